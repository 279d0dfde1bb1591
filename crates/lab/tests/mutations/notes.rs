//! What the loader of attention tells consumers, and what they give back: notes ahead of tiles of
//! queries, and those.

use flex_block_attn_ptx::ir::{Binary, Cmp, Op, Operand};

use crate::edit::Which::{All, Nth};
use crate::edit::{
    all, arrives_on, barrier, change, double, expects_on, move_behind_branch, only_threads, op,
    postpone, remove, unbranch, unguard, waits_on,
};
use crate::handover::{JOB_NOTE, NOTE, earlier, say, stores};
use crate::phases::{
    JOB_FULL, NOTED, Q_EMPTY, Q_FULL, count, flip, no_release, no_release_of, no_wait,
};
use crate::trace::{address, other_stage, parity_bit, places};
use crate::{Base, By, Mutation, Setup};

/// A test for accesses of notes.
fn notes(s: &Setup) -> impl Fn(&Op) -> bool + use<> {
    let stores = stores(4);
    let first = all(s.kernel()).into_iter().find(|inst| stores(&inst.op));
    let first = first
        .and_then(|inst| address(&inst.op))
        .expect("notes are left");
    move |op| {
        matches!(op, Op::Load { .. } | Op::Store { .. })
            && address(op).is_some_and(|at| (0..16).contains(&(at.offset - first.offset)))
    }
}

/// Has consumers read the note that was announced so many notes before the last, not `from`.
fn read(s: &mut Setup, from: u64, to: u64) -> usize {
    let behind = |op: &Op| matches!(op, Op::Binary { op: Binary::Sub, b: Operand::Imm(before), .. } if *before == from);
    // Places of notes are found by a mask of this.
    let before: Vec<_> = all(s.kernel())
        .windows(2)
        .filter_map(|pair| match (&pair[0].op, &pair[1].op) {
            (
                op @ Op::Binary { dst, .. },
                Op::Binary {
                    op: Binary::And,
                    a: Operand::Reg(a),
                    b: Operand::Imm(3),
                    ..
                },
            ) if behind(op) && dst == a => Some(op.clone()),
            _ => None,
        })
        .collect();
    change(
        s.kernel_mut(),
        All,
        |op| before.contains(op),
        |op| {
            if let Op::Binary { b, .. } = op {
                *b = Operand::Imm(to);
            }
        },
    )
}

pub fn table() -> Vec<Mutation> {
    let mut table = announcements();
    table.extend(words());
    table.extend(queries());
    table
}

/// That a note is there.
fn announcements() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "notes are not announced",
            kind: "missing arrival",
            base: Base::Wide,
            edit: |s| no_release(s, NOTED),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "notes are announced twice",
            kind: "extra arrival",
            base: Base::Wide,
            edit: |s| {
                let arrives = arrives_on(s.kernel(), NOTED);
                double(s.kernel_mut(), All, arrives)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "Deadlock"]),
        },
        Mutation {
            name: "a note is written behind its announcement",
            kind: "early arrival",
            base: Base::Wide,
            edit: |s| earlier(s, NOTED, stores(4)),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "a note is announced before its job is there",
            kind: "early arrival",
            base: Base::Wide,
            edit: |s| {
                let filled = waits_on(s.kernel(), JOB_FULL);
                let arrives = arrives_on(s.kernel(), NOTED);
                move_behind_branch(s.kernel_mut(), filled, arrives)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "a note is announced when its keys have been loaded",
            kind: "late arrival",
            base: Base::Wide,
            edit: |s| {
                let arrives = arrives_on(s.kernel(), NOTED);
                postpone(s.kernel_mut(), arrives)
            },
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "the first note is not waited for",
            kind: "missing full wait",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), NOTED);
                remove(s.kernel_mut(), Nth(0), waits)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "later notes are not waited for",
            kind: "missing full wait",
            base: Base::Short,
            edit: |s| {
                let waits = waits_on(s.kernel(), NOTED);
                remove(s.kernel_mut(), Nth(1), waits)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "one warpgroup alone waits for later notes",
            kind: "missing full wait",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), NOTED);
                only_threads(s.kernel_mut(), Nth(1), waits, Cmp::Ge, 256)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "consumers wait for notes with the other parity",
            kind: "parity",
            base: Base::Wide,
            edit: |s| flip(s, NOTED),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "notes are announced on one mbarrier instead of two",
            kind: "alternating barriers",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), NOTED);
                let arrives = arrives_on(s.kernel(), NOTED);
                parity_bit(s.kernel_mut(), &waits, 0)
                    + places(s.kernel_mut(), |op| waits(op) || arrives(op), 1)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "Deadlock"]),
        },
        Mutation {
            name: "the loader announces all notes on the first mbarrier",
            kind: "alternating barriers",
            base: Base::Wide,
            edit: |s| {
                let arrives = arrives_on(s.kernel(), NOTED);
                places(s.kernel_mut(), arrives, 1)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "Deadlock"]),
        },
        Mutation {
            name: "consumers wait for later notes on the other mbarrier",
            kind: "alternating barriers",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), NOTED);
                other_stage(s.kernel_mut(), Nth(1), waits)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "Deadlock"]),
        },
        Mutation {
            name: "two arrivals for a note",
            kind: "mbarrier count",
            base: Base::Short,
            edit: |s| count(s, NOTED, 2),
            by: By::Emulator(&["Deadlock"]),
        },
    ]
}

