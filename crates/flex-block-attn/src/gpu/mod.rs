//! Attention, plans and choices of tiles on NVIDIA GPUs.
//!
//! In: tensors whose pointers are addresses of device memory, and a stream, all the caller's. Out: work
//! on that stream; nothing is allocated, nothing waited for, so calls may be captured into graphs.
//! Arguments are checked as on CPUs; what the kernels do not do comes back as [`Error::Gpu`].
//!
//! [`plan_steps`], [`select_steps`], [`forward_steps`] and [`backward_steps`] say as plain data what a call
//! puts on the stream: what is launched is what the emulator runs in tests.
//!
//! - `forward`, `backward`: the two passes; `video`: what they know of videos;
//! - `combine`: attention over parts of the keys, put together;
//! - `select`: masks of tiles, by what their tokens hold;
//! - here: what they share, and plans.

mod backward;
mod combine;
mod forward;
mod select;
mod video;

use std::collections::HashMap;
use std::sync::{OnceLock, PoisonError, RwLock};

use flex_block_attn_cuda::{self as cuda, Device, Function};
use flex_block_attn_kernels::backward::{self as backward_kernels, bounds, finish, prepare};
use flex_block_attn_kernels::forward as forward_kernels;
use flex_block_attn_kernels::{
    Element, Kernel, Launch, Strides, combine as combining, exact, plan as planning, pool,
    select as selecting,
};
use flex_block_attn_mask::PlanLayout;
use flex_block_attn_mask::expression::Formula;

pub use flex_block_attn_kernels::plan::Mask;

pub use backward::{BackwardSteps, Keys, backward, backward_steps, backward_workspace};
pub use combine::{MOST_PARTS, combine, combine_step};
pub use forward::{forward, forward_slots, forward_steps};
pub use select::{MOST_SELECTED, Order, Selection, select, select_steps, selection_numbers};

use crate::{DType, Error, Options, Result, Tensor, Video, check};

/// A stream of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stream {
    /// The GPU's ordinal, as torch counts them.
    pub device: u32,
    /// The stream's handle (torch's `Stream.cuda_stream`); 0 is the default stream.
    pub handle: usize,
}

impl Stream {
    /// A number that no other stream of this process has, or had, or will have, by which memory can be
    /// kept for it; none while it is captured into a graph, whose work other streams may do.
    ///
    /// # Errors
    /// No GPU; what the driver says.
    ///
    /// # Safety
    /// The stream is alive.
    pub unsafe fn identity(self) -> Result<Option<u64>> {
        // SAFETY: the caller's word.
        Ok(unsafe { Device::get(self.device)?.identity(cuda::Stream(self.handle))? })
    }

    /// Has a 32-bit word set to 0: a counter, before [`forward()`] takes it for the first time.
    ///
    /// # Errors
    /// No GPU; what the driver says.
    ///
    /// # Safety
    /// The word is of the device's memory, at a multiple of 4, and nobody uses it before the stream has
    /// come past this. The stream is alive.
    pub unsafe fn clear(self, address: u64) -> Result<()> {
        let device = Device::get(self.device)?;
        // SAFETY: the caller's word.
        unsafe { device.zero_words(address, 1, cuda::Stream(self.handle))? };
        Ok(())
    }

    /// Has words of 64 bits written into the device's memory: bits of a mask, before [`plan()`] reads
    /// them. They need not stay where they are on the host.
    ///
    /// # Errors
    /// No GPU; what the driver says; a stream that is captured into a graph, which would read them anew
    /// whenever it runs.
    ///
    /// # Safety
    /// The words are not in pinned memory. There is room for them at the address, of the device's memory,
    /// and nobody uses it before the stream has come past this. The stream is alive.
    pub unsafe fn write(self, address: u64, words: &[u64]) -> Result<()> {
        let (device, stream) = (Device::get(self.device)?, cuda::Stream(self.handle));
        // SAFETY: the caller's word.
        unsafe {
            if device.identity(stream)?.is_none() {
                let got = "a stream that is captured into a graph";
                return Err(refused(
                    "a new mask's stream",
                    got,
                    "one that is not captured",
                ));
            }
            device.write_words(address, words, stream)?;
        }
        Ok(())
    }
}

/// Multiprocessors of the GPU with an ordinal, as torch counts them.
///
/// # Errors
/// No GPU.
pub fn multiprocessors(device: u32) -> Result<u32> {
    Ok(Device::get(device)?.multiprocessors())
}

/// A plan in device memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// What it is for.
    pub layout: PlanLayout,
    /// Address of its words, int32, [`PlanLayout::words`] of them.
    pub address: u64,
    /// By which pairs of partial blocks are chosen; without it no block is partial.
    pub exact: Option<Exact>,
    /// Whether all rows of a head are known to have one list, as those of a dense mask: then attention
    /// forward is faster. False is always right.
    pub alike: bool,
}

