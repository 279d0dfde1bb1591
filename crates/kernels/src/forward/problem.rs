//! The whole problem as the parameters say, and how it is cut into tiles of queries.

use flex_block_attn_ptx::ir::Special;
use flex_block_attn_ptx::{Builder, Reg};

use super::board::Board;
use super::parts::Parts;
use super::{Config, Rows};
use crate::canvas::Grid;
use crate::exact::Exact;
use crate::lists::Lists;

/// All parameters but the tensor maps.
pub(super) struct Problem<'k> {
    pub(super) k: &'k Builder,
    pub(super) heads: Reg<'k, u32>,
    pub(super) q_len: Reg<'k, u32>,
    /// Factor of the scores, in units of log2.
    pub(super) scale: Reg<'k, f32>,
    pub(super) kv_len: Reg<'k, u32>,
    pub(super) kv_block: Reg<'k, u32>,
    counter: Reg<'k, u64>,
    /// Tiles of queries of all heads and batches, or pairs of them; or, where some are computed in parts,
    /// jobs.
    jobs: Reg<'k, u32>,
    /// Tiles, or pairs, that come a head after the other.
    apart: Reg<'k, u32>,
    /// Heads of the others, which come together.
    together: Reg<'k, u32>,
    /// Tiles of queries of a head, or pairs.
    of_head: Reg<'k, u32>,
    pub(super) q_block: Reg<'k, u32>,
    /// Heads of q for each of k and v.
    group: Reg<'k, u32>,
    /// What is computed in parts, where it can be.
    pub(super) parts: Option<Parts<'k>>,
    /// The plan's rows.
    pub(super) lists: Lists<'k>,
    /// What counts of partial blocks, if there may be any.
    pub(super) exact: Option<Exact<'k>>,
    /// The video whose tokens these are, if they are one's.
    pub(super) grid: Option<Grid<'k>>,
    rows: Rows,
}

/// A tile of queries: which of its head's.
#[derive(Clone, Copy)]
pub(super) struct Tile<'k> {
    pub(super) head: Reg<'k, u32>,
    pub(super) batch: Reg<'k, u32>,
    /// Head of k and v.
    pub(super) kv_head: Reg<'k, u32>,
    /// First word of the plan's record for this head.
    pub(super) record: Reg<'k, u32>,
    /// Its number in the head.
    pub(super) number: Reg<'k, u32>,
    /// Which part of it is meant.
    pub(super) part: Part<'k>,
}

/// Which of a head's rows a query is, and whether it is a token at all.
pub(super) type Query<'k> = (Reg<'k, u32>, Reg<'k, bool>);

/// A part of a tile of queries: some of its list of keys.
#[derive(Clone, Copy)]
pub(super) struct Part<'k> {
    /// The slot where its results go, and one more; 0 for a tile as a whole.
    pub(super) slot: Reg<'k, u32>,
    /// Its number.
    pub(super) number: Reg<'k, u32>,
}

impl<'k> Problem<'k> {
    /// Declares its parameters.
    pub(super) fn new(k: &'k Builder, config: Config) -> Self {
        let mut problem = Self {
            k,
            heads: k.param("heads"),
            q_len: k.param("q_len"),
            scale: k.param("scale"),
            kv_len: k.param("kv_len"),
            kv_block: k.param("kv_block"),
            counter: k.param("counter"),
            jobs: k.param("jobs"),
            apart: k.param("apart"),
            together: k.param("together"),
            of_head: k.param("of_head"),
            q_block: k.param("q_block"),
            group: k.param("group"),
            parts: config.has_parts().then(|| Parts::new(k, config)),
            lists: Lists::new(k),
            exact: None,
            grid: None,
            rows: config.rows,
        };
        let lengths = [problem.q_len, problem.kv_len];
        problem.exact = config.mask.map(|mask| Exact::new(k, mask, lengths));
        problem.grid = config.canvas.then(|| Grid::new(k, config.piece));
        problem
    }

