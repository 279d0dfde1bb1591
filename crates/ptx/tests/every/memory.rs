//! Instructions on memory.

use super::*;

pub fn cases() -> Vec<(&'static str, Vec<Op>)> {
    vec![
        ("loads", loads()),
        ("stores", stores()),
        ("atomics", atomics()),
        ("reductions", reductions()),
        ("matrices", matrices()),
        ("fences", fences()),
    ]
}

const TYPES: [Ty; 12] = [
    Ty::B8,
    Ty::U8,
    Ty::B16,
    Ty::U16,
    Ty::S16,
    Ty::B32,
    Ty::U32,
    Ty::S32,
    Ty::B64,
    Ty::U64,
    Ty::S64,
    Ty::F32,
];
const SPACES: [Space; 3] = [Space::Global, Space::Shared, Space::Cluster];

/// An address in this space.
fn place(space: Space, offset: i32) -> Address {
    let base = if space == Space::Global { d(0) } else { r(0) };
    at(base, offset)
}

/// Sizes of vectors of this type: 16 bytes at most.
fn sizes(ty: Ty) -> impl Iterator<Item = u32> {
    [1, 2, 4]
        .into_iter()
        .filter(move |count| count * ty.bytes() <= 16)
}

fn loads() -> Vec<Op> {
    let mut ops = Vec::new();
    let mut add = |space, cache, ty, count: u32| {
        let n = 10 + ops.len() as u32;
        let dst = (n..n + count).map(|n| of(ty, n)).collect();
        ops.push(Op::Load {
            space,
            cache,
            ty,
            dst,
            address: place(space, 16 * (n as i32 - 20)),
        });
    };
    for ty in TYPES {
        sizes(ty).for_each(|count| add(Space::Global, Cache::Default, ty, count));
    }
    for space in SPACES {
        for count in [1, 2, 4] {
            add(space, Cache::Default, Ty::F32, count);
            add(space, Cache::Volatile, Ty::U32, count);
        }
    }
    for count in [1, 2, 4] {
        add(Space::Global, Cache::Constant, Ty::F32, count);
    }
    for scope in [Scope::Cta, Scope::Cluster, Scope::Gpu] {
        for ty in [Ty::U32, Ty::U64] {
            let dst = of(ty, 10 + ops.len() as u32);
            ops.push(Op::LoadAcquire {
                scope,
                ty,
                dst,
                address: at(d(0), 0),
            });
        }
    }
    ops
}

fn stores() -> Vec<Op> {
    let mut ops = Vec::new();
    let mut add = |space, ty, count: u32| {
        let src = (1..=count).map(|n| reg(of(ty, n))).collect();
        ops.push(Op::Store {
            space,
            ty,
            src,
            address: place(space, 0),
        });
        let src = (1..=count).map(|_| constant(ty)).collect();
        ops.push(Op::Store {
            space,
            ty,
            src,
            address: place(space, 16),
        });
    };
    for ty in TYPES {
        sizes(ty).for_each(|count| add(Space::Global, ty, count));
    }
    for space in [Space::Shared, Space::Cluster] {
        [1, 2, 4]
            .into_iter()
            .for_each(|count| add(space, Ty::F32, count));
    }
    for scope in [Scope::Cta, Scope::Cluster, Scope::Gpu] {
        ops.push(Op::StoreRelease {
            scope,
            ty: Ty::U32,
            src: reg(r(1)),
            address: at(d(0), 8),
        });
        ops.push(Op::StoreRelease {
            scope,
            ty: Ty::U64,
            src: imm(1),
            address: at(d(0), 8),
        });
    }
    ops
}

