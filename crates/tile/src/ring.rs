//! [`Ring`]: tiles that producers fill, by TMA or by stores, and consumers use up, in turn.
//!
//! Stages may be known when the kernel is built: loops over tiles are unrolled by the number of
//! stages, so that descriptors and addresses are constants. A consumer that leaves out tiles as it
//! goes may have its stage in a register instead. Each side keeps a parity for each stage, so a ring
//! may be left at any stage and started again at stage 0, as long as both sides do so alike.
//!
//! Or both sides count tiles through all of the kernel, leaving out none: how many there were before
//! one, its turn, says both its stage and its parity.

use flex_block_attn_ptx::builder::TmaOptions;
use flex_block_attn_ptx::{Builder, Reg};

use crate::barrier::BARRIER_BYTES;
use crate::{Barrier, Phases, Place, Shape, Shared, SharedTile, Waiter};

/// Bytes from a stage's barriers to the next one's.
const NEXT_BARRIERS: u32 = 2 * BARRIER_BYTES;

/// Some tiles of one shape, each with a barrier that says it is full and one that says it is
/// empty again. Tiles lie one after the other, and so do the pairs of barriers.
#[derive(Debug, Clone)]
pub struct Ring<'k> {
    stages: Vec<Stage<'k>>,
    /// Whether two thread blocks fill it together.
    of_pair: bool,
}

#[derive(Debug, Clone, Copy)]
struct Stage<'k> {
    tile: SharedTile<'k>,
    full: Barrier<'k>,
    empty: Barrier<'k>,
}

impl<'k> Ring<'k> {
    /// `stages` tiles, filled by one thread's copies; each is empty after `releases` arrivals: one by
    /// each consumer's warp.
    pub fn new(shared: &Shared<'k>, stages: usize, shape: Shape, releases: u32) -> Self {
        Self::stored(shared, stages, shape, 1, releases)
    }

    /// The same, each being full after `fills` arrivals: one by each warp that stores a part of it.
    pub fn stored(
        shared: &Shared<'k>,
        stages: usize,
        shape: Shape,
        fills: u32,
        releases: u32,
    ) -> Self {
        let tiles: Vec<_> = (0..stages).map(|_| shared.tile(shape)).collect();
        let stages = tiles
            .into_iter()
            .map(|tile| Stage {
                tile,
                full: shared.barrier(fills),
                empty: shared.barrier(releases),
            })
            .collect();
        Self {
            stages,
            of_pair: false,
        }
    }

    /// As [`Ring::new`], for a cluster of two thread blocks that fill their rings together, each with
    /// copies to both: a stage is empty after `releases` arrivals by each of the two. By turns only.
    pub fn of_pair(shared: &Shared<'k>, stages: usize, shape: Shape, releases: u32) -> Self {
        Self {
            of_pair: true,
            ..Self::new(shared, stages, shape, 2 * releases)
        }
    }

    /// Makes its barriers ready, see [`Barrier::init`].
    #[track_caller]
    pub fn init(&self) {
        for stage in &self.stages {
            stage.full.init();
            stage.empty.init();
        }
    }

    /// Waits until the tile whose turn it is has been filled.
    ///
    /// # Panics
    /// If there are not a power of two of stages.
    #[track_caller]
    pub fn wait_full(&self, turn: Reg<'k, u32>) -> SharedTile<'k> {
        let (stage, parity) = self.of_turn(turn);
        let Stage { tile, full, .. } = self.stages[0];
        full.following(stage, NEXT_BARRIERS).wait_for(parity);
        tile.following(stage)
    }

    /// The tile whose turn it is, which must have been waited for.
    ///
    /// # Panics
    /// If there are not a power of two of stages.
    #[track_caller]
    pub fn tile(&self, turn: Reg<'k, u32>) -> SharedTile<'k> {
        let (stage, _) = self.of_turn(turn);
        self.stages[0].tile.following(stage)
    }

    /// Waits until the place of the tile whose turn it is is empty, see [`Producer::wait`].
    ///
    /// # Panics
    /// If there are not a power of two of stages.
    #[track_caller]
    pub fn wait_empty(&self, turn: Reg<'k, u32>) -> (SharedTile<'k>, Barrier<'k>) {
        let (stage, parity) = self.of_turn(turn);
        let Stage { tile, full, empty } = self.stages[0];
        empty.following(stage, NEXT_BARRIERS).wait_for(parity ^ 1);
        (tile.following(stage), full.following(stage, NEXT_BARRIERS))
    }

    /// Says that this warp, of which `leader` is one lane, needs the tile whose turn it was no longer.
    ///
    /// # Panics
    /// If there are not a power of two of stages.
    #[track_caller]
    pub fn release(&self, turn: Reg<'k, u32>, leader: Reg<'k, bool>) {
        let (stage, _) = self.of_turn(turn);
        let empty = self.stages[0].empty.following(stage, NEXT_BARRIERS);
        let k = leader.builder();
        if self.of_pair {
            // Two lanes, each at one of the two.
            let rank = k.lane() & 1;
            k.where_(k.lane().lt(2), || empty.arrive_in_block(rank));
        } else {
            k.where_(leader, || empty.arrive());
        }
    }

    /// Stage and parity of a turn.
    fn of_turn(&self, turn: Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, u32>) {
        let stages = self.stages.len() as u32;
        assert!(stages.is_power_of_two(), "{stages} stages");
        (turn & (stages - 1), (turn >> stages.ilog2()) & 1)
    }

    /// The side that fills.
    #[track_caller]
    pub fn producer(&self, phases: &Phases<'k>) -> Producer<'k> {
        let side = |&stage: &Stage<'k>| (stage, phases.waiter_ahead(stage.empty));
        Producer {
            stages: self.stages.iter().map(side).collect(),
        }
    }

    /// A side that uses what was filled: whole warps, of which `leader` is one lane each.
    #[track_caller]
    pub fn consumer(&self, leader: Reg<'k, bool>, phases: &Phases<'k>) -> Consumer<'k> {
        let side = |&stage: &Stage<'k>| (stage, phases.waiter(stage.full));
        Consumer {
            k: leader.builder(),
            leader,
            stages: self.stages.iter().map(side).collect(),
        }
    }
}

/// Fills a ring's tiles.
#[derive(Debug, Clone)]
pub struct Producer<'k> {
    stages: Vec<(Stage<'k>, Waiter<'k>)>,
}

impl<'k> Producer<'k> {
    /// Waits until the stage is empty, then has it filled by one copy.
    #[track_caller]
    pub fn load(&self, stage: usize, map: Reg<'k, u64>, place: Place, options: TmaOptions<'k>) {
        self.fill(stage, |tile, full| tile.load(map, place, full, options));
    }

