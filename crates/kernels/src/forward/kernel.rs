//! The forward kernel itself: what a thread block's producer and its consumers do.

use flex_block_attn_ptx::builder::{Address, TmaOptions};
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{
    Barrier, Fragments, Left, Phases, Place, RegTile, Right, Ring, Shared, SharedTile, WARPGROUP,
    Warpgroup,
};

use super::keys::Keys;
use super::problem::Problem;
use super::queries::{Note, Queries};
use super::softmax::Softmax;
use super::walk::{Notes, walk};
use super::work::{Jobs, plan};
use super::{Config, OWN, tiles};
use crate::canvas::Source;
use crate::exact::{Axis, Where};
use crate::gemm::pair;
use crate::lists::PARTIAL;

/// Stages of k and of v.
const STAGES: usize = 2;
/// The warps that plan and, for a video, walk; of the first, thread 0 loads.
const PLANNER: u32 = 1;
const WALKER: u32 = 2;
/// Named barriers: consumer `w` of at most three waits at `TURN + w` for its turn.
const TURN: u32 = 2;

/// The tensor maps.
#[derive(Clone, Copy)]
pub(super) struct Maps<'k> {
    pub(super) q: Source<'k>,
    pub(super) k: Source<'k>,
    pub(super) v: Source<'k>,
    pub(super) out: Source<'k>,
}

impl<'k> Maps<'k> {
    /// Declares them.
    pub(super) fn new(k: &'k Builder, canvas: bool) -> Self {
        let source = |name| Source::new(k, name, canvas);
        Self {
            q: source("q"),
            k: source("k"),
            v: source("v"),
            out: source("out"),
        }
    }
}

/// What is in shared memory.
pub(super) struct Stores<'k> {
    pub(super) jobs: Jobs<'k>,
    pub(super) queries: Queries<'k>,
    pub(super) keys: Ring<'k>,
    pub(super) values: Ring<'k>,
    /// Of the tile in each stage, the first keys of its pieces: the loader's notes, for which it has no
    /// registers. Where blocks may be partial, consumers read them, too.
    rows: Vec<Address<'k, u32>>,
    /// Of a video: what its tiles are put together from.
    boxes: Option<Notes<'k>>,
}

impl Config {
    pub(super) fn body(self, k: &Builder) {
        let maps = Maps::new(k, self.canvas);
        let problem = Problem::new(k, self);

        let shared = Shared::new(k);
        // Tiles first: they are aligned to more than all else.
        let ring = || Ring::new(&shared, STAGES, self.kv_shape(), 4 * self.consumers());
        let stores = Stores {
            queries: Queries::new(&shared, self),
            keys: ring(),
            values: ring(),
            jobs: Jobs::new(&shared, self.canvas),
            rows: (0..STAGES)
                .map(|_| shared.bytes(4 * self.pieces(), 4))
                .collect(),
            boxes: self.canvas.then(|| Notes::new(&shared, self)),
        };
        shared.finish();
        k.if_(k.tid().equals(0), || {
            stores.jobs.init();
            stores.queries.init();
            stores.keys.init();
            stores.values.init();
            stores.boxes.iter().for_each(Notes::init);
            k.mbarrier_init_fence();
        });
        k.sync_threads();

        let (producer, consumer) = self.registers();
        k.if_else(
            Warpgroup::number(k).equals(0),
            || {
                Warpgroup::release_registers(k, producer);
                let loads = k.tid().equals(0);
                match problem.grid.as_ref().zip(stores.boxes.as_ref()) {
                    None => {
                        k.if_(loads, || self.load(maps, &problem, &stores));
                        k.if_(k.tid().equals(PLANNER * 32), || {
                            plan(&problem, self, &stores.jobs);
                        });
                    }
                    Some((grid, notes)) => {
                        k.if_(loads, || {
                            tiles::load(&problem, grid, self, maps, &stores, notes);
                        });
                        let warp = k.tid() >> 5;
                        k.if_(warp.equals(PLANNER), || {
                            tiles::plan(&problem, grid, self, &stores.jobs);
                        });
                        k.if_(warp.equals(WALKER), || {
                            walk(&problem, grid, self, &stores.jobs, notes);
                        });
                    }
                }
            },
            || {
                Warpgroup::acquire_registers(k, consumer);
                self.consume(maps.out, &problem, &stores);
            },
        );
    }

