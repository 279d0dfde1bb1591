//! [`BlockMask`]: one bit for each (batch, head, query block, key block), batch and head possibly
//! shared. Built here from bool matrices and index lists, in `builders` from patterns; read by
//! `Plan::new` and by whoever wants to look at it.

use std::ops::Range;
use std::sync::Arc;

use crate::expression::Expression;
use crate::{Extents, MaskError, classify};

/// A borrowed bool matrix of any strides: what a caller's tensor looks like.
///
/// Bytes other than 0 count as true. Shape and strides are (batch, heads, rows, columns), strides
/// in elements; a stride of 0 repeats (a broadcast or expanded dimension).
#[derive(Debug, Clone, Copy)]
pub struct BoolMatrix<'a> {
    bytes: &'a [u8],
    shape: [usize; 4],
    strides: [usize; 4],
}

impl<'a> BoolMatrix<'a> {
    /// A view of `bytes`.
    ///
    /// # Errors
    /// When some index of the shape would lie outside of `bytes`.
    pub fn new(bytes: &'a [u8], shape: [usize; 4], strides: [usize; 4]) -> Result<Self, MaskError> {
        let last = shape
            .iter()
            .zip(strides)
            .try_fold(0usize, |last, (&extent, stride)| {
                last.checked_add(extent.saturating_sub(1).checked_mul(stride)?)
            });
        let empty = shape.contains(&0);
        if !empty && last.is_none_or(|last| last >= bytes.len()) {
            return Err(MaskError::OutOfBounds {
                shape,
                strides,
                len: bytes.len(),
            });
        }
        Ok(Self {
            bytes,
            shape,
            strides,
        })
    }

    /// A dense two-dimensional matrix, shared by all batches and heads.
    ///
    /// # Errors
    /// When `bytes` is shorter than `rows * columns`.
    pub fn dense(bytes: &'a [u8], rows: usize, columns: usize) -> Result<Self, MaskError> {
        Self::new(bytes, [1, 1, rows, columns], [0, 0, columns, 1])
    }

    fn get(&self, index: [usize; 4]) -> bool {
        let offset: usize = index.iter().zip(self.strides).map(|(i, s)| i * s).sum();
        self.bytes[offset] != 0
    }
}

/// Which blocks of an attention are computed.
///
/// `batch` and `heads` are the mask's own extents: 1 stands for all batches, or all query heads. A mask
/// with an [`Expression`] has partial blocks, of whose pairs only those count that the expression lets
/// through.
#[derive(Clone, PartialEq, Eq)]
pub struct BlockMask {
    extents: Extents,
    batch: usize,
    heads: usize,
    words_per_row: usize,
    /// Bits of all rows, 64 columns a word; bits past the last column stay clear.
    words: Vec<u64>,
    exact: Option<Exact>,
}

/// What a mask knows of single tokens.
#[derive(Clone, PartialEq, Eq)]
struct Exact {
    expression: Arc<Expression>,
    /// Bits of partial blocks, as in [`BlockMask::words`].
    partial: Vec<u64>,
}

impl BlockMask {
    /// A mask with no block selected.
    pub fn empty(extents: Extents, batch: usize, heads: usize) -> Self {
        let words_per_row = extents.kv_blocks().div_ceil(64);
        Self {
            extents,
            batch,
            heads,
            words_per_row,
            words: vec![0; batch * heads * extents.q_blocks() * words_per_row],
            exact: None,
        }
    }

    /// A mask with an expression, with no block selected.
    pub(crate) fn partly_empty(
        extents: Extents,
        batch: usize,
        heads: usize,
        expression: Arc<Expression>,
    ) -> Self {
        let empty = Self::empty(extents, batch, heads);
        let partial = vec![0; empty.words.len()];
        let exact = Exact {
            expression,
            partial,
        };
        Self {
            exact: Some(exact),
            ..empty
        }
    }

