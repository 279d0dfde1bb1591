//! The forward kernel for blocks of queries of any multiple of 16.
//!
//! Warps have 16 queries each, so each warp's are of one block, but those of a thread block's twelve are of
//! several, with a list each. Loaders merge the lists ([`load`]): tiles of 64 keys are put together from
//! pieces of such blocks. A warpgroup leaves out tiles that none of its warps want ([`wanted`]); a warp of a
//! warpgroup that does want one masks the pieces that it does not.
//!
//! Warpgroups go their own ways, and who holds a place in shared memory may keep all waiting: keys and
//! values have places of their own, and a loader each. Keys are given back as soon as their scores are
//! weights. Each warpgroup hides its softmax as the other forward kernel does: the product with v trails
//! that with k by one wanted tile, whose values it holds while it seeks the next.

mod load;
mod wanted;

use flex_block_attn_ptx::builder::Address;
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{Fragments, Left, Phases, RegTile, Right, Ring, Shared, Warpgroup};

use super::kernel::Maps;
use super::output::Results;
use super::problem::Problem;
use super::queries::{Queries, Using};
use super::softmax::Softmax;
use super::{Config, OWN};
use crate::exact::{Axis, Where};
use crate::gemm::pair;
use crate::merge::{PARTIAL_WANTS, TOKENS};
use wanted::Wanted;

/// Queries of a tile.
pub(super) const QUERIES: u32 = 192;
/// Warps that multiply, and those of a warpgroup.
const WARPS: u32 = QUERIES / 16;
const OWN_WARPS: u32 = 4;
/// The producer's warps.
const KEYS_LOADER: u32 = 0;
const VALUES_LOADER: u32 = 1;

/// In a tile's wants: there are no more for these queries. It has all warps' bits.
const END: u32 = u32::MAX;

/// What is in shared memory.
struct Stores<'k> {
    queries: Queries<'k>,
    /// Tiles of k, and of v: the same ones in both, an end behind those for the same queries included.
    keys: Ring<'k>,
    values: Ring<'k>,
    /// For each stage of k, a want for each piece: bits of the warps that want it, from [`TOKENS`] on how
    /// many of its keys there are, and from [`PARTIAL_WANTS`] on the warps to which its block is partial.
    /// Behind them, where blocks may be partial, the first keys of the pieces.
    wants: Address<'k, u32>,
}

impl Config {
    pub(super) fn mixed_body(self, k: &Builder) {
        let maps = Maps::new(k, self.canvas);
        let results = Results::new(k);
        let problem = Problem::new(k, self);
        let shared = Shared::new(k);
        let ring = |stages: u32| Ring::new(&shared, stages as usize, self.kv_shape(), WARPS);
        let [of_keys, of_values] = self.stages();
        let stores = Stores {
            queries: Queries::new(&shared, self),
            keys: ring(of_keys),
            values: ring(of_values),
            wants: shared.bytes(of_keys * self.stage_bytes(), 4),
        };
        shared.finish();
        k.if_(k.tid().equals(0), || {
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
                let warp = k.tid() >> 5;
                k.if_(warp.equals(KEYS_LOADER), || {
                    self.load_keys(maps, &problem, &stores);
                });
                k.if_(warp.equals(VALUES_LOADER), || {
                    self.load_values(maps, &problem, &stores);
                });
            },
            || {
                Warpgroup::acquire_registers(k, consumer);
                self.consume_mixed(&problem, &results, &stores);
            },
        );
    }

    /// Tiles of k, and of v, that may be under way: as many as there is room for. Values are held longer.
    fn stages(self) -> [u32; 2] {
        match self.head_dim {
            64 => [12, 12],
            _ => [5, 6],
        }
    }

    /// Bytes of a tile's wants.
    fn want_bytes(self) -> u32 {
        4 * self.pieces()
    }

    /// Bytes of a stage's wants and first keys.
    fn stage_bytes(self) -> u32 {
        2 * self.want_bytes()
    }

