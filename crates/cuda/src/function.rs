//! [`Function`]: a kernel that is loaded on a device.

use std::ffi::c_int;
use std::ptr;

use flex_block_attn_ptx::{Entry, Launch};

use crate::arguments::Arguments;
use crate::driver::{self, FunctionHandle, LaunchAttribute, LaunchConfig, Stream};
use crate::{Device, Error};

/// The CUDA version from which graphs have launches that start early.
const EARLY_IN_GRAPHS: (u32, u32) = (12, 3);

/// A kernel on a device. It stays loaded as long as the process lives.
#[derive(Debug)]
pub struct Function {
    device: &'static Device,
    handle: FunctionHandle,
    entry: Entry,
}

impl Function {
    pub(crate) fn new(device: &'static Device, handle: FunctionHandle, entry: Entry) -> Self {
        Self {
            device,
            handle,
            entry,
        }
    }

    /// What it is launched with.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Registers of a thread, as the driver's compiler chose.
    ///
    /// # Errors
    /// What the driver says.
    pub fn registers(&self) -> Result<u32, Error> {
        self.property(driver::FUNCTION_REGISTERS)
    }

    /// Bytes of a thread that did not find a register, and lie in memory.
    ///
    /// # Errors
    /// What the driver says.
    pub fn spilled_bytes(&self) -> Result<u32, Error> {
        self.property(driver::FUNCTION_LOCAL_BYTES)
    }

    fn property(&self, which: c_int) -> Result<u32, Error> {
        let mut value = 0;
        // SAFETY: the function lives, and the result goes to a variable of its type.
        self.device.with_context(|| unsafe {
            self.device
                .driver
                .function_get(&raw mut value, which, self.handle)
        })?;
        Ok(value as u32)
    }

    /// Puts a launch on a stream, and returns at once.
    ///
    /// Allocates nothing and waits for nothing, so it may be captured into a graph.
    ///
    /// # Errors
    /// [`Error::Launch`] if the launch does not fit the kernel; [`Error::Call`] if the driver
    /// refuses it.
    ///
    /// # Safety
    /// The addresses in the arguments are of this device's memory, as large as the kernel's
    /// documentation says, valid and not otherwise written until the stream has come past the
    /// launch; the stream is one of this device, alive.
    pub unsafe fn launch(&self, launch: &Launch, stream: Stream) -> Result<(), Error> {
        self.entry.check(launch)?;
        let mut attributes = [LaunchAttribute {
            id: 0,
            pad: [0; 4],
            value: [0; 16],
        }; 2];
        let mut attribute_count = 0;
        let mut attribute = |id, value: &[u32]| {
            let next = &mut attributes[attribute_count];
            next.id = id;
            next.value[..value.len()].copy_from_slice(value);
            attribute_count += 1;
        };
        if self.entry.cluster > 1 {
            attribute(
                driver::LAUNCH_ATTRIBUTE_CLUSTER,
                &[self.entry.cluster, 1, 1],
            );
        }
        // Older drivers know no graphs of such launches, and waiting does no harm without.
        if self.entry.early && self.device.driver_version() >= EARLY_IN_GRAPHS {
            attribute(driver::LAUNCH_ATTRIBUTE_EARLY, &[1]);
        }
        let config = LaunchConfig {
            grid: launch.grid,
            block: [self.entry.threads, 1, 1],
            shared_bytes: self.entry.shared_bytes,
            stream,
            attributes: attributes.as_ptr(),
            attribute_count: attribute_count as u32,
        };
        let driver = self.device.driver;
        self.device.with_context(|| {
            let mut arguments = Arguments::empty();
            // Encoding tensor maps, too, wants a context.
            let args = arguments.fill(driver, &launch.args)?;
            // SAFETY: config, its attributes and arguments live until the call returns, by when the
            // driver has copied them; each argument has its parameter's size, as checked above.
            // Memory and stream are the caller's word.
            unsafe { driver.launch(&raw const config, self.handle, args, ptr::null()) }
        })
    }
}
