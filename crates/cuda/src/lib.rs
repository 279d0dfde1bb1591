//! Runs printed kernels on NVIDIA GPUs. Needs the driver's library at run time and nothing at build
//! time.
//!
//! In: kernels and [`Launch`](flex_block_attn_ptx::Launch) records, from `flex-block-attn` and
//! `lab`; streams and addresses that somebody else (torch, usually) owns. Out: work on those
//! streams. The context is the device's primary one, which torch uses too. Knows nothing of how
//! kernels are written, of masks or of attention.
//!
//! - [`Device`]: a GPU; [`Device::load`] compiles a kernel or finds it compiled;
//! - [`Function`]: a kernel on a device; [`Function::launch`] launches it;
//! - [`Buffer`], [`Event`]: memory and timing for tests and tools; attention never allocates.
//!
//! A machine without driver or GPU is no failure: [`Device::get`] then gives
//! [`Error::Unavailable`], whose text says why.

mod arguments;
mod compile;
mod device;
mod driver;
mod error;
mod event;
mod function;
mod memory;

pub use device::{Device, devices};
pub use driver::Stream;
pub use error::Error;
pub use event::Event;
pub use function::Function;
pub use memory::Buffer;
