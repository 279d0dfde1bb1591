//! [`Error`]: everything that can be wrong with a call, each with the argument's name, what came
//! and what is allowed.

use crate::DType;

/// What a call of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// A call that was refused. Nothing has been computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor's shape does not go with the others.
    #[error("{argument} has shape {got:?}, but {reason} needs {needed:?}")]
    Shape {
        /// The argument's name.
        argument: &'static str,
        /// The shape that came.
        got: [usize; 4],
        /// The shape needed.
        needed: [usize; 4],
        /// What needs it.
        reason: &'static str,
    },
    /// A tensor's dtype does not go with the others.
    #[error("{argument} is {got}, but {reason} needs {needed}")]
    DType {
        /// The argument's name.
        argument: &'static str,
        /// The dtype that came.
        got: DType,
        /// The dtype needed.
        needed: DType,
        /// What needs it.
        reason: &'static str,
    },
    /// The last dimension's stride is not 1.
    #[error("the last dimension of {argument} must be contiguous, but its stride is {got}")]
    LastStride {
        /// The argument's name.
        argument: &'static str,
        /// The stride that came, in elements.
        got: isize,
    },
    /// head_dim is not supported.
    #[error("head_dim must be a multiple of 8 from 8 to 256, got {got}")]
    HeadDim {
        /// What came.
        got: usize,
    },
    /// Query heads cannot be shared out over key heads.
    #[error("q has {q_heads} heads, which is no multiple of the {kv_heads} heads of k and v")]
    Heads {
        /// Heads of q.
        q_heads: usize,
        /// Heads of k and v.
        kv_heads: usize,
    },
    /// The mask's batch or heads are neither 1 nor those of q.
    #[error("block_mask has {got} {what}, but q has {needed}: allowed are 1 (shared) and {needed}")]
    MaskExtent {
        /// "batches" or "heads".
        what: &'static str,
        /// What came.
        got: usize,
        /// q's own.
        needed: usize,
    },
    /// The mask's expression depends on the batch or head, but its plan is that of one.
    #[error("the mask's expression tells {what} apart, but is made for 1, and q has {needed}")]
    MaskTellsApart {
        /// "batches" or "heads".
        what: &'static str,
        /// q's own.
        needed: usize,
    },
    /// The mask's tables are on no device that the call can read.
    #[error("table t{table} of the mask's expression must be {allowed}")]
    MaskTable {
        /// The table's number.
        table: usize,
        /// What is allowed.
        allowed: &'static str,
    },
    /// The plan was made for other lengths.
    #[error(
        "block_mask is made for q_len {mask_q_len} and kv_len {mask_kv_len}, but the tensors have \
         {q_len} and {kv_len}"
    )]
    MaskLengths {
        /// The plan's number of queries.
        mask_q_len: usize,
        /// The plan's number of keys.
        mask_kv_len: usize,
        /// The tensors' number of queries.
        q_len: usize,
        /// The tensors' number of keys.
        kv_len: usize,
    },
    /// The softmax scale is no finite number.
    #[error("scale must be a finite number, got {got}")]
    Scale {
        /// What came.
        got: f64,
    },
    /// A view would reach outside of its data.
    #[error("a tensor of shape {shape:?} and strides {strides:?} does not fit its {len} elements")]
    OutOfBounds {
        /// The view's shape.
        shape: [usize; 4],
        /// The view's strides, in elements.
        strides: [isize; 4],
        /// Elements there are.
        len: usize,
    },
    /// A tensor to be written has elements that share memory.
    #[error("{argument} has shape {shape:?} and strides {strides:?}: its elements overlap")]
    Overlap {
        /// The argument's name.
        argument: &'static str,
        /// The view's shape.
        shape: [usize; 4],
        /// The view's strides, in elements.
        strides: [isize; 4],
    },
    /// What the GPU's kernels do not do.
    #[error("on a GPU, {argument} must be {allowed}, got {got}")]
    Gpu {
        /// The argument's name.
        argument: &'static str,
        /// What came.
        got: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// What a video cannot be.
    #[error("of a video, {argument} must be {allowed}, got {got}")]
    Video {
        /// The argument's name.
        argument: &'static str,
        /// What came.
        got: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// There is no GPU, or its driver says no.
    #[error(transparent)]
    Device(#[from] flex_block_attn_cuda::Error),
    /// The mask is wrong.
    #[error(transparent)]
    Mask(#[from] flex_block_attn_mask::MaskError),
}
