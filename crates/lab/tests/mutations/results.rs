//! What attention leaves in memory: the output, which threads of a quad exchange first, and logarithms;
//! of queries without keys the planner stores both.

use flex_block_attn_ptx::Ty;
use flex_block_attn_ptx::ir::{Binary, Cmp, Kernel, Op, Operand, RegId, ShuffleMode, Space};

use crate::edit::Which::{All, Nth, Within};
use crate::edit::{Which, all, change, computed, only_threads, op, param, remove};
use crate::trace::{immediate, operands, results, sources};
use crate::values::breaks;
use crate::{Base, By, Mutation, Setup};

/// A test for stores of results, of so many words.
fn stores(words: usize) -> impl Fn(&Op) -> bool {
    move |op| matches!(op, Op::Store { space: Space::Global, src, .. } if src.len() == words)
}

// By words: logarithms, the first the planner's; parts of rows; zeros.
const LOG: usize = 1;
const PART: usize = 2;
const ZEROS: usize = 4;

// Comparisons with the number of queries, in the order of the body. The planner's are of a whole tile,
// logarithms and zeros. Then come a thread's two rows, of the last tile of all and of others.
const NO_LOG: usize = 1;
const NO_OUTPUT: usize = 2;
const ROWS: [Which; 2] = [Within(3, 5), Within(5, 7)];

/// A test for comparisons with the number of queries.
fn guards(kernel: &Kernel) -> impl Fn(&Op) -> bool + use<> {
    let q_len = param(kernel, "q_len");
    move |op| matches!(op, Op::Compare { b, .. } if *b == q_len)
}

/// Compares with a larger number instead.
fn boundless(s: &mut Setup, which: &[Which]) -> usize {
    let guards = guards(s.kernel());
    // The last first: those that are changed are no longer counted.
    let edits = which.iter().rev().map(|&which| {
        change(s.kernel_mut(), which, &guards, |op| {
            if let Op::Compare { b, .. } = op {
                *b = Operand::Imm(u32::MAX.into());
            }
        })
    });
    edits.sum()
}

/// What is compared so: numbers of queries.
fn guarded(kernel: &Kernel) -> Vec<RegId> {
    let guards = guards(kernel);
    operands(kernel, |op| match *op {
        Op::Compare { a, .. } if guards(op) => vec![a],
        _ => Vec::new(),
    })
}

/// Stores a thread's second row so many behind the first.
fn second_row(s: &mut Setup, behind: u64) -> usize {
    let second = of_rows(s, Binary::Add, 8);
    immediate(s.kernel_mut(), All, second, behind)
}

/// Results of `op` on `constant` that rows of stored outputs and logarithms are computed from.
fn of_rows(s: &Setup, op: Binary, constant: u64) -> impl Fn(&Op) -> bool + use<> {
    let (kernel, mut rows) = (s.kernel(), guarded(s.kernel()));
    // The rows' place in the warpgroup's, in the tile, behind its first.
    for _ in 0..3 {
        rows.extend(sources(kernel, rows.clone(), Binary::Add));
    }
    let is = results(rows, op);
    move |it| is(it) && matches!(it, Op::Binary { b: Operand::Imm(b), .. } if *b == constant)
}

/// Of the two numbers that say which columns are a thread's, by a bit each of its lane: how much each bit
/// counts. They count 8, and 2 for a bit that is 2.
fn columns(s: &mut Setup, counts: [u64; 2]) -> usize {
    let products = |of: u64, by: u64| {
        let bits = operands(s.kernel(), |op| match *op {
            Op::Binary {
                op: Binary::And,
                dst,
                b: Operand::Imm(bit),
                ..
            } if bit == of => vec![Operand::Reg(dst)],
            _ => Vec::new(),
        });
        operands(s.kernel(), |op| match *op {
            Op::Binary {
                op: Binary::Mul,
                dst,
                a: Operand::Reg(a),
                b: Operand::Imm(b),
                ..
            } if bits.contains(&a) && b == by => vec![Operand::Reg(dst)],
            _ => Vec::new(),
        })
    };
    let [odd, upper] = [products(1, 8), products(2, 2)];
    let sums = |op: &Op| match *op {
        Op::Binary {
            op: Binary::Add,
            a: Operand::Reg(a),
            b: Operand::Reg(b),
            ..
        } if odd.contains(&a) && upper.contains(&b) => Some([a, b]),
        _ => None,
    };
    let sums: Vec<_> = all(s.kernel()).iter().filter_map(|i| sums(&i.op)).collect();
    let of = |place: usize| sums.iter().map(|sum| sum[place]).collect();
    let (odd, upper) = (results(of(0), Binary::Mul), results(of(1), Binary::Mul));
    immediate(s.kernel_mut(), All, odd, counts[0])
        + immediate(s.kernel_mut(), All, upper, counts[1])
}

