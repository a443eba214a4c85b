//! Loads and stores: addresses of lanes to the memory that they lie in; local memory and kernel parameters.

use super::Step;
use super::block::{Block, lanes};
use super::warp::Warp;
use crate::compile::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW};
use crate::error::FaultClass;
use crate::program::{Access, Addr, HALF, NONE, Place, Strength};

/// Memory that an address lies in, and the address there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Where {
    Global(u64),
    Shared(u32),
    Local(u32),
    Param(u32),
}

/// Resolves an address used in `place`.
pub(crate) fn resolve(place: Place, address: u64) -> Where {
    let within = |window: u64| (address >= window && address < window + WINDOW).then(|| (address - window) as u32);
    match place {
        Place::Global => Where::Global(address),
        Place::Shared => Where::Shared(within(SHARED_WINDOW).unwrap_or(u32::try_from(address).unwrap_or(u32::MAX))),
        Place::Local => Where::Local(within(LOCAL_WINDOW).unwrap_or(u32::try_from(address).unwrap_or(u32::MAX))),
        Place::Param => Where::Param(within(PARAM_WINDOW).unwrap_or(u32::try_from(address).unwrap_or(u32::MAX))),
        Place::Generic => match (within(SHARED_WINDOW), within(LOCAL_WINDOW), within(PARAM_WINDOW)) {
            (Some(a), _, _) => Where::Shared(a),
            (_, Some(a), _) => Where::Local(a),
            (_, _, Some(a)) => Where::Param(a),
            _ => Where::Global(address),
        },
    }
}

/// How bytes are touched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Touch {
    pub write: bool,
    pub strong: bool,
}

impl Touch {
    pub(crate) const READ: Touch = Touch { write: false, strong: false };
    pub(crate) const WRITE: Touch = Touch { write: true, strong: false };
}

