//! A product in each thread block of a cluster.

use flex_block_attn_emulator::Memory;
use flex_block_attn_ptx::builder::TmaOptions;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch};
use flex_block_attn_tile::{Left, RegTile, Right, Shape, Shared, WARPGROUP, Warpgroup};

use crate::{check, map, numbers, place, store};

/// Rows of a block's part of the product, and the inner dimension.
const ROWS: u32 = 64;
/// Columns: two panels, which are the descriptors' leading offset apart.
const COLUMNS: u32 = 128;
/// Thread blocks of the cluster.
const BLOCKS: u32 = 4;

/// Of a block's tiles of a and b.
fn shapes() -> [Shape; 2] {
    [ROWS, COLUMNS].map(|columns| Shape::new(ROWS, columns, Element::Bf16))
}

/// Each block multiplies its own rows of a by all of b.
fn product() -> Kernel {
    Builder::kernel("product", WARPGROUP, |k| {
        k.set_cluster(BLOCKS);
        let (a, b) = (k.tensor_map("a"), k.tensor_map("b"));
        let out = k.param::<u64>("out");
        let shared = Shared::new(k);
        // b is not the last, so that a wrong offset from panel to panel gives wrong results.
        let [a_shape, b_shape] = shapes();
        let (b_tile, a_tile) = (shared.tile(b_shape), shared.tile(a_shape));
        let loaded = shared.barrier(1);
        shared.finish();
        let first_row = k.cta_x() * ROWS;
        k.if_(k.tid().equals(0), || {
            loaded.init();
            k.mbarrier_init_fence();
            loaded.arrive_expect(a_shape.bytes() + b_shape.bytes());
            a_tile.load(a, place(k, first_row), loaded, TmaOptions::default());
            b_tile.load(b, place(k, k.var(0u32)), loaded, TmaOptions::default());
        });
        k.sync_threads();
        loaded.wait_for(k.var(0u32));
        let wg = Warpgroup::new(k, 0);
        let sum = RegTile::uninit(k, COLUMNS);
        wg.fence();
        wg.product(&sum, Left::Tile(a_tile), Right::Tile(b_tile));
        wg.wait(0);
        store(k, wg, &sum, out, first_row);
    })
}

#[test]
fn products_are_right_in_every_block_of_a_cluster() {
    let (rows, inner, columns) = (BLOCKS * ROWS, ROWS as usize, COLUMNS as usize);
    let (a_halves, a) = numbers(Element::Bf16, rows * ROWS, 1);
    let (b_halves, b) = numbers(Element::Bf16, ROWS * COLUMNS, 20_000);
    let mut memory = Memory::new();
    let [a_shape, b_shape] = shapes();
    let a_map = map(a_shape, memory.alloc_with("a", &a_halves), rows);
    let b_map = map(b_shape, memory.alloc_with("b", &b_halves), ROWS);
    let out = memory.alloc("out", 4 * rows as usize * columns);
    let launch = Launch {
        grid: [BLOCKS, 1, 1],
        args: vec![a_map, b_map, Arg::U64(out)],
    };
    let expected = |row: usize, column: usize| {
        let of = |k| a[row * inner + k] * b[k * columns + column];
        (0..inner).map(of).sum()
    };
    check(&product(), &launch, &memory, (out, rows, COLUMNS), expected);
}
