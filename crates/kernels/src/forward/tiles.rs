//! What is different where tokens are a video's: the planner counts boxes, the loader copies them by
//! the notes of [`super::walk`], and consumers hide what a box has beside the video.

use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{Barrier, Phases, RegTile, SharedTile, Warpgroup};

use super::Config;
use super::kernel::{Maps, Stores, at_last_stage, each_after_first};
use super::keys::Start;
use super::problem::{Problem, Tile};
use super::queries::Note;
use super::walk::{HEAVY, Notes, UNLIKE, has};
use super::work::{Job, Jobs};
use crate::canvas::{Grid, Source};

/// The planner of a video, a whole warp: as [`super::work::plan`].
pub(super) fn plan<'k>(problem: &Problem<'k>, grid: &Grid<'k>, config: Config, jobs: &Jobs<'k>) {
    let k = problem.k;
    let leader = k.lane().equals(0);
    let emptied = jobs.emptied(k);
    let queries = config.queries();
    let q_tiles = problem.q_block / queries;
    problem.each_tile_of_warp(|tile| {
        let row = problem.lists.of_rank(tile.record, tile.number / q_tiles);
        let first = (row * q_tiles + tile.number % q_tiles) * queries;
        // Lane i has the spot of piece i of the queries: of tiles beside the video there is none.
        let piece = k.lane().min(queries / config.piece - 1);
        let spot = grid.spot(first + piece * config.piece);
        k.if_(grid.is_inside(spot).any(), || {
            let (boxes, blank, list, count) = totals(problem, grid, tile, row);
            let keys = boxes * config.piece;
            let tiles = (keys + (config.kv_tile - 1)) / config.kv_tile;
            emptied.wait();
            k.if_(k.lane().lt(config.q_pieces()), || {
                k.store_shared(jobs.spots().plus(k.lane() * 4), spot);
            });
            k.warp_sync();
            k.if_(leader, || {
                let zero = k.var(0u32);
                jobs.put(&Job {
                    note: Note {
                        first,
                        place: Note::place(tile),
                        tiles,
                        columns: blank,
                    },
                    kv_head: tile.kv_head,
                    // The walker starts at the list's end, with so many entries to come.
                    start: Start {
                        entry: list + count,
                        block: zero,
                        left: count,
                        missing: tiles * config.kv_tile - keys,
                        partial: zero,
                    },
                });
            });
        });
    });
    emptied.wait();
    k.if_(leader, || jobs.put(&Job::none(k)));
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

/// What the loader of a video does: as that of rows, by the walker's notes.
pub(super) fn load<'k>(
    problem: &Problem<'k>,
    grid: &Grid<'k>,
    config: Config,
    maps: Maps<'k>,
    stores: &Stores<'k>,
    notes: &Notes<'k>,
) {
    let k = problem.k;
    let Stores {
        jobs,
        queries,
        keys,
        values,
        ..
    } = stores;
    let phases = Phases::new(k);
    let (keys, values) = (keys.producer(&phases), values.producer(&phases));
    let (filled, emptied) = (jobs.filled(&phases), queries.emptied(&phases));
    // Tiles of keys that are loaded.
    let turn = k.var(0u32);
    k.loop_(|leave| {
        filled.wait();
        let note = jobs.note(k);
        leave.when(note.is_end());
        let tiles = note.tiles;
        let line = [jobs.kv_head(k), note.batch()];
        let fill = |(tile, full): (SharedTile<'k>, Barrier<'k>), from: Source<'k>, turn| {
            full.arrive_expect(tile.shape.bytes());
            for i in 0..config.pieces() {
                let part = tile.row_range(i * config.piece, config.piece);
                let spot = notes.piece(turn, i).spot();
                grid.load(part, from.boxes(), spot, line, full);
            }
        };
        let load_keys = |stage: usize| {
            notes.wait(turn);
            let empty = keys.wait(stage);
            notes.take(turn);
            fill(empty, maps.k, turn);
        };
        let load_values = |stage: usize, turn| fill(values.wait(stage), maps.v, turn);
        let some = || {
            // The first keys do not wait for the last output to be stored.
            load_keys(0);
            emptied.wait();
            queries.keep_spots(k, jobs.spots());
            queries.fill_boxes(grid, maps.q.boxes(), jobs.note(k));
            jobs.release();
            each_after_first(k, tiles, |stage, before| {
                let last = k.var(turn);
                turn.set(turn + 1);
                load_keys(stage);
                load_values(before, last);
            });
            at_last_stage(k, tiles, |stage| load_values(stage, turn));
            turn.set(turn + 1);
        };
        let none = || {
            emptied.wait();
            queries.keep_spots(k, jobs.spots());
            queries.pass(k, note);
            jobs.release();
        };
        k.if_else(tiles.gt(0), some, none);
    });
    emptied.wait();
    queries.pass(k, Note::end(k));
}

impl Config {
    /// Pieces of a tile of queries.
    pub(super) fn q_pieces(self) -> u32 {
        self.queries() / self.piece
    }

    /// Hides, of a tile of scores, what its note says.
    pub(super) fn hide_blank<'k>(
        self,
        grid: &Grid<'k>,
        notes: &Notes<'k>,
        turn: Reg<'k, u32>,
        wg: Warpgroup<'k>,
        scores: &RegTile<'k>,
    ) {
        let k: &'k Builder = wg.lane.builder();
        let kinds = notes.kinds(turn);
        k.if_(kinds.differs(0), || {
            for i in 0..self.pieces() {
                let part = scores.part(i * self.piece..(i + 1) * self.piece);
                let piece = notes.piece(turn, i);
                k.if_(has(kinds, UNLIKE, i), || {
                    part.set_columns_without(&piece.bits(self), wg.lane, f32::NEG_INFINITY);
                });
                k.if_(has(kinds, HEAVY, i), || {
                    grid.weigh(&part, piece.heavy_row(grid), wg.lane);
                });
            }
        });
    }
}
