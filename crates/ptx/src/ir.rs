//! The table of instructions, and what holds them: [`Module`], [`Kernel`], [`Block`], [`Node`],
//! [`Inst`], [`Op`]. Data only.
//!
//! Made by [`crate::Builder`]; read by the verifier, the printer and the emulator. Control flow is
//! structured (`If`, `Loop`, `Break`): a reader never meets a label. Registers may be assigned any
//! number of times, as in PTX; each read must be preceded by an assignment on every path to it.

use std::panic::Location;

use crate::{Class, Element, Ty};

/// Kernels that are loaded together.
#[derive(Debug, Clone)]
pub struct Module {
    /// The kernels; their names differ.
    pub kernels: Vec<Kernel>,
}

/// One kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Its entry point's name.
    pub name: String,
    /// Parameters, in order.
    pub params: Vec<Param>,
    /// Threads of a thread block: the kernel is always launched with just as many.
    pub threads: u32,
    /// Thread blocks of a cluster along x; 1 for no cluster.
    pub cluster: u32,
    /// Thread blocks on one multiprocessor that ptxas must allow for by its choice of registers.
    pub min_blocks: u32,
    /// Dynamic shared memory, in bytes. It starts at a multiple of 1024.
    pub shared_bytes: u32,
    /// The class of each register.
    pub registers: Vec<Class>,
    /// Number of loops; [`Node::Loop`] ids are below it.
    pub loops: u32,
    /// What it does.
    pub body: Block,
}

/// A parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Param {
    /// Its name, for messages.
    pub name: String,
    /// What it is.
    pub kind: ParamKind,
}

/// Kinds of parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParamKind {
    /// A number or an address: 32 or 64 bits.
    Scalar(Ty),
    /// A tensor map, 128 bytes.
    TensorMap,
}

/// A register of a kernel: an index into [`Kernel::registers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegId(pub u32);

/// What an instruction reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operand {
    /// A register.
    Reg(RegId),
    /// A constant's bits; float32 constants are their bit pattern, booleans are 0 or 1.
    Imm(u64),
}

/// An address: what a register holds plus a constant. Shared addresses have 32 bits, global
/// ones 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Address {
    /// The register.
    pub base: RegId,
    /// Bytes added to it.
    pub offset: i32,
}

/// Statements in order.
pub type Block = Vec<Node>;

/// A statement.
#[derive(Debug, Clone)]
pub enum Node {
    /// An instruction.
    Inst(Inst),
    /// A branch on a predicate.
    If {
        /// What decides.
        cond: Guard,
        /// Taken if it holds.
        then: Block,
        /// Taken if not.
        otherwise: Block,
        /// Where it was written.
        at: &'static Location<'static>,
    },
    /// Runs until a `Break` leaves it.
    Loop {
        /// Which loop.
        id: u32,
        /// What is repeated.
        body: Block,
        /// Where it was written.
        at: &'static Location<'static>,
    },
    /// Leaves an enclosing loop, if a condition holds or always.
    Break {
        /// Which loop.
        id: u32,
        /// When.
        cond: Option<Guard>,
        /// Where it was written.
        at: &'static Location<'static>,
    },
}

/// A predicate that must hold, or must not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Guard {
    /// The predicate.
    pub pred: RegId,
    /// Whether it must not hold.
    pub negated: bool,
}

/// An instruction in its place.
#[derive(Debug, Clone)]
pub struct Inst {
    /// Lanes for which this does not hold leave the instruction out.
    pub guard: Option<Guard>,
    /// What it does.
    pub op: Op,
    /// The place in Rust source that asked for it.
    pub at: &'static Location<'static>,
}

