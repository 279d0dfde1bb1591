//! Row operations between the products: the online softmax of the forward pass, and P and dS of
//! the backward pass. A tile's rows lie `stride` reals apart, of which the first `columns` (a
//! multiple of 16) count. Called by the drivers.

use super::{Isa, Operation, PANEL, Real};

/// A tile of scores, of which the last `pad` columns stand for no key.
pub struct Scores<'a, R> {
    pub values: &'a mut [R],
    pub stride: usize,
    pub rows: usize,
    pub columns: usize,
    pub pad: usize,
}

impl<R> Scores<'_, R> {
    fn check(&self, len: usize) {
        assert!(self.rows > 0 && self.columns.is_multiple_of(PANEL) && self.pad < PANEL);
        assert!(self.pad < self.columns && self.columns <= self.stride);
        assert!((self.rows - 1) * self.stride + self.columns <= len);
    }
}

/// What the online softmax keeps for each row from tile to tile.
pub struct Running<'a, R> {
    /// The largest `scale * score` so far, -inf at first.
    pub max: &'a mut [R],
    /// The sum of 2^(scale * score - max) so far, 0 at first.
    pub sum: &'a mut [R],
    /// The output so far, not yet divided by the sum: rows of `out_stride`.
    pub out: &'a mut [R],
    pub out_stride: usize,
}

/// One step of the online softmax (Milakov, Gimelshein, arXiv 1805.02867): scores become
/// probabilities relative to the rows' new maxima, as operands in place, and what was summed up
/// relative to the old maxima is rescaled. `scale`, which is positive, includes log2(e).
pub fn softmax<I: Isa>(scores: Scores<'_, I::Real>, scale: I::Real, running: Running<'_, I::Real>) {
    let rows = scores.rows;
    scores.check(scores.values.len());
    assert!(running.max.len() >= rows && running.sum.len() >= rows);
    assert!(
        running.out_stride.is_multiple_of(PANEL) && running.out.len() >= rows * running.out_stride
    );
    // SAFETY: the instruction set is the CPU's (see `simd`); all rows lie inside of their slices.
    unsafe {
        I::enter(Softmax {
            scores,
            scale,
            running,
        })
    }
}

struct Softmax<'a, R> {
    scores: Scores<'a, R>,
    scale: R,
    running: Running<'a, R>,
}

impl<I: Isa> Operation<I> for Softmax<'_, I::Real> {
    type Output = ();

    #[inline(always)]
    unsafe fn run(self) {
        let Self {
            scores,
            scale,
            running,
        } = self;
        // SAFETY: `softmax` has checked that all rows lie inside of their slices, and columns are
        // a multiple of the lanes.
        unsafe {
            let scale_vector = I::splat(scale);
            for r in 0..scores.rows {
                let row = scores.values.as_mut_ptr().add(r * scores.stride);
                for column in scores.columns - scores.pad..scores.columns {
                    *row.add(column) = I::Real::NEG_INFINITY;
                }
                // Two chains, as one would wait for itself.
                let mut high = [I::load(row); 2];
                for at in (0..scores.columns).step_by(PANEL) {
                    high[0] = I::max(high[0], I::load(row.add(at)));
                    high[1] = I::max(high[1], I::load(row.add(at + PANEL - I::LANES)));
                    for lane in (I::LANES..PANEL - I::LANES).step_by(I::LANES) {
                        high[1] = I::max(high[1], I::load(row.add(at + lane)));
                    }
                }
                let high = scale * I::maximum(I::max(high[0], high[1]));
                let old = running.max[r];
                // Written so that a NaN in `high` stays: the row's output is NaN then.
                let new = if old > high { old } else { high };
                // A row of which nothing counts so far: all its scores are -inf, and P is 0.
                let base = if new == I::Real::NEG_INFINITY {
                    I::Real::ZERO
                } else {
                    new
                };
                let shift = I::splat(I::Real::ZERO - base);
                let mut sums = [I::splat(I::Real::ZERO); 2];
                for at in (0..scores.columns).step_by(PANEL) {
                    for (part, lane) in (0..PANEL).step_by(I::LANES).enumerate() {
                        let score = I::load(row.add(at + lane));
                        let p = I::exp2(I::mul_add(score, scale_vector, shift));
                        sums[part % 2] = I::add(sums[part % 2], p);
                        I::store_operands(row.cast::<I::Operand>().add(at + lane), p);
                    }
                }
                let sum = I::sum(I::add(sums[0], sums[1]));
                if new > old {
                    let fade = (old - new).exp2();
                    let fade_vector = I::splat(fade);
                    running.sum[r] = running.sum[r] * fade;
                    let out = running.out.as_mut_ptr().add(r * running.out_stride);
                    for at in (0..running.out_stride).step_by(I::LANES) {
                        I::store(out.add(at), I::mul(I::load(out.add(at)), fade_vector));
                    }
                }
                running.max[r] = new;
                running.sum[r] += sum;
            }
        }
    }
}

