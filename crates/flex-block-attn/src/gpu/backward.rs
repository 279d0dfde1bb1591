//! The backward pass: arguments to three launches, up to five.

use flex_block_attn_cuda as cuda;
use flex_block_attn_kernels::Launch;
use flex_block_attn_kernels::backward::{
    Args, Config, WINDOW, Workspace, bounds, cut, finish, prepare, slot_numbers,
};
use flex_block_attn_kernels::cut::{Cut, InParts};
use flex_block_attn_mask::Extents;

use super::video::{canvas, in_lines, no_kernel, places};
use super::{Choice, Plan, Step, Stream, choice, contiguous, in_memory, put, refused};
use crate::{Gradients, Options, Result, Saved, Tensor, check};

/// What says whether gradients of k and v are computed in parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keys {
    /// Lengths and blocks.
    pub extents: Extents,
    /// Heads of k and v.
    pub heads: usize,
    /// Multiprocessors of the GPU.
    pub multiprocessors: u32,
}

impl Keys {
    /// Which of them are, for a q of this shape; none if they are too many to be counted.
    fn cut(&self, [batch, heads, _, head_dim]: [usize; 4]) -> Option<Cut> {
        let shape = [batch, heads, self.heads, head_dim];
        cut(self.extents, shape, self.multiprocessors)
    }
}

/// Numbers (of 32 bits) of the memory that [`backward()`] computes in, for a q of this shape, and whether
/// its gradient is to repeat to the last bit; of a video's q, of as many tokens as its tiles and text have
/// places, and without `keys`: theirs are not computed in parts.
pub fn backward_workspace(q_shape: [usize; 4], deterministic: bool, keys: Option<Keys>) -> usize {
    let cut = keys.and_then(|keys| keys.cut(q_shape));
    Arrays::new(q_shape, deterministic, cut).end
}

/// Where in that memory each array starts, in numbers; the lse is the first one.
struct Arrays {
    delta: usize,
    /// If it is deterministic; and so are the bounds.
    steps: usize,
    /// Of dq.
    sums: usize,
    /// What parts of dk and dv leave.
    slots: usize,
    bounds: usize,
    end: usize,
}

impl Arrays {
    fn new(q_shape: [usize; 4], deterministic: bool, cut: Option<Cut>) -> Self {
        let [batch, heads, q_len, head_dim] = q_shape;
        let (lines, workspace) = (batch * heads, Workspace::new(q_len));
        let if_integers = |numbers| if deterministic { numbers } else { 0 };
        // Lines are of whole units of 64: all start at multiples of 16 bytes.
        let delta = lines * workspace.line;
        let steps = 2 * delta;
        let sums = steps + if_integers(delta);
        let slots = sums + lines * workspace.units * 64 * head_dim;
        let bounds = slots + cut.map_or(0, |cut| slot_numbers(cut, head_dim));
        Self {
            delta,
            steps,
            sums,
            slots,
            bounds,
            end: bounds + if_integers(lines * bounds::WORDS),
        }
    }
}

/// What a call puts on a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct BackwardSteps {
    /// Words that must be 0 before the launches: the first one's address, and how many, perhaps none.
    pub zeroed: (u64, usize),
    /// The launches, in order.
    pub launches: Vec<(Step, Launch)>,
}

