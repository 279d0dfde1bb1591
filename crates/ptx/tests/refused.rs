//! What the verifier refuses, and with which words.
//!
//! Each test lists wrong instructions or kernels; the expectations, in `snapshots/`, are what the
//! verifier says to them.

#[allow(dead_code)] // shared with other tests
mod every;

use every::structure::{break_, fails, guarded, holds, if_, loop_, one};
use every::*;
use flex_block_attn_ptx::ir::*;
use flex_block_attn_ptx::verify::{Fault, Place, VerifyError};
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
            },
            Op::MbarrierWait {
                address: near,
                parity: imm(2),
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

// ---- flow --------------------------------------------------------------------------------------

fn kernel(loops: u32, body: Block) -> Kernel {
    Kernel {
        loops,
        body,
        ..empty("k")
    }
}

fn set(register: u32) -> Node {
    one(Op::Mov {
        ty: Ty::U32,
        dst: r(register),
        src: imm(1),
    })
}

fn set_pred(register: u32) -> Node {
    one(Op::Mov {
        ty: Ty::Pred,
        dst: p(register),
        src: imm(1),
    })
}

fn read(register: u32) -> Op {
    let (src, address) = (vec![imm(0)], at(r(register), 0));
    Op::Store {
        space: Space::Shared,
        ty: Ty::U32,
        src,
        address,
    }
}

#[track_caller]
fn assert_unassigned(register: RegId, body: Block) {
    assert_eq!(
        refusal(&kernel(2, body)).fault,
        Fault::Unassigned { register }
    );
}

#[track_caller]
fn assert_passes(body: Block) {
    verify(&kernel(2, body)).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn reads_follow_writes() {
    assert_passes(vec![set(0), one(read(0))]);
    assert_unassigned(r(0), vec![one(read(0))]);
    assert_unassigned(r(0), vec![one(read(0)), set(0)]);
    // An instruction reads before it writes.
    let copy = Op::Mov {
        ty: Ty::U32,
        dst: r(0),
        src: reg(r(0)),
    };
    assert_unassigned(r(0), vec![one(copy)]);
    assert_unassigned(p(0), vec![set(0), guarded(holds(0), read(0))]);
    assert_unassigned(p(0), vec![if_(holds(0), vec![], vec![])]);
    assert_unassigned(p(0), vec![loop_(0, vec![break_(0, Some(holds(0)))])]);
}

#[test]
fn products_read_their_accumulators() {
    let product = |accumulate| {
        one(Op::Wgmma {
            element: Element::Bf16,
            n: 8,
            acc: (0..4).map(f).collect(),
            a: MatrixA::Shared {
                descriptor: imm(1),
                transposed: false,
            },
            b: imm(1),
            b_transposed: false,
            accumulate,
        })
    };
    assert_passes(vec![product(imm(0)), product(imm(1))]);
    assert_unassigned(f(0), vec![product(imm(1))]);
    assert_unassigned(f(0), vec![set_pred(0), product(reg(p(0)))]);
}

#[test]
fn both_sides_of_a_branch_count() {
    let branch = |then, otherwise| vec![set_pred(0), if_(holds(0), then, otherwise), one(read(0))];
    assert_passes(branch(vec![set(0)], vec![set(0)]));
    assert_unassigned(r(0), branch(vec![set(0)], vec![]));
    assert_unassigned(r(0), branch(vec![], vec![set(0)]));
    // A side that ends in a trap goes nowhere.
    assert_passes(branch(vec![set(0)], vec![one(Op::Trap)]));
    assert_unassigned(
        r(0),
        branch(vec![set(0)], vec![set_pred(1), guarded(holds(1), Op::Trap)]),
    );
}

#[test]
fn loops_are_left_by_their_breaks() {
    let leave = |id| break_(id, Some(holds(0)));
    let body = |nodes: Block| vec![set_pred(0), loop_(0, nodes), one(read(0))];
    assert_passes(body(vec![set(0), leave(0)]));
    assert_unassigned(r(0), body(vec![leave(0), set(0)]));
    assert_unassigned(r(0), body(vec![leave(0), set(0), leave(0)]));
    assert_passes(body(vec![set(0), break_(0, None)]));
    // What follows a loop that is never left, or a break, is never reached.
    assert_passes(body(vec![]));
    assert_passes(body(vec![set(0), break_(0, None), one(read(7))]));
    // What one round assigns, the next may not rely on.
    assert_unassigned(r(1), body(vec![set(0), one(read(1)), set(1), leave(0)]));
    // A break out of two loops carries what is assigned where it stands.
    assert_unassigned(r(0), body(vec![loop_(1, vec![leave(0), set(0), leave(1)])]));
    assert_passes(body(vec![set(0), loop_(1, vec![leave(0), leave(1)])]));
}

#[test]
fn writes_under_a_guard_hold_under_it_only() {
    let write = || Op::Mov {
        ty: Ty::U32,
        dst: r(0),
        src: imm(1),
    };
    let start = |nodes: Block| [vec![set_pred(0), set_pred(1)], nodes].concat();
    assert_unassigned(r(0), start(vec![guarded(holds(0), write()), one(read(0))]));
    assert_passes(start(vec![
        guarded(holds(0), write()),
        guarded(holds(0), read(0)),
    ]));
    assert_unassigned(
        r(0),
        start(vec![guarded(holds(0), write()), guarded(fails(0), read(0))]),
    );
    assert_unassigned(
        r(0),
        start(vec![guarded(holds(0), write()), guarded(holds(1), read(0))]),
    );
    // The predicate has changed meanwhile.
    assert_unassigned(
        r(0),
        start(vec![
            guarded(holds(0), write()),
            set_pred(0),
            guarded(holds(0), read(0)),
        ]),
    );
    // What was assigned stays so.
    assert_passes(start(vec![
        set(0),
        guarded(holds(0), write()),
        one(read(0)),
    ]));
}

#[test]
fn breaks_and_loops_match() {
    let fault = |loops, body| refusal(&kernel(loops, body)).fault;
    assert_eq!(
        fault(1, vec![break_(0, None)]),
        Fault::Break {
            id: 0,
            around: vec![]
        }
    );
    let body = vec![loop_(0, vec![loop_(1, vec![break_(2, None)])])];
    assert_eq!(
        fault(2, body),
        Fault::Break {
            id: 2,
            around: vec![0, 1]
        }
    );
    let twice = || loop_(0, vec![break_(0, None)]);
    assert_eq!(
        fault(1, vec![twice(), twice()]),
        Fault::Loop { id: 0, loops: 1 }
    );
    assert_eq!(fault(0, vec![twice()]), Fault::Loop { id: 0, loops: 0 });
    let (register, registers) = (RegId(9), 0);
    let missing = Kernel {
        registers: Vec::new(),
        ..kernel(0, vec![one(Op::Elect { dst: RegId(9) })])
    };
    assert_eq!(
        refusal(&missing).fault,
        Fault::NoRegister {
            register,
            registers
        }
    );
}

#[test]
fn an_error_names_kernel_instruction_and_place() {
    let kernel = kernel(0, vec![one(read(3))]);
    let Node::Inst(Inst { at, .. }) = &kernel.body[0] else {
        panic!("made above")
    };
    let register = r(3).0;
    assert_eq!(
        refusal(&kernel).to_string(),
        format!(
            "kernel `k`, `st.shared.u32 [%r3], 0;` ({at}): \
             register {register} is read, but not assigned on every path to here"
        )
    );
    assert!(at.file().ends_with("refused.rs") || at.file().ends_with("mod.rs"));
}
