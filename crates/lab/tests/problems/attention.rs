//! Attention forward, against a softmax in float64.

use flex_block_attn::{BlockMask, BoolMatrix, Extents};
use flex_block_attn_emulator::Options;
use flex_block_attn_kernels::{Element, forward};
use flex_block_attn_lab::problems::Forward;

use crate::right_in_all_ways;

fn config(head_dim: u32, kv_tile: u32, piece: u32) -> forward::Config {
    forward::Config {
        element: Element::Bf16,
        head_dim,
        rows: forward::Rows::Whole(128),
        kv_tile,
        piece,
        mask: None,
        canvas: false,
    }
}

/// A mask of lengths and blocks (queries, keys), one matrix for each head: rows of 0s and 1s.
fn mask(lengths: [usize; 2], blocks: [usize; 2], heads: &[&[&str]]) -> BlockMask {
    let extents = Extents::new(lengths[0], lengths[1], blocks[0], blocks[1]).unwrap();
    let (rows, columns) = (extents.q_blocks(), extents.kv_blocks());
    let bytes: Vec<u8> = heads
        .iter()
        .flat_map(|rows| rows.iter().flat_map(|row| row.bytes()))
        .map(|digit| digit - b'0')
        .collect();
    let shape = [1, heads.len(), rows, columns];
    let strides = [bytes.len(), rows * columns, columns, 1];
    let matrix = BoolMatrix::new(&bytes, shape, strides).unwrap();
    BlockMask::from_matrix(extents, matrix).unwrap()
}

#[test]
fn lists_of_every_length() {
    // None, one, two, three and all blocks: both stages are first and last.
    let rows = ["0000", "0001", "1010", "1101", "1111"];
    let mask = mask([640, 512], [128, 128], &[&rows]);
    let problem = Forward::new(config(128, 128, 128), mask);
    right_in_all_ways(&problem.setup(), &Options::all(2));
}

#[test]
fn lists_that_end_long_after_they_began() {
    // The planner takes the next tile of queries when few tiles of keys are left: 7 of these.
    let rows = [
        "111111100000",
        "011111111000",
        "111111111111",
        "000000100000",
        "111111111000",
    ];
    for blocks in [1, 2] {
        let problem = Forward {
            heads: 2,
            blocks,
            ..Forward::new(config(64, 128, 64), mask([640, 1536], [128, 128], &[&rows]))
        };
        right_in_all_ways(&problem.setup(), &Options::all(1));
    }
}

#[test]
fn tiles_in_parts() {
    // Lists shorter than there are parts, some empty; a tile behind the sequence's end; the last heads
    // together. Output and lse are those of whole tiles.
    let rows = ["0000000", "0010000", "1010110", "1111111", "0111111"];
    for (head_dim, kv_tile, piece) in [(64, 128, 64), (128, 192, 64), (64, 192, 192)] {
        let kv_block = piece as usize;
        let mask = mask([1200, 7 * kv_block - 5], [256, kv_block], &[&rows]);
        for in_parts in [(0, 2), (12, 3), (19, 8)] {
            let problem = Forward {
                heads: 2,
                blocks: 3,
                in_parts: Some(in_parts),
                ..Forward::new(config(head_dim, kv_tile, piece), mask.clone())
            };
            right_in_all_ways(&problem.setup(), &Options::all((in_parts.0 % 2).into()));
        }
    }
}

#[test]
fn tiles_in_parts_of_several_batches_without_an_lse() {
    let masks: [&[&str]; 2] = [&["110", "001"], &["010", "111"]];
    let problem = Forward {
        batch: 2,
        heads: 2,
        kv_heads: 1,
        blocks: 2,
        in_parts: Some((5, 2)),
        tokens_first: true,
        lse: false,
        ..Forward::new(config(128, 128, 32), mask([250, 192], [128, 64], &masks))
    };
    right_in_all_ways(&problem.setup(), &Options::all(1));
}

#[test]
fn wide_tiles_blocks_of_several_tiles_and_shared_heads() {
    let problem = |kv_tile, piece| Forward {
        heads: 2,
        scale: 0.1,
        ..Forward::new(
            config(128, kv_tile, piece),
            mask([256, 768], [256, 384], &[&["01"]]),
        )
    };
    right_in_all_ways(&problem(192, 192).setup(), &Options::all(1));
    right_in_all_ways(&problem(128, 128).setup(), &Options::all(0));
    right_in_all_ways(&problem(192, 64).setup(), &Options::all(0));
}

