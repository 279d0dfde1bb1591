//! How lists of key blocks are walked, and tiles put together from their pieces.

use flex_block_attn_ptx::ir::{Binary, Cmp, Op, Operand, Space};

use crate::edit::Which::All;
use crate::edit::{all, change, param, remove};
use crate::handover::{JOB_NOTE, JOB_START, say};
use crate::trace::{address, places};
use crate::{Base, By, Mutation, Setup};

// Words of a job's note, and of where its keys start.
const TILES: usize = 2;
const COLUMNS: usize = 3;
const ENTRY: usize = 0;
const BLOCK: usize = 1;
const LEFT: usize = 2;
const MISSING: usize = 3;

/// Where the walk sets down that a whole block is to come.
fn whole_block(s: &Setup) -> impl Fn(&Op) -> bool + use<> {
    let kv_block = param(s.kernel(), "kv_block");
    move |op| matches!(op, Op::Mov { src, .. } if *src == kv_block)
}

/// Compares what is left of a block with something else than 0.
fn ends_at(s: &mut Setup, keys: u64) -> usize {
    let whole_block = whole_block(s);
    let left = |op: &Op| match op {
        Op::Mov { dst, .. } if whole_block(op) => Some(Operand::Reg(*dst)),
        _ => None,
    };
    let left: Vec<_> = all(s.kernel()).iter().filter_map(|i| left(&i.op)).collect();
    change(
        s.kernel_mut(),
        All,
        |op| matches!(op, Op::Compare { cmp: Cmp::Eq, a, .. } if left.contains(a)),
        |op| {
            if let Op::Compare { b, .. } = op {
                *b = Operand::Imm(keys);
            }
        },
    )
}

/// Never steps on to the entry before.
fn no_step(s: &mut Setup) -> usize {
    let word = |op: &Op| match op {
        Op::MulWide { a, .. } => Some(*a),
        _ => None,
    };
    let words: Vec<_> = all(s.kernel()).iter().filter_map(|i| word(&i.op)).collect();
    remove(
        s.kernel_mut(),
        All,
        |op| matches!(op, Op::Binary { op: Binary::Sub, dst, a, .. } if *a == Operand::Reg(*dst) && words.contains(a)),
    )
}

/// Has the loader note the pieces of both stages in one place.
fn one_place(s: &mut Setup) -> usize {
    let notes =
        |op: &Op| matches!(op, Op::Store { space: Space::Shared, src, .. } if src.len() == 1);
    let first = all(s.kernel()).into_iter().find(|inst| notes(&inst.op));
    let first = first.and_then(|inst| address(&inst.op));
    // A word for each of three pieces.
    let of_pieces = |op: &Op| {
        matches!(op, Op::Load { .. } | Op::Store { .. })
            && address(op)
                .zip(first)
                .is_some_and(|(at, first)| (at.offset - 8..=at.offset + 8).contains(&first.offset))
    };
    places(s.kernel_mut(), of_pieces, 1)
}

pub fn table() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "the last key is left out",
            kind: "columns",
            base: Base::Ragged,
            edit: |s| say(s, JOB_NOTE, COLUMNS, Binary::Sub, 1),
            by: By::Result,
        },
        Mutation {
            name: "a column more than there are keys",
            kind: "columns",
            base: Base::Ragged,
            edit: |s| say(s, JOB_NOTE, COLUMNS, Binary::Add, 1),
            by: By::Result,
        },
        Mutation {
            name: "all columns are keys",
            kind: "columns",
            base: Base::Ragged,
            edit: |s| say(s, JOB_NOTE, COLUMNS, Binary::Max, 192),
            by: By::Result,
        },
        Mutation {
            name: "a tile of keys too many, without any key",
            kind: "walk",
            base: Base::Ragged,
            edit: |s| {
                say(s, JOB_NOTE, TILES, Binary::Add, 1)
                    + say(s, JOB_START, MISSING, Binary::Add, 192)
            },
            by: By::Result,
        },
        Mutation {
            name: "a tile of keys too few",
            kind: "walk",
            base: Base::Ragged,
            edit: |s| {
                say(s, JOB_NOTE, TILES, Binary::Sub, 1) + say(s, JOB_NOTE, TILES, Binary::Max, 1)
            },
            by: By::Result,
        },
        Mutation {
            name: "missing pieces are not left out",
            kind: "walk",
            base: Base::Ragged,
            edit: |s| say(s, JOB_START, MISSING, Binary::And, 0),
            by: By::Result,
        },
        Mutation {
            name: "a piece too many is missing",
            kind: "walk",
            base: Base::Ragged,
            edit: |s| say(s, JOB_START, MISSING, Binary::Add, 64),
            by: By::Result,
        },
        Mutation {
            name: "a walk starts an entry behind the list",
            kind: "walk",
            base: Base::Wide,
            edit: |s| say(s, JOB_START, ENTRY, Binary::Add, 1),
            by: By::Result,
        },
        Mutation {
            name: "a walk leaves an entry out",
            kind: "walk",
            base: Base::Wide,
            edit: |s| say(s, JOB_START, ENTRY, Binary::Sub, 1),
            by: By::Result,
        },
        Mutation {
            name: "a walk stays at its entry",
            kind: "walk",
            base: Base::Ragged,
            edit: no_step,
            by: By::Result,
        },
        Mutation {
            name: "all walks start in the first block",
            kind: "walk",
            base: Base::Wide,
            edit: |s| say(s, JOB_START, BLOCK, Binary::And, 0),
            by: By::Result,
        },
        Mutation {
            name: "the last block is taken for whole",
            kind: "walk",
            base: Base::Ragged,
            edit: |s| say(s, JOB_START, LEFT, Binary::Max, 192),
            by: By::Result,
        },
        Mutation {
            name: "the first piece of blocks is left out",
            kind: "walk",
            base: Base::Ragged,
            edit: |s| ends_at(s, 64),
            by: By::Result,
        },
        Mutation {
            name: "a walk goes on in front of its block",
            kind: "walk",
            base: Base::Short,
            edit: |s| {
                let whole_block = whole_block(s);
                remove(s.kernel_mut(), All, whole_block)
            },
            by: By::Result,
        },
        Mutation {
            name: "the next tile's pieces take the place of those that v waits with",
            kind: "walk",
            base: Base::Ragged,
            edit: one_place,
            by: By::Result,
        },
    ]
}
