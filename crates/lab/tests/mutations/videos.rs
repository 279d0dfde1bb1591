//! A video, whose tiles of keys are put together from boxes by a walker and two loaders.

use flex_block_attn_kernels::canvas::{Canvas, Padding};
use flex_block_attn_lab::problems::Video;

use crate::{FAR, Setup, mask};

/// Rows of thirteen tiles of keys, more than there are notes of tiles, of as many as there are, of two and
/// twice of one; tiles that stick out of the video, and text with copies of its last token; one thread
/// block.
pub fn forward() -> Setup {
    let canvas = Canvas {
        thw: [4, 15, 40],
        tile: [2, 8, 8],
        text_len: 20,
        padding: Padding::Zero,
    };
    let len = canvas.padded_len() as usize;
    let all: Vec<usize> = (0..=20).collect();
    let mut rows: [&[usize]; 21] = [&[]; 21];
    rows[0] = &all;
    rows[4] = &[0, 1, 2, 3, 4, 5, 6, 10, 11, 12, 13, 14];
    (rows[7], rows[9], rows[20]) = (&[5, 6, 20], &[2], &[3]);
    Video {
        blocks: 1,
        scale: FAR,
        ..Video::new(64, canvas, mask([len, len, 128, 128], [1, 1], &rows))
    }
    .forward()
}
