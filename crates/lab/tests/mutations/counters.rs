//! Turns: loader and consumers of attention count tiles of keys, and notes, through all of the kernel;
//! the count says which stage's turn it is, and with which parity.
//!
//! No mutations, for they are harmless: consumers always give back the other of two stages, or the loader
//! always waits for it. For a first stage it then waits until the second is empty, too.

use flex_block_attn_ptx::ir::{Binary, Op, Operand};

use crate::edit::Which::{All, Nth, Within};
use crate::edit::{arrives_on, change, computed, expects_on, op, waits_on};
use crate::phases::{K_EMPTY, K_FULL, NOTED, Q_EMPTY, Q_FULL, V_EMPTY, V_FULL};
use crate::trace::{immediate, operands, other_stage, parity_bit, places, same_parity};
use crate::{Base, By, Mutation, Setup};

// Where is counted, in the order of the body. The loader: notes, tiles but a row's last, that.
const NOTE: usize = 0;
const LOADED: usize = 1;
const LOADED_LAST: usize = 2;
// Consumers: the first note, tiles but a row's last, later notes, a row's last tile.
const STEP: usize = 4;
const SEEN: usize = 5;
const STEP_LAST: usize = 6;

/// A test for what counts.
fn counts(op: &Op) -> bool {
    matches!(
        op,
        Op::Binary { op: Binary::Add, dst, a: Operand::Reg(a), b: Operand::Imm(1), .. } if a == dst
    )
}

/// Counts so many where one was counted.
fn count(s: &mut Setup, nth: usize, by: u64) -> usize {
    immediate(s.kernel_mut(), Nth(nth), counts, by)
}

/// Starts to count at one, where the `nth` is counted.
fn from_one(s: &mut Setup, nth: usize) -> usize {
    let counters = operands(s.kernel(), |op| match *op {
        Op::Binary { dst, .. } if counts(op) => vec![Operand::Reg(dst)],
        _ => Vec::new(),
    });
    let counter = counters[nth];
    let starts =
        |op: &Op| matches!(op, Op::Mov { dst, src: Operand::Imm(0), .. } if *dst == counter);
    change(s.kernel_mut(), All, starts, |op| {
        if let Op::Mov { src, .. } = op {
            *src = Operand::Imm(1);
        }
    })
}

/// Has the consumers' products from one on, up to another, be with the other stage's tile.
fn other_tile(s: &mut Setup, first: usize, end: usize) -> usize {
    // Stages are this many rows apart: of panels of 128 bytes.
    let rows = op!(Op::Binary {
        op: Binary::Mul,
        b: Operand::Imm(256),
        ..
    });
    let beside = (Binary::Xor, Operand::Imm(1));
    computed(
        s.kernel_mut(),
        Within(first, end),
        rows,
        beside,
        |op| match op {
            Op::Binary { a, .. } => Some(a),
            _ => None,
        },
    )
}

pub fn table() -> Vec<Mutation> {
    let mut table = turns();
    table.extend(parities());
    table.extend(stages());
    table
}

/// What is counted.
fn turns() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "consumers do not count a row's last tile",
            kind: "turn counter",
            base: Base::Wide,
            edit: |s| count(s, STEP_LAST, 0),
            by: By::Emulator(&["Race", "Deadlock"]),
        },
        Mutation {
            name: "consumers count a row's last tile alone",
            kind: "turn counter",
            base: Base::Wide,
            edit: |s| count(s, STEP, 0),
            by: By::Emulator(&["Race", "Deadlock"]),
        },
        Mutation {
            name: "the loader does not count a row's last tile",
            kind: "turn counter",
            base: Base::Wide,
            edit: |s| count(s, LOADED_LAST, 0),
            by: By::Emulator(&["Race", "Deadlock", "Mbarrier"]),
        },
        Mutation {
            name: "the loader counts a tile twice",
            kind: "turn counter",
            base: Base::Wide,
            edit: |s| count(s, LOADED, 2),
            by: By::Emulator(&["UninitialisedMemory", "Race", "Deadlock", "Mbarrier"]),
        },
        Mutation {
            name: "both count a row's last tile twice",
            kind: "turn counter",
            base: Base::Wide,
            edit: |s| count(s, STEP_LAST, 2) + count(s, LOADED_LAST, 2),
            by: By::Emulator(&["Race", "Deadlock", "Mbarrier"]),
        },
        Mutation {
            name: "consumers start with the second turn",
            kind: "turn counter",
            base: Base::Wide,
            edit: |s| from_one(s, STEP),
            by: By::Emulator(&["Race", "Deadlock", "UninitialisedMemory"]),
        },
        Mutation {
            name: "the loader starts with the second turn",
            kind: "turn counter",
            base: Base::Wide,
            edit: |s| from_one(s, LOADED),
            by: By::Emulator(&["Race", "Deadlock"]),
        },
        Mutation {
            name: "all start with the second turn",
            kind: "turn counter",
            base: Base::Short,
            edit: |s| from_one(s, LOADED) + from_one(s, STEP),
            by: By::Emulator(&["UninitialisedMemory", "Deadlock"]),
        },
        Mutation {
            name: "the loader does not count notes",
            kind: "turn counter",
            base: Base::Wide,
            edit: |s| count(s, NOTE, 0),
            by: By::Emulator(&["Race", "Deadlock", "Mbarrier"]),
        },
        Mutation {
            name: "consumers count the first note alone",
            kind: "turn counter",
            base: Base::Wide,
            edit: |s| count(s, SEEN, 0),
            by: By::Emulator(&["Race", "Deadlock", "UninitialisedMemory"]),
        },
        Mutation {
            name: "the loader starts with the second note",
            kind: "turn counter",
            base: Base::Short,
            edit: |s| from_one(s, NOTE),
            by: By::Emulator(&["Deadlock", "UninitialisedMemory"]),
        },
    ]
}

