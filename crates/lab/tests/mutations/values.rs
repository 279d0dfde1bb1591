//! Values: registers without any, shuffles, the softmax, rounding.

use std::ops::Range;

use flex_block_attn_ptx::ir::{
    Binary, Block, Cmp, Inst, Kernel, Node, Op, Operand, Packed, RegId, ShuffleMode, Ternary,
    Unary, VoteMode,
};
use flex_block_attn_ptx::{Arg, Ty};

use crate::edit::Which::{All, Nth, Within};
use crate::edit::{Which, all, change, only_threads, op, remove};
use crate::handover::{JOB_NOTE, say};
use crate::places::argument;
use crate::{Base, By, Mutation, Setup};

/// The argument that scores are multiplied by.
const SCALE: &str = "scale";

/// The constants 1 and -inf.
const ONE: Operand = Operand::Imm(0x3f80_0000);
const NO_KEYS: u64 = 0xff80_0000;

/// Where the accumulators of the wgmma `nth` are set to zero.
fn fills(kernel: &Kernel, nth: usize) -> impl Fn(&Op) -> bool + use<> {
    let acc = |inst: &Inst| match &inst.op {
        Op::Wgmma { acc, .. } => Some(acc.clone()),
        _ => None,
    };
    let acc = all(kernel)
        .iter()
        .filter_map(acc)
        .nth(nth)
        .expect("kernels multiply");
    move |op| matches!(op, Op::Mov { dst, src: Operand::Imm(0), .. } if acc.contains(dst))
}

/// Changes what the wgmma `nth` does with its accumulators.
fn accumulate(s: &mut Setup, nth: usize, to: u64) -> usize {
    change(s.kernel_mut(), Nth(nth), op!(Op::Wgmma { .. }), |op| {
        if let Op::Wgmma { accumulate, .. } = op {
            *accumulate = Operand::Imm(to);
        }
    })
}

/// Sets the distance of shuffles over `from` lanes.
fn distance(s: &mut Setup, which: Which, from: u64, to: u64) -> usize {
    let shuffles = move |op: &Op| matches!(op, Op::Shuffle { mode: ShuffleMode::Butterfly, lane: Operand::Imm(lane), .. } if *lane == from);
    change(s.kernel_mut(), which, shuffles, |op| {
        if let Op::Shuffle { lane, .. } = op {
            *lane = Operand::Imm(to);
        }
    })
}

/// Registers that hold what a row's output so far is multiplied by: they start at one.
fn factors(kernel: &Kernel) -> Vec<Operand> {
    let starts = |op: &Op| match op {
        Op::Mov { dst, src, .. } if *src == ONE => vec![Operand::Reg(*dst)],
        _ => Vec::new(),
    };
    all(kernel)
        .iter()
        .flat_map(|inst| starts(&inst.op))
        .collect()
}

/// A test for multiplications of the output, in place.
fn scales(op: &Op) -> bool {
    matches!(op, Op::Binary { op: Binary::Mul, ty: Ty::F32, dst, a, .. } if *a == Operand::Reg(*dst))
}

/// A test for those by such a factor.
fn rescales(kernel: &Kernel) -> impl Fn(&Op) -> bool + use<> {
    let factors = factors(kernel);
    move |op| scales(op) && matches!(op, Op::Binary { b, .. } if factors.contains(b))
}

/// Multiplies by one instead.
fn no_factor(s: &mut Setup, which: Which, matches: impl Fn(&Op) -> bool) -> usize {
    change(s.kernel_mut(), which, matches, |op| match op {
        Op::Binary { b, .. } | Op::Ternary { b, .. } => *b = ONE,
        _ => {}
    })
}

/// Swaps the operands of instructions with two of them.
fn swap(s: &mut Setup, which: Which, matches: impl Fn(&Op) -> bool) -> usize {
    change(s.kernel_mut(), which, matches, |op| match op {
        Op::Binary { a, b, .. } => std::mem::swap(a, b),
        Op::Pack { low, high, .. } => std::mem::swap(low, high),
        _ => {}
    })
}

