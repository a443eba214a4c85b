//! Who touched which bytes last, and what each warp knows of the others.
//!
//! Every warp has a clock that advances when it synchronises. A record of an access holds the warp and its clock; a
//! later access is ordered after it if the later warp has learnt of that clock, through a barrier, an mbarrier, or a
//! release and acquire. Within a warp, lanes are ordered by the warp's synchronising instructions.

use std::collections::HashMap;

/// More blocks than this are not checked for global races.
pub(crate) const MAX_BLOCKS: u64 = (1 << 28) - 2;
/// Lane of a record that stands for several lanes.
pub(crate) const MANY: u32 = 63;

/// The last write of four bytes and two reads: one that others did not know of when they read, and the last of the others.
pub(crate) type Shadow = [u64; 3];

/// A record of shared memory: valid, warp 6, lane 6, clock 26, bytes 4, atomic 1, pc 20 bits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Record {
    pub warp: u32,
    pub lane: u32,
    pub clock: u32,
    pub bytes: u32,
    pub atomic: bool,
    pub pc: u32,
}

impl Record {
    pub(crate) fn pack(self) -> u64 {
        1 << 63
            | u64::from(self.warp & 63) << 57
            | u64::from(self.lane & 63) << 51
            | u64::from(self.clock & 0x3ff_ffff) << 25
            | u64::from(self.bytes & 15) << 21
            | u64::from(self.atomic) << 20
            | u64::from(self.pc & 0xf_ffff)
    }

    pub(crate) fn unpack(x: u64) -> Option<Record> {
        (x >> 63 != 0).then_some(Record {
            warp: (x >> 57 & 63) as u32,
            lane: (x >> 51 & 63) as u32,
            clock: (x >> 25 & 0x3ff_ffff) as u32,
            bytes: (x >> 21 & 15) as u32,
            atomic: x >> 20 & 1 != 0,
            pc: (x & 0xf_ffff) as u32,
        })
    }
}

/// Which lane touched which byte, for words whose record stands for several lanes: neighbours in a word are no race.
/// Empty until something narrower than a word is touched.
#[derive(Default)]
pub(crate) struct Parts(Vec<[[u8; 4]; 3]>);

/// No lane yet.
const NOBODY: u8 = 255;

impl Parts {
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Record `k` of a word was written for some of its bytes; `merged` says that it goes on.
    #[inline(always)]
    pub(crate) fn note(&mut self, word: usize, k: usize, bytes: u32, lane: u32, merged: bool) {
        if bytes != 15 || !self.0.is_empty() {
            self.set(word, k, bytes, lane, merged);
        }
    }

    fn set(&mut self, word: usize, k: usize, bytes: u32, lane: u32, merged: bool) {
        if self.0.len() <= word {
            self.0.resize(word + 1, [[NOBODY; 4]; 3]);
        }
        let part = &mut self.0[word][k];
        if !merged {
            *part = [NOBODY; 4];
        }
        for (_, p) in part.iter_mut().enumerate().filter(|(b, _)| bytes >> b & 1 != 0) {
            *p = if *p == NOBODY || *p == lane as u8 { lane as u8 } else { MANY as u8 };
        }
    }

    /// Whether record `k` knows of nobody but `lane` at these bytes.
    pub(crate) fn only(&self, word: usize, k: usize, bytes: u32, lane: u32) -> bool {
        let part = self.0.get(word).map_or([NOBODY; 4], |p| p[k]);
        (0..4).all(|b| bytes >> b & 1 == 0 || part[b] == lane as u8)
    }
}

/// What warps bring to a barrier.
#[derive(Default)]
pub(crate) struct Known {
    row: Vec<u32>,
    acquired: u64,
    fenced: Fenced,
}

/// What a warp knew at its last fence, of the scope of the block or wider, and of those that are wider; nothing before its first.
type Fenced = [Option<Box<[u32]>>; 2];

/// Most addresses of strong reads that a warp remembers: after more it may have read any.
pub(crate) const MAX_PENDING: usize = 64;