/// Parities of turns.
fn parities() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "consumers wait for keys with their stage for a parity",
            kind: "parity",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), K_FULL);
                parity_bit(s.kernel_mut(), waits, 0)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "Deadlock"]),
        },
        Mutation {
            name: "the loader's parity for values changes every four tiles",
            kind: "parity",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), V_EMPTY);
                parity_bit(s.kernel_mut(), waits, 2)
            },
            by: By::Emulator(&["Race", "Deadlock", "Mbarrier"]),
        },
        Mutation {
            name: "consumers always wait for values with one parity",
            kind: "parity",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), V_FULL);
                same_parity(s.kernel_mut(), waits, 0)
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "the loader always waits for the first phase of keys",
            kind: "parity",
            base: Base::Short,
            edit: |s| {
                let waits = waits_on(s.kernel(), K_EMPTY);
                same_parity(s.kernel_mut(), waits, 1)
            },
            by: By::Emulator(&["Race", "Mbarrier"]),
        },
        Mutation {
            name: "consumers wait for queries with one parity",
            kind: "parity",
            base: Base::Short,
            edit: |s| {
                let waits = waits_on(s.kernel(), Q_FULL);
                same_parity(s.kernel_mut(), waits, 0)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "the loader waits for queries to be given back with one parity",
            kind: "parity",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), Q_EMPTY);
                same_parity(s.kernel_mut(), waits, 1)
            },
            by: By::Emulator(&["Race", "Mbarrier"]),
        },
        Mutation {
            name: "consumers wait for notes as if there were one mbarrier",
            kind: "parity",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), NOTED);
                parity_bit(s.kernel_mut(), waits, 0)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "Deadlock"]),
        },
    ]
}

/// Stages of turns.
fn stages() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "consumers wait for keys of the other stage",
            kind: "stage",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), K_FULL);
                other_stage(s.kernel_mut(), All, waits)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "Deadlock"]),
        },
        Mutation {
            name: "consumers wait for a row's last values in the other stage",
            kind: "stage",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), V_FULL);
                other_stage(s.kernel_mut(), Within(1, 3), waits)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "Deadlock"]),
        },
        Mutation {
            name: "the loader waits for the other stage for a row's first keys",
            kind: "stage",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), K_EMPTY);
                other_stage(s.kernel_mut(), Nth(0), waits)
            },
            by: By::Emulator(&["Race", "Mbarrier", "Deadlock"]),
        },
        Mutation {
            name: "consumers give another stage back than that of a row's first keys",
            kind: "stage",
            base: Base::Wide,
            edit: |s| {
                let releases = arrives_on(s.kernel(), K_EMPTY);
                other_stage(s.kernel_mut(), Nth(0), releases)
            },
            by: By::Emulator(&["Race", "Mbarrier", "Deadlock"]),
        },
        Mutation {
            name: "consumers give another stage back than that of a row's last values",
            kind: "stage",
            base: Base::Wide,
            edit: |s| {
                let releases = arrives_on(s.kernel(), V_EMPTY);
                other_stage(s.kernel_mut(), Nth(1), releases)
            },
            by: By::Emulator(&["Race", "Mbarrier", "Deadlock"]),
        },
        Mutation {
            name: "that values are there is told at the other stage's mbarrier",
            kind: "stage",
            base: Base::Wide,
            edit: |s| {
                let expects = expects_on(s.kernel(), V_FULL);
                other_stage(s.kernel_mut(), All, expects)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "Deadlock"]),
        },
        Mutation {
            name: "all keys are told of at the first stage's mbarrier",
            kind: "stage",
            base: Base::Short,
            edit: |s| {
                let expects = expects_on(s.kernel(), K_FULL);
                places(s.kernel_mut(), expects, 1)
            },
            by: By::Emulator(&["Deadlock", "Mbarrier"]),
        },
        Mutation {
            name: "keys are loaded over those of the other stage",
            kind: "stage",
            base: Base::Wide,
            edit: |s| other_tile(s, 0, 2),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "scores are of the other stage's keys",
            kind: "stage",
            base: Base::Wide,
            edit: |s| other_tile(s, 5, 6),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "a row's last weights are for the other stage's values",
            kind: "stage",
            base: Base::Wide,
            edit: |s| other_tile(s, 7, 9),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
    ]
}
