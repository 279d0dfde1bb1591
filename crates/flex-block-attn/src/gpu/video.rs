//! Videos for the kernels: sizes in their words, and what they do not take. Used by both passes.

use flex_block_attn_kernels::canvas::{self, Canvas};
use flex_block_attn_kernels::forward;

use super::refused;
use crate::{Error, Options, Padding, Result, Video};

/// The video for the kernels.
pub(super) fn canvas(video: &Video) -> Result<Canvas> {
    let canvas = || {
        Some(Canvas {
            thw: triple(video.thw)?,
            tile: triple(video.tile)?,
            text_len: u32::try_from(video.text_len).ok()?,
            padding: match video.padding {
                Padding::Exact => canvas::Padding::Exact,
                Padding::Zero => canvas::Padding::Zero,
            },
        })
    };
    let allowed = "of at most 2047 x 1023 x 1023 tokens in whole tiles, 2^25 with the text";
    canvas()
        .filter(|canvas| canvas.fits())
        .ok_or_else(|| refused("thw", format!("{video:?}"), allowed))
}

/// Three numbers as kernels have them.
pub(super) fn triple(of: [usize; 3]) -> Option<[u32; 3]> {
    let [a, b, c] = of.map(|n| u32::try_from(n).ok());
    Some([a?, b?, c?])
}

/// Why there is no kernel, for tensors that are as they should be.
pub(super) fn no_kernel(head_dim: u32, options: &Options) -> Error {
    match &options.video {
        Some(video) if matches!(head_dim, 64 | 128) => refused(
            "tile_thw",
            format!("{:?}, {} in all", video.tile, video.block()),
            "of a multiple of 128 tokens",
        ),
        _ => refused("head_dim", head_dim, "64 or 128"),
    }
}

/// q's shape, with all places of tiles for its tokens.
pub(super) fn places(
    [batch, heads, tokens, head_dim]: [usize; 4],
    options: &Options,
) -> [usize; 4] {
    let places = options.video.as_ref().map_or(tokens, Video::places);
    [batch, heads, places, head_dim]
}

/// Refuses tensors of a video whose heads and batches do not lie one behind the other.
pub(super) fn in_lines<const N: usize>(
    tensors: [(&'static str, &forward::Tensor, [usize; 4]); N],
    options: &Options,
) -> Result<()> {
    if options.video.is_none() {
        return Ok(());
    }
    for (argument, &tensor, [batch, heads, ..]) in tensors {
        if !Canvas::takes(tensor, heads as u32, batch as u32) {
            let got = format!("{:?}", tensor.strides);
            let allowed =
                "of a video such that the stride of batches is a multiple of that of heads";
            return Err(refused(argument, got, allowed));
        }
    }
    Ok(())
}
