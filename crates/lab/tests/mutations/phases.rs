//! mbarriers: parities, bytes, waits, releases, initialisation.
//!
//! No mutations, for they are harmless: `arrive_expect` behind its copy (the phase cannot end
//! before that arrival); a proxy fence less between a consumer's release and the next copy (wgmma
//! and copies are of one proxy); no wait for a stage of b to be empty (the producer has just waited
//! for a's, which the same warps give back at the same time).

use flex_block_attn_ptx::ir::{Cmp, Op, Operand};

use crate::edit::Which::{All, Nth, Within};
use crate::edit::{
    arrives_on, change, change_behind, double, expects_on, inits, move_before, only_threads, op,
    other_parity, remove, remove_behind, toggles, unguard, waits_on,
};
use crate::trace::same_as;
use crate::{Base, By, Mutation, Setup};

// mbarriers, in the order of their initialisation. The product's rings have three stages.
const A_FULL: usize = 0;
const A_EMPTY: usize = 1;
const B_FULL: usize = 6;
const B_EMPTY: usize = 7;
// Those of attention have two, behind what jobs, notes, of which there are two, and queries have. Stages
// are chosen at run time: to wait on the first means to wait on either.
pub const JOB_FULL: usize = 0;
pub const JOB_EMPTY: usize = 1;
pub const NOTED: usize = 2;
pub const Q_FULL: usize = 4;
pub const Q_EMPTY: usize = 5;
pub const K_FULL: usize = 6;
pub const K_EMPTY: usize = 7;
pub const V_FULL: usize = 10;
pub const V_EMPTY: usize = 11;

/// Starts a role's parity at the other value.
pub fn flip(s: &mut Setup, nth: usize) -> usize {
    let waits = waits_on(s.kernel(), nth);
    other_parity(s.kernel_mut(), waits)
}

/// Never toggles a role's parity.
pub fn no_toggle(s: &mut Setup, nth: usize) -> usize {
    let waits = waits_on(s.kernel(), nth);
    remove_behind(s.kernel_mut(), waits, toggles)
}

/// Expects so many bytes more on an mbarrier.
fn expect(s: &mut Setup, nth: usize, more: i64) -> usize {
    let expects = expects_on(s.kernel(), nth);
    change(s.kernel_mut(), All, expects, |op| {
        if let Op::MbarrierArriveExpect {
            bytes: Operand::Imm(bytes),
            ..
        } = op
        {
            *bytes = bytes.wrapping_add_signed(more);
        }
    })
}

/// Initialises an mbarrier for so many arrivals.
pub fn count(s: &mut Setup, nth: usize, arrivals: u64) -> usize {
    let init = inits(s.kernel(), nth);
    change(s.kernel_mut(), All, init, |op| {
        if let Op::MbarrierInit { count, .. } = op {
            *count = Operand::Imm(arrivals);
        }
    })
}

pub fn no_wait(s: &mut Setup, nth: usize) -> usize {
    let waits = waits_on(s.kernel(), nth);
    remove(s.kernel_mut(), All, waits)
}

pub fn no_release(s: &mut Setup, nth: usize) -> usize {
    let releases = arrives_on(s.kernel(), nth);
    remove(s.kernel_mut(), All, releases)
}

/// Gives a stage back before the wait for the product that reads it.
fn early_release(s: &mut Setup, nth: usize) -> usize {
    let releases = arrives_on(s.kernel(), nth);
    move_before(s.kernel_mut(), releases, op!(Op::WgmmaWait { .. }))
}

/// The same, of the releases there are the `which`.
pub fn early_release_of(s: &mut Setup, nth: usize, which: usize) -> usize {
    let release = same_as(s.kernel(), which, &arrives_on(s.kernel(), nth));
    move_before(s.kernel_mut(), release, op!(Op::WgmmaWait { .. }))
}

/// Leaves out the `which` of the releases there are.
pub fn no_release_of(s: &mut Setup, nth: usize, which: usize) -> usize {
    let releases = arrives_on(s.kernel(), nth);
    remove(s.kernel_mut(), Nth(which), releases)
}

pub fn table() -> Vec<Mutation> {
    let mut table = tokens();
    table.extend(setup());
    table
}

