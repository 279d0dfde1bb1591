//! [`Element`]: what tensors hold, how it is widened to the numbers that are computed with, and
//! which instructions suit it. Read by packing, written by the drivers' epilogues.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::simd::{self, Job, Operands, Real};

mod sealed {
    pub trait Sealed {}
}

/// An element type of tensors: f16, bf16, f32 or f64.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// What is accumulated in, and the lse's type: f64 for f64, f32 for all others.
    type Real: Real;

    /// Converts a row exactly.
    #[doc(hidden)]
    fn widen(from: &[Self], to: &mut [Self::Real]);
    /// Converts a row, rounding to nearest.
    #[doc(hidden)]
    fn narrow(from: &[Self::Real], to: &mut [Self]);
    /// Runs a job with the best instructions for products of such elements.
    #[doc(hidden)]
    fn run_products(job: impl Job<Self::Real>);
    /// Runs a job with the best instructions that round no operand.
    #[doc(hidden)]
    fn run_exact(job: impl Job<Self::Real>);
}

macro_rules! elements {
    ($($element:ty: $real:ty, |$wide_from:ident, $wide_to:ident| $widen:expr,
        |$narrow_from:ident, $narrow_to:ident| $narrow:expr,
        |$products:ident| $run_products:expr, |$exact:ident| $run_exact:expr;)*) => {$(
        impl sealed::Sealed for $element {}

        impl Element for $element {
            type Real = $real;

            fn widen($wide_from: &[Self], $wide_to: &mut [Self::Real]) {
                $widen
            }

            fn narrow($narrow_from: &[Self::Real], $narrow_to: &mut [Self]) {
                $narrow
            }

            fn run_products($products: impl Job<Self::Real>) {
                $run_products
            }

            fn run_exact($exact: impl Job<Self::Real>) {
                $run_exact
            }
        }
    )*};
}

elements! {
    f32: f32, |from, to| to.copy_from_slice(from), |from, to| to.copy_from_slice(from),
        |job| simd::run_f32(job, Operands::Exact), |job| simd::run_f32(job, Operands::Exact);
    f64: f64, |from, to| to.copy_from_slice(from), |from, to| to.copy_from_slice(from),
        |job| simd::run_f64(job), |job| simd::run_f64(job);
    bf16: f32, |from, to| widen_bf16(from, to), |from, to| to.convert_from_f32_slice(from),
        |job| simd::run_f32(job, Operands::Bf16), |job| simd::run_f32(job, Operands::Exact);
    f16: f32, |from, to| from.convert_to_f32_slice(to), |from, to| to.convert_from_f32_slice(from),
        |job| simd::run_f32(job, Operands::Exact), |job| simd::run_f32(job, Operands::Exact);
}

/// A bf16 number is the upper half of an f32; said so, the compiler vectorises it.
fn widen_bf16(from: &[bf16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32::from_bits(u32::from(from.to_bits()) << 16);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_widens_exactly() {
        let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let mut wide = vec![0.0; all.len()];
        bf16::widen(&all, &mut wide);
        for (from, to) in all.iter().zip(&wide) {
            assert!(from.to_f32() == *to || (from.is_nan() && to.is_nan()));
        }
    }
}
