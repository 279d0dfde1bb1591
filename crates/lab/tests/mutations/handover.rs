//! What the planner of attention hands to the loader, and where it has it from: jobs, and the counter
//! that thread blocks share.
//!
//! No mutation, for it is harmless: the planner puts up tiles of queries behind the sequence's end.
//! Loads of them bring zeros, and guards leave out what they would store.

use flex_block_attn_ptx::Ty;
use flex_block_attn_ptx::ir::{Binary, Node, Op, Operand, Space, Special};

use crate::edit::Which::{All, Nth};
use crate::edit::{
    all, arrives_on, change, computed, double, move_before, op, remove, rewrite, waits_on,
};
use crate::phases::{JOB_EMPTY, JOB_FULL, Q_EMPTY, count, flip, no_release, no_toggle, no_wait};
use crate::{Base, By, Mutation, Setup};

/// Stores to shared memory of so many words.
pub fn stores(words: usize) -> impl Fn(&Op) -> bool {
    move |op| matches!(op, Op::Store { space: Space::Shared, src, .. } if src.len() == words)
}

// Stores of four words, in the order of the body: notes to consumers, halves of jobs.
pub const NOTE: usize = 0;
pub const JOB_NOTE: usize = 1;
pub const JOB_START: usize = 2;

/// Has one of these say something else: `op` of one of its words and `value`.
pub fn say(s: &mut Setup, nth: usize, word: usize, op: Binary, value: i32) -> usize {
    let value = Operand::Imm(u64::from(value as u32));
    computed(
        s.kernel_mut(),
        Nth(nth),
        stores(4),
        (op, value),
        |op| match op {
            Op::Store { src, .. } => Some(&mut src[word]),
            _ => None,
        },
    )
}

/// Takes a constant for special registers.
pub fn constant(s: &mut Setup, matches: impl Fn(&Op) -> bool, value: u64) -> usize {
    change(s.kernel_mut(), All, matches, |op| {
        if let Op::Special { dst, .. } = *op {
            *op = Op::Mov {
                ty: Ty::U32,
                dst,
                src: Operand::Imm(value),
            };
        }
    })
}

/// Counts so many tiles of queries for each that is taken.
fn step(s: &mut Setup, tiles: u64) -> usize {
    change(s.kernel_mut(), All, op!(Op::Atomic { .. }), |op| {
        if let Op::Atomic { src, .. } = op {
            *src = Operand::Imm(tiles);
        }
    })
}

/// Moves arrivals to before what precedes them.
pub fn earlier(s: &mut Setup, nth: usize, before: impl Fn(&Op) -> bool) -> usize {
    let arrives = arrives_on(s.kernel(), nth);
    move_before(s.kernel_mut(), arrives, before)
}

pub fn table() -> Vec<Mutation> {
    let mut table = jobs();
    table.extend(counter());
    table
}

/// From the planner to the loader.
fn jobs() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "jobs are not waited for",
            kind: "missing full wait",
            base: Base::Wide,
            edit: |s| no_wait(s, JOB_FULL),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "jobs are not announced",
            kind: "missing arrival",
            base: Base::Wide,
            edit: |s| no_release(s, JOB_FULL),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "that there are no more jobs is not announced",
            kind: "missing arrival",
            base: Base::Ragged,
            edit: |s| {
                let arrives = arrives_on(s.kernel(), JOB_FULL);
                remove(s.kernel_mut(), Nth(1), arrives)
            },
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "jobs are announced twice",
            kind: "extra arrival",
            base: Base::Wide,
            edit: |s| {
                let arrives = arrives_on(s.kernel(), JOB_FULL);
                double(s.kernel_mut(), All, arrives)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "Deadlock"]),
        },
        Mutation {
            name: "the head of keys is written behind the announcement",
            kind: "early arrival",
            base: Base::Wide,
            edit: |s| earlier(s, JOB_FULL, stores(2)),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "a job overwrites the one before",
            kind: "missing empty wait",
            base: Base::Short,
            edit: |s| no_wait(s, JOB_EMPTY),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a job's place is given back before its queries are loaded",
            kind: "early release",
            base: Base::Wide,
            edit: |s| {
                let emptied = waits_on(s.kernel(), Q_EMPTY);
                let releases = arrives_on(s.kernel(), JOB_EMPTY);
                let release = all(s.kernel()).into_iter().find(|inst| releases(&inst.op));
                let release = release.expect("the loader gives jobs back");
                no_release(s, JOB_EMPTY);
                rewrite(s.kernel_mut(), All, emptied, |wait| {
                    vec![Node::Inst(release.clone()), Node::Inst(wait)]
                })
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a job's place is never given back",
            kind: "missing release",
            base: Base::Wide,
            edit: |s| no_release(s, JOB_EMPTY),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "the planner does not wait until its first job is done",
            kind: "parity",
            base: Base::Short,
            edit: |s| flip(s, JOB_EMPTY),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "the loader does not toggle its parity for jobs",
            kind: "parity",
            base: Base::Wide,
            edit: |s| no_toggle(s, JOB_FULL),
            by: By::Emulator(&["Race", "Deadlock"]),
        },
        Mutation {
            name: "both planner and loader are to announce a job",
            kind: "mbarrier count",
            base: Base::Wide,
            edit: |s| count(s, JOB_FULL, 2),
            by: By::Emulator(&["Deadlock"]),
        },
    ]
}

/// How thread blocks share tiles.
fn counter() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "of two thread blocks both start at the first tile",
            kind: "counter",
            base: Base::Ragged,
            edit: |s| {
                let block = op!(Op::Special {
                    which: Special::CtaIdX,
                    ..
                });
                constant(s, block, 0)
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a tile is taken without counting it",
            kind: "counter",
            base: Base::Ragged,
            edit: |s| step(s, 0),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a tile is counted twice",
            kind: "counter",
            base: Base::Ragged,
            edit: |s| step(s, 2),
            by: By::Result,
        },
        Mutation {
            name: "counting starts at the first tile, not behind those that thread blocks start at",
            kind: "counter",
            base: Base::Ragged,
            edit: |s| {
                let blocks = op!(Op::Special {
                    which: Special::GridX,
                    ..
                });
                constant(s, blocks, 0)
            },
            by: By::Emulator(&["Race"]),
        },
    ]
}
