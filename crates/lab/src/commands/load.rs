//! `lab load`: how long it takes until a kernel can be launched.

use std::error::Error;
use std::time::Instant;

use flex_block_attn_kernels as kernels;
use flex_block_attn_lab::gpu::Gpu;

pub const USAGE: &str = "lab load

Loads all kernels on the first GPU and prints the milliseconds that each took: those of
the driver's compiler the first time, those of reading the code from the cache's folder
(FLEX_BLOCK_ATTN_CACHE_DIR) the next. CUDA_CACHE_DISABLE=1 keeps the driver's own cache out.";

pub fn run(words: &[String]) -> Result<(), Box<dyn Error>> {
    if !words.is_empty() {
        return Err(USAGE.into());
    }
    let gpu = Gpu::find()?;
    for kernel in kernels::all() {
        let start = Instant::now();
        gpu.load(&kernel)?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        println!("load {}\t{ms:.2}", kernel.name);
    }
    Ok(())
}
