//! Unpublished: what keeps the other crates honest. Nothing may depend on it.
//!
//! - [`mod@reference`]: attention and its gradients in float64, written from the definition;
//! - [`cases`]: random problems for a test to run on a backend and on the reference;
//! - `tests/`: backends against the reference, and the house rules.
#![forbid(unsafe_code)]

pub mod cases;
pub mod reference;