/// What the backward pass knows of each row.
pub struct RowFacts<'a, R> {
    /// Base-2 logarithm of the row's sum of exp(scale * score).
    pub lse: &'a [R],
    /// The row's sum of out * dout, less the lse's own gradient.
    pub delta: &'a [R],
}

/// Scores become probabilities `P = 2^(scale * score - lse)`, and their gradients, `dP`, in a tile
/// of the same shape, become the scores' gradients `dS = P (dP - delta)`. Operands in place.
pub fn softmax_gradient<I: Isa>(
    scores: Scores<'_, I::Real>,
    gradients: &mut [I::Real],
    scale: I::Real,
    facts: RowFacts<'_, I::Real>,
) {
    scores.check(scores.values.len());
    scores.check(gradients.len());
    assert!(facts.lse.len() >= scores.rows && facts.delta.len() >= scores.rows);
    // SAFETY: the instruction set is the CPU's (see `simd`); all rows lie inside of their slices.
    unsafe {
        I::enter(SoftmaxGradient {
            scores,
            gradients,
            scale,
            facts,
        })
    }
}

struct SoftmaxGradient<'a, R> {
    scores: Scores<'a, R>,
    gradients: &'a mut [R],
    scale: R,
    facts: RowFacts<'a, R>,
}

impl<I: Isa> Operation<I> for SoftmaxGradient<'_, I::Real> {
    type Output = ();

    #[inline(always)]
    unsafe fn run(self) {
        let Self {
            scores,
            gradients,
            scale,
            facts,
        } = self;
        // SAFETY: `softmax_gradient` has checked that all rows lie inside of their slices, and
        // columns are a multiple of the lanes.
        unsafe {
            let scale = I::splat(scale);
            for r in 0..scores.rows {
                let row = scores.values.as_mut_ptr().add(r * scores.stride);
                let gradient = gradients.as_mut_ptr().add(r * scores.stride);
                let shift = I::splat(I::Real::ZERO - facts.lse[r]);
                let delta = I::splat(facts.delta[r]);
                for at in (0..scores.columns).step_by(I::LANES) {
                    let p = I::exp2(I::mul_add(I::load(row.add(at)), scale, shift));
                    let ds = I::mul(p, I::sub(I::load(gradient.add(at)), delta));
                    I::store_operands(row.cast::<I::Operand>().add(at), p);
                    I::store_operands(gradient.cast::<I::Operand>().add(at), ds);
                }
                for column in scores.columns - scores.pad..scores.columns {
                    *row.cast::<I::Operand>().add(column) = I::Operand::default();
                    *gradient.cast::<I::Operand>().add(column) = I::Operand::default();
                }
            }
        }
    }
}

/// A tile that row operations have left as operands, as a slice of such; row `r` starts at
/// `r * operand_stride(stride)`.
pub fn as_operands<I: Isa>(tile: &[I::Real]) -> &[I::Operand] {
    let ratio = operand_stride::<I>(1);
    // SAFETY: operands are plain numbers that are not larger than reals nor stricter in alignment
    // (`operand_stride` divides), so the same bytes hold `ratio` times as many.
    unsafe { std::slice::from_raw_parts(tile.as_ptr().cast(), tile.len() * ratio) }
}