    fn consume_mixed<'k>(self, problem: &Problem<'k>, results: &Results<'k>, stores: &Stores<'k>) {
        let k = problem.k;
        let wg = Warpgroup::new(k, 1);
        let phases = Phases::new(k);
        let wanted = Wanted::new(self, stores, wg, &phases);
        let queries = stores.queries.using(wg.leader);
        let q = stores.queries.tile.part(wg.index, OWN);
        let pair = pair(self.element);
        let scores = RegTile::uninit(k, self.kv_tile);
        let weights = Fragments::uninit(k, self.kv_tile / 16);
        let output = RegTile::uninit(k, self.head_dim);
        let softmax = Softmax::new(k, problem.scale, true);

        let multiply_keys = || {
            let keys = wanted.keys();
            wg.fence();
            wg.product(&scores, Left::Tile(q), Right::Transposed(keys));
        };
        let multiply_values = || {
            softmax.rescale(&output);
            let values = wanted.values();
            wg.fence();
            wg.add_product(&output, Left::Fragments(&weights), Right::Tile(values));
        };

        k.loop_(|leave| {
            queries.next();
            leave.when(queries.note().is_end());
            queries.wait();
            softmax.reset();
            output.fill(0.0);
            wanted.start();
            k.loop_(|leave| {
                wanted.seek_first();
                leave.when(wanted.is_end());
                multiply_keys();
                wg.wait(0);
                self.hide_unwanted(problem, &queries, wg, &scores, &wanted);
                softmax.step(&scores);
                wanted.release_keys();
                scores.round_to(&weights, pair);
                wanted.hold_first();
                wanted.seek_next();

                k.loop_(|leave| {
                    leave.when(wanted.is_none());
                    multiply_keys();
                    // Under the product with k.
                    multiply_values();
                    wg.wait(1);
                    let changed = self.hide_unwanted(problem, &queries, wg, &scores, &wanted);
                    softmax.further(&scores, changed, || {
                        wg.product_of_warp(&scores, q, wanted.keys());
                    });
                    wanted.release_keys();
                    wanted.hold();
                    // Under the product with v. Were it not for the waits in here, ptxas would wait for
                    // that product before the exponentials.
                    wanted.seek_next();
                    wg.wait(0);
                    wanted.release_before();
                    scores.round_to(&weights, pair);
                });

                multiply_values();
                wg.wait(0);
                wanted.release_held();
                leave.when(wanted.is_end());
            });
            wanted.release_keys();
            // The next queries come while the output of these is stored.
            queries.release();
            let (inverse, log_sum) = softmax.finish();
            output.scale_rows(inverse);
            let own = wg.index * OWN + wg.row();
            let rows = [own, own + 8].map(|i| queries.query(problem, i));
            results.store(problem, wg, queries.note(), rows, (&output, pair), log_sum);
        });
    }

    /// Hides, of the scores of the tile at hand, the pieces that this warp does not want, keys behind
    /// the sequence, and what the mask's expression hides in partial blocks. Says whether that is anything.
    fn hide_unwanted<'k>(
        self,
        problem: &Problem<'k>,
        queries: &Using<'_, 'k>,
        wg: Warpgroup<'k>,
        scores: &RegTile<'k>,
        wanted: &Wanted<'k>,
    ) -> Reg<'k, bool> {
        let k = problem.k;
        let any = k.var(false);
        for (i, &want) in (0..).zip(wanted.wants()) {
            let columns = i * self.piece..(i + 1) * self.piece;
            let keys = (want >> TOKENS) & ((1 << (PARTIAL_WANTS - TOKENS)) - 1);
            let kept = (want & wanted.mine()).differs(0).select(keys, 0u32);
            any.set(any | kept.lt(self.piece));
            k.if_(kept.lt(self.piece), || {
                scores.set_columns_from(columns.clone(), kept, wg.lane, f32::NEG_INFINITY);
            });
            let Some(exact) = &problem.exact else {
                continue;
            };
            let partial = (want >> PARTIAL_WANTS) & wanted.mine();
            any.set(any | partial.differs(0));
            k.if_(partial.differs(0), || {
                let note = queries.note();
                exact.hide(
                    &scores.part(columns),
                    &Where {
                        batch: note.batch(),
                        head: note.head(),
                        rows: Axis::Queries(note.first + wg.index * OWN + wg.row()),
                        first_column: wanted.first_key(i),
                        lane: wg.lane,
                    },
                );
            });
        }
        any
    }
}
