//! Attention backward, against gradients in float64.

use std::collections::BTreeSet;

use flex_block_attn::{BlockMask, Extents, builders};
use flex_block_attn_emulator::{Allocation, Options};
use flex_block_attn_kernels::Element;
use flex_block_attn_kernels::backward::Config;
use flex_block_attn_kernels::cut::Cut;
use flex_block_attn_lab::problems::Backward;

use crate::right_in_all_ways;

fn config(head_dim: u32, piece: u32) -> Config {
    Config {
        element: Element::Bf16,
        head_dim,
        piece,
        deterministic: false,
        apart: false,
        mask: None,
        canvas: false,
    }
}

fn mask(lengths: [usize; 2], blocks: [usize; 2], rows: &[&str]) -> BlockMask {
    let extents = Extents::new(lengths[0], lengths[1], blocks[0], blocks[1]).unwrap();
    BlockMask::from_fn(extents, |row, column| rows[row].as_bytes()[column] == b'1')
}

#[test]
fn columns_of_every_length() {
    // None, one, two, three tiles of queries, and all.
    let rows = ["01010", "00110", "00011", "00001"];
    for head_dim in [64, 128] {
        let mask = mask([256, 640], [64, 128], &rows);
        let problem = Backward::new(config(head_dim, 64), mask);
        right_in_all_ways(&problem.setup(), &Options::all(1));
    }
}

#[test]
fn heads_that_share_keys() {
    let problem = Backward {
        batch: 2,
        heads: 4,
        kv_heads: 2,
        scale: 0.08,
        ..Backward::new(config(128, 64), mask([192, 256], [192, 256], &["1"]))
    };
    right_in_all_ways(&problem.setup(), &Options::all(0));
}

#[test]
fn pieces_and_sequences_that_end_anywhere() {
    for (head_dim, piece, q_block, kv_block, q_len, kv_len) in [
        (128, 64, 64, 128, 200, 300),
        (128, 32, 96, 256, 250, 500),
        (128, 16, 48, 128, 130, 129),
        (64, 16, 16, 128, 40, 10),
        (64, 64, 128, 128, 129, 257),
        (64, 32, 32, 384, 200, 400),
        // Tiles within a block, and of two that follow each other or do not.
        (128, 16, 80, 128, 500, 256),
        (128, 32, 32, 128, 330, 130),
    ] {
        let extents = Extents::new(q_len, kv_len, q_block, kv_block).unwrap();
        let seen = |row: usize, column: usize| (row * 7 + column * 3) % 4 != 1;
        let mask = BlockMask::from_fn(extents, seen);
        let problem = Backward::new(config(head_dim, piece), mask);
        right_in_all_ways(&problem.setup(), &Options::all(0));
    }
}

#[test]
fn keys_of_several_blocks() {
    for (head_dim, piece, q_block, kv_block, q_len, kv_len) in [
        (64, 64, 64, 64, 200, 300),
        (128, 64, 192, 48, 250, 250),
        (64, 16, 48, 16, 130, 100),
        (64, 32, 96, 192, 150, 390),
    ] {
        let extents = Extents::new(q_len, kv_len, q_block, kv_block).unwrap();
        let seen = |row: usize, column: usize| (row * 5 + column * 3) % 4 < 2 && column != 2;
        for element in [Element::Bf16, Element::F16] {
            let config = Config {
                element,
                apart: true,
                ..config(head_dim, piece)
            };
            let problem = Backward {
                heads: 2,
                ..Backward::new(config, BlockMask::from_fn(extents, seen))
            };
            right_in_all_ways(&problem.setup(), &Options::all(1)[1..3]);
        }
    }
}

/// Thread blocks that walk all queries start somewhere among the first of a window, and come to those
/// before in the end.
#[test]
fn windows() {
    // Of 18 blocks of queries the second column has all.
    let seen = |row: usize, column: usize| column == 1 || (row + column) % 3 < 1;
    let extents = Extents::new(18 * 64, 384, 64, 128).unwrap();
    for (head_dim, window) in [(64, 640), (128, 64), (128, 1 << 20)] {
        let problem = Backward {
            heads: 2,
            kv_heads: 1,
            window,
            ..Backward::new(config(head_dim, 64), BlockMask::from_fn(extents, seen))
        };
        right_in_all_ways(&problem.setup(), &Options::all(1)[1..3]);
    }
}

/// So many tiles of keys whole, so many others in so many parts.
fn cut(whole: u32, tiles: u32, parts: u32) -> Option<Cut> {
    Some(Cut {
        whole,
        tiles,
        parts,
    })
}

/// All keys see all queries: parts start at different places, among few entries and among many.
#[test]
fn parts_of_full_lists() {
    for (head_dim, q_len, window, cut) in [
        (128, 1152, 1 << 20, cut(1, 2, 3)),
        (64, 1152, 256, cut(0, 3, 8)),
        (128, 200, 640, cut(2, 1, 2)),
    ] {
        let problem = Backward {
            window,
            cut,
            ..Backward::new(
                config(head_dim, 64),
                builders::full(Extents::new(q_len, 384, 64, 128).unwrap()),
            )
        };
        right_in_all_ways(&problem.setup(), &Options::all(1));
    }
}

