//! The sizes of a block mask: lengths in tokens, block sizes in tokens, block counts.

use std::ops::Range;

use crate::MaskError;

/// Block sizes are multiples of this many tokens: a warp's share of a tensor-core tile.
pub const BLOCK_STEP: usize = 16;

/// Lengths and block sizes, in tokens. The last block of each side may be shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extents {
    q_len: usize,
    kv_len: usize,
    q_block: usize,
    kv_block: usize,
}

impl Extents {
    /// Sizes of an attention of `q_len` queries in blocks of `q_block` over `kv_len` keys in
    /// blocks of `kv_block`.
    ///
    /// # Errors
    /// A block size that is no positive multiple of 16; a length beyond 2^31 tokens.
    pub fn new(
        q_len: usize,
        kv_len: usize,
        q_block: usize,
        kv_block: usize,
    ) -> Result<Self, MaskError> {
        check_block_size("q_block_size", q_block)?;
        check_block_size("kv_block_size", kv_block)?;
        let sizes = [
            ("q_len", q_len),
            ("kv_len", kv_len),
            ("q_block_size", q_block),
            ("kv_block_size", kv_block),
        ];
        for (argument, got) in sizes {
            if i32::try_from(got).is_err() {
                return Err(MaskError::TooLarge { argument, got });
            }
        }
        Ok(Self {
            q_len,
            kv_len,
            q_block,
            kv_block,
        })
    }

    /// Sizes with blocks as [`Extents::default_block`] says.
    ///
    /// # Errors
    /// A length beyond 2^31 tokens.
    pub fn with_default_blocks(q_len: usize, kv_len: usize) -> Result<Self, MaskError> {
        let block = Self::default_block(q_len, kv_len);
        Self::new(q_len, kv_len, block, block)
    }

    /// Tokens of a block where nobody says: 128, doubled until neither side has more than 2048 blocks.
    /// So a plan, whose size is that of its matrix of blocks, has 34 MB at most for a batch and head.
    pub fn default_block(q_len: usize, kv_len: usize) -> usize {
        const BLOCKS: usize = 2048;
        let wanted = q_len.max(kv_len).div_ceil(BLOCKS);
        wanted.next_power_of_two().max(128)
    }

    /// Number of query tokens.
    pub fn q_len(&self) -> usize {
        self.q_len
    }

    /// Number of key tokens.
    pub fn kv_len(&self) -> usize {
        self.kv_len
    }

    /// Tokens of a query block.
    pub fn q_block(&self) -> usize {
        self.q_block
    }

    /// Tokens of a key block.
    pub fn kv_block(&self) -> usize {
        self.kv_block
    }

    /// Number of query blocks: rows of the mask.
    pub fn q_blocks(&self) -> usize {
        self.q_len.div_ceil(self.q_block)
    }

    /// Number of key blocks: columns of the mask.
    pub fn kv_blocks(&self) -> usize {
        self.kv_len.div_ceil(self.kv_block)
    }

    /// Rows and columns that the ends of the sequences do not cut short.
    pub(crate) fn whole_blocks(&self) -> [usize; 2] {
        [self.q_len / self.q_block, self.kv_len / self.kv_block]
    }

    /// Whether a mask of so many rows and columns is one of these blocks.
    ///
    /// # Errors
    /// When it is not.
    pub fn check_blocks(&self, rows: usize, columns: usize) -> Result<(), MaskError> {
        if (rows, columns) == (self.q_blocks(), self.kv_blocks()) {
            return Ok(());
        }
        Err(MaskError::BlockCount {
            got_rows: rows,
            got_columns: columns,
            rows: self.q_blocks(),
            columns: self.kv_blocks(),
            q_len: self.q_len(),
            q_block: self.q_block(),
            kv_len: self.kv_len(),
            kv_block: self.kv_block(),
        })
    }

    /// The query tokens of block `row`; the last block ends where the sequence does.
    pub fn q_tokens(&self, row: usize) -> Range<usize> {
        row * self.q_block..((row + 1) * self.q_block).min(self.q_len)
    }

    /// The key tokens of block `column`; the last block ends where the sequence does.
    pub fn kv_tokens(&self, column: usize) -> Range<usize> {
        column * self.kv_block..((column + 1) * self.kv_block).min(self.kv_len)
    }
}

/// A block size is a positive multiple of [`BLOCK_STEP`], by whatever name a caller knows it.
pub(crate) fn check_block_size(argument: &'static str, got: usize) -> Result<(), MaskError> {
    if got == 0 || !got.is_multiple_of(BLOCK_STEP) {
        return Err(MaskError::BlockSize { argument, got });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_ranges_end_with_the_sequence() {
        let extents = Extents::new(100, 33, 48, 16).unwrap();
        assert_eq!((extents.q_blocks(), extents.kv_blocks()), (3, 3));
        assert_eq!(extents.q_tokens(2), 96..100);
        assert_eq!(extents.kv_tokens(2), 32..33);
    }

    #[test]
    fn empty_sequences_have_no_blocks() {
        let extents = Extents::new(0, 0, 16, 16).unwrap();
        assert_eq!((extents.q_blocks(), extents.kv_blocks()), (0, 0));
    }

    #[test]
    fn default_blocks_grow_with_the_sequence() {
        for (len, block) in [
            (0, 128),
            (1, 128),
            (262_144, 128),
            (262_145, 256),
            (1 << 20, 512),
        ] {
            let extents = Extents::with_default_blocks(len, 100).unwrap();
            assert_eq!(extents.q_block(), block, "{len}");
            assert!(extents.q_blocks() <= 2048 && extents.kv_block() == block);
        }
    }

    #[test]
    fn bad_sizes_are_named() {
        let text = |result: Result<Extents, MaskError>| result.unwrap_err().to_string();
        assert_eq!(
            text(Extents::new(64, 64, 24, 16)),
            "q_block_size must be a positive multiple of 16, got 24"
        );
        assert_eq!(
            text(Extents::new(64, 64, 16, 0)),
            "kv_block_size must be a positive multiple of 16, got 0"
        );
        assert_eq!(
            text(Extents::new(64, 1 << 31, 16, 16)),
            "kv_len is too large for 32-bit block indices: got 2147483648"
        );
    }
}
