//! [`Board`]: how both thread blocks of a pair come to have the same job next. The first one takes it from
//! the counter that all thread blocks share, and puts its number up in the second one's shared memory. Called
//! by the planner.

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::ir::Special;
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{Barrier, Phases, Shared, Waiter};

/// What lies in shared memory, of each of the two.
pub(super) struct Board<'k> {
    /// The next job's number, and that it is there: of the second one.
    number: Address<'k, u32>,
    up: Barrier<'k>,
    /// It was read: of the first one.
    read: Barrier<'k>,
}

/// A planner's view.
pub(super) struct Reader<'a, 'k> {
    board: &'a Board<'k>,
    rank: Reg<'k, u32>,
    up: Waiter<'k>,
    read: Waiter<'k>,
}

impl<'k> Board<'k> {
    pub(super) fn new(shared: &Shared<'k>) -> Self {
        Self {
            number: shared.bytes(4, 4),
            up: shared.barrier(1),
            read: shared.barrier(1),
        }
    }

    pub(super) fn init(&self) {
        self.up.init();
        self.read.init();
    }

    pub(super) fn reader(&self, k: &'k Builder) -> Reader<'_, 'k> {
        let phases = Phases::new(k);
        Reader {
            board: self,
            rank: k.special(Special::ClusterCtaRank),
            up: phases.waiter(self.up),
            read: phases.waiter_ahead(self.read),
        }
    }
}

impl<'k> Reader<'_, 'k> {
    /// The job that comes next, which `take` takes from the counter: a whole warp, of both thread blocks.
    pub(super) fn next(&self, take: impl FnOnce() -> Reg<'k, u32>) -> Reg<'k, u32> {
        let k = self.rank.builder();
        let &Board { number, up, read } = self.board;
        let next = k.var(0u32);
        let first = || {
            next.set(take());
            // What was put up before.
            self.read.wait();
            k.if_(k.lane().equals(0), || {
                let second = k.var(1u32);
                k.store_cluster(number.in_block(second), next);
                up.arrive_in_block_release(second);
            });
        };
        let second = || {
            self.up.wait_for_block();
            next.set(k.load_shared_uniform(number));
            k.if_(k.lane().equals(0), || read.arrive_in_block(k.var(0u32)));
        };
        k.if_else(self.rank.equals(0), first, second);
        next
    }
}
