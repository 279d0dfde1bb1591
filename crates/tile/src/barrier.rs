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
    parity: Reg<'k, u32>,
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
        Waiter {
            barrier: self,
            parity: self.k.var(0u32),
        }
    }

    /// Somebody for whom the barrier starts as if a phase had just been completed: the first wait
    /// passes at once. This is how producers wait for buffers that start out empty.
    #[track_caller]
    pub fn waiter_ahead(self) -> Waiter<'k> {
        Waiter {
            barrier: self,
            parity: self.k.var(1u32),
        }
    }

    pub(crate) fn address(self) -> Address<'k, u32> {
        self.address
    }
}

impl Waiter<'_> {
    /// Waits for the next phase.
    #[track_caller]
    pub fn wait(self) {
        self.barrier
            .k
            .mbarrier_wait(self.barrier.address, self.parity);
        let mut parity = self.parity;
        parity ^= 1;
    }
}
