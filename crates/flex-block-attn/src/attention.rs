//! [`forward`] and [`backward`]: arguments are checked, a backend is chosen, its arguments are
//! filled in. Today's only backend is the CPU's.

use std::num::NonZeroUsize;

use flex_block_attn_cpu as cpu;
use flex_block_attn_mask::expression::Expression;
use flex_block_attn_mask::{PlanLayout, PlanView};
use half::{bf16, f16};

use crate::video::{self, Video};
use crate::{DType, Error, Result, Tensor, TensorMut, check};

/// What a call may be told beyond its tensors and its plan.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Options {
    /// Factor of q k^T before the softmax; `None` is `1 / sqrt(head_dim)`.
    pub scale: Option<f64>,
    /// Threads of the CPU backend; `None` is one for each core.
    pub threads: Option<NonZeroUsize>,
    /// Whether a GPU's gradient of q repeats to the last bit, as all other results do: it takes longer.
    pub deterministic: bool,
    /// The video whose tokens these are, if the plan's blocks are its tiles: tensors are in (time, height,
    /// width) order, text behind. The lse then has a number for each of [`Video::places`], in an order
    /// that only the backward pass of the same backend knows, and no gradient.
    pub video: Option<Video>,
}

/// What the forward read and wrote, for the backward to read again.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// Queries, (batch, q_heads, q_len, head_dim).
    pub q: Tensor<'a>,
    /// Keys, (batch, kv_heads, kv_len, head_dim).
    pub k: Tensor<'a>,
    /// Values, of k's shape.
    pub v: Tensor<'a>,
    /// The forward's output, of q's shape.
    pub out: Tensor<'a>,
    /// The forward's lse, (batch, q_heads, q_len, 1).
    pub lse: Tensor<'a>,
}

/// Where the backward writes; what is `None` is not computed.
#[derive(Debug, Default)]
pub struct Gradients<'a> {
    /// Gradient of q, of its shape and dtype.
    pub dq: Option<TensorMut<'a>>,
    /// Gradient of k, of its shape and dtype.
    pub dk: Option<TensorMut<'a>>,
    /// Gradient of v, of its shape and dtype.
    pub dv: Option<TensorMut<'a>>,
}

/// Attention over the blocks of `plan`; of partial ones, over the pairs that its expression lets through.
///
/// Tensors are (batch, heads, sequence, head_dim), only the last dimension being contiguous; `out`
/// has q's shape and dtype. `lse`, (batch, q_heads, q_len, 1), receives the natural logarithm of
/// the sum of `exp(scale * q·k)` in float32 (float64 for float64 tensors). Algorithm: online
/// softmax over key blocks (Dao et al., FlashAttention, arXiv 2205.14135, algorithm 1).
///
/// # Errors
/// Arguments that do not go together; nothing has been written then.
pub fn forward(
    q: Tensor<'_>,
    k: Tensor<'_>,
    v: Tensor<'_>,
    plan: PlanView<'_>,
    options: &Options,
    out: TensorMut<'_>,
    lse: TensorMut<'_>,
) -> Result<()> {
    let layout = plan.layout();
    let mask = on_host(plan, &layout)?;
    check::forward([&q, &k, &v], mask, options, &out, Some(&lse))?;
    if let Some(video) = &options.video {
        let of = (video, options);
        return match q.dtype {
            DType::F16 => video::forward::<f16>([q, k, v], plan, of, out, lse),
            DType::BF16 => video::forward::<bf16>([q, k, v], plan, of, out, lse),
            DType::F32 => video::forward::<f32>([q, k, v], plan, of, out, lse),
            DType::F64 => video::forward::<f64>([q, k, v], plan, of, out, lse),
        };
    }
    match q.dtype {
        DType::F16 => cpu_forward::<f16>([q, k, v], plan, options, out, lse),
        DType::BF16 => cpu_forward::<bf16>([q, k, v], plan, options, out, lse),
        DType::F32 => cpu_forward::<f32>([q, k, v], plan, options, out, lse),
        DType::F64 => cpu_forward::<f64>([q, k, v], plan, options, out, lse),
    }
    Ok(())
}

