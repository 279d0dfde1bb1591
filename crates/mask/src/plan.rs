//! [`Plan`]: what kernels read of a mask. The arrays are laid out here and nowhere else.
//!
//! In: a [`BlockMask`]. Out: for each of the mask's (batch, head) matrices one fixed-size record of
//! 32-bit words, so that a plan's size follows from the mask's shape alone, whatever is selected,
//! and whoever allocates it needs not wait for the mask's contents:
//!
//! | array | words | holds |
//! |---|---|---|
//! | row counts | rows | selected blocks of each row |
//! | row order | rows | rows, longest first, equal ones ascending |
//! | row lists | rows x columns | each row's selected columns, ascending, then unused words (0) |
//! | column counts, order, lists | likewise, rows and columns exchanged | for the backward pass |
//!
//! Records follow each other in (batch, head) order.
//!
//! An entry of a list has the bit [`PARTIAL`] if the mask's expression chooses among the block's pairs;
//! plans of whole blocks never have it.

use std::sync::Arc;

use crate::expression::Expression;
use crate::{BlockMask, Extents, MaskError, parallel};

/// In an entry of a list: the block is partial. The rest is the block's number: [`block_of`].
pub const PARTIAL: i32 = i32::MIN;

/// The block of a list's entry.
#[inline]
pub fn block_of(entry: i32) -> usize {
    (entry & !PARTIAL) as usize
}

/// Whether only those of its pairs count that the mask's expression lets through.
#[inline]
pub fn is_partial(entry: i32) -> bool {
    entry & PARTIAL != 0
}

/// Where the arrays lie: a function of the mask's shape only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PlanLayout {
    /// Lengths, block sizes and block counts.
    pub extents: Extents,
    /// Batches of the mask: 1 if shared.
    pub batch: usize,
    /// Query heads of the mask: 1 if shared.
    pub heads: usize,
}

impl PlanLayout {
    /// Rows of the mask: query blocks.
    pub fn rows(&self) -> usize {
        self.extents.q_blocks()
    }

    /// Columns of the mask: key blocks.
    pub fn columns(&self) -> usize {
        self.extents.kv_blocks()
    }

    /// 32-bit words of one (batch, head) record.
    pub fn record_words(&self) -> usize {
        let (rows, columns) = (self.rows(), self.columns());
        2 * (rows + columns + rows * columns)
    }

    /// 32-bit words of the whole plan.
    pub fn words(&self) -> usize {
        self.batch * self.heads * self.record_words()
    }

    /// Whether so many words are those of a plan with this layout.
    ///
    /// # Errors
    /// When they are not.
    pub fn check_words(&self, words: usize) -> Result<(), MaskError> {
        if words == self.words() {
            return Ok(());
        }
        Err(MaskError::Plan {
            rows: self.rows(),
            columns: self.columns(),
            reason: "its number of words does not follow from the mask's shape",
        })
    }

    /// First word of the (batch, head) record that stands for `batch` and `head`; a mask's extent
    /// of 1 stands for all.
    fn record_start(&self, batch: usize, head: usize) -> usize {
        let b = if self.batch == 1 { 0 } else { batch };
        let h = if self.heads == 1 { 0 } else { head };
        assert!(
            b < self.batch && h < self.heads,
            "({batch}, {head}) is outside of {self:?}"
        );
        (b * self.heads + h) * self.record_words()
    }

    /// Where one side's arrays lie in each record.
    pub fn side(&self, side: Side) -> SideLayout {
        let (rows, columns) = (self.rows(), self.columns());
        match side {
            Side::Rows => SideLayout {
                start: 0,
                lists: rows,
                stride: columns,
            },
            Side::Columns => SideLayout {
                start: rows * (2 + columns),
                lists: columns,
                stride: rows,
            },
        }
    }
}

/// Which lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// Each row's columns, for the forward pass.
    Rows,
    /// Each column's rows, for the backward pass.
    Columns,
}

/// Counts, order and lists of one side, in 32-bit words from the start of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SideLayout {
    start: usize,
    /// Number of lists: rows or columns.
    pub lists: usize,
    /// Words of each list, used or not: columns or rows.
    pub stride: usize,
}

impl SideLayout {
    /// Where the length of a list lies.
    pub fn count(&self, list: usize) -> usize {
        self.start + list
    }

    /// Where the order of the lists starts.
    pub fn order(&self) -> usize {
        self.start + self.lists
    }

    /// Where a list starts.
    pub fn list(&self, list: usize) -> usize {
        self.start + 2 * self.lists + list * self.stride
    }
}

