//! The forward kernel itself: what a thread block's producer and its consumers do.

use flex_block_attn_ptx::builder::{Address, TmaOptions};
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{
    Fragments, Left, Phases, Place, Producer, RegTile, Right, Ring, Shared, WARPGROUP, Warpgroup,
};

use super::keys::Keys;
use super::problem::Problem;
use super::queries::{Note, Queries};
use super::softmax::Softmax;
use super::work::{Jobs, plan};
use super::{Config, OWN};
use crate::gemm::pair;

/// Stages of k and of v.
const STAGES: usize = 2;
/// The thread that plans, in another warp than the loader, which is thread 0.
const PLANNER: u32 = 32;
/// Named barriers: consumer `w` of at most three waits at `TURN + w` for its turn.
const TURN: u32 = 2;

/// The tensor maps.
#[derive(Clone, Copy)]
pub(super) struct Maps<'k> {
    pub(super) q: Reg<'k, u64>,
    pub(super) k: Reg<'k, u64>,
    pub(super) v: Reg<'k, u64>,
    pub(super) out: Reg<'k, u64>,
}

impl<'k> Maps<'k> {
    /// Declares them.
    pub(super) fn new(k: &'k Builder) -> Self {
        Self {
            q: k.tensor_map("q"),
            k: k.tensor_map("k"),
            v: k.tensor_map("v"),
            out: k.tensor_map("out"),
        }
    }
}

/// What is in shared memory.
struct Stores<'k> {
    jobs: Jobs<'k>,
    queries: Queries<'k>,
    keys: Ring<'k>,
    values: Ring<'k>,
    /// Of the tile in each stage, the first keys of its pieces: the loader's own notes, for which it
    /// has no registers.
    rows: Vec<Address<'k, u32>>,
}

impl Config {
    pub(super) fn body(self, k: &Builder) {
        let maps = Maps::new(k);
        let problem = Problem::new(k);

        let shared = Shared::new(k);
        // Tiles first: they are aligned to more than all else.
        let ring = || Ring::new(&shared, STAGES, self.kv_shape(), 4 * self.consumers());
        let stores = Stores {
            queries: Queries::new(&shared, self.q_shape()),
            keys: ring(),
            values: ring(),
            jobs: Jobs::new(&shared),
            rows: (0..STAGES)
                .map(|_| shared.bytes(4 * self.pieces(), 4))
                .collect(),
        };
        shared.finish();
        k.if_(k.tid().equals(0), || {
            stores.jobs.init();
            stores.queries.init();
            stores.keys.init();
            stores.values.init();
            k.mbarrier_init_fence();
        });
        k.sync_threads();

        let (producer, consumer) = self.registers();
        k.if_else(
            Warpgroup::number(k).equals(0),
            || {
                Warpgroup::release_registers(k, producer);
                k.if_(k.tid().equals(0), || self.load(maps, &problem, &stores));
                k.if_(k.tid().equals(PLANNER), || {
                    plan(&problem, self, &stores.jobs);
                });
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
            let place = |row| Place::rows(row, kv_head, batch);
            let some = || {
                let walk = Keys::new(problem, self, jobs.start(k));
                // The first keys do not wait for the last output to be stored.
                walk.next_tile(rows[0]);
                self.load_tile(&keys, 0, maps.k, rows[0], &place);
                emptied.wait();
                queries.fill(k, maps.q, jobs.note(k));
                jobs.release();
                each_after_first(k, tiles, |stage, before| {
                    walk.next_tile(rows[stage]);
                    self.load_tile(&keys, stage, maps.k, rows[stage], &place);
                    self.load_tile(&values, before, maps.v, rows[before], &place);
                });
                at_last_stage(k, tiles, |stage| {
                    self.load_tile(&values, stage, maps.v, rows[stage], &place);
                });
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

    /// Has a stage filled with the pieces whose first keys are at `rows`.
    fn load_tile<'k>(
        self,
        ring: &Producer<'k>,
        stage: usize,
        map: Reg<'k, u64>,
        rows: Address<'k, u32>,
        place: &impl Fn(Reg<'k, u32>) -> Place,
    ) {
        let (k, options) = (map.builder(), TmaOptions::default());
        ring.fill(stage, |tile, full| {
            for i in 0..self.pieces() {
                let place = place(k.load_shared(rows.at(4 * i)));
                if self.pieces() == 1 {
                    tile.load(map, place, full, options);
                } else {
                    let part = tile.row_range(i * self.piece, self.piece);
                    part.load_panels(map, place, full, options);
                }
            }
        });
    }

    fn consume<'k>(self, out: Reg<'k, u64>, problem: &Problem<'k>, stores: &Stores<'k>) {
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
        let softmax = Softmax::new(k, problem.scale, self.by_polynomial);

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
                keys.release(0);
                k.if_(note.columns.lt(self.kv_tile), || {
                    let all = 0..self.kv_tile;
                    scores.set_columns_from(all, note.columns, wg.lane, f32::NEG_INFINITY);
                });
                softmax.step(&scores);
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
                    keys.release(stage);
                    softmax.step(&scores);
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
            let (inverse, log_sum) = softmax.finish();
            output.scale_rows(inverse);
            // Read again: registers are worth more than this.
            let note = stores.queries.note(k);
            problem.store_lse(wg, note, log_sum);
            stores.queries.store(k, wg, note, out, &output, pair);
        });
    }
}

/// Does `body(stage, stage before)` for each tile but the first.
fn each_after_first<'k>(k: &'k Builder, tiles: Reg<'k, u32>, body: impl Fn(usize, usize)) {
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
fn at_last_stage<'k>(k: &'k Builder, tiles: Reg<'k, u32>, body: impl Fn(usize)) {
    k.if_else((tiles & 1).equals(1), || body(0), || body(1));
}
