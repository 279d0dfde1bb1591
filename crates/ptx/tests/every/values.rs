//! Instructions on values.

use super::*;

pub fn cases() -> Vec<(&'static str, Vec<Op>)> {
    vec![
        ("moves", moves()),
        ("unary", unaries()),
        ("binary_integers", binary_integers()),
        ("binary_bits", binary_bits()),
        ("binary_floats", binary_floats()),
        ("ternary", ternaries()),
        ("conversions", conversions()),
        ("comparisons", comparisons()),
        ("selections", selections()),
    ]
}

pub const INTEGERS: [Ty; 6] = [Ty::U16, Ty::S16, Ty::U32, Ty::S32, Ty::U64, Ty::S64];
const FLOATS: [Ty; 3] = [Ty::F32, Ty::Bf16x2, Ty::F16x2];

fn moves() -> Vec<Op> {
    let mut ops = Vec::new();
    for ty in [
        Ty::Pred,
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
    ] {
        ops.push(Op::Mov {
            ty,
            dst: of(ty, 1),
            src: reg(of(ty, 0)),
        });
        ops.push(Op::Mov {
            ty,
            dst: of(ty, 2),
            src: constant(ty),
        });
    }
    ops.extend([
        Op::Mov {
            ty: Ty::B32,
            dst: f(3),
            src: reg(r(0)),
        },
        Op::Mov {
            ty: Ty::B32,
            dst: r(3),
            src: reg(f(0)),
        },
        Op::Mov {
            ty: Ty::F32,
            dst: f(4),
            src: imm(u64::from(f32::NEG_INFINITY.to_bits())),
        },
        Op::Mov {
            ty: Ty::U64,
            dst: d(4),
            src: imm(u64::MAX),
        },
        Op::Mov {
            ty: Ty::U32,
            dst: r(4),
            src: imm(u64::from(u32::MAX)),
        },
    ]);
    use Special::*;
    let specials = [
        TidX,
        CtaIdX,
        CtaIdY,
        CtaIdZ,
        GridX,
        GridY,
        GridZ,
        LaneId,
        ClusterCtaRank,
        SmId,
        Clock,
    ];
    ops.extend(
        (10..)
            .zip(specials)
            .map(|(n, which)| Op::Special { dst: r(n), which }),
    );
    ops.extend([
        Op::Param {
            ty: Ty::U64,
            dst: d(5),
            param: 0,
        },
        Op::Param {
            ty: Ty::U32,
            dst: r(30),
            param: 1,
        },
        Op::Param {
            ty: Ty::F32,
            dst: f(5),
            param: 2,
        },
        Op::ParamAddress {
            dst: d(6),
            param: 3,
        },
        Op::SharedBase { dst: r(31) },
        Op::Join {
            ty: Ty::B32,
            dst: r(32),
            low: reg(h(0)),
            high: reg(h(1)),
        },
        Op::Join {
            ty: Ty::B64,
            dst: d(7),
            low: reg(r(0)),
            high: reg(r(1)),
        },
        Op::Join {
            ty: Ty::B64,
            dst: d(8),
            low: reg(r(0)),
            high: imm(0x4000_0040),
        },
        Op::Join {
            ty: Ty::B64,
            dst: d(9),
            low: imm(7),
            high: reg(r(0)),
        },
        Op::Split {
            ty: Ty::B32,
            low: h(4),
            high: h(5),
            src: reg(r(0)),
        },
        Op::Split {
            ty: Ty::B64,
            low: r(33),
            high: r(34),
            src: reg(d(0)),
        },
    ]);
    ops
}

fn unaries() -> Vec<Op> {
    use Unary::*;
    let mut ops = Vec::new();
    let mut add = |op, types: &[Ty]| {
        for &ty in types {
            let result = if matches!(op, PopCount | LeadingZeros) {
                Ty::U32
            } else {
                ty
            };
            let dst = of(result, 10 + ops.len() as u32);
            ops.push(Op::Unary {
                op,
                ty,
                dst,
                a: reg(of(ty, 0)),
            });
        }
    };
    for op in [Neg, Abs] {
        add(
            op,
            &[Ty::S16, Ty::S32, Ty::S64, Ty::F32, Ty::Bf16x2, Ty::F16x2],
        );
    }
    add(Not, &[Ty::Pred, Ty::B16, Ty::B32, Ty::B64, Ty::U32]);
    for op in [PopCount, LeadingZeros, ReverseBits] {
        add(op, &[Ty::B32, Ty::B64]);
    }
    for op in [Exp2, Log2, Reciprocal, Sqrt, ReciprocalSqrt] {
        add(op, &[Ty::F32]);
    }
    ops.push(Op::Unary {
        op: Exp2,
        ty: Ty::F32,
        dst: f(60),
        a: constant(Ty::F32),
    });
    ops.push(Op::Unary {
        op: PopCount,
        ty: Ty::B32,
        dst: r(60),
        a: constant(Ty::B32),
    });
    ops
}

