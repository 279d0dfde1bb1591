//! Counts, sizes and constants that the hardware or ptxas has limits for.
//!
//! In: a kernel's description, an instruction. Out: a fault. Called by [`super::verify`].

use std::collections::HashSet;

use super::{Fault, require};
use crate::Ty;
use crate::ir::{Address, Kernel, Op, Operand, Param, ParamKind, Scope};

/// Bytes of shared memory of a thread block at most.
const SHARED_BYTES: u32 = 232_448;
/// Bytes of parameters at most.
const PARAM_BYTES: u32 = 4096;
/// Bytes of a tensor map, and what its address is a multiple of.
const MAP_BYTES: u32 = 128;
const MAP_ALIGNMENT: u32 = 64;

/// Whether the kernel's description is within limits.
pub(super) fn kernel(kernel: &Kernel) -> Result<(), Fault> {
    let Kernel {
        threads,
        cluster,
        min_blocks,
        shared_bytes,
        ..
    } = *kernel;
    name("the kernel's name", &kernel.name)?;
    let whole_warps = threads.is_multiple_of(32) && (32..=1024).contains(&threads);
    require(
        whole_warps,
        "`threads`",
        threads,
        "multiples of 32 up to 1024",
    )?;
    require((1..=8).contains(&cluster), "`cluster`", cluster, "1 to 8")?;
    require(
        (1..=32).contains(&min_blocks),
        "`min_blocks`",
        min_blocks,
        "1 to 32",
    )?;
    require(
        shared_bytes <= SHARED_BYTES,
        "`shared_bytes`",
        shared_bytes,
        "0 to 232448",
    )?;
    params(&kernel.params)
}

fn params(params: &[Param]) -> Result<(), Fault> {
    let mut names = HashSet::new();
    let mut bytes = 0_u32;
    for Param { name, kind } in params {
        self::name("a parameter's name", name)?;
        require(
            names.insert(name),
            "a parameter's name",
            name,
            "one that is not yet taken",
        )?;
        let (size, alignment) = match kind {
            ParamKind::TensorMap => (MAP_BYTES, MAP_ALIGNMENT),
            ParamKind::Scalar(ty) => {
                let allowed = &[
                    Ty::B32,
                    Ty::U32,
                    Ty::S32,
                    Ty::B64,
                    Ty::U64,
                    Ty::S64,
                    Ty::F32,
                ];
                if !allowed.contains(ty) {
                    return Err(Fault::Type {
                        what: "a parameter",
                        ty: *ty,
                        allowed,
                    });
                }
                (ty.bytes(), ty.bytes())
            }
        };
        bytes = bytes.next_multiple_of(alignment) + size;
    }
    require(
        bytes <= PARAM_BYTES,
        "the size of the parameters",
        bytes,
        "0 to 4096 bytes",
    )
}

/// Letters, digits and underscores, and none of the few words that mean something else there.
fn name(what: &'static str, name: &str) -> Result<(), Fault> {
    let starts = name.starts_with(|c: char| c.is_ascii_alphabetic());
    let rest = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let free = !["smem", "WARP_SZ"].contains(&name);
    let allowed = "a letter, then letters, digits and underscores; not smem, not WARP_SZ";
    require(starts && rest && free, what, format!("`{name}`"), allowed)
}

/// Whether an mbarrier's instruction has a scope that there is for it.
fn in_cluster(scope: Scope) -> Result<(), Fault> {
    let allowed = "the thread block or the cluster";
    require(
        scope != Scope::Gpu,
        "the scope",
        format!("{scope:?}"),
        allowed,
    )
}

