//! [`Barrier`]: an mbarrier in shared memory, [`Barriers`]: some of a kind; [`Phases`] and [`Waiter`]:
//! who keeps count of their phases.

use std::cell::Cell;

use flex_block_attn_ptx::builder::{Address, Value};
use flex_block_attn_ptx::{Builder, Reg};

/// Bytes of a barrier.
pub(crate) const BARRIER_BYTES: u32 = 8;

/// An mbarrier. A phase is complete after its count of arrivals and all bytes expected by them.
#[derive(Debug, Clone, Copy)]
pub struct Barrier<'k> {
    k: &'k Builder,
    address: Address<'k, u32>,
    count: u32,
}

/// Barriers side by side, one of which is chosen at run time.
#[derive(Debug, Clone, Copy)]
pub struct Barriers<'k> {
    first: Barrier<'k>,
    number: u32,
}

/// A role's view of its barriers: how often it has waited at each, by parity, up to 32 of them in
/// one register. Registers are what the tightest roles lack.
#[derive(Debug)]
pub struct Phases<'k> {
    parities: Reg<'k, u32>,
    used: Cell<u32>,
}

/// One role's view of a barrier: each [`Waiter::wait`] is for the phase after the last.
#[derive(Debug, Clone, Copy)]
pub struct Waiter<'k> {
    barrier: Barrier<'k>,
    parities: Reg<'k, u32>,
    /// Which bit of them is this barrier's.
    bit: u32,
    /// Whether it starts as if a phase had been completed.
    ahead: bool,
}

impl<'k> Phases<'k> {
    /// A role that has not waited yet.
    #[track_caller]
    pub fn new(k: &'k Builder) -> Self {
        Self {
            parities: k.var(0u32),
            used: Cell::new(0),
        }
    }

    /// Waits for a barrier's first phase, then the second, and so on.
    ///
    /// # Panics
    /// If there are 32 already.
    pub fn waiter(&self, barrier: Barrier<'k>) -> Waiter<'k> {
        self.add(barrier, false)
    }

    /// As if a phase had just been completed: the first wait passes at once. This is how producers
    /// wait for buffers that start out empty.
    ///
    /// # Panics
    /// If there are 32 already.
    pub fn waiter_ahead(&self, barrier: Barrier<'k>) -> Waiter<'k> {
        self.add(barrier, true)
    }

    fn add(&self, barrier: Barrier<'k>, ahead: bool) -> Waiter<'k> {
        let bit = self.used.replace(self.used.get() + 1);
        assert!(bit < 32, "a role with more than 32 barriers");
        Waiter {
            barrier,
            parities: self.parities,
            bit,
            ahead,
        }
    }
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

    /// Arrives at the barrier that thread block `rank` of the cluster has in this one's place.
    #[track_caller]
    pub fn arrive_in_block(self, rank: Reg<'k, u32>) {
        self.k.mbarrier_arrive_remote(self.address.in_block(rank));
    }

    /// The same; what this thread has stored there is seen after [`Waiter::wait_for_block`].
    #[track_caller]
    pub fn arrive_in_block_release(self, rank: Reg<'k, u32>) {
        let there = self.address.in_block(rank);
        self.k.mbarrier_arrive_remote_release(there);
    }

    /// Arrives, and has the phase wait for so many bytes of copies.
    #[track_caller]
    pub fn arrive_expect(self, bytes: u32) {
        self.k.mbarrier_arrive_expect(self.address, bytes);
    }

    /// Has so many contiguous bytes, a multiple of 16, loaded from global to shared memory and counted
    /// here.
    #[track_caller]
    pub fn load_bytes(self, to: Address<'k, u32>, from: Reg<'k, u64>, bytes: u32) {
        self.k.bulk_load(to, from, bytes, self.address);
    }

    /// The `index`-th of some barriers that are `bytes` bytes apart, of which this is the first.
    #[track_caller]
    pub(crate) fn following(self, index: Reg<'k, u32>, bytes: u32) -> Self {
        Self {
            address: self.address.plus(index * bytes),
            ..self
        }
    }

    /// Waits for the end of a phase, by its parity: 0 for the first, then 1, then 0 again.
    #[track_caller]
    pub fn wait_for(self, parity: Reg<'k, u32>) {
        self.k.mbarrier_wait(self.address, parity);
    }

    pub(crate) fn address(self) -> Address<'k, u32> {
        self.address
    }
}

impl<'k> Barriers<'k> {
    pub(crate) fn new(first: Barrier<'k>, number: u32) -> Self {
        Self { first, number }
    }

    /// Makes them ready, see [`Barrier::init`].
    #[track_caller]
    pub fn init(self) {
        let first = self.first;
        for i in 0..self.number {
            let address = first.address.at(i * BARRIER_BYTES);
            Barrier { address, ..first }.init();
        }
    }

    /// The `index`-th.
    #[track_caller]
    pub fn at(self, index: Reg<'k, u32>) -> Barrier<'k> {
        self.first.following(index, BARRIER_BYTES)
    }

    /// The one whose turn it is, where each completes a phase, one after the other, then each its
    /// second, and so on: `turn` is how many phases there were before.
    ///
    /// # Panics
    /// If there are not a power of two of them.
    #[track_caller]
    pub fn in_turn(self, turn: Reg<'k, u32>) -> Barrier<'k> {
        assert!(self.number.is_power_of_two(), "{} barriers", self.number);
        self.at(turn & (self.number - 1))
    }

    /// Waits for the phase of that one.
    ///
    /// # Panics
    /// As [`Barriers::in_turn`].
    #[track_caller]
    pub fn wait_in_turn(self, turn: Reg<'k, u32>) {
        let Barrier { k, address, .. } = self.in_turn(turn);
        k.mbarrier_wait(address, (turn >> self.number.ilog2()) & 1);
    }
}

impl<'k> Waiter<'k> {
    /// Waits for the next phase.
    #[track_caller]
    pub fn wait(self) {
        let Barrier { k, address, .. } = self.barrier;
        k.mbarrier_wait(address, self.parity(self.bit));
        self.pass();
    }

    /// The same; what another thread block of the cluster has stored here before it arrived is seen after it.
    #[track_caller]
    pub fn wait_for_block(self) {
        let Barrier { k, address, .. } = self.barrier;
        k.mbarrier_wait_for_block(address, self.parity(self.bit));
        self.pass();
    }

    /// Counts the phase.
    #[track_caller]
    fn pass(self) {
        let mut parities = self.parities;
        parities ^= 1 << self.bit;
    }

    /// Waits for the next phase of the `index`-th barrier of some that are `bytes` bytes apart, of
    /// which this is the first: their waiters were made one after the other.
    #[track_caller]
    pub(crate) fn wait_at(self, index: Reg<'k, u32>, bytes: u32) {
        let barrier = self.barrier.following(index, bytes);
        let parity = self.pass_at(index);
        barrier.k.mbarrier_wait(barrier.address, parity);
    }

    /// Counts the next phase of that barrier without waiting for it. Gives its parity.
    #[track_caller]
    pub(crate) fn pass_at(self, index: Reg<'k, u32>) -> Reg<'k, u32> {
        let Self {
            barrier,
            mut parities,
            bit,
            ..
        } = self;
        let bit = index + bit;
        let parity = self.parity(bit);
        parities ^= barrier.k.var(1u32) << bit;
        parity
    }

    /// The parity of the next phase of the barrier of that bit.
    #[track_caller]
    fn parity(self, bit: impl Value<u32>) -> Reg<'k, u32> {
        let waited = (self.parities >> bit) & 1;
        if self.ahead { waited ^ 1 } else { waited }
    }
}
