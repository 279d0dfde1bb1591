//! What the machine offers, as a dictionary.

use flex_block_attn::doctor::Report;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// See `_native.pyi` for its keys.
#[pyfunction]
pub fn doctor(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let Report { cpu, gpus } = py.detach(Report::new);
    let report = PyDict::new(py);
    report.set_item("float32", cpu.float32)?;
    report.set_item("bf16", cpu.bf16)?;
    report.set_item("threads", cpu.threads)?;
    let (gpus, problem) = match gpus {
        Ok(gpus) => (gpus, None),
        Err(reason) => (Vec::new(), Some(reason)),
    };
    report.set_item("gpu_problem", problem)?;
    let mut found = Vec::new();
    for gpu in gpus {
        let entry = PyDict::new(py);
        entry.set_item("name", gpu.name)?;
        entry.set_item("capability", gpu.capability)?;
        entry.set_item("multiprocessors", gpu.multiprocessors)?;
        entry.set_item("memory_bytes", gpu.memory_bytes)?;
        entry.set_item("driver_version", gpu.driver_version)?;
        entry.set_item("problem", gpu.problem)?;
        found.push(entry);
    }
    report.set_item("gpus", found)?;
    Ok(report)
}
