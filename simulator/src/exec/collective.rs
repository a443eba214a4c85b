//! Everything that is neither arithmetic nor control: dispatch, and the collectives of a warp.

use super::Step;
use super::block::{Block, lanes};
use super::warp::Warp;
use crate::compile::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW};
use crate::program::{HALF, Inst, Kind, NONE, Place, Reduce, Shuffle, Vote};

impl Block<'_> {
    /// Runs an instruction for the lanes of `active`. False: nothing came of it yet, let others run first.
    pub(crate) fn execute(&mut self, warp: &mut Warp, frame: u16, inst: &Inst, kind: &Kind, active: u32) -> Step<bool> {
        match kind {
            Kind::Access(x) => self.access(warp, frame, active, x)?,
            Kind::LoadParam { offset, bytes, signed, words } => {
                let (at, n) = (*offset as usize, *bytes as usize);
                let Some(raw) = self.l.params.get(at..at + n) else {
                    let lane = active.trailing_zeros();
                    return self.fault(crate::error::FaultClass::OobGlobal, warp, lane, || {
                        format!(
                            "read of {n} bytes at offset {at} of the {} bytes of kernel parameters",
                            self.l.params.len()
                        )
                    });
                };
                let v = super::access::little(raw);
                let up = 64 - 8 * bytes;
                let v = if *signed { (((v << up) as i64) >> up) as u64 } else { v };
                for lane in lanes(active) {
                    match *words {
                        2 => warp.set64(frame, inst.d, lane, v),
                        HALF => warp.set32(frame, inst.d, lane, v as u32 & 0xffff),
                        _ => warp.set32(frame, inst.d, lane, v as u32),
                    }
                }
            }
            Kind::Atom(x) => self.atomic(warp, frame, active, x)?,
            Kind::Fence { proxy, wide } => {
                self.fence(warp, *wide);
                if *proxy {
                    self.clocks.proxy_fence(warp.id);
                }
            }
            Kind::WarpBar => self.clocks.advance(warp.id),
            Kind::WgmmaFence => {
                self.clocks.advance(warp.id);
                warp.products_fenced.fence();
                warp.goes_together(self.pc);
            }
            Kind::Shuffle { mode, pred } => self.shuffle(warp, frame, inst, active, *mode, *pred),
            Kind::Vote { op, source } => {
                let members = warp.get32(frame, inst.b, active.trailing_zeros()) & active;
                let p = warp.pred(frame, source.0, source.1) & members;
                let result = match op {
                    Vote::Ballot => {
                        for lane in lanes(active) {
                            warp.set32(frame, inst.d, lane, p);
                        }
                        self.clocks.advance(warp.id);
                        return Ok(true);
                    }
                    Vote::All => p == members,
                    Vote::Any => p != 0,
                    Vote::Uni => p == members || p == 0,
                };
                warp.set_pred(frame, inst.d, if result { u32::MAX } else { 0 }, active);
                self.clocks.advance(warp.id);
            }
            Kind::Match { all, wide, pred } => {
                let members = warp.get32(frame, inst.b, active.trailing_zeros()) & active;
                let value = |w: &Warp, l: u32| {
                    if *wide { w.get64(frame, inst.a, l) } else { w.get32(frame, inst.a, l).into() }
                };
                let values: Vec<u64> = (0..32).map(|l| value(warp, l)).collect();
                let same = |v: u64| lanes(members).filter(|&i| values[i as usize] == v).fold(0u32, |m, i| m | 1 << i);
                for lane in lanes(active) {
                    let hits = same(values[lane as usize]);
                    let whole = hits == members;
                    warp.set32(frame, inst.d, lane, if *all && !whole { 0 } else { hits });
                    warp.set_pred(frame, *pred, if whole { u32::MAX } else { 0 }, 1 << lane);
                }
                self.clocks.advance(warp.id);
            }
            Kind::Redux { op, signed, absolute, nan } => {
                let members = warp.get32(frame, inst.b, active.trailing_zeros()) & active;
                let values: Vec<u32> = lanes(members).map(|i| warp.get32(frame, inst.a, i)).collect();
                let result = reduce(&values, *op, *signed, *absolute, *nan);
                for lane in lanes(active) {
                    warp.set32(frame, inst.d, lane, result);
                }
                self.clocks.advance(warp.id);
            }
            Kind::Elect { pred } => {
                let members = warp.get32(frame, inst.b, active.trailing_zeros()) & active;
                let leader = members.trailing_zeros();
                if inst.d != NONE {
                    for lane in lanes(active) {
                        warp.set32(frame, inst.d, lane, leader);
                    }
                }
                warp.set_pred(frame, *pred, if leader < 32 { 1 << leader } else { 0 }, active);
            }
            Kind::ActiveMask => {
                for lane in lanes(active) {
                    warp.set32(frame, inst.d, lane, active);
                }
            }
            Kind::Clock { wide } => {
                // Time passes for those who wait, too.
                let now = warp.instructions + 1000 * u64::from(warp.spins);
                warp.saw_sync = true;
                for lane in lanes(active) {
                    if *wide {
                        warp.set64(frame, inst.d, lane, now);
                    } else {
                        warp.set32(frame, inst.d, lane, now as u32);
                    }
                }
            }
            Kind::IsSpace(place) => {
                let mut hits = 0;
                for lane in lanes(active) {
                    let a = warp.get64(frame, inst.a, lane);
                    let within = |w: u64| a >= w && a < w + WINDOW;
                    let constant = || self.l.find(a).is_some_and(|i| self.l.allocations[i].constant);
                    let hit = match place {
                        Place::Shared => within(SHARED_WINDOW),
                        Place::Local => within(LOCAL_WINDOW),
                        Place::Param => within(PARAM_WINDOW),
                        // The window of kernel parameters lies in that of global memory.
                        Place::Global => !within(SHARED_WINDOW) && !within(LOCAL_WINDOW) && !constant(),
                        Place::Generic => constant(),
                    };
                    hits |= u32::from(hit) << lane;
                }
                warp.set_pred(frame, inst.d, hits, active);
            }
            Kind::LdMatrix { regs, trans, address, place } => {
                self.ldmatrix(warp, frame, regs, *trans, *address, *place)?
            }
            Kind::StMatrix { regs, trans, address, place } => {
                self.stmatrix(warp, frame, regs, *trans, *address, *place)?
            }
            Kind::MovMatrix => {
                let a = warp.lane_values(frame, inst.a);
                // Element (r, c) sits in lane 4 r + c / 2, half c % 2.
                let element = |r: u32, c: u32| a[(4 * r + c / 2) as usize] >> (16 * (c % 2)) & 0xffff;
                for lane in lanes(active) {
                    let (r, c) = (lane / 4, 2 * (lane % 4));
                    warp.set32(frame, inst.d, lane, element(c, r) | element(c + 1, r) << 16);
                }
                self.clocks.advance(warp.id);
            }
            Kind::Mma(m) => self.mma(warp, frame, m),
            Kind::Wgmma(w) => {
                self.wgmma(warp, frame, w)?;
                self.check_pending(warp, active)?;
            }
            Kind::Mbar(m) => return self.mbarrier(warp, frame, active, m),
            Kind::CpAsync(c) => {
                self.cp_async(warp, frame, active, c)?;
                self.check_pending(warp, active)?;
            }
            Kind::CpCommit => {
                for p in &mut warp.copies {
                    if p.group == NONE && active >> p.lane & 1 != 0 {
                        p.group = warp.groups[p.lane as usize];
                    }
                }
                for lane in lanes(active) {
                    warp.groups[lane as usize] += 1;
                }
            }
            Kind::CpWait(n) => self.cp_wait(warp, active, Some(*n)),
            Kind::CpWaitAll => self.cp_wait(warp, active, None),
            Kind::CpMbarArrive { address, place, no_increment } => {
                self.cp_mbar_arrive(warp, frame, active, *address, *place, *no_increment)?;
                self.check_pending(warp, active)?;
            }
            Kind::Bulk(b) => {
                self.bulk(warp, frame, active, b)?;
                self.check_pending(warp, active)?;
            }
            Kind::MapReplace { address, place, field, bytes } => {
                self.map_replace(warp, frame, inst.a, active, (*address, *place, *field, *bytes))?
            }
            Kind::MapCopy { dst, src } => self.map_copy(warp, frame, active, *dst, *src)?,
            Kind::BulkCommit => self.bulk_commit(warp, active),
            Kind::BulkWait(n) => self.bulk_wait(warp, active, *n),
            Kind::WgmmaCommit => {
                self.product_commit(warp);
                warp.goes_together(self.pc);
            }
            Kind::WgmmaWait(n) => {
                self.product_wait(warp, *n);
                warp.goes_together(self.pc);
            }
            // The rest never comes here.
            _ => {}
        }
        Ok(true)
    }

    fn shuffle(&mut self, warp: &mut Warp, frame: u16, inst: &Inst, active: u32, mode: Shuffle, pred: u32) {
        let a = warp.lane_values(frame, inst.a);
        let (b, c) = (warp.lane_values(frame, inst.e), warp.lane_values(frame, inst.c));
        let (mut out, mut hits) = (a, 0u32);
        for lane in lanes(active) {
            let i = lane as usize;
            let (clamp, segment) = (c[i] & 31, c[i] >> 8 & 31);
            let (max, min) = ((lane & segment) | (clamp & !segment), lane & segment);
            let b = b[i] & 31;
            let (j, hit) = match mode {
                Shuffle::Up => (lane.wrapping_sub(b), lane as i32 - b as i32 >= max as i32),
                Shuffle::Down => (lane + b, lane + b <= max),
                Shuffle::Bfly => (lane ^ b, lane ^ b <= max),
                Shuffle::Idx => (min | (b & !segment), min | (b & !segment) <= max),
            };
            let j = if hit { j } else { lane };
            out[i] = a[j as usize & 31];
            hits |= u32::from(hit) << lane;
        }
        for lane in lanes(active) {
            warp.set32(frame, inst.d, lane, out[lane as usize]);
        }
        warp.set_pred(frame, pred, hits, active);
        self.clocks.advance(warp.id);
    }
}

