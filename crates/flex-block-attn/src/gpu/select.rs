//! Choosing tiles: arguments to launches. The same choices as [`crate::select`] makes on the CPU.

use flex_block_attn_kernels::select::{self, Args, MOST_TILES, Mask, Pooled};
use flex_block_attn_kernels::{Launch, pool};

use super::video::triple;
use super::{Step, Stream, computed, in_memory, put, refused};
use crate::select::{Choice, Scoring};
use crate::{Result, Tensor, Video, check};

/// Most tiles that [`select()`] chooses of.
pub const MOST_SELECTED: usize = MOST_TILES as usize;

/// Where the tokens of tiles are.
#[derive(Debug, Clone, Copy)]
pub enum Order<'a> {
    /// One tile behind the other, of so many tokens; tokens behind them are not looked at.
    Tiles {
        /// Tiles.
        tiles: usize,
        /// Tokens of each.
        block: usize,
    },
    /// In (time, height, width) order, with the text behind.
    Video(&'a Video),
}

/// What [`select()`] reads and writes besides queries and keys, in device memory.
#[derive(Debug, Clone, Copy)]
pub struct Selection {
    /// Address of the mask, a byte for each pair of blocks, 0 or 1: (batch, heads of q, or 1 where heads
    /// share a mask, blocks, blocks), contiguous. [`super::plan()`] takes it.
    pub mask: u64,
    /// Address of what it is united with, of (blocks, blocks) bytes, contiguous: sliding tiles, or text
    /// that sees and is seen by all. What is not 0 is kept.
    pub base: u64,
    /// Blocks: tiles, then those of text, of as many tokens.
    pub blocks: usize,
    /// Address of the tokens of text that count, int64, one number for each batch; all count without.
    /// Blocks of text behind them, of which one is left at least, see only themselves.
    pub text_lengths: Option<u64>,
    /// Address of [`selection_numbers`] float32, a multiple of 16; their contents do not matter.
    pub workspace: u64,
}

/// A call that kernels take, and its sizes in their words.
struct Call {
    config: pool::Config,
    tiles: pool::Tiles,
    batch: u32,
    heads: [u32; 2],
    shared: bool,
    /// Weight of relevance, if it is by importance.
    lambda: Option<f32>,
    top: u32,
}

impl Call {
    fn new(q: &Tensor<'_>, k: &Tensor<'_>, order: Order<'_>, choice: &Choice) -> Result<Self> {
        check::pooled_pair(q, k)?;
        let [batch, heads, _, head_dim] = q.shape;
        let (element, head_dim) = computed("q", q.dtype, head_dim)?;
        if [batch, heads].into_iter().any(|extent| extent > 65_535) {
            let allowed = "of at most 65535 batches and heads";
            return Err(refused("q", format!("{:?}", q.shape), allowed));
        }
        let tiles = tiles(order)?;
        for (argument, tokens) in [("q", q.shape[2]), ("k", k.shape[2])] {
            check_tokens(argument, tokens, order)?;
        }
        let groups = u64::from(tiles.count()) * (heads + k.shape[1]) as u64;
        if tiles.count() > MOST_TILES || groups >= 1 << 31 {
            let allowed = "of at most 6144 tiles";
            return Err(refused("q", format!("of {} tiles", tiles.count()), allowed));
        }
        if !matches!(choice.cells, None | Some([_, [1, 1, 1]])) {
            let got = format!("{:?}", choice.cells);
            return Err(refused("cells", got, "a single one"));
        }
        let top = match choice.top {
            0 => return Err(refused("top", 0, "at least 1")),
            top => top.min(MOST_SELECTED) as u32,
        };
        let lambda = match choice.scoring {
            Scoring::Similarity => None,
            Scoring::Importance { lambda } if (0.0..=1.0).contains(&lambda) => Some(lambda as f32),
            other => {
                let allowed = "similarity, or importance of a lambda from 0 to 1";
                return Err(refused("scoring", format!("{other:?}"), allowed));
            }
        };
        Ok(Self {
            config: pool::Config { element, head_dim },
            tiles,
            batch: batch as u32,
            heads: [heads, k.shape[1]].map(|heads| heads as u32),
            shared: choice.share_heads,
            lambda,
            top,
        })
    }

