//! What the verifier refuses, and with which words.
//!
//! Each test lists wrong instructions or kernels; the expectations, in `snapshots/`, are what the
//! verifier says to them.

#[allow(dead_code)] // shared with other tests
mod every;

use every::*;
use flex_block_attn_ptx::ir::*;
use flex_block_attn_ptx::verify::{Place, VerifyError};
use flex_block_attn_ptx::{Element, Ty, verify};

/// Compares a text with `snapshots/`.
fn expect(name: &str, text: &str) {
    insta::with_settings!({ omit_expression => true }, { insta::assert_snapshot!(name, text) });
}

fn refusal(kernel: &Kernel) -> VerifyError {
    match verify(kernel) {
        Err(error) => error,
        Ok(()) => panic!("passes, but should not: {:?}", kernel.body.last()),
    }
}

/// What is said about each instruction, on two lines: the instruction, the fault.
fn words(ops: impl IntoIterator<Item = Op>) -> String {
    let refusals = ops.into_iter().map(|op| {
        let VerifyError { place, fault, .. } = refusal(&around("k", &[op]));
        match place {
            Place::Statement { text, .. } => format!("{text}\n    {fault}"),
            Place::Kernel => panic!("{fault} has no place"),
        }
    });
    refusals.collect::<Vec<_>>().join("\n")
}

/// Of each type the operation is tried with those that it does not exist for.
fn wrong_types(types: &[Ty], op: impl Fn(Ty) -> Op) -> Vec<Op> {
    types.iter().map(|&ty| op(ty)).collect()
}

#[test]
fn types() {
    use Ty::*;
    let unary = |op, types: &[Ty]| {
        wrong_types(types, |ty| Op::Unary {
            op,
            ty,
            dst: of(ty, 1),
            a: reg(of(ty, 0)),
        })
    };
    let binary = |op, types: &[Ty]| {
        wrong_types(types, |ty| {
            let (a, b) = (reg(of(ty, 0)), reg(of(ty, 1)));
            Op::Binary {
                op,
                ty,
                dst: of(ty, 2),
                a,
                b,
            }
        })
    };
    let ternary = |op, types: &[Ty]| {
        wrong_types(types, |ty| {
            let [a, b, c] = [0, 1, 2].map(|n| reg(of(ty, n)));
            Op::Ternary {
                op,
                ty,
                dst: of(ty, 3),
                a,
                b,
                c,
            }
        })
    };
    let compare = |cmp, types: &[Ty]| {
        wrong_types(types, |ty| {
            let (a, b) = (reg(of(ty, 0)), reg(of(ty, 1)));
            Op::Compare {
                cmp,
                ty,
                dst: p(5),
                a,
                b,
            }
        })
    };
    let convert = |to, from| Op::Convert {
        to,
        from,
        dst: of(to, 1),
        src: reg(of(from, 0)),
    };
    expect(
        "types",
        &words(
            [
                wrong_types(&[U8, F16, Bf16x2], |ty| Op::Mov {
                    ty,
                    dst: of(ty, 1),
                    src: reg(of(ty, 0)),
                }),
                unary(Unary::Neg, &[U32, B32, Pred]),
                unary(Unary::Abs, &[U64]),
                unary(Unary::Not, &[F32, F16x2]),
                unary(Unary::PopCount, &[U16, F32]),
                unary(Unary::LeadingZeros, &[F32]),
                unary(Unary::ReverseBits, &[Pred]),
                unary(Unary::Exp2, &[F16x2, U32]),
                unary(Unary::Log2, &[Bf16x2]),
                unary(Unary::Reciprocal, &[S32]),
                unary(Unary::Sqrt, &[B32]),
                unary(Unary::ReciprocalSqrt, &[U64]),
                binary(Binary::Add, &[B32, Pred, U8]),
                binary(Binary::Sub, &[B64]),
                binary(Binary::Mul, &[B16]),
                binary(Binary::Min, &[B32]),
                binary(Binary::Max, &[Pred]),
                binary(Binary::MulHigh, &[F32]),
                binary(Binary::Div, &[F16x2]),
                binary(Binary::Rem, &[F32]),
                binary(Binary::And, &[F32]),
                binary(Binary::Or, &[U8]),
                binary(Binary::Xor, &[Bf16x2]),
                ternary(Ternary::Fma, &[U32]),
                ternary(Ternary::Mad, &[F32]),
                compare(Cmp::Eq, &[Pred, F16x2]),
                compare(Cmp::Lt, &[B32]),
                vec![
                    Op::Binary {
                        op: Binary::Shl,
                        ty: F32,
                        dst: f(1),
                        a: reg(f(0)),
                        b: imm(1),
                    },
                    Op::Binary {
                        op: Binary::Shr,
                        ty: Pred,
                        dst: p(1),
                        a: reg(p(0)),
                        b: imm(1),
                    },
                    Op::MulWide {
                        ty: U64,
                        dst: d(2),
                        a: reg(d(0)),
                        b: reg(d(1)),
                        c: None,
                    },
                    Op::Select {
                        ty: Pred,
                        dst: p(3),
                        a: reg(p(0)),
                        b: reg(p(1)),
                        cond: p(2),
                    },
                    Op::Join {
                        ty: U64,
                        dst: d(0),
                        low: reg(r(0)),
                        high: reg(r(1)),
                    },
                    Op::Split {
                        ty: U64,
                        low: r(0),
                        high: r(1),
                        src: reg(d(0)),
                    },
                    convert(F32, F32),
                    convert(B32, U64),
                    convert(U32, Bf16x2),
                    convert(F16, U32),
                    convert(S64, F16),
                ],
            ]
            .concat(),
        ),
    );
}

