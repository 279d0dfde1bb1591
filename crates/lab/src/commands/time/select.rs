//! Choosing tiles of a video, as SSTA does at 720p: queries and keys of 16 heads, tokens before heads, to a
//! mask. Measured are pooling, what follows, and both.

use flex_block_attn_kernels::forward::Tensor;
use flex_block_attn_kernels::{Element, Strides, pool, select};
use flex_block_attn_lab::gpu::Gpu;

use super::{HEAD_DIM, Measured, Result, numbers};

const HEADS: u32 = 16;
const TILES: pool::Tiles = pool::Tiles {
    thw: [31, 45, 80],
    tile: [6, 8, 8],
    zeros_count: true,
};
/// Blocks of text.
const TEXT: u32 = 1;

pub(super) fn select(gpu: &mut Gpu, shared: bool) -> Result<Vec<(String, Measured)>> {
    let (tokens, tiles) = (TILES.thw.iter().product::<u32>(), TILES.count());
    let blocks = tiles + TEXT;
    let strides = Strides {
        row: (HEADS * HEAD_DIM).into(),
        head: HEAD_DIM.into(),
        batch: (tokens * HEADS * HEAD_DIM).into(),
    };
    let mean_bytes = (4 * HEADS * tiles * HEAD_DIM) as usize;
    let mut pooled = |seed| -> Result<pool::Pooled> {
        let address = gpu.alloc_with(&numbers(seed, strides.batch as usize))?;
        Ok(pool::Pooled {
            tensor: Tensor { address, strides },
            heads: HEADS,
            means: gpu.alloc(mean_bytes)?,
        })
    };
    let tensors = [pooled(1)?, pooled(2)?];
    let mut means = |of: pool::Pooled| -> Result<select::Pooled> {
        Ok(select::Pooled {
            means: of.means,
            heads: HEADS,
            average: gpu.alloc(mean_bytes)?,
        })
    };
    let args = select::Args {
        pooled: [means(tensors[0])?, means(tensors[1])?],
        shared,
        lambda: 0.7,
        weights: gpu.alloc((8 * HEADS * tiles) as usize)?,
        batch: 1,
        tiles,
        features: HEAD_DIM,
        top: 64,
        mask: select::Mask {
            mask: gpu.alloc((HEADS * blocks * blocks) as usize)?,
            base: gpu.alloc_with(&vec![0; (blocks * blocks) as usize])?,
            blocks,
            text_lengths: 0,
            block: TILES.tile.iter().product(),
        },
    };
    let config = pool::Config {
        element: Element::Bf16,
        head_dim: HEAD_DIM,
    };
    let pool_args = pool::Args {
        tensors,
        batch: 1,
        tiles: TILES,
    };
    let mut launches = vec![(gpu.load(&config.kernel())?, config.launch(&pool_args))];
    for config in select::Config::of(&args, true) {
        launches.push((gpu.load(&config.kernel())?, config.launch(&args)));
    }
    let mut measured = Vec::new();
    for (what, part) in [
        ("pool", 0..1),
        ("keep", 1..launches.len()),
        ("all", 0..launches.len()),
    ] {
        let times = gpu.time(1, 30, || {
            let mut each = launches[part.clone()].iter();
            each.try_for_each(|(function, launch)| gpu.launch(function, launch))
        })?;
        let work = 2.0 * 2.0 * strides.batch as f64;
        measured.push((what.to_owned(), Measured { times, work }));
    }
    Ok(measured)
}
