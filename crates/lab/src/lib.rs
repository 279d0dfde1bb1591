//! Unpublished: what keeps the other crates honest. Nothing may depend on it.
//!
//! - [`mod@reference`]: attention and its gradients in float64, written from the definition;
//! - [`cases`]: random cases for a test to run on a backend and on the reference;
//! - [`problems`]: kernels with tensors and what must come of them, for the emulator and for a GPU;
//! - [`rules`]: masks' expressions to try kernels on;
//! - [`gpu`]: a GPU with memory of its own, for tests and measurements;
//! - [`ptxas`]: NVIDIA's assembler, as a judge of generated PTX;
//! - `tests/`: backends against the reference, printed kernels against the assembler, and the
//!   house rules.
#![deny(unsafe_code)]

pub mod cases;
pub mod gpu;
pub mod problems;
pub mod ptxas;
pub mod reference;
pub mod rules;