/// A mask's expression on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exact {
    mask: exact::Mask,
    tables: Vec<exact::Table>,
}

impl Exact {
    /// A formula, with its tables' addresses and extents. The numbers there, int32 and contiguous, are
    /// those that the mask's blocks were found with; nothing is looked up outside of tables that
    /// [`crate::BlockMask::from_expression`] has accepted.
    ///
    /// # Errors
    /// Tables of other dimensions than the formula looks up, or at odd addresses.
    pub fn new(formula: &Formula, tables: Vec<(u64, Vec<u32>)>) -> Result<Self> {
        if formula.tables.len() != tables.len() {
            let got = format!("{} tables", tables.len());
            return Err(refused("a mask's expression", got, "given all its tables"));
        }
        for (table, ((address, extents), &dimensions)) in
            tables.iter().zip(&formula.tables).enumerate()
        {
            if extents.len() != dimensions || !address.is_multiple_of(4) {
                let allowed = "of as many dimensions as it has indices, at a multiple of 4 bytes";
                return Err(Error::MaskTable { table, allowed });
            }
        }
        let table = |(address, extents)| exact::Table { address, extents };
        Ok(Self {
            mask: exact::Mask::new(formula.clone()),
            tables: tables.into_iter().map(table).collect(),
        })
    }
}

impl Plan {
    /// What kernels are built with, and what they look up.
    fn exact(&self) -> (Option<exact::Mask>, &[exact::Table]) {
        match &self.exact {
            Some(exact) => (Some(exact.mask), &exact.tables),
            None => (None, &[]),
        }
    }

    fn mask(&self) -> check::Mask<'_> {
        check::Mask {
            layout: &self.layout,
            formula: self.exact.as_ref().map(|exact| exact.mask.formula()),
        }
    }
}

/// A kernel that a call launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// A part of planning.
    Plan(planning::Config),
    /// Attention forward.
    Forward(forward_kernels::Config),
    /// Tiles computed in parts, put together.
    JoinOutputs(forward_kernels::join::Config),
    /// What bounds the gradient of q.
    Bounds(bounds::Config),
    /// What attention backward reads besides its inputs.
    Prepare(prepare::Config),
    /// Attention backward.
    Backward(backward_kernels::Config),
    /// Parts of the gradients of k and v, put together.
    JoinGradients(backward_kernels::join::Config),
    /// The gradient of q, rounded.
    Finish(finish::Config),
    /// Attention over parts of the keys, put together.
    Combine(combining::Config),
    /// Means of tiles.
    Pool(pool::Config),
    /// A part of choosing tiles by their means.
    Select(selecting::Config),
}

impl Step {
    /// The kernel itself.
    pub fn kernel(self) -> Kernel {
        match self {
            Self::Plan(config) => config.kernel(),
            Self::Forward(config) => config.kernel(),
            Self::JoinOutputs(config) => config.kernel(),
            Self::Bounds(config) => config.kernel(),
            Self::Prepare(config) => config.kernel(),
            Self::Backward(config) => config.kernel(),
            Self::JoinGradients(config) => config.kernel(),
            Self::Finish(config) => config.kernel(),
            Self::Combine(config) => config.kernel(),
            Self::Pool(config) => config.kernel(),
            Self::Select(config) => config.kernel(),
        }
    }
}

/// The launches that make a plan of a mask, in order; none if the mask has no entries. If its blocks are a
/// video's tiles, those rows come first that take longest, and what takes as long runs together.
///
/// # Errors
/// When the mask is too large, or not for the video's tiles.
pub fn plan_steps(mask: &Mask, plan: &Plan, video: Option<&Video>) -> Result<Vec<(Step, Launch)>> {
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
    let canvas = |video: &Video| {
        video.check(&layout)?;
        video::canvas(video)
    };
    let args = planning::Args {
        mask: *mask,
        layout,
        plan: plan.address,
        canvas: video.map(canvas).transpose()?,
    };
    let step = |config: planning::Config| (Step::Plan(config), config.launch(&args));
    Ok(planning::Config::of(&args).into_iter().map(step).collect())
}

/// Makes a plan of a mask, on a stream; of a video's tiles, if there is one.
///
/// # Errors
/// When the mask is too large, or not for the video's tiles; no GPU.
///
/// # Safety
/// Mask and plan lie in the device's memory, as large as their layout says; nobody else writes the
/// mask, or uses the plan, before the stream has come past this call. The stream is alive.
pub unsafe fn plan(mask: &Mask, plan: &Plan, video: Option<&Video>, stream: Stream) -> Result<()> {
    for (step, launch) in plan_steps(mask, plan, video)? {
        // SAFETY: the caller's word.
        unsafe { put(step, &launch, stream)? };
    }
    Ok(())
}

