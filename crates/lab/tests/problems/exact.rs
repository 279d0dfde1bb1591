//! Masks with an expression, against attention over the pairs that it lets through.

use flex_block_attn::{BlockMask, Extents};
use flex_block_attn_emulator::Options;
use flex_block_attn_kernels::cut::Cut;
use flex_block_attn_kernels::{Element, backward, forward};
use flex_block_attn_lab::problems::{Backward, Forward, Rule};
use flex_block_attn_lab::rules::{causal, dilated_window, documents_with_prefix, neighbourhood};

use crate::right_in_all_ways;

/// All blocks with a pair that counts.
fn blocks(
    rule: &Rule,
    lengths: [usize; 2],
    sizes: [usize; 2],
    batch: usize,
    head: usize,
) -> BlockMask {
    let extents = Extents::new(lengths[0], lengths[1], sizes[0], sizes[1]).unwrap();
    BlockMask::from_fn(extents, |row, column| {
        let range = |i: usize, size: usize, len: usize| i * size..((i + 1) * size).min(len);
        range(row, sizes[0], lengths[0]).any(|query| {
            range(column, sizes[1], lengths[1]).any(|key| rule.counts(batch, head, query, key))
        })
    })
}

/// Both passes in the emulator, over some blocks and in one way each.
fn right(rule: &Rule, lengths: [usize; 2], head_dim: u32, sizes: [usize; 2]) {
    let element = Element::Bf16;
    let mask = blocks(rule, lengths, sizes, 0, 0);
    let [q_block, kv_block] = sizes.map(|size| size as u32);
    let config = forward::Config::choose(element, head_dim, q_block, kv_block, Some(rule.mask()));
    let problem = Forward {
        rule: Some(rule.clone()),
        ..Forward::new(config.unwrap(), mask.clone())
    };
    right_in_all_ways(&problem.setup(), &Options::all(1)[1..3]);
    for deterministic in [false, true] {
        let exact = Some(rule.mask());
        let config =
            backward::Config::choose(element, head_dim, q_block, kv_block, exact, deterministic);
        let problem = Backward {
            rule: Some(rule.clone()),
            ..Backward::new(config.unwrap(), mask.clone())
        };
        right_in_all_ways(&problem.setup(), &Options::all(1)[1..2]);
    }
}

#[test]
fn lower_triangles() {
    for (head_dim, sizes) in [
        (128, [128, 128]),
        (128, [256, 64]),
        (64, [128, 32]),
        (64, [64, 64]),
        (128, [48, 96]),
        (128, [128, 384]),
    ] {
        right(&causal(), [300, 410], head_dim, sizes);
    }
}

#[test]
fn windows_with_holes() {
    for (head_dim, sizes) in [(64, [128, 128]), (128, [32, 64])] {
        right(&dilated_window(50), [270, 330], head_dim, sizes);
    }
}

#[test]
fn neighbours_in_space() {
    // 5 x 6 x 11 tokens.
    for (head_dim, sizes) in [(128, [128, 128]), (64, [16, 16])] {
        right(&neighbourhood(6, 11), [330, 330], head_dim, sizes);
    }
}

#[test]
fn tables_of_tokens_and_of_heads() {
    let (batch, heads, tokens) = (2, 4, 260);
    let rule = documents_with_prefix(tokens, batch as u32, heads as u32);
    // The last head's prefix is the longest: its blocks are those that any head wants.
    for (head_dim, size) in [(128, 128), (64, 48)] {
        let mask = blocks(&rule, [tokens; 2], [size; 2], batch - 1, heads - 1);
        let whole = mask.extents();
        let mask = BlockMask::from_matrix(
            whole,
            flex_block_attn::BoolMatrix::new(
                &mask.to_dense(),
                [batch, heads, whole.q_blocks(), whole.kv_blocks()],
                [0, 0, whole.kv_blocks(), 1],
            )
            .unwrap(),
        )
        .unwrap();
        let with = Some(rule.mask());
        let block = size as u32;
        let config = forward::Config::choose(Element::F16, head_dim, block, block, with);
        let problem = Forward {
            batch,
            heads,
            kv_heads: 2,
            rule: Some(rule.clone()),
            ..Forward::new(config.unwrap(), mask.clone())
        };
        right_in_all_ways(&problem.setup(), &Options::all(1)[1..2]);
        let config = backward::Config::choose(Element::F16, head_dim, block, block, with, false);
        // All twelve tiles of keys whole, or most in parts.
        let cut = Cut {
            whole: 5,
            tiles: 7,
            parts: 3,
        };
        for cut in [None, Some(cut)] {
            let problem = Backward {
                batch,
                heads,
                kv_heads: 2,
                rule: Some(rule.clone()),
                cut,
                ..Backward::new(config.unwrap(), mask.clone())
            };
            right_in_all_ways(&problem.setup(), &Options::all(1)[1..2]);
        }
    }
}
