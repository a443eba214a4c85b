//! Operations on mbarriers, and the landing of the copies that they count.

use super::Step;
use super::access::{Touch, Where, resolve};
use super::block::{Block, lanes};
use super::race::{MANY, Record};
use super::warp::{Pending, Warp};
use crate::error::FaultClass;
use crate::program::{Addr, Mbar, MbarOp, NONE, Place};

/// An mbarrier in shared memory. The 64 bits in memory are its own opaque state: phase and pending count.
#[derive(Debug, Clone, Default)]
pub(crate) struct Mbarrier {
    pub expected: u32,
    pub pending: i64,
    pub tx: i64,
    pub phase: u64,
    /// Knowledge of those who arrived in this phase, and of the phases before.
    pub row: Vec<u32>,
    pub done_row: Vec<u32>,
    /// Releases of other blocks that they know of.
    pub acquired: u64,
    pub done_acquired: u64,
    /// Copies that land when somebody has waited for their phase: phase, target, data and what of it is written.
    pub landings: Vec<(u64, u32, Vec<u8>, Vec<u8>)>,
    /// Warps to whom the end of a phase was first denied: warp, phase, time of the instruction.
    pub denied: Vec<(u32, u64, u64)>,
}

/// Host memory of a landing of `n` bytes, with what the allocator adds.
pub(super) fn landing_bytes(n: usize) -> usize {
    2 * n + 128
}

impl Block<'_> {
    pub(super) fn mbar_at(&mut self, warp: &mut Warp, lane: u32, place: Place, a: u64) -> Step<u32> {
        match resolve(place, a) {
            Where::Shared(a) => self.shared_at(warp, lane, a, 8, true).map(|a| a as u32),
            _ => self
                .fault(FaultClass::OobShared, warp, lane, || format!("the mbarrier at {a:#x} is not in shared memory")),
        }
    }

    /// Operations on a mbarrier are atomic, but its beginning and its end need a barrier like any write. The others
    /// count as reads, which leave the record of the beginning alone.
    pub(super) fn mbar_touched(&mut self, warp: &Warp, lane: u32, at: u32, plain: bool) {
        if self.check_shared {
            self.shared_record(warp.id, lane, at as usize, 8, Touch { write: plain, strong: !plain }, true);
        }
    }

    /// Does something to a mbarrier that must exist.
    pub(super) fn with_mbar<T>(
        &mut self,
        warp: &Warp,
        lane: u32,
        at: u32,
        f: impl FnOnce(&mut Mbarrier) -> T,
    ) -> Step<T> {
        match self.mbarriers.get_mut(&at) {
            Some(m) => {
                let result = f(m);
                if m.pending == 0 && m.tx == 0 {
                    m.phase += 1;
                    m.pending = m.expected.into();
                    m.done_row = std::mem::take(&mut m.row);
                    m.done_acquired = m.acquired;
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
            m.acquired = m.acquired.max(self.clocks.acquired[warp as usize]);
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
                    let old = self.mbarriers.insert(at, new);
                    self.forget(old);
                    self.state[at as usize..at as usize + 8].fill(1);
                    progress = true;
                }
                MbarOp::Inval => {
                    let old = self.mbarriers.remove(&at);
                    self.forget(old);
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

    /// The copies of a mbarrier that is no more never land.
    fn forget(&mut self, old: Option<Mbarrier>) {
        self.pending_bytes -= old.iter().flat_map(|m| &m.landings).map(|l| landing_bytes(l.2.len())).sum::<usize>();
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
            m.done_row.resize(self.clocks.row(copier).len(), 0);
            m.done_row[copier as usize] = self.clocks.clock(copier) - 1;
        }
        let (row, acquired) = (m.done_row.clone(), m.done_acquired);
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
            self.pending_bytes -= landing_bytes(n);
            self.shared[a..a + n].copy_from_slice(&data);
            self.state[a..a + n].copy_from_slice(&valid);
            for word in a / 4..(a + n).div_ceil(4) {
                if let Some(cell) = self.shadow.get_mut(word) {
                    *cell = [written.pack(), 0, 0];
                }
            }
        }
        self.clocks.learn(warp, &row);
        self.clocks.acquire(warp, acquired);
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
            self.pending_bytes -= landed.len() * size_of::<Pending>();
            self.pending_bytes += landed.iter().map(|p| landing_bytes(p.bytes as usize)).sum::<usize>();
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