/// The launches of [`backward`], for a GPU of so many multiprocessors; none if there are no queries or no
/// keys. `workspace` is the address of as many numbers as [`backward_workspace`] says.
///
/// # Errors
/// Arguments that do not go together, or that the kernels do not take.
#[allow(clippy::too_many_arguments)]
pub fn backward_steps(
    saved: &Saved<'_>,
    dout: Tensor<'_>,
    dlse: Option<Tensor<'_>>,
    plan: &Plan,
    options: &Options,
    gradients: &Gradients<'_>,
    workspace: u64,
    multiprocessors: u32,
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
    let deterministic = options.deterministic;
    let (mask, tables) = plan.exact();
    let config = match &options.video {
        None => Config::choose(element, head_dim, q_block, kv_block, mask, deterministic),
        Some(_) => Config::choose_for_canvas(element, head_dim, q_block, deterministic),
    };
    let config = config.ok_or_else(|| no_kernel(head_dim, options))?;
    let canvas = options.video.as_ref().map(canvas).transpose()?;
    let boxes = canvas.map(|_| config.piece);
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
    // Arrays between the kernels are in the order of tiles.
    let places = places(q.shape, options);
    let [batch, heads, q_len, _] = places.map(|extent| extent as u32);
    let kv_heads = k.shape[1] as u32;
    let keys = Keys {
        extents: plan.layout.extents,
        heads: k.shape[1],
        // A video's keys are not computed in parts.
        multiprocessors: options.video.as_ref().map_or(multiprocessors, |_| 0),
    };
    let too_many = || {
        refused(
            "k",
            format!("{:?}", k.shape),
            "of fewer than 2^32 tiles of 128 keys",
        )
    };
    let cut = keys.cut(places).ok_or_else(too_many)?;
    let arrays = Arrays::new(places, deterministic, Some(cut));
    let at = |number: usize| workspace + 4 * number as u64;
    let [delta, steps, sums] = [arrays.delta, arrays.steps, arrays.sums].map(at);
    let [slots, bounds_at] = [arrays.slots, arrays.bounds].map(at);
    let in_parts = (cut.tiles > 0).then_some(InParts { cut, slots });
    let (dout, keys, values) = (read("dout", dout)?, read("k", k)?, read("v", v)?);
    let bounding = bounds::Args {
        k: keys,
        v: values,
        bounds: bounds_at,
        batch,
        heads: kv_heads,
        len: k.shape[2] as u32,
    };
    let before = prepare::Args {
        out: read("out", out)?,
        dout,
        lse: lse.pointer as u64,
        dlse: dlse.map_or(0, |dlse| dlse.pointer as u64),
        log2: workspace,
        delta,
        steps,
        bounds: bounds_at,
        sums,
        batch,
        heads,
        kv_heads,
        q_len,
        canvas,
    };
    let main = Args {
        q: read("q", q)?,
        k: keys,
        v: values,
        dout,
        dk: dk?,
        dv: dv?,
        lse: workspace,
        delta,
        steps,
        dq: sums,
        window: WINDOW,
        plan: plan.address,
        layout: plan.layout,
        batch,
        heads,
        kv_heads,
        scale,
        tables,
        in_parts,
        canvas,
    };
    let after = finish::Args {
        sums,
        steps,
        dq: dq?,
        batch,
        heads,
        q_len,
        scale,
        canvas,
    };
    in_lines(
        [
            ("q", &main.q, q.shape),
            ("k", &main.k, k.shape),
            ("v", &main.v, v.shape),
            ("dout", &main.dout, q.shape),
        ],
        options,
    )?;
    let first = prepare::Config {
        element,
        head_dim,
        deterministic,
        boxes,
    };
    let last = finish::Config {
        element,
        head_dim,
        deterministic,
        boxes,
    };
    let mut launches = vec![
        (Step::Prepare(first), first.launch(&before)),
        (Step::Backward(config), config.launch(&main)),
        (Step::Finish(last), last.launch(&after)),
    ];
    if let Some((join, launch)) = config.join(&main) {
        launches.insert(2, (Step::JoinGradients(join), launch));
    }
    if deterministic {
        let bounds = bounds::Config { element, head_dim };
        launches.insert(0, (Step::Bounds(bounds), bounds.launch(&bounding)));
    }
    Ok(Some(BackwardSteps {
        zeroed: (bounds_at, arrays.end - arrays.bounds),
        launches,
    }))
}

/// [`crate::backward()`] on a stream of a GPU, for what [`super::forward()`] accepts; all gradients are
/// computed, and `lse` and `dlse` are contiguous.
///
/// All is computed in `workspace`, as many numbers as [`backward_workspace`] says, at a multiple of 16
/// bytes. Their contents do not matter.
///
/// Of small calls dk and dv may be sums of a few parts, each rounded to 16 bits; they are added in float32
/// and rounded again, and repeat to the last bit. dq is a sum in float32, in any order, and repeats up to
/// rounding. If [`Options::deterministic`] is asked for, it is a sum of 32-bit integers, and repeats: of a
/// query's terms each is rounded to a 2^-29th, or less, of `(|dout| max |v| + |delta|) max |k| scale`, norms
/// of the query and its head.
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
    workspace: u64,
    stream: Stream,
) -> Result<()> {
    let device = cuda::Device::get(stream.device)?;
    let steps = backward_steps(
        saved,
        dout,
        dlse,
        plan,
        options,
        gradients,
        workspace,
        device.multiprocessors(),
    )?;
    let Some(BackwardSteps { zeroed, launches }) = steps else {
        return Ok(());
    };
    // SAFETY: the caller's word.
    unsafe {
        if zeroed.1 > 0 {
            device.zero_words(zeroed.0, zeroed.1, cuda::Stream(stream.handle))?;
        }
        for (step, launch) in launches {
            put(step, &launch, stream)?;
        }
    }
    Ok(())
}
