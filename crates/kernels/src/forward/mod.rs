//! Attention forward: `out = softmax(scale q k^T) v` over the key blocks that a plan lists for each
//! block of queries, and the logarithm of each row's sum.
//!
//! A thread block has 128 or 192 queries at a time, warpgroups of 64 with all of their softmax in
//! registers, and a producer that streams tiles of k and v. Of each warpgroup one product is always
//! in flight while it computes the softmax of the one before (FlashAttention-3, arXiv 2407.08608):
//! the product with v trails that with k by one tile. Named barriers let the warpgroups take turns
//! at the tensor cores, so that one's softmax lies under the other's products.
//!
//! Thread blocks stay, one for each multiprocessor, and take the next tile of queries when they are
//! done with one, without a pause: the next queries take the place of the last as soon as these are
//! multiplied with their last keys, and their first scores are under way while the output of the last is
//! stored. Heads come in turn, so that those who run together share keys in the L2 cache, and of a
//! head, and of the last few together, the longest lists first.
//!
//! A tile of keys is put together from pieces of the listed blocks: it needs not be a block, nor a
//! part of one. The order of keys does not matter to the sum, so lists are walked from their end,
//! where the sequence's last and perhaps short block stands: only the first tile can have columns
//! that are no keys.
//!
//! Where two tiles of queries have one list, since they are of one block, two thread blocks share tiles of
//! keys: half of the bytes from the L2 cache, and of the power that they take.
//!
//! - `kernel`: what loader and consumers do;
//! - `mixed`: what they do if a tile's queries are of several blocks;
//! - `problem`: the parameters, and how the problem is cut into tiles of queries;
//! - `work`: the planner, who looks up the next tile of queries;
//! - `board`: who takes it for a pair of thread blocks;
//! - `keys`: the pieces of a list of key blocks, one after the other;
//! - `tiles`: what is different for the tiles of a video;
//! - `walk`: which boxes of them each tile of keys is put together from;
//! - `queries`: the tile of queries, and what is known of it;
//! - `output`: what becomes of it;
//! - `softmax`: the running softmax;
//! - `parts`: tiles that are computed in parts, where there are few; `join`: the kernel that puts these
//!   together;
//! - `choose`: which config computes what;
//! - here: configs, arguments, launches. Called by `flex-block-attn`.

mod board;
mod choose;
pub mod join;
mod kernel;
mod keys;
mod mixed;
mod output;
mod parts;
mod problem;
mod queries;
mod softmax;
mod tiles;
mod walk;
mod work;

use flex_block_attn_mask::{PlanLayout, Side};
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch};
use flex_block_attn_tile::{Shape, Strides, WARPGROUP};

use crate::canvas::{self, Boxes, Canvas};
use crate::cut::{Cut, InParts, Pass};
use crate::exact::{Mask, Table};
use crate::lists::{self, Call, panels, whole};

/// Queries of a warpgroup.
const OWN: u32 = 64;

/// What the kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns of q, k and v: 64 or 128.
    pub head_dim: u32,
    /// A tile's queries, and whether they are of one block.
    pub rows: Rows,
    /// Keys of a tile: 128 or 192; for mixed rows, and pairs of tiles of 192 queries, 64.
    pub kv_tile: u32,
    /// Keys of a piece: what divides both the tile and the mask's key blocks.
    pub piece: u32,
    /// What counts of partial blocks, if there may be any.
    pub mask: Option<Mask>,
    /// Whether tokens are a video's, with text behind, and pieces boxes of it.
    pub canvas: bool,
}

/// What blocks of queries the tiles of queries are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rows {
    /// Multiples of a tile, of so many queries, 128 or 192: it is in one block.
    Whole(u32),
    /// Any multiples of 16: a tile, of 192 queries, is of several blocks.
    Mixed,
    /// Multiples of two tiles, of so many queries, 128 or 192, or any if all lists are the same: two thread
    /// blocks, a cluster, have two tiles of one list at a time, and share tiles of keys, of which each copies
    /// a half to both.
    Pairs(u32),
}

