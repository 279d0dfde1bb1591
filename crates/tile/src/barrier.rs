//! [`Barrier`]: an mbarrier in shared memory, and [`Waiter`], who keeps count of its phases.

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::{Builder, Reg};

/// An mbarrier. A phase is complete after its count of arrivals and all bytes expected by them.
#[derive(Debug, Clone, Copy)]
pub struct Barrier<'k> {
    k: &'k Builder,
    address: Address<'k, u32>,
    count: u32,
}

/// One role's view of a barrier: each [`Waiter::wait`] is for the phase after the last.
#[derive(Debug, Clone, Copy)]
pub struct Waiter<'k> {
    barrier: Barrier<'k>,
    /// Parities of the phases to wait for: this one's at `bit`. Barriers of a ring share a register.
    parities: Reg<'k, u32>,
    bit: u32,
}

impl<'k> Barrier<'k> {
    pub(crate) fn new(k: &'k Builder, address: Address<'k, u32>, count: u32) -> Self {
        Self { k, address, count }
    }

    /// Makes it ready. One thread does so for all barriers, then
    /// [`Builder::mbarrier_init_fence`], then all threads sync.
    #[track_caller]
    pub fn init(self) {
        self.k.mbarrier_init(self.address, self.count);
    }

    /// Arrives.
    #[track_caller]
    pub fn arrive(self) {
        self.k.mbarrier_arrive(self.address);
    }

    /// Arrives, and has the phase wait for so many bytes of copies.
    #[track_caller]
    pub fn arrive_expect(self, bytes: u32) {
        self.k.mbarrier_arrive_expect(self.address, bytes);
    }

    /// Somebody who waits for the first phase, then the second, and so on.
    #[track_caller]
    pub fn waiter(self) -> Waiter<'k> {
        Self::waiters([self])[0]
    }

    /// Somebody for whom the barrier starts as if a phase had just been completed: the first wait
    /// passes at once. This is how producers wait for buffers that start out empty.
    #[track_caller]
    pub fn waiter_ahead(self) -> Waiter<'k> {
        Self::waiters_ahead([self])[0]
    }

    /// [`Barrier::waiter`] of each, up to 32.
    #[track_caller]
    pub fn waiters(barriers: impl IntoIterator<Item = Self>) -> Vec<Waiter<'k>> {
        Self::waiters_from(barriers.into_iter().collect(), 0)
    }

    /// [`Barrier::waiter_ahead`] of each, up to 32.
    #[track_caller]
    pub fn waiters_ahead(barriers: impl IntoIterator<Item = Self>) -> Vec<Waiter<'k>> {
        Self::waiters_from(barriers.into_iter().collect(), 1)
    }

    #[track_caller]
    fn waiters_from(barriers: Vec<Self>, parity: u32) -> Vec<Waiter<'k>> {
        let count = barriers.len() as u32;
        assert!((1..=32).contains(&count), "{count} barriers");
        let parities = barriers[0].k.var(parity * (u32::MAX >> (32 - count)));
        let waiter = |(bit, barrier)| Waiter {
            barrier,
            parities,
            bit,
        };
        (0..).zip(barriers).map(waiter).collect()
    }

    pub(crate) fn address(self) -> Address<'k, u32> {
        self.address
    }
}

impl Waiter<'_> {
    /// Waits for the next phase.
    #[track_caller]
    pub fn wait(self) {
        let Self {
            barrier,
            mut parities,
            bit,
        } = self;
        barrier
            .k
            .mbarrier_wait(barrier.address, (parities >> bit) & 1);
        parities ^= 1 << bit;
    }
}
