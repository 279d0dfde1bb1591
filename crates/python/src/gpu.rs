//! Plans, forward, backward and parts put together, on CUDA tensors: addresses and a stream to the library.
//!
//! Who calls has allocated what is written, but for what lasts no longer than a call. [`plan_shape`] says beforehand of what shape a plan is.

use flex_block_attn::gpu::{self, Keys, Mask, Plan, Stream};
use flex_block_attn::{Gradients, Options, PlanLayout, Saved, Video};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::allocation::Allocation;
use crate::attention::{RawPlan, RawVideo, Unbound, video};
use crate::counter::Counter;
use crate::error::{python, python_mask};
use crate::exchange::is_plain;
use crate::expression::RawExact;
use crate::mask::{BlockMask, RawExtents, extents};
use crate::tensor::{Kind, MOST, Raw};

/// The stream that torch works on at present, on a tensor's GPU. The library makes the device's context
/// current itself, so no device guard is needed.
pub fn stream(py: Python<'_>, tensor: &Raw) -> PyResult<Stream> {
    // What torch.cuda.current_stream(device).cuda_stream is, without making an object of it.
    static CURRENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let current = CURRENT.import(py, "torch._C", "_cuda_getCurrentRawStream")?;
    let device = tensor
        .gpu
        .ok_or_else(|| PyValueError::new_err("the tensor is not on a GPU"))?;
    let handle = current.call1((device,))?.extract()?;
    Ok(Stream { device, handle })
}

/// A mask of two to four dimensions, and the layout of its plan.
fn mask(blocks: &Raw, sizes: RawExtents) -> PyResult<(Mask, PlanLayout)> {
    if blocks.kind != Kind::Bool || !(2..=MOST).contains(&blocks.dimensions) {
        let text = "block_mask must be bool, of 2 to 4 dimensions";
        return Err(PyValueError::new_err(text));
    }
    let missing = MOST - blocks.dimensions;
    let (mut shape, mut strides) = (blocks.shape, blocks.strides);
    shape.rotate_right(missing);
    strides.rotate_right(missing);
    let [batch, heads, rows, columns] = shape;
    let layout = PlanLayout {
        extents: extents(sizes)?,
        batch,
        heads,
    };
    layout
        .extents
        .check_blocks(rows, columns)
        .map_err(python_mask)?;
    let mask = Mask::Bytes {
        address: blocks.address as u64,
        strides: strides.map(|stride| stride as u64),
    };
    Ok((mask, layout))
}

/// The shape of the plan that [`plan_cuda`] makes of a mask as it is; none for what it does not take
/// or has nothing to launch for.
#[pyfunction]
pub fn plan_shape(
    blocks: &Bound<'_, PyAny>,
    sizes: RawExtents,
) -> PyResult<Option<(usize, usize, usize)>> {
    if !is_plain(blocks)? {
        return Ok(None);
    }
    // What is wrong, if anything is, others say.
    let Ok(raw) = blocks.extract::<Raw>() else {
        return Ok(None);
    };
    let ready = raw.gpu.is_some() && !raw.shape.contains(&0);
    let layout = mask(&raw, sizes).ok().filter(|_| ready);
    Ok(layout.map(|(_, layout)| (layout.batch, layout.heads, layout.record_words())))
}

/// Plans a bool matrix on its GPU, or one for each batch and head, into an int32 tensor; of the tiles of a
/// `video`, if there is one.
#[pyfunction]
#[pyo3(signature = (blocks, sizes, to, video=None))]
pub fn plan_cuda(
    py: Python<'_>,
    blocks: Raw,
    sizes: RawExtents,
    to: Raw,
    video: Option<RawVideo>,
) -> PyResult<()> {
    let (mask, layout) = mask(&blocks, sizes)?;
    plan(py, mask, layout, self::video(video)?, &blocks, &to)
}

