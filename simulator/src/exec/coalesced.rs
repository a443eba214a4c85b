//! The most common access to global memory, in one go: all 32 lanes, each beside the one before, in one allocation. What
//! is not plain here, such as memory that another block has touched, is left to the way of single lanes.

use super::access::{put, take};
use super::block::Block;
use super::global::race_map;
use super::race::Global;
use super::warp::Warp;
use crate::program::{Access, NONE};
use std::sync::atomic::Ordering::Relaxed;

/// Every byte of a word was written.
const WRITTEN: u32 = 0x0101_0101;
/// Most words of an access: 32 bytes a lane.
const MOST: usize = 256;

impl Block<'_> {
    /// Does a plain access of all lanes if they lie side by side from `a` on. False: the access is still to be done.
    pub(crate) fn coalesced(&mut self, warp: &mut Warp, frame: u16, a: u64, size: u32, x: &Access) -> bool {
        match 8 * size as usize {
            n @ ..=32 => self.coalesced_words(warp, frame, a, size, x, &mut [0; 32][..n]),
            n => self.coalesced_words(warp, frame, a, size, x, &mut [0; MOST][..n]),
        }
    }

    /// As `coalesced`, with room for the words of the access, zeros.
    #[inline(always)]
    fn coalesced_words(
        &mut self,
        warp: &mut Warp,
        frame: u16,
        a: u64,
        size: u32,
        x: &Access,
        words: &mut [u32],
    ) -> bool {
        let l = self.l;
        let bytes = 32 * u64::from(size);
        let inside = |i: usize| {
            let alloc = l.allocations.get(i)?;
            let offset = a.wrapping_sub(alloc.base);
            (offset < alloc.bytes && alloc.bytes - offset >= bytes).then_some(offset as usize)
        };
        let Some((index, offset)) =
            [Some(warp.hint), l.find(a)].into_iter().flatten().find_map(|i| inside(i).map(|o| (i, o)))
        else {
            return false;
        };
        let alloc = &l.allocations[index];
        if offset & 3 != 0 || a & u64::from(size - 1) != 0 || (x.store && alloc.constant) {
            return false;
        }
        warp.hint = index;
        let n = words.len();
        let data = alloc.data.words(offset, n);
        let valid = alloc.valid.as_ref().map(|v| v.words(offset, n));
        if x.store {
            if !warp.unwritten.is_empty() {
                return false;
            }
            gather(warp, frame, x, words);
            if l.races_global && !self.record_words(warp.id, index, offset, n, true) {
                return false;
            }
            data.iter().zip(words.iter()).for_each(|(d, w)| d.store(*w, Relaxed));
            for v in valid.into_iter().flatten() {
                if v.load(Relaxed) != WRITTEN {
                    v.store(WRITTEN, Relaxed);
                }
            }
            return true;
        }
        if valid.is_some_and(|v| v.iter().any(|v| v.load(Relaxed) != WRITTEN)) {
            return false;
        }
        if l.races_global && !alloc.constant && !self.record_words(warp.id, index, offset, n, false) {
            return false;
        }
        words.iter_mut().zip(data).for_each(|(w, d)| *w = d.load(Relaxed));
        scatter(warp, frame, x, words);
        true
    }

    /// As `global_record` for `n` words that this warp alone accesses whole, where only its block has been. False: another
    /// block has touched one of them, and what is recorded so far will be so again.
    fn record_words(&mut self, warp: u32, index: usize, offset: usize, n: usize, write: bool) -> bool {
        let l = self.l;
        let Some(map) = race_map(&l.races[index], (l.allocations[index].bytes as usize).div_ceil(4)) else {
            return true;
        };
        let clock = self.clocks.clock(warp);
        let me = Global { block: self.index as u32, warp, clock, bytes: 15, strong: false }.pack();
        // Nobody's, or this block's.
        let own = |record: u64| record == 0 || Global::same_block(record, me);
        for cell in map.double_words(6 * offset, 3 * n).chunks_exact(3) {
            let [written, read, read_too] = [&cell[0], &cell[1], &cell[2]];
            let quick = match write {
                false => own(written.load(Relaxed)),
                true => [written, read, read_too].into_iter().all(|c| own(c.load(Relaxed))),
            };
            if !quick {
                return false;
            }
            let slot = match write {
                true => written,
                false if own(read.load(Relaxed)) => read,
                false => read_too,
            };
            if slot.load(Relaxed) != me {
                slot.store(me, Relaxed);
            }
        }
        true
    }
}

/// The words that a store writes, from the registers of all lanes.
fn gather(warp: &Warp, frame: u16, x: &Access, words: &mut [u32]) {
    let per = x.regs.len();
    for (k, (reg, width)) in x.regs.iter().enumerate() {
        if x.bytes == 4 && *width == 1 {
            let values = warp.lane_values(frame, *reg);
            (0..32).for_each(|lane| words[lane * per + k] = values[lane]);
            continue;
        }
        for lane in 0..32 {
            let v = take(warp, frame, lane as u32, *reg, *width);
            let at = (lane * per + k) * x.bytes as usize;
            match x.bytes {
                8 => (words[at / 4], words[at / 4 + 1]) = (v as u32, (v >> 32) as u32),
                4 => words[at / 4] = v as u32,
                n => words[at / 4] |= (v as u32 & ((1 << (8 * n)) - 1)) << (8 * (at % 4)),
            }
        }
    }
}

/// Puts the words that a load read into the registers of all lanes.
fn scatter(warp: &mut Warp, frame: u16, x: &Access, words: &[u32]) {
    let per = x.regs.len();
    for (k, (reg, width)) in x.regs.iter().enumerate() {
        if x.bytes == 4 && *width == 1 && *reg != NONE {
            let values = std::array::from_fn(|lane| words[lane * per + k]);
            warp.set_lanes(frame, *reg, &values, u32::MAX);
            continue;
        }
        for lane in 0..32 {
            let at = (lane * per + k) * x.bytes as usize;
            let v = match x.bytes {
                8 => u64::from(words[at / 4]) | u64::from(words[at / 4 + 1]) << 32,
                4 => words[at / 4].into(),
                n => (words[at / 4] >> (8 * (at % 4)) & ((1 << (8 * n)) - 1)).into(),
            };
            put(warp, frame, lane as u32, *reg, *width, v, x);
        }
    }
}
