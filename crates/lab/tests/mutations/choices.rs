//! What tiles are chosen by: means of their tokens, weights of keys, and what is kept of a row's scores.

use flex_block_attn_kernels::select::ROOMS;
use flex_block_attn_kernels::{Element, pool};
use flex_block_attn_lab::problems::{Layout, Pool, Select};
use flex_block_attn_ptx::ir::{Binary, Cmp, Op, Operand, Packed, ShuffleMode, Space};
use flex_block_attn_ptx::{Arg, Ty};

use crate::edit::Which::{All, Nth};
use crate::edit::{change, op, remove, unguard};
use crate::places::argument;
use crate::{Base, By, Mutation, Setup};

/// Tiles of which a warp has none of the tokens, or some that stick out; two to a thread block.
pub fn means() -> Setup {
    Pool {
        config: pool::Config {
            element: Element::Bf16,
            head_dim: 64,
        },
        batch: 1,
        heads: [2, 1],
        tiles: pool::Tiles {
            thw: [3, 5, 9],
            tile: [2, 4, 8],
            zeros_count: false,
        },
        more: 0,
        layout: Layout {
            tokens_first: true,
            gap: 8,
        },
    }
    .setup()
}

/// Heads that share keys, more than are multiplied at a time, rows of text, of which one does not count.
fn choice() -> Select {
    Select {
        heads: 2,
        kv_heads: 1,
        batch: 2,
        lambda: Some(0.7),
        text_lengths: Some([5, 30]),
        room: Some(ROOMS[0]),
        ..Select::new(131, 133)
    }
}

/// With the kernel that scores and keeps.
pub fn masks() -> Setup {
    choice().setup()
}

/// With the kernel that weighs keys.
pub fn weights() -> Setup {
    choice().weighing()
}

pub fn table() -> Vec<Mutation> {
    let mut table = of_means();
    table.extend(of_weights());
    table.extend(of_masks());
    table
}

/// Puts another number in the place of an argument.
fn say(s: &mut Setup, name: &str, number: u32) -> usize {
    *argument(s, name) = Arg::U32(number);
    1
}

/// A test for sums with what another lane has, so many away.
fn shuffles(distance: u64) -> impl Fn(&Op) -> bool {
    move |op| {
        matches!(
            op,
            Op::Shuffle { mode: ShuffleMode::Butterfly, lane: Operand::Imm(lane), .. }
                if *lane == distance
        )
    }
}

/// Lets lanes exchange with themselves.
fn alone(s: &mut Setup, distance: u64) -> usize {
    change(s.kernel_mut(), All, shuffles(distance), |op| {
        if let Op::Shuffle { lane, .. } = op {
            *lane = Operand::Imm(0);
        }
    })
}

/// Puts a constant in the place of the second operand.
fn second(op: &mut Op, constant: u64) {
    match op {
        Op::Binary { b, .. } | Op::Compare { b, .. } | Op::Select { b, .. } => {
            *b = Operand::Imm(constant);
        }
        _ => {}
    }
}

fn of_means() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "a tile's sums are read before all warps have written theirs",
            kind: "missing barrier",
            base: Base::Means,
            edit: |s| remove(s.kernel_mut(), All, op!(Op::BarrierSync { .. })),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "tokens beside the video are summed",
            kind: "missing guard",
            base: Base::Means,
            edit: |s| {
                let loads = op!(Op::Load {
                    space: Space::Global,
                    ..
                });
                unguard(s.kernel_mut(), All, loads)
            },
            by: By::Emulator(&["OutOfBounds"]),
        },
        Mutation {
            name: "a tile at the border is divided by the tokens of a whole one",
            kind: "padding",
            base: Base::Means,
            edit: |s| say(s, "divisor", 64),
            by: By::Result,
        },
        Mutation {
            name: "rows that a warp reads together are not summed",
            kind: "shuffle",
            base: Base::Means,
            edit: |s| alone(s, 16),
            by: By::Result,
        },
        Mutation {
            name: "means are rounded to float16",
            kind: "rounding",
            base: Base::Means,
            edit: |s| {
                change(s.kernel_mut(), All, op!(Op::Pack { .. }), |op| {
                    if let Op::Pack { format, .. } = op {
                        *format = Packed::F16;
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "a head of keys is taken for one of queries",
            kind: "wrong tensor",
            base: Base::Means,
            edit: |s| say(s, "first_heads", 1),
            by: By::Emulator(&["OutOfBounds"]),
        },
        Mutation {
            name: "a tile is narrower than it is",
            kind: "wrong place",
            base: Base::Means,
            edit: |s| say(s, "tile_width", 7),
            by: By::Result,
        },
    ]
}

fn of_weights() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "keys are multiplied with a sum that is not all there",
            kind: "missing barrier",
            base: Base::Weights,
            edit: |s| remove(s.kernel_mut(), Nth(1), op!(Op::BarrierSync { .. })),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "what is redundant ranks high",
            kind: "redundancy",
            base: Base::Weights,
            edit: |s| {
                // Less one, of the weight.
                let less = op!(Op::Binary {
                    op: Binary::Sub,
                    ty: Ty::F32,
                    b: Operand::Imm(_),
                    ..
                });
                change(s.kernel_mut(), All, less, |op| second(op, 0))
            },
            by: By::Result,
        },
        Mutation {
            name: "redundancy is a sum, not a mean",
            kind: "redundancy",
            base: Base::Weights,
            edit: |s| {
                // The first quotients are of norms.
                let quotients = op!(Op::Binary {
                    op: Binary::Div,
                    ty: Ty::F32,
                    a: Operand::Reg(_),
                    ..
                });
                let one = u64::from(1.0f32.to_bits());
                let divided = |op: &mut Op| second(op, one);
                let count = crate::edit::all(s.kernel())
                    .iter()
                    .filter(|inst| quotients(&inst.op))
                    .count();
                change(s.kernel_mut(), Nth(count - 1), quotients, divided)
            },
            by: By::Result,
        },
        Mutation {
            name: "norms are of some of a key's features",
            kind: "shuffle",
            base: Base::Weights,
            edit: |s| alone(s, 8),
            by: By::Result,
        },
    ]
}