fn reduce(values: &[u32], op: Reduce, signed: bool, absolute: bool, nan: bool) -> u32 {
    let Some((&first, rest)) = values.split_first() else {
        return 0;
    };
    let read = |x: u32| if absolute { x & 0x7fff_ffff } else { x };
    if matches!(op, Reduce::MinF | Reduce::MaxF) {
        let f = |x: u32| f32::from_bits(read(x));
        if nan && values.iter().any(|v| f(*v).is_nan()) {
            return 0x7fff_ffff;
        }
        let pick = |a: f32, b: f32| {
            if op == Reduce::MinF { a.min(b) } else { a.max(b) }
        };
        let r = rest.iter().fold(f(first), |a, b| pick(a, f(*b)));
        return if r.is_nan() { 0x7fff_ffff } else { r.to_bits() };
    }
    rest.iter().fold(first, |a, &b| match (op, signed) {
        (Reduce::Add, _) => a.wrapping_add(b),
        (Reduce::And, _) => a & b,
        (Reduce::Or, _) => a | b,
        (Reduce::Xor, _) => a ^ b,
        (Reduce::Min, true) => (a as i32).min(b as i32) as u32,
        (Reduce::Max, true) => (a as i32).max(b as i32) as u32,
        (Reduce::Min, false) => a.min(b),
        _ => a.max(b),
    })
}