/// `op` on two registers, and on a register and a constant.
fn both(ops: &mut Vec<Op>, op: Binary, ty: Ty) {
    let n = 10 + ops.len() as u32;
    let (a, b) = (reg(of(ty, 0)), reg(of(ty, 1)));
    ops.push(Op::Binary {
        op,
        ty,
        dst: of(ty, n),
        a,
        b,
    });
    ops.push(Op::Binary {
        op,
        ty,
        dst: of(ty, n + 1),
        a,
        b: constant(ty),
    });
}

fn binary_integers() -> Vec<Op> {
    use Binary::*;
    let mut ops = Vec::new();
    for op in [Add, Sub, Mul, MulHigh, Div, Rem, Min, Max] {
        INTEGERS.into_iter().for_each(|ty| both(&mut ops, op, ty));
    }
    ops
}

fn binary_bits() -> Vec<Op> {
    use Binary::*;
    let mut ops = Vec::new();
    for op in [And, Or, Xor] {
        for ty in [Ty::Pred, Ty::B16, Ty::B32, Ty::B64, Ty::U32, Ty::S32] {
            both(&mut ops, op, ty);
        }
    }
    let left = [Ty::B16, Ty::B32, Ty::B64, Ty::U32, Ty::S32, Ty::U64].map(|ty| (Shl, ty));
    let right = [Ty::B16, Ty::B32, Ty::B64]
        .into_iter()
        .chain(INTEGERS)
        .map(|ty| (Shr, ty));
    for (op, ty) in left.into_iter().chain(right) {
        let n = 100 + ops.len() as u32;
        let a = reg(of(ty, 0));
        ops.push(Op::Binary {
            op,
            ty,
            dst: of(ty, n),
            a,
            b: reg(r(1)),
        });
        ops.push(Op::Binary {
            op,
            ty,
            dst: of(ty, n + 1),
            a,
            b: imm(5),
        });
    }
    ops
}

fn binary_floats() -> Vec<Op> {
    use Binary::*;
    let mut ops = Vec::new();
    for op in [Add, Sub, Mul, Min, Max] {
        for ty in FLOATS {
            let n = 10 + ops.len() as u32;
            ops.push(Op::Binary {
                op,
                ty,
                dst: of(ty, n),
                a: reg(of(ty, 0)),
                b: reg(of(ty, 1)),
            });
        }
        both(&mut ops, op, Ty::F32);
    }
    both(&mut ops, Div, Ty::F32);
    ops
}

fn ternaries() -> Vec<Op> {
    let mut ops = Vec::new();
    let fma = FLOATS.map(|ty| (Ternary::Fma, ty));
    let mad = INTEGERS.map(|ty| (Ternary::Mad, ty));
    for (op, ty) in fma.into_iter().chain(mad) {
        let [a, b, c] = [0, 1, 2].map(|n| reg(of(ty, n)));
        ops.push(Op::Ternary {
            op,
            ty,
            dst: of(ty, 10 + ops.len() as u32),
            a,
            b,
            c,
        });
        if !matches!(ty, Ty::Bf16x2 | Ty::F16x2) {
            let dst = of(ty, 10 + ops.len() as u32);
            ops.push(Op::Ternary {
                op,
                ty,
                dst,
                a,
                b: constant(ty),
                c: constant(ty),
            });
        }
    }
    for (n, ty) in [(0, Ty::U32), (10, Ty::S32)] {
        let (a, b) = (reg(of(ty, 0)), reg(of(ty, 1)));
        ops.extend([
            Op::MulWide {
                ty,
                dst: d(40 + n),
                a,
                b,
                c: None,
            },
            Op::MulWide {
                ty,
                dst: d(41 + n),
                a,
                b: constant(ty),
                c: None,
            },
            Op::MulWide {
                ty,
                dst: d(42 + n),
                a,
                b,
                c: Some(reg(d(0))),
            },
            Op::MulWide {
                ty,
                dst: d(43 + n),
                a,
                b: constant(ty),
                c: Some(imm(7)),
            },
        ]);
    }
    let [a, b, c] = [0, 1, 2].map(|n| reg(r(n)));
    ops.extend([
        Op::Lop3 {
            dst: r(60),
            a,
            b,
            c,
            table: 0xfe,
        },
        Op::Lop3 {
            dst: r(61),
            a,
            b,
            c: constant(Ty::B32),
            table: 0x0a,
        },
        Op::Permute {
            dst: r(62),
            a,
            b,
            selector: imm(0x5410),
        },
        Op::Permute {
            dst: r(63),
            a,
            b: imm(0),
            selector: c,
        },
    ]);
    ops
}