    /// Does `body` for each tile of queries that this thread block takes, in a whole warp; of a pair, which
    /// has a `board`, both take one of the same job. Leaves the counter as it was.
    pub(super) fn each_tile(&self, board: Option<&Board<'k>>, body: impl FnOnce(Tile<'k>)) {
        let k = self.k;
        let reader = board.map(|board| board.reader(k));
        // Who takes jobs: thread blocks, or pairs.
        let taker = |block: Reg<'k, u32>| if board.is_some() { block / 2 } else { block };
        let first_lane = k.lane().equals(0);
        let job = k.var(taker(k.cta_x()));
        k.loop_(|leave| {
            leave.when(job.ge(self.jobs));
            let (tile, part) = match &self.parts {
                Some(parts) => parts.of_job(job),
                None => (job, Part::whole(k)),
            };
            body(self.tile(tile, part));
            let take = || self.take(first_lane) + taker(k.grid_x());
            job.set(match &reader {
                None => take(),
                Some(reader) => reader.next(take),
            });
        });
    }

    /// Takes a job that nobody has taken yet, but for the first that each has: a whole warp.
    fn take(&self, first_lane: Reg<'k, bool>) -> Reg<'k, u32> {
        let k = self.k;
        let taken = k.var(0u32);
        k.if_(first_lane, || {
            taken.set(k.atomic_add_global(self.counter, 1));
            // As often as there are jobs. Who counts last counts for the next launch.
            k.if_(taken.equals(self.jobs - 1), || {
                k.atomic_add_global(self.counter, k.var(0u32) - self.jobs);
            });
        });
        taken.uniform()
    }

    /// A tile by its number among all; of a pair this thread block's.
    pub(super) fn tile(&self, tile: Reg<'k, u32>, part: Part<'k>) -> Tile<'k> {
        let (line, number) = self.place(tile);
        let number = match self.rows {
            Rows::Whole(_) | Rows::Mixed => number,
            Rows::Pairs(_) => number * 2 + self.k.special(Special::ClusterCtaRank),
        };
        let (head, batch) = (line % self.heads, line / self.heads);
        Tile {
            head,
            batch,
            kv_head: self.kv_head(head),
            record: self.lists.record(head, batch),
            number,
            part,
        }
    }

    /// The head of k and v for one of q.
    pub(super) fn kv_head(&self, head: Reg<'k, u32>) -> Reg<'k, u32> {
        head / self.group
    }

    /// The mask's row that a tile of so many queries, of one block, is in, and its first query. Where a head
    /// is one block, since all rows are alike, that is the first row: of lists as long the first comes first.
    pub(super) fn row(&self, tile: Tile<'k>, queries: u32) -> (Reg<'k, u32>, Reg<'k, u32>) {
        let of_row = self.q_block / queries;
        let row = self.lists.of_rank(tile.record, tile.number / of_row);
        (row, (row * of_row + tile.number % of_row) * queries)
    }

    /// Which head's a tile is, or a pair, counted over all batches, and its number there. Heads come one
    /// after the other, so that those who run together share keys in the L2 cache. Short lists come last in
    /// a head; so that they do in the end, too, the last heads come together.
    fn place(&self, tile: Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, u32>) {
        let k = self.k;
        let (line, number) = (k.var(tile / self.of_head), k.var(tile % self.of_head));
        k.if_(tile.ge(self.apart), || {
            let late = tile - self.apart;
            line.set(self.apart / self.of_head + late % self.together);
            number.set(late / self.together);
        });
        (line, number)
    }

    /// A query by its number in its head, but for those of a video.
    pub(super) fn query(&self, number: Reg<'k, u32>) -> Query<'k> {
        (number, number.lt(self.q_len))
    }

    /// Keys of the block that starts at key `first`: the sequence's last may be short.
    pub(super) fn keys_of_block(&self, first: Reg<'k, u32>) -> Reg<'k, u32> {
        (self.kv_len - first).min(self.kv_block)
    }
}

impl<'k> Part<'k> {
    /// A tile as a whole.
    pub(super) fn whole(k: &'k Builder) -> Self {
        let [slot, number] = [(); 2].map(|()| k.var(0u32));
        Self { slot, number }
    }
}

/// The next multiple of `step`.
pub(super) fn rounded_up(value: Reg<'_, u32>, step: u32) -> Reg<'_, u32> {
    if step.is_power_of_two() {
        (value + (step - 1)) & !(step - 1)
    } else {
        (value + (step - 1)) / step * step
    }
}
