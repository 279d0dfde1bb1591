//! Exact softmax attention over a chosen set of (query block, key block) pairs, forward and
//! backward:
//!
//! ```text
//! out = softmax(scale * q k^T  restricted to the mask) v
//! ```
//!
//! In: tensors as views ([`Tensor`], [`TensorMut`]) in (batch, heads, sequence, head_dim) order,
//! and the [`Plan`] of a [`BlockMask`]. Out: results in the caller's tensors; nothing is
//! allocated for the caller. Bad arguments come back as an [`Error`] that names the argument,
//! before anything is computed. The Python extension and Rust programs call this crate; it knows
//! nothing of Python.
//!
//! - float32, bfloat16 and float16 with float32 accumulation; float64 in float64.
//! - Query heads may be a multiple of key heads (grouped-query attention): query head `h` reads
//!   key head `h / (q_heads / kv_heads)`.
//! - head_dim: any multiple of 8 up to 256.
//! - A query without any key gets output 0, lse -inf and zero gradients.
//!
//! ```
//! use flex_block_attn::{Extents, Options, Plan, Tensor, TensorMut, builders, forward};
//!
//! let (batch, heads, tokens, head_dim) = (1, 2, 256, 64);
//! let shape = [batch, heads, tokens, head_dim];
//! let values: Vec<f32> = (0..shape.iter().product()).map(|i| (i as f32 * 0.1).sin()).collect();
//! let tensor = Tensor::new(&values, shape)?;
//!
//! // Each block of 64 queries sees the blocks of keys up to 64 tokens away.
//! let extents = Extents::new(tokens, tokens, 64, 64)?;
//! let plan = Plan::new(&builders::sliding_window(extents, 64, 64));
//!
//! let mut out = vec![0.0f32; values.len()];
//! let mut lse = vec![0.0f32; batch * heads * tokens];
//! forward(
//!     tensor,
//!     tensor,
//!     tensor,
//!     plan.view(),
//!     &Options::default(),
//!     TensorMut::new(&mut out, shape)?,
//!     TensorMut::new(&mut lse, [batch, heads, tokens, 1])?,
//! )?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod attention;
mod check;
pub mod doctor;
mod error;
pub mod gpu;
pub mod select;
mod tensor;
pub mod video;

pub use attention::{Gradients, Options, Saved, backward, forward};
pub use error::{Error, Result};
pub use flex_block_attn_mask::{
    BLOCK_STEP, BlockMask, BoolMatrix, Extents, MaskError, Plan, PlanLayout, PlanView, builders,
    expression,
};
pub use half::{bf16, f16};
pub use tensor::{DType, Element, Tensor, TensorMut};
pub use video::{Padding, Video};

/// The README's Rust example is a test.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

/// And so is that of the page on masks of functions.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/masks.md")]
struct Masks;
