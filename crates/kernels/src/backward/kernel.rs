//! The main kernel: what a thread block's loader, its reducers and its two consumers do.
//!
//! A warpgroup has 64 of the keys: scores are made transposed, so that they, rounded, are left
//! operands of the products that make dk and dv. The scores' gradients go to shared memory besides,
//! for dq. Of 128 columns of it each warpgroup makes 64, of all keys; of 64, each makes its own keys'
//! part of the sum.
//!
//! dq's sums lie as the products leave them: of each 16 rows first those of the first 64 columns, as a
//! warp has them, then those of the others, if there are. A warp's are eight times 32 lanes times four.

use flex_block_attn_ptx::builder::{Address, Leave, TmaOptions};
use flex_block_attn_ptx::ir::Fence;
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{
    Barrier, Fragments, Left, Phases, Place, RegTile, Right, Ring, Shape, Shared, SharedTile,
    WARPGROUP, Warpgroup,
};

use super::queries::{KeyTile, Problem, Walk};
use super::{Config, KEYS, OWN, QUERIES};
use crate::gemm::pair;
use crate::merge::WARPS;

/// Stages of q and of dout.
const STAGES: usize = 2;
/// Warpgroups that multiply.
const CONSUMERS: u32 = 2;
/// Bytes of a tile's lse, or of its deltas.
const ROW_BYTES: u32 = 4 * QUERIES;
/// Columns of dq that a consumer makes, and bytes of a warp's part of it.
const DQ_COLUMNS: u32 = 64;
const DQ_WARP_BYTES: u32 = 4 * 16 * DQ_COLUMNS;
/// The thread that reduces, in another warp than the loader, which is warp 0.
const REDUCER: u32 = 32;
/// In a note's place of a line: there are no more queries.
const END: u32 = u32::MAX;
/// Named barriers: all consumers; a consumer's own threads at `OWN_SYNC + w`.
const BOTH: u32 = 1;
const OWN_SYNC: u32 = 2;

/// The tensor maps.
#[derive(Clone, Copy)]
struct Maps<'k> {
    q: Reg<'k, u64>,
    k: Reg<'k, u64>,
    v: Reg<'k, u64>,
    dout: Reg<'k, u64>,
    dk: Reg<'k, u64>,
    dv: Reg<'k, u64>,
}

/// What is in shared memory.
struct Stores<'k> {
    keys: SharedTile<'k>,
    values: SharedTile<'k>,
    /// K and V are there.
    keys_full: Barrier<'k>,
    queries: Ring<'k>,
    douts: Ring<'k>,
    /// Gradients of the scores, queries by keys: what consumers tell each other.
    gradients: Vec<SharedTile<'k>>,
    /// dq on its way out; whether it is there, and gone again.
    dq: Address<'k, u32>,
    dq_full: Barrier<'k>,
    dq_empty: Barrier<'k>,
    /// For each stage: lse and deltas of its queries.
    lse: Vec<Address<'k, u32>>,
    deltas: Vec<Address<'k, u32>>,
    /// For each stage a note: the line of the workspace that is the queries' head's, then for each
    /// piece its first query, and a bit for each warp whose keys it sees.
    notes: Vec<Address<'k, u32>>,
}

/// How consumers share the making of dq, and where their parts lie on the way out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Share {
    /// Each makes half of the columns: of 16 rows first one's, then the other's.
    Columns,
    /// Each makes its keys' part of the sum: first one's part, then the other's.
    Keys,
}

impl Config {
    fn share(self) -> Share {
        match self.head_dim {
            DQ_COLUMNS => Share::Keys,
            _ => Share::Columns,
        }
    }

    /// Bytes of 16 rows of dq.
    fn dq_rows_bytes(self) -> u32 {
        4 * 16 * self.head_dim
    }

