//! The forward pass: arguments to a launch.

use flex_block_attn_cuda::Device;
use flex_block_attn_kernels::Launch;
use flex_block_attn_kernels::cut::{Cut, InParts};
use flex_block_attn_kernels::forward::{Args, Config};

use super::video::{canvas, in_lines, no_kernel};
use super::{Choice, Plan, Step, Stream, choice, contiguous, in_memory, put};
use crate::{Error, Options, Result, Tensor, TensorMut, check};

/// Bytes of the memory in which [`forward()`] computes some of its tiles in parts, on a GPU of so many
/// multiprocessors: 0 for most calls, and for those that it refuses.
pub fn forward_slots(
    q: &Tensor<'_>,
    plan: &Plan,
    options: &Options,
    multiprocessors: u32,
) -> usize {
    if q.shape.contains(&0) {
        return 0;
    }
    let bytes = || {
        let choice = choice(q, plan, options)?;
        let (config, cut) = config(&choice, q, plan, options, multiprocessors)?;
        Ok::<_, Error>(config.slot_bytes(cut))
    };
    bytes().unwrap_or(0)
}

/// Which config computes it, and which tiles in parts.
fn config(
    choice: &Choice,
    q: &Tensor<'_>,
    plan: &Plan,
    options: &Options,
    multiprocessors: u32,
) -> Result<(Config, Cut)> {
    let &Choice {
        element,
        head_dim,
        q_block,
        kv_block,
        ..
    } = choice;
    let config = match &options.video {
        None => Config::choose(element, head_dim, q_block, kv_block, plan.exact().0),
        Some(_) => Config::choose_for_canvas(element, head_dim, q_block),
    };
    let config = config.ok_or_else(|| no_kernel(head_dim, options))?;
    let [batch, heads, ..] = q.shape;
    let lines = (batch * heads) as u32;
    let cut = config.cut(plan.layout, lines, multiprocessors);
    // Few tiles are faster in parts.
    let in_pairs = config.in_pairs(cut, plan.layout, plan.alike, lines, multiprocessors);
    Ok(in_pairs.map_or((config, cut), |pairs| {
        (pairs, Cut::none(cut.whole + cut.tiles))
    }))
}

/// The launches of [`forward()`], for a GPU of so many multiprocessors; none if there are no queries.
///
/// # Errors
/// Arguments that do not go together, or that the kernels do not take.
#[allow(clippy::too_many_arguments)]
pub fn forward_steps(
    q: Tensor<'_>,
    k: Tensor<'_>,
    v: Tensor<'_>,
    plan: &Plan,
    options: &Options,
    out: &TensorMut<'_>,
    lse: Option<&TensorMut<'_>>,
    counter: u64,
    slots: Option<u64>,
    multiprocessors: u32,
) -> Result<Vec<(Step, Launch)>> {
    check::forward([&q, &k, &v], plan.mask(), options, out, lse)?;
    if q.shape.contains(&0) {
        return Ok(Vec::new());
    }
    let choice = choice(&q, plan, options)?;
    let (config, cut) = config(&choice, &q, plan, options, multiprocessors)?;
    let slots = slots.filter(|_| cut.tiles > 0);
    let canvas = options.video.as_ref().map(canvas).transpose()?;
    if let Some(lse) = lse {
        contiguous("lse", lse.shape, lse.strides)?;
    }
    let [batch, heads, ..] = q.shape;
    let args = Args {
        q: in_memory("q", q.pointer as u64, q.shape, q.strides)?,
        k: in_memory("k", k.pointer as u64, k.shape, k.strides)?,
        v: in_memory("v", v.pointer as u64, v.shape, v.strides)?,
        out: in_memory("out", out.pointer as u64, out.shape, out.strides)?,
        lse: lse.map(|lse| lse.pointer as u64),
        plan: plan.address,
        layout: plan.layout,
        alike: plan.alike,
        batch: batch as u32,
        heads: heads as u32,
        kv_heads: k.shape[1] as u32,
        scale: choice.scale,
        counter,
        blocks: multiprocessors,
        in_parts: slots.map(|slots| InParts { cut, slots }),
        tables: plan.exact().1,
        canvas,
    };
    in_lines(
        [
            ("q", &args.q, q.shape),
            ("k", &args.k, k.shape),
            ("v", &args.v, v.shape),
            ("out", &args.out, q.shape),
        ],
        options,
    )?;
    let main = (Step::Forward(config), config.launch(&args));
    let join = config.join(&args);
    let join = join.map(|(config, launch)| (Step::JoinOutputs(config), launch));
    Ok(std::iter::once(main).chain(join).collect())
}

/// [`crate::forward`] on a stream of a GPU: bfloat16 and float16, head_dim 64 and 128, blocks of any
/// multiples of 16. `lse`, if it is wanted, is contiguous; addresses, and strides of dimensions longer
/// than 1, are multiples of 16 bytes; a negative scale is refused. Bitwise repeatable.
///
/// By the 32-bit word at `counter` thread blocks share their work. It is 0, and will be 0 again when the
/// stream has come past this call: calls that follow each other on a stream may use the same.
///
/// In `slots`, of as many bytes as [`forward_slots`] says, at a multiple of 16, tiles are computed in parts
/// where there are too few for all multiprocessors; each part's output is rounded once, and then their sum.
/// Without it all are computed whole.
///
/// # Errors
/// Arguments that do not go together or that the kernels do not take; no GPU. Nothing has been put on
/// the stream then.
///
/// # Safety
/// All pointers and addresses are of the device's memory, as large as shapes and strides say; nobody
/// writes the inputs, or uses the outputs, the counter or the slots, before the stream has come past
/// this call. The stream is alive.
#[allow(clippy::too_many_arguments)]
pub unsafe fn forward(
    q: Tensor<'_>,
    k: Tensor<'_>,
    v: Tensor<'_>,
    plan: &Plan,
    options: &Options,
    out: TensorMut<'_>,
    lse: Option<TensorMut<'_>>,
    counter: u64,
    slots: Option<u64>,
    stream: Stream,
) -> Result<()> {
    let device = Device::get(stream.device)?;
    let blocks = device.multiprocessors();
    let lse = lse.as_ref();
    for (step, launch) in forward_steps(q, k, v, plan, options, &out, lse, counter, slots, blocks)?
    {
        // SAFETY: the caller's word.
        unsafe { put(step, &launch, stream)? };
    }
    Ok(())
}
