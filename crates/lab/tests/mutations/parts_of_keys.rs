//! Attention backward with tiles of keys in parts: which part a thread block has, where it leaves dk and
//! dv, and how parts are put together.

use flex_block_attn_kernels::cut::Cut;
use flex_block_attn_kernels::{Element, backward};
use flex_block_attn_lab::problems::Backward;
use flex_block_attn_ptx::Ty;
use flex_block_attn_ptx::ir::{Binary, Cmp, Op, Operand, Space};

use crate::edit::Which::{All, Nth};
use crate::edit::{all, change, only_threads, op, param, remove};
use crate::{Base, By, Mutation, mask};

/// Tiles of keys with lists of five blocks of queries, of four, of two and of none: the first is computed
/// whole. Of the second's keys, the last of all, not all are there.
pub fn problem() -> Backward {
    let mask = mask(
        [320, 498, 64, 128],
        [1, 1],
        &[&[0, 3], &[0, 1, 3], &[0], &[0, 1, 3], &[0, 3]],
    );
    let config = backward::Config::choose(Element::Bf16, 128, 64, 128, None, false);
    Backward {
        cut: Some(Cut {
            whole: 1,
            tiles: 3,
            parts: 2,
        }),
        ..Backward::new(config.expect("blocks are multiples of 16"), mask)
    }
}

/// A part's ends, in 2^28ths of a list.
fn in_shares(op: &Op) -> bool {
    matches!(op, Op::Binary { op: Binary::Mul, b: Operand::Imm(b), .. } if *b == 1 << 28)
}

/// What looks for the place of a slot that stands for none.
fn looks_for_slot(op: &Op) -> bool {
    matches!(op, Op::Compare { ty: Ty::U32, b: Operand::Imm(b), .. } if *b == u32::MAX.into())
}

pub fn table() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "a part begins where all do",
            kind: "part's share",
            base: Base::PartsOfKeys,
            edit: |s| {
                change(s.kernel_mut(), Nth(0), in_shares, |op| {
                    if let Op::Binary { b, .. } = op {
                        *b = Operand::Imm(0);
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "a part ends where the one before does",
            kind: "part's share",
            base: Base::PartsOfKeys,
            edit: |s| {
                change(s.kernel_mut(), Nth(1), in_shares, |op| {
                    if let Op::Binary { b, .. } = op {
                        *b = Operand::Imm(0);
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "parts are stored as if they were all",
            kind: "gradients' place",
            base: Base::PartsOfKeys,
            edit: |s| {
                let compares = all(s.kernel());
                let number = compares.iter().filter(|i| looks_for_slot(&i.op)).count();
                // Behind those for the end of notes. Nothing is greater.
                change(s.kernel_mut(), Nth(number - 1), looks_for_slot, |op| {
                    if let Op::Compare { cmp, .. } = op {
                        *cmp = Cmp::Gt;
                    }
                })
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a part's place is that of the next",
            kind: "gradients' place",
            base: Base::PartsOfKeys,
            edit: |s| {
                let whole = param(s.kernel(), "whole");
                let less = move |op: &Op| matches!(*op, Op::Binary { op: Binary::Sub, b, .. } if b == whole);
                change(s.kernel_mut(), All, less, |op| {
                    if let Op::Binary { b, .. } = op {
                        *b = Operand::Imm(0);
                    }
                })
            },
            by: By::Emulator(&["OutOfBounds"]),
        },
        Mutation {
            name: "some threads do not wait for the parts",
            kind: "early start",
            base: Base::Joined,
            edit: |s| only_threads(s.kernel_mut(), All, op!(Op::GridWait), Cmp::Ge, 32),
            by: By::Emulator(&["Early"]),
        },
        Mutation {
            name: "what a part has of a column is left out",
            kind: "missing term",
            base: Base::Joined,
            edit: |s| {
                let sums = op!(Op::Binary {
                    op: Binary::Add,
                    ty: Ty::F32,
                    ..
                });
                remove(s.kernel_mut(), Nth(3), sums)
            },
            by: By::Result,
        },
        Mutation {
            name: "sums are stored as dk that are dv",
            kind: "gradients' place",
            base: Base::Joined,
            edit: |s| {
                let which = op!(Op::Compare {
                    ty: Ty::U32,
                    b: Operand::Imm(1),
                    ..
                });
                change(s.kernel_mut(), All, which, |op| {
                    if let Op::Compare { b, .. } = op {
                        *b = Operand::Imm(2);
                    }
                })
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "sums of keys behind the last are stored",
            kind: "guard",
            base: Base::Joined,
            edit: |s| {
                let kv_len = param(s.kernel(), "kv_len");
                let guards = move |op: &Op| matches!(op, Op::Compare { b, .. } if *b == kv_len);
                change(s.kernel_mut(), All, guards, |op| {
                    if let Op::Compare { b, .. } = op {
                        *b = Operand::Imm(u32::MAX.into());
                    }
                })
            },
            by: By::Emulator(&["OutOfBounds", "UninitialisedMemory"]),
        },
        Mutation {
            name: "the last rows of a tile's sums are not stored",
            kind: "missing store",
            base: Base::Joined,
            edit: |s| {
                let stores = op!(Op::Store {
                    space: Space::Global,
                    ..
                });
                remove(s.kernel_mut(), Nth(1), stores)
            },
            by: By::Result,
        },
    ]
}
