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

use flex_block_attn_mask::PlanLayout;
use flex_block_attn_ptx::builder::{Address, Value};
use flex_block_attn_ptx::ir::Operand;
use flex_block_attn_ptx::{Arg, Builder, Reg, Swizzle, TensorMap};
use flex_block_attn_tile::{Barrier, MATRIX_AXES, RegTile, Shape, SharedTile};

use crate::forward::Tensor;

/// Where the parts of a spot start: width, then height, then time; or the row, with [`TEXT`].
const HEIGHT: u32 = 10;
const TIME: u32 = 20;
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

    /// The arguments for [`Source::new`], of `kind`: `lines` are heads and batches.
    ///
    /// # Panics
    /// If there are several heads and batches, and the distance of batches is no multiple of that of
    /// heads.
    pub(crate) fn source(
        self,
        kind: Boxes,
        shape: Shape,
        tensor: Tensor,
        [heads, batch]: [u32; 2],
    ) -> Vec<Arg> {
        let [time, height, width] = self.thw.map(u64::from);
        let bytes = u64::from(shape.element.bytes());
        let strides = tensor.strides;
        let (line, per_batch) = lines(tensor, [heads, batch]);
        let lines = u64::from(batch - 1) * u64::from(per_batch) + u64::from(heads);
        let row = strides.row * bytes;
        let [t, h, w] = self.unit(shape.rows);
        let map = |address, dims: [u64; 3], tile: [u32; 3]| TensorMap {
            element: shape.element,
            address,
            rank: MATRIX_AXES as u32,
            dims: [shape.columns.into(), dims[0], dims[1], dims[2], lines],
            strides: [
                bytes,
                row,
                row * dims[0],
                row * dims[0] * dims[1],
                line * bytes,
            ],
            tile: [shape.panel_columns(), tile[0], tile[1], tile[2], 1],
            swizzle: Swizzle::B128,
        };
        let text = match self.text_len {
            // Never read.
            0 => tensor.address,
            _ => tensor.address + row * time * height * width,
        };
        let rows = self.text_len.max(1).into();
        let video = |tile| Arg::TensorMap(map(tensor.address, [width, height, time], tile));
        let stacks = (kind == Boxes::Stacked).then(|| video([w, h, t * self.stack(shape.rows)]));
        [video([w, h, t])]
            .into_iter()
            .chain(stacks)
            .chain([
                Arg::TensorMap(map(text, [rows, 1, 1], [shape.rows, 1, 1])),
                Arg::U32(per_batch),
            ])
            .collect()
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

/// Which of a tensor's rows the token in a place is, of `len`, and whether it is one.
pub(crate) fn token<'k>(
    grid: &Option<Grid<'k>>,
    place: Reg<'k, u32>,
    len: Reg<'k, u32>,
) -> (Reg<'k, u32>, Reg<'k, bool>) {
    match grid {
        None => (place, place.lt(len)),
        Some(grid) => grid.token_at(grid.spot(place)),
    }
}

/// What tells kernels of videos from others, in their names.
pub(crate) fn tag(boxes: Option<u32>) -> String {
    boxes.map_or(String::new(), |piece| format!("_canvas{piece}"))
}

/// Elements from a line to the next, and lines from a batch to the next.
fn lines(tensor: Tensor, [heads, batch]: [u32; 2]) -> (u64, u32) {
    let strides = tensor.strides;
    match (heads, batch) {
        (_, 1) => (strides.head, 1),
        (1, _) => (strides.batch, 1),
        _ => {
            assert!(strides.batch.is_multiple_of(strides.head), "{tensor:?}");
            let lines = u32::try_from(strides.batch / strides.head);
            (strides.head, lines.expect("fewer than 2^32 lines"))
        }
    }
}

/// A spot.
fn packed([t, h, w]: [u32; 3]) -> u32 {
    (t << TIME) | (h << HEIGHT) | w
}