/// Instructions. Each variant's doc gives its PTX, with the fields' names for operands.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // fields, by the names in the PTX
pub enum Op {
    // ---- values ------------------------------------------------------------------------------
    /// `mov.ty dst, src`; as `b32` also between integer and float32 registers.
    Mov { ty: Ty, dst: RegId, src: Operand },
    /// `mov.u32 dst, %special`
    Special { dst: RegId, which: Special },
    /// `ld.param.ty dst, [param]`
    Param { ty: Ty, dst: RegId, param: u32 },
    /// `mov.b64 dst, param; cvta.param.u64 dst, dst`: the generic address of a tensor map.
    ParamAddress { dst: RegId, param: u32 },
    /// `mov.u32 dst, smem`: where dynamic shared memory starts, the block's rank in its cluster in the
    /// top byte.
    SharedBase { dst: RegId },
    /// `op.ty dst, a`
    Unary { op: Unary, ty: Ty, dst: RegId, a: Operand },
    /// `op.ty dst, a, b`
    Binary { op: Binary, ty: Ty, dst: RegId, a: Operand, b: Operand },
    /// `op.ty dst, a, b, c`
    Ternary { op: Ternary, ty: Ty, dst: RegId, a: Operand, b: Operand, c: Operand },
    /// `mul.wide.ty dst, a, b`, or `mad.wide.ty dst, a, b, c`: 32 by 32 to 64 bits.
    MulWide { ty: Ty, dst: RegId, a: Operand, b: Operand, c: Option<Operand> },
    /// `lop3.b32 dst, a, b, c, table`: any bitwise function of three words.
    Lop3 { dst: RegId, a: Operand, b: Operand, c: Operand, table: u8 },
    /// `prmt.b32 dst, a, b, selector`: bytes of two words, picked.
    Permute { dst: RegId, a: Operand, b: Operand, selector: Operand },
    /// `cvt[.rounding].to.from dst, src`: to the nearest.
    Convert { to: Ty, from: Ty, dst: RegId, src: Operand },
    /// `cvt.rn.bf16x2.f32 dst, high, low` and its kin: two float32 rounded into one register.
    Pack { format: Packed, dst: RegId, low: Operand, high: Operand },
    /// `mov.b32 dst, {low, high}` (from 16 bits) or `mov.b64 dst, {low, high}` (from 32).
    Join { ty: Ty, dst: RegId, low: Operand, high: Operand },
    /// `mov.b32 {low, high}, src` (to 16 bits) or `mov.b64 {low, high}, src` (to 32).
    Split { ty: Ty, low: RegId, high: RegId, src: Operand },
    /// `setp.cmp.ty dst, a, b`
    Compare { cmp: Cmp, ty: Ty, dst: RegId, a: Operand, b: Operand },
    /// `selp.ty dst, a, b, cond`: `a` where `cond` holds, else `b`.
    Select { ty: Ty, dst: RegId, a: Operand, b: Operand, cond: RegId },

    // ---- memory ------------------------------------------------------------------------------
    /// `ld.space[.cache][.vN].ty {dst..}, [address]`
    Load { space: Space, cache: Cache, ty: Ty, dst: Vec<RegId>, address: Address },
    /// `st.space[.vN].ty [address], {src..}`
    Store { space: Space, ty: Ty, src: Vec<Operand>, address: Address },
    /// `atom.order.scope.space.op.ty dst, [address], src[, swap]`
    Atomic {
        op: AtomicOp,
        order: Order,
        scope: Scope,
        space: Space,
        ty: Ty,
        dst: RegId,
        address: Address,
        src: Operand,
        /// For compare-and-swap: what is written if the memory holds `src`.
        swap: Option<Operand>,
    },
    /// `red.relaxed.scope.space.op[.vN].ty [address], {src..}`
    Reduce { op: AtomicOp, scope: Scope, space: Space, ty: Ty, address: Address, src: Vec<Operand> },
    /// `ld.acquire.scope.global.ty dst, [address]`
    LoadAcquire { scope: Scope, ty: Ty, dst: RegId, address: Address },
    /// `st.release.scope.global.ty [address], src`
    StoreRelease { scope: Scope, ty: Ty, src: Operand, address: Address },
    /// `ldmatrix.sync.aligned.m8n8.xN[.trans].shared.b16 {dst..}, [address]`: 1, 2 or 4 matrices.
    LoadMatrix { transposed: bool, dst: Vec<RegId>, address: Address },
    /// `stmatrix.sync.aligned.m8n8.xN[.trans].shared.b16 [address], {src..}`
    StoreMatrix { transposed: bool, src: Vec<RegId>, address: Address },
    /// `fence...`
    Fence(Fence),

    // ---- warps -------------------------------------------------------------------------------
    /// `shfl.sync.mode.b32 dst, src, lane, clamp, -1`
    Shuffle { mode: ShuffleMode, dst: RegId, src: Operand, lane: Operand },
    /// `vote.sync.mode.pred dst, src, -1`
    Vote { mode: VoteMode, dst: RegId, src: RegId },
    /// `vote.sync.ballot.b32 dst, src, -1`
    Ballot { dst: RegId, src: RegId },
    /// `redux.sync.op.ty dst, src, -1` (32-bit integers)
    WarpReduce { op: Binary, ty: Ty, dst: RegId, src: Operand },
    /// `elect.sync _|dst, -1`: true for one lane, the same each time.
    Elect { dst: RegId },
    /// `bar.warp.sync -1`
    WarpSync,
    /// `mma.sync.aligned.m16n8k16.row.col.f32.element.element.f32 {acc}, {a}, {b}, {acc}`: `a` of 16
    /// rows by `b` of 8 columns is added to the accumulators.
    Mma {
        /// Type of a and b.
        element: Element,
        /// float32 accumulators.
        acc: [RegId; 4],
        a: [RegId; 4],
        b: [RegId; 2],
    },

