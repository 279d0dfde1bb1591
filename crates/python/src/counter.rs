//! [`Counter`]: the word by which the thread blocks of an attention forward share their work. The kernel
//! leaves it 0, as it found it, so calls that follow each other on a stream use the same.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use flex_block_attn::gpu::Stream;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::python;
use crate::tensor::Raw;

/// A tensor of one int32, 0.
pub struct Counter {
    tensor: Py<PyAny>,
    address: u64,
}

impl Counter {
    /// That of a stream, which torch works on at present. It lies there for as long as the process lives;
    /// in a graph, which may run beside the stream it was captured on, each call has its own.
    pub fn of(py: Python<'_>, stream: Stream) -> PyResult<Self> {
        static KEPT: Mutex<Option<HashMap<(u32, u64), Counter>>> = Mutex::new(None);
        // Never held while Python runs, which may hand the GIL to who waits for it.
        let find = |key: &(u32, u64)| {
            let kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
            kept.as_ref()?.get(key).map(|counter| counter.share(py))
        };
        // SAFETY: it is torch's current stream.
        let Some(id) = (unsafe { stream.identity() }).map_err(python)? else {
            return Self::new(py, stream);
        };
        let key = (stream.device, id);
        if let Some(counter) = find(&key) {
            return Ok(counter);
        }
        let made = Self::new(py, stream)?;
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        let counter = kept.get_or_insert_default().entry(key).or_insert(made);
        Ok(counter.share(py))
    }

    fn new(py: Python<'_>, stream: Stream) -> PyResult<Self> {
        let torch = py.import("torch")?;
        let settings = PyDict::new(py);
        settings.set_item("dtype", torch.getattr("int32")?)?;
        let device = torch.getattr("device")?.call1(("cuda", stream.device))?;
        settings.set_item("device", device)?;
        let tensor = torch.getattr("empty")?.call((1,), Some(&settings))?;
        let address = tensor.extract::<Raw>()?.address as u64;
        // SAFETY: torch has just allocated it for its current stream, which this is.
        unsafe { stream.clear(address) }.map_err(python)?;
        Ok(Self {
            tensor: tensor.unbind(),
            address,
        })
    }

    fn share(&self, py: Python<'_>) -> Self {
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
