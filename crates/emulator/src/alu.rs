//! Arithmetic of single lanes: integers, floats, packed pairs, conversions.
//!
//! In: an operation, its type and operand bits, from `execute`. Out: the result's bits. All values
//! travel as 64 bits; types say how many of them count.

use flex_block_attn_ptx::Ty;
use flex_block_attn_ptx::ir::{AtomicOp, Binary, Cmp, Packed, Ternary, Unary};
use half::{bf16, f16};

use crate::fault::{Done, Kind, Wrong};
use crate::numbers::{
    E4M3, E5M2, approximate, bf16_bits, f16_bits, from_bf16, from_f16, maximum, minimum,
};

/// How a type's bits are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Signed(u32),
    Unsigned(u32),
    Float,
    Half,
    Bf16Pair,
    F16Pair,
}

fn form(ty: Ty) -> Form {
    match ty {
        Ty::Pred => Form::Unsigned(1),
        Ty::B8 | Ty::U8 => Form::Unsigned(8),
        Ty::B16 | Ty::U16 => Form::Unsigned(16),
        Ty::S16 => Form::Signed(16),
        Ty::B32 | Ty::U32 => Form::Unsigned(32),
        Ty::S32 => Form::Signed(32),
        Ty::B64 | Ty::U64 => Form::Unsigned(64),
        Ty::S64 => Form::Signed(64),
        Ty::F16 => Form::Half,
        Ty::F32 => Form::Float,
        Ty::Bf16x2 => Form::Bf16Pair,
        Ty::F16x2 => Form::F16Pair,
    }
}

