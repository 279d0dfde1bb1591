//! The backward pass: arguments to three launches.

use flex_block_attn_cuda as cuda;
use flex_block_attn_kernels::Launch;
use flex_block_attn_kernels::backward::{Args, Config, Workspace, finish, prepare};

use super::{Choice, Plan, Step, Stream, choice, contiguous, in_memory, put, refused};
use crate::{Gradients, Options, Result, Saved, Tensor, check};

/// What [`backward`] needs besides: two arrays of 32-bit numbers at multiples of 16 bytes. Their
/// contents do not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackwardWorkspace {
    /// Numbers of the first.
    pub rows: usize,
    /// Numbers of the second: as many as q has, in whole units of 64 queries, and one in 1024 more.
    pub sums: usize,
}

impl BackwardWorkspace {
    /// For a q of this shape.
    pub fn new([batch, heads, q_len, head_dim]: [usize; 4]) -> Self {
        let (workspace, lines) = (Workspace::new(q_len), batch * heads);
        Self {
            rows: 2 * lines * workspace.line,
            sums: Self::tickets_at([batch, heads, q_len, head_dim])
                + workspace.tickets(lines, head_dim),
        }
    }

    /// Where in the second array the tickets lie, behind the sums.
    fn tickets_at([batch, heads, q_len, head_dim]: [usize; 4]) -> usize {
        batch * heads * Workspace::new(q_len).units * 64 * head_dim
    }
}

/// What a call puts on a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct BackwardSteps {
    /// Words that must be 0 before the launches: the first one's address, and how many.
    pub zeroed: (u64, usize),
    /// The launches, in order.
    pub launches: Vec<(Step, Launch)>,
}

/// The launches of [`backward`]; none if there are no queries or no keys. `workspace` are the addresses
/// of the two arrays of [`BackwardWorkspace`].
///
/// # Errors
/// Arguments that do not go together, or that the kernels do not take.
pub fn backward_steps(
    saved: &Saved<'_>,
    dout: Tensor<'_>,
    dlse: Option<Tensor<'_>>,
    plan: &Plan,
    options: &Options,
    gradients: &Gradients<'_>,
    workspace: [u64; 2],
) -> Result<Option<BackwardSteps>> {
    check::backward(saved, &dout, dlse.as_ref(), plan.mask(), options, gradients)?;
    let Saved { q, k, v, out, lse } = *saved;
    if q.shape.contains(&0) || k.shape.contains(&0) {
        return Ok(None);
    }
    let Choice {
        element,
        head_dim,
        q_block,
        kv_block,
        scale,
    } = choice(&q, plan, options)?;
    let (mask, tables) = plan.exact();
    let config = Config {
        deterministic: options.deterministic,
        ..Config::choose(element, head_dim, q_block, kv_block, mask)
            .ok_or_else(|| refused("head_dim", head_dim, "64 or 128"))?
    };
    contiguous("lse", lse.shape, lse.strides)?;
    if let Some(dlse) = &dlse {
        contiguous("dlse", dlse.shape, dlse.strides)?;
    }
    let read = |argument, x: Tensor<'_>| in_memory(argument, x.pointer as u64, x.shape, x.strides);
    let missing = |argument| refused(argument, "none", "given");
    let [dq, dk, dv] = [
        ("dq", &gradients.dq),
        ("dk", &gradients.dk),
        ("dv", &gradients.dv),
    ]
    .map(|(argument, gradient)| {
        let x = gradient.as_ref().ok_or_else(|| missing(argument))?;
        in_memory(argument, x.pointer as u64, x.shape, x.strides)
    });
    let [batch, heads, q_len, _] = q.shape.map(|extent| extent as u32);
    let numbers = BackwardWorkspace::new(q.shape);
    let [rows, sums] = workspace;
    let dout = read("dout", dout)?;
    let before = prepare::Args {
        out: read("out", out)?,
        dout,
        lse: lse.pointer as u64,
        dlse: dlse.map_or(0, |dlse| dlse.pointer as u64),
        log2: rows,
        delta: rows + 2 * numbers.rows as u64,
        batch,
        heads,
        q_len,
    };
    let main = Args {
        q: read("q", q)?,
        k: read("k", k)?,
        v: read("v", v)?,
        dout,
        dk: dk?,
        dv: dv?,
        lse: before.log2,
        delta: before.delta,
        dq: sums,
        tickets: sums + 4 * BackwardWorkspace::tickets_at(q.shape) as u64,
        plan: plan.address,
        layout: plan.layout,
        batch,
        heads,
        kv_heads: k.shape[1] as u32,
        scale,
        tables,
    };
    let after = finish::Args {
        sums,
        dq: dq?,
        batch,
        heads,
        q_len,
        scale,
    };
    let first = prepare::Config { element, head_dim };
    let last = finish::Config { element, head_dim };
    Ok(Some(BackwardSteps {
        zeroed: (sums, numbers.sums),
        launches: vec![
            (Step::Prepare(first), first.launch(&before)),
            (Step::Backward(config), config.launch(&main)),
            (Step::Finish(last), last.launch(&after)),
        ],
    }))
}

/// [`crate::backward()`] on a stream of a GPU, for what [`super::forward()`] accepts; all gradients are
/// computed, and `lse` and `dlse` are contiguous. dq is a sum in float32, in any order, and repeats up
/// to rounding, unless [`Options::deterministic`] is asked for.
///
/// # Errors
/// Arguments that do not go together or that the kernels do not take; no GPU. Nothing has been put on
/// the stream then.
///
/// # Safety
/// All pointers and addresses are of the device's memory, as large as shapes and strides say; nobody
/// writes the inputs, or uses the outputs or the workspace, before the stream has come past this call.
/// The stream is alive.
#[allow(clippy::too_many_arguments)]
pub unsafe fn backward(
    saved: &Saved<'_>,
    dout: Tensor<'_>,
    dlse: Option<Tensor<'_>>,
    plan: &Plan,
    options: &Options,
    gradients: &Gradients<'_>,
    workspace: [u64; 2],
    stream: Stream,
) -> Result<()> {
    let steps = backward_steps(saved, dout, dlse, plan, options, gradients, workspace)?;
    let Some(BackwardSteps { zeroed, launches }) = steps else {
        return Ok(());
    };
    let device = cuda::Device::get(stream.device)?;
    // SAFETY: the caller's word.
    unsafe {
        device.zero_words(zeroed.0, zeroed.1, cuda::Stream(stream.handle))?;
        for (step, launch) in launches {
            put(step, &launch, stream)?;
        }
    }
    Ok(())
}
