//! What the main kernel reads of each query besides q and dout: `delta = rowsum(dout * out)`, less the
//! gradient of the lse (FlashAttention-2, arXiv 2307.08691, section 3.1.2), and the lse in units of
//! log2. Queries without keys, and those that only fill up the workspace's lines, get a lse of inf,
//! which makes their weights 0.
//!
//! Bound by memory: a thread's eight loads of 16 bytes are all under way before the first is used.

use flex_block_attn_ptx::ir::Special;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch};

use super::Workspace;
use crate::canvas::{self, Canvas, Grid};
use crate::chunk::{self, Lanes, Rows};
use crate::forward::Tensor;

const THREADS: u32 = 256;
/// Rows that a lane has a chunk of.
const DEPTH: usize = 4;

/// What the kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns of out and dout: a multiple of 8 from 32 to 256.
    pub head_dim: u32,
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
    /// Address of the forward's lse, float32 (batch, heads, q_len), contiguous.
    pub lse: u64,
    /// Address of the gradient of the lse, likewise; 0 if there is none.
    pub dlse: u64,
    /// Address of the lse in units of log2, to be written: float32, [`Workspace::line`] for each head.
    pub log2: u64,
    /// Address of the deltas, to be written, likewise.
    pub delta: u64,
    /// Batches.
    pub batch: u32,
    /// Heads.
    pub heads: u32,
    /// Queries, at least 1; of a video with all padding of tiles.
    pub q_len: u32,
    /// The video: numbers are in the order of tiles, tensors are not.
    pub canvas: Option<Canvas>,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        let dims = [64, 96, 128, 192, 256];
        [Element::Bf16, Element::F16]
            .iter()
            .flat_map(|&element| {
                let rows = dims.map(|head_dim| (head_dim, None));
                let boxes = super::BOXES.map(|(head_dim, piece)| (head_dim, Some(piece)));
                let config = move |(head_dim, boxes)| Self {
                    element,
                    head_dim,
                    boxes,
                };
                rows.into_iter().chain(boxes).map(config)
            })
            .collect()
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
        list.extend([args.lse, args.dlse, args.log2, args.delta].map(Arg::U64));
        list.extend([args.q_len, line].map(Arg::U32));
        list.extend(canvas::args(self.boxes, args.canvas));
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
        } = self;
        let tag = canvas::tag(boxes);
        let name = format!("prepare_{element:?}_d{head_dim}{tag}").to_lowercase();
        Builder::kernel(name, THREADS, |k| self.body(k))
    }

    fn body(self, k: &Builder) {
        let (out, dout) = (Rows::new(k, "out"), Rows::new(k, "dout"));
        let (lse, dlse) = (k.param::<u64>("lse"), k.param::<u64>("dlse"));
        let (log2, delta) = (k.param::<u64>("log2"), k.param::<u64>("delta"));
        let (q_len, line) = (k.param::<u32>("q_len"), k.param::<u32>("line"));
        let grid = self.boxes.map(|piece| Grid::new(k, piece));

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
        let sums = loaded.map(|chunks| {
            let [a, b] = chunks.map(|words| chunk::floats(words, self.element));
            let products = a.into_iter().zip(b).skip(1);
            let own = products.fold(a[0] * b[0], |sum, (a, b)| a.fma(b, sum));
            lanes.sum(own)
        });
        // Lane i of a row's stores the i-th: a warp's results are neighbours.
        let mut value = sums[0];
        for (i, &sum) in (1u32..).zip(&sums[1..]) {
            value = chunk.equals(i).select(sum, value);
        }
        let row = first + chunk * lanes.rows;
        let head = k.cta_z() * k.special(Special::GridY) + k.cta_y();
        let read = head.times_wide(q_len) + row.to_u64();
        let written = head.times_wide(line) + row.to_u64();
        k.if_(row.lt(line) & chunk.lt(DEPTH as u32), || {
            let (result, scaled) = (k.var(0f32), k.var(f32::INFINITY));
            k.if_(canvas::token(&grid, row, q_len).1, || {
                let lse = k.load_constant::<f32>(lse + (read << 2));
                let less = k.var(0f32);
                k.if_(dlse.differs(0), || {
                    less.set(k.load_constant::<f32>(dlse + (read << 2)));
                });
                k.if_(lse.differs(f32::NEG_INFINITY), || {
                    result.set(value - less);
                    scaled.set(lse * std::f32::consts::LOG2_E);
                });
            });
            k.store_global(delta + (written << 2), result);
            k.store_global(log2 + (written << 2), scaled);
        });
    }
}