fn low(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

fn signed(value: u64, bits: u32) -> i64 {
    (value << (64 - bits)) as i64 >> (64 - bits)
}

fn float(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn bits(x: f32) -> u64 {
    u64::from(x.to_bits())
}

fn unsupported(what: String) -> Wrong {
    Kind::Unsupported { what }.into()
}

/// Both halves of packed pairs, by a function of double precision: exact for sums and products of
/// halves, so that only the last step rounds.
fn pairs<const N: usize>(form: Form, operands: [u64; N], f: impl Fn([f64; N]) -> f64) -> u64 {
    let half = |shift: u32| {
        let bits = operands.map(|pair| (pair >> shift) as u16);
        match form {
            Form::Bf16Pair => {
                let value = f(bits.map(|bits| f64::from(from_bf16(bits))));
                if value.is_nan() {
                    0x7fff
                } else {
                    bf16::from_f64(value).to_bits()
                }
            }
            _ => {
                let value = f(bits.map(|bits| f64::from(from_f16(bits))));
                if value.is_nan() {
                    0x7fff
                } else {
                    f16::from_f64(value).to_bits()
                }
            }
        }
    };
    u64::from(half(0)) | u64::from(half(16)) << 16
}

/// `op.ty a`
pub(crate) fn unary(op: Unary, ty: Ty, a: u64) -> Done<u64> {
    let form = form(ty);
    Ok(match (op, form) {
        (Unary::Neg, Form::Float) => bits(-float(a)),
        (Unary::Abs, Form::Float) => bits(float(a).abs()),
        (Unary::Neg, Form::Bf16Pair | Form::F16Pair) => (a ^ 0x8000_8000) & low(32),
        (Unary::Abs, Form::Bf16Pair | Form::F16Pair) => a & 0x7fff_7fff,
        (Unary::Neg, Form::Signed(n) | Form::Unsigned(n)) => a.wrapping_neg() & low(n),
        (Unary::Abs, Form::Signed(n)) => signed(a, n).unsigned_abs() & low(n),
        (Unary::Not, Form::Signed(n) | Form::Unsigned(n)) => !a & low(n),
        (Unary::PopCount, Form::Signed(n) | Form::Unsigned(n)) => {
            u64::from((a & low(n)).count_ones())
        }
        (Unary::LeadingZeros, Form::Signed(n) | Form::Unsigned(n)) => {
            u64::from((a & low(n)).leading_zeros() - (64 - n))
        }
        (Unary::ReverseBits, Form::Signed(n) | Form::Unsigned(n)) => a.reverse_bits() >> (64 - n),
        (Unary::Exp2, Form::Float) => bits(approximate(float(a), f64::exp2)),
        (Unary::Log2, Form::Float) => bits(approximate(float(a), f64::log2)),
        (Unary::Reciprocal, Form::Float) => bits(approximate(float(a), |x| 1.0 / x)),
        (Unary::Sqrt, Form::Float) => bits(approximate(float(a), f64::sqrt)),
        (Unary::ReciprocalSqrt, Form::Float) => bits(approximate(float(a), |x| 1.0 / x.sqrt())),
        (Unary::Exp2, Form::Bf16Pair | Form::F16Pair) => pairs(form, [a], |[x]| x.exp2()),
        _ => return Err(unsupported(format!("{op:?} of {ty}"))),
    })
}

/// `op.ty a, b`
pub(crate) fn binary(op: Binary, ty: Ty, a: u64, b: u64) -> Done<u64> {
    let form = form(ty);
    Ok(match form {
        Form::Float => {
            let (x, y) = (float(a), float(b));
            bits(match op {
                Binary::Add => x + y,
                Binary::Sub => x - y,
                Binary::Mul => x * y,
                Binary::Div => x / y,
                Binary::Min => minimum(x, y),
                Binary::Max => maximum(x, y),
                _ => return Err(unsupported(format!("{op:?} of {ty}"))),
            })
        }
        Form::Bf16Pair | Form::F16Pair => match op {
            Binary::Add => pairs(form, [a, b], |[x, y]| x + y),
            Binary::Sub => pairs(form, [a, b], |[x, y]| x - y),
            Binary::Mul => pairs(form, [a, b], |[x, y]| x * y),
            Binary::Min => pairs(form, [a, b], |[x, y]| {
                f64::from(minimum(x as f32, y as f32))
            }),
            Binary::Max => pairs(form, [a, b], |[x, y]| {
                f64::from(maximum(x as f32, y as f32))
            }),
            _ => return Err(unsupported(format!("{op:?} of {ty}"))),
        },
        Form::Half => return Err(unsupported(format!("{op:?} of {ty}"))),
        Form::Signed(n) => integer(op, n, true, a, b)?,
        Form::Unsigned(n) => integer(op, n, false, a, b)?,
    })
}

fn integer(op: Binary, n: u32, is_signed: bool, a: u64, b: u64) -> Done<u64> {
    let (ua, ub) = (a & low(n), b & low(n));
    let (sa, sb) = (signed(a, n), signed(b, n));
    let zero = || Wrong::from(Kind::DivisionByZero);
    let result = match op {
        Binary::Add => a.wrapping_add(b),
        Binary::Sub => a.wrapping_sub(b),
        Binary::Mul => a.wrapping_mul(b),
        Binary::MulHigh if is_signed => ((i128::from(sa) * i128::from(sb)) >> n) as u64,
        Binary::MulHigh => ((u128::from(ua) * u128::from(ub)) >> n) as u64,
        Binary::Div if ub == 0 => return Err(zero()),
        Binary::Div if is_signed => sa.wrapping_div(sb) as u64,
        Binary::Div => ua / ub,
        Binary::Rem if ub == 0 => return Err(zero()),
        Binary::Rem if is_signed => sa.wrapping_rem(sb) as u64,
        Binary::Rem => ua % ub,
        Binary::Min if is_signed => sa.min(sb) as u64,
        Binary::Min => ua.min(ub),
        Binary::Max if is_signed => sa.max(sb) as u64,
        Binary::Max => ua.max(ub),
        Binary::And => a & b,
        Binary::Or => a | b,
        Binary::Xor => a ^ b,
        // Shift counts have 32 bits whatever the type, and stop at the width.
        Binary::Shl => match b as u32 {
            count if count < n => a << count,
            _ => 0,
        },
        Binary::Shr if is_signed => (sa >> (b as u32).min(n - 1).min(63)) as u64,
        Binary::Shr => match b as u32 {
            count if count < n => ua >> count,
            _ => 0,
        },
    };
    Ok(result & low(n))
}

/// `op.ty a, b, c`
pub(crate) fn ternary(op: Ternary, ty: Ty, a: u64, b: u64, c: u64) -> Done<u64> {
    let form = form(ty);
    Ok(match (op, form) {
        (Ternary::Fma, Form::Float) => bits(float(a).mul_add(float(b), float(c))),
        (Ternary::Fma, Form::Bf16Pair | Form::F16Pair) => {
            pairs(form, [a, b, c], |[x, y, z]| x * y + z)
        }
        (Ternary::Mad, Form::Signed(n) | Form::Unsigned(n)) => {
            a.wrapping_mul(b).wrapping_add(c) & low(n)
        }
        _ => return Err(unsupported(format!("{op:?} of {ty}"))),
    })
}

/// `mul.wide.ty a, b`
pub(crate) fn mul_wide(ty: Ty, a: u64, b: u64) -> Done<u64> {
    match form(ty) {
        Form::Signed(n) if n < 64 => Ok(signed(a, n).wrapping_mul(signed(b, n)) as u64),
        Form::Unsigned(n) if n < 64 => Ok((a & low(n)).wrapping_mul(b & low(n))),
        _ => Err(unsupported(format!("mul.wide of {ty}"))),
    }
}

/// `setp.cmp.ty a, b`
pub(crate) fn compare(cmp: Cmp, ty: Ty, a: u64, b: u64) -> Done<bool> {
    let order = match form(ty) {
        Form::Float => float(a).partial_cmp(&float(b)),
        Form::Signed(n) => Some(signed(a, n).cmp(&signed(b, n))),
        Form::Unsigned(n) => Some((a & low(n)).cmp(&(b & low(n)))),
        Form::Half | Form::Bf16Pair | Form::F16Pair => {
            return Err(unsupported(format!("comparison of {ty}")));
        }
    };
    Ok(match (cmp, order) {
        (Cmp::Ne, None) => true,
        (_, None) => false,
        (Cmp::Eq, Some(order)) => order.is_eq(),
        (Cmp::Ne, Some(order)) => order.is_ne(),
        (Cmp::Lt, Some(order)) => order.is_lt(),
        (Cmp::Le, Some(order)) => order.is_le(),
        (Cmp::Gt, Some(order)) => order.is_gt(),
        (Cmp::Ge, Some(order)) => order.is_ge(),
    })
}

/// `lop3.b32`
pub(crate) fn lop3(table: u8, a: u64, b: u64, c: u64) -> u64 {
    let mut result = 0;
    for row in 0..8u8 {
        if table >> row & 1 != 0 {
            let pick = |value: u64, bit: u8| if row >> bit & 1 != 0 { value } else { !value };
            result |= pick(a, 2) & pick(b, 1) & pick(c, 0);
        }
    }
    result & low(32)
}

/// `prmt.b32`
pub(crate) fn permute(a: u64, b: u64, selector: u64) -> u64 {
    let source = a & low(32) | b << 32;
    let mut result = 0;
    for i in 0..4 {
        let pick = selector >> (4 * i) & 0xf;
        let mut byte = source >> (8 * (pick & 7)) & 0xff;
        if pick & 8 != 0 {
            byte = if byte & 0x80 != 0 { 0xff } else { 0 };
        }
        result |= byte << (8 * i);
    }
    result
}

/// `cvt.to.from`: floats to the nearest integers, stopping at the range's ends; integers to floats
/// to nearest even.
pub(crate) fn convert(to: Ty, from: Ty, a: u64) -> Done<u64> {
    let wrong = || unsupported(format!("conversion of {from} to {to}"));
    Ok(match (form(to), form(from)) {
        (Form::Float, Form::Float) => a,
        (Form::Float, Form::Half) => bits(from_f16(a as u16)),
        (Form::Half, Form::Float) => u64::from(f16_bits(float(a))),
        (Form::Float, Form::Signed(n)) => bits(signed(a, n) as f32),
        (Form::Float, Form::Unsigned(n)) => bits((a & low(n)) as f32),
        (Form::Signed(n), Form::Float) => {
            let limit = i64::MAX >> (64 - n);
            let value = float(a).round_ties_even();
            (value as i64).clamp(-limit - 1, limit) as u64 & low(n)
        }
        (Form::Unsigned(n), Form::Float) => (float(a).round_ties_even() as u64).min(low(n)),
        (Form::Signed(n) | Form::Unsigned(n), Form::Signed(m)) => signed(a, m) as u64 & low(n),
        (Form::Signed(n) | Form::Unsigned(n), Form::Unsigned(m)) => a & low(m) & low(n),
        _ => return Err(wrong()),
    })
}

/// `cvt.rn.format.f32 high, low`
pub(crate) fn pack(format: Packed, lower: u64, upper: u64) -> u64 {
    let (x, y) = (float(lower), float(upper));
    match format {
        Packed::Bf16 => u64::from(bf16_bits(x)) | u64::from(bf16_bits(y)) << 16,
        Packed::F16 => u64::from(f16_bits(x)) | u64::from(f16_bits(y)) << 16,
        Packed::E4m3 => u64::from(E4M3.bits(x)) | u64::from(E4M3.bits(y)) << 8,
        Packed::E5m2 => u64::from(E5M2.bits(x)) | u64::from(E5M2.bits(y)) << 8,
    }
}

/// What memory holds after an atomic operation.
pub(crate) fn atomic(op: AtomicOp, ty: Ty, old: u64, src: u64, swap: Option<u64>) -> Done<u64> {
    match op {
        AtomicOp::Add => binary(Binary::Add, ty, old, src),
        AtomicOp::Min => binary(Binary::Min, ty, old, src),
        AtomicOp::Max => binary(Binary::Max, ty, old, src),
        AtomicOp::And => Ok(old & src),
        AtomicOp::Or => Ok(old | src),
        AtomicOp::Exchange => Ok(src),
        AtomicOp::CompareAndSwap => match swap {
            Some(swap) => Ok(if old == src { swap } else { old }),
            None => Err(unsupported(
                "compare-and-swap without a new value".to_owned(),
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ok(result: Done<u64>) -> u64 {
        result.expect("a supported operation")
    }

    #[test]
    fn shifts_stop_at_the_width() {
        assert_eq!(ok(binary(Binary::Shl, Ty::B32, 1, 32)), 0);
        assert_eq!(
            ok(binary(Binary::Shr, Ty::S32, 0x8000_0000, 99)),
            0xffff_ffff
        );
        assert_eq!(ok(binary(Binary::Shr, Ty::U32, 0x8000_0000, 31)), 1);
        assert_eq!(ok(binary(Binary::Shl, Ty::B64, 3, 63)), 1 << 63);
    }

    #[test]
    fn integers_wrap_and_widen() {
        assert_eq!(ok(binary(Binary::Add, Ty::U32, u64::from(u32::MAX), 1)), 0);
        assert_eq!(ok(binary(Binary::MulHigh, Ty::U32, 1 << 31, 4)), 2);
        assert_eq!(ok(binary(Binary::MulHigh, Ty::S32, low(32), 1)), low(32));
        assert_eq!(ok(mul_wide(Ty::S32, low(32), 5)) as i64, -5);
        assert_eq!(ok(mul_wide(Ty::U32, low(32), low(32))), low(32) * low(32));
        assert_eq!(
            ok(binary(Binary::Div, Ty::S32, low(32) - 6, 2)),
            low(32) - 2
        );
        assert!(binary(Binary::Rem, Ty::U32, 1, 0).is_err());
        assert_eq!(ok(convert(Ty::S64, Ty::S32, low(32))), u64::MAX);
        assert_eq!(ok(convert(Ty::U64, Ty::U32, low(32))), low(32));
        assert_eq!(ok(convert(Ty::S32, Ty::F32, bits(-1e20))), 0x8000_0000);
        assert_eq!(ok(unary(Unary::LeadingZeros, Ty::B32, 1)), 31);
    }

    #[test]
    fn bitwise_tables_and_permutations() {
        let (a, b, c) = (0xf0f0_1234, 0xcccc_5678, 0xaaaa_9abc);
        assert_eq!(lop3(0xf0 & 0xcc | 0xaa, a, b, c), a & b | c);
        assert_eq!(lop3(0x96, a, b, c), a ^ b ^ c);
        assert_eq!(permute(0x3322_1100, 0x7766_5544, 0x7531), 0x7755_3311);
    }

    #[test]
    fn packed_pairs_round_each_half() {
        let pair = pack(Packed::Bf16, bits(1.0), bits(-2.0));
        assert_eq!(pair, 0xc000_3f80);
        assert_eq!(ok(binary(Binary::Add, Ty::Bf16x2, pair, pair)), 0xc080_4000);
        assert_eq!(
            ok(binary(Binary::Mul, Ty::F16x2, 0x4000_3c00, 0x4000_3c00)),
            0x4400_3c00
        );
    }

    #[test]
    fn comparisons_with_nan() {
        let nan = bits(f32::NAN);
        assert!(!compare(Cmp::Eq, Ty::F32, nan, nan).unwrap());
        assert!(compare(Cmp::Ne, Ty::F32, nan, nan).unwrap());
        assert!(compare(Cmp::Lt, Ty::S32, low(32), 0).unwrap());
        assert!(compare(Cmp::Gt, Ty::U32, low(32), 0).unwrap());
    }
}