/// A (batch, heads, tokens, head_dim) tensor in global memory.
#[derive(Debug, Clone, Copy)]
pub struct Tensor {
    /// Its address, a multiple of 16.
    pub address: u64,
    /// Elements from one index to the next; multiples of 8.
    pub strides: Strides,
}

/// What a launch gives it.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
    /// Output.
    pub out: Tensor,
    /// Address of the logarithms of the rows' sums, float32 (batch, heads, q_len), contiguous; none if
    /// they are not wanted.
    pub lse: Option<u64>,
    /// Address of the plan, int32, [`PlanLayout::words`] of them.
    pub plan: u64,
    /// What the plan is for, and where its arrays lie. Its blocks are what [`Config::takes`].
    pub layout: PlanLayout,
    /// Whether all rows of a head are known to have one list, as those of a dense mask: then pairs are of
    /// the whole head. False is always right.
    pub alike: bool,
    /// Batches, up to 65535.
    pub batch: u32,
    /// Heads of q, up to 65535.
    pub heads: u32,
    /// Heads of k and v: they divide those of q.
    pub kv_heads: u32,
    /// Factor of the scores: not negative.
    pub scale: f32,
    /// Address of an int32 that is 0 at the start of the launch, and belongs to it until it ends; then
    /// it is 0 again.
    pub counter: u64,
    /// Thread blocks at most: the device's multiprocessors; of pairs at least two.
    pub blocks: u32,
    /// Tiles that are computed in parts, by [`Config::cut`] or another cut of as many tiles, in slots of
    /// [`Config::slot_bytes`]; none if there are none. [`Config::join`] is launched behind it, then.
    pub in_parts: Option<InParts>,
    /// The tables that the mask looks up.
    pub tables: &'a [Table],
    /// The video, whose tiles are the mask's blocks, of queries and of keys: the plan is in the order of
    /// tiles, padding included; tensors and the lse are in that of tokens, the lse with room for padding
    /// behind.
    pub canvas: Option<Canvas>,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        let of_both = [
            (Rows::Whole(128), 192, 192),
            (Rows::Whole(128), 192, 64),
            (Rows::Whole(128), 128, 32),
            (Rows::Whole(128), 128, 16),
            (Rows::Mixed, 64, 64),
            (Rows::Mixed, 64, 32),
            (Rows::Mixed, 64, 16),
        ];
        // Whole rows leave registers for three consumers with short heads only.
        let of_short_heads = [128, 64, 32, 16].map(|piece| (Rows::Whole(192), 128, piece));
        let pairs = [(128, 192, 192), (128, 192, 64), (192, 64, 64)]
            .map(|(queries, kv_tile, piece)| (Rows::Pairs(queries), kv_tile, piece));
        let of = |element, head_dim| {
            let more = match head_dim {
                64 => &of_short_heads[..],
                _ => &pairs,
            };
            let config = move |&(rows, kv_tile, piece)| Self {
                element,
                head_dim,
                rows,
                kv_tile,
                piece,
                mask: None,
                canvas: false,
            };
            let rows = of_both.iter().chain(more).map(config);
            rows.chain(Self::all_of_canvases(element, head_dim))
        };
        let both = |element| of(element, 64).chain(of(element, 128));
        both(Element::Bf16).chain(both(Element::F16)).collect()
    }

    /// Queries of a tile.
    fn queries(self) -> u32 {
        match self.rows {
            Rows::Whole(queries) | Rows::Pairs(queries) => queries,
            Rows::Mixed => mixed::QUERIES,
        }
    }

    /// Warpgroups that multiply.
    fn consumers(self) -> u32 {
        self.queries() / OWN
    }

    fn q_shape(self) -> Shape {
        Shape::new(self.queries(), self.head_dim, self.element)
    }

    fn kv_shape(self) -> Shape {
        Shape::new(self.kv_tile, self.head_dim, self.element)
    }

    fn piece_shape(self) -> Shape {
        Shape::new(self.piece, self.head_dim, self.element)
    }

    /// Pieces of a tile.
    fn pieces(self) -> u32 {
        self.kv_tile / self.piece
    }

    /// Registers that the producer and each of the consumers have: together at most 504 with two
    /// consumers, 512 with three.
    fn registers(self) -> (u32, u32) {
        match self.consumers() {
            3 => (32, 160),
            _ if self.kv_tile == 192 && self.head_dim == 128 => (24, 240),
            _ => (40, 232),
        }
    }

    /// The launch for some tensors.
    ///
    /// # Panics
    /// If blocks are not multiples of the tile of queries and the piece, or there is nothing to
    /// compute.
    pub fn launch(self, args: &Args<'_>) -> Launch {
        let layout = args.layout;
        let call = Call::new(
            layout,
            [args.batch, args.heads, args.kv_heads, self.head_dim],
        );
        assert!(
            self.takes(self.q_block(args), call.kv_block),
            "blocks of {args:?} for {self:?}"
        );
        assert_eq!(self.canvas, args.canvas.is_some(), "{self:?}");
        let of = |heads| [heads, call.batch];
        let kv = |tensor| {
            if let Some(canvas) = args.canvas {
                let lines = of(call.kv_heads);
                return canvas.source(Boxes::Stacked, self.piece_shape(), tensor, lines);
            }
            // A piece that is a whole tile comes by one copy.
            let one = self.pieces() == 1 && matches!(self.rows, Rows::Whole(_));
            let map = if one { whole } else { panels };
            vec![map(self.piece_shape(), tensor, call.of_kv())]
        };
        let q = |rows: fn(Shape, Tensor, [u64; 4]) -> Arg, shape, tensor| match args.canvas {
            None => vec![rows(shape, tensor, call.of_q())],
            Some(canvas) => {
                canvas.source(Boxes::Single, self.piece_shape(), tensor, of(call.heads))
            }
        };
        let mut list = q(whole, self.q_shape(), args.q);
        list.extend(kv(args.k));
        list.extend(kv(args.v));
        list.extend(output::args(args));
        list.extend(self.numbers(args));
        if let Some(canvas) = args.canvas {
            canvas.check(layout);
            list.extend(canvas.args(self.piece, self.scale(args)));
        }
        list.extend(self.mask.map_or(vec![], |mask| mask.args(args.tables)));
        Launch {
            grid: [self.thread_blocks(args), 1, 1],
            args: list,
        }
    }

    /// Thread blocks of a launch.
    fn thread_blocks(self, args: &Args<'_>) -> u32 {
        let jobs = self.cut_of(args).jobs();
        let takers = jobs.min(self.takers(args.blocks));
        match self.rows {
            Rows::Whole(_) | Rows::Mixed => takers,
            Rows::Pairs(_) => 2 * takers,
        }
    }

    /// Who takes jobs, on so many multiprocessors.
    fn takers(self, blocks: u32) -> u32 {
        match self.rows {
            Rows::Whole(_) | Rows::Mixed => blocks,
            Rows::Pairs(_) => (blocks / 2).max(1),
        }
    }

    /// Which tiles to compute in parts, for so many heads of all batches on so many multiprocessors.
    pub fn cut(self, layout: PlanLayout, lines: u32, blocks: u32) -> Cut {
        let tiles = lines * self.jobs_of_head(layout, false);
        match self.has_parts() {
            true => {
                let entries = layout.columns() as u32;
                Cut::choose(Pass::FORWARD, tiles, blocks, entries, self.steps(layout))
            }
            false => Cut::none(tiles),
        }
    }

    /// Tiles of keys, of all of them.
    fn steps(self, layout: PlanLayout) -> u32 {
        (layout.extents.kv_len() as u32).div_ceil(self.kv_tile)
    }

    /// The launch that follows where tiles are computed in parts.
    pub fn join(self, args: &Args<'_>) -> Option<(join::Config, Launch)> {
        let in_parts = args.in_parts?;
        let config = join::Config {
            element: self.element,
            head_dim: self.head_dim,
            queries: self.queries(),
            parts: in_parts.cut.parts,
        };
        Some((config, config.launch(args, in_parts)))
    }

    fn cut_of(self, args: &Args<'_>) -> Cut {
        let tiles = args.batch * args.heads * self.jobs_of_head(args.layout, args.alike);
        let cut = Cut::of(args.in_parts, tiles);
        assert!(cut.tiles == 0 || self.has_parts(), "{cut:?} for {self:?}");
        cut
    }

    /// Tiles of queries of a head, or pairs of them.
    fn jobs_of_head(self, layout: PlanLayout, alike: bool) -> u32 {
        let (q_len, q_block) = (layout.extents.q_len(), layout.extents.q_block());
        let job = self.queries_of_job();
        let by_blocks = match self.rows {
            Rows::Whole(_) => true,
            Rows::Pairs(_) => !alike,
            Rows::Mixed => false,
        };
        match by_blocks {
            true => layout.rows() as u32 * (q_block as u32 / job),
            false => (q_len as u32).div_ceil(job),
        }
    }

    /// Queries of a tile, or of a pair of them.
    fn queries_of_job(self) -> u32 {
        match self.rows {
            Rows::Whole(_) | Rows::Mixed => self.queries(),
            Rows::Pairs(queries) => 2 * queries,
        }
    }

    /// Queries of a block: where all rows are alike a head is one.
    fn q_block(self, args: &Args<'_>) -> u32 {
        match self.rows {
            Rows::Pairs(_) if args.alike => {
                self.jobs_of_head(args.layout, true) * self.queries_of_job()
            }
            _ => args.layout.extents.q_block() as u32,
        }
    }

    /// Masked scores are -inf, of which 0 times would be NaN. With this scale, too, all keys have the
    /// same weight.
    fn scale(self, args: &Args<'_>) -> f32 {
        args.scale.max(canvas::least_scale(self.canvas))
    }

    /// The arguments for [`problem::Problem::new`], but for what a video or a mask has besides.
    fn numbers(self, args: &Args<'_>) -> Vec<Arg> {
        let layout = args.layout;
        let call = Call::new(
            layout,
            [args.batch, args.heads, args.kv_heads, self.head_dim],
        );
        let of_head = self.jobs_of_head(layout, args.alike);
        let lines = call.batch * call.heads;
        // Enough to fill the multiprocessors twice; keys of more do not fit into the L2 cache.
        let together = (2 * self.takers(args.blocks))
            .div_ceil(of_head)
            .clamp(1, lines);
        let cut = self.cut_of(args);
        let mut list = vec![
            Arg::U32(call.heads),
            Arg::U32(call.q_len),
            Arg::F32(self.scale(args) * std::f32::consts::LOG2_E),
            Arg::U32(call.kv_len),
            Arg::U32(call.kv_block),
            Arg::U64(args.counter),
            Arg::U32(cut.jobs()),
            Arg::U32((lines - together) * of_head),
            Arg::U32(together),
            Arg::U32(of_head),
            Arg::U32(self.q_block(args)),
            Arg::U32(call.heads / call.kv_heads),
        ];
        if self.has_parts() {
            let slots = args.in_parts.map_or(0, |of| of.slots);
            list.extend(parts::args(self, cut, slots));
        }
        list.extend(lists::args(args.plan, layout, Side::Rows));
        list
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        let Self {
            element,
            head_dim,
            rows,
            kv_tile,
            piece,
            mask,
            canvas,
        } = self;
        let tile = match rows {
            Rows::Whole(queries) => format!("q{queries}_kv{kv_tile}"),
            Rows::Mixed => "mixed".to_owned(),
            Rows::Pairs(queries) => format!("pairs{queries}_kv{kv_tile}"),
        };
        let tag = mask.map(Mask::tag).unwrap_or_default();
        let of = if canvas { "_canvas" } else { "" };
        let name = format!("forward_{element:?}_d{head_dim}_{tile}_p{piece}{tag}{of}");
        let threads = (1 + self.consumers()) * WARPGROUP;
        Builder::kernel(name.to_lowercase(), threads, |k| match rows {
            Rows::Whole(_) => self.body(k),
            Rows::Pairs(_) => {
                k.set_cluster(2);
                self.body(k);
            }
            Rows::Mixed => self.mixed_body(k),
        })
    }
}
