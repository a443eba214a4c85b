//! Copies that do not stop the host: pinned memory, a second stream for what goes to the device, events between them.
//!
//! ```text
//! Staging   the next inputs:  pinned memory --second stream--> device memory of its own --main stream--> where kernels read
//! Mail      the few late inputs and the results of a pass, both on the main stream
//! ```

use super::device::{Device, bind, failed};
use super::{Allocation, Buffer, DType};
use crate::error::Result;
use cudarc::driver::{CudaContext, CudaEvent, DriverError, result};
use std::sync::Arc;

/// Main memory that the device copies from and to while the host goes on.
struct Pinned {
    start: *mut u8,
    len: usize,
    context: Arc<CudaContext>,
}

// SAFETY: the memory is owned by this value alone, and the driver takes it from any thread.
unsafe impl Send for Pinned {}
// SAFETY: `&Pinned` gives only `&[u8]`.
unsafe impl Sync for Pinned {}

impl Pinned {
    fn new(context: &Arc<CudaContext>, len: usize) -> std::result::Result<Self, DriverError> {
        context.bind_to_thread()?;
        let len = len.max(1);
        // SAFETY: the context is bound, and the memory is freed once, in `drop`.
        let start = unsafe { result::malloc_host(len, 0) }?.cast::<u8>();
        // SAFETY: there are `len` bytes; zeros make them initialised.
        unsafe { start.write_bytes(0, len) };
        Ok(Pinned { start, len, context: context.clone() })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes that live as long as `self`; their users wait for copies into them.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; their users wait for copies out of them.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A copy may still be under way when an error ends a step.
        self.context.record_err(bind(&self.context).and_then(|()| result::ctx::synchronize()));
        // SAFETY: the memory came from `malloc_host`, and nothing uses it any more.
        self.context.record_err(unsafe { result::free_host(self.start.cast()) });
    }
}

/// Inputs of the next pass on their way to the device, while the pass before may be running.
pub struct Staging {
    pinned: Pinned,
    memory: Allocation,
    /// The copy to the device is done: the kernels' stream waits for it, and so does the host before it writes again.
    arrived: CudaEvent,
    /// The kernels' stream has taken the inputs: the next copy waits for it.
    taken: CudaEvent,
}

impl Staging {
    /// Room for `bytes` bytes; None on a device on paper.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn new(device: &Device, bytes: usize) -> Result<Option<Self>> {
        let memory = device.alloc(bytes.div_ceil(4), DType::F32)?;
        let Some((context, _, _)) = device.streams() else { return Ok(None) };
        // The memory belongs to the kernels' stream until that has come to this point.
        device.synchronize()?;
        let cannot = |e| failed("make room for inputs", e);
        let [arrived, taken] = [context.new_event(None).map_err(cannot)?, context.new_event(None).map_err(cannot)?];
        let pinned = Pinned::new(context, memory.buffer().len * 4).map_err(cannot)?;
        Ok(Some(Staging { pinned, memory, arrived, taken }))
    }

    /// Bytes that fit.
    pub fn bytes(&self) -> usize {
        self.memory.buffer().len * 4
    }

    /// Lets `fill` write the inputs and sends them. Only an earlier copy that has not arrived is waited for.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn send(&mut self, device: &Device, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        let Some((_, _, copies)) = device.streams() else { return Ok(()) };
        let cannot = |e| failed("take the next inputs", e);
        self.arrived.synchronize().map_err(cannot)?;
        fill(self.pinned.bytes_mut());
        copies.wait(&self.taken).map_err(cannot)?;
        // SAFETY: both sides have that many bytes; neither is touched before `arrived`, which every other user waits for.
        unsafe { result::memcpy_htod_async(self.memory.buffer().address, self.pinned.bytes(), copies.cu_stream()) }
            .map_err(cannot)?;
        self.arrived.record(copies).map_err(cannot)
    }

    /// Copies what was sent to where the kernels read it, in the order of their stream.
    ///
    /// # Safety
    /// `to` is as [`Buffer`] says.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Panics
    /// When `to` is larger than what was sent.
    pub unsafe fn deliver(&self, device: &Device, to: Buffer) -> Result<()> {
        let Some((_, stream, _)) = device.streams() else { return Ok(()) };
        let cannot = |e| failed("take inputs", e);
        stream.wait(&self.arrived).map_err(cannot)?;
        // SAFETY: the caller answers for `to`, and the other is a part of an allocation.
        unsafe { device.copy_buffer(to, self.memory.buffer().slice(0..to.len)) }?;
        self.taken.record(stream).map_err(cannot)
    }
}

/// The late inputs of one pass and its results, in pinned memory.
pub struct Mail {
    out: Pinned,
    back: Pinned,
    /// The pass is done and its results are here.
    done: CudaEvent,
}

impl Mail {
    /// Room for `out` bytes to the device and `back` bytes from it; None on a device on paper.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn new(device: &Device, out: usize, back: usize) -> Result<Option<Self>> {
        let Some((context, _, _)) = device.streams() else { return Ok(None) };
        let cannot = |e| failed("make room for results", e);
        Ok(Some(Mail {
            out: Pinned::new(context, out).map_err(cannot)?,
            back: Pinned::new(context, back).map_err(cannot)?,
            done: context.new_event(None).map_err(cannot)?,
        }))
    }

    /// Whether that many bytes fit.
    pub fn holds(&self, out: usize, back: usize) -> bool {
        out <= self.out.len && back <= self.back.len
    }

    /// Writes the inputs, in the order of the kernels' stream.
    ///
    /// # Safety
    /// The buffers are as [`Buffer`] says, and [`Mail::wait`] has seen the pass before.
    ///
    /// # Errors
    /// When sizes differ, or the driver refuses.
    pub unsafe fn send(&mut self, device: &Device, inputs: &[(Buffer, &[u8])]) -> Result<()> {
        let mut at = 0;
        for (to, bytes) in inputs {
            let place = at..at + bytes.len();
            self.out.bytes_mut()[place.clone()].copy_from_slice(bytes);
            // SAFETY: the caller answers for the buffers, and that `wait` comes before the next `send` writes to this memory.
            unsafe { device.write_buffer_later(*to, &self.out.bytes()[place]) }?;
            at += bytes.len();
        }
        Ok(())
    }

    /// Has the results copied once the work before is done.
    ///
    /// # Safety
    /// The buffers are as [`Buffer`] says, and [`Mail::wait`] has seen the pass before.
    ///
    /// # Errors
    /// When the driver refuses.
    pub unsafe fn ask(&mut self, device: &Device, results: &[Buffer]) -> Result<()> {
        let Some((_, stream, _)) = device.streams() else { return Ok(()) };
        let cannot = |e| failed("give results", e);
        let mut at = 0;
        for from in results {
            let place = at..at + from.len * from.dtype.bytes();
            at = place.end;
            // SAFETY: both sides have that many bytes; the caller answers for the buffers, and `wait` comes before they are read.
            unsafe { result::memcpy_dtoh_async(&mut self.back.bytes_mut()[place], from.address, stream.cu_stream()) }
                .map_err(cannot)?;
        }
        self.done.record(stream).map_err(cannot)
    }

    /// Waits for the results that were asked for last, in their order.
    ///
    /// # Errors
    /// When any work before failed.
    pub fn wait(&self) -> Result<&[u8]> {
        self.done.synchronize().map_err(|e| failed("finish its work", e))?;
        Ok(self.back.bytes())
    }
}
