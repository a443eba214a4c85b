//! Global memory: bounds, bytes that nobody wrote, and races between blocks.

use super::Step;
use super::access::{Touch, put, take};
use super::block::Block;
use super::race::{Global, MAX_PENDING};
use super::traffic::empty;
use super::warp::Warp;
use crate::error::FaultClass;
use crate::memory::{HostBytes, describe_nearest};
use crate::program::{Access, NONE};
use std::sync::atomic::Ordering::Relaxed;

impl Block<'_> {
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
    pub(super) fn global_access(
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
        let first = at / 4;
        let cells = map.double_words(24 * first, 3 * (end.div_ceil(4) - first));
        while at < end {
            let word = at / 4;
            let stop = end.min(4 * word + 4);
            let bytes = ((1u32 << (stop - at)) - 1) << (at % 4);
            at = stop;
            let me = Global { bytes, ..me };
            let cell = |k: usize| &cells[3 * (word - first) + k];
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
                let slot = if r0 == 0 || mine(r0) { 1 } else { 2 };
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

    /// A strong write or atomic at `address`, of any scope: whoever of the block reads it learns what the warp's last fence covered, and
    /// what the warp had learnt of other blocks.
    pub(crate) fn tell(&mut self, warp: u32, address: u64) {
        if (self.check_shared || self.l.races_global)
            && let Some(row) = self.clocks.fenced(warp, false)
        {
            let (known, acquired) = self.told.entry(address).or_insert_with(|| (vec![0; row.len()].into(), 0));
            known.iter_mut().zip(&row).for_each(|(x, y)| *x = (*x).max(*y));
            *acquired = (*acquired).max(self.clocks.acquired[warp as usize]);
        }
    }

    /// A strong read or atomic at `address`, of any scope: the other end of [`tell`](Self::tell).
    pub(crate) fn hear(&mut self, warp: u32, address: u64) {
        if let Some((known, acquired)) = self.told.get(&address) {
            self.clocks.learn(warp, known);
            self.clocks.acquire(warp, *acquired);
        }
    }

    /// A strong write or atomic at `address`: publishes what the warp's last fence covered.
    pub(crate) fn publish(&mut self, warp: u32, address: u64) {
        if self.l.races_global
            && let Some(row) = self.clocks.fenced(warp, true)
        {
            self.l.sync().release(self.index as u32, address, &row);
        }
    }

    /// A strong read or atomic at `address`: a later fence acquires from it.
    pub(crate) fn watch(&mut self, warp: u32, address: u64) {
        if self.l.races_global {
            let pending = &mut self.clocks.pending[warp as usize];
            if pending.len() < MAX_PENDING && !pending.contains(&address) {
                pending.push(address);
            }
        }
    }

    /// What strong reads saw becomes known.
    pub(crate) fn acquire_fence(&mut self, warp: u32) {
        if self.l.races_global {
            let time = {
                let table = self.l.sync();
                match &self.clocks.pending[warp as usize] {
                    many if many.len() == MAX_PENDING => table.now(),
                    few => few.iter().map(|a| table.acquire(*a)).max().unwrap_or(0),
                }
            };
            self.clocks.acquire(warp, time);
            self.clocks.pending[warp as usize].clear();
        }
    }

    pub(crate) fn fence(&mut self, warp: &mut Warp, wide: bool) {
        if wide {
            self.acquire_fence(warp.id);
        }
        self.clocks.fence(warp.id, wide);
        warp.saw_sync = true;
    }
}

pub(super) fn race_map(slot: &std::sync::OnceLock<HostBytes>, words: usize) -> Option<&HostBytes> {
    let map = slot.get_or_init(|| HostBytes::zeroed(words * 24).unwrap_or_else(empty));
    (map.len() > 0).then_some(map)
}

fn cut(v: u64, bytes: u32) -> u64 {
    if bytes == 8 { v } else { v & ((1 << (8 * bytes)) - 1) }
}
