//! What is different where tokens are a video's: the planner counts boxes, loaders copy them by the
//! notes of [`super::walk`], and consumers hide what a box has beside the video.

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{Phases, RegTile, Ring, Warpgroup};

use super::Config;
use super::kernel::{Maps, Stores};
use super::keys::Start;
use super::output::Results;
use super::problem::{Problem, Tile};
use super::queries::{Note, query_of_box};
use super::walk::Notes;
use super::work::{Job, Jobs, LATE};
use crate::canvas::{Grid, Source};

/// The planner of a video, a whole warp: as [`super::work::plan`].
pub(super) fn plan<'k>(
    problem: &Problem<'k>,
    grid: &Grid<'k>,
    config: Config,
    results: &Results<'k>,
    jobs: &Jobs<'k>,
) {
    let k = problem.k;
    let taken = jobs.taken(k);
    let queries = config.queries();
    problem.each_tile(None, |tile| {
        let place = Note::place(tile);
        let of_block = problem.q_block / queries;
        let row = problem.lists.of_rank(tile.record, tile.number / of_block);
        // Boxes with a token are put together: tiles at the video's borders have fewer than others.
        let before = tile.number % of_block * config.q_pieces();
        let found = gather(grid, config, row, before, jobs.spots());
        k.if_(found.gt(before), || {
            let (boxes, blank, list, count) = totals(problem, grid, tile, row);
            let keys = boxes * config.piece;
            let tiles = (keys + (config.kv_tile - 1)) / config.kv_tile;
            let note = Note {
                first: k.var(0u32),
                place,
                tiles,
                columns: blank,
            };
            let some = || {
                let zero = k.var(0u32);
                jobs.put(&Job {
                    note,
                    kv_head: problem.kv_head(note.head()),
                    // The walker starts at the list's end, with so many entries to come.
                    start: Start {
                        entry: list + count,
                        block: zero,
                        left: count,
                        missing: tiles * config.kv_tile - keys,
                        partial: zero,
                    },
                });
                taken.wait();
            };
            let none = || {
                // Of padding each token has a score of 0; of none the logarithm is -inf.
                let log_sum = blank.to_f32().log2() * std::f32::consts::LN_2;
                let query = |i| query_of_box(grid, jobs.spots(), config.piece, i);
                results.store_none(problem, note, (queries, query), config.head_dim, log_sum);
            };
            k.if_else(tiles.gt(0), some, none);
        });
    });
    jobs.put(&Job::none(k));
}

/// Leaves at `to` the spots of the pieces of a tile of queries: of the block's boxes that have a token
/// those behind the first `before` of these, and nowhere where there are none left. Gives how many the
/// block has. A whole warp, which must sync before its lanes read them.
fn gather<'k>(
    grid: &Grid<'k>,
    config: Config,
    block: Reg<'k, u32>,
    before: Reg<'k, u32>,
    to: Address<'k, u32>,
) -> Reg<'k, u32> {
    let k = block.builder();
    let (corner, boxes) = (grid.corner(block), grid.boxes_of_tile());
    let mut found = k.var(0u32);
    k.if_(k.lane().lt(config.q_pieces()), || {
        k.store_shared(to.plus(k.lane() * 4), grid.nowhere());
    });
    // Other lanes may write there next.
    k.warp_sync();
    k.for_(0, boxes, 32, |first| {
        let i = first + k.lane();
        let spot = grid.nth_box(corner, i);
        let there = i.lt(boxes) & grid.is_inside(spot);
        let those = there.ballot();
        let lanes_before = (k.var(1u32) << k.lane()) - 1;
        // Of those before it is a large number.
        let at = found + (those & lanes_before).count_ones() - before;
        k.if_(there & at.lt(config.q_pieces()), || {
            k.store_shared(to.plus(at * 4), spot);
        });
        found += those.count_ones();
    });
    found
}

/// Of a row of the mask: boxes of keys, padding that is attended, the list's first word, and its entries.
fn totals<'k>(
    problem: &Problem<'k>,
    grid: &Grid<'k>,
    tile: Tile<'k>,
    row: Reg<'k, u32>,
) -> (Reg<'k, u32>, Reg<'k, u32>, Reg<'k, u32>, Reg<'k, u32>) {
    let k = problem.k;
    let count = problem.lists.count(tile.record, row);
    let list = problem.lists.list(tile.record, row);
    let (mut boxes, mut blank) = (k.var(0u32), k.var(0u32));
    k.for_(k.lane(), count, 32, |i| {
        let counts = grid.counts(problem.lists.word(list + i));
        boxes += counts.0;
        blank += counts.1;
    });
    k.warp_sync();
    (boxes.warp_sum(), blank.warp_sum(), list, count)
}

