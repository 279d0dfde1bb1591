//! Masks with an expression: what does not count of a partial block is hidden. In: a tile of numbers in
//! rows of queries, and where it lies. Out: the same tile, with a number in place of what is hidden.
//! Called by both passes between their products.

use std::ops::Range;

use flex_block_attn_mask::PlanView;
use flex_block_attn_mask::expression::Evaluator;

use super::{Isa, Operation};

/// What evaluates a plan's expression, if it has one.
pub(crate) fn evaluator(plan: PlanView<'_>) -> Option<Evaluator<'_>> {
    let evaluator = |expression| {
        Evaluator::new(expression).expect("callers have checked that the host has all tables")
    };
    plan.expression().map(evaluator)
}

/// A part of a tile that belongs to a partial block.
pub(crate) struct Hidden {
    pub batch: usize,
    /// Of q.
    pub head: usize,
    /// The tile's rows.
    pub queries: Range<usize>,
    /// Some of its columns, at most [`Evaluator::MOST_KEYS`].
    pub columns: Range<usize>,
    /// Their keys; some at the end may lie behind the sequence, where nothing is read.
    pub keys: Range<usize>,
    /// Numbers from a row to the next.
    pub stride: usize,
}

/// Puts a number in the place of what does not count, in several tiles of one shape.
pub(crate) fn hide<I: Isa, const N: usize>(
    evaluator: &mut Evaluator<'_>,
    hidden: &Hidden,
    tiles: [&mut [I::Real]; N],
    with: I::Real,
) {
    // SAFETY: the instruction set is the CPU's (see `simd`).
    unsafe {
        I::enter(Hide {
            evaluator,
            hidden,
            tiles,
            with,
        });
    }
}

struct Hide<'h, 'e, R, const N: usize> {
    evaluator: &'h mut Evaluator<'e>,
    hidden: &'h Hidden,
    tiles: [&'h mut [R]; N],
    with: R,
}

impl<I: Isa, const N: usize> Operation<I> for Hide<'_, '_, I::Real, N> {
    type Output = ();

    #[inline(always)]
    unsafe fn run(self) {
        let Self {
            evaluator,
            hidden,
            mut tiles,
            with,
        } = self;
        evaluator.tile(hidden.batch, hidden.head, hidden.keys.clone());
        for (row, query) in hidden.queries.clone().enumerate() {
            let counts = evaluator.row(query);
            for tile in &mut tiles {
                let start = row * hidden.stride + hidden.columns.start;
                let numbers = &mut tile[start..start + hidden.columns.len()];
                for (number, &counts) in numbers.iter_mut().zip(counts) {
                    *number = if counts != 0 { *number } else { with };
                }
            }
        }
    }
}