    // ---- barriers ----------------------------------------------------------------------------
    /// `bar.sync id, threads`: the named barrier `id` for so many threads.
    BarrierSync { id: Operand, threads: Operand },
    /// `bar.arrive id, threads`
    BarrierArrive { id: Operand, threads: Operand },
    /// `barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned`, each alone.
    ClusterArrive,
    /// See [`Op::ClusterArrive`].
    ClusterWait,
    /// `mapa.shared::cluster.u32 dst, address, rank`: where another block of the cluster has what
    /// this one has at `address`.
    MapShared { dst: RegId, address: Operand, rank: Operand },
    /// `mbarrier.init.shared::cta.b64 [address], count`
    MbarrierInit { address: Address, count: Operand },
    /// `mbarrier.inval.shared::cta.b64 [address]`
    MbarrierInvalidate { address: Address },
    /// `mbarrier.arrive.shared::cta.b64 _, [address]`; `shared::cluster` if remote, and then, with the
    /// cluster's scope, `mbarrier.arrive.release.cluster`.
    MbarrierArrive { address: Address, remote: bool, scope: Scope },
    /// `mbarrier.arrive.expect_tx.shared::cta.b64 _, [address], bytes`
    MbarrierArriveExpect { address: Address, bytes: Operand },
    /// `mbarrier.try_wait.parity.shared::cta.b64` in a loop: until the phase of `parity` is over; with the
    /// cluster's scope `mbarrier.try_wait.parity.acquire.cluster`.
    MbarrierWait { address: Address, parity: Operand, scope: Scope },
    /// `mbarrier.test_wait.parity.shared::cta.b64 dst, [address], parity`
    MbarrierTest { dst: RegId, address: Address, parity: Operand },

    // ---- bulk copies -------------------------------------------------------------------------
    /// `cp.async.bulk.tensor.Nd.shared::cluster.global.tile.mbarrier::complete_tx::bytes
    /// [dst], [map, {coordinates}], [barrier]` and its multicast and cache-hint forms.
    TmaLoad {
        dst: Address,
        map: RegId,
        coordinates: Vec<Operand>,
        barrier: Address,
        /// A bit for each block of the cluster that gets the tile, at the same offsets.
        multicast: Option<Operand>,
        hint: Option<RegId>,
    },
    /// `cp.async.bulk.tensor.Nd.global.shared::cta.tile.bulk_group [map, {coordinates}], [src]`
    TmaStore { map: RegId, coordinates: Vec<Operand>, src: Address, hint: Option<RegId> },
    /// `cp.reduce.async.bulk.tensor.Nd.global.shared::cta.add.tile.bulk_group [map, {..}], [src]`
    TmaReduceAdd { map: RegId, coordinates: Vec<Operand>, src: Address },
    /// `prefetch.tensormap [map]`
    PrefetchMap { map: RegId },
    /// `cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [dst], [src], bytes,
    /// [barrier]`
    BulkLoad { dst: Address, src: Address, bytes: Operand, barrier: Address, hint: Option<RegId> },
    /// `cp.async.bulk.global.shared::cta.bulk_group [dst], [src], bytes`
    BulkStore { dst: Address, src: Address, bytes: Operand },
    /// `cp.reduce.async.bulk.global.shared::cta.bulk_group.add.ty [dst], [src], bytes`
    BulkReduceAdd { ty: Ty, dst: Address, src: Address, bytes: Operand },
    /// `cp.async.bulk.commit_group`
    BulkCommit,
    /// `cp.async.bulk.wait_group[.read] pending`
    BulkWait { pending: u32, read: bool },
    /// `createpolicy.fractional.L2::which.b64 dst, 1.0`
    CachePolicy { dst: RegId, which: Policy },

    // ---- warpgroups --------------------------------------------------------------------------
    /// `wgmma.fence.sync.aligned`
    WgmmaFence,
    /// `wgmma.commit_group.sync.aligned`
    WgmmaCommit,
    /// `wgmma.wait_group.sync.aligned pending`
    WgmmaWait { pending: u32 },
    /// `wgmma.mma_async.sync.aligned.m64nNkK.f32.element.element {acc}, a, b, scale_d, 1, 1, ...`
    Wgmma {
        /// Type of a and b.
        element: Element,
        /// Columns of the product, a multiple of 8.
        n: u32,
        /// float32 accumulators: n / 2 of each thread.
        acc: Vec<RegId>,
        a: MatrixA,
        /// Descriptor of b in shared memory, 64 bits.
        b: Operand,
        /// Whether b is stored with n contiguous rather than k (16-bit types only).
        b_transposed: bool,
        /// Whether the product is added to the accumulators, a predicate or a constant; otherwise
        /// it replaces them.
        accumulate: Operand,
    },
    /// `setmaxnreg.inc.sync.aligned.u32 count`, or `dec`
    SetMaxRegisters { increase: bool, count: u32 },