/// A plan that owns its words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    layout: PlanLayout,
    words: Vec<i32>,
    expression: Option<Arc<Expression>>,
}

impl Plan {
    /// Plans a mask on the host, in time proportional to its blocks.
    pub fn new(mask: &BlockMask) -> Self {
        let layout = Self::layout_of(mask);
        let mut words = vec![0; layout.words()];
        write(mask, &layout, &mut words);
        Self {
            layout,
            words,
            expression: mask.shared_expression(),
        }
    }

    /// The layout of a mask's plan.
    pub fn layout_of(mask: &BlockMask) -> PlanLayout {
        PlanLayout {
            extents: mask.extents(),
            batch: mask.batch(),
            heads: mask.heads(),
        }
    }

    /// Plans a mask into words that somebody else owns, whatever they held.
    ///
    /// # Errors
    /// When there are not as many words as the layout says.
    pub fn write(mask: &BlockMask, words: &mut [i32]) -> Result<(), MaskError> {
        let layout = Self::layout_of(mask);
        layout.check_words(words.len())?;
        write(mask, &layout, words);
        Ok(())
    }

    /// Where the arrays lie.
    pub fn layout(&self) -> PlanLayout {
        self.layout
    }

    /// All words, as kernels read them.
    pub fn words(&self) -> &[i32] {
        &self.words
    }

    /// By which pairs of partial blocks are chosen.
    pub fn expression(&self) -> Option<&Expression> {
        self.expression.as_deref()
    }

    /// The plan as backends take it.
    pub fn view(&self) -> PlanView<'_> {
        PlanView {
            layout: self.layout,
            words: &self.words,
            expression: self.expression.as_deref(),
        }
    }
}

/// Writes all words of all records.
fn write(mask: &BlockMask, layout: &PlanLayout, words: &mut [i32]) {
    let mut pieces = Vec::new();
    let records = words.chunks_exact_mut(layout.record_words().max(1));
    for (line, record) in (0..layout.batch * layout.heads).zip(records) {
        let (batch, head) = (line / layout.heads, line % layout.heads);
        let (bits, partial) = mask.bits(batch, head);
        let matrix = Matrix {
            bits,
            partial,
            stride: layout.columns().div_ceil(64),
            rows: layout.rows(),
        };
        let sides = record.split_at_mut(layout.side(Side::Columns).start);
        for (which, words) in [(Side::Rows, sides.0), (Side::Columns, sides.1)] {
            let SideLayout { lists, stride, .. } = layout.side(which);
            let (counts, rest) = words.split_at_mut(lists);
            let (_, entries) = rest.split_at_mut(lists);
            // No lists have no entries, and lists may have none.
            let entries = entries.chunks_mut((64 * stride).max(1));
            let entries = entries.map(Some).chain(std::iter::repeat_with(|| None));
            for (number, (counts, entries)) in counts.chunks_mut(64).zip(entries).enumerate() {
                let entries = entries.unwrap_or_default();
                pieces.push((matrix, which, number, counts, entries));
            }
        }
    }
    let blocks = layout.words() / 2;
    parallel::consume(
        blocks,
        pieces,
        |(matrix, which, number, counts, entries)| {
            matrix.lists(which, number, counts, entries);
        },
    );
    for record in words.chunks_exact_mut(layout.record_words().max(1)) {
        for which in [Side::Rows, Side::Columns] {
            order_longest_first(record, &layout.side(which));
        }
    }
}

/// Bits of the blocks of a batch and head.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    bits: &'a [u64],
    partial: Option<&'a [u64]>,
    /// Words of a row.
    stride: usize,
    rows: usize,
}

impl Matrix<'_> {
    /// Writes 64 lists of a side, of which `number` come before: their lengths and their entries.
    fn lists(&self, which: Side, number: usize, counts: &mut [i32], entries: &mut [i32]) {
        let length = entries.len() / counts.len().max(1);
        counts.fill(0);
        let mut append = |list: usize, at: usize, bit: u32, block: usize| {
            let flag = self.partial.map_or(0, |bits| (bits[at] >> bit & 1) as i32);
            let count = &mut counts[list];
            // `Extents` keeps indices below 2^31.
            entries[list * length + *count as usize] = block as i32 | flag << 31;
            *count += 1;
        };
        match which {
            Side::Rows => {
                for row in 64 * number..self.rows.min(64 * (number + 1)) {
                    for word in 0..self.stride {
                        let at = row * self.stride + word;
                        for bit in ones(self.bits[at]) {
                            append(row - 64 * number, at, bit, 64 * word + bit as usize);
                        }
                    }
                }
            }
            // A word's columns: the ends of their lists stay in the cache.
            Side::Columns => {
                for row in 0..self.rows {
                    let at = row * self.stride + number;
                    for bit in ones(self.bits[at]) {
                        append(bit as usize, at, bit, row);
                    }
                }
            }
        }
        for (list, &count) in counts.iter().enumerate() {
            entries[list * length + count as usize..(list + 1) * length].fill(0);
        }
    }
}

