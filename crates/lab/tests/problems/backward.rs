//! Attention backward, against gradients in float64.

use flex_block_attn::{BlockMask, Extents};
use flex_block_attn_emulator::Options;
use flex_block_attn_kernels::Element;
use flex_block_attn_kernels::backward::{Config, Order};
use flex_block_attn_lab::problems::Backward;

use crate::right_in_all_ways;

fn config(head_dim: u32, piece: u32) -> Config {
    Config {
        element: Element::Bf16,
        head_dim,
        piece,
        order: Order::CHOSEN,
        mask: None,
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

#[test]
fn orders() {
    // Of 18 blocks of queries the second column has all, and starts somewhere among them.
    let seen = |row: usize, column: usize| column == 1 || (row + column) % 3 < 1;
    let extents = Extents::new(18 * 64, 384, 64, 128).unwrap();
    for order in Order::all() {
        for head_dim in [64, 128] {
            if order.outgoing == 2 && head_dim == 64 {
                continue;
            }
            let config = Config {
                order,
                ..config(head_dim, 64)
            };
            let problem = Backward {
                heads: 2,
                kv_heads: 1,
                ..Backward::new(config, BlockMask::from_fn(extents, seen))
            };
            right_in_all_ways(&problem.setup(), &Options::all(1)[1..3]);
        }
    }
}