    /// A mask from two bool matrices of one shape: true in the one where a block is computed, and in
    /// the other where only those of its pairs count that an expression lets through.
    ///
    /// # Errors
    /// When rows and columns are not the block counts of `extents`, the matrices differ in shape, or
    /// the expression leaves int32, may divide by 0, or looks behind a table's end.
    pub fn from_matrices(
        extents: Extents,
        wanted: BoolMatrix<'_>,
        partial: BoolMatrix<'_>,
        expression: Expression,
    ) -> Result<Self, MaskError> {
        let [batch, heads, rows, columns] = wanted.shape;
        extents.check_blocks(partial.shape[2], partial.shape[3])?;
        if partial.shape != wanted.shape {
            return Err(MaskError::Parameter {
                argument: "partial",
                got: format!("{:?}", partial.shape),
                allowed: "of the shape of the wanted blocks",
            });
        }
        classify::check_expression(extents, [batch, heads], &expression)?;
        let mut mask = Self::from_matrix(extents, wanted)?;
        mask.exact = Some(Exact {
            expression: Arc::new(expression),
            partial: vec![0; mask.words.len()],
        });
        for b in 0..batch {
            for h in 0..heads {
                for row in 0..rows {
                    for column in 0..columns {
                        if partial.get([b, h, row, column]) && mask.contains(b, h, row, column) {
                            mask.mark_partial(b, h, row, column);
                        }
                    }
                }
            }
        }
        Ok(mask)
    }

    /// A mask shared by all batches and heads, with the blocks for which `keep(row, column)`.
    pub fn from_fn(extents: Extents, mut keep: impl FnMut(usize, usize) -> bool) -> Self {
        let mut mask = Self::empty(extents, 1, 1);
        for row in 0..extents.q_blocks() {
            for column in 0..extents.kv_blocks() {
                if keep(row, column) {
                    mask.insert(0, 0, row, column);
                }
            }
        }
        mask
    }

    /// A mask from a bool matrix, true where a block is computed.
    ///
    /// # Errors
    /// When rows and columns are not the block counts of `extents`.
    pub fn from_matrix(extents: Extents, matrix: BoolMatrix<'_>) -> Result<Self, MaskError> {
        let [batch, heads, rows, columns] = matrix.shape;
        extents.check_blocks(rows, columns)?;
        let mut mask = Self::empty(extents, batch, heads);
        for b in 0..batch {
            for h in 0..heads {
                for row in 0..rows {
                    for column in 0..columns {
                        if matrix.get([b, h, row, column]) {
                            mask.insert(b, h, row, column);
                        }
                    }
                }
            }
        }
        Ok(mask)
    }

    /// A mask shared by all batches and heads, from (row, column) pairs; repeats do no harm.
    ///
    /// # Errors
    /// A pair outside of the mask.
    pub fn from_blocks(
        extents: Extents,
        blocks: impl IntoIterator<Item = (usize, usize)>,
    ) -> Result<Self, MaskError> {
        let mut mask = Self::empty(extents, 1, 1);
        for (row, column) in blocks {
            mask.check(row, column)?;
            mask.insert(0, 0, row, column);
        }
        Ok(mask)
    }

    /// A mask from the lists of key blocks of each row, rows in (batch, head, row) order.
    ///
    /// # Errors
    /// An index outside of the mask, or another number of lists than `batch * heads * rows`.
    pub fn from_row_lists(
        extents: Extents,
        batch: usize,
        heads: usize,
        lists: &[Vec<usize>],
    ) -> Result<Self, MaskError> {
        let rows = extents.q_blocks();
        if lists.len() != batch * heads * rows {
            return Err(MaskError::Parameter {
                argument: "lists",
                got: lists.len().to_string(),
                allowed: "one list for each batch, head and query block",
            });
        }
        let mut mask = Self::empty(extents, batch, heads);
        for (index, list) in lists.iter().enumerate() {
            let (matrix, row) = (index / rows, index % rows);
            for &column in list {
                mask.check(row, column)?;
                mask.insert(matrix / heads, matrix % heads, row, column);
            }
        }
        Ok(mask)
    }

    fn check(&self, row: usize, column: usize) -> Result<(), MaskError> {
        let (rows, columns) = (self.extents.q_blocks(), self.extents.kv_blocks());
        if row < rows && column < columns {
            return Ok(());
        }
        Err(MaskError::BlockIndex {
            row,
            column,
            rows,
            columns,
        })
    }

    /// Lengths, block sizes and block counts.
    pub fn extents(&self) -> Extents {
        self.extents
    }