/// How the boxes of a canvas are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Boxes {
    /// Each by itself.
    Single,
    /// Stacks of them, too.
    Stacked,
}

/// Where copies find a tensor's pieces.
#[derive(Clone, Copy)]
pub(crate) enum Source<'k> {
    /// By this map, at rows.
    Rows(Reg<'k, u64>),
    /// At spots.
    Canvas(Maps<'k>),
}

/// A tensor of a canvas.
#[derive(Clone, Copy)]
pub(crate) struct Maps<'k> {
    video: Reg<'k, u64>,
    /// Of the same by stacks.
    stacks: Option<Reg<'k, u64>>,
    text: Reg<'k, u64>,
    /// Lines from a batch to the next.
    per_batch: Reg<'k, u32>,
}

impl<'k> Source<'k> {
    /// Declares its parameters.
    pub(crate) fn new(k: &'k Builder, name: &str, boxes: Option<Boxes>) -> Self {
        let map = k.tensor_map(name);
        match boxes {
            None => Self::Rows(map),
            Some(boxes) => Self::Canvas(Maps {
                video: map,
                stacks: (boxes == Boxes::Stacked).then(|| k.tensor_map(&format!("{name}_stacks"))),
                text: k.tensor_map(&format!("{name}_text")),
                per_batch: k.param(&format!("{name}_lines")),
            }),
        }
    }

    /// Has maps fetched ahead of their first copies.
    pub(crate) fn prefetch(self, k: &'k Builder) {
        match self {
            Self::Rows(map) => k.prefetch_map(map),
            Self::Canvas(maps) => {
                k.prefetch_map(maps.video);
                k.prefetch_map(maps.text);
            }
        }
    }

    /// The map of rows.
    pub(crate) fn rows(self) -> Reg<'k, u64> {
        match self {
            Self::Rows(map) => map,
            Self::Canvas(_) => panic!("a canvas has no rows"),
        }
    }

    /// The maps of a canvas.
    pub(crate) fn boxes(self) -> Maps<'k> {
        match self {
            Self::Canvas(maps) => maps,
            Self::Rows(_) => panic!("rows are no boxes"),
        }
    }
}

impl<'k> Maps<'k> {
    fn stacks(self) -> Reg<'k, u64> {
        self.stacks.expect("a map of stacks")
    }

    /// A head's line.
    fn line(self, [head, batch]: [Reg<'k, u32>; 2]) -> Reg<'k, u32> {
        batch * self.per_batch + head
    }
}

/// A canvas in a kernel.
pub(crate) struct Grid<'k> {
    k: &'k Builder,
    /// Tokens of a box.
    piece: u32,
    /// Tokens of a tile.
    block: Reg<'k, u32>,
    /// Tiles: all, those of one time, and those of one height, too.
    tiles: Reg<'k, u32>,
    plane: Divisor<'k>,
    line: Divisor<'k>,
    /// Boxes: of a tile, of one in a row, and one behind the other in time.
    boxes: Reg<'k, f32>,
    w_boxes: Reg<'k, f32>,
    t_boxes: Reg<'k, f32>,
    /// Extents, as spots: of a tile, of the video, of a box.
    tile: Reg<'k, u32>,
    end: Reg<'k, u32>,
    unit: Reg<'k, u32>,
    /// Logarithms to base 2 of a box's width and height.
    log_w: Reg<'k, u32>,
    log_h: Reg<'k, u32>,
    /// A bit for the first token of each of a box's rows, and of each of its planes.
    rows: Reg<'k, u64>,
    planes: Reg<'k, u64>,
    text_len: Reg<'k, u32>,
    /// 1 if padding of tiles is attended, else 0.
    attended: Reg<'k, u32>,
    /// The row of the text that has a weight, if any has, and what that adds to its scores.
    heavy: Reg<'k, u32>,
    weight: Reg<'k, f32>,
}

