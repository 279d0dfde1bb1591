//! Attention backward: what loader, consumers and reducers hand each other, the consumers' turns, what
//! sums of integers need, and where dk and dv are stored.

use flex_block_attn_ptx::Ty;
use flex_block_attn_ptx::ir::{Binary, Cmp, Fence, Op, Operand, Space};

use crate::edit::Which::{All, Nth, Within};
use crate::edit::{all, arrives_on, change, move_before, only_threads, op, param, remove};
use crate::phases::{count, flip, no_release, no_wait};
use crate::{Base, By, Mutation, Setup};

// mbarriers, in the order of their initialisation: those of rings are of the first of two stages.
const KEYS_FULL: usize = 0;
const VALUES_FULL: usize = 1;
const Q_FULL: usize = 2;
const Q_EMPTY: usize = 3;
const DOUT_FULL: usize = 6;
const GRADIENTS_FULL: usize = 10;
const GRADIENTS_EMPTY: usize = 11;
// Those of the first consumer.
const DQ_FULL: usize = 14;
const DQ_EMPTY: usize = 16;

/// Waits of a consumer for its turn: its barrier's number is in a register.
fn waits_for_turn(op: &Op) -> bool {
    matches!(
        op,
        Op::BarrierSync {
            id: Operand::Reg(_),
            ..
        }
    )
}

/// Gives a stage back before the wait for the product that reads it.
fn early_release(s: &mut Setup, nth: usize) -> usize {
    let releases = arrives_on(s.kernel(), nth);
    move_before(s.kernel_mut(), releases, op!(Op::WgmmaWait { .. }))
}

pub fn table() -> Vec<Mutation> {
    let mut table = tiles();
    table.extend(exchange());
    table.extend(sums());
    table.extend(integers());
    table.extend(stores());
    table.extend(starts());
    table
}

/// Keys, queries with their notes, gradients of the output.
fn tiles() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "keys are not waited for",
            kind: "missing full wait",
            base: Base::Gradients,
            edit: |s| no_wait(s, KEYS_FULL),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "values are not waited for",
            kind: "missing full wait",
            base: Base::Gradients,
            edit: |s| no_wait(s, VALUES_FULL),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "the output's gradients are not waited for",
            kind: "missing full wait",
            base: Base::Gradients,
            edit: |s| no_wait(s, DOUT_FULL),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "notes are read before they are there",
            kind: "missing full wait",
            base: Base::Integers,
            edit: |s| {
                let waits = crate::edit::waits_on(s.kernel(), Q_FULL);
                only_threads(s.kernel_mut(), All, waits, Cmp::Ge, 128)
            },
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "queries are given back before their product is over",
            kind: "early release",
            base: Base::Gradients,
            edit: |s| early_release(s, Q_EMPTY),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "reducers do not give notes back",
            kind: "missing release",
            base: Base::Gradients,
            edit: |s| {
                let releases = arrives_on(s.kernel(), Q_EMPTY);
                only_threads(s.kernel_mut(), All, releases, Cmp::Ge, 128)
            },
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "notes are overwritten when consumers have read them",
            kind: "mbarrier count",
            base: Base::Integers,
            edit: |s| count(s, Q_EMPTY, 8),
            by: By::Emulator(&["Race", "Mbarrier"]),
        },
    ]
}

