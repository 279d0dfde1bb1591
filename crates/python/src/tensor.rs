//! A tensor as it crosses from Python: `(address, dtype, shape, strides)`, strides in elements.

use std::ffi::c_void;

use flex_block_attn::{DType, Tensor, TensorMut};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// What `ops.py` makes of a torch tensor. (Of a struct with names, PyO3 would read attributes.)
#[derive(FromPyObject)]
pub struct Raw(usize, String, Vec<usize>, Vec<isize>);

impl Raw {
    fn dtype(&self, argument: &str) -> PyResult<DType> {
        match self.1.as_str() {
            "float16" => Ok(DType::F16),
            "bfloat16" => Ok(DType::BF16),
            "float32" => Ok(DType::F32),
            "float64" => Ok(DType::F64),
            other => Err(PyTypeError::new_err(format!(
                "{argument} is {other}, but only float16, bfloat16, float32 and float64 are supported"
            ))),
        }
    }

    /// Shape and strides with four dimensions; an lse of three gets a last one of 1.
    fn layout(&self, argument: &str) -> PyResult<([usize; 4], [isize; 4])> {
        let (mut shape, mut strides) = (self.2.clone(), self.3.clone());
        if shape.len() == 3 {
            shape.push(1);
            strides.push(1);
        }
        match (shape.try_into(), strides.try_into()) {
            (Ok(shape), Ok(strides)) => Ok((shape, strides)),
            _ => Err(PyValueError::new_err(format!(
                "{argument} must have 4 dimensions (batch, heads, sequence, head_dim), got {}",
                self.2.len()
            ))),
        }
    }

    /// # Safety
    /// The tensor is alive, of this layout and dtype, and not written during `'a`.
    pub unsafe fn read<'a>(&self, argument: &str) -> PyResult<Tensor<'a>> {
        let (shape, strides) = self.layout(argument)?;
        let pointer = self.0 as *const c_void;
        // SAFETY: the caller's promise.
        Ok(unsafe { Tensor::from_raw(pointer, self.dtype(argument)?, shape, strides) })
    }

    /// # Safety
    /// The tensor is alive, of this layout and dtype, and used by nobody else during `'a`.
    pub unsafe fn write<'a>(&self, argument: &str) -> PyResult<TensorMut<'a>> {
        let (shape, strides) = self.layout(argument)?;
        let pointer = self.0 as *mut c_void;
        // SAFETY: the caller's promise.
        Ok(unsafe { TensorMut::from_raw(pointer, self.dtype(argument)?, shape, strides) })
    }
}
