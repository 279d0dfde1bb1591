//! The forward kernel for blocks of queries that are no multiples of a thread block's 128: any
//! multiple of 16.
//!
//! Warps have 16 queries each, so each warp's are of one block, but those of a thread block are of
//! several, with a list each. The loader merges the lists ([`Merge`]). Tiles of 64 keys are put together
//! from pieces of such blocks. A warpgroup leaves out tiles that none of
//! its warps want; a warp of a warpgroup that does want one masks the pieces that it does not.
//!
//! Rings are deep, tiles small, and warpgroups go their own ways: what hides the softmax of one are
//! the products of the other.

use flex_block_attn_ptx::builder::{Address, TmaOptions};
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{
    Fragments, Left, Phases, Place, RegTile, Right, Ring, Shape, Shared, SharedTile, Warpgroup,
};

use super::kernel::Maps;
use super::problem::{Problem, Tile, rounded_up};
use super::queries::{Note, Queries};
use super::softmax::Softmax;
use super::{Config, OWN};
use crate::canvas::Source;
use crate::exact::{Axis, Where};
use crate::gemm::pair;
use crate::merge::{Merge, NO_BLOCK, PARTIAL_WANTS, WARPS};

/// Queries of a tile.
pub(super) const QUERIES: u32 = 128;
/// Tiles of k, each with its tile of v, that may be under way.
const STAGES: usize = 6;
/// Warps of a warpgroup.
const OWN_WARPS: u32 = 4;

/// In a tile's first want: there are no more for these queries.
const END: u32 = u32::MAX;

/// What is in shared memory.
struct Stores<'k> {
    queries: Queries<'k>,
    /// Tiles of k, with those of v behind them.
    pairs: Ring<'k>,
    /// For each stage, a want for each piece: bits of the warps that want it, from bit 8 on how many of
    /// its keys there are, and from [`PARTIAL_WANTS`] on the warps to which its block is partial.
    /// Behind them, where blocks may be partial, the first keys of the pieces.
    wants: Vec<Address<'k, u32>>,
}

/// The pieces of several lists, walked as one.
struct Pieces<'a, 'k> {
    problem: &'a Problem<'k>,
    config: Config,
    lists: Merge<'k>,
    /// First key that is still to come of the block at hand, how many are, in whole pieces, and the
    /// warps that want them.
    key: Reg<'k, u32>,
    left: Reg<'k, u32>,
    warps: Reg<'k, u32>,
}

impl Config {
    fn pair_shape(self) -> Shape {
        Shape::new(2 * self.kv_tile, self.head_dim, self.element)
    }

    pub(super) fn mixed_body(self, k: &Builder) {
        let maps = Maps::new(k, self.canvas);
        let problem = Problem::new(k, self);
        let shared = Shared::new(k);
        let stores = Stores {
            queries: Queries::new(&shared, self),
            pairs: Ring::new(&shared, STAGES, self.pair_shape(), WARPS),
            wants: (0..STAGES)
                .map(|_| shared.bytes(2 * self.want_bytes(), 4))
                .collect(),
        };
        shared.finish();
        k.if_(k.tid().equals(0), || {
            stores.queries.init();
            stores.pairs.init();
            k.mbarrier_init_fence();
        });
        k.sync_threads();

        let (producer, consumer) = self.registers();
        k.if_else(
            Warpgroup::number(k).equals(0),
            || {
                Warpgroup::release_registers(k, producer);
                k.if_(k.tid().lt(32), || self.merge(maps, &problem, &stores));
            },
            || {
                Warpgroup::acquire_registers(k, consumer);
                self.consume_mixed(maps.out, &problem, &stores);
            },
        );
    }

