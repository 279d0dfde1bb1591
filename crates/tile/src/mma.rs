//! Matrix products of a warpgroup: `acc += a b` for operands in shared memory or registers; and a
//! single warp's part of one.
//!
//! In: tiles. Out: one wgmma for each 32 bytes of the inner dimension, with descriptors made here
//! and nowhere else (PTX ISA, "Asynchronous warpgroup level matrix instructions": matrix
//! descriptors). A descriptor's low word holds the address and the leading stride, in units of 16
//! bytes; its high word the stride between groups of 8 rows and the swizzle. All are constants but
//! the start of shared memory, so each costs one addition.

use flex_block_attn_ptx::builder::A;
use flex_block_attn_ptx::{Builder, Element, Reg};

use crate::shape::PANEL_ROW;
use crate::{Fragments, RegTile, Shape, SharedTile};

/// High word: groups of 8 rows are 1024 bytes apart; 128-byte swizzle.
const HIGH: u32 = ((8 * PANEL_ROW) >> 4) | 1 << 30;
/// Bytes of the inner dimension that one wgmma takes.
const STEP_BYTES: u32 = 32;

/// A left operand: 64 rows of the product.
#[derive(Debug, Clone, Copy)]
pub enum Left<'a, 'k> {
    /// A tile of 64 rows whose columns are the inner dimension.
    Tile(SharedTile<'k>),
    /// A tile whose 64 columns are the product's rows, its rows the inner dimension.
    TileTransposed(SharedTile<'k>),
    /// Registers.
    Fragments(&'a Fragments<'k>),
}

/// A right operand.
#[derive(Debug, Clone, Copy)]
pub enum Right<'k> {
    /// A tile whose rows are the inner dimension: `acc += a tile`.
    Tile(SharedTile<'k>),
    /// A tile whose columns are the inner dimension: `acc += a tile^T`.
    Transposed(SharedTile<'k>),
}

/// Which way a shared operand is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inner {
    /// The inner dimension runs along columns.
    Columns,
    /// It runs along rows, of which one wgmma takes 16 (16-bit elements only).
    Rows,
}

/// A shared operand's descriptors, one for each step of the inner dimension.
struct Descriptors<'k> {
    tile: SharedTile<'k>,
    inner: Inner,
    /// Where the tile starts: a register and a constant, in units of 16 bytes.
    start: (Reg<'k, u32>, u32),
    high: Reg<'k, u32>,
}

impl<'k> Descriptors<'k> {
    #[track_caller]
    fn new(tile: SharedTile<'k>, inner: Inner, high: Reg<'k, u32>) -> Self {
        Self {
            tile,
            inner,
            start: tile.start16(),
            high,
        }
    }

    /// Length of the inner dimension in bytes (of a row, if it runs along columns) and steps.
    fn steps(&self) -> u32 {
        match self.inner {
            Inner::Columns => self.tile.shape.panels() * PANEL_ROW / STEP_BYTES,
            Inner::Rows => self.tile.rows() / 16,
        }
    }

    /// Length of the other dimension.
    fn outer(&self) -> u32 {
        match self.inner {
            Inner::Columns => self.tile.rows(),
            Inner::Rows => self.tile.shape.columns,
        }
    }

    #[track_caller]
    fn step(&self, step: u32) -> Reg<'k, u64> {
        let panel_bytes = self.tile.shape.panel_bytes();
        let per_panel = PANEL_ROW / STEP_BYTES;
        let (bytes, leading) = match self.inner {
            // Inside a panel's rows, then in the next panel. The leading stride is not used.
            Inner::Columns => (
                step / per_panel * panel_bytes + step % per_panel * STEP_BYTES,
                1,
            ),
            // 16 rows on; panels, groups of 64 columns, are the leading stride apart.
            Inner::Rows => (step * 16 * PANEL_ROW, panel_bytes >> 4),
        };
        let (start, offset) = self.start;
        let low = start + (offset + (bytes >> 4) + (leading << 16));
        low.join(self.high)
    }
}

/// Issues `acc (+)= left right` and leaves it in flight; `accumulate` says whether acc is added to
/// or overwritten by the first step. The caller fences before, commits and waits after.
///
/// # Panics
/// If shapes do not fit.
#[track_caller]
pub(crate) fn issue<'k>(
    k: &'k Builder,
    acc: &RegTile<'k>,
    left: Left<'_, 'k>,
    right: Right<'k>,
    accumulate: bool,
) {
    let high = k.var(HIGH);
    let (right, b_transposed) = match right {
        Right::Tile(tile) => (Descriptors::new(tile, Inner::Rows, high), true),
        Right::Transposed(tile) => (Descriptors::new(tile, Inner::Columns, high), false),
    };
    let element = right.tile.shape.element;
    assert!(
        matches!(element, Element::Bf16 | Element::F16) || !b_transposed,
        "only 16-bit tiles can be stored with the inner dimension along rows"
    );
    assert_eq!(acc.columns(), right.outer(), "columns of the product");
    let steps = right.steps();
    let shared = |tile: SharedTile<'k>, inner| {
        let a = Descriptors::new(tile, inner, high);
        assert_eq!((a.outer(), a.steps()), (64, steps), "the left operand");
        assert_eq!(tile.shape.element, element, "operands of one type");
        a
    };
    let a: Box<dyn Fn(u32) -> A<'k> + '_> = match left {
        Left::Tile(tile) => {
            let a = shared(tile, Inner::Columns);
            Box::new(move |step| A::Shared {
                descriptor: a.step(step),
                transposed: false,
            })
        }
        Left::TileTransposed(tile) => {
            let a = shared(tile, Inner::Rows);
            Box::new(move |step| A::Shared {
                descriptor: a.step(step),
                transposed: true,
            })
        }
        Left::Fragments(fragments) => {
            assert_eq!(fragments.steps(), steps as usize, "the left operand");
            Box::new(move |step| A::Registers(fragments.step(step as usize)))
        }
    };
    for step in 0..steps {
        let accumulate = accumulate || step > 0;
        k.wgmma(
            element,
            acc.registers(),
            a(step),
            right.step(step),
            b_transposed,
            accumulate,
        );
    }
}

