//! The forward kernel itself: what each thread block, its producer warp and its warpgroups do.

use flex_block_attn_ptx::builder::TmaOptions;
use flex_block_attn_ptx::ir::Special;
use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{
    Barrier, Fragments, Left, Place, RegTile, Right, Ring, RowPair, Shared, SharedTile, WARPGROUP,
    Warpgroup,
};

use super::softmax::Softmax;
use super::{Config, OWN, QUERIES};
use crate::gemm::pair;

/// Stages of k and of v.
const STAGES: usize = 2;
/// Named barriers: warpgroup `w` waits at `TURN + w` for its turn, and for its own threads at
/// `OWN_SYNC + w`.
const TURN: u32 = 2;
const OWN_SYNC: u32 = 4;

impl Config {
    pub(super) fn body(self, k: &Builder) {
        let maps = Maps {
            q: k.tensor_map("q"),
            k: k.tensor_map("k"),
            v: k.tensor_map("v"),
            out: k.tensor_map("out"),
        };
        let lse = k.param::<u64>("lse");
        let row = Row::new(k);
        let scale = k.param::<f32>("scale");

        let shared = Shared::new(k);
        let q_tile = shared.tile(self.q_shape());
        let keys = Ring::new(&shared, STAGES, self.kv_shape(), 8);
        let values = Ring::new(&shared, STAGES, self.kv_shape(), 8);
        let q_full = shared.barrier(1);
        shared.finish();
        k.if_(k.tid().equals(0), || {
            q_full.init();
            keys.init();
            values.init();
            k.mbarrier_init_fence();
        });
        k.sync_threads();

        k.if_else(
            Warpgroup::number(k).equals(0),
            || {
                Warpgroup::release_registers(k, 24);
                k.if_(k.tid().equals(0) & row.tiles.gt(0), || {
                    self.produce(k, maps, &row, (q_tile, q_full), &keys, &values);
                });
            },
            || {
                Warpgroup::acquire_registers(k, 240);
                self.consume(
                    k,
                    maps.out,
                    lse,
                    scale,
                    &row,
                    (q_tile, q_full),
                    &keys,
                    &values,
                );
            },
        );
    }

    /// Loads q, then k and v tile by tile, v trailing by one as it does in the consumers.
    fn produce<'k>(
        self,
        k: &'k Builder,
        maps: Maps<'k>,
        row: &Row<'k>,
        (q_tile, q_full): (SharedTile<'k>, Barrier<'k>),
        keys: &Ring<'k>,
        values: &Ring<'k>,
    ) {
        let options = TmaOptions::default();
        let (keys, values) = (keys.producer(), values.producer());
        q_full.arrive_expect(q_tile.shape.bytes());
        q_tile.load(maps.q, row.queries(k.cta_x() * QUERIES), q_full, options);

        let here = k.uninit::<u32>();
        here.set(row.kv_tile(k, k.var(0u32)) * self.kv_tile);
        keys.load(0, maps.k, row.keys(here), options);
        each_pair(k, row.tiles, |tile, stage, before| {
            let previous = here.copied();
            here.set(row.kv_tile(k, tile) * self.kv_tile);
            keys.load(stage, maps.k, row.keys(here), options);
            values.load(before, maps.v, row.keys(previous), options);
        });
        last_stage(k, row.tiles, |stage| {
            values.load(stage, maps.v, row.keys(here), options)
        });
    }

    #[allow(clippy::too_many_arguments)]
    fn consume<'k>(
        self,
        k: &'k Builder,
        out: Reg<'k, u64>,
        lse: Reg<'k, u64>,
        scale: Reg<'k, f32>,
        row: &Row<'k>,
        (q_tile, q_full): (SharedTile<'k>, Barrier<'k>),
        keys: &Ring<'k>,
        values: &Ring<'k>,
    ) {
        let wg = Warpgroup::new(k, 1);
        let (keys, values) = (keys.consumer(k, wg.leader), values.consumer(k, wg.leader));
        let q = q_tile.part(wg.index, OWN);
        let scores = RegTile::uninit(k, self.kv_tile);
        let weights = Fragments::uninit(k, self.kv_tile / 16);
        let output = RegTile::uninit(k, self.head_dim);
        let softmax = Softmax::new(k, scale);
        output.fill(0.0);

        // The first warpgroup goes first.
        k.if_(wg.index.equals(0), || k.barrier_arrive(TURN, 2 * WARPGROUP));
        k.if_(row.tiles.gt(0), || {
            q_full.waiter().wait();
            let k_tile = keys.wait(0);
            wg.fence();
            wg.product(&scores, Left::Tile(q), Right::Transposed(k_tile));
            wg.wait(0);
            keys.release(0);
            softmax.step(&scores);
            scores.round_to(&weights, pair(self.element));

            each_pair(k, row.tiles, |_, stage, before| {
                let k_tile = keys.wait(stage);
                k.barrier_sync(wg.index + TURN, 2 * WARPGROUP);
                wg.fence();
                wg.product(&scores, Left::Tile(q), Right::Transposed(k_tile));
                // Under the product with k: the output is rescaled for the maximum found last.
                output.scale_rows(softmax.factor);
                let v_tile = values.wait(before);
                wg.fence();
                wg.add_product(&output, Left::Fragments(&weights), Right::Tile(v_tile));
                k.barrier_arrive((wg.index ^ 1) + TURN, 2 * WARPGROUP);
                wg.wait(1);
                keys.release(stage);
                softmax.step(&scores);
                wg.wait(0);
                values.release(before);
                scores.round_to(&weights, pair(self.element));
            });

            output.scale_rows(softmax.factor);
            last_stage(k, row.tiles, |stage| {
                let v_tile = values.wait(stage);
                wg.fence();
                wg.add_product(&output, Left::Fragments(&weights), Right::Tile(v_tile));
                wg.wait(0);
            });
        });

        let (inverse, log_sum) = softmax.finish();
        output.scale_rows(inverse);
        let first = k.cta_x() * QUERIES + wg.index * OWN;
        row.store_lse(k, lse, first + wg.row(), log_sum, (wg.lane & 3).equals(0));
        // The output takes the place of this warpgroup's queries, which it has done with.
        wg.sync(wg.index + OWN_SYNC);
        wg.store(&output, pair(self.element), q);
        wg.sync(wg.index + OWN_SYNC);
        k.if_(wg.first_thread, || {
            let places = (0..q.shape.panels()).map(|panel| row.queries(first).panel(panel));
            q.store(out, places);
            k.bulk_commit();
            k.bulk_wait(0);
        });
    }
}

