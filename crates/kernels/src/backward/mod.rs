//! Attention backward: dq, dk and dv of the key blocks that a plan lists, from the forward's lse.
//!
//! Three launches, up to five: [`prepare`] makes of the lse and of `rowsum(dout * out)` what the main
//! kernel reads, and zeros to which it adds;
//! the main kernel keeps 128 keys, with their dk and dv in registers, and walks the queries that see
//! them (FlashAttention-2, arXiv 2307.08691, algorithm 2, keys outermost), adding to dq in float32;
//! [`finish`] rounds dq. The workspace is made of three arrays, up to five, see [`Workspace`].
//!
//! Of a launch of few tiles of keys some are computed in parts, a thread block for each: [`cut`] says
//! which. A part walks a share of each list and leaves its dk and dv, rounded to 16 bits; [`join`] adds a
//! tile's in float32 and rounds once more. Always in the same order: dk and dv repeat to the last bit.
//!
//! dq's sums are made in any order, and repeat but for rounding. Deterministic kernels add integers
//! instead, whose sums have no order (fixed-point accumulation, as in S. Le Grand, A. W. Goetz, R. C.
//! Walker, Computer Physics Communications 184 (2013) 374): [`bounds`] goes before, [`prepare`] makes of
//! it how fine each query's integers can be.
//!
//! - [`bounds`], [`prepare`], [`join`], [`finish`]: what comes before and after;
//! - `kernel`: what is in the main kernel's shared memory, and its loader;
//! - `consume`, `apart`, `reduce`: what its consumers do, where both want all tiles and where not, and
//!   its reducers;
//! - `tiles`: which keys a thread block has, and which part of their lists;
//! - `queries`: the pieces of these lists of query blocks, one after the other;
//! - here: configs, arguments, launches. Called by `flex-block-attn`.

mod apart;
pub mod bounds;
mod consume;
pub mod finish;
pub mod join;
mod kernel;
pub mod prepare;
mod queries;
mod reduce;
mod tiles;

use flex_block_attn_mask::{Extents, PlanLayout, Side};
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch};
use flex_block_attn_tile::{Shape, WARPGROUP};

use crate::canvas::{self, Boxes, Canvas};
use crate::chunk;
use crate::cut::{Cut, InParts, Pass};
use crate::exact::{Mask, Table};
use crate::forward::{self, Tensor};
use crate::lists::{self, Call, panels, whole};

/// Keys of a thread block.
const KEYS: u32 = 128;
/// Keys of a warpgroup.
const OWN: u32 = 64;
/// Columns of a unit, which is what a consumer makes of a tile's dq, and of a panel of dq's sums.
/// Queries of a line are counted in as many.
const UNIT: u32 = 64;
/// Bytes of a query's numbers in a panel of sums, and of eight queries'.
const ROW_BYTES: u32 = 4 * UNIT;
const EIGHT_BYTES: u32 = 8 * ROW_BYTES;

/// Head dimensions and pieces of videos.
const BOXES: [(u32, u32); 2] = [(64, 64), (128, 64)];

/// Entries of a list at least that thread blocks start at different places of.
const FEWEST_SPREAD: u32 = 16;
/// What [`Args::window`] is chosen to be.
pub const WINDOW: u32 = 8192;

/// What the main kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns of q, k and v: 64 or 128.
    pub head_dim: u32,
    /// Queries of a piece, which divides the mask's query blocks: 64, 32 or 16.
    pub piece: u32,
    /// Whether dq is the same to the last bit each time, as dk and dv always are.
    pub deterministic: bool,
    /// Whether a tile of keys is of several blocks: consumers leave out what their own do not see.
    pub apart: bool,
    /// What counts of partial blocks, if there may be any.
    pub mask: Option<Mask>,
    /// Whether tokens are a video's, with text behind, and pieces boxes of it.
    pub canvas: bool,
}

/// The arrays between the launches: lse, deltas, perhaps steps, and dq's sums, each (batch, heads, ...),
/// contiguous; float32, but for sums of integers. ([`slot_numbers`] says how large another is.)
///
/// dq's sums lie in panels of 64 columns, and in them as the products leave them, see [`finish`]; the
/// numbers of queries lie as the main kernel's threads have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workspace {
    /// Numbers of a line of the first ones: queries in whole units, and one unit more.
    pub line: usize,
    /// Units of 64 queries in a line of the last.
    pub units: usize,
}