fn atomics() -> Vec<Op> {
    use AtomicOp::*;
    let mut ops = Vec::new();
    let mut add = |op, order, scope, space, ty, src| {
        let dst = of(ty, 10 + ops.len() as u32);
        let address = place(space, 8);
        let swap = (op == CompareAndSwap).then_some(reg(of(ty, 2)));
        ops.push(Op::Atomic {
            op,
            order,
            scope,
            space,
            ty,
            dst,
            address,
            src,
            swap,
        });
    };
    let table: [(AtomicOp, &[Ty]); 7] = [
        (
            Add,
            &[Ty::U32, Ty::S32, Ty::U64, Ty::F32, Ty::F16x2, Ty::Bf16x2],
        ),
        (Min, &[Ty::U32, Ty::S32, Ty::U64, Ty::S64]),
        (Max, &[Ty::U32, Ty::S32, Ty::U64, Ty::S64]),
        (And, &[Ty::B32, Ty::B64, Ty::U32]),
        (Or, &[Ty::B32, Ty::B64, Ty::U32]),
        (Exchange, &[Ty::B32, Ty::B64, Ty::U32]),
        (CompareAndSwap, &[Ty::B16, Ty::B32, Ty::B64, Ty::U32]),
    ];
    for (op, types) in table {
        for &ty in types {
            add(
                op,
                Order::Relaxed,
                Scope::Gpu,
                Space::Global,
                ty,
                reg(of(ty, 1)),
            );
        }
    }
    for order in [
        Order::Relaxed,
        Order::Acquire,
        Order::Release,
        Order::AcquireRelease,
    ] {
        for scope in [Scope::Cta, Scope::Cluster, Scope::Gpu] {
            add(Add, order, scope, Space::Global, Ty::U32, imm(1));
        }
    }
    for space in [Space::Shared, Space::Cluster] {
        add(Add, Order::Relaxed, Scope::Cta, space, Ty::U32, imm(1));
        add(
            CompareAndSwap,
            Order::Acquire,
            Scope::Cta,
            space,
            Ty::B32,
            imm(1),
        );
    }
    ops
}

fn reductions() -> Vec<Op> {
    use AtomicOp::*;
    let mut ops = Vec::new();
    let mut add = |op, scope, space, ty, count: u32| {
        let src = (1..=count).map(|n| reg(of(ty, n))).collect();
        ops.push(Op::Reduce {
            op,
            scope,
            space,
            ty,
            address: place(space, 0),
            src,
        });
    };
    let table: [(AtomicOp, &[Ty]); 5] = [
        (
            Add,
            &[Ty::U32, Ty::S32, Ty::U64, Ty::F32, Ty::F16x2, Ty::Bf16x2],
        ),
        (Min, &[Ty::U32, Ty::S32, Ty::U64, Ty::S64]),
        (Max, &[Ty::U32, Ty::S32, Ty::U64, Ty::S64]),
        (And, &[Ty::B32, Ty::B64]),
        (Or, &[Ty::B32, Ty::B64]),
    ];
    for (op, types) in table {
        types
            .iter()
            .for_each(|&ty| add(op, Scope::Gpu, Space::Global, ty, 1));
    }
    for count in [2, 4] {
        add(Add, Scope::Gpu, Space::Global, Ty::F32, count);
        for op in [Add, Min, Max] {
            add(op, Scope::Gpu, Space::Global, Ty::F16x2, count);
            add(op, Scope::Gpu, Space::Global, Ty::Bf16x2, count);
        }
    }
    for space in SPACES {
        for scope in [Scope::Cta, Scope::Cluster, Scope::Gpu] {
            add(Add, scope, space, Ty::F32, 1);
        }
    }
    ops.push(Op::Reduce {
        op: Add,
        scope: Scope::Gpu,
        space: Space::Global,
        ty: Ty::U32,
        address: at(d(0), 0),
        src: vec![imm(1)],
    });
    ops
}

fn matrices() -> Vec<Op> {
    let mut ops = Vec::new();
    for transposed in [false, true] {
        for count in [1, 2, 4] {
            let n = 10 + 4 * ops.len() as u32;
            let dst: Vec<_> = (n..n + count).map(r).collect();
            ops.push(Op::LoadMatrix {
                transposed,
                dst: dst.clone(),
                address: at(r(0), 512),
            });
            ops.push(Op::StoreMatrix {
                transposed,
                src: dst,
                address: at(r(0), 0),
            });
        }
    }
    ops
}

fn fences() -> Vec<Op> {
    [
        Fence::ProxyAsyncShared,
        Fence::ProxyAsyncGlobal,
        Fence::MbarrierInit,
        Fence::AcquireRelease(Scope::Cta),
        Fence::AcquireRelease(Scope::Cluster),
        Fence::AcquireRelease(Scope::Gpu),
    ]
    .map(Op::Fence)
    .into()
}
