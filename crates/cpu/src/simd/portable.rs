//! [`Portable`]: vectors as arrays, which the compiler maps to what the target has (NEON on
//! aarch64, SSE2 on x86-64). The only instruction set for float64, where exactness, not speed, is
//! asked for.

use super::gemm::{Gemm, cover};
use super::{Isa, Operation, Real};

/// Arrays of eight values as vectors.
#[derive(Clone, Copy)]
pub(crate) struct Portable<R>(std::marker::PhantomData<R>);

const LANES: usize = 8;

fn zip<R: Copy>(a: [R; LANES], b: [R; LANES], f: impl Fn(R, R) -> R) -> [R; LANES] {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

impl<R: Real + Default> Isa for Portable<R> {
    type Real = R;
    type Operand = R;
    type Vector = [R; LANES];
    type Words = [R; LANES];

    const NAME: &'static str = "portable";
    const LANES: usize = LANES;
    const DEPTH: usize = 1;
    const UNROLL: usize = 1;

    unsafe fn enter<O: Operation<Self>>(operation: O) -> O::Output {
        // SAFETY: these instructions are every CPU's.
        unsafe { operation.run() }
    }

    #[inline(always)]
    unsafe fn gemm(gemm: &Gemm<'_, Self>, c: *mut R) {
        // SAFETY: the caller has checked the product's addresses.
        unsafe {
            for first in 0..gemm.panels.len() {
                cover!(Self, gemm, c, first, 1 x 2, [1, 2, 3 | 4]);
            }
        }
    }

    fn to_operand(value: R) -> R {
        value
    }

    #[inline(always)]
    unsafe fn splat(value: R) -> [R; LANES] {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const R) -> [R; LANES] {
        // SAFETY: the trait's contract.
        unsafe { from.cast::<[R; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut R, value: [R; LANES]) {
        // SAFETY: the trait's contract.
        unsafe { to.cast::<[R; LANES]>().write_unaligned(value) }
    }

    #[inline(always)]
    unsafe fn store_operands(to: *mut R, value: [R; LANES]) {
        // SAFETY: the trait's contract.
        unsafe { Self::store(to, value) }
    }

    #[inline(always)]
    unsafe fn add(a: [R; LANES], b: [R; LANES]) -> [R; LANES] {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(a: [R; LANES], b: [R; LANES]) -> [R; LANES] {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(a: [R; LANES], b: [R; LANES]) -> [R; LANES] {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn mul_add(a: [R; LANES], b: [R; LANES], c: [R; LANES]) -> [R; LANES] {
        // Not `f32::mul_add`: without a fused instruction that is a call into the C library.
        std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }

    #[inline(always)]
    unsafe fn max(a: [R; LANES], b: [R; LANES]) -> [R; LANES] {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn exp2(value: [R; LANES]) -> [R; LANES] {
        value.map(Real::exp2)
    }

    #[inline(always)]
    unsafe fn sum(value: [R; LANES]) -> R {
        value.into_iter().fold(R::ZERO, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn maximum(value: [R; LANES]) -> R {
        value
            .into_iter()
            .fold(R::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn load_words(from: *const R) -> [R; LANES] {
        // SAFETY: the trait's contract.
        unsafe { Self::load(from) }
    }

    #[inline(always)]
    unsafe fn splat_word(from: *const R) -> [R; LANES] {
        // SAFETY: the trait's contract.
        [unsafe { *from }; LANES]
    }

    #[inline(always)]
    unsafe fn mul_words(a: [R; LANES], b: [R; LANES], c: [R; LANES]) -> [R; LANES] {
        // SAFETY: no instruction beyond every CPU's.
        unsafe { Self::mul_add(a, b, c) }
    }
}
