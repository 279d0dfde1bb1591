//! Means over blocks of tokens: what a dynamic mask is chosen from.
//!
//! Bound by memory. A block belongs to as many warps as keep four loads of 16 bytes under way in
//! each thread; a thread block has eight warps, so several blocks if these are short. Called by
//! `flex-block-attn`.

use flex_block_attn_ptx::ir::Special;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg};

use crate::chunk::{self, CHUNK, Lanes, Rows};
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
    /// Columns: 64, 128 or 256.
    pub head_dim: u32,
}

/// What a launch gives it.
#[derive(Debug, Clone, Copy)]
pub struct Args {
    /// What is pooled, (batch, heads, len, head_dim).
    pub tensor: Tensor,
    /// Address of the means, float32 (batch, heads, blocks, head_dim), contiguous; a multiple
    /// of 4. There are `len / block` blocks, rounded up; the last one's mean is over the tokens
    /// that there are.
    pub means: u64,
    /// Batches.
    pub batch: u32,
    /// Heads.
    pub heads: u32,
    /// Tokens, at least 1.
    pub len: u32,
    /// Tokens of a block, at least 1.
    pub block: u32,
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

    /// The launch for some tensor.
    ///
    /// # Panics
    /// If there are no tokens, if the means of a head are 2^32 or more, or if the tensor's address
    /// or strides are not multiples of 16 bytes.
    pub fn launch(self, args: &Args) -> Launch {
        let len = args.len;
        let block = args.block.min(len);
        assert!(block > 0, "{args:?}");
        let blocks = len.div_ceil(block);
        assert!(blocks.checked_mul(self.head_dim).is_some(), "{args:?}");
        let loads = block.div_ceil(DEPTH as u32 * self.lanes().rows);
        let block_warps = loads.min(WARPS).next_power_of_two();
        let mut list = Vec::from(chunk::args(args.tensor));
        list.push(Arg::U64(args.means));
        list.extend([len, block, blocks, block_warps.ilog2()].map(Arg::U32));
        Launch {
            grid: [blocks.div_ceil(WARPS / block_warps), args.heads, args.batch],
            args: list,
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        let Self { element, head_dim } = self;
        let name = format!("pool_{element:?}_d{head_dim}").to_lowercase();
        Builder::kernel(name, THREADS, |k| self.body(k))
    }

    fn body<'k>(self, k: &'k Builder) {
        let tensor = Rows::new(k, "tensor");
        let means = k.param::<u64>("means");
        let (len, block) = (k.param::<u32>("len"), k.param::<u32>("block"));
        let blocks = k.param::<u32>("blocks");
        // Binary logarithm of the warps that a block has.
        let split = k.param::<u32>("split");
        k.set_shared_bytes(4 * WARPS * self.head_dim);
        let shared = k.shared_base();

        let lanes = self.lanes();
        let (tid, lane) = (k.tid(), k.lane());
        let warp = tid >> 5;
        let (block_warps, block_warp) = (k.var(1u32) << split, warp - (warp >> split << split));
        let here = k.var(WARPS) >> split;
        let first_block = k.cta_x() * here;
        // Tokens of a block: none behind the last.
        let tokens = |number: Reg<'k, u32>| block.min(len - (number * block).min(len));

        let number = first_block + (warp >> split);
        let count = tokens(number);
        let chunk = lane % lanes.each;
        let token = k.var(block_warp * lanes.rows + lane / lanes.each);
        let address = k.var(tensor.chunk(number * block + token, chunk));
        let apart = block_warps * lanes.rows;
        let apart_bytes = apart.to_u64() * tensor.stride;
        let sums = [0.0; 8].map(|zero: f32| k.var(zero));
        // All lanes go round as often as the first.
        k.for_(0, count, apart * DEPTH as u32, |_| {
            let loaded: [_; DEPTH] = std::array::from_fn(|_| {
                let words = k.load_constants_where(token.lt(count), address);
                token.set(token + apart);
                address.set(address + apart_bytes);
                words
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

        // Now each thread has a column of a block, of the sums of whose warps it makes the mean.
        let line = (k.cta_z() * k.special(Special::GridY) + k.cta_y()).times_wide(blocks);
        k.for_(tid, here * self.head_dim, THREADS, |at| {
            let (index, column) = (at / self.head_dim, at % self.head_dim);
            let number = first_block + index;
            k.if_(number.lt(blocks), || {
                let mut sum = k.var(0.0f32);
                k.for_(index << split, (index + 1) << split, 1, |warp| {
                    let at = warp * self.head_dim + column;
                    sum += k.load_shared::<f32>(shared + (at << 2));
                });
                let place = (line + number.to_u64()) * u64::from(self.head_dim) + column.to_u64();
                k.store_global(means + (place << 2), sum / tokens(number).to_f32());
            });
        });
    }
}
