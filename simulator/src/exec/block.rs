//! A block: its shared memory and barriers, the turns of its warps, and the loop that runs one warp.

use super::barrier::{Barrier, Mbarrier};
use super::hazard::Hazards;
use super::race::{Clocks, Parts, Shadow};
use super::stats::Stats;
use super::warp::Warp;
use super::{Launch, Step, Stop, mix};
use crate::compile::CODE_WINDOW;
use crate::error::FaultClass;
use crate::program::{Call, Inst, Kind, NONE, Slot};
use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;

/// How a turn of a block ended.
pub(crate) enum Outcome {
    Done,
    /// It has had its share.
    Waiting,
    /// All that it did was to wait for somebody.
    Spinning,
}

/// Why a warp stopped running.
#[derive(PartialEq, Eq, Clone, Copy)]
enum Turn {
    /// No lane can go on.
    Blocked,
    /// It goes round in a loop that waits for somebody.
    Spinning,
    /// Its share is used up.
    Share,
}

/// Instructions of a warp before the next one has its turn.
const SHARE: u64 = 20_000;
/// Instructions of a block before the next one has its turn.
const BLOCK_SHARE: u64 = 20_000_000;
/// Turns of a group of lanes, while others of the warp wait, before these run too.
const MAX_TURNS: u32 = 2_000;

pub(crate) struct Block<'a> {
    pub l: &'a Launch<'a>,
    pub index: u64,
    pub warps: Vec<Warp>,
    pub shared: Vec<u8>,
    /// Bit 0: written. Bit 1: target of a copy that has not landed.
    pub state: Vec<u8>,
    pub shadow: Vec<Shadow>,
    pub parts: Parts,
    pub clocks: Clocks,
    pub barriers: Vec<Barrier>,
    pub mbarriers: HashMap<u32, Mbarrier>,
    /// Knowledge published at addresses of shared memory.
    pub shared_sync: HashMap<u32, Box<[u32]>>,
    pub hazards: Hazards,
    pub stats: Stats,
    pub pc: u32,
    /// Records of shared and global accesses are kept.
    pub check_shared: bool,
    order: Vec<u32>,
}