/// A walk through the boxes of a tile, or the pieces of a block of text, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Walk<'k> {
    /// The tile's spot, and how far behind it the next box is.
    pub(crate) corner: Reg<'k, u32>,
    pub(crate) inner: Reg<'k, u32>,
}

/// A number, and what [`quotient`] asks of it.
#[derive(Clone, Copy)]
struct Divisor<'k> {
    number: Reg<'k, u32>,
    inverse: Reg<'k, f32>,
}

impl<'k> Divisor<'k> {
    fn new(k: &'k Builder, name: &str) -> Self {
        Self {
            number: k.param(name),
            inverse: k.param(&format!("inverse_{name}")),
        }
    }
}

/// The argument for a divisor's inverse.
pub(crate) fn inverse(number: u32) -> Arg {
    Arg::F32(1.0 / number as f32)
}

/// A number below [`MOST_BOXES`] divided, rounded down: an instruction of its own takes more registers
/// than loaders have.
pub(crate) fn quotient<'k>(a: Reg<'k, u32>, inverse: Reg<'k, f32>) -> Reg<'k, u32> {
    // Halves are between the numbers that are asked for: what is rounded to the nearest is never near
    // the middle of two. Adding this leaves no bits for a fraction.
    const WHOLE: f32 = 1.5 * (1 << 23) as f32;
    let middle = (a.to_f32() + 0.5) * inverse - 0.5;
    (middle + WHOLE).to_bits() - WHOLE.to_bits()
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

impl<'k> Grid<'k> {
    /// Declares its parameters.
    pub(crate) fn new(k: &'k Builder, piece: u32) -> Self {
        Self {
            k,
            piece,
            block: k.param("tile_tokens"),
            tiles: k.param("video_tiles"),
            plane: Divisor::new(k, "plane_tiles"),
            line: Divisor::new(k, "line_tiles"),
            boxes: k.param("inverse_boxes"),
            w_boxes: k.param("inverse_w_boxes"),
            t_boxes: k.param("inverse_t_boxes"),
            tile: k.param("tile_thw"),
            end: k.param("video_thw"),
            unit: k.param("box_thw"),
            log_w: k.param("log_w"),
            log_h: k.param("log_h"),
            rows: k.param("box_rows"),
            planes: k.param("box_planes"),
            text_len: k.param("text_len"),
            attended: k.param("attended"),
            heavy: k.param("heavy"),
            weight: k.param("weight"),
        }
    }

    /// A spot behind the video, where copies find zeros.
    pub(crate) fn nowhere(&self) -> Reg<'k, u32> {
        self.end & !((1 << TIME) - 1)
    }

    /// The spot of a tile, or of a block of text.
    pub(crate) fn corner(&self, block: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = self.k;
        let corner = k.var((block - self.tiles) * self.block + TEXT);
        k.if_(block.lt(self.tiles), || {
            let t = quotient(block, self.plane.inverse);
            let rest = block - t * self.plane.number;
            let h = quotient(rest, self.line.inverse);
            let w = rest - h * self.line.number;
            let sides = [TIME, HEIGHT, 0].map(|at| match at {
                TIME => self.tile & !((1 << TIME) - 1),
                at => self.tile & (SIDE << at),
            });
            corner.set(t * sides[0] + h * sides[1] + w * sides[2]);
        });
        corner
    }

    /// Takes the next box of a walk: its spot.
    pub(crate) fn take(&self, walk: Walk<'k>) -> Reg<'k, u32> {
        let Walk { corner, inner } = walk;
        let k = self.k;
        let spot = corner + inner;
        k.if_else(
            is_text(corner),
            || inner.set(inner + self.piece),
            || {
                // The next in time; at the end to the right, at the end of a row down.
                inner.set(inner + (time(self.unit) << TIME));
                k.if_(time(inner).equals(time(self.tile)), || {
                    inner.set((inner & ((1 << TIME) - 1)) + width(self.unit));
                    k.if_(width(inner).equals(width(self.tile)), || {
                        inner.set(inner + (self.unit & (SIDE << HEIGHT)) - width(self.tile));
                    });
                });
            },
        );
        spot
    }

    /// Whether a token is at a spot: of a box at a spot, whether it has any.
    pub(crate) fn is_inside(&self, spot: Reg<'k, u32>) -> Reg<'k, bool> {
        let video = time(spot).lt(time(self.end))
            & height(spot).lt(height(self.end))
            & width(spot).lt(width(self.end));
        // The time of a spot of the text is behind all of the video's.
        video | (is_text(spot) & row(spot).lt(self.text_len))
    }

    /// The spot of the token in a place of the order of tiles.
    pub(crate) fn spot(&self, place: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = self.k;
        let block = quotient(place >> self.piece.ilog2(), self.boxes);
        let token = place - block * self.block;
        let spot = self.corner(block);
        let inside = k.var(token);
        k.if_not(is_text(spot), || {
            let of_unit = self.of_unit(token & (self.piece - 1));
            inside.set(self.unit_at(token >> self.piece.ilog2()) + of_unit);
        });
        spot + inside
    }

    /// How far behind a box's spot its i-th token is.
    fn of_unit(&self, i: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = self.k;
        let low = |log: Reg<'k, u32>| (k.var(1u32) << log) - 1;
        let t = i >> (self.log_w + self.log_h);
        let h = (i >> self.log_w) & low(self.log_h);
        let w = i & low(self.log_w);
        (t << TIME) + (h << HEIGHT) + w
    }

    /// Which of a tensor's rows the i-th token of the box at a spot is, and whether it is one; nothing is
    /// one of a box that has none.
    pub(crate) fn token_of_box(
        &self,
        spot: Reg<'k, u32>,
        i: Reg<'k, u32>,
    ) -> (Reg<'k, u32>, Reg<'k, bool>) {
        let of_box = is_text(spot).select(i, self.of_unit(i));
        let (token, inside) = self.token_at(spot + of_box);
        (token, inside & self.is_inside(spot))
    }

    /// Which of a tensor's rows the token at a spot is, and whether there is one.
    fn token_at(&self, spot: Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, bool>) {
        (self.token(spot), self.is_inside(spot))
    }

    /// How far behind a tile's spot its n-th box is.
    fn unit_at(&self, n: Reg<'k, u32>) -> Reg<'k, u32> {
        let in_time = |extent: Reg<'k, u32>| extent & !((1 << TIME) - 1);
        // Boxes first go on in time, then to the right; at an end back by the tile's extent.
        let place = quotient(n, self.t_boxes);
        let h = quotient(place, self.w_boxes);
        n * in_time(self.unit) - place * in_time(self.tile)
            + (place << self.log_w)
            + h * ((self.unit & (SIDE << HEIGHT)) - width(self.tile))
    }

    /// The logarithm to base 2 of a box's time.
    fn log_t(&self) -> Reg<'k, u32> {
        self.k.var(self.piece.ilog2()) - self.log_w - self.log_h
    }

    /// The spot of the n-th box of a tile, or of a block of text, at a spot.
    pub(crate) fn nth_box(&self, corner: Reg<'k, u32>, n: Reg<'k, u32>) -> Reg<'k, u32> {
        let inside = self.unit_at(n);
        corner + is_text(corner).select(n * self.piece, inside)
    }

    /// Boxes of a tile, and of a block of text, with or without tokens.
    pub(crate) fn boxes_of_tile(&self) -> Reg<'k, u32> {
        self.block >> self.piece.ilog2()
    }

    /// Which token of the tensor is at a spot.
    pub(crate) fn token(&self, spot: Reg<'k, u32>) -> Reg<'k, u32> {
        let [h, w] = [height(self.end), width(self.end)];
        let token = (time(spot) * h + height(spot)) * w + width(spot);
        is_text(spot).select(row(spot) + time(self.end) * h * w, token)
    }

    /// Of a tile, or a block of text: boxes that have a token, and how much padding is attended.
    pub(crate) fn counts(&self, block: Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, u32>) {
        let k = self.k;
        let corner = self.corner(block);
        let keys = (self.text_len - row(corner)).min(self.block);
        let boxes = k.var((keys + (self.piece - 1)) / self.piece);
        let blank = k.var(0u32);
        k.if_not(is_text(corner), || {
            let inside = [time, height, width]
                .map(|along| (along(self.end) - along(corner)).min(along(self.tile)));
            let [t, h, w] = inside;
            let whole = |extent: Reg<'k, u32>, unit: Reg<'k, u32>, log: Reg<'k, u32>| {
                (extent + unit - 1) >> log
            };
            boxes.set(
                whole(t, time(self.unit), self.log_t())
                    * whole(h, height(self.unit), self.log_h)
                    * whole(w, width(self.unit), self.log_w),
            );
            blank.set((self.block - t * h * w) * self.attended);
        });
        (boxes, blank)
    }

    /// Which rows of a box are tokens: a bit each, in words of 32.
    pub(crate) fn bits(&self, spot: Reg<'k, u32>) -> Vec<Reg<'k, u32>> {
        let k = self.k;
        let all = k.var(match self.piece {
            64 => u64::MAX,
            piece => (1 << piece) - 1,
        });
        // The first so many, of up to 64, where there are fewer than a box has.
        let first = |tokens: Reg<'k, u32>, most: Reg<'k, u32>, times: Reg<'k, u64>| {
            k.if_(tokens.lt(most), || {
                let bits = (k.var(1u64) << tokens) - 1u64;
                all.set(all & (bits * times));
            });
        };
        k.if_else(
            is_text(spot),
            || {
                let piece = k.var(self.piece);
                first(self.text_len - row(spot), piece, k.var(1u64));
            },
            || {
                let left = |along: fn(Reg<'k, u32>) -> Reg<'k, u32>| along(self.end) - along(spot);
                let (w, h, t) = (
                    width(self.unit),
                    height(self.unit) << self.log_w,
                    k.var(self.piece),
                );
                first(left(width).min(w), w, self.rows);
                first(left(height).min(SIDE) << self.log_w, h, self.planes);
                let log_plane = self.log_w + self.log_h;
                first(left(time).min(64) << log_plane, t, k.var(1u64));
            },
        );
        let words = [all.to_u32(), (all >> 32).to_u32()];
        words[..self.piece.div_ceil(32) as usize].to_vec()
    }

    /// What copies add to the scores of a token.
    pub(crate) fn weight(&self, spot: Reg<'k, u32>) -> Reg<'k, f32> {
        self.heavy_row(spot).equals(0).select(self.weight, 0f32)
    }

    /// Adds to a tile of scores what copies of the key of one of its columns do.
    pub(crate) fn weigh(&self, scores: &RegTile<'k>, column: Reg<'k, u32>, lane: Reg<'k, u32>) {
        scores.add_to_column(column, lane, self.weight);
    }

    /// Which row of a piece is the one that has a weight: if it is in this piece, less than its rows.
    pub(crate) fn heavy_row(&self, spot: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = self.k;
        is_text(spot).select(k.var(self.heavy) - row(spot), u32::MAX)
    }

    /// The spot of the piece that a lane copies, of a tile of so many rows: those behind have the last's.
    pub(crate) fn spot_of_lane(&self, spots: Address<'k, u32>, rows: u32) -> Reg<'k, u32> {
        let lane = self.k.lane().min(rows / self.piece - 1);
        self.k.load_shared(spots.plus(lane * 4))
    }

    /// Of pieces, at most 16, of which each lane of a warp has one's spot: which make stacks.
    pub(crate) fn stacks(&self, spot: Reg<'k, u32>, pieces: u32) -> Stacks<'k> {
        let k = self.k;
        let is_piece = k.lane().lt(pieces);
        let stack = time(self.tile) >> self.log_t();
        let more = stack.gt(MOST_STACKED).select(0u32, stack - 1);
        let all_more = (k.var(1u32) << more) - 1;
        let step = self.unit & !((1 << TIME) - 1);
        let follows = is_piece & spot.equals(spot.from_lane_below(1) + step);
        let in_time = time(spot) >> self.log_t();
        let starts = in_time.equals(quotient(in_time, self.t_boxes) * stack);
        let next = (follows.ballot() >> (k.lane() + 1)) & all_more;
        let firsts = (is_piece & starts & next.equals(all_more)).ballot();
        let before = ((firsts << more) >> k.lane()) & all_more;
        let others = (is_piece & before.differs(0)).ballot();
        Stacks(firsts | (others << 16))
    }

    /// Has a tile filled with the pieces of which each lane of a warp has one's spot: it copies that one,
    /// or, of keys, its stack, or none.
    pub(crate) fn fill(
        &self,
        (tile, full): (SharedTile<'k>, Barrier<'k>),
        maps: Maps<'k>,
        spot: Reg<'k, u32>,
        stacks: Option<Stacks<'k>>,
        line: [Reg<'k, u32>; 2],
    ) {
        let k = self.k;
        k.if_(k.lane().equals(0), || {
            full.arrive_expect(tile.shape.bytes())
        });
        k.warp_sync();
        let is_piece = k.lane().lt(tile.shape.rows / self.piece);
        let part = || tile.part(k.lane(), self.piece);
        match stacks {
            None => k.if_(is_piece, || self.load(part(), maps, spot, line, full)),
            Some(stacks) => k.if_(is_piece & !stacks.has_other(k.lane()), || {
                k.if_else(
                    stacks.has_first(k.lane()) & !is_text(spot),
                    || self.copy(part(), maps.stacks(), at(spot), maps.line(line), full),
                    || self.load(part(), maps, spot, line, full),
                );
            }),
        }
    }

    /// Has a piece loaded.
    pub(crate) fn load(
        &self,
        tile: SharedTile<'k>,
        maps: Maps<'k>,
        spot: Reg<'k, u32>,
        [head, batch]: [Reg<'k, u32>; 2],
        full: Barrier<'k>,
    ) {
        let line = maps.line([head, batch]);
        let none = Operand::Imm(0);
        // Two forms of one copy, as a map that is chosen at run time takes more registers.
        self.k.if_else(
            is_text(spot),
            || {
                self.copy(
                    tile,
                    maps.text,
                    [row(spot).operand(), none, none],
                    line,
                    full,
                )
            },
            || self.copy(tile, maps.video, at(spot), line, full),
        );
    }

    /// Has all panels of a piece, or of a stack of them, copied.
    fn copy(
        &self,
        tile: SharedTile<'k>,
        map: Reg<'k, u64>,
        [a, b, c]: [Operand; 3],
        line: Reg<'k, u32>,
        full: Barrier<'k>,
    ) {
        for panel in 0..tile.shape.panels() {
            let column = Operand::Imm((panel * tile.shape.panel_columns()).into());
            tile.load_panel(panel, map, [column, a, b, c, line.operand()], full);
        }
    }
}

/// Coordinates of a spot.
fn at(spot: Reg<'_, u32>) -> [Operand; 3] {
    [width(spot), height(spot), time(spot)].map(|axis| axis.operand())
}

/// Which pieces of a tile of keys are copied as one, since they are boxes one behind the other in time: a
/// bit for each that is the first of a stack; 16 bits higher, for each other.
#[derive(Clone, Copy)]
pub(crate) struct Stacks<'k>(pub(crate) Reg<'k, u32>);

impl<'k> Stacks<'k> {
    fn has_first(self, piece: Reg<'k, u32>) -> Reg<'k, bool> {
        ((self.0 >> piece) & 1).differs(0)
    }

    fn has_other(self, piece: Reg<'k, u32>) -> Reg<'k, bool> {
        ((self.0 >> (piece + 16)) & 1).differs(0)
    }
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
