//! The kernels in the emulator, against float64: both completion modes, each warp in turn and by
//! chance. A fault of any kind, or a wrong element, fails. Where there is a GPU, the same launches run
//! on it, twice, and must leave the same.
//!
//! `FLEX_BLOCK_ATTN_REQUIRE_GPU=1` fails without a GPU; `FLEX_BLOCK_ATTN_SKIP_EMULATOR=1` leaves the
//! emulator out, for runs under the tools that watch a GPU.

mod attention;
mod backward;
mod plan;
mod product;
mod rows;

use std::sync::OnceLock;

use flex_block_attn_emulator::{Memory, Options, emulate};
use flex_block_attn_lab::emulated::Setup;
use flex_block_attn_lab::gpu::Gpu;
use flex_block_attn_ptx::{Kernel, Launch};

/// Runs a launch in all the given ways, each on memory of its own, and compares each time.
#[track_caller]
fn right_in_all_ways(setup: &Setup, ways: &[Options]) {
    let prepare = || (setup.memory.clone(), setup.launch.clone(), ());
    in_all_ways(&setup.kernel, ways, prepare, |memory, ()| {
        if let Err(wrong) = setup.check(memory) {
            panic!("wrong results: {wrong}");
        }
    });
}

/// Whether a GPU leaves the same bits each time.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeats {
    Exactly,
    /// Sums are added to in any order.
    Nearly,
}

/// Runs a launch in all the given ways, each on memory of its own from `prepare`; `check` sees the
/// memory after each.
#[track_caller]
fn in_all_ways<T>(
    kernel: &Kernel,
    ways: &[Options],
    prepare: impl Fn() -> (Memory, Launch, T),
    check: impl Fn(&Memory, &T),
) {
    each_in_all_ways(
        ways,
        Repeats::Exactly,
        || {
            let (memory, launch, what) = prepare();
            (memory, vec![(kernel.clone(), launch)], what)
        },
        check,
    );
}

/// [`in_all_ways`] of launches that follow each other.
#[track_caller]
fn each_in_all_ways<T>(
    ways: &[Options],
    repeats: Repeats,
    prepare: impl Fn() -> (Memory, Vec<(Kernel, Launch)>, T),
    check: impl Fn(&Memory, &T),
) {
    let skipped = std::env::var_os("FLEX_BLOCK_ATTN_SKIP_EMULATOR").is_some();
    for options in if skipped { &[] } else { ways } {
        let (mut memory, launches, what) = prepare();
        for (kernel, launch) in &launches {
            if let Err(fault) = emulate(kernel, launch, &mut memory, options) {
                panic!("{options:?}: {fault}");
            }
        }
        check(&memory, &what);
    }
    let Some(gpu) = gpu() else { return };
    let run = || {
        let (mut memory, launches, what) = prepare();
        for (kernel, launch) in &launches {
            if let Err(error) = gpu.run(kernel, launch, &mut memory) {
                panic!("{} on the GPU: {error}", kernel.name);
            }
        }
        check(&memory, &what);
        memory
    };
    let (first, second) = (run(), run());
    if repeats == Repeats::Nearly {
        return;
    }
    for range in first.ranges() {
        let bytes = |memory: &Memory| -> Vec<u8> {
            memory.read(range.start, (range.end - range.start) as usize)
        };
        assert_eq!(
            bytes(&first),
            bytes(&second),
            "other results the second time"
        );
    }
}

/// The GPU, if there is one; if not, says so once.
fn gpu() -> Option<&'static Gpu> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    GPU.get_or_init(Gpu::for_test).as_ref()
}
