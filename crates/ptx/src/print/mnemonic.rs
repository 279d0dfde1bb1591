//! [`Op::mnemonic`]: an instruction's name with all its modifiers, without operands.
//!
//! Called by the printer and by reports of faults.

use crate::ir::{
    AtomicOp, Binary, Cache, Cmp, Fence, Op, Order, Packed, Policy, Scope, ShuffleMode, Space,
    Ternary, Unary, VoteMode,
};
use crate::{Element, Ty};

impl Op {
    /// Its PTX name with all modifiers: `ld.global.v4.f32`. Of the few that take two instructions,
    /// the one that matters.
    pub fn mnemonic(&self) -> String {
        match self {
            Self::Mov { ty, .. } => format!("mov.{ty}"),
            Self::Special { .. } | Self::SharedBase { .. } => "mov.u32".into(),
            Self::Param { ty, .. } => format!("ld.param.{ty}"),
            Self::ParamAddress { .. } => "cvta.param.u64".into(),
            Self::Unary { op, ty, .. } => unary(*op, *ty),
            Self::Binary { op, ty, .. } => binary(*op, *ty),
            Self::Ternary {
                op: Ternary::Fma,
                ty,
                ..
            } => format!("fma.rn.{ty}"),
            Self::Ternary {
                op: Ternary::Mad,
                ty,
                ..
            } => format!("mad.lo.{ty}"),
            Self::MulWide { ty, c: None, .. } => format!("mul.wide.{ty}"),
            Self::MulWide { ty, c: Some(_), .. } => format!("mad.wide.{ty}"),
            Self::Lop3 { .. } => "lop3.b32".into(),
            Self::Permute { .. } => "prmt.b32".into(),
            Self::Convert { to, from, .. } => format!("cvt{}.{to}.{from}", rounding(*to, *from)),
            Self::Pack { format, .. } => pack(*format).into(),
            Self::Join { ty, .. } | Self::Split { ty, .. } => format!("mov.{ty}"),
            Self::Compare { cmp, ty, .. } => format!("setp.{}.{ty}", compare(*cmp, *ty)),
            Self::Select { ty, .. } => format!("selp.{ty}"),

            Self::Load {
                space,
                cache,
                ty,
                dst,
                ..
            } => load(*space, *cache, *ty, dst.len()),
            Self::Store { space, ty, src, .. } => {
                format!("st.{}{}.{ty}", self::space(*space), vector(src.len()))
            }
            Self::Atomic {
                op,
                order,
                scope,
                space,
                ty,
                ..
            } => format!(
                "atom.{}.{}.{}.{}",
                self::order(*order),
                self::scope(*scope),
                self::space(*space),
                atomic(*op, *ty, 1),
            ),
            Self::Reduce {
                op,
                scope,
                space,
                ty,
                src,
                ..
            } => format!(
                "red.relaxed.{}.{}.{}",
                self::scope(*scope),
                self::space(*space),
                atomic(*op, *ty, src.len()),
            ),
            Self::LoadAcquire { scope, ty, .. } => {
                format!("ld.acquire.{}.global.{ty}", self::scope(*scope))
            }
            Self::StoreRelease { scope, ty, .. } => {
                format!("st.release.{}.global.{ty}", self::scope(*scope))
            }
            Self::LoadMatrix {
                transposed, dst, ..
            } => matrix("ldmatrix", dst.len(), *transposed),
            Self::StoreMatrix {
                transposed, src, ..
            } => matrix("stmatrix", src.len(), *transposed),
            Self::Fence(fence) => self::fence(*fence),

            Self::Shuffle { mode, .. } => format!("shfl.sync.{}.b32", shuffle(*mode)),
            Self::Vote {
                mode: VoteMode::All,
                ..
            } => "vote.sync.all.pred".into(),
            Self::Vote {
                mode: VoteMode::Any,
                ..
            } => "vote.sync.any.pred".into(),
            Self::Ballot { .. } => "vote.sync.ballot.b32".into(),
            Self::WarpReduce { op, ty, .. } => format!("redux.sync.{}", plain(*op, *ty)),
            Self::Elect { .. } => "elect.sync".into(),
            Self::WarpSync => "bar.warp.sync".into(),
            Self::Mma { element, .. } => {
                let name = self::element(*element);
                format!("mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32")
            }

            Self::BarrierSync { .. } => "bar.sync".into(),
            Self::BarrierArrive { .. } => "bar.arrive".into(),
            Self::ClusterArrive => "barrier.cluster.arrive.release.aligned".into(),
            Self::ClusterWait => "barrier.cluster.wait.acquire.aligned".into(),
            Self::MapShared { .. } => "mapa.shared::cluster.u32".into(),
            Self::MbarrierInit { .. } => "mbarrier.init.shared::cta.b64".into(),
            Self::MbarrierInvalidate { .. } => "mbarrier.inval.shared::cta.b64".into(),
            Self::MbarrierArrive { remote, scope, .. } => {
                let release = beyond_block("release", *scope);
                let space = if *remote { "cluster" } else { "cta" };
                format!("mbarrier.arrive{release}.shared::{space}.b64")
            }
            Self::MbarrierArriveExpect { .. } => "mbarrier.arrive.expect_tx.shared::cta.b64".into(),
            Self::MbarrierWait { scope, .. } => {
                let acquire = beyond_block("acquire", *scope);
                format!("mbarrier.try_wait.parity{acquire}.shared::cta.b64")
            }
            Self::MbarrierTest { .. } => "mbarrier.test_wait.parity.shared::cta.b64".into(),

            Self::TmaLoad {
                coordinates,
                multicast,
                hint,
                ..
            } => format!(
                "cp.async.bulk.tensor.{}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{}{}",
                coordinates.len(),
                if multicast.is_some() {
                    ".multicast::cluster"
                } else {
                    ""
                },
                cache_hint(hint.is_some()),
            ),
            Self::TmaStore {
                coordinates, hint, ..
            } => format!(
                "cp.async.bulk.tensor.{}d.global.shared::cta.tile.bulk_group{}",
                coordinates.len(),
                cache_hint(hint.is_some()),
            ),
            Self::TmaReduceAdd { coordinates, .. } => format!(
                "cp.reduce.async.bulk.tensor.{}d.global.shared::cta.add.tile.bulk_group",
                coordinates.len()
            ),
            Self::PrefetchMap { .. } => "prefetch.tensormap".into(),
            Self::BulkLoad { hint, .. } => format!(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes{}",
                cache_hint(hint.is_some()),
            ),
            Self::BulkStore { .. } => "cp.async.bulk.global.shared::cta.bulk_group".into(),
            Self::BulkReduceAdd { ty, .. } => {
                format!("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.{ty}")
            }
            Self::BulkCommit => "cp.async.bulk.commit_group".into(),
            Self::BulkWait { read: false, .. } => "cp.async.bulk.wait_group".into(),
            Self::BulkWait { read: true, .. } => "cp.async.bulk.wait_group.read".into(),
            Self::CachePolicy {
                which: Policy::EvictLast,
                ..
            } => "createpolicy.fractional.L2::evict_last.b64".into(),
            Self::CachePolicy {
                which: Policy::EvictFirst,
                ..
            } => "createpolicy.fractional.L2::evict_first.b64".into(),

            Self::WgmmaFence => "wgmma.fence.sync.aligned".into(),
            Self::WgmmaCommit => "wgmma.commit_group.sync.aligned".into(),
            Self::WgmmaWait { .. } => "wgmma.wait_group.sync.aligned".into(),
            Self::Wgmma { element, n, .. } => {
                // A step is 32 bytes of k.
                let (k, name) = (32 / element.bytes(), self::element(*element));
                format!("wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{name}.{name}")
            }
            Self::SetMaxRegisters { increase: true, .. } => {
                "setmaxnreg.inc.sync.aligned.u32".into()
            }
            Self::SetMaxRegisters {
                increase: false, ..
            } => "setmaxnreg.dec.sync.aligned.u32".into(),

            Self::GridWait => "griddepcontrol.wait".into(),
            Self::GridLaunch => "griddepcontrol.launch_dependents".into(),
            Self::Sleep { .. } => "nanosleep.u32".into(),
            Self::Trap => "trap".into(),
        }
    }
}

