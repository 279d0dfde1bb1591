//! `delta = rowsum(dout * out)`: of each query the one number that the backward pass needs of the
//! output (FlashAttention-2, arXiv 2307.08691).
//!
//! Bound by memory: a thread's eight loads of 16 bytes are all under way before the first is used.
//! Called by `flex-block-attn`.

use flex_block_attn_ptx::ir::Special;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch};

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
}

/// What a launch gives it.
#[derive(Debug, Clone, Copy)]
pub struct Args {
    /// Output of the forward pass, (batch, heads, q_len, head_dim).
    pub out: Tensor,
    /// Its gradient, of the same shape.
    pub dout: Tensor,
    /// Address of the result, float32 (batch, heads, q_len), contiguous; a multiple of 4.
    pub delta: u64,
    /// Batches.
    pub batch: u32,
    /// Heads.
    pub heads: u32,
    /// Queries, at least 1.
    pub q_len: u32,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        let dims = [64, 96, 128, 192, 256];
        [Element::Bf16, Element::F16]
            .iter()
            .flat_map(|&element| dims.map(|head_dim| Self { element, head_dim }))
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
        list.extend([Arg::U64(args.delta), Arg::U32(args.q_len)]);
        Launch {
            grid: [args.q_len.div_ceil(self.rows()), args.heads, args.batch],
            args: list,
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        let Self { element, head_dim } = self;
        let name = format!("delta_{element:?}_d{head_dim}").to_lowercase();
        Builder::kernel(name, THREADS, |k| self.body(k))
    }

    fn body(self, k: &Builder) {
        let (out, dout) = (Rows::new(k, "out"), Rows::new(k, "dout"));
        let delta = k.param::<u64>("delta");
        let q_len = k.param::<u32>("q_len");

        let lanes = Lanes::new(self.head_dim);
        let warp = k.tid() >> 5;
        let (own, chunk) = (k.lane() / lanes.each, k.lane() % lanes.each);
        let first = k.cta_x() * self.rows() + warp * (DEPTH as u32 * lanes.rows) + own;
        let loaded: [_; DEPTH] = std::array::from_fn(|i| {
            let row = first + i as u32 * lanes.rows;
            let inside = row.lt(q_len) & chunk.lt(lanes.chunks);
            [out, dout].map(|tensor| k.load_constants_where(inside, tensor.chunk(row, chunk)))
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
        let line = (k.cta_z() * k.special(Special::GridY) + k.cta_y()).times_wide(q_len);
        let address = delta + ((line + row.to_u64()) << 2);
        k.where_(row.lt(q_len) & chunk.lt(DEPTH as u32), || {
            k.store_global(address, value);
        });
    }
}
