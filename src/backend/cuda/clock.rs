//! The time that work takes on a device, and how fast it could be.

use super::device::{Device, failed};
use crate::error::Result;
use cudarc::driver::{CudaEvent, sys};

/// A point in the work of a device, with its time.
pub struct Moment {
    event: CudaEvent,
}

impl Moment {
    /// Milliseconds of the device from here to `later`, which is waited for.
    ///
    /// # Errors
    /// When work before failed.
    pub fn milliseconds_until(&self, later: &Moment) -> Result<f64> {
        self.event.elapsed_ms(&later.event).map(f64::from).map_err(|e| failed("tell the time", e))
    }
}

impl Device {
    /// Clock in kHz of the multiprocessors, and bytes a second that the memory moves at best; None where the driver does not
    /// tell.
    pub fn rates(&self) -> [Option<f64>; 2] {
        use sys::CUdevice_attribute as A;
        let tell = |attribute| {
            let value = self.driver.as_ref().and_then(|driver| driver.context.attribute(attribute).ok());
            value.filter(|&value| value > 0).map(f64::from)
        };
        let memory_clock = tell(A::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE);
        let bus_bits = tell(A::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
        // Two transfers a clock.
        let bandwidth = memory_clock.zip(bus_bits).map(|(khz, bits)| 2.0 * khz * 1e3 * bits / 8.0);
        [tell(A::CU_DEVICE_ATTRIBUTE_CLOCK_RATE), bandwidth]
    }

    /// This point in the work of the device; None on paper, and while nothing is to run.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn moment(&self) -> Result<Option<Moment>> {
        let Some((context, stream, _)) = self.streams() else { return Ok(None) };
        let cannot = |e| failed("note the time", e);
        let event = context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).map_err(cannot)?;
        event.record(stream).map_err(cannot)?;
        Ok(Some(Moment { event }))
    }
}
