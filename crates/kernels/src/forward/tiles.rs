//! How a list of tiles of a video is walked: what the planner counts before, and a tile of keys at a
//! time, put together from boxes. The loader leaves a note of each tile for the consumers.
//!
//! A note has a spot for each piece, a word that says which pieces are not like others, and for each
//! piece the bits of its keys: of boxes that reach out of the video, of the text's last piece, and of
//! pieces that only fill the tile up, some do not count.

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{RegTile, Warpgroup};

use super::Config;
use super::keys::Start;
use super::problem::{Problem, Tile};
use super::queries::Note;
use super::work::{Job, Jobs};
use crate::canvas::{Grid, Walk};

/// In a note's word of unlike pieces, from here on those with a key that has a weight.
const HEAVY: u32 = 16;

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
                    start: Start {
                        entry: list + count,
                        block: zero,
                        left: zero,
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

/// A walk through a list, by the loader.
pub(super) struct Boxes<'a, 'k> {
    problem: &'a Problem<'k>,
    grid: &'a Grid<'k>,
    config: Config,
    /// As in [`Start`]: behind what comes next; of the tile at hand, tokens to come, padding included.
    entry: Reg<'k, u32>,
    left: Reg<'k, u32>,
    missing: Reg<'k, u32>,
    walk: Walk<'k>,
}

impl<'a, 'k> Boxes<'a, 'k> {
    /// A walk, of which nothing is done yet; it changes the registers of `start`.
    pub(super) fn new(
        problem: &'a Problem<'k>,
        grid: &'a Grid<'k>,
        config: Config,
        start: Start<'k>,
    ) -> Self {
        Self {
            problem,
            grid,
            config,
            entry: start.entry,
            left: start.left,
            missing: start.missing,
            walk: Walk {
                corner: start.block,
                inner: start.partial,
            },
        }
    }

    /// Leaves the note of the next tile.
    pub(super) fn next_tile(&self, note: Address<'k, u32>) {
        let (k, grid, piece) = (self.problem.k, self.grid, self.config.piece);
        let Self { mut missing, .. } = *self;
        let unlike = k.var(0u32);
        let mark = |bits: u32, i: Reg<'k, u32>| unlike.set(unlike | k.var(bits) << i);
        k.for_(0, self.config.pieces(), 1, |i| {
            let spot = grid.nowhere();
            let words: Vec<_> = (0..piece.div_ceil(32)).map(|_| k.var(0u32)).collect();
            k.if_else(
                missing.gt(0),
                || {
                    missing -= piece;
                    mark(1, i);
                },
                || {
                    spot.set(self.next_box());
                    let bits = grid.bits(spot);
                    k.if_not(grid.is_full(&bits), || mark(1, i));
                    k.if_(grid.heavy_row(spot).lt(piece), || {
                        mark((1 << HEAVY) + 1, i);
                    });
                    for (word, bits) in words.iter().zip(bits) {
                        word.set(bits);
                    }
                },
            );
            let own = note.plus(i * 4);
            k.store_shared(own, spot);
            for (word, bits) in (1..).zip(words) {
                k.store_shared(own.at(self.config.note_words(word)), bits);
            }
        });
        k.store_shared(note.at(self.config.unlike()), unlike);
    }

    /// The next box that has a token.
    fn next_box(&self) -> Reg<'k, u32> {
        let Self {
            mut entry,
            mut left,
            walk,
            ..
        } = *self;
        let (problem, grid, k) = (self.problem, self.grid, self.problem.k);
        let spot = k.var(0u32);
        k.loop_(|leave| {
            k.if_(left.equals(0), || {
                entry -= 1;
                walk.corner.set(grid.corner(problem.lists.word(entry)));
                walk.inner.set(0u32);
                left.set(problem.kv_block);
            });
            left -= self.config.piece;
            spot.set(grid.take(walk));
            leave.when(grid.is_inside(spot));
        });
        spot
    }
}

impl Config {
    /// Pieces of a tile of queries.
    pub(super) fn q_pieces(self) -> u32 {
        self.queries() / self.piece
    }

    /// Where in a note the n-th word of each piece lies.
    fn note_words(self, n: u32) -> u32 {
        4 * self.pieces() * n
    }

    /// Where in a note the word of unlike pieces lies.
    fn unlike(self) -> u32 {
        self.note_words(1 + self.piece.div_ceil(32))
    }

    /// Bytes of a note.
    pub(super) fn note_bytes(self) -> u32 {
        match self.canvas {
            false => self.note_words(1),
            true => self.unlike() + 4,
        }
    }

    /// Hides, of a tile of scores, what the note says; gives the stage back when it has been read.
    pub(super) fn hide_blank<'k>(
        self,
        grid: &Grid<'k>,
        note: Address<'k, u32>,
        wg: Warpgroup<'k>,
        scores: &RegTile<'k>,
        release: impl FnOnce(),
    ) {
        let k: &'k Builder = wg.lane.builder();
        let unlike = k.load_shared_uniform(note.at(self.unlike()));
        k.if_(unlike.differs(0), || {
            for i in 0..self.pieces() {
                let part = scores.part(i * self.piece..(i + 1) * self.piece);
                let word = |n| k.load_shared_uniform(note.at(self.note_words(n) + 4 * i));
                k.if_((unlike & (1 << i)).differs(0), || {
                    let bits: Vec<_> = (1..=self.piece.div_ceil(32)).map(word).collect();
                    part.set_columns_without(&bits, wg.lane, f32::NEG_INFINITY);
                });
                k.if_((unlike & (1 << (HEAVY + i))).differs(0), || {
                    grid.weigh(&part, grid.heavy_row(word(0)), wg.lane);
                });
            }
        });
        release();
    }
}
