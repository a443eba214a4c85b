//! Stream capture: work is written down instead of done, and becomes a graph.
//!
//! Issue order is a valid order of a graph, so a graph is a list. The dependencies are followed all the same, by a
//! clock for each stream, to find forked streams that were never joined: a GPU refuses such a graph.

use crate::abi::*;
use crate::graph::{Graph, GraphMemory};
use crate::state::{Handle, State, driver, no_such};
use crate::stream;
use crate::work::Work;
use std::collections::BTreeMap;
use std::ffi::{c_int, c_uint};
use std::sync::Arc;
use std::thread::ThreadId;

/// How much of each stream's work something comes after.
pub type Clock = BTreeMap<Handle, u64>;

/// A capture that has begun.
pub struct Capture {
    origin: Handle,
    /// `CUstreamCaptureMode`: 0 global, 1 thread local, 2 relaxed.
    mode: c_uint,
    thread: ThreadId,
    work: Vec<Work>,
    memory: Vec<Arc<GraphMemory>>,
    clocks: BTreeMap<Handle, Clock>,
    invalid: bool,
}

impl Capture {
    /// Writes down work of `stream`.
    pub fn add(&mut self, stream: Handle, work: Work) {
        *self.clocks.entry(stream).or_default().entry(stream).or_default() += 1;
        self.work.push(work);
    }

    /// Makes memory that the graph owns live as long as the graph.
    pub fn own(&mut self, memory: Arc<GraphMemory>) {
        self.memory.push(memory);
    }

    /// What `stream`'s next work comes after.
    pub fn clock(&self, stream: Handle) -> Clock {
        self.clocks.get(&stream).cloned().unwrap_or_default()
    }

    /// `stream`'s next work also comes after `clock`.
    pub fn after(&mut self, stream: Handle, clock: &Clock) {
        let own = self.clocks.entry(stream).or_default();
        for (s, n) in clock {
            let seen = own.entry(*s).or_default();
            *seen = (*n).max(*seen);
        }
    }

    /// Memory of this capture at `address`.
    pub fn memory_at(&self, address: u64) -> Option<&Arc<GraphMemory>> {
        self.memory.iter().find(|m| m.address == address)
    }

    fn unjoined(&self) -> bool {
        let origin = self.clock(self.origin);
        let joined =
            |(s, clock): (&Handle, &Clock)| clock.get(s).copied().unwrap_or(0) <= origin.get(s).copied().unwrap_or(0);
        !self.clocks.iter().all(joined)
    }
}

/// The capture that `stream` takes part in. Work on the legacy stream would wait for every blocking stream, which a
/// capture cannot express, so it is refused while one is captured.
pub fn of(state: &mut State, stream: Handle) -> Outcome<Option<&mut Capture>> {
    let id = stream::capture(state, stream)?;
    if id.is_none() && stream::is_legacy(stream) {
        let blocked = |s: &stream::Stream| s.capture.is_some() && s.flags & stream::NON_BLOCKING == 0;
        if let Some(id) = state.streams.values().find(|s| blocked(s)).and_then(|s| s.capture) {
            invalidate(state, id);
            let text = "work on the legacy stream would wait for a stream that is being captured";
            return Err(failure(STREAM_CAPTURE_IMPLICIT, text));
        }
    }
    match id.and_then(|id| state.captures.get_mut(&id)) {
        Some(c) if c.invalid => Err(quiet(STREAM_CAPTURE_INVALIDATED)),
        found => Ok(found),
    }
}

fn invalidate(state: &mut State, id: Handle) {
    if let Some(c) = state.captures.get_mut(&id) {
        c.invalid = true;
    }
}

/// Refuses a call that a capture does not allow: in global mode for every thread, in thread-local mode for its own.
pub fn forbid(state: &mut State, call: &str) -> Outcome {
    let me = std::thread::current().id();
    let hit = |c: &Capture| c.mode == 0 || c.mode == 1 && c.thread == me;
    let Some(id) = state.captures.iter().find(|(_, c)| hit(c)).map(|(id, _)| *id) else {
        return Ok(());
    };
    invalidate(state, id);
    Err(failure(STREAM_CAPTURE_UNSUPPORTED, format!("{call} is not allowed while a stream is being captured")))
}

/// Refuses a call on a stream that is being captured, whatever the mode.
pub fn forbid_on(state: &mut State, stream: Handle, call: &str) -> Outcome {
    let Some(id) = stream::capture(state, stream)? else {
        return Ok(());
    };
    invalidate(state, id);
    Err(failure(STREAM_CAPTURE_UNSUPPORTED, format!("{call} is not allowed on a stream that is being captured")))
}

/// `stream` waits for an event that was recorded in capture `id`, after `clock`.
pub fn join(state: &mut State, stream: Handle, id: Handle, clock: &Clock) -> Outcome {
    if !state.captures.contains_key(&id) {
        return Err(failure(CAPTURED_EVENT, "the event was recorded in a capture that has ended"));
    }
    match stream::capture(state, stream)? {
        Some(own) if own != id => {
            invalidate(state, own);
            invalidate(state, id);
            return Err(failure(
                STREAM_CAPTURE_MERGE,
                "the event belongs to another capture: two captures cannot be one",
            ));
        }
        Some(_) => {}
        None if stream::is_built_in(stream) => {
            invalidate(state, id);
            return Err(failure(STREAM_CAPTURE_IMPLICIT, "the legacy stream cannot join a capture"));
        }
        None => {
            if let Some(s) = state.streams.get_mut(&stream) {
                s.capture = Some(id);
            }
        }
    }
    if let Some(c) = state.captures.get_mut(&id) {
        c.after(stream, clock);
    }
    Ok(())
}

