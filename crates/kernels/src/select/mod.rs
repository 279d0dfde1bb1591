//! A mask of the tiles whose means suit each other: from what [`crate::pool`] leaves, the bytes that
//! [`crate::plan`] takes.
//!
//! Up to three launches, on one stream: [`Config::Average`] makes one head of all, if heads share a mask;
//! [`Config::Weigh`] says of each key what makes its product with a query its importance, if that is
//! asked for; [`Config::Keep`] scores, and keeps the best of each row. All in float32, of sums in a fixed
//! order: the same means give the same mask. Called by `flex-block-attn`.
//!
//! Importance (SSTA, the technical report of HunyuanVideo-1.5, arXiv 2511.18870) is `lambda * cosine of
//! query and key - (1 - lambda) * mean cosine of the key and all others`. With keys `k` of norm 1 the
//! latter is `(k (sum of all keys) - k k) / (their number - 1)`: no product of keys with keys is needed.

mod average;
mod keep;
mod weigh;

use flex_block_attn_ptx::{Arg, Builder, Kernel, Launch, Reg};

/// Most tiles of a row that a kernel keeps the scores of, by the room that it has.
pub const ROOMS: [u32; 4] = [512, 1024, 2048, 6144];
/// Most tiles at all.
pub const MOST_TILES: u32 = ROOMS[3];

/// What a norm is at least, lest 0 be divided by it: a mean of 0 has cosine 0 with everything.
const LEAST_NORM: f32 = 1e-12;

/// Which of the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Config {
    /// Means of all heads.
    Average,
    /// Weights of keys of so many features, 64 or 128.
    Weigh(u32),
    /// Scores, and the best of each row.
    Keep {
        /// Whether by importance, or by products alone.
        weighed: bool,
        /// One of [`ROOMS`].
        room: u32,
    },
}

/// What all launches are given.
#[derive(Debug, Clone, Copy)]
pub struct Args {
    /// Queries and keys. Where heads share a mask, their average is scored, else each head.
    pub pooled: [Pooled; 2],
    /// Whether heads share a mask.
    pub shared: bool,
    /// Weight of relevance, from 0 to 1; products alone are not weighed.
    pub lambda: f32,
    /// Address of the weights of keys, two float32 each, (batch, heads of keys, tiles); a multiple of 8.
    pub weights: u64,
    /// Batches.
    pub batch: u32,
    /// Tiles, at least 1 and at most [`MOST_TILES`].
    pub tiles: u32,
    /// Features of a mean: 64 or 128.
    pub features: u32,
    /// Tiles that a row keeps, at least 1.
    pub top: u32,
    /// The mask.
    pub mask: Mask,
}

/// Means, float32 (batch, heads, tiles, features), contiguous; at multiples of 16.
#[derive(Debug, Clone, Copy)]
pub struct Pooled {
    /// Address of those of each head.
    pub means: u64,
    /// Heads.
    pub heads: u32,
    /// Address of the means of all heads, if they share a mask.
    pub average: u64,
}

/// What is written, and what it is united with.
#[derive(Debug, Clone, Copy)]
pub struct Mask {
    /// Address of the mask, a byte for each pair of blocks: (batch, heads of queries or 1, blocks,
    /// blocks), contiguous.
    pub mask: u64,
    /// Address of (blocks, blocks) bytes, not 0 where a block is kept in any case.
    pub base: u64,
    /// Blocks of the mask, tiles first.
    pub blocks: u32,
    /// Address of the number of tokens of text that count, int64 for each batch, or 0 if all do. Of blocks
    /// behind the tiles, those behind these tokens see only themselves, and are seen by no other; one is
    /// left at least.
    pub text_lengths: u64,
    /// Tokens of a block.
    pub block: u32,
}

impl Args {
    /// Heads of queries and of keys that are scored.
    fn heads(&self) -> [u32; 2] {
        self.pooled.map(|of| if self.shared { 1 } else { of.heads })
    }

    /// Where their means are.
    fn means(&self) -> [Arg; 2] {
        self.pooled
            .map(|of| if self.shared { of.average } else { of.means })
            .map(Arg::U64)
    }

