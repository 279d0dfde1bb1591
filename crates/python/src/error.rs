//! The library's errors as Python's: a wrong dtype is a `TypeError`, any other bad argument a
//! `ValueError`; what a GPU or its driver refuses is a `RuntimeError`.

use flex_block_attn::{Error, MaskError};
use pyo3::PyErr;
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};

pub fn python(error: impl Into<Error>) -> PyErr {
    let error = error.into();
    match error {
        Error::DType { .. } => PyTypeError::new_err(error.to_string()),
        Error::Device(_) => PyRuntimeError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}

/// For `map_err` on functions of masks.
pub fn python_mask(error: MaskError) -> PyErr {
    python(error)
}
