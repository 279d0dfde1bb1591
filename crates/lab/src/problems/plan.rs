//! [`Compaction`]: plans from masks in memory, word for word against the host's; [`TileCompaction`]: those
//! of a video's tiles, which have an order of their own.

use std::cmp::Reverse;
use std::collections::HashSet;

use flex_block_attn::expression::{Expression, b, h, kv, q};
use flex_block_attn::{BlockMask, BoolMatrix, Extents, Plan};
use flex_block_attn_emulator::Memory;
use flex_block_attn_kernels::canvas::{Canvas, PIECE};
use flex_block_attn_kernels::plan::{Args, Config, Mask};
use flex_block_attn_mask::Side;
use flex_block_attn_ptx::Element;

use super::{Close, Expected, Setup, Step};

/// Mask compaction.
#[derive(Debug, Clone, Copy)]
pub struct Compaction {
    /// Batches, heads, rows, columns of the mask.
    pub shape: [usize; 4],
    /// Kept entries, of 256: 0 to 256.
    pub density: u16,
    /// How the mask lies in memory.
    pub layout: MaskLayout,
}

/// How a mask lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaskLayout {
    /// In order.
    Dense,
    /// Columns before rows.
    Transposed,
    /// One matrix, repeated for each head and batch, its entries three bytes apart.
    Repeated,
}

impl Compaction {
    fn strides(&self) -> [usize; 4] {
        let [_, heads, rows, columns] = self.shape;
        let matrix = rows * columns;
        match self.layout {
            MaskLayout::Dense => [heads * matrix, matrix, columns, 1],
            MaskLayout::Transposed => [heads * matrix, matrix, 1, rows],
            MaskLayout::Repeated => [0, 0, 3 * columns, 3],
        }
    }

    /// Bytes of every value that counts as true, and zeros.
    fn bytes(&self) -> Vec<u8> {
        let strides = self.strides();
        let last: usize = (0..4).map(|i| (self.shape[i] - 1) * strides[i]).sum();
        let mut state = 77u64;
        (0..=last)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005) + 1;
                let [kept, value, ..] = (state >> 32).to_le_bytes();
                u8::from(u16::from(kept) < self.density) * value.max(1)
            })
            .collect()
    }

    /// Both kernels with a mask.
    ///
    /// # Panics
    /// If the mask has no entries.
    pub fn setup(&self) -> Setup {
        let [_, _, rows, columns] = self.shape;
        let bytes = self.bytes();
        let extents = Extents::new(16 * rows, 16 * columns, 16, 16).expect("a mask has entries");
        let matrix = BoolMatrix::new(&bytes, self.shape, self.strides()).expect("bytes suffice");
        let mask = BlockMask::from_matrix(extents, matrix).expect("extents fit");
        let plan = Plan::new(&mask);

        let mut memory = Memory::new();
        let args = Args {
            mask: Mask::Bytes {
                address: memory.alloc_with("mask", &bytes),
                strides: self.strides().map(|stride| stride as u64),
            },
            layout: plan.layout(),
            plan: memory.alloc("plan", 4 * plan.words().len()),
            canvas: None,
        };
        of(memory, &args, plan.words().to_vec())
    }
}

/// Compaction of a mask of a video's tiles, its lists ranked by the boxes that they are computed by.
#[derive(Debug, Clone, Copy)]
pub struct TileCompaction {
    /// The video.
    pub canvas: Canvas,
    /// Heads, with masks of their own.
    pub heads: usize,
    /// Kept entries, of 256: 0 to 256.
    pub density: u16,
}

