//! Work that goes on after its instruction: copies on their way, and products and bulk stores that still read.
//!
//! Products run at their issue, but until their wait their results and their operands in shared memory are not to be
//! touched. The same holds for the source of a bulk store.

use super::block::{Block, lanes};
use super::race::{MANY, Record};
use super::warp::{Pending, Warp};
use crate::error::FaultClass;
use crate::program::{Inst, Kind, NONE, Place};

/// A touch of bytes that a copy of another warp was filling, or a write of bytes that another warp's product or bulk
/// store was reading. Whether a wait or a barrier is missing shows at the other warp's wait: a touch that comes before
/// it for sure was too early; one without any order to it is a race. All warps run the same program, so who has not
/// come to its own wait for the same group of copies lacks a wait, too.
struct Early {
    warp: u32,
    lane: u32,
    clock: u32,
    /// The warp that copies or reads.
    other: u32,
    /// Number of the [`Reading`], `None` for a copy that fills.
    reading: Option<u64>,
    /// The warp that touches had waited for its own copies of that group.
    waited: bool,
    at: usize,
    pc: u32,
    text: String,
}

/// A product or bulk store that may still read shared memory.
pub(crate) struct Reading {
    number: u64,
    warp: u32,
    /// Thread of a bulk store; `MANY` for a product of the whole warp.
    lane: u32,
    clock: u32,
    /// Group it was committed to, `NONE` before.
    group: u32,
    /// Pieces of 16 bytes that it reads.
    pieces: Vec<u32>,
    /// Registers of the warp that its results will be in: moves change them.
    results: Vec<u32>,
    /// Its host memory, with what the allocator adds, when it began.
    bytes: usize,
}

#[derive(Default)]
pub(crate) struct Hazards {
    early: Vec<Early>,
    pub readings: Vec<Reading>,
    /// Readings per 16 bytes of shared memory.
    readers: Vec<u16>,
    numbers: u64,
    /// Per four bytes of shared memory: the last copy that filled them, its group and its issue's clock.
    filled: Vec<(u32, u32)>,
    /// Per warp: the first group of its copies that it has not waited for, `NONE` if there is none.
    oldest: Vec<u32>,
    /// Waits for mbarriers that do not exist (yet).
    missing: u32,
}

impl Hazards {
    pub(crate) fn clear(&mut self) {
        self.early.clear();
        self.readings.clear();
        self.readers.clear();
        self.filled.clear();
        self.oldest.clear();
        self.missing = 0;
    }
}

/// Most touches kept of one block: each place in the code is kept once for each pair of warps.
const MAX_EARLY: usize = 1024;