/// Waits, arrivals, bytes.
fn tokens() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "a consumer starts with the other parity",
            kind: "parity",
            base: Base::Gemm,
            edit: |s| flip(s, A_FULL),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "q is waited for with the other parity",
            kind: "parity",
            base: Base::Wide,
            edit: |s| flip(s, Q_FULL),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "the producer waits for a first phase that nobody ends",
            kind: "parity",
            base: Base::Wide,
            edit: |s| flip(s, K_EMPTY),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "a consumer does not toggle its parity",
            kind: "parity",
            base: Base::Gemm,
            edit: |s| no_toggle(s, A_FULL),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a consumer toggles another mbarrier's parity",
            kind: "parity",
            base: Base::Gemm,
            edit: |s| {
                let waits = waits_on(s.kernel(), A_FULL);
                change_behind(s.kernel_mut(), waits, toggles, |mut op| {
                    if let Op::Binary {
                        b: Operand::Imm(bit),
                        ..
                    } = &mut op
                    {
                        *bit <<= 1;
                    }
                    Some(op)
                })
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "Deadlock"]),
        },
        Mutation {
            name: "the producer does not toggle its parity",
            kind: "parity",
            base: Base::Gemm,
            edit: |s| no_toggle(s, B_EMPTY),
            by: By::Emulator(&["Deadlock", "Race"]),
        },
        Mutation {
            name: "16 bytes too many expected",
            kind: "expected bytes",
            base: Base::Gemm,
            edit: |s| expect(s, A_FULL, 16),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "16 bytes too few expected",
            kind: "expected bytes",
            base: Base::Wide,
            edit: |s| expect(s, K_FULL, -16),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "half of q expected",
            kind: "expected bytes",
            base: Base::Short,
            edit: |s| expect(s, Q_FULL, -(64 * 128)),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "no bytes expected, but the arrival made",
            kind: "expected bytes",
            base: Base::Wide,
            edit: |s| expect(s, V_FULL, -(128 * 256)),
            by: By::Emulator(&["Mbarrier", "Race"]),
        },
        Mutation {
            name: "no arrive_expect",
            kind: "missing arrival",
            base: Base::Gemm,
            edit: |s| {
                let expects = expects_on(s.kernel(), B_FULL);
                remove(s.kernel_mut(), All, expects)
            },
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "arrive_expect twice",
            kind: "extra arrival",
            base: Base::Wide,
            edit: |s| {
                let expects = expects_on(s.kernel(), K_FULL);
                double(s.kernel_mut(), All, expects)
            },
            by: By::Emulator(&["Mbarrier"]),
        },
        Mutation {
            name: "a tile of a is not waited for",
            kind: "missing full wait",
            base: Base::Gemm,
            edit: |s| no_wait(s, A_FULL),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "q is not waited for",
            kind: "missing full wait",
            base: Base::Wide,
            edit: |s| no_wait(s, Q_FULL),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "the next row's first tile of k is not waited for",
            kind: "missing full wait",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), K_FULL);
                remove(s.kernel_mut(), Nth(2), waits)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "a row's last tile of v is not waited for",
            kind: "missing full wait",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), V_FULL);
                remove(s.kernel_mut(), Within(1, 3), waits)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "one warp alone waits for a tile of v",
            kind: "missing full wait",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), V_FULL);
                only_threads(s.kernel_mut(), All, waits, Cmp::Lt, 160)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "a stage of a is filled before it is empty",
            kind: "missing empty wait",
            base: Base::Gemm,
            edit: |s| no_wait(s, A_EMPTY),
            by: By::Emulator(&["Race", "Mbarrier"]),
        },
        Mutation {
            name: "a stage of k is filled before it is empty",
            kind: "missing empty wait",
            base: Base::Short,
            edit: |s| no_wait(s, K_EMPTY),
            by: By::Emulator(&["Race", "Mbarrier"]),
        },
        Mutation {
            name: "a stage of v is filled before it is empty",
            kind: "missing empty wait",
            base: Base::Wide,
            edit: |s| no_wait(s, V_EMPTY),
            by: By::Emulator(&["Race", "Mbarrier"]),
        },
        Mutation {
            name: "k is given back before its product is over",
            kind: "early release",
            base: Base::Wide,
            edit: |s| early_release(s, K_EMPTY),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "v is given back before its product is over",
            kind: "early release",
            base: Base::Wide,
            edit: |s| early_release_of(s, V_EMPTY, 0),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a row's last v is given back before its product is over",
            kind: "early release",
            base: Base::Wide,
            edit: |s| early_release_of(s, V_EMPTY, 1),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a stage of k is never given back",
            kind: "missing release",
            base: Base::Wide,
            edit: |s| no_release(s, K_EMPTY),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "a row's first tile of k is not given back",
            kind: "missing release",
            base: Base::Wide,
            edit: |s| no_release_of(s, K_EMPTY, 0),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "a row's last tile of v is not given back",
            kind: "missing release",
            base: Base::Wide,
            edit: |s| no_release_of(s, V_EMPTY, 1),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "a stage of a is never given back",
            kind: "missing release",
            base: Base::Gemm,
            edit: |s| no_release(s, A_EMPTY),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "the second warpgroup does not give v back",
            kind: "missing release",
            base: Base::Wide,
            edit: |s| {
                let releases = arrives_on(s.kernel(), V_EMPTY);
                only_threads(s.kernel_mut(), All, releases, Cmp::Lt, 256)
            },
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "all lanes give k back",
            kind: "extra arrival",
            base: Base::Wide,
            edit: |s| {
                let releases = arrives_on(s.kernel(), K_EMPTY);
                unguard(s.kernel_mut(), All, releases)
            },
            by: By::Emulator(&["Deadlock", "Race", "Mbarrier"]),
        },
        Mutation {
            name: "a stage of a is given back twice",
            kind: "extra arrival",
            base: Base::Gemm,
            edit: |s| {
                let releases = arrives_on(s.kernel(), A_EMPTY);
                double(s.kernel_mut(), All, releases)
            },
            by: By::Emulator(&["Deadlock", "Race", "Mbarrier"]),
        },
    ]
}

