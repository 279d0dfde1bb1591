//! What the emulator computes and what it catches, kernel by kernel. Each kernel runs in both
//! completion modes and under several schedules: right ones must agree, wrong ones must be caught.

mod barriers;
mod clusters;
mod copies;
mod memory;
mod pipeline;
mod products;
mod races;
mod values;

use flex_block_attn_emulator::{Fault, Kind, Memory, Options, emulate};
use flex_block_attn_ptx::{Arg, Kernel, Launch};

/// A launch of some blocks along x.
pub fn launch(blocks: u32, args: &[Arg]) -> Launch {
    Launch {
        grid: [blocks, 1, 1],
        args: args.to_vec(),
    }
}

/// Runs a right kernel in all ways; the results, by `read`, which must be the same each time.
#[track_caller]
pub fn results<T: PartialEq + std::fmt::Debug>(
    kernel: &Kernel,
    launch: &Launch,
    memory: &Memory,
    read: impl Fn(&Memory) -> T,
) -> T {
    let mut first = None;
    for options in Options::all(4) {
        let mut memory = memory.clone();
        if let Err(fault) = emulate(kernel, launch, &mut memory, &options) {
            panic!("{options:?}: {fault}");
        }
        let result = read(&memory);
        match &first {
            None => first = Some(result),
            Some(first) => assert_eq!(*first, result, "{options:?}"),
        }
    }
    first.expect("there are several ways")
}

/// Runs a wrong kernel in all ways, each of which must find a fault that `expected` accepts; one.
#[track_caller]
pub fn caught(
    kernel: &Kernel,
    launch: &Launch,
    memory: &Memory,
    expected: impl Fn(&Kind) -> bool,
) -> Fault {
    let mut last = None;
    for options in Options::all(4) {
        match emulate(kernel, launch, &mut memory.clone(), &options) {
            Ok(_) => panic!("{options:?}: no fault was found"),
            Err(fault) => {
                assert!(expected(&fault.kind), "{options:?}: another fault: {fault}");
                last = Some(*fault);
            }
        }
    }
    last.expect("there are several ways")
}

/// Numbers by chance, small multiples of 1/8: sums of their products are exact.
pub fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 24) as f32 - 128.0) / 64.0 * 0.5
        })
        .map(|x| (x * 8.0).round() / 8.0)
        .collect()
}

/// As bfloat16.
pub fn to_bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|x| (x.to_bits() >> 16) as u16).collect()
}
