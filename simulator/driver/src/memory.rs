//! Device memory, copies, fills, and host memory.

use crate::abi::*;
use crate::capture;
use crate::graph::{self, GraphMemory};
use crate::pool;
use crate::state::{Handle, current, driver, no_such};
use crate::stream;
use crate::work::{Work, submit};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ffi::{c_uint, c_void};
use std::sync::Arc;

fn allocate(out: Out<u64>, bytes: usize) -> Outcome<u64> {
    if bytes == 0 {
        return Err(failure(INVALID_VALUE, "an allocation must have at least one byte"));
    }
    if out.address() == 0 {
        return Err(failure(INVALID_VALUE, "the pointer for the result is null"));
    }
    let address = driver()?.device.alloc(bytes as u64)?;
    out.set(address)?;
    Ok(address)
}

/// Memory from `pool`, or from the device's current pool.
fn allocate_async(out: Out<u64>, bytes: usize, pool: Option<Handle>, stream: Handle) -> Outcome {
    let d = driver()?;
    let mut state = d.ready()?;
    let capturing = capture::of(&mut state, stream)?.is_some();
    let pool = pool.unwrap_or_else(|| pool::current(&mut state));
    if !state.pools.contains_key(&pool) {
        return Err(no_such("memory pool", pool));
    }
    if !capturing {
        let address = allocate(out, bytes)?;
        state.take_from_pool(pool, address, bytes as u64);
        return Ok(());
    }
    if bytes == 0 {
        return Err(failure(INVALID_VALUE, "an allocation must have at least one byte"));
    }
    // The graph's memory has one address for its whole life; each launch finds it uninitialised.
    let bytes = bytes as u64;
    let address = d.device.alloc_named(bytes, "memory of a graph")?;
    let memory = Arc::new(GraphMemory { address, bytes });
    out.set(address)?;
    if let Some(capture) = capture::of(&mut state, stream)? {
        capture.own(memory);
        capture.add(stream, Work::Forget { address, bytes });
    }
    Ok(())
}

fn free(address: u64) -> Outcome {
    let d = driver()?;
    let mut state = d.in_context()?;
    if address == 0 {
        return Ok(());
    }
    match graph::memory_at(&state, address) {
        Some(bytes) => d.device.poison(address, bytes)?,
        None => {
            d.device.free(address)?;
            state.give_back_to_pool(address);
        }
    }
    // Freed also after a kernel failed, so that the program's clean-up does not look like a leak.
    state.sticky.map_or(Ok(()), |code| Err(quiet(code)))
}

fn free_async(address: u64, stream: Handle) -> Outcome {
    let d = driver()?;
    let mut state = d.in_context()?;
    let owned = graph::memory_at(&state, address);
    match capture::of(&mut state, stream)? {
        Some(capture) => {
            let work = match owned {
                Some(bytes) => Work::Forget { address, bytes },
                None => Work::Free(address),
            };
            capture.add(stream, work);
            Ok(())
        }
        None => {
            drop(state);
            free(address)
        }
    }
}

/// Calls without a stream are not allowed while another thread's capture is in global mode.
fn now(call: &str, work: Work) -> Outcome {
    let d = driver()?;
    capture::forbid(&mut *d.ready()?, call)?;
    submit(d, 2, work)
}

fn fill(to: u64, pattern: u32, size: usize, count: usize) -> Work {
    fill_2d(to, 0, pattern, size, count, 1)
}

fn fill_2d(to: u64, pitch: usize, pattern: u32, size: usize, count: usize, rows: usize) -> Work {
    Work::Fill { to, pattern, size, count, rows, pitch }
}

/// A copy between addresses of either side: device addresses are those of live allocations.
fn unified(to: u64, from: u64, bytes: usize) -> Outcome<Work> {
    let device = &driver()?.device;
    let on_device = |a: u64| device.address_range(a).is_some();
    Ok(match (on_device(to), on_device(from)) {
        (true, true) => Work::Copy { to, from, bytes },
        (true, false) => Work::ToDevice { to, from: host(from), bytes },
        (false, true) => Work::ToHost { to: host(to), from, bytes },
        (false, false) => {
            return Err(failure(INVALID_VALUE, format!("neither {to:#x} nor {from:#x} is in live device memory")));
        }
    })
}

fn host(address: u64) -> Host {
    Host::new(address as usize)
}

fn host_alloc(out: Out<*mut c_void>, bytes: usize) -> Outcome {
    let mut state = driver()?.ready()?;
    if bytes == 0 {
        return out.set(std::ptr::null_mut());
    }
    let layout = Layout::from_size_align(bytes, 4096).map_err(|_| quiet(OUT_OF_MEMORY))?;
    if out.address() == 0 {
        return Err(failure(INVALID_VALUE, "the pointer for the result is null"));
    }
    // SAFETY: the layout's size is not zero.
    let start = unsafe { alloc_zeroed(layout) };
    if start.is_null() {
        return Err(failure(OUT_OF_MEMORY, format!("the host has no room for {bytes} bytes")));
    }
    state.host.insert(start.expose_provenance(), layout);
    out.set(start.cast())
}