#[test]
fn types_in_memory() {
    use Ty::*;
    let atomic = |op, ty, swap| Op::Atomic {
        op,
        order: Order::Relaxed,
        scope: Scope::Gpu,
        space: Space::Global,
        ty,
        dst: of(ty, 3),
        address: at(d(0), 0),
        src: reg(of(ty, 1)),
        swap,
    };
    let reduce = |op, space, ty, count: u32| Op::Reduce {
        op,
        scope: Scope::Gpu,
        space,
        ty,
        address: if space == Space::Global {
            at(d(0), 0)
        } else {
            at(r(0), 0)
        },
        src: (1..=count).map(|n| reg(of(ty, n))).collect(),
    };
    let load = |space, cache, ty| Op::Load {
        space,
        cache,
        ty,
        dst: vec![of(ty, 3)],
        address: if space == Space::Global {
            at(d(0), 0)
        } else {
            at(r(0), 0)
        },
    };
    let warp = |op, ty| Op::WarpReduce {
        op,
        ty,
        dst: of(ty, 1),
        src: reg(of(ty, 0)),
    };
    expect(
        "types_in_memory",
        &words([
            load(Space::Global, Cache::Default, Bf16x2),
            load(Space::Shared, Cache::Constant, F32),
            Op::Store {
                space: Space::Shared,
                ty: Pred,
                src: vec![reg(p(0))],
                address: at(r(0), 0),
            },
            Op::LoadAcquire {
                scope: Scope::Gpu,
                ty: F16,
                dst: h(0),
                address: at(d(0), 0),
            },
            Op::StoreRelease {
                scope: Scope::Gpu,
                ty: Pred,
                src: reg(p(0)),
                address: at(d(0), 0),
            },
            atomic(AtomicOp::Add, S64, None),
            atomic(AtomicOp::Min, F32, None),
            atomic(AtomicOp::Max, F16x2, None),
            atomic(AtomicOp::And, F32, None),
            atomic(AtomicOp::Or, U16, None),
            atomic(AtomicOp::Exchange, F32, None),
            atomic(AtomicOp::CompareAndSwap, F32, Some(reg(f(2)))),
            atomic(AtomicOp::CompareAndSwap, B32, None),
            atomic(AtomicOp::Add, U32, Some(reg(r(2)))),
            reduce(AtomicOp::Exchange, Space::Global, U32, 1),
            reduce(AtomicOp::Add, Space::Global, S64, 1),
            reduce(AtomicOp::Add, Space::Shared, F32, 2),
            reduce(AtomicOp::Add, Space::Global, U32, 2),
            reduce(AtomicOp::Max, Space::Global, F32, 4),
            reduce(AtomicOp::And, Space::Global, B32, 2),
            warp(Binary::Add, U64),
            warp(Binary::Max, F32),
            warp(Binary::And, U64),
            warp(Binary::Mul, U32),
            Op::BulkReduceAdd {
                ty: S64,
                dst: at(d(0), 0),
                src: at(r(0), 0),
                bytes: imm(16),
            },
        ]),
    );
}

