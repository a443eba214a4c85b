//! Barriers of a block, and what happens when nobody can go on.

use super::block::{Block, Outcome, lanes};
use super::race::Known;
use super::warp::Warp;
use super::{Step, Stop};
use crate::error::FaultClass;
use crate::program::{Bar, Kind, NONE};

pub(crate) struct Barrier {
    /// Lanes of each warp that have arrived.
    arrived: Vec<u32>,
    /// Threads that arrived without waiting, and what they knew then: what they do later is not ordered, and they
    /// learn nothing.
    arrivals: u32,
    brought: Known,
    /// Threads expected; `None` means all that live.
    expected: Option<u32>,
    in_use: bool,
    votes: u32,
    all: bool,
    any: bool,
}

impl Barrier {
    pub(crate) fn new(warps: usize) -> Barrier {
        Barrier {
            arrived: vec![0; warps],
            arrivals: 0,
            brought: Known::default(),
            expected: None,
            in_use: false,
            votes: 0,
            all: true,
            any: false,
        }
    }
}

impl Block<'_> {
    pub(crate) fn bar(&mut self, warp: &mut Warp, frame: u16, active: u32, bar: &Bar) -> Step {
        let first = active.trailing_zeros();
        let id = if bar.id == NONE { 16 } else { warp.get32(frame, bar.id, first) };
        if id > 15 && bar.id != NONE {
            return self.fault(FaultClass::Trap, warp, first, || format!("barrier {id} does not exist, there are 16"));
        }
        let expected = match bar.count {
            NONE => None,
            r => {
                let n = warp.get32(frame, r, first);
                if n == 0 || !n.is_multiple_of(32) {
                    return self.fault(FaultClass::Trap, warp, first, || {
                        format!("a barrier of {n} threads: must be a multiple of 32")
                    });
                }
                Some(n)
            }
        };
        let b = &mut self.barriers[id as usize];
        if b.in_use && b.expected != expected {
            let before = b.expected;
            return self.fault(FaultClass::BarrierDivergence, warp, first, || {
                format!("barrier {id} is used with {expected:?} threads while others wait there for {before:?}")
            });
        }
        b.in_use = true;
        b.expected = expected;
        if bar.reduce != 0 {
            let p = warp.pred(frame, bar.source.0, bar.source.1) & active;
            b.votes += p.count_ones();
            b.all &= p == active;
            b.any |= p != 0;
        }
        if bar.arrive_only {
            b.arrivals += if active == warp.live { 32 } else { active.count_ones() };
            self.clocks.bring(warp.id, &mut b.brought);
        } else {
            b.arrived[warp.id as usize] |= active;
            warp.at_barrier |= active;
            warp.unfair = false;
            for lane in lanes(active) {
                warp.barrier_pc[lane as usize] = self.pc;
                warp.effect[lane as usize] = 0;
            }
        }
        if !bar.arrive_only && bar.aligned && self.l.options.sanitizer.barriers {
            let (pc, lane) = (self.pc, first);
            let elsewhere = lanes(warp.at_barrier).find(|&i| warp.barrier_pc[i as usize] != pc);
            let past = lanes(warp.all & !warp.live).find(|&i| warp.effect[i as usize] > pc);
            if let Some(other) = elsewhere.or(past) {
                let at = elsewhere.map_or(warp.effect[other as usize], |i| warp.barrier_pc[i as usize]);
                let line = self.l.program.line(at);
                return self.fault(FaultClass::BarrierDivergence, warp, lane, || {
                    format!("only a part of the warp reaches this barrier: lane {other} of the same warp went to line {line}")
                });
            }
        }
        self.complete(id, Some(warp))
    }

    /// Opens barrier `id` if everybody is there. `current` is the warp that runs and is not in its place.
    fn complete(&mut self, id: u32, mut current: Option<&mut Warp>) -> Step {
        let b = &self.barriers[id as usize];
        if !b.in_use {
            return Ok(());
        }
        let live = |w: usize, current: &Option<&mut Warp>| match current {
            Some(c) if c.id as usize == w => c.live,
            _ => self.warps[w].live,
        };
        let mut threads = b.arrivals;
        for (w, arrived) in b.arrived.iter().enumerate() {
            let live = live(w, &current);
            if b.expected.is_none() && *arrived != live {
                return Ok(());
            }
            threads += if *arrived == 0 {
                0
            } else if *arrived == live {
                32
            } else {
                arrived.count_ones()
            };
        }
        if b.expected.is_some_and(|n| threads < n) || threads == 0 {
            return Ok(());
        }
        let done = std::mem::replace(&mut self.barriers[id as usize], Barrier::new(self.warps.len()));
        let waiting: Vec<u32> = (0..).zip(&done.arrived).filter(|(_, m)| **m != 0).map(|(w, _)| w).collect();
        self.clocks.join(&waiting, done.brought);
        let l = self.l;
        for (w, mask) in done.arrived.iter().enumerate().filter(|(_, m)| **m != 0) {
            let warp = match &mut current {
                Some(c) if c.id as usize == w => &mut **c,
                _ => &mut self.warps[w],
            };
            warp.at_barrier &= !mask;
            for lane in lanes(*mask) {
                let pc = warp.barrier_pc[lane as usize];
                let (frame, inst) = (warp.frame[lane as usize], &l.program.code[pc as usize]);
                if let Kind::Bar(bar) = &inst.kind {
                    match bar.reduce {
                        1 => warp.set32(frame, bar.d, lane, done.votes),
                        2 => warp.set_pred(frame, bar.d, if done.all { u32::MAX } else { 0 }, 1 << lane),
                        3 => warp.set_pred(frame, bar.d, if done.any { u32::MAX } else { 0 }, 1 << lane),
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }

    /// A warp has no lane that can go on: barriers may be complete now, or its lanes may have parted for good.
    pub(crate) fn settle(&mut self, w: u32) -> Step {
        self.check_parted(w)?;
        for id in 0..17 {
            self.complete(id, None)?;
        }
        Ok(())
    }

    /// Reports lanes of one warp that wait at different barriers, or that went past one where others wait.
    fn check_parted(&mut self, w: u32) -> Step {
        let warp = &self.warps[w as usize];
        if warp.at_barrier == 0 || !self.l.options.sanitizer.barriers {
            return Ok(());
        }
        let first = warp.at_barrier.trailing_zeros();
        let pc = warp.barrier_pc[first as usize];
        let aligned = matches!(&self.l.program.code[pc as usize].kind, Kind::Bar(b) if b.aligned);
        if !aligned {
            return Ok(());
        }
        let line = |pc: u32| self.l.program.line(pc);
        let mut parted = None;
        for lane in lanes(warp.all & !(1 << first)) {
            let i = lane as usize;
            if warp.at_barrier >> lane & 1 != 0 {
                if warp.barrier_pc[i] != pc {
                    parted = Some(format!("lane {lane} of the same warp waits at line {}", line(warp.barrier_pc[i])));
                }
            } else if warp.live >> lane & 1 != 0 {
                parted = Some(format!(
                    "lane {lane} of the same warp waits at line {}, without this barrier",
                    line(warp.pc[i])
                ));
            } else if warp.effect[i] > pc {
                parted = Some(format!(
                    "lane {lane} of the same warp went past it to line {} and exited",
                    line(warp.effect[i])
                ));
            }
        }
        match parted {
            None => Ok(()),
            Some(text) => {
                self.pc = pc;
                self.fault(FaultClass::BarrierDivergence, warp, first, || {
                    format!("only a part of the warp reaches this barrier: {text}")
                })
            }
        }
    }

    /// Nobody can go on.
    pub(crate) fn deadlock(&mut self) -> Step<Outcome> {
        for w in 0..self.warps.len() {
            if self.warps[w].live != 0 {
                self.settle(w as u32)?;
            }
        }
        if self.warps.iter().any(|w| w.ready() != 0) {
            return Ok(Outcome::Waiting);
        }
        let Some(warp) = self.warps.iter().find(|w| w.live != 0) else {
            return Err(Stop);
        };
        let lane = warp.live.trailing_zeros();
        self.pc =
            if warp.at_barrier >> lane & 1 != 0 { warp.barrier_pc[lane as usize] } else { warp.pc[lane as usize] };
        let mut waits: Vec<String> = Vec::new();
        for w in self.warps.iter().filter(|w| w.live != 0) {
            let i = w.live.trailing_zeros() as usize;
            let pc = if w.at_barrier >> i & 1 != 0 { w.barrier_pc[i] } else { w.pc[i] };
            waits.push(format!("warp {} at line {}", w.id, self.l.program.line(pc)));
        }
        waits.truncate(8);
        let what = format!("deadlock: nobody can go on ({})", waits.join(", "));
        self.fault(FaultClass::BarrierDivergence, warp, lane, || what)
    }
}
