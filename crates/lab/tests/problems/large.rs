//! Problems that would take the emulator too long: on a GPU alone.

use flex_block_attn::{Extents, builders};
use flex_block_attn_kernels::backward::{self, prepare};
use flex_block_attn_kernels::{Element, all, forward, pool};
use flex_block_attn_lab::problems::{
    Backward, Compaction, Forward, Layout, MaskLayout, Pool, Prepare, Product,
};

use flex_block_attn_lab::ptxas::allowed_spills;

use crate::{gpu, right_on};

const ELEMENTS: [Element; 2] = [Element::Bf16, Element::F16];

#[test]
fn all_kernels_load_without_spills() {
    let Some(gpu) = gpu() else { return };
    for kernel in all() {
        let function = gpu
            .load(&kernel)
            .unwrap_or_else(|error| panic!("{}: {error}", kernel.name));
        let spills = function.spilled_bytes().expect("loaded");
        let allowed = allowed_spills(&kernel.name);
        assert!(spills <= allowed, "{} spills {spills} bytes", kernel.name);
    }
}

#[test]
fn products() {
    let Some(gpu) = gpu() else { return };
    for element in ELEMENTS {
        let problem = Product {
            element,
            m: 512,
            n: 1024,
            k: 768,
        };
        right_on(gpu, &problem.setup());
    }
}

/// Attention of four heads of 1536 tokens over random blocks, in tiles of queries of one block.
fn forward_by(element: Element, block: usize) {
    let Some(gpu) = gpu() else { return };
    let extents = Extents::new(1536, 1536, block, block).unwrap();
    let mask = builders::random(extents, 1, 4, 0.3, 5).unwrap();
    // Of each tile of keys the largest piece that fits; all pieces are in small problems.
    let piece = |tile: u32| {
        if (block as u32).is_multiple_of(tile) {
            tile
        } else {
            64
        }
    };
    for head_dim in [64, 128] {
        for kv_tile in [128, 192] {
            let config = forward::Config {
                element,
                head_dim,
                rows: forward::Rows::Whole(128),
                kv_tile,
                piece: piece(kv_tile),
                mask: None,
                canvas: false,
            };
            let problem = Forward {
                heads: 4,
                kv_heads: 2,
                blocks: gpu.device().multiprocessors(),
                tokens_first: head_dim == 64,
                ..Forward::new(config, mask.clone())
            };
            right_on(gpu, &problem.setup());
        }
    }
}

#[test]
fn forward_bf16_over_blocks_of_128() {
    forward_by(Element::Bf16, 128);
}

#[test]
fn forward_bf16_over_blocks_of_384() {
    forward_by(Element::Bf16, 384);
}

#[test]
fn forward_f16_over_blocks_of_128() {
    forward_by(Element::F16, 128);
}

#[test]
fn forward_f16_over_blocks_of_384() {
    forward_by(Element::F16, 384);
}

/// Pairs of thread blocks on all multiprocessors, some of which take a second pair of tiles.
#[test]
fn forward_in_pairs() {
    let Some(gpu) = gpu() else { return };
    for (element, queries, kv_tile, piece, alike, scale) in [
        (Element::Bf16, 128, 192, 192, true, 0.125),
        (Element::F16, 128, 192, 64, true, 4.0),
        (Element::F16, 192, 64, 64, true, 0.125),
        (Element::Bf16, 192, 64, 64, false, 4.0),
    ] {
        let extents = Extents::new(5000, 1500, 384, 3 * piece as usize).unwrap();
        let mask = match alike {
            true => builders::full(extents),
            false => builders::random(extents, 1, 4, 0.4, 7).unwrap(),
        };
        let config = forward::Config {
            element,
            head_dim: 128,
            rows: forward::Rows::Pairs(queries),
            kv_tile,
            piece,
            mask: None,
            canvas: false,
        };
        let problem = Forward {
            heads: 4,
            kv_heads: 4,
            blocks: gpu.device().multiprocessors(),
            scale,
            alike,
            ..Forward::new(config, mask)
        };
        right_on(gpu, &problem.setup());
    }
}

#[test]
fn forward_over_small_blocks() {
    let Some(gpu) = gpu() else { return };
    for (element, block) in [(Element::Bf16, 48), (Element::F16, 64)] {
        let extents = Extents::new(1500, 1100, block, block).unwrap();
        let mask = builders::random(extents, 2, 2, 0.3, 6).unwrap();
        let config = forward::Config::choose(element, 128, block as u32, block as u32, None);
        let problem = Forward {
            batch: 2,
            heads: 2,
            blocks: gpu.device().multiprocessors(),
            ..Forward::new(config.expect("blocks are multiples of 16"), mask)
        };
        right_on(gpu, &problem.setup());
    }
}

#[test]
fn gradients() {
    let Some(gpu) = gpu() else { return };
    for element in ELEMENTS {
        for (head_dim, deterministic) in [(64, false), (64, true), (128, false), (128, true)] {
            let extents = Extents::new(1100, 1000, 128, 128).unwrap();
            let config = backward::Config {
                element,
                head_dim,
                piece: 64,
                mask: None,
                apart: false,
                canvas: false,
                deterministic,
            };
            let problem = Backward {
                heads: 4,
                kv_heads: 2,
                ..Backward::new(config, builders::random(extents, 1, 4, 0.3, 7).unwrap())
            };
            right_on(gpu, &problem.setup());
        }
    }
}

#[test]
fn plans() {
    let Some(gpu) = gpu() else { return };
    for shape in [[1, 24, 240, 240], [2, 3, 361, 361]] {
        for density in [0, 77, 256] {
            let problem = Compaction {
                shape,
                density,
                layout: MaskLayout::Dense,
            };
            right_on(gpu, &problem.setup());
        }
    }
}

/// In order, and with tokens before heads and gaps.
fn layouts() -> [Layout; 2] {
    [
        Layout::default(),
        Layout {
            tokens_first: true,
            gap: 24,
        },
    ]
}

#[test]
fn deltas_and_lses() {
    let Some(gpu) = gpu() else { return };
    for config in prepare::Config::all() {
        if config.boxes.is_some() {
            continue;
        }
        for (index, q_len) in [1000, 1153, 4096].into_iter().enumerate() {
            let [a, b] = layouts();
            let (out, dout) = if index % 2 == 0 { (a, b) } else { (b, a) };
            let problem = Prepare {
                config,
                batch: 2,
                heads: 3,
                q_len,
                out,
                dout,
                has_dlse: index % 2 == 0,
            };
            right_on(gpu, &problem.setup());
        }
    }
}

#[test]
fn means() {
    let Some(gpu) = gpu() else { return };
    let tiles = |thw, tile, zeros_count| pool::Tiles {
        thw,
        tile,
        zeros_count,
    };
    for config in pool::Config::all() {
        for tiles in [
            pool::Tiles::blocks(4096, 128),
            pool::Tiles::blocks(3000, 384),
            pool::Tiles::blocks(2049, 16),
            pool::Tiles::blocks(1537, 1536),
            tiles([7, 45, 80], [6, 8, 8], true),
            tiles([5, 33, 50], [2, 4, 8], false),
        ] {
            for layout in layouts() {
                let problem = Pool {
                    config,
                    batch: 2,
                    heads: [4, 2],
                    tiles,
                    more: 0,
                    layout,
                };
                right_on(gpu, &problem.setup());
            }
        }
    }
}