/// A test for shuffles by which threads exchange the output: integers, by neighbours.
fn exchanges(kernel: &Kernel) -> impl Fn(&Op) -> bool + use<> {
    let given = operands(kernel, |op| match *op {
        Op::Select {
            ty: Ty::U32, dst, ..
        } => vec![Operand::Reg(dst)],
        _ => Vec::new(),
    });
    move |op| {
        matches!(
            op,
            Op::Shuffle { mode: ShuffleMode::Butterfly, src: Operand::Reg(src), .. }
                if given.contains(src)
        )
    }
}

/// A test for what chooses the halves that are given, or those that are kept.
fn halves(kernel: &Kernel, are_given: bool) -> impl Fn(&Op) -> bool + use<> {
    let exchanges = exchanges(kernel);
    let given = operands(kernel, |op| match *op {
        Op::Shuffle { src, .. } if exchanges(op) => vec![src],
        _ => Vec::new(),
    });
    let taken = operands(kernel, |op| match *op {
        Op::Shuffle { dst, .. } if exchanges(op) => vec![Operand::Reg(dst)],
        _ => Vec::new(),
    });
    let is_taken = move |x: &Operand| matches!(x, Operand::Reg(x) if taken.contains(x));
    move |op| match op {
        Op::Select { dst, .. } if are_given => given.contains(dst),
        Op::Select { a, b, .. } => is_taken(a) || is_taken(b),
        _ => false,
    }
}

/// Takes the one for the other.
fn other_half(s: &mut Setup, are_given: bool) -> usize {
    let halves = halves(s.kernel(), are_given);
    change(s.kernel_mut(), All, halves, |op| {
        if let Op::Select { a, b, .. } = op {
            std::mem::swap(a, b);
        }
    })
}

pub fn table() -> Vec<Mutation> {
    let mut table = outputs();
    table.extend(exchange());
    table.extend(keyless());
    table
}

