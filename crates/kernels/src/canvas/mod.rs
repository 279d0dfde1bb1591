//! Tokens of a video as they lie, in (time, height, width) order with text behind, read and written as
//! if they were put tile by tile: [`Canvas`] for launches, `Grid` and `Source` for kernels.
//!
//! Kernels count tokens in the order of tiles: a tile is a block of the mask, padded to its full size;
//! text follows. A tile is cut into boxes, which are a kernel's pieces: a copy moves one straight
//! between the video and shared memory, where its tokens are rows. What a box has outside of the video
//! reads as zeros and is not written; boxes without any token are passed over. The order of tokens inside
//! of a tile is nobody's business: it is box by box, those of one place one behind the other in time.
//!
//! Where a box starts is a word, a spot: its time, height and width, or its row of the text. The emulator
//! and the TMA unit see a video as a tensor of five dimensions (column, width, height, time, line), and
//! text as one of three that has two more of extent 1. A line is a head of a batch.

mod copies;
mod grid;

use flex_block_attn_mask::PlanLayout;
use flex_block_attn_ptx::{Arg, Reg};

pub(crate) use copies::{Boxes, Maps, Source, Stacks};
pub(crate) use grid::{Grid, Walk, inverse, quotient, token};

use crate::forward::Tensor;

/// Where the parts of a spot start: width, then height, then time; or the row, with [`TEXT`].
const HEIGHT: u32 = 10;
const TIME: u32 = 20;
/// Of a spot of the video, the bits of its time.
const TIMES: u32 = !((1 << TIME) - 1);
/// In a spot: it is one of the text.
const TEXT: u32 = 1 << 31;
/// Tokens of the boxes that the forward pass computes a video by. Small ones have few tokens beside it.
pub const PIECE: u32 = 16;
/// Boxes of a tile of queries there.
const Q_BOXES: u64 = 128 / PIECE as u64;
/// Boxes, whole tiles and text, at most.
pub(crate) const MOST_BOXES: u32 = 1 << 21;
/// Boxes of a stack at most: there are so many pieces in every tile of keys.
const MOST_STACKED: u32 = 8;
/// Bits of a width or a height.
const SIDE: u32 = (1 << HEIGHT) - 1;

/// A video with text behind, and how it is cut into tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Canvas {
    /// Tokens along (time, height, width).
    pub thw: [u32; 3],
    /// Tokens of a tile along each: a block of the mask, of queries and of keys alike.
    pub tile: [u32; 3],
    /// Tokens of text.
    pub text_len: u32,
    /// What tiles hold besides tokens.
    pub padding: Padding,
}

/// What tiles at the borders, and the last block of text, are filled up with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Padding {
    /// Nothing: attention is over the tokens there are.
    Exact,
    /// Zeros, and copies of the last token of text, which are attended.
    Zero,
}

impl Canvas {
    /// Tokens at most along (time, height, width), tiles being whole.
    pub const MOST: [u32; 3] = [(1 << (31 - TIME)) - 1, SIDE, SIDE];

    /// Tiles along each axis.
    pub fn tiles(self) -> [u32; 3] {
        std::array::from_fn(|axis| self.thw[axis].div_ceil(self.tile[axis]))
    }

    /// Tokens of a tile, and of a block of text.
    pub fn block(self) -> u32 {
        self.tile.iter().product()
    }

    /// Tokens of the video, as they lie.
    pub fn video_len(self) -> u32 {
        self.thw.iter().product()
    }

    /// Tokens, padding of tiles included, text without.
    pub fn padded_len(self) -> u32 {
        self.tiles().iter().product::<u32>() * self.block() + self.text_len
    }

    /// # Panics
    /// If a plan is not for its tiles.
    pub(crate) fn check(self, layout: PlanLayout) {
        let (extents, len) = (layout.extents, self.padded_len() as usize);
        let blocks = [extents.q_block(), extents.kv_block()];
        let lengths = [extents.q_len(), extents.kv_len()];
        assert!(
            self.fits() && blocks == [self.block() as usize; 2] && lengths == [len; 2],
            "{layout:?} for {self:?}"
        );
    }

