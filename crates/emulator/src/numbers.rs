//! Number formats and approximate functions, as the hardware rounds them.
//!
//! In: float32 values and bit patterns, from the arithmetic unit, the bulk engine and the matrix
//! unit. Out: the same. Approximate functions (`ex2.approx` and its kin) are computed in double
//! precision and rounded once: at least as exact as the hardware, never bit for bit the same.

use half::{bf16, f16};

/// The bits of a float32 rounded to bfloat16, to nearest even; NaNs become the canonical one.
pub(crate) fn bf16_bits(x: f32) -> u16 {
    if x.is_nan() {
        0x7fff
    } else {
        bf16::from_f32(x).to_bits()
    }
}

/// The bits of a float32 rounded to float16, to nearest even; NaNs become the canonical one.
pub(crate) fn f16_bits(x: f32) -> u16 {
    if x.is_nan() {
        0x7fff
    } else {
        f16::from_f32(x).to_bits()
    }
}

/// A bfloat16 as float32.
pub(crate) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// A float16 as float32.
pub(crate) fn from_f16(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

/// An 8-bit float format.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Float8 {
    mantissa: i32,
    bias: i32,
    largest: f32,
    largest_bits: u8,
}

/// 4 exponent bits, 3 of mantissa; no infinities.
pub(crate) const E4M3: Float8 = Float8 {
    mantissa: 3,
    bias: 7,
    largest: 448.0,
    largest_bits: 0x7e,
};
/// 5 exponent bits, 2 of mantissa.
pub(crate) const E5M2: Float8 = Float8 {
    mantissa: 2,
    bias: 15,
    largest: 57344.0,
    largest_bits: 0x7b,
};

impl Float8 {
    /// Rounds to nearest even; what lies beyond the largest number becomes the largest.
    pub(crate) fn bits(self, x: f32) -> u8 {
        if x.is_nan() {
            return 0x7f;
        }
        let sign = if x.is_sign_negative() { 0x80 } else { 0 };
        let size = x.abs();
        if size >= self.largest {
            return sign | self.largest_bits;
        }
        let lowest = 1 - self.bias;
        // The exponent by the bits; float32's subnormals lie below `lowest` anyhow.
        let exponent = ((size.to_bits() >> 23) as i32 - 127).max(lowest);
        let units = f64::from(size) * f64::from(self.mantissa - exponent).exp2();
        let units = units.round_ties_even() as i32;
        // A subnormal has the exponent `lowest` and no leading one: the same sum serves both, and
        // a carry into the exponent is right as it is.
        sign | (((exponent - lowest) << self.mantissa) + units) as u8
    }

    /// As float32.
    pub(crate) fn value(self, bits: u8) -> f32 {
        let sign = if bits & 0x80 != 0 { -1.0 } else { 1.0 };
        let exponent = i32::from(bits & 0x7f) >> self.mantissa;
        let mantissa = i32::from(bits) & ((1 << self.mantissa) - 1);
        let top = 0x7f >> self.mantissa;
        if self.mantissa == 3 && bits & 0x7f == 0x7f {
            return f32::NAN;
        }
        if self.mantissa == 2 && exponent == top {
            return if mantissa == 0 {
                sign * f32::INFINITY
            } else {
                f32::NAN
            };
        }
        let (exponent, mantissa) = match exponent {
            0 => (1, mantissa),
            _ => (exponent, mantissa | (1 << self.mantissa)),
        };
        sign * mantissa as f32 * ((exponent - self.bias - self.mantissa) as f32).exp2()
    }
}

/// Subnormal numbers become zero, the sign stays.
pub(crate) fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0.0f32.copysign(x)
    } else {
        x
    }
}

/// A function of float32 under `.approx.ftz`: subnormals are flushed on both sides.
pub(crate) fn approximate(x: f32, f: impl Fn(f64) -> f64) -> f32 {
    flush(f(f64::from(flush(x))) as f32)
}

/// `min.f32`: of a NaN and a number the number; minus zero is less than zero.
pub(crate) fn minimum(a: f32, b: f32) -> f32 {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => f32::from_bits(0x7fff_ffff),
        (true, false) => b,
        (false, true) => a,
        _ if a == b => {
            if a.is_sign_negative() {
                a
            } else {
                b
            }
        }
        _ => {
            if a < b {
                a
            } else {
                b
            }
        }
    }
}

/// `max.f32`: likewise.
pub(crate) fn maximum(a: f32, b: f32) -> f32 {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => f32::from_bits(0x7fff_ffff),
        (true, false) => b,
        (false, true) => a,
        _ if a == b => {
            if a.is_sign_negative() {
                b
            } else {
                a
            }
        }
        _ => {
            if a > b {
                a
            } else {
                b
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bit_floats_come_back() {
        for format in [E4M3, E5M2] {
            for bits in 0..=255u8 {
                let value = format.value(bits);
                if value.is_finite() {
                    assert_eq!(format.bits(value), bits, "{format:?} {bits:#x}");
                }
            }
        }
    }

    #[test]
    fn eight_bit_floats_round_to_even_and_saturate() {
        assert_eq!(E4M3.bits(1.0 + 1.0 / 16.0), E4M3.bits(1.0));
        assert_eq!(E4M3.bits(1.0 + 3.0 / 16.0), E4M3.bits(1.25));
        assert_eq!(E4M3.bits(1e9), 0x7e);
        assert_eq!(E4M3.bits(f32::NEG_INFINITY), 0xfe);
        assert_eq!(E5M2.bits(60000.0), 0x7b);
        assert_eq!(E4M3.bits(1e-9), 0);
        assert_eq!(E4M3.bits(1.9999), E4M3.bits(2.0));
    }

    #[test]
    fn minima_prefer_numbers() {
        assert_eq!(minimum(f32::NAN, 1.0), 1.0);
        assert_eq!(maximum(1.0, f32::NAN), 1.0);
        assert!(minimum(0.0, -0.0).is_sign_negative());
        assert!(maximum(-0.0, 0.0).is_sign_positive());
    }

    #[test]
    fn halves_round_to_even() {
        assert_eq!(bf16_bits(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(bf16_bits(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(bf16_bits(f32::NAN), 0x7fff);
        assert_eq!(f16_bits(1e6), 0x7c00);
    }
}
