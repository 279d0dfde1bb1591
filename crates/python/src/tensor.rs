//! A torch tensor as it crosses from Python: [`Raw`], what it says of itself. Reading it here costs a
//! fraction of what taking it apart in Python and the parts through a call would: it is most of what a
//! call costs the host.

use std::ffi::c_void;

use flex_block_attn::{DType, Tensor, TensorMut};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;

/// Dimensions at most.
const MOST: usize = 4;

/// A tensor's address, type, and up to four dimensions; strides in elements. Those that it lacks at
/// the end are of 1.
pub struct Raw {
    pub address: usize,
    pub shape: [usize; MOST],
    pub strides: [isize; MOST],
    pub kind: Kind,
    pub dimensions: usize,
}

/// What a tensor's elements are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Float(DType),
    Int32,
    Other,
}

impl<'py> FromPyObject<'_, 'py> for Raw {
    type Error = PyErr;

    fn extract(tensor: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let py = tensor.py();
        let (dimensions, shape) = numbers(&tensor.getattr(intern!(py, "shape"))?)?;
        let (_, strides) = numbers(&tensor.call_method0(intern!(py, "stride"))?)?;
        Ok(Self {
            address: tensor.call_method0(intern!(py, "data_ptr"))?.extract()?,
            shape,
            strides,
            kind: kind(&tensor.getattr(intern!(py, "dtype"))?)?,
            dimensions,
        })
    }
}

/// How many numbers a tuple has, and these.
fn numbers<'py, T: Copy + From<u8> + for<'a> FromPyObject<'a, 'py>>(
    tuple: &Bound<'py, PyAny>,
) -> PyResult<(usize, [T; MOST])> {
    let tuple = tuple.cast::<PyTuple>()?;
    let mut numbers = [T::from(1); MOST];
    for (number, item) in numbers.iter_mut().zip(tuple) {
        *number = item.extract().map_err(Into::into)?;
    }
    Ok((tuple.len(), numbers))
}

/// What a `torch.dtype` stands for: each is one object.
fn kind(dtype: &Bound<'_, PyAny>) -> PyResult<Kind> {
    static KNOWN: PyOnceLock<[(Py<PyAny>, Kind); 5]> = PyOnceLock::new();
    let py = dtype.py();
    let known = KNOWN.get_or_try_init(py, || -> PyResult<_> {
        let torch = py.import("torch")?;
        let object = |name: &str| Ok::<_, PyErr>(torch.getattr(name)?.unbind());
        Ok([
            (object("bfloat16")?, Kind::Float(DType::BF16)),
            (object("float16")?, Kind::Float(DType::F16)),
            (object("float32")?, Kind::Float(DType::F32)),
            (object("float64")?, Kind::Float(DType::F64)),
            (object("int32")?, Kind::Int32),
        ])
    })?;
    let found = known.iter().find(|(object, _)| dtype.is(object));
    Ok(found.map_or(Kind::Other, |&(_, kind)| kind))
}

impl Raw {
    fn layout(&self, argument: &str) -> PyResult<(DType, [usize; MOST], [isize; MOST])> {
        let Kind::Float(dtype) = self.kind else {
            return Err(PyTypeError::new_err(format!(
                "{argument} must be float16, bfloat16, float32 or float64"
            )));
        };
        // An lse has three.
        if !(MOST - 1..=MOST).contains(&self.dimensions) {
            return Err(PyValueError::new_err(format!(
                "{argument} must have 4 dimensions (batch, heads, sequence, head_dim), got {}",
                self.dimensions
            )));
        }
        Ok((dtype, self.shape, self.strides))
    }

    /// # Safety
    /// The tensor is alive, of this layout and dtype, and not written during `'a`.
    pub unsafe fn read<'a>(&self, argument: &str) -> PyResult<Tensor<'a>> {
        let (dtype, shape, strides) = self.layout(argument)?;
        let pointer = self.address as *const c_void;
        // SAFETY: the caller's promise.
        Ok(unsafe { Tensor::from_raw(pointer, dtype, shape, strides) })
    }

    /// # Safety
    /// The tensor is alive, of this layout and dtype, and used by nobody else during `'a`.
    pub unsafe fn write<'a>(&self, argument: &str) -> PyResult<TensorMut<'a>> {
        let (dtype, shape, strides) = self.layout(argument)?;
        let pointer = self.address as *mut c_void;
        // SAFETY: the caller's promise.
        Ok(unsafe { TensorMut::from_raw(pointer, dtype, shape, strides) })
    }
}