    pub(super) fn body(self, k: &Builder) {
        let maps = Maps {
            q: k.tensor_map("q"),
            k: k.tensor_map("k"),
            v: k.tensor_map("v"),
            dout: k.tensor_map("dout"),
            dk: k.tensor_map("dk"),
            dv: k.tensor_map("dv"),
        };
        let problem = Problem::new(k);
        let shared = Shared::new(k);
        let each = |bytes| -> Vec<_> { (0..STAGES).map(|_| shared.bytes(bytes, 16)).collect() };
        let gradient = Shape::new(QUERIES, CONSUMERS * OWN, self.element);
        let stores = Stores {
            keys: shared.tile(self.kv_shape()),
            values: shared.tile(self.kv_shape()),
            // The reducer reads the notes of these.
            queries: Ring::new(&shared, STAGES, self.q_shape(), WARPS + 1),
            douts: Ring::new(&shared, STAGES, self.q_shape(), WARPS),
            gradients: (0..STAGES).map(|_| shared.tile(gradient)).collect(),
            dq: shared.bytes(WARPS * DQ_WARP_BYTES, 128),
            keys_full: shared.barrier(1),
            dq_full: shared.barrier(WARPS),
            dq_empty: shared.barrier(1),
            lse: each(ROW_BYTES),
            deltas: each(ROW_BYTES),
            notes: each(4 + 8 * self.pieces()),
        };
        shared.finish();
        k.if_(k.tid().equals(0), || {
            stores.keys_full.init();
            stores.queries.init();
            stores.douts.init();
            stores.dq_full.init();
            stores.dq_empty.init();
            k.mbarrier_init_fence();
        });
        k.sync_threads();

        let keys = problem.keys();
        k.if_else(
            Warpgroup::number(k).equals(0),
            || {
                Warpgroup::release_registers(k, 24);
                k.if_(k.tid().lt(32), || self.load(maps, &problem, keys, &stores));
                k.if_(k.tid().equals(REDUCER), || self.reduce(&problem, &stores));
            },
            || {
                Warpgroup::acquire_registers(k, 240);
                self.consume(maps, &problem, keys, &stores);
            },
        );
    }

