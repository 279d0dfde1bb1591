//! AVX2 with FMA, AVX-512, and AVX-512 with the bf16 dot product.
//!
//! Tile heights fill the registers: 16 of them hold 6 x 2 sums, 2 columns and a row (AVX2); 32 hold
//! 12 x 2 sums likewise (AVX-512).

use std::arch::x86_64::*;

use half::bf16;

use super::gemm::{Gemm, cover};
use super::{Isa, Operation};

/// Whether the CPU has the bf16 dot product, and gains by it: AMD's does twice the work of a
/// float32 product in the same time. Intel's (Sapphire Rapids) was measured to be slower than
/// float32 products of widened numbers, its fast bf16 being in AMX.
pub(crate) fn has_fast_bf16_dot() -> bool {
    const AMD: [u32; 3] = [0x6874_7541, 0x6974_6E65, 0x444D_4163];
    let vendor = __cpuid(0);
    is_x86_feature_detected!("avx512bf16") && [vendor.ebx, vendor.edx, vendor.ecx] == AMD
}

/// 2^f for f in [-1/2, 1/2], from f^5 down to f; the constant term is 1. Fitted for the least
/// relative error with the constant term fixed: 1.9e-7 after rounding, against 6e-8 of the
/// rounding alone.
#[expect(clippy::approx_constant, reason = "fitted, and not quite ln 2")]
const EXP2: [f32; 5] = [
    0.001_326_472_7,
    0.009_671_513,
    0.055_507_337,
    0.240_222_42,
    0.693_147,
];

/// AVX2 and FMA: 8 lanes.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// AVX-512F: 16 lanes.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

/// AVX-512F with `vdpbf16ps`: operands are bf16 pairs.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16;

impl Isa for Avx2 {
    type Real = f32;
    type Operand = f32;
    type Vector = __m256;
    type Words = __m256;

    const NAME: &'static str = "avx2";
    const LANES: usize = 8;
    const DEPTH: usize = 1;
    const UNROLL: usize = 4;

    unsafe fn enter<O: Operation<Self>>(operation: O) -> O::Output {
        #[target_feature(enable = "avx2,fma")]
        #[inline(never)]
        unsafe fn enabled<O: Operation<Avx2>>(operation: O) -> O::Output {
            // SAFETY: the trait's contract.
            unsafe { operation.run() }
        }
        // SAFETY: the trait's contract.
        unsafe { enabled(operation) }
    }

    #[inline(always)]
    unsafe fn gemm(gemm: &Gemm<'_, Self>, c: *mut f32) {
        // SAFETY: the caller has checked the product's addresses.
        unsafe {
            for first in 0..gemm.panels.len() {
                cover!(Self, gemm, c, first, 1 x 2, [1, 2, 3, 4, 5 | 6]);
            }
        }
    }

    fn to_operand(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m256) {
        // SAFETY: the trait's contract.
        unsafe { _mm256_storeu_ps(to, value) }
    }

    #[inline(always)]
    unsafe fn store_operands(to: *mut f32, value: __m256) {
        // SAFETY: the trait's contract.
        unsafe { Self::store(to, value) }
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn exp2(value: __m256) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe {
            let whole = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(value);
            let fraction = _mm256_sub_ps(value, whole);
            let mut power = _mm256_set1_ps(EXP2[0]);
            for coefficient in &EXP2[1..] {
                power = _mm256_fmadd_ps(power, fraction, _mm256_set1_ps(*coefficient));
            }
            power = _mm256_fmadd_ps(power, fraction, _mm256_set1_ps(1.0));
            // Times 2^whole, by adding to the exponent's bits.
            let exponent = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(whole));
            let scaled =
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), exponent));
            // Below -126 that would wrap around: such powers become 0. "Not less" keeps NaN, to
            // which the line above has added 0 (the shifted-out result of converting NaN).
            let normal = _mm256_cmp_ps::<_CMP_NLT_UQ>(value, _mm256_set1_ps(-126.0));
            _mm256_and_ps(scaled, normal)
        }
    }

    #[inline(always)]
    unsafe fn sum(value: __m256) -> f32 {
        // SAFETY: the trait's contract.
        unsafe {
            let half = _mm_add_ps(
                _mm256_castps256_ps128(value),
                _mm256_extractf128_ps::<1>(value),
            );
            let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps::<1>(quarter, quarter)))
        }
    }

    #[inline(always)]
    unsafe fn maximum(value: __m256) -> f32 {
        // SAFETY: the trait's contract.
        unsafe {
            let half = _mm_max_ps(
                _mm256_castps256_ps128(value),
                _mm256_extractf128_ps::<1>(value),
            );
            let quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_max_ss(quarter, _mm_shuffle_ps::<1>(quarter, quarter)))
        }
    }

    #[inline(always)]
    unsafe fn load_words(from: *const f32) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { Self::load(from) }
    }

    #[inline(always)]
    unsafe fn splat_word(from: *const f32) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_set1_ps(*from) }
    }

    #[inline(always)]
    unsafe fn mul_words(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
}

