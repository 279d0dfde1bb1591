//! The kernels in the emulator, against float64: both completion modes, each warp in turn and by
//! chance. A fault of any kind, or a wrong element, fails.

mod attention;
mod plan;
mod product;
mod rows;

use flex_block_attn_emulator::{Memory, Options, emulate};
use flex_block_attn_ptx::{Kernel, Launch};
use half::bf16;

/// Runs a launch in all the given ways, each on memory of its own from `prepare`; `check` sees the
/// memory after each.
fn in_all_ways<T>(
    kernel: &Kernel,
    ways: &[Options],
    prepare: impl Fn() -> (Memory, Launch, T),
    check: impl Fn(&Memory, &T),
) {
    for options in ways {
        let (mut memory, launch, what) = prepare();
        if let Err(fault) = emulate(kernel, &launch, &mut memory, options) {
            panic!("{options:?}: {fault}");
        }
        check(&memory, &what);
    }
}

/// Numbers by chance, about normal, that bfloat16 holds exactly. The same for the same seed.
fn normal(seed: u64, count: usize) -> Vec<bf16> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f64 / (1u64 << 24) as f64
    };
    // The sum of 12 uniform numbers has variance 1.
    (0..count)
        .map(|_| bf16::from_f64((0..12).map(|_| uniform()).sum::<f64>() - 6.0))
        .collect()
}

/// Their bits, as emulated memory holds them.
fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Float64 values of bfloat16 in emulated memory.
fn read(memory: &Memory, address: u64, count: usize) -> Vec<f64> {
    let words: Vec<u16> = memory.read(address, count);
    words
        .into_iter()
        .map(|x| bf16::from_bits(x).to_f64())
        .collect()
}

/// Root of the mean square of the differences, relative to that of the expected values.
fn relative_error(got: &[f64], expected: &[f64]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let wrong = squares(&mut got.iter().zip(expected).map(|(a, b)| a - b));
    let all = squares(&mut expected.iter().copied());
    assert!(!wrong.is_nan(), "NaN in the results");
    (wrong / all).sqrt()
}
