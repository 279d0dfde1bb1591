//! What can go wrong between a kernel and its GPU.

use flex_block_attn_ptx::LaunchError;
use thiserror::Error;

/// Anything that keeps work from reaching a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Error {
    /// There is no driver, no GPU, or none that can run our kernels.
    #[error("no CUDA device: {reason}")]
    Unavailable {
        /// What is missing, and what would help.
        reason: String,
    },
    /// A call of the driver failed.
    #[error("the CUDA driver's {call} failed: {name} ({text})")]
    Call {
        /// The call's name.
        call: &'static str,
        /// The driver's code.
        code: i32,
        /// The code's name.
        name: String,
        /// The driver's description of it.
        text: String,
    },
    /// The driver's compiler refused a kernel.
    #[error("the CUDA driver cannot compile kernel {kernel}: {log}")]
    Compile {
        /// The kernel's name.
        kernel: String,
        /// What the compiler said.
        log: String,
    },
    /// A launch does not fit its kernel.
    #[error(transparent)]
    Launch(#[from] LaunchError),
}