/// Gradients of the scores, which consumers exchange, and their turns.
fn exchange() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "the other consumer's gradients are not waited for",
            kind: "missing full wait",
            base: Base::Gradients,
            edit: |s| no_wait(s, GRADIENTS_FULL),
            by: By::Emulator(&["Race", "UninitialisedMemory"]),
        },
        Mutation {
            name: "gradients overwrite those that are still multiplied",
            kind: "missing empty wait",
            base: Base::Gradients,
            edit: |s| no_wait(s, GRADIENTS_EMPTY),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "gradients of scores are given back before dq is made of them",
            kind: "early release",
            base: Base::Gradients,
            edit: |s| early_release(s, GRADIENTS_EMPTY),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "gradients of one consumer are enough",
            kind: "mbarrier count",
            base: Base::Gradients,
            edit: |s| count(s, GRADIENTS_FULL, 4),
            by: By::Emulator(&["Race", "Mbarrier", "Deadlock"]),
        },
        Mutation {
            name: "a consumer does not say that its gradients are there",
            kind: "missing release",
            base: Base::Integers,
            edit: |s| no_release(s, GRADIENTS_FULL),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "no proxy fences in the backward pass",
            kind: "proxy fence",
            base: Base::Gradients,
            edit: |s| remove(s.kernel_mut(), All, op!(Op::Fence(Fence::ProxyAsyncShared))),
            by: By::Emulator(&["ProxyFence"]),
        },
        Mutation {
            name: "consumers do not wait for their turns",
            kind: "turns",
            base: Base::Gradients,
            edit: |s| remove(s.kernel_mut(), All, waits_for_turn),
            by: By::Emulator(&["Barrier", "NamedBarrier"]),
        },
        Mutation {
            name: "nobody gives the first turn",
            kind: "turns",
            base: Base::Gradients,
            edit: |s| remove(s.kernel_mut(), Nth(0), op!(Op::BarrierArrive { .. })),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "the last tile's turn is not passed on",
            kind: "turns",
            base: Base::Gradients,
            edit: |s| remove(s.kernel_mut(), Nth(3), op!(Op::BarrierArrive { .. })),
            by: By::Emulator(&["Deadlock"]),
        },
    ]
}

/// dq on its way out.
fn sums() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "a reducer does not wait for its unit",
            kind: "missing full wait",
            base: Base::Gradients,
            edit: |s| no_wait(s, DQ_FULL),
            by: By::Emulator(&["Race", "ProxyFence", "UninitialisedMemory"]),
        },
        Mutation {
            name: "a unit overwrites one that is on its way out",
            kind: "missing empty wait",
            base: Base::Integers,
            edit: |s| no_wait(s, DQ_EMPTY),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "consumers wait for a first unit's way out",
            kind: "parity",
            base: Base::Integers,
            edit: |s| flip(s, DQ_EMPTY),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "three warps make a unit",
            kind: "mbarrier count",
            base: Base::Integers,
            edit: |s| count(s, DQ_FULL, 3),
            by: By::Emulator(&["Race", "ProxyFence", "Mbarrier", "UninitialisedMemory"]),
        },
        Mutation {
            name: "a unit's place is given back before it was read",
            kind: "bulk group",
            base: Base::Gradients,
            edit: |s| remove(s.kernel_mut(), All, op!(Op::BulkWait { read: true, .. })),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "sums are not committed",
            kind: "bulk group",
            base: Base::Gradients,
            edit: |s| remove(s.kernel_mut(), Nth(0), op!(Op::BulkCommit)),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a reducer does not give its unit back",
            kind: "missing release",
            base: Base::Integers,
            edit: |s| no_release(s, DQ_EMPTY),
            by: By::Emulator(&["Deadlock"]),
        },
    ]
}

/// Sums of integers.
fn integers() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "integers are added as if they were floats",
            kind: "type of sums",
            base: Base::Integers,
            edit: |s| {
                change(s.kernel_mut(), All, op!(Op::BulkReduceAdd { .. }), |op| {
                    if let Op::BulkReduceAdd { ty, .. } = op {
                        *ty = Ty::F32;
                    }
                })
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "nobody copies the steps of integers",
            kind: "missing copy",
            base: Base::Integers,
            edit: |s| remove(s.kernel_mut(), Nth(2), op!(Op::BulkLoad { .. })),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "steps of integers are copied and not expected",
            kind: "expect-tx",
            base: Base::Integers,
            edit: |s| {
                // Behind those for keys, values and queries: for dout, deltas and steps.
                change(
                    s.kernel_mut(),
                    Nth(3),
                    op!(Op::MbarrierArriveExpect { .. }),
                    |op| {
                        if let Op::MbarrierArriveExpect { bytes, .. } = op {
                            *bytes = Operand::Imm(64 * 128 * 2 + 4 * 64);
                        }
                    },
                )
            },
            by: By::Emulator(&["Mbarrier", "Deadlock", "Race", "UninitialisedMemory"]),
        },
    ]
}

