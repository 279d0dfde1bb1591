//! Tiles of queries that are computed in parts.

use crate::places::{number, wide, word};
use crate::{Base, By, Mutation};

const WHOLE: &str = "whole_tiles";
const CUT: &str = "cut_tiles";
const PARTS: &str = "parts";
const SLOTS: &str = "slots";
const SLOTS_LSE: &str = "slots_lse";

pub fn table() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "a list is divided into more parts than there are",
            kind: "parts",
            base: Base::Parts,
            edit: |s| word(s, PARTS, |parts| parts + 1),
            by: By::Result,
        },
        Mutation {
            name: "the last whole tile is taken for a part",
            kind: "parts",
            base: Base::Parts,
            edit: |s| word(s, WHOLE, |tiles| tiles - 1),
            by: By::Emulator(&["OutOfBounds"]),
        },
        Mutation {
            name: "the first tile in parts is taken for a whole one",
            kind: "parts",
            base: Base::Parts,
            edit: |s| word(s, WHOLE, |tiles| tiles + 1),
            by: By::Emulator(&["UninitialisedMemory"]),
        },
        Mutation {
            name: "a part is of another tile than its slot says",
            kind: "parts",
            base: Base::Parts,
            edit: |s| word(s, CUT, |tiles| tiles - 1),
            by: By::Emulator(&["UninitialisedMemory"]),
        },
        Mutation {
            name: "slots begin a row too late",
            kind: "parts",
            base: Base::Parts,
            edit: |s| wide(s, SLOTS, |address| address + 128),
            by: By::Emulator(&["UninitialisedMemory"]),
        },
        Mutation {
            name: "logarithms of slots begin a row too early",
            kind: "parts",
            base: Base::Parts,
            edit: |s| wide(s, SLOTS_LSE, |address| address - 4),
            by: By::Emulator(&["UninitialisedMemory"]),
        },
        Mutation {
            name: "the counter is left by whole tiles only",
            kind: "counter",
            base: Base::Parts,
            edit: |s| number(s, "counter", 0, 1),
            by: By::Result,
        },
    ]
}
