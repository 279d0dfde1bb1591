//! Attention forward, against a softmax in float64.

use flex_block_attn_emulator::Options;
use flex_block_attn_lab::emulated::Forward;

use crate::right_in_all_ways;

#[test]
fn lists_of_every_length() {
    // None, one, two, three and all blocks: both stages are first and last.
    let problem = Forward {
        heads: 1,
        group: 1,
        head_dim: 128,
        kv_tile: 128,
        q_block: 128,
        kv_block: 128,
        kv_len: 512,
        lists: vec![vec![], vec![3], vec![0, 2], vec![0, 1, 3], vec![0, 1, 2, 3]],
        scale: 0.125,
    };
    right_in_all_ways(&problem.setup(), &Options::all(2));
}

#[test]
fn wide_tiles_blocks_of_several_tiles_and_shared_heads() {
    let problem = |kv_tile| Forward {
        heads: 2,
        group: 2,
        head_dim: 128,
        kv_tile,
        q_block: 256,
        kv_block: 384,
        kv_len: 768,
        lists: vec![vec![1]],
        scale: 0.1,
    };
    right_in_all_ways(&problem(192).setup(), &Options::all(1));
    right_in_all_ways(&problem(128).setup(), &Options::all(0));
}

#[test]
fn short_heads() {
    let problem = |kv_tile| Forward {
        heads: 2,
        group: 1,
        head_dim: 64,
        kv_tile,
        q_block: 128,
        kv_block: 384,
        kv_len: 768,
        lists: vec![vec![0], vec![0, 1]],
        scale: 0.2,
    };
    right_in_all_ways(&problem(128).setup(), &Options::all(1));
    right_in_all_ways(&problem(192).setup(), &Options::all(0));
}