    /// Batches that the mask tells apart: 1, or the tensors' batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Query heads that the mask tells apart: 1, or the tensors' heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    fn row_start(&self, batch: usize, head: usize, row: usize) -> usize {
        assert!(batch < self.batch && head < self.heads && row < self.extents.q_blocks());
        ((batch * self.heads + head) * self.extents.q_blocks() + row) * self.words_per_row
    }

    /// Selects a block.
    ///
    /// # Panics
    /// When an index lies outside of the mask.
    pub fn insert(&mut self, batch: usize, head: usize, row: usize, column: usize) {
        assert!(column < self.extents.kv_blocks());
        let start = self.row_start(batch, head, row);
        self.words[start + column / 64] |= 1 << (column % 64);
    }

    /// Says of a selected block that it is partial. The mask has an expression.
    pub(crate) fn mark_partial(&mut self, batch: usize, head: usize, row: usize, column: usize) {
        let at = self.row_start(batch, head, row) + column / 64;
        if let Some(exact) = &mut self.exact {
            exact.partial[at] |= 1 << (column % 64);
        }
    }

    /// By which single tokens are chosen, in partial blocks.
    pub fn expression(&self) -> Option<&Expression> {
        self.exact.as_ref().map(|exact| &*exact.expression)
    }

    pub(crate) fn shared_expression(&self) -> Option<Arc<Expression>> {
        self.exact.as_ref().map(|exact| exact.expression.clone())
    }

    /// Whether only those pairs of a block count that the expression lets through.
    ///
    /// # Panics
    /// When an index lies outside of the mask.
    pub fn is_partial(&self, batch: usize, head: usize, row: usize, column: usize) -> bool {
        assert!(column < self.extents.kv_blocks());
        let at = self.row_start(batch, head, row) + column / 64;
        let exact = self.exact.as_ref();
        exact.is_some_and(|exact| exact.partial[at] >> (column % 64) & 1 == 1)
    }

    /// Partial blocks, of the mask's own batches and heads.
    pub fn count_partial(&self) -> usize {
        let words = self.exact.iter().flat_map(|exact| &exact.partial);
        words.map(|word| word.count_ones() as usize).sum()
    }

    /// The bits of a mask with an expression, each matrix cut behind some of its rows, the last one
    /// among them.
    pub(crate) fn strips(&mut self, cuts: &[usize]) -> Vec<Strip<'_>> {
        let (words_per_row, rows) = (self.words_per_row, self.extents.q_blocks());
        let Some(exact) = &mut self.exact else {
            return Vec::new();
        };
        let matrix = (rows * words_per_row).max(1);
        let matrices = self.words.chunks_mut(matrix);
        let matrices = matrices.zip(exact.partial.chunks_mut(matrix)).enumerate();
        let mut strips = Vec::new();
        for (line, (mut wanted, mut partial)) in matrices {
            let mut start = 0;
            for &end in cuts {
                let words = (end - start) * words_per_row;
                let (own, later) = wanted.split_at_mut(words);
                let (own_partial, later_partial) = partial.split_at_mut(words);
                (wanted, partial) = (later, later_partial);
                strips.push(Strip {
                    batch: line / self.heads,
                    head: line % self.heads,
                    rows: start..end,
                    words_per_row,
                    wanted: own,
                    partial: own_partial,
                });
                start = end;
            }
        }
        strips
    }

    /// Selects, row after row, what is selected so many rows and columns before, as partial as it is
    /// there. Blocks that the sequences' ends cut short stay as they are.
    pub(crate) fn repeat(&mut self, [rows, columns]: [usize; 2]) {
        let (stride, all) = (self.words_per_row, self.extents.q_blocks());
        let [whole_rows, whole_columns] = self.extents.whole_blocks();
        let partial = self.exact.iter_mut().map(|exact| &mut exact.partial);
        for words in std::iter::once(&mut self.words).chain(partial) {
            for matrix in words.chunks_exact_mut((all * stride).max(1)) {
                for row in rows..whole_rows {
                    let (before, own) = matrix.split_at_mut(row * stride);
                    let from = &before[(row - rows) * stride..][..stride];
                    join_moved(&mut own[..stride], from, columns, whole_columns);
                }
            }
        }
    }

    /// Words of the bits of a matrix: selected blocks, and partial ones if there may be any. Rows
    /// follow each other, 64 columns a word.
    pub(crate) fn bits(&self, batch: usize, head: usize) -> (&[u64], Option<&[u64]>) {
        let len = self.extents.q_blocks() * self.words_per_row;
        let range = (batch * self.heads + head) * len..(batch * self.heads + head + 1) * len;
        let partial = self
            .exact
            .as_ref()
            .map(|exact| &exact.partial[range.clone()]);
        (&self.words[range], partial)
    }

    /// Words of 64 bits of [`Self::write_bits`].
    pub fn bit_words(&self) -> usize {
        2 * self.words.len()
    }

    /// Writes a bit for each block, for those that plan elsewhere: first whether it is selected, of
    /// all (batch, head, row, column), the columns of a row in words of their own; then, likewise,
    /// whether it is partial.
    ///
    /// # Errors
    /// When there are not [`Self::bit_words`] words.
    pub fn write_bits(&self, words: &mut [u64]) -> Result<(), MaskError> {
        if words.len() != self.bit_words() {
            return Err(MaskError::Parameter {
                argument: "words",
                got: words.len().to_string(),
                allowed: "as many as bit_words says",
            });
        }
        let (selected, partial) = words.split_at_mut(self.words.len());
        selected.copy_from_slice(&self.words);
        match &self.exact {
            Some(exact) => partial.copy_from_slice(&exact.partial),
            None => partial.fill(0),
        }
        Ok(())
    }

    /// Whether a block is selected.
    ///
    /// # Panics
    /// When an index lies outside of the mask.
    pub fn contains(&self, batch: usize, head: usize, row: usize, column: usize) -> bool {
        assert!(column < self.extents.kv_blocks());
        let start = self.row_start(batch, head, row);
        self.words[start + column / 64] >> (column % 64) & 1 == 1
    }

    /// The selected columns of a row, ascending.
    pub fn row(&self, batch: usize, head: usize, row: usize) -> impl Iterator<Item = usize> + '_ {
        let start = self.row_start(batch, head, row);
        let words = &self.words[start..start + self.words_per_row];
        words.iter().enumerate().flat_map(|(index, &word)| {
            std::iter::successors((word != 0).then_some(word), |rest| {
                let rest = rest & (rest - 1);
                (rest != 0).then_some(rest)
            })
            .map(move |rest| index * 64 + rest.trailing_zeros() as usize)
        })
    }

    /// Every block that is in one of the two masks. A shared mask joins a per-head one.
    ///
    /// # Errors
    /// Masks of other extents, or of batches or heads that are neither equal nor 1; masks with an
    /// expression, whose conditions are to be joined instead.
    pub fn union(&self, other: &Self) -> Result<Self, MaskError> {
        let join = |ours: usize, theirs: usize| match (ours, theirs) {
            (a, b) if a == b => Some(a),
            (1, b) => Some(b),
            (a, 1) => Some(a),
            _ => None,
        };
        let (batch, heads) = (join(self.batch, other.batch), join(self.heads, other.heads));
        let fits = self.extents == other.extents && self.exact.is_none() && other.exact.is_none();
        let (Some(batch), Some(heads), true) = (batch, heads, fits) else {
            return Err(MaskError::Parameter {
                argument: "other",
                got: format!("{other:?}"),
                allowed: "a mask of whole blocks of the same extents, its batch and heads equal or 1",
            });
        };
        let mut joined = Self::empty(self.extents, batch, heads);
        for b in 0..batch {
            for h in 0..heads {
                for row in 0..self.extents.q_blocks() {
                    for mask in [self, other] {
                        let from =
                            mask.row_start(b.min(mask.batch - 1), h.min(mask.heads - 1), row);
                        let to = joined.row_start(b, h, row);
                        for word in 0..self.words_per_row {
                            joined.words[to + word] |= mask.words[from + word];
                        }
                    }
                }
            }
        }
        Ok(joined)
    }

    /// Selected blocks, of the mask's own batches and heads.
    pub fn count(&self) -> usize {
        self.words
            .iter()
            .map(|word| word.count_ones() as usize)
            .sum()
    }

    /// Whether all blocks are selected, of all batches and heads, and none is partial.
    pub fn is_full(&self) -> bool {
        let columns = self.extents.kv_blocks();
        let all = |word: usize| u64::MAX >> (64 - (columns - 64 * word).min(64));
        let mut rows = self.words.chunks(self.words_per_row.max(1));
        let mut partial = self.exact.iter().flat_map(|exact| &exact.partial);
        rows.all(|row| row.iter().enumerate().all(|(i, &bits)| bits == all(i)))
            && partial.all(|&bits| bits == 0)
    }

    /// The share of (query, key) token pairs that is computed: 1 for a full mask, 0 without blocks.
    /// Partial blocks are computed whole.
    pub fn density(&self) -> f64 {
        let all = self.batch * self.heads * self.extents.q_len() * self.extents.kv_len();
        if all == 0 {
            return 0.0;
        }
        let mut pairs = 0usize;
        for b in 0..self.batch {
            for h in 0..self.heads {
                for row in 0..self.extents.q_blocks() {
                    let keys: usize = self
                        .row(b, h, row)
                        .map(|column| self.extents.kv_tokens(column).len())
                        .sum();
                    pairs += keys * self.extents.q_tokens(row).len();
                }
            }
        }
        pairs as f64 / all as f64
    }

    /// All blocks as bytes of 0 and 1, dense in (batch, head, row, column) order.
    pub fn to_dense(&self) -> Vec<u8> {
        self.bytes(&self.words)
    }

    /// Partial blocks as bytes of 0 and 1, likewise.
    pub fn partial_to_dense(&self) -> Vec<u8> {
        match &self.exact {
            Some(exact) => self.bytes(&exact.partial),
            None => vec![0; self.to_dense().len()],
        }
    }

    fn bytes(&self, words: &[u64]) -> Vec<u8> {
        let columns = self.extents.kv_blocks();
        let rows = self.batch * self.heads * self.extents.q_blocks();
        let mut dense = vec![0; rows * columns];
        for row in 0..rows {
            let bits = &words[row * self.words_per_row..][..self.words_per_row];
            for column in 0..columns {
                dense[row * columns + column] = (bits[column / 64] >> (column % 64) & 1) as u8;
            }
        }
        dense
    }
}