fn conversions() -> Vec<Op> {
    let mut ops = Vec::new();
    let mut add = |to, from| {
        let dst = of(to, 10 + ops.len() as u32);
        ops.push(Op::Convert {
            to,
            from,
            dst,
            src: reg(of(from, 0)),
        });
    };
    let small = [Ty::U8, Ty::U16, Ty::S16, Ty::U32, Ty::S32, Ty::U64, Ty::S64];
    for to in small {
        small
            .into_iter()
            .filter(|&from| from != to)
            .for_each(|from| add(to, from));
    }
    for ty in small {
        add(Ty::F32, ty);
        add(ty, Ty::F32);
    }
    add(Ty::F32, Ty::F16);
    add(Ty::F16, Ty::F32);
    ops.push(Op::Convert {
        to: Ty::F32,
        from: Ty::S32,
        dst: f(200),
        src: constant(Ty::S32),
    });
    ops.push(Op::Convert {
        to: Ty::U64,
        from: Ty::U32,
        dst: d(200),
        src: imm(9),
    });
    let (low, high) = (reg(f(0)), reg(f(1)));
    ops.extend([
        Op::Pack {
            format: Packed::Bf16,
            dst: r(200),
            low,
            high,
        },
        Op::Pack {
            format: Packed::F16,
            dst: r(201),
            low,
            high,
        },
        Op::Pack {
            format: Packed::E4m3,
            dst: h(202),
            low,
            high,
        },
        Op::Pack {
            format: Packed::E5m2,
            dst: h(203),
            low,
            high,
        },
        Op::Pack {
            format: Packed::Bf16,
            dst: r(204),
            low,
            high: constant(Ty::F32),
        },
    ]);
    ops
}

fn comparisons() -> Vec<Op> {
    let mut ops = Vec::new();
    let mut add = |cmp, ty| {
        let n = 10 + ops.len() as u32;
        let (a, b) = (reg(of(ty, 0)), reg(of(ty, 1)));
        ops.push(Op::Compare {
            cmp,
            ty,
            dst: p(n),
            a,
            b,
        });
        ops.push(Op::Compare {
            cmp,
            ty,
            dst: p(n + 1),
            a,
            b: constant(ty),
        });
    };
    for ty in INTEGERS.into_iter().chain([Ty::F32]) {
        [Cmp::Eq, Cmp::Ne, Cmp::Lt, Cmp::Le, Cmp::Gt, Cmp::Ge]
            .into_iter()
            .for_each(|cmp| add(cmp, ty));
    }
    for ty in [Ty::B16, Ty::B32, Ty::B64] {
        [Cmp::Eq, Cmp::Ne].into_iter().for_each(|cmp| add(cmp, ty));
    }
    ops
}

fn selections() -> Vec<Op> {
    let mut ops = Vec::new();
    for ty in INTEGERS
        .into_iter()
        .chain([Ty::B16, Ty::B32, Ty::B64, Ty::F32])
    {
        let n = 10 + ops.len() as u32;
        let (a, b, cond) = (reg(of(ty, 0)), reg(of(ty, 1)), p(0));
        ops.push(Op::Select {
            ty,
            dst: of(ty, n),
            a,
            b,
            cond,
        });
        ops.push(Op::Select {
            ty,
            dst: of(ty, n + 1),
            a: constant(ty),
            b,
            cond,
        });
    }
    ops
}
