//! Kernels for what is around instructions: parameters, directives, guards, control flow.

use super::*;

/// A kernel of two predicates (0, 1), a 32-bit register (2) and a 64-bit one (3).
fn small(name: &str, body: Block) -> Kernel {
    Kernel {
        name: name.into(),
        params: Vec::new(),
        threads: 64,
        cluster: 1,
        min_blocks: 1,
        shared_bytes: 0,
        registers: vec![Class::Pred, Class::Pred, Class::B32, Class::B64],
        loops: 2,
        body,
    }
}

const COUNT: RegId = RegId(2);
const POINTER: RegId = RegId(3);

pub const fn holds(pred: u32) -> Guard {
    Guard {
        pred: RegId(pred),
        negated: false,
    }
}

pub const fn fails(pred: u32) -> Guard {
    Guard {
        pred: RegId(pred),
        negated: true,
    }
}

#[track_caller]
pub fn one(op: Op) -> Node {
    Node::Inst(inst(op))
}

#[track_caller]
pub fn guarded(guard: Guard, op: Op) -> Node {
    Node::Inst(Inst {
        guard: Some(guard),
        ..inst(op)
    })
}

#[track_caller]
pub fn if_(cond: Guard, then: Block, otherwise: Block) -> Node {
    Node::If {
        cond,
        then,
        otherwise,
        at: Location::caller(),
    }
}

#[track_caller]
pub fn loop_(id: u32, body: Block) -> Node {
    Node::Loop {
        id,
        body,
        at: Location::caller(),
    }
}

#[track_caller]
pub fn break_(id: u32, cond: Option<Guard>) -> Node {
    Node::Break {
        id,
        cond,
        at: Location::caller(),
    }
}

fn lane() -> Node {
    one(Op::Special {
        dst: COUNT,
        which: Special::LaneId,
    })
}

fn is_below(dst: u32, limit: u64) -> Node {
    let (a, b) = (reg(COUNT), imm(limit));
    one(Op::Compare {
        cmp: Cmp::Lt,
        ty: Ty::U32,
        dst: RegId(dst),
        a,
        b,
    })
}

fn add(n: u64) -> Op {
    Op::Binary {
        op: Binary::Add,
        ty: Ty::U32,
        dst: COUNT,
        a: reg(COUNT),
        b: imm(n),
    }
}

fn store() -> Node {
    let (src, address) = (vec![reg(COUNT)], at(COUNT, 0));
    one(Op::Store {
        space: Space::Shared,
        ty: Ty::U32,
        src,
        address,
    })
}

/// All of them.
pub fn kernels() -> Vec<Kernel> {
    vec![nothing(), parameters(), guards(), branches(), loops()]
}

fn nothing() -> Kernel {
    Kernel {
        registers: Vec::new(),
        ..small("nothing", Vec::new())
    }
}

/// Parameters of every kind, two of them named like instructions; a cluster.
fn parameters() -> Kernel {
    let kinds = [
        Ty::B32,
        Ty::U32,
        Ty::S32,
        Ty::B64,
        Ty::U64,
        Ty::S64,
        Ty::F32,
    ]
    .map(ParamKind::Scalar);
    let names = ["a", "add", "c", "d", "out", "f", "max"];
    let param = |(name, kind): (&str, ParamKind)| Param {
        name: name.into(),
        kind,
    };
    let mut params: Vec<_> = names.into_iter().zip(kinds).map(param).collect();
    params.push(param(("map", ParamKind::TensorMap)));
    let body = vec![
        one(Op::Param {
            ty: Ty::U32,
            dst: COUNT,
            param: 1,
        }),
        one(Op::Param {
            ty: Ty::U64,
            dst: POINTER,
            param: 4,
        }),
        one(Op::Store {
            space: Space::Global,
            ty: Ty::U32,
            src: vec![reg(COUNT)],
            address: at(POINTER, 0),
        }),
        one(Op::ParamAddress {
            dst: POINTER,
            param: 7,
        }),
        one(Op::PrefetchMap { map: POINTER }),
        one(Op::ClusterArrive),
        one(Op::ClusterWait),
    ];
    let kernel = small("parameters", body);
    Kernel {
        params,
        cluster: 2,
        min_blocks: 2,
        threads: 384,
        shared_bytes: 232_448,
        ..kernel
    }
}

/// Instructions under guards: one line, several lines, a value that stays under its guard.
fn guards() -> Kernel {
    let src = vec![reg(COUNT)];
    let kernel = small(
        "guards",
        vec![
            lane(),
            is_below(0, 1),
            guarded(holds(0), add(8)),
            guarded(fails(0), add(16)),
            guarded(
                holds(0),
                Op::MbarrierWait {
                    address: at(COUNT, 0),
                    parity: imm(0),
                    scope: Scope::Cta,
                },
            ),
            guarded(
                holds(0),
                Op::ParamAddress {
                    dst: POINTER,
                    param: 0,
                },
            ),
            guarded(holds(0), Op::PrefetchMap { map: POINTER }),
            guarded(
                fails(0),
                Op::Store {
                    space: Space::Shared,
                    ty: Ty::U32,
                    src,
                    address: at(COUNT, -8),
                },
            ),
            guarded(fails(0), Op::Trap),
        ],
    );
    Kernel {
        params: vec![Param {
            name: "map".into(),
            kind: ParamKind::TensorMap,
        }],
        ..kernel
    }
}

fn branches() -> Kernel {
    small(
        "branches",
        vec![
            lane(),
            is_below(0, 16),
            if_(holds(0), vec![one(add(1))], vec![]),
            if_(fails(0), vec![one(add(2))], vec![]),
            if_(holds(0), vec![], vec![one(add(3))]),
            if_(
                holds(0),
                vec![
                    is_below(1, 8),
                    if_(holds(1), vec![one(add(4))], vec![one(add(5))]),
                ],
                vec![one(add(6))],
            ),
            if_(holds(0), vec![], vec![]),
            store(),
        ],
    )
}

/// A loop in a loop, left by each kind of break, one of them past both.
fn loops() -> Kernel {
    small(
        "loops",
        vec![
            lane(),
            loop_(
                0,
                vec![
                    is_below(0, 100),
                    break_(0, Some(fails(0))),
                    loop_(
                        1,
                        vec![
                            one(add(3)),
                            is_below(1, 50),
                            break_(1, Some(holds(1))),
                            is_below(1, 90),
                            if_(fails(1), vec![store(), break_(0, None)], vec![]),
                        ],
                    ),
                    one(add(1)),
                ],
            ),
            store(),
        ],
    )
}
