//! Contexts. They count users and hold the sticky error; memory and handles belong to the one device.

use crate::abi::*;
use crate::device::check;
use crate::report;
use crate::state::{Context, Driver, Handle, State, current, driver, no_such, with_stack};
use std::ffi::{c_int, c_uint, c_void};

/// Reports device memory that is still allocated.
pub fn report_leaks(d: &Driver) {
    if d.config.leaks {
        report::leaks(d, &d.device.leaks());
    }
}

/// The last context is gone: its memory, handles and error go too, as on a GPU, after what was leaked is reported.
fn end(d: &Driver, mut state: std::sync::MutexGuard<'_, State>) {
    if !state.contexts.is_empty() {
        return;
    }
    // Graphs own memory that is not leaked; modules free their variables.
    let fresh = State::after(&state);
    let mut old = std::mem::replace(&mut *state, fresh);
    state.host = std::mem::take(&mut old.host);
    state.registered = std::mem::take(&mut old.registered);
    drop(old);
    report_leaks(d);
    for leak in d.device.leaks() {
        // Listed a moment ago under the same lock; a failure would only leave it allocated.
        let _ = d.device.free(leak.address);
    }
}

fn destroy(context: Handle) -> Outcome {
    let d = driver()?;
    let mut state = d.lock();
    if state.contexts.get(&context).is_none_or(|c| c.primary) {
        return Err(no_such("context made by cuCtxCreate", context));
    }
    state.contexts.remove(&context);
    with_stack(|s| s.retain(|&c| c != context));
    end(d, state);
    Ok(())
}

fn create(out: Out<Handle>, flags: c_uint, device: c_int) -> Outcome {
    check(device)?;
    let d = driver()?;
    let mut state = d.lock();
    let handle = state.handle();
    out.set(handle)?;
    state.contexts.insert(handle, Context { references: 1, primary: false, flags });
    with_stack(|s| s.push(handle));
    Ok(())
}

fn primary(state: &State) -> Option<Handle> {
    state.contexts.iter().find(|(_, c)| c.primary).map(|(h, _)| *h)
}

fn release(device: c_int, all: bool) -> Outcome {
    check(device)?;
    let d = driver()?;
    let mut state = d.lock();
    let Some(handle) = primary(&state) else {
        return if all { Ok(()) } else { Err(failure(INVALID_CONTEXT, "the primary context is not retained")) };
    };
    let gone = state.contexts.get_mut(&handle).is_some_and(|c| {
        c.references = if all { 0 } else { c.references - 1 };
        c.references == 0
    });
    if gone {
        state.contexts.remove(&handle);
        end(d, state);
    }
    Ok(())
}

