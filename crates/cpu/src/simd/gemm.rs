//! The matrix product that all of attention's products are: `C = A B` or `C += A B`, with `A` as it
//! lies or transposed, and `B` in panels of 16 columns whose rows come in
//! runs (so that gathered blocks need no copy). Called by the drivers; the inner tile is shared by
//! all instruction sets, which choose its shape.
//!
//! Addresses, in operands, with `s` counting words along the dimension that is summed over:
//!
//! - `A(row, s)` is at `row * stride + s * DEPTH`, or, transposed, at `row * DEPTH + s * stride`;
//! - `B(s, panel, column)` is at `panels[panel] + run.start + (s - words before) * b_step +
//!   column * DEPTH`, `run` being the run that word `s` falls into.

use super::{Isa, Operation, PANEL, Real};

/// Consecutive rows of `B`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Offset of the first, in operands.
    pub start: usize,
    /// Their number, in words.
    pub words: usize,
}

/// The left factor.
pub struct Left<'a, I: Isa> {
    pub values: &'a [I::Operand],
    /// From a row to the next, or, transposed, from a word to the next; in operands.
    pub stride: usize,
    pub transposed: bool,
}

impl<I: Isa> Left<'_, I> {
    /// From a row to the next, in operands.
    pub(super) fn row_stride(&self) -> usize {
        if self.transposed {
            I::DEPTH
        } else {
            self.stride
        }
    }

    /// From a word to the next, in operands.
    fn word_stride(&self) -> usize {
        if self.transposed {
            self.stride
        } else {
            I::DEPTH
        }
    }
}

/// One product; see the module's head for the meaning of the strides.
pub struct Gemm<'a, I: Isa> {
    pub rows: usize,
    pub a: Left<'a, I>,
    pub b: &'a [I::Operand],
    pub b_step: usize,
    /// Where each panel of `B` starts, in operands; panel `p` makes columns `16 p ..` of `C`.
    pub panels: &'a [usize],
    pub runs: &'a [Run],
    pub c_row: usize,
    /// Add to `C` instead of overwriting it.
    pub accumulate: bool,
}

impl<I: Isa> Gemm<'_, I> {
    /// Computes the product into `c`.
    ///
    /// # Panics
    /// When an operand would be read, or `c` written, outside of its slice; when `A` is not
    /// transposed and a run is no multiple of [`Isa::UNROLL`] words.
    pub fn run(&self, c: &mut [I::Real]) {
        if self.rows == 0 || self.panels.is_empty() {
            return;
        }
        let words: usize = self.runs.iter().map(|run| run.words).sum();
        if words > 0 {
            let a = &self.a;
            let a_last =
                (self.rows - 1) * a.row_stride() + (words - 1) * a.word_stride() + I::DEPTH;
            assert!(
                a_last <= a.values.len(),
                "A ends at {a_last} of {}",
                a.values.len()
            );
        }
        let last_panel = *self.panels.iter().max().expect("there are panels");
        for run in self.runs.iter().filter(|run| run.words > 0) {
            let b_last = last_panel + run.start + (run.words - 1) * self.b_step + PANEL * I::DEPTH;
            assert!(
                b_last <= self.b.len(),
                "B ends at {b_last} of {}",
                self.b.len()
            );
        }
        let c_last = (self.rows - 1) * self.c_row + self.panels.len() * PANEL;
        assert!(c_last <= c.len(), "C ends at {c_last} of {}", c.len());
        let unrolled = self
            .runs
            .iter()
            .all(|run| run.words.is_multiple_of(I::UNROLL));
        assert!(
            self.a.transposed || unrolled,
            "a run is no multiple of {} words",
            I::UNROLL
        );
        // SAFETY: all addresses of the module's head have just been found to lie inside of their
        // slices.
        unsafe { I::gemm(self, c.as_mut_ptr()) }
    }
}