#[test]
fn short_heads() {
    let problem = |kv_tile, piece| Forward {
        heads: 2,
        kv_heads: 2,
        scale: 0.2,
        ..Forward::new(
            config(64, kv_tile, piece),
            mask([256, 768], [128, 384], &[&["10", "11"]]),
        )
    };
    right_in_all_ways(&problem(128, 128).setup(), &Options::all(1));
    right_in_all_ways(&problem(192, 192).setup(), &Options::all(0));
}

#[test]
fn pieces_of_any_size_fill_tiles() {
    // Tiles of pieces from anywhere, the first of them not full.
    for (kv_tile, piece, kv_block, kv_len) in [
        (128, 64, 64, 448),
        (192, 64, 64, 448),
        (128, 32, 96, 672),
        (128, 16, 48, 336),
        (192, 64, 128, 896),
    ] {
        let mask = mask(
            [256, kv_len],
            [128, kv_block],
            &[&["1011011", "0100000"], &["0000001", "1111111"]],
        );
        let problem = Forward {
            heads: 2,
            ..Forward::new(config(64, kv_tile, piece), mask)
        };
        right_in_all_ways(&problem.setup(), &Options::all(0));
    }
}

#[test]
fn sequences_end_anywhere() {
    // Queries end within a tile, or before the block's last tile; keys within a piece.
    for (lengths, blocks, tile, piece) in [
        ([200, 300], [128, 128], 128, 128),
        ([257, 385], [256, 192], 192, 192),
        ([129, 449], [384, 128], 192, 64),
        ([1, 17], [128, 16], 128, 16),
        ([130, 130], [128, 64], 128, 64),
    ] {
        let extents = Extents::new(lengths[0], lengths[1], blocks[0], blocks[1]).unwrap();
        let (rows, columns) = (extents.q_blocks(), extents.kv_blocks());
        // All of the last row; of others all but the last column, if there are several.
        let row = |row: usize| {
            let last = row + 1 == rows || columns == 1;
            format!("{}{}", "1".repeat(columns - 1), u8::from(last))
        };
        let text: Vec<String> = (0..rows).map(row).collect();
        let text: Vec<&str> = text.iter().map(String::as_str).collect();
        let problem = Forward {
            batch: 2,
            heads: 2,
            kv_heads: 1,
            ..Forward::new(config(64, tile, piece), mask(lengths, blocks, &[&text]))
        };
        right_in_all_ways(&problem.setup(), &Options::all(0));
    }
}

#[test]
fn tokens_before_heads() {
    let masks: [&[&str]; 2] = [&["110", "001"], &["010", "111"]];
    let problem = Forward {
        batch: 2,
        heads: 2,
        kv_heads: 1,
        tokens_first: true,
        blocks: 3,
        ..Forward::new(config(128, 128, 128), mask([250, 380], [128, 128], &masks))
    };
    right_in_all_ways(&problem.setup(), &Options::all(1));
}

fn mixed(head_dim: u32, piece: u32) -> forward::Config {
    forward::Config {
        rows: forward::Rows::Mixed,
        ..config(head_dim, 64, piece)
    }
}

#[test]
fn queries_of_several_blocks() {
    // Blocks of a warpgroup's queries, of less, of parts of both, and of a warp's; lists that share
    // all, some and no blocks, and none at all.
    let rows = [
        "10110", "01101", "00000", "11111", "10010", "00001", "01000",
    ];
    for (q_block, kv_block, piece, q_len) in [
        (64, 64, 64, 448),
        (64, 64, 64, 300),
        (48, 128, 64, 330),
        (16, 96, 32, 112),
        (192, 48, 16, 1300),
    ] {
        let extents = Extents::new(q_len, 5 * kv_block - 9, q_block, kv_block).unwrap();
        let seen = |row: usize, column: usize| rows[row].as_bytes()[column] == b'1';
        let problem = Forward {
            heads: 2,
            kv_heads: 1,
            ..Forward::new(mixed(64, piece), BlockMask::from_fn(extents, seen))
        };
        right_in_all_ways(&problem.setup(), &Options::all(1));
    }
}

/// A list of blocks that are so many blocks apart. Where these are more than the rings have places, the
/// warpgroup must give back what it holds before the next can come.
fn gaps(lengths: impl IntoIterator<Item = usize>) -> String {
    let gap = |length| format!("1{}", "0".repeat(length));
    lengths.into_iter().map(gap).collect::<String>() + "1"
}

