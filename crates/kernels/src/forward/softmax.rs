//! The softmax of a tile of scores, and what it leaves for the tiles after it.

use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{RegTile, RowPair, quad_sum};

/// The running softmax of a thread's two rows (Milakov and Gimelshein, arXiv 1805.02867), in
/// units of log2.
pub(super) struct Softmax<'k> {
    scale: Reg<'k, f32>,
    /// The largest score so far, scaled.
    max: RowPair<'k>,
    /// This thread's part of the sum of weights relative to it.
    sum: RowPair<'k>,
    /// What the output so far must be multiplied by, after the last step.
    pub(super) factor: RowPair<'k>,
}

impl<'k> Softmax<'k> {
    pub(super) fn new(k: &'k Builder, scale: Reg<'k, f32>) -> Self {
        let pair = || [k.uninit(), k.uninit()];
        Self {
            scale,
            max: pair(),
            sum: pair(),
            factor: pair(),
        }
    }

    /// Starts anew: no keys yet.
    pub(super) fn reset(&self) {
        for row in 0..2 {
            self.max[row].set(f32::NEG_INFINITY);
            self.sum[row].set(0.0);
            self.factor[row].set(1.0);
        }
    }

    /// Turns a tile of scores into weights, in place.
    pub(super) fn step(&self, scores: &RegTile<'k>) {
        for (row, found) in scores.row_max().into_iter().enumerate() {
            let max = (found * self.scale).max(self.max[row]);
            self.factor[row].set((self.max[row] - max).exp2());
            self.max[row].set(max);
        }
        scores.exp2_scaled(self.scale, self.max);
        for (row, sum) in scores.row_sum_own().into_iter().enumerate() {
            self.sum[row].set(self.sum[row].fma(self.factor[row], sum));
        }
    }

    /// What the output must be multiplied by in the end, and the natural logarithm of the sum of
    /// exponentials: 0 and -inf for rows without any key.
    pub(super) fn finish(&self) -> (RowPair<'k>, RowPair<'k>) {
        let sum = quad_sum(self.sum);
        let row = |row: usize| {
            let any = sum[row].gt(0.0);
            let log2 = sum[row].log2() + self.max[row];
            let log = any.select(log2 * std::f32::consts::LN_2, f32::NEG_INFINITY);
            (any.select(sum[row].reciprocal(), 0.0), log)
        };
        let ((a, la), (b, lb)) = (row(0), row(1));
        ([a, b], [la, lb])
    }
}
