//! Every instruction in every form, as small kernels: one [`Case`] for each group.
//!
//! Made by hand, without the builder. Read by the expectations of the printed text and the
//! verifier's tests in this crate, and by the assembling test of `lab`.

#![allow(missing_docs)]

use std::panic::Location;

use flex_block_attn_ptx::ir::*;
use flex_block_attn_ptx::operands::Use;
use flex_block_attn_ptx::{Class, Element, Ty};

mod copies;
mod memory;
pub mod structure;
mod sync;
mod values;

/// Instructions that belong together, and a kernel of them.
pub struct Case {
    /// Their name, and the kernel's.
    pub name: &'static str,
    /// The instructions.
    pub ops: Vec<Op>,
    /// A kernel that makes what they read, runs them, and stores what they wrote.
    pub kernel: Kernel,
}

/// The kernels of all cases, and those of [`structure`].
pub fn kernels() -> Vec<Kernel> {
    cases()
        .into_iter()
        .map(|case| case.kernel)
        .chain(structure::kernels())
        .collect()
}

/// All groups.
pub fn cases() -> Vec<Case> {
    [
        values::cases(),
        memory::cases(),
        sync::cases(),
        copies::cases(),
    ]
    .concat()
    .into_iter()
    .map(case)
    .collect()
}

fn case((name, ops): (&'static str, Vec<Op>)) -> Case {
    let kernel = around(name, &ops);
    Case { name, ops, kernel }
}

/// Registers of each class that the instructions may name.
const EACH: u32 = 256;
const CLASSES: [Class; 5] = [Class::Pred, Class::B16, Class::B32, Class::B64, Class::F32];

/// Predicate `n`.
pub fn p(n: u32) -> RegId {
    RegId(n)
}

/// 16-bit register `n`.
pub fn h(n: u32) -> RegId {
    RegId(EACH + n)
}

/// 32-bit register `n`.
pub fn r(n: u32) -> RegId {
    RegId(2 * EACH + n)
}

/// 64-bit register `n`.
pub fn d(n: u32) -> RegId {
    RegId(3 * EACH + n)
}

/// float32 register `n`.
pub fn f(n: u32) -> RegId {
    RegId(4 * EACH + n)
}

/// A register of the class that `ty` needs.
pub fn of(ty: Ty, n: u32) -> RegId {
    match ty.class() {
        Class::Pred => p(n),
        Class::B16 => h(n),
        Class::B32 => r(n),
        Class::B64 => d(n),
        Class::F32 => f(n),
    }
}

pub fn reg(register: RegId) -> Operand {
    Operand::Reg(register)
}

pub fn imm(value: u64) -> Operand {
    Operand::Imm(value)
}

pub fn at(base: RegId, offset: i32) -> Address {
    Address { base, offset }
}

#[track_caller]
pub fn inst(op: Op) -> Inst {
    Inst {
        guard: None,
        op,
        at: Location::caller(),
    }
}

/// A constant that every type of this class can hold, and that floats can, too.
pub fn constant(ty: Ty) -> Operand {
    imm(match ty {
        Ty::Pred => 1,
        Ty::F32 => 0x3fc0_0000,
        Ty::S16 => 0xfffd,
        Ty::S32 => 0xffff_fffd,
        Ty::S64 => -3_i64 as u64,
        Ty::B32 => 0xdead_beef,
        Ty::Bf16x2 => 0x3f80_3f80,
        Ty::F16x2 => 0x3c00_3c00,
        _ => 3,
    })
}

/// A kernel without instructions that has all registers, a pointer (64 bits), a word and a
/// tensor map as parameters.
pub fn empty(name: &str) -> Kernel {
    let param = |name: &str, kind| Param {
        name: name.into(),
        kind,
    };
    Kernel {
        name: name.into(),
        params: vec![
            param("out", ParamKind::Scalar(Ty::U64)),
            param("n", ParamKind::Scalar(Ty::U32)),
            param("scale", ParamKind::Scalar(Ty::F32)),
            param("map", ParamKind::TensorMap),
        ],
        threads: 128,
        cluster: 1,
        min_blocks: 1,
        shared_bytes: 4096,
        registers: CLASSES
            .into_iter()
            .flat_map(|class| [class; EACH as usize])
            .collect(),
        loops: 0,
        body: Vec::new(),
    }
}

/// What gives a register something that ptxas cannot know beforehand.
fn source(register: RegId) -> Vec<Op> {
    let word = r(EACH - 1);
    let thread = Op::Special {
        dst: word,
        which: Special::TidX,
    };
    match register.0 / EACH {
        0 => vec![
            thread,
            Op::Compare {
                cmp: Cmp::Lt,
                ty: Ty::U32,
                dst: register,
                a: reg(word),
                b: imm(64),
            },
        ],
        1 => vec![
            thread,
            Op::Convert {
                to: Ty::U16,
                from: Ty::U32,
                dst: register,
                src: reg(word),
            },
        ],
        2 => vec![Op::Param {
            ty: Ty::U32,
            dst: register,
            param: 1,
        }],
        3 => vec![Op::Param {
            ty: Ty::U64,
            dst: register,
            param: 0,
        }],
        _ => vec![Op::Param {
            ty: Ty::F32,
            dst: register,
            param: 2,
        }],
    }
}

/// What makes a register matter.
fn sink(register: RegId) -> Vec<Op> {
    let (out, word) = (at(d(EACH - 1), 8 * (register.0 % EACH) as i32), r(EACH - 1));
    let store = |ty, src| Op::Store {
        space: Space::Global,
        ty,
        src: vec![reg(src)],
        address: out,
    };
    match register.0 / EACH {
        0 => vec![
            Op::Select {
                ty: Ty::U32,
                dst: word,
                a: imm(1),
                b: imm(0),
                cond: register,
            },
            store(Ty::U32, word),
        ],
        1 => vec![store(Ty::U16, register)],
        2 => vec![store(Ty::U32, register)],
        3 => vec![store(Ty::U64, register)],
        _ => vec![store(Ty::F32, register)],
    }
}

/// A kernel of these instructions, with what they need before and after.
pub fn around(name: &str, ops: &[Op]) -> Kernel {
    let (mut known, mut before, mut after) = (vec![d(EACH - 1)], source(d(EACH - 1)), Vec::new());
    for op in ops {
        op.visit(&mut |used| match used {
            Use::Read(register, _) if !known.contains(&register) => {
                known.push(register);
                before.extend(source(register));
            }
            Use::Write(register, _) => {
                known.push(register);
                after.extend(sink(register));
            }
            Use::Read(..) | Use::Constant(..) => {}
        });
    }
    let mut kernel = empty(name);
    let all = before.into_iter().chain(ops.iter().cloned()).chain(after);
    kernel.body = all.map(inst).map(Node::Inst).collect();
    kernel
}
