//! Which types PTX has each instruction for.
//!
//! In: an instruction. Out: a fault if it does not exist. Called by [`super::verify`].

use super::{Fault, require};
use crate::ir::{AtomicOp, Binary, Cache, Cmp, MatrixA, Op, Space, Ternary, Unary};
use crate::operands::Use;
use crate::{Element, Ty};

use Ty::{B8, B16, B32, B64, Bf16x2, F16, F16x2, F32, Pred, S16, S32, S64, U8, U16, U32, U64};

/// Whatever a register can hold whole.
const VALUES: &[Ty] = &[Pred, B16, U16, S16, B32, U32, S32, B64, U64, S64, F32];
/// Of those, what there can be two of to choose from.
const CHOICES: &[Ty] = &[B16, U16, S16, B32, U32, S32, B64, U64, S64, F32];
const MEMORY: &[Ty] = &[B8, U8, B16, U16, S16, B32, U32, S32, B64, U64, S64, F32];
const INTEGERS: &[Ty] = &[U16, S16, U32, S32, U64, S64];
const SIGNED: &[Ty] = &[S16, S32, S64, F32, Bf16x2, F16x2];
const NUMBERS: &[Ty] = &[U16, S16, U32, S32, U64, S64, F32, Bf16x2, F16x2];
const DIVISIBLE: &[Ty] = &[U16, S16, U32, S32, U64, S64, F32];
const BITS: &[Ty] = &[B16, U16, S16, B32, U32, S32, B64, U64, S64];
const LOGIC: &[Ty] = &[Pred, B16, U16, S16, B32, U32, S32, B64, U64, S64];
const WORDS: &[Ty] = &[B32, U32, S32, B64, U64, S64];
const WORD: &[Ty] = &[B32, U32, S32];
const FLOATS: &[Ty] = &[F32, Bf16x2, F16x2];
const ORDERED: &[Ty] = &[U16, S16, U32, S32, U64, S64, F32];
const CONVERTIBLE: &[Ty] = &[U8, U16, S16, U32, S32, U64, S64, F32, F16];

pub(super) fn check(op: &Op) -> Result<(), Fault> {
    match op {
        Op::Mov { ty, .. } => one_of("mov", *ty, VALUES),
        Op::Unary { op, ty, .. } => unary(*op, *ty),
        Op::Binary { op, ty, .. } => binary(*op, *ty),
        Op::Ternary {
            op: Ternary::Fma,
            ty,
            ..
        } => one_of("fma", *ty, FLOATS),
        Op::Ternary {
            op: Ternary::Mad,
            ty,
            ..
        } => one_of("mad", *ty, INTEGERS),
        Op::MulWide { ty, .. } => one_of("mul.wide", *ty, &[U32, S32]),
        Op::Convert { to, from, .. } => convert(*to, *from),
        Op::Join { ty, .. } => one_of("joining", *ty, &[B32, B64]),
        Op::Split { ty, .. } => one_of("splitting", *ty, &[B32, B64]),
        Op::Compare {
            cmp: Cmp::Eq | Cmp::Ne,
            ty,
            ..
        } => one_of("setp", *ty, CHOICES),
        Op::Compare { ty, .. } => one_of("an ordering setp", *ty, ORDERED),
        Op::Select { ty, .. } => one_of("selp", *ty, CHOICES),

        Op::Load {
            space, cache, ty, ..
        } => {
            let constant = *cache == Cache::Constant;
            let known = !constant || *space == Space::Global;
            require(
                known,
                "the memory of a `.nc` load",
                format!("{space:?}"),
                "Global",
            )?;
            one_of("ld", *ty, MEMORY)
        }
        Op::Store { ty, .. } => one_of("st", *ty, MEMORY),
        Op::LoadAcquire { ty, .. } => one_of("ld.acquire", *ty, MEMORY),
        Op::StoreRelease { ty, .. } => one_of("st.release", *ty, MEMORY),
        Op::Atomic { op, ty, swap, .. } => atomic(*op, *ty, swap.is_some()),
        Op::Reduce {
            op, space, ty, src, ..
        } => reduce(*op, *space, *ty, src.len()),
        Op::WarpReduce { op, ty, .. } => warp_reduce(*op, *ty),
        Op::BulkReduceAdd { ty, .. } => {
            one_of("cp.reduce.async.bulk.add", *ty, &[U32, S32, U64, F32])
        }
        Op::Wgmma {
            element,
            a,
            b_transposed,
            ..
        } => product(*element, a, *b_transposed),
        Op::Mma { element, .. } => require(
            matches!(element, Element::Bf16 | Element::F16),
            "the element of a warp's product",
            format!("{element:?}"),
            "Bf16, F16",
        ),
        _ => Ok(()),
    }?;
    constants(op)
}

fn one_of(what: &'static str, ty: Ty, allowed: &'static [Ty]) -> Result<(), Fault> {
    if allowed.contains(&ty) {
        Ok(())
    } else {
        Err(Fault::Type { what, ty, allowed })
    }
}

fn unary(op: Unary, ty: Ty) -> Result<(), Fault> {
    match op {
        Unary::Neg => one_of("neg", ty, SIGNED),
        Unary::Abs => one_of("abs", ty, SIGNED),
        Unary::Not => one_of("not", ty, LOGIC),
        Unary::PopCount => one_of("popc", ty, WORDS),
        Unary::LeadingZeros => one_of("clz", ty, WORDS),
        Unary::ReverseBits => one_of("brev", ty, WORDS),
        Unary::Exp2 => one_of("ex2", ty, &[F32]),
        Unary::Log2 => one_of("lg2", ty, &[F32]),
        Unary::Reciprocal => one_of("rcp", ty, &[F32]),
        Unary::Sqrt => one_of("sqrt", ty, &[F32]),
        Unary::ReciprocalSqrt => one_of("rsqrt", ty, &[F32]),
    }
}