/// Whether an instruction's counts and constants are within limits.
pub(super) fn check(kernel: &Kernel, op: &Op) -> Result<(), Fault> {
    match op {
        Op::Param { ty, param, .. } => {
            let allowed = "a number's index, with its type";
            let is = describe(kernel, *param);
            let right = kind(kernel, *param) == Some(ParamKind::Scalar(*ty));
            require(
                right,
                "the parameter",
                format!("{param} ({is}), read as {ty}"),
                allowed,
            )
        }
        Op::ParamAddress { param, .. } => {
            let is = format!("{param} ({})", describe(kernel, *param));
            let right = kind(kernel, *param) == Some(ParamKind::TensorMap);
            require(right, "the parameter", is, "a tensor map's index")
        }

        Op::Load { ty, dst, .. } => vector(*ty, dst.len()),
        Op::Store { ty, src, .. } | Op::Reduce { ty, src, .. } => vector(*ty, src.len()),
        Op::LoadMatrix { dst, .. } => matrices(dst.len()),
        Op::StoreMatrix { src, .. } => matrices(src.len()),

        Op::BarrierSync { id, threads } | Op::BarrierArrive { id, threads } => {
            constant(*id, "the barrier", "0 to 15", |id| id < 16)?;
            let allowed = "multiples of 32, no more than the kernel has";
            let up_to = u64::from(kernel.threads);
            constant(*threads, "the number of threads", allowed, |threads| {
                threads % 32 == 0 && (32..=up_to).contains(&threads)
            })
        }
        Op::MbarrierInit { address, count } => {
            mbarrier(*address)?;
            let allowed = "1 to 1048575";
            constant(*count, "the count", allowed, |count| {
                (1..1 << 20).contains(&count)
            })
        }
        Op::MbarrierArriveExpect { address, bytes } => {
            mbarrier(*address)?;
            let allowed = "0 to 1048575";
            constant(*bytes, "the number of bytes", allowed, |bytes| {
                bytes < 1 << 20
            })
        }
        Op::MbarrierWait {
            address,
            parity,
            scope,
        } => {
            mbarrier(*address)?;
            in_cluster(*scope)?;
            constant(*parity, "the parity", "0 and 1", |parity| parity < 2)
        }
        Op::MbarrierTest {
            address, parity, ..
        } => {
            mbarrier(*address)?;
            constant(*parity, "the parity", "0 and 1", |parity| parity < 2)
        }
        Op::MbarrierInvalidate { address } => mbarrier(*address),
        Op::MbarrierArrive { address, scope, .. } => {
            mbarrier(*address)?;
            in_cluster(*scope)
        }

        Op::TmaLoad {
            coordinates,
            barrier,
            ..
        } => {
            mbarrier(*barrier)?;
            rank(coordinates.len())
        }
        Op::TmaStore { coordinates, .. } | Op::TmaReduceAdd { coordinates, .. } => {
            rank(coordinates.len())
        }
        Op::BulkLoad { bytes, barrier, .. } => {
            mbarrier(*barrier)?;
            bulk(*bytes)
        }
        Op::BulkStore { bytes, .. } | Op::BulkReduceAdd { bytes, .. } => bulk(*bytes),

        Op::WgmmaWait { pending } => require(*pending <= 7, "`pending`", pending, "0 to 7"),
        Op::Wgmma { n, acc, .. } => {
            let whole = n.is_multiple_of(8) && (8..=256).contains(n);
            require(whole, "`n`", n, "multiples of 8 from 8 to 256")?;
            let right = acc.len() == *n as usize / 2;
            require(right, "the number of accumulators", acc.len(), "n / 2")
        }
        Op::SetMaxRegisters { count, .. } => {
            let right = count.is_multiple_of(8) && (24..=256).contains(count);
            require(right, "`count`", count, "multiples of 8 from 24 to 256")
        }
        _ => Ok(()),
    }
}

fn kind(kernel: &Kernel, param: u32) -> Option<ParamKind> {
    kernel.params.get(param as usize).map(|param| param.kind)
}

/// What a parameter is, for messages.
fn describe(kernel: &Kernel, param: u32) -> String {
    match kind(kernel, param) {
        None => format!("of {}", kernel.params.len()),
        Some(ParamKind::Scalar(ty)) => ty.to_string(),
        Some(ParamKind::TensorMap) => "a tensor map".to_owned(),
    }
}

/// Registers are not looked at.
fn constant(
    operand: Operand,
    what: &'static str,
    allowed: &'static str,
    is_allowed: impl FnOnce(u64) -> bool,
) -> Result<(), Fault> {
    match operand {
        Operand::Reg(_) => Ok(()),
        Operand::Imm(value) => require(is_allowed(value), what, value, allowed),
    }
}

fn vector(ty: Ty, count: usize) -> Result<(), Fault> {
    let fits = matches!(count, 1 | 2 | 4) && count * ty.bytes() as usize <= 16;
    require(
        fits,
        "the number of values",
        count,
        "1, 2 or 4, of 16 bytes together at most",
    )
}

fn matrices(count: usize) -> Result<(), Fault> {
    require(
        matches!(count, 1 | 2 | 4),
        "the number of matrices",
        count,
        "1, 2 or 4",
    )
}

/// mbarriers are 8 bytes at multiples of 8; so are, as a rule, the registers they are named by.
fn mbarrier(Address { offset, .. }: Address) -> Result<(), Fault> {
    require(
        offset % 8 == 0,
        "the mbarrier's offset",
        offset,
        "multiples of 8",
    )
}

fn rank(coordinates: usize) -> Result<(), Fault> {
    require(
        (1..=5).contains(&coordinates),
        "the number of coordinates",
        coordinates,
        "1 to 5",
    )
}

fn bulk(bytes: Operand) -> Result<(), Fault> {
    let allowed = "multiples of 16 from 16";
    constant(bytes, "the number of bytes", allowed, |bytes| {
        bytes > 0 && bytes % 16 == 0
    })
}