    /// What the loader does, a whole warp.
    fn merge<'k>(self, maps: Maps<'k>, problem: &Problem<'k>, stores: &Stores<'k>) {
        let k = problem.k;
        let Stores {
            queries,
            pairs,
            wants,
        } = stores;
        let phases = Phases::new(k);
        let pairs = pairs.producer(&phases);
        let emptied = queries.emptied(&phases);
        let leader = k.lane().equals(0);
        problem.each_tile_of_warp(|tile| {
            let first = tile.number * QUERIES;
            let pieces = Pieces::new(problem, self, tile, first);
            emptied.wait();
            k.if_(leader, || {
                let some = k.var(1u32);
                queries.fill(
                    k,
                    maps.q.rows(),
                    Note {
                        first,
                        place: Note::place(tile),
                        tiles: some,
                        columns: some,
                    },
                );
            });
            in_turn(k, |leave, stage| {
                let (pair, full) = pairs.wait(stage);
                let found: Vec<_> = (0..self.pieces()).map(|_| pieces.next()).collect();
                let wants = wants[stage];
                let end = found[0].1.equals(0);
                k.if_(leader & end, || {
                    k.store_shared(wants, k.var(END));
                    full.arrive();
                });
                leave.when(end);
                k.if_(leader, || {
                    for (i, &(row, want)) in (0..).zip(&found) {
                        k.store_shared(wants.at(4 * i), want);
                        if self.mask.is_some() {
                            k.store_shared(wants.at(self.want_bytes() + 4 * i), row);
                        }
                    }
                    full.arrive_expect(pair.shape.bytes());
                    for (i, &(row, _)) in (0..).zip(&found) {
                        let place = Place::rows(row, tile.kv_head, tile.batch);
                        let load = |part: SharedTile<'k>, map| {
                            let piece = part.row_range(i * self.piece, self.piece);
                            piece.load_panels(map, place, full, TmaOptions::default());
                        };
                        load(self.k_part(pair), maps.k.rows());
                        load(self.v_part(pair), maps.v.rows());
                    }
                });
            });
        });
        emptied.wait();
        k.if_(leader, || queries.pass(k, Note::end(k)));
    }

    /// Bytes of a tile's wants.
    fn want_bytes(self) -> u32 {
        4 * self.pieces()
    }

    fn k_part(self, pair: SharedTile<'_>) -> SharedTile<'_> {
        pair.row_range(0, self.kv_tile)
    }

    fn v_part(self, pair: SharedTile<'_>) -> SharedTile<'_> {
        pair.row_range(self.kv_tile, self.kv_tile)
    }

    fn consume_mixed<'k>(self, out: Source<'k>, problem: &Problem<'k>, stores: &Stores<'k>) {
        let k = problem.k;
        let wg = Warpgroup::new(k, 1);
        let phases = Phases::new(k);
        let pairs = stores.pairs.consumer(wg.leader, &phases);
        let filled = stores.queries.filled(&phases);
        let q = stores.queries.tile.part(wg.index, OWN);
        let pair = pair(self.element);
        let scores = RegTile::uninit(k, self.kv_tile);
        let weights = Fragments::uninit(k, self.kv_tile / 16);
        let output = RegTile::uninit(k, self.head_dim);
        let softmax = Softmax::new(k, problem.scale);
        // Bits of a want that are this warpgroup's, and this warp's.
        let all = (1 << OWN_WARPS) - 1;
        let own = k.var(all) << (wg.index * OWN_WARPS);
        let mine = k.var(1u32) << (wg.index * OWN_WARPS + wg.warp);

        k.loop_(|leave| {
            filled.wait();
            let note = stores.queries.note(k);
            leave.when(note.is_end());
            softmax.reset();
            output.fill(0.0);
            in_turn(k, |leave, stage| {
                let tile = pairs.wait(stage);
                let want = |i| k.load_shared_uniform(stores.wants[stage].at(4 * i));
                let first = want(0);
                let end = first.equals(END);
                k.if_(end, || pairs.release(stage));
                leave.when(end);
                let others = (1..self.pieces()).map(want);
                let wants: Vec<_> = std::iter::once(first).chain(others).collect();
                let any = wants[1..].iter().fold(wants[0], |any, &want| any | want) & own;
                k.if_(any.differs(0), || {
                    wg.fence();
                    let keys = Right::Transposed(self.k_part(tile));
                    wg.product(&scores, Left::Tile(q), keys);
                    wg.wait(0);
                    for (i, &want) in (0..).zip(&wants) {
                        let columns = i * self.piece..(i + 1) * self.piece;
                        let keys = (want >> 8) & (0xffff >> 8);
                        let kept = (want & mine).differs(0).select(keys, 0u32);
                        k.if_(kept.lt(self.piece), || {
                            scores.set_columns_from(
                                columns.clone(),
                                kept,
                                wg.lane,
                                f32::NEG_INFINITY,
                            );
                        });
                        let Some(exact) = &problem.exact else {
                            continue;
                        };
                        let partial = (want >> PARTIAL_WANTS) & mine;
                        k.if_(partial.differs(0), || {
                            let note = stores.queries.note(k);
                            let first = stores.wants[stage].at(self.want_bytes() + 4 * i);
                            exact.hide(
                                &scores.part(columns),
                                &Where {
                                    batch: note.batch(),
                                    head: note.head(),
                                    rows: Axis::Queries(note.first + wg.index * OWN + wg.row()),
                                    first_column: k.load_shared_uniform(first),
                                    lane: wg.lane,
                                },
                            );
                        });
                    }
                    softmax.step_of_some(&scores);
                    output.scale_rows(softmax.factor);
                    scores.round_to(&weights, pair);
                    wg.fence();
                    let values = Right::Tile(self.v_part(tile));
                    wg.add_product(&output, Left::Fragments(&weights), values);
                    wg.wait(0);
                });
                pairs.release(stage);
            });
            let (inverse, log_sum) = softmax.finish();
            output.scale_rows(inverse);
            // Read again: registers are worth more than this.
            let note = stores.queries.note(k);
            problem.store_lse(wg, note, log_sum);
            stores
                .queries
                .store(k, wg, note, (out, None), &output, pair);
        });
    }
}