/// Plans a mask that the host has made on the GPU of an int32 tensor, into that: its bits go to `bits`,
/// an int64 tensor there.
#[pyfunction]
pub fn plan_mask_cuda(py: Python<'_>, mask: &BlockMask, bits: Raw, to: Raw) -> PyResult<()> {
    let mask = mask.library();
    let layout = PlanLayout {
        extents: mask.extents(),
        batch: mask.batch(),
        heads: mask.heads(),
    };
    let mut words = vec![0; mask.bit_words()];
    if bits.kind != Kind::Int64 || bits.shape != [words.len(), 1, 1, 1] || bits.gpu != to.gpu {
        let text = "bits must be as many int64 numbers as the mask has, on the plan's GPU";
        return Err(PyValueError::new_err(text));
    }
    mask.write_bits(&mut words).map_err(python_mask)?;
    let (on, address) = (stream(py, &to)?, bits.address as u64);
    // SAFETY: the words are a vector's, and `launch.py` has allocated as many on the stream's device for
    // this call alone.
    py.detach(|| unsafe { on.write(address, &words) })
        .map_err(python)?;
    plan(py, Mask::Bits { address }, layout, None, &bits, &to)
}

fn plan(
    py: Python<'_>,
    mask: Mask,
    layout: PlanLayout,
    video: Option<Video>,
    from: &Raw,
    to: &Raw,
) -> PyResult<()> {
    let words = to.shape.iter().product();
    layout.check_words(words).map_err(python_mask)?;
    let plan = Plan {
        layout,
        address: to.address as u64,
        exact: None,
        alike: false,
    };
    let on = stream(py, from)?;
    // SAFETY: the mask's layout was read from a tensor on the stream's device, and `launch.py` has
    // allocated the plan there, which has room for its words; torch's allocator keeps both until the
    // stream has come past this call.
    py.detach(|| unsafe { gpu::plan(&mask, &plan, video.as_ref(), on) })
        .map_err(python)
}

/// Whether a tensor must be copied before kernels take it: its rows are contiguous, but the copy engine
/// of a GPU wants addresses and strides of whole 16 bytes.
#[pyfunction]
pub fn must_be_copied(tensor: Raw) -> bool {
    tensor.strides[3] == 1 && !gpu::takes(tensor.address as u64, tensor.shape, tensor.strides)
}

/// Attention forward on a GPU: writes `out`, and the `lse` if there is one, contiguous and of three
/// dimensions. `alike` says whether all rows of the mask are known to have one list.
#[pyfunction]
#[pyo3(signature = (inputs, plan, scale, out, lse, exact, video=None, alike=false))]
#[allow(clippy::too_many_arguments)]
pub fn forward_cuda(
    py: Python<'_>,
    inputs: (Raw, Raw, Raw),
    plan: RawPlan,
    scale: Option<f64>,
    out: Raw,
    lse: Option<Raw>,
    exact: Option<RawExact>,
    video: Option<RawVideo>,
    alike: bool,
) -> PyResult<()> {
    let video = self::video(video)?;
    let (address, layout) = plan.layout(&inputs.0, &inputs.1, video.as_ref())?;
    let plan = Plan {
        layout,
        address: address as u64,
        exact: exact.map(|exact| exact.on_device()).transpose()?,
        alike,
    };
    let options = Options {
        scale,
        video,
        ..Options::default()
    };
    let on = stream(py, &inputs.0)?;
    let counter = Counter::of(py, on)?;
    let multiprocessors = gpu::multiprocessors(on.device).map_err(python)?;
    // SAFETY: all layouts were read from tensors, which `ops.py` has seen to be on the stream's device
    // or has allocated there, as has `direct`; the plan has as many words as its layout says; torch's
    // allocator keeps all until the stream has come past this call.
    unsafe {
        let (q, k, v) = (
            inputs.0.read("q")?,
            inputs.1.read("k")?,
            inputs.2.read("v")?,
        );
        let lse = lse.map(|lse| lse.write("lse")).transpose()?;
        let slots = match gpu::forward_slots(&q, &plan, &options, multiprocessors) {
            0 => None,
            bytes => Some(Allocation::new(py, on.device, bytes.div_ceil(4))?),
        };
        let call = Unbound((q, k, v, out.write("out")?, lse));
        let (counter, slots) = (counter.address(), slots.as_ref().map(Allocation::address));
        py.detach(move || {
            let Unbound((q, k, v, out, lse)) = call.whole();
            gpu::forward(q, k, v, &plan, &options, out, lse, counter, slots, on)
        })
    }
    .map_err(python)
}

