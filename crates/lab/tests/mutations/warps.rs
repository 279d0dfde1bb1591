//! What warps do together: named barriers, `setmaxnreg`, branches around warpgroup instructions.

use flex_block_attn_ptx::ir::{Binary, Cmp, Inst, Op, Operand, RegId, Special};

use crate::edit::Which::{All, Nth};
use crate::edit::{all, arrives_on, change, only_threads, op, remove, unbranch};
use crate::phases::JOB_FULL;
use crate::trace::operands;
use crate::{Base, By, Mutation, Setup};

/// Threads of the barrier that a warpgroup waits at alone, and of that by which two take turns.
const OWN: Operand = Operand::Imm(128);
const TURN: Operand = Operand::Imm(256);

/// Registers that hold a special register.
fn special(s: &Setup, which: Special) -> Vec<RegId> {
    let is = |inst: &Inst| match inst.op {
        Op::Special { dst, which: it } if it == which => Some(dst),
        _ => None,
    };
    all(s.kernel()).iter().filter_map(is).collect()
}

/// Compares registers with something else: of such comparisons the `nth`.
fn chosen(s: &mut Setup, among: Vec<RegId>, nth: usize, to: (Cmp, u64)) -> usize {
    let chooses =
        |op: &Op| matches!(op, Op::Compare { a: Operand::Reg(a), .. } if among.contains(a));
    change(s.kernel_mut(), Nth(nth), chooses, |op| {
        if let Op::Compare { cmp, b, .. } = op {
            (*cmp, *b) = (to.0, Operand::Imm(to.1));
        }
    })
}

/// Has other threads load: the second that are told apart by their index.
fn loader(s: &mut Setup, cmp: Cmp, thread: u64) -> usize {
    let threads = special(s, Special::TidX);
    chosen(s, threads, 1, (cmp, thread))
}

/// Has other warps plan: the first that are told apart by their index.
fn planner(s: &mut Setup, cmp: Cmp, warp: u64) -> usize {
    let threads = special(s, Special::TidX);
    let warps = operands(s.kernel(), |op| match *op {
        Op::Binary {
            op: Binary::Shr,
            dst,
            a: Operand::Reg(a),
            b: Operand::Imm(5),
            ..
        } if threads.contains(&a) => {
            vec![Operand::Reg(dst)]
        }
        _ => Vec::new(),
    });
    chosen(s, warps, 0, (cmp, warp))
}