/// `MR` rows by `NP` panels of `C`, each panel `VP` vectors wide, kept in registers over the sum.
///
/// Each shape is a function of its own (see [`Isa::enter`]): inlined into one, the compiler has
/// them compete for registers.
pub struct Tile<'a, I: Isa, const MR: usize, const NP: usize, const VP: usize> {
    pub gemm: &'a Gemm<'a, I>,
    /// The tile's first row of `A`.
    pub a: *const I::Operand,
    pub panels: [*const I::Operand; NP],
    /// The tile's first element of `C`.
    pub c: *mut I::Real,
}

impl<I: Isa, const MR: usize, const NP: usize, const VP: usize> Operation<I>
    for Tile<'_, I, MR, NP, VP>
{
    type Output = ();

    #[inline(always)]
    unsafe fn run(self) {
        let Self {
            gemm,
            mut a,
            panels,
            c,
        } = self;
        // SAFETY: `Gemm::run` has checked the product's addresses, those of the module's head.
        unsafe {
            let mut sums = [[[I::splat(I::Real::ZERO); VP]; NP]; MR];
            for run in gemm.runs {
                let mut b = panels.map(|panel| panel.add(run.start));
                if gemm.a.transposed {
                    for _ in 0..run.words {
                        step::<I, MR, NP, VP>(&mut sums, a, I::DEPTH, b);
                        a = a.add(gemm.a.stride);
                        b = b.map(|b| b.add(gemm.b_step));
                    }
                } else {
                    for _ in 0..run.words / I::UNROLL {
                        for _ in 0..I::UNROLL {
                            step::<I, MR, NP, VP>(&mut sums, a, gemm.a.stride, b);
                            a = a.add(I::DEPTH);
                            b = b.map(|b| b.add(gemm.b_step));
                        }
                    }
                }
            }
            for (m, row) in sums.iter().enumerate() {
                for (p, panel) in row.iter().enumerate() {
                    for (v, &sum) in panel.iter().enumerate() {
                        let at = c.add(m * gemm.c_row + p * PANEL + v * I::LANES);
                        let old = if gemm.accumulate {
                            I::load(at)
                        } else {
                            I::splat(I::Real::ZERO)
                        };
                        I::store(at, I::add(old, sum));
                    }
                }
            }
        }
    }
}

/// One word of each row times one row of each panel.
///
/// # Safety
/// The addresses lie inside of the product's slices.
#[inline(always)]
unsafe fn step<I: Isa, const MR: usize, const NP: usize, const VP: usize>(
    sums: &mut [[[I::Vector; VP]; NP]; MR],
    a: *const I::Operand,
    a_row: usize,
    b: [*const I::Operand; NP],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let columns: [[I::Words; VP]; NP] =
            b.map(|b| std::array::from_fn(|v| I::load_words(b.add(v * I::LANES * I::DEPTH))));
        for (m, row) in sums.iter_mut().enumerate() {
            let word = I::splat_word(a.add(m * a_row));
            for (panel, columns) in row.iter_mut().zip(columns) {
                for (sum, column) in panel.iter_mut().zip(columns) {
                    *sum = I::mul_words(word, column, *sum);
                }
            }
        }
    }
}

