//! The matrix product that all of attention's products are: `C = A B` or `C += A B`, with `A` read
//! by strides (so that it may be transposed), and `B` in panels of 16 columns whose rows come in
//! runs (so that gathered blocks need no copy). Called by the drivers; the inner tile is shared by
//! all instruction sets, which choose its shape.
//!
//! Addresses, in operands, with `s` counting words along the dimension that is summed over:
//!
//! - `A(row, s)` is at `row * a_row + s * a_step`;
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

/// One product; see the module's head for the meaning of the strides.
pub struct Gemm<'a, I: Isa> {
    pub rows: usize,
    pub a: &'a [I::Operand],
    pub a_row: usize,
    pub a_step: usize,
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
    /// When an operand would be read, or `c` written, outside of its slice.
    pub fn run(&self, c: &mut [I::Real]) {
        if self.rows == 0 || self.panels.is_empty() {
            return;
        }
        let words: usize = self.runs.iter().map(|run| run.words).sum();
        if words > 0 {
            let a_last = (self.rows - 1) * self.a_row + (words - 1) * self.a_step + I::DEPTH;
            assert!(
                a_last <= self.a.len(),
                "A ends at {a_last} of {}",
                self.a.len()
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
        // SAFETY: the instruction set is the CPU's (see `simd`), all addresses of the module's
        // head have just been found to lie inside of their slices.
        unsafe {
            I::enter(Entered {
                gemm: self,
                c: c.as_mut_ptr(),
            })
        }
    }
}

struct Entered<'a, I: Isa> {
    gemm: &'a Gemm<'a, I>,
    c: *mut I::Real,
}

impl<I: Isa> Operation<I> for Entered<'_, I> {
    type Output = ();

    #[inline(always)]
    unsafe fn run(self) {
        // SAFETY: `Gemm::run` has checked all addresses.
        unsafe { I::gemm(self.gemm, self.c) }
    }
}

/// `MR` rows by `NP` panels of `C`, each panel `VP` vectors wide, kept in registers over the sum.
///
/// # Safety
/// `a` and `c` point to the tile's first row, `panels` to the panels' first operands, of a product
/// whose addresses have been checked.
#[inline(always)]
pub(super) unsafe fn tile<I: Isa, const MR: usize, const NP: usize, const VP: usize>(
    gemm: &Gemm<'_, I>,
    mut a: *const I::Operand,
    panels: [*const I::Operand; NP],
    c: *mut I::Real,
) {
    // SAFETY: the caller's promise; offsets are those of the module's head.
    unsafe {
        let mut sums = [[[I::splat(I::Real::ZERO); VP]; NP]; MR];
        for run in gemm.runs {
            let mut b = panels.map(|panel| panel.add(run.start));
            for _ in 0..run.words {
                let columns: [[I::Words; VP]; NP] = std::array::from_fn(|p| {
                    std::array::from_fn(|v| I::load_words(b[p].add(v * I::LANES * I::DEPTH)))
                });
                for m in 0..MR {
                    let row = I::splat_word(a.add(m * gemm.a_row));
                    for p in 0..NP {
                        for v in 0..VP {
                            sums[m][p][v] = I::mul_words(row, columns[p][v], sums[m][p][v]);
                        }
                    }
                }
                a = a.add(gemm.a_step);
                for panel in &mut b {
                    *panel = panel.add(gemm.b_step);
                }
            }
        }
        for m in 0..MR {
            for p in 0..NP {
                for v in 0..VP {
                    let at = c.add(m * gemm.c_row + p * PANEL + v * I::LANES);
                    let sum = if gemm.accumulate {
                        I::add(I::load(at), sums[m][p][v])
                    } else {
                        sums[m][p][v]
                    };
                    I::store(at, sum);
                }
            }
        }
    }
}

/// Covers `C` with tiles of `NP` panels by the given heights, tallest first; the last must be 1.
///
/// Panels go outside, rows inside: a panel of `B` then stays in the first-level cache while rows
/// of `A` stream by.
macro_rules! cover {
    ($isa:ty, $gemm:ident, $c:ident, $first:expr, $panels:literal x $vectors:literal, [$($height:literal),+]) => {{
        let panels: [*const <$isa as $crate::simd::Isa>::Operand; $panels] =
            std::array::from_fn(|p| $gemm.b.as_ptr().add($gemm.panels[$first + p]));
        let mut row = 0;
        $(
            while $gemm.rows - row >= $height {
                $crate::simd::gemm::tile::<$isa, $height, $panels, $vectors>(
                    $gemm,
                    $gemm.a.as_ptr().add(row * $gemm.a_row),
                    panels,
                    $c.add(row * $gemm.c_row + $first * $crate::simd::PANEL),
                );
                row += $height;
            }
        )+
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
                check::<I>(rows, columns, accumulate);
            }
        }
    }

    fn check<I: Isa>(rows: usize, columns: usize, accumulate: bool) {
        let value = |i: usize| ((i * 37 + 11) % 64) as f64 / 32.0 - 1.0;
        let operand = |i: usize| I::to_operand(I::Real::of(value(i)));
        let words = 7;
        // A transposed: consecutive rows one word apart.
        let (a_row, a_step) = (I::DEPTH, rows * I::DEPTH + 4);
        let a: Vec<I::Operand> = (0..(words + 1) * a_step).map(operand).collect();
        // B's rows come as two runs, the later one first.
        let b_step = columns * PANEL * I::DEPTH;
        let b: Vec<I::Operand> = (0..10 * b_step).map(|i| operand(i + 5)).collect();
        let runs = [
            Run {
                start: 6 * b_step,
                words: 3,
            },
            Run {
                start: b_step,
                words: words - 3,
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
            a: &a,
            a_row,
            a_step,
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
                        let b_row = if s < 3 { 6 + s } else { s - 2 };
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
            a: &[1.0; 4],
            a_row: 4,
            a_step: 1,
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
