//! How kernels are written: a [`Builder`] collects instructions, a [`Reg`] is a typed register
//! that the usual operators work on.
//!
//! In: calls from `tile` and `kernels`, in the order in which a thread runs them. Out: a
//! [`Kernel`]. Every instruction keeps the place in Rust source that asked for it, so a fault
//! found by the emulator points into the kernel's own lines.
//!
//! ```
//! use flex_block_attn_ptx::{Builder, Kernel};
//!
//! let kernel: Kernel = Builder::kernel("axpy", 128, |k| {
//!     let (x, y) = (k.param::<u64>("x"), k.param::<u64>("y"));
//!     let (a, n) = (k.param::<f32>("a"), k.param::<u32>("n"));
//!     let i = k.cta_x() * 128 + k.tid();
//!     k.if_(i.lt(n), || {
//!         let (x, y) = (x + i.times_wide(4), y + i.times_wide(4));
//!         let sum = k.load_global::<f32>(x.at(0)).fma(a, k.load_global::<f32>(y.at(0)));
//!         k.store_global(y.at(0), sum);
//!     });
//! });
//! assert_eq!(kernel.params.len(), 4);
//! ```
//!
//! A [`Reg`] is a register, as in PTX, not a value: after [`Reg::set`] all its copies read the new
//! contents. Operators make new registers, so only what is `set` or assigned by `+=` and its kin
//! ever changes.

mod copies;
mod memory;
mod mma;
mod sync;
mod values;

use std::cell::RefCell;
use std::marker::PhantomData;
use std::panic::Location;

use crate::ir::{Block, Guard, Inst, Kernel, Node, Op, Operand, Param, ParamKind, RegId, Special};
use crate::{Class, Scalar, Ty};

pub use copies::TmaOptions;
pub use memory::{Address, AddressOf};
pub use mma::A;

/// Collects one kernel. Shared references suffice for all calls, so that registers can carry one.
#[derive(Debug)]
pub struct Builder {
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    kernel: Kernel,
    /// Blocks that are open, innermost last; the first is the kernel's body.
    open: Vec<Block>,
    /// What instructions are guarded by at the moment.
    guard: Option<Guard>,
}

/// A register that holds a `T`: `u32`, `i32`, `u64`, `u16`, `f32` or, for predicates, `bool`.
#[derive(Debug)]
pub struct Reg<'k, T> {
    builder: &'k Builder,
    id: RegId,
    holds: PhantomData<T>,
}

impl<T> Clone for Reg<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Reg<'_, T> {}

/// A register or a constant: what instructions take as a `T`.
pub trait Value<T: Scalar> {
    /// As the instruction's operand.
    fn operand(self) -> Operand;
}

impl<T: Scalar> Value<T> for Reg<'_, T> {
    fn operand(self) -> Operand {
        Operand::Reg(self.id)
    }
}

impl<T: Scalar> Value<T> for T {
    fn operand(self) -> Operand {
        Operand::Imm(self.bits())
    }
}

/// A loop under construction: what leaves it.
#[derive(Debug, Clone, Copy)]
pub struct Leave<'k> {
    builder: &'k Builder,
    id: u32,
}

impl Leave<'_> {
    /// Leaves the loop if `cond` holds.
    #[track_caller]
    pub fn when(&self, cond: Reg<'_, bool>) {
        self.break_(Some(cond.holds()));
    }

    /// Leaves the loop.
    #[track_caller]
    pub fn now(&self) {
        self.break_(None);
    }

    #[track_caller]
    fn break_(&self, cond: Option<Guard>) {
        let at = Location::caller();
        self.builder.push(Node::Break {
            id: self.id,
            cond,
            at,
        });
    }
}

impl Builder {
    /// A kernel for thread blocks of `threads` threads, of what `body` does.
    pub fn kernel(name: impl Into<String>, threads: u32, body: impl FnOnce(&Builder)) -> Kernel {
        let builder = Self {
            state: RefCell::new(State {
                kernel: Kernel {
                    name: name.into(),
                    params: Vec::new(),
                    threads,
                    cluster: 1,
                    min_blocks: 1,
                    shared_bytes: 0,
                    registers: Vec::new(),
                    loops: 0,
                    body: Vec::new(),
                },
                open: vec![Vec::new()],
                guard: None,
            }),
        };
        body(&builder);
        let mut state = builder.state.into_inner();
        state.kernel.body = state
            .open
            .pop()
            .expect("the body is open from start to end");
        state.kernel
    }

    // ---- the kernel ----------------------------------------------------------------------------