/// Covers some panels of `C` with tiles of the given heights, which are all from 1 to the largest.
///
/// Rows are shared out evenly, since low tiles wait for their own sums: 8 rows by tiles of 6 at
/// most are 4 + 4, not 6 + 2. Rows go inside of panels, so that a panel of `B` stays in the
/// first-level cache while rows of `A` stream by.
macro_rules! cover {
    ($isa:ty, $gemm:ident, $c:ident, $first:expr, $panels:literal x $vectors:literal,
        [$($height:literal),+ | $largest:literal]) => {{
        let panels: [*const <$isa as $crate::simd::Isa>::Operand; $panels] =
            std::array::from_fn(|p| $gemm.b.as_ptr().add($gemm.panels[$first + p]));
        let mut row = 0;
        while row < $gemm.rows {
            let left = $gemm.rows - row;
            let height = left.div_ceil(left.div_ceil($largest));
            let a = $gemm.a.values.as_ptr().add(row * $gemm.a.row_stride());
            let c = $c.add(row * $gemm.c_row + $first * $crate::simd::PANEL);
            let gemm = $gemm;
            match height {
                $($height => <$isa>::enter($crate::simd::gemm::Tile::<$isa, $height, $panels, $vectors> {
                    gemm, a, panels, c,
                }),)+
                _ => <$isa>::enter($crate::simd::gemm::Tile::<$isa, $largest, $panels, $vectors> {
                    gemm, a, panels, c,
                }),
            }
            row += height;
        }
    }};
}
pub(super) use cover;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::for_each_isa;

    /// A product over gathered runs and panels, for all heights that tiles are made of, against
    /// the definition in float64.
    fn product<I: Isa>() {
        for rows in (1..=30).chain([64, 77]) {
            for (columns, accumulate) in [(1, false), (2, true), (3, true), (5, false)] {
                check::<I>(rows, columns, accumulate, true);
                check::<I>(rows, columns, accumulate, false);
            }
        }
    }

    fn check<I: Isa>(rows: usize, columns: usize, accumulate: bool, transposed: bool) {
        let value = |i: usize| ((i * 37 + 11) % 64) as f64 / 32.0 - 1.0;
        let operand = |i: usize| I::to_operand(I::Real::of(value(i)));
        // Transposed, any number of words will do.
        let words = if transposed { 7 } else { 8 };
        let stride = if transposed {
            rows * I::DEPTH + 4
        } else {
            words * I::DEPTH + 4
        };
        let (a_row, a_step) = if transposed {
            (I::DEPTH, stride)
        } else {
            (stride, I::DEPTH)
        };
        let a: Vec<I::Operand> = (0..(rows + words) * stride).map(operand).collect();
        // B's rows come as two runs, the later one first.
        let b_step = columns * PANEL * I::DEPTH;
        let b: Vec<I::Operand> = (0..10 * b_step).map(|i| operand(i + 5)).collect();
        let runs = [
            Run {
                start: 6 * b_step,
                words: 4,
            },
            Run {
                start: b_step,
                words: words - 4,
            },
        ];
        let panels: Vec<usize> = (0..columns).rev().map(|p| p * PANEL * I::DEPTH).collect();
        let c_row = columns * PANEL + 3;
        let old: Vec<I::Real> = (0..rows * c_row)
            .map(|i| I::Real::of(value(i + 1)))
            .collect();
        let mut c = old.clone();
        let gemm = Gemm::<I> {
            rows,
            a: Left {
                values: &a,
                stride,
                transposed,
            },
            b: &b,
            b_step,
            panels: &panels,
            runs: &runs,
            c_row,
            accumulate,
        };
        gemm.run(&mut c);

        for row in 0..rows {
            for column in 0..c_row {
                let at = row * c_row + column;
                let mut sum = if accumulate || column >= columns * PANEL {
                    value(at + 1)
                } else {
                    0.0
                };
                if column < columns * PANEL {
                    let panel = panels[column / PANEL];
                    for s in 0..words {
                        let b_row = if s < 4 { 6 + s } else { s - 3 };
                        for d in 0..I::DEPTH {
                            let a = value(row * a_row + s * a_step + d);
                            let b = panel + b_row * b_step + column % PANEL * I::DEPTH + d;
                            sum += a * value(b + 5);
                        }
                    }
                }
                // The values are multiples of 1/32 below 1: products and sums are exact.
                assert!(
                    c[at] == I::Real::of(sum),
                    "{} {rows}x{columns} at ({row}, {column})",
                    I::NAME
                );
            }
        }
    }

    #[test]
    fn products_equal_the_definition() {
        for_each_isa!(product);
    }

    #[test]
    #[should_panic(expected = "B ends at")]
    fn what_lies_outside_is_not_read() {
        type I = crate::simd::Portable<f32>;
        let gemm = Gemm::<I> {
            rows: 1,
            a: Left {
                values: &[1.0; 4],
                stride: 4,
                transposed: false,
            },
            b: &[1.0; 63],
            b_step: 16,
            panels: &[0],
            runs: &[Run { start: 0, words: 4 }],
            c_row: 16,
            accumulate: false,
        };
        gemm.run(&mut [0.0; 16]);
    }
}