    fn load<'k>(
        self,
        maps: Maps<'k>,
        problem: &Problem<'k>,
        keys: KeyTile<'k>,
        stores: &Stores<'k>,
    ) {
        let (k, options) = (problem.k, TmaOptions::default());
        let leader = k.lane().equals(0);
        let phases = Phases::new(k);
        let queries = stores.queries.producer(&phases);
        let douts = stores.douts.producer(&phases);
        k.if_(leader, || {
            stores
                .keys_full
                .arrive_expect(2 * stores.keys.shape.bytes());
            let place = Place::rows(keys.first, keys.head, keys.batch);
            stores.keys.load(maps.k, place, stores.keys_full, options);
            stores.values.load(maps.v, place, stores.keys_full, options);
        });
        let walk = Walk::new(problem, self, keys);
        // Tiles go into the stages in turn, whatever head they are of.
        in_turn(k, |leave, stage| {
            let some = walk.seek();
            let (tile, full) = queries.wait(stage);
            let note = stores.notes[stage];
            k.if_(leader & !some, || {
                k.store_shared(note, k.var(END));
                full.arrive();
            });
            leave.when(!some);
            k.where_(leader, || k.store_shared(note, walk.line()));
            for i in 0..self.pieces() {
                let (row, want) = walk.next_piece();
                k.where_(leader, || {
                    k.store_shared(note.at(4 + 8 * i), row);
                    k.store_shared(note.at(8 + 8 * i), want);
                });
            }
            let load = |tile, full, map, numbers: Address<'k, u32>, from| {
                self.load_tile(problem, tile, full, map, note, |row| {
                    (Place::rows(row, walk.head, keys.batch), numbers, from)
                });
            };
            k.if_(leader, || {
                load(tile, full, maps.q, stores.lse[stage], problem.lse);
            });
            let (tile, full) = douts.wait(stage);
            k.if_(leader, || {
                load(tile, full, maps.dout, stores.deltas[stage], problem.delta);
            });
        });
    }

    /// Has a tile filled with the pieces that a note tells, and their numbers with it: `what` says,
    /// for a first query, where a piece lies, where its numbers go, and where the array of them
    /// starts.
    fn load_tile<'k>(
        self,
        problem: &Problem<'k>,
        tile: SharedTile<'k>,
        full: Barrier<'k>,
        map: Reg<'k, u64>,
        note: Address<'k, u32>,
        what: impl Fn(Reg<'k, u32>) -> (Place, Address<'k, u32>, Reg<'k, u64>),
    ) {
        let k = problem.k;
        full.arrive_expect(tile.shape.bytes() + ROW_BYTES);
        for i in 0..self.pieces() {
            let row = k.load_shared::<u32>(note.at(4 + 8 * i));
            let (place, numbers, from) = what(row);
            let part = tile.row_range(i * self.piece, self.piece);
            part.load_panels(map, place, full, TmaOptions::default());
            let line = k.load_shared::<u32>(note);
            let at = line.times_wide(problem.line) + row.to_u64();
            let bytes = 4 * self.piece;
            full.load_bytes(numbers.at(i * bytes), from + at * 4, bytes);
        }
    }

    /// Has dq added to memory, tile by tile.
    fn reduce(self, problem: &Problem<'_>, stores: &Stores<'_>) {
        let k = problem.k;
        let phases = Phases::new(k);
        let queries = stores.queries.consumer(k.lane().equals(0), &phases);
        let full = phases.waiter(stores.dq_full);
        in_turn(k, |leave, stage| {
            queries.wait(stage);
            let note = stores.notes[stage];
            let line = k.load_shared::<u32>(note);
            leave.when(line.equals(END));
            let rows: Vec<Reg<'_, u32>> = (0..self.pieces())
                .map(|i| k.load_shared(note.at(4 + 8 * i)))
                .collect();
            queries.release(stage);
            full.wait();
            let bytes = self.piece / 16 * self.dq_rows_bytes();
            // Where parts of the same rows lie.
            let parts = match self.share() {
                Share::Columns => 0..1,
                Share::Keys => 0..CONSUMERS,
            };
            for (i, &row) in (0..).zip(&rows) {
                // What only fills the tile up is not wanted.
                k.if_(row.lt(problem.tiles * QUERIES), || {
                    let first = line.times_wide(problem.tiles * QUERIES) + row.to_u64();
                    let to = problem.dq + first * u64::from(4 * self.head_dim);
                    for part in parts.clone() {
                        let from = stores.dq.at(part * (4 * DQ_WARP_BYTES) + i * bytes);
                        k.bulk_reduce_add(to, from, bytes);
                    }
                });
            }
            k.bulk_commit();
            k.bulk_wait_read(0);
            stores.dq_empty.arrive();
        });
        k.bulk_wait(0);
    }

    fn consume<'k>(
        self,
        maps: Maps<'k>,
        problem: &Problem<'k>,
        keys: KeyTile<'k>,
        stores: &Stores<'k>,
    ) {
        let k = problem.k;
        let wg = Warpgroup::new(k, 1);
        let pair = pair(self.element);
        let phases = Phases::new(k);
        let queries = stores.queries.consumer(wg.leader, &phases);
        let douts = stores.douts.consumer(wg.leader, &phases);
        let dq_empty = phases.waiter_ahead(stores.dq_empty);
        let part = match self.share() {
            Share::Columns => wg.warp * CONSUMERS + wg.index,
            Share::Keys => wg.index * 4 + wg.warp,
        };
        let dq_to = stores.dq.plus(part * DQ_WARP_BYTES + wg.lane * 16);
        let own_keys = stores.keys.part(wg.index, OWN);
        let own_values = stores.values.part(wg.index, OWN);
        let scores = RegTile::uninit(k, QUERIES);
        let gradients = RegTile::uninit(k, QUERIES);
        let weights = Fragments::uninit(k, QUERIES / 16);
        let rounded = Fragments::uninit(k, QUERIES / 16);
        let dq = RegTile::uninit(k, DQ_COLUMNS);
        let [dk, dv] = [(); 2].map(|()| RegTile::uninit(k, self.head_dim));
        dk.fill(0.0);
        dv.fill(0.0);
        // Masked scores are -inf, of which 0 times would be NaN.
        let scale = problem.scale.max(f32::MIN_POSITIVE) * std::f32::consts::LOG2_E;
        // This warp's bit of a want.
        let mine = k.var(1u32) << (wg.index * 4 + wg.warp);
        // The sequence may end among these keys.
        let own = keys.first + wg.index * OWN + wg.row();
        let inside = [0, 8].map(|row| (own + row).lt(problem.kv_len));
        let cut = (keys.first + KEYS).gt(problem.kv_len);

        phases.waiter(stores.keys_full).wait();
        in_turn(k, |leave, stage| {
            let q = queries.wait(stage);
            let line = k.load_shared::<u32>(stores.notes[stage]).uniform();
            leave.when(line.equals(END));
            wg.fence();
            wg.product(&scores, Left::Tile(own_keys), Right::Transposed(q));
            let dout = douts.wait(stage);
            wg.fence();
            wg.product(&gradients, Left::Tile(own_values), Right::Transposed(dout));
            wg.wait(1);
            for i in 0..self.pieces() {
                let want = k.load_shared::<u32>(stores.notes[stage].at(8 + 8 * i));
                k.if_((want.uniform() & mine).equals(0), || {
                    let columns = i * self.piece..(i + 1) * self.piece;
                    scores.set_columns(columns, f32::NEG_INFINITY);
                });
            }
            k.if_(cut, || {
                for (score, row) in scores.elements() {
                    score.set(inside[row].select(score, f32::NEG_INFINITY));
                }
            });
            each_column(k, wg, stores.lse[stage], &scores, |score, lse| {
                score.set(score.fma(scale, -lse).exp2());
            });
            wg.wait(0);
            scores.round_to(&weights, pair);
            let weight = scores.registers();
            let mut i = 0;
            each_column(
                k,
                wg,
                stores.deltas[stage],
                &gradients,
                |gradient, delta| {
                    gradient.set((gradient - delta) * weight[i]);
                    i += 1;
                },
            );
            gradients.round_to(&rounded, pair);
            let exchange = stores.gradients[stage];
            wg.store_transposed(&rounded, exchange.panel_at(wg.index));
            wg.fence();
            wg.add_product(&dv, Left::Fragments(&weights), Right::Tile(dout));
            let (gradients_of, keys_of) = match self.share() {
                Share::Columns => {
                    // Both warpgroups' gradients are there.
                    k.barrier_sync(BOTH, CONSUMERS * WARPGROUP);
                    (exchange, stores.keys.panel_at(wg.index))
                }
                Share::Keys => {
                    wg.sync(wg.index + OWN_SYNC);
                    (exchange.panel_at(wg.index), own_keys)
                }
            };
            wg.fence();
            wg.product(&dq, Left::Tile(gradients_of), Right::Tile(keys_of));
            wg.wait(1);
            douts.release(stage);
            wg.fence();
            wg.add_product(&dk, Left::Fragments(&rounded), Right::Tile(q));
            wg.wait(1);
            dq_empty.wait();
            for (i, numbers) in (0..).zip(dq.registers().chunks_exact(4)) {
                let numbers: [Reg<'k, f32>; 4] = std::array::from_fn(|j| numbers[j]);
                k.store_shareds(dq_to.at(4 * 128 * i), numbers);
            }
            k.fence(Fence::ProxyAsyncShared);
            k.warp_sync();
            k.where_(wg.leader, || stores.dq_full.arrive());
            wg.wait(0);
            queries.release(stage);
        });

        for mut register in dk.registers().iter().copied() {
            register *= problem.scale;
        }
        // Both have done with K and V, whose places the gradients take.
        k.barrier_sync(BOTH, CONSUMERS * WARPGROUP);
        wg.store(&dv, pair, own_values);
        wg.store(&dk, pair, own_keys);
        wg.sync(wg.index + OWN_SYNC);
        k.if_(wg.first_thread, || {
            let place = Place::rows(keys.first + wg.index * OWN, keys.head, keys.batch);
            let panels = || (0..own_keys.shape.panels()).map(|panel| place.panel(panel));
            own_keys.store(maps.dk, panels());
            own_values.store(maps.dv, panels());
            k.bulk_commit();
            k.bulk_wait(0);
        });
    }
}

/// Does `body(element, number)` for each element of a tile of keys by queries: `numbers` has one for
/// each query.
fn each_column<'k>(
    k: &'k Builder,
    wg: Warpgroup<'k>,
    numbers: Address<'k, u32>,
    tile: &RegTile<'k>,
    mut body: impl FnMut(Reg<'k, f32>, Reg<'k, f32>),
) {
    // Of every 8 columns a thread has two, in both of its rows.
    let own = numbers.plus((wg.lane & 3) * 8);
    for (i, four) in (0..).zip(tile.registers().chunks_exact(4)) {
        let two: [Reg<'k, f32>; 2] = k.load_shareds(own.at(32 * i));
        for (j, &element) in four.iter().enumerate() {
            body(element, two[j % 2]);
        }
    }
}

/// Does `body` for one stage after the other, until it leaves.
fn in_turn<'k>(k: &'k Builder, body: impl Fn(Leave<'k>, usize)) {
    k.loop_(|leave| {
        for stage in 0..STAGES {
            body(leave, stage);
        }
    });
}
