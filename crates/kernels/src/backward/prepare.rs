//! What the main kernel finds of each query besides q and dout: its sums of dq, zeros;
//! `delta = rowsum(dout * out)`, less the gradient of the lse (FlashAttention-2, arXiv 2307.08691, section
//! 3.1.2), and the lse in units of log2. Queries without keys, and those that only fill up the
//! workspace's lines, get a lse of inf, which makes their weights 0.
//!
//! If dq's sums are to be of integers, also how many steps of them make 1, a power of two: so many that
//! no sum can leave the range. With p the weights, `dq = sum of p (dout v - delta) k`, and the weights of
//! a query sum to 1: no part of the sum exceeds `(|dout| max |v| + |delta|) max |k|`, for which 2^30 is
//! left. Not a number where something that goes in is not: integers would not show it.
//!
//! Bound by memory: a thread's eight loads of 16 bytes, and as many stores of zeros, are all under way
//! before the first is used.

use flex_block_attn_ptx::ir::Special;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg};

use super::{UNIT, Workspace, bounds};
use crate::canvas::{self, Canvas, Grid};
use crate::chunk::{self, Lanes, Rows};
use crate::forward::Tensor;

const THREADS: u32 = 256;
/// Rows that a lane has a chunk of.
const DEPTH: usize = 4;
/// What sums of integers keep within: half of what they could, for what rounding adds.
const RANGE: f32 = (1u32 << 30) as f32;
/// Steps at most, where nothing but 0 is added: so many that 1 over them is still a float32.
const MOST_STEPS: f32 = (1u128 << 100) as f32;

/// What the kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns of out and dout: a multiple of 8 from 32 to 256.
    pub head_dim: u32,
    /// Whether dq's sums are of integers.
    pub deterministic: bool,
    /// Tokens of the main kernel's pieces, if tokens are a video's.
    pub boxes: Option<u32>,
}

