//! Counters of memory traffic: sectors of global memory, wavefronts of shared memory.

use super::access::{Where, resolve};
use super::block::{Block, lanes};
use crate::memory::HostBytes;
use crate::program::Place;
use std::sync::atomic::Ordering::Relaxed;

impl Block<'_> {
    /// Counts sectors and wavefronts of one request.
    pub(crate) fn count(&mut self, place: Place, addresses: &[u64; 32], active: u32, size: u32, write: bool) {
        let Some(first) = lanes(active).next() else {
            return;
        };
        match resolve(place, addresses[first as usize]) {
            Where::Global(_) => {
                let mut sectors = Vec::with_capacity(64);
                let mut distinct: Vec<u64> = lanes(active).map(|l| addresses[l as usize]).collect();
                distinct.sort_unstable();
                distinct.dedup();
                for a in &distinct {
                    for s in a >> 5..=a.saturating_add(u64::from(size) - 1) >> 5 {
                        sectors.push(s);
                    }
                }
                sectors.dedup();
                for s in &sectors {
                    if let Some(i) = self.l.find(s << 5).or_else(|| self.l.find((s << 5) + 31)) {
                        let alloc = &self.l.allocations[i];
                        let map = self.l.touched[i].get_or_init(|| {
                            HostBytes::zeroed(alloc.bytes.div_ceil(32) as usize + 8).unwrap_or_else(empty)
                        });
                        let at = ((s << 5).saturating_sub(alloc.base) / 32) as usize;
                        let flag = if write { 2 } else { 1 };
                        if at < map.len() && map.a8(at).load(Relaxed) & flag == 0 {
                            map.a8(at).fetch_or(flag, Relaxed);
                        }
                    }
                }
                let t = &mut self.stats.traffic[self.pc as usize];
                t.requests += 1;
                t.sectors += sectors.len() as u64;
                t.needed += (distinct.len() as u64 * u64::from(size)).div_ceil(32);
            }
            Where::Shared(_) => {
                let list: Vec<u64> = lanes(active).map(|l| addresses[l as usize]).collect();
                self.count_shared(&list, size);
            }
            Where::Local(_) => {
                self.stats.traffic[self.pc as usize].local_bytes += u64::from(active.count_ones() * size);
            }
            Where::Param(_) => {}
        }
    }

    /// Wavefronts of shared accesses: lanes in groups of 128 bytes, each bank one word at a time.
    pub(crate) fn count_shared(&mut self, addresses: &[u64], size: u32) {
        let group = (128 / size.max(4)).clamp(1, 32) as usize;
        let (mut wavefronts, mut least) = (0, 0);
        for part in addresses.chunks(group) {
            let mut words: Vec<u64> =
                part.iter().flat_map(|a| a / 4..=a.saturating_add(u64::from(size) - 1) / 4).collect();
            words.sort_unstable();
            words.dedup();
            let mut banks = [0u64; 32];
            words.iter().for_each(|w| banks[(w % 32) as usize] += 1);
            wavefronts += banks.iter().max().copied().unwrap_or(0);
            least += (words.len() as u64).div_ceil(32);
        }
        let t = &mut self.stats.traffic[self.pc as usize];
        t.wavefronts += wavefronts;
        t.least += least;
    }
}

/// Stands in where the host has no room for a map.
pub(super) fn empty() -> HostBytes {
    HostBytes::zeroed(0).unwrap_or_else(|| std::process::abort())
}
