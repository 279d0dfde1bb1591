//! What operands are computed from: barriers and tiles that are chosen at run time, and the turns that
//! choose them.
//!
//! A place that a turn chooses is at `[base + stage * bytes + offset]`, where `stage` is some bits of the
//! turn, and `offset` is that of the first such place. Its parity is the bit above them.

use std::collections::BTreeSet;

use flex_block_attn_ptx::ir::{Address, Binary, Kernel, Op, Operand, RegId};

use crate::edit::Which::All;
use crate::edit::{Which, all, change, computed};

/// The address that an instruction accesses, if it is in a register and a constant.
pub fn address(op: &Op) -> Option<Address> {
    match *op {
        Op::Load { address, .. }
        | Op::Store { address, .. }
        | Op::MbarrierInit { address, .. }
        | Op::MbarrierArrive { address, .. }
        | Op::MbarrierArriveExpect { address, .. }
        | Op::MbarrierWait { address, .. } => Some(address),
        Op::TmaLoad { dst, .. } => Some(dst),
        _ => None,
    }
}

/// `base`, and registers that hold something added to it.
pub fn from_base(kernel: &Kernel, base: RegId) -> BTreeSet<RegId> {
    let mut found = BTreeSet::from([base]);
    for inst in all(kernel) {
        if let Op::Binary {
            op: Binary::Add,
            dst,
            a: Operand::Reg(a),
            ..
        } = inst.op
            && found.contains(&a)
        {
            found.insert(dst);
        }
    }
    found
}

/// A test for the results of `op` that are among some registers.
pub fn results(among: Vec<RegId>, op: Binary) -> impl Fn(&Op) -> bool {
    move |it| matches!(it, Op::Binary { op: is, dst, .. } if *is == op && among.contains(dst))
}

/// Registers among the operands that `pick` finds in instructions.
pub fn operands(kernel: &Kernel, pick: impl Fn(&Op) -> Vec<Operand>) -> Vec<RegId> {
    let register = |operand| match operand {
        Operand::Reg(register) => Some(register),
        Operand::Imm(_) => None,
    };
    let picked = all(kernel).into_iter().flat_map(|inst| pick(&inst.op));
    picked.filter_map(register).collect()
}

/// What the results of `op` among some registers are computed from.
pub fn sources(kernel: &Kernel, among: Vec<RegId>, op: Binary) -> Vec<RegId> {
    let is = results(among, op);
    operands(kernel, |it| match *it {
        Op::Binary { a, b, .. } if is(it) => vec![a, b],
        _ => Vec::new(),
    })
}

/// Registers that say how far behind the first place instructions access one.
fn distances(kernel: &Kernel, accesses: impl Fn(&Op) -> bool) -> Vec<RegId> {
    let bases = operands(kernel, |op| {
        let address = address(op).filter(|_| accesses(op));
        address
            .map(|at| Operand::Reg(at.base))
            .into_iter()
            .collect()
    });
    sources(kernel, bases, Binary::Add)
}

/// Has accesses be to the place beside the one whose turn it is.
pub fn other_stage(kernel: &mut Kernel, which: Which, accesses: impl Fn(&Op) -> bool) -> usize {
    let distances = results(distances(kernel, accesses), Binary::Mul);
    let beside = (Binary::Xor, Operand::Imm(1));
    computed(kernel, which, distances, beside, |op| match op {
        Op::Binary { a, .. } => Some(a),
        _ => None,
    })
}

/// Has accesses take so many places in turn: a power of two.
pub fn places(kernel: &mut Kernel, accesses: impl Fn(&Op) -> bool, number: u64) -> usize {
    let stages = sources(kernel, distances(kernel, accesses), Binary::Mul);
    let masks = results(stages, Binary::And);
    immediate(kernel, All, masks, number - 1)
}

/// Has waits take for their parity the bit of their turn that is so far up.
pub fn parity_bit(kernel: &mut Kernel, waits: impl Fn(&Op) -> bool, bit: u64) -> usize {
    let mut parities = operands(kernel, |op| match op {
        Op::MbarrierWait { parity, .. } if waits(op) => vec![*parity],
        _ => Vec::new(),
    });
    // Who is ahead waits for the other.
    parities.extend(sources(kernel, parities.clone(), Binary::Xor));
    let shifted = sources(kernel, parities, Binary::And);
    immediate(kernel, All, results(shifted, Binary::Shr), bit)
}

/// Has waits always be for one parity.
pub fn same_parity(kernel: &mut Kernel, waits: impl Fn(&Op) -> bool, to: u64) -> usize {
    change(kernel, All, waits, |op| {
        if let Op::MbarrierWait { parity, .. } = op {
            *parity = Operand::Imm(to);
        }
    })
}

/// Puts a constant in the place of another, as the second operand.
pub fn immediate(
    kernel: &mut Kernel,
    which: Which,
    matches: impl Fn(&Op) -> bool,
    to: u64,
) -> usize {
    let with_constant = |op: &Op| {
        let constant = matches!(
            op,
            Op::Binary {
                b: Operand::Imm(_),
                ..
            } | Op::Compare {
                b: Operand::Imm(_),
                ..
            }
        );
        constant && matches(op)
    };
    change(kernel, which, with_constant, |op| {
        if let Op::Binary { b, .. } | Op::Compare { b, .. } = op {
            *b = Operand::Imm(to);
        }
    })
}

/// A test for instructions that equal the `nth` of a sort.
pub fn same_as(
    kernel: &Kernel,
    nth: usize,
    matches: &dyn Fn(&Op) -> bool,
) -> impl Fn(&Op) -> bool + use<> {
    let mut found = all(kernel).into_iter().filter(|inst| matches(&inst.op));
    let op = found.nth(nth).map(|inst| inst.op);
    move |it| op.as_ref() == Some(it)
}
