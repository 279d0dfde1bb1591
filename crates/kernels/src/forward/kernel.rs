//! The forward kernel itself: what a thread block's producer and its consumers do.

use flex_block_attn_ptx::builder::{Address, TmaOptions};
use flex_block_attn_ptx::ir::Special;
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{
    Barrier, Fragments, Left, Phases, Place, RegTile, Right, Ring, Shared, SharedTile, WARPGROUP,
    Warpgroup,
};

use super::board::Board;
use super::keys::Keys;
use super::output::Results;
use super::problem::Problem;
use super::queries::{Queries, Using};
use super::softmax::Softmax;
use super::walk::{Notes, walk};
use super::work::{Jobs, LATE, plan};
use super::{Config, OWN, Rows, tiles};
use crate::canvas::{Boxes, Source};
use crate::exact::{Axis, Where};
use crate::gemm::pair;
use crate::lists::PARTIAL;

/// The producer's warps. The loader is thread 0 of the first; for a video the whole warp, with one that
/// walks, and a second loader, of values.
const LOADER: u32 = 0;
const PLANNER: u32 = 1;
const WALKER: u32 = 2;
const SECOND_LOADER: u32 = 3;
/// Named barriers: consumer `w` of at most three waits at `TURN + w` for its turn.
const TURN: u32 = 2;

/// The tensor maps.
#[derive(Clone, Copy)]
pub(super) struct Maps<'k> {
    pub(super) q: Source<'k>,
    pub(super) k: Source<'k>,
    pub(super) v: Source<'k>,
}

impl<'k> Maps<'k> {
    /// Declares them.
    pub(super) fn new(k: &'k Builder, canvas: bool) -> Self {
        let source = |name, boxes| Source::new(k, name, canvas.then_some(boxes));
        Self {
            q: source("q", Boxes::Single),
            k: source("k", Boxes::Stacked),
            v: source("v", Boxes::Stacked),
        }
    }
}

/// What is in shared memory.
pub(super) struct Stores<'k> {
    pub(super) jobs: Jobs<'k>,
    /// Of a pair.
    board: Option<Board<'k>>,
    pub(super) queries: Queries<'k>,
    pub(super) keys: Ring<'k>,
    pub(super) values: Ring<'k>,
    /// Of each of the last tiles, one after the other, the first keys of its pieces: the loader's notes,
    /// for which it has no registers. Where blocks may be partial, consumers read them, too.
    rows: Address<'k, u32>,
    /// Of a video: what its tiles are put together from.
    boxes: Option<Notes<'k>>,
}

impl Config {
    pub(super) fn body(self, k: &Builder) {
        let maps = Maps::new(k, self.canvas);
        let results = Results::new(k);
        let problem = Problem::new(k, self);

        let shared = Shared::new(k);
        // Tiles first: they are aligned to more than all else.
        let warps = 4 * self.consumers();
        let ring = || match self.rows {
            Rows::Pairs(_) => Ring::of_pair(&shared, self.places(), self.kv_shape(), warps),
            Rows::Whole(_) | Rows::Mixed => {
                Ring::new(&shared, self.places(), self.kv_shape(), warps)
            }
        };
        let stores = Stores {
            queries: Queries::new(&shared, self),
            keys: ring(),
            values: ring(),
            jobs: Jobs::new(&shared, self.canvas),
            board: matches!(self.rows, Rows::Pairs(_)).then(|| Board::new(&shared)),
            rows: shared.bytes(self.kept_rows() * self.row_bytes(), 4),
            boxes: self.canvas.then(|| Notes::new(&shared, self)),
        };
        shared.finish();
        k.if_(k.tid().equals(0), || {
            stores.jobs.init();
            stores.queries.init();
            stores.keys.init();
            stores.values.init();
            stores.board.iter().for_each(Board::init);
            stores.boxes.iter().for_each(Notes::init);
            k.mbarrier_init_fence();
        });
        self.sync_all(k);

        let (producer, consumer) = self.registers();
        k.if_else(
            Warpgroup::number(k).equals(0),
            || {
                Warpgroup::release_registers(k, producer);
                let warp = k.tid() >> 5;
                match problem.grid.as_ref().zip(stores.boxes.as_ref()) {
                    None => {
                        k.if_(k.tid().equals(0), || self.load(maps, &problem, &stores));
                        k.if_(warp.equals(PLANNER), || {
                            plan(
                                &problem,
                                self,
                                &results,
                                &stores.jobs,
                                stores.board.as_ref(),
                            );
                        });
                    }
                    Some((grid, notes)) => {
                        let loader = tiles::Loader {
                            problem: &problem,
                            grid,
                            maps,
                            stores: &stores,
                            notes,
                        };
                        k.if_(warp.equals(LOADER), || loader.load_keys());
                        k.if_(warp.equals(SECOND_LOADER), || loader.load_values());
                        k.if_(warp.equals(PLANNER), || {
                            tiles::plan(&problem, grid, self, &results, &stores.jobs);
                        });
                        k.if_(warp.equals(WALKER), || {
                            walk(&problem, grid, self, &stores.jobs, notes);
                        });
                    }
                }
            },
            || {
                Warpgroup::acquire_registers(k, consumer);
                self.consume(&problem, &results, &stores);
            },
        );
        if matches!(self.rows, Rows::Pairs(_)) {
            // Until then the other one may still arrive at barriers here.
            k.cluster_sync();
        }
    }

