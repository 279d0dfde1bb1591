//! Masks of the tiles that suit each other, by means.

use flex_block_attn_emulator::Options;
use flex_block_attn_kernels::select::ROOMS;
use flex_block_attn_lab::problems::Select;

use crate::right_in_all_ways;

const LAMBDAS: [Option<f32>; 4] = [None, Some(0.7), Some(0.0), Some(1.0)];

/// One tile, fewer than a row keeps, rows and keys that fill thread blocks and a few more.
#[test]
fn masks_by_product_and_importance() {
    for (tiles, blocks, top) in [
        (1, 1, 1),
        (3, 3, 5),
        (8, 11, 3),
        (40, 40, 39),
        (129, 140, 12),
        (150, 150, 1),
    ] {
        for (index, lambda) in LAMBDAS.into_iter().enumerate() {
            let problem = Select {
                lambda,
                top,
                features: [64, 128][index % 2],
                ..Select::new(tiles, blocks)
            };
            right_in_all_ways(&problem.setup(), &Options::all(1));
        }
    }
}

#[test]
fn heads_of_their_own_and_shared() {
    for (heads, kv_heads) in [(4, 4), (6, 2), (5, 1)] {
        for shared in [false, true] {
            for lambda in [None, Some(0.7)] {
                let problem = Select {
                    batch: 2,
                    heads,
                    kv_heads,
                    shared,
                    lambda,
                    features: if heads == 4 { 128 } else { 64 },
                    seed: 9,
                    ..Select::new(30, 33)
                };
                right_in_all_ways(&problem.setup(), &Options::all(1));
            }
        }
    }
}

/// No text, some of a block, a block, all of it, in blocks behind which others are that do not count.
#[test]
fn text_that_counts() {
    for text_lengths in [[0, 1], [16, 17], [48, 40]] {
        let problem = Select {
            batch: 2,
            heads: 2,
            text_lengths: Some(text_lengths),
            ..Select::new(17, 20)
        };
        right_in_all_ways(&problem.setup(), &Options::all(1));
    }
}

/// Many tiles, for which there are kernels of their own: with few, too.
#[test]
fn rooms_for_many_tiles() {
    for (tiles, room, keep) in [
        (512, None, ROOMS[0]),
        (513, None, ROOMS[1]),
        (140, Some(ROOMS[1]), ROOMS[1]),
        (140, Some(ROOMS[2]), ROOMS[2]),
        (140, Some(ROOMS[3]), ROOMS[3]),
    ] {
        for lambda in [None, Some(0.6)] {
            let problem = Select {
                lambda,
                top: 20,
                seed: 2,
                room,
                ..Select::new(tiles, tiles + 3)
            };
            let setup = problem.setup();
            assert!(setup.kernel().name.contains(&format!("_{keep}_")));
            right_in_all_ways(&setup, &Options::all(0)[..1]);
        }
    }
}