/// The functions that AVX-512 with and without bf16 operands have in common.
macro_rules! avx512_vectors {
    () => {
        type Real = f32;
        type Vector = __m512;

        const LANES: usize = 16;
        const UNROLL: usize = 1;

        #[inline(always)]
        unsafe fn gemm(gemm: &Gemm<'_, Self>, c: *mut f32) {
            // SAFETY: the caller has checked the product's addresses.
            unsafe {
                let mut first = 0;
                while gemm.panels.len() - first >= 2 {
                    cover!(Self, gemm, c, first, 2 x 1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 | 12]);
                    first += 2;
                }
                if first < gemm.panels.len() {
                    cover!(Self, gemm, c, first, 1 x 1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 | 12]);
                }
            }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> __m512 {
            // SAFETY: the trait's contract.
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            // SAFETY: the trait's contract.
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(to: *mut f32, value: __m512) {
            // SAFETY: the trait's contract.
            unsafe { _mm512_storeu_ps(to, value) }
        }

        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            // SAFETY: the trait's contract.
            unsafe { _mm512_add_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            // SAFETY: the trait's contract.
            unsafe { _mm512_sub_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            // SAFETY: the trait's contract.
            unsafe { _mm512_mul_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: the trait's contract.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            // SAFETY: the trait's contract.
            unsafe { _mm512_max_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn exp2(value: __m512) -> __m512 {
            // SAFETY: the trait's contract.
            unsafe {
                let whole = _mm512_roundscale_ps::<
                    { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
                >(value);
                let fraction = _mm512_sub_ps(value, whole);
                let mut power = _mm512_set1_ps(EXP2[0]);
                for coefficient in &EXP2[1..] {
                    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(*coefficient));
                }
                power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(1.0));
                // "Not less" keeps NaN; -inf, whose fraction is NaN, becomes 0.
                let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(value, _mm512_set1_ps(-126.0));
                _mm512_maskz_scalef_ps(normal, power, whole)
            }
        }

        #[inline(always)]
        unsafe fn sum(value: __m512) -> f32 {
            // SAFETY: the trait's contract.
            unsafe { _mm512_reduce_add_ps(value) }
        }

        #[inline(always)]
        unsafe fn maximum(value: __m512) -> f32 {
            // SAFETY: the trait's contract.
            unsafe { _mm512_reduce_max_ps(value) }
        }
    };
}

impl Isa for Avx512 {
    avx512_vectors!();

    type Operand = f32;
    type Words = __m512;

    const NAME: &'static str = "avx512";
    const DEPTH: usize = 1;

    unsafe fn enter<O: Operation<Self>>(operation: O) -> O::Output {
        #[target_feature(enable = "avx512f")]
        #[inline(never)]
        unsafe fn enabled<O: Operation<Avx512>>(operation: O) -> O::Output {
            // SAFETY: the trait's contract.
            unsafe { operation.run() }
        }
        // SAFETY: the trait's contract.
        unsafe { enabled(operation) }
    }

    fn to_operand(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    unsafe fn store_operands(to: *mut f32, value: __m512) {
        // SAFETY: the trait's contract.
        unsafe { Self::store(to, value) }
    }

    #[inline(always)]
    unsafe fn load_words(from: *const f32) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { Self::load(from) }
    }

    #[inline(always)]
    unsafe fn splat_word(from: *const f32) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_ps(*from) }
    }

    #[inline(always)]
    unsafe fn mul_words(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
}

impl Isa for Avx512Bf16 {
    avx512_vectors!();

    type Operand = bf16;
    type Words = __m512bh;

    const NAME: &'static str = "avx512-bf16";
    const DEPTH: usize = 2;

    unsafe fn enter<O: Operation<Self>>(operation: O) -> O::Output {
        #[target_feature(enable = "avx512f,avx512bf16")]
        #[inline(never)]
        unsafe fn enabled<O: Operation<Avx512Bf16>>(operation: O) -> O::Output {
            // SAFETY: the trait's contract.
            unsafe { operation.run() }
        }
        // SAFETY: the trait's contract.
        unsafe { enabled(operation) }
    }

    fn to_operand(value: f32) -> bf16 {
        bf16::from_f32(value)
    }

    #[inline(always)]
    unsafe fn store_operands(to: *mut bf16, value: __m512) {
        // SAFETY: the trait's contract; 16 bf16 numbers are 32 bytes, as is the vector.
        unsafe {
            let rounded: __m256bh = _mm512_cvtneps_pbh(value);
            to.cast::<__m256bh>().write_unaligned(rounded);
        }
    }

    #[inline(always)]
    unsafe fn load_words(from: *const bf16) -> __m512bh {
        // SAFETY: the trait's contract; 16 words of two bf16 numbers are 64 bytes.
        unsafe { from.cast::<__m512bh>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn splat_word(from: *const bf16) -> __m512bh {
        // SAFETY: the trait's contract; a pair of bf16 numbers is read as one 32-bit number, and
        // vectors of the same size are reinterpreted.
        unsafe {
            let pair = from.cast::<i32>().read_unaligned();
            std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair))
        }
    }

    #[inline(always)]
    unsafe fn mul_words(a: __m512bh, b: __m512bh, c: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_dpbf16_ps(c, a, b) }
    }
}