impl<'a> Block<'a> {
    pub(crate) fn new(l: &'a Launch<'a>, index: u64) -> Block<'a> {
        let mut b = Block {
            l,
            index,
            warps: (0..l.warps).map(Warp::new).collect(),
            shared: Vec::new(),
            state: Vec::new(),
            shadow: Vec::new(),
            parts: Parts::default(),
            clocks: Clocks::default(),
            barriers: Vec::new(),
            mbarriers: HashMap::new(),
            shared_sync: HashMap::new(),
            hazards: Hazards::default(),
            stats: Stats::default(),
            pc: 0,
            check_shared: l.options.sanitizer.races_shared,
            order: (0..l.warps).collect(),
        };
        b.start(index);
        b
    }

    /// Starts the kernel in block `index`, from nothing.
    pub(crate) fn start(&mut self, index: u64) {
        let l = self.l;
        self.index = index;
        let bytes = l.shared_bytes as usize;
        self.shared.clear();
        self.shared.resize(bytes.next_multiple_of(16), 0xff);
        self.state.clear();
        self.state.resize(bytes.next_multiple_of(16), 0);
        if self.check_shared {
            self.shadow.clear();
            self.shadow.resize(bytes.div_ceil(4), [0; 3]);
            self.parts.clear();
        }
        self.clocks.start(l.warps as usize);
        self.barriers.clear();
        self.barriers.resize_with(17, || Barrier::new(l.warps as usize));
        self.mbarriers.clear();
        self.shared_sync.clear();
        self.hazards.clear();
        for w in &mut self.warps {
            w.start(l, index);
        }
        if let Some(seed) = l.options.seed {
            self.order.sort_by_key(|w| mix(seed ^ index.wrapping_mul(1_000_003) ^ u64::from(*w) << 32));
        }
    }

    pub(crate) fn run(&mut self, stats: &mut Stats) -> Step<Outcome> {
        std::mem::swap(&mut self.stats, stats);
        let outcome = self.turns();
        if !matches!(outcome, Ok(Outcome::Waiting | Outcome::Spinning)) {
            self.never_landed();
        }
        std::mem::swap(&mut self.stats, stats);
        outcome
    }

    fn turns(&mut self) -> Step<Outcome> {
        let mut spent = 0;
        loop {
            let (mut ran, mut spinning, mut worked) = (false, true, false);
            for i in 0..self.order.len() {
                let w = self.order[i] as usize;
                if self.warps[w].ready() == 0 {
                    continue;
                }
                if self.l.stop.load(Relaxed) {
                    return Err(Stop);
                }
                ran = true;
                let mut warp = std::mem::replace(&mut self.warps[w], Warp::placeholder());
                let before = warp.instructions;
                let turn = self.run_warp(&mut warp);
                spent += warp.instructions - before;
                self.warps[w] = warp;
                let turn = turn?;
                spinning &= turn == Turn::Spinning;
                self.warps[w].spins += u32::from(turn == Turn::Spinning);
                worked |= std::mem::take(&mut self.warps[w].worked) || turn != Turn::Spinning;
                if turn == Turn::Blocked {
                    self.settle(w as u32)?;
                }
            }
            if !ran {
                if self.warps.iter().all(|w| w.live == 0) {
                    return Ok(Outcome::Done);
                }
                return self.deadlock();
            }
            if worked {
                self.l.worked();
            }
            if spinning {
                return self.spun();
            }
            if spent > BLOCK_SHARE {
                return Ok(Outcome::Waiting);
            }
        }
    }

    /// Every warp that could run only waited. Fails when nobody else does anything either, for long.
    fn spun(&mut self) -> Step<Outcome> {
        if !self.l.is_idle() {
            return Ok(Outcome::Spinning);
        }
        let Some(warp) = self.warps.iter().find(|w| w.ready() != 0) else {
            return Ok(Outcome::Spinning);
        };
        let lane = warp.ready().trailing_zeros();
        self.pc = warp.pc[lane as usize];
        self.fault(FaultClass::Timeout, warp, lane, || {
            "waits for something that never comes: nobody in the launch does anything else any more".into()
        })
    }

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

    fn run_warp(&mut self, warp: &mut Warp) -> Step<Turn> {
        let l = self.l;
        let code = &l.program.code[..];
        let limit = warp.instructions + SHARE;
        'group: loop {
            let Some((mut pc, mask, frame, other)) = Self::select(warp) else {
                return Ok(Turn::Blocked);
            };
            let base = warp.words(frame);
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
                            let members = self.members(warp, frame, inst, active);
                            if members & !active != 0 {
                                // Lanes that came earlier wait at this instruction: together they may be complete.
                                let here = lanes(warp.at_sync)
                                    .filter(|&i| warp.pc[i as usize] == pc && warp.frame[i as usize] == frame);
                                let here = here.fold(0u32, |m, i| m | 1 << i);
                                if members & !(active | here) != 0 {
                                    park(warp, mask & !active, pc + 1);
                                    park(warp, active, pc);
                                    warp.at_sync |= active;
                                    warp.unfair = false;
                                    self.warp_barrier(warp);
                                    continue 'group;
                                }
                                let together = active | here;
                                warp.at_sync &= !here;
                                self.execute(warp, frame, inst, kind, together)?;
                                park(warp, mask | together, pc + 1);
                                continue 'group;
                            }
                            if !self.execute(warp, frame, inst, kind, active)? {
                                park(warp, mask, pc + 1);
                                return Ok(Turn::Spinning);
                            }
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
            Kind::Shuffle { .. }
            | Kind::Vote { .. }
            | Kind::Match { .. }
            | Kind::Redux { .. }
            | Kind::Elect { .. }
            | Kind::WarpBar => warp.get32(frame, inst.b, active.trailing_zeros()),
            Kind::LdMatrix { .. }
            | Kind::StMatrix { .. }
            | Kind::MovMatrix
            | Kind::Mma(_)
            | Kind::Wgmma(_)
            | Kind::WarpAligned
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

    fn ret(&mut self, warp: &mut Warp, frame: u16, active: u32) {
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

    fn call(&mut self, warp: &mut Warp, frame: u16, active: u32, call: &Call, pc: u32) -> Step {
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
                return self.trap(warp, first, "stack overflow").map(|_| ());
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

    fn trap(&mut self, warp: &Warp, lane: u32, what: &str) -> Step<Turn> {
        self.fault(FaultClass::Trap, warp, lane, || what.to_owned())
    }

    fn timeout(&mut self, warp: &Warp, mask: u32) -> Step<Turn> {
        let n = warp.instructions;
        self.fault(FaultClass::Timeout, warp, mask.trailing_zeros(), || {
            format!("the warp has executed {n} instructions and the budget is used up: an endless loop?")
        })
    }

    /// Where a thread is, in words.
    pub(crate) fn place(&self, warp: u32, lane: u32) -> String {
        let l = self.l;
        let thread = l.thread_index((warp * 32 + lane.min(31)).min(l.threads - 1));
        let (line, text) = (l.program.line(self.pc), l.program.text(self.pc));
        let block = l.block_index(self.index);
        format!("kernel {} block {block:?} thread {thread:?} line {line} `{text}`", l.program.name)
    }

    /// Records a finding and goes on.
    pub(crate) fn note(&self, class: FaultClass, warp: u32, lane: u32, what: impl FnOnce() -> String) {
        let mut reports = self.l.reports.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        reports.add(class, self.l.program.line(self.pc), || format!("{}: {}", self.place(warp, lane), what()));
    }

    /// Records a finding and ends the launch.
    pub(crate) fn fault<T>(&self, class: FaultClass, warp: &Warp, lane: u32, what: impl FnOnce() -> String) -> Step<T> {
        self.note(class, warp.id, lane, what);
        self.l.stop.store(true, Relaxed);
        Err(Stop)
    }
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

/// The lanes of a mask, in order.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = u32> {
    let mut left = mask;
    std::iter::from_fn(move || {
        (left != 0).then(|| {
            let i = left.trailing_zeros();
            left &= left - 1;
            i
        })
    })
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