/// Lets loops go on for a step too many: those that are left by their `of`-th conditions, at a
/// bound or, counting down, at 0.
fn longer(s: &mut Setup, of: Range<usize>) -> usize {
    let leaves = breaks(&s.kernel().body);
    let preds = leaves.get(of).unwrap_or(&[]);
    change(
        s.kernel_mut(),
        All,
        |op| matches!(op, Op::Compare { dst, .. } if preds.contains(dst)),
        |op| {
            if let Op::Compare { cmp, b, .. } = op {
                match (*cmp, *b) {
                    (Cmp::Ge, _) => *cmp = Cmp::Gt,
                    _ => *b = Operand::Imm(u32::MAX.into()),
                }
            }
        },
    )
}

// Conditions of attention's loops over tiles of keys, and of that over tiles of queries. Those between are
// of loops over queries without keys.
const LOADER: Range<usize> = 1..2;
const PLANNER: Range<usize> = 2..3;
const CONSUMERS: Range<usize> = 5..6;

/// The predicates that loops are left by, in order.
pub fn breaks(block: &Block) -> Vec<RegId> {
    let of = |node: &Node| match node {
        Node::Inst(_) => Vec::new(),
        Node::Break { cond, .. } => cond.iter().map(|guard| guard.pred).collect(),
        Node::Loop { body, .. } => breaks(body),
        Node::If {
            then, otherwise, ..
        } => [breaks(then), breaks(otherwise)].concat(),
    };
    block.iter().flat_map(of).collect()
}

pub fn table() -> Vec<Mutation> {
    let mut table = registers();
    table.extend(numbers());
    table
}

fn registers() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "the sum does not start at zero",
            kind: "uninitialised accumulator",
            base: Base::Gemm,
            edit: |s| {
                let fills = fills(s.kernel(), 0);
                remove(s.kernel_mut(), All, fills)
            },
            by: By::Verifier(&["Unassigned"]),
        },
        Mutation {
            name: "the output does not start at zero",
            kind: "uninitialised accumulator",
            base: Base::Wide,
            edit: |s| {
                let fills = fills(s.kernel(), 16);
                remove(s.kernel_mut(), All, fills)
            },
            by: By::Verifier(&["Unassigned"]),
        },
        Mutation {
            name: "the first scores are added to registers without a value",
            kind: "uninitialised accumulator",
            base: Base::Wide,
            edit: |s| accumulate(s, 0, 1),
            by: By::Verifier(&["Unassigned"]),
        },
        Mutation {
            name: "later scores are added to the weights before",
            kind: "wrong accumulation",
            base: Base::Wide,
            edit: |s| accumulate(s, 8, 1),
            by: By::Result,
        },
        Mutation {
            name: "the second stage's product replaces the sum",
            kind: "wrong accumulation",
            base: Base::Gemm,
            edit: |s| accumulate(s, 4, 0),
            by: By::Result,
        },
        Mutation {
            name: "a sum without a first value",
            kind: "uninitialised register",
            base: Base::Wide,
            edit: |s| {
                // Those of the two rows' sums come before the output's.
                let zero = op!(Op::Mov {
                    ty: Ty::F32,
                    src: Operand::Imm(0),
                    ..
                });
                remove(s.kernel_mut(), Nth(0), zero)
            },
            by: By::Verifier(&["Unassigned"]),
        },
        Mutation {
            // On the path of the other lanes nothing is assigned.
            name: "weights rounded in some lanes only",
            kind: "uninitialised register",
            base: Base::Wide,
            edit: |s| {
                let rounds = op!(Op::Pack { .. });
                only_threads(s.kernel_mut(), Nth(0), rounds, Cmp::Ge, 130)
            },
            by: By::Verifier(&["Unassigned"]),
        },
        Mutation {
            name: "all go on for a tile too many",
            kind: "loop",
            base: Base::Wide,
            edit: |s| say(s, JOB_NOTE, 2, Binary::Add, 1),
            by: By::Result,
        },
        Mutation {
            name: "the loader goes on for a tile too many",
            kind: "loop",
            base: Base::Wide,
            edit: |s| longer(s, LOADER),
            by: By::Emulator(&["Deadlock", "Race"]),
        },
        Mutation {
            name: "the planner goes on for a tile of queries too many",
            kind: "loop",
            base: Base::Ragged,
            edit: |s| longer(s, PLANNER),
            by: By::Emulator(&["DivisionByZero"]),
        },
        Mutation {
            name: "the consumers go on for a tile too many",
            kind: "loop",
            base: Base::Wide,
            edit: |s| longer(s, CONSUMERS),
            by: By::Emulator(&["Race", "Deadlock"]),
        },
        Mutation {
            // Both going on is harmless: the step too many brings zeros.
            name: "the producer goes on for a step too many",
            kind: "loop",
            base: Base::Gemm,
            edit: |s| longer(s, 0..3),
            by: By::Emulator(&["LeftBehind"]),
        },
    ]
}

