//! Atomic operations on global and shared memory.

use super::access::{Where, little, resolve, take};
use super::block::{Block, lanes};
use super::warp::Warp;
use super::{Step, access::Touch};
use crate::compile::SHARED_WINDOW;
use crate::error::FaultClass;
use crate::memory::HostBytes;
use crate::numeric::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, flush};
use crate::program::{Atom, AtomOp, AtomTy, NONE, Strength};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// The new value of an atomic operation on `bytes` bytes.
pub(crate) fn combine(op: AtomOp, ty: AtomTy, bytes: u32, ftz: bool, old: u64, v: u64, second: u64) -> u64 {
    let up = 64 - 8 * bytes;
    let signed = |x: u64| ((x << up) as i64) >> up;
    let cut = |x: u64| (x << up) >> up;
    let float = |x: f32, y: f32| match op {
        AtomOp::Min => {
            if x.is_nan() || y < x {
                y
            } else {
                x
            }
        }
        AtomOp::Max => {
            if x.is_nan() || y > x {
                y
            } else {
                x
            }
        }
        _ => x + y,
    };
    let half = |x: u64, y: u64, bf: bool| -> u64 {
        let read = |h: u64| {
            if bf { bf16_to_f32(h as u16) } else { f16_to_f32(h as u16) }
        };
        let r = float(read(x), read(y));
        (if bf { f32_to_bf16(r) } else { f32_to_f16(r) }).into()
    };
    match (op, ty) {
        (AtomOp::Exch, _) => cut(v),
        (AtomOp::Cas, _) => {
            if cut(old) == cut(v) {
                cut(second)
            } else {
                old
            }
        }
        (AtomOp::And, _) => old & v,
        (AtomOp::Or, _) => old | v,
        (AtomOp::Xor, _) => old ^ v,
        (AtomOp::Inc, _) => {
            if old >= v {
                0
            } else {
                old + 1
            }
        }
        (AtomOp::Dec, _) => {
            if old == 0 || old > v {
                v
            } else {
                old - 1
            }
        }
        (AtomOp::Add, AtomTy::Unsigned | AtomTy::Signed) => cut(old.wrapping_add(v)),
        (AtomOp::Min, AtomTy::Unsigned) => old.min(cut(v)),
        (AtomOp::Max, AtomTy::Unsigned) => old.max(cut(v)),
        (AtomOp::Min, AtomTy::Signed) => {
            if signed(v) < signed(old) {
                cut(v)
            } else {
                old
            }
        }
        (AtomOp::Max, AtomTy::Signed) => {
            if signed(v) > signed(old) {
                cut(v)
            } else {
                old
            }
        }
        (_, AtomTy::F32) => {
            let (x, y) = (f32::from_bits(old as u32), f32::from_bits(v as u32));
            let r = if ftz && op == AtomOp::Add { flush(flush(x) + flush(y)) } else { float(x, y) };
            r.to_bits().into()
        }
        (_, AtomTy::F64) => {
            let (x, y) = (f64::from_bits(old), f64::from_bits(v));
            let r = match op {
                AtomOp::Min => x.min(y),
                AtomOp::Max => x.max(y),
                _ => x + y,
            };
            r.to_bits()
        }
        (_, AtomTy::F16) => half(old, v, false),
        (_, AtomTy::Bf16) => half(old, v, true),
        (_, AtomTy::F16x2) => half(old & 0xffff, v & 0xffff, false) | half(old >> 16, v >> 16 & 0xffff, false) << 16,
        (_, AtomTy::Bf16x2) => half(old & 0xffff, v & 0xffff, true) | half(old >> 16, v >> 16 & 0xffff, true) << 16,
    }
}

/// Applies `f` to the bytes at `offset` in one step; gives the old value.
pub(crate) fn update(data: &HostBytes, offset: usize, bytes: u32, f: impl Fn(u64) -> u64) -> u64 {
    macro_rules! on {
        ($cell:expr, $t:ty) => {{
            let cell = $cell;
            let mut old = cell.load(Relaxed);
            loop {
                match cell.compare_exchange_weak(old, f(old.into()) as $t, SeqCst, Relaxed) {
                    Ok(v) => break v.into(),
                    Err(v) => old = v,
                }
            }
        }};
    }
    match bytes {
        1 => on!(data.a8(offset), u8),
        2 => on!(data.a16(offset), u16),
        4 => on!(data.a32(offset), u32),
        _ => on!(data.a64(offset), u64),
    }
}