/// `stream`, if it is being captured, waits for an event from outside: a graph cannot depend on that.
pub fn isolate(state: &mut State, stream: Handle) -> Outcome {
    let Some(id) = stream::capture(state, stream)? else {
        return Ok(());
    };
    invalidate(state, id);
    let text = "a stream that is being captured cannot wait for an event that was recorded before the capture";
    Err(failure(STREAM_CAPTURE_ISOLATION, text))
}

fn begin(stream: Handle, mode: c_uint) -> Outcome {
    let mut state = driver()?.ready()?;
    if mode > 2 {
        return Err(failure(INVALID_VALUE, format!("capture mode {mode} does not exist")));
    }
    if stream::is_built_in(stream) {
        return Err(failure(STREAM_CAPTURE_UNSUPPORTED, "the default streams cannot be captured: make one"));
    }
    if stream::capture(&state, stream)?.is_some() {
        return Err(failure(401, "the stream is being captured already"));
    }
    let id = state.handle();
    let capture = Capture {
        origin: stream,
        mode,
        thread: std::thread::current().id(),
        work: Vec::new(),
        memory: Vec::new(),
        clocks: BTreeMap::from([(stream, Clock::new())]),
        invalid: false,
    };
    state.captures.insert(id, capture);
    if let Some(s) = state.streams.get_mut(&stream) {
        s.capture = Some(id);
    }
    Ok(())
}

fn end(stream: Handle, out: Out<Handle>) -> Outcome {
    out.set(0)?;
    let mut state = driver()?.ready()?;
    let id = stream::capture(&state, stream)?;
    let Some((id, capture)) = id.and_then(|id| Some((id, state.captures.get(&id)?))) else {
        return Err(failure(401, "the stream is not being captured"));
    };
    if capture.origin != stream {
        invalidate(&mut state, id);
        return Err(failure(STREAM_CAPTURE_UNMATCHED, "the capture began on another stream and must end there"));
    }
    if capture.mode != 2 && capture.thread != std::thread::current().id() {
        invalidate(&mut state, id);
        let text = "the capture began on another thread, and its mode is not relaxed";
        return Err(failure(STREAM_CAPTURE_WRONG_THREAD, text));
    }
    for s in state.streams.values_mut() {
        if s.capture == Some(id) {
            s.capture = None;
        }
    }
    let Some(capture) = state.captures.remove(&id) else {
        return Err(no_such("capture", id));
    };
    if capture.invalid {
        return Err(failure(STREAM_CAPTURE_INVALIDATED, "an earlier error ended this capture"));
    }
    if capture.unjoined() {
        let text = "work was forked to another stream that the first one never waited for";
        return Err(failure(STREAM_CAPTURE_UNJOINED, text));
    }
    let graph = state.handle();
    out.set(graph)?;
    state.graphs.insert(graph, Arc::new(Graph { work: capture.work, memory: capture.memory }));
    Ok(())
}

fn status(state: &State, stream: Handle) -> Outcome<(c_uint, Handle)> {
    let Some(id) = stream::capture(state, stream)? else {
        return Ok((0, 0));
    };
    let invalid = state.captures.get(&id).is_some_and(|c| c.invalid);
    Ok((if invalid { 2 } else { 1 }, id))
}

driver_calls! {
    fn cuStreamBeginCapture_v2(stream: Handle, mode: c_uint) {
        begin(stream, mode)
    }

    fn cuStreamEndCapture(stream: Handle, graph: Out<Handle>) {
        end(stream, graph)
    }

    fn cuStreamIsCapturing(stream: Handle, out: Out<c_uint>) {
        let state = driver()?.ready()?;
        out.set(status(&state, stream)?.0)
    }

    fn cuStreamGetCaptureInfo_v2(
        stream: Handle, out: Out<c_uint>, id: Out<u64>, graph: Out<Handle>, nodes: Out<Handle>, count: Out<usize>,
    ) {
        capture_info(stream, out, id, graph, nodes, count)
    }

    fn cuStreamGetCaptureInfo_v3(
        stream: Handle, out: Out<c_uint>, id: Out<u64>, graph: Out<Handle>, nodes: Out<Handle>, edges: Out<Handle>,
        count: Out<usize>,
    ) {
        edges.set_if_asked(0);
        capture_info(stream, out, id, graph, nodes, count)
    }

    fn cuThreadExchangeStreamCaptureMode(_mode: Out<c_int>) {
        Err(failure(NOT_SUPPORTED, "the capture mode of threads is not simulated: begin the capture in relaxed mode"))
    }
}

fn capture_info(
    stream: Handle,
    out: Out<c_uint>,
    id: Out<u64>,
    graph: Out<Handle>,
    nodes: Out<Handle>,
    count: Out<usize>,
) -> Outcome {
    let state = driver()?.ready()?;
    let (status, capture) = status(&state, stream)?;
    out.set(status)?;
    if status == 1 && [graph.address(), nodes.address(), count.address()].iter().any(|&a| a != 0) {
        return Err(failure(NOT_SUPPORTED, "nodes of a graph that is being captured are not simulated"));
    }
    id.set_if_asked(capture);
    Ok(())
}
