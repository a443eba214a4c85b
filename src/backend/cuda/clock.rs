//! The time that work takes on a device, and how fast it could be.

use super::device::{Device, failed};
use super::launch::Launch;
use crate::error::Result;
use cudarc::driver::{CudaEvent, sys};
use std::sync::MutexGuard;

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

/// A launch that was timed.
pub(super) struct Timed {
    file: &'static str,
    kernel: &'static str,
    start: Moment,
    end: Moment,
}

/// Launches are timed while it lives: also when the work fails or panics, those after it are not.
struct Timing<'a>(&'a Device);

impl Timing<'_> {
    /// What was timed.
    fn end(self) -> Vec<Timed> {
        self.0.timed().take().unwrap_or_default()
    }
}

impl Drop for Timing<'_> {
    fn drop(&mut self) {
        *self.0.timed() = None;
    }
}

/// All launches of one kernel, whatever it was specialised for.
#[derive(Clone, Debug, serde::Serialize)]
pub struct KernelTime {
    /// `attention` for `kernels/attention.cu`.
    pub file: &'static str,
    /// The kernel's name.
    pub kernel: &'static str,
    /// Number of launches.
    pub launches: usize,
    /// Seconds of the device in all of them.
    pub seconds: f64,
}

impl Device {
    /// The launches that `work` makes, by kernel, those that took longest first. Waits for them.
    ///
    /// Each is timed from the end of what was before it on the stream to its own end: where the host is slower than the device,
    /// waiting for the host counts too. Meanwhile staged passes are launched kernel by kernel, for a graph hides its launches.
    /// Empty on paper.
    ///
    /// # Errors
    /// Those of `work`, and when a launch failed.
    pub fn time_launches(&self, work: impl FnOnce() -> Result<()>) -> Result<Vec<KernelTime>> {
        *self.timed() = Some(Vec::new());
        let timing = Timing(self);
        work()?;
        let timed = timing.end();
        let mut kernels: Vec<KernelTime> = Vec::new();
        for Timed { file, kernel, start, end } in timed {
            let seconds = start.milliseconds_until(&end)? / 1e3;
            match kernels.iter_mut().find(|k| (k.file, k.kernel) == (file, kernel)) {
                Some(k) => (k.launches, k.seconds) = (k.launches + 1, k.seconds + seconds),
                None => kernels.push(KernelTime { file, kernel, launches: 1, seconds }),
            }
        }
        kernels.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(kernels)
    }

    /// Whether launches are being timed.
    pub(crate) fn times_launches(&self) -> bool {
        self.timed().is_some()
    }

    fn timed(&self) -> MutexGuard<'_, Option<Vec<Timed>>> {
        self.common.timed.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Launches, between two moments when launches are being timed.
    pub(super) fn between_moments(&self, launch: &Launch, run: impl FnOnce() -> Result<()>) -> Result<()> {
        // Events between launches that are captured would be of the graph.
        if self.captures || !self.times_launches() {
            return run();
        }
        let start = self.moment()?;
        run()?;
        let end = self.moment()?;
        if let (Some(start), Some(end), Some(timed)) = (start, end, &mut *self.timed()) {
            timed.push(Timed { file: launch.file, kernel: launch.kernel, start, end });
        }
        Ok(())
    }

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

    /// This point in the work of the device; None on paper.
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
