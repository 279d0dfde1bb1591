//! The short way of a call: all that can be asked of tensors without torch's help, and what follows from
//! it, in one call from Python.
//!
//! In: tensors as users have them. Out: the result, or none where the call must go the long way. Called
//! by `direct.py` and `api.py`, [`taken`] by `select`, too.

use flex_block_attn::{DType, gpu};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

use crate::attention::RawPlan;
use crate::exchange::is_plain;
use crate::expression::RawExact;
use crate::gpu::forward_cuda;
use crate::mask::RawExtents;
use crate::tensor::{Kind, MOST, Raw};

/// q, k and v, if kernels take them as they are: plain tensors of one GPU, not empty, of one dtype that
/// kernels compute in, at addresses and of strides that they can copy from.
pub fn taken(tensors: [&Bound<'_, PyAny>; 3]) -> PyResult<Option<[Raw; 3]>> {
    let mut raws = [None, None, None];
    for (raw, tensor) in raws.iter_mut().zip(tensors) {
        if !is_plain(tensor)? {
            return Ok(None);
        }
        // What cannot be read, transforms' tensors perhaps, takes torch's way.
        *raw = tensor.extract::<Raw>().ok();
    }
    let [Some(q), Some(k), Some(v)] = raws else {
        return Ok(None);
    };
    let alike = |x: &Raw| {
        (x.kind, x.gpu, x.dimensions) == (q.kind, q.gpu, MOST)
            // torch has tensors of zeros without memory.
            && x.address != 0
            && !x.shape.contains(&0)
            && gpu::takes(x.address as u64, x.shape, x.strides)
    };
    let dtype = matches!(q.kind, Kind::Float(DType::BF16 | DType::F16));
    if !(dtype && q.gpu.is_some() && [&q, &k, &v].into_iter().all(alike)) {
        return Ok(None);
    }
    for tensor in tensors {
        // Its memory then holds the numbers with the other sign.
        if tensor
            .call_method0(intern!(tensor.py(), "is_neg"))?
            .is_truthy()?
        {
            return Ok(None);
        }
    }
    Ok(Some([q, k, v]))
}

/// Whether kernels take q, k and v as they are.
#[pyfunction]
pub fn are_ready(
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
) -> PyResult<bool> {
    Ok(taken([q, k, v])?.is_some())
}

/// An output, and an lse if it was asked for.
type Results = (Py<PyAny>, Option<Py<PyAny>>);

/// Attention of a plan for such lengths and blocks, if nothing needs a closer look. `wanted` says whether
/// results are to be differentiable, and whether the lse is one of them; `alike`, whether all rows of the
/// mask are known to have one list.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
#[pyo3(signature = (q, k, v, plan, sizes, scale, wanted, exact, alike))]
pub fn attention(
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    plan: &Bound<'_, PyAny>,
    sizes: RawExtents,
    scale: Option<f64>,
    wanted: (bool, bool),
    exact: Option<RawExact>,
    alike: bool,
) -> PyResult<Option<Results>> {
    let py = q.py();
    let (q_len, kv_len, q_block, kv_block) = sizes;
    let (differentiable, wants_lse) = wanted;
    let Some([queries, keys, values]) = taken([q, k, v])? else {
        return Ok(None);
    };
    if (q_len, kv_len) != (queries.shape[2], keys.shape[2]) || !is_plain(plan)? {
        return Ok(None);
    }
    let Ok(plan) = plan.extract::<Raw>() else {
        return Ok(None);
    };
    if plan.gpu != queries.gpu || scale.is_some_and(|scale| scale.is_nan() || scale < 0.0) {
        return Ok(None);
    }
    if differentiable {
        for tensor in [q, k, v] {
            let needed = tensor.getattr(intern!(py, "requires_grad"))?;
            if needed.is_truthy()? {
                return Ok(None);
            }
        }
    }
    static EMPTY_LIKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let out = EMPTY_LIKE.import(py, "torch", "empty_like")?.call1((q,))?;
    let lse = wants_lse.then(|| new_lse(q, &queries)).transpose()?;
    forward_cuda(
        py,
        (queries, keys, values),
        RawPlan(plan, q_block, kv_block),
        scale,
        out.extract()?,
        lse.as_ref().map(|lse| lse.extract()).transpose()?,
        exact,
        None,
        alike,
    )?;
    Ok(Some((out.unbind(), lse.map(Bound::unbind))))
}

fn new_lse<'py>(q: &Bound<'py, PyAny>, queries: &Raw) -> PyResult<Bound<'py, PyAny>> {
    static FLOAT32: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = q.py();
    let settings = PyDict::new(py);
    settings.set_item("dtype", FLOAT32.import(py, "torch", "float32")?)?;
    let [batch, heads, tokens, _] = queries.shape;
    let shape = ((batch, heads, tokens),);
    q.call_method(intern!(py, "new_empty"), shape, Some(&settings))
}
