//! Ways to change a kernel: instructions taken out, replaced, moved, wrapped in branches.
//!
//! In: a kernel, which instructions, and how. Out: the number of places changed, 0 if there is no
//! such instruction. Instructions are counted in the order of the body.

use std::panic::Location;

use flex_block_attn_ptx::Class;
use flex_block_attn_ptx::Ty;
use flex_block_attn_ptx::ir::{
    Address, Binary, Block, Cmp, Guard, Inst, Kernel, MatrixA, Node, Op, Operand, RegId, Special,
};

use crate::trace::{address, from_base};

/// Which of the instructions that match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    All,
    Nth(usize),
    /// Those from one on, up to another, which is not among them.
    Within(usize, usize),
}

/// A test of an instruction, as a closure.
macro_rules! op {
    ($pattern:pat $(if $guard:expr)?) => {
        |op: &Op| matches!(op, $pattern $(if $guard)?)
    };
}
pub(crate) use op;

impl Which {
    fn takes(self, index: usize) -> bool {
        match self {
            Self::All => true,
            Self::Nth(nth) => nth == index,
            Self::Within(first, end) => (first..end).contains(&index),
        }
    }
}

/// Calls `f` for each block of statements, inner ones first.
fn blocks(block: &mut Block, f: &mut dyn FnMut(&mut Block)) {
    for node in &mut *block {
        match node {
            Node::Inst(_) | Node::Break { .. } => {}
            Node::If {
                then, otherwise, ..
            } => {
                blocks(then, f);
                blocks(otherwise, f);
            }
            Node::Loop { body, .. } => blocks(body, f),
        }
    }
    f(block);
}

/// Calls `f` for each instruction, in order.
fn instructions(block: &Block, f: &mut dyn FnMut(&Inst)) {
    for node in block {
        match node {
            Node::Inst(inst) => f(inst),
            Node::Break { .. } => {}
            Node::If {
                then, otherwise, ..
            } => {
                instructions(then, f);
                instructions(otherwise, f);
            }
            Node::Loop { body, .. } => instructions(body, f),
        }
    }
}

/// All instructions, in order.
pub fn all(kernel: &Kernel) -> Vec<Inst> {
    let mut all = Vec::new();
    instructions(&kernel.body, &mut |inst| all.push(inst.clone()));
    all
}

/// Puts what `f` returns in the place of instructions.
pub fn rewrite(
    kernel: &mut Kernel,
    which: Which,
    matches: impl Fn(&Op) -> bool,
    mut f: impl FnMut(Inst) -> Vec<Node>,
) -> usize {
    fn walk(block: &mut Block, f: &mut dyn FnMut(Inst) -> Vec<Node>) {
        for node in std::mem::take(block) {
            match node {
                Node::Inst(inst) => block.extend(f(inst)),
                Node::Break { .. } => block.push(node),
                Node::If {
                    cond,
                    mut then,
                    mut otherwise,
                    at,
                } => {
                    walk(&mut then, f);
                    walk(&mut otherwise, f);
                    block.push(Node::If {
                        cond,
                        then,
                        otherwise,
                        at,
                    });
                }
                Node::Loop { id, mut body, at } => {
                    walk(&mut body, f);
                    block.push(Node::Loop { id, body, at });
                }
            }
        }
    }
    let (mut seen, mut edits) = (0, 0);
    walk(&mut kernel.body, &mut |inst| {
        if !matches(&inst.op) {
            return vec![Node::Inst(inst)];
        }
        seen += 1;
        if !which.takes(seen - 1) {
            return vec![Node::Inst(inst)];
        }
        edits += 1;
        f(inst)
    });
    edits
}

/// Takes instructions out.
pub fn remove(kernel: &mut Kernel, which: Which, matches: impl Fn(&Op) -> bool) -> usize {
    rewrite(kernel, which, matches, |_| Vec::new())
}

/// Executes instructions twice.
pub fn double(kernel: &mut Kernel, which: Which, matches: impl Fn(&Op) -> bool) -> usize {
    rewrite(kernel, which, matches, |inst| {
        vec![Node::Inst(inst.clone()), Node::Inst(inst)]
    })
}

/// Changes instructions in place.
pub fn change(
    kernel: &mut Kernel,
    which: Which,
    matches: impl Fn(&Op) -> bool,
    mut f: impl FnMut(&mut Op),
) -> usize {
    rewrite(kernel, which, matches, |mut inst| {
        f(&mut inst.op);
        vec![Node::Inst(inst)]
    })
}

