//! Attention forward: `out = softmax(scale q k^T) v` over the key blocks that a plan lists for each
//! block of queries, and the logarithm of each row's sum.
//!
//! A thread block has 128 queries, two warpgroups of 64 with all of their softmax in registers,
//! and a producer warp that streams tiles of k and v. Of each warpgroup one product is always in
//! flight while it computes the softmax of the one before (FlashAttention-3, arXiv 2407.08608): the
//! product with v trails that with k by one tile. Named barriers let the warpgroups take turns at
//! the tensor cores, so that one's softmax lies under the other's products.
//!
//! Called by `flex-block-attn`; scores are kept in units of log2, so that exp is exp2.

mod kernel;
mod softmax;

use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch};
use flex_block_attn_tile::{Shape, Strides, WARPGROUP};

/// Queries of a thread block.
const QUERIES: u32 = 128;
/// Queries of a warpgroup.
const OWN: u32 = 64;

/// What the kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns of q, k and v: 64 or 128.
    pub head_dim: u32,
    /// Keys of a tile: 128 or 192.
    pub kv_tile: u32,
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
pub struct Args {
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
    /// Output.
    pub out: Tensor,
    /// Logarithms of the rows' sums, float32 (batch, heads, q_len), contiguous.
    pub lse: u64,
    /// Address of the plan's row counts: int32 for each block of queries.
    pub counts: u64,
    /// Address of the plan's row lists: int32, `list_stride` for each block of queries.
    pub lists: u64,
    /// Words from one list to the next: the number of key blocks.
    pub list_stride: u32,
    /// Words from one (batch, head) record of the plan to the next; 0 for a shared one.
    pub record: [u32; 2],
    /// Batches.
    pub batch: u32,
    /// Heads of q; `group` of them share one of k and v.
    pub heads: u32,
    /// Heads of q for each of k and v.
    pub group: u32,
    /// Queries, a multiple of 128.
    pub q_len: u32,
    /// Keys, a multiple of `kv_tile`.
    pub kv_len: u32,
    /// Tokens of a block of queries, a multiple of 128.
    pub q_block: u32,
    /// Tokens of a block of keys, a multiple of `kv_tile`.
    pub kv_block: u32,
    /// Factor of the scores.
    pub scale: f32,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        let config = |element, head_dim, kv_tile| Self {
            element,
            head_dim,
            kv_tile,
        };
        let elements = [Element::Bf16, Element::F16];
        let shapes = [(128, 128), (128, 192), (64, 128), (64, 192)];
        elements
            .iter()
            .flat_map(|&e| shapes.map(|(dim, tile)| config(e, dim, tile)))
            .collect()
    }

    fn q_shape(self) -> Shape {
        Shape::new(QUERIES, self.head_dim, self.element)
    }

    fn kv_shape(self) -> Shape {
        Shape::new(self.kv_tile, self.head_dim, self.element)
    }

    fn out_shape(self) -> Shape {
        Shape::new(OWN, self.head_dim, self.element)
    }

    /// The launch for some tensors.
    ///
    /// # Panics
    /// If lengths or blocks are not multiples of the tiles.
    pub fn launch(self, args: &Args) -> Launch {
        let Args {
            batch,
            heads,
            q_len,
            kv_len,
            q_block,
            kv_block,
            ..
        } = *args;
        assert!(
            q_len % QUERIES == 0 && q_block % QUERIES == 0,
            "queries of {args:?}"
        );
        assert!(
            kv_len % self.kv_tile == 0 && kv_block % self.kv_tile == 0,
            "keys of {args:?}"
        );
        let extents =
            |heads: u32, tokens: u32| [batch, heads, tokens, self.head_dim].map(u64::from);
        let map = |shape: Shape, tensor: Tensor, extents| {
            Arg::TensorMap(shape.tensor_map(tensor.address, extents, tensor.strides))
        };
        let of_q = extents(heads, q_len);
        let of_kv = extents(heads / args.group, kv_len);
        let out = self
            .out_shape()
            .panel_map(args.out.address, of_q, args.out.strides);
        Launch {
            grid: [q_len / QUERIES, heads, batch],
            args: vec![
                map(self.q_shape(), args.q, of_q),
                map(self.kv_shape(), args.k, of_kv),
                map(self.kv_shape(), args.v, of_kv),
                Arg::TensorMap(out),
                Arg::U64(args.lse),
                Arg::U64(args.counts),
                Arg::U64(args.lists),
                Arg::U32(args.list_stride),
                Arg::U32(args.record[0]),
                Arg::U32(args.record[1]),
                Arg::U32(args.group),
                Arg::U32(q_block / QUERIES),
                Arg::U32(kv_block / self.kv_tile),
                Arg::F32(args.scale * std::f32::consts::LOG2_E),
            ],
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        let Self {
            element,
            head_dim,
            kv_tile,
        } = self;
        let name = format!("forward_{element:?}_d{head_dim}_kv{kv_tile}").to_lowercase();
        Builder::kernel(name, 3 * WARPGROUP, |k| self.body(k))
    }
}
