//! Runs Hopper kernels on the CPU, and reports what they do wrong.
//!
//! In: a kernel of the `ptx` crate as its builder made it, the launch record that would go to the
//! driver, and emulated device [`Memory`]. Out: the results in that memory and [`Statistics`], or a
//! [`Fault`]. Knows nothing of attention or of the driver; used by tests.
//!
//! Thread blocks run side by side, their warps one after the other, 32 lanes at a time. The bulk
//! engine and the matrix unit work asynchronously: at the latest moment that the program allows, or
//! at the earliest; a right kernel gives the same results. On top of the results, shadow state tells
//! what hardware lets pass: reads of what was never written, races between threads, blocks and async
//! engines (vector clocks, the two proxies and the cluster's scope kept apart), accumulators used too
//! early, wrong byte counts, deadlocks. Order is between threads: though lanes go in step here, what one has done is known
//! to another of its warp after `bar.warp.sync` or a barrier only, not after a shuffle or a vote.
//!
//! - `machine`: the scheduler; `program`: a kernel decoded; `warp`: registers and control flow;
//! - `execute`: what each instruction does; `alu`, `numbers`: arithmetic; `access`: memory;
//!   `barrier`, `mbarrier`: who waits for whom; `bulk`, `tile`: copies; `wgmma`, `matrix`: products;
//! - `memory`, `shared`: bytes; `clock`, `shadow`, `global`: order;
//! - `fault`: what is reported.
#![forbid(unsafe_code)]

mod access;
mod alu;
mod barrier;
mod bulk;
mod clock;
mod cluster;
mod execute;
pub mod fault;
mod global;
mod machine;
mod matrix;
mod mbarrier;
mod memory;
mod numbers;
mod options;
mod program;
mod shadow;
mod shared;
mod tile;
mod warp;
mod wgmma;

pub use fault::{Fault, Kind};
pub use machine::emulate;
pub use memory::{Allocation, Element, Memory};
pub use options::{Completion, Options, Schedule, Statistics};