    /// Whether kernels can name all its tokens.
    pub fn fits(self) -> bool {
        let tiles = self.tiles().iter().map(|&n| u64::from(n)).product::<u64>();
        let places = tiles * u64::from(self.block()) + u64::from(self.text_len);
        places / 16 < u64::from(MOST_BOXES)
            && (0..3).all(|axis| {
                let (tiles, tile) = (self.tiles()[axis], self.tile[axis]);
                (1..=Self::MOST[axis]).contains(&tiles.saturating_mul(tile))
            })
    }

    /// The box of so many tokens, a power of two that divides the tile's, by which the fewest pairs are
    /// computed; of several the widest.
    pub fn unit(self, piece: u32) -> [u32; 3] {
        let sides = |axis: usize| {
            (0..)
                .map(|n| 1 << n)
                .take_while(move |side| self.tile[axis].is_multiple_of(*side))
        };
        let units = sides(2).flat_map(|w| sides(1).map(move |h| [h, w]));
        let fitting = units.filter_map(|[h, w]| {
            let t = piece.checked_div(h * w)?;
            let whole = t * h * w == piece && self.tile[0].is_multiple_of(t);
            whole.then_some([t, h, w])
        });
        let best = fitting.min_by_key(|&unit| {
            let [t, h, _] = unit;
            (self.pairs(unit, piece), t * h, t)
        });
        best.unwrap_or_else(|| panic!("boxes of {piece} in {self:?}"))
    }

    /// Boxes that are copied as one where all have a token: those of a tile that are one behind the other
    /// in time, unless there are too many.
    fn stack(self, piece: u32) -> u32 {
        match self.tile[0] / self.unit(piece)[0] {
            boxes @ ..=MOST_STACKED => boxes,
            _ => 1,
        }
    }

    /// In proportion to the pairs that are computed of a video that sees all of itself: boxes of keys, by
    /// boxes of queries in whole tiles of these.
    fn pairs(self, unit: [u32; 3], piece: u32) -> u64 {
        // Along each axis: tiles, and boxes of each; first whole ones, then the one at the border.
        let along: [[(u32, u32); 2]; 3] = std::array::from_fn(|axis| {
            let (len, tile, side) = (self.thw[axis], self.tile[axis], unit[axis]);
            let rest = len % tile;
            [
                (len / tile, tile / side),
                (rest.min(1), rest.div_ceil(side)),
            ]
        });
        // The backward pass fills its tiles over the ends of the mask's blocks.
        let of_tile = if piece == PIECE { Q_BOXES } else { 1 };
        let (mut keys, mut queries) = (0, 0);
        for (i, j, l) in (0..8).map(|n| (n & 1, n >> 1 & 1, n >> 2)) {
            let kinds = [along[0][i], along[1][j], along[2][l]];
            let tiles: u64 = kinds.iter().map(|kind| u64::from(kind.0)).product();
            let boxes: u64 = kinds.iter().map(|kind| u64::from(kind.1)).product();
            keys += tiles * boxes;
            queries += tiles * boxes.div_ceil(of_tile);
        }
        keys * queries
    }

    /// The arguments for [`Grid::new`].
    pub(crate) fn args(self, piece: u32, scale: f32) -> Vec<Arg> {
        let [_, n_h, n_w] = self.tiles();
        let [t, h, w] = self.unit(piece);
        // Ones at the start of each of a box's rows, and of each of its planes.
        let every = |step: u32| {
            (0..64)
                .step_by(step as usize)
                .fold(0, |all, i| all | 1 << i)
        };
        // Copies of the last token are as good as one that has their weight, too.
        let copies = (self.text_len.next_multiple_of(self.block()) - self.text_len) as f32;
        let weighs = self.padding == Padding::Zero && copies > 0.0;
        vec![
            Arg::U32(self.block()),
            Arg::U32(self.tiles().iter().product()),
            Arg::U32(n_h * n_w),
            inverse(n_h * n_w),
            Arg::U32(n_w),
            inverse(n_w),
            inverse(self.block() / piece),
            inverse(self.tile[2] / w),
            inverse(self.tile[0] / t),
            Arg::U32(packed(self.tile)),
            Arg::U32(packed(self.thw)),
            Arg::U32(packed([t, h, w])),
            Arg::U32(w.ilog2()),
            Arg::U32(h.ilog2()),
            Arg::U64(every(w)),
            Arg::U64(every((h * w).min(64))),
            Arg::U32(self.text_len),
            Arg::U32(match self.padding {
                Padding::Exact => 0,
                Padding::Zero => 1,
            }),
            Arg::U32(if weighs { self.text_len - 1 } else { u32::MAX }),
            Arg::F32(copies.ln_1p() / scale),
        ]
    }

