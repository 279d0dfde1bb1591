//! [`Event`]: points of time on a stream, for tools that measure.

use crate::driver::{self, EventHandle, Stream};
use crate::{Device, Error};

/// A point of time on a stream.
#[derive(Debug)]
pub struct Event {
    device: &'static Device,
    handle: EventHandle,
}

impl Device {
    /// An event, to be recorded.
    ///
    /// # Errors
    /// What the driver says.
    pub fn event(&'static self) -> Result<Event, Error> {
        let mut handle = EventHandle::NULL;
        // SAFETY: the result goes to a variable of its type.
        self.with_context(|| unsafe {
            self.driver
                .event_create(&raw mut handle, driver::EVENT_DEFAULT)
        })?;
        Ok(Event {
            device: self,
            handle,
        })
    }
}

impl Event {
    /// Marks the point that the stream is at after all it was given so far.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// The stream is one of the event's device, alive.
    pub unsafe fn record(&self, stream: Stream) -> Result<(), Error> {
        // SAFETY: by the caller's word.
        let record = || unsafe { self.device.driver.event_record(self.handle, stream) };
        self.device.with_context(record)
    }

    /// Waits for this event, and gives the milliseconds since an earlier one. Both have been
    /// recorded.
    ///
    /// # Errors
    /// What the driver says, what went wrong on the stream included.
    pub fn elapsed_ms(&self, since: &Self) -> Result<f32, Error> {
        let mut ms = 0.0;
        // SAFETY: both events live; the result goes to a variable of its type.
        self.device.with_context(|| unsafe {
            self.device.driver.event_wait(self.handle)?;
            self.device
                .driver
                .event_elapsed(&raw mut ms, since.handle, self.handle)
        })?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: nobody can use it after. A failure leaves an event behind, no more.
        let _ = self
            .device
            .with_context(|| unsafe { self.device.driver.event_destroy(self.handle) });
    }
}