impl<'a, 'k> Pieces<'a, 'k> {
    /// Those of the blocks that the queries from `first` on are in.
    fn new(problem: &'a Problem<'k>, config: Config, tile: Tile<'k>, first: Reg<'k, u32>) -> Self {
        let k = problem.k;
        let lists = Merge::new(k, problem.lists.plan, config.mask.is_some());
        lists.start(first, problem.q_len, |query| {
            let row = query / problem.q_block;
            let lists = &problem.lists;
            (lists.list(tile.record, row), lists.count(tile.record, row))
        });
        Self {
            problem,
            config,
            lists,
            key: k.var(0u32),
            left: k.var(0u32),
            warps: k.var(0u32),
        }
    }

    /// The next piece's first key, and who wants it: nobody, if there are no more; its keys then lie
    /// behind the sequence, where copies find zeros. All lanes.
    fn next(&self) -> (Reg<'k, u32>, Reg<'k, u32>) {
        let (k, problem, piece) = (self.problem.k, self.problem, self.config.piece);
        let (mut key, mut left) = (self.key, self.left);
        k.if_(left.equals(0), || {
            let (block, warps) = self.lists.take();
            k.if_(block.lt(NO_BLOCK), || {
                self.warps.set(warps);
                key.set(block * problem.kv_block);
                left.set(rounded_up(problem.keys_of_block(key), piece));
            });
        });
        let (row, want) = (k.var(problem.kv_len), k.var(0u32));
        k.if_(left.gt(0), || {
            row.set(key);
            let keys = (problem.kv_len - key).min(piece);
            want.set(self.warps | (keys << 8));
            key += piece;
            left -= piece;
        });
        (row, want)
    }
}

/// Does `body` for one stage after the other, until it leaves.
fn in_turn<'k>(k: &'k Builder, body: impl Fn(flex_block_attn_ptx::builder::Leave<'k>, usize)) {
    k.loop_(|leave| {
        for stage in 0..STAGES {
            body(leave, stage);
        }
    });
}
