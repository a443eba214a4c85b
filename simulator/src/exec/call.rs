//! Calls of functions, and returns from them.

use super::Step;
use super::block::{Block, lanes};
use super::warp::Warp;
use crate::compile::CODE_WINDOW;
use crate::program::{Call, Kind, Slot};

impl Block<'_> {
    pub(super) fn ret(&mut self, warp: &mut Warp, frame: u16, active: u32) {
        let f = warp.frames[frame as usize];
        let l = self.l;
        let (callee, inst) = (&l.program.funcs[f.func as usize], &l.program.code[f.call as usize]);
        if let Kind::Call(call) = &inst.kind {
            for (from, to) in callee.returns.iter().zip(&call.returns) {
                copy_slot(warp, (frame, *from), (f.parent, *to), active);
            }
        }
        for lane in lanes(active) {
            warp.pc[lane as usize] = f.call + 1;
            warp.frame[lane as usize] = f.parent;
        }
        warp.trim();
    }

    pub(super) fn call(&mut self, warp: &mut Warp, frame: u16, active: u32, call: &Call, pc: u32) -> Step {
        if warp.instructions > self.l.options.budget {
            return self.timeout(warp, active).map(|_| ());
        }
        let mut left = active;
        while left != 0 {
            let first = left.trailing_zeros();
            let (func, group) = match call.func {
                Some(f) => (f, left),
                None => {
                    let target = warp.get64(frame, call.pointer, first);
                    let same = lanes(left)
                        .filter(|&i| warp.get64(frame, call.pointer, i) == target)
                        .fold(0u32, |m, i| m | 1 << i);
                    let p = self.l.program;
                    let number = u32::try_from(target.wrapping_sub(CODE_WINDOW)).unwrap_or(u32::MAX);
                    let fitting = p.pointers.get(&number).copied().filter(|i| {
                        let f = &p.funcs[*i as usize];
                        *i != p.entry && f.params.len() == call.args.len() && f.returns.len() == call.returns.len()
                    });
                    let Some(index) = fitting else {
                        return self
                            .trap(warp, first, "the address called is not that of a fitting function")
                            .map(|_| ());
                    };
                    (index, same)
                }
            };
            let Some(new) = warp.push(self.l, self.index, func, frame, pc) else {
                return self
                    .trap(warp, first, "stack overflow, or nested calls of all blocks need too much memory")
                    .map(|_| ());
            };
            let info = &self.l.program.funcs[func as usize];
            for (from, to) in call.args.iter().zip(&info.params) {
                copy_slot(warp, (frame, *from), (new, *to), group);
            }
            for lane in lanes(group) {
                warp.pc[lane as usize] = info.start;
                warp.frame[lane as usize] = new;
            }
            left &= !group;
        }
        Ok(())
    }
}

/// Copies an argument or result between frames.
fn copy_slot(warp: &mut Warp, (from_frame, from): (u16, Slot), (to_frame, to): (u16, Slot), mask: u32) {
    let stride = warp.local_stride as usize;
    let at = |w: &Warp, f: u16, offset: u32, lane: u32| {
        lane as usize * stride + (w.frames[f as usize].local_base + offset) as usize
    };
    for lane in lanes(mask) {
        match (from, to) {
            (Slot::Local(a, n), Slot::Local(b, m)) => {
                let (a, b, n) = (at(warp, from_frame, a, lane), at(warp, to_frame, b, lane), n.min(m) as usize);
                warp.local.copy_within(a..a + n, b);
                warp.local_state.copy_within(a..a + n, b);
            }
            (Slot::Pred(a), Slot::Pred(b)) => {
                let v = warp.pred(from_frame, a, false);
                warp.set_pred(to_frame, b, v, 1 << lane);
            }
            _ => {
                let bits = match from {
                    Slot::Reg(a, 2) => warp.get64(from_frame, a, lane),
                    Slot::Reg(a, _) => warp.get32(from_frame, a, lane).into(),
                    Slot::Local(a, n) => {
                        let (a, n) = (at(warp, from_frame, a, lane), n.min(8) as usize);
                        let mut bytes = [0; 8];
                        bytes[..n].copy_from_slice(&warp.local[a..a + n]);
                        u64::from_le_bytes(bytes)
                    }
                    Slot::Pred(a) => u64::from(warp.pred(from_frame, a, false) >> lane & 1),
                };
                match to {
                    Slot::Reg(b, 2) => warp.set64(to_frame, b, lane, bits),
                    Slot::Reg(b, _) => warp.set32(to_frame, b, lane, bits as u32),
                    Slot::Local(b, n) => {
                        let (b, n) = (at(warp, to_frame, b, lane), n.min(8) as usize);
                        warp.local[b..b + n].copy_from_slice(&bits.to_le_bytes()[..n]);
                        warp.local_state[b..b + n].fill(1);
                    }
                    Slot::Pred(b) => warp.set_pred(to_frame, b, if bits & 1 != 0 { u32::MAX } else { 0 }, 1 << lane),
                }
            }
        }
    }
}