/// Lets all lanes execute instructions that some are guarded from.
pub fn unguard(kernel: &mut Kernel, which: Which, matches: impl Fn(&Op) -> bool) -> usize {
    rewrite(kernel, which, matches, |inst| {
        vec![Node::Inst(Inst {
            guard: None,
            ..inst
        })]
    })
}

/// The registers that an instruction accesses memory by, or reads for the one that does.
fn needs(inst: &Inst) -> Vec<RegId> {
    let mut needs: Vec<_> = inst.guard.iter().map(|guard| guard.pred).collect();
    needs.extend(address(&inst.op).map(|address| address.base));
    if let Op::Binary { a, b, .. } = inst.op {
        let registers = [a, b].into_iter().filter_map(|operand| match operand {
            Operand::Reg(register) => Some(register),
            Operand::Imm(_) => None,
        });
        needs.extend(registers);
    }
    needs
}

/// Moves every instruction of one sort to just before the nearest earlier one of another sort in
/// the same block. What lies between and computes its address moves, too.
pub fn move_before(
    kernel: &mut Kernel,
    moved: impl Fn(&Op) -> bool,
    anchor: impl Fn(&Op) -> bool,
) -> usize {
    let is = |node: &Node, test: &dyn Fn(&Op) -> bool| matches!(node, Node::Inst(inst) if test(&inst.op));
    let mut edits = 0;
    blocks(&mut kernel.body, &mut |block| {
        for i in 0..block.len() {
            if !is(&block[i], &moved) {
                continue;
            }
            let Some(to) = (0..i).rev().find(|&j| is(&block[j], &anchor)) else {
                continue;
            };
            let mut needed = Vec::new();
            let (mut moved, mut kept) = (Vec::new(), Vec::new());
            for (k, node) in block.drain(to..=i).enumerate().rev() {
                let taken = match &node {
                    Node::Inst(inst) if to + k == i => Some(inst),
                    Node::Inst(inst) => Some(inst).filter(
                        |inst| matches!(inst.op, Op::Binary { dst, .. } if needed.contains(&dst)),
                    ),
                    _ => None,
                };
                match taken {
                    Some(inst) => {
                        needed.extend(needs(inst));
                        moved.push(node);
                    }
                    None => kept.push(node),
                }
            }
            let between = moved.into_iter().rev().chain(kept.into_iter().rev());
            let behind = block.split_off(to);
            block.extend(between.chain(behind));
            edits += 1;
        }
    });
    edits
}

/// Whether an instruction that matches is directly in a block, not in a branch or loop of it.
fn holds(block: &Block, matches: &dyn Fn(&Op) -> bool) -> bool {
    block
        .iter()
        .any(|node| matches!(node, Node::Inst(inst) if matches(&inst.op)))
}

/// Whether a node is a branch with such an instruction in it.
fn branches(node: &Node, matches: &dyn Fn(&Op) -> bool) -> bool {
    matches!(node, Node::If { then, otherwise, .. } if otherwise.is_empty() && holds(then, matches))
}

/// Takes branches away around instructions that match: `if c { body }` becomes `body`.
pub fn unbranch(kernel: &mut Kernel, matches: impl Fn(&Op) -> bool) -> usize {
    // Outer ones first: those around inner ones that are taken away stay.
    fn walk(block: &mut Block, matches: &dyn Fn(&Op) -> bool) -> usize {
        let mut edits = 0;
        for mut node in std::mem::take(block) {
            let taken = branches(&node, matches);
            match &mut node {
                Node::Inst(_) | Node::Break { .. } => {}
                Node::If {
                    then, otherwise, ..
                } => edits += walk(then, matches) + walk(otherwise, matches),
                Node::Loop { body, .. } => edits += walk(body, matches),
            }
            match node {
                Node::If { then, .. } if taken => {
                    edits += 1;
                    block.extend(then);
                }
                _ => block.push(node),
            }
        }
        edits
    }
    walk(&mut kernel.body, &matches)
}