/// The untyped bits of a type's size: what bitwise operations are written with.
fn bits(ty: Ty) -> &'static str {
    match ty {
        Ty::Pred => "pred",
        Ty::B8 | Ty::U8 => "b8",
        Ty::B16 | Ty::U16 | Ty::S16 | Ty::F16 => "b16",
        Ty::B32 | Ty::U32 | Ty::S32 | Ty::F32 | Ty::Bf16x2 | Ty::F16x2 => "b32",
        Ty::B64 | Ty::U64 | Ty::S64 => "b64",
    }
}

fn is_float(ty: Ty) -> bool {
    matches!(ty, Ty::F32 | Ty::F16 | Ty::Bf16x2 | Ty::F16x2)
}

fn unary(op: Unary, ty: Ty) -> String {
    match op {
        Unary::Neg => format!("neg.{ty}"),
        Unary::Abs => format!("abs.{ty}"),
        Unary::Not => format!("not.{}", bits(ty)),
        Unary::PopCount => format!("popc.{}", bits(ty)),
        Unary::LeadingZeros => format!("clz.{}", bits(ty)),
        Unary::ReverseBits => format!("brev.{}", bits(ty)),
        Unary::Exp2 => format!("ex2.approx.ftz.{ty}"),
        Unary::Log2 => format!("lg2.approx.ftz.{ty}"),
        Unary::Reciprocal => format!("rcp.approx.ftz.{ty}"),
        Unary::Sqrt => format!("sqrt.approx.ftz.{ty}"),
        Unary::ReciprocalSqrt => format!("rsqrt.approx.ftz.{ty}"),
    }
}

