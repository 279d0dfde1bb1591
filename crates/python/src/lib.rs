//! The extension module `flex_block_attn._native`: numbers in, views out, errors mapped.
//!
//! Called by the Python package (`python/flex_block_attn`), which owns all tensors. Of a
//! tensor its address, dtype, shape and strides are read, and a few that a call needs are made by torch;
//! nothing else of torch is known here. The GIL is released while the library works. No logic: arguments
//! are checked by `flex_block_attn`.

mod allocation;
mod attention;
mod counter;
mod direct;
mod doctor;
mod error;
mod exchange;
mod expression;
mod gpu;
mod mask;
mod select;
mod tensor;
mod term;

use flex_block_attn::gpu::MOST_PARTS;
use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(attention::forward, module)?)?;
    module.add_function(wrap_pyfunction!(attention::backward, module)?)?;
    module.add_function(wrap_pyfunction!(mask::default_block, module)?)?;
    module.add_function(wrap_pyfunction!(mask::plan_words, module)?)?;
    module.add_function(wrap_pyfunction!(mask::write_plan, module)?)?;
    module.add_function(wrap_pyfunction!(gpu::plan_shape, module)?)?;
    module.add_function(wrap_pyfunction!(gpu::plan_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(gpu::plan_mask_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(direct::are_ready, module)?)?;
    module.add_function(wrap_pyfunction!(gpu::must_be_copied, module)?)?;
    module.add_function(wrap_pyfunction!(direct::attention, module)?)?;
    module.add_function(wrap_pyfunction!(gpu::forward_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(gpu::combine_cuda, module)?)?;
    module.add("MOST_PARTS", MOST_PARTS)?;
    module.add_function(wrap_pyfunction!(select::select_numbers, module)?)?;
    module.add_function(wrap_pyfunction!(select::select_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(gpu::backward_workspace, module)?)?;
    module.add_function(wrap_pyfunction!(gpu::backward_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(doctor::doctor, module)?)?;
    module.add_class::<mask::BlockMask>()?;
    module.add_class::<expression::Steps>()?;
    module.add_class::<term::Term>()?;
    module.add_function(wrap_pyfunction!(expression::moved, module)?)?;
    Ok(())
}
