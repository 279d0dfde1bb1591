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

    /// Turns a tile of scores into weights, in place. Each row has a score that is not -inf.
    pub(super) fn step(&self, scores: &RegTile<'k>) {
        self.step_by(scores, |max| max);
    }

    /// As [`Softmax::step`], but all scores of a row may be -inf, and may have been in all tiles.
    pub(super) fn step_of_some(&self, scores: &RegTile<'k>) {
        // -inf less -inf would be NaN; -inf less anything else has the weight 0.
        self.step_by(scores, |max| max.equals(f32::NEG_INFINITY).select(0.0, max));
    }

    fn step_by(&self, scores: &RegTile<'k>, offset: impl Fn(Reg<'k, f32>) -> Reg<'k, f32>) {
        let found = scores.row_max();
        let offsets = [0, 1].map(|row| {
            let max = (found[row] * self.scale).max(self.max[row]);
            let offset = offset(max);
            self.factor[row].set((self.max[row] - offset).exp2());
            self.max[row].set(max);
            offset
        });
        scores.exp2_scaled(self.scale, offsets);
        for (row, sum) in scores.row_sum_own().into_iter().enumerate() {
            self.sum[row].set(self.sum[row].fma(self.factor[row], sum));
        }
    }

    /// Sees so many keys more that are 0, and so are their values.
    pub(super) fn see_zeros(&self, count: Reg<'k, f32>) {
        // Each thread of a quad adds a part to its own.
        let own = count * 0.25;
        for row in 0..2 {
            let max = self.max[row].max(0.0);
            self.factor[row].set((self.max[row] - max).exp2());
            let sum = self.sum[row] * self.factor[row];
            self.sum[row].set(own.fma((-max).exp2(), sum));
            self.max[row].set(max);
        }
    }

    /// What the output must be multiplied by in the end, and the natural logarithm of the sum of
    /// exponentials: 0 and -inf for rows without any key.
    pub(super) fn finish(&self) -> (RowPair<'k>, RowPair<'k>) {
        let sum = quad_sum(self.sum);
        let row = |row: usize| {
            // A NaN stays one.
            let none = sum[row].equals(0.0);
            let log2 = sum[row].log2() + self.max[row];
            let log = none.select(f32::NEG_INFINITY, log2 * std::f32::consts::LN_2);
            (none.select(0.0, sum[row].reciprocal()), log)
        };
        let ((a, la), (b, lb)) = (row(0), row(1));
        ([a, b], [la, lb])
    }
}
