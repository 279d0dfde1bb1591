//! Mask compaction, word for word against the host's.

use flex_block_attn_emulator::Options;
use flex_block_attn_kernels::canvas::{Canvas, Padding};
use flex_block_attn_lab::problems::MaskLayout::{Dense, Repeated, Transposed};
use flex_block_attn_lab::problems::{BitCompaction, Compaction, TileCompaction};

use crate::right_in_all_ways;

#[test]
fn masks_of_all_layouts() {
    let shapes = [
        [1, 1, 1, 1],
        [2, 3, 5, 7],
        [1, 2, 33, 31],
        [1, 1, 9, 70],
        [2, 1, 70, 9],
    ];
    for layout in [Dense, Transposed, Repeated] {
        for shape in shapes {
            let problem = Compaction {
                shape,
                density: 100,
                layout,
            };
            right_in_all_ways(&problem.setup(), &Options::all(1));
        }
    }
}

#[test]
fn long_rows_and_columns() {
    // Longer than what is loaded, gathered, or ranked at a time.
    for (shape, layout) in [
        ([1, 1, 4, 1100], Dense),
        ([1, 1, 1100, 4], Transposed),
        ([1, 1, 385, 400], Dense),
    ] {
        let problem = Compaction {
            shape,
            density: 60,
            layout,
        };
        right_in_all_ways(&problem.setup(), &Options::all(1));
    }
}

#[test]
fn empty_and_full() {
    for density in [0, 256] {
        let problem = Compaction {
            shape: [1, 1, 40, 36],
            density,
            layout: Dense,
        };
        right_in_all_ways(&problem.setup(), &Options::all(1));
    }
}

#[test]
fn bits_of_masks_with_partial_blocks() {
    for (shape, reach) in [
        ([1, 1, 1, 1], 3),
        ([2, 3, 5, 7], 20),
        ([1, 2, 33, 31], 100),
        ([1, 1, 9, 70], 300),
        ([1, 1, 70, 131], 500),
        ([1, 1, 4, 1100], 9000),
        ([1, 1, 1100, 4], 9000),
        ([1, 1, 40, 36], -1),
    ] {
        let problem = BitCompaction { shape, reach };
        right_in_all_ways(&problem.setup(), &Options::all(1));
    }
}

#[test]
fn tiles_of_videos() {
    for (thw, tile, text_len, density) in [
        ([5, 13, 20], [2, 8, 8], 300, 128),
        ([9, 9, 9], [4, 4, 8], 0, 60),
        ([31, 45, 24], [6, 8, 8], 1, 90),
        ([1, 8, 16], [1, 8, 16], 129, 256),
    ] {
        let problem = TileCompaction {
            canvas: Canvas {
                thw,
                tile,
                text_len,
                padding: Padding::Exact,
            },
            heads: 2,
            density,
        };
        right_in_all_ways(&problem.setup(), &Options::all(1));
    }
}
