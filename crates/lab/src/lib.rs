//! Unpublished: what keeps the other crates honest. Nothing may depend on it.
//!
//! - [`mod@reference`]: attention and its gradients in float64, written from the definition;
//! - [`cases`]: random problems for a test to run on a backend and on the reference;
//! - [`emulated`]: kernels ready for the emulator, with what must come of them;
//! - [`ptxas`]: NVIDIA's assembler, as a judge of generated PTX;
//! - `tests/`: backends against the reference, printed kernels against the assembler, and the
//!   house rules.
#![forbid(unsafe_code)]

pub mod cases;
pub mod emulated;
pub mod ptxas;
pub mod reference;