#[test]
fn operands() {
    let (a, b) = (reg(r(0)), reg(r(1)));
    let add = |dst, a, b| Op::Binary {
        op: Binary::Add,
        ty: Ty::U32,
        dst,
        a,
        b,
    };
    let constants = |ty| {
        let (dst, a) = (of(ty, 1), reg(of(ty, 0)));
        Op::Binary {
            op: Binary::Add,
            ty,
            dst,
            a,
            b: imm(1),
        }
    };
    expect(
        "operands",
        &words([
            add(f(0), a, b),
            add(r(2), reg(d(0)), b),
            add(r(2), a, imm(1 << 32)),
            Op::Mov {
                ty: Ty::B32,
                dst: d(0),
                src: a,
            },
            Op::Mov {
                ty: Ty::U16,
                dst: h(0),
                src: imm(0x1_0000),
            },
            Op::Mov {
                ty: Ty::Pred,
                dst: p(0),
                src: imm(2),
            },
            Op::Vote {
                mode: VoteMode::All,
                dst: p(1),
                src: r(0),
            },
            Op::Store {
                space: Space::Global,
                ty: Ty::U32,
                src: vec![a],
                address: at(r(1), 0),
            },
            Op::Store {
                space: Space::Shared,
                ty: Ty::U32,
                src: vec![a],
                address: at(d(1), 0),
            },
            Op::Store {
                space: Space::Shared,
                ty: Ty::B32,
                src: vec![reg(f(1))],
                address: at(r(1), 0),
            },
            Op::Join {
                ty: Ty::B64,
                dst: d(1),
                low: a,
                high: reg(f(0)),
            },
            constants(Ty::F16x2),
            constants(Ty::Bf16x2),
            Op::Convert {
                to: Ty::F32,
                from: Ty::F16,
                dst: f(0),
                src: imm(0x3c00),
            },
        ]),
    );
}

#[test]
fn limits() {
    let (near, id, threads) = (at(r(0), 0), imm(1), imm(64));
    let odd = at(r(0), 4);
    let load = |ty, count: u32| Op::Load {
        space: Space::Global,
        cache: Cache::Default,
        ty,
        dst: (3..3 + count).map(|n| of(ty, n)).collect(),
        address: at(d(0), 0),
    };
    let tensor = |count: usize| Op::TmaStore {
        map: d(0),
        coordinates: vec![imm(0); count],
        src: near,
        hint: None,
    };
    let bulk = |bytes| Op::BulkStore {
        dst: at(d(0), 0),
        src: near,
        bytes: imm(bytes),
    };
    expect(
        "limits",
        &words([
            Op::Param {
                ty: Ty::U32,
                dst: r(0),
                param: 0,
            },
            Op::Param {
                ty: Ty::U64,
                dst: d(0),
                param: 3,
            },
            Op::Param {
                ty: Ty::U64,
                dst: d(0),
                param: 4,
            },
            Op::ParamAddress {
                dst: d(0),
                param: 0,
            },
            load(Ty::F32, 3),
            load(Ty::F32, 0),
            load(Ty::U64, 4),
            Op::LoadMatrix {
                transposed: false,
                dst: vec![r(1), r(2), r(3)],
                address: near,
            },
            Op::StoreMatrix {
                transposed: false,
                src: vec![],
                address: near,
            },
            Op::BarrierSync {
                id: imm(16),
                threads,
            },
            Op::BarrierSync {
                id,
                threads: imm(100),
            },
            Op::BarrierSync {
                id,
                threads: imm(0),
            },
            Op::BarrierArrive {
                id,
                threads: imm(160),
            },
            Op::MbarrierInit {
                address: odd,
                count: imm(1),
            },
            Op::MbarrierInit {
                address: near,
                count: imm(0),
            },
            Op::MbarrierInvalidate { address: odd },
            Op::MbarrierArrive {
                address: odd,
                remote: false,
                scope: Scope::Cta,
            },
            Op::MbarrierArrive {
                address: near,
                remote: true,
                scope: Scope::Gpu,
            },
            Op::MbarrierArriveExpect {
                address: odd,
                bytes: imm(16),
            },
            Op::MbarrierArriveExpect {
                address: near,
                bytes: imm(1 << 20),
            },
            Op::MbarrierWait {
                address: odd,
                parity: imm(0),
                scope: Scope::Cta,
            },
            Op::MbarrierWait {
                address: near,
                parity: imm(2),
                scope: Scope::Cta,
            },
            Op::MbarrierWait {
                address: near,
                parity: imm(1),
                scope: Scope::Gpu,
            },
            Op::MbarrierTest {
                dst: p(0),
                address: odd,
                parity: imm(0),
            },
            tensor(0),
            tensor(6),
            Op::TmaReduceAdd {
                map: d(0),
                coordinates: vec![],
                src: near,
            },
            Op::TmaLoad {
                dst: near,
                map: d(0),
                coordinates: vec![imm(0)],
                barrier: odd,
                multicast: None,
                hint: None,
            },
            Op::BulkLoad {
                dst: near,
                src: at(d(0), 0),
                bytes: imm(16),
                barrier: odd,
                hint: None,
            },
            Op::BulkLoad {
                dst: near,
                src: at(d(0), 0),
                bytes: imm(8),
                barrier: near,
                hint: None,
            },
            Op::BulkReduceAdd {
                ty: Ty::F32,
                dst: at(d(0), 0),
                src: near,
                bytes: imm(4),
            },
            bulk(0),
            bulk(24),
            Op::WgmmaWait { pending: 8 },
            Op::SetMaxRegisters {
                increase: true,
                count: 20,
            },
            Op::SetMaxRegisters {
                increase: true,
                count: 100,
            },
            Op::SetMaxRegisters {
                increase: false,
                count: 264,
            },
        ]),
    );
}