driver_calls! {
    fn cuMemAlloc_v2(out: Out<u64>, bytes: usize) {
        capture::forbid(&mut *driver()?.ready()?, "cuMemAlloc")?;
        allocate(out, bytes).map(drop)
    }

    fn cuMemAllocPitch_v2(out: Out<u64>, pitch: Out<usize>, width: usize, height: usize, _element: c_uint) {
        capture::forbid(&mut *driver()?.ready()?, "cuMemAllocPitch")?;
        let row = width.checked_next_multiple_of(512);
        let Some((row, bytes)) = row.and_then(|r| Some((r, r.checked_mul(height)?))) else {
            return Err(quiet(OUT_OF_MEMORY));
        };
        pitch.set(row)?;
        allocate(out, bytes).map(drop)
    }

    fn cuMemAllocAsync(out: Out<u64>, bytes: usize, stream: Handle) {
        allocate_async(out, bytes, None, stream)
    }

    fn cuMemAllocFromPoolAsync(out: Out<u64>, bytes: usize, pool: Handle, stream: Handle) {
        allocate_async(out, bytes, Some(pool), stream)
    }

    fn cuMemFree_v2(address: u64) {
        capture::forbid(&mut *driver()?.in_context()?, "cuMemFree")?;
        free(address)
    }

    fn cuMemFreeAsync(address: u64, stream: Handle) {
        free_async(address, stream)
    }

    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) {
        let d = driver()?;
        drop(d.in_context()?);
        let (f, t) = d.device.mem_info();
        free.set(f as usize)?;
        total.set(t as usize)
    }

    fn cuMemGetAddressRange_v2(base: Out<u64>, bytes: Out<usize>, address: u64) {
        let d = driver()?;
        drop(d.ready()?);
        let (b, n) = d.device.address_range(address)
            .ok_or_else(|| failure(NOT_FOUND, format!("{address:#x} is not in live device memory")))?;
        base.set_if_asked(b);
        bytes.set_if_asked(n as usize);
        Ok(())
    }

    fn cuMemcpy(to: u64, from: u64, bytes: usize) {
        now("cuMemcpy", unified(to, from, bytes)?)
    }

    fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: Handle) {
        submit(driver()?, stream, unified(to, from, bytes)?)
    }

    fn cuMemcpyHtoD_v2(to: u64, from: Host, bytes: usize) {
        now("cuMemcpyHtoD", Work::ToDevice { to, from, bytes })
    }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: Host, bytes: usize, stream: Handle) {
        submit(driver()?, stream, Work::ToDevice { to, from, bytes })
    }

    fn cuMemcpyDtoH_v2(to: Host, from: u64, bytes: usize) {
        now("cuMemcpyDtoH", Work::ToHost { to, from, bytes })
    }

    fn cuMemcpyDtoHAsync_v2(to: Host, from: u64, bytes: usize, stream: Handle) {
        submit(driver()?, stream, Work::ToHost { to, from, bytes })
    }

    fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) {
        now("cuMemcpyDtoD", Work::Copy { to, from, bytes })
    }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) {
        submit(driver()?, stream, Work::Copy { to, from, bytes })
    }

    fn cuMemcpyPeer(to: u64, _to_context: Handle, from: u64, _from_context: Handle, bytes: usize) {
        now("cuMemcpyPeer", Work::Copy { to, from, bytes })
    }

    fn cuMemcpyPeerAsync(to: u64, _c: Handle, from: u64, _from_context: Handle, bytes: usize, stream: Handle) {
        submit(driver()?, stream, Work::Copy { to, from, bytes })
    }

    fn cuMemsetD8_v2(to: u64, value: u8, count: usize) {
        now("cuMemsetD8", fill(to, value.into(), 1, count))
    }

    fn cuMemsetD16_v2(to: u64, value: u16, count: usize) {
        now("cuMemsetD16", fill(to, value.into(), 2, count))
    }

    fn cuMemsetD32_v2(to: u64, value: u32, count: usize) {
        now("cuMemsetD32", fill(to, value, 4, count))
    }

    fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: Handle) {
        submit(driver()?, stream, fill(to, value.into(), 1, count))
    }

    fn cuMemsetD16Async(to: u64, value: u16, count: usize, stream: Handle) {
        submit(driver()?, stream, fill(to, value.into(), 2, count))
    }

    fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: Handle) {
        submit(driver()?, stream, fill(to, value, 4, count))
    }

    fn cuMemsetD2D8_v2(to: u64, pitch: usize, value: u8, width: usize, height: usize) {
        now("cuMemsetD2D8", fill_2d(to, pitch, value.into(), 1, width, height))
    }

    fn cuMemsetD2D16_v2(to: u64, pitch: usize, value: u16, width: usize, height: usize) {
        now("cuMemsetD2D16", fill_2d(to, pitch, value.into(), 2, width, height))
    }

    fn cuMemsetD2D32_v2(to: u64, pitch: usize, value: u32, width: usize, height: usize) {
        now("cuMemsetD2D32", fill_2d(to, pitch, value, 4, width, height))
    }

    fn cuMemsetD2D8Async(to: u64, pitch: usize, value: u8, width: usize, height: usize, stream: Handle) {
        submit(driver()?, stream, fill_2d(to, pitch, value.into(), 1, width, height))
    }

    fn cuMemsetD2D16Async(to: u64, pitch: usize, value: u16, width: usize, height: usize, stream: Handle) {
        submit(driver()?, stream, fill_2d(to, pitch, value.into(), 2, width, height))
    }

    fn cuMemsetD2D32Async(to: u64, pitch: usize, value: u32, width: usize, height: usize, stream: Handle) {
        submit(driver()?, stream, fill_2d(to, pitch, value, 4, width, height))
    }

    fn cuMemHostAlloc(out: Out<*mut c_void>, bytes: usize, flags: c_uint) {
        if flags & 2 != 0 {
            return Err(failure(NOT_SUPPORTED, "kernels cannot reach host memory (CU_MEMHOSTALLOC_DEVICEMAP)"));
        }
        host_alloc(out, bytes)
    }

    fn cuMemAllocHost_v2(out: Out<*mut c_void>, bytes: usize) {
        host_alloc(out, bytes)
    }

    fn cuMemFreeHost(start: Host) {
        if start.address() == 0 {
            return Ok(());
        }
        let layout = driver()?.lock().host.remove(&start.address());
        let Some(layout) = layout else {
            return Err(failure(INVALID_VALUE, format!("{:#x} was not given out by cuMemHostAlloc", start.address())));
        };
        // SAFETY: allocated in `host_alloc` with this layout, and removed from the table, so freed once.
        unsafe { dealloc(std::ptr::with_exposed_provenance_mut(start.address()), layout) };
        Ok(())
    }

    fn cuMemHostGetFlags(flags: Out<c_uint>, start: Host) {
        let state = driver()?.ready()?;
        if !state.host.contains_key(&start.address()) {
            return Err(failure(INVALID_VALUE, format!("{:#x} was not given out by cuMemHostAlloc", start.address())));
        }
        flags.set(0)
    }

    fn cuMemHostRegister_v2(start: Host, bytes: usize, flags: c_uint) {
        let mut state = driver()?.ready()?;
        if flags & 2 != 0 {
            return Err(failure(NOT_SUPPORTED, "kernels cannot reach host memory (CU_MEMHOSTREGISTER_DEVICEMAP)"));
        }
        if start.address() == 0 || bytes == 0 || start.address().checked_add(bytes).is_none() {
            return Err(failure(INVALID_VALUE, format!("{bytes} bytes at {:#x} cannot be registered", start.address())));
        }
        let end = start.address() + bytes;
        let overlaps = |(at, n): (&usize, &usize)| *at < end && start.address() < at + n;
        if state.registered.iter().any(overlaps) {
            return Err(failure(HOST_MEMORY_ALREADY_REGISTERED, "the range overlaps one that is registered"));
        }
        state.registered.insert(start.address(), bytes);
        Ok(())
    }

    fn cuMemHostUnregister(start: Host) {
        let gone = driver()?.lock().registered.remove(&start.address());
        let text = || format!("{:#x} is not registered", start.address());
        gone.map(|_| ()).ok_or_else(|| failure(HOST_MEMORY_NOT_REGISTERED, text()))
    }

    fn cuPointerGetAttribute(out: Out<u64>, attribute: c_uint, address: u64) {
        let d = driver()?;
        let state = d.ready()?;
        let range = d.device.address_range(address);
        let holds = |(at, n): (&usize, usize)| (*at..*at + n).contains(&(address as usize));
        let pinned = state.host.iter().map(|(a, l)| (a, l.size())).chain(state.registered.iter().map(|(a, n)| (a, *n)));
        if range.is_none() && !pinned.into_iter().any(holds) {
            return Err(quiet(INVALID_VALUE));
        }
        // Results of 4 bytes are written as such: the caller has no room for more.
        let small = |value: u32| out.cast::<u32>().set(value);
        match (attribute, range) {
            (1, _) => out.set(current()),
            (2, r) => small(if r.is_some() { 2 } else { 1 }),
            (3, Some(_)) => out.set(address),
            (4, None) => out.set(address),
            (7, Some((base, _))) => out.set(base),
            (8, _) => out.cast::<u8>().set(0),
            (9, _) => small(0),
            (11, Some((base, _))) => out.set(base),
            (12, Some((_, bytes))) => out.set(bytes),
            _ => Err(failure(INVALID_VALUE, format!("attribute {attribute} of {address:#x} is not known to the simulator"))),
        }
    }

    fn cuStreamAttachMemAsync(stream: Handle, _address: u64, _bytes: usize, _flags: c_uint) {
        stream::capture(&*driver()?.ready()?, stream)?;
        Err(failure(NOT_SUPPORTED, "managed memory is not simulated"))
    }

    fn cuMemAllocManaged(_out: Out<u64>, _bytes: usize, _flags: c_uint) {
        Err(failure(NOT_SUPPORTED, "managed memory is not simulated: device attribute 83 says so"))
    }
}