/// What notes say, and where.
fn words() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "no note is written",
            kind: "missing note",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Nth(NOTE), stores(4)),
            by: By::Emulator(&["UninitialisedMemory"]),
        },
        Mutation {
            name: "all notes are written in one place",
            kind: "missing note",
            base: Base::Wide,
            edit: |s| {
                let notes = notes(s);
                let written = |op: &Op| matches!(op, Op::Store { .. }) && notes(op);
                places(s.kernel_mut(), written, 1)
            },
            by: By::Emulator(&["UninitialisedMemory", "Race"]),
        },
        Mutation {
            name: "two places for notes: the next overwrites one that is still read",
            kind: "note's place",
            base: Base::Wide,
            edit: |s| {
                let notes = notes(s);
                places(s.kernel_mut(), notes, 2)
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "one place for notes",
            kind: "note's place",
            base: Base::Wide,
            edit: |s| {
                let notes = notes(s);
                places(s.kernel_mut(), notes, 1)
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "consumers read the note behind the last",
            kind: "note's place",
            base: Base::Wide,
            edit: |s| read(s, 1, 0),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "consumers store an output by the next row's note",
            kind: "note's place",
            base: Base::Wide,
            edit: |s| read(s, 2, 1),
            by: By::Emulator(&["OutOfBounds", "Race"]),
        },
        Mutation {
            name: "consumers store an output by the note before its own",
            kind: "note's place",
            base: Base::Wide,
            edit: |s| read(s, 2, 3),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "all tiles say that they are the first",
            kind: "note",
            base: Base::Wide,
            edit: |s| say(s, JOB_NOTE, 0, Binary::And, 0),
            by: By::Result,
        },
        Mutation {
            name: "all tiles say that they are of the first batch",
            kind: "note",
            base: Base::Ragged,
            edit: |s| say(s, JOB_NOTE, 1, Binary::And, 0xffff),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a note says that there is a tile of keys more than are loaded",
            kind: "note",
            base: Base::Wide,
            edit: |s| say(s, NOTE, 2, Binary::Add, 1),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "a note says that there is a tile of keys less than are loaded",
            kind: "note",
            base: Base::Short,
            edit: |s| say(s, NOTE, 2, Binary::Sub, 1),
            by: By::Emulator(&["Deadlock"]),
        },
    ]
}

/// Tiles of queries.
fn queries() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "queries overwrite those before",
            kind: "missing empty wait",
            base: Base::Wide,
            edit: |s| no_wait(s, Q_EMPTY),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "the loader waits for the first queries to be given back",
            kind: "parity",
            base: Base::Short,
            edit: |s| flip(s, Q_EMPTY),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "later queries are not waited for",
            kind: "missing full wait",
            base: Base::Wide,
            edit: |s| {
                let waits = waits_on(s.kernel(), Q_FULL);
                remove(s.kernel_mut(), Nth(1), waits)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "queries' place is never given back",
            kind: "missing release",
            base: Base::Wide,
            edit: |s| no_release(s, Q_EMPTY),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "queries of a row of one tile are not given back",
            kind: "missing release",
            base: Base::Wide,
            edit: |s| no_release_of(s, Q_EMPTY, 0),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "queries of a row of several tiles are not given back",
            kind: "missing release",
            base: Base::Wide,
            edit: |s| no_release_of(s, Q_EMPTY, 1),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "queries are given back behind each tile of keys",
            kind: "early release",
            base: Base::Wide,
            edit: |s| {
                let releases = arrives_on(s.kernel(), Q_EMPTY);
                unbranch(s.kernel_mut(), releases)
            },
            by: By::Emulator(&["Race", "Mbarrier"]),
        },
        Mutation {
            name: "queries are given back before the last product with keys is over",
            kind: "early release",
            base: Base::Wide,
            edit: |s| {
                let releases = arrives_on(s.kernel(), Q_EMPTY);
                let waits = op!(Op::WgmmaWait { .. });
                move_behind_branch(s.kernel_mut(), waits, releases)
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "all lanes give queries back",
            kind: "extra arrival",
            base: Base::Wide,
            edit: |s| {
                let releases = arrives_on(s.kernel(), Q_EMPTY);
                unguard(s.kernel_mut(), All, releases)
            },
            by: By::Emulator(&["Race", "Mbarrier", "Deadlock"]),
        },
        Mutation {
            name: "one warpgroup's releases are enough for queries' place",
            kind: "mbarrier count",
            base: Base::Wide,
            edit: |s| count(s, Q_EMPTY, 4),
            by: By::Emulator(&["Race", "Mbarrier"]),
        },
        Mutation {
            name: "both loader and consumers are to say that queries are there",
            kind: "mbarrier count",
            base: Base::Ragged,
            edit: |s| count(s, Q_FULL, 9),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "queries are not expected",
            kind: "missing arrival",
            base: Base::Wide,
            edit: |s| {
                let expects = expects_on(s.kernel(), Q_FULL);
                remove(s.kernel_mut(), All, expects)
            },
            by: By::Emulator(&["Deadlock", "Mbarrier"]),
        },
        Mutation {
            name: "a job's announcement is taken for a note's",
            kind: "missing full wait",
            base: Base::Wide,
            edit: |s| {
                let job = barrier(s.kernel(), JOB_FULL);
                let waits = waits_on(s.kernel(), NOTED);
                change(s.kernel_mut(), All, waits, |op| {
                    if let Op::MbarrierWait { address, .. } = op {
                        *address = job;
                    }
                })
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "Deadlock"]),
        },
    ]
}
