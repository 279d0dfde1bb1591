//! Masks chosen by what tokens hold, on the CPU; [`crate::gpu::select()`] chooses on GPUs.
//!
//! In: queries and keys as [`Tensor`]s. Out: a [`BlockMask`], of which a plan is made as of any
//! other. Choices are made of three pieces:
//!
//! 1. [`Pooled`]: a mean of each block of tokens, or several, one for each of its cells;
//! 2. [`Scores`]: how well a pooled key suits a pooled query;
//! 3. [`Scores::keep_top`] and [`Scores::keep_mass`]: the best of each row, added to a mask.
//!
//! [`video_tiles`] and [`tiles_in_place`] put them together as video models do (MoBA over tiles; with
//! sliding tiles it is SSTA). Sources: MoBA, arXiv 2502.13189; STA, arXiv 2502.04507; SSTA, the technical report of
//! HunyuanVideo-1.5, arXiv 2511.18870.
//!
//! ```
//! use flex_block_attn::builders::{self, StaCanvas};
//! use flex_block_attn::select::{Choice, Scoring, video_tiles};
//! use flex_block_attn::{Plan, Tensor};
//!
//! // 2 x 3 x 4 tiles of 2 x 2 x 4 tokens, then 20 tokens of text; 2 heads of 8 numbers.
//! let canvas = StaCanvas { tiles: [2, 3, 4], window: [1, 1, 3], tile_tokens: 16, text_tokens: 20 };
//! let shape = [1, 2, 24 * 16 + 20, 8];
//! let values: Vec<f32> = (0..shape.iter().product()).map(|i| (i as f32).sin()).collect();
//! let tokens = Tensor::new(&values, shape)?;
//!
//! let choice = Choice::new(5, Scoring::Importance { lambda: 0.7 });
//! let chosen = video_tiles(tokens, tokens, &canvas, &choice)?;
//! let mask = chosen.union(&builders::sta(&canvas)?)?;
//! let plan = Plan::new(&mask);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod pooled;
mod scores;

use std::num::NonZeroUsize;

use flex_block_attn_mask::builders::StaCanvas;
use flex_block_attn_mask::{BlockMask, Extents, MaskError};

pub use pooled::Pooled;
pub use scores::Scores;

use crate::{Result, Tensor, Video};

/// By what tiles are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scoring {
    /// The tiles with the largest products of mean query and mean key.
    Similarity,
    /// The fewest tiles whose softmax of those products adds up to `mass`; [`LEAST_BLOCKS`] at
    /// least, [`Choice::top`] at most. Released models use 2 x 2 x 2 cells with it.
    Mass {
        /// From 0 to 1.
        mass: f64,
    },
    /// Likeness to the query, less likeness to the other keys: see [`Scores::importance`].
    Importance {
        /// The weight of the former, from 0 to 1.
        lambda: f64,
    },
}

/// Blocks that a choice by mass keeps at least, as released models have it.
pub const LEAST_BLOCKS: usize = 8;

/// Divisor of scores before the softmax of a choice by mass, as released models have it.
pub const TEMPERATURE: f64 = 0.01;

/// How tiles are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Tiles that a tile sees, at least 1; all if there are no more.
    pub top: usize,
    /// By what.
    pub scoring: Scoring,
    /// A tile's tokens along (time, height, width), and its cells along each of them, whose means
    /// are compared side by side; `None` is a single cell.
    pub cells: Option<[[usize; 3]; 2]>,
    /// Whether heads are averaged, and share a mask.
    pub share_heads: bool,
    /// Threads; `None` is one for each core.
    pub threads: Option<NonZeroUsize>,
}

impl Choice {
    /// A choice for each head, tiles being compared by a single mean.
    pub fn new(top: usize, scoring: Scoring) -> Self {
        Self {
            top,
            scoring,
            cells: None,
            share_heads: false,
            threads: None,
        }
    }
}

/// The mask in which each tile sees those that suit it best, and text sees and is seen by all.
///
/// `q` and `k` are (batch, heads, sequence, head_dim) in tile order, heads of k dividing those of
/// q; the sequence is at least the canvas' tiles, what follows is not looked at. No tile is forced
/// to see itself; the canvas' window is not used. The mask is that of each batch and query head, or
/// of each batch where heads share.
///
/// # Errors
/// Those of the pieces; a sequence that is shorter than the tiles; cells of other tiles.
pub fn video_tiles(
    q: Tensor<'_>,
    k: Tensor<'_>,
    canvas: &StaCanvas,
    choice: &Choice,
) -> Result<BlockMask> {
    let extents = canvas.extents()?;
    let block = canvas.tile_tokens;
    let tiles: usize = canvas.tiles.iter().product();
    let pool = |argument: &'static str, mut x: Tensor<'_>| {
        if x.shape[2] < tiles * block {
            return Err(parameter(
                argument,
                format!("{} tokens", x.shape[2]),
                "at least the canvas' tiles long",
            ));
        }
        x.shape[2] = tiles * block;
        let pooled = match choice.cells {
            None => Pooled::blocks(x, block, choice.threads)?,
            Some([tile, _]) if tile.iter().product::<usize>() != block => {
                return Err(parameter(
                    "cells",
                    format!("{tile:?}"),
                    "of the canvas' tile_tokens",
                ));
            }
            Some([tile, cells]) => Pooled::tiles(x, tile, cells, choice.threads)?,
        };
        Ok(over_heads(pooled, choice))
    };
    let pooled = [pool("q", q)?, pool("k", k)?];
    choose(pooled, extents, tiles, choice)
}

