//! The words that Hopper kernels are written in: every hardware encoding has its home here.
//!
//! In: calls from `kernels`, on a [`Builder`]. Out: instructions. Shapes, element types and
//! swizzles are values known when a kernel is built, so kernels are functions of their config;
//! descriptors, byte counts, parities and the addresses of swizzled chunks follow from them and
//! are never written by hand. What does not fit is a panic while the kernel is built, which tests
//! do for every config. Knows nothing of attention, masks or drivers.
//!
//! - [`Shape`]: rows, columns and element type of a tile, and its tensor map in global memory;
//! - [`Shared`]: a thread block's shared memory, from which tiles and barriers are taken;
//! - [`SharedTile`]: a swizzled tile; loaded and stored by TMA, an operand of products;
//! - [`RegTile`], [`Fragments`]: tiles in the registers of a warpgroup;
//! - [`Warpgroup`]: who computes;
//! - [`Barrier`], [`Barriers`], [`Phases`], [`Ring`]: how producers and consumers hand tiles over.
//!
//! ThunderKittens (Spector et al., arXiv 2410.20399) is the model for the vocabulary.
#![forbid(unsafe_code)]

mod barrier;
mod mma;
mod registers;
mod ring;
mod shape;
mod shared;
mod warpgroup;

pub use barrier::{Barrier, Barriers, Phases, Waiter};
pub use flex_block_attn_ptx::Builder;
pub use mma::{Left, Right};
pub use registers::{Fragments, RegTile, RowPair, four_of_sixteen, quad_sum};
pub use ring::{Consumer, Producer, Ring};
pub use shape::{MATRIX_AXES, Place, Shape, Strides};
pub use shared::{RowAddress, Shared, SharedTile};
pub use warpgroup::{WARPGROUP, Warpgroup};
