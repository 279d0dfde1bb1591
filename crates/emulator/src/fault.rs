//! What a kernel can do wrong: [`Fault`], one [`Kind`] for each mistake.
//!
//! In: kinds with their data, from the part of the emulator that noticed, and the instruction and
//! warp at which it was. Out: an error whose text says what, where in Rust source, by whom, on which
//! memory, and what would have made it right.

use std::fmt;

/// A kernel broke a rule of the machine.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "kernel {kernel}, block {block:?}, warp {warp}{}: {kind}\n  at {at}: {instruction}",
    lanes_text(*lanes)
)]
pub struct Fault {
    /// The kernel's name.
    pub kernel: String,
    /// What is wrong.
    pub kind: Kind,
    /// The instruction at which it was noticed.
    pub instruction: String,
    /// Its place in Rust source.
    pub at: String,
    /// The thread block, by its index in the grid.
    pub block: [u32; 3],
    /// The warp, counted in its block.
    pub warp: u32,
    /// A bit for each lane concerned.
    pub lanes: u32,
}

fn lanes_text(lanes: u32) -> String {
    match lanes {
        0 | u32::MAX => String::new(),
        _ if lanes.count_ones() == 1 => format!(", lane {}", lanes.trailing_zeros()),
        _ => format!(", lanes {lanes:#010x}"),
    }
}

/// A byte of memory, by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The allocation's name, or whose shared memory.
    pub region: String,
    /// Bytes from its start. Negative or beyond its end where nothing is.
    pub offset: i64,
    /// The address.
    pub address: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} + {} (address {:#x})",
            self.region, self.offset, self.address
        )
    }
}

/// An earlier access that a later one conflicts with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Earlier {
    /// What it did: "read", "write", ...
    pub what: &'static str,
    /// By whom.
    pub who: String,
    /// The instruction.
    pub instruction: String,
    /// Its place in Rust source.
    pub at: String,
}

impl fmt::Display for Earlier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} by {} at {}: {}",
            self.what, self.who, self.at, self.instruction
        )
    }
}

/// Warps of a thread block that can go no further, all for the same reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Their thread block.
    pub block: [u32; 3],
    /// The warps.
    pub warps: Vec<u32>,
    /// What they wait for, and how far that is.
    pub what: String,
    /// The instruction.
    pub instruction: String,
    /// Its place in Rust source.
    pub at: String,
}

