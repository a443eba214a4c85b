//! The loop that runs one warp: which lanes go next, branches, and where lanes of a warp meet again.

use super::Step;
use super::block::{Block, lanes};
use super::warp::Warp;
use crate::error::FaultClass;
use crate::program::{Inst, Kind, NONE};

/// Why a warp stopped running.
#[derive(PartialEq, Eq, Clone, Copy)]
pub(super) enum Turn {
    /// No lane can go on.
    Blocked,
    /// It goes round in a loop that waits for somebody.
    Spinning,
    /// Its share is used up.
    Share,
}

/// Instructions of a warp before the next one has its turn.
const SHARE: u64 = 20_000;
/// Turns of a group of lanes, while others of the warp wait, before these run too.
const MAX_TURNS: u32 = 2_000;

impl Block<'_> {
    /// The lanes that run next: those of the deepest call, of these the lowest program counter. Also the lowest
    /// program counter among the others of the same frame, where the groups may meet.
    fn select(warp: &Warp) -> Option<(u32, u32, u16, u32)> {
        let ready = warp.ready();
        if ready == 0 {
            return None;
        }
        let first = ready.trailing_zeros() as usize;
        let (pc, frame) = (warp.pc[first], warp.frame[first]);
        if warp.frames.len() == 1 {
            let mut equal = 0u32;
            for i in 0..32 {
                equal |= u32::from(warp.pc[i] == pc) << i;
            }
            if equal & ready == ready {
                return Some((pc, ready, frame, NONE));
            }
        }
        let depth = |i: usize| warp.frames[warp.frame[i] as usize].depth;
        let lanes = || (0..32usize).filter(|i| ready >> i & 1 != 0);
        let key = |i: &usize| (std::cmp::Reverse(depth(*i)), warp.pc[*i], warp.frame[*i]);
        let best = if warp.unfair { lanes().max_by_key(key)? } else { lanes().min_by_key(key)? };
        let (pc, frame) = (warp.pc[best], warp.frame[best]);
        let mask = lanes().filter(|&i| warp.pc[i] == pc && warp.frame[i] == frame).fold(0, |m, i| m | 1 << i);
        if warp.unfair {
            return Some((pc, mask, frame, NONE - 1));
        }
        let other = lanes().filter(|&i| mask >> i & 1 == 0 && warp.frame[i] == frame).map(|i| warp.pc[i]).min();
        // Lanes in other frames cannot be met, but they wait all the same.
        let other = other.unwrap_or(if mask == ready { NONE } else { NONE - 1 });
        Some((pc, mask, frame, other))
    }

    pub(super) fn run_warp(&mut self, warp: &mut Warp) -> Step<Turn> {
        let l = self.l;
        let code = &l.program.code[..];
        let limit = warp.instructions + SHARE;
        'group: loop {
            let Some((mut pc, mask, frame, other)) = Self::select(warp) else {
                return Ok(Turn::Blocked);
            };
            let mut base = warp.words(frame);
            if warp.instructions > limit {
                return Ok(Turn::Share);
            }
            loop {
                let inst = &code[pc as usize];
                warp.instructions += 1;
                let active = match inst.guard {
                    NONE => mask,
                    // SAFETY: the decoder placed the guard inside the frame.
                    g => mask & unsafe { crate::lanes::pred(base, g, inst.guard_not) },
                };
                let count = &mut self.stats.counts[pc as usize];
                count.0 += 1;
                count.1 += u64::from(active.count_ones());
                if warp.watched() && active != 0 {
                    self.pc = pc;
                    self.watch_operands(warp, frame, inst, active);
                    base = warp.words(frame);
                }
                if let Kind::Alu = inst.kind {
                    if active != 0 {
                        // SAFETY: `base` is the frame of the function that the instruction belongs to.
                        unsafe { (inst.alu)(base, inst, active) };
                    }
                    pc += 1;
                    if pc >= other {
                        park(warp, mask, pc);
                        continue 'group;
                    }
                    continue;
                }
                self.pc = pc;
                match &inst.kind {
                    Kind::Jump(target) => {
                        let backward = *target <= pc;
                        if active == mask {
                            pc = *target;
                        } else if active != 0 {
                            park(warp, mask, pc + 1);
                            park(warp, active, *target);
                        } else {
                            pc += 1;
                        }
                        if active != 0 && backward {
                            if warp.instructions > l.options.budget {
                                return self.timeout(warp, mask);
                            }
                            let spins = std::mem::take(&mut warp.saw_sync) & !std::mem::take(&mut warp.saw_store);
                            warp.worked |= !spins;
                            if other != NONE || active != mask {
                                warp.turns += 1;
                                if warp.turns > MAX_TURNS {
                                    warp.turns = 0;
                                    warp.unfair = !warp.unfair;
                                    if active == mask {
                                        park(warp, mask, pc);
                                    }
                                    continue 'group;
                                }
                            }
                            if spins && active == mask {
                                park(warp, mask, pc);
                                return Ok(Turn::Spinning);
                            }
                            if spins || warp.instructions > limit {
                                if active == mask {
                                    park(warp, mask, pc);
                                }
                                return Ok(if spins { Turn::Spinning } else { Turn::Share });
                            }
                        }
                        if active != mask && active != 0 || pc >= other {
                            if active == mask || active == 0 {
                                park(warp, mask, pc);
                            }
                            continue 'group;
                        }
                        continue;
                    }
                    Kind::Switch(targets) => {
                        park(warp, mask, pc + 1);
                        let index = warp.lane_values(frame, inst.a);
                        for lane in lanes(active) {
                            match targets.get(index[lane as usize] as usize) {
                                Some(t) => warp.pc[lane as usize] = *t,
                                None => {
                                    return self.trap(warp, lane, "the index of brx.idx is outside its list");
                                }
                            }
                        }
                        if warp.instructions > l.options.budget {
                            return self.timeout(warp, mask);
                        }
                        continue 'group;
                    }
                    Kind::Exit => {
                        park(warp, mask, pc + 1);
                        warp.live &= !active;
                        warp.unfair = false;
                        warp.worked |= active != 0;
                        if active != 0 {
                            self.exited(warp);
                            continue 'group;
                        }
                    }
                    Kind::Ret => {
                        park(warp, mask, pc + 1);
                        if active != 0 {
                            self.ret(warp, frame, active);
                            continue 'group;
                        }
                    }
                    Kind::Call(call) => {
                        park(warp, mask, pc + 1);
                        if active != 0 {
                            self.call(warp, frame, active, call, pc)?;
                            continue 'group;
                        }
                    }
                    Kind::Trap(what) => {
                        if active != 0 {
                            return self.trap(warp, active.trailing_zeros(), what);
                        }
                    }
                    Kind::Bar(bar) => {
                        if active != 0 {
                            park(warp, mask, pc + 1);
                            self.bar(warp, frame, active, bar)?;
                            continue 'group;
                        }
                    }
                    Kind::Yield => {
                        park(warp, mask, pc + 1);
                        return Ok(Turn::Spinning);
                    }
                    kind => {
                        if active != 0 {
                            // Lanes with different masks take part in different operations: those with the first
                            // lane's mask do now, the others look again.
                            let alike = alike(warp, frame, inst, active.trailing_zeros());
                            let (group, apart) = (active & alike, active & !alike);
                            self.stats.counts[pc as usize].1 -= u64::from(apart.count_ones());
                            let members = self.members(warp, frame, inst, group);
                            let mut here = 0;
                            if members & !group != 0 {
                                // Lanes that came earlier wait at this instruction: together they may be complete.
                                here = lanes(warp.at_sync & alike)
                                    .filter(|&i| warp.pc[i as usize] == pc && warp.frame[i as usize] == frame)
                                    .fold(0u32, |m, i| m | 1 << i);
                                if members & !(group | here) != 0 {
                                    park(warp, mask & !active, pc + 1);
                                    park(warp, active, pc);
                                    warp.at_sync |= group;
                                    warp.unfair = false;
                                    self.warp_barrier(warp);
                                    continue 'group;
                                }
                            }
                            if here | apart != 0 {
                                warp.at_sync &= !here;
                                self.execute(warp, frame, inst, kind, group | here)?;
                                park(warp, mask | here, pc + 1);
                                park(warp, apart, pc);
                                continue 'group;
                            }
                            if !self.execute(warp, frame, inst, kind, active)? {
                                park(warp, mask, pc + 1);
                                return Ok(Turn::Spinning);
                            }
                            // What it did with the registers ended the claim of the pointer from before.
                            base = warp.words(frame);
                        }
                    }
                }
                pc += 1;
                if pc >= other {
                    park(warp, mask, pc);
                    continue 'group;
                }
            }
        }
    }

    /// Lanes that must execute `inst` together: those of its mask that have not exited.
    fn members(&self, warp: &Warp, frame: u16, inst: &Inst, active: u32) -> u32 {
        let mask = match &inst.kind {
            kind if has_mask(kind) => warp.get32(frame, inst.b, active.trailing_zeros()),
            Kind::LdMatrix { .. }
            | Kind::StMatrix { .. }
            | Kind::MovMatrix
            | Kind::Mma(_)
            | Kind::Wgmma(_)
            | Kind::WgmmaFence
            | Kind::WgmmaCommit
            | Kind::WgmmaWait(_) => u32::MAX,
            _ => return 0,
        };
        mask & warp.live
    }

    /// `bar.warp.sync` lets lanes meet at different places.
    fn warp_barrier(&mut self, warp: &mut Warp) {
        let code = &self.l.program.code;
        let waiting = lanes(warp.at_sync).filter(|&i| matches!(code[warp.pc[i as usize] as usize].kind, Kind::WarpBar));
        let waiting = waiting.fold(0u32, |m, i| m | 1 << i);
        for lane in lanes(waiting) {
            let inst = &code[warp.pc[lane as usize] as usize];
            let members = warp.get32(warp.frame[lane as usize], inst.b, lane) & warp.live;
            if members & !waiting == 0 {
                for i in lanes(members & waiting) {
                    warp.pc[i as usize] += 1;
                }
                warp.at_sync &= !members;
                self.clocks.advance(warp.id);
                return;
            }
        }
    }

    /// After some lanes have exited: others may wait for nobody else.
    fn exited(&mut self, warp: &mut Warp) {
        warp.trim();
        if warp.at_sync != 0 {
            self.warp_barrier(warp);
            // Lanes at collective instructions look again.
            warp.at_sync = 0;
        }
    }

    pub(super) fn trap(&mut self, warp: &Warp, lane: u32, what: &str) -> Step<Turn> {
        self.fault(FaultClass::Trap, warp, lane, || what.to_owned())
    }

    pub(super) fn timeout(&mut self, warp: &Warp, mask: u32) -> Step<Turn> {
        let n = warp.instructions;
        self.fault(FaultClass::Timeout, warp, mask.trailing_zeros(), || {
            format!("the warp has executed {n} instructions and the budget is used up: an endless loop?")
        })
    }
}

/// Whether operand `b` is the mask of the lanes that take part.
fn has_mask(kind: &Kind) -> bool {
    use Kind::*;
    matches!(kind, Shuffle { .. } | Vote { .. } | Match { .. } | Redux { .. } | Elect { .. } | WarpBar)
}

/// The lanes that have the same mask for `inst` as `lane`; without a mask all of them.
fn alike(warp: &Warp, frame: u16, inst: &Inst, lane: u32) -> u32 {
    if !has_mask(&inst.kind) {
        return u32::MAX;
    }
    let masks = warp.lane_values(frame, inst.b);
    let own = masks[lane as usize];
    (0..32).fold(0, |m, i| m | u32::from(masks[i] == own) << i)
}

/// Sets the program counter of lanes.
#[inline(always)]
pub(crate) fn park(warp: &mut Warp, mask: u32, pc: u32) {
    if mask == u32::MAX {
        warp.pc = [pc; 32];
    } else {
        for i in 0..32 {
            if mask >> i & 1 != 0 {
                warp.pc[i] = pc;
            }
        }
    }
}