#[test]
fn warpgroups_leave_out_tiles() {
    // Of the three blocks of a tile of queries one has such a list, and one all blocks, so that tiles are
    // blocks; the third has all, none or every third.
    let rows = [
        "0".into(),
        "1".into(),
        "0".repeat(40) + "1",
        "1".to_owned() + &"0".repeat(39) + "1",
        "01".repeat(20),
        gaps([0, 0, 1, 2, 3, 4, 5, 6, 7]),
        "00000001100000011000001100001100".into(),
        gaps(8..=13),
        gaps([22, 23, 24, 25]),
    ];
    for (head_dim, piece, blocks, rows) in [
        (64, 64, 1, &rows[..]),
        (64, 16, 2, &rows[4..8]),
        (128, 64, 7, &rows[..8]),
    ] {
        let kv_block = 64;
        let columns = rows.iter().map(String::len).max().unwrap();
        let lengths = [3 * 64 * rows.len(), columns * kv_block - 9];
        let extents = Extents::new(lengths[0], lengths[1], 64, kv_block).unwrap();
        let seen = |row: usize, column: usize| {
            let tile = row / 3;
            // Which of the three warpgroups does what changes.
            match (row + tile) % 3 {
                0 => rows[tile].as_bytes().get(column) == Some(&b'1'),
                1 => true,
                _ => [true, false, column % 3 == 1][tile / 3 % 3],
            }
        };
        let problem = Forward {
            blocks,
            ..Forward::new(mixed(head_dim, piece), BlockMask::from_fn(extents, seen))
        };
        right_in_all_ways(&problem.setup(), &Options::all(1));
    }
}

#[test]
fn mixed_queries_of_several_heads_and_batches() {
    let masks: [&[&str]; 2] = [&["1100", "0011", "0000"], &["0101", "1110", "0001"]];
    let problem = Forward {
        batch: 2,
        heads: 2,
        kv_heads: 2,
        tokens_first: true,
        blocks: 3,
        ..Forward::new(mixed(128, 64), mask([150, 250], [64, 64], &masks))
    };
    right_in_all_ways(&problem.setup(), &Options::all(1));
}

#[test]
fn scale_zero_gives_all_keys_the_same_weight() {
    for config in [config(64, 128, 64), mixed(64, 64)] {
        let problem = Forward {
            scale: 0.0,
            ..Forward::new(config, mask([128, 150], [128, 64], &[&["101"]]))
        };
        right_in_all_ways(&problem.setup(), &Options::all(0));
    }
}

/// Each config on problems by chance: lengths, blocks, heads, masks, layouts. `video` has those for videos.
#[test]
fn every_config_on_random_masks() {
    let mut state = 1u64;
    let mut below = |bound: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005) + 1;
        (state >> 33) as usize % bound
    };
    for config in forward::Config::all() {
        if config.canvas {
            continue;
        }
        let alike = matches!(config.rows, forward::Rows::Pairs(_)) && below(2) == 1;
        let q_block = match config.rows {
            forward::Rows::Whole(queries) => queries as usize * (1 + below(2)),
            forward::Rows::Pairs(_) if alike => 16 * (1 + below(12)),
            forward::Rows::Pairs(queries) => 2 * queries as usize,
            forward::Rows::Mixed => 16 * (1 + below(12)),
        };
        let kv_block = config.piece as usize * (1 + below(3));
        let (q_len, kv_len) = (1 + below(300), 1 + below(6 * kv_block.min(128)));
        let extents = Extents::new(q_len, kv_len, q_block, kv_block).unwrap();
        let mask_heads = 1 + below(2);
        let (rows, columns) = (extents.q_blocks(), extents.kv_blocks());
        let different = if alike { 1 } else { rows };
        let bytes: Vec<u8> = (0..mask_heads)
            .flat_map(|_| {
                let lists: Vec<u8> = (0..different * columns)
                    .map(|_| u8::from(below(2) == 1))
                    .collect();
                lists.repeat(rows / different)
            })
            .collect();
        let strides = [bytes.len(), rows * columns, columns, 1];
        let matrix = BoolMatrix::new(&bytes, [1, mask_heads, rows, columns], strides).unwrap();
        let kv_heads = 1 + below(2);
        let problem = Forward {
            batch: 1 + below(2),
            heads: 2,
            kv_heads,
            blocks: 1 + below(4) as u32,
            tokens_first: below(2) == 1,
            lse: below(2) == 1,
            alike,
            ..Forward::new(config, BlockMask::from_matrix(extents, matrix).unwrap())
        };
        right_in_all_ways(&problem.setup(), &Options::all(1)[2..3]);
    }
}

