//! Reports, read as a user: they name the kernel, the instruction, its place in Rust source, the
//! warp, and the address.

use crate::phases::{K_EMPTY, V_EMPTY, early_release_of, no_release};
use crate::{Base, found, ways};

/// Asserts that a mistake is found as `who` by a text that holds all of `parts`.
#[track_caller]
fn assert_names(edit: fn(&mut crate::Setup) -> usize, who: &str, parts: &[&str]) {
    let mut setup = Base::Wide.setup();
    assert!(edit(&mut setup) > 0, "nothing is changed");
    let (by, text) = found(&setup, &ways(2)).expect("it is wrong");
    assert_eq!(by, who, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
}

#[test]
fn a_race_is_told_in_full() {
    assert_names(
        // A row's last values, under whose product the next row's scores are.
        |s| early_release_of(s, V_EMPTY, 1),
        "emulator: Race",
        &[
            "kernel forward_bf16_d128_q128_kv128_p128, block [",
            "warp ",
            // Where it is noticed, by what instruction, on which byte.
            "\n  at crates/kernels/src/forward/kernel.rs:",
            ": cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [",
            "this write of shared memory of block [",
            "(address 0x",
            // And with whom it conflicts.
            "is not ordered after the read by wgmma of warp ",
            " at crates/kernels/src/forward/kernel.rs:",
            ": wgmma.mma_async.sync.aligned.m64n128k16",
        ],
    );
}

#[test]
fn a_deadlock_is_told_in_full() {
    // Nobody gives keys back.
    assert_names(
        |s| no_release(s, K_EMPTY),
        "emulator: Deadlock",
        &[
            "kernel forward_bf16_d128_q128_kv128_p128, block [0, 0, 0], warp 0: deadlock",
            "block [0, 0, 0], warp 0 waits for parity 0 of the mbarrier at shared memory of",
            "(address 0x",
            "it is in phase 0 (parity 0): 8 of 8 arrivals and 0 bytes are missing",
            "at crates/kernels/src/forward/kernel.rs:",
            ": mbarrier.try_wait.parity.shared::cta.b64 ",
            // The planner, who has put up the next job and would put up another.
            "block [0, 0, 0], warp 1 waits for parity ",
            "at crates/kernels/src/forward/work.rs:",
            // The consumers: one waits for keys, the other for its turn.
            "block [0, 0, 0], warps [4, 5, 6, 7] wait for parity ",
            "block [0, 0, 0], warps [8, 9, 10, 11] wait for barrier 3: 128 of 256 threads have arrived",
            ": bar.sync %",
        ],
    );
}