/// Sums and products of floats say their rounding: without it ptxas would join them to `fma`,
/// and results would differ from the emulator's.
fn binary(op: Binary, ty: Ty) -> String {
    match (op, is_float(ty)) {
        (Binary::Add | Binary::Sub | Binary::Mul | Binary::Div, true) => {
            let name = plain(op, ty);
            let (name, ty) = name.split_once('.').unwrap_or((&name, ""));
            format!("{name}.rn.{ty}")
        }
        (Binary::Mul, false) => format!("mul.lo.{ty}"),
        (Binary::MulHigh, _) => format!("mul.hi.{ty}"),
        _ => plain(op, ty),
    }
}

/// `op.ty`, with nothing between.
fn plain(op: Binary, ty: Ty) -> String {
    match op {
        Binary::Add => format!("add.{ty}"),
        Binary::Sub => format!("sub.{ty}"),
        Binary::Mul | Binary::MulHigh => format!("mul.{ty}"),
        Binary::Div => format!("div.{ty}"),
        Binary::Rem => format!("rem.{ty}"),
        Binary::Min => format!("min.{ty}"),
        Binary::Max => format!("max.{ty}"),
        Binary::And => format!("and.{}", bits(ty)),
        Binary::Or => format!("or.{}", bits(ty)),
        Binary::Xor => format!("xor.{}", bits(ty)),
        Binary::Shl => format!("shl.{}", bits(ty)),
        Binary::Shr => format!("shr.{ty}"),
    }
}

/// To integers floats are cut; to floats numbers are rounded to the nearest, where rounding is
/// needed at all.
fn rounding(to: Ty, from: Ty) -> &'static str {
    match (to, from) {
        (Ty::F32, Ty::F16) => "",
        (Ty::F32 | Ty::F16, _) => ".rn",
        (_, Ty::F32 | Ty::F16) => ".rni",
        _ => "",
    }
}

fn pack(format: Packed) -> &'static str {
    match format {
        Packed::Bf16 => "cvt.rn.bf16x2.f32",
        Packed::F16 => "cvt.rn.f16x2.f32",
        Packed::E4m3 => "cvt.rn.satfinite.e4m3x2.f32",
        Packed::E5m2 => "cvt.rn.satfinite.e5m2x2.f32",
    }
}

