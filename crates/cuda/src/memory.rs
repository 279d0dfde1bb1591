//! [`Buffer`]: device memory for tests and tools. Attention works in memory of its caller's.

use crate::{Device, Error};

/// Device memory, freed when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    device: &'static Device,
    address: u64,
    bytes: usize,
}

impl Device {
    /// Allocates at least one byte, at a multiple of 256.
    ///
    /// # Errors
    /// [`Error::Call`], mostly when there is not so much.
    pub fn alloc(&'static self, bytes: usize) -> Result<Buffer, Error> {
        let mut address = 0;
        // SAFETY: the result goes to a variable of its type.
        self.with_context(|| unsafe { self.driver.alloc(&raw mut address, bytes.max(1)) })?;
        Ok(Buffer {
            device: self,
            address,
            bytes,
        })
    }
}

impl Buffer {
    /// Where it lies.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Fills it with a byte, after all that the default stream was given before.
    ///
    /// # Errors
    /// What the driver says.
    pub fn fill(&self, value: u8) -> Result<(), Error> {
        let Self {
            device,
            address,
            bytes,
        } = *self;
        // SAFETY: the memory is this buffer's.
        device.with_context(|| unsafe { device.driver.fill(address, value, bytes) })
    }

    /// Writes bytes to its start, and waits.
    ///
    /// # Panics
    /// If it is shorter.
    ///
    /// # Errors
    /// What the driver says.
    pub fn write(&self, from: &[u8]) -> Result<(), Error> {
        let Self {
            device,
            address,
            bytes,
        } = *self;
        assert!(from.len() <= bytes, "{} bytes into {bytes}", from.len());
        // SAFETY: both sides have that many bytes.
        device.with_context(|| unsafe {
            device
                .driver
                .copy_in(address, from.as_ptr().cast(), from.len())
        })
    }

    /// Reads bytes from its start, after all that the default stream was given before.
    ///
    /// # Panics
    /// If it is shorter.
    ///
    /// # Errors
    /// What the driver says, what went wrong in a kernel included.
    pub fn read(&self, to: &mut [u8]) -> Result<(), Error> {
        let Self {
            device,
            address,
            bytes,
        } = *self;
        assert!(to.len() <= bytes, "{} bytes from {bytes}", to.len());
        // SAFETY: both sides have that many bytes.
        device.with_context(|| unsafe {
            device
                .driver
                .copy_out(to.as_mut_ptr().cast(), address, to.len())
        })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Self {
            device, address, ..
        } = *self;
        // SAFETY: the memory is this buffer's, and nobody can use it after. Freeing waits for the
        // device; an error then is that of an earlier launch, which reading has reported.
        let _ = device.with_context(|| unsafe { device.driver.free(address) });
    }
}
