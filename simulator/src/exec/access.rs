//! Memory: addresses to bytes, with every check of the sanitizer on the way.

use super::Step;
use super::block::{Block, lanes};
use super::race::{Global, MANY, Record};
use super::warp::Warp;
use crate::compile::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW};
use crate::error::FaultClass;
use crate::memory::{HostBytes, describe_nearest};
use crate::program::{Access, Addr, HALF, Kind, NONE, Place, Strength};
use std::sync::atomic::Ordering::Relaxed;

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
            std::array::from_fn(|i| warp.get64(frame, a.reg, i as u32).wrapping_add(a.offset as u64))
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
            self.clocks.fence(warp.id);
        }
        let touch = Touch { write: x.store, strong };
        for lane in lanes(active) {
            let address = addresses[lane as usize];
            match resolve(x.place, address) {
                Where::Global(a) => self.global_access(warp, frame, lane, a, size, x, touch)?,
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
        if !x.store && x.strength == Strength::Acquire {
            self.acquire_fence(warp.id);
        }
        Ok(())
    }

    /// Checks a global access; gives the allocation's index and the offset in it.
    #[inline(always)]
    pub(crate) fn global_at(&self, warp: &mut Warp, lane: u32, a: u64, size: u32, write: bool) -> Step<(usize, usize)> {
        if a & u64::from(size - 1) != 0 {
            return self.misaligned(warp, lane, a, size);
        }
        let fits = |i: usize| {
            let alloc = self.l.allocations.get(i)?;
            let offset = a.wrapping_sub(alloc.base);
            (offset < alloc.bytes && alloc.bytes - offset >= u64::from(size)).then_some(offset as usize)
        };
        if let Some(offset) = fits(warp.hint) {
            if write && self.l.allocations[warp.hint].constant {
                return self.out_of_bounds(warp, lane, a, size, write);
            }
            return Ok((warp.hint, offset));
        }
        match self.l.find(a).and_then(|i| fits(i).map(|o| (i, o))) {
            Some((i, o)) if !(write && self.l.allocations[i].constant) => {
                warp.hint = i;
                Ok((i, o))
            }
            _ => self.out_of_bounds(warp, lane, a, size, write),
        }
    }

    #[cold]
    pub(crate) fn misaligned<T>(&self, warp: &Warp, lane: u32, a: u64, size: u32) -> Step<T> {
        self.fault(FaultClass::Misaligned, warp, lane, || {
            format!("address {a:#x} is not a multiple of {size}, the size of the access")
        })
    }

    #[cold]
    pub(crate) fn out_of_bounds<T>(&self, warp: &Warp, lane: u32, a: u64, size: u32, write: bool) -> Step<T> {
        let l = self.l;
        let what = if write { "write" } else { "read" };
        let live: Vec<_> = l.allocations.iter().map(|x| (x.base, x.bytes, x.label.as_str())).collect();
        let freed = l.memory.freed();
        let freed: Vec<_> = freed.iter().map(|(b, n, t)| (*b, *n, t.as_str())).collect();
        self.fault(FaultClass::OobGlobal, warp, lane, || {
            let constant = l.find(a).is_some_and(|i| l.allocations[i].constant);
            let near = if constant {
                "constant memory, which cannot be written".into()
            } else {
                describe_nearest(&live, &freed, a, size.into())
            };
            format!("{what} of {size} bytes of global memory at {a:#x}: {near}")
        })
    }

    #[allow(clippy::too_many_arguments)]
    #[inline(always)]
    fn global_access(
        &mut self,
        warp: &mut Warp,
        frame: u16,
        lane: u32,
        a: u64,
        size: u32,
        x: &Access,
        touch: Touch,
    ) -> Step {
        let (i, offset) = self.global_at(warp, lane, a, size, x.store)?;
        let l = self.l;
        let alloc = &l.allocations[i];
        let bytes = x.bytes as usize;
        if x.store {
            if touch.strong {
                self.publish(warp.id, a);
            }
            if l.races_global {
                let changes = x.regs.iter().enumerate().any(|(k, (s, w))| {
                    alloc.data.load(offset + k * bytes, bytes) != cut(take(warp, frame, lane, *s, *w), x.bytes)
                });
                self.global_record(warp.id, lane, i, offset, size as usize, touch, changes);
            }
            for (k, (s, w)) in x.regs.iter().enumerate() {
                alloc.data.store(offset + k * bytes, bytes, take(warp, frame, lane, *s, *w));
                if let Some(valid) = &alloc.valid {
                    let known = warp.unwritten.is_empty()
                        || warp.unwritten.get(&warp.line(frame, *s)).is_none_or(|lanes| lanes >> lane & 1 == 0);
                    valid.store(offset + k * bytes, bytes, if known { 0x0101_0101_0101_0101 } else { 0 });
                }
            }
            return Ok(());
        }
        if touch.strong {
            self.watch(warp.id, a);
        }
        if l.races_global && !alloc.constant {
            self.global_record(warp.id, lane, i, offset, size as usize, touch, true);
        }
        for (k, (d, w)) in x.regs.iter().enumerate() {
            let at = offset + k * bytes;
            if let Some(valid) = &alloc.valid {
                let all = if bytes == 8 { 0x0101_0101_0101_0101 } else { (1u64 << (8 * bytes)) / 255 };
                if valid.load(at, bytes) != all && *d != NONE {
                    self.unwritten_global(warp.id, lane, a + (k * bytes) as u64, x.bytes, i);
                }
            }
            put(warp, frame, lane, *d, *w, alloc.data.load(at, bytes), x);
        }
        Ok(())
    }

    #[cold]
    pub(crate) fn unwritten_global(&self, warp: u32, lane: u32, a: u64, size: u32, i: usize) {
        let alloc = &self.l.allocations[i];
        self.note(FaultClass::UninitialisedGlobal, warp, lane, || {
            let (offset, label, n) = (a - alloc.base, &alloc.label, alloc.bytes);
            format!("read of {size} bytes of global memory at {a:#x} that nobody wrote: byte {offset} of {label} ({n} bytes)")
        });
    }

    /// Checks and records an access for races between blocks. `changes`: a write that changes bytes.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn global_record(
        &mut self,
        warp: u32,
        lane: u32,
        i: usize,
        offset: usize,
        size: usize,
        touch: Touch,
        changes: bool,
    ) {
        let l = self.l;
        let words = (l.allocations[i].bytes as usize).div_ceil(4);
        let Some(map) = race_map(&l.races[i], words) else {
            return;
        };
        let me =
            Global { block: self.index as u32, warp, clock: self.clocks.clock(warp), bytes: 15, strong: touch.strong };
        let (mut at, end) = (offset, offset + size);
        while at < end {
            let word = at / 4;
            let stop = end.min(4 * word + 4);
            let bytes = ((1u32 << (stop - at)) - 1) << (at % 4);
            at = stop;
            let me = Global { bytes, ..me };
            let cell = |k: usize| map.a64(24 * word + 8 * k);
            let w = cell(0).load(Relaxed);
            let conflict = |r: u64| match Global::unpack(r) {
                Some(r) if r.block != me.block && r.bytes & bytes != 0 && !(r.strong && me.strong) => {
                    (!self.known(r, warp)).then_some(r)
                }
                _ => None,
            };
            if !touch.write {
                if let Some(r) = conflict(w) {
                    self.global_race(lane, warp, r, i, 4 * word, "reads what", "wrote");
                }
                let (r0, r1) = (cell(1).load(Relaxed), cell(2).load(Relaxed));
                let mine = |r: u64| Global::unpack(r).is_some_and(|r| r.block == me.block);
                let slot = if r0 == 0 || mine(r0) {
                    1
                } else if r1 == 0 || mine(r1) || r1 != me.pack() {
                    2
                } else {
                    continue;
                };
                let old = if slot == 1 { r0 } else { r1 };
                let merged = match Global::unpack(old) {
                    Some(o) if o.block == me.block && o.clock == me.clock && o.strong == me.strong => {
                        Global { bytes: o.bytes | bytes, ..me }
                    }
                    _ => me,
                };
                if old != merged.pack() {
                    cell(slot).store(merged.pack(), Relaxed);
                }
                continue;
            }
            if changes {
                if let Some(r) = conflict(w) {
                    self.global_race(lane, warp, r, i, 4 * word, "writes what", "wrote");
                }
                for k in [1, 2] {
                    if let Some(r) = conflict(cell(k).load(Relaxed)) {
                        self.global_race(lane, warp, r, i, 4 * word, "writes what", "read");
                    }
                }
            }
            let merged = match Global::unpack(w) {
                Some(o) if o.block == me.block && o.warp == me.warp && o.clock == me.clock && o.strong == me.strong => {
                    Global { bytes: o.bytes | bytes, ..me }
                }
                _ => me,
            };
            if merged.pack() != w {
                cell(0).store(merged.pack(), Relaxed);
            }
        }
    }

    /// Whether warp `w` has learnt, by an acquire, of another block's access.
    fn known(&self, r: Global, w: u32) -> bool {
        let time = self.clocks.acquired[w as usize];
        time > 0 && self.l.sync().known(r.block, r.warp, r.clock, time)
    }

    #[cold]
    #[allow(clippy::too_many_arguments)]
    fn global_race(&self, lane: u32, warp: u32, r: Global, i: usize, offset: usize, does: &str, did: &str) {
        let (l, alloc) = (self.l, &self.l.allocations[i]);
        self.note(FaultClass::DataRaceGlobal, warp, lane, || {
            let other = l.block_index(r.block.into());
            let a = alloc.base + offset as u64;
            format!(
                "{does} block {other:?} warp {} {did}, without synchronisation: {a:#x}, byte {offset} of {}",
                r.warp, alloc.label
            )
        });
    }

    /// A strong write or atomic at `address`: publishes what the warp's last fence covered.
    pub(crate) fn publish(&mut self, warp: u32, address: u64) {
        if self.l.races_global
            && let Some(row) = self.clocks.fenced(warp)
        {
            self.l.sync().release(self.index as u32, address, &row);
        }
    }

    /// A strong read or atomic at `address`: a later fence acquires from it.
    pub(crate) fn watch(&mut self, warp: u32, address: u64) {
        if self.l.races_global {
            let pending = &mut self.clocks.pending[warp as usize];
            if !pending.contains(&address) {
                if pending.len() >= 64 {
                    pending.remove(0);
                }
                pending.push(address);
            }
        }
    }

    /// What strong reads saw becomes known.
    pub(crate) fn acquire_fence(&mut self, warp: u32) {
        if self.l.races_global {
            let time = {
                let table = self.l.sync();
                self.clocks.pending[warp as usize].iter().map(|a| table.acquire(*a)).max().unwrap_or(0)
            };
            let known = &mut self.clocks.acquired[warp as usize];
            *known = (*known).max(time);
        }
    }

    pub(crate) fn fence(&mut self, warp: &mut Warp) {
        self.acquire_fence(warp.id);
        self.clocks.fence(warp.id);
        warp.saw_sync = true;
    }

    /// Checks a shared access.
    #[inline(always)]
    pub(crate) fn shared_at(&self, warp: &Warp, lane: u32, a: u32, size: u32, write: bool) -> Step<usize> {
        if a & (size - 1) != 0 {
            return self.misaligned(warp, lane, a.into(), size);
        }
        if u64::from(a) + u64::from(size) > u64::from(self.l.shared_bytes) {
            let n = self.l.shared_bytes;
            return self.fault(FaultClass::OobShared, warp, lane, || {
                let what = if write { "write" } else { "read" };
                let past = u64::from(a) + u64::from(size) - u64::from(n);
                format!("{what} of {size} bytes at {a:#x} of shared memory: {past} bytes past the end of its {n} bytes")
            });
        }
        Ok(a as usize)
    }

    #[allow(clippy::too_many_arguments)]
    #[inline(always)]
    fn shared_access(
        &mut self,
        warp: &mut Warp,
        frame: u16,
        lane: u32,
        a: u32,
        size: u32,
        x: &Access,
        touch: Touch,
    ) -> Step {
        let at = self.shared_at(warp, lane, a, size, x.store)?;
        let bytes = x.bytes as usize;
        if x.store {
            let mut data = [0u8; 32];
            for (k, (s, w)) in x.regs.iter().enumerate() {
                data[k * bytes..(k + 1) * bytes]
                    .copy_from_slice(&take(warp, frame, lane, *s, *w).to_le_bytes()[..bytes]);
            }
            if touch.strong {
                self.shared_publish(warp.id, a);
            }
            self.shared_write(warp.id, lane, at, &data[..size as usize], touch.strong);
            return Ok(());
        }
        if touch.strong {
            self.shared_learn(warp.id, a);
        }
        self.shared_read(warp.id, lane, at, size as usize, touch.strong);
        for (k, (d, w)) in x.regs.iter().enumerate() {
            let from = at + k * bytes;
            let v = little(&self.shared[from..from + bytes]);
            put(warp, frame, lane, *d, *w, v, x);
        }
        Ok(())
    }

    /// Checks for reading shared bytes that are in bounds.
    #[inline(always)]
    pub(crate) fn shared_read(&mut self, warp: u32, lane: u32, at: usize, size: usize, strong: bool) {
        let state = &self.state[at..at + size];
        if state.iter().any(|s| *s != 1) {
            self.bad_state(warp, lane, at, size, false);
        }
        if self.check_shared {
            self.shared_record(warp, lane, at, size, Touch { write: false, strong }, true);
        }
    }

    /// Checks and does a write of shared bytes that are in bounds.
    #[inline(always)]
    pub(crate) fn shared_write(&mut self, warp: u32, lane: u32, at: usize, data: &[u8], strong: bool) {
        let size = data.len();
        if self.state[at..at + size].iter().any(|s| s & 2 != 0) {
            self.bad_state(warp, lane, at, size, true);
        }
        if !self.hazards.readings.is_empty() {
            self.overwritten(warp, lane, at, size);
        }
        if self.check_shared {
            let changes = self.shared[at..at + size] != *data || self.state[at..at + size].contains(&0);
            self.shared_record(warp, lane, at, size, Touch { write: true, strong }, changes);
        }
        self.shared[at..at + size].copy_from_slice(data);
        self.state[at..at + size].fill(1);
    }

    #[cold]
    pub(crate) fn bad_state(&mut self, warp: u32, lane: u32, at: usize, size: usize, write: bool) {
        let what = if write { "write" } else { "read" };
        let s = self.l.options.sanitizer;
        if let Some(k) = (at..at + size).find(|k| self.state[*k] & 2 != 0) {
            if s.async_copies {
                self.touched_in_flight(
                    warp,
                    lane,
                    k,
                    format!("{what} of {size} bytes at {at:#x} of shared memory that a copy fills"),
                );
            }
        } else if !write && s.uninitialised {
            self.note(FaultClass::UninitialisedShared, warp, lane, || {
                format!("read of {size} bytes at {at:#x} of shared memory that nobody wrote")
            });
        }
    }

    /// Checks and records an access for races within the block.
    pub(crate) fn shared_record(&mut self, warp: u32, lane: u32, at: usize, size: usize, touch: Touch, changes: bool) {
        let me = Record { warp, lane, clock: self.clocks.clock(warp), bytes: 15, atomic: touch.strong, pc: self.pc };
        let (mut at, end) = (at, at + size);
        while at < end {
            let word = at / 4;
            let stop = end.min(4 * word + 4);
            let bytes = ((1u32 << (stop - at)) - 1) << (at % 4);
            at = stop;
            let me = Record { bytes, ..me };
            let cell = self.shadow[word];
            let conflict = |k: usize| match Record::unpack(cell[k]) {
                Some(r)
                    if r.bytes & bytes != 0
                        && !(r.atomic && me.atomic)
                        && !self.clocks.ordered(r, warp, lane)
                        && !(r.lane == MANY && r.warp == warp && self.parts.only(word, k, bytes, lane)) =>
                {
                    Some(r)
                }
                _ => None,
            };
            let merge = |k: usize| match Record::unpack(cell[k]) {
                Some(o) if o.warp == warp && o.clock == me.clock && o.atomic == me.atomic => {
                    (Record { bytes: o.bytes | bytes, lane: if o.lane == lane { lane } else { MANY }, ..me }, true)
                }
                _ => (me, false),
            };
            if !touch.write {
                if let Some(r) = conflict(0) {
                    self.shared_race(warp, lane, r, 4 * word, "reads what", "wrote");
                }
                let mine = |r: u64| Record::unpack(r).is_none_or(|r| r.warp == warp);
                let slot = if mine(cell[1]) { 1 } else { 2 };
                let (record, merged) = merge(slot);
                self.shadow[word][slot] = record.pack();
                self.parts.note(word, slot, bytes, lane, merged);
                continue;
            }
            if changes {
                if let Some(r) = conflict(0) {
                    self.shared_race(warp, lane, r, 4 * word, "writes what", "wrote");
                }
                for old in [1, 2] {
                    if let Some(r) = conflict(old) {
                        self.shared_race(warp, lane, r, 4 * word, "writes what", "read");
                    }
                }
            }
            let (record, merged) = merge(0);
            self.shadow[word][0] = record.pack();
            self.parts.note(word, 0, bytes, lane, merged);
        }
    }

    #[cold]
    fn shared_race(&self, warp: u32, lane: u32, r: Record, at: usize, does: &str, did: &str) {
        if r.warp == self.clocks.copier() {
            let wrote = "an asynchronous copy wrote";
            return self.note(FaultClass::AsyncCopyHazard, warp, lane, || {
                format!("{does} {wrote}, without a wait for its mbarrier: {at:#x} of shared memory")
            });
        }
        let wait = matches!(self.l.program.code[r.pc as usize].kind, Kind::CpWait(_) | Kind::CpWaitAll);
        if wait && self.knows_issue(warp, r.warp, at) && !self.has_waited(warp, at) {
            return self.note(FaultClass::AsyncCopyHazard, warp, lane, || {
                format!("{does} a copy of warp {} wrote, and has not waited either: {at:#x} of shared memory", r.warp)
            });
        }
        self.note(FaultClass::DataRaceShared, warp, lane, || {
            let who = if r.lane == MANY { "several lanes".to_owned() } else { format!("lane {}", r.lane) };
            let line = self.l.program.line(r.pc);
            format!(
                "{does} {who} of warp {} {did} at line {line}, without a barrier between: {at:#x} of shared memory",
                r.warp
            )
        });
    }

    pub(crate) fn shared_publish(&mut self, warp: u32, a: u32) {
        if self.check_shared
            && let Some(row) = self.clocks.fenced(warp)
        {
            let slot = self.shared_sync.entry(a).or_insert_with(|| vec![0; row.len()].into());
            slot.iter_mut().zip(&row).for_each(|(x, y)| *x = (*x).max(*y));
        }
    }

    pub(crate) fn shared_learn(&mut self, warp: u32, a: u32) {
        if self.check_shared
            && let Some(row) = self.shared_sync.get(&a)
        {
            self.clocks.learn(warp, row);
        }
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

    /// Counts sectors and wavefronts of one request.
    pub(crate) fn count(&mut self, place: Place, addresses: &[u64; 32], active: u32, size: u32, write: bool) {
        let Some(first) = lanes(active).next() else {
            return;
        };
        match resolve(place, addresses[first as usize]) {
            Where::Global(_) => {
                let mut sectors = Vec::with_capacity(64);
                let mut distinct: Vec<u64> = lanes(active).map(|l| addresses[l as usize]).collect();
                distinct.sort_unstable();
                distinct.dedup();
                for a in &distinct {
                    for s in a >> 5..=(a + u64::from(size) - 1) >> 5 {
                        sectors.push(s);
                    }
                }
                sectors.dedup();
                for s in &sectors {
                    if let Some(i) = self.l.find(s << 5).or_else(|| self.l.find((s << 5) + 31)) {
                        let alloc = &self.l.allocations[i];
                        let map = self.l.touched[i].get_or_init(|| {
                            HostBytes::zeroed(alloc.bytes.div_ceil(32) as usize + 8).unwrap_or_else(empty)
                        });
                        let at = ((s << 5).saturating_sub(alloc.base) / 32) as usize;
                        let flag = if write { 2 } else { 1 };
                        if at < map.len() && map.a8(at).load(Relaxed) & flag == 0 {
                            map.a8(at).fetch_or(flag, Relaxed);
                        }
                    }
                }
                let t = &mut self.stats.traffic[self.pc as usize];
                t.requests += 1;
                t.sectors += sectors.len() as u64;
                t.needed += (distinct.len() as u64 * u64::from(size)).div_ceil(32);
            }
            Where::Shared(_) => {
                let list: Vec<u64> = lanes(active).map(|l| addresses[l as usize]).collect();
                self.count_shared(&list, size);
            }
            Where::Local(_) => {
                self.stats.traffic[self.pc as usize].local_bytes += u64::from(active.count_ones() * size);
            }
            Where::Param(_) => {}
        }
    }

    /// Wavefronts of shared accesses: lanes in groups of 128 bytes, each bank one word at a time.
    pub(crate) fn count_shared(&mut self, addresses: &[u64], size: u32) {
        let group = (128 / size.max(4)).clamp(1, 32) as usize;
        let (mut wavefronts, mut least) = (0, 0);
        for part in addresses.chunks(group) {
            let mut words: Vec<u64> = part.iter().flat_map(|a| a / 4..=(a + u64::from(size) - 1) / 4).collect();
            words.sort_unstable();
            words.dedup();
            let mut banks = [0u64; 32];
            words.iter().for_each(|w| banks[(w % 32) as usize] += 1);
            wavefronts += banks.iter().max().copied().unwrap_or(0);
            least += (words.len() as u64).div_ceil(32);
        }
        let t = &mut self.stats.traffic[self.pc as usize];
        t.wavefronts += wavefronts;
        t.least += least;
    }
}

fn empty() -> HostBytes {
    HostBytes::zeroed(0).unwrap_or_else(|| std::process::abort())
}

fn race_map(slot: &std::sync::OnceLock<HostBytes>, words: usize) -> Option<&HostBytes> {
    let map = slot.get_or_init(|| HostBytes::zeroed(words * 24).unwrap_or_else(empty));
    (map.len() > 0).then_some(map)
}

pub(crate) fn little(bytes: &[u8]) -> u64 {
    let mut b = [0u8; 8];
    b[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(b)
}

fn cut(v: u64, bytes: u32) -> u64 {
    if bytes == 8 { v } else { v & ((1 << (8 * bytes)) - 1) }
}

/// Reads one lane of a register of 1 or 2 words.
#[inline(always)]
pub(crate) fn take(warp: &Warp, frame: u16, lane: u32, reg: u32, words: u32) -> u64 {
    if words == 2 { warp.get64(frame, reg, lane) } else { warp.get32(frame, reg, lane).into() }
}

/// Writes a loaded value, extended to the register.
#[inline(always)]
fn put(warp: &mut Warp, frame: u16, lane: u32, reg: u32, words: u32, v: u64, x: &Access) {
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