impl Block<'_> {
    pub(crate) fn atomic(&mut self, warp: &mut Warp, frame: u16, active: u32, x: &Atom) -> Step {
        let addresses = self.addresses(warp, frame, x.address);
        let words = if x.bytes == 8 { 2 } else { 1 };
        let releases = matches!(x.strength, Strength::Release | Strength::AcqRel);
        let acquires = matches!(x.strength, Strength::Acquire | Strength::AcqRel);
        let touch = Touch { write: true, strong: true };
        if releases {
            self.clocks.fence(warp.id, x.wide);
        }
        warp.saw_sync = true;
        let size = x.bytes * x.elements.len() as u32;
        if self.l.options.counters {
            self.count(x.place, &addresses, active, size, true);
        }
        if active != warp.all {
            for i in lanes(active) {
                warp.effect[i as usize] = self.pc;
            }
        }
        for lane in lanes(active) {
            let a = addresses[lane as usize];
            let mut olds = [0u64; 8];
            match resolve(x.place, a) {
                Where::Global(a) => {
                    let (i, offset) = self.global_at(warp, lane, a, size, true)?;
                    self.tell(warp.id, a);
                    if x.wide {
                        self.publish(warp.id, a);
                    }
                    if self.l.races_global {
                        let touch = Touch { strong: x.wide, ..touch };
                        self.global_record(warp.id, lane, i, offset, size as usize, touch, true);
                    }
                    let alloc = &self.l.allocations[i];
                    for (k, (d, v, second)) in x.elements.iter().enumerate() {
                        let at = offset + k * x.bytes as usize;
                        let v = take(warp, frame, lane, *v, words);
                        let second = if *second == NONE { 0 } else { take(warp, frame, lane, *second, words) };
                        if let Some(valid) = &alloc.valid {
                            let all = if x.bytes == 8 { 0x0101_0101_0101_0101 } else { (1u64 << (8 * x.bytes)) / 255 };
                            let blind = x.op == AtomOp::Exch && *d == NONE;
                            if !blind && valid.load(at, x.bytes as usize) != all {
                                self.unwritten_global(warp.id, lane, a, x.bytes, i);
                            }
                            valid.store(at, x.bytes as usize, 0x0101_0101_0101_0101);
                        }
                        olds[k] =
                            update(&alloc.data, at, x.bytes, |old| combine(x.op, x.ty, x.bytes, x.ftz, old, v, second));
                    }
                    self.hear(warp.id, a);
                    if x.wide {
                        self.watch(warp.id, a);
                    }
                }
                Where::Shared(a) => {
                    let at = self.shared_at(warp, lane, a, size, true)?;
                    self.tell(warp.id, SHARED_WINDOW + u64::from(a));
                    if self.state[at..at + size as usize].iter().any(|s| *s != 1) {
                        self.bad_state(warp.id, lane, at, size as usize, false);
                    }
                    for (k, (_, v, second)) in x.elements.iter().enumerate() {
                        let at = at + k * x.bytes as usize;
                        let v = take(warp, frame, lane, *v, words);
                        let second = if *second == NONE { 0 } else { take(warp, frame, lane, *second, words) };
                        let old = little(&self.shared[at..at + x.bytes as usize]);
                        olds[k] = old;
                        // On shared memory f32 sums keep subnormal numbers.
                        let new = combine(x.op, x.ty, x.bytes, false, old, v, second).to_le_bytes();
                        if self.check_shared {
                            self.shared_record(warp.id, lane, at, x.bytes as usize, touch, true);
                        }
                        self.shared[at..at + x.bytes as usize].copy_from_slice(&new[..x.bytes as usize]);
                        self.state[at..at + x.bytes as usize].fill(1);
                    }
                    self.hear(warp.id, SHARED_WINDOW + u64::from(a));
                }
                Where::Local(_) | Where::Param(_) => {
                    return self.fault(FaultClass::OobGlobal, warp, lane, || {
                        format!("atomic on {a:#x}, which is neither global nor shared memory")
                    });
                }
            }
            for ((d, _, _), old) in x.elements.iter().zip(olds) {
                if *d == NONE {
                    continue;
                }
                if words == 2 {
                    warp.set64(frame, *d, lane, old);
                } else {
                    warp.set32(frame, *d, lane, old as u32);
                }
            }
        }
        if acquires && x.wide {
            self.acquire_fence(warp.id);
        }
        Ok(())
    }
}
