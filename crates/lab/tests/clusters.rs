//! The tile layer in clusters: a product in each thread block, in the emulator.

use flex_block_attn_emulator::{Memory, Options, emulate};
use flex_block_attn_ptx::builder::{TmaOptions, Value};
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg};
use flex_block_attn_tile::{
    Left, Place, RegTile, Right, Shape, Shared, Strides, WARPGROUP, Warpgroup,
};

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
            let at = |row: Reg<'_, u32>| Place {
                row: row.operand(),
                panel: 0u32.operand(),
                head: 0u32.operand(),
                batch: 0u32.operand(),
            };
            a_tile.load(a, at(first_row), loaded, TmaOptions::default());
            b_tile.load(b, at(k.var(0u32)), loaded, TmaOptions::default());
        });
        k.sync_threads();
        loaded.wait_for(k.var(0u32));
        let wg = Warpgroup::new(k, 0);
        let sum = RegTile::uninit(k, COLUMNS);
        wg.fence();
        wg.product(&sum, Left::Tile(a_tile), Right::Tile(b_tile));
        wg.wait(0);
        let row = first_row + wg.row();
        let start = out + (row * COLUMNS + (wg.lane & 3) * 2).times_wide(4);
        for (i, (register, second)) in (0u32..).zip(sum.elements()) {
            let column = 8 * (i / 4) + i % 2;
            k.store_global(
                start.at(4 * (8 * COLUMNS * second as u32 + column)),
                register,
            );
        }
    })
}

/// Small numbers, as bfloat16 and as they are: sums of their products are exact.
fn numbers(count: u32, seed: u32) -> (Vec<u16>, Vec<f32>) {
    let one = |i: u32| ((i + seed).wrapping_mul(2_654_435_761) >> 28) as f32 - 7.5;
    let values: Vec<f32> = (0..count).map(one).collect();
    let halves = values.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
    (halves, values)
}

#[test]
fn products_are_right_in_every_block_of_a_cluster() {
    let (rows, columns) = ((BLOCKS * ROWS) as usize, COLUMNS as usize);
    let (a_halves, a) = numbers(BLOCKS * ROWS * ROWS, 1);
    let (b_halves, b) = numbers(ROWS * COLUMNS, 2);
    let mut memory = Memory::new();
    let addresses = [
        memory.alloc_with("a", &a_halves),
        memory.alloc_with("b", &b_halves),
    ];
    let out = memory.alloc("out", rows * columns * 4);
    let [a_map, b_map] = [0, 1].map(|i| {
        let shape = shapes()[i];
        let extents = [1, 1, [rows as u64, ROWS.into()][i], shape.columns.into()];
        let strides = Strides {
            row: shape.columns.into(),
            head: 16,
            batch: 16,
        };
        Arg::TensorMap(shape.tensor_map(addresses[i], extents, strides))
    });
    let launch = Launch {
        grid: [BLOCKS, 1, 1],
        args: vec![a_map, b_map, Arg::U64(out)],
    };
    let kernel = product();
    for options in Options::all(2) {
        let mut memory = memory.clone();
        if let Err(fault) = emulate(&kernel, &launch, &mut memory, &options) {
            panic!("{options:?}: {fault}");
        }
        let got = memory.read::<f32>(out, rows * columns);
        for (i, got) in got.into_iter().enumerate() {
            let (row, column) = (i / columns, i % columns);
            let inner = ROWS as usize;
            let expected: f32 = (0..inner)
                .map(|k| a[row * inner + k] * b[k * columns + column])
                .sum();
            assert_eq!(got, expected, "{options:?}: row {row}, column {column}");
        }
    }
}
