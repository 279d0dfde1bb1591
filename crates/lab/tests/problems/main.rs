//! The kernels against float64, in the emulator: both completion modes, each warp in turn and by
//! chance. A fault of any kind, or a wrong element, fails. Where there is a GPU, the same problems run
//! on it, twice, and must leave the same; larger ones run there alone.
//!
//! `FLEX_BLOCK_ATTN_REQUIRE_GPU=1` fails without a GPU; `FLEX_BLOCK_ATTN_SKIP_EMULATOR=1` leaves the
//! emulator out, for runs under the tools that watch a GPU.

mod attention;
mod backward;
mod exact;
mod large;
mod plan;
mod product;
mod rows;
mod select;
mod video;

use std::sync::OnceLock;

use flex_block_attn_emulator::Options;
use flex_block_attn_lab::gpu::Gpu;
use flex_block_attn_lab::problems::Setup;

/// Runs a problem in all the given ways, and on the GPU if there is one.
#[track_caller]
fn right_in_all_ways(setup: &Setup, ways: &[Options]) {
    let skipped = std::env::var_os("FLEX_BLOCK_ATTN_SKIP_EMULATOR").is_some();
    for options in if skipped { &[] } else { ways } {
        if let Err(failure) = setup.run(options) {
            panic!("{}, {options:?}: {failure}", setup.kernel().name);
        }
    }
    if let Some(gpu) = gpu() {
        right_on(gpu, setup);
    }
}

/// Runs a problem on the GPU.
#[track_caller]
fn right_on(gpu: &Gpu, setup: &Setup) {
    if let Err(failure) = setup.run_on(gpu) {
        panic!("{}: {failure}", setup.kernel().name);
    }
}

/// The GPU, if there is one; if not, says so once.
fn gpu() -> Option<&'static Gpu> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    GPU.get_or_init(Gpu::for_test).as_ref()
}
