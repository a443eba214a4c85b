//! A block: its shared memory and barriers, the turns of its warps, and how findings are reported.

use super::barrier::Barrier;
use super::hazard::Hazards;
use super::mbarrier::Mbarrier;
use super::race::{Clocks, Parts, Shadow};
use super::run::Turn;
use super::stats::Stats;
use super::warp::Warp;
use super::{Launch, Step, Stop, mix};
use crate::error::FaultClass;
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

/// Most host memory of a block for work that it has not waited for, and the step in which it is asked for. All that
/// fits into shared memory at once needs less than an eighth of it.
const MAX_PENDING: usize = 64 << 20;
const PENDING_STEP: usize = 1 << 20;

/// Instructions of a block before the next one has its turn.
const BLOCK_SHARE: u64 = 20_000_000;

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
    /// What strong writes to an address told whoever of the block reads it strongly: clocks, and the time of releases.
    pub told: HashMap<u64, (Box<[u32]>, u64)>,
    pub hazards: Hazards,
    /// Host memory of copies that have not landed and of readings that go on, and the most that was asked for.
    pub pending_bytes: usize,
    granted: usize,
    pub stats: Stats,
    pub pc: u32,
    /// Records of shared and global accesses are kept.
    pub check_shared: bool,
    /// Fences between the proxies are looked at.
    pub check_proxies: bool,
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
            told: HashMap::new(),
            hazards: Hazards::default(),
            pending_bytes: 0,
            granted: 0,
            stats: Stats::default(),
            pc: 0,
            check_shared: l.options.sanitizer.races_shared,
            check_proxies: l.options.sanitizer.fences && l.options.sanitizer.races_shared && l.program.async_reads,
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
        self.clocks.start(l.warps as usize, self.check_proxies);
        self.barriers.clear();
        self.barriers.resize_with(17, || Barrier::new(l.warps as usize));
        self.mbarriers.clear();
        self.told.clear();
        self.hazards.clear();
        self.pending_bytes = 0;
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
                    self.check_warpgroups();
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

    /// After the last warp has ended: all threads of a warpgroup must have executed the same products, fences, commits and waits.
    fn check_warpgroups(&mut self) {
        if !self.l.options.sanitizer.barriers {
            return;
        }
        for first in (0..self.warps.len()).step_by(4) {
            let group = &self.warps[first..(first + 4).min(self.warps.len())];
            let whole = |w: &Warp| w.together.hash == group[0].together.hash && !w.together.partly;
            let same = group.len() == 4 && group.iter().all(whole);
            if let Some(warp) = group.iter().find(|w| w.together.hash != 0).filter(|_| !same) {
                let id = warp.id;
                self.pc = warp.together.last;
                self.note(FaultClass::BarrierDivergence, id, 0, || {
                    let last = first + 3;
                    format!(
                        "warps {first} to {last} are a warpgroup, but not all of their threads executed the same instructions of one \
                         (this is the last of warp {id})"
                    )
                });
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

    /// After the start of asynchronous work: there must be an end to what nobody waits for.
    pub(crate) fn check_pending(&mut self, warp: &Warp, active: u32) -> Step {
        if self.pending_bytes <= self.granted {
            return Ok(());
        }
        let more = (self.pending_bytes - self.granted).next_multiple_of(PENDING_STEP);
        self.granted += more;
        if self.l.grow(more as u64) && self.pending_bytes <= MAX_PENDING {
            return Ok(());
        }
        self.fault(FaultClass::Trap, warp, active.trailing_zeros(), || {
            "too many copies, stores or products that nobody has waited for, of this block or of all".into()
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

impl Drop for Block<'_> {
    fn drop(&mut self) {
        self.l.shrink(self.granted as u64 + self.warps.iter().map(|w| w.grown).sum::<u64>());
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