/// Stores of dk and dv: nothing else is stored two words at a time.
fn is_stored(op: &Op) -> bool {
    matches!(op, Op::Store { space: Space::Global, src, .. } if src.len() == 2)
}

/// dk and dv.
fn stores() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "dk and dv of keys behind the last are stored",
            kind: "guard",
            base: Base::Gradients,
            edit: |s| {
                let kv_len = param(s.kernel(), "kv_len");
                let guards = move |op: &Op| matches!(op, Op::Compare { b, .. } if *b == kv_len);
                let instructions = all(s.kernel());
                let number = instructions.iter().filter(|i| guards(&i.op)).count();
                // Behind those that hide scores and choose lists: one for each row of a thread.
                change(s.kernel_mut(), Within(number - 2, number), guards, |op| {
                    if let Op::Compare { b, .. } = op {
                        *b = Operand::Imm(u32::MAX.into());
                    }
                })
            },
            by: By::Emulator(&["OutOfBounds"]),
        },
        Mutation {
            name: "dk and dv in each other's place",
            kind: "gradients' place",
            base: Base::Gradients,
            edit: |s| {
                let at = |name: &str| {
                    let found = s
                        .kernel()
                        .params
                        .iter()
                        .position(|param| param.name == name);
                    found.expect("the kernel has it") as u32
                };
                let (dk, dv) = (at("dk"), at("dv"));
                change(s.kernel_mut(), All, op!(Op::Param { .. }), |op| {
                    if let Op::Param { param, .. } = op {
                        *param = match *param {
                            own if own == dk => dv,
                            own if own == dv => dk,
                            own => own,
                        };
                    }
                })
            },
            by: By::Result,
        },
        Mutation {
            name: "columns of dk and dv are half as far apart",
            kind: "gradients' place",
            base: Base::Gradients,
            edit: |s| {
                change(s.kernel_mut(), All, is_stored, |op| {
                    if let Op::Store { address, .. } = op {
                        address.offset /= 2;
                    }
                })
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "dk is not multiplied by the scale",
            kind: "scale",
            base: Base::Integers,
            edit: |s| {
                let scale = param(s.kernel(), "scale");
                let in_place = move |op: &Op| {
                    matches!(
                        *op,
                        Op::Binary { op: Binary::Mul, dst, a, b, .. }
                            if a == Operand::Reg(dst) && b == scale
                    )
                };
                remove(s.kernel_mut(), All, in_place)
            },
            by: By::Result,
        },
        Mutation {
            name: "the last columns of dk are not stored",
            kind: "missing store",
            base: Base::Gradients,
            edit: |s| {
                // Eight stores of each of two rows: dv's, then dk's.
                remove(s.kernel_mut(), Nth(31), is_stored)
            },
            by: By::Result,
        },
    ]
}

/// An early start: waits for the launch before are the loader's, of the warps behind it, and the
/// consumers'.
fn starts() -> Vec<Mutation> {
    let mutation = |name, edit| Mutation {
        name,
        kind: "early start",
        base: Base::Gradients,
        edit,
        by: By::Emulator(&["Early"]),
    };
    vec![
        mutation("the loader does not wait for the launch before", |s| {
            remove(s.kernel_mut(), Nth(0), op!(Op::GridWait))
        }),
        mutation("reducers do not wait for the launch before", |s| {
            remove(s.kernel_mut(), Nth(1), op!(Op::GridWait))
        }),
        mutation("consumers do not wait for the launch before", |s| {
            remove(s.kernel_mut(), Nth(2), op!(Op::GridWait))
        }),
    ]
}
