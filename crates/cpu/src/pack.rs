//! Packing: tokens of a tensor become operands in the layouts that products read quickly. Done
//! once for a head, used by every tile that reads its tokens. Called by the drivers.
//!
//! | layout | operands | read as |
//! |---|---|---|
//! | [`row_major`] | `[token][stride]` | `A`, tokens being rows |
//! | [`depth_rows`] | `[token / DEPTH][stride][DEPTH]` | `B`, summed over tokens |
//! | [`transposed`] | `[token / 16][width / DEPTH][16][DEPTH]` | `B`, summed over head_dim, tokens being columns |
//!
//! Numbers of tokens and of values are rounded up to 16 and filled with zeros.

use std::ops::Range;

use crate::Element;
use crate::simd::{Isa, PANEL, Real};
use crate::view::View;

/// head_dim of packed tokens: rounded up to whole panels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Width(usize);

impl Width {
    pub fn of(head_dim: usize) -> Self {
        Self(head_dim.next_multiple_of(PANEL))
    }

    /// Values of a token, zeros included.
    pub fn values(self) -> usize {
        self.0
    }

    /// Operands from a token to the next. One panel more than its values: at a stride of a power
    /// of two, tokens would compete for the same few sets of the first-level cache.
    pub fn stride(self) -> usize {
        self.0 + PANEL
    }

    /// Operands of `tokens` tokens, transposed.
    pub fn transposed_len(self, tokens: usize) -> usize {
        tokens.next_multiple_of(PANEL) * self.0
    }

    /// Operands of `tokens` tokens in rows.
    pub fn rows_len(self, tokens: usize) -> usize {
        tokens.next_multiple_of(PANEL) * self.stride()
    }

    /// Where each panel of a token's values starts in `depth_rows`, for [`crate::simd::gemm`].
    pub fn panels<I: Isa>(self) -> Vec<usize> {
        (0..self.0 / PANEL)
            .map(|panel| panel * PANEL * I::DEPTH)
            .collect()
    }
}

/// One head's tokens, to be packed.
#[derive(Debug)]
pub(crate) struct Tokens<'a, T> {
    pub tensor: View<'a, T>,
    pub batch: usize,
    pub head: usize,
}

impl<T: Element> Tokens<'_, T> {
    /// Calls `each(index, values)` for the tokens of a range, then with zeros up to a multiple of
    /// 16; `values` are as many as the width says.
    fn each<R: Real>(
        &self,
        tokens: Range<usize>,
        width: Width,
        mut each: impl FnMut(usize, &[T::Real]),
    ) where
        T: Element<Real = R>,
    {
        let head_dim = self.tensor.shape()[3];
        let mut values = vec![R::ZERO; width.values()];
        let len = tokens.len();
        for (index, token) in tokens.enumerate() {
            T::widen(
                self.tensor.row(self.batch, self.head, token),
                &mut values[..head_dim],
            );
            each(index, &values);
        }
        values.fill(R::ZERO);
        for index in len..len.next_multiple_of(PANEL) {
            each(index, &values);
        }
    }
}

/// See the module's head. `factor` multiplies each value.
pub(crate) fn row_major<I: Isa, T: Element<Real = I::Real>>(
    from: &Tokens<'_, T>,
    tokens: Range<usize>,
    width: Width,
    factor: I::Real,
    to: &mut [I::Operand],
) {
    from.each(tokens, width, |index, values| {
        for (to, &value) in to[index * width.stride()..].iter_mut().zip(values) {
            *to = I::to_operand(value * factor);
        }
    });
}

/// See the module's head.
pub(crate) fn depth_rows<I: Isa, T: Element<Real = I::Real>>(
    from: &Tokens<'_, T>,
    tokens: Range<usize>,
    width: Width,
    to: &mut [I::Operand],
) {
    from.each(tokens, width, |index, values| {
        let word_row = index / I::DEPTH * width.stride() * I::DEPTH;
        let to = to[word_row + index % I::DEPTH..]
            .iter_mut()
            .step_by(I::DEPTH);
        for (to, &value) in to.zip(values) {
            *to = I::to_operand(value);
        }
    });
}

/// See the module's head.
pub(crate) fn transposed<I: Isa, T: Element<Real = I::Real>>(
    from: &Tokens<'_, T>,
    tokens: Range<usize>,
    width: Width,
    to: &mut [I::Operand],
) {
    from.each(tokens, width, |index, values| {
        let panel = &mut to[index / PANEL * PANEL * width.values()..];
        for (word, values) in values.chunks_exact(I::DEPTH).enumerate() {
            let at = (word * PANEL + index % PANEL) * I::DEPTH;
            for (to, &value) in panel[at..at + I::DEPTH].iter_mut().zip(values) {
                *to = I::to_operand(value);
            }
        }
    });
}