/// Where outputs and logarithms are stored.
fn outputs() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "queries behind the last have results",
            kind: "guard",
            base: Base::Ragged,
            edit: |s| boundless(s, &ROWS),
            by: By::Emulator(&["Race", "OutOfBounds"]),
        },
        Mutation {
            name: "both rows of a thread are stored in the first's place",
            kind: "output's place",
            base: Base::Wide,
            edit: |s| second_row(s, 0),
            by: By::Result,
        },
        Mutation {
            name: "a thread's second row is the fourth behind the first",
            kind: "output's place",
            base: Base::Wide,
            edit: |s| second_row(s, 4),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "both warpgroups store the first's rows",
            kind: "output's place",
            base: Base::Wide,
            edit: |s| {
                let index = of_rows(s, Binary::Mul, 64);
                immediate(s.kernel_mut(), All, index, 0)
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "rows of warps are 8 apart",
            kind: "output's place",
            base: Base::Short,
            edit: |s| {
                let warps = of_rows(s, Binary::Mul, 16);
                immediate(s.kernel_mut(), All, warps, 8)
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a quad's threads store two rows",
            kind: "output's place",
            base: Base::Wide,
            edit: |s| {
                let quads = of_rows(s, Binary::Shr, 2);
                immediate(s.kernel_mut(), All, quads, 1)
            },
            by: By::Emulator(&["Race", "LaneOverlap"]),
        },
        Mutation {
            name: "columns of the output are half as far apart",
            kind: "output's place",
            base: Base::Wide,
            edit: |s| {
                change(s.kernel_mut(), All, stores(PART), |op| {
                    if let Op::Store { address, .. } = op {
                        address.offset /= 2;
                    }
                })
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "odd threads' columns are the fourth behind the even ones'",
            kind: "output's place",
            base: Base::Wide,
            edit: |s| columns(s, [4, 2]),
            by: By::Emulator(&["LaneOverlap"]),
        },
        Mutation {
            name: "the columns of a quad's inner threads in each other's place",
            kind: "output's place",
            base: Base::Short,
            edit: |s| columns(s, [4, 4]),
            by: By::Result,
        },
        Mutation {
            name: "the last columns of the output are not stored",
            kind: "missing store",
            base: Base::Wide,
            edit: |s| {
                // Eight stores of each of two rows, for the last row of all and others.
                [7, 15, 23, 31]
                    .into_iter()
                    .rev()
                    .map(|nth| remove(s.kernel_mut(), Nth(nth), stores(PART)))
                    .sum()
            },
            by: By::Result,
        },
        Mutation {
            name: "the output of the last row of all is not stored",
            kind: "missing store",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Within(0, 16), stores(PART)),
            by: By::Result,
        },
        Mutation {
            name: "logarithms of second rows are not stored",
            kind: "missing store",
            base: Base::Short,
            edit: |s| {
                [2, 4]
                    .into_iter()
                    .rev()
                    .map(|nth| remove(s.kernel_mut(), Nth(nth), stores(LOG)))
                    .sum()
            },
            by: By::Result,
        },
        Mutation {
            name: "all threads of a quad store the logarithm",
            kind: "thread choice",
            base: Base::Wide,
            edit: |s| {
                let lanes = operands(s.kernel(), |op| match *op {
                    Op::Binary {
                        op: Binary::And,
                        dst,
                        b: Operand::Imm(3),
                        ..
                    } => {
                        vec![Operand::Reg(dst)]
                    }
                    _ => Vec::new(),
                });
                let first = |op: &Op| matches!(op, Op::Compare { cmp: Cmp::Eq, a: Operand::Reg(a), .. } if lanes.contains(a));
                change(s.kernel_mut(), All, first, |op| {
                    if let Op::Compare { cmp, .. } = op {
                        *cmp = Cmp::Ge;
                    }
                })
            },
            by: By::Emulator(&["LaneOverlap"]),
        },
    ]
}

