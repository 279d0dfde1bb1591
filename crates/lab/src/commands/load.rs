//! `lab load`: how long it takes until a kernel can be launched.

use std::error::Error;
use std::time::Instant;

use flex_block_attn_kernels as kernels;
use flex_block_attn_lab::gpu::Gpu;

pub const USAGE: &str = "lab load

Loads all kernels on the first GPU and prints the milliseconds that each took, the driver's
registers a thread and spilled bytes. CUDA_CACHE_DISABLE=1 has the driver compile; without it,
and from the second run on, it finds compiled code in its cache (CUDA_CACHE_PATH).";

pub fn run(words: &[String]) -> Result<(), Box<dyn Error>> {
    if !words.is_empty() {
        return Err(USAGE.into());
    }
    let gpu = Gpu::find()?;
    for kernel in kernels::all() {
        let start = Instant::now();
        let function = gpu.load(&kernel)?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let (registers, spilled) = (function.registers()?, function.spilled_bytes()?);
        println!("load {}\t{ms:.2}\t{registers}\t{spilled}", kernel.name);
    }
    Ok(())
}