    /// Numbers of each of the arrays of a workspace: means of q and k, those of all heads, weights.
    fn numbers(&self) -> [usize; 5] {
        let of_head = self.tiles.count() as usize * self.config.head_dim as usize;
        let batch = self.batch as usize;
        let [q, k] = self.heads.map(|heads| batch * heads as usize * of_head);
        let average = if self.shared { batch * of_head } else { 0 };
        let scored = if self.shared {
            1
        } else {
            self.heads[1] as usize
        };
        let weights = match self.lambda {
            Some(_) => 2 * batch * scored * self.tiles.count() as usize,
            None => 0,
        };
        [q, k, average, average, weights]
    }
}

/// The tiles, if a kernel takes them.
fn tiles(order: Order<'_>) -> Result<pool::Tiles> {
    let fits = |n: usize| u32::try_from(n).ok();
    let tiles = match order {
        Order::Tiles { tiles, block } => {
            let len = tiles.checked_mul(block).and_then(fits);
            let block = fits(block).filter(|&block| block > 0);
            len.zip(block)
                .map(|(len, block)| pool::Tiles::blocks(len, block))
        }
        Order::Video(video) => {
            video.check_sizes()?;
            let zeros_count = video.padding == crate::Padding::Zero;
            triple(video.thw)
                .zip(triple(video.tile))
                .map(|(thw, tile)| pool::Tiles {
                    thw,
                    tile,
                    zeros_count,
                })
        }
    };
    tiles.filter(|tiles| tiles.fits()).ok_or_else(|| {
        let allowed = "one tile at least, of fewer than 2^21 tokens, and of fewer than 2^31 in all";
        refused("the order of tokens", format!("{order:?}"), allowed)
    })
}

fn check_tokens(argument: &'static str, tokens: usize, order: Order<'_>) -> Result<()> {
    let (fits, allowed) = match order {
        Order::Tiles { tiles, block } => (tokens >= tiles * block, "at least as long as all tiles"),
        Order::Video(video) => (tokens == video.tokens(), "of all tokens of the video"),
    };
    match fits {
        true => Ok(()),
        false => Err(refused(argument, format!("{tokens} tokens"), allowed)),
    }
}

/// Numbers of 32 bits that [`select()`] needs besides.
///
/// # Errors
/// Arguments that do not go together, or that the kernels do not take.
pub fn selection_numbers(
    q: &Tensor<'_>,
    k: &Tensor<'_>,
    order: Order<'_>,
    choice: &Choice,
) -> Result<usize> {
    Ok(Call::new(q, k, order, choice)?.numbers().iter().sum())
}