/// Attention over parts of the keys put together, on a GPU: from outputs and lses of 2 to
/// `MOST_PARTS` parts, `out` and `lse`. An lse has three dimensions.
#[pyfunction]
pub fn combine_cuda(py: Python<'_>, parts: Vec<(Raw, Raw)>, out: Raw, lse: Raw) -> PyResult<()> {
    let on = stream(py, &out)?;
    if parts
        .iter()
        .flat_map(|(a, b)| [a, b])
        .chain([&lse])
        .any(|x| x.gpu != out.gpu)
    {
        let text = "parts, out and lse must be on one GPU";
        return Err(PyValueError::new_err(text));
    }
    // SAFETY: all layouts were read from tensors, now seen to be on the stream's device; torch's
    // allocator keeps them until the stream has come past this call.
    unsafe {
        let parts = parts
            .iter()
            .map(|(out, lse)| Ok((out.read("parts")?, lse.read("parts")?)))
            .collect::<PyResult<Vec<_>>>()?;
        let call = Unbound((parts, out.write("out")?, lse.write("lse")?));
        py.detach(move || {
            let Unbound((parts, out, lse)) = call.whole();
            gpu::combine(&parts, out, lse, on)
        })
    }
    .map_err(python)
}

/// Numbers (of 32 bits) of [`backward_cuda`]'s workspace, for a q of this shape, and whether its gradient
/// is to repeat to the last bit; unless tokens are a video's, also for a k of the shape in `keys`, blocks
/// of so many queries and keys, and the ordinal of a GPU.
#[pyfunction]
#[pyo3(signature = (q_shape, deterministic, keys=None))]
pub fn backward_workspace(
    q_shape: [usize; 4],
    deterministic: bool,
    keys: Option<([usize; 4], usize, usize, u32)>,
) -> PyResult<usize> {
    let keys = keys
        .map(|([_, heads, kv_len, _], q_block, kv_block, device)| {
            Ok::<_, PyErr>(Keys {
                extents: extents((q_shape[2], kv_len, q_block, kv_block))?,
                heads,
                multiprocessors: gpu::multiprocessors(device).map_err(python)?,
            })
        })
        .transpose()?;
    Ok(gpu::backward_workspace(q_shape, deterministic, keys))
}

/// Attention backward on a GPU: writes all three gradients. `saved` are q, k, v, out and lse;
/// `gradients` those of out and, perhaps, of lse; `workspace` the address of the memory that it computes in.
/// `settings` are the scale, and whether the gradient of q is to repeat to the last bit; `video` as for
/// [`forward_cuda`].
#[pyfunction]
#[pyo3(signature = (saved, gradients, plan, settings, outputs, workspace, exact, video=None))]
#[allow(clippy::too_many_arguments)]
pub fn backward_cuda(
    py: Python<'_>,
    saved: (Raw, Raw, Raw, Raw, Raw),
    gradients: (Raw, Option<Raw>),
    plan: RawPlan,
    settings: (f64, bool),
    outputs: (Raw, Raw, Raw),
    workspace: u64,
    exact: Option<RawExact>,
    video: Option<RawVideo>,
) -> PyResult<()> {
    let video = self::video(video)?;
    let (address, layout) = plan.layout(&saved.0, &saved.1, video.as_ref())?;
    let plan = Plan {
        layout,
        address: address as u64,
        exact: exact.map(|exact| exact.on_device()).transpose()?,
        alike: false,
    };
    let options = Options {
        scale: Some(settings.0),
        threads: None,
        deterministic: settings.1,
        video,
    };
    let on = stream(py, &saved.0)?;
    // SAFETY: as for `forward_cuda`.
    unsafe {
        let saved = Saved {
            q: saved.0.read("q")?,
            k: saved.1.read("k")?,
            v: saved.2.read("v")?,
            out: saved.3.read("out")?,
            lse: saved.4.read("lse")?,
        };
        let dout = gradients.0.read("dout")?;
        let dlse = gradients.1.map(|dlse| dlse.read("dlse")).transpose()?;
        let gradients = Gradients {
            dq: Some(outputs.0.write("dq")?),
            dk: Some(outputs.1.write("dk")?),
            dv: Some(outputs.2.write("dv")?),
        };
        let call = Unbound((saved, dout, dlse, gradients));
        py.detach(move || {
            let Unbound((saved, dout, dlse, gradients)) = call.whole();
            gpu::backward(
                &saved, dout, dlse, &plan, &options, &gradients, workspace, on,
            )
        })
    }
    .map_err(python)
}
