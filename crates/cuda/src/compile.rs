//! From PTX to loaded code, by the driver's own compiler.
//!
//! The driver keeps what it compiled in a folder of its own (`~/.nv/ComputeCache`, or
//! `CUDA_CACHE_PATH`), by PTX, driver and GPU. Its linker (`cuLinkCreate`), which would give us the
//! machine code to keep, compiles as if there were other modules, and then ignores `setmaxnreg`:
//! kernels that live by it spill.

use std::ffi::{c_int, c_void};
use std::ptr;

use crate::Error;
use crate::driver::{self, Driver, ModuleHandle};

/// Room for what the compiler says of a bad kernel.
const LOG_BYTES: usize = 16 << 10;

/// A module of a kernel's PTX, loaded into the current context.
pub(crate) fn load(driver: &Driver, kernel: &str, ptx: &str) -> Result<ModuleHandle, Error> {
    let mut log = vec![0u8; LOG_BYTES];
    let options: [c_int; 2] = [driver::JIT_ERROR_LOG, driver::JIT_ERROR_LOG_BYTES];
    let values: [*mut c_void; 2] = [
        log.as_mut_ptr().cast(),
        // An integer in a pointer's place, as the call wants it.
        ptr::without_provenance_mut(LOG_BYTES - 1),
    ];
    let mut module = ModuleHandle::NULL;
    // The text ends in 0.
    let text = [ptx.as_bytes(), &[0]].concat();
    // SAFETY: the text ends in 0, the arrays have two entries, the log has the length given; all
    // outlive the call.
    let result = unsafe {
        driver.module_load(
            &raw mut module,
            text.as_ptr().cast(),
            2,
            options.as_ptr(),
            values.as_ptr(),
        )
    };
    match result {
        Err(Error::Call { .. }) if log[0] != 0 => {
            let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
            Err(Error::Compile {
                kernel: kernel.to_owned(),
                log: String::from_utf8_lossy(&log[..end]).trim().to_owned(),
            })
        }
        result => result.map(|()| module),
    }
}