/// What the warps of one block know of each other.
#[derive(Default)]
pub(crate) struct Clocks {
    /// Entries of a row: the warps, and one for copies that land by themselves when the phase of a mbarrier ends.
    n: usize,
    /// Entries of a row in `rows`: `n`, or twice that with what fences of the proxies cover.
    stride: usize,
    /// `rows[w * stride + v]`: the last clock of `v` that `w` knows; its own is the last that it finished. Entry
    /// `n + v`: the last clock of `v` with a fence between the proxies on its way to `w`. Whoever learns a row learns
    /// both.
    rows: Vec<u32>,
    /// What fences of `w` made publishable.
    fenced: Vec<Fenced>,
    /// Releases of other blocks up to this time are known to `w`.
    pub acquired: Vec<u64>,
    /// Addresses that `w` read strongly since its last fence.
    pub pending: Vec<Vec<u64>>,
}

impl Clocks {
    pub(crate) fn start(&mut self, n: usize, proxies: bool) {
        self.n = n + 1;
        self.stride = if proxies { 2 * self.n } else { self.n };
        self.rows.clear();
        self.rows.resize(self.n * self.stride, 0);
        self.fenced.clear();
        self.fenced.resize(n, [None, None]);
        self.acquired.clear();
        self.acquired.resize(n, 0);
        self.pending.clear();
        self.pending.resize(n, Vec::new());
    }

    /// The number that stands for copies which land by themselves.
    pub(crate) fn copier(&self) -> u32 {
        self.n as u32 - 1
    }

    /// Whether `w` has learnt of the access that `v` made at `clock`.
    pub(crate) fn knows(&self, w: u32, v: u32, clock: u32) -> bool {
        clock <= self.row(w)[v as usize]
    }

    pub(crate) fn row(&self, w: u32) -> &[u32] {
        &self.rows[w as usize * self.stride..(w as usize + 1) * self.stride]
    }

    /// The clock of accesses that `w` makes now.
    #[inline(always)]
    pub(crate) fn clock(&self, w: u32) -> u32 {
        self.rows[w as usize * self.stride + w as usize] + 1
    }

    /// Ends the current interval of `w`.
    pub(crate) fn advance(&mut self, w: u32) {
        self.rows[w as usize * self.stride + w as usize] += 1;
    }

    #[inline(always)]
    pub(crate) fn ordered(&self, r: Record, w: u32, lane: u32) -> bool {
        if r.warp == w {
            return r.lane == lane || r.clock < self.clock(w);
        }
        self.knows(w, r.warp, r.clock)
    }

    /// `w` learns what `row` says.
    pub(crate) fn learn(&mut self, w: u32, row: &[u32]) {
        let own = &mut self.rows[w as usize * self.stride..(w as usize + 1) * self.stride];
        for (a, b) in own.iter_mut().zip(row) {
            *a = (*a).max(*b);
        }
    }

    /// `w` learns of the releases of other blocks up to `time`.
    pub(crate) fn acquire(&mut self, w: u32, time: u64) {
        let known = &mut self.acquired[w as usize];
        *known = (*known).max(time);
    }

    /// `w` arrives at a barrier: ends its interval, and adds what it knows until now.
    pub(crate) fn bring(&mut self, w: u32, known: &mut Known) {
        self.advance(w);
        known.row.resize(self.stride, 0);
        for (a, b) in known.row.iter_mut().zip(self.row(w)) {
            *a = (*a).max(*b);
        }
        known.acquired = known.acquired.max(self.acquired[w as usize]);
        for (known, f) in known.fenced.iter_mut().zip(&self.fenced[w as usize]) {
            if let Some(f) = f {
                let sum = known.get_or_insert_with(|| vec![0; f.len()].into());
                sum.iter_mut().zip(f).for_each(|(a, b)| *a = (*a).max(*b));
            }
        }
    }

    /// A barrier at which the given warps wait; `known` is what others brought that went on.
    pub(crate) fn join(&mut self, warps: &[u32], mut known: Known) {
        for &w in warps {
            self.bring(w, &mut known);
        }
        for &w in warps {
            self.learn(w, &known.row);
            self.acquired[w as usize] = known.acquired;
            self.fenced[w as usize].clone_from(&known.fenced);
        }
    }

