//! What warps do together: named barriers, `setmaxnreg`, branches around warpgroup instructions.

use flex_block_attn_ptx::ir::{Cmp, Inst, Op, Operand, Special};

use crate::edit::Which::{All, Nth};
use crate::edit::{all, change, only_threads, op, remove, unbranch};
use crate::{Base, By, Mutation, Setup};

/// Threads of the barrier that a warpgroup waits at alone, and of that by which two take turns.
const OWN: Operand = Operand::Imm(128);
const TURN: Operand = Operand::Imm(256);

/// The thread that loads, by the threads that are told apart by index: the second; and that plans.
const LOADER: usize = 1;
const PLANNER: usize = 2;

/// Has other threads do what one thread is chosen for.
fn chosen(s: &mut Setup, nth: usize, to: Cmp, thread: u64) -> usize {
    let tid = |inst: &Inst| match inst.op {
        Op::Special {
            dst,
            which: Special::TidX,
        } => Some(Operand::Reg(dst)),
        _ => None,
    };
    let tids: Vec<Operand> = all(s.kernel()).iter().filter_map(tid).collect();
    let chooses = |op: &Op| matches!(op, Op::Compare { a, .. } if tids.contains(a));
    change(s.kernel_mut(), Nth(nth), chooses, |op| {
        if let Op::Compare { cmp, b, .. } = op {
            (*cmp, *b) = (to, Operand::Imm(thread));
        }
    })
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
            name: "a warpgroup keeps its turn in every second step",
            kind: "named barrier",
            base: Base::Wide,
            edit: |s| remove(s.kernel_mut(), Nth(1), op!(Op::BarrierArrive { .. })),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "nobody waits for the turn in every second step",
            kind: "named barrier",
            base: Base::Wide,
            edit: |s| {
                let waits = op!(Op::BarrierSync { threads: TURN, .. });
                remove(s.kernel_mut(), Nth(0), waits)
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
            name: "the output overwrites queries that other warps still multiply",
            kind: "named barrier",
            base: Base::Wide,
            edit: |s| {
                remove(
                    s.kernel_mut(),
                    Nth(0),
                    op!(Op::BarrierSync { threads: OWN, .. }),
                )
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "the output is stored before all warps have written it",
            kind: "named barrier",
            base: Base::Wide,
            edit: |s| {
                remove(
                    s.kernel_mut(),
                    Nth(1),
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
            base: Base::Short,
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
                let syncs = op!(Op::BarrierSync { threads: OWN, .. });
                only_threads(s.kernel_mut(), Nth(0), syncs, Cmp::Eq, 128)
            },
            by: By::Emulator(&["Divergence"]),
        },
        Mutation {
            name: "all threads of a warpgroup store the output",
            kind: "thread choice",
            base: Base::Wide,
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
            name: "all lanes of the loader's warp load",
            kind: "thread choice",
            base: Base::Wide,
            edit: |s| chosen(s, LOADER, Cmp::Lt, 32),
            by: By::Emulator(&["LaneOverlap"]),
        },
        Mutation {
            name: "all lanes of the planner's warp plan",
            kind: "thread choice",
            base: Base::Wide,
            edit: |s| chosen(s, PLANNER, Cmp::Ge, 32),
            by: By::Emulator(&["LaneOverlap"]),
        },
        Mutation {
            name: "the loader is to plan when it has loaded",
            kind: "thread choice",
            base: Base::Short,
            edit: |s| chosen(s, PLANNER, Cmp::Eq, 0),
            by: By::Emulator(&["Deadlock"]),
        },
    ]
}