fn compare(cmp: Cmp, ty: Ty) -> &'static str {
    match cmp {
        Cmp::Eq => "eq",
        // Plain `ne` of floats is false if one is NaN.
        Cmp::Ne if is_float(ty) => "neu",
        Cmp::Ne => "ne",
        Cmp::Lt => "lt",
        Cmp::Le => "le",
        Cmp::Gt => "gt",
        Cmp::Ge => "ge",
    }
}

fn load(space: Space, cache: Cache, ty: Ty, count: usize) -> String {
    let (space, vector) = (self::space(space), vector(count));
    match cache {
        Cache::Default => format!("ld.{space}{vector}.{ty}"),
        Cache::Constant => format!("ld.{space}.nc{vector}.{ty}"),
        Cache::Volatile => format!("ld.volatile.{space}{vector}.{ty}"),
    }
}

fn vector(count: usize) -> String {
    if count == 1 {
        String::new()
    } else {
        format!(".v{count}")
    }
}

fn matrix(name: &str, count: usize, transposed: bool) -> String {
    let trans = if transposed { ".trans" } else { "" };
    format!("{name}.sync.aligned.m8n8.x{count}{trans}.shared.b16")
}

fn space(space: Space) -> &'static str {
    match space {
        Space::Global => "global",
        Space::Shared => "shared",
        Space::Cluster => "shared::cluster",
    }
}

fn order(order: Order) -> &'static str {
    match order {
        Order::Relaxed => "relaxed",
        Order::Acquire => "acquire",
        Order::Release => "release",
        Order::AcquireRelease => "acq_rel",
    }
}

fn scope(scope: Scope) -> &'static str {
    match scope {
        Scope::Cta => "cta",
        Scope::Cluster => "cluster",
        Scope::Gpu => "gpu",
    }
}

/// Order and scope of an mbarrier's instruction, which are understood if the scope is the thread block.
fn beyond_block(order: &str, of: Scope) -> String {
    match of {
        Scope::Cta => String::new(),
        wider => format!(".{order}.{}", scope(wider)),
    }
}

/// Operation, vector and type of an atomic instruction.
fn atomic(op: AtomicOp, ty: Ty, count: usize) -> String {
    // Packed sums want it said that subnormals are kept.
    let noftz = if matches!(ty, Ty::F16x2 | Ty::Bf16x2) {
        ".noftz"
    } else {
        ""
    };
    let vector = vector(count);
    match op {
        AtomicOp::Add => format!("add{noftz}{vector}.{ty}"),
        AtomicOp::Min => format!("min{noftz}{vector}.{ty}"),
        AtomicOp::Max => format!("max{noftz}{vector}.{ty}"),
        AtomicOp::And => format!("and.{}", bits(ty)),
        AtomicOp::Or => format!("or.{}", bits(ty)),
        AtomicOp::Exchange => format!("exch.{}", bits(ty)),
        AtomicOp::CompareAndSwap => format!("cas.{}", bits(ty)),
    }
}

fn fence(fence: Fence) -> String {
    match fence {
        Fence::ProxyAsyncShared => "fence.proxy.async.shared::cta".into(),
        Fence::ProxyAsyncGlobal => "fence.proxy.async.global".into(),
        Fence::MbarrierInit => "fence.mbarrier_init.release.cluster".into(),
        Fence::AcquireRelease(scope) => format!("fence.acq_rel.{}", self::scope(scope)),
    }
}

fn shuffle(mode: ShuffleMode) -> &'static str {
    match mode {
        ShuffleMode::Index => "idx",
        ShuffleMode::Butterfly => "bfly",
        ShuffleMode::Up => "up",
        ShuffleMode::Down => "down",
    }
}

fn cache_hint(is_there: bool) -> &'static str {
    if is_there { ".L2::cache_hint" } else { "" }
}

fn element(element: Element) -> &'static str {
    match element {
        Element::Bf16 => "bf16",
        Element::F16 => "f16",
        Element::F32 => "f32",
        Element::E4m3 => "e4m3",
        Element::E5m2 => "e5m2",
        Element::U8 => "u8",
        Element::I32 => "s32",
    }
}
