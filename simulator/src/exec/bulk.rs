//! Bulk copies between global and shared memory, plain ones and those that a tensor map describes.

use super::Step;
use super::access::{Touch, Where, little, resolve};
use super::atomics::combine;
use super::block::{Block, lanes};
use super::mbarrier::landing_bytes;
use super::race::MANY;
use super::warp::Warp;
use crate::program::{AtomOp, AtomTy, Bulk, Place};

/// One run of bytes of a bulk copy; without a global address it lies outside the tensor.
pub(super) struct Piece {
    pub shared: u32,
    pub global: Option<u64>,
    pub bytes: u32,
    pub element: (AtomTy, u32),
    pub fill: u64,
}

impl Block<'_> {
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
                if self.check_proxies {
                    self.async_proxy_reads(warp.id, lane, from, n);
                }
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
                self.pending_bytes += landing_bytes(n);
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
        if self.check_proxies {
            self.async_proxy_reads(warp.id, lane, at, n);
        }
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
}

fn reduce_at(data: &crate::memory::HostBytes, offset: usize, bytes: u32, op: AtomOp, ty: AtomTy, v: u64) {
    super::atomics::update(data, offset, bytes, |old| combine(op, ty, bytes, false, old, v, 0));
}
