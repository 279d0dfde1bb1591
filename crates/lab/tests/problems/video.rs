//! Attention over videos in tiles, read and written where their tokens lie.

use flex_block_attn::{BlockMask, Extents, builders};
use flex_block_attn_emulator::Options;
use flex_block_attn_kernels::Element;
use flex_block_attn_kernels::canvas::{Canvas, Padding};
use flex_block_attn_lab::problems::{Layout, Video};

use crate::right_in_all_ways;

const PADDINGS: [Padding; 2] = [Padding::Exact, Padding::Zero];

fn canvas(thw: [u32; 3], tile: [u32; 3], text_len: u32, padding: Padding) -> Canvas {
    Canvas {
        thw,
        tile,
        text_len,
        padding,
    }
}

fn extents(canvas: Canvas) -> Extents {
    let (len, block) = (canvas.padded_len() as usize, canvas.block() as usize);
    Extents::new(len, len, block, block).unwrap()
}

fn random(canvas: Canvas, heads: usize, density: f64, seed: u64) -> BlockMask {
    builders::random(extents(canvas), 1, heads, density, seed).unwrap()
}

/// Tiles that stick out along each axis, whole boxes of them too.
#[test]
fn odd_canvases() {
    for padding in PADDINGS {
        for (head_dim, thw, tile, text) in [
            (64, [3, 5, 10], [2, 8, 8], 20),
            (128, [3, 9, 8], [2, 8, 8], 0),
            (64, [5, 5, 5], [6, 8, 8], 70),
            (128, [1, 6, 20], [2, 4, 16], 130),
            // Boxes of the forward pass, (2, 2, 4), stick out along each, too.
            (128, [7, 9, 11], [6, 8, 8], 37),
        ] {
            let canvas = canvas(thw, tile, text, padding);
            let video = Video::new(head_dim, canvas, random(canvas, 1, 0.6, 4));
            right_in_all_ways(&video.forward(), &Options::all(1));
        }
    }
}

/// Batches, heads that share keys, a mask for each head, both ways that tensors lie, any thread blocks.
#[test]
fn layouts_and_heads() {
    for (tokens_first, gap, padding) in [(false, 0, Padding::Zero), (true, 8, Padding::Exact)] {
        let canvas = canvas([3, 6, 12], [2, 8, 8], 150, padding);
        let video = Video {
            element: Element::F16,
            batch: 2,
            heads: 4,
            kv_heads: 2,
            blocks: 3,
            layout: Layout { tokens_first, gap },
            ..Video::new(64, canvas, random(canvas, 4, 0.5, 9))
        };
        right_in_all_ways(&video.forward(), &Options::all(1)[1..3]);
        right_in_all_ways(&video.backward(), &Options::all(1)[1..3]);
    }
}

/// Sliding tiles, which text sees all of; boxes that are tiles' halves, thirds and sixths.
#[test]
fn sliding_tiles() {
    for padding in PADDINGS {
        let canvas = canvas([7, 5, 12], [6, 4, 16], 40, padding);
        let mask = builders::sta(&builders::StaCanvas {
            tiles: [2, 2, 1],
            window: [1, 3, 1],
            tile_tokens: 384,
            text_tokens: 40,
        })
        .unwrap();
        assert_eq!(mask.extents(), extents(canvas));
        for head_dim in [64, 128] {
            let video = Video {
                heads: 2,
                kv_heads: 1,
                ..Video::new(head_dim, canvas, mask.clone())
            };
            right_in_all_ways(&video.forward(), &Options::all(0));
            right_in_all_ways(&video.backward(), &Options::all(0));
        }
    }
}

#[test]
fn gradients() {
    for padding in PADDINGS {
        for (head_dim, thw, tile, text) in [
            (64, [3, 5, 10], [2, 8, 8], 20),
            (128, [3, 9, 8], [2, 8, 8], 0),
            (64, [5, 5, 5], [6, 8, 8], 70),
            (128, [1, 6, 20], [2, 4, 16], 130),
        ] {
            let canvas = canvas(thw, tile, text, padding);
            for deterministic in [false, true] {
                let video = Video {
                    deterministic,
                    ..Video::new(head_dim, canvas, random(canvas, 1, 0.6, 4))
                };
                right_in_all_ways(&video.backward(), &Options::all(1)[1..3]);
            }
        }
    }
}

/// All keys weigh the same, copies of text's last token too; and queries that see nothing.
#[test]
fn scale_zero_and_rows_without_keys() {
    for padding in PADDINGS {
        let canvas = canvas([3, 5, 10], [2, 8, 8], 20, padding);
        let mask = BlockMask::from_fn(extents(canvas), |row, column| row != 1 && column != 2);
        let video = Video {
            scale: 0.0,
            ..Video::new(64, canvas, mask)
        };
        right_in_all_ways(&video.forward(), &Options::all(0));
        right_in_all_ways(&video.backward(), &Options::all(0));
    }
}