    // ---- the rest ----------------------------------------------------------------------------
    /// `griddepcontrol.wait`: until the kernels before it are done, under programmatic launch.
    GridWait,
    /// `griddepcontrol.launch_dependents`
    GridLaunch,
    /// `nanosleep.u32 ns`
    Sleep { nanoseconds: Operand },
    /// `trap`
    Trap,
}

/// Where `a` of a wgmma comes from.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum MatrixA {
    /// Shared memory: a descriptor, and whether m is contiguous rather than k.
    Shared { descriptor: Operand, transposed: bool },
    /// Four 32-bit registers of each thread.
    Registers([RegId; 4]),
}

/// Special registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // named as in PTX
pub enum Special {
    TidX,
    CtaIdX,
    CtaIdY,
    CtaIdZ,
    GridX,
    GridY,
    GridZ,
    LaneId,
    ClusterCtaRank,
    SmId,
    Clock,
}

/// Operations on one operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unary {
    /// `neg`
    Neg,
    /// `abs`
    Abs,
    /// `not`
    Not,
    /// `popc`: bits that are set
    PopCount,
    /// `clz`: zeros before the highest bit that is set
    LeadingZeros,
    /// `brev`: bits in reverse order
    ReverseBits,
    /// `ex2.approx.ftz`
    Exp2,
    /// `lg2.approx.ftz`
    Log2,
    /// `rcp.approx.ftz`
    Reciprocal,
    /// `sqrt.approx.ftz`
    Sqrt,
    /// `rsqrt.approx.ftz`
    ReciprocalSqrt,
}

/// Operations on two operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binary {
    /// `add`; of floats `add.rn`, which ptxas never joins with a product to `fma`
    Add,
    /// `sub`; of floats `sub.rn`
    Sub,
    /// `mul`; of floats `mul.rn`, of integers `mul.lo`
    Mul,
    /// `mul.hi`
    MulHigh,
    /// `div`; for float32 `div.rn`
    Div,
    /// `rem`
    Rem,
    /// `min`; of a NaN and a number, the number
    Min,
    /// `max`; of a NaN and a number, the number
    Max,
    /// `and`
    And,
    /// `or`
    Or,
    /// `xor`
    Xor,
    /// `shl`; zero beyond the width
    Shl,
    /// `shr`; zeros or, if signed, signs come in
    Shr,
}

/// Operations on three operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ternary {
    /// `fma.rn`
    Fma,
    /// `mad.lo`
    Mad,
}

/// What [`Op::Pack`] rounds to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packed {
    /// Two bfloat16 in 32 bits.
    Bf16,
    /// Two float16 in 32 bits.
    F16,
    /// Two 8-bit floats in 16 bits, beyond the largest: the largest.
    E4m3,
    /// Likewise.
    E5m2,
}

/// Comparisons. Of floats they are ordered: false if one is NaN, but `Ne`, which is true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

/// Where memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Device memory; addresses of 64 bits.
    Global,
    /// Shared memory of this thread block; addresses of 32 bits.
    Shared,
    /// Shared memory of the cluster, at addresses made by [`Op::MapShared`] or at one's own.
    Cluster,
}

/// How a load may be cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// As usual.
    Default,
    /// `.nc`: nothing writes this memory while the kernel runs.
    Constant,
    /// `.volatile`: others may write it at any time.
    Volatile,
}

/// What an atomic operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum AtomicOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Exchange,
    CompareAndSwap,
}

/// What else an atomic operation orders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Order {
    Relaxed,
    Acquire,
    Release,
    AcquireRelease,
}

/// Who sees an atomic operation as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The thread block.
    Cta,
    /// The cluster.
    Cluster,
    /// The device.
    Gpu,
}

/// Fences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// `fence.proxy.async.shared::cta`: between ordinary accesses of shared memory and those of
    /// the TMA unit and wgmma.
    ProxyAsyncShared,
    /// `fence.proxy.async.global`: likewise of global memory.
    ProxyAsyncGlobal,
    /// `fence.mbarrier_init.release.cluster`: makes initialised mbarriers known to all.
    MbarrierInit,
    /// `fence.acq_rel.scope`: `__threadfence` and its kin.
    AcquireRelease(Scope),
}

/// How lanes find their partner; the mask is all lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShuffleMode {
    /// Lane `lane`, for all.
    Index,
    /// Own lane XOR `lane`.
    Butterfly,
    /// Own lane minus `lane`; lanes without such a partner keep their own.
    Up,
    /// Own lane plus `lane`; likewise.
    Down,
}

/// What lanes vote on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VoteMode {
    /// It holds for all.
    All,
    /// It holds for one at least.
    Any,
}

/// What the L2 cache should do with lines of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// They leave last.
    EvictLast,
    /// They leave first.
    EvictFirst,
}