/// Adds the bits of another row, so many places further on, before an end.
fn join_moved(to: &mut [u64], from: &[u64], places: usize, end: usize) {
    let (words, bits) = (places / 64, places % 64);
    for at in words..end.div_ceil(64) {
        let low = from[at - words] << bits;
        let high = match (bits, at - words) {
            (0, _) | (_, 0) => 0,
            (bits, behind) => from[behind - 1] >> (64 - bits),
        };
        let inside = match end - 64 * at {
            left @ 0..64 => !(!0 << left),
            _ => !0,
        };
        to[at] |= (low | high) & inside;
    }
}

/// Some rows of a matrix of a mask with an expression, to be written.
pub(crate) struct Strip<'a> {
    pub batch: usize,
    pub head: usize,
    pub rows: Range<usize>,
    words_per_row: usize,
    wanted: &'a mut [u64],
    partial: &'a mut [u64],
}

impl Strip<'_> {
    /// Selects all blocks of a rectangle inside.
    pub fn insert_all(&mut self, rows: Range<usize>, columns: Range<usize>) {
        if columns.is_empty() {
            return;
        }
        let (first, last) = (columns.start / 64, (columns.end - 1) / 64);
        let head_bits = !0 << (columns.start % 64);
        let tail_bits = !0 >> (63 - (columns.end - 1) % 64);
        for row in rows {
            let start = (row - self.rows.start) * self.words_per_row;
            let words = &mut self.wanted[start + first..=start + last];
            match words {
                [only] => *only |= head_bits & tail_bits,
                [first, between @ .., last] => {
                    *first |= head_bits;
                    between.fill(!0);
                    *last |= tail_bits;
                }
                [] => {}
            }
        }
    }

    /// Selects a block, in part or whole.
    pub fn insert(&mut self, row: usize, column: usize, is_partial: bool) {
        let at = (row - self.rows.start) * self.words_per_row + column / 64;
        self.wanted[at] |= 1 << (column % 64);
        self.partial[at] |= u64::from(is_partial) << (column % 64);
    }
}