/// Mistakes.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Kind {
    /// The launch does not fit the kernel.
    #[error("the launch does not fit the kernel: {reason}")]
    Launch {
        /// In what.
        reason: String,
    },
    /// A register is read that nothing was written to.
    #[error("register {register} is read before it is written")]
    UninitialisedRegister {
        /// Its name in PTX.
        register: String,
    },
    /// All lanes must execute an instruction together, and some are elsewhere.
    #[error("all lanes must execute this together, only {active:#010x} do")]
    Divergence {
        /// Lanes that do.
        active: u32,
    },
    /// No memory is there.
    #[error("{place}: no memory there for {bytes} bytes")]
    OutOfBounds {
        /// Where.
        place: Place,
        /// Bytes of the access.
        bytes: u32,
    },
    /// An address is not a multiple of what it must be.
    #[error("{place} must be a multiple of {needed}")]
    Misaligned {
        /// Where.
        place: Place,
        /// Of what.
        needed: u32,
    },
    /// Memory is read that nothing was written to.
    #[error("{place} is read before it is written")]
    UninitialisedMemory {
        /// Where.
        place: Place,
    },
    /// Two lanes store to the same bytes in one instruction.
    #[error("two lanes store to {place} in one instruction")]
    LaneOverlap {
        /// Where.
        place: Place,
    },
    /// Two accesses of one place, one a write, in no order.
    #[error("this {what} of {place} is not ordered after the {earlier}")]
    Race {
        /// Where.
        place: Place,
        /// What the later access does.
        what: &'static str,
        /// The other access.
        earlier: Box<Earlier>,
    },
    /// An async access (bulk copy, wgmma) of what was written by ordinary stores, with no
    /// `fence.proxy.async` between.
    #[error("no fence.proxy.async lies between this async {what} of {place} and the {earlier}")]
    ProxyFence {
        /// Where.
        place: Place,
        /// What the later access does.
        what: &'static str,
        /// The write.
        earlier: Box<Earlier>,
    },
    /// An access of what a thread of another block of the cluster wrote, behind an arrival and a wait
    /// that order only what thread blocks do by themselves.
    #[error(
        "this {what} of {place} follows the {earlier}, but not in the cluster's scope: the arrival wants \
         .release.cluster, the wait .acquire.cluster"
    )]
    Scope {
        /// Where.
        place: Place,
        /// What the later access does.
        what: &'static str,
        /// The write.
        earlier: Box<Earlier>,
    },
    /// `ld.global.nc` of memory that the launch writes.
    #[error("{place} is loaded by ld.global.nc, and written in the same launch")]
    ConstantWritten {
        /// Where.
        place: Place,
    },
    /// Integer division by zero.
    #[error("integer division by zero")]
    DivisionByZero,
    /// An ordinary access of an mbarrier's bytes.
    #[error("{place} is an mbarrier: only mbarrier instructions may touch it")]
    LiveMbarrier {
        /// Where.
        place: Place,
    },
    /// Misuse of an mbarrier.
    #[error("mbarrier at {place}: {problem}")]
    Mbarrier {
        /// Where.
        place: Place,
        /// What is wrong.
        problem: String,
    },
    /// Misuse of a named barrier.
    #[error("barrier {id}: {problem}")]
    NamedBarrier {
        /// Which.
        id: u32,
        /// What is wrong.
        problem: String,
    },
    /// Misuse of the cluster barrier.
    #[error("cluster barrier: {problem}")]
    ClusterBarrier {
        /// What is wrong.
        problem: String,
    },
    /// Misuse of `setmaxnreg`.
    #[error("setmaxnreg: {problem}")]
    RegisterCount {
        /// What is wrong.
        problem: String,
    },
    /// A matrix descriptor that the hardware would misread.
    #[error("matrix descriptor: {problem}")]
    Descriptor {
        /// What is wrong.
        problem: String,
    },
    /// A bulk copy that the hardware would refuse.
    #[error("bulk copy: {problem}")]
    Bulk {
        /// What is wrong.
        problem: String,
    },
    /// An accumulator is used while a wgmma may still write it.
    #[error("accumulator register {register} is used before the wgmma.wait_group that covers it")]
    AccumulatorInFlight {
        /// Its name in PTX.
        register: String,
    },
    /// An A operand is overwritten while a wgmma may still read it.
    #[error(
        "register {register}, an A operand, is written before the wgmma.wait_group that covers it"
    )]
    OperandInFlight {
        /// Its name in PTX.
        register: String,
    },
    /// Registers of a wgmma were used by other instructions, or by a wgmma of another shape, since
    /// the last `wgmma.fence`.
    #[error("no wgmma.fence lies between this wgmma and an earlier use of register {register}")]
    MissingWgmmaFence {
        /// Its name in PTX.
        register: String,
    },
    /// The four warps of a warpgroup do not execute the same warpgroup instructions.
    #[error("the warps of a warpgroup differ: {problem}")]
    Warpgroup {
        /// In what.
        problem: String,
    },
    /// A kernel that may start before the launches before it are over does not wait for them.
    #[error("{what} before griddepcontrol.wait: the launches before may not be over")]
    Early {
        /// What it does.
        what: &'static str,
    },
    /// Asynchronous work is left at the end.
    #[error("at exit: {problem}")]
    LeftBehind {
        /// What.
        problem: String,
    },
    /// No warp can move and nothing is under way.
    #[error("deadlock{}", waiting_text(waiting))]
    Deadlock {
        /// Who waits for what.
        waiting: Vec<Waiting>,
    },
    /// `trap`
    #[error("trap")]
    Trap,
    /// More instructions than [`crate::Options::limit`] allows.
    #[error("more than {limit} instructions were executed")]
    Limit {
        /// Instructions allowed.
        limit: u64,
    },
    /// Something that the hardware may know and the emulator does not.
    #[error("not supported by the emulator: {what}")]
    Unsupported {
        /// What.
        what: String,
    },
}

fn waiting_text(waiting: &[Waiting]) -> String {
    let text = |w: &Waiting| {
        let (warps, waits) = match w.warps[..] {
            [warp] => (format!("warp {warp}"), "waits"),
            _ => (format!("warps {:?}", w.warps), "wait"),
        };
        let Waiting {
            block,
            what,
            instruction,
            at,
            ..
        } = w;
        format!("\n  block {block:?}, {warps} {waits} for {what}\n    at {at}: {instruction}")
    };
    waiting.iter().map(text).collect()
}

/// A kind on its way up, with the lanes concerned (none: all active ones).
#[derive(Debug)]
pub(crate) struct Wrong {
    pub(crate) kind: Box<Kind>,
    pub(crate) lanes: u32,
    /// The instruction, the block and the warp that caused it, if not those being executed.
    pub(crate) origin: Option<(u32, [u32; 3], u32)>,
}

impl Wrong {
    /// Says which lanes are concerned, if nobody did before.
    pub(crate) fn at_lane(mut self, lane: usize) -> Self {
        if self.lanes == 0 {
            self.lanes = 1 << lane;
        }
        self
    }
}

impl From<Kind> for Wrong {
    fn from(kind: Kind) -> Self {
        Self {
            kind: Box::new(kind),
            lanes: 0,
            origin: None,
        }
    }
}

/// What the parts of the emulator return.
pub(crate) type Done<T = ()> = Result<T, Wrong>;