/// The tensor maps.
#[derive(Clone, Copy)]
struct Maps<'k> {
    q: Reg<'k, u64>,
    k: Reg<'k, u64>,
    v: Reg<'k, u64>,
    out: Reg<'k, u64>,
}

/// What a thread block's queries look at.
struct Row<'k> {
    head: Reg<'k, u32>,
    kv_head: Reg<'k, u32>,
    batch: Reg<'k, u32>,
    /// The list of key blocks.
    list: Reg<'k, u64>,
    /// Tiles of keys in a block.
    tiles_per_block: Reg<'k, u32>,
    /// Tiles of keys in the whole list.
    tiles: Reg<'k, u32>,
}

impl<'k> Row<'k> {
    fn new(k: &'k Builder) -> Self {
        let (counts, lists) = (k.param::<u64>("counts"), k.param::<u64>("lists"));
        let list_stride = k.param::<u32>("list_stride");
        let batch_record = k.param::<u32>("batch_record");
        let head_record = k.param::<u32>("head_record");
        let group = k.param::<u32>("group");
        let q_tiles_per_block = k.param::<u32>("q_tiles_per_block");
        let tiles_per_block = k.param::<u32>("kv_tiles_per_block");
        let (head, batch) = (k.cta_y(), k.cta_z());
        let block = k.cta_x() / q_tiles_per_block;
        let record = head.to_u64() * head_record.to_u64() + batch.to_u64() * batch_record.to_u64();
        let count = k.load_constant::<u32>(counts + (record + block.to_u64()) * 4);
        Self {
            head,
            kv_head: head / group,
            batch,
            list: lists + (record + block.times_wide(list_stride)) * 4,
            tiles_per_block,
            // The same in all lanes, and known to be: products are issued inside of loops over it.
            tiles: (count * tiles_per_block).uniform(),
        }
    }

    /// The tile of keys that comes at place `tile` of the list.
    fn kv_tile(&self, k: &'k Builder, tile: Reg<'k, u32>) -> Reg<'k, u32> {
        let block = tile / self.tiles_per_block;
        let listed = k.load_constant::<u32>(self.list + block.times_wide(4));
        listed * self.tiles_per_block + tile % self.tiles_per_block
    }

    fn queries(&self, row: Reg<'k, u32>) -> Place {
        Place::rows(row, self.head, self.batch)
    }

    fn keys(&self, row: Reg<'k, u32>) -> Place {
        Place::rows(row, self.kv_head, self.batch)
    }

    /// Stores the logarithms of a thread's two rows, from row `row` of the sequence on.
    fn store_lse(
        &self,
        k: &'k Builder,
        lse: Reg<'k, u64>,
        row: Reg<'k, u32>,
        values: RowPair<'k>,
        cond: Reg<'k, bool>,
    ) {
        let q_len = k.grid_x() * QUERIES;
        let heads = k.special(Special::GridY);
        let line = (self.batch * heads + self.head).times_wide(q_len);
        let address = lse + (line + row.to_u64()) * 4;
        k.where_(cond, || {
            k.store_global(address.at(0), values[0]);
            k.store_global(address.at(8 * 4), values[1]);
        });
    }
}

/// Does `body(tile, stage, stage before)` for each tile but the first.
fn each_pair<'k>(k: &'k Builder, tiles: Reg<'k, u32>, body: impl Fn(Reg<'k, u32>, usize, usize)) {
    let mut tile = k.var(1u32);
    k.loop_(|leave| {
        for stage in [1, 0] {
            leave.when(tile.ge(tiles));
            body(tile, stage, 1 - stage);
            tile += 1;
        }
    });
}

/// Does `body` for the stage that the last tile is in.
fn last_stage<'k>(k: &'k Builder, tiles: Reg<'k, u32>, body: impl Fn(usize)) {
    k.if_else((tiles & 1).equals(1), || body(0), || body(1));
}