impl std::fmt::Debug for BlockMask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let e = self.extents;
        write!(
            f,
            "BlockMask(batch {}, heads {}, {} x {} blocks of {} x {} over {} x {} tokens, density {:.3}",
            self.batch,
            self.heads,
            e.q_blocks(),
            e.kv_blocks(),
            e.q_block(),
            e.kv_block(),
            e.q_len(),
            e.kv_len(),
            self.density()
        )?;
        match self.expression() {
            Some(expression) => write!(f, ", {} partial: {expression})", self.count_partial()),
            None => write!(f, ")"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extents() -> impl Strategy<Value = Extents> {
        (1usize..5, 1usize..5, 0usize..200, 0usize..1400).prop_map(|(q, kv, q_len, kv_len)| {
            Extents::new(q_len, kv_len, q * 16, kv * 16).unwrap()
        })
    }

    proptest! {
        #[test]
        fn matrix_and_back(extents in extents(), batch in 1usize..3, heads in 1usize..3, seed: u64) {
            let shape = [batch, heads, extents.q_blocks(), extents.kv_blocks()];
            let len: usize = shape.iter().product();
            let bytes: Vec<u8> = (0..len as u64)
                .map(|i| (seed.rotate_left(i as u32) ^ i.wrapping_mul(0x9E37)) as u8 & 1)
                .collect();
            let strides = [heads * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1];
            let matrix = BoolMatrix::new(&bytes, shape, strides).unwrap();
            let mask = BlockMask::from_matrix(extents, matrix).unwrap();
            prop_assert_eq!(mask.to_dense(), bytes.clone());
            prop_assert_eq!(mask.count(), bytes.iter().filter(|&&b| b == 1).count());

            let lists: Vec<Vec<usize>> = (0..batch * heads * shape[2])
                .map(|i| mask.row(i / shape[2] / heads, i / shape[2] % heads, i % shape[2]).collect())
                .collect();
            let again = BlockMask::from_row_lists(extents, batch, heads, &lists).unwrap();
            prop_assert_eq!(again, mask);
        }
    }

    #[test]
    fn strides_broadcast_and_transpose() {
        let extents = Extents::new(32, 48, 16, 16).unwrap();
        // A 3 x 2 matrix read transposed, repeated for 2 batches by stride 0.
        let bytes = [1, 0, 0, 1, 1, 1];
        let matrix = BoolMatrix::new(&bytes, [2, 1, 2, 3], [0, 0, 1, 2]).unwrap();
        let mask = BlockMask::from_matrix(extents, matrix).unwrap();
        assert_eq!(mask.to_dense(), [1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1]);
    }

    #[test]
    fn density_counts_tokens_not_blocks() {
        let extents = Extents::new(24, 16, 16, 16).unwrap();
        let mask = BlockMask::from_blocks(extents, [(1, 0)]).unwrap();
        assert_eq!(mask.density(), 8.0 / 24.0);
        assert_eq!(
            BlockMask::empty(Extents::new(0, 16, 16, 16).unwrap(), 1, 1).density(),
            0.0
        );
    }

    #[test]
    fn full_masks_are_known() {
        let extents = Extents::new(24, 40, 16, 16).unwrap();
        let mut mask = BlockMask::from_fn(extents, |row, column| row + column < 3);
        assert!(!mask.is_full());
        mask.insert(0, 0, 1, 2);
        assert!(mask.is_full());
        assert!(BlockMask::empty(Extents::new(0, 16, 16, 16).unwrap(), 1, 1).is_full());
        for columns in [2, 63, 64, 65, 128, 130] {
            let extents = Extents::new(32, 16 * columns, 16, 16).unwrap();
            assert!(BlockMask::from_fn(extents, |_, _| true).is_full());
            for left_out in [0, columns / 2, columns - 1] {
                let some = |row: usize, column: usize| row == 0 || column != left_out;
                assert!(!BlockMask::from_fn(extents, some).is_full());
            }
        }
    }

    #[test]
    fn union_shares_what_is_shared() {
        let extents = Extents::new(32, 32, 16, 16).unwrap();
        let shared = BlockMask::from_blocks(extents, [(0, 0)]).unwrap();
        let mut per_head = BlockMask::empty(extents, 1, 2);
        per_head.insert(0, 1, 1, 1);
        let joined = per_head.union(&shared).unwrap();
        assert_eq!(joined.to_dense(), [1, 0, 0, 0, 1, 0, 0, 1]);
        assert!(joined.union(&BlockMask::empty(extents, 1, 3)).is_err());
    }

    #[test]
    fn mistakes_are_named() {
        let extents = Extents::new(100, 64, 32, 16).unwrap();
        let wrong = BoolMatrix::dense(&[1; 12], 4, 3).unwrap();
        assert_eq!(
            BlockMask::from_matrix(extents, wrong)
                .unwrap_err()
                .to_string(),
            "block_mask has 4 x 3 blocks, but q_len 100 in blocks of 32 and kv_len 64 in blocks of \
             16 need 4 x 4"
        );
        assert_eq!(
            BlockMask::from_blocks(extents, [(4, 0)])
                .unwrap_err()
                .to_string(),
            "selected block (4, 0) lies outside of the 4 x 4 blocks"
        );
        assert_eq!(
            BoolMatrix::dense(&[1; 11], 4, 3).unwrap_err().to_string(),
            "block_mask of shape [1, 1, 4, 3] and strides [0, 0, 3, 1] does not fit its 11 elements"
        );
    }
}