/// Lists of any length, of which some parts have nothing, or all parts; heads that share keys; tiles of
/// keys that are cut short, or have none at all.
#[test]
fn parts_of_some_lists() {
    for (element, head_dim, [q_block, kv_block], [q_len, kv_len], cut) in [
        (Element::Bf16, 128, [64, 128], [300, 450], cut(3, 13, 4)),
        (Element::F16, 64, [64, 128], [420, 300], cut(5, 7, 8)),
        (Element::F16, 128, [32, 384], [200, 500], cut(0, 24, 5)),
        (Element::Bf16, 64, [16, 256], [150, 400], cut(1, 15, 7)),
    ] {
        let extents = Extents::new(q_len, kv_len, q_block, kv_block).unwrap();
        let mask = builders::random(extents, 2, 4, 0.4, 5).unwrap();
        let piece = u32::try_from(q_block).unwrap();
        let problem = Backward {
            batch: 2,
            heads: 4,
            kv_heads: 2,
            cut,
            ..Backward::new(
                Config {
                    element,
                    ..config(head_dim, piece)
                },
                mask,
            )
        };
        right_in_all_ways(&problem.setup(), &Options::all(1)[1..3]);
    }
}

/// Each block of a tile of keys has a list of its own, and a part a share of each.
#[test]
fn parts_of_several_lists() {
    for (head_dim, piece, [q_block, kv_block], cut) in [
        (128, 64, [64, 64], cut(1, 5, 3)),
        (64, 32, [96, 48], cut(0, 6, 6)),
        (128, 16, [16, 192], cut(4, 2, 7)),
    ] {
        let extents = Extents::new(250, 300, q_block, kv_block).unwrap();
        for deterministic in [false, true] {
            let config = Config {
                deterministic,
                apart: true,
                ..config(head_dim, piece)
            };
            let problem = Backward {
                heads: 2,
                kv_heads: 2,
                cut,
                ..Backward::new(config, builders::random(extents, 1, 2, 0.5, 6).unwrap())
            };
            right_in_all_ways(&problem.setup(), &Options::all(1)[1..3]);
        }
    }
}

/// With sums of integers all gradients repeat, whatever the order.
#[test]
fn parts_with_sums_of_integers() {
    for (head_dim, piece, [q_block, kv_block], [q_len, kv_len], cut) in [
        (128, 64, [64, 128], [330, 500], cut(3, 5, 3)),
        (64, 32, [96, 256], [250, 300], cut(0, 8, 2)),
    ] {
        let extents = Extents::new(q_len, kv_len, q_block, kv_block).unwrap();
        let problem = Backward {
            batch: 2,
            heads: 2,
            kv_heads: 1,
            cut,
            ..Backward::new(
                Config {
                    deterministic: true,
                    ..config(head_dim, piece)
                },
                builders::random(extents, 2, 2, 0.6, 3).unwrap(),
            )
        };
        right_in_all_ways(&problem.setup(), &crowded(1));
    }
}

/// Blocks of all sizes, keys beyond the sequence, heads that share keys, and several masks.
#[test]
fn sums_of_integers() {
    for (head_dim, piece, [q_block, kv_block], [q_len, kv_len]) in [
        (128, 64, [64, 128], [200, 500]),
        (128, 32, [96, 256], [250, 500]),
        (128, 16, [48, 48], [130, 400]),
        (64, 16, [16, 16], [70, 900]),
        (64, 64, [128, 64], [129, 300]),
        (64, 32, [32, 384], [200, 400]),
        (64, 64, [64, 192], [64, 520]),
    ] {
        let extents = Extents::new(q_len, kv_len, q_block, kv_block).unwrap();
        let mask = builders::random(extents, 2, 2, 0.6, 3).unwrap();
        let problem = Backward {
            batch: 2,
            heads: 2,
            kv_heads: 1,
            ..Backward::new(
                Config {
                    deterministic: true,
                    apart: kv_block % 128 > 0,
                    ..config(head_dim, piece)
                },
                mask,
            )
        };
        right_in_all_ways(&problem.setup(), &crowded(1));
    }
}

/// More thread blocks side by side than [`Options::all`] has.
fn crowded(seeds: u64) -> Vec<Options> {
    let resident = 5;
    let more = |options| Options {
        resident,
        ..options
    };
    Options::all(seeds).into_iter().map(more).collect()
}

/// dq's sums, before they are rounded, as all ways of running leave them: once for each that differs.
fn sums(deterministic: bool) -> usize {
    // All queries see all keys.
    let extents = Extents::new(192, 640, 64, 128).unwrap();
    let problem = Backward::new(
        Config {
            deterministic,
            ..config(128, 64)
        },
        builders::full(extents),
    );
    let setup = problem.setup();
    let all = crowded(4).into_iter().map(|options| {
        let memory = setup.run(&options).expect("right in all ways");
        let sums = |allocation: &&Allocation| allocation.name() == "sums";
        let found = memory.allocations().iter().find(sums);
        found.expect("there are sums").bytes().to_vec()
    });
    all.collect::<BTreeSet<_>>().len()
}

#[test]
fn only_sums_of_integers_repeat() {
    assert_eq!(sums(true), 1);
    assert!(sums(false) > 1);
}
