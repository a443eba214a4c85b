//! Graphs: lists of work that were captured and can be run again.

use crate::abi::*;
use crate::capture;
use crate::state::{Handle, State, driver, no_such};
use crate::work::{self, Work};
use std::ffi::c_uint;
use std::sync::Arc;

/// Memory that was allocated while a stream was captured: it lives as long as the graph.
pub struct GraphMemory {
    /// First byte.
    pub address: u64,
    /// Length.
    pub bytes: u64,
}

impl Drop for GraphMemory {
    fn drop(&mut self) {
        if let Ok(d) = driver() {
            // The context's end may have freed it already.
            let _ = d.device.free(self.address);
        }
    }
}

/// A list of work, and the memory that it owns.
#[derive(Default)]
pub struct Graph {
    /// In an order that all dependencies allow.
    pub work: Vec<Work>,
    /// Kept alive for the work.
    pub memory: Vec<Arc<GraphMemory>>,
}

/// Bytes of the graph memory at `address`, if a graph owns it.
pub fn memory_at(state: &State, address: u64) -> Option<u64> {
    let graphs = state.graphs.values().chain(state.execs.values());
    let owned = graphs.flat_map(|g| &g.memory).find(|m| m.address == address);
    owned.or_else(|| state.captures.values().find_map(|c| c.memory_at(address))).map(|m| m.bytes)
}

/// Flags: 1 free on launch, 2 upload, 4 launch from the device, 8 priorities of nodes.
fn instantiate(out: Out<Handle>, graph: Handle, flags: u64) -> Outcome {
    let mut state = driver()?.ready()?;
    if flags & !15 != 0 || flags & 5 == 5 {
        return Err(failure(
            INVALID_VALUE,
            format!("instantiation flags {flags:#x} exclude each other or do not exist"),
        ));
    }
    if flags & 4 != 0 {
        return Err(failure(NOT_SUPPORTED, "launching graphs from kernels is not simulated"));
    }
    let graph = state.graphs.get(&graph).cloned().ok_or_else(|| no_such("graph", graph))?;
    let exec = state.handle();
    out.set(exec)?;
    state.execs.insert(exec, graph);
    Ok(())
}

fn launch(exec: Handle, stream: Handle) -> Outcome {
    let d = driver()?;
    let mut state = d.ready()?;
    let graph = state.execs.get(&exec).cloned().ok_or_else(|| no_such("instantiated graph", exec))?;
    if let Some(capture) = capture::of(&mut state, stream)? {
        graph.work.iter().for_each(|w| capture.add(stream, w.clone()));
        graph.memory.iter().for_each(|m| capture.own(m.clone()));
        return Ok(());
    }
    drop(state);
    graph.work.iter().try_for_each(|w| work::run(d, w))
}

driver_calls! {
    fn cuGraphCreate(out: Out<Handle>, _flags: c_uint) {
        let mut state = driver()?.ready()?;
        let graph = state.handle();
        out.set(graph)?;
        state.graphs.insert(graph, Arc::default());
        Ok(())
    }

    fn cuGraphClone(out: Out<Handle>, graph: Handle) {
        let mut state = driver()?.ready()?;
        let copy = state.graphs.get(&graph).cloned().ok_or_else(|| no_such("graph", graph))?;
        let handle = state.handle();
        out.set(handle)?;
        state.graphs.insert(handle, copy);
        Ok(())
    }

    fn cuGraphGetNodes(graph: Handle, nodes: Out<Handle>, count: Out<usize>) {
        let state = driver()?.ready()?;
        let graph = state.graphs.get(&graph).ok_or_else(|| no_such("graph", graph))?;
        if nodes.address() != 0 {
            return Err(failure(NOT_SUPPORTED, "handles of a graph's nodes are not simulated, only their number"));
        }
        count.set(graph.work.len())
    }

    fn cuGraphInstantiateWithFlags(out: Out<Handle>, graph: Handle, flags: u64) {
        instantiate(out, graph, flags)
    }

    fn cuGraphUpload(exec: Handle, _stream: Handle) {
        let state = driver()?.ready()?;
        state.execs.get(&exec).map(|_| ()).ok_or_else(|| no_such("instantiated graph", exec))
    }

    fn cuGraphLaunch(exec: Handle, stream: Handle) {
        launch(exec, stream)
    }

    fn cuGraphExecDestroy(exec: Handle) {
        let gone = driver()?.lock().execs.remove(&exec);
        gone.map(drop).ok_or_else(|| no_such("instantiated graph", exec))
    }

    fn cuGraphDestroy(graph: Handle) {
        let gone = driver()?.lock().graphs.remove(&graph);
        gone.map(drop).ok_or_else(|| no_such("graph", graph))
    }
}