fn refused(argument: &'static str, got: impl ToString, allowed: &'static str) -> Error {
    Error::Gpu {
        argument,
        got: got.to_string(),
        allowed,
    }
}

/// The element and the columns of a tensor that kernels compute with.
fn computed(argument: &'static str, dtype: DType, head_dim: usize) -> Result<(Element, u32)> {
    let element = match dtype {
        DType::BF16 => Element::Bf16,
        DType::F16 => Element::F16,
        other => return Err(refused(argument, other, "bfloat16 or float16")),
    };
    match head_dim {
        64 | 128 => Ok((element, head_dim as u32)),
        _ => Err(refused("head_dim", head_dim, "64 or 128")),
    }
}

/// What kernels are chosen by.
struct Choice {
    element: Element,
    head_dim: u32,
    q_block: u32,
    kv_block: u32,
    scale: f32,
}

/// What both passes ask of q and the mask, whose shapes go together and are not empty.
fn choice(q: &Tensor<'_>, plan: &Plan, options: &Options) -> Result<Choice> {
    let [batch, heads, _, head_dim] = q.shape;
    let (element, columns) = computed("q", q.dtype, head_dim)?;
    for (argument, got) in [("q's batch", batch), ("q's number of heads", heads)] {
        if got > 65_535 {
            return Err(refused(argument, got, "at most 65535"));
        }
    }
    let scale = options
        .scale
        .unwrap_or_else(|| (head_dim as f64).sqrt().recip());
    if scale < 0.0 {
        return Err(refused("scale", scale, "0 or more"));
    }
    let extents = plan.layout.extents;
    if extents.kv_len() == 0 {
        return Err(refused("kv_len", 0, "at least 1"));
    }
    let words = plan.layout.words();
    if u32::try_from(words).is_err() {
        let got = format!("a plan of {words} words");
        return Err(refused(
            "block_mask",
            got,
            "a plan of fewer than 2^32 words",
        ));
    }
    // Kernels count tiles of 128 queries, at most those of whole blocks, by 32 bits.
    let queries = plan.layout.rows() as u128 * extents.q_block() as u128;
    if queries.div_ceil(128) * (batch * heads) as u128 > u128::from(u32::MAX / 2) {
        let got = format!("{batch} x {heads} x {}", extents.q_len());
        return Err(refused(
            "q",
            got,
            "of fewer than 2^38 queries in whole blocks",
        ));
    }
    Ok(Choice {
        element,
        head_dim: columns,
        q_block: extents.q_block() as u32,
        kv_block: extents.kv_block() as u32,
        scale: scale as f32,
    })
}

/// Refuses numbers of queries that are not contiguous.
fn contiguous(argument: &'static str, shape: [usize; 4], strides: [isize; 4]) -> Result<()> {
    let [_, heads, tokens, _] = shape;
    let dense = [(heads * tokens) as isize, tokens as isize, 1];
    let same = |dim: usize| shape[dim] <= 1 || strides[dim] == dense[dim];
    if (0..3).all(same) {
        return Ok(());
    }
    Err(refused(
        argument,
        format!("strides {strides:?}"),
        "contiguous",
    ))
}

/// Whether kernels take a tensor of these strides, in elements of 16 bits, as it lies in memory: its address,
/// and the strides of dimensions longer than 1, are positive multiples of 16 bytes. The last dimension
/// is not looked at.
pub fn takes(address: u64, shape: [usize; 4], strides: [isize; 4]) -> bool {
    in_strides(address, shape, strides).is_some()
}

/// A tensor as kernels take it.
fn in_memory(
    argument: &'static str,
    address: u64,
    shape: [usize; 4],
    strides: [isize; 4],
) -> Result<forward_kernels::Tensor> {
    let Some(strides) = in_strides(address, shape, strides) else {
        return Err(Error::Gpu {
            argument,
            got: format!("{strides:?} (in elements) at address {address:#x}"),
            allowed: "at an address and of strides that are positive multiples of 16 bytes",
        });
    };
    Ok(forward_kernels::Tensor { address, strides })
}

fn in_strides(address: u64, shape: [usize; 4], strides: [isize; 4]) -> Option<Strides> {
    const BYTES: isize = 2;
    const COPIED: isize = 16;
    // A dimension of 1 may have any stride: it is never stepped over.
    let stride = |dim: usize| match (shape[dim], strides[dim]) {
        (..=1, _) => Some(COPIED as u64),
        (_, stride) if stride > 0 && stride * BYTES % COPIED == 0 => Some(stride as u64),
        _ => None,
    };
    if !address.is_multiple_of(COPIED as u64) {
        return None;
    }
    Some(Strides {
        row: stride(2)?,
        head: stride(1)?,
        batch: stride(0)?,
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
