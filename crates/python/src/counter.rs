//! [`Counter`]: the word by which the thread blocks of an attention forward share their work. The kernel
//! leaves it 0, as it found it, so calls that follow each other on a stream use the same.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use flex_block_attn::gpu::Stream;
use pyo3::prelude::*;

use crate::allocation::Allocation;
use crate::error::python;

/// One word, 0.
pub struct Counter(Allocation);

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
        let word = Allocation::new(py, stream.device, 1)?;
        // SAFETY: torch has just allocated it for its current stream, which this is.
        unsafe { stream.clear(word.address()) }.map_err(python)?;
        Ok(Self(word))
    }

    fn share(&self, py: Python<'_>) -> Self {
        Self(self.0.share(py))
    }

    /// Where it lies while this value lives.
    pub fn address(&self) -> u64 {
        self.0.address()
    }
}