impl Workspace {
    /// For so many queries.
    pub fn new(q_len: usize) -> Self {
        let units = q_len.div_ceil(UNIT as usize);
        Self {
            line: (units + 1) * UNIT as usize,
            units,
        }
    }
}

/// Which tiles of keys are computed in parts, on so many multiprocessors; of a video none is. No answer
/// for more tiles than 32 bits count.
pub fn cut(
    extents: Extents,
    [batch, heads, kv_heads, head_dim]: [usize; 4],
    multiprocessors: u32,
) -> Option<Cut> {
    let [kv_len, kv_block] = [extents.kv_len(), extents.kv_block()].map(|n| n as u32);
    let lines = kv_heads.checked_mul(batch)?;
    let tiles = (tiles::of_head(kv_len, kv_block) as usize).checked_mul(lines)?;
    let tiles = u32::try_from(tiles).ok()?;
    if !matches!(head_dim, 64 | 128) || kv_heads == 0 {
        return Some(Cut::none(tiles));
    }
    let rows = u32::try_from(extents.q_blocks()).ok()?;
    let walked = extents.q_len().div_ceil(queries(head_dim as u32) as usize);
    let steps = u32::try_from(walked.checked_mul(heads / kv_heads)?).ok()?;
    let pass = Pass::BACKWARD;
    Some(Cut::choose(pass, tiles, multiprocessors, rows, steps))
}

/// Numbers of 32 bits that the parts of a launch leave.
pub fn slot_numbers(cut: Cut, head_dim: usize) -> usize {
    // dk and dv, of 16 bits each.
    cut.slots() as usize * KEYS as usize * head_dim
}

/// Queries of a tile: each consumer makes a unit of its dq.
fn queries(head_dim: u32) -> u32 {
    2 * UNIT * UNIT / head_dim
}