    /// Numbers of a head's means.
    fn numbers(&self) -> u32 {
        self.tiles * self.features
    }
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::Average, Self::Weigh(64), Self::Weigh(128)];
        for weighed in [false, true] {
            all.extend(ROOMS.map(|room| Self::Keep { weighed, room }));
        }
        all
    }

    /// Those of a choice, in order.
    ///
    /// # Panics
    /// If there are more than [`MOST_TILES`] tiles.
    pub fn of(args: &Args, weighed: bool) -> Vec<Self> {
        let room = ROOMS.into_iter().find(|&room| args.tiles <= room);
        let room = room.unwrap_or_else(|| panic!("{args:?}"));
        let average = args.shared.then_some(Self::Average);
        let weigh = weighed.then_some(Self::Weigh(args.features));
        let keep = Self::Keep { weighed, room };
        average.into_iter().chain(weigh).chain([keep]).collect()
    }

    /// The launch for some means.
    ///
    /// # Panics
    /// If it is for another number of tiles or features, or the heads of keys do not divide those of
    /// queries.
    pub fn launch(self, args: &Args) -> Launch {
        let ([heads, kv_heads], batch) = (args.heads(), args.batch);
        assert!(
            args.tiles > 0 && matches!(args.features, 64 | 128) && heads.is_multiple_of(kv_heads),
            "{args:?}"
        );
        let [q, k] = args.means();
        match self {
            Self::Average => {
                let of = |of: Pooled| {
                    let [means, average] = [of.means, of.average].map(Arg::U64);
                    [means, average, Arg::U32(of.heads)]
                };
                let mut list = args.pooled.map(of).concat();
                list.push(Arg::U32(args.numbers()));
                Launch {
                    grid: [average::blocks(args.numbers()), 2, batch],
                    args: list,
                }
            }
            Self::Weigh(features) => {
                assert_eq!(features, args.features, "{args:?}");
                let lambda = Arg::F32(args.lambda);
                Launch {
                    grid: [kv_heads, batch, 1],
                    args: vec![k, Arg::U64(args.weights), Arg::U32(args.tiles), lambda],
                }
            }
            Self::Keep { weighed, room } => {
                assert!(args.tiles <= room && args.top > 0, "{args:?}");
                let mask = args.mask;
                let mut list = vec![q, k];
                list.extend([mask.base, mask.text_lengths, mask.mask].map(Arg::U64));
                list.extend([args.tiles, mask.blocks, args.features].map(Arg::U32));
                list.extend([args.top.min(args.tiles), mask.block].map(Arg::U32));
                list.extend([kv_heads, heads / kv_heads].map(Arg::U32));
                if weighed {
                    list.push(Arg::U64(args.weights));
                }
                Launch {
                    grid: [keep::thread_blocks(mask.blocks), heads, batch],
                    args: list,
                }
            }
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        match self {
            Self::Average => Builder::kernel("select_average", average::THREADS, average::body),
            Self::Weigh(features) => {
                let name = format!("select_weigh_d{features}");
                Builder::kernel(name, weigh::THREADS, |k| match features {
                    64 => weigh::body::<2>(k),
                    128 => weigh::body::<4>(k),
                    other => panic!("{other} features"),
                })
            }
            Self::Keep { weighed, room } => {
                let by = if weighed { "importance" } else { "product" };
                let name = format!("select_keep_{room}_by_{by}");
                Builder::kernel(name, keep::THREADS, |k| keep::body(k, weighed, room))
            }
        }
    }
}

/// The sum over a warp, in all lanes.
fn warp_sum(own: Reg<'_, f32>) -> Reg<'_, f32> {
    [1, 2, 4, 8, 16]
        .into_iter()
        .fold(own, |sum, distance| sum + sum.butterfly(distance))
}

/// 1 over the norm of a row, given the sum of its squares.
fn inverse_norm<'k>(k: &'k Builder, squares: Reg<'k, f32>) -> Reg<'k, f32> {
    k.var(1.0f32) / squares.sqrt().max(LEAST_NORM)
}
