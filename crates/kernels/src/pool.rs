//! Means over tiles of tokens: what a dynamic mask is chosen from. Queries and keys take one launch.
//!
//! A tensor's tokens lie in (time, height, width) order, and a tile is a box of them; those at the borders
//! have the tokens that there are, or zeros besides, as the caller says. Blocks of a plain sequence are
//! tiles of a video of one frame and one line; tokens in tile order are such a sequence. Means are rounded
//! to the tensor's own type: models were trained so, and a choice among close scores depends on it.
//!
//! Bound by memory. A tile belongs to as many warps as keep four loads of 16 bytes under way in each
//! thread; a thread block has eight warps, so several tiles if these are short. Heads come before tiles:
//! where a token's heads are neighbours in memory, thread blocks that run together read what lies together.
//! Called by `flex-block-attn`.

use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg};

use crate::canvas::{MOST_BOXES, inverse, quotient};
use crate::chunk::{self, CHUNK, Heads, Lanes};
use crate::forward::Tensor;

const WARPS: u32 = 8;
const THREADS: u32 = 32 * WARPS;
/// Loads of a thread that are under way together.
const DEPTH: usize = 4;

/// What the kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns: 64 or 128.
    pub head_dim: u32,
}

/// What a launch gives it.
#[derive(Debug, Clone, Copy)]
pub struct Args {
    /// What is pooled; the second may have no heads.
    pub tensors: [Pooled; 2],
    /// Batches.
    pub batch: u32,
    /// Which tokens make a tile.
    pub tiles: Tiles,
}

/// A tensor and where its means go.
#[derive(Debug, Clone, Copy)]
pub struct Pooled {
    /// (batch, heads, tokens, head_dim); tokens behind those of the tiles are not read.
    pub tensor: Tensor,
    /// Heads.
    pub heads: u32,
    /// Address of the means, float32 (batch, heads, tiles, head_dim), contiguous; a multiple of 4.
    pub means: u64,
}

/// Tiles of tokens in (time, height, width) order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiles {
    /// Tokens along each axis, at least 1; the last tiles may stick out.
    pub thw: [u32; 3],
    /// Tokens of a tile along each, at least 1.
    pub tile: [u32; 3],
    /// Whether a tile that sticks out counts zeros there, or nothing.
    pub zeros_count: bool,
}

impl Tiles {
    /// Blocks of a sequence; the last one may be short.
    pub fn blocks(len: u32, block: u32) -> Self {
        Self {
            thw: [1, 1, len],
            tile: [1, 1, block.min(len)],
            zeros_count: false,
        }
    }

    /// Along each axis.
    fn counts(self) -> [u32; 3] {
        std::array::from_fn(|axis| self.thw[axis].div_ceil(self.tile[axis]))
    }

    /// All.
    pub fn count(self) -> u32 {
        self.counts().iter().product()
    }

