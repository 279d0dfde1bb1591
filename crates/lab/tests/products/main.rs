//! Products of the tile layer by themselves, in the emulator, against float64.
//!
//! - `clusters`: of warpgroups, in thread blocks of a cluster;
//! - `warps`: of single warps;
//! - here: what their kernels and launches share.

mod clusters;
mod warps;

use flex_block_attn_emulator::{Memory, Options, emulate};
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg};
use flex_block_attn_tile::{Place, RegTile, Shape, Strides, Warpgroup};
use half::{bf16, f16};

/// Elements by chance, as a tensor has them and as they are: multiples of 1/16 below 8, so that sums of
/// their products are exact in float32, too.
fn numbers(element: Element, count: u32, seed: u32) -> (Vec<u16>, Vec<f64>) {
    let one = |i: u32| ((i + seed).wrapping_mul(2_654_435_761) >> 24) as f32 / 16.0 - 8.0;
    let values: Vec<f32> = (0..count).map(one).collect();
    let bits = |x: &f32| match element {
        Element::F16 => f16::from_f32(*x).to_bits(),
        _ => bf16::from_f32(*x).to_bits(),
    };
    let halves = values.iter().map(bits).collect();
    (halves, values.into_iter().map(f64::from).collect())
}

/// The map for copies of tiles from a matrix of so many rows, as wide as they are.
fn map(shape: Shape, address: u64, rows: u32) -> Arg {
    let strides = Strides {
        row: shape.columns.into(),
        head: 16,
        batch: 16,
    };
    let extents = [1, 1, rows.into(), shape.columns.into()];
    Arg::TensorMap(shape.tensor_map(address, extents, strides))
}

/// Where a tile of such a matrix starts.
fn place(k: &Builder, row: Reg<'_, u32>) -> Place {
    Place::rows(row, k.var(0u32), k.var(0u32))
}

/// Stores a thread's sums to a float32 matrix as wide as they are, from a row on.
fn store<'k>(
    k: &'k Builder,
    wg: Warpgroup<'k>,
    sums: &RegTile<'k>,
    out: Reg<'k, u64>,
    first_row: Reg<'k, u32>,
) {
    let columns = sums.columns();
    let start = out + ((first_row + wg.row()) * columns + (wg.lane & 3) * 2).times_wide(4);
    for (i, (register, second)) in (0u32..).zip(sums.elements()) {
        let column = 8 * (i / 4) + i % 2;
        let bytes = 4 * (8 * columns * second as u32 + column);
        k.store_global(start.at(bytes), register);
    }
}

/// Runs a launch, which writes a float32 matrix to `out`, in some ways, and compares.
fn check(
    kernel: &Kernel,
    launch: &Launch,
    memory: &Memory,
    (out, rows, columns): (u64, u32, u32),
    expected: impl Fn(usize, usize) -> f64,
) {
    let name = &kernel.name;
    for options in Options::all(2) {
        let mut memory = memory.clone();
        if let Err(fault) = emulate(kernel, launch, &mut memory, &options) {
            panic!("{name}, {options:?}: {fault}");
        }
        let got = memory.read::<f32>(out, (rows * columns) as usize);
        for (i, got) in got.into_iter().enumerate() {
            let (row, column) = (i / columns as usize, i % columns as usize);
            assert_eq!(
                f64::from(got),
                expected(row, column),
                "{name}, {options:?}: row {row}, column {column}"
            );
        }
    }
}
