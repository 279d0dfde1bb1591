//! The room of vector instructions: one [`Isa`] for each instruction set, and the operations that
//! attention is made of, written once over any of them: [`gemm`], the row operations of
//! [`rows`], and what masks with an expression hide of a tile ([`exact`]). In: slices. Out: slices. Called by the forward and backward drivers, which are
//! generic over `Isa` and hold no vector code.
//!
//! All `unsafe` arithmetic of this crate is below this module. The contract is the same
//! everywhere: safe functions check the bounds of whole operations, vector code inside trusts
//! them; a type that implements `Isa` is only used by [`run_f32`] and [`run_f64`] after the CPU
//! has been found to have its instructions.

pub mod exact;
pub mod gemm;
mod portable;
pub mod rows;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512, Avx512Bf16};

use gemm::Gemm;

/// Keys of a packed panel, and the granule of all packed extents. Equal to the granule of block
/// sizes, so that no panel straddles two blocks.
pub(crate) const PANEL: usize = flex_block_attn_mask::BLOCK_STEP;

/// The number type that is accumulated in. (It and the traits below are `pub` in a private
/// module: the public trait `Element` names them.)
pub trait Real:
    Copy
    + Default
    + Send
    + Sync
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::AddAssign
    + 'static
{
    const ZERO: Self;
    const NEG_INFINITY: Self;
    fn of(value: f64) -> Self;
    fn ln(self) -> Self;
    fn exp2(self) -> Self;
    fn recip(self) -> Self;
    fn to_f32(self) -> f32;
}

macro_rules! reals {
    ($($real:ident),*) => {$(
        impl Real for $real {
            const ZERO: Self = 0.0;
            const NEG_INFINITY: Self = $real::NEG_INFINITY;
            fn of(value: f64) -> Self {
                value as $real
            }
            fn ln(self) -> Self {
                self.ln()
            }
            fn to_f32(self) -> f32 {
                self as f32
            }
            fn exp2(self) -> Self {
                self.exp2()
            }
            fn recip(self) -> Self {
                self.recip()
            }
        }
    )*};
}

reals!(f32, f64);

/// An instruction set: vectors of [`Isa::Real`], and multiplication of packed operands.
///
/// Operands are what a product multiplies: reals, or bf16 numbers in pairs that one instruction
/// multiplies and adds ([`Isa::DEPTH`] = 2). A **word** is `DEPTH` operands that follow each
/// other along the dimension that is summed over.
///
/// # Safety
/// Of every function here: the CPU has the instructions, and pointers are valid for the
/// [`Isa::LANES`] values (or the word) that the function reads or writes; alignment is free.
pub trait Isa: Copy + Send + Sync + 'static {
    type Real: Real;
    type Operand: Copy + Default + Send + Sync + 'static;
    /// [`Isa::LANES`] reals.
    type Vector: Copy;
    /// [`Isa::LANES`] words.
    type Words: Copy;

    const NAME: &'static str;
    const LANES: usize;
    const DEPTH: usize;
    /// Words that a product's inner loop takes at once where `A` lies in rows: its addresses then
    /// differ by constants. Divides 8. Where a step is long, 1: unrolled, the compiler moves loads
    /// ahead and runs out of registers.
    const UNROLL: usize;

    /// Runs an operation compiled with this instruction set.
    unsafe fn enter<O: Operation<Self>>(operation: O) -> O::Output;
    /// The product with tiles of this instruction set's shape.
    unsafe fn gemm(gemm: &Gemm<'_, Self>, c: *mut Self::Real);

    fn to_operand(value: Self::Real) -> Self::Operand;

    unsafe fn splat(value: Self::Real) -> Self::Vector;
    unsafe fn load(from: *const Self::Real) -> Self::Vector;
    unsafe fn store(to: *mut Self::Real, value: Self::Vector);
    /// Stores as operands.
    unsafe fn store_operands(to: *mut Self::Operand, value: Self::Vector);
    unsafe fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    unsafe fn sub(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    unsafe fn mul(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`.
    unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The larger; where one is NaN, either of them.
    unsafe fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// 2 to the power of each, for powers up to 127; NaN stays NaN, below the smallest normal
    /// number it is 0.
    unsafe fn exp2(value: Self::Vector) -> Self::Vector;
    unsafe fn sum(value: Self::Vector) -> Self::Real;
    unsafe fn maximum(value: Self::Vector) -> Self::Real;

    unsafe fn load_words(from: *const Self::Operand) -> Self::Words;
    /// One word, repeated.
    unsafe fn splat_word(from: *const Self::Operand) -> Self::Words;
    /// `c` plus, for each lane, the word's products.
    unsafe fn mul_words(a: Self::Words, b: Self::Words, c: Self::Vector) -> Self::Vector;
}

/// Code to be compiled for an instruction set. Implementations mark `run` `#[inline(always)]`,
/// and all that `run` calls as well: only what is inlined into [`Isa::enter`] is so compiled.
pub trait Operation<I: Isa> {
    type Output;
    /// # Safety
    /// Called from [`Isa::enter`] only.
    unsafe fn run(self) -> Self::Output;
}

/// A whole computation, generic over the instruction set it is given.
pub trait Job<R: Real> {
    fn run<I: Isa<Real = R>>(self);
}

/// Runs a job with the best instructions for float32 that this CPU has.
pub(crate) fn run_f32(job: impl Job<f32>, operands: Operands) {
    #[cfg(target_arch = "x86_64")]
    {
        let avx512 = is_x86_feature_detected!("avx512f");
        if avx512 && operands == Operands::Bf16 && x86::has_fast_bf16_dot() {
            return job.run::<Avx512Bf16>();
        }
        if avx512 {
            return job.run::<Avx512>();
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return job.run::<Avx2>();
        }
    }
    let _ = operands;
    job.run::<Portable<f32>>();
}

/// Runs a job in float64.
pub(crate) fn run_f64(job: impl Job<f64>) {
    job.run::<Portable<f64>>();
}

/// To which precision operands may be rounded before they are multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operands {
    /// Not at all.
    Exact,
    /// To bf16: the tensors are bf16, and so may be the probabilities, as on GPUs.
    Bf16,
}

/// Calls a generic test once for each instruction set of this CPU.
#[cfg(test)]
macro_rules! for_each_isa {
    ($test:ident) => {{
        use $crate::simd::Portable;
        $test::<Portable<f32>>();
        $test::<Portable<f64>>();
        #[cfg(target_arch = "x86_64")]
        {
            use $crate::simd::{Avx2, Avx512, Avx512Bf16};
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                $test::<Avx2>();
            } else {
                println!("not run for avx2: this CPU lacks it");
            }
            if is_x86_feature_detected!("avx512f") {
                $test::<Avx512>();
            } else {
                println!("not run for avx512: this CPU lacks it");
            }
            if is_x86_feature_detected!("avx512bf16") {
                $test::<Avx512Bf16>();
            } else {
                println!("not run for avx512-bf16: this CPU lacks it");
            }
        }
    }};
}
#[cfg(test)]
pub(crate) use for_each_isa;
