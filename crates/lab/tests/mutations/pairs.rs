//! Pairs of thread blocks that share tiles of keys.

use flex_block_attn_kernels::{Element, forward};
use flex_block_attn_lab::problems::Forward;
use flex_block_attn_ptx::ir::{Binary, Op, Operand, Scope, Special};

use crate::edit::Which::{All, Nth, Within};
use crate::edit::{change, op, remove};
use crate::handover::constant;
use crate::phases::{K_EMPTY, count};
use crate::places::word;
use crate::trace::immediate;
use crate::{Base, By, FAR, Mutation, Setup, mask};

/// Heads of two blocks of two tiles of queries, of which the last has 28 queries, on one pair of thread
/// blocks: lists of nine tiles of keys, of none, of one, and of as many as there are
/// places for, as the last has.
pub fn forward() -> Setup {
    let all: Vec<usize> = (0..9).collect();
    let mask = mask(
        [604, 560, 384, 64],
        [1, 4],
        &[
            &all,
            &[],
            &[3, 4, 5, 7],
            &[1],
            &[8],
            &[],
            &[2, 3, 4, 6, 7],
            &[0, 1, 3, 5],
        ],
    );
    let config = forward::Config {
        element: Element::Bf16,
        head_dim: 128,
        rows: forward::Rows::Pairs(192),
        kv_tile: 64,
        piece: 64,
        mask: None,
        canvas: false,
    };
    Forward {
        heads: 4,
        blocks: 2,
        scale: FAR,
        ..Forward::new(config, mask)
    }
    .setup()
}

/// The first stage of v to be empty, of four stages each.
const V_EMPTY: usize = K_EMPTY + 8;

/// Without the `nth` of the waits for both of a pair: an arrival, and a wait.
fn no_cluster_sync(s: &mut Setup, nth: usize) -> usize {
    let cluster = op!(Op::ClusterArrive | Op::ClusterWait);
    remove(s.kernel_mut(), Within(2 * nth, 2 * nth + 2), cluster)
}

/// Lets those arrivals or waits that are in the cluster's scope be in the thread block's.
fn in_scope_of_block(s: &mut Setup, which: impl Fn(&Op) -> bool) -> usize {
    let of_cluster = |op: &Op| {
        let scope = match op {
            Op::MbarrierArrive { scope, .. } | Op::MbarrierWait { scope, .. } => Some(*scope),
            _ => None,
        };
        which(op) && scope == Some(Scope::Cluster)
    };
    change(s.kernel_mut(), All, of_cluster, |op| {
        if let Op::MbarrierArrive { scope, .. } | Op::MbarrierWait { scope, .. } = op {
            *scope = Scope::Cta;
        }
    })
}

pub fn table() -> Vec<Mutation> {
    let mutation = |name, kind, edit, by| Mutation {
        name,
        kind,
        base: Base::Pairs,
        edit,
        by,
    };
    vec![
        mutation(
            "tiles are copied to the first of a pair alone",
            "multicast",
            |s| {
                change(
                    s.kernel_mut(),
                    All,
                    op!(Op::Mov {
                        src: Operand::Imm(0b11),
                        ..
                    }),
                    |op| {
                        if let Op::Mov { src, .. } = op {
                            *src = Operand::Imm(0b01);
                        }
                    },
                )
            },
            By::Emulator(&["Deadlock"]),
        ),
        mutation(
            "both of a pair copy the first panel",
            "multicast",
            |s| {
                let rank = op!(Op::Special {
                    which: Special::ClusterCtaRank,
                    ..
                });
                constant(s, rank, 0)
            },
            By::Emulator(&["Race"]),
        ),
        mutation(
            "a stage of k is empty when one of a pair says so",
            "mbarrier count",
            |s| count(s, K_EMPTY, 12),
            By::Emulator(&["Race", "Mbarrier"]),
        ),
        mutation(
            "a stage of v is empty when one of a pair says so",
            "mbarrier count",
            |s| count(s, V_EMPTY, 12),
            By::Emulator(&["Race", "Mbarrier", "Deadlock"]),
        ),
        mutation(
            "who gives a stage back tells the first of a pair twice",
            "mbarrier arrival",
            |s| {
                change(s.kernel_mut(), All, op!(Op::MapShared { .. }), |op| {
                    if let Op::MapShared { rank, .. } = op {
                        *rank = Operand::Imm(0);
                    }
                })
            },
            By::Emulator(&["Mbarrier", "Deadlock", "Race"]),
        ),
        mutation(
            "descriptors keep the block's rank",
            "descriptor",
            |s| {
                let drops = op!(Op::Binary {
                    op: Binary::And,
                    b: Operand::Imm(0x3_ffff),
                    ..
                });
                immediate(s.kernel_mut(), Nth(0), drops, u32::MAX.into())
            },
            By::Emulator(&["Race"]),
        ),
        mutation(
            "the first tiles may come before the other's barriers are there",
            "cluster barrier",
            |s| no_cluster_sync(s, 0),
            By::Emulator(&["Mbarrier"]),
        ),
        mutation(
            "who is done leaves while the other gives back the last stages",
            "cluster barrier",
            |s| no_cluster_sync(s, 1),
            By::Emulator(&["ClusterBarrier"]),
        ),
        mutation(
            "the next job's number is put up for threads of one block",
            "scope",
            |s| in_scope_of_block(s, op!(Op::MbarrierArrive { .. })),
            By::Emulator(&["Scope"]),
        ),
        mutation(
            "the next job's number is waited for as if it came from the same block",
            "scope",
            |s| in_scope_of_block(s, op!(Op::MbarrierWait { .. })),
            By::Emulator(&["Scope"]),
        ),
        mutation(
            "heads have a pair less than they have",
            "tile",
            |s| word(s, "of_head", |pairs| pairs - 1),
            By::Emulator(&["OutOfBounds"]),
        ),
    ]
}
