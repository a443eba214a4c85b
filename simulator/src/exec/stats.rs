//! Counts per instruction, kept by each worker and summed at the end.

use super::Launch;
use crate::counters::{Counters, LaunchReport, LineConflict};
use crate::program::{Class, Kind};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

/// Memory traffic of one instruction.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Traffic {
    pub requests: u64,
    pub sectors: u64,
    pub needed: u64,
    pub wavefronts: u64,
    pub least: u64,
    pub local_bytes: u64,
}

#[derive(Default)]
pub(crate) struct Stats {
    /// Warp instructions and active lanes by program counter.
    pub counts: Vec<(u64, u64)>,
    pub traffic: Vec<Traffic>,
}

impl Stats {
    pub(crate) fn new(instructions: usize) -> Stats {
        Stats { counts: vec![(0, 0); instructions], traffic: vec![Traffic::default(); instructions] }
    }

    pub(crate) fn add(&mut self, other: &Stats) {
        for (a, b) in self.counts.iter_mut().zip(&other.counts) {
            a.0 += b.0;
            a.1 += b.1;
        }
        for (a, b) in self.traffic.iter_mut().zip(&other.traffic) {
            a.requests += b.requests;
            a.sectors += b.sectors;
            a.needed += b.needed;
            a.wavefronts += b.wavefronts;
            a.least += b.least;
            a.local_bytes += b.local_bytes;
        }
    }

    pub(crate) fn report(&self, l: &Launch<'_>) -> LaunchReport {
        let p = l.program;
        let mut c = Counters::default();
        let mut lines: BTreeMap<u32, LineConflict> = BTreeMap::new();
        for (pc, ((n, lanes), t)) in self.counts.iter().zip(&self.traffic).enumerate() {
            let source = p.source[pc];
            if source.class != Class::Part && *n > 0 {
                c.warp_instructions += n;
                c.lane_instructions += lanes;
                *c.by_class.entry(source.class.name().to_owned()).or_default() += n;
                c.float_flops += lanes * u64::from(source.flops);
            }
            match &p.code[pc].kind {
                Kind::Mma(m) => {
                    *c.matrix_flops.entry(m.a_ty.kind(m.d_ty).to_owned()).or_default() +=
                        n * 2 * u64::from(m.m * m.n * m.k)
                }
                // Each of the four warps of a group does 16 of the 64 rows.
                Kind::Wgmma(w) => {
                    *c.matrix_flops.entry(w.a_ty.kind(w.d_ty).to_owned()).or_default() +=
                        n * 2 * u64::from(16 * w.n * w.k)
                }
                Kind::Bar(_) | Kind::Mbar(_) => c.barriers += n,
                Kind::Atom(_) => c.atomics += n,
                _ => {}
            }
            c.global_requests += t.requests;
            c.global_sectors += t.sectors;
            c.global_sectors_needed += t.needed;
            c.shared_wavefronts += t.wavefronts;
            c.shared_wavefronts_least += t.least;
            c.local_bytes += t.local_bytes;
            if t.wavefronts > t.least {
                let text = p.text(pc as u32).to_owned();
                let e = lines.entry(source.line).or_insert(LineConflict {
                    line: source.line,
                    text,
                    wavefronts: 0,
                    least: 0,
                });
                e.wavefronts += t.wavefronts;
                e.least += t.least;
            }
        }
        for (a, map) in l.allocations.iter().zip(&l.touched) {
            if let Some(map) = map.get() {
                for i in 0..a.bytes.div_ceil(32) as usize {
                    let flags = map.a8(i).load(Relaxed);
                    c.dram_bytes_read += u64::from(flags & 1) * 32;
                    c.dram_bytes_written += u64::from(flags >> 1 & 1) * 32;
                }
            }
        }
        c.conflicts = lines.into_values().collect();
        c.conflicts.sort_by_key(|x| std::cmp::Reverse(x.wavefronts - x.least));
        let registers = l.config.registers.unwrap_or(p.registers);
        let (blocks, limit) = l.arch.occupancy(l.threads, registers, l.shared_bytes);
        let estimate = c.estimate(l.arch);
        LaunchReport {
            kernel: p.name.clone(),
            grid: l.config.grid,
            block: l.config.block,
            shared_bytes: l.shared_bytes,
            registers,
            registers_from_assembler: l.config.registers.is_some(),
            occupancy_blocks: blocks,
            occupancy_limit: limit.to_owned(),
            occupancy: f64::from(blocks * l.warps * 32) / f64::from(l.arch.threads_per_sm),
            counters: c,
            estimate,
        }
    }
}