    /// Loads, for each tile of queries, k and v tile by tile, v trailing by one as it does in the
    /// consumers.
    fn load<'k>(self, maps: Maps<'k>, problem: &Problem<'k>, stores: &Stores<'k>) {
        let k = problem.k;
        let Stores {
            jobs,
            queries,
            keys,
            values,
            rows,
            ..
        } = stores;
        let phases = Phases::new(k);
        let (keys, values) = (keys.producer(&phases), values.producer(&phases));
        let (filled, emptied) = (jobs.filled(&phases), queries.emptied(&phases));
        k.loop_(|leave| {
            filled.wait();
            let note = jobs.note(k);
            leave.when(note.is_end());
            let tiles = note.tiles;
            let (kv_head, batch) = (jobs.kv_head(k), note.batch());
            let line = [kv_head, batch];
            let some = || {
                let walk = Keys::new(problem, self, jobs.start(k));
                let load_keys = |stage: usize| {
                    let empty = match self.mask {
                        None => {
                            walk.next_tile(rows[stage]);
                            keys.wait(stage)
                        }
                        Some(_) => {
                            // Consumers read of the tile before until then.
                            let empty = keys.wait(stage);
                            walk.next_tile(rows[stage]);
                            empty
                        }
                    };
                    self.load_tile(k, empty, maps.k.rows(), rows[stage], line);
                };
                let load_values = |stage: usize| {
                    let empty = values.wait(stage);
                    self.load_tile(k, empty, maps.v.rows(), rows[stage], line);
                };
                // The first keys do not wait for the last output to be stored.
                load_keys(0);
                emptied.wait();
                queries.fill(k, maps.q.rows(), jobs.note(k));
                jobs.release();
                each_after_first(k, tiles, |stage, before| {
                    load_keys(stage);
                    load_values(before);
                });
                at_last_stage(k, tiles, load_values);
            };
            let none = || {
                emptied.wait();
                queries.pass(k, note);
                jobs.release();
            };
            k.if_else(tiles.gt(0), some, none);
        });
        emptied.wait();
        queries.pass(k, Note::end(k));
    }

    /// Has an empty stage filled with the pieces whose first keys are at `rows`.
    fn load_tile<'k>(
        self,
        k: &'k Builder,
        (tile, full): (SharedTile<'k>, Barrier<'k>),
        map: Reg<'k, u64>,
        rows: Address<'k, u32>,
        line: [Reg<'k, u32>; 2],
    ) {
        let options = TmaOptions::default();
        full.arrive_expect(tile.shape.bytes());
        for i in 0..self.pieces() {
            let row = k.load_shared(rows.at(4 * i));
            let row = match self.mask {
                None => row,
                Some(_) => row & !PARTIAL,
            };
            let place = Place::rows(row, line[0], line[1]);
            if self.pieces() == 1 {
                tile.load(map, place, full, options);
            } else {
                let part = tile.row_range(i * self.piece, self.piece);
                part.load_panels(map, place, full, options);
            }
        }
    }

    fn consume<'k>(self, out: Source<'k>, problem: &Problem<'k>, stores: &Stores<'k>) {
        let k = problem.k;
        let wg = Warpgroup::new(k, 1);
        let phases = Phases::new(k);
        let keys = stores.keys.consumer(wg.leader, &phases);
        let values = stores.values.consumer(wg.leader, &phases);
        let filled = stores.queries.filled(&phases);
        let q = stores.queries.tile.part(wg.index, OWN);
        let pair = pair(self.element);
        let scores = RegTile::uninit(k, self.kv_tile);
        let weights = Fragments::uninit(k, self.kv_tile / 16);
        let output = RegTile::uninit(k, self.head_dim);
        let softmax = Softmax::new(k, problem.scale);

        // Of a video, and how many tiles of keys were seen.
        let video = problem.grid.as_ref().zip(stores.boxes.as_ref());
        let video = video.map(|(grid, notes)| (grid, notes, k.var(0u32)));
        let hide = |stage: usize| {
            let release = || keys.release(stage);
            match video {
                None => self.hide(problem, stores, wg, &scores, stage, release),
                Some((grid, notes, turn)) => {
                    self.hide_blank(grid, notes, turn, wg, &scores);
                    turn.set(turn + 1);
                    release();
                }
            }
        };
        let step = |scores: &RegTile<'k>| match self.mask {
            None => softmax.step(scores),
            Some(_) => softmax.step_of_some(scores),
        };

        // Turns are in a circle, and the first warpgroup goes first.
        let last = wg.index.equals(self.consumers() - 1);
        let next = last.select(0u32, wg.index + 1);
        k.if_(wg.index.equals(0), || k.barrier_arrive(TURN, 2 * WARPGROUP));
        k.loop_(|leave| {
            filled.wait();
            let note = stores.queries.note(k);
            leave.when(note.is_end());
            let tiles = note.tiles;
            softmax.reset();
            output.fill(0.0);
            k.if_(tiles.gt(0), || {
                let k_tile = keys.wait(0);
                wg.fence();
                wg.product(&scores, Left::Tile(q), Right::Transposed(k_tile));
                wg.wait(0);
                hide(0);
                if !self.canvas {
                    k.if_(note.columns.lt(self.kv_tile), || {
                        let all = 0..self.kv_tile;
                        scores.set_columns_from(all, note.columns, wg.lane, f32::NEG_INFINITY);
                    });
                }
                step(&scores);
                scores.round_to(&weights, pair);

                each_after_first(k, tiles, |stage, before| {
                    let k_tile = keys.wait(stage);
                    k.barrier_sync(wg.index + TURN, 2 * WARPGROUP);
                    wg.fence();
                    wg.product(&scores, Left::Tile(q), Right::Transposed(k_tile));
                    // Under the product with k: the output is rescaled for the maximum found last.
                    output.scale_rows(softmax.factor);
                    let v_tile = values.wait(before);
                    wg.fence();
                    wg.add_product(&output, Left::Fragments(&weights), Right::Tile(v_tile));
                    k.barrier_arrive(next + TURN, 2 * WARPGROUP);
                    wg.wait(1);
                    hide(stage);
                    step(&scores);
                    wg.wait(0);
                    values.release(before);
                    scores.round_to(&weights, pair);
                });

                output.scale_rows(softmax.factor);
                at_last_stage(k, tiles, |stage| {
                    let v_tile = values.wait(stage);
                    wg.fence();
                    wg.add_product(&output, Left::Fragments(&weights), Right::Tile(v_tile));
                    wg.wait(0);
                    values.release(stage);
                });
            });
            if self.canvas {
                let zeros = stores.queries.note(k).columns;
                k.if_(zeros.gt(0), || {
                    softmax.see_zeros(zeros.to_f32());
                    output.scale_rows(softmax.factor);
                });
            }
            let (inverse, log_sum) = softmax.finish();
            output.scale_rows(inverse);
            // Read again: registers are worth more than this.
            let note = stores.queries.note(k);
            problem.store_lse(wg, note, log_sum);
            let to = (out, problem.grid.as_ref());
            stores.queries.store(k, wg, note, to, &output, pair);
        });
    }
}

