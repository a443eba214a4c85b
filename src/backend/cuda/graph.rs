//! Launches that are captured once and replayed together.

use super::device::{Device, failed};
use crate::error::{Error, Result};
use cudarc::driver::{CudaContext, result, sys};
use std::sync::Arc;

/// Launches that were captured once and are replayed together.
pub struct Graph {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
    context: Arc<CudaContext>,
}

// SAFETY: the driver takes these handles from any thread that has bound the context, as every use here does first.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: both were made by the driver, belong to this context and are destroyed once.
        unsafe {
            self.context.record_err(self.context.bind_to_thread());
            self.context.record_err(result::graph::exec_destroy(self.exec));
            self.context.record_err(result::graph::destroy(self.graph));
        }
    }
}

impl Device {
    /// Captures the launches and copies that `work` makes, without running them.
    ///
    /// # Errors
    /// Those of `work`, and when the driver cannot capture.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let cannot = |e| failed("capture a graph", e);
        let Some(driver) = self.running()? else {
            return Err(Error::usage("a device on which nothing runs cannot capture a graph"));
        };
        if self.times_launches() {
            return Err(Error::usage("a graph cannot be captured while launches are timed"));
        }
        driver.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(cannot)?;
        let worked = work();
        // SAFETY: the stream is capturing since the call above.
        let graph = unsafe { result::stream::end_capture(driver.stream.cu_stream()) };
        if let Err(e) = worked {
            // SAFETY: the graph was captured above and is destroyed once.
            let _ = graph.map(|graph| unsafe { result::graph::destroy(graph) });
            return Err(e);
        }
        let graph = graph.map_err(cannot)?;
        // SAFETY: the graph was captured above; no flags.
        match unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) } {
            Ok(exec) => Ok(Graph { graph, exec, context: driver.context.clone() }),
            Err(e) => {
                // SAFETY: the graph was captured above and is destroyed once.
                let _ = unsafe { result::graph::destroy(graph) };
                Err(cannot(e))
            }
        }
    }

    /// Runs what was captured.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn replay(&self, graph: &Graph) -> Result<()> {
        let Some(driver) = self.running()? else { return Ok(()) };
        // SAFETY: the graph lives, and so do the buffers it names: they are the caller's arena.
        unsafe { result::graph::launch(graph.exec, driver.stream.cu_stream()) }.map_err(|e| failed("replay a step", e))
    }
}
