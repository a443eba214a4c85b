//! Shared memory: bounds, bytes that nobody wrote, targets of copies, and races within the block.

use super::Step;
use super::access::{Touch, little, put, take};
use super::block::Block;
use super::race::{MANY, Record};
use super::warp::Warp;
use crate::compile::SHARED_WINDOW;
use crate::error::FaultClass;
use crate::program::{Access, Kind};

impl Block<'_> {
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
    pub(super) fn shared_access(
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
        if touch.strong && x.store {
            self.tell(warp.id, SHARED_WINDOW + u64::from(a));
        } else if touch.strong {
            self.hear(warp.id, SHARED_WINDOW + u64::from(a));
        }
        // The common sizes as constants, so that copies and comparisons are single instructions.
        match (x.bytes, size) {
            (4, 4) => self.shared_bytes(warp, frame, lane, at, (4, 4), x, touch),
            (4, 16) => self.shared_bytes(warp, frame, lane, at, (4, 16), x, touch),
            (2, 2) => self.shared_bytes(warp, frame, lane, at, (2, 2), x, touch),
            (bytes, size) => self.shared_bytes(warp, frame, lane, at, (bytes as usize, size as usize), x, touch),
        }
        Ok(())
    }

    /// An access of `size` bytes that are in bounds, in elements of `bytes`.
    #[allow(clippy::too_many_arguments)]
    #[inline(always)]
    fn shared_bytes(
        &mut self,
        warp: &mut Warp,
        frame: u16,
        lane: u32,
        at: usize,
        (bytes, size): (usize, usize),
        x: &Access,
        touch: Touch,
    ) {
        if x.store {
            let mut data = [0u8; 32];
            for (k, (s, w)) in x.regs.iter().enumerate() {
                data[k * bytes..(k + 1) * bytes]
                    .copy_from_slice(&take(warp, frame, lane, *s, *w).to_le_bytes()[..bytes]);
            }
            return self.shared_write(warp.id, lane, at, &data[..size], touch.strong);
        }
        self.shared_read(warp.id, lane, at, size, touch.strong);
        for (k, (d, w)) in x.regs.iter().enumerate() {
            let from = at + k * bytes;
            let v = little(&self.shared[from..from + bytes]);
            put(warp, frame, lane, *d, *w, v, x);
        }
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
    #[inline(always)]
    pub(crate) fn shared_record(&mut self, warp: u32, lane: u32, at: usize, size: usize, touch: Touch, changes: bool) {
        let me = Record { warp, lane, clock: self.clocks.clock(warp), bytes: 15, atomic: touch.strong, pc: self.pc };
        if size == 4 && at.is_multiple_of(4) {
            return self.shared_record_word(at / 4, me, touch.write, changes);
        }
        let (mut at, end) = (at, at + size);
        while at < end {
            let word = at / 4;
            let stop = end.min(4 * word + 4);
            let bytes = ((1u32 << (stop - at)) - 1) << (at % 4);
            at = stop;
            self.shared_record_word(word, Record { bytes, ..me }, touch.write, changes);
        }
    }

    fn shared_record_word(&mut self, word: usize, me: Record, write: bool, changes: bool) {
        let Record { warp, lane, bytes, .. } = me;
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
        // Whoever learns of this read learns of all that came before it. (An atomic need not, with which an atomic read does not race.)
        let before =
            |r: Record| r.bytes & !bytes == 0 && (r.atomic || !me.atomic) && self.clocks.knows(warp, r.warp, r.clock);
        let slot = match write {
            true => 0,
            false if Record::unpack(cell[1]).is_none_or(|r| r.warp == warp || before(r)) => 1,
            false => 2,
        };
        let races_with = match (write, changes) {
            (true, true) => 0..3,
            (true, false) => 0..0,
            (false, _) => 0..1,
        };
        for k in races_with {
            if let Some(r) = conflict(k) {
                let (does, did) =
                    (if write { "writes what" } else { "reads what" }, if k == 0 { "wrote" } else { "read" });
                self.shared_race(warp, lane, r, 4 * word, does, did);
            }
        }
        let (record, merged) = merge(slot);
        self.shadow[word][slot] = record.pack();
        self.parts.note(word, slot, bytes, lane, merged);
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
}