impl TileCompaction {
    /// Both kernels with a mask.
    ///
    /// # Panics
    /// If the video has no tokens.
    pub fn setup(&self) -> Setup {
        let boxes = self.boxes();
        let (block, tokens) = (
            self.canvas.block() as usize,
            self.canvas.padded_len() as usize,
        );
        let mask = Compaction {
            shape: [1, self.heads, boxes.len(), boxes.len()],
            density: self.density,
            layout: MaskLayout::Dense,
        };
        let bytes = mask.bytes();
        let extents = Extents::new(tokens, tokens, block, block).expect("a video has tokens");
        let matrix = BoolMatrix::new(&bytes, mask.shape, mask.strides()).expect("bytes suffice");
        let plan = Plan::new(&BlockMask::from_matrix(extents, matrix).expect("extents fit"));
        let layout = plan.layout();
        let mut words = plan.words().to_vec();
        for record in words.chunks_mut(layout.record_words()) {
            for side in [Side::Rows, Side::Columns].map(|side| layout.side(side)) {
                let cost = |&line: &usize| -> usize {
                    let list = &record[side.list(line)..][..record[side.count(line)] as usize];
                    list.iter().map(|&entry| boxes[entry as usize]).sum()
                };
                let mut order: Vec<usize> = (0..side.lists).collect();
                order.sort_by_key(|line| Reverse(cost(line)));
                let order: Vec<i32> = order.into_iter().map(|line| line as i32).collect();
                record[side.order()..][..side.lists].copy_from_slice(&order);
            }
        }

        let mut memory = Memory::new();
        let args = Args {
            mask: Mask::Bytes {
                address: memory.alloc_with("mask", &bytes),
                strides: mask.strides().map(|stride| stride as u64),
            },
            layout,
            plan: memory.alloc("plan", 4 * words.len()),
            canvas: Some(self.canvas),
        };
        of(memory, &args, words)
    }

    /// Of each tile, then each block of text, the boxes with a token.
    fn boxes(&self) -> Vec<usize> {
        let Canvas {
            thw,
            tile,
            text_len,
            ..
        } = self.canvas;
        let unit = self.canvas.unit(PIECE);
        let (tiles, block) = (self.canvas.tiles(), self.canvas.block());
        let mut boxes = Vec::new();
        let of_tile = |corner: [u32; 3]| {
            let along = |axis: usize| {
                let end = (corner[axis] + tile[axis]).min(thw[axis]);
                (corner[axis]..end).map(move |token| (token - corner[axis]) / unit[axis])
            };
            let mut seen = HashSet::new();
            for t in along(0) {
                for h in along(1) {
                    seen.extend(along(2).map(|w| (t, h, w)));
                }
            }
            seen.len()
        };
        for t in 0..tiles[0] {
            for h in 0..tiles[1] {
                for w in 0..tiles[2] {
                    boxes.push(of_tile([t * tile[0], h * tile[1], w * tile[2]]));
                }
            }
        }
        let texts = (0..text_len).step_by(block as usize);
        boxes.extend(texts.map(|first| (text_len - first).min(block).div_ceil(PIECE) as usize));
        boxes
    }
}

/// Compaction of the bits of a mask that was made on the host.
#[derive(Debug, Clone, Copy)]
pub struct BitCompaction {
    /// Batches, heads, rows, columns of the mask.
    pub shape: [usize; 4],
    /// Tokens that a query sees before and behind itself: partial blocks at the border.
    pub reach: i32,
}

impl BitCompaction {
    /// Both kernels with a mask, which differs from head to head.
    ///
    /// # Panics
    /// If the mask has no entries.
    pub fn setup(&self) -> Setup {
        let [batch, heads, rows, columns] = self.shape;
        let extents = Extents::new(16 * rows, 16 * columns, 16, 16).expect("a mask has entries");
        let near = (q() - kv() - (b() * 3 + h()) * 11)
            .abs()
            .at_most(self.reach);
        let expression = Expression::new(&near).expect("a window is an expression");
        let mask = BlockMask::from_expression(extents, batch, heads, &expression)
            .expect("nothing is looked up");
        let plan = Plan::new(&mask);
        let mut bits = vec![0u64; mask.bit_words()];
        mask.write_bits(&mut bits).expect("words suffice");

        let mut memory = Memory::new();
        let args = Args {
            mask: Mask::Bits {
                address: memory.alloc_with("bits", &bits),
            },
            layout: plan.layout(),
            plan: memory.alloc("plan", 4 * plan.words().len()),
            canvas: None,
        };
        of(memory, &args, plan.words().to_vec())
    }
}

/// Both kernels, which are to write the words of a plan.
fn of(memory: Memory, args: &Args, words: Vec<i32>) -> Setup {
    let step = |config: Config| Step::new(config.kernel(), config.launch(args));
    let words = words.into_iter().map(f64::from).collect();
    Setup::new(
        memory,
        Config::of(args).map(step).to_vec(),
        vec![Expected::new(
            "the plan",
            args.plan,
            Element::I32,
            words,
            Close::Each(0.0),
        )],
    )
}