/// What threads of a quad give each other before.
fn exchange() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "threads keep the half that they are to give away",
            kind: "exchange",
            base: Base::Wide,
            edit: |s| {
                let exchanges = exchanges(s.kernel());
                change(s.kernel_mut(), All, exchanges, |op| {
                    if let Op::Shuffle { dst, src, .. } = *op {
                        *op = Op::Mov {
                            ty: Ty::U32,
                            dst,
                            src,
                        };
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "a column's exchange is missing",
            kind: "exchange",
            base: Base::Wide,
            edit: |s| {
                let exchanges = exchanges(s.kernel());
                // Sixteen of the last row of all come before.
                change(s.kernel_mut(), Nth(16 + 5), exchanges, |op| {
                    if let Op::Shuffle { dst, src, .. } = *op {
                        *op = Op::Mov {
                            ty: Ty::U32,
                            dst,
                            src,
                        };
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "threads exchange with the lane but one",
            kind: "exchange",
            base: Base::Wide,
            edit: |s| {
                let exchanges = exchanges(s.kernel());
                change(s.kernel_mut(), All, exchanges, |op| {
                    if let Op::Shuffle { lane, .. } = op {
                        *lane = Operand::Imm(2);
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "threads give away the half that is theirs",
            kind: "exchange",
            base: Base::Short,
            edit: |s| other_half(s, true),
            by: By::Result,
        },
        Mutation {
            name: "what was given lies on the wrong side of what was kept",
            kind: "exchange",
            base: Base::Short,
            edit: |s| other_half(s, false),
            by: By::Result,
        },
        Mutation {
            name: "pairs of the output in the wrong order",
            kind: "rounding",
            base: Base::Wide,
            edit: |s| {
                // Those before are of weights.
                change(
                    s.kernel_mut(),
                    Within(64, 128),
                    op!(Op::Pack { .. }),
                    |op| {
                        if let Op::Pack { low, high, .. } = op {
                            std::mem::swap(low, high);
                        }
                    },
                )
            },
            by: By::Result,
        },
    ]
}

/// Queries without any key.
fn keyless() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "zeros of queries without keys are not written",
            kind: "keyless queries",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), All, stores(ZEROS)),
            by: By::Result,
        },
        Mutation {
            name: "half of the queries without keys get zeros",
            kind: "keyless queries",
            base: Base::Wide,
            edit: |s| {
                // The planner's loop is the one before; that of logarithms comes between.
                let last = breaks(&s.kernel().body)[4];
                let leaves = |op: &Op| matches!(op, Op::Compare { dst, .. } if *dst == last);
                immediate(s.kernel_mut(), All, leaves, 64)
            },
            by: By::Result,
        },
        Mutation {
            name: "one lane writes zeros",
            kind: "keyless queries",
            base: Base::Wide,
            edit: |s| only_threads(s.kernel_mut(), All, stores(ZEROS), Cmp::Eq, 32),
            by: By::Result,
        },
        Mutation {
            name: "what is written of queries without keys is not zero",
            kind: "keyless queries",
            base: Base::Wide,
            edit: |s| {
                change(s.kernel_mut(), All, stores(ZEROS), |op| {
                    if let Op::Store { src, .. } = op {
                        src[1] = Operand::Imm(0x3f80);
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "neighbouring rows' lanes write the same zeros",
            kind: "keyless queries",
            base: Base::Wide,
            edit: |s| {
                let chunks = op!(Op::Binary {
                    op: Binary::And,
                    b: Operand::Imm(15),
                    ..
                });
                immediate(s.kernel_mut(), All, chunks, 7)
            },
            by: By::Emulator(&["LaneOverlap"]),
        },
        Mutation {
            name: "zeros are written over other queries",
            kind: "keyless queries",
            base: Base::Wide,
            edit: |s| {
                let rows = results(vec![guarded(s.kernel())[NO_OUTPUT]], Binary::Add);
                let other = (Binary::Add, Operand::Imm(256));
                computed(s.kernel_mut(), All, rows, other, |op| match op {
                    Op::Binary { a, .. } => Some(a),
                    _ => None,
                })
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "zeros are written behind the last query",
            kind: "guard",
            base: Base::Ragged,
            edit: |s| boundless(s, &[Nth(NO_OUTPUT)]),
            by: By::Emulator(&["Race", "OutOfBounds"]),
        },
        Mutation {
            name: "queries without keys behind the last have a logarithm",
            kind: "guard",
            base: Base::Ragged,
            edit: |s| boundless(s, &[Nth(NO_LOG)]),
            by: By::Emulator(&["Race", "OutOfBounds"]),
        },
        Mutation {
            name: "queries without keys have no logarithm",
            kind: "keyless queries",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Nth(0), stores(LOG)),
            by: By::Result,
        },
        Mutation {
            name: "the logarithm of queries without keys is 0",
            kind: "keyless queries",
            base: Base::Wide,
            edit: |s| {
                let log = op!(Op::Mov { ty: Ty::F32, .. });
                change(s.kernel_mut(), Nth(0), log, |op| {
                    if let Op::Mov { src, .. } = op {
                        *src = Operand::Imm(0);
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "queries without keys are put up, too",
            kind: "keyless queries",
            base: Base::Wide,
            edit: |s| {
                // The first such comparison is of a list's entries, before one is looked up.
                let some = op!(Op::Compare {
                    cmp: Cmp::Gt,
                    ty: Ty::U32,
                    b: Operand::Imm(0),
                    ..
                });
                change(s.kernel_mut(), Nth(1), some, |op| {
                    if let Op::Compare { cmp, .. } = op {
                        *cmp = Cmp::Ge;
                    }
                })
            },
            by: By::Emulator(&["Deadlock", "Race", "OutOfBounds"]),
        },
        Mutation {
            name: "all queries are taken for such without keys",
            kind: "keyless queries",
            base: Base::Short,
            edit: |s| {
                let some = op!(Op::Compare {
                    cmp: Cmp::Gt,
                    ty: Ty::U32,
                    b: Operand::Imm(0),
                    ..
                });
                change(s.kernel_mut(), Nth(1), some, |op| {
                    if let Op::Compare { b, .. } = op {
                        *b = Operand::Imm(u32::MAX.into());
                    }
                })
            },
            by: By::Result,
        },
    ]
}