fn numbers() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "the maximum of a row without the neighbours' columns",
            kind: "shuffle",
            base: Base::Wide,
            edit: |s| distance(s, Within(0, 4), 1, 4),
            by: By::Result,
        },
        Mutation {
            name: "the sum of a row from another row",
            kind: "shuffle",
            base: Base::Short,
            edit: |s| {
                // The last two shuffles over two lanes are of the sum.
                let all = all(s.kernel());
                let count = all.iter().filter(|inst| {
                    matches!(
                        inst.op,
                        Op::Shuffle {
                            mode: ShuffleMode::Butterfly,
                            lane: Operand::Imm(2),
                            ..
                        }
                    )
                });
                let last = count.count() - 1;
                distance(s, Nth(last), 2, 8)
            },
            by: By::Result,
        },
        Mutation {
            name: "all warps take themselves for the first consumers",
            kind: "shuffle",
            base: Base::Gemm,
            edit: |s| {
                change(
                    s.kernel_mut(),
                    All,
                    op!(Op::Shuffle {
                        mode: ShuffleMode::Index,
                        ..
                    }),
                    |op| {
                        if let Op::Shuffle { src, .. } = op {
                            *src = Operand::Imm(1);
                        }
                    },
                )
            },
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "the factor for a new maximum upside down",
            kind: "softmax",
            base: Base::Wide,
            edit: |s| {
                swap(
                    s,
                    All,
                    op!(Op::Binary {
                        op: Binary::Sub,
                        ty: Ty::F32,
                        ..
                    }),
                )
            },
            by: By::Result,
        },
        Mutation {
            name: "the output is not rescaled for the last maximum",
            kind: "softmax",
            base: Base::Short,
            edit: |s| {
                // Its first half is under the products with k, the other behind a row's.
                let rescales = rescales(s.kernel());
                let count = all(s.kernel())
                    .iter()
                    .filter(|inst| rescales(&inst.op))
                    .count();
                no_factor(s, Within(count / 2, count), rescales)
            },
            by: By::Result,
        },
        Mutation {
            name: "the output is not rescaled for any but the last maximum",
            kind: "softmax",
            base: Base::Wide,
            edit: |s| {
                let rescales = rescales(s.kernel());
                let count = all(s.kernel())
                    .iter()
                    .filter(|inst| rescales(&inst.op))
                    .count();
                no_factor(s, Within(0, count / 2), rescales)
            },
            by: By::Result,
        },
        Mutation {
            name: "the output is not divided by the sum of weights",
            kind: "softmax",
            base: Base::Wide,
            edit: |s| {
                let rescales = rescales(s.kernel());
                no_factor(s, All, move |op| scales(op) && !rescales(op))
            },
            by: By::Result,
        },
        Mutation {
            name: "the logarithm of base 2 for the natural one",
            kind: "softmax",
            base: Base::Short,
            edit: |s| {
                let converts = op!(Op::Binary {
                    op: Binary::Mul,
                    ty: Ty::F32,
                    b: Operand::Imm(_),
                    ..
                });
                no_factor(s, All, converts)
            },
            by: By::Result,
        },
        Mutation {
            name: "the softmax of a row starts with what the row before left",
            kind: "softmax",
            base: Base::Wide,
            edit: |s| {
                // The first such constant is the planner's, for queries without keys.
                let none = op!(Op::Mov {
                    src: Operand::Imm(NO_KEYS),
                    ..
                });
                change(s.kernel_mut(), Within(1, 3), none, |op| {
                    if let Op::Mov { dst, src, .. } = op {
                        *src = Operand::Reg(*dst);
                    }
                })
            },
            by: By::Verifier(&["Unassigned"]),
        },
        Mutation {
            name: "the sum of weights is not rescaled",
            kind: "softmax",
            base: Base::Wide,
            edit: |s| {
                let factors = factors(s.kernel());
                let sums = |op: &Op| matches!(op, Op::Ternary { op: Ternary::Fma, b, .. } if factors.contains(b));
                no_factor(s, All, sums)
            },
            by: By::Result,
        },
        Mutation {
            name: "weights that are too large stay",
            kind: "softmax",
            base: Base::Wide,
            edit: |s| {
                change(
                    s.kernel_mut(),
                    All,
                    op!(Op::Vote {
                        mode: VoteMode::All,
                        ..
                    }),
                    |op| {
                        if let Op::Vote { dst, .. } = *op {
                            *op = Op::Mov {
                                ty: Ty::Pred,
                                dst,
                                src: Operand::Imm(1),
                            };
                        }
                    },
                )
            },
            by: By::Result,
        },
        Mutation {
            name: "scores are computed again with the halves of a step swapped for keys",
            kind: "softmax",
            base: Base::Wide,
            edit: |s| {
                change(s.kernel_mut(), All, op!(Op::Mma { .. }), |op| {
                    if let Op::Mma { b, .. } = op {
                        b.swap(0, 1);
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "one weight of 64 is not exponentiated",
            kind: "softmax",
            base: Base::Wide,
            edit: |s| {
                change(
                    s.kernel_mut(),
                    Nth(20),
                    op!(Op::Unary {
                        op: Unary::Exp2,
                        ..
                    }),
                    |op| {
                        if let Op::Unary { op, .. } = op {
                            *op = Unary::Abs;
                        }
                    },
                )
            },
            by: By::Result,
        },
        Mutation {
            name: "scores in other units than the maximum",
            kind: "softmax",
            base: Base::Wide,
            edit: |s| match argument(s, SCALE) {
                Arg::F32(scale) => {
                    *scale *= std::f32::consts::LN_2;
                    1
                }
                _ => 0,
            },
            by: By::Result,
        },
        Mutation {
            name: "the minimum of a row for its maximum",
            kind: "softmax",
            base: Base::Short,
            edit: |s| {
                change(
                    s.kernel_mut(),
                    All,
                    op!(Op::Binary {
                        op: Binary::Max,
                        ty: Ty::F32,
                        ..
                    }),
                    |op| {
                        if let Op::Binary { op, .. } = op {
                            *op = Binary::Min;
                        }
                    },
                )
            },
            by: By::Result,
        },
        Mutation {
            name: "pairs of weights in the wrong order",
            kind: "rounding",
            base: Base::Wide,
            edit: |s| {
                // Of a row's first tile and of later ones, 128 columns each.
                swap(s, Within(0, 64), op!(Op::Pack { .. }))
            },
            by: By::Result,
        },
        Mutation {
            name: "a pair of c in the wrong order",
            kind: "rounding",
            base: Base::Gemm,
            edit: |s| swap(s, Nth(17), op!(Op::Pack { .. })),
            by: By::Result,
        },
        Mutation {
            name: "c is rounded to float16",
            kind: "rounding",
            base: Base::Gemm,
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
            name: "c's matrices are stored transposed",
            kind: "rounding",
            base: Base::Gemm,
            edit: |s| {
                change(s.kernel_mut(), All, op!(Op::StoreMatrix { .. }), |op| {
                    if let Op::StoreMatrix { transposed, .. } = op {
                        *transposed = true;
                    }
                })
            },
            by: By::Result,
        },
    ]
}
