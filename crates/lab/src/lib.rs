//! Unpublished: what keeps the other crates honest. Nothing may depend on it.
//!
//! - [`mod@reference`]: attention and its gradients in float64, written from the definition;
//! - [`cases`]: random problems for a test to run on a backend and on the reference;
//! - [`emulated`]: kernels ready for the emulator, with what must come of them;
//! - [`gpu`]: a GPU with memory of its own, for tests and measurements;
//! - [`ptxas`]: NVIDIA's assembler, as a judge of generated PTX;
//! - `tests/`: backends against the reference, printed kernels against the assembler, and the
//!   house rules.
#![deny(unsafe_code)]

pub mod cases;
pub mod emulated;
pub mod gpu;
pub mod ptxas;
pub mod reference;