impl Block<'_> {
    /// Addresses of all lanes.
    pub(crate) fn addresses(&self, warp: &Warp, frame: u16, a: Addr) -> [u64; 32] {
        if a.wide {
            warp.lane_values64(frame, a.reg).map(|r| r.wrapping_add(a.offset as u64))
        } else {
            warp.lane_values(frame, a.reg).map(|r| u64::from(r.wrapping_add(a.offset as u32)))
        }
    }

    pub(crate) fn access(&mut self, warp: &mut Warp, frame: u16, active: u32, x: &Access) -> Step {
        let addresses = self.addresses(warp, frame, x.address);
        let size = x.bytes * x.regs.len() as u32;
        let strong = x.strength != Strength::Weak;
        if x.store {
            warp.saw_store |= !strong;
            if active != warp.all {
                for i in lanes(active) {
                    warp.effect[i as usize] = self.pc;
                }
            }
        }
        if strong {
            warp.saw_sync = true;
        }
        if self.l.options.counters {
            self.count(x.place, &addresses, active, size, x.store);
        }
        if x.store && matches!(x.strength, Strength::Release | Strength::AcqRel) {
            self.clocks.fence(warp.id, x.wide);
        }
        if active == u32::MAX
            && !strong
            && let Where::Global(a) = resolve(x.place, addresses[0])
            && addresses.iter().enumerate().all(|(i, b)| *b == addresses[0].wrapping_add(i as u64 * u64::from(size)))
            && self.coalesced(warp, frame, a, size, x)
        {
            return Ok(());
        }
        let touch = Touch { write: x.store, strong };
        for lane in lanes(active) {
            let address = addresses[lane as usize];
            match resolve(x.place, address) {
                Where::Global(a) => {
                    if strong && x.store {
                        self.tell(warp.id, a);
                    } else if strong {
                        self.hear(warp.id, a);
                    }
                    self.global_access(warp, frame, lane, a, size, x, Touch { strong: strong && x.wide, ..touch })?
                }
                Where::Shared(a) => self.shared_access(warp, frame, lane, a, size, x, touch)?,
                Where::Local(a) => self.local_access(warp, frame, lane, a, size, x)?,
                Where::Param(a) => {
                    let end = a as usize + size as usize;
                    if x.store || end > self.l.params.len() {
                        let n = self.l.params.len();
                        return self.fault(FaultClass::OobGlobal, warp, lane, || {
                            format!("access of {size} bytes at offset {a} of the {n} bytes of kernel parameters")
                        });
                    }
                    for (k, (d, words)) in x.regs.iter().enumerate() {
                        let at = a as usize + k * x.bytes as usize;
                        let v = little(&self.l.params[at..at + x.bytes as usize]);
                        put(warp, frame, lane, *d, *words, v, x);
                    }
                }
            }
        }
        if !x.store && x.strength == Strength::Acquire && x.wide {
            self.acquire_fence(warp.id);
        }
        Ok(())
    }

    fn local_access(&mut self, warp: &mut Warp, frame: u16, lane: u32, a: u32, size: u32, x: &Access) -> Step {
        let f = warp.frames[frame as usize];
        let have = f.local_base + self.l.program.funcs[f.func as usize].local_bytes;
        if a & (size - 1) != 0 {
            return self.misaligned(warp, lane, a.into(), size);
        }
        if u64::from(a) + u64::from(size) > have.into() {
            return self.fault(FaultClass::OobLocal, warp, lane, || {
                format!("access of {size} bytes at {a:#x} of local memory: a thread has {have} bytes")
            });
        }
        let (at, bytes) = ((lane * warp.local_stride + a) as usize, x.bytes as usize);
        for (k, (r, w)) in x.regs.iter().enumerate() {
            let range = at + k * bytes..at + (k + 1) * bytes;
            if x.store {
                let v = take(warp, frame, lane, *r, *w);
                warp.local[range.clone()].copy_from_slice(&v.to_le_bytes()[..bytes]);
                let known = warp.unwritten.is_empty()
                    || warp.unwritten.get(&warp.line(frame, *r)).is_none_or(|lanes| lanes >> lane & 1 == 0);
                warp.local_state[range].fill(u8::from(known));
                continue;
            }
            // Compilers copy whole structures with their padding: only a use of the value is a fault.
            if self.l.options.sanitizer.uninitialised && *r != NONE && warp.local_state[range.clone()].contains(&0) {
                let line = warp.line(frame, *r);
                *warp.unwritten.entry(line).or_default() |= 1 << lane;
            }
            let v = little(&warp.local[range]);
            put(warp, frame, lane, *r, *w, v, x);
        }
        Ok(())
    }

    /// Bytes at any address, without conversion: for descriptors. Checked like a read.
    pub(crate) fn read_bytes(
        &mut self,
        warp: &mut Warp,
        lane: u32,
        place: Place,
        address: u64,
        out: &mut [u8],
    ) -> Step {
        let n = out.len();
        match resolve(place, address) {
            Where::Param(a) => {
                let end = a as usize + n;
                if end > self.l.params.len() {
                    return self.fault(FaultClass::OobGlobal, warp, lane, || {
                        format!("read past the kernel parameters at offset {a}")
                    });
                }
                out.copy_from_slice(&self.l.params[a as usize..end]);
            }
            Where::Shared(a) => {
                for (k, byte) in out.iter_mut().enumerate() {
                    let at = self.shared_at(warp, lane, a.wrapping_add(k as u32), 1, false)?;
                    *byte = self.shared[at];
                }
                self.shared_read(warp.id, lane, a as usize, n, false);
            }
            Where::Global(a) => {
                for (k, byte) in out.iter_mut().enumerate() {
                    let (i, offset) = self.global_at(warp, lane, a.wrapping_add(k as u64), 1, false)?;
                    *byte = self.l.allocations[i].data.load(offset, 1) as u8;
                }
            }
            Where::Local(a) => {
                return self
                    .fault(FaultClass::OobLocal, warp, lane, || format!("local memory at {a:#x} cannot be read here"));
            }
        }
        Ok(())
    }
}

pub(crate) fn little(bytes: &[u8]) -> u64 {
    let mut b = [0u8; 8];
    b[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(b)
}

/// Reads one lane of a register of 1 or 2 words.
#[inline(always)]
pub(crate) fn take(warp: &Warp, frame: u16, lane: u32, reg: u32, words: u32) -> u64 {
    if words == 2 { warp.get64(frame, reg, lane) } else { warp.get32(frame, reg, lane).into() }
}

/// Writes a loaded value, extended to the register.
#[inline(always)]
pub(super) fn put(warp: &mut Warp, frame: u16, lane: u32, reg: u32, words: u32, v: u64, x: &Access) {
    if reg == NONE {
        return;
    }
    let up = 64 - 8 * x.bytes;
    let v = if x.signed { (((v << up) as i64) >> up) as u64 } else { v };
    if words == 2 {
        warp.set64(frame, reg, lane, v);
    } else {
        warp.set32(frame, reg, lane, if words == HALF { v as u32 & 0xffff } else { v as u32 });
    }
}
