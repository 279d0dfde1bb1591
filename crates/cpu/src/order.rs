//! Rows of a tensor in another order, and back: for callers whose tokens lie otherwise than a plan's
//! blocks want them. In: a view, and which token is in each place. Out: dense numbers in the type that is
//! computed with; or the view's rows, written.

use crate::simd::Real;
use crate::{Element, View, ViewMut};

/// The tokens' rows, (batch, heads, places, columns); 0 where there is no token. Behind a row's own
/// columns comes what `more` says of its place, then zeros.
pub fn gather<T: Element>(
    from: &View<'_, T>,
    tokens: &[Option<usize>],
    columns: usize,
    more: impl Fn(usize) -> f64,
) -> Vec<T::Real> {
    let [batch, heads, _, width] = from.shape();
    let mut values = vec![T::Real::ZERO; batch * heads * tokens.len() * columns];
    for (at, row) in values.chunks_exact_mut(columns).enumerate() {
        let (line, place) = (at / tokens.len(), at % tokens.len());
        if let Some(token) = tokens[place] {
            T::widen(
                from.row(line / heads, line % heads, token),
                &mut row[..width],
            );
        }
        if width < columns {
            row[width] = T::Real::of(more(place));
        }
    }
    values
}

/// What undoes [`gather`]: each token's row, rounded.
pub fn scatter<T: Element>(
    values: &[T::Real],
    tokens: &[Option<usize>],
    columns: usize,
    to: ViewMut<'_, T>,
) {
    let [_, heads, _, width] = to.shape();
    for (at, row) in values.chunks_exact(columns).enumerate() {
        let (line, place) = (at / tokens.len(), at % tokens.len());
        if let Some(token) = tokens[place] {
            // SAFETY: the view is this function's alone, and so is each row of it in turn.
            let to = unsafe { to.row_mut(line / heads, line % heads, token) };
            T::narrow(&row[..width], to);
        }
    }
}