/// The launches of [`select()`], in order; none if there are no batches or heads.
///
/// # Errors
/// Arguments that do not go together, or that the kernels do not take.
pub fn select_steps(
    q: &Tensor<'_>,
    k: &Tensor<'_>,
    order: Order<'_>,
    choice: &Choice,
    selection: &Selection,
) -> Result<Vec<(Step, Launch)>> {
    let call = Call::new(q, k, order, choice)?;
    let count = call.tiles.count();
    let blocks = u32::try_from(selection.blocks)
        .ok()
        .filter(|&n| (count..=65_535).contains(&n));
    let Some(blocks) = blocks else {
        let allowed = "all tiles and blocks of text, at most 65535";
        return Err(refused("blocks", selection.blocks, allowed));
    };
    if !selection.workspace.is_multiple_of(16) {
        let got = format!("{:#x}", selection.workspace);
        return Err(refused("workspace", got, "at a multiple of 16 bytes"));
    }
    if call.batch == 0 || call.heads[0] == 0 {
        return Ok(Vec::new());
    }
    let mut end = selection.workspace;
    let [q_means, k_means, q_average, k_average, weights] = call.numbers().map(|numbers| {
        let address = end;
        end += 4 * numbers as u64;
        address
    });
    let [heads, kv_heads] = call.heads;
    let pooling = pool::Args {
        tensors: [
            pool::Pooled {
                tensor: in_memory("q", q.pointer as u64, q.shape, q.strides)?,
                heads,
                means: q_means,
            },
            pool::Pooled {
                tensor: in_memory("k", k.pointer as u64, k.shape, k.strides)?,
                heads: kv_heads,
                means: k_means,
            },
        ],
        batch: call.batch,
        tiles: call.tiles,
    };
    let pooled = |means, heads, average| Pooled {
        means,
        heads,
        average,
    };
    let args = Args {
        pooled: [
            pooled(q_means, heads, q_average),
            pooled(k_means, kv_heads, k_average),
        ],
        shared: call.shared,
        lambda: call.lambda.unwrap_or(1.0),
        weights,
        batch: call.batch,
        tiles: count,
        features: call.config.head_dim,
        top: call.top,
        mask: Mask {
            mask: selection.mask,
            base: selection.base,
            blocks,
            text_lengths: selection.text_lengths.unwrap_or(0),
            block: call.tiles.tile.iter().product(),
        },
    };
    let mut steps = vec![(Step::Pool(call.config), call.config.launch(&pooling))];
    for config in select::Config::of(&args, call.lambda.is_some()) {
        steps.push((Step::Select(config), config.launch(&args)));
    }
    Ok(steps)
}

/// Chooses tiles, on a stream of a GPU: the mask in which each tile sees those that suit it best, as
/// [`crate::select::video_tiles`] and [`crate::select::tiles_in_place`] have it, united with what
/// [`Selection::base`] keeps. In two launches, three by importance, and one more where heads share a mask.
///
/// bfloat16 and float16, head_dim 64 and 128, at most [`MOST_SELECTED`] tiles, a single cell of each;
/// [`Scoring::Mass`] is refused; [`Choice::threads`] is not looked at. Addresses, and strides of dimensions
/// longer than 1, are multiples of 16 bytes. Scores are float32: tiles whose scores differ by less than
/// that rounds may be told otherwise than on the CPU. Of equal scores the first are kept. Bitwise
/// repeatable.
///
/// # Errors
/// Arguments that do not go together or that the kernels do not take; no GPU. Nothing has been put on the
/// stream then.
///
/// # Safety
/// All pointers and addresses are of the device's memory, as large as shapes, strides and the
/// [`Selection`] say; nobody writes what is read, or uses the mask or the workspace, before the stream has
/// come past this call. The stream is alive.
///
/// ```no_run
/// use flex_block_attn::gpu::{self, Mask, Order, Selection, Stream};
/// use flex_block_attn::select::{Choice, Scoring};
/// use flex_block_attn::{Error, Tensor, Video};
///
/// /// A mask of tiles, and from it a plan; `selection.workspace` has `gpu::selection_numbers` numbers.
/// unsafe fn choose(
///     [q, k]: [Tensor<'_>; 2],
///     video: &Video,
///     selection: &Selection,
///     plan: &gpu::Plan,
///     stream: Stream,
/// ) -> Result<(), Error> {
///     let choice = Choice::new(64, Scoring::Importance { lambda: 0.7 });
///     let (n, heads) = (selection.blocks as u64, q.shape()[1] as u64);
///     unsafe {
///         gpu::select(&q, &k, Order::Video(video), &choice, selection, stream)?;
///         let strides = [heads * n * n, n * n, n, 1];
///         gpu::plan(&Mask::Bytes { address: selection.mask, strides }, plan, Some(video), stream)
///     }
/// }
/// ```
pub unsafe fn select(
    q: &Tensor<'_>,
    k: &Tensor<'_>,
    order: Order<'_>,
    choice: &Choice,
    selection: &Selection,
    stream: Stream,
) -> Result<()> {
    for (step, launch) in select_steps(q, k, order, choice, selection)? {
        // SAFETY: the caller's word.
        unsafe { put(step, &launch, stream)? };
    }
    Ok(())
}