/// What a launch of the main kernel gives it.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
    /// Gradient of the output.
    pub dout: Tensor,
    /// Gradient of k, to be written.
    pub dk: Tensor,
    /// Gradient of v, to be written.
    pub dv: Tensor,
    /// Address of the queries' lse times log2(e), [`Workspace::line`] of them for each head; inf for
    /// queries without keys and behind the last.
    pub lse: u64,
    /// Address of the queries' deltas, likewise; 0 for those.
    pub delta: u64,
    /// Address of dq's sums, for each head [`Workspace::units`] of 64 x head_dim: zeros, added to.
    pub dq: u64,
    /// Address of how many steps make 1, as those of lse and delta; read by deterministic kernels only.
    pub steps: u64,
    /// Queries among which thread blocks start that walk all: [`WINDOW`].
    pub window: u32,
    /// Address of the plan, int32, [`PlanLayout::words`] of them.
    pub plan: u64,
    /// What the plan is for, and where its arrays lie. Its blocks of queries are multiples of `piece`
    /// tokens.
    pub layout: PlanLayout,
    /// Batches.
    pub batch: u32,
    /// Heads of q.
    pub heads: u32,
    /// Heads of k and v: they divide those of q.
    pub kv_heads: u32,
    /// Factor of the scores.
    pub scale: f32,
    /// The tables that the mask looks up.
    pub tables: &'a [Table],
    /// Tiles of 128 keys that are computed in parts, by [`cut`] or another cut of as many tiles, in slots of
    /// [`slot_numbers`] of 32 bits; none of a video, or if there are none. [`join`] is launched behind it,
    /// then.
    pub in_parts: Option<InParts>,
    /// The video, as for the forward pass.
    pub canvas: Option<Canvas>,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for element in [Element::Bf16, Element::F16] {
            for head_dim in [64, 128] {
                for (deterministic, apart) in
                    [(false, false), (false, true), (true, false), (true, true)]
                {
                    all.extend([64, 32, 16].map(|piece| Self {
                        element,
                        head_dim,
                        piece,
                        deterministic,
                        apart,
                        mask: None,
                        canvas: false,
                    }));
                    // Tiles of a video are whole tiles of keys.
                    let boxes = BOXES.iter().filter(|of| of.0 == head_dim && !apart);
                    all.extend(boxes.map(|&(head_dim, piece)| Self {
                        element,
                        head_dim,
                        piece,
                        deterministic,
                        apart,
                        mask: None,
                        canvas: true,
                    }));
                }
            }
        }
        all
    }

    /// The config for a head dimension, blocks of so many queries and keys, and a mask's expression, if
    /// it has one; none if head_dim is neither 64 nor 128, or blocks are no
    /// multiples of 16.
    pub fn choose(
        element: Element,
        head_dim: u32,
        q_block: u32,
        kv_block: u32,
        mask: Option<Mask>,
        deterministic: bool,
    ) -> Option<Self> {
        let supported = matches!(head_dim, 64 | 128)
            && [q_block, kv_block]
                .iter()
                .all(|&block| block > 0 && block.is_multiple_of(16));
        let fits = |&piece: &u32| q_block.is_multiple_of(piece);
        let piece = [64, 32, 16].into_iter().find(fits).filter(|_| supported)?;
        Some(Self {
            element,
            head_dim,
            piece,
            deterministic,
            apart: !kv_block.is_multiple_of(KEYS),
            mask,
            canvas: false,
        })
    }

    /// The config for a head dimension and a video in tiles of so many tokens, likewise; none if
    /// head_dim is neither 64 nor 128, or the forward pass has none.
    pub fn choose_for_canvas(
        element: Element,
        head_dim: u32,
        block: u32,
        deterministic: bool,
    ) -> Option<Self> {
        forward::Config::choose_for_canvas(element, head_dim, block)?;
        // Boxes are its own: nothing that the forward pass leaves depends on them.
        let config = Self::choose(element, head_dim, block, block, None, deterministic)?;
        Some(Self {
            canvas: true,
            ..config
        })
    }

    /// Queries of a tile.
    fn queries(self) -> u32 {
        queries(self.head_dim)
    }

    /// Pieces of a tile.
    fn pieces(self) -> u32 {
        self.queries() / self.piece
    }

    fn kv_shape(self) -> Shape {
        Shape::new(KEYS, self.head_dim, self.element)
    }

    fn q_shape(self) -> Shape {
        Shape::new(self.queries(), self.head_dim, self.element)
    }

    fn piece_shape(self) -> Shape {
        Shape::new(self.piece, self.head_dim, self.element)
    }

    /// The main kernel's launch for some tensors.
    ///
    /// # Panics
    /// If blocks are not multiples of the piece, or the address or strides of dk or dv not of 16 bytes.
    pub fn launch(self, args: &Args<'_>) -> Launch {
        let layout = args.layout;
        let call = Call::new(
            layout,
            [args.batch, args.heads, args.kv_heads, self.head_dim],
        );
        assert!(
            call.kv_block.is_multiple_of(16) && call.q_block.is_multiple_of(self.piece),
            "blocks of {args:?} for {self:?}"
        );
        let workspace = Workspace::new(layout.extents.q_len());
        let (of_q, of_kv) = (call.of_q(), call.of_kv());
        let tiles = tiles::of_head(call.kv_len, call.kv_block) * call.kv_heads * call.batch;
        let cut = Cut::of(args.in_parts, tiles);
        assert!(cut.tiles == 0 || !self.canvas, "{args:?}");
        let rows = layout.rows() as u32;
        let window = (args.window / call.q_block).min(rows);
        // An empty list has as many entries as none that is spread.
        let window = match tiles::of_block(call.kv_block) > 0 && rows >= FEWEST_SPREAD {
            true => window,
            false => 0,
        };
        assert_eq!(self.canvas, args.canvas.is_some(), "{self:?}");
        let [of_q, of_kv] = [(of_q, call.heads), (of_kv, call.kv_heads)];
        type Rows = fn(Shape, Tensor, [u64; 4]) -> Arg;
        let source = |rows: Rows, shape, tensor, (extents, heads)| match args.canvas {
            None => vec![rows(shape, tensor, extents)],
            Some(canvas) => {
                let lines = [heads, call.batch];
                canvas.source(Boxes::Single, self.piece_shape(), tensor, lines)
            }
        };
        let of_queries = |tensor| {
            let mut maps = source(panels, self.piece_shape(), tensor, of_q);
            if !self.canvas {
                maps.push(whole(self.q_shape(), tensor, of_q.0));
            }
            maps
        };
        let mut list = [
            of_queries(args.q),
            of_queries(args.dout),
            source(whole, self.kv_shape(), args.k, of_kv),
            source(whole, self.kv_shape(), args.v, of_kv),
        ]
        .concat();
        list.extend([args.lse, args.delta, args.dq].map(Arg::U64));
        list.extend([args.dk, args.dv].map(chunk::args).concat());
        list.extend([
            Arg::F32(args.scale),
            Arg::U32(call.q_len),
            Arg::U32(call.kv_len),
            Arg::U32(call.q_block),
            Arg::U32(call.kv_block),
            Arg::U32(call.heads),
            Arg::U32(workspace.line as u32),
            Arg::U32(if window > 0 { rows } else { 0 }),
            Arg::U32(window),
        ]);
        list.extend(lists::args(args.plan, layout, Side::Columns));
        list.extend(tiles::args(call, cut, args));
        if let Some(canvas) = args.canvas {
            canvas.check(layout);
            let scale = args.scale.max(canvas::least_scale(true));
            list.extend(canvas.args(self.piece, scale));
        }
        list.extend(self.mask.map_or(vec![], |mask| mask.args(args.tables)));
        if self.deterministic {
            list.push(Arg::U64(args.steps));
        }
        Launch {
            grid: [cut.jobs(), 1, 1],
            args: list,
        }
    }

    /// The launch that follows where tiles are computed in parts.
    pub fn join(self, args: &Args<'_>) -> Option<(join::Config, Launch)> {
        let config = join::Config {
            element: self.element,
            head_dim: self.head_dim,
            parts: args.in_parts?.cut.parts,
        };
        Some((config, config.launch(args)))
    }

    /// The main kernel.
    pub fn kernel(self) -> Kernel {
        let Self {
            element,
            head_dim,
            piece,
            deterministic,
            apart,
            mask,
            canvas,
        } = self;
        let mut name = format!("backward_{element:?}_d{head_dim}_p{piece}").to_lowercase();
        if apart {
            name += "_apart";
        }
        if deterministic {
            name += "_deterministic";
        }
        name += &mask.map(Mask::tag).unwrap_or_default();
        if canvas {
            name += "_canvas";
        }
        Builder::kernel(name, 3 * WARPGROUP, |k| self.body(k))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_of_few_heads_are_cut() {
        let of = |len, block, [heads, kv_heads]: [usize; 2]| {
            let extents = Extents::new(len, len, block, block).expect("multiples of 16");
            cut(extents, [1, heads, kv_heads, 128], 132).expect("few tiles")
        };
        let parts = |whole, tiles, parts| Cut {
            whole,
            tiles,
            parts,
        };
        assert_eq!(of(11_520, 128, [1, 1]), parts(0, 90, 4));
        assert_eq!(of(19_200, 128, [1, 1]), parts(132, 18, 7));
        // Heads of q that share keys have no tiles of their own, but lists.
        assert_eq!(of(11_520, 128, [4, 1]), parts(0, 90, 7));
        assert_eq!(of(15_360, 128, [24, 24]), Cut::none(2880));
        // The last block is counted whole, unless tiles are of several.
        assert_eq!(of(300, 256, [1, 1]), Cut::none(4));
        assert_eq!(of(300, 64, [1, 1]), Cut::none(3));
    }

    #[test]
    fn what_kernels_do_not_take_is_not_cut() {
        let extents = Extents::new(5000, 5000, 128, 128).expect("multiples of 16");
        let of = |shape, multiprocessors| cut(extents, shape, multiprocessors);
        assert_eq!(of([1, 1, 1, 96], 132), Some(Cut::none(40)));
        assert_eq!(of([1, 1, 1, 128], 0), Some(Cut::none(40)));
        assert_eq!(of([1, 1, 0, 128], 132), Some(Cut::none(0)));
        assert_eq!(of([1 << 20, 1, 1 << 20, 128], 132), None);
    }
}