/// What a launch gives it.
#[derive(Debug, Clone, Copy)]
pub struct Args {
    /// Output of the forward pass, (batch, heads, q_len, head_dim).
    pub out: Tensor,
    /// Its gradient, of the same shape.
    pub dout: Tensor,
    /// Address of the forward's lse, float32 (batch, heads, q_len), contiguous; of a video in the order
    /// of tokens.
    pub lse: u64,
    /// Address of the gradient of the lse, likewise; 0 if there is none.
    pub dlse: u64,
    /// Address of the lse in units of log2, to be written: float32, [`Workspace::line`] for each head.
    pub log2: u64,
    /// Address of the deltas, to be written, likewise.
    pub delta: u64,
    /// Address of the steps, to be written, likewise; not read if sums are of float32.
    pub steps: u64,
    /// Address of what [`bounds`] leaves; likewise.
    pub bounds: u64,
    /// Address of dq's sums, to be set to 0: for each head [`Workspace::units`] of 64 x head_dim.
    pub sums: u64,
    /// Batches.
    pub batch: u32,
    /// Heads.
    pub heads: u32,
    /// Heads of k and v: they divide these.
    pub kv_heads: u32,
    /// Queries, at least 1; of a video with all padding of tiles.
    pub q_len: u32,
    /// The video: what is written is in the order of tiles, what is read is not.
    pub canvas: Option<Canvas>,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for element in [Element::Bf16, Element::F16] {
            let of = |deterministic, boxes| {
                move |head_dim| Self {
                    element,
                    head_dim,
                    deterministic,
                    boxes,
                }
            };
            all.extend([64, 96, 128, 192, 256].map(of(false, None)));
            all.extend([64, 128].map(of(true, None)));
            for (head_dim, piece) in super::BOXES {
                all.extend([false, true].map(|exact| of(exact, Some(piece))(head_dim)));
            }
        }
        all
    }

    /// Rows of a thread block.
    fn rows(self) -> u32 {
        THREADS / 32 * DEPTH as u32 * Lanes::new(self.head_dim).rows
    }

    /// The launch for some tensors.
    ///
    /// # Panics
    /// If there are no queries, or a tensor's address or strides are not multiples of 16 bytes.
    pub fn launch(self, args: &Args) -> Launch {
        assert!(args.q_len > 0, "{args:?}");
        let mut list = Vec::from(chunk::args(args.out));
        list.extend(chunk::args(args.dout));
        let line = Workspace::new(args.q_len as usize).line as u32;
        list.extend([args.lse, args.dlse, args.log2, args.delta, args.sums].map(Arg::U64));
        list.extend([args.q_len, line].map(Arg::U32));
        list.extend(canvas::args(self.boxes, args.canvas));
        if self.deterministic {
            let group = args.heads / args.kv_heads;
            list.extend([args.steps, args.bounds].map(Arg::U64));
            list.extend([args.kv_heads, group].map(Arg::U32));
        }
        Launch {
            grid: [line.div_ceil(self.rows()), args.heads, args.batch],
            args: list,
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        let Self {
            element,
            head_dim,
            boxes,
            ..
        } = self;
        let mut name = format!("prepare_{element:?}_d{head_dim}").to_lowercase();
        name += &canvas::tag(boxes);
        if self.deterministic {
            name += "_deterministic";
        }
        Builder::kernel(name, THREADS, |k| self.body(k))
    }

    fn body(self, k: &Builder) {
        let (out, dout) = (Rows::new(k, "out"), Rows::new(k, "dout"));
        let (lse, dlse) = (k.param::<u64>("lse"), k.param::<u64>("dlse"));
        let (log2, delta) = (k.param::<u64>("log2"), k.param::<u64>("delta"));
        let sums = k.param::<u64>("sums");
        let (q_len, line) = (k.param::<u32>("q_len"), k.param::<u32>("line"));
        let grid = self.boxes.map(|piece| Grid::new(k, piece));
        let steps = self.deterministic.then(|| Steps::new(k));

        // The main kernel waits for the end of this one.
        k.grid_launch();
        let lanes = Lanes::new(self.head_dim);
        let warp = k.tid() >> 5;
        let (own, chunk) = (k.lane() / lanes.each, k.lane() % lanes.each);
        let first = k.cta_x() * self.rows() + warp * (DEPTH as u32 * lanes.rows) + own;
        let loaded: [_; DEPTH] = std::array::from_fn(|i| {
            let row = first + i as u32 * lanes.rows;
            let (token, inside) = canvas::token(&grid, row, q_len);
            let inside = inside & chunk.lt(lanes.chunks);
            [out, dout].map(|tensor| k.load_constants_where(inside, tensor.chunk(token, chunk)))
        });
        let head = k.cta_z() * k.special(Special::GridY) + k.cta_y();
        self.clear(k, sums, head, line);
        // Of two tensors' rows the products' sum. Lane i of a row's has the i-th: a warp's results are
        // neighbours.
        let product = |one: usize, other: usize| {
            let sums = loaded.map(|chunks| {
                let [a, b] = [one, other].map(|i| chunk::floats(chunks[i], self.element));
                let products = a.into_iter().zip(b).skip(1);
                let own = products.fold(a[0] * b[0], |sum, (a, b)| a.fma(b, sum));
                lanes.sum(own)
            });
            let mut value = sums[0];
            for (i, &sum) in (1u32..).zip(&sums[1..]) {
                value = chunk.equals(i).select(sum, value);
            }
            value
        };
        let value = product(0, 1);
        let squares = steps.as_ref().map(|_| product(1, 1));
        let row = first + chunk * lanes.rows;
        let (token, inside) = canvas::token(&grid, row, q_len);
        let read = head.times_wide(q_len) + token.to_u64();
        let written = head.times_wide(line) + place(row).to_u64();
        k.if_(row.lt(line) & chunk.lt(DEPTH as u32), || {
            let (result, scaled) = (k.var(0f32), k.var(f32::INFINITY));
            let fine = k.var(1f32);
            k.if_(inside, || {
                let lse = k.load_constant::<f32>(lse + (read << 2));
                let less = k.var(0f32);
                k.if_(dlse.differs(0), || {
                    less.set(k.load_constant::<f32>(dlse + (read << 2)));
                });
                k.if_(lse.differs(f32::NEG_INFINITY), || {
                    result.set(value - less);
                    scaled.set(lse * std::f32::consts::LOG2_E);
                    if let (Some(steps), Some(squares)) = (&steps, squares) {
                        fine.set(steps.of(result, squares, lse));
                    }
                });
            });
            if let Some(steps) = &steps {
                k.store_global(steps.written + (written << 2), fine);
            }
            k.store_global(delta + (written << 2), result);
            k.store_global(log2 + (written << 2), scaled);
        });
    }

    /// Sets to 0 as many of a head's sums as are of this thread block's rows: wherever which of them
    /// lies, together they are all.
    fn clear(self, k: &Builder, sums: Reg<'_, u64>, head: Reg<'_, u32>, line: Reg<'_, u32>) {
        let chunks_of_row = self.head_dim / 4;
        // Behind a line's last unit there is one without sums.
        let chunks = (line - UNIT) * chunks_of_row;
        let sums = sums + head.to_u64() * (chunks.times_wide(16));
        let own = self.rows() * chunks_of_row;
        let zero = k.var(0u32);
        for step in 0..own / THREADS {
            let chunk = k.cta_x() * own + (k.tid() + step * THREADS);
            k.if_(chunk.lt(chunks), || {
                k.store_globals(sums + chunk.times_wide(16), [zero; 4]);
            });
        }
    }
}

/// Where a query's number lies: of 16 neighbours those four are together which a thread of the main
/// kernel has, two in each eight.
pub(super) fn place(query: Reg<'_, u32>) -> Reg<'_, u32> {
    let (pair, eight) = ((query >> 1) & 3, (query >> 3) & 1);
    (query & !15) + pair * 4 + eight * 2 + (query & 1)
}

/// What it takes to say how many steps make 1.
struct Steps<'k> {
    k: &'k Builder,
    written: Reg<'k, u64>,
    bounds: Reg<'k, u64>,
    kv_heads: Reg<'k, u32>,
    group: Reg<'k, u32>,
}

impl<'k> Steps<'k> {
    /// Declares its parameters.
    fn new(k: &'k Builder) -> Self {
        Self {
            k,
            written: k.param("steps"),
            bounds: k.param("bounds"),
            kv_heads: k.param("kv_heads"),
            group: k.param("group"),
        }
    }

    /// Of a query with this delta, sum of dout's squares, and lse.
    fn of(&self, delta: Reg<'k, f32>, squares: Reg<'k, f32>, lse: Reg<'k, f32>) -> Reg<'k, f32> {
        let k = self.k;
        let head = k.cta_z() * self.kv_heads + k.cta_y() / self.group;
        let bounds = self.bounds + head.times_wide(4 * bounds::WORDS as u32);
        let [keys, values]: [Reg<'k, f32>; 2] = k.load_constants(bounds);
        let gradient = squares.sqrt() * values.sqrt() + delta.abs();
        let bound = gradient * keys;
        // Rounded down to a power of two.
        let most = (bound.reciprocal() * RANGE).min(MOST_STEPS);
        let steps = (most.to_bits() & 0x7f80_0000).as_f32();
        (bound + lse).fma(0.0, steps)
    }
}