/// The places of a word's bits, ascending.
fn ones(word: u64) -> impl Iterator<Item = u32> {
    let mut rest = word;
    std::iter::from_fn(move || {
        let bit = (rest != 0).then(|| rest.trailing_zeros())?;
        rest &= rest - 1;
        Some(bit)
    })
}

fn order_longest_first(record: &mut [i32], side: &SideLayout) {
    let mut order: Vec<i32> = (0..side.lists as i32).collect();
    order.sort_by_key(|&list| (-record[side.count(list as usize)], list));
    record[side.order()..][..side.lists].copy_from_slice(&order);
}

/// A plan that somebody else owns: all its words have been checked.
#[derive(Debug, Clone, Copy)]
pub struct PlanView<'a> {
    layout: PlanLayout,
    words: &'a [i32],
    expression: Option<&'a Expression>,
}

impl<'a> PlanView<'a> {
    /// Takes words that came from outside, of a mask of whole blocks.
    ///
    /// # Errors
    /// When they are too few, a list is not ascending or leaves the mask, a block is partial, or an
    /// order is no permutation: nothing that a backend reads through a view leads it astray.
    pub fn new(layout: PlanLayout, words: &'a [i32]) -> Result<Self, MaskError> {
        Self::checked(layout, words, None)
    }

    /// Takes words that came from outside, of a mask with an expression.
    ///
    /// # Errors
    /// As for [`PlanView::new`], but that blocks may be partial.
    pub fn with_expression(
        layout: PlanLayout,
        words: &'a [i32],
        expression: &'a Expression,
    ) -> Result<Self, MaskError> {
        Self::checked(layout, words, Some(expression))
    }

    fn checked(
        layout: PlanLayout,
        words: &'a [i32],
        expression: Option<&'a Expression>,
    ) -> Result<Self, MaskError> {
        let error = |reason| MaskError::Plan {
            rows: layout.rows(),
            columns: layout.columns(),
            reason,
        };
        layout.check_words(words.len())?;
        // Without an expression the bit is part of a number, which then is none of the mask's.
        let flag = if expression.is_some() { PARTIAL } else { 0 };
        for record in words.chunks_exact(layout.record_words().max(1)) {
            for (side, extent) in [
                (Side::Rows, layout.columns()),
                (Side::Columns, layout.rows()),
            ] {
                check(record, &layout.side(side), extent, flag).map_err(error)?;
            }
        }
        Ok(Self {
            layout,
            words,
            expression,
        })
    }

    /// By which pairs of partial blocks are chosen.
    pub fn expression(&self) -> Option<&'a Expression> {
        self.expression
    }

    /// Where the arrays lie.
    pub fn layout(&self) -> PlanLayout {
        self.layout
    }

    fn list(&self, side: Side, batch: usize, head: usize, list: usize) -> &'a [i32] {
        let side = self.layout.side(side);
        let record = &self.words[self.layout.record_start(batch, head)..];
        let count = record[side.count(list)] as usize;
        &record[side.list(list)..][..count]
    }

    /// The columns that a row keeps, ascending; see [`block_of`].
    pub fn row(&self, batch: usize, head: usize, row: usize) -> &'a [i32] {
        self.list(Side::Rows, batch, head, row)
    }

    /// The rows that keep a column, ascending; see [`block_of`].
    pub fn column(&self, batch: usize, head: usize, column: usize) -> &'a [i32] {
        self.list(Side::Columns, batch, head, column)
    }

    /// Rows, longest list first.
    pub fn row_order(&self, batch: usize, head: usize) -> &'a [i32] {
        let side = self.layout.side(Side::Rows);
        &self.words[self.layout.record_start(batch, head) + side.order()..][..side.lists]
    }

    /// Columns, longest list first.
    pub fn column_order(&self, batch: usize, head: usize) -> &'a [i32] {
        let side = self.layout.side(Side::Columns);
        &self.words[self.layout.record_start(batch, head) + side.order()..][..side.lists]
    }
}

