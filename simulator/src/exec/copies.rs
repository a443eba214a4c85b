//! `cp.async`. A copy is read at its issue and lands at the wait that ends it; until then its target counts as in
//! flight, so that a missing wait shows.

use super::Step;
use super::access::{Touch, Where, resolve};
use super::block::{Block, lanes};
use super::warp::{Pending, Warp};
use crate::program::{CpAsync, NONE, Place};

impl Block<'_> {
    pub(crate) fn cp_async(&mut self, warp: &mut Warp, frame: u16, active: u32, c: &CpAsync) -> Step {
        let (to, from) = (self.addresses(warp, frame, c.dst), self.addresses(warp, frame, c.src));
        let ignore = if c.ignore.0 == NONE { 0 } else { warp.pred(frame, c.ignore.0, c.ignore.1) };
        if self.l.options.counters {
            self.count(Place::Shared, &to, active, c.bytes, true);
            self.count(Place::Global, &from, active, c.bytes, false);
        }
        for lane in lanes(active) {
            let i = lane as usize;
            let mut take =
                if c.src_bytes == NONE { c.bytes } else { warp.get32(frame, c.src_bytes, lane).min(c.bytes) };
            if ignore >> lane & 1 != 0 {
                take = 0;
            }
            let Where::Shared(a) = resolve(Place::Shared, to[i]) else {
                continue;
            };
            let at = self.shared_at(warp, lane, a, c.bytes, true)?;
            let (mut data, mut valid) = ([0u8; 16], u16::MAX);
            if take > 0 {
                if from[i] & u64::from(c.bytes - 1) != 0 {
                    return self.misaligned(warp, lane, from[i], c.bytes);
                }
                let (index, offset) = self.global_span(warp, lane, from[i], take.into(), false)?;
                let alloc = &self.l.allocations[index];
                for (k, byte) in data.iter_mut().enumerate().take(take as usize) {
                    *byte = alloc.data.load(offset + k, 1) as u8;
                    if alloc.valid.as_ref().is_some_and(|v| v.load(offset + k, 1) == 0) {
                        valid &= !(1 << k);
                    }
                }
                if self.l.races_global {
                    self.global_record(warp.id, lane, index, offset, take as usize, Touch::READ, true);
                }
                if valid != u16::MAX {
                    self.unwritten_global(warp.id, lane, from[i], take, index);
                }
            }
            self.in_flight(warp.id, lane, at, c.bytes as usize);
            self.copy_issued(warp.id, warp.groups[lane as usize], at, c.bytes as usize);
            warp.copies.push(Pending { lane, to: at as u32, bytes: c.bytes, data, valid, group: NONE });
            self.pending_bytes += size_of::<Pending>();
        }
        Ok(())
    }

    /// A range of one allocation, of any size.
    pub(super) fn global_span(
        &self,
        warp: &mut Warp,
        lane: u32,
        a: u64,
        size: u64,
        write: bool,
    ) -> Step<(usize, usize)> {
        match self.l.find(a) {
            Some(i) if self.l.allocations[i].end() - a >= size && !(write && self.l.allocations[i].constant) => {
                Ok((i, (a - self.l.allocations[i].base) as usize))
            }
            _ => self.out_of_bounds(warp, lane, a, u32::try_from(size).unwrap_or(u32::MAX), write),
        }
    }

    /// Marks the target of a copy. Races are judged now: the copy may land at any time from here on.
    pub(super) fn in_flight(&mut self, warp: u32, lane: u32, at: usize, bytes: usize) {
        if self.state[at..at + bytes].iter().any(|s| s & 2 != 0) {
            self.bad_state(warp, lane, at, bytes, true);
        }
        if !self.hazards.readings.is_empty() {
            self.overwritten(warp, lane, at, bytes);
        }
        if self.check_shared {
            self.shared_record(warp, lane, at, bytes, Touch::WRITE, true);
        }
        if self.l.options.sanitizer.async_copies {
            self.state[at..at + bytes].fill(2);
        }
    }

    fn land(&mut self, warp: u32, p: &Pending) {
        let (at, n) = (p.to as usize, p.bytes as usize);
        self.landed(warp, at, n);
        self.shared[at..at + n].copy_from_slice(&p.data[..n]);
        for k in 0..n {
            self.state[at + k] = if self.l.options.sanitizer.uninitialised { (p.valid >> k & 1) as u8 } else { 1 };
        }
        if self.check_shared {
            self.arrived(warp, p.lane, at, n);
        }
    }

    /// After landing, the bytes are as if written by the waiting lane just now.
    fn arrived(&mut self, warp: u32, lane: u32, at: usize, n: usize) {
        for word in at / 4..(at + n).div_ceil(4) {
            if let Some(cell) = self.shadow.get_mut(word) {
                *cell = [0; 3];
            }
        }
        self.shared_record(warp, lane, at, n, Touch::WRITE, false);
    }

    /// `wait_group n`; `None` waits for all, committed or not.
    pub(crate) fn cp_wait(&mut self, warp: &mut Warp, active: u32, n: Option<u32>) {
        let mut copies = std::mem::take(&mut warp.copies);
        let before = copies.len();
        copies.retain(|p| {
            let done = active >> p.lane & 1 != 0
                && match n {
                    None => true,
                    Some(n) => p.group != NONE && p.group + n < warp.groups[p.lane as usize],
                };
            if done {
                self.land(warp.id, p);
            }
            !done
        });
        self.pending_bytes -= (before - copies.len()) * size_of::<Pending>();
        warp.copies = copies;
        self.copies_waited(warp);
    }
}
