//! [`Options`]: how a kernel is run; [`Statistics`]: what it did.

/// When asynchronous operations are performed. A right kernel's results do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Completion {
    /// As late as the program allows: copies to shared memory when no warp can move otherwise,
    /// copies from it at the wait that covers them, wgmma likewise.
    #[default]
    Latest,
    /// When they are issued.
    Earliest,
}

/// Who moves next. A right kernel's results do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Schedule {
    /// Each warp in turn.
    #[default]
    RoundRobin,
    /// By chance, from a seed: runs of any length, now and then a warp that is left out for long;
    /// copies complete at any time.
    Random(u64),
}

/// How a kernel is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// When asynchronous operations are performed.
    pub mode: Completion,
    /// Who moves next.
    pub schedule: Schedule,
    /// Thread blocks that run side by side; whole clusters, one at least.
    pub resident: usize,
    /// Instructions of all warps together, before the run is given up.
    pub limit: u64,
    /// Whether sums of floats must come in one order, as their last bits depend on it: if nothing
    /// orders two of them, that is a race.
    pub ordered_sums: bool,
}

impl Default for Options {
    /// Latest completion, each warp in turn, two blocks side by side.
    fn default() -> Self {
        Self {
            mode: Completion::Latest,
            schedule: Schedule::RoundRobin,
            resident: 2,
            limit: 1 << 34,
            ordered_sums: false,
        }
    }
}

impl Options {
    /// The ways in which each kernel should be run: both modes, each warp in turn and by chance.
    pub fn all(seeds: u64) -> Vec<Self> {
        let schedules = (0..seeds).map(Schedule::Random);
        std::iter::once(Schedule::RoundRobin)
            .chain(schedules)
            .flat_map(|schedule| {
                [Completion::Latest, Completion::Earliest].map(|mode| Self {
                    mode,
                    schedule,
                    ..Self::default()
                })
            })
            .collect()
    }
}

/// What a kernel did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Instructions executed, by the warp's index in its block divided by four: by warpgroup.
    pub instructions: Vec<u64>,
    /// Floating-point operations of wgmma.
    pub wgmma_flops: u64,
    /// Bytes that bulk copies brought to shared memory (once for each block that got them).
    pub bulk_loaded: u64,
    /// Bytes that bulk copies and reductions took to global memory.
    pub bulk_stored: u64,
    /// Bytes that ordinary loads read from global memory.
    pub loaded: u64,
    /// Bytes that ordinary stores, atomics and reductions wrote to global memory.
    pub stored: u64,
    /// Thread blocks run.
    pub blocks: u64,
}

/// A small generator of numbers by chance (xorshift64*).
#[derive(Debug)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        // Zero is the one state that never changes; close seeds must not look alike.
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let bits = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        (bits as usize) % bound.max(1)
    }
}
