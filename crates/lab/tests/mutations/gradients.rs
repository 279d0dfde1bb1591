//! Attention backward: what loader, consumers and reducers hand each other, the consumers' turns, and
//! what orders the sums of thread blocks.

use flex_block_attn_ptx::Ty;
use flex_block_attn_ptx::ir::{Address, Binary, Cache, Cmp, Fence, Op, Operand, Space};

use crate::edit::Which::{All, Nth};
use crate::edit::{
    arrives_on, change, change_behind, computed, move_before, only_threads, op, remove,
};
use crate::phases::{count, flip, no_release, no_wait};
use crate::{Base, By, Mutation, Setup};

// mbarriers, in the order of their initialisation: those of rings are of the first of two stages.
const KEYS_FULL: usize = 0;
const Q_FULL: usize = 1;
const Q_EMPTY: usize = 2;
const DOUT_FULL: usize = 5;
const GRADIENTS_FULL: usize = 9;
const GRADIENTS_EMPTY: usize = 10;
// Those of the first consumer.
const DQ_FULL: usize = 13;
const DQ_EMPTY: usize = 15;

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

/// Puts another wait in the place of those for sums to be written.
fn wait_for_sums(s: &mut Setup, wait: Op) -> usize {
    let written = op!(Op::BulkWait {
        pending: 0,
        read: false
    });
    // The last is for dk and dv.
    (0..2)
        .map(|_| change(s.kernel_mut(), Nth(0), written, |op| *op = wait.clone()))
        .sum()
}

pub fn table() -> Vec<Mutation> {
    let mut table = tiles();
    table.extend(exchange());
    table.extend(sums());
    table.extend(tickets());
    table
}

/// Keys, queries with their notes, gradients of the output.
fn tiles() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "keys and values are not waited for",
            kind: "missing full wait",
            base: Base::Gradients,
            edit: |s| no_wait(s, KEYS_FULL),
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
            base: Base::InOrder,
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
            base: Base::InOrder,
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
            base: Base::InOrder,
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
            base: Base::InOrder,
            edit: |s| no_wait(s, DQ_EMPTY),
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "consumers wait for a first unit's way out",
            kind: "parity",
            base: Base::InOrder,
            edit: |s| flip(s, DQ_EMPTY),
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "three warps make a unit",
            kind: "mbarrier count",
            base: Base::InOrder,
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
            base: Base::InOrder,
            edit: |s| no_release(s, DQ_EMPTY),
            by: By::Emulator(&["Deadlock"]),
        },
    ]
}

/// What orders the sums of thread blocks.
fn tickets() -> Vec<Mutation> {
    vec![
        Mutation {
            name: "sums do not wait for their turn",
            kind: "order of sums",
            base: Base::InOrder,
            edit: |s| {
                let (asks, compares) = (op!(Op::LoadAcquire { .. }), op!(Op::Compare { .. }));
                change_behind(s.kernel_mut(), asks, compares, |mut op| {
                    if let Op::Compare { a, b, .. } = &mut op {
                        *b = *a;
                    }
                    Some(op)
                })
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a ticket is read without acquiring",
            kind: "order of sums",
            base: Base::InOrder,
            edit: |s| {
                change(s.kernel_mut(), All, op!(Op::LoadAcquire { .. }), |op| {
                    if let Op::LoadAcquire { dst, address, .. } = *op {
                        *op = Op::Load {
                            space: Space::Global,
                            cache: Cache::Volatile,
                            ty: Ty::U32,
                            dst: vec![dst],
                            address,
                        };
                    }
                })
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a ticket is written without releasing",
            kind: "order of sums",
            base: Base::InOrder,
            edit: |s| {
                change(s.kernel_mut(), All, op!(Op::StoreRelease { .. }), |op| {
                    if let Op::StoreRelease { src, address, .. } = *op {
                        *op = Op::Store {
                            space: Space::Global,
                            ty: Ty::U32,
                            src: vec![src],
                            address,
                        };
                    }
                })
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a ticket is written before the sums",
            kind: "order of sums",
            base: Base::InOrder,
            edit: |s| {
                let read = Op::BulkWait {
                    pending: 0,
                    read: true,
                };
                wait_for_sums(s, read)
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "a ticket is written when the sums before are",
            kind: "order of sums",
            base: Base::InOrder,
            edit: |s| {
                let later = Op::BulkWait {
                    pending: 1,
                    read: false,
                };
                wait_for_sums(s, later)
            },
            by: By::Emulator(&["Race"]),
        },
        Mutation {
            name: "no proxy fence between a ticket and the sums",
            kind: "proxy fence",
            base: Base::InOrder,
            edit: |s| remove(s.kernel_mut(), All, op!(Op::Fence(Fence::ProxyAsyncGlobal))),
            by: By::Emulator(&["ProxyFence"]),
        },
        Mutation {
            name: "a proxy fence of shared memory between a ticket and the sums",
            kind: "proxy fence",
            base: Base::InOrder,
            edit: |s| {
                change(
                    s.kernel_mut(),
                    All,
                    op!(Op::Fence(Fence::ProxyAsyncGlobal)),
                    |op| *op = Op::Fence(Fence::ProxyAsyncShared),
                )
            },
            by: By::Emulator(&["ProxyFence"]),
        },
        Mutation {
            name: "a ticket names the next tile",
            kind: "order of sums",
            base: Base::InOrder,
            edit: |s| {
                let more = (Binary::Add, Operand::Imm(1));
                computed(
                    s.kernel_mut(),
                    All,
                    op!(Op::StoreRelease { .. }),
                    more,
                    |op| match op {
                        Op::StoreRelease { src, .. } => Some(src),
                        _ => None,
                    },
                )
            },
            by: By::Emulator(&["Deadlock"]),
        },
        Mutation {
            name: "a neighbour's ticket is written",
            kind: "order of sums",
            base: Base::InOrder,
            edit: |s| {
                change(s.kernel_mut(), All, op!(Op::StoreRelease { .. }), |op| {
                    if let Op::StoreRelease {
                        address: Address { offset, .. },
                        ..
                    } = op
                    {
                        *offset += 4;
                    }
                })
            },
            by: By::Emulator(&["Deadlock", "Race"]),
        },
        Mutation {
            name: "all thread blocks draw the same number",
            kind: "counter",
            base: Base::InOrder,
            edit: |s| {
                change(s.kernel_mut(), All, op!(Op::Atomic { .. }), |op| {
                    if let Op::Atomic { src, .. } = op {
                        *src = Operand::Imm(0);
                    }
                })
            },
            by: By::Emulator(&["Race", "Deadlock"]),
        },
    ]
}
