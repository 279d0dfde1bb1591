//! What bounds dq, for sums of integers: of each head of k the largest magnitude, of v the largest
//! norm of a row, squared.
//!
//! Magnitudes are compared as integers, by their bits: a NaN is the largest.
//!
//! Bound by memory: a thread's eight loads of 16 bytes are all under way before the first is used.

use flex_block_attn_ptx::ir::Special;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg};

use crate::chunk::{self, Lanes, Rows};
use crate::forward::Tensor;

const THREADS: u32 = 256;
/// Rows that a lane has a chunk of.
const DEPTH: usize = 4;
/// Words of a head of k and v.
pub const WORDS: usize = 2;

/// What the kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns of k and v: 64 or 128.
    pub head_dim: u32,
}

/// What a launch gives it.
#[derive(Debug, Clone, Copy)]
pub struct Args {
    /// Keys, (batch, heads, len, head_dim).
    pub k: Tensor,
    /// Values, of the same shape.
    pub v: Tensor,
    /// Address of the bounds, (batch, heads, [`WORDS`]): bits of float32, 0 before.
    pub bounds: u64,
    /// Batches.
    pub batch: u32,
    /// Heads of k and v.
    pub heads: u32,
    /// Keys, at least 1.
    pub len: u32,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        [Element::Bf16, Element::F16]
            .iter()
            .flat_map(|&element| [64, 128].map(|head_dim| Self { element, head_dim }))
            .collect()
    }

    /// Rows of a thread block.
    fn rows(self) -> u32 {
        THREADS / 32 * DEPTH as u32 * Lanes::new(self.head_dim).rows
    }

    /// The launch for some tensors.
    ///
    /// # Panics
    /// If there are no keys, or a tensor's address or strides are not multiples of 16 bytes.
    pub fn launch(self, args: &Args) -> Launch {
        assert!(args.len > 0, "{args:?}");
        let mut list = Vec::from(chunk::args(args.k));
        list.extend(chunk::args(args.v));
        list.extend([Arg::U64(args.bounds), Arg::U32(args.len)]);
        Launch {
            grid: [args.len.div_ceil(self.rows()), args.heads, args.batch],
            args: list,
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        let Self { element, head_dim } = self;
        let name = format!("bounds_{element:?}_d{head_dim}").to_lowercase();
        Builder::kernel(name, THREADS, |k| self.body(k))
    }

    fn body(self, k: &Builder) {
        let tensors = [Rows::new(k, "k"), Rows::new(k, "v")];
        let (bounds, len) = (k.param::<u64>("bounds"), k.param::<u32>("len"));

        let lanes = Lanes::new(self.head_dim);
        let warp = k.tid() >> 5;
        let (own, chunk) = (k.lane() / lanes.each, k.lane() % lanes.each);
        let first = k.cta_x() * self.rows() + warp * (DEPTH as u32 * lanes.rows) + own;
        let loaded: [_; DEPTH] = std::array::from_fn(|i| {
            let row = first + i as u32 * lanes.rows;
            let inside = row.lt(len);
            tensors.map(|tensor| k.load_constants_where(inside, tensor.chunk(row, chunk)))
        });
        let (magnitude, norm) = (k.var(0u32), k.var(0u32));
        for chunks in loaded {
            let [keys, values] = chunks.map(|words| chunk::floats(words, self.element));
            for x in keys {
                magnitude.set(magnitude.max(magnitude_of(x)));
            }
            let own = values[1..]
                .iter()
                .fold(values[0] * values[0], |sum, &x| x.fma(x, sum));
            norm.set(norm.max(magnitude_of(lanes.sum(own))));
        }
        let head = k.cta_z() * k.special(Special::GridY) + k.cta_y();
        let place = bounds + head.times_wide(4 * WORDS as u32);
        let (magnitude, norm) = (magnitude.warp_max(), norm.warp_max());
        k.if_(k.lane().equals(0), || {
            k.reduce_max_global(place, magnitude);
            k.reduce_max_global(place.at(4), norm);
        });
    }
}

/// The bits without the sign.
fn magnitude_of(x: Reg<'_, f32>) -> Reg<'_, u32> {
    x.to_bits() & 0x7fff_ffff
}