impl Config {
    /// Hides, of a tile of scores, what the mask's expression hides in partial blocks. Gives the stage
    /// back when its notes have been read.
    fn hide<'k>(
        self,
        problem: &Problem<'k>,
        stores: &Stores<'k>,
        wg: Warpgroup<'k>,
        scores: &RegTile<'k>,
        stage: usize,
        release: impl FnOnce(),
    ) {
        let k = problem.k;
        let rows = stores.rows[stage];
        let Some(exact) = &problem.exact else {
            release();
            return;
        };
        let hide = |i: u32, word: Reg<'k, u32>| {
            k.if_(word.ge(PARTIAL), || {
                let note = stores.queries.note(k);
                exact.hide(
                    &scores.part(i * self.piece..(i + 1) * self.piece),
                    &Where {
                        batch: note.batch(),
                        head: note.head(),
                        rows: Axis::Queries(note.first + wg.index * OWN + wg.row()),
                        first_column: word & !PARTIAL,
                        lane: wg.lane,
                    },
                );
            });
        };
        let word = |i: u32| k.load_shared_uniform(rows.at(4 * i));
        if self.pieces() == 1 {
            let word = word(0);
            release();
            hide(0, word);
        } else {
            // There are no registers to keep all words in.
            (0..self.pieces()).for_each(|i| hide(i, word(i)));
            release();
        }
    }
}

/// Does `body(stage, stage before)` for each tile but the first.
pub(super) fn each_after_first<'k>(
    k: &'k Builder,
    tiles: Reg<'k, u32>,
    body: impl Fn(usize, usize),
) {
    let mut left = k.var(tiles - 1);
    k.loop_(|leave| {
        for stage in [1, 0] {
            leave.when(left.equals(0));
            body(stage, 1 - stage);
            left -= 1;
        }
    });
}

/// Does `body` for the stage that the last tile is in.
pub(super) fn at_last_stage<'k>(k: &'k Builder, tiles: Reg<'k, u32>, body: impl Fn(usize)) {
    k.if_else((tiles & 1).equals(1), || body(0), || body(1));
}