/// [`video_tiles`] of tokens that lie as they come, in (time, height, width) order with text behind:
/// the mask for an attention over them, whose [`Options::video`](crate::Options::video) is this one.
///
/// ```
/// use flex_block_attn::builders::{self, StaCanvas};
/// use flex_block_attn::select::{Choice, Scoring, tiles_in_place};
/// use flex_block_attn::{Options, Padding, Plan, Tensor, TensorMut, Video, forward};
///
/// let video =
///     Video { thw: [3, 5, 9], tile: [2, 4, 4], text_len: 20, padding: Padding::Zero };
/// let shape = [1, 2, video.tokens(), 8];
/// let values: Vec<f32> = (0..shape.iter().product()).map(|i| (i as f32).sin()).collect();
/// let tokens = Tensor::new(&values, shape)?;
///
/// let choice = Choice::new(3, Scoring::Importance { lambda: 0.7 });
/// let sliding = builders::sta(&StaCanvas {
///     tiles: video.tiles(),
///     window: [1, 3, 1],
///     tile_tokens: video.block(),
///     text_tokens: video.text_len,
/// })?;
/// let plan = Plan::new(&tiles_in_place(tokens, tokens, &video, &choice)?.union(&sliding)?);
///
/// let places = 2 * video.places();
/// let (mut out, mut lse) = (vec![0f32; values.len()], vec![0f32; places]);
/// let options = Options { video: Some(video), ..Options::default() };
/// let (out, lse) =
///     (TensorMut::new(&mut out, shape)?, TensorMut::new(&mut lse, [1, 2, places / 2, 1])?);
/// forward(tokens, tokens, tokens, plan.view(), &options, out, lse)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Those of the pieces; another number of tokens than the video's; cells of other tiles.
pub fn tiles_in_place(
    q: Tensor<'_>,
    k: Tensor<'_>,
    video: &Video,
    choice: &Choice,
) -> Result<BlockMask> {
    video.check_sizes()?;
    let [tile, cells] = choice.cells.unwrap_or([video.tile, [1; 3]]);
    if tile != video.tile {
        return Err(parameter(
            "cells",
            format!("{tile:?}"),
            "of the video's tile",
        ));
    }
    let pool = |argument: &'static str, x: Tensor<'_>| {
        if x.shape[2] != video.tokens() {
            let got = format!("{} tokens", x.shape[2]);
            return Err(parameter(argument, got, "of all tokens of the video"));
        }
        let pooled = Pooled::video(x, video, cells, choice.threads)?;
        Ok(over_heads(pooled, choice))
    };
    let pooled = [pool("q", q)?, pool("k", k)?];
    let (places, block) = (video.places(), video.block());
    let extents = Extents::new(places, places, block, block)?;
    choose(pooled, extents, video.tiles().iter().product(), choice)
}

fn over_heads(pooled: Pooled, choice: &Choice) -> Pooled {
    match choice.share_heads {
        true => pooled.over_heads(),
        false => pooled,
    }
}

/// The mask of pooled queries and keys of so many tiles, with text that sees and is seen by all.
fn choose(
    [q, k]: [Pooled; 2],
    extents: Extents,
    tiles: usize,
    choice: &Choice,
) -> Result<BlockMask> {
    let scores = match choice.scoring {
        Scoring::Similarity | Scoring::Mass { .. } => Scores::similarity(&q, &k)?,
        Scoring::Importance { lambda } => Scores::importance(&q, &k, lambda)?,
    };
    let [batch, heads, ..] = scores.shape();
    let mut mask = BlockMask::empty(extents, batch, heads);
    match choice.scoring {
        Scoring::Mass { mass } => scores.keep_mass(mass, choice.top, &mut mask)?,
        _ => scores.keep_top(choice.top, &mut mask)?,
    }
    let text = BlockMask::from_fn(extents, |row, column| row >= tiles || column >= tiles);
    Ok(mask.union(&text)?)
}

fn parameter(argument: &'static str, got: String, allowed: &'static str) -> crate::Error {
    MaskError::Parameter {
        argument,
        got,
        allowed,
    }
    .into()
}