/// `acc = left right^T`, the warp's 16 rows of it, by the warp alone and at once, see
/// [`crate::Warpgroup::product_of_warp`].
///
/// # Panics
/// If shapes do not fit.
#[track_caller]
pub(crate) fn of_warp<'k>(
    k: &'k Builder,
    acc: &RegTile<'k>,
    left: SharedTile<'k>,
    right: SharedTile<'k>,
    (warp, lane): (Reg<'k, u32>, Reg<'k, u32>),
) {
    let Shape {
        columns, element, ..
    } = left.shape;
    assert!(
        matches!(element, Element::Bf16 | Element::F16),
        "a warp multiplies 16-bit tiles only"
    );
    assert_eq!(left.rows(), 64, "rows of a left operand");
    assert_eq!(
        (right.shape.columns, right.shape.element),
        (columns, element),
        "columns and elements of the right operand"
    );
    assert_eq!(acc.columns(), right.rows(), "columns of the product");
    assert!(
        right.rows().is_multiple_of(16),
        "{} rows of a right operand",
        right.rows()
    );
    let a_rows = left.matrix_rows(warp, lane).first();
    // A step's halves of 8 rows come one after the other: ptxas wants them in neighbouring registers.
    let b_rows = right.transposed_rows(k.var(0u32), lane).first();
    acc.fill(0.0);
    // Who does this has few registers, and seldom does it: ptxas would unroll the loop, and load ahead, if
    // it knew the number of steps.
    let steps = k.var(columns / 16).uniform();
    k.for_(0, steps, 1, |step| {
        let a = k.load_matrices::<4>(left.chunks_of_step(a_rows, step), false);
        // Rows of the right operand are 16 on for each 8 accumulators; its swizzle repeats by then.
        let mut chunks = right.chunks_of_step(b_rows, step);
        for sixteen in acc.registers().chunks_exact(8) {
            let b = k.load_matrices::<4>(chunks, false);
            for (acc, b) in sixteen.chunks_exact(4).zip(b.chunks_exact(2)) {
                let acc = std::array::from_fn(|i| acc[i]);
                k.mma(element, acc, a, [b[0], b[1]]);
            }
            chunks = chunks.at(16 * PANEL_ROW);
        }
    });
    // One lane gives the tile back for all.
    k.warp_sync();
}