    /// A fence: what `w` knows becomes publishable within the block, and beyond it if it is `wide`. Ends its interval.
    pub(crate) fn fence(&mut self, w: u32, wide: bool) {
        self.advance(w);
        let known: Box<[u32]> = self.row(w).into();
        let [block, beyond] = &mut self.fenced[w as usize];
        if wide {
            *beyond = Some(known.clone());
        }
        *block = Some(known);
    }

    /// A fence between the proxies: covers what `w` did and knows. It may be anywhere between the write and the
    /// asynchronous read, by the writer, by the reader, or by a warp that passes the knowledge on.
    pub(crate) fn proxy_fence(&mut self, w: u32) {
        if self.stride > self.n {
            self.advance(w);
            let (known, covered) = {
                let n = self.n;
                self.rows[w as usize * self.stride..(w as usize + 1) * self.stride].split_at_mut(n)
            };
            covered.copy_from_slice(known);
        }
    }

    /// Whether a fence between the proxies lies between the access that `v` made at `clock` and `w`.
    pub(crate) fn covered(&self, w: u32, v: u32, clock: u32) -> bool {
        clock <= self.row(w)[self.n + v as usize]
    }

    /// What `w` may publish within the block, or beyond it.
    pub(crate) fn fenced(&self, w: u32, wide: bool) -> Option<Box<[u32]>> {
        self.fenced[w as usize][usize::from(wide)].clone()
    }
}

/// Time of a release, and the clocks of the block's warps that it covers.
type Release = (u64, Box<[u32]>);

/// Releases of all blocks. Times order them: who acquires one knows every earlier one, which is more than the memory
/// model promises, so correct code is never accused.
#[derive(Default)]
pub(crate) struct SyncTable {
    time: u64,
    /// Time of the last release at an address.
    places: HashMap<u64, u64>,
    /// Per block: what was known at which time.
    log: HashMap<u32, Vec<Release>>,
}

impl SyncTable {
    pub(crate) fn release(&mut self, block: u32, address: u64, row: &[u32]) {
        self.time += 1;
        self.places.insert(address, self.time);
        let log = self.log.entry(block).or_default();
        if log.last().is_none_or(|(_, last)| last.as_ref() != row) {
            log.push((self.time, row.into()));
        }
    }

    /// The time of the last release anywhere.
    pub(crate) fn now(&self) -> u64 {
        self.time
    }

    pub(crate) fn acquire(&self, address: u64) -> u64 {
        self.places.get(&address).copied().unwrap_or(0)
    }

    /// Whether the access of a warp at a clock was released up to `time`.
    pub(crate) fn known(&self, block: u32, warp: u32, clock: u32, time: u64) -> bool {
        let Some(log) = self.log.get(&block) else {
            return false;
        };
        log[..log.partition_point(|(t, _)| *t <= time)]
            .iter()
            .any(|(_, row)| row.get(warp as usize).is_some_and(|c| *c >= clock))
    }
}

/// A record of global memory: block + 1 in 28 bits, warp 5, clock 26, bytes 4, strong 1.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Global {
    pub block: u32,
    pub warp: u32,
    pub clock: u32,
    pub bytes: u32,
    pub strong: bool,
}

impl Global {
    pub(crate) fn pack(self) -> u64 {
        u64::from(self.block + 1) << 36
            | u64::from(self.warp & 31) << 31
            | u64::from(self.clock & 0x3ff_ffff) << 5
            | u64::from(self.bytes & 15) << 1
            | u64::from(self.strong)
    }

    /// Whether two packed records are of the same block.
    pub(crate) fn same_block(a: u64, b: u64) -> bool {
        a >> 36 == b >> 36
    }

    pub(crate) fn unpack(x: u64) -> Option<Global> {
        (x >> 36 != 0).then(|| Global {
            block: (x >> 36) as u32 - 1,
            warp: (x >> 31 & 31) as u32,
            clock: (x >> 5 & 0x3ff_ffff) as u32,
            bytes: (x >> 1 & 15) as u32,
            strong: x & 1 != 0,
        })
    }
}