/// Initialisation.
fn setup() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "a release less is enough for a stage of a",
            kind: "mbarrier count",
            base: Base::Gemm,
            edit: |s| count(s, A_EMPTY, 7),
            by: By::Emulator(&["Race", "Mbarrier"]),
        },
        Mutation {
            name: "half of the releases are enough for a stage of v",
            kind: "mbarrier count",
            base: Base::Wide,
            edit: |s| count(s, V_EMPTY, 4),
            by: By::Emulator(&["Race", "Mbarrier", "Deadlock"]),
        },
        Mutation {
            name: "a release more than there are",
            kind: "mbarrier count",
            base: Base::Wide,
            edit: |s| count(s, K_EMPTY, 9),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "two arrivals for q",
            kind: "mbarrier count",
            base: Base::Short,
            edit: |s| count(s, Q_FULL, 2),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "an mbarrier for no arrivals",
            kind: "mbarrier count",
            base: Base::Wide,
            edit: |s| count(s, K_FULL, 0),
            by: By::Verifier(&["Value"]),
        },
        Mutation {
            name: "an mbarrier is not initialised",
            kind: "missing init",
            base: Base::Wide,
            edit: |s| {
                let init = inits(s.kernel(), V_FULL);
                remove(s.kernel_mut(), All, init)
            },
            by: By::Emulator(&["Mbarrier"]),
        },
        Mutation {
            name: "nobody waits for the initialisation",
            kind: "missing init",
            base: Base::Gemm,
            edit: |s| {
                let all_threads = op!(Op::BarrierSync {
                    id: Operand::Imm(0),
                    ..
                });
                remove(s.kernel_mut(), All, all_threads)
            },
            by: By::Emulator(&["Mbarrier"]),
        },
        Mutation {
            name: "the barrier of all threads comes before the initialisation",
            kind: "missing init",
            base: Base::Wide,
            edit: |s| {
                let all_threads = op!(Op::BarrierSync {
                    id: Operand::Imm(0),
                    ..
                });
                move_before(s.kernel_mut(), all_threads, op!(Op::Special { .. }))
            },
            by: By::Emulator(&["Mbarrier"]),
        },
    ]
}
