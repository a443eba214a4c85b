//! Streams. Work runs before its call returns, so they are always idle.

use crate::abi::*;
use crate::capture;
pub use crate::state::Stream;
use crate::state::{Handle, State, current, driver, no_such};
use crate::work::{HostFunction, Work, submit};
use std::ffi::{c_int, c_uint};

/// Flag `CU_STREAM_NON_BLOCKING`.
pub const NON_BLOCKING: u32 = 1;

/// Null, `CU_STREAM_LEGACY` and `CU_STREAM_PER_THREAD`, which always exist.
pub fn is_built_in(stream: Handle) -> bool {
    stream <= 2
}

/// The stream that waits for all blocking ones.
pub fn is_legacy(stream: Handle) -> bool {
    stream <= 1
}

/// The capture that an existing stream takes part in.
pub fn capture(state: &State, stream: Handle) -> Outcome<Option<Handle>> {
    if is_built_in(stream) {
        return Ok(None);
    }
    state.streams.get(&stream).map(|s| s.capture).ok_or_else(|| no_such("stream", stream))
}

fn create(out: Out<Handle>, flags: c_uint, priority: c_int) -> Outcome {
    let mut state = driver()?.ready()?;
    if flags > NON_BLOCKING {
        return Err(failure(INVALID_VALUE, format!("stream flags {flags:#x} do not exist")));
    }
    let stream = state.handle();
    out.set(stream)?;
    state.streams.insert(stream, Stream { flags, priority: priority.clamp(-5, 0), capture: None });
    Ok(())
}

driver_calls! {
    fn cuStreamCreate(out: Out<Handle>, flags: c_uint) {
        create(out, flags, 0)
    }

    fn cuStreamCreateWithPriority(out: Out<Handle>, flags: c_uint, priority: c_int) {
        create(out, flags, priority)
    }

    fn cuStreamDestroy_v2(stream: Handle) {
        let mut state = driver()?.lock();
        if is_built_in(stream) {
            return Err(failure(INVALID_HANDLE, "the default streams cannot be destroyed"));
        }
        let gone = state.streams.remove(&stream).ok_or_else(|| no_such("stream", stream))?;
        // A capture without its stream can never end.
        if let Some(id) = gone.capture {
            state.captures.remove(&id);
            state.streams.values_mut().filter(|s| s.capture == Some(id)).for_each(|s| s.capture = None);
        }
        Ok(())
    }

    fn cuStreamSynchronize(stream: Handle) {
        let mut state = driver()?.ready()?;
        capture::forbid_on(&mut state, stream, "cuStreamSynchronize")
    }

    fn cuStreamQuery(stream: Handle) {
        let mut state = driver()?.ready()?;
        capture::forbid_on(&mut state, stream, "cuStreamQuery")
    }

    fn cuStreamGetFlags(stream: Handle, flags: Out<c_uint>) {
        let state = driver()?.ready()?;
        capture(&state, stream)?;
        flags.set(state.streams.get(&stream).map_or(0, |s| s.flags))
    }

    fn cuStreamGetPriority(stream: Handle, priority: Out<c_int>) {
        let state = driver()?.ready()?;
        capture(&state, stream)?;
        priority.set(state.streams.get(&stream).map_or(0, |s| s.priority))
    }

    fn cuStreamGetId(stream: Handle, id: Out<u64>) {
        capture(&*driver()?.ready()?, stream)?;
        id.set(stream)
    }

    fn cuStreamGetCtx(stream: Handle, context: Out<Handle>) {
        capture(&*driver()?.ready()?, stream)?;
        context.set(current())
    }

    fn cuStreamGetDevice(stream: Handle, device: Out<c_int>) {
        capture(&*driver()?.ready()?, stream)?;
        device.set(0)
    }

    fn cuLaunchHostFunc(stream: Handle, function: Option<HostFunction>, data: Host) {
        let function = function.ok_or_else(|| failure(INVALID_VALUE, "the host function is null"))?;
        submit(driver()?, stream, Work::Call(function, data))
    }
}
