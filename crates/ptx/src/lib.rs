//! PTX as data: everything that a Hopper kernel may say, typed.
//!
//! In: calls on a [`Builder`], from `tile` and `kernels`. Out: a [`Kernel`], checked by
//! [`verify()`], printed by [`print()`] for the driver, run as it is by the `emulator`; and the
//! [`Launch`] record that goes with it. Knows nothing of tiles, attention or drivers.
//!
//! - [`ir`]: the table of instructions;
//! - [`builder`]: how kernels are written;
//! - [`operands`]: what each instruction reads and writes;
//! - [`mod@verify`], [`mod@print`]: what reads them;
//! - [`launch`]: what a launch is, apart from its kernel.
#![forbid(unsafe_code)]

pub mod builder;
pub mod ir;
pub mod launch;
pub mod operands;
pub mod print;
mod types;
pub mod verify;

pub use builder::{Builder, Reg};
pub use ir::{Kernel, Module};
pub use launch::{Arg, Entry, Launch, LaunchError, MAX_ARGS, MAX_RANK, Swizzle, TensorMap};
pub use print::print;
pub use types::{Class, Element, Scalar, Ty};
pub use verify::verify;