fn binary(op: Binary, ty: Ty) -> Result<(), Fault> {
    match op {
        Binary::Add => one_of("add", ty, NUMBERS),
        Binary::Sub => one_of("sub", ty, NUMBERS),
        Binary::Mul => one_of("mul", ty, NUMBERS),
        Binary::Min => one_of("min", ty, NUMBERS),
        Binary::Max => one_of("max", ty, NUMBERS),
        Binary::MulHigh => one_of("mul.hi", ty, INTEGERS),
        Binary::Div => one_of("div", ty, DIVISIBLE),
        Binary::Rem => one_of("rem", ty, INTEGERS),
        Binary::And => one_of("and", ty, LOGIC),
        Binary::Or => one_of("or", ty, LOGIC),
        Binary::Xor => one_of("xor", ty, LOGIC),
        Binary::Shl => one_of("shl", ty, BITS),
        Binary::Shr => one_of("shr", ty, BITS),
    }
}

/// float16 comes from and goes to float32 only; a float32 is not converted to itself.
fn convert(to: Ty, from: Ty) -> Result<(), Fault> {
    match (to, from) {
        (F16, other) | (other, F16) => one_of("cvt to or from f16", other, &[F32]),
        (F32, F32) => one_of("cvt to f32", from, &[U8, U16, S16, U32, S32, U64, S64, F16]),
        _ => one_of("cvt", to, CONVERTIBLE).and(one_of("cvt", from, CONVERTIBLE)),
    }
}

fn atomic(op: AtomicOp, ty: Ty, swaps: bool) -> Result<(), Fault> {
    let wants_swap = op == AtomicOp::CompareAndSwap;
    let is = if swaps { "there" } else { "missing" };
    require(
        swaps == wants_swap,
        "`swap`",
        is,
        "there for compare-and-swap, missing otherwise",
    )?;
    match op {
        AtomicOp::Add => one_of("atom.add", ty, &[U32, S32, U64, F32, Bf16x2, F16x2]),
        AtomicOp::Min => one_of("atom.min", ty, &[U32, S32, U64, S64]),
        AtomicOp::Max => one_of("atom.max", ty, &[U32, S32, U64, S64]),
        AtomicOp::And => one_of("atom.and", ty, WORDS),
        AtomicOp::Or => one_of("atom.or", ty, WORDS),
        AtomicOp::Exchange => one_of("atom.exch", ty, WORDS),
        AtomicOp::CompareAndSwap => one_of(
            "atom.cas",
            ty,
            &[B16, U16, S16, B32, U32, S32, B64, U64, S64],
        ),
    }
}

fn reduce(op: AtomicOp, space: Space, ty: Ty, count: usize) -> Result<(), Fault> {
    match op {
        AtomicOp::Exchange | AtomicOp::CompareAndSwap => Err(Fault::value(
            "the operation of red",
            format!("{op:?}"),
            "Add, Min, Max, And, Or",
        )),
        _ if count <= 1 => atomic(op, ty, false),
        _ => {
            let global = space == Space::Global;
            require(
                global,
                "the memory of a vector red",
                format!("{space:?}"),
                "Global",
            )?;
            match op {
                AtomicOp::Add => one_of("a vector red.add", ty, FLOATS),
                AtomicOp::Min | AtomicOp::Max => {
                    one_of("a vector red.min or red.max", ty, &[Bf16x2, F16x2])
                }
                _ => Err(Fault::value(
                    "the operation of a vector red",
                    format!("{op:?}"),
                    "Add, Min, Max",
                )),
            }
        }
    }
}

fn warp_reduce(op: Binary, ty: Ty) -> Result<(), Fault> {
    match op {
        Binary::Add | Binary::Min | Binary::Max => one_of("redux", ty, &[U32, S32]),
        Binary::And | Binary::Or | Binary::Xor => one_of("redux", ty, WORD),
        _ => Err(Fault::value(
            "the operation of redux",
            format!("{op:?}"),
            "Add, Min, Max, And, Or, Xor",
        )),
    }
}

fn product(element: Element, a: &MatrixA, b_transposed: bool) -> Result<(), Fault> {
    let known = matches!(
        element,
        Element::Bf16 | Element::F16 | Element::E4m3 | Element::E5m2
    );
    require(
        known,
        "the element of a product",
        format!("{element:?}"),
        "Bf16, F16, E4m3, E5m2",
    )?;
    let a_transposed = matches!(
        a,
        MatrixA::Shared {
            transposed: true,
            ..
        }
    );
    let transposed = a_transposed || b_transposed;
    let allowed = "not transposed; of 16-bit elements, either";
    require(
        !transposed || element.bytes() == 2,
        "an operand",
        "transposed",
        allowed,
    )
}

/// ptxas takes no constants for float16 and packed operands.
fn constants(op: &Op) -> Result<(), Fault> {
    let ty = match op {
        Op::Unary { ty, .. }
        | Op::Binary { ty, .. }
        | Op::Ternary { ty, .. }
        | Op::Convert { from: ty, .. }
        | Op::Atomic { ty, .. }
        | Op::Reduce { ty, .. } => *ty,
        _ => return Ok(()),
    };
    let mut is_constant = false;
    op.visit(&mut |used| is_constant |= matches!(used, Use::Constant(..)));
    let refused = is_constant && matches!(ty, F16 | Bf16x2 | F16x2);
    if refused {
        Err(Fault::ConstantOperand { ty })
    } else {
        Ok(())
    }
}
