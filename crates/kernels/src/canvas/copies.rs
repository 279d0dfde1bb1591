//! How a video's boxes are copied: [`Source`], where copies find a tensor's pieces, [`Stacks`], which of
//! these go together, and what fills a tile of shared memory with them.

use flex_block_attn_ptx::builder::{Address, Value};
use flex_block_attn_ptx::ir::Operand;
use flex_block_attn_ptx::{Arg, Builder, Reg, Swizzle, TensorMap};
use flex_block_attn_tile::{Barrier, MATRIX_AXES, Shape, SharedTile};

use super::grid::{Grid, quotient};
use super::{Canvas, MOST_STACKED, TIMES, height, is_text, row, time, width};
use crate::forward::Tensor;

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

impl Canvas {
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

impl<'k> Grid<'k> {
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
        let step = self.unit & TIMES;
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
        line: [Reg<'k, u32>; 2],
        full: Barrier<'k>,
    ) {
        let line = maps.line(line);
        let row = || [row(spot).operand(), Operand::Imm(0), Operand::Imm(0)];
        // Two forms of one copy, as a map that is chosen at run time takes more registers.
        self.k.if_else(
            is_text(spot),
            || self.copy(tile, maps.text, row(), line, full),
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
