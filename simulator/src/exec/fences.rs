//! Fences that PTX asks for around asynchronous work, and whose lack the simulator itself would not feel.
//!
//! `wgmma.fence` orders accesses to registers before products: it must come before the first product, and between a
//! write by any other instruction to an accumulator or a register of A and a product that uses it. Only products of
//! one shape may follow each other on an accumulator without it. Compilers move registers (zeros to begin with, too)
//! between the fence and the product, so a move only carries on what is known of its source.
//!
//! `fence.proxy.async` orders writes of shared memory by ordinary instructions (the generic proxy, `cp.async` too)
//! before reads by products and bulk copies (the asynchronous proxy). What bulk copies wrote needs none, nor do
//! operations on mbarriers.

use super::block::Block;
use super::race::Record;
use super::warp::Warp;
use crate::error::FaultClass;
use crate::program::{Inst, NONE, Wgmma};
use std::collections::HashMap;

/// How a register was last written since the warp's last `wgmma.fence`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    /// By an ordinary instruction, at this place.
    Ordinary(u32),
    /// As an accumulator of products of this shape: n, k.
    Accumulator(u32, u32),
}

/// Registers of products, by their line, written since the warp's last `wgmma.fence`.
#[derive(Default)]
pub(crate) struct ProductRegisters {
    written: HashMap<u32, Written>,
    /// There was a fence at all.
    fenced: bool,
}

impl ProductRegisters {
    pub(crate) fn clear(&mut self) {
        self.written.clear();
        self.fenced = false;
    }

    pub(crate) fn fence(&mut self) {
        self.written.clear();
        self.fenced = true;
    }
}

impl Block<'_> {
    /// Keeps which registers of products the instruction at `self.pc` writes, in the lanes of `active`.
    pub(crate) fn note_written(&mut self, warp: &mut Warp, frame: u16, inst: &Inst, active: u32) {
        let p = self.l.program;
        for line in &p.product_lines[self.pc as usize] {
            let line = warp.line(frame, line * 32);
            let how = match p.is_move(self.pc) && inst.a != NONE {
                true => [inst.a, inst.b]
                    .into_iter()
                    .filter(|source| *source != NONE)
                    .find_map(|source| warp.products_fenced.written.get(&warp.line(frame, source)).copied()),
                false => Some(Written::Ordinary(self.pc)),
            };
            if let Some(how) = how {
                warp.products_fenced.written.insert(line, how);
            } else if active == warp.live {
                warp.products_fenced.written.remove(&line);
            }
        }
    }

    /// A product is about to run: looks for a missing `wgmma.fence`.
    pub(crate) fn check_product_fence(&mut self, warp: &mut Warp, frame: u16, w: &Wgmma) {
        if !warp.checks_fences {
            return;
        }
        let lane = warp.live.trailing_zeros();
        if !warp.products_fenced.fenced {
            self.note(FaultClass::MissingFence, warp.id, lane, || {
                "the first wgmma.mma_async of the warp: no wgmma.fence before it".into()
            });
            warp.products_fenced.fenced = true;
        }
        let written = |r: &u32| warp.products_fenced.written.get(&warp.line(frame, *r)).copied();
        let shape = Written::Accumulator(w.n, w.k);
        let accumulator = w.d.iter().find_map(|r| written(r).filter(|u| *u != shape));
        let fragment = w.a.iter().find_map(written);
        for (found, name) in [(accumulator, "an accumulator"), (fragment, "a register of A")] {
            match found {
                Some(Written::Ordinary(pc)) => {
                    let line = self.l.program.line(pc);
                    self.note(FaultClass::MissingFence, warp.id, lane, || {
                        format!("{name} is written at line {line}: no wgmma.fence between")
                    });
                }
                Some(Written::Accumulator(n, k)) => self.note(FaultClass::MissingFence, warp.id, lane, || {
                    format!("{name} is that of a product of another shape, m64n{n}k{k}: no wgmma.fence between")
                }),
                None => {}
            }
        }
        for r in &w.d {
            warp.products_fenced.written.insert(warp.line(frame, *r), shape);
        }
    }

    /// The asynchronous proxy reads shared memory. Writes without any order before it are races, found elsewhere.
    pub(crate) fn async_proxy_reads(&mut self, warp: u32, lane: u32, at: usize, bytes: usize) {
        let uncovered = (at / 4..(at + bytes).div_ceil(4)).find_map(|word| {
            let r = Record::unpack(self.shadow[word][0])?;
            let known = r.warp == warp || self.clocks.knows(warp, r.warp, r.clock);
            let generic = r.warp != self.clocks.copier();
            (generic && known && !self.clocks.covered(warp, r.warp, r.clock)).then_some((word, r))
        });
        let Some((word, r)) = uncovered else { return };
        let line = self.l.program.line(r.pc);
        self.note(FaultClass::MissingFence, warp, lane, || {
            format!(
                "reads in the async proxy what warp {} wrote at line {line}, without a fence.proxy.async between: \
                 {:#x} of shared memory",
                r.warp,
                4 * word
            )
        });
    }
}
