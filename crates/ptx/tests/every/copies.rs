//! Bulk copies and products, of warpgroups and of warps.

use super::*;

pub fn cases() -> Vec<(&'static str, Vec<Op>)> {
    vec![
        ("tensor_copies", tensor_copies()),
        ("bulk_copies", bulk_copies()),
        ("products_of_shared", products(true)),
        ("products_of_registers", products(false)),
        ("widths", widths()),
        ("products_of_warps", products_of_warps()),
    ]
}

fn tensor_copies() -> Vec<Op> {
    let (map, barrier) = (d(1), at(r(0), 2048));
    let (dst, src) = (at(r(0), 1024), at(r(0), 1024));
    let mut ops = vec![
        Op::ParamAddress { dst: map, param: 3 },
        Op::PrefetchMap { map },
    ];
    for rank in 1..=5 {
        let coordinates: Vec<_> = (1..=rank).map(|n| reg(r(n))).collect();
        for (multicast, hint) in [
            (None, None),
            (Some(reg(h(0))), None),
            (None, Some(d(2))),
            (Some(imm(3)), Some(d(2))),
        ] {
            let coordinates = coordinates.clone();
            ops.push(Op::TmaLoad {
                dst,
                map,
                coordinates,
                barrier,
                multicast,
                hint,
            });
        }
        for hint in [None, Some(d(2))] {
            ops.push(Op::TmaStore {
                map,
                coordinates: coordinates.clone(),
                src,
                hint,
            });
        }
        ops.push(Op::TmaReduceAdd {
            map,
            coordinates,
            src,
        });
    }
    let coordinates = vec![imm(0), imm(0xffff_ffff), reg(r(1))];
    ops.push(Op::TmaStore {
        map,
        coordinates,
        src,
        hint: None,
    });
    ops
}

fn bulk_copies() -> Vec<Op> {
    let (local, barrier, global) = (at(r(0), 1024), at(r(0), 2048), at(d(0), 64));
    let mut ops = vec![
        Op::CachePolicy {
            dst: d(1),
            which: Policy::EvictLast,
        },
        Op::CachePolicy {
            dst: d(2),
            which: Policy::EvictFirst,
        },
    ];
    for bytes in [imm(256), reg(r(1))] {
        for hint in [None, Some(d(1))] {
            ops.push(Op::BulkLoad {
                dst: local,
                src: global,
                bytes,
                barrier,
                hint,
            });
        }
        ops.push(Op::BulkStore {
            dst: global,
            src: local,
            bytes,
        });
        for ty in [Ty::U32, Ty::S32, Ty::U64, Ty::F32] {
            ops.push(Op::BulkReduceAdd {
                ty,
                dst: global,
                src: local,
                bytes,
            });
        }
    }
    ops.push(Op::BulkCommit);
    for pending in [0, 3] {
        for read in [false, true] {
            ops.push(Op::BulkWait { pending, read });
        }
    }
    ops
}

/// One product, between the instructions that it needs.
fn product(
    ops: &mut Vec<Op>,
    element: Element,
    a: MatrixA,
    b_transposed: bool,
    accumulate: Operand,
) {
    let (n, acc) = (16, (0..8).map(f).collect());
    ops.push(Op::WgmmaFence);
    ops.push(Op::Wgmma {
        element,
        n,
        acc,
        a,
        b: reg(d(1)),
        b_transposed,
        accumulate,
    });
    ops.push(Op::WgmmaCommit);
    ops.push(Op::WgmmaWait { pending: 0 });
}

fn products(shared: bool) -> Vec<Op> {
    let mut ops = Vec::new();
    let a = |transposed| match shared {
        true => MatrixA::Shared {
            descriptor: reg(d(0)),
            transposed,
        },
        false => MatrixA::Registers([0, 1, 2, 3].map(r)),
    };
    for element in [Element::Bf16, Element::F16, Element::E4m3, Element::E5m2] {
        for accumulate in [imm(0), imm(1), reg(p(0))] {
            product(&mut ops, element, a(false), false, accumulate);
        }
    }
    for element in [Element::Bf16, Element::F16] {
        product(&mut ops, element, a(false), true, imm(1));
        if shared {
            product(&mut ops, element, a(true), false, imm(1));
        }
    }
    ops
}

/// Products of many widths, each from zero.
fn widths() -> Vec<Op> {
    let mut ops = Vec::new();
    for n in [8, 24, 64, 128, 256] {
        ops.extend([
            Op::WgmmaFence,
            Op::Wgmma {
                element: Element::Bf16,
                n,
                acc: (0..n / 2).map(f).collect(),
                a: MatrixA::Shared {
                    descriptor: reg(d(0)),
                    transposed: false,
                },
                b: reg(d(1)),
                b_transposed: false,
                accumulate: imm(0),
            },
            Op::WgmmaCommit,
            Op::WgmmaWait { pending: 1 },
            Op::WgmmaWait { pending: 0 },
        ]);
    }
    ops
}

fn products_of_warps() -> Vec<Op> {
    let product = |element| Op::Mma {
        element,
        acc: [0, 1, 2, 3].map(f),
        a: [0, 1, 2, 3].map(r),
        b: [4, 5].map(r),
    };
    [Element::Bf16, Element::F16].map(product).into()
}
