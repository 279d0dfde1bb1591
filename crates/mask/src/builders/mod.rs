//! Masks made from a pattern, one file a family. In: sizes and the pattern's parameters. Out: a
//! [`BlockMask`](crate::BlockMask).
//!
//! A block is the unit: a pattern that cuts through a block keeps the whole block. All are shared
//! by batches and heads, except where a function says otherwise.

mod basic;
mod random;
mod sta;
mod text;

pub use basic::{causal, full, sliding_window};
pub use random::random;
pub use sta::{StaCanvas, sta};
pub use text::without_padded_text;