/// Gradients of [`forward`].
///
/// `dout` is the gradient of `out` (any strides, last dimension contiguous), `dlse`, if any, that
/// of `lse`. Algorithm: recomputation of P from the lse, block by block (Dao, FlashAttention-2,
/// arXiv 2307.08691, algorithm 2), with `dlse` subtracted from delta. Bitwise repeatable for the
/// same number of threads.
///
/// # Errors
/// Arguments that do not go together; nothing has been written then.
pub fn backward(
    saved: Saved<'_>,
    dout: Tensor<'_>,
    dlse: Option<Tensor<'_>>,
    plan: PlanView<'_>,
    options: &Options,
    gradients: Gradients<'_>,
) -> Result<()> {
    let layout = plan.layout();
    let mask = on_host(plan, &layout)?;
    check::backward(&saved, &dout, dlse.as_ref(), mask, options, &gradients)?;
    if let Some(video) = &options.video {
        let of = (video, options);
        return match saved.q.dtype {
            DType::F16 => video::backward::<f16>(saved, dout, plan, of, gradients),
            DType::BF16 => video::backward::<bf16>(saved, dout, plan, of, gradients),
            DType::F32 => video::backward::<f32>(saved, dout, plan, of, gradients),
            DType::F64 => video::backward::<f64>(saved, dout, plan, of, gradients),
        };
    }
    match saved.q.dtype {
        DType::F16 => cpu_backward::<f16>(saved, dout, dlse, plan, options, gradients),
        DType::BF16 => cpu_backward::<bf16>(saved, dout, dlse, plan, options, gradients),
        DType::F32 => cpu_backward::<f32>(saved, dout, dlse, plan, options, gradients),
        DType::F64 => cpu_backward::<f64>(saved, dout, dlse, plan, options, gradients),
    }
    Ok(())
}

/// A plan's mask; its expression is evaluated here, of tables that are here.
fn on_host<'a>(plan: PlanView<'a>, layout: &'a PlanLayout) -> Result<check::Mask<'a>> {
    let expression = plan.expression();
    let tables = expression.map_or(&[][..], |expression| expression.tables());
    if let Some(table) = tables.iter().position(|table| table.values().is_none()) {
        let allowed = "in the host's memory, as the tensors are";
        return Err(Error::MaskTable { table, allowed });
    }
    Ok(check::Mask {
        layout,
        formula: expression.map(Expression::formula),
    })
}

pub(crate) fn setting(options: &Options, head_dim: usize) -> cpu::Setting {
    cpu::Setting {
        scale: options
            .scale
            .unwrap_or_else(|| (head_dim as f64).sqrt().recip()),
        threads: threads(options.threads),
    }
}

/// The threads that were asked for, or one for each core.
pub(crate) fn threads(wanted: Option<NonZeroUsize>) -> NonZeroUsize {
    wanted.unwrap_or_else(|| std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN))
}

fn cpu_forward<T: cpu::Element>(
    [q, k, v]: [Tensor<'_>; 3],
    plan: PlanView<'_>,
    options: &Options,
    out: TensorMut<'_>,
    lse: TensorMut<'_>,
) {
    cpu::forward(&cpu::Forward::<T> {
        q: view(q),
        k: view(k),
        v: view(v),
        plan,
        setting: setting(options, q.shape[3]),
        out: view_mut(out),
        lse: view_mut(lse),
    });
}

fn cpu_backward<T: cpu::Element>(
    saved: Saved<'_>,
    dout: Tensor<'_>,
    dlse: Option<Tensor<'_>>,
    plan: PlanView<'_>,
    options: &Options,
    gradients: Gradients<'_>,
) {
    cpu::backward(&cpu::Backward::<T> {
        q: view(saved.q),
        k: view(saved.k),
        v: view(saved.v),
        out: view(saved.out),
        lse: view(saved.lse),
        dout: view(dout),
        dlse: dlse.map(view),
        plan,
        setting: setting(options, saved.q.shape[3]),
        dq: gradients.dq.map(view_mut),
        dk: gradients.dk.map(view_mut),
        dv: gradients.dv.map(view_mut),
    });
}

/// The backend's view of a checked tensor: `T` is its dtype.
pub(crate) fn view<T>(tensor: Tensor<'_>) -> cpu::View<'_, T> {
    let [batch, head, token, _] = tensor.strides;
    // SAFETY: who made the tensor promised its elements, by slice or by contract; `check` has
    // found its last dimension contiguous and its dtype that of the call, from which `T` follows.
    unsafe { cpu::View::new(tensor.pointer.cast(), tensor.shape, [batch, head, token]) }
}

/// The backend's view of a checked tensor to be written: `T` is its dtype.
pub(crate) fn view_mut<T>(tensor: TensorMut<'_>) -> cpu::ViewMut<'_, T> {
    let [batch, head, token, _] = tensor.strides;
    // SAFETY: as for `view`; besides, `check` has found the elements to lie apart.
    unsafe { cpu::ViewMut::new(tensor.pointer.cast(), tensor.shape, [batch, head, token]) }
}