    /// Waits for all threads of the thread block, of a pair those of both.
    fn sync_all(self, k: &Builder) {
        match self.rows {
            Rows::Pairs(_) => k.cluster_sync(),
            Rows::Whole(_) | Rows::Mixed => k.sync_threads(),
        }
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
            ..
        } = stores;
        let phases = Phases::new(k);
        let (filled, queries) = (jobs.filled(&phases), queries.filling(k));
        // Tiles of keys that are loaded.
        let mut turn = k.var(0u32);
        k.loop_(|leave| {
            filled.wait();
            queries.announce(jobs.note(k));
            leave.when(jobs.note(k).is_end());
            let mut left = jobs.note(k).tiles;
            let line = [jobs.kv_head(k), jobs.note(k).batch()];
            let walk = Keys::new(problem, self, jobs.start(k));
            let load_keys = |turn: Reg<'k, u32>| {
                let rows = self.rows_of(stores, turn);
                // To look up blocks takes long: it is done while the tile's place is not yet free.
                walk.next_tile(rows);
                self.load_tile(k, keys.wait_empty(turn), maps.k.rows(), rows, line);
            };
            let load_values = |turn: Reg<'k, u32>| {
                let rows = self.rows_of(stores, turn);
                self.load_tile(k, values.wait_empty(turn), maps.v.rows(), rows, line);
            };
            // The first keys do not wait for the queries before to be done with.
            load_keys(turn);
            queries.wait();
            queries.fill(maps.q.rows(), jobs.note(k));
            let late = left.min(LATE);
            k.loop_(|leave| {
                k.if_(left.equals(late), || jobs.release());
                left -= 1;
                leave.when(left.equals(0));
                load_keys(turn + 1);
                load_values(turn);
                turn += 1;
            });
            load_values(turn);
            turn += 1;
        });
    }

    /// Tiles of k, and of v, that there is room for.
    fn places(self) -> usize {
        match self.rows {
            Rows::Pairs(192) => 4,
            _ => 2,
        }
    }

    /// Tiles whose rows are kept, a power of two: those that consumers may still read of, and as many that
    /// come next.
    fn kept_rows(self) -> u32 {
        2 * self.places() as u32
    }

    /// Bytes of a tile's rows: of a video's it has none.
    fn row_bytes(self) -> u32 {
        if self.canvas { 0 } else { 4 * self.pieces() }
    }

    /// Where the first keys of a tile's pieces are.
    fn rows_of<'k>(self, stores: &Stores<'k>, turn: Reg<'k, u32>) -> Address<'k, u32> {
        stores
            .rows
            .plus((turn & (self.kept_rows() - 1)) * self.row_bytes())
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
            let part = || tile.row_range(i * self.piece, self.piece);
            match self.rows {
                Rows::Pairs(_) => {
                    let rank = k.special(Special::ClusterCtaRank);
                    part().load_panel_for_pair(rank, map, place, full);
                }
                _ if self.pieces() == 1 => tile.load(map, place, full, options),
                _ => part().load_panels(map, place, full, options),
            }
        }
    }

    /// One tile of queries after the other, without a pause: the first scores of the next are under way
    /// when the output of the last is stored.
    fn consume<'k>(self, problem: &Problem<'k>, results: &Results<'k>, stores: &Stores<'k>) {
        let k = problem.k;
        let wg = Warpgroup::new(k, 1);
        let queries = stores.queries.using(wg.leader);
        let (keys, values) = (&stores.keys, &stores.values);
        let q = stores.queries.tile.part(wg.index, OWN);
        let pair = pair(self.element);
        let scores = RegTile::uninit(k, self.kv_tile);
        let weights = Fragments::uninit(k, self.kv_tile / 16);
        let output = RegTile::uninit(k, self.head_dim);
        let softmax = Softmax::new(k, problem.scale, self.mask.is_some());

        let multiply_keys = |turn: Reg<'k, u32>| {
            let k_tile = keys.wait_full(turn);
            wg.fence();
            wg.product(&scores, Left::Tile(q), Right::Transposed(k_tile));
        };
        let multiply_values = |turn: Reg<'k, u32>| {
            let v_tile = values.wait_full(turn);
            wg.fence();
            wg.add_product(&output, Left::Fragments(&weights), Right::Tile(v_tile));
        };
        // Whether any score was hidden.
        let hide = |turn: Reg<'k, u32>| match problem.grid.as_ref().zip(stores.boxes.as_ref()) {
            None => self.hide(problem, stores, &queries, wg, &scores, turn),
            Some((grid, notes)) => self.hide_blank(grid, notes, turn, wg, &scores),
        };
        let finish = || {
            let note = queries.note_before();
            if self.canvas {
                let zeros = note.columns;
                k.if_(zeros.gt(0), || {
                    softmax.see_zeros(zeros.to_f32());
                    softmax.rescale(&output);
                });
            }
            let (inverse, log_sum) = softmax.finish();
            output.scale_rows(inverse);
            let own = wg.index * OWN + wg.row();
            let rows = [own, own + 8].map(|i| queries.query_before(problem, i));
            results.store(problem, wg, note, rows, (&output, pair), log_sum);
        };

        // Turns are in a circle, and the first warpgroup goes first.
        let last = wg.index.equals(self.consumers() - 1);
        let next = last.select(0u32, wg.index + 1);
        let wait_for_turn = || k.barrier_sync(wg.index + TURN, 2 * WARPGROUP);
        let pass_turn = || k.barrier_arrive(next + TURN, 2 * WARPGROUP);
        k.if_(wg.index.equals(0), || k.barrier_arrive(TURN, 2 * WARPGROUP));

        // Tiles of keys that were seen before the one at hand.
        let mut turn = k.var(0u32);
        queries.next();
        k.if_not(queries.note().is_end(), || {
            queries.wait();
            multiply_keys(turn);
            k.loop_(|leave| {
                let note = queries.note();
                let mut left = note.tiles - 1;
                softmax.reset();
                output.fill(0.0);
                wg.wait(0);
                k.if_(left.equals(0), || queries.release());
                hide(turn);
                keys.release(turn, wg.leader);
                if !self.canvas {
                    let columns = note.first_columns();
                    k.if_(columns.lt(self.kv_tile), || {
                        let all = 0..self.kv_tile;
                        scores.set_columns_from(all, columns, wg.lane, f32::NEG_INFINITY);
                    });
                }
                softmax.step(&scores);
                scores.round_to(&weights, pair);

                k.loop_(|leave| {
                    leave.when(left.equals(0));
                    left -= 1;
                    wait_for_turn();
                    multiply_keys(turn + 1);
                    // Under the product with k.
                    softmax.rescale(&output);
                    multiply_values(turn);
                    pass_turn();
                    wg.wait(1);
                    k.if_(left.equals(0), || queries.release());
                    // For the last tile's scores there are no queries any more.
                    let changed = hide(turn + 1) | left.equals(0);
                    softmax.further(&scores, changed, || {
                        wg.product_of_warp(&scores, q, keys.tile(turn + 1));
                    });
                    keys.release(turn + 1, wg.leader);
                    wg.wait(0);
                    values.release(turn, wg.leader);
                    scores.round_to(&weights, pair);
                    turn += 1;
                });

                softmax.rescale(&output);
                queries.next();
                // ptxas keeps products in flight only if all ways that meet have the same: the last
                // output has a way of its own.
                k.if_(queries.note().is_end(), || {
                    wait_for_turn();
                    multiply_values(turn);
                    pass_turn();
                    wg.wait(0);
                    finish();
                    leave.now();
                });
                wait_for_turn();
                multiply_values(turn);
                queries.wait();
                multiply_keys(turn + 1);
                pass_turn();
                wg.wait(1);
                values.release(turn, wg.leader);
                finish();
                turn += 1;
            });
        });
    }

    /// Hides, of a tile of scores, what the mask's expression hides in partial blocks. Says whether there
    /// are any.
    fn hide<'k>(
        self,
        problem: &Problem<'k>,
        stores: &Stores<'k>,
        queries: &Using<'_, 'k>,
        wg: Warpgroup<'k>,
        scores: &RegTile<'k>,
        turn: Reg<'k, u32>,
    ) -> Reg<'k, bool> {
        let k = problem.k;
        let Some(exact) = &problem.exact else {
            return k.var(false);
        };
        let rows = self.rows_of(stores, turn);
        let hide = |i: u32, word: Reg<'k, u32>| {
            k.if_(word.ge(PARTIAL), || {
                let note = queries.note();
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
        // Most tiles have no partial block. There are no registers to keep all words in.
        let any = k.load_shared_uniform_any(rows, self.pieces()).ge(PARTIAL);
        k.if_(any, || {
            (0..self.pieces()).for_each(|i| hide(i, word(i)));
        });
        any
    }
}
