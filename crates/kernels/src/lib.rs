//! The kernels, each as three things: a config (what it is built for), an argument record (what a
//! launch gives it), and a function that builds it.
//!
//! In: configs and addresses, from `flex-block-attn`. Out: a [`Kernel`] for each config and a
//! [`Launch`] for each call. Knows nothing of drivers, torch or allocation. [`all`] lists every
//! config there is: tests print, assemble and emulate them all.
#![forbid(unsafe_code)]

pub mod backward;
pub mod canvas;
mod chunk;
pub mod combine;
pub mod cut;
pub mod exact;
pub mod forward;
pub mod gemm;
mod lists;
mod merge;
pub mod plan;
pub mod pool;
pub mod select;

pub use flex_block_attn_ptx::{Element, Kernel, Launch};
pub use flex_block_attn_tile::Strides;

/// Every kernel in every config that is ever launched, but for those of masks with an expression, of
/// which there is no end.
pub fn all() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    kernels.extend(forward::Config::all().into_iter().map(|c| c.kernel()));
    kernels.extend(forward::join::Config::all().into_iter().map(|c| c.kernel()));
    kernels.extend(backward::Config::all().into_iter().map(|c| c.kernel()));
    kernels.extend(
        backward::bounds::Config::all()
            .into_iter()
            .map(|c| c.kernel()),
    );
    kernels.extend(
        backward::prepare::Config::all()
            .into_iter()
            .map(|c| c.kernel()),
    );
    kernels.extend(
        backward::join::Config::all()
            .into_iter()
            .map(|c| c.kernel()),
    );
    kernels.extend(
        backward::finish::Config::all()
            .into_iter()
            .map(|c| c.kernel()),
    );
    kernels.extend(plan::Config::all().into_iter().map(|c| c.kernel()));
    kernels.extend(combine::Config::all().into_iter().map(|c| c.kernel()));
    kernels.extend(pool::Config::all().into_iter().map(|c| c.kernel()));
    kernels.extend(select::Config::all().into_iter().map(|c| c.kernel()));
    kernels.extend(gemm::Config::all().into_iter().map(|c| c.kernel()));
    kernels
}
