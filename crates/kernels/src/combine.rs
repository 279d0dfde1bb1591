//! Attention over several parts of the keys, put together: each part's output counts with the share that
//! its keys have in the sum of exponentials, which is what lses are logarithms of.
//!
//! Bound by memory: everything is read once and written once, rounded once. Lanes of a row have a chunk of
//! 16 bytes each, of all parts; a thread has several rows, whose loads are under way together. Called by
//! `flex-block-attn`.

use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg};

use crate::chunk::{self, Lanes, Rows};
use crate::forward::Tensor;

pub(crate) const THREADS: u32 = 256;
/// Rows of a thread.
const DEPTH: u32 = 2;
/// The most parts.
pub const MOST: u32 = 8;

/// What the kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns: 64 or 128.
    pub head_dim: u32,
    /// From 2 to [`MOST`].
    pub parts: u32,
}

/// Output and lse of (batch, heads, len) rows.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// The output, (batch, heads, len, head_dim).
    pub out: Tensor,
    /// Address of the lse, float32; of a head one number after the other.
    pub lse: u64,
    /// Numbers from one head and batch of the lse to the next.
    pub lse_strides: [u64; 2],
}

/// What a launch gives it.
#[derive(Debug, Clone)]
pub struct Args {
    /// As many as the config says. A row without any key has an output of 0 and an lse of -inf.
    pub parts: Vec<Part>,
    /// What is written.
    pub whole: Part,
    /// Batches.
    pub batch: u32,
    /// Heads.
    pub heads: u32,
    /// Rows of a head, at least 1.
    pub len: u32,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for element in [Element::Bf16, Element::F16] {
            for head_dim in [64, 128] {
                all.extend((2..=MOST).map(|parts| Self {
                    element,
                    head_dim,
                    parts,
                }));
            }
        }
        all
    }

    /// The launch for some tensors.
    ///
    /// # Panics
    /// If there are no rows, or as many parts as the config says, or if an output's address or strides
    /// are not multiples of 16 bytes.
    pub fn launch(self, args: &Args) -> Launch {
        assert!(
            args.len > 0 && args.parts.len() == self.parts as usize,
            "{args:?}"
        );
        let mut list = Vec::new();
        for part in args.parts.iter().chain([&args.whole]) {
            list.extend(chunk::args(part.out));
            let [head, batch] = part.lse_strides.map(|stride| 4 * stride);
            list.extend([part.lse, head, batch].map(Arg::U64));
        }
        list.push(Arg::U32(args.len));
        Launch {
            grid: [
                args.len.div_ceil(rows_of_block(self.head_dim)),
                args.heads,
                args.batch,
            ],
            args: list,
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        let Self {
            element,
            head_dim,
            parts,
        } = self;
        let name = format!("combine_{element:?}_d{head_dim}_{parts}").to_lowercase();
        Builder::kernel(name, THREADS, |k| self.body(k))
    }

    fn body(self, k: &Builder) {
        let parts: Vec<_> = (0..self.parts)
            .map(|part| InMemory::new(k, &format!("part{part}")))
            .collect();
        let whole = InMemory::new(k, "whole");
        let len = k.param::<u32>("len");

        let (rows, chunk) = own_rows(k, self.head_dim);
        let loaded: Vec<Vec<_>> = rows
            .iter()
            .map(|&row| {
                let inside = row.lt(len);
                let load = |part: &InMemory<'_>| {
                    let [lse] = k.load_constants_where::<f32, 1>(inside, part.number(row));
                    let words: [Reg<'_, u32>; 4] =
                        k.load_constants_where(inside, part.out.chunk(row, chunk));
                    (lse, words)
                };
                parts.iter().map(load).collect()
            })
            .collect();
        for (&row, parts) in rows.iter().zip(&loaded) {
            let (words, lse) = self::whole(parts, self.element);
            k.if_(row.lt(len), || {
                k.store_globals(whole.out.chunk(row, chunk), words);
                k.if_(chunk.equals(0), || k.store_global(whole.number(row), lse));
            });
        }
    }
}

/// Rows of a thread block, of as many columns; here, and where tiles in parts are put together.
pub(crate) fn rows_of_block(head_dim: u32) -> u32 {
    THREADS / 32 * DEPTH * Lanes::new(head_dim).rows
}

/// This thread's rows, counted by thread blocks along x, and its chunk of them.
pub(crate) fn own_rows(k: &Builder, head_dim: u32) -> (Vec<Reg<'_, u32>>, Reg<'_, u32>) {
    let lanes = Lanes::new(head_dim);
    let (own, chunk) = (k.lane() / lanes.each, k.lane() % lanes.each);
    let of_warps = k.cta_x() * rows_of_block(head_dim) + (k.tid() >> 5) * (DEPTH * lanes.rows);
    let first = of_warps + own;
    let rows = (0..DEPTH).map(|i| first + i * lanes.rows).collect();
    (rows, chunk)
}

/// A chunk of the output and the lse of a row, from those of its parts.
pub(crate) fn whole<'k>(
    parts: &[(Reg<'k, f32>, [Reg<'k, u32>; 4])],
    element: Element,
) -> ([Reg<'k, u32>; 4], Reg<'k, f32>) {
    let k = parts[0].0.builder();
    let lses = parts.iter().map(|(lse, _)| *lse);
    let most = lses
        .clone()
        .skip(1)
        .fold(parts[0].0, |most, lse| most.max(lse));
    // Of no keys at all, weights are exp(-inf - 0), where exp(-inf + inf) would be no number.
    let base = most.equals(f32::NEG_INFINITY).select(0.0, most);
    let weights: Vec<_> = lses
        .map(|lse| ((lse - base) * std::f32::consts::LOG2_E).exp2())
        .collect();
    let sum = weights[1..].iter().fold(weights[0], |sum, &w| sum + w);
    let share = sum.equals(0.0).select(0.0, sum.reciprocal());
    let mut total = [0.0; 8].map(|zero: f32| k.var(zero));
    for (&(_, words), &weight) in parts.iter().zip(&weights) {
        for (total, x) in total.iter_mut().zip(chunk::floats(words, element)) {
            *total = x.fma(weight * share, *total);
        }
    }
    let words = chunk::packed(total, element);
    (words, sum.log2().fma(std::f32::consts::LN_2, base))
}

/// The rows of this thread block's head, in its batch.
struct InMemory<'k> {
    out: Rows<'k>,
    lse: Reg<'k, u64>,
}

impl<'k> InMemory<'k> {
    /// Declares its parameters.
    fn new(k: &'k Builder, name: &str) -> Self {
        let out = Rows::new(k, name);
        let lse = k.param::<u64>(&format!("{name}_lse"));
        let stride = |of: &str| k.param::<u64>(&format!("{name}_lse_{of}_stride"));
        let (head, batch) = (stride("head"), stride("batch"));
        Self {
            out,
            lse: lse + k.cta_y().to_u64() * head + k.cta_z().to_u64() * batch,
        }
    }

    /// Address of a row's lse.
    fn number(&self, row: Reg<'k, u32>) -> Reg<'k, u64> {
        self.lse + row.times_wide(4)
    }
}
