//! The forward kernel for blocks of queries that are no multiples of a thread block's 128: any
//! multiple of 16.
//!
//! Warps have 16 queries each, so each warp's are of one block, but those of a thread block are of
//! several, with a list each. The loader merges the lists ([`Merge`]). Tiles of 64 keys are put together
//! from pieces of such blocks. A warpgroup leaves out tiles that none of
//! its warps want; a warp of a warpgroup that does want one masks the pieces that it does not.
//!
//! Rings are deep, tiles small, and warpgroups go their own ways. Each hides its softmax as the other
//! forward kernel does: the product with v trails that with k by one wanted tile. So it holds a tile
//! while it seeks the next, but not until the ring comes round to it: the loader would wait for the
//! tile, and the warpgroup for the loader. A run of tiles ends there, as it does behind the last.

use flex_block_attn_ptx::builder::{Address, TmaOptions};
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{
    Consumer, Fragments, Left, Phases, Place, RegTile, Right, Ring, Shape, Shared, SharedTile,
    Warpgroup,
};

use super::kernel::Maps;
use super::output::Results;
use super::problem::{Problem, Tile, rounded_up};
use super::queries::{Note, Queries, Using};
use super::softmax::Softmax;
use super::{Config, OWN};
use crate::exact::{Axis, Where};
use crate::gemm::pair;
use crate::merge::{Merge, NO_BLOCK, PARTIAL_WANTS, WARPS};

/// Queries of a tile.
pub(super) const QUERIES: u32 = 128;
/// Tiles of k, each with its tile of v, that may be under way.
const STAGES: u32 = 6;
/// Warps of a warpgroup.
const OWN_WARPS: u32 = 4;

/// In a tile's wants: there are no more for these queries. It has all warps' bits.
const END: u32 = u32::MAX;

/// What is in shared memory.
struct Stores<'k> {
    queries: Queries<'k>,
    /// Tiles of k, with those of v behind them.
    pairs: Ring<'k>,
    /// For each stage, a want for each piece: bits of the warps that want it, from bit 8 on how many of
    /// its keys there are, and from [`PARTIAL_WANTS`] on the warps to which its block is partial.
    /// Behind them, where blocks may be partial, the first keys of the pieces.
    wants: Address<'k, u32>,
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

/// The tiles that a warpgroup wants, found one after the other.
struct Wanted<'k> {
    k: &'k Builder,
    config: Config,
    pairs: Consumer<'k>,
    /// The wants of the first stage.
    notes: Address<'k, u32>,
    /// Bits of a want that are this warpgroup's, and this warp's.
    own: Reg<'k, u32>,
    mine: Reg<'k, u32>,
    /// The stage at hand, and its wants.
    stage: Reg<'k, u32>,
    wants: Vec<Reg<'k, u32>>,
    /// The stage of the tile that is held, and of the one that was before, which may be held still.
    held: Reg<'k, u32>,
    before: Reg<'k, u32>,
}

impl Config {
    fn pair_shape(self) -> Shape {
        Shape::new(2 * self.kv_tile, self.head_dim, self.element)
    }

