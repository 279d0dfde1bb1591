//! The problem as the parameters say, and the queries that see a tile of keys: of each head that reads
//! the keys the lists of their blocks, merged, walked a piece at a time. Used by the loader, a warp.

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::{Builder, Reg};

use super::kernel::WARPS;
use super::tiles::{Job, KeyTile, Tiles};
use super::{Config, KEYS, UNIT};
use crate::canvas::{self, Grid};
use crate::chunk::Heads;
use crate::exact::Exact;
use crate::lists::Lists;
use crate::merge::{Merge, NO_BLOCK, WARP_TOKENS};

/// The golden ratio's part behind the point, times 2^32.
const GOLDEN: u32 = 0x9E37_79B9;

/// All parameters but the tensor maps.
pub(super) struct Problem<'k> {
    pub(super) k: &'k Builder,
    pub(super) lse: Reg<'k, u64>,
    pub(super) delta: Reg<'k, u64>,
    pub(super) dq: Reg<'k, u64>,
    pub(super) dk: Heads<'k>,
    pub(super) dv: Heads<'k>,
    pub(super) scale: Reg<'k, f32>,
    q_len: Reg<'k, u32>,
    pub(super) kv_len: Reg<'k, u32>,
    pub(super) q_block: Reg<'k, u32>,
    kv_block: Reg<'k, u32>,
    pub(super) heads: Reg<'k, u32>,
    /// Numbers of a head in the arrays of lse and delta.
    pub(super) line: Reg<'k, u32>,
    /// Where sums of integers are made: address of how many steps make 1, for each query.
    pub(super) steps: Option<Reg<'k, u64>>,
    /// Entries of a list that thread blocks start at different places of: of one that has all queries.
    /// 0 for none.
    spread: Reg<'k, u32>,
    /// How many of its first entries they start at.
    window: Reg<'k, u32>,
    pub(super) tiles: Tiles<'k>,
    /// What counts of partial blocks, if there may be any.
    pub(super) exact: Option<Exact<'k>>,
    /// The video whose tokens these are, if they are one's.
    pub(super) grid: Option<Grid<'k>>,
}

/// A walk through the lists of the heads that read the keys.
pub(super) struct Walk<'a, 'k> {
    problem: &'a Problem<'k>,
    config: Config,
    job: Job<'k>,
    /// The batch: what is read between a place's release and the copies into it lies in a register.
    batch: Reg<'k, u32>,
    /// Twice the head at hand, and one more in the second part of its lists.
    at: Reg<'k, u32>,
    lists: Merge<'k>,
    /// First query that is still to come of the block at hand, how many are, in whole pieces, and the
    /// warps whose keys they see.
    query: Reg<'k, u32>,
    left: Reg<'k, u32>,
    warps: Reg<'k, u32>,
    boxes: Option<Boxes<'k>>,
}

/// What a walk through a video's tiles has besides.
///
/// It lies in shared memory, for each lane apart: the loader has few registers. Four words are the
/// tile's corner and how far behind it the next box is, that box's first query, and the warps that want
/// it; behind all lanes' is one that is not 0 where the keys of the lane's warp have a token: else nobody
/// sees them.
#[derive(Clone, Copy)]
struct Boxes<'k> {
    words: Address<'k, u32>,
}

/// Bytes of a walk through boxes.
pub(super) const WALK_BYTES: u32 = 32 * 20;

impl<'k> Boxes<'k> {
    fn own(self, k: &'k Builder) -> Address<'k, u32> {
        self.words.plus(k.lane() * 16)
    }

    fn tokens(self, k: &'k Builder) -> Address<'k, u32> {
        self.words.at(32 * 16).plus(k.lane() * 4)
    }
}

impl<'k> Problem<'k> {
    /// Declares its parameters.
    pub(super) fn new(k: &'k Builder, config: Config) -> Self {
        let mut problem = Self {
            k,
            lse: k.param("lse"),
            delta: k.param("delta"),
            dq: k.param("dq"),
            dk: Heads::new(k, "dk"),
            dv: Heads::new(k, "dv"),
            scale: k.param("scale"),
            q_len: k.param("q_len"),
            kv_len: k.param("kv_len"),
            q_block: k.param("q_block"),
            kv_block: k.param("kv_block"),
            heads: k.param("heads"),
            line: k.param("line"),
            steps: None,
            spread: k.param("spread"),
            window: k.param("window"),
            tiles: Tiles::new(k, Lists::new(k), config.canvas, config.head_dim),
            exact: None,
            grid: None,
        };
        let lengths = [problem.q_len, problem.kv_len];
        problem.exact = config.mask.map(|mask| Exact::new(k, mask, lengths));
        problem.grid = config.canvas.then(|| Grid::new(k, config.piece));
        problem.steps = config.deterministic.then(|| k.param("steps"));
        problem
    }

    /// Queries of a head, in whole units.
    pub(super) fn padded(&self) -> Reg<'k, u32> {
        self.line - UNIT
    }

    /// Where among `own` entries of a list of `count` the walk starts; what lies before comes in the end.
    /// Of lists with all queries each thread block starts somewhere else, or all would add to the same
    /// tile of dq at the same time; but not far away, or what they read and add to would not stay in the
    /// L2 cache until the next one comes by. Other lists are walked as they lie.
    fn start(&self, keys: KeyTile<'k>, count: Reg<'k, u32>, own: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = self.k;
        let start = k.var(0u32);
        k.if_(count.equals(self.spread), || {
            // Multiples of the golden ratio, less their whole part, are spread evenly.
            let part = (keys.first >> KEYS.ilog2()) * GOLDEN;
            let window = self.window.min(own);
            start.set((part.times_wide(window) >> 32).to_u32());
        });
        start
    }
}

impl<'a, 'k> Walk<'a, 'k> {
    /// A walk that has yet to find its first list; of a video it has `words` for itself.
    pub(super) fn new(
        problem: &'a Problem<'k>,
        config: Config,
        job: Job<'k>,
        words: Option<Address<'k, u32>>,
    ) -> Self {
        let k = problem.k;
        let keys = job.keys(k);
        Self {
            problem,
            config,
            job,
            batch: keys.batch,
            at: k.var(keys.head * problem.tiles.group * 2 - 1),
            lists: Merge::new(k, WARPS, problem.tiles.lists().plan, config.mask.is_some()),
            query: k.var(0u32),
            left: k.var(0u32),
            warps: k.var(0u32),
            boxes: problem.grid.as_ref().zip(words).map(|(grid, words)| {
                let boxes = Boxes { words };
                let key = keys.first + k.lane() * WARP_TOKENS;
                let tokens = grid.is_inside(grid.spot(key)).select(1u32, 0u32);
                k.store_shared(boxes.tokens(k), tokens);
                k.store_shareds(boxes.own(k), [(); 4].map(|()| k.var(0u32)));
                boxes
            }),
        }
    }

