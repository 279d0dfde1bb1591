//! Attention forward: `out = softmax(scale q k^T) v` over the key blocks that a plan lists for each
//! block of queries, and the logarithm of each row's sum.
//!
//! A thread block has 128 queries, two warpgroups of 64 with all of their softmax in registers,
//! and a producer warp that streams tiles of k and v. Of each warpgroup one product is always in
//! flight while it computes the softmax of the one before (FlashAttention-3, arXiv 2407.08608): the
//! product with v trails that with k by one tile. Named barriers let the warpgroups take turns at
//! the tensor cores, so that one's softmax lies under the other's products.
//!
//! Called by `flex-block-attn`; scores are kept in units of log2, so that exp is exp2.

use flex_block_attn_ptx::builder::TmaOptions;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg};
use flex_block_attn_tile::{
    Barrier, Fragments, Left, Place, RegTile, Right, Ring, RowPair, Shape, Shared, SharedTile,
    Strides, WARPGROUP, Warpgroup, quad_sum,
};

use crate::gemm::pair;

/// Queries of a thread block.
const QUERIES: u32 = 128;
/// Queries of a warpgroup.
const OWN: u32 = 64;
/// Stages of k and of v.
const STAGES: usize = 2;
/// Named barriers: warpgroup `w` waits at `TURN + w` for its turn, and for its own threads at
/// `OWN_SYNC + w`.
const TURN: u32 = 2;
const OWN_SYNC: u32 = 4;

/// What the kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns of q, k and v: 64 or 128.
    pub head_dim: u32,
    /// Keys of a tile: 128 or 192.
    pub kv_tile: u32,
}

/// A (batch, heads, tokens, head_dim) tensor in global memory.
#[derive(Debug, Clone, Copy)]
pub struct Tensor {
    /// Its address, a multiple of 16.
    pub address: u64,
    /// Elements from one index to the next; multiples of 8.
    pub strides: Strides,
}

/// What a launch gives it.
#[derive(Debug, Clone, Copy)]
pub struct Args {
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
    /// Output.
    pub out: Tensor,
    /// Logarithms of the rows' sums, float32 (batch, heads, q_len), contiguous.
    pub lse: u64,
    /// Address of the plan's row counts: int32 for each block of queries.
    pub counts: u64,
    /// Address of the plan's row lists: int32, `list_stride` for each block of queries.
    pub lists: u64,
    /// Words from one list to the next: the number of key blocks.
    pub list_stride: u32,
    /// Words from one (batch, head) record of the plan to the next; 0 for a shared one.
    pub record: [u32; 2],
    /// Batches.
    pub batch: u32,
    /// Heads of q; `group` of them share one of k and v.
    pub heads: u32,
    /// Heads of q for each of k and v.
    pub group: u32,
    /// Queries, a multiple of 128.
    pub q_len: u32,
    /// Keys, a multiple of `kv_tile`.
    pub kv_len: u32,
    /// Tokens of a block of queries, a multiple of 128.
    pub q_block: u32,
    /// Tokens of a block of keys, a multiple of `kv_tile`.
    pub kv_block: u32,
    /// Factor of the scores.
    pub scale: f32,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        let config = |element, head_dim, kv_tile| Self {
            element,
            head_dim,
            kv_tile,
        };
        let elements = [Element::Bf16, Element::F16];
        let shapes = [(128, 128), (128, 192), (64, 128), (64, 192)];
        elements
            .iter()
            .flat_map(|&e| shapes.map(|(dim, tile)| config(e, dim, tile)))
            .collect()
    }

    fn q_shape(self) -> Shape {
        Shape::new(QUERIES, self.head_dim, self.element)
    }

    fn kv_shape(self) -> Shape {
        Shape::new(self.kv_tile, self.head_dim, self.element)
    }

    fn out_shape(self) -> Shape {
        Shape::new(OWN, self.head_dim, self.element)
    }

    /// The launch for some tensors.
    ///
    /// # Panics
    /// If lengths or blocks are not multiples of the tiles.
    pub fn launch(self, args: &Args) -> Launch {
        let Args {
            batch,
            heads,
            q_len,
            kv_len,
            q_block,
            kv_block,
            ..
        } = *args;
        assert!(
            q_len % QUERIES == 0 && q_block % QUERIES == 0,
            "queries of {args:?}"
        );
        assert!(
            kv_len % self.kv_tile == 0 && kv_block % self.kv_tile == 0,
            "keys of {args:?}"
        );
        let extents =
            |heads: u32, tokens: u32| [batch, heads, tokens, self.head_dim].map(u64::from);
        let map = |shape: Shape, tensor: Tensor, extents| {
            Arg::TensorMap(shape.tensor_map(tensor.address, extents, tensor.strides))
        };
        let of_q = extents(heads, q_len);
        let of_kv = extents(heads / args.group, kv_len);
        let out = self
            .out_shape()
            .panel_map(args.out.address, of_q, args.out.strides);
        Launch {
            grid: [q_len / QUERIES, heads, batch],
            args: vec![
                map(self.q_shape(), args.q, of_q),
                map(self.kv_shape(), args.k, of_kv),
                map(self.kv_shape(), args.v, of_kv),
                Arg::TensorMap(out),
                Arg::U64(args.lse),
                Arg::U64(args.counts),
                Arg::U64(args.lists),
                Arg::U32(args.list_stride),
                Arg::U32(args.record[0]),
                Arg::U32(args.record[1]),
                Arg::U32(args.group),
                Arg::U32(q_block / QUERIES),
                Arg::U32(kv_block / self.kv_tile),
                Arg::F32(args.scale * std::f32::consts::LOG2_E),
            ],
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        let Self {
            element,
            head_dim,
            kv_tile,
        } = self;
        let name = format!("forward_{element:?}_d{head_dim}_kv{kv_tile}").to_lowercase();
        Builder::kernel(name, 3 * WARPGROUP, |k| self.body(k))
    }

    fn body(self, k: &Builder) {
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
        let heads = k.special(flex_block_attn_ptx::ir::Special::GridY);
        let line = (self.batch * heads + self.head).times_wide(q_len);
        let address = lse + (line + row.to_u64()) * 4;
        k.where_(cond, || {
            k.store_global(address.at(0), values[0]);
            k.store_global(address.at(8 * 4), values[1]);
        });
    }
}

