//! Pairs of thread blocks that share tiles of keys.

use flex_block_attn_kernels::{Element, forward};
use flex_block_attn_lab::problems::Forward;
use flex_block_attn_ptx::ir::{Binary, Op, Operand, Special};

use crate::edit::Which::{All, Nth, Within};
use crate::edit::{change, op, remove};
use crate::handover::constant;
use crate::phases::{K_EMPTY, V_EMPTY, count};
use crate::places::word;
use crate::trace::immediate;
use crate::{Base, By, FAR, Mutation, Setup, mask};

/// Heads of three tiles of queries, on one pair of thread blocks: of six tiles of keys, of none, of one and of
/// five.
pub fn forward() -> Setup {
    let all: Vec<usize> = (0..6).collect();
    let mask = mask(
        [300, 1100, 512, 192],
        [1, 4],
        &[&all, &[], &[3], &[0, 1, 3, 4, 5]],
    );
    let config = forward::Config::choose(Element::Bf16, 128, 512, 192, None)
        .and_then(forward::Config::in_pairs)
        .expect("dense masks of head_dim 128 are computed in pairs");
    Forward {
        heads: 4,
        scale: FAR,
        ..Forward::new(config, mask)
    }
    .setup()
}

/// Without the `nth` of the waits for both of a pair: an arrival, and a wait.
fn no_cluster_sync(s: &mut Setup, nth: usize) -> usize {
    let cluster = op!(Op::ClusterArrive | Op::ClusterWait);
    remove(s.kernel_mut(), Within(2 * nth, 2 * nth + 2), cluster)
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
            |s| count(s, K_EMPTY, 8),
            By::Emulator(&["Race", "Mbarrier"]),
        ),
        mutation(
            "a stage of v is empty when one of a pair says so",
            "mbarrier count",
            |s| count(s, V_EMPTY, 8),
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
            "a pair's second tile is the next pair's first",
            "tile",
            |s| word(s, "row_tiles", |tiles| tiles - 1),
            By::Emulator(&["OutOfBounds"]),
        ),
    ]
}
