//! Attention and plans on NVIDIA GPUs.
//!
//! In: tensors whose pointers are addresses of device memory, and a stream, all the caller's. Out: work
//! on that stream; nothing is allocated, nothing waited for, so calls may be captured into graphs.
//! Arguments are checked as on CPUs; what the kernels do not do comes back as [`Error::Gpu`].
//!
//! [`plan_steps`] and [`forward_step`] say as plain data what a call puts on the stream: what is
//! launched is what the emulator runs in tests.

use std::collections::HashMap;
use std::sync::{OnceLock, PoisonError, RwLock};

use flex_block_attn_cuda::{self as cuda, Device, Function};
use flex_block_attn_kernels::forward::{self, Config};
use flex_block_attn_kernels::{Element, Kernel, Launch, Strides, plan as planning};
use flex_block_attn_mask::PlanLayout;

use crate::{DType, Error, Options, Result, Tensor, TensorMut, check};

/// A stream of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stream {
    /// The GPU's ordinal, as torch counts them.
    pub device: u32,
    /// The stream's handle (torch's `Stream.cuda_stream`); 0 is the default stream.
    pub handle: usize,
}

/// A bool matrix for each batch and head, in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mask {
    /// Address of the first entry: a byte each, not 0 where a block is kept.
    pub address: u64,
    /// Bytes from one index to the next of (batch, head, row, column); 0 repeats.
    pub strides: [u64; 4],
}

/// A plan in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// What it is for.
    pub layout: PlanLayout,
    /// Address of its words, int32, [`PlanLayout::words`] of them.
    pub address: u64,
}

/// Bytes that [`forward()`] needs besides, at a multiple of 4; their contents do not matter.
pub const FORWARD_WORKSPACE_BYTES: usize = 4;

/// A kernel that a call launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// A part of planning.
    Plan(planning::Config),
    /// Attention forward.
    Forward(Config),
}

impl Step {
    /// The kernel itself.
    pub fn kernel(self) -> Kernel {
        match self {
            Self::Plan(config) => config.kernel(),
            Self::Forward(config) => config.kernel(),
        }
    }
}

/// The launches that make a plan of a mask, in order; none if the mask has no entries.
///
/// # Errors
/// When the mask is too large.
pub fn plan_steps(mask: &Mask, plan: &Plan) -> Result<Vec<(Step, Launch)>> {
    const MOST: usize = 65_535;
    let layout = plan.layout;
    let extents = [layout.batch, layout.heads, layout.rows(), layout.columns()];
    if extents.contains(&0) {
        return Ok(Vec::new());
    }
    if extents.iter().any(|&extent| extent > MOST) {
        return Err(Error::Gpu {
            argument: "block_mask",
            got: format!("{extents:?}"),
            allowed: "at most 65535 along each dimension",
        });
    }
    let args = planning::Args {
        mask: mask.address,
        strides: mask.strides,
        layout,
        plan: plan.address,
    };
    let step = |config: planning::Config| (Step::Plan(config), config.launch(&args));
    Ok(planning::Config::all().into_iter().map(step).collect())
}

/// Makes a plan of a mask, on a stream.
///
/// # Errors
/// When the mask is too large, or there is no GPU for it.
///
/// # Safety
/// Mask and plan lie in the device's memory, as large as their layout says; nobody else writes the
/// mask, or uses the plan, before the stream has come past this call. The stream is alive.
pub unsafe fn plan(mask: &Mask, plan: &Plan, stream: Stream) -> Result<()> {
    for (step, launch) in plan_steps(mask, plan)? {
        // SAFETY: the caller's word.
        unsafe { put(step, &launch, stream)? };
    }
    Ok(())
}

/// The launch of [`forward()`], for a GPU of so many multiprocessors; none if there are no queries. The
/// word at `workspace` must be 0 when it starts.
///
/// # Errors
/// Arguments that do not go together, or that the kernels do not take.
#[allow(clippy::too_many_arguments)]
pub fn forward_step(
    q: Tensor<'_>,
    k: Tensor<'_>,
    v: Tensor<'_>,
    plan: &Plan,
    options: &Options,
    out: &TensorMut<'_>,
    lse: &TensorMut<'_>,
    workspace: u64,
    multiprocessors: u32,
) -> Result<Option<(Step, Launch)>> {
    check::forward([&q, &k, &v], &plan.layout, options, out, lse)?;
    let [batch, heads, _, head_dim] = q.shape;
    if q.shape.contains(&0) {
        return Ok(None);
    }
    let refused = |argument, got: String, allowed| Error::Gpu {
        argument,
        got,
        allowed,
    };
    let element = match q.dtype {
        DType::BF16 => Element::Bf16,
        DType::F16 => Element::F16,
        other => return Err(refused("q", other.to_string(), "bfloat16 or float16")),
    };
    let extents = plan.layout.extents;
    let blocks = [extents.q_block(), extents.kv_block()].map(|block| block as u32);
    let config = Config::choose(element, head_dim as u32, blocks[0], blocks[1])
        .ok_or_else(|| refused("head_dim", head_dim.to_string(), "64 or 128"))?;
    for (argument, got) in [("q's batch", batch), ("q's number of heads", heads)] {
        if got > 65_535 {
            return Err(refused(argument, got.to_string(), "at most 65535"));
        }
    }
    let scale = options
        .scale
        .unwrap_or_else(|| (head_dim as f64).sqrt().recip());
    if scale < 0.0 {
        return Err(refused("scale", scale.to_string(), "0 or more"));
    }
    if extents.kv_len() == 0 {
        return Err(refused("kv_len", "0".to_owned(), "at least 1"));
    }
    if lse.strides[..3] != dense_lse(lse.shape) {
        return Err(refused(
            "lse",
            format!("strides {:?}", lse.strides),
            "contiguous",
        ));
    }
    let args = forward::Args {
        q: in_memory("q", q.pointer as u64, q.shape, q.strides)?,
        k: in_memory("k", k.pointer as u64, k.shape, k.strides)?,
        v: in_memory("v", v.pointer as u64, v.shape, v.strides)?,
        out: in_memory("out", out.pointer as u64, out.shape, out.strides)?,
        lse: lse.pointer as u64,
        plan: plan.address,
        layout: plan.layout,
        batch: batch as u32,
        heads: heads as u32,
        kv_heads: k.shape[1] as u32,
        scale: scale as f32,
        counter: workspace,
        blocks: multiprocessors,
    };
    Ok(Some((Step::Forward(config), config.launch(&args))))
}

