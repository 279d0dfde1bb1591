//! Plans, forward and backward on CUDA tensors: addresses and a stream to the library.

use std::ffi::c_void;

use flex_block_attn::gpu::{self, BackwardWorkspace, Mask, Plan, Stream};
use flex_block_attn::{DType, Gradients, Options, PlanLayout, Saved, TensorMut};
use pyo3::prelude::*;

use crate::attention::{RawPlan, Unbound};
use crate::error::{python, python_mask};
use crate::expression::RawExact;
use crate::mask::{RawExtents, extents};
use crate::tensor::Raw;

/// (device ordinal, stream handle)
type RawStream = (u32, usize);

fn stream((device, handle): RawStream) -> Stream {
    Stream { device, handle }
}

/// Plans a bool matrix on its GPU, `(address, shape, strides)` in (batch, head, row, column) order,
/// into the int32 memory `(address, words)`.
#[pyfunction]
pub fn plan_cuda(
    py: Python<'_>,
    blocks: (u64, [usize; 4], [u64; 4]),
    sizes: RawExtents,
    to: (u64, usize),
    on: RawStream,
) -> PyResult<()> {
    let (address, [batch, heads, rows, columns], strides) = blocks;
    let layout = PlanLayout {
        extents: extents(sizes)?,
        batch,
        heads,
    };
    layout
        .extents
        .check_blocks(rows, columns)
        .map_err(python_mask)?;
    layout.check_words(to.1).map_err(python_mask)?;
    let mask = Mask { address, strides };
    let plan = Plan {
        layout,
        address: to.0,
        exact: None,
    };
    // SAFETY: `ops.py` has read the mask's layout from a tensor on the stream's device, and has
    // allocated the plan, which has room for its words; torch's allocator keeps both until the stream
    // has come past this call.
    py.detach(|| unsafe { gpu::plan(&mask, &plan, stream(on)) })
        .map_err(python)
}

/// Attention forward on a GPU: writes `out`, and the lse at address `rows`: contiguous numbers, behind
/// which the workspace lies, of [`gpu::FORWARD_WORKSPACE_BYTES`] bytes.
#[pyfunction]
#[pyo3(signature = (inputs, plan, scale, out, rows, on, exact=None))]
#[allow(clippy::too_many_arguments)]
pub fn forward_cuda(
    py: Python<'_>,
    inputs: (Raw, Raw, Raw),
    plan: RawPlan,
    scale: f64,
    out: Raw,
    rows: u64,
    on: RawStream,
    exact: Option<RawExact>,
) -> PyResult<()> {
    let (address, layout) = plan.layout(&inputs.0, &inputs.1)?;
    let plan = Plan {
        layout,
        address: address as u64,
        exact: exact.map(|exact| exact.on_device()).transpose()?,
    };
    let options = Options {
        scale: Some(scale),
        ..Options::default()
    };
    // SAFETY: `ops.py` has read all layouts from tensors on the stream's device, and has allocated
    // outputs and workspace; the plan has as many words as its layout says; torch's allocator keeps
    // all until the stream has come past this call.
    unsafe {
        let (q, k, v) = (
            inputs.0.read("q")?,
            inputs.1.read("k")?,
            inputs.2.read("v")?,
        );
        let [batch, heads, tokens, _] = inputs.0.shape;
        let lse = TensorMut::from_raw(
            rows as *mut c_void,
            DType::F32,
            [batch, heads, tokens, 1],
            [(heads * tokens) as isize, tokens as isize, 1, 1],
        );
        let workspace = rows + 4 * (batch * heads * tokens) as u64;
        let out = out.write("out")?;
        let call = Unbound((q, k, v, out, lse));
        py.detach(move || {
            let Unbound((q, k, v, out, lse)) = call.whole();
            gpu::forward(q, k, v, &plan, &options, out, lse, workspace, stream(on))
        })
    }
    .map_err(python)
}

/// Numbers (of 32 bits) of the two arrays of [`backward_cuda`]'s workspace, for a q of this shape, and whether
/// its gradient is to repeat to the last bit.
#[pyfunction]
pub fn backward_workspace(q_shape: [usize; 4], deterministic: bool) -> (usize, usize) {
    let BackwardWorkspace { rows, sums } = BackwardWorkspace::new(q_shape, deterministic);
    (rows, sums)
}

/// Attention backward on a GPU: writes all three gradients. `saved` are q, k, v, out and lse;
/// `gradients` those of out and, perhaps, of lse; `workspace` the addresses of two arrays.
/// `settings` are the scale, and whether the gradient of q is to repeat to the last bit.
#[pyfunction]
#[pyo3(signature = (saved, gradients, plan, settings, outputs, workspace, on, exact=None))]
#[allow(clippy::too_many_arguments)]
pub fn backward_cuda(
    py: Python<'_>,
    saved: (Raw, Raw, Raw, Raw, Raw),
    gradients: (Raw, Option<Raw>),
    plan: RawPlan,
    settings: (f64, bool),
    outputs: (Raw, Raw, Raw),
    workspace: [u64; 2],
    on: RawStream,
    exact: Option<RawExact>,
) -> PyResult<()> {
    let (address, layout) = plan.layout(&saved.0, &saved.1)?;
    let plan = Plan {
        layout,
        address: address as u64,
        exact: exact.map(|exact| exact.on_device()).transpose()?,
    };
    let options = Options {
        scale: Some(settings.0),
        threads: None,
        deterministic: settings.1,
    };
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
                &saved,
                dout,
                dlse,
                &plan,
                &options,
                &gradients,
                workspace,
                stream(on),
            )
        })
    }
    .map_err(python)
}
