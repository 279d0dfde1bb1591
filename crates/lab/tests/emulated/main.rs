//! The kernels in the emulator, against float64: both completion modes, each warp in turn and by
//! chance. A fault of any kind, or a wrong element, fails.

mod attention;
mod plan;
mod product;
mod rows;

use flex_block_attn_emulator::{Memory, Options, emulate};
use flex_block_attn_lab::emulated::Setup;
use flex_block_attn_ptx::{Kernel, Launch};

/// Runs a launch in all the given ways, each on memory of its own, and compares each time.
#[track_caller]
fn right_in_all_ways(setup: &Setup, ways: &[Options]) {
    for options in ways {
        if let Err(failure) = setup.run(options) {
            panic!("{options:?}: {failure}");
        }
    }
}

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