impl Block<'_> {
    fn note_at(&mut self, pc: u32, class: FaultClass, warp: u32, lane: u32, what: String) {
        let now = std::mem::replace(&mut self.pc, pc);
        self.note(class, warp, lane, || what);
        self.pc = now;
    }

    /// Byte `at` of shared memory is the target of a copy that has not landed, and is touched.
    pub(crate) fn touched_in_flight(&mut self, warp: u32, lane: u32, at: usize, what: String) {
        let copy = if self.check_shared { Record::unpack(self.shadow[at / 4][0]) } else { None };
        match copy {
            // Without any order to the copy's issue it is a race, which is found elsewhere.
            Some(c) if c.warp != warp && c.lane != MANY && !self.clocks.knows(warp, c.warp, c.clock) => {}
            Some(c) if c.warp != warp && c.lane != MANY => self.early(warp, lane, c.warp, None, at, what),
            _ => self.note(FaultClass::AsyncCopyHazard, warp, lane, || format!("{what}, before the wait for the copy")),
        }
    }

    /// A copy that belongs to the warp's `group` was issued.
    pub(crate) fn copy_issued(&mut self, warp: u32, group: u32, at: usize, bytes: usize) {
        let (words, warps) = (self.shared.len().div_ceil(4), self.l.warps as usize);
        let clock = self.clocks.clock(warp);
        let h = &mut self.hazards;
        h.filled.resize(words, (NONE, 0));
        h.filled[at / 4..(at + bytes).div_ceil(4)].fill((group, clock));
        h.oldest.resize(warps, NONE);
        let oldest = &mut h.oldest[warp as usize];
        *oldest = group.min(*oldest);
    }

    /// Copies of a warp have landed.
    pub(crate) fn copies_waited(&mut self, warp: &Warp) {
        if let Some(oldest) = self.hazards.oldest.get_mut(warp.id as usize) {
            let group = |p: &Pending| if p.group == NONE { warp.groups[p.lane as usize] } else { p.group };
            *oldest = warp.copies.iter().map(group).min().unwrap_or(NONE);
        }
    }

    /// Whether a warp has waited for its own copies of the group that filled byte `at`.
    pub(crate) fn has_waited(&self, warp: u32, at: usize) -> bool {
        let group = self.hazards.filled.get(at / 4).map_or(NONE, |f| f.0);
        let oldest = self.hazards.oldest.get(warp as usize).copied().unwrap_or(NONE);
        group == NONE || oldest > group
    }

    /// Whether a barrier lies between the issue of the copy of warp `copier` that filled byte `at` and what `warp` does.
    pub(crate) fn knows_issue(&self, warp: u32, copier: u32, at: usize) -> bool {
        self.hazards.filled.get(at / 4).is_some_and(|f| self.clocks.knows(warp, copier, f.1))
    }

    fn early(&mut self, warp: u32, lane: u32, other: u32, reading: Option<u64>, at: usize, text: String) {
        let h = &self.hazards;
        let known = h.early.iter().any(|e| (e.pc, e.warp, e.other, e.reading) == (self.pc, warp, other, reading));
        if !known && h.early.len() < MAX_EARLY {
            let (clock, waited) = (self.clocks.clock(warp), reading.is_some() || self.has_waited(warp, at));
            let early = Early { warp, lane, clock, other, reading, waited, at, pc: self.pc, text };
            self.hazards.early.push(early);
        }
    }

    /// The wait of warp `other` for what was touched too early has come.
    fn judge(&mut self, over: impl Fn(&Early) -> bool) {
        let mut i = 0;
        while i < self.hazards.early.len() {
            if !over(&self.hazards.early[i]) {
                i += 1;
                continue;
            }
            let e = self.hazards.early.swap_remove(i);
            if !e.waited || self.clocks.knows(e.other, e.warp, e.clock) {
                self.too_early(e);
            } else {
                let text = format!("{}, without a barrier after the wait of warp {}", e.text, e.other);
                self.note_at(e.pc, FaultClass::DataRaceShared, e.warp, e.lane, text);
            }
        }
    }

    /// A copy of `warp` lands: what touched its target before can now be judged.
    pub(crate) fn landed(&mut self, warp: u32, at: usize, bytes: usize) {
        if !self.hazards.early.is_empty() {
            self.judge(|e| e.other == warp && e.reading.is_none() && e.at >= at && e.at < at + bytes);
        }
    }

    fn too_early(&mut self, e: Early) {
        let text = format!("{}, before the wait of warp {}", e.text, e.other);
        self.note_at(e.pc, FaultClass::AsyncCopyHazard, e.warp, e.lane, text);
    }

    /// The block has ended: touches of what nobody waited for.
    pub(crate) fn never_landed(&mut self) {
        for e in std::mem::take(&mut self.hazards.early) {
            self.too_early(e);
        }
    }

    /// A wait for an mbarrier that nobody has initialised: another warp may be about to. False when it has been
    /// patient enough.
    pub(crate) fn patient(&mut self) -> bool {
        self.hazards.missing += 1;
        self.hazards.missing < 100
    }

    fn reads(&mut self, warp: u32, lane: u32, pieces: Vec<u32>, results: Vec<u32>) {
        let chunks = self.shared.len().div_ceil(16);
        let h = &mut self.hazards;
        h.readers.resize(chunks, 0);
        for p in &pieces {
            let n = &mut h.readers[*p as usize];
            *n = n.saturating_add(1);
        }
        let clock = self.clocks.clock(warp);
        h.numbers += 1;
        let bytes = size_of::<Reading>() + 4 * (pieces.len() + results.len()) + 32;
        self.pending_bytes += bytes;
        h.readings.push(Reading { number: h.numbers, warp, lane, clock, group: NONE, pieces, results, bytes });
    }

    /// Ends the readings for which `done` holds; gives how many.
    fn finish(&mut self, done: impl Fn(&Reading) -> bool) -> u32 {
        let h = &mut self.hazards;
        let (mut kept, mut ended) = (Vec::with_capacity(h.readings.len()), Vec::new());
        for r in h.readings.drain(..) {
            if !done(&r) {
                kept.push(r);
                continue;
            }
            for p in &r.pieces {
                let n = &mut h.readers[*p as usize];
                *n = n.saturating_sub(1);
            }
            ended.push(r.number);
            self.pending_bytes -= r.bytes;
        }
        h.readings = kept;
        if !h.early.is_empty() {
            self.judge(|e| e.reading.is_some_and(|n| ended.contains(&n)));
        }
        ended.len() as u32
    }

    /// A bulk store by a thread has begun to read shared memory.
    pub(crate) fn store_reads(&mut self, warp: u32, lane: u32, at: usize, bytes: usize) {
        if self.l.options.sanitizer.async_copies && bytes > 0 {
            let pieces = (at / 16..(at + bytes).div_ceil(16)).map(|p| p as u32).collect();
            self.reads(warp, lane, pieces, Vec::new());
        }
    }

    pub(crate) fn bulk_commit(&mut self, warp: &mut Warp, active: u32) {
        for r in self.hazards.readings.iter_mut().filter(|r| r.warp == warp.id && r.lane != MANY && r.group == NONE) {
            if active >> r.lane & 1 != 0 {
                r.group = warp.bulk_groups[r.lane as usize];
            }
        }
        for lane in lanes(active) {
            warp.bulk_groups[lane as usize] += 1;
        }
    }

    /// Waits until at most `n` groups of each lane go on.
    pub(crate) fn bulk_wait(&mut self, warp: &mut Warp, active: u32, n: u32) {
        if self.hazards.readings.is_empty() {
            return;
        }
        let groups = warp.bulk_groups;
        self.finish(|r| {
            r.warp == warp.id
                && r.lane != MANY
                && active >> r.lane & 1 != 0
                && r.group != NONE
                && r.group + n < groups[r.lane as usize]
        });
    }

    /// A product of the warp has begun to read pieces of shared memory; its results will be in registers `d`.
    pub(crate) fn product_reads(&mut self, warp: &mut Warp, frame: u16, d: &[u32], mut pieces: Vec<u32>) {
        if self.l.options.sanitizer.async_copies {
            pieces.sort_unstable();
            pieces.dedup();
            let results = d.iter().map(|r| warp.line(frame, *r)).collect();
            self.reads(warp.id, MANY, pieces, results);
            warp.products += 1;
        }
    }

    pub(crate) fn product_commit(&mut self, warp: &mut Warp) {
        self.clocks.advance(warp.id);
        for r in self.hazards.readings.iter_mut().filter(|r| r.warp == warp.id && r.lane == MANY && r.group == NONE) {
            r.group = warp.product_groups;
        }
        warp.product_groups += 1;
    }

    pub(crate) fn product_wait(&mut self, warp: &mut Warp, n: u32) {
        self.clocks.advance(warp.id);
        if warp.products > 0 {
            let groups = warp.product_groups;
            let done = self.finish(|r| r.warp == warp.id && r.lane == MANY && r.group != NONE && r.group + n < groups);
            warp.products -= done;
        }
    }

    /// Bytes of shared memory are about to be written: nothing may still read them.
    pub(crate) fn overwritten(&mut self, warp: u32, lane: u32, at: usize, bytes: usize) {
        let pieces = at / 16..(at + bytes).div_ceil(16);
        if self.hazards.readers[pieces.clone()].iter().all(|n| *n == 0) {
            return;
        }
        // Without any order to the reading's issue it is a race, which is found elsewhere.
        let reading = self.hazards.readings.iter().find(|r| {
            r.pieces.iter().any(|p| pieces.contains(&(*p as usize)))
                && (r.warp == warp || self.clocks.knows(warp, r.warp, r.clock))
        });
        let Some(r) = reading else { return };
        let (who, wait) =
            if r.lane == MANY { ("wgmma", "wgmma.wait_group") } else { ("bulk store", "cp.async.bulk.wait_group") };
        let (other, number) = (r.warp, r.number);
        let text =
            format!("write of {bytes} bytes at {at:#x} of shared memory that a {who} of warp {other} may still read");
        if other == warp {
            self.note(FaultClass::AsyncCopyHazard, warp, lane, || format!("{text}: no {wait} between"));
        } else {
            self.early(warp, lane, other, Some(number), at, text);
        }
    }

    /// Looks at the operands of an instruction before it runs.
    #[cold]
    pub(crate) fn watch_operands(&mut self, warp: &mut Warp, frame: u16, inst: &Inst, active: u32) {
        if warp.checks_fences {
            self.note_written(warp, frame, inst, active);
        }
        if warp.products != 0 {
            self.unfinished_operands(warp, frame, inst);
        }
        if !warp.unwritten.is_empty() {
            self.unwritten_operands(warp, frame, inst, active);
        }
    }

    /// Follows values of local memory that nobody wrote. Copies and what puts bytes together hand them on, stores put
    /// them back; whatever computes with one is at fault.
    fn unwritten_operands(&mut self, warp: &mut Warp, frame: u16, inst: &Inst, active: u32) {
        let (mut used, mut set) = (Vec::new(), Vec::new());
        let known = |o: &&u32| **o != NONE;
        match &inst.kind {
            Kind::Access(x) => {
                used.push(x.address.reg);
                if !x.store {
                    set.extend(x.regs.iter().map(|r| r.0));
                } else if x.place == Place::Shared {
                    used.extend(x.regs.iter().map(|r| r.0));
                }
            }
            Kind::Atom(x) => {
                used.push(x.address.reg);
                used.extend(x.elements.iter().flat_map(|e| [e.1, e.2]));
                set.extend(x.elements.iter().map(|e| e.0));
            }
            Kind::Mma(m) => {
                used.extend(m.a.iter().chain(&m.b).chain(&m.c));
                set.extend(&m.d);
            }
            Kind::LdMatrix { regs, .. } => set.extend(regs.iter()),
            Kind::Wgmma(w) => used.extend(&w.a),
            Kind::Jump(_) | Kind::Call(_) | Kind::Ret | Kind::Exit | Kind::Bar(_) => {}
            _ => {
                used.extend([inst.a, inst.b, inst.c].iter().filter(known));
                set.push(inst.d);
            }
        }
        let line = |at: u32| warp.line(frame, at);
        let lanes_of = |list: &[u32]| {
            let of = |o: &u32| warp.unwritten.get(&line(*o)).copied().unwrap_or(0);
            list.iter().filter(known).map(of).fold(0, |a, b| a | b) & active
        };
        let lanes = lanes_of(&used);
        if lanes != 0 && !hands_on(self.l.program.text(self.pc), &inst.kind) {
            self.note(FaultClass::UninitialisedLocal, warp.id, lanes.trailing_zeros(), || {
                "uses a value of local memory that the thread did not write".into()
            });
        }
        let set: Vec<u32> = set.iter().filter(known).map(|o| line(*o)).collect();
        for register in set {
            let old = warp.unwritten.get(&register).copied().unwrap_or(0) & !active;
            let new = if matches!(inst.kind, Kind::Alu) { old | lanes } else { old };
            if new == 0 {
                warp.unwritten.remove(&register);
            } else {
                warp.unwritten.insert(register, new);
            }
        }
    }

    /// Whether an instruction touches results of products that have not been waited for. Compilers copy registers
    /// between a product and its wait: a copy is as unfinished as its source.
    fn unfinished_operands(&mut self, warp: &mut Warp, frame: u16, inst: &Inst) {
        let line = |at: u32| warp.line(frame, at);
        let mut used: Vec<u32> = Vec::new();
        match &inst.kind {
            Kind::Alu if self.l.program.text(self.pc).starts_with("mov") => {
                let to = line(inst.d);
                let from: Vec<u32> = [inst.a, inst.b].iter().filter(|o| **o != NONE).map(|o| line(*o)).collect();
                for r in self.hazards.readings.iter_mut().filter(|r| r.warp == warp.id && r.lane == MANY) {
                    let copied = r.results.iter().any(|l| from.contains(l));
                    r.results.retain(|l| *l != to);
                    if copied {
                        r.results.push(to);
                    }
                }
            }
            Kind::Alu | Kind::Shuffle { .. } | Kind::MovMatrix | Kind::Redux { .. } => {
                used.extend([inst.d, inst.a, inst.b, inst.c].iter().filter(|o| **o != NONE));
            }
            Kind::Access(x) => used.extend(x.regs.iter().map(|r| r.0).filter(|r| *r != NONE)),
            Kind::Atom(x) => used.extend(x.elements.iter().map(|e| e.1)),
            Kind::LdMatrix { regs, .. } | Kind::StMatrix { regs, .. } => used.extend(regs.iter()),
            Kind::Mma(m) => used.extend(m.a.iter().chain(&m.b).chain(&m.c).chain(&m.d)),
            // Products in a row may add to the same registers.
            Kind::Wgmma(w) => used.extend(&w.a),
            _ => {}
        }
        let mut of_products =
            self.hazards.readings.iter().filter(|r| r.warp == warp.id && r.lane == MANY).flat_map(|r| &r.results);
        if !used.is_empty() && of_products.any(|l| used.iter().any(|u| line(*u) == *l)) {
            self.note(FaultClass::AsyncCopyHazard, warp.id, warp.live.trailing_zeros(), || {
                "a register that a wgmma may still write: no wgmma.wait_group between".into()
            });
        }
    }
}

/// Instructions that only move bytes about.
fn hands_on(text: &str, kind: &Kind) -> bool {
    let moves = ["mov.", "prmt.", "and.", "or.", "shl.", "shr.", "bfi.", "bfe.", "selp.", "cvt.u", "cvt.s"];
    match kind {
        Kind::Alu => moves.iter().any(|m| text.starts_with(m)),
        _ => false,
    }
}