/// The running softmax of a thread's two rows (Milakov and Gimelshein, arXiv 1805.02867), in
/// units of log2.
struct Softmax<'k> {
    scale: Reg<'k, f32>,
    /// The largest score so far, scaled.
    max: RowPair<'k>,
    /// This thread's part of the sum of weights relative to it.
    sum: RowPair<'k>,
    /// What the output so far must be multiplied by, after the last step.
    factor: RowPair<'k>,
}

impl<'k> Softmax<'k> {
    fn new(k: &'k Builder, scale: Reg<'k, f32>) -> Self {
        let pair = |value: f32| [k.var(value), k.var(value)];
        Self {
            scale,
            max: pair(f32::NEG_INFINITY),
            sum: pair(0.0),
            factor: pair(1.0),
        }
    }

    /// Turns a tile of scores into weights, in place.
    fn step(&self, scores: &RegTile<'k>) {
        let found = scores.row_max();
        for row in 0..2 {
            let max = (found[row] * self.scale).max(self.max[row]);
            self.factor[row].set((self.max[row] - max).exp2());
            self.max[row].set(max);
        }
        scores.exp2_scaled(self.scale, self.max);
        let sum = scores.row_sum_own();
        for row in 0..2 {
            self.sum[row].set(self.sum[row].fma(self.factor[row], sum[row]));
        }
    }

    /// What the output must be multiplied by in the end, and the natural logarithm of the sum of
    /// exponentials: 0 and -inf for rows without any key.
    fn finish(&self) -> (RowPair<'k>, RowPair<'k>) {
        let sum = quad_sum(self.sum);
        let row = |row: usize| {
            let any = sum[row].gt(0.0);
            let log2 = sum[row].log2() + self.max[row];
            let log = any.select(log2 * std::f32::consts::LN_2, f32::NEG_INFINITY);
            (any.select(sum[row].reciprocal(), 0.0), log)
        };
        let ((a, la), (b, lb)) = (row(0), row(1));
        ([a, b], [la, lb])
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