    /// Whether kernels can be given a tensor.
    pub fn takes(tensor: Tensor, heads: u32, batch: u32) -> bool {
        let strides = tensor.strides;
        heads == 1 || batch == 1 || strides.batch.is_multiple_of(strides.head)
    }
}

/// The least factor of scores, other than 0, for which all that is added to scores is a number.
pub(crate) fn least_scale(canvas: bool) -> f32 {
    match canvas {
        false => f32::MIN_POSITIVE,
        // The weight of copies is added before scores are multiplied.
        true => 1e-30,
    }
}

/// The arguments for a [`Grid`] whose scores nobody reads, if there are boxes.
///
/// # Panics
/// If there are boxes without a canvas, or the other way round.
pub(crate) fn args(boxes: Option<u32>, canvas: Option<Canvas>) -> Vec<Arg> {
    match (boxes, canvas) {
        (None, None) => Vec::new(),
        (Some(piece), Some(canvas)) => canvas.args(piece, 1.0),
        _ => panic!("boxes of {boxes:?} in {canvas:?}"),
    }
}

/// What tells kernels of videos from others, in their names.
pub(crate) fn tag(boxes: Option<u32>) -> String {
    boxes.map_or(String::new(), |piece| format!("_canvas{piece}"))
}

/// A spot.
fn packed([t, h, w]: [u32; 3]) -> u32 {
    (t << TIME) | (h << HEIGHT) | w
}

fn time(spot: Reg<'_, u32>) -> Reg<'_, u32> {
    spot >> TIME
}

fn height(spot: Reg<'_, u32>) -> Reg<'_, u32> {
    (spot >> HEIGHT) & SIDE
}

fn width(spot: Reg<'_, u32>) -> Reg<'_, u32> {
    spot & SIDE
}

fn is_text(spot: Reg<'_, u32>) -> Reg<'_, bool> {
    spot.ge(TEXT)
}

fn row(spot: Reg<'_, u32>) -> Reg<'_, u32> {
    spot & !TEXT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_are_those_that_compute_least() {
        let canvas = |thw, tile| Canvas {
            thw,
            tile,
            text_len: 0,
            padding: Padding::Exact,
        };
        // 720p and 480p, 121 frames. At 720p (1, 2, 8) has fewer keys, 114,080 beside 115,200, but more
        // tiles of queries, 960 beside 910: 18 boxes of a tile at the lower border take three, 15 two.
        let [high, low] = [[31, 45, 80], [31, 30, 52]].map(|thw| canvas(thw, [6, 8, 8]));
        assert_eq!(high.unit(PIECE), [2, 1, 8]);
        assert_eq!(high.pairs([2, 1, 8], PIECE), 115_200 / 16 * 910);
        assert_eq!(high.pairs([1, 2, 8], PIECE), 114_080 / 16 * 960);
        assert_eq!(low.unit(PIECE), [2, 2, 4]);
        // Of the backward pass only tokens count.
        assert_eq!(high.unit(64), [1, 8, 8]);
        // Tiles without borders: the widest.
        assert_eq!(canvas([12, 16, 16], [6, 8, 8]).unit(PIECE), [1, 2, 8]);
        assert_eq!(canvas([4, 8, 32], [2, 4, 16]).unit(PIECE), [1, 1, 16]);
    }

    #[test]
    fn stacks_are_of_a_tile_and_not_too_high() {
        let stack = |tile| {
            let canvas = Canvas {
                thw: tile,
                tile,
                text_len: 0,
                padding: Padding::Exact,
            };
            (canvas.unit(PIECE), canvas.stack(PIECE))
        };
        assert_eq!(stack([6, 8, 8]), ([1, 2, 8], 6));
        assert_eq!(stack([1, 8, 16]), ([1, 1, 16], 1));
        assert_eq!(stack([8, 4, 16]), ([1, 1, 16], 8));
        assert_eq!(stack([9, 4, 16]), ([1, 1, 16], 1));
    }
}