/// A stride in reals, as operands.
pub const fn operand_stride<I: Isa>(reals: usize) -> usize {
    const {
        assert!(size_of::<I::Real>().is_multiple_of(size_of::<I::Operand>()));
        assert!(align_of::<I::Operand>() <= align_of::<I::Real>());
    }
    reals * (size_of::<I::Real>() / size_of::<I::Operand>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::for_each_isa;

    fn tolerance<R: Real>() -> f64 {
        if size_of::<R>() == 8 { 1e-14 } else { 4e-7 }
    }

    fn power_of_two<I: Isa>()
    where
        I::Real: Into<f64>,
    {
        struct All<'a, R>(&'a mut [R]);
        impl<I: Isa> Operation<I> for All<'_, I::Real> {
            type Output = ();
            #[inline(always)]
            unsafe fn run(self) {
                for values in self.0.chunks_exact_mut(I::LANES) {
                    // SAFETY: a chunk is as long as a vector.
                    unsafe { I::store(values.as_mut_ptr(), I::exp2(I::load(values.as_ptr()))) }
                }
            }
        }
        let powers: Vec<f64> = (-12600..12700).map(|i| f64::from(i) / 100.0).collect();
        let special = [f64::NEG_INFINITY, -1e30, -200.0, f64::NAN];
        let all: Vec<f64> = powers.iter().chain(&special).copied().collect();
        let mut values: Vec<I::Real> = all.iter().map(|&p| I::Real::of(p)).collect();
        values.resize(all.len().next_multiple_of(16), I::Real::ZERO);
        let given: Vec<f64> = values.iter().map(|&v| v.into()).collect();
        // SAFETY: `for_each_isa` has found the CPU to have the instructions.
        unsafe { I::enter(All(&mut values)) };
        for (i, &power) in given.iter().enumerate().take(powers.len()) {
            let (got, want): (f64, f64) = (values[i].into(), power.exp2());
            assert!(
                (got / want - 1.0).abs() < tolerance::<I::Real>(),
                "{} 2^{power}: {got}",
                I::NAME
            );
        }
        let specials: Vec<f64> = values[powers.len()..][..4]
            .iter()
            .map(|&v| v.into())
            .collect();
        assert!(
            specials[..2] == [0.0, 0.0] && specials[2] < 1e-50 && specials[3].is_nan(),
            "{} {specials:?}",
            I::NAME
        );
    }

    #[test]
    fn powers_of_two_are_accurate_and_end_well() {
        for_each_isa!(power_of_two);
    }

    /// Two steps over one row each equal one softmax over both.
    fn two_steps<I: Isa>()
    where
        I::Real: Into<f64>,
    {
        let first: Vec<f64> = (0..32).map(|i| f64::from(i * 7 % 32) / 8.0 - 2.0).collect();
        let second: Vec<f64> = (0..16).map(|i| f64::from(i * 5 % 16) / 2.0 - 1.0).collect();
        let pad = 3;
        let real = |values: &[f64]| values.iter().map(|&v| I::Real::of(v)).collect::<Vec<_>>();
        let (mut max, mut sum) = ([I::Real::NEG_INFINITY], [I::Real::ZERO]);
        let mut out = vec![I::Real::of(0.0); 16];
        for (values, pad) in [(&first, 0), (&second, pad)] {
            let mut scores = real(values);
            let columns = scores.len();
            softmax::<I>(
                Scores {
                    values: &mut scores,
                    stride: columns,
                    rows: 1,
                    columns,
                    pad,
                },
                I::Real::of(0.5),
                Running {
                    max: &mut max,
                    sum: &mut sum,
                    out: &mut out,
                    out_stride: 16,
                },
            );
            // "P V" with V = 1 in the first column of the output.
            let p: I::Real = sum[0] - out[0];
            out[0] += p;
        }
        let all = || first.iter().chain(&second[..16 - pad]).map(|s| 0.5 * s);
        let top = all().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = all().map(|s| (s - top).exp2()).sum();
        assert_eq!(max[0].into(), top);
        for got in [sum[0], out[0]] {
            let got: f64 = got.into();
            assert!(
                (got / total - 1.0).abs() < 1e-6,
                "{} {got} {total}",
                I::NAME
            );
        }
    }

    /// A row without scores that count, then one with some: as if the first had not been.
    fn nothing_counts_at_first<I: Isa>()
    where
        I::Real: Into<f64>,
    {
        let (mut max, mut sum) = ([I::Real::NEG_INFINITY], [I::Real::ZERO]);
        let mut out = vec![I::Real::ZERO; 16];
        for (score, expected) in [(f64::NEG_INFINITY, 0.0), (1.0, 16.0)] {
            let mut scores = vec![I::Real::of(score); 16];
            softmax::<I>(
                Scores {
                    values: &mut scores,
                    stride: 16,
                    rows: 1,
                    columns: 16,
                    pad: 0,
                },
                I::Real::of(0.5),
                Running {
                    max: &mut max,
                    sum: &mut sum,
                    out: &mut out,
                    out_stride: 16,
                },
            );
            assert_eq!(sum[0].into(), expected, "{}", I::NAME);
            assert!(out.iter().all(|&x| x == I::Real::ZERO), "{}", I::NAME);
        }
        assert_eq!(max[0].into(), 0.5);
    }

    #[test]
    fn rows_of_which_nothing_counts() {
        for_each_isa!(nothing_counts_at_first);
    }

    #[test]
    fn softmax_in_two_steps() {
        for_each_isa!(two_steps);
    }
}