    /// Waits until the stage is empty, then has it filled by what `copies` issues: copies to all
    /// of the tile, counted at the barrier.
    #[track_caller]
    pub fn fill(&self, stage: usize, copies: impl FnOnce(SharedTile<'k>, Barrier<'k>)) {
        let (tile, full) = self.wait(stage);
        full.arrive_expect(tile.shape.bytes());
        copies(tile, full);
    }

    /// Says for a warp that uses none of the stage's next tile that it needs it no longer; the stage has
    /// been waited for.
    #[track_caller]
    pub fn release(&self, stage: usize) {
        self.stages[stage].0.empty.arrive();
    }

    /// Waits until the stage is empty. Who wants to say more than that it is full writes it
    /// somewhere, then arrives at the barrier that is given, then copies. Who stores arrives after
    /// that.
    #[track_caller]
    pub fn wait(&self, stage: usize) -> (SharedTile<'k>, Barrier<'k>) {
        let (Stage { tile, full, .. }, empty) = self.stages[stage];
        empty.wait();
        (tile, full)
    }
}

/// Uses a ring's tiles.
#[derive(Debug, Clone)]
pub struct Consumer<'k> {
    k: &'k Builder,
    leader: Reg<'k, bool>,
    stages: Vec<(Stage<'k>, Waiter<'k>)>,
}

impl<'k> Consumer<'k> {
    /// Waits until the stage is full.
    #[track_caller]
    pub fn wait(&self, stage: usize) -> SharedTile<'k> {
        let (stage, full) = self.stages[stage];
        full.wait();
        stage.tile
    }

    /// The stage's tile, which must have been waited for.
    pub fn tile(&self, stage: usize) -> SharedTile<'k> {
        self.stages[stage].0.tile
    }

    /// Says that this warp needs the stage no longer: one lane arrives.
    #[track_caller]
    pub fn release(&self, stage: usize) {
        let empty = self.stages[stage].0.empty;
        self.k.where_(self.leader, || empty.arrive());
    }

    /// As [`Consumer::wait`], of a stage in a register that is the same in the whole warp.
    #[track_caller]
    pub fn wait_at(&self, stage: Reg<'k, u32>) {
        let (_, full) = self.stages[0];
        full.wait_at(stage, NEXT_BARRIERS);
    }

    /// Counts the stage's next tile without waiting for it, which may be done later by the parity that is
    /// given, if at all.
    #[track_caller]
    pub fn pass_at(&self, stage: Reg<'k, u32>) -> Reg<'k, u32> {
        let (_, full) = self.stages[0];
        full.pass_at(stage)
    }

    /// Waits for a tile that was passed, see [`Consumer::pass_at`].
    #[track_caller]
    pub fn wait_for_at(&self, stage: Reg<'k, u32>, parity: Reg<'k, u32>) {
        let full = self.stages[0].0.full.following(stage, NEXT_BARRIERS);
        full.wait_for(parity);
    }

    /// As [`Consumer::tile`], of such a stage.
    #[track_caller]
    pub fn tile_at(&self, stage: Reg<'k, u32>) -> SharedTile<'k> {
        // ptxas must know that it is the same, or it moves each of a product's descriptors to uniform
        // registers on its own.
        self.tile(0).following(stage.uniform())
    }

    /// As [`Consumer::release`], of such a stage.
    #[track_caller]
    pub fn release_at(&self, stage: Reg<'k, u32>) {
        let empty = self.stages[0].0.empty.following(stage, NEXT_BARRIERS);
        self.k.where_(self.leader, || empty.arrive());
    }
}