pub fn table() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "nobody has the first turn",
            kind: "named barrier",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Nth(0), op!(Op::BarrierArrive { .. })),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "a warpgroup keeps its turn in every step but a row's last",
            kind: "named barrier",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Nth(1), op!(Op::BarrierArrive { .. })),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "a warpgroup keeps the last turn of all",
            kind: "named barrier",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Nth(2), op!(Op::BarrierArrive { .. })),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "a warpgroup keeps a row's last turn",
            kind: "named barrier",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Nth(3), op!(Op::BarrierArrive { .. })),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "nobody waits for the turn in every step but a row's last",
            kind: "named barrier",
            base: Base::Wide,
            edit: |s| {
                let waits = op!(Op::BarrierSync { threads: TURN, .. });
                remove(s.kernel_mut(), Nth(0), waits)
            },
            by: By::Emulator(&["NamedBarrier"]),
        },
        Mutation {
            name: "nobody waits for the last turn of all",
            kind: "named barrier",
            base: Base::Short,
            edit: |s| {
                let waits = op!(Op::BarrierSync { threads: TURN, .. });
                remove(s.kernel_mut(), Nth(1), waits)
            },
            by: By::Emulator(&["NamedBarrier"]),
        },
        Mutation {
            name: "nobody waits for a row's last turn",
            kind: "named barrier",
            base: Base::Wide,
            edit: |s| {
                let waits = op!(Op::BarrierSync { threads: TURN, .. });
                remove(s.kernel_mut(), Nth(2), waits)
            },
            by: By::Emulator(&["NamedBarrier"]),
        },
        Mutation {
            name: "the second warpgroup does not wait for its turn",
            kind: "named barrier",
            base: Base::Wide,
            edit: |s| {
                let waits = op!(Op::BarrierSync { threads: TURN, .. });
                only_threads(s.kernel_mut(), All, waits, Cmp::Lt, 256)
            },
            by: By::Emulator(&["Deadlock", "NamedBarrier"]),
        },
        Mutation {
            name: "kept steps are read before all warps have written them",
            kind: "named barrier",
            base: Base::Integers,
            edit: |s| {
                remove(
                    s.kernel_mut(),
                    All,
                    op!(Op::BarrierSync { threads: OWN, .. }),
                )
            },
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "c is stored before all warps have written it",
            kind: "named barrier",
            base: Base::Gemm,
            edit: |s| {
                remove(
                    s.kernel_mut(),
                    All,
                    op!(Op::BarrierSync { threads: OWN, .. }),
                )
            },
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "a warpgroup's barrier is for one warp less",
            kind: "named barrier",
            base: Base::Gemm,
            edit: |s| {
                change(
                    s.kernel_mut(),
                    All,
                    op!(Op::BarrierSync { threads: OWN, .. }),
                    |op| {
                        if let Op::BarrierSync { threads, .. } = op {
                            *threads = Operand::Imm(96);
                        }
                    },
                )
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "NamedBarrier", "Deadlock"]),
        },
        Mutation {
            name: "a warpgroup's barrier is for both",
            kind: "named barrier",
            base: Base::Gemm,
            edit: |s| {
                change(
                    s.kernel_mut(),
                    All,
                    op!(Op::BarrierSync { threads: OWN, .. }),
                    |op| {
                        if let Op::BarrierSync { threads, .. } = op {
                            *threads = TURN;
                        }
                    },
                )
            },
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "both warpgroups wait at one barrier, each for its own threads",
            kind: "named barrier",
            base: Base::Gemm,
            edit: |s| {
                change(
                    s.kernel_mut(),
                    All,
                    op!(Op::BarrierSync { threads: OWN, .. }),
                    |op| {
                        if let Op::BarrierSync { id, .. } = op {
                            *id = Operand::Imm(1);
                        }
                    },
                )
            },
            by: By::Emulator(&["Race", "UninitialisedMemory", "NamedBarrier"]),
        },
        Mutation {
            name: "the producer gives no registers back",
            kind: "setmaxnreg",
            base: Base::Wide,
            edit: |s| {
                let gives = op!(Op::SetMaxRegisters {
                    increase: false,
                    ..
                });
                remove(s.kernel_mut(), All, gives)
            },
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "the producer keeps 16 registers too many",
            kind: "setmaxnreg",
            base: Base::Wide,
            edit: |s| {
                let gives = op!(Op::SetMaxRegisters {
                    increase: false,
                    ..
                });
                change(s.kernel_mut(), All, gives, |op| {
                    *op = Op::SetMaxRegisters {
                        increase: false,
                        count: 56,
                    };
                })
            },
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "only two warps take their registers",
            kind: "setmaxnreg",
            base: Base::Gemm,
            edit: |s| {
                let takes = op!(Op::SetMaxRegisters { increase: true, .. });
                only_threads(s.kernel_mut(), All, takes, Cmp::Lt, 192)
            },
            by: By::Emulator(&["Warpgroup"]),
        },
        Mutation {
            name: "consumers release registers that they do not have",
            kind: "setmaxnreg",
            base: Base::Short,
            edit: |s| {
                let takes = op!(Op::SetMaxRegisters { increase: true, .. });
                change(s.kernel_mut(), All, takes, |op| {
                    *op = Op::SetMaxRegisters {
                        increase: false,
                        count: 240,
                    };
                })
            },
            by: By::Emulator(&["RegisterCount"]),
        },
        Mutation {
            name: "a number of registers that there is not",
            kind: "setmaxnreg",
            base: Base::Wide,
            edit: |s| {
                let takes = op!(Op::SetMaxRegisters { increase: true, .. });
                change(s.kernel_mut(), All, takes, |op| {
                    *op = Op::SetMaxRegisters {
                        increase: true,
                        count: 236,
                    };
                })
            },
            by: By::Verifier(&["Value"]),
        },
        Mutation {
            name: "half a warp multiplies",
            kind: "divergent branch",
            base: Base::Gemm,
            edit: |s| only_threads(s.kernel_mut(), Nth(0), op!(Op::Wgmma { .. }), Cmp::Ge, 144),
            by: By::Emulator(&["Divergence"]),
        },
        Mutation {
            name: "three warps of four multiply",
            kind: "divergent branch",
            base: Base::Wide,
            edit: |s| only_threads(s.kernel_mut(), Nth(9), op!(Op::Wgmma { .. }), Cmp::Ge, 160),
            by: By::Emulator(&["Warpgroup"]),
        },
        Mutation {
            name: "one lane waits at a barrier of warps",
            kind: "divergent branch",
            base: Base::Short,
            edit: |s| {
                let syncs = op!(Op::BarrierSync { threads: TURN, .. });
                only_threads(s.kernel_mut(), Nth(0), syncs, Cmp::Eq, 128)
            },
            by: By::Emulator(&["Divergence"]),
        },
        Mutation {
            name: "all threads of a warpgroup store c",
            kind: "thread choice",
            base: Base::Gemm,
            edit: |s| unbranch(s.kernel_mut(), op!(Op::TmaStore { .. })),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "all threads initialise the mbarriers",
            kind: "thread choice",
            base: Base::Gemm,
            edit: |s| unbranch(s.kernel_mut(), op!(Op::MbarrierInit { .. })),
            by: By::Emulator(&["Mbarrier"]),
        },
        Mutation {
            name: "one lane alone waits for its warp behind the zeros",
            kind: "divergent branch",
            base: Base::Wide,
            edit: |s| only_threads(s.kernel_mut(), Nth(0), op!(Op::WarpSync), Cmp::Eq, 32),
            by: By::Emulator(&["Divergence"]),
        },
        Mutation {
            name: "all lanes of the loader's warp load",
            kind: "thread choice",
            base: Base::Wide,
            edit: |s| loader(s, Cmp::Lt, 32),
            by: By::Emulator(&["LaneOverlap"]),
        },
        Mutation {
            name: "all lanes of the planner's warp put up jobs",
            kind: "thread choice",
            base: Base::Wide,
            edit: |s| {
                let puts = arrives_on(s.kernel(), JOB_FULL);
                unbranch(s.kernel_mut(), puts)
            },
            by: By::Emulator(&["LaneOverlap"]),
        },
        Mutation {
            name: "all lanes of the planner's warp take tiles",
            kind: "thread choice",
            base: Base::Wide,
            edit: |s| unbranch(s.kernel_mut(), op!(Op::Atomic { .. })),
            by: By::Result,
        },
        Mutation {
            name: "the loader is to plan when it has loaded",
            kind: "thread choice",
            base: Base::Short,
            edit: |s| planner(s, Cmp::Eq, 0),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "three warps plan",
            kind: "thread choice",
            base: Base::Wide,
            edit: |s| planner(s, Cmp::Ge, 1),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "nobody plans",
            kind: "thread choice",
            base: Base::Short,
            edit: |s| planner(s, Cmp::Gt, 3),
            by: By::Emulator(&["Deadlock"]),
        },
    ]
}
