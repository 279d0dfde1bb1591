//! The kernels in the emulator, against float64: both completion modes, each warp in turn and by
//! chance. A fault of any kind, or a wrong element, fails.

mod attention;
mod product;

use flex_block_attn_emulator::Options;
use flex_block_attn_lab::emulated::Setup;

/// Runs a launch in all the given ways, each on memory of its own.
#[track_caller]
fn in_all_ways(setup: &Setup, ways: &[Options]) {
    for options in ways {
        if let Err(failure) = setup.run(options) {
            panic!("{options:?}: {failure}");
        }
    }
}
