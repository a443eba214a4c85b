//! Asynchronous copies and mbarriers. A copy is read at its issue and lands at the wait that ends it; until then its
//! target counts as in flight, so that a missing wait shows.

use super::Step;
use super::access::{Touch, Where, little, resolve};
use super::atomics::combine;
use super::barrier::Mbarrier;
use super::block::{Block, lanes};
use super::matrix::swizzle;
use super::race::{MANY, Record};
use super::warp::{Pending, Warp};
use crate::error::FaultClass;
use crate::program::{Addr, AtomOp, AtomTy, Bulk, CpAsync, Mbar, MbarOp, NONE, Place};
use crate::tensor_map::{BYTES, TensorMap};

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
        }
        Ok(())
    }

    /// A range of one allocation, of any size.
    fn global_span(&self, warp: &mut Warp, lane: u32, a: u64, size: u64, write: bool) -> Step<(usize, usize)> {
        match self.l.find(a) {
            Some(i) if self.l.allocations[i].end() - a >= size && !(write && self.l.allocations[i].constant) => {
                Ok((i, (a - self.l.allocations[i].base) as usize))
            }
            _ => self.out_of_bounds(warp, lane, a, u32::try_from(size).unwrap_or(u32::MAX), write),
        }
    }

    /// Marks the target of a copy. Races are judged now: the copy may land at any time from here on.
    fn in_flight(&mut self, warp: u32, lane: u32, at: usize, bytes: usize) {
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
        warp.copies = copies;
        self.copies_waited(warp);
    }

    fn mbar_at(&mut self, warp: &mut Warp, lane: u32, place: Place, a: u64) -> Step<u32> {
        match resolve(place, a) {
            Where::Shared(a) => self.shared_at(warp, lane, a, 8, true).map(|a| a as u32),
            _ => self
                .fault(FaultClass::OobShared, warp, lane, || format!("the mbarrier at {a:#x} is not in shared memory")),
        }
    }

    /// Operations on a mbarrier are atomic, but its beginning and its end need a barrier like any write. The others
    /// count as reads, which leave the record of the beginning alone.
    fn mbar_touched(&mut self, warp: &Warp, lane: u32, at: u32, plain: bool) {
        if self.check_shared {
            self.shared_record(warp.id, lane, at as usize, 8, Touch { write: plain, strong: !plain }, true);
        }
    }

    /// Does something to a mbarrier that must exist.
    fn with_mbar<T>(&mut self, warp: &Warp, lane: u32, at: u32, f: impl FnOnce(&mut Mbarrier) -> T) -> Step<T> {
        match self.mbarriers.get_mut(&at) {
            Some(m) => {
                let result = f(m);
                if m.pending == 0 && m.tx == 0 {
                    m.phase += 1;
                    m.pending = m.expected.into();
                    m.done_row = std::mem::take(&mut m.row);
                }
                Ok(result)
            }
            None => self.fault(FaultClass::UninitialisedShared, warp, lane, || {
                format!("there is no initialised mbarrier at {at:#x} of shared memory")
            }),
        }
    }

    /// What a warp knows goes to the mbarrier's phase.
    fn contribute(&mut self, warp: u32, at: u32) {
        let row = {
            self.clocks.advance(warp);
            self.clocks.row(warp).to_vec()
        };
        if let Some(m) = self.mbarriers.get_mut(&at) {
            if m.row.is_empty() {
                m.row = m.done_row.clone();
            }
            m.row.resize(row.len(), 0);
            m.row.iter_mut().zip(&row).for_each(|(a, b)| *a = (*a).max(*b));
        }
    }

    pub(crate) fn mbarrier(&mut self, warp: &mut Warp, frame: u16, active: u32, m: &Mbar) -> Step<bool> {
        if m.op == MbarOp::Pending {
            for lane in lanes(active) {
                let state = warp.get64(frame, m.count, lane);
                warp.set32(frame, m.d, lane, (state >> 40) as u32 & 0xf_ffff);
            }
            return Ok(true);
        }
        let addresses = self.addresses(warp, frame, m.address);
        let mut progress = false;
        for lane in lanes(active) {
            let at = self.mbar_at(warp, lane, m.place, addresses[lane as usize])?;
            self.mbar_touched(warp, lane, at, matches!(m.op, MbarOp::Init | MbarOp::Inval));
            let count = if m.count == NONE || matches!(m.op, MbarOp::Test | MbarOp::Try) {
                1
            } else {
                warp.get32(frame, m.count, lane)
            };
            match m.op {
                MbarOp::Init => {
                    if count == 0 || count > 0xf_ffff {
                        return self.fault(FaultClass::Trap, warp, lane, || {
                            format!("a mbarrier of {count} arrivals: must be 1..=1048575")
                        });
                    }
                    let new = Mbarrier { expected: count, pending: count.into(), ..Mbarrier::default() };
                    self.mbarriers.insert(at, new);
                    self.state[at as usize..at as usize + 8].fill(1);
                    progress = true;
                }
                MbarOp::Inval => {
                    self.mbarriers.remove(&at);
                    self.state[at as usize..at as usize + 8].fill(0);
                    progress = true;
                }
                MbarOp::ExpectTx | MbarOp::CompleteTx => {
                    let n = i64::from(count);
                    self.with_mbar(warp, lane, at, |b| b.tx += if m.op == MbarOp::ExpectTx { n } else { -n })?;
                    progress = true;
                }
                MbarOp::Arrive | MbarOp::ArriveDrop => {
                    self.contribute(warp.id, at);
                    let tx = if m.tx == NONE { 0 } else { warp.get32(frame, m.tx, lane) };
                    let drop = m.op == MbarOp::ArriveDrop;
                    let (state, over) = self.with_mbar(warp, lane, at, |b| {
                        let state = b.phase & 0xff_ffff_ffff | (b.pending as u64 & 0xf_ffff) << 40;
                        b.tx += i64::from(tx);
                        b.pending -= i64::from(count);
                        if drop {
                            b.expected = b.expected.saturating_sub(count);
                        }
                        (state, b.pending < 0)
                    })?;
                    if over {
                        return self.fault(FaultClass::Trap, warp, lane, || {
                            format!("more arrivals at the mbarrier at {at:#x} than it expects")
                        });
                    }
                    if m.d != NONE {
                        warp.set64(frame, m.d, lane, state);
                    }
                    progress = true;
                }
                MbarOp::Test | MbarOp::Try if !self.mbarriers.contains_key(&at) && self.patient() => {
                    warp.set_pred(frame, m.d, 0, 1 << lane);
                }
                MbarOp::Test | MbarOp::Try => {
                    let (phase, early) = self.with_mbar(warp, lane, at, |b| (b.phase, too_soon(b, warp)))?;
                    let done = if early {
                        false
                    } else if m.parity {
                        // Complete when the phase of that parity is not the current one.
                        phase & 1 != u64::from(warp.get32(frame, m.count, lane)) & 1
                    } else {
                        phase != warp.get64(frame, m.count, lane) & 0xff_ffff_ffff
                    };
                    warp.set_pred(frame, m.d, if done { u32::MAX } else { 0 }, 1 << lane);
                    if done {
                        self.observe(warp.id, at, phase);
                        progress = true;
                    }
                }
                MbarOp::Pending => {}
            }
        }
        warp.saw_store |= progress;
        warp.saw_sync |= !progress;
        Ok(progress)
    }

    /// A finished phase has been seen: its copies land, and its arrivals are known.
    fn observe(&mut self, warp: u32, at: u32, phase: u64) {
        let Some(m) = self.mbarriers.get_mut(&at) else {
            return;
        };
        let (done, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut m.landings).into_iter().partition(|l| l.0 < phase);
        m.landings = rest;
        if !done.is_empty() {
            // The copies are the work of nobody in the block; only those who learn of the phase may touch them.
            let copier = self.clocks.copier();
            self.clocks.advance(copier);
            m.done_row.resize(copier as usize + 1, 0);
            m.done_row[copier as usize] = self.clocks.clock(copier) - 1;
        }
        let row = m.done_row.clone();
        let written = Record {
            warp: self.clocks.copier(),
            lane: MANY,
            clock: self.clocks.clock(self.clocks.copier()) - 1,
            bytes: 15,
            atomic: false,
            pc: self.pc,
        };
        for (_, to, data, valid) in done {
            let (a, n) = (to as usize, data.len());
            self.shared[a..a + n].copy_from_slice(&data);
            self.state[a..a + n].copy_from_slice(&valid);
            for word in a / 4..(a + n).div_ceil(4) {
                if let Some(cell) = self.shadow.get_mut(word) {
                    *cell = [written.pack(), 0, 0];
                }
            }
        }
        self.clocks.learn(warp, &row);
    }

    /// Arrives when the lane's copies so far have landed: they land when somebody waits for the phase.
    pub(crate) fn cp_mbar_arrive(
        &mut self,
        warp: &mut Warp,
        frame: u16,
        active: u32,
        address: Addr,
        place: Place,
        no_increment: bool,
    ) -> Step {
        let addresses = self.addresses(warp, frame, address);
        for lane in lanes(active) {
            let at = self.mbar_at(warp, lane, place, addresses[lane as usize])?;
            self.mbar_touched(warp, lane, at, false);
            let mut copies = std::mem::take(&mut warp.copies);
            let mut landed = Vec::new();
            copies.retain(|p| {
                if p.lane == lane {
                    landed.push(*p);
                }
                p.lane != lane
            });
            warp.copies = copies;
            self.copies_waited(warp);
            self.contribute(warp.id, at);
            self.with_mbar(warp, lane, at, |m| {
                for p in &landed {
                    let n = p.bytes as usize;
                    let valid = (0..n).map(|k| (p.valid >> k & 1) as u8).collect();
                    m.landings.push((m.phase, p.to, p.data[..n].to_vec(), valid));
                }
                // Without .noinc the pending count is first raised by one: no change in sum.
                m.pending -= i64::from(no_increment);
            })?;
        }
        Ok(())
    }

    pub(crate) fn bulk(&mut self, warp: &mut Warp, frame: u16, active: u32, b: &Bulk) -> Step {
        let (shared, global) = (self.addresses(warp, frame, b.shared), self.addresses(warp, frame, b.global));
        let mbars = b.mbar.map(|a| self.addresses(warp, frame, a));
        for lane in lanes(active) {
            let i = lane as usize;
            let Where::Shared(s) = resolve(Place::Shared, shared[i]) else {
                continue;
            };
            let pieces = if b.tensor {
                self.tensor_pieces(warp, frame, lane, b, s, global[i])?
            } else {
                let n = warp.get32(frame, b.size, lane);
                if !n.is_multiple_of(16) || !s.is_multiple_of(16) || !global[i].is_multiple_of(16) {
                    let a = if s.is_multiple_of(16) { global[i] } else { s.into() };
                    return self.misaligned(warp, lane, a, 16);
                }
                vec![Piece {
                    shared: s,
                    global: Some(global[i]),
                    bytes: n,
                    element: b.reduce.map_or((AtomTy::Unsigned, 4), |r| (r.1, r.2)),
                    fill: 0,
                }]
            };
            let total: u64 = pieces.iter().map(|p| u64::from(p.bytes)).sum();
            let mbar = match &mbars {
                Some(a) => {
                    let at = self.mbar_at(warp, lane, Place::Shared, a[i])?;
                    self.mbar_touched(warp, lane, at, false);
                    let phase = self.with_mbar(warp, lane, at, |m| m.phase)?;
                    Some((at, phase))
                }
                None => None,
            };
            for p in pieces {
                if b.to_shared {
                    self.bulk_load(warp, lane, b, &p, mbar)?;
                } else {
                    self.bulk_store(warp, lane, b, &p)?;
                }
            }
            if let Some((at, _)) = mbar {
                self.with_mbar(warp, lane, at, |m| m.tx -= total as i64)?;
            }
        }
        Ok(())
    }

    fn bulk_load(&mut self, warp: &mut Warp, lane: u32, b: &Bulk, p: &Piece, mbar: Option<(u32, u64)>) -> Step {
        let n = p.bytes as usize;
        let at = self.shared_at(warp, lane, p.shared, 1, true)?;
        if at + n > self.l.shared_bytes as usize {
            self.shared_at(warp, lane, self.l.shared_bytes, 1, true)?;
        }
        let (mut data, mut valid) = (vec![0u8; n], vec![1u8; n]);
        match p.global {
            None => {
                for c in data.chunks_mut(p.element.1.max(1) as usize) {
                    let fill = p.fill.to_le_bytes();
                    let k = c.len().min(8);
                    c[..k].copy_from_slice(&fill[..k]);
                }
            }
            Some(a) if b.shared_both => {
                let Where::Shared(from) = resolve(Place::Shared, a) else {
                    return Ok(());
                };
                let from = self.shared_at(warp, lane, from, 16, false)?;
                if from + n > self.l.shared_bytes as usize {
                    self.shared_at(warp, lane, self.l.shared_bytes, 1, false)?;
                }
                self.shared_read(warp.id, lane, from, n, false);
                data.copy_from_slice(&self.shared[from..from + n]);
            }
            Some(a) => {
                let (i, offset) = self.global_span(warp, lane, a, n as u64, false)?;
                let alloc = &self.l.allocations[i];
                for k in 0..n {
                    data[k] = alloc.data.load(offset + k, 1) as u8;
                    if let Some(v) = &alloc.valid {
                        valid[k] = v.load(offset + k, 1) as u8;
                    }
                }
                if self.l.races_global && n > 0 {
                    self.global_record(warp.id, lane, i, offset, n, Touch::READ, true);
                }
                if let Some(k) = valid.iter().position(|v| *v == 0) {
                    self.unwritten_global(warp.id, lane, a + k as u64, 1, i);
                }
                if self.l.options.counters {
                    self.count_bulk(a, n, false);
                }
            }
        }
        if let Some((bar, phase)) = mbar {
            self.in_flight(warp.id, MANY, at, n);
            if let Some(m) = self.mbarriers.get_mut(&bar) {
                m.landings.push((phase, p.shared, data, valid));
            }
        }
        Ok(())
    }

    fn bulk_store(&mut self, warp: &mut Warp, lane: u32, b: &Bulk, p: &Piece) -> Step {
        let n = p.bytes as usize;
        let Some(a) = p.global else { return Ok(()) };
        let at = self.shared_at(warp, lane, p.shared, 1, false)?;
        if at + n > self.l.shared_bytes as usize {
            self.shared_at(warp, lane, self.l.shared_bytes, 1, false)?;
        }
        self.shared_read(warp.id, lane, at, n, false);
        self.store_reads(warp.id, lane, at, n);
        let (i, offset) = self.global_span(warp, lane, a, n as u64, true)?;
        if self.l.options.counters {
            self.count_bulk(a, n, true);
        }
        if self.l.races_global && n > 0 {
            let touch = Touch { write: true, strong: b.reduce.is_some() };
            self.global_record(warp.id, lane, i, offset, n, touch, true);
        }
        let alloc = &self.l.allocations[i];
        let (ty, bytes) = p.element;
        match b.reduce {
            None => {
                for k in 0..n {
                    alloc.data.store(offset + k, 1, self.shared[at + k].into());
                }
            }
            Some((op, _, _)) => {
                for k in (0..n).step_by(bytes as usize) {
                    let v = little(&self.shared[at + k..at + k + bytes as usize]);
                    reduce_at(&alloc.data, offset + k, bytes, op, ty, v);
                }
            }
        }
        if let Some(v) = &alloc.valid {
            v.fill(offset, n, 1);
        }
        Ok(())
    }

    fn count_bulk(&mut self, a: u64, n: usize, write: bool) {
        let mut at = a;
        let end = a + n as u64;
        while at < end {
            let mut addresses = [0u64; 32];
            let mut mask = 0;
            for (k, slot) in addresses.iter_mut().enumerate() {
                if at < end {
                    *slot = at;
                    mask |= 1 << k;
                    at += 16;
                }
            }
            self.count(Place::Global, &addresses, mask, 16, write);
        }
    }

    /// The runs of bytes that a tensor copy moves, box order in shared memory, swizzled in pieces of 16 bytes.
    fn tensor_pieces(
        &mut self,
        warp: &mut Warp,
        frame: u16,
        lane: u32,
        b: &Bulk,
        shared: u32,
        map: u64,
    ) -> Step<Vec<Piece>> {
        let mut raw = [0u8; BYTES];
        self.read_bytes(warp, lane, Place::Generic, map, &mut raw)?;
        let map = match TensorMap::decode(&raw) {
            Ok(m) => m,
            Err(e) => return self.fault(FaultClass::Trap, warp, lane, || e.to_string()),
        };
        if map.rank as usize != b.coords.len() {
            let (rank, n) = (map.rank, b.coords.len());
            return self.fault(FaultClass::Trap, warp, lane, || {
                format!("{n} coordinates for a tensor map of {rank} dimensions")
            });
        }
        if !shared.is_multiple_of(128) {
            return self.misaligned(warp, lane, shared.into(), 128);
        }
        let coords: Vec<i64> = b.coords.iter().map(|c| i64::from(warp.get32(frame, *c, lane) as i32)).collect();
        let size = u64::from(map.element_bytes());
        let row = [16, 32, 64, 128][map.swizzle as usize];
        let elements: u64 = map.boxes[..map.rank as usize].iter().map(|n| u64::from(*n)).product();
        if elements * size > 256 << 10 {
            return self.fault(FaultClass::Trap, warp, lane, || {
                "the box of the tensor map is larger than shared memory".into()
            });
        }
        let fill = if map.fill == 1 { 0x7fff_7fff } else { 0 };
        let ty = match map.data_type {
            3 | 5 => AtomTy::Signed,
            6 => AtomTy::F16,
            7 | 10 | 11 | 12 => AtomTy::F32,
            8 => AtomTy::F64,
            9 => AtomTy::Bf16,
            _ => AtomTy::Unsigned,
        };
        let mut pieces: Vec<Piece> = Vec::new();
        let mut index = [0u64; 5];
        for e in 0..elements {
            let mut rest = e;
            for (d, i) in index.iter_mut().enumerate().take(map.rank as usize) {
                *i = rest % u64::from(map.boxes[d]);
                rest /= u64::from(map.boxes[d]);
            }
            let mut global = Some(map.address);
            for d in 0..map.rank as usize {
                let c = coords[d] + (index[d] * u64::from(map.steps[d].max(1))) as i64;
                let stride = if d == 0 { size } else { map.strides[d - 1] };
                let inside = c >= 0 && c < i64::from(map.dims[d]);
                global = if inside { global.map(|g| g.wrapping_add(c as u64 * stride)) } else { None };
            }
            let at = swizzle(u64::from(shared) + e * size, row) as u32;
            if let Some(last) = pieces.last_mut()
                && last.shared + last.bytes == at
                && match (last.global, global) {
                    (Some(a), Some(b)) => a + u64::from(last.bytes) == b,
                    (None, None) => true,
                    _ => false,
                }
            {
                last.bytes += size as u32;
                continue;
            }
            pieces.push(Piece { shared: at, global, bytes: size as u32, element: (ty, size as u32), fill });
        }
        Ok(pieces)
    }

    /// `tensormap.replace`: one field of a map in memory.
    pub(crate) fn map_replace(
        &mut self,
        warp: &mut Warp,
        frame: u16,
        value: u32,
        active: u32,
        (address, place, field, bytes): (Addr, Place, u32, u32),
    ) -> Step {
        let addresses = self.addresses(warp, frame, address);
        for lane in lanes(active) {
            let v = if bytes == 8 { warp.get64(frame, value, lane) } else { warp.get32(frame, value, lane).into() };
            let data = v.to_le_bytes();
            match resolve(place, addresses[lane as usize]) {
                Where::Shared(a) => {
                    let at = self.shared_at(warp, lane, a.wrapping_add(field), bytes, true)?;
                    self.shared_write(warp.id, lane, at, &data[..bytes as usize], false);
                }
                Where::Global(a) => {
                    let a = a.wrapping_add(field.into());
                    let (i, offset) = self.global_at(warp, lane, a, bytes, true)?;
                    let alloc = &self.l.allocations[i];
                    alloc.data.store(offset, bytes as usize, v);
                    if let Some(m) = &alloc.valid {
                        m.fill(offset, bytes as usize, 1);
                    }
                }
                _ => {
                    return self.fault(FaultClass::OobGlobal, warp, lane, || {
                        "a tensor map lies in global or shared memory".into()
                    });
                }
            }
        }
        Ok(())
    }

    /// `tensormap.cp_fenceproxy`: 128 bytes from shared to global memory.
    pub(crate) fn map_copy(&mut self, warp: &mut Warp, frame: u16, active: u32, dst: Addr, src: Addr) -> Step {
        let (to, from) = (self.addresses(warp, frame, dst), self.addresses(warp, frame, src));
        let lane = active.trailing_zeros();
        let mut data = [0u8; BYTES];
        self.read_bytes(warp, lane, Place::Shared, from[lane as usize], &mut data)?;
        let Where::Global(a) = resolve(Place::Generic, to[lane as usize]) else {
            return Ok(());
        };
        let (i, offset) = self.global_span(warp, lane, a, BYTES as u64, true)?;
        let alloc = &self.l.allocations[i];
        for (k, byte) in data.iter().enumerate() {
            alloc.data.store(offset + k, 1, (*byte).into());
        }
        if let Some(m) = &alloc.valid {
            m.fill(offset, BYTES, 1);
        }
        Ok(())
    }
}

/// Whether copies of an ended phase are still on their way: the first test of each warp finds them so, which shows who
/// does not test again.
fn too_soon(m: &mut Mbarrier, warp: &Warp) -> bool {
    let phase = m.phase;
    if !m.landings.iter().any(|l| l.0 < phase) {
        return false;
    }
    m.denied.retain(|d| d.1 == phase);
    match m.denied.iter().find(|d| d.0 == warp.id) {
        // The other lanes of the same instruction.
        Some((_, _, at)) => *at == warp.instructions,
        None => {
            m.denied.push((warp.id, phase, warp.instructions));
            true
        }
    }
}

/// One run of bytes of a bulk copy; without a global address it lies outside the tensor.
struct Piece {
    shared: u32,
    global: Option<u64>,
    bytes: u32,
    element: (AtomTy, u32),
    fill: u64,
}

fn reduce_at(data: &crate::memory::HostBytes, offset: usize, bytes: u32, op: AtomOp, ty: AtomTy, v: u64) {
    super::atomics::update(data, offset, bytes, |old| combine(op, ty, bytes, false, old, v, 0));
}