    /// Whether the kernel can name all tokens, and those of a tile.
    pub fn fits(self) -> bool {
        let product = |of: [u128; 3]| of.iter().product::<u128>();
        let [thw, tile] = [self.thw, self.tile].map(|of| of.map(u128::from));
        if product(thw) == 0 || product(tile) == 0 {
            return false;
        }
        let whole = std::array::from_fn(|axis| thw[axis].next_multiple_of(tile[axis]));
        product(whole) < 1 << 31 && product(tile) < u128::from(MOST_BOXES)
    }
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        [Element::Bf16, Element::F16]
            .iter()
            .flat_map(|&element| [64, 128].map(|head_dim| Self { element, head_dim }))
            .collect()
    }

    fn lanes(self) -> Lanes {
        let lanes = Lanes::new(self.head_dim);
        assert_eq!(lanes.chunks, lanes.each, "columns that leave lanes idle");
        lanes
    }

    /// The launch for some tensors.
    ///
    /// # Panics
    /// If tiles do not fit, if there are more thread blocks than a grid has, or if a tensor's address or
    /// strides are not multiples of 16 bytes.
    pub fn launch(self, args: &Args) -> Launch {
        let Args { tensors, tiles, .. } = args;
        assert!(tiles.fits(), "{args:?}");
        let block: u32 = tiles.tile.iter().product();
        let loads = block.div_ceil(DEPTH as u32 * self.lanes().rows);
        let tile_warps = loads.min(WARPS).next_power_of_two();
        let heads = tensors[0].heads + tensors[1].heads;
        let groups = tiles.count().div_ceil(WARPS / tile_warps);
        let thread_blocks = groups.checked_mul(heads).filter(|&n| n < 1 << 31);

        let mut list = Vec::new();
        for Pooled { tensor, means, .. } in tensors {
            list.extend(chunk::args(*tensor));
            list.push(Arg::U64(*means));
        }
        let [_, n_h, n_w] = tiles.counts();
        list.extend([tensors[0].heads, heads, tiles.count()].map(Arg::U32));
        list.extend([n_h, n_w].map(Arg::U32));
        list.extend(tiles.thw.map(Arg::U32));
        list.extend(tiles.tile.map(Arg::U32));
        list.extend([inverse(tiles.tile[1]), inverse(tiles.tile[2])]);
        list.push(Arg::U32(if tiles.zeros_count { block } else { 0 }));
        list.push(Arg::U32(tile_warps.ilog2()));
        Launch {
            grid: [thread_blocks.expect("few tiles"), args.batch, 1],
            args: list,
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        let Self { element, head_dim } = self;
        let name = format!("pool_{element:?}_d{head_dim}").to_lowercase();
        Builder::kernel(name, THREADS, |k| self.body(k))
    }

    fn body(self, k: &Builder) {
        let [first, second] = ["first", "second"].map(|name| {
            let tensor = Heads::new(k, name);
            (tensor, k.param::<u64>(&format!("{name}_means")))
        });
        let (first_heads, heads) = (k.param::<u32>("first_heads"), k.param::<u32>("heads"));
        let grid = Grid::new(k);
        // Binary logarithm of the warps that a tile has.
        let split = k.param::<u32>("split");
        k.set_shared_bytes(4 * WARPS * self.head_dim);
        let shared = k.shared_base();

        let (line, group) = (k.cta_x() % heads, k.cta_x() / heads);
        let in_second = line.ge(first_heads);
        let head = in_second.select(line - first_heads, line);
        let tensor = first.0.or(in_second, second.0).rows(head, k.cta_y());

        let lanes = self.lanes();
        let (tid, lane) = (k.tid(), k.lane());
        let warp = tid >> 5;
        let (tile_warps, tile_warp) = (k.var(1u32) << split, warp - (warp >> split << split));
        let here = k.var(WARPS) >> split;
        let first_tile = group * here;

        let tile = grid.tile(first_tile + (warp >> split));
        let chunk = lane % lanes.each;
        let place = k.var(tile_warp * lanes.rows + lane / lanes.each);
        let apart = tile_warps * lanes.rows;
        let sums = [0.0; 8].map(|zero: f32| k.var(zero));
        // All lanes go round as often as the first.
        k.for_(0, grid.block(), apart * DEPTH as u32, |_| {
            let loaded: [_; DEPTH] = std::array::from_fn(|_| {
                let (token, inside) = grid.token(&tile, place);
                place.set(place + apart);
                k.load_constants_where(inside, tensor.chunk(token, chunk))
            });
            for words in loaded {
                for (mut sum, x) in sums.into_iter().zip(chunk::floats(words, self.element)) {
                    sum += x;
                }
            }
        });
        let sums = sums.map(|sum| lanes.sum_rows(sum));
        let mine = shared + ((warp * self.head_dim + chunk * CHUNK) << 2);
        k.if_(lane.lt(lanes.each), || {
            let [a, b, c, d, e, f, g, h] = sums;
            k.store_shareds(mine, [a, b, c, d]);
            k.store_shareds(mine.at(16), [e, f, g, h]);
        });
        k.sync_threads();

        // Now each thread has a column of a tile, of the sums of whose warps it makes the mean.
        let means = in_second.select(second.1, first.1);
        let tensor_heads = in_second.select(heads - first_heads, first_heads);
        let record = (k.cta_y() * tensor_heads + head).times_wide(grid.count);
        k.for_(tid, here * self.head_dim, THREADS, |at| {
            let (index, column) = (at / self.head_dim, at % self.head_dim);
            let number = first_tile + index;
            k.if_(number.lt(grid.count), || {
                let mut sum = k.var(0.0f32);
                k.for_(index << split, (index + 1) << split, 1, |warp| {
                    let at = warp * self.head_dim + column;
                    sum += k.load_shared::<f32>(shared + (at << 2));
                });
                let mean = sum / grid.tile(number).divisor.to_f32();
                let place = (record + number.to_u64()) * u64::from(self.head_dim);
                let at = means + ((place + column.to_u64()) << 2);
                k.store_global(at, chunk::rounded(mean, self.element));
            });
        });
    }
}

