//! A torch tensor as it crosses from Python: [`Raw`], what it says of itself. Reading it here costs a
//! fraction of what taking it apart in Python and the parts through a call would.
//!
//! torch is asked by `exchange`, and by attributes where that gives nothing: older versions of torch,
//! subclasses.

use std::ffi::c_void;

use flex_block_attn::{DType, Tensor, TensorMut};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;

use crate::exchange::{self, Outline};

/// Dimensions at most.
pub const MOST: usize = 4;

/// A tensor's address, type, and up to four dimensions; strides in elements. Those that it lacks at
/// the end are of 1.
pub struct Raw {
    pub address: usize,
    pub shape: [usize; MOST],
    pub strides: [isize; MOST],
    pub kind: Kind,
    pub dimensions: usize,
    /// The ordinal of its GPU, if that is where it lies.
    pub gpu: Option<u32>,
}

/// What a tensor's elements are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Float(DType),
    Int32,
    Int64,
    Bool,
    Other,
}

impl<'py> FromPyObject<'_, 'py> for Raw {
    type Error = PyErr;

    fn extract(tensor: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match exchange::outline(&tensor, Self::of_outline)? {
            Some(raw) => Ok(raw),
            None => Self::of_attributes(&tensor),
        }
    }
}

impl Raw {
    fn of_outline(outline: Outline<'_>) -> Self {
        let mut shape = [1; MOST];
        let mut strides = [1; MOST];
        for (to, from) in shape.iter_mut().zip(outline.shape) {
            *to = *from as usize;
        }
        for (to, from) in strides.iter_mut().zip(outline.strides) {
            *to = *from as isize;
        }
        // Codes: 0 is an integer with a sign, 2 a float, 4 a bfloat, 6 a bool.
        let kind = match outline.element {
            (4, 16, 1) => Kind::Float(DType::BF16),
            (2, 16, 1) => Kind::Float(DType::F16),
            (2, 32, 1) => Kind::Float(DType::F32),
            (2, 64, 1) => Kind::Float(DType::F64),
            (0, 32, 1) => Kind::Int32,
            (0, 64, 1) => Kind::Int64,
            (6, 8, 1) => Kind::Bool,
            _ => Kind::Other,
        };
        let (device_type, ordinal) = outline.device;
        Self {
            address: outline.address,
            shape,
            strides,
            kind,
            dimensions: outline.shape.len(),
            gpu: (device_type == exchange::CUDA).then_some(ordinal as u32),
        }
    }

    fn of_attributes(tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = tensor.py();
        let (dimensions, shape) = numbers(&tensor.getattr(intern!(py, "shape"))?)?;
        let (_, strides) = numbers(&tensor.call_method0(intern!(py, "stride"))?)?;
        let gpu = match tensor.getattr(intern!(py, "is_cuda"))?.is_truthy()? {
            true => Some(tensor.call_method0(intern!(py, "get_device"))?.extract()?),
            false => None,
        };
        Ok(Self {
            address: tensor.call_method0(intern!(py, "data_ptr"))?.extract()?,
            shape,
            strides,
            kind: kind(&tensor.getattr(intern!(py, "dtype"))?)?,
            dimensions,
            gpu,
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
    static KNOWN: PyOnceLock<[(Py<PyAny>, Kind); 7]> = PyOnceLock::new();
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
            (object("int64")?, Kind::Int64),
            (object("bool")?, Kind::Bool),
        ])
    })?;
    let found = known.iter().find(|(object, _)| dtype.is(object));
    Ok(found.map_or(Kind::Other, |&(_, kind)| kind))
}

impl Raw {
    /// Whether its elements follow each other in order.
    pub fn is_contiguous(&self) -> bool {
        self.shape.contains(&0)
            || (0..MOST).all(|dim| {
                let step: usize = self.shape[dim + 1..].iter().product();
                self.shape[dim] == 1 || self.strides[dim] == step as isize
            })
    }

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
