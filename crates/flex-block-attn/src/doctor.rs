//! What this machine offers, and what of it is used: for people who ask why something is slow or
//! refused.
//!
//! In: nothing. Out: a [`Report`], plain data; whoever shows it finds the words.

use std::num::NonZeroUsize;

use flex_block_attn_cuda as cuda;

/// What this machine offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The CPU backend.
    pub cpu: Cpu,
    /// All NVIDIA GPUs, or why none can be reached.
    pub gpus: Result<Vec<Gpu>, String>,
}

/// The CPU backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpu {
    /// The instruction set that float32 products use.
    pub float32: &'static str,
    /// The one that bf16 products use.
    pub bf16: &'static str,
    /// Threads, if a call does not say.
    pub threads: usize,
}

/// An NVIDIA GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// As its maker calls it.
    pub name: String,
    /// Its compute capability.
    pub capability: (u32, u32),
    /// Its multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of its memory.
    pub memory_bytes: usize,
    /// The CUDA version up to which its driver goes.
    pub driver_version: (u32, u32),
    /// Why it cannot run our kernels, if so.
    pub problem: Option<String>,
}

impl Report {
    /// Looks.
    pub fn new() -> Self {
        let [float32, bf16] = flex_block_attn_cpu::instruction_sets();
        let threads = std::thread::available_parallelism();
        Self {
            cpu: Cpu {
                float32,
                bf16,
                threads: threads.map_or(1, NonZeroUsize::get),
            },
            gpus: gpus(),
        }
    }
}

impl Default for Report {
    fn default() -> Self {
        Self::new()
    }
}

fn gpus() -> Result<Vec<Gpu>, String> {
    let devices = cuda::devices().map_err(|error| match error {
        cuda::Error::Unavailable { reason } => reason,
        other => other.to_string(),
    })?;
    let gpu = |device: &'static cuda::Device| Gpu {
        name: device.name().to_owned(),
        capability: device.capability(),
        multiprocessors: device.multiprocessors(),
        memory_bytes: device.memory_bytes(),
        driver_version: device.driver_version(),
        problem: device.check().err().map(|error| error.to_string()),
    };
    Ok(devices.into_iter().map(gpu).collect())
}
