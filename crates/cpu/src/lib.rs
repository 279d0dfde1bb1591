//! Block-sparse attention on CPUs: the embedded default, and what every test can run.
//!
//! In: tensors as [`View`]s whose shapes go together (the public crate has checked them), a
//! validated plan, a scale and a number of threads. Out: [`forward`] writes output and lse,
//! [`backward`] the gradients; [`pool`] means of tokens, from which masks are chosen. Called by the public crate only; knows nothing of GPUs.
//!
//! Work is proportional to the blocks that the plan keeps, memory to the sequence. A call goes
//! `forward`/`backward` (how tasks are cut and ordered) -> `pack` (tensors to operands) ->
//! `simd::gemm` and `simd::rows` (the arithmetic), with `threads` underneath.

mod backward;
mod buffer;
mod element;
mod forward;
mod order;
mod pack;
mod pool;
mod simd;
mod threads;
mod tiles;
mod view;

use std::num::NonZeroUsize;

pub use element::Element;
use flex_block_attn_mask::PlanView;
pub use order::{gather, scatter};
pub use view::{View, ViewMut};

/// What forward and backward are told beyond their tensors.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Factor of q k^T before the softmax; finite.
    pub scale: f64,
    /// How many threads work.
    pub threads: NonZeroUsize,
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// Queries, (batch, q_heads, q_len, head_dim).
    pub q: View<'a, T>,
    /// Keys, (batch, kv_heads, kv_len, head_dim); kv_heads divides q_heads.
    pub k: View<'a, T>,
    /// Values, of k's shape.
    pub v: View<'a, T>,
    /// Which blocks, for q's and k's lengths.
    pub plan: PlanView<'a>,
    /// Scale and threads.
    pub setting: Setting,
    /// Output, of q's shape.
    pub out: ViewMut<'a, T>,
    /// Natural logarithm of each query's sum of exp(scale * q·k), (batch, q_heads, q_len, 1).
    pub lse: ViewMut<'a, T::Real>,
}

/// Attention over the plan's blocks; of partial ones, over the pairs that its expression lets through.
///
/// # Panics
/// When shapes do not go together, or the host lacks numbers of the expression's tables.
pub fn forward<T: Element>(args: &Forward<'_, T>) {
    forward::forward(args);
}
/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a, T: Element> {
    /// The forward's queries.
    pub q: View<'a, T>,
    /// The forward's keys.
    pub k: View<'a, T>,
    /// The forward's values.
    pub v: View<'a, T>,
    /// The forward's output.
    pub out: View<'a, T>,
    /// The forward's lse.
    pub lse: View<'a, T::Real>,
    /// Gradient of the output, of q's shape.
    pub dout: View<'a, T>,
    /// Gradient of the lse, of its shape.
    pub dlse: Option<View<'a, T::Real>>,
    /// The forward's plan.
    pub plan: PlanView<'a>,
    /// Scale and threads.
    pub setting: Setting,
    /// Gradient of q, if wanted.
    pub dq: Option<ViewMut<'a, T>>,
    /// Gradient of k, if wanted.
    pub dk: Option<ViewMut<'a, T>>,
    /// Gradient of v, if wanted.
    pub dv: Option<ViewMut<'a, T>>,
}

/// Gradients of [`forward`].
///
/// # Panics
/// When shapes do not go together, or the host lacks numbers of the expression's tables.
pub fn backward<T: Element>(args: &Backward<'_, T>) {
    backward::backward(args);
}

/// Arguments of [`pool`].
#[derive(Debug)]
pub struct Pool<'a, T: Element> {
    /// What is pooled, (batch, heads, len, head_dim).
    pub tensor: View<'a, T>,
    /// Tokens of a block, at least 1; the last one may have fewer.
    pub block: usize,
    /// The tokens of each cell, counted from the start of a block. A cell's mean is over the tokens
    /// that there are, and 0 without any.
    pub cells: &'a [Vec<usize>],
    /// Where the tokens of blocks are, if they do not lie in the order of blocks.
    pub order: Option<Order<'a>>,
    /// How many threads work.
    pub threads: NonZeroUsize,
}

/// Blocks of tokens that lie elsewhere.
#[derive(Debug, Clone, Copy)]
pub struct Order<'a> {
    /// For each place of each block the token that is there; `None` is zeros.
    pub tokens: &'a [Option<usize>],
    /// Whether a mean is over zeros, too.
    pub zeros_count: bool,
}

/// Writes the means of all cells of all blocks, (batch, heads, blocks, cells, head_dim). They are
/// rounded to the tensor's type before they become float32.
///
/// # Panics
/// When `means` is of another length.
pub fn pool<T: Element>(args: &Pool<'_, T>, means: &mut [f32]) {
    pool::pool(args, means);
}

/// What products are made of on this CPU: for float32 operands, and for bf16 ones.
pub fn instruction_sets() -> [&'static str; 2] {
    struct Name<'a>(&'a mut &'static str);
    impl simd::Job<f32> for Name<'_> {
        fn run<I: simd::Isa<Real = f32>>(self) {
            *self.0 = I::NAME;
        }
    }
    [simd::Operands::Exact, simd::Operands::Bf16].map(|operands| {
        let mut name = "";
        simd::run_f32(Name(&mut name), operands);
        name
    })
}