driver_calls! {
    fn cuDevicePrimaryCtxRetain(out: Out<Handle>, device: c_int) {
        check(device)?;
        let d = driver()?;
        let mut state = d.lock();
        let handle = match primary(&state) {
            Some(h) => h,
            None => {
                let h = state.handle();
                state.contexts.insert(h, Context { primary: true, ..Context::default() });
                h
            }
        };
        out.set(handle)?;
        if let Some(c) = state.contexts.get_mut(&handle) {
            c.references += 1;
        }
        Ok(())
    }

    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        release(device, false)
    }

    fn cuDevicePrimaryCtxReset_v2(device: c_int) {
        release(device, true)
    }

    fn cuDevicePrimaryCtxGetState(device: c_int, flags: Out<c_uint>, active: Out<c_int>) {
        check(device)?;
        let state = driver()?.lock();
        let context = primary(&state).and_then(|h| state.contexts.get(&h));
        flags.set(context.map_or(0, |c| c.flags))?;
        active.set(context.is_some().into())
    }

    fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, flags: c_uint) {
        check(device)?;
        let mut state = driver()?.lock();
        if let Some(c) = primary(&state).and_then(|h| state.contexts.get_mut(&h)) {
            c.flags = flags;
        }
        Ok(())
    }

    fn cuCtxCreate_v2(out: Out<Handle>, flags: c_uint, device: c_int) {
        create(out, flags, device)
    }

    fn cuCtxCreate_v3(out: Out<Handle>, affinity: In<u8>, count: c_int, flags: c_uint, device: c_int) {
        if !affinity.is_null() || count != 0 {
            return Err(failure(NOT_SUPPORTED, "execution affinity is not simulated"));
        }
        create(out, flags, device)
    }

    fn cuCtxCreate_v4(out: Out<Handle>, params: In<u8>, flags: c_uint, device: c_int) {
        if !params.is_null() {
            return Err(failure(NOT_SUPPORTED, "creation parameters of contexts are not simulated"));
        }
        create(out, flags, device)
    }

    fn cuCtxDestroy_v2(context: Handle) {
        destroy(context)
    }

    fn cuCtxGetCurrent(out: Out<Handle>) {
        driver()?;
        out.set(current())
    }

    fn cuCtxSetCurrent(context: Handle) {
        let state = driver()?.lock();
        if context != 0 && !state.contexts.contains_key(&context) {
            return Err(failure(INVALID_CONTEXT, format!("{context:#x} is no context (destroyed, or never made)")));
        }
        with_stack(|s| {
            s.pop();
            if context != 0 {
                s.push(context);
            }
        });
        Ok(())
    }

    fn cuCtxPushCurrent_v2(context: Handle) {
        if !driver()?.lock().contexts.contains_key(&context) {
            return Err(failure(INVALID_CONTEXT, format!("{context:#x} is no context")));
        }
        with_stack(|s| s.push(context));
        Ok(())
    }

    fn cuCtxPopCurrent_v2(out: Out<Handle>) {
        driver()?;
        match with_stack(Vec::pop) {
            Some(context) => {
                out.set_if_asked(context);
                Ok(())
            }
            None => Err(failure(INVALID_CONTEXT, "the calling thread has no context to pop")),
        }
    }

    fn cuCtxGetDevice(device: Out<c_int>) {
        drop(driver()?.in_context()?);
        device.set(0)
    }

    fn cuCtxGetId(context: Handle, id: Out<u64>) {
        let state = driver()?.lock();
        let context = if context == 0 { current() } else { context };
        if !state.contexts.contains_key(&context) {
            return Err(failure(INVALID_CONTEXT, format!("{context:#x} is no context")));
        }
        id.set(context)
    }

    fn cuCtxGetApiVersion(context: Handle, version: Out<c_uint>) {
        if context != 0 && !driver()?.lock().contexts.contains_key(&context) {
            return Err(failure(INVALID_CONTEXT, format!("{context:#x} is no context")));
        }
        version.set(crate::device::VERSION as c_uint)
    }

    fn cuCtxGetFlags(flags: Out<c_uint>) {
        let state = driver()?.in_context()?;
        flags.set(state.contexts.get(&current()).map_or(0, |c| c.flags))
    }

    fn cuCtxSetFlags(flags: c_uint) {
        let mut state = driver()?.in_context()?;
        if let Some(c) = state.contexts.get_mut(&current()) {
            c.flags = flags;
        }
        Ok(())
    }

    fn cuCtxSynchronize() {
        let d = driver()?;
        let mut state = d.ready()?;
        crate::capture::forbid(&mut state, "cuCtxSynchronize")
    }

    fn cuCtxGetLimit(value: Out<usize>, limit: c_uint) {
        drop(driver()?.in_context()?);
        value.set(match limit {
            0 => 1024,      // stack of a thread
            1 => 1 << 20,   // printf's buffer
            2 => 8 << 20,   // the device's heap
            3 | 4 => 0,     // launches by kernels
            5 => 128,       // fetch granularity of L2
            6 => 0,         // persisting L2
            _ => return Err(failure(UNSUPPORTED_LIMIT, format!("limit {limit} is not known to the simulator"))),
        })
    }

    fn cuCtxSetLimit(limit: c_uint, _value: usize) {
        drop(driver()?.in_context()?);
        if limit > 6 {
            return Err(failure(UNSUPPORTED_LIMIT, format!("limit {limit} is not known to the simulator")));
        }
        Ok(())
    }

    fn cuCtxGetCacheConfig(config: Out<c_uint>) {
        drop(driver()?.in_context()?);
        config.set(0)
    }

    fn cuCtxSetCacheConfig(_config: c_uint) {
        driver()?.in_context().map(|_| ())
    }

    fn cuCtxGetStreamPriorityRange(least: Out<c_int>, greatest: Out<c_int>) {
        drop(driver()?.in_context()?);
        least.set_if_asked(0);
        greatest.set_if_asked(-5);
        Ok(())
    }

    fn cuCtxEnablePeerAccess(_peer: Handle, _flags: c_uint) {
        Err(failure(INVALID_DEVICE, "there is one simulated device, so no peer"))
    }

    fn cuCtxGetExecAffinity(_out: Out<c_void>, _kind: c_int) {
        Err(failure(NOT_SUPPORTED, "execution affinity is not simulated"))
    }
}