/// Scores so far apart that weights by the first tile's largest would overflow: tiles are computed again.
#[test]
fn scores_that_rise() {
    let rows = &["1111", "0110", "1011"][..];
    let short = forward::Config {
        rows: forward::Rows::Whole(192),
        ..config(64, 128, 128)
    };
    for (config, q_block, kv_block) in [
        (config(128, 192, 192), 128, 384),
        (config(128, 192, 64), 128, 128),
        (config(64, 192, 192), 128, 384),
        (short, 192, 256),
    ] {
        for element in [Element::Bf16, Element::F16] {
            let lengths = [3 * q_block, 4 * kv_block - 70];
            let problem = Forward {
                scale: 8.0,
                ..Forward::new(
                    forward::Config { element, ..config },
                    mask(lengths, [q_block, kv_block], &[rows]),
                )
            };
            right_in_all_ways(&problem.setup(), &Options::all(1));
        }
    }
}

/// Clusters of two thread blocks: one, and more; pairs of which the second tile has no queries, or some;
/// several jobs of each; heads that share keys; batches and heads with lists of their own, one empty;
/// blocks of queries of any size.
#[test]
fn pairs_of_tiles_share_keys() {
    let lists = ["11111", "00000", "01011", "10000"];
    for (config, q, kv, blocks) in [
        (pairs(128, 192), [700, 384], [5 * 192 - 70, 192], 2),
        (pairs(128, 192), [200, 48], [5 * 192, 192], 5),
        (pairs(128, 64), [1290, 256], [5 * 128 - 3, 128], 4),
        (pairs(128, 64), [120, 16], [5 * 64, 64], 3),
        (pairs(192, 64), [1000, 128], [5 * 64 - 30, 64], 4),
        (pairs(192, 64), [190, 16], [5 * 192, 192], 5),
    ] {
        let problem = Forward {
            blocks,
            tokens_first: blocks == 4,
            lse: blocks != 3,
            alike: true,
            scale: if blocks == 5 { 8.0 } else { 0.125 },
            ..of_pairs(config, q, kv, |head, _| lists[head])
        };
        right_in_all_ways(&problem.setup(), &Options::all(2));
    }
}

/// The same of blocks of one, two and three pairs, whose lists differ from row to row, some of one tile of
/// keys; the sequence ends in a block's first tile, or its last.
#[test]
fn pairs_of_tiles_of_a_block_share_keys() {
    let lists = ["11111", "00000", "01011", "10000", "00100"];
    for (config, q, kv, blocks) in [
        (pairs(128, 192), [700, 256], [5 * 192 - 70, 192], 2),
        (pairs(128, 64), [1200, 512], [5 * 64, 64], 7),
        (pairs(192, 64), [1100, 384], [5 * 192 - 70, 192], 4),
        (pairs(192, 64), [1600, 768], [5 * 64, 64], 2),
        (pairs(192, 64), [1900, 384], [5 * 64 - 3, 64], 9),
    ] {
        let problem = Forward {
            blocks,
            tokens_first: blocks == 4,
            lse: blocks != 7,
            scale: if blocks == 9 { 8.0 } else { 0.125 },
            ..of_pairs(config, q, kv, |head, row| lists[(head + row) % 5])
        };
        right_in_all_ways(&problem.setup(), &Options::all(2));
    }
}

/// Four heads, two of which share keys: the length and the block of queries and of keys, and the list of a
/// head's row of blocks.
fn of_pairs(
    config: forward::Config,
    [q_len, q_block]: [usize; 2],
    [kv_len, kv_block]: [usize; 2],
    list: impl Fn(usize, usize) -> &'static str,
) -> Forward {
    let rows = 0..q_len.div_ceil(q_block);
    let lists = [0, 1, 2, 3].map(|head| rows.clone().map(|row| list(head, row)).collect());
    let heads = lists.each_ref().map(Vec::as_slice);
    Forward {
        heads: 4,
        kv_heads: 2,
        ..Forward::new(config, mask([q_len, kv_len], [q_block, kv_block], &heads))
    }
}

fn pairs(queries: u32, piece: u32) -> forward::Config {
    forward::Config {
        rows: forward::Rows::Pairs(queries),
        ..config(128, if queries == 192 { 64 } else { 192 }, piece)
    }
}