    /// Launches it in clusters of `blocks` thread blocks along x.
    pub fn set_cluster(&self, blocks: u32) {
        self.state.borrow_mut().kernel.cluster = blocks;
    }

    /// Thread blocks of a cluster, as far as they are set.
    pub fn cluster(&self) -> u32 {
        self.state.borrow().kernel.cluster
    }

    /// Has ptxas choose registers so that `blocks` thread blocks fit on a multiprocessor.
    pub fn set_min_blocks(&self, blocks: u32) {
        self.state.borrow_mut().kernel.min_blocks = blocks;
    }

    /// Gives it `bytes` of shared memory.
    pub fn set_shared_bytes(&self, bytes: u32) {
        self.state.borrow_mut().kernel.shared_bytes = bytes;
    }

    /// Threads of a thread block.
    pub fn threads(&self) -> u32 {
        self.state.borrow().kernel.threads
    }

    /// Declares a parameter and loads it.
    #[track_caller]
    pub fn param<T: Scalar>(&self, name: &str) -> Reg<'_, T> {
        let param = self.declare(name, ParamKind::Scalar(T::TY));
        self.write(|dst| Op::Param {
            ty: T::TY,
            dst,
            param,
        })
    }

    /// Declares a tensor map; the address is for copies only.
    #[track_caller]
    pub fn tensor_map(&self, name: &str) -> Reg<'_, u64> {
        let param = self.declare(name, ParamKind::TensorMap);
        self.write(|dst| Op::ParamAddress { dst, param })
    }

    fn declare(&self, name: &str, kind: ParamKind) -> u32 {
        let params = &mut self.state.borrow_mut().kernel.params;
        params.push(Param {
            name: name.to_owned(),
            kind,
        });
        params.len() as u32 - 1
    }

    // ---- control flow --------------------------------------------------------------------------

    /// Does `then` in lanes where `cond` holds.
    #[track_caller]
    pub fn if_(&self, cond: Reg<'_, bool>, then: impl FnOnce()) {
        self.branch(cond.holds(), then, || {});
    }

    /// Does `then` in lanes where `cond` does not hold.
    #[track_caller]
    pub fn if_not(&self, cond: Reg<'_, bool>, then: impl FnOnce()) {
        self.branch(cond.fails(), then, || {});
    }

    /// Does `then` in lanes where `cond` holds, `otherwise` in the others.
    #[track_caller]
    pub fn if_else(&self, cond: Reg<'_, bool>, then: impl FnOnce(), otherwise: impl FnOnce()) {
        self.branch(cond.holds(), then, otherwise);
    }

    #[track_caller]
    fn branch(&self, cond: Guard, then: impl FnOnce(), otherwise: impl FnOnce()) {
        let at = Location::caller();
        let (then, otherwise) = (self.collect(then), self.collect(otherwise));
        self.push(Node::If {
            cond,
            then,
            otherwise,
            at,
        });
    }

    /// Repeats `body` until what it is given leaves the loop.
    #[track_caller]
    pub fn loop_<'k>(&'k self, body: impl FnOnce(Leave<'k>)) {
        let at = Location::caller();
        let id = {
            let loops = &mut self.state.borrow_mut().kernel.loops;
            *loops += 1;
            *loops - 1
        };
        let body = self.collect(|| body(Leave { builder: self, id }));
        self.push(Node::Loop { id, body, at });
    }

    /// Does `body` with a counter that runs from `start` to `end`, which is not reached, by `step`.
    #[track_caller]
    pub fn for_<'k>(
        &'k self,
        start: impl Value<u32>,
        end: impl Value<u32> + Copy,
        step: impl Value<u32> + Copy,
        body: impl FnOnce(Reg<'k, u32>),
    ) {
        let counter = self.var::<u32>(start);
        self.loop_(|leave| {
            leave.when(counter.ge(end));
            body(counter);
            counter.set(counter + step);
        });
    }

    /// Guards each instruction of `body` by `cond`: for a few stores or arrivals, where a branch
    /// would cost more. It may hold no control flow.
    ///
    /// # Panics
    /// If `body` is itself inside of such a body.
    pub fn where_(&self, cond: Reg<'_, bool>, body: impl FnOnce()) {
        let before = self.state.borrow_mut().guard.replace(cond.holds());
        assert!(before.is_none(), "an instruction can have one guard only");
        body();
        self.state.borrow_mut().guard = None;
    }

    fn collect(&self, body: impl FnOnce()) -> Block {
        self.state.borrow_mut().open.push(Vec::new());
        body();
        self.state.borrow_mut().open.pop().expect("pushed above")
    }

    // ---- registers and instructions ------------------------------------------------------------

    /// A register with `value` in it.
    #[track_caller]
    pub fn var<T: Scalar>(&self, value: impl Value<T>) -> Reg<'_, T> {
        let src = value.operand();
        self.write(|dst| Op::Mov {
            ty: T::TY,
            dst,
            src,
        })
    }

    /// A register with nothing in it, to be written before it is read.
    pub fn uninit<T: Scalar>(&self) -> Reg<'_, T> {
        let id = self.register(T::TY.class());
        self.reg(id)
    }

    /// Thread in the thread block.
    #[track_caller]
    pub fn tid(&self) -> Reg<'_, u32> {
        self.special(Special::TidX)
    }

    /// Lane in the warp.
    #[track_caller]
    pub fn lane(&self) -> Reg<'_, u32> {
        self.special(Special::LaneId)
    }

    /// Thread block in the grid, along x.
    #[track_caller]
    pub fn cta_x(&self) -> Reg<'_, u32> {
        self.special(Special::CtaIdX)
    }

    /// Thread block in the grid, along y.
    #[track_caller]
    pub fn cta_y(&self) -> Reg<'_, u32> {
        self.special(Special::CtaIdY)
    }

    /// Thread block in the grid, along z.
    #[track_caller]
    pub fn cta_z(&self) -> Reg<'_, u32> {
        self.special(Special::CtaIdZ)
    }

    /// Thread blocks of the grid, along x.
    #[track_caller]
    pub fn grid_x(&self) -> Reg<'_, u32> {
        self.special(Special::GridX)
    }

    /// Any special register.
    #[track_caller]
    pub fn special(&self, which: Special) -> Reg<'_, u32> {
        self.write(|dst| Op::Special { dst, which })
    }

    /// Where the thread block's shared memory starts. In a cluster the top byte is the block's rank.
    #[track_caller]
    pub fn shared_base(&self) -> Reg<'_, u32> {
        self.write(|dst| Op::SharedBase { dst })
    }

    /// Appends an instruction.
    #[track_caller]
    pub fn emit(&self, op: Op) {
        let guard = self.state.borrow().guard;
        self.push(Node::Inst(Inst {
            guard,
            op,
            at: Location::caller(),
        }));
    }

    /// Appends an instruction for lanes where `cond` holds.
    #[track_caller]
    fn emit_where(&self, cond: Reg<'_, bool>, op: Op) {
        let guarded = self.state.borrow().guard.is_some();
        assert!(!guarded, "an instruction can have one guard only");
        self.push(Node::Inst(Inst {
            guard: Some(cond.holds()),
            op,
            at: Location::caller(),
        }));
    }

    /// Appends an instruction that writes a new register.
    #[track_caller]
    fn write<T: Scalar>(&self, op: impl FnOnce(RegId) -> Op) -> Reg<'_, T> {
        let id = self.register(T::TY.class());
        self.emit(op(id));
        self.reg(id)
    }

    fn register(&self, class: Class) -> RegId {
        let registers = &mut self.state.borrow_mut().kernel.registers;
        registers.push(class);
        RegId(registers.len() as u32 - 1)
    }

    fn reg<T>(&self, id: RegId) -> Reg<'_, T> {
        Reg {
            builder: self,
            id,
            holds: PhantomData,
        }
    }

    #[track_caller]
    fn push(&self, node: Node) {
        let mut state = self.state.borrow_mut();
        let inst = matches!(node, Node::Inst(_));
        assert!(
            inst || state.guard.is_none(),
            "no control flow under a guard"
        );
        state.open.last_mut().expect("the body is open").push(node);
    }
}

impl<'k, T> Reg<'k, T> {
    /// Its number in the kernel.
    pub fn id(self) -> RegId {
        self.id
    }

    /// The builder it belongs to.
    pub fn builder(self) -> &'k Builder {
        self.builder
    }
}

impl<'k> Reg<'k, bool> {
    fn holds(self) -> Guard {
        Guard {
            pred: self.id,
            negated: false,
        }
    }

    fn fails(self) -> Guard {
        Guard {
            pred: self.id,
            negated: true,
        }
    }
}

/// The type of packed pairs in a `u32` register, for [`Reg::packed_fma`] and its kin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pair {
    /// Two bfloat16.
    Bf16,
    /// Two float16.
    F16,
}

impl Pair {
    fn ty(self) -> Ty {
        match self {
            Self::Bf16 => Ty::Bf16x2,
            Self::F16 => Ty::F16x2,
        }
    }
}