    pub(super) fn mixed_body(self, k: &Builder) {
        let maps = Maps::new(k, self.canvas);
        let results = Results::new(k);
        let problem = Problem::new(k, self);
        let shared = Shared::new(k);
        let stores = Stores {
            queries: Queries::new(&shared, self),
            pairs: Ring::new(&shared, STAGES as usize, self.pair_shape(), WARPS),
            wants: shared.bytes(STAGES * self.stage_bytes(), 4),
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
                self.consume_mixed(&problem, &results, &stores);
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
        let queries = queries.filling(k);
        let leader = k.lane().equals(0);
        problem.each_tile(|tile| {
            let first = tile.number * QUERIES;
            let pieces = Pieces::new(problem, self, tile, first);
            let some = k.var(1u32);
            let note = Note {
                first,
                place: Note::place(tile),
                tiles: some,
                columns: some,
            };
            queries.announce(note);
            queries.wait();
            k.if_(leader, || queries.fill(maps.q.rows(), note));
            in_turn(k, |leave, stage| {
                let (pair, full) = pairs.wait(stage as usize);
                let found: Vec<_> = (0..self.pieces()).map(|_| pieces.next()).collect();
                let wants = wants.at(stage * self.stage_bytes());
                let end = found[0].1.equals(0);
                k.if_(leader & end, || {
                    for i in 0..self.pieces() {
                        k.store_shared(wants.at(4 * i), k.var(END));
                    }
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
        queries.announce(Note::end(k));
    }

    /// Bytes of a tile's wants.
    fn want_bytes(self) -> u32 {
        4 * self.pieces()
    }

    /// Bytes of a stage's wants and first keys.
    fn stage_bytes(self) -> u32 {
        2 * self.want_bytes()
    }

    fn k_part(self, pair: SharedTile<'_>) -> SharedTile<'_> {
        pair.row_range(0, self.kv_tile)
    }

    fn v_part(self, pair: SharedTile<'_>) -> SharedTile<'_> {
        pair.row_range(self.kv_tile, self.kv_tile)
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
            let keys = self.k_part(wanted.tile());
            wg.fence();
            wg.product(&scores, Left::Tile(q), Right::Transposed(keys));
        };
        let multiply_values = || {
            softmax.rescale(&output);
            let values = self.v_part(wanted.held_tile());
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
                        wg.product_of_warp(&scores, q, self.k_part(wanted.tile()));
                    });
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
            wanted.finish();
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
        for (i, &want) in (0..).zip(&wanted.wants) {
            let columns = i * self.piece..(i + 1) * self.piece;
            let keys = (want >> 8) & (0xffff >> 8);
            let kept = (want & wanted.mine).differs(0).select(keys, 0u32);
            any.set(any | kept.lt(self.piece));
            k.if_(kept.lt(self.piece), || {
                scores.set_columns_from(columns.clone(), kept, wg.lane, f32::NEG_INFINITY);
            });
            let Some(exact) = &problem.exact else {
                continue;
            };
            let partial = (want >> PARTIAL_WANTS) & wanted.mine;
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

impl<'k> Wanted<'k> {
    fn new(config: Config, stores: &Stores<'k>, wg: Warpgroup<'k>, phases: &Phases<'k>) -> Self {
        let k = wg.index.builder();
        let first_warp = wg.index * OWN_WARPS;
        let all = (1 << OWN_WARPS) - 1;
        Self {
            k,
            config,
            pairs: stores.pairs.consumer(wg.leader, phases),
            notes: stores.wants,
            own: k.var(all) << first_warp,
            mine: k.var(1u32) << (first_warp + wg.warp),
            stage: k.uninit(),
            wants: (0..config.pieces()).map(|_| k.uninit()).collect(),
            held: k.uninit(),
            before: k.uninit(),
        }
    }

    /// Starts with the tiles for the next queries.
    fn start(&self) {
        self.stage.set(0u32);
    }

    /// Goes on to the next tile that a warp of this warpgroup wants, or to the end. None is held.
    fn seek_first(&self) {
        self.k.loop_(|leave| {
            self.look();
            leave.when(self.is_for_us());
            self.pass();
        });
    }

    /// The same, but only up to the tiles that are held.
    fn seek_next(&self) {
        for want in &self.wants {
            want.set(0u32);
        }
        self.k.loop_(|leave| {
            leave.when(self.stage.equals(self.before));
            self.look();
            leave.when(self.is_for_us());
            self.pass();
        });
    }

    /// Whether there are no more tiles for these queries.
    fn is_end(&self) -> Reg<'k, bool> {
        self.wants[0].equals(END)
    }

    /// Whether what was sought last was not found.
    fn is_none(&self) -> Reg<'k, bool> {
        self.is_end() | !self.is_for_us()
    }

    /// The tile found.
    fn tile(&self) -> SharedTile<'k> {
        self.pairs.tile_at(self.stage)
    }

    /// First key of one of its pieces, where blocks may be partial.
    fn first_key(&self, piece: u32) -> Reg<'k, u32> {
        let behind = self.config.want_bytes();
        self.k
            .load_shared_uniform(self.note().at(behind + 4 * piece))
    }

    /// Holds it, and no other, to go on.
    fn hold_first(&self) {
        self.before.set(self.stage);
        self.held.set(self.stage);
        self.advance();
    }

    /// Holds it besides the one that is held, to go on.
    fn hold(&self) {
        self.before.set(self.held);
        self.held.set(self.stage);
        self.advance();
    }

    /// The tile that was held last.
    fn held_tile(&self) -> SharedTile<'k> {
        self.pairs.tile_at(self.held)
    }

    /// Gives it back.
    fn release_held(&self) {
        self.pairs.release_at(self.held);
    }

    /// Gives back the one that was held before it.
    fn release_before(&self) {
        self.pairs.release_at(self.before);
    }

    /// Gives the end back.
    fn finish(&self) {
        self.pairs.release_at(self.stage);
    }

    /// Waits for the stage at hand, and reads who wants it.
    fn look(&self) {
        self.pairs.wait_at(self.stage);
        let note = self.note();
        for (i, want) in (0..).zip(&self.wants) {
            want.set(self.k.load_shared_uniform(note.at(4 * i)));
        }
    }

    /// Whether it is the end, or has a piece that a warp of this warpgroup wants.
    fn is_for_us(&self) -> Reg<'k, bool> {
        let (&first, others) = self.wants.split_first().expect("a tile has pieces");
        let any = others.iter().fold(first, |any, &want| any | want);
        (any & self.own).differs(0)
    }

    /// Gives it back and goes on.
    fn pass(&self) {
        self.pairs.release_at(self.stage);
        self.advance();
    }

    fn advance(&self) {
        let next = self.stage + 1;
        self.stage.set(next.equals(STAGES).select(0u32, next));
    }

    fn note(&self) -> Address<'k, u32> {
        self.notes.plus(self.stage * self.config.stage_bytes())
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
fn in_turn<'k>(k: &'k Builder, body: impl Fn(flex_block_attn_ptx::builder::Leave<'k>, u32)) {
    k.loop_(|leave| {
        for stage in 0..STAGES {
            body(leave, stage);
        }
    });
}
