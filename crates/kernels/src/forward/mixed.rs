//! The forward kernel for blocks of queries that are no multiples of a thread block's 128: any
//! multiple of 16.
//!
//! Warps have 16 queries each, so each warp's are of one block, but those of a thread block are of
//! several, with a list each. The loader merges the lists: each of eight lanes stands in one of them,
//! the smallest entry comes next, and a bit for each lane that has it says which warps want it. Tiles
//! of 64 keys are put together from pieces of such blocks. A warpgroup leaves out tiles that none of
//! its warps want; a warp of a warpgroup that does want one masks the pieces that it does not.
//!
//! Rings are deep, tiles small, and warpgroups go their own ways: what hides the softmax of one are
//! the products of the other.

use flex_block_attn_ptx::builder::{Address, TmaOptions};
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{
    Fragments, Left, Phases, Place, RegTile, Right, Ring, Shape, Shared, SharedTile, Warpgroup,
};

use super::kernel::{Maps, WARPS};
use super::problem::{Problem, Tile, rounded_up};
use super::queries::{Note, Queries};
use super::softmax::Softmax;
use super::{Config, OWN, QUERIES};
use crate::gemm::pair;

/// Tiles of k, each with its tile of v, that may be under way.
const STAGES: usize = 6;
/// Queries of a warp.
const WARP_QUERIES: u32 = 16;
/// Warps of a warpgroup.
const OWN_WARPS: u32 = 4;

/// In a tile's first want: there are no more for these queries.
const END: u32 = u32::MAX;
/// In the place of an entry: the list has no more.
const NO_ENTRY: u32 = u32::MAX;

/// What is in shared memory.
struct Stores<'k> {
    queries: Queries<'k>,
    /// Tiles of k, with those of v behind them.
    pairs: Ring<'k>,
    /// For each stage, a want for each piece: bits of the warps that want it, and from bit 8 on how
    /// many of its keys there are.
    wants: Vec<Address<'k, u32>>,
}

/// Lists being merged. Lanes hold one each; `block`, `left` and `warps` are the same in all.
struct Merge<'a, 'k> {
    problem: &'a Problem<'k>,
    config: Config,
    /// The lane's entry, and the one after it, asked for ahead: the answer takes long.
    entry: Reg<'k, u32>,
    after: Reg<'k, u32>,
    /// The word of the plan behind that one, and where the list ends.
    next: Reg<'k, u32>,
    end: Reg<'k, u32>,
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
        let maps = Maps::new(k);
        let problem = Problem::new(k);
        let shared = Shared::new(k);
        let stores = Stores {
            queries: Queries::new(&shared, self.q_shape()),
            pairs: Ring::new(&shared, STAGES, self.pair_shape(), WARPS),
            wants: (0..STAGES)
                .map(|_| shared.bytes(4 * self.pieces(), 4))
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
            let merge = Merge::new(problem, self, tile, first);
            emptied.wait();
            k.if_(leader, || {
                let some = k.var(1u32);
                queries.fill(
                    k,
                    maps.q,
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
                let found: Vec<_> = (0..self.pieces()).map(|_| merge.next_piece()).collect();
                let wants = wants[stage];
                let end = found[0].1.equals(0);
                k.if_(leader & end, || {
                    k.store_shared(wants, k.var(END));
                    full.arrive();
                });
                leave.when(end);
                k.if_(leader, || {
                    for (i, &(_, want)) in (0..).zip(&found) {
                        k.store_shared(wants.at(4 * i), want);
                    }
                    full.arrive_expect(pair.shape.bytes());
                    for (i, &(row, _)) in (0..).zip(&found) {
                        let place = Place::rows(row, tile.kv_head, tile.batch);
                        let load = |part: SharedTile<'k>, map| {
                            let piece = part.row_range(i * self.piece, self.piece);
                            piece.load_panels(map, place, full, TmaOptions::default());
                        };
                        load(self.k_part(pair), maps.k);
                        load(self.v_part(pair), maps.v);
                    }
                });
            });
        });
        emptied.wait();
        k.if_(leader, || queries.pass(k, Note::end(k)));
    }

    fn k_part(self, pair: SharedTile<'_>) -> SharedTile<'_> {
        pair.row_range(0, self.kv_tile)
    }

    fn v_part(self, pair: SharedTile<'_>) -> SharedTile<'_> {
        pair.row_range(self.kv_tile, self.kv_tile)
    }

    fn consume_mixed<'k>(self, out: Reg<'k, u64>, problem: &Problem<'k>, stores: &Stores<'k>) {
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
                let want = |i| {
                    let at = stores.wants[stage].at(4 * i);
                    k.load_shared::<u32>(at).uniform()
                };
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
                        let kept = (want & mine).differs(0).select(want >> 8, 0u32);
                        k.if_(kept.lt(self.piece), || {
                            let columns = i * self.piece..(i + 1) * self.piece;
                            scores.set_columns_from(columns, kept, wg.lane, f32::NEG_INFINITY);
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
            problem.store_lse(wg, stores.queries.note(k), log_sum);
            stores.queries.store(k, wg, out, &output, pair);
        });
    }
}

impl<'a, 'k> Merge<'a, 'k> {
    /// The lists of the blocks that the queries from `first` on are in. Lane `w` stands in that of
    /// warp `w`.
    fn new(problem: &'a Problem<'k>, config: Config, tile: Tile<'k>, first: Reg<'k, u32>) -> Self {
        let k = problem.k;
        let query = first + k.lane() * WARP_QUERIES;
        let (next, end) = (k.var(0u32), k.var(0u32));
        k.if_(k.lane().lt(WARPS) & query.lt(problem.q_len), || {
            let row = query / problem.q_block;
            next.set(problem.list(tile, row));
            end.set(next + problem.count(tile, row));
        });
        let merge = Self {
            problem,
            config,
            entry: k.uninit(),
            after: k.uninit(),
            next,
            end,
            key: k.var(0u32),
            left: k.var(0u32),
            warps: k.var(0u32),
        };
        merge.ask();
        merge.advance();
        merge
    }

    /// Takes the entry that was asked for, and asks for the next.
    fn advance(&self) {
        self.entry.set(self.after);
        self.ask();
    }

    fn ask(&self) {
        let mut next = self.next;
        self.after.set(NO_ENTRY);
        self.problem.k.if_(next.lt(self.end), || {
            self.after.set(self.problem.word(next));
            next += 1;
        });
    }

    /// The next piece's first key, and who wants it: nobody, if there are no more; its keys then lie
    /// behind the sequence, where copies find zeros. All lanes.
    fn next_piece(&self) -> (Reg<'k, u32>, Reg<'k, u32>) {
        let (k, problem, piece) = (self.problem.k, self.problem, self.config.piece);
        let (mut key, mut left) = (self.key, self.left);
        k.if_(left.equals(0), || {
            let smallest = self.entry.warp_min();
            k.if_(smallest.differs(NO_ENTRY), || {
                let has_it = self.entry.equals(smallest);
                self.warps.set(has_it.ballot());
                k.if_(has_it, || self.advance());
                key.set(smallest * problem.kv_block);
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
