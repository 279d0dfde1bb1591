//! Which (query block, key block) pairs an attention computes.
//!
//! In: lengths and block sizes ([`Extents`]), and a choice of blocks: a bool matrix, index lists
//! one of the [`builders`], or an [`expression`] of single tokens. Out: a [`BlockMask`], and from it a [`Plan`], the only form that
//! compute backends read.
//!
//! Called by the backends (plans) and by the public crate (everything). It knows nothing of
//! tensors' values, of devices, or of the tile sizes that a backend prefers.
//!
//! ```
//! use flex_block_attn_mask::{Extents, Plan, builders};
//!
//! let extents = Extents::new(1000, 1000, 128, 128)?;
//! let mask = builders::sliding_window(extents, 128, 128);
//! let plan = Plan::new(&mask);
//! assert_eq!(plan.view().row(0, 0, 3), &[2, 3, 4]);
//! # Ok::<(), flex_block_attn_mask::MaskError>(())
//! ```
#![forbid(unsafe_code)]

mod block_mask;
pub mod builders;
mod classify;
mod error;
pub mod expression;
mod extents;
mod parallel;
mod picture;
mod plan;

pub use block_mask::{BlockMask, BoolMatrix};
pub use error::MaskError;
pub use extents::{BLOCK_STEP, Extents};
pub use plan::{PARTIAL, Plan, PlanLayout, PlanView, Side, SideLayout, block_of, is_partial};