/// [`Tiles`] in the kernel.
struct Grid<'k> {
    /// Tiles: all, and along height and width.
    count: Reg<'k, u32>,
    n_h: Reg<'k, u32>,
    n_w: Reg<'k, u32>,
    thw: [Reg<'k, u32>; 3],
    sides: [Reg<'k, u32>; 3],
    /// 1 over the height and the width of a tile.
    inverse_h: Reg<'k, f32>,
    inverse_w: Reg<'k, f32>,
    /// What sums are divided by, or 0 for the tokens that there are.
    divisor: Reg<'k, u32>,
}

/// A tile: its first token, how many it has along each axis, and what its sums are divided by.
struct Tile<'k> {
    corner: Reg<'k, u32>,
    rest: [Reg<'k, u32>; 3],
    divisor: Reg<'k, u32>,
}

impl<'k> Grid<'k> {
    /// Declares its parameters.
    fn new(k: &'k Builder) -> Self {
        Self {
            count: k.param("tiles"),
            n_h: k.param("height_tiles"),
            n_w: k.param("width_tiles"),
            thw: ["time", "height", "width"].map(|name| k.param(name)),
            sides: ["tile_time", "tile_height", "tile_width"].map(|name| k.param(name)),
            inverse_h: k.param("inverse_tile_height"),
            inverse_w: k.param("inverse_tile_width"),
            divisor: k.param("divisor"),
        }
    }

    /// Tokens of a whole tile.
    fn block(&self) -> Reg<'k, u32> {
        let [t, h, w] = self.sides;
        t * h * w
    }

    /// A tile by its number; none of its tokens is there if there is no such tile.
    fn tile(&self, number: Reg<'k, u32>) -> Tile<'k> {
        let (line, w) = (number / self.n_w, number % self.n_w);
        let (t, h) = (line / self.n_h, line % self.n_h);
        let first: [_; 3] = std::array::from_fn(|axis| [t, h, w][axis] * self.sides[axis]);
        let rest: [_; 3] = std::array::from_fn(|axis| {
            let (end, first) = (self.thw[axis], first[axis]);
            self.sides[axis].min(end - first.min(end))
        });
        let [_, height, width] = self.thw;
        let tokens = rest[0] * rest[1] * rest[2];
        Tile {
            corner: (first[0] * height + first[1]) * width + first[2],
            rest,
            divisor: self.divisor.equals(0).select(tokens, self.divisor),
        }
    }

    /// The token in a place of a tile, and whether there is one.
    fn token(&self, tile: &Tile<'k>, place: Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, bool>) {
        let [_, side_h, side_w] = self.sides;
        let line = quotient(place, self.inverse_w);
        let w = place - line * side_w;
        let t = quotient(line, self.inverse_h);
        let h = line - t * side_h;
        let [_, height, width] = self.thw;
        let token = tile.corner + (t * height + h) * width + w;
        let [rest_t, rest_h, rest_w] = tile.rest;
        (token, t.lt(rest_t) & h.lt(rest_h) & w.lt(rest_w))
    }
}
