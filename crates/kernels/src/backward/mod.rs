//! Attention backward: dq, dk and dv of the key blocks that a plan lists, from the forward's lse.
//!
//! Three launches, or four: [`prepare`] makes of the lse and of `rowsum(dout * out)` what the main kernel
//! reads, and zeros to which it adds;
//! the main kernel keeps 128 keys, with their dk and dv in registers, and walks the queries that see
//! them (FlashAttention-2, arXiv 2307.08691, algorithm 2, keys outermost), adding to dq in float32;
//! [`finish`] rounds dq. The workspace is made of three arrays, or four, see [`Workspace`].
//!
//! dq's sums are made in any order, and repeat but for rounding. Deterministic kernels add integers
//! instead, whose sums have no order (fixed-point accumulation, as in S. Le Grand, A. W. Goetz, R. C.
//! Walker, Computer Physics Communications 184 (2013) 374): [`bounds`] goes before, [`prepare`] makes of
//! it how fine each query's integers can be.
//!
//! - [`bounds`], [`prepare`], [`finish`]: what comes before and after;
//! - `kernel`: what is in the main kernel's shared memory, and its loader;
//! - `consume`, `apart`, `reduce`: what its consumers do, where both want all tiles and where not, and
//!   its reducers;
//! - `queries`: the pieces of the lists of query blocks, one after the other;
//! - here: configs, arguments, launches. Called by `flex-block-attn`.

mod apart;
pub mod bounds;
mod consume;
pub mod finish;
mod kernel;
pub mod prepare;
mod queries;
mod reduce;

use flex_block_attn_mask::{PlanLayout, Side};
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch};
use flex_block_attn_tile::{Shape, WARPGROUP};

use crate::canvas::{self, Canvas};
use crate::chunk;
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
/// contiguous; float32, but for sums of integers.
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

    /// Queries of a tile: each consumer makes a unit of its dq.
    fn queries(self) -> u32 {
        2 * UNIT * UNIT / self.head_dim
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
        // A tile of keys of one block comes when its list's length says; others as they lie.
        let tiles = match call.kv_block.is_multiple_of(KEYS) {
            true => call.kv_block / KEYS,
            false => 0,
        };
        let key_tiles = match tiles {
            0 => call.kv_len.div_ceil(KEYS),
            tiles => layout.columns() as u32 * tiles,
        };
        let rows = layout.rows() as u32;
        let window = (args.window / call.q_block).min(rows);
        // An empty list has as many entries as none that is spread.
        let window = match tiles > 0 && rows >= FEWEST_SPREAD {
            true => window,
            false => 0,
        };
        assert_eq!(self.canvas, args.canvas.is_some(), "{self:?}");
        let [of_q, of_kv] = [(of_q, call.heads), (of_kv, call.kv_heads)];
        type Rows = fn(Shape, Tensor, [u64; 4]) -> Arg;
        let source = |rows: Rows, shape, tensor, (extents, heads)| match args.canvas {
            None => vec![rows(shape, tensor, extents)],
            Some(canvas) => canvas.source(self.piece_shape(), tensor, [heads, call.batch]),
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
            Arg::U32(tiles),
            Arg::U32(call.q_len),
            Arg::U32(call.kv_len),
            Arg::U32(call.q_block),
            Arg::U32(call.kv_block),
            Arg::U32(call.heads),
            Arg::U32(call.heads / call.kv_heads),
            Arg::U32(workspace.line as u32),
            Arg::U32(workspace.units as u32),
            Arg::U32(if window > 0 { rows } else { 0 }),
            Arg::U32(window),
        ]);
        list.extend(lists::args(args.plan, layout, Side::Columns));
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
            grid: [key_tiles, call.kv_heads, call.batch],
            args: list,
        }
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
