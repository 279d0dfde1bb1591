//! What can be wrong with a mask: one variant a mistake, each with what came and what is allowed.

/// A mask, its sizes or its plan cannot be used as given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MaskError {
    /// A block size is zero or no multiple of [`crate::BLOCK_STEP`].
    #[error("{argument} must be a positive multiple of 16, got {got}")]
    BlockSize {
        /// The argument's name.
        argument: &'static str,
        /// What came.
        got: usize,
    },
    /// A length or a block count does not fit the plan's 32-bit indices.
    #[error("{argument} is too large for 32-bit block indices: got {got}")]
    TooLarge {
        /// The argument's name.
        argument: &'static str,
        /// What came.
        got: usize,
    },
    /// A mask's last two dimensions are not the block counts that lengths and block sizes give.
    #[error(
        "block_mask has {got_rows} x {got_columns} blocks, but q_len {q_len} in blocks of {q_block} \
         and kv_len {kv_len} in blocks of {kv_block} need {rows} x {columns}"
    )]
    BlockCount {
        /// Rows that came.
        got_rows: usize,
        /// Columns that came.
        got_columns: usize,
        /// Rows needed.
        rows: usize,
        /// Columns needed.
        columns: usize,
        /// Number of query tokens.
        q_len: usize,
        /// Tokens of a query block.
        q_block: usize,
        /// Number of key tokens.
        kv_len: usize,
        /// Tokens of a key block.
        kv_block: usize,
    },
    /// A matrix view would read outside of its slice.
    #[error(
        "block_mask of shape {shape:?} and strides {strides:?} does not fit its {len} elements"
    )]
    OutOfBounds {
        /// (batch, heads, rows, columns).
        shape: [usize; 4],
        /// Elements from one index to the next, for each dimension.
        strides: [usize; 4],
        /// Elements there are.
        len: usize,
    },
    /// A block index lies outside of the mask.
    #[error("selected block ({row}, {column}) lies outside of the {rows} x {columns} blocks")]
    BlockIndex {
        /// Row of the block.
        row: usize,
        /// Column of the block.
        column: usize,
        /// Rows there are.
        rows: usize,
        /// Columns there are.
        columns: usize,
    },
    /// A parameter of a builder is outside of its range.
    #[error("{argument} must be {allowed}, got {got}")]
    Parameter {
        /// The argument's name.
        argument: &'static str,
        /// What came, as text.
        got: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// A formula is none, or its numbers leave what it may compute with.
    #[error("the mask's expression {text} cannot be used: {reason}")]
    Formula {
        /// The formula.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Words handed over as a plan are not one.
    #[error("not a plan of {rows} x {columns} blocks: {reason}")]
    Plan {
        /// Rows of the mask.
        rows: usize,
        /// Columns of the mask.
        columns: usize,
        /// Which rule they break.
        reason: &'static str,
    },
}