/// Moves every instruction of one sort to just behind the nearest later branch around one of another
/// sort, in the same block.
pub fn move_behind_branch(
    kernel: &mut Kernel,
    moved: impl Fn(&Op) -> bool,
    within: impl Fn(&Op) -> bool,
) -> usize {
    let mut edits = 0;
    blocks(&mut kernel.body, &mut |block| {
        for i in (0..block.len()).rev() {
            if !matches!(&block[i], Node::Inst(inst) if moved(&inst.op)) {
                continue;
            }
            if let Some(to) = (i..block.len()).find(|&j| branches(&block[j], &within)) {
                block[i..=to].rotate_left(1);
                edits += 1;
            }
        }
    });
    edits
}

/// Moves branches around instructions that match to the end of the block that they are in.
pub fn postpone(kernel: &mut Kernel, matches: impl Fn(&Op) -> bool) -> usize {
    let mut edits = 0;
    blocks(&mut kernel.body, &mut |block| {
        let is = |node: &Node| branches(node, &matches);
        let (moved, mut rest): (Vec<_>, Vec<_>) = std::mem::take(block).into_iter().partition(is);
        edits += moved.len();
        rest.extend(moved);
        *block = rest;
    });
    edits
}

/// Takes out, behind every instruction of one sort, the nearest of another sort in the same block.
pub fn remove_behind(
    kernel: &mut Kernel,
    anchor: impl Fn(&Op) -> bool,
    removed: impl Fn(&Op) -> bool,
) -> usize {
    change_behind(kernel, anchor, removed, |_| None)
}

/// Puts what `f` returns in the place of such instructions.
pub fn change_behind(
    kernel: &mut Kernel,
    anchor: impl Fn(&Op) -> bool,
    changed: impl Fn(&Op) -> bool,
    mut f: impl FnMut(Op) -> Option<Op>,
) -> usize {
    let mut edits = 0;
    blocks(&mut kernel.body, &mut |block| {
        let mut due = false;
        for node in std::mem::take(block) {
            match node {
                Node::Inst(inst) if due && changed(&inst.op) => {
                    due = false;
                    edits += 1;
                    block.extend(f(inst.op.clone()).map(|op| Node::Inst(Inst { op, ..inst })));
                }
                Node::Inst(inst) => {
                    due |= anchor(&inst.op);
                    block.push(Node::Inst(inst));
                }
                _ => block.push(node),
            }
        }
    });
    edits
}

/// Lets only threads whose index compares so with `bound` execute instructions.
pub fn only_threads(
    kernel: &mut Kernel,
    which: Which,
    matches: impl Fn(&Op) -> bool,
    cmp: Cmp,
    bound: u64,
) -> usize {
    let mut fresh = |class| {
        kernel.registers.push(class);
        RegId(kernel.registers.len() as u32 - 1)
    };
    let (tid, pred) = (fresh(Class::B32), fresh(Class::Pred));
    rewrite(kernel, which, matches, |inst| {
        let at = inst.at;
        let plain = |op| {
            Node::Inst(Inst {
                guard: None,
                op,
                at,
            })
        };
        vec![
            plain(Op::Special {
                dst: tid,
                which: Special::TidX,
            }),
            plain(Op::Compare {
                cmp,
                ty: Ty::U32,
                dst: pred,
                a: Operand::Reg(tid),
                b: Operand::Imm(bound),
            }),
            Node::If {
                cond: Guard {
                    pred,
                    negated: false,
                },
                then: vec![Node::Inst(inst)],
                otherwise: Vec::new(),
                at,
            },
        ]
    })
}

/// An instruction without a guard, at the place of the mutation.
#[track_caller]
pub fn plain(op: Op) -> Node {
    Node::Inst(Inst {
        guard: None,
        op,
        at: Location::caller(),
    })
}

/// The address of the mbarrier that is initialised `nth`.
pub fn barrier(kernel: &Kernel, nth: usize) -> Address {
    let address = |inst: &Inst| match inst.op {
        Op::MbarrierInit { address, .. } => Some(address),
        _ => None,
    };
    all(kernel)
        .iter()
        .filter_map(address)
        .nth(nth)
        .expect("kernels initialise their mbarriers")
}

/// A test for addresses of that mbarrier, or of some that it is the first of, chosen at run time.
fn of_barrier(kernel: &Kernel, nth: usize) -> impl Fn(&Address) -> bool + use<> {
    let first = barrier(kernel, nth);
    let bases = from_base(kernel, first.base);
    move |address| address.offset == first.offset && bases.contains(&address.base)
}

