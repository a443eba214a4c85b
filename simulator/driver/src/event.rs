//! Events. Their times are those of the simulator, not of a GPU: said once on standard error when one is asked for.

use crate::abi::*;
use crate::capture::{self, Clock};
use crate::report;
use crate::state::{Handle, driver, no_such};
use crate::stream;
use std::ffi::c_uint;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Flag `CU_EVENT_DISABLE_TIMING`.
const DISABLE_TIMING: u32 = 2;

/// Where an event was last recorded.
#[derive(Default, Clone)]
pub enum Recorded {
    /// Nowhere yet.
    #[default]
    Never,
    /// In a stream, at this time since the driver began.
    At(Duration),
    /// In a capture, after this work.
    Captured(Handle, Clock),
}

/// An event.
#[derive(Default)]
pub struct Event {
    flags: u32,
    recorded: Recorded,
}

fn record(event: Handle, stream: Handle) -> Outcome {
    let d = driver()?;
    let mut state = d.ready()?;
    let recorded = match stream::capture(&state, stream)? {
        Some(id) => {
            let clock = capture::of(&mut state, stream)?.map(|c| c.clock(stream)).unwrap_or_default();
            Recorded::Captured(id, clock)
        }
        None => Recorded::At(d.started.elapsed()),
    };
    state.events.get_mut(&event).ok_or_else(|| no_such("event", event))?.recorded = recorded;
    Ok(())
}

fn wait(stream: Handle, event: Handle) -> Outcome {
    let mut state = driver()?.ready()?;
    let recorded = state.events.get(&event).ok_or_else(|| no_such("event", event))?.recorded.clone();
    match recorded {
        // Waiting for an event that was never recorded is waiting for nothing.
        Recorded::Never => stream::capture(&state, stream).map(|_| ()),
        Recorded::At(_) => capture::isolate(&mut state, stream),
        Recorded::Captured(id, clock) => capture::join(&mut state, stream, id, &clock),
    }
}

/// All work is done when its call returns, so an event has always happened.
fn done(event: Handle, call: &str) -> Outcome {
    let mut state = driver()?.ready()?;
    let event = state.events.get(&event).ok_or_else(|| no_such("event", event))?;
    if matches!(event.recorded, Recorded::Captured(..)) {
        return Err(failure(CAPTURED_EVENT, "the event was last recorded in a stream that was being captured"));
    }
    capture::forbid(&mut state, call)
}

fn elapsed(milliseconds: Out<f32>, start: Handle, end: Handle) -> Outcome {
    static SAID: AtomicBool = AtomicBool::new(false);
    let state = driver()?.ready()?;
    let at = |handle| {
        let event = state.events.get(&handle).ok_or_else(|| no_such("event", handle))?;
        match event.recorded {
            _ if event.flags & DISABLE_TIMING != 0 => {
                Err(failure(INVALID_HANDLE, "the event was made without timing (CU_EVENT_DISABLE_TIMING)"))
            }
            Recorded::At(time) => Ok(time.as_secs_f64() * 1e3),
            _ => Err(failure(INVALID_HANDLE, "the event was not recorded")),
        }
    };
    let time = at(end)? - at(start)?;
    report::say_once(&SAID, "event times are the simulator's own: they say nothing about a GPU");
    milliseconds.set(time as f32)
}

driver_calls! {
    fn cuEventCreate(out: Out<Handle>, flags: c_uint) {
        let mut state = driver()?.ready()?;
        if flags > 7 {
            return Err(failure(INVALID_VALUE, format!("event flags {flags:#x} do not exist")));
        }
        let event = state.handle();
        out.set(event)?;
        state.events.insert(event, Event { flags, recorded: Recorded::Never });
        Ok(())
    }

    fn cuEventDestroy_v2(event: Handle) {
        let gone = driver()?.lock().events.remove(&event);
        gone.map(drop).ok_or_else(|| no_such("event", event))
    }

    fn cuEventRecord(event: Handle, stream: Handle) {
        record(event, stream)
    }

    fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: c_uint) {
        if flags != 0 {
            return Err(failure(NOT_SUPPORTED, "external event nodes are not simulated"));
        }
        record(event, stream)
    }

    fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint) {
        if flags != 0 {
            return Err(failure(NOT_SUPPORTED, "external event nodes are not simulated"));
        }
        wait(stream, event)
    }

    fn cuEventSynchronize(event: Handle) {
        done(event, "cuEventSynchronize")
    }

    fn cuEventQuery(event: Handle) {
        done(event, "cuEventQuery")
    }

    fn cuEventElapsedTime(milliseconds: Out<f32>, start: Handle, end: Handle) {
        elapsed(milliseconds, start, end)
    }

    fn cuEventElapsedTime_v2(milliseconds: Out<f32>, start: Handle, end: Handle) {
        elapsed(milliseconds, start, end)
    }
}