fn of_masks() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "features are multiplied before they are there",
            kind: "missing barrier",
            base: Base::Masks,
            edit: |s| remove(s.kernel_mut(), Nth(1), op!(Op::BarrierSync { .. })),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "features are overwritten while they are multiplied",
            kind: "missing barrier",
            base: Base::Masks,
            edit: |s| remove(s.kernel_mut(), Nth(0), op!(Op::BarrierSync { .. })),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "scores are compared before they are there",
            kind: "missing barrier",
            base: Base::Masks,
            edit: |s| remove(s.kernel_mut(), Nth(2), op!(Op::BarrierSync { .. })),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "the larger of two negative scores is taken for the smaller",
            kind: "order of scores",
            base: Base::Masks,
            edit: |s| {
                let signs = op!(Op::Compare {
                    cmp: Cmp::Ge,
                    b: Operand::Imm(0x8000_0000),
                    ..
                });
                change(s.kernel_mut(), All, signs, |op| second(op, u32::MAX.into()))
            },
            by: By::Result,
        },
        Mutation {
            name: "scores are told apart without their highest bit",
            kind: "order of scores",
            base: Base::Masks,
            edit: |s| {
                let first = op!(Op::Mov {
                    src: Operand::Imm(0x8000_0000),
                    ..
                });
                change(s.kernel_mut(), All, first, |op| {
                    if let Op::Mov { src, .. } = op {
                        *src = Operand::Imm(0x4000_0000);
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "columns behind the last tile are the best",
            kind: "missing guard",
            base: Base::Masks,
            edit: |s| {
                let scores = op!(Op::Select {
                    b: Operand::Imm(0),
                    ..
                });
                change(s.kernel_mut(), Nth(0), scores, |op| {
                    second(op, u32::MAX.into())
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "equal scores are all kept",
            kind: "order of scores",
            base: Base::Masks,
            edit: |s| {
                // How many lanes before have an equal one.
                let counts = op!(Op::Unary {
                    op: flex_block_attn_ptx::ir::Unary::PopCount,
                    ..
                });
                change(s.kernel_mut(), All, counts, |op| {
                    if let Op::Unary { a, .. } = op {
                        *a = Operand::Imm(0);
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "a row keeps one more",
            kind: "loop",
            base: Base::Masks,
            edit: |s| say(s, "top", 6),
            by: By::Result,
        },
        Mutation {
            name: "a head of queries has keys of its own",
            kind: "wrong tensor",
            base: Base::Masks,
            edit: |s| say(s, "group", 1),
            by: By::Emulator(&["OutOfBounds"]),
        },
        Mutation {
            name: "text that does not count is seen",
            kind: "padding",
            base: Base::Masks,
            edit: |s| say(s, "block", 1),
            by: By::Result,
        },
        Mutation {
            name: "queries count by their norm",
            kind: "redundancy",
            base: Base::Masks,
            edit: |s| alone(s, 4),
            by: By::Result,
        },
        Mutation {
            name: "bytes are written behind a row",
            kind: "missing guard",
            base: Base::Masks,
            edit: |s| {
                let stores = op!(Op::Store {
                    space: Space::Global,
                    ..
                });
                unguard(s.kernel_mut(), All, stores)
            },
            by: By::Emulator(&["Race", "OutOfBounds"]),
        },
    ]
}
