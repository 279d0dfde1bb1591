//! [`Pooled`]: the means of blocks of tokens.

use std::num::NonZeroUsize;
use std::ops::Range;

use flex_block_attn_cpu as cpu;
use half::{bf16, f16};

use super::parameter;
use crate::{DType, Padding, Result, Tensor, Video, attention, check};

/// Means of tokens, float32 (batch, heads, blocks, features), dense. They are rounded to the
/// tokens' own type first: models were trained so, and a choice among close scores depends on it.
#[derive(Debug, Clone, PartialEq)]
pub struct Pooled {
    pub(super) shape: [usize; 4],
    pub(super) values: Vec<f32>,
}

impl Pooled {
    /// The mean of each block of `block` tokens; the last one may have fewer. `threads` are those
    /// that work, `None` being one for each core.
    ///
    /// # Errors
    /// A block of 0; a tensor whose last dimension is not contiguous.
    pub fn blocks(x: Tensor<'_>, block: usize, threads: Option<NonZeroUsize>) -> Result<Self> {
        if block == 0 {
            return Err(parameter("block", "0".into(), "at least 1"));
        }
        // A block of more tokens than there are is all of them.
        let all = (0..block.min(x.shape[2])).collect();
        Self::new(x, block, &[all], None, threads)
    }

    /// For each tile, the means of its cells side by side. Tokens are in tile order, in whole tiles
    /// of (time, height, width). As in adaptive pooling, cell i of p on an axis of n tokens covers
    /// tokens floor(i n / p) to ceil((i + 1) n / p).
    ///
    /// # Errors
    /// An axis of 0 tokens or cells; tokens that are no whole tiles; a tensor whose last dimension
    /// is not contiguous.
    pub fn tiles(
        x: Tensor<'_>,
        tile: [usize; 3],
        cells: [usize; 3],
        threads: Option<NonZeroUsize>,
    ) -> Result<Self> {
        let lists = cells_of(tile, cells)?;
        let block = tile.iter().product();
        if !x.shape[2].is_multiple_of(block) {
            let got = format!("{} tokens", x.shape[2]);
            return Err(parameter("x", got, "whole tiles"));
        }
        Self::new(x, block, &lists, None, threads)
    }

    /// The same for the tiles of a video whose tokens lie as they come, with its text behind. A mean
    /// is over what the video's padding puts beside the tokens, too. Where a tile has several cells
    /// that is zeros in any case: a cell that is half empty counts half.
    ///
    /// # Errors
    /// Sizes that make no sense; an axis of 0 cells; another number of tokens than the video has; a
    /// tensor whose last dimension is not contiguous.
    pub fn video(
        x: Tensor<'_>,
        video: &Video,
        cells: [usize; 3],
        threads: Option<NonZeroUsize>,
    ) -> Result<Self> {
        video.check_sizes()?;
        let lists = cells_of(video.tile, cells)?;
        if x.shape[2] != video.tokens() {
            let got = format!("{} tokens", x.shape[2]);
            return Err(parameter("x", got, "of all tokens of the video"));
        }
        let tokens = video.order();
        let order = cpu::Order {
            tokens: &tokens[..tokens.len() - video.text_len],
            zeros_count: video.padding == Padding::Zero || lists.len() > 1,
        };
        Self::new(x, video.block(), &lists, Some(order), threads)
    }

    fn new(
        x: Tensor<'_>,
        block: usize,
        cells: &[Vec<usize>],
        order: Option<cpu::Order<'_>>,
        threads: Option<NonZeroUsize>,
    ) -> Result<Self> {
        check::pooled(&x)?;
        let [batch, heads, len, head_dim] = x.shape;
        let places = order.map_or(len, |order| order.tokens.len());
        let features = cells.len() * head_dim;
        let shape = [batch, heads, places.div_ceil(block), features];
        let mut values = vec![0.0; shape.iter().product()];
        let how = (block, cells, order, attention::threads(threads));
        match x.dtype {
            DType::F16 => pool::<f16>(x, how, &mut values),
            DType::BF16 => pool::<bf16>(x, how, &mut values),
            DType::F32 => pool::<f32>(x, how, &mut values),
            DType::F64 => pool::<f64>(x, how, &mut values),
        }
        Ok(Self { shape, values })
    }

    /// (batch, heads, blocks, features).
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The values, dense.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The mean over all heads, as one head.
    pub fn over_heads(&self) -> Self {
        let [batch, heads, blocks, features] = self.shape;
        let mut values = vec![0.0; batch * blocks * features];
        if !values.is_empty() && heads > 0 {
            let of_head = blocks * features;
            let batches = self.values.chunks_exact(heads * of_head);
            for (mean, heads_of) in values.chunks_exact_mut(of_head).zip(batches) {
                for head in heads_of.chunks_exact(of_head) {
                    for (sum, value) in mean.iter_mut().zip(head) {
                        *sum += value;
                    }
                }
            }
            for value in &mut values {
                *value /= heads as f32;
            }
        }
        let shape = [batch, heads.min(1), blocks, features];
        Self { shape, values }
    }

    /// One block's features.
    pub(super) fn row(&self, batch: usize, head: usize, block: usize) -> &[f32] {
        let [_, heads, blocks, features] = self.shape;
        let row = (batch * heads + head) * blocks + block;
        &self.values[row * features..][..features]
    }

    /// Every block's features divided by their norm; zeros stay zeros.
    pub(super) fn normalised(&self) -> Self {
        let mut result = self.clone();
        if self.shape[3] > 0 {
            for row in result.values.chunks_exact_mut(self.shape[3]) {
                let norm = row.iter().map(|value| value * value).sum::<f32>().sqrt();
                // What torch's normalize takes for zero.
                let norm = norm.max(1e-12);
                for value in row {
                    *value /= norm;
                }
            }
        }
        result
    }
}

/// The places of each cell, counted from the start of a tile.
fn cells_of(tile: [usize; 3], cells: [usize; 3]) -> Result<Vec<Vec<usize>>> {
    for (argument, triple) in [("tile", tile), ("cells", cells)] {
        if triple.contains(&0) {
            let got = format!("{triple:?}");
            return Err(parameter(argument, got, "three positive numbers"));
        }
    }
    let edges = |axis: usize| -> Vec<Range<usize>> {
        let (n, p) = (tile[axis], cells[axis]);
        (0..p)
            .map(|i| i * n / p..((i + 1) * n).div_ceil(p))
            .collect()
    };
    let [time, height, width] = [edges(0), edges(1), edges(2)];
    let mut lists = Vec::new();
    for t in &time {
        for h in &height {
            for w in &width {
                let rows = t
                    .clone()
                    .flat_map(|t| h.clone().map(move |h| t * tile[1] + h));
                let places = rows.flat_map(|row| w.clone().map(move |w| row * tile[2] + w));
                lists.push(places.collect());
            }
        }
    }
    Ok(lists)
}

/// Of a tensor, and of tokens of a block, cells, their order and threads.
fn pool<T: cpu::Element>(
    x: Tensor<'_>,
    (block, cells, order, threads): (usize, &[Vec<usize>], Option<cpu::Order<'_>>, NonZeroUsize),
    means: &mut [f32],
) {
    let args = cpu::Pool::<T> {
        tensor: attention::view(x),
        block,
        cells,
        order,
        threads,
    };
    cpu::pool(&args, means);
}
