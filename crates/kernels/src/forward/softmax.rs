//! The softmax of a tile of scores, and what it leaves for the tiles after it.

use flex_block_attn_ptx::{Builder, Reg};
use flex_block_attn_tile::{RegTile, RowPair, quad_sum};

/// The running softmax of a thread's two rows (Milakov and Gimelshein, arXiv 1805.02867), in
/// units of log2.
///
/// Weights are relative to a score, which need not be the largest so far: the quotient at the end is
/// the same, as long as none overflows. (The largest weight is rounded as all are, then, where it would
/// have been 1: decision 14 says what that costs.) So it is the first tile's largest, and stays until
/// weights have become large: most tiles are summed up without a look for their largest score, and what
/// was summed before is not multiplied anew.
pub(super) struct Softmax<'k> {
    scale: Reg<'k, f32>,
    /// Whether all scores of a row may be -inf, in a tile or in all of them.
    some: bool,
    /// What weights are relative to: a score, scaled; -inf while all were.
    base: RowPair<'k>,
    /// This thread's part of the sum of weights.
    sum: RowPair<'k>,
    /// What the output so far must be multiplied by, after the last step.
    factor: RowPair<'k>,
}

/// What a thread's weights of a row of a tile may add up to: float16 still holds a weight of that size, and
/// there is room for sums of many, and for large values.
const MOST: f32 = (1u32 << 15) as f32;

impl<'k> Softmax<'k> {
    pub(super) fn new(k: &'k Builder, scale: Reg<'k, f32>, some: bool) -> Self {
        let pair = || [k.uninit(), k.uninit()];
        Self {
            scale,
            some,
            base: pair(),
            sum: pair(),
            factor: pair(),
        }
    }

    /// Starts anew: no keys yet.
    pub(super) fn reset(&self) {
        for row in 0..2 {
            self.base[row].set(f32::NEG_INFINITY);
            self.sum[row].set(0.0);
            self.factor[row].set(1.0);
        }
    }

    /// Turns a tile of scores into weights, in place, and moves the base to the largest so far: a row's first
    /// tile, or any.
    pub(super) fn step(&self, scores: &RegTile<'k>) {
        let found = scores.row_max();
        let offsets = [0, 1].map(|row| {
            let before = self.base[row];
            let base = (found[row] * self.scale).max(before);
            let offset = match self.some {
                // -inf less -inf would be NaN; -inf less anything else has the weight 0.
                true => base.equals(f32::NEG_INFINITY).select(0.0, base),
                false => base,
            };
            self.factor[row].set((before - offset).exp2());
            before.set(base);
            offset
        });
        scores.exp2_scaled(self.scale, offsets);
        for (row, sum) in scores.row_sum_own().into_iter().enumerate() {
            self.sum[row].set(self.sum[row].fma(self.factor[row], sum));
        }
    }

    /// Turns a further tile of scores into weights, in place, by the base as it is, unless that makes some
    /// too large: these scores `again` computes once more. It cannot if `step` says so. Each warp sees
    /// to its own rows, and most are never computed again.
    pub(super) fn further(&self, scores: &RegTile<'k>, step: Reg<'k, bool>, again: impl FnOnce()) {
        let k = self.scale.builder();
        let step = k.var(step);
        if self.some {
            let [a, b] = self.base.map(|base| base.equals(f32::NEG_INFINITY));
            step.set(step | (a | b).any());
        }
        k.if_not(step, || {
            k.if_not(self.stay(scores), || {
                again();
                step.set(k.var(true));
            });
        });
        k.if_(step, || self.step(scores));
    }

    /// By the base as it is: no row's is -inf. Says whether that went well, for all of the warp.
    fn stay(&self, scores: &RegTile<'k>) -> Reg<'k, bool> {
        scores.exp2_scaled(self.scale, self.base);
        let own = scores.row_sum_own();
        // A NaN is not fine.
        let fine = (own[0].le(MOST) & own[1].le(MOST)).all();
        for (row, own) in own.into_iter().enumerate() {
            self.factor[row].set(1.0);
            self.sum[row].set(self.sum[row] + fine.select(own, 0.0));
        }
        fine
    }

    /// Multiplies what was summed up so far by what the last step says, if that is anything but 1.
    pub(super) fn rescale(&self, output: &RegTile<'k>) {
        let k = self.scale.builder();
        let [a, b] = self.factor.map(|factor| factor.differs(1.0));
        k.if_((a | b).any(), || output.scale_rows(self.factor));
    }

    /// Sees so many keys more that are 0, and so are their values.
    pub(super) fn see_zeros(&self, count: Reg<'k, f32>) {
        // Each thread of a quad adds a part to its own.
        let own = count * 0.25;
        for row in 0..2 {
            let base = self.base[row].max(0.0);
            self.factor[row].set((self.base[row] - base).exp2());
            let sum = self.sum[row] * self.factor[row];
            self.sum[row].set(own.fma((-base).exp2(), sum));
            self.base[row].set(base);
        }
    }

    /// What the output must be multiplied by in the end, and the natural logarithm of the sum of
    /// exponentials: 0 and -inf for rows without any key.
    pub(super) fn finish(&self) -> (RowPair<'k>, RowPair<'k>) {
        let sum = quad_sum(self.sum);
        let row = |row: usize| {
            // A NaN stays one.
            let none = sum[row].equals(0.0);
            let log2 = sum[row].log2() + self.base[row];
            let log = none.select(f32::NEG_INFINITY, log2 * std::f32::consts::LN_2);
            (none.select(0.0, sum[row].reciprocal()), log)
        };
        let ((a, la), (b, lb)) = (row(0), row(1));
        ([a, b], [la, lb])
    }
}
