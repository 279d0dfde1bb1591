//! Instructions between threads.

use super::*;

pub fn cases() -> Vec<(&'static str, Vec<Op>)> {
    vec![
        ("warps", warps()),
        ("barriers", barriers()),
        ("mbarriers", mbarriers()),
        ("rest", rest()),
    ]
}

fn warps() -> Vec<Op> {
    use ShuffleMode::*;
    let mut ops = Vec::new();
    for (n, mode) in (0..).step_by(4).zip([Index, Butterfly, Up, Down]) {
        let src = reg(r(0));
        ops.extend([
            Op::Shuffle {
                mode,
                dst: r(10 + n),
                src,
                lane: imm(1),
            },
            Op::Shuffle {
                mode,
                dst: r(11 + n),
                src,
                lane: reg(r(1)),
            },
            Op::Shuffle {
                mode,
                dst: f(12 + n),
                src: reg(f(0)),
                lane: imm(2),
            },
        ]);
    }
    ops.extend([
        Op::Vote {
            mode: VoteMode::All,
            dst: p(1),
            src: p(0),
        },
        Op::Vote {
            mode: VoteMode::Any,
            dst: p(2),
            src: p(0),
        },
        Op::Ballot {
            dst: r(40),
            src: p(0),
        },
    ]);
    for (n, ty) in [(0, Ty::U32), (10, Ty::S32)] {
        let src = reg(r(0));
        for (i, op) in (50..).zip([Binary::Add, Binary::Min, Binary::Max]) {
            ops.push(Op::WarpReduce {
                op,
                ty,
                dst: r(n + i),
                src,
            });
        }
    }
    for (n, op) in (70..).zip([Binary::And, Binary::Or, Binary::Xor]) {
        ops.push(Op::WarpReduce {
            op,
            ty: Ty::B32,
            dst: r(n),
            src: reg(r(0)),
        });
    }
    ops.extend([
        Op::WarpReduce {
            op: Binary::Add,
            ty: Ty::U32,
            dst: r(80),
            src: imm(3),
        },
        Op::Elect { dst: p(3) },
        Op::WarpSync,
    ]);
    ops
}

fn barriers() -> Vec<Op> {
    let (id, threads) = (reg(r(0)), reg(r(1)));
    vec![
        Op::BarrierSync {
            id: imm(0),
            threads: imm(128),
        },
        Op::BarrierSync {
            id,
            threads: imm(128),
        },
        Op::BarrierSync { id, threads },
        Op::BarrierArrive {
            id: imm(15),
            threads: imm(64),
        },
        Op::BarrierArrive {
            id,
            threads: imm(128),
        },
        Op::BarrierArrive { id, threads },
        Op::ClusterArrive,
        Op::ClusterWait,
        Op::MapShared {
            dst: r(10),
            address: reg(r(0)),
            rank: imm(1),
        },
        Op::MapShared {
            dst: r(11),
            address: reg(r(0)),
            rank: reg(r(1)),
        },
    ]
}

fn mbarriers() -> Vec<Op> {
    let (near, far) = (at(r(0), 0), at(r(0), 1024));
    vec![
        Op::MbarrierInit {
            address: near,
            count: imm(1),
        },
        Op::MbarrierInit {
            address: far,
            count: reg(r(1)),
        },
        Op::MbarrierArrive {
            address: near,
            remote: false,
            scope: Scope::Cta,
        },
        Op::MbarrierArrive {
            address: at(r(2), 8),
            remote: true,
            scope: Scope::Cta,
        },
        Op::MbarrierArrive {
            address: at(r(2), 8),
            remote: true,
            scope: Scope::Cluster,
        },
        Op::MbarrierArriveExpect {
            address: near,
            bytes: imm(32768),
        },
        Op::MbarrierArriveExpect {
            address: far,
            bytes: reg(r(1)),
        },
        Op::MbarrierTest {
            dst: p(1),
            address: near,
            parity: imm(0),
        },
        Op::MbarrierTest {
            dst: p(2),
            address: near,
            parity: reg(r(1)),
        },
        Op::MbarrierWait {
            address: near,
            parity: imm(1),
            scope: Scope::Cta,
        },
        Op::MbarrierWait {
            address: far,
            parity: reg(r(1)),
            scope: Scope::Cluster,
        },
        Op::MbarrierInvalidate { address: near },
    ]
}

fn rest() -> Vec<Op> {
    vec![
        Op::GridWait,
        Op::GridLaunch,
        Op::Sleep {
            nanoseconds: imm(100),
        },
        Op::Sleep {
            nanoseconds: reg(r(0)),
        },
        Op::SetMaxRegisters {
            increase: false,
            count: 24,
        },
        Op::SetMaxRegisters {
            increase: true,
            count: 240,
        },
        Op::Trap,
    ]
}