/// [`crate::forward`] on a stream of a GPU: bfloat16 and float16, head_dim 64 and 128, blocks of any
/// multiples of 16. `lse` is contiguous; addresses, and strides of dimensions longer than 1, are
/// multiples of 16 bytes; a negative scale is refused. Bitwise repeatable.
///
/// # Errors
/// Arguments that do not go together or that the kernels do not take; no GPU. Nothing has been put on
/// the stream then.
///
/// # Safety
/// All pointers and addresses are of the device's memory, as large as shapes and strides say, and
/// `workspace` of [`FORWARD_WORKSPACE_BYTES`] bytes; nobody writes the inputs, or uses the outputs or
/// the workspace, before the stream has come past this call. The stream is alive.
#[allow(clippy::too_many_arguments)]
pub unsafe fn forward(
    q: Tensor<'_>,
    k: Tensor<'_>,
    v: Tensor<'_>,
    plan: &Plan,
    options: &Options,
    out: TensorMut<'_>,
    lse: TensorMut<'_>,
    workspace: u64,
    stream: Stream,
) -> Result<()> {
    let device = Device::get(stream.device)?;
    let blocks = device.multiprocessors();
    let step = forward_step(q, k, v, plan, options, &out, &lse, workspace, blocks)?;
    if let Some((step, launch)) = step {
        // SAFETY: the caller's word.
        unsafe {
            device.zero_words(workspace, 1, cuda::Stream(stream.handle))?;
            put(step, &launch, stream)?;
        }
    }
    Ok(())
}

/// Strides of a contiguous lse, of all dimensions but the last.
fn dense_lse([_, heads, tokens, _]: [usize; 4]) -> [isize; 3] {
    [(heads * tokens) as isize, tokens as isize, 1]
}

/// A tensor as kernels take it.
fn in_memory(
    argument: &'static str,
    address: u64,
    shape: [usize; 4],
    strides: [isize; 4],
) -> Result<forward::Tensor> {
    const BYTES: isize = 2;
    const COPIED: isize = 16;
    let refused = || Error::Gpu {
        argument,
        got: format!("{strides:?} (in elements) at address {address:#x}"),
        allowed: "at an address and of strides that are positive multiples of 16 bytes",
    };
    if !address.is_multiple_of(COPIED as u64) {
        return Err(refused());
    }
    // A dimension of 1 may have any stride: it is never stepped over.
    let stride = |dim: usize| match (shape[dim], strides[dim]) {
        (..=1, _) => Ok(COPIED as u64),
        (_, stride) if stride > 0 && stride * BYTES % COPIED == 0 => Ok(stride as u64),
        _ => Err(refused()),
    };
    Ok(forward::Tensor {
        address,
        strides: Strides {
            row: stride(2)?,
            head: stride(1)?,
            batch: stride(0)?,
        },
    })
}

/// Puts a launch on a stream. A kernel is loaded once for each GPU of the process.
///
/// # Safety
/// As [`Function::launch`] asks.
unsafe fn put(step: Step, launch: &Launch, stream: Stream) -> Result<()> {
    let function = loaded(step, stream.device)?;
    // SAFETY: the caller's word.
    unsafe { function.launch(launch, cuda::Stream(stream.handle))? };
    Ok(())
}

fn loaded(step: Step, device: u32) -> Result<&'static Function> {
    type Functions = RwLock<HashMap<(u32, Step), &'static Function>>;
    static FUNCTIONS: OnceLock<Functions> = OnceLock::new();
    let functions = FUNCTIONS.get_or_init(Functions::default);
    let found = functions
        .read()
        .unwrap_or_else(PoisonError::into_inner)
        .get(&(device, step))
        .copied();
    if let Some(function) = found {
        return Ok(function);
    }
    let function = Device::get(device)?.load(&step.kernel())?;
    functions
        .write()
        .unwrap_or_else(PoisonError::into_inner)
        .insert((device, step), function);
    Ok(function)
}