/// A test for waits on the mbarrier that is initialised `nth`, and those chosen with it.
pub fn waits_on(kernel: &Kernel, nth: usize) -> impl Fn(&Op) -> bool + use<> {
    let is = of_barrier(kernel, nth);
    move |op| matches!(op, Op::MbarrierWait { address, .. } if is(address))
}

/// A test for plain arrivals on it.
pub fn arrives_on(kernel: &Kernel, nth: usize) -> impl Fn(&Op) -> bool + use<> {
    let is = of_barrier(kernel, nth);
    move |op| matches!(op, Op::MbarrierArrive { address, .. } if is(address))
}

/// A test for arrivals on it that announce bytes.
pub fn expects_on(kernel: &Kernel, nth: usize) -> impl Fn(&Op) -> bool + use<> {
    let is = of_barrier(kernel, nth);
    move |op| matches!(op, Op::MbarrierArriveExpect { address, .. } if is(address))
}

/// A test for its initialisation.
pub fn inits(kernel: &Kernel, nth: usize) -> impl Fn(&Op) -> bool + use<> {
    let at = barrier(kernel, nth).offset;
    move |op| matches!(op, Op::MbarrierInit { address, .. } if address.offset == at)
}

/// Puts what `op` makes of an operand and a value in that operand's place.
pub fn computed(
    kernel: &mut Kernel,
    which: Which,
    matches: impl Fn(&Op) -> bool,
    (op, value): (Binary, Operand),
    operand: impl Fn(&mut Op) -> Option<&mut Operand>,
) -> usize {
    kernel.registers.push(Class::B32);
    let dst = RegId(kernel.registers.len() as u32 - 1);
    rewrite(kernel, which, matches, |mut inst| {
        let operand = operand(&mut inst.op).expect("the instruction has it");
        let a = std::mem::replace(operand, Operand::Reg(dst));
        let (ty, b) = (Ty::U32, value);
        vec![plain(Op::Binary { op, ty, dst, a, b }), Node::Inst(inst)]
    })
}

/// Lets waits be for the other parity.
pub fn other_parity(kernel: &mut Kernel, waits: impl Fn(&Op) -> bool) -> usize {
    let flip = (Binary::Xor, Operand::Imm(1));
    computed(kernel, Which::All, waits, flip, |op| match op {
        Op::MbarrierWait { parity, .. } => Some(parity),
        _ => None,
    })
}

/// A test for what toggles a bit of a role's parities.
pub fn toggles(op: &Op) -> bool {
    matches!(
        op,
        Op::Binary { op: Binary::Xor, dst, a: Operand::Reg(a), b: Operand::Imm(bit), .. }
            if dst == a && bit.is_power_of_two()
    )
}

/// The register that holds a parameter.
pub fn param(kernel: &Kernel, name: &str) -> Operand {
    let index = kernel.params.iter().position(|param| param.name == name);
    let register = all(kernel).iter().find_map(|inst| match inst.op {
        Op::Param { dst, param, .. } if Some(param as usize) == index => Some(dst),
        _ => None,
    });
    Operand::Reg(register.expect("the kernel reads it"))
}

/// Which operand of a wgmma.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    A,
    B,
}

/// Changes the constants in the low words of the descriptors of those wgmmas that `of` accepts.
pub fn descriptors(
    kernel: &mut Kernel,
    side: Side,
    of: impl Fn(&Op) -> bool,
    f: impl Fn(u64) -> u64,
) -> usize {
    let all = all(kernel);
    let descriptor = |inst: &Inst| match (&inst.op, side) {
        (
            Op::Wgmma {
                a: MatrixA::Shared { descriptor, .. },
                ..
            },
            Side::A,
        ) if of(&inst.op) => Some(*descriptor),
        (Op::Wgmma { b, .. }, Side::B) if of(&inst.op) => Some(*b),
        _ => None,
    };
    let descriptors: Vec<Operand> = all.iter().filter_map(descriptor).collect();
    let low = |inst: &Inst| match inst.op {
        Op::Join { dst, low, .. } if descriptors.contains(&Operand::Reg(dst)) => Some(low),
        _ => None,
    };
    let lows: Vec<Operand> = all.iter().filter_map(low).collect();
    change(
        kernel,
        Which::All,
        |op| matches!(op, Op::Binary { dst, b: Operand::Imm(_), .. } if lows.contains(&Operand::Reg(*dst))),
        |op| {
            if let Op::Binary {
                b: Operand::Imm(bits),
                ..
            } = op
            {
                *bits = f(*bits);
            }
        },
    )
}
