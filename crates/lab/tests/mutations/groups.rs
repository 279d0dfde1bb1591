//! Groups of asynchronous work: commits and waits, of wgmmas and of bulk stores.

use flex_block_attn_ptx::Ty;
use flex_block_attn_ptx::ir::{Op, Operand, Space};

use crate::edit::Which::{All, Nth};
use crate::edit::{Which, all, change, move_before, op, plain, remove, rewrite};
use crate::{Base, By, Mutation};

/// A bulk commit is followed by an ordinary store over the tile that is still being read.
fn reuse(s: &mut crate::Setup) -> usize {
    let address = all(s.kernel())
        .iter()
        .find_map(|inst| match inst.op {
            Op::TmaStore { src, .. } => Some(src),
            _ => None,
        })
        .expect("kernels store by TMA");
    rewrite(s.kernel_mut(), All, op!(Op::BulkCommit), |inst| {
        let store = plain(Op::Store {
            space: Space::Shared,
            ty: Ty::B32,
            src: vec![Operand::Imm(0)],
            address,
        });
        vec![flex_block_attn_ptx::ir::Node::Inst(inst), store]
    })
}

/// Leaves a product more in flight.
fn two_for_one(s: &mut crate::Setup, which: Which) -> usize {
    let one = op!(Op::WgmmaWait { pending: 1 });
    change(s.kernel_mut(), which, one, |op| {
        *op = Op::WgmmaWait { pending: 2 };
    })
}

pub fn table() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "the first scores are not waited for",
            kind: "wgmma wait",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Nth(0), op!(Op::WgmmaWait { pending: 0 })),
            by: By::Emulator(&["AccumulatorInFlight"]),
        },
        Mutation {
            name: "later scores are not waited for: wait_group 2 for 1",
            kind: "wgmma wait",
            base: Base::Wide,
            edit: |s| two_for_one(s, Nth(0)),
            by: By::Emulator(&["AccumulatorInFlight"]),
        },
        Mutation {
            name: "a row's last product with v is not waited for: wait_group 2 for 1",
            kind: "wgmma wait",
            base: Base::Wide,
            edit: |s| two_for_one(s, Nth(1)),
            by: By::Emulator(&["AccumulatorInFlight"]),
        },
        Mutation {
            name: "weights are overwritten under the product with v: wait_group 1 for 0",
            kind: "wgmma wait",
            base: Base::Wide,
            edit: |s| {
                change(
                    s.kernel_mut(),
                    Nth(1),
                    op!(Op::WgmmaWait { pending: 0 }),
                    |op| {
                        *op = Op::WgmmaWait { pending: 1 };
                    },
                )
            },
            by: By::Emulator(&["OperandInFlight", "Race"]),
        },
        Mutation {
            name: "the last product of all with v is not waited for",
            kind: "wgmma wait",
            base: Base::Short,
            edit: |s| remove(s.kernel_mut(), Nth(2), op!(Op::WgmmaWait { pending: 0 })),
            by: By::Emulator(&["AccumulatorInFlight"]),
        },
        Mutation {
            name: "the last product is not waited for",
            kind: "wgmma wait",
            base: Base::Gemm,
            edit: |s| remove(s.kernel_mut(), All, op!(Op::WgmmaWait { pending: 0 })),
            by: By::Emulator(&["AccumulatorInFlight"]),
        },
        Mutation {
            name: "tiles are given back one product too early: wait_group 2 for 1",
            kind: "wgmma wait",
            base: Base::Gemm,
            edit: |s| two_for_one(s, All),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "no product is committed",
            kind: "wgmma commit",
            base: Base::Gemm,
            edit: |s| remove(s.kernel_mut(), All, op!(Op::WgmmaCommit)),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "scores in the loop are not a group of their own",
            kind: "wgmma commit",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Nth(1), op!(Op::WgmmaCommit)),
            by: By::Emulator(&["AccumulatorInFlight"]),
        },
        Mutation {
            name: "a row's last product with v is of one group with the next row's first scores",
            kind: "wgmma commit",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Nth(4), op!(Op::WgmmaCommit)),
            by: By::Emulator(&["AccumulatorInFlight", "Race"]),
        },
        Mutation {
            name: "the next row's first scores are not a group of their own",
            kind: "wgmma commit",
            base: Base::Short,
            edit: |s| remove(s.kernel_mut(), Nth(5), op!(Op::WgmmaCommit)),
            by: By::Emulator(&["AccumulatorInFlight", "Race"]),
        },
        Mutation {
            name: "the wait comes before the commit",
            kind: "wgmma commit",
            base: Base::Short,
            edit: |s| {
                let wait = op!(Op::WgmmaWait { .. });
                move_before(s.kernel_mut(), wait, op!(Op::WgmmaCommit))
            },
            by: By::Emulator(&["AccumulatorInFlight", "OperandInFlight"]),
        },
        Mutation {
            name: "the store of c is not waited for",
            kind: "bulk group",
            base: Base::Gemm,
            edit: |s| remove(s.kernel_mut(), All, op!(Op::BulkWait { .. })),
            by: By::Emulator(&["LeftBehind"]),
        },
        Mutation {
            name: "one store may be under way at the end",
            kind: "bulk group",
            base: Base::Gemm,
            edit: |s| {
                change(s.kernel_mut(), All, op!(Op::BulkWait { .. }), |op| {
                    *op = Op::BulkWait {
                        pending: 1,
                        read: false,
                    };
                })
            },
            by: By::Emulator(&["LeftBehind"]),
        },
        Mutation {
            name: "the store of c is not committed",
            kind: "bulk group",
            base: Base::Gemm,
            edit: |s| remove(s.kernel_mut(), All, op!(Op::BulkCommit)),
            by: By::Emulator(&["LeftBehind"]),
        },
        Mutation {
            name: "the last panel is stored behind the commit",
            kind: "bulk group",
            base: Base::Gemm,
            edit: |s| {
                let commit = op!(Op::BulkCommit);
                move_before(s.kernel_mut(), commit, op!(Op::TmaStore { .. }))
            },
            by: By::Emulator(&["LeftBehind"]),
        },
        Mutation {
            name: "c's tile is written again before it was read",
            kind: "bulk group",
            base: Base::Gemm,
            edit: reuse,
            by: By::Emulator(&["Race"]),
        },
    ]
}