    /// Goes on to the next head that has queries left; says whether there is one.
    pub(super) fn seek(&self) -> Reg<'k, bool> {
        let problem = self.problem;
        let some = || self.left.gt(0) | self.lists.some();
        problem.k.loop_(|leave| {
            leave.when(some());
            // Compared as equal: before the first head stands -1. The last is not kept: the loader has
            // few registers.
            let keys = self.job.keys(problem.k);
            let last = (keys.head + 1) * problem.tiles.group * 2 - 1;
            let Self { mut at, .. } = *self;
            leave.when(at.equals(last));
            at += 1;
            let lists = problem.tiles.lists();
            let record = lists.record(self.head(), keys.batch);
            self.lists.start(keys.first, problem.kv_len, |key| {
                let column = key / problem.kv_block;
                let (list, count) = (lists.list(record, column), lists.count(record, column));
                let count = match &self.boxes {
                    None => count,
                    Some(boxes) => count * problem.k.load_shared::<u32>(boxes.tokens(problem.k)),
                };
                let (first, own) = match problem.tiles.cut {
                    None => (problem.k.var(0u32), count),
                    Some(_) => self.job.share(problem.k, count),
                };
                let start = problem.start(keys, count, own);
                let list = list + first;
                let second = (at & 1).equals(1);
                (
                    second.select(list, list + start),
                    second.select(start, own - start),
                )
            });
        });
        some()
    }

    /// The head at hand.
    pub(super) fn head(&self) -> Reg<'k, u32> {
        self.at >> 1
    }

    /// Which line of the workspace is the head's.
    pub(super) fn line(&self) -> Reg<'k, u32> {
        self.batch * self.problem.heads + self.head()
    }

    /// Head and batch at hand.
    pub(super) fn place(&self) -> [Reg<'k, u32>; 2] {
        [self.head(), self.batch]
    }

    /// As [`Walk::next_piece`], of a video: of boxes that have a token. Where they are is told, too.
    pub(super) fn next_box(&self, grid: &Grid<'k>) -> (Reg<'k, u32>, Reg<'k, u32>, Reg<'k, u32>) {
        let (problem, piece) = (self.problem, self.config.piece);
        let (k, left) = (problem.k, self.left);
        let boxes = self.boxes.expect("a walk through a video");
        let [corner, inner, query, warps] = k.load_shareds(boxes.own(k));
        let walk = canvas::Walk { corner, inner };
        let (row, want) = (k.var(problem.padded()), k.var(0u32));
        let spot = grid.nowhere();
        k.loop_(|leave| {
            k.if_(left.equals(0), || {
                let (block, wanted) = self.lists.take();
                k.if_(block.lt(NO_BLOCK), || {
                    warps.set(wanted);
                    query.set(block * problem.q_block);
                    let queries = (problem.q_len - query).min(problem.q_block);
                    left.set((queries + (piece - 1)) & !(piece - 1));
                    walk.corner.set(grid.corner(block));
                    walk.inner.set(0u32);
                });
            });
            leave.when(left.equals(0));
            spot.set(grid.take(walk));
            row.set(query);
            want.set(warps);
            query.set(query + piece);
            left.set(left - piece);
            leave.when(grid.is_inside(spot));
            row.set(problem.padded());
            want.set(0u32);
            spot.set(grid.nowhere());
        });
        k.store_shareds(boxes.own(k), [corner, inner, query, warps]);
        (row, want, spot)
    }

    /// The first query of the head's next piece, and the warps whose keys it sees. If there is none,
    /// the query lies in the line's last unit, behind the sequence, and sees no keys.
    pub(super) fn next_piece(&self) -> (Reg<'k, u32>, Reg<'k, u32>) {
        let (problem, piece) = (self.problem, self.config.piece);
        let Self {
            mut query,
            mut left,
            ..
        } = *self;
        let k = problem.k;
        k.if_(left.equals(0), || {
            let (block, warps) = self.lists.take();
            k.if_(block.lt(NO_BLOCK), || {
                self.warps.set(warps);
                query.set(block * problem.q_block);
                // The sequence's last block may be short.
                let queries = (problem.q_len - query).min(problem.q_block);
                left.set((queries + (piece - 1)) & !(piece - 1));
            });
        });
        let (row, want) = (k.var(problem.padded()), k.var(0u32));
        k.if_(left.gt(0), || {
            row.set(query);
            want.set(self.warps);
            query += piece;
            left -= piece;
        });
        (row, want)
    }
}