#[test]
fn products() {
    let product = |element, n, a, b_transposed| Op::Wgmma {
        element,
        n,
        acc: (0..8).map(f).collect(),
        a,
        b: reg(d(1)),
        b_transposed,
        accumulate: imm(1),
    };
    let shared = |transposed| MatrixA::Shared {
        descriptor: reg(d(0)),
        transposed,
    };
    let of_warp = |element, last| Op::Mma {
        element,
        acc: [f(0), f(1), f(2), last],
        a: [0, 1, 2, 3].map(r),
        b: [4, 5].map(r),
    };
    expect(
        "products",
        &words([
            product(Element::Bf16, 12, shared(false), false),
            product(Element::Bf16, 264, shared(false), false),
            product(Element::Bf16, 24, shared(false), false),
            product(Element::F32, 16, shared(false), false),
            product(Element::U8, 16, shared(false), false),
            product(Element::E4m3, 16, shared(false), true),
            product(Element::E5m2, 16, shared(true), false),
            product(
                Element::Bf16,
                16,
                MatrixA::Registers([r(0), r(1), r(2), r(300)]),
                false,
            ),
            of_warp(Element::F32, f(3)),
            of_warp(Element::E4m3, f(3)),
            of_warp(Element::Bf16, r(6)),
        ]),
    );
}

#[test]
fn kernels() {
    let param = |name: &str, kind| Param {
        name: name.into(),
        kind,
    };
    let number = |name| param(name, ParamKind::Scalar(Ty::U32));
    let with = |change: &dyn Fn(&mut Kernel)| {
        let mut kernel = empty("k");
        change(&mut kernel);
        let error = refusal(&kernel);
        assert_eq!(error.place, Place::Kernel);
        error.to_string()
    };
    let refusals = [
        with(&|k| k.name = String::new()),
        with(&|k| k.name = "2d".into()),
        with(&|k| k.name = "a-b".into()),
        with(&|k| k.name = "smem".into()),
        with(&|k| k.threads = 0),
        with(&|k| k.threads = 100),
        with(&|k| k.threads = 1056),
        with(&|k| k.cluster = 0),
        with(&|k| k.cluster = 16),
        with(&|k| k.min_blocks = 0),
        with(&|k| k.shared_bytes = 232_449),
        with(&|k| k.params = vec![number("a b")]),
        with(&|k| k.params = vec![number("a"), number("a")]),
        with(&|k| k.params = vec![param("a", ParamKind::Scalar(Ty::U16))]),
        with(&|k| {
            let map = |n| param(&format!("map{n}"), ParamKind::TensorMap);
            k.params = [number("n")].into_iter().chain((0..32).map(map)).collect();
        }),
    ];
    expect("kernels", &refusals.join("\n"));
}
