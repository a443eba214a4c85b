//! Launches that are captured once and replayed together.
//!
//! What is to be captured goes to a stream of its own. So neither what other threads do meanwhile becomes part of the graph, nor is the
//! device's own stream left behind capturing when the work panics.

use super::device::{Device, Driver, failed};
use crate::error::{Error, Result};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use std::sync::Arc;

/// Launches that were captured once and are replayed together.
pub struct Graph {
    exec: sys::CUgraphExec,
    template: Template,
}

// SAFETY: the driver takes these handles from any thread that has bound the context, as every use here does first.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        let context = &self.template.context;
        context.record_err(context.bind_to_thread());
        // SAFETY: it was made by the driver, belongs to this context and is destroyed once.
        context.record_err(unsafe { result::graph::exec_destroy(self.exec) });
    }
}

/// What was captured.
struct Template {
    graph: sys::CUgraph,
    context: Arc<CudaContext>,
}

impl Drop for Template {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: it was made by the driver, belongs to this context and is destroyed once.
        self.context.record_err(unsafe { result::graph::destroy(self.graph) });
    }
}

/// A stream that captures for as long as this lives.
struct Capture {
    stream: Arc<CudaStream>,
    is_over: bool,
}

impl Capture {
    fn begin(stream: &Arc<CudaStream>) -> std::result::Result<Self, DriverError> {
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        Ok(Capture { stream: stream.clone(), is_over: false })
    }

    fn end(&mut self) -> std::result::Result<Template, DriverError> {
        self.is_over = true;
        // SAFETY: the stream is capturing since `begin`, which this thread called.
        let graph = unsafe { result::stream::end_capture(self.stream.cu_stream()) }?;
        Ok(Template { graph, context: self.stream.context().clone() })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if !self.is_over {
            // The work failed or panicked: nobody wants what it launched.
            drop(self.end());
        }
    }
}

impl Device {
    /// Captures the launches that `work` makes on the device that it is given, without running them. What takes an allocation (copies, fills)
    /// is refused there: its memory belongs to the stream of this device.
    ///
    /// # Errors
    /// Those of `work`, and when the driver cannot capture.
    pub fn capture(&self, work: impl FnOnce(&Arc<Device>) -> Result<()>) -> Result<Graph> {
        let cannot = |e| failed("capture a graph", e);
        let Some(driver) = self.running()? else {
            return Err(Error::usage("a device on which nothing runs cannot capture a graph"));
        };
        if self.times_launches() {
            return Err(Error::usage("a graph cannot be captured while launches are timed"));
        }
        let (context, copies) = (driver.context.clone(), driver.copies.clone());
        let stream = context.new_stream().map_err(cannot)?;
        let mut capture = Capture::begin(&stream).map_err(cannot)?;
        let captured = self.copy_with(Some(Driver { context, stream, copies }), true);
        work(&Arc::new(captured))?;
        let template = capture.end().map_err(cannot)?;
        // SAFETY: the graph was captured above; no flags.
        let exec = unsafe { result::graph::instantiate(template.graph, sys::CUgraphInstantiate_flags(0)) };
        Ok(Graph { exec: exec.map_err(cannot)?, template })
    }

    /// Runs what was captured.
    ///
    /// # Safety
    /// What was promised of each launch and copy when it was captured must be so again, of the same buffers: see [`Buffer`](super::Buffer).
    ///
    /// # Errors
    /// When the driver refuses.
    pub unsafe fn replay(&self, graph: &Graph) -> Result<()> {
        let Some(driver) = self.running()? else { return Ok(()) };
        // SAFETY: the graph lives; what it does is what the caller answers for.
        unsafe { result::graph::launch(graph.exec, driver.stream.cu_stream()) }.map_err(|e| failed("replay a step", e))
    }
}
