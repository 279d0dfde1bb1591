//! The kernels that read whole tensors once, against sums in float64: what comes before the main kernel of
//! the backward pass, parts put together, and pooling.

use flex_block_attn_emulator::Options;
use flex_block_attn_kernels::backward::{bounds, prepare};
use flex_block_attn_kernels::{combine, pool};
use flex_block_attn_lab::problems::{Bounds, Combine, Layout, Pool, Prepare};

use crate::right_in_all_ways;

#[test]
fn deltas_and_lses_of_queries() {
    // `video` has those for videos.
    let configs = prepare::Config::all().into_iter();
    for (index, config) in configs.filter(|config| config.boxes.is_none()).enumerate() {
        let problem = Prepare {
            config,
            batch: 2,
            heads: 2,
            // Some of a thread block's rows, all of them, and a few more.
            q_len: [1, 64, 130][index % 3],
            out: Layout {
                tokens_first: true,
                gap: 8,
            },
            dout: Layout::default(),
            has_dlse: index % 2 == 1,
        };
        right_in_all_ways(&problem.setup(), &Options::all(1));
    }
}

#[test]
fn bounds_of_heads() {
    for (index, config) in bounds::Config::all().into_iter().enumerate() {
        let problem = Bounds {
            config,
            batch: 2,
            heads: 2,
            len: [1, 130, 64, 300][index],
            layout: Layout {
                tokens_first: index % 2 == 1,
                gap: 8,
            },
        };
        right_in_all_ways(&problem.setup(), &Options::all(1));
    }
}

#[test]
fn parts_put_together() {
    for (index, config) in combine::Config::all().into_iter().enumerate() {
        let problem = Combine {
            config,
            batch: 2,
            heads: 2,
            // Some of a thread block's rows, all of them, and a few more.
            len: [1, 64, 130, 70][index % 4],
            layout: Layout {
                tokens_first: index % 2 == 1,
                gap: 8,
            },
        };
        right_in_all_ways(&problem.setup(), &Options::all(1));
    }
}

#[test]
fn means_of_blocks() {
    // One token, fewer than a block, blocks that share a thread block, blocks that go round often.
    let sizes = [
        (1, 1),
        (10, 64),
        (37, 1),
        (50, 16),
        (100, 48),
        (300, 128),
        (500, 499),
    ];
    for config in pool::Config::all() {
        for (len, block) in sizes {
            let problem = Pool {
                config,
                batch: 1,
                heads: [2, 0],
                tiles: pool::Tiles::blocks(len, block),
                more: 0,
                layout: Layout {
                    tokens_first: len % 2 == 0,
                    gap: 16,
                },
            };
            right_in_all_ways(&problem.setup(), &Options::all(1));
        }
    }
}

#[test]
fn means_of_tiles() {
    // Whole tiles; tiles that stick out along some axes, by all but a token, in which a warp has none;
    // one that is larger than the video.
    let sizes = [
        ([4, 6, 8], [2, 3, 4]),
        ([3, 9, 17], [2, 8, 8]),
        ([7, 8, 9], [6, 8, 8]),
        ([5, 1, 33], [1, 1, 16]),
        ([2, 3, 5], [6, 8, 8]),
        ([9, 4, 4], [3, 1, 5]),
    ];
    for (index, config) in pool::Config::all().into_iter().enumerate() {
        for (thw, tile) in sizes {
            let zeros_count = (index + thw[0] as usize).is_multiple_of(2);
            let problem = Pool {
                config,
                batch: 2,
                heads: [[2, 1], [1, 1], [3, 1], [4, 2]][index],
                tiles: pool::Tiles {
                    thw,
                    tile,
                    zeros_count,
                },
                more: 5,
                layout: Layout {
                    tokens_first: index % 2 == 0,
                    gap: 8,
                },
            };
            right_in_all_ways(&problem.setup(), &Options::all(1));
        }
    }
}