/// What the two loaders of a video do, a whole warp each: one copies queries and keys, by the walker's
/// notes, the other values. One alone is busy for most of the time that a tile is computed in.
pub(super) struct Loader<'a, 'k> {
    pub(super) problem: &'a Problem<'k>,
    pub(super) grid: &'a Grid<'k>,
    pub(super) maps: Maps<'k>,
    pub(super) stores: &'a Stores<'k>,
    pub(super) notes: &'a Notes<'k>,
}

impl<'k> Loader<'_, 'k> {
    pub(super) fn load_keys(&self) {
        let Self {
            problem,
            grid,
            maps,
            stores,
            ..
        } = *self;
        let k = problem.k;
        let jobs = &stores.jobs;
        let phases = Phases::new(k);
        let (filled, queries) = (jobs.filled(&phases), stores.queries.filling(k));
        // Tiles of keys that are loaded.
        let mut turn = k.var(0u32);
        k.loop_(|leave| {
            filled.wait();
            let note = jobs.note(k);
            queries.announce_boxes(note, jobs.spots());
            leave.when(note.is_end());
            let line = [jobs.kv_head(k), note.batch()];
            let load = |turn| self.load(&stores.keys, maps.k, turn, line);
            // The first keys do not wait for the queries before to be done with.
            load(turn);
            queries.wait();
            queries.fill_boxes(grid, maps.q.boxes(), jobs.note(k), jobs.spots());
            let mut left = jobs.note(k).tiles;
            let late = left.min(LATE);
            // All lanes have read the job.
            k.warp_sync();
            k.loop_(|leave| {
                k.if_(k.lane().equals(0) & left.equals(late), || jobs.release());
                left -= 1;
                turn += 1;
                leave.when(left.equals(0));
                load(turn);
            });
        });
    }

    pub(super) fn load_values(&self) {
        let Self {
            problem,
            maps,
            stores,
            ..
        } = *self;
        let k = problem.k;
        let jobs = &stores.jobs;
        let filled = jobs.filled(&Phases::new(k));
        let mut turn = k.var(0u32);
        k.loop_(|leave| {
            filled.wait();
            let note = jobs.note(k);
            leave.when(note.is_end());
            let line = [jobs.kv_head(k), note.batch()];
            let mut left = note.tiles;
            // All lanes have read it.
            k.warp_sync();
            k.if_(k.lane().equals(0), || jobs.release());
            k.loop_(|leave| {
                self.load(&stores.values, maps.v, turn, line);
                turn += 1;
                left -= 1;
                leave.when(left.equals(0));
            });
        });
    }

    /// Has the next tile of a ring filled.
    fn load(&self, ring: &Ring<'k>, from: Source<'k>, turn: Reg<'k, u32>, line: [Reg<'k, u32>; 2]) {
        let k = self.problem.k;
        self.notes.wait(turn);
        // Consumers may wait for the copies: what can be known before the place is free is.
        let spot = self.notes.spot(self.grid, turn);
        let stacks = self.notes.stacks(turn);
        let empty = ring.wait_empty(turn);
        // All lanes have read the note.
        k.warp_sync();
        k.if_(k.lane().equals(0), || self.notes.take(turn));
        self.grid
            .fill(empty, from.boxes(), spot, Some(stacks), line);
    }
}

impl Config {
    /// Pieces of a tile of queries.
    pub(super) fn q_pieces(self) -> u32 {
        self.queries() / self.piece
    }

    /// Hides, of a tile of scores, what its note says. Says whether that is anything.
    pub(super) fn hide_blank<'k>(
        self,
        grid: &Grid<'k>,
        notes: &Notes<'k>,
        turn: Reg<'k, u32>,
        wg: Warpgroup<'k>,
        scores: &RegTile<'k>,
    ) -> Reg<'k, bool> {
        let k: &'k Builder = wg.lane.builder();
        let columns = notes.columns(turn);
        let any = columns.some_unlike();
        k.if_(any, || {
            for i in 0..self.kv_tile / 32 {
                k.if_(columns.has_blank(i), || {
                    let part = scores.part(32 * i..32 * (i + 1));
                    part.set_columns_without(&[columns.bits(i)], wg.lane, f32::NEG_INFINITY);
                });
            }
            k.if_(columns.has_heavy(), || {
                grid.weigh(scores, columns.heavy(), wg.lane);
            });
        });
        any
    }
}
