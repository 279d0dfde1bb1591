//! From PTX to machine code, by the driver's own compiler.

use std::ffi::{c_int, c_void};
use std::ptr;

use crate::Error;
use crate::driver::{self, Driver, Linker};

/// Room for what the compiler says of a bad kernel.
const LOG_BYTES: usize = 16 << 10;

/// Machine code of a module for the GPU of the current context.
pub(crate) fn compile(driver: &Driver, kernel: &str, ptx: &str) -> Result<Vec<u8>, Error> {
    let mut log = vec![0u8; LOG_BYTES];
    let result = link(driver, ptx, &mut log);
    result.map_err(|error| match error {
        Error::Call { .. } if log[0] != 0 => {
            let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
            Error::Compile {
                kernel: kernel.to_owned(),
                log: String::from_utf8_lossy(&log[..end]).trim().to_owned(),
            }
        }
        error => error,
    })
}

fn link(driver: &Driver, ptx: &str, log: &mut [u8]) -> Result<Vec<u8>, Error> {
    let options: [c_int; 2] = [driver::JIT_ERROR_LOG, driver::JIT_ERROR_LOG_BYTES];
    let values: [*mut c_void; 2] = [
        log.as_mut_ptr().cast(),
        // An integer in a pointer's place, as the call wants it.
        ptr::without_provenance_mut(log.len() - 1),
    ];
    let mut linker = Linker::NULL;
    // PTX ends in 0, which counts.
    let text = [ptx.as_bytes(), &[0]].concat();
    // SAFETY: arrays have the lengths given beside them; `log` and `values` outlive the linker,
    // which is destroyed below whatever happens; its code is copied before.
    unsafe {
        driver.link_create(2, options.as_ptr(), values.as_ptr(), &raw mut linker)?;
        let code = (|| {
            driver.link_add(
                linker,
                driver::JIT_INPUT_PTX,
                text.as_ptr().cast(),
                text.len(),
                ptr::null(),
                0,
                ptr::null(),
                ptr::null(),
            )?;
            let (mut code, mut len) = (ptr::null(), 0);
            driver.link_complete(linker, &raw mut code, &raw mut len)?;
            Ok(std::slice::from_raw_parts(code.cast::<u8>(), len).to_vec())
        })();
        driver.link_destroy(linker)?;
        code
    }
}