fn check(record: &[i32], side: &SideLayout, extent: usize, flag: i32) -> Result<(), &'static str> {
    for list in 0..side.lists {
        let count = usize::try_from(record[side.count(list)]).unwrap_or(usize::MAX);
        if count > extent {
            return Err("a list is longer than the mask");
        }
        let entries = &record[side.list(list)..][..count];
        let inside =
            |&entry: &i32| usize::try_from(entry & !flag).is_ok_and(|block| block < extent);
        let ascending = |a: &i32, b: &i32| a & !flag < b & !flag;
        if !entries.iter().all(inside) || !entries.is_sorted_by(ascending) {
            return Err("a list is not ascending inside of the mask");
        }
    }
    let mut seen = vec![false; side.lists];
    for &list in &record[side.order()..][..side.lists] {
        let slot = usize::try_from(list)
            .ok()
            .and_then(|list| seen.get_mut(list));
        if slot.is_none_or(|slot| std::mem::replace(slot, true)) {
            return Err("an order is no permutation");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Extents, builders};

    proptest! {
        #[test]
        fn lists_say_what_the_mask_says(
            rows in 0usize..9, columns in 0usize..9, batch in 1usize..3, heads in 1usize..3,
            density in 0.0f64..1.0, seed: u64,
        ) {
            let extents = Extents::new(rows * 16, columns * 16, 16, 16).unwrap();
            let mask = builders::random(extents, batch, heads, density, seed).unwrap();
            let plan = Plan::new(&mask);
            let view = PlanView::new(plan.layout(), plan.words()).unwrap();
            let selected = |b, h, row, column| mask.contains(b, h, row, column);
            for b in 0..batch {
                for h in 0..heads {
                    for row in 0..rows {
                        let list: Vec<i32> = (0..columns)
                            .filter(|&column| selected(b, h, row, column))
                            .map(|column| column as i32)
                            .collect();
                        prop_assert_eq!(view.row(b, h, row), list);
                    }
                    for column in 0..columns {
                        let list: Vec<i32> = (0..rows)
                            .filter(|&row| selected(b, h, row, column))
                            .map(|row| row as i32)
                            .collect();
                        prop_assert_eq!(view.column(b, h, column), list);
                    }
                    let lengths: Vec<_> = view
                        .row_order(b, h)
                        .iter()
                        .map(|&row| view.row(b, h, row as usize).len())
                        .collect();
                    prop_assert!(lengths.is_sorted_by(|a, b| a >= b));
                    let lengths: Vec<_> = view
                        .column_order(b, h)
                        .iter()
                        .map(|&column| view.column(b, h, column as usize).len())
                        .collect();
                    prop_assert!(lengths.is_sorted_by(|a, b| a >= b));
                }
            }
        }

        /// Whatever one word is replaced by, the view refuses it or still holds its promises.
        #[test]
        fn damaged_words_do_not_pass(at in 0usize..1000, value in -2i32..9) {
            let extents = Extents::new(64, 96, 16, 16).unwrap();
            let plan = Plan::new(&builders::causal(extents));
            let mut words = plan.words().to_vec();
            let at = at % words.len();
            words[at] = value;
            if let Ok(view) = PlanView::new(plan.layout(), &words) {
                for row in 0..4 {
                    prop_assert!(view.row(0, 0, row).iter().all(|&c| (0..6).contains(&c)));
                }
                for column in 0..6 {
                    prop_assert!(view.column(0, 0, column).iter().all(|&r| (0..4).contains(&r)));
                }
            }
        }
    }

    #[test]
    fn layout_is_as_documented() {
        let extents = Extents::new(32, 48, 16, 16).unwrap();
        let mask = BlockMask::from_blocks(extents, [(0, 2), (1, 0), (1, 2)]).unwrap();
        #[rustfmt::skip]
        assert_eq!(Plan::new(&mask).words(), [
            1, 2,             // row counts
            1, 0,             // row order
            2, 0, 0, 0, 2, 0, // row lists
            1, 0, 2,          // column counts
            2, 0, 1,          // column order
            1, 0, 0, 0, 0, 1, // column lists
        ]);
    }

    #[test]
    fn shared_records_stand_for_all() {
        let extents = Extents::new(32, 32, 16, 16).unwrap();
        let mut mask = BlockMask::empty(extents, 1, 2);
        mask.insert(0, 1, 0, 1);
        let plan = Plan::new(&mask);
        assert_eq!(plan.view().row(5, 1, 0), [1]);
        assert!(plan.view().row(5, 0, 0).is_empty());
    }
}
