//! [`Allocation`]: memory of a GPU that torch allocates for the library, on its current stream, without
//! Python code of ours asking for it. In: a GPU and how many words. Out: their address, for as long as the
//! value lives. Called by `counter`, and by `gpu` for what a call computes in.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::tensor::Raw;

/// A tensor of int32. Its memory is free again, for what follows on the stream, when it is dropped.
pub struct Allocation {
    tensor: Py<PyAny>,
    address: u64,
}

impl Allocation {
    /// Of so many words of 32 bits, on a GPU; their contents are any.
    pub fn new(py: Python<'_>, device: u32, words: usize) -> PyResult<Self> {
        let torch = py.import("torch")?;
        let settings = PyDict::new(py);
        settings.set_item("dtype", torch.getattr("int32")?)?;
        let device = torch.getattr("device")?.call1(("cuda", device))?;
        settings.set_item("device", device)?;
        let tensor = torch.getattr("empty")?.call((words,), Some(&settings))?;
        let address = tensor.extract::<Raw>()?.address as u64;
        Ok(Self {
            tensor: tensor.unbind(),
            address,
        })
    }

    /// The same memory, for another owner.
    pub fn share(&self, py: Python<'_>) -> Self {
        Self {
            tensor: self.tensor.clone_ref(py),
            address: self.address,
        }
    }

    /// Where it lies while this value lives.
    pub fn address(&self) -> u64 {
        self.address
    }
}
