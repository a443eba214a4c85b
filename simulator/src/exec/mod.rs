//! The executor: blocks over host threads, warps of a block in turn, lanes of a warp together.

mod access;
mod atomics;
mod barrier;
mod block;
mod bulk;
mod call;
mod coalesced;
mod collective;
mod copies;
mod fences;
mod global;
mod hazard;
mod matrix;
mod mbarrier;
mod race;
mod report;
mod run;
mod shared;
mod stats;
mod tensor;
mod traffic;
mod warp;
mod wgmma;

use crate::arch::{Arch, WARP};
use crate::counters::LaunchReport;
use crate::device::LaunchConfig;
use crate::error::{Fault, FaultClass};
use crate::memory::{Allocation, HostBytes, Memory};
use crate::options::Options;
use crate::program::Program;
use block::{Block, Outcome};
use race::SyncTable;
use report::Reports;
use stats::Stats;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// The launch has ended by a fatal report: everything unwinds.
pub(crate) struct Stop;
pub(crate) type Step<T = ()> = Result<T, Stop>;

/// What all blocks of a launch share.
pub(crate) struct Launch<'a> {
    pub options: &'a Options,
    pub arch: &'a Arch,
    pub program: &'a Program,
    pub config: &'a LaunchConfig,
    pub memory: &'a Memory,
    pub params: &'a [u8],
    /// Sorted by address.
    pub allocations: Vec<Arc<Allocation>>,
    /// Per allocation: records of the last accesses, made on the first.
    pub races: Vec<OnceLock<HostBytes>>,
    /// Per allocation: one byte per 32-byte sector, bit 0 read, bit 1 written.
    pub touched: Vec<OnceLock<HostBytes>>,
    pub threads: u32,
    pub warps: u32,
    pub shared_bytes: u32,
    /// Where dynamic shared memory starts.
    pub dynamic_at: u32,
    pub races_global: bool,
    pub sync: Mutex<SyncTable>,
    pub reports: Mutex<Reports>,
    pub stop: AtomicBool,
    pub unfinished: AtomicU64,
    /// Host memory that a warp needs without nested calls, and that blocks have come to need beyond [`block_bytes`].
    warp_bytes: u64,
    grown: AtomicU64,
    started: Instant,
    /// Milliseconds after the start when a block last did more than to wait, and turns in vain since then.
    last_work: AtomicU64,
    idle_turns: AtomicU64,
}

/// Turns in vain (of all blocks together), and (where other blocks could still be at work on other threads) the time,
/// after which waiting has no end.
const IDLE_TURNS: u64 = 20_000;
const IDLE_MILLISECONDS: u64 = 2000;

impl Launch<'_> {
    /// A block did something besides waiting.
    pub(crate) fn worked(&self) {
        self.idle_turns.store(0, Ordering::Relaxed);
        self.last_work.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// A block waited once more: whether nobody has done anything else for so long that nobody will.
    pub(crate) fn is_idle(&self) -> bool {
        let unfinished = self.unfinished.load(Ordering::Relaxed);
        let turns = self.idle_turns.fetch_add(1, Ordering::Relaxed);
        let now = self.started.elapsed().as_millis() as u64;
        let long = now.saturating_sub(self.last_work.load(Ordering::Relaxed)) > IDLE_MILLISECONDS;
        turns > IDLE_TURNS.max(16 * unfinished.min(RESIDENT)) && (long || unfinished == 1)
    }

    /// A block needs more host memory. False: that is too much for all blocks together.
    pub(crate) fn grow(&self, bytes: u64) -> bool {
        self.grown.fetch_add(bytes, Ordering::Relaxed) + bytes <= BLOCK_MEMORY
    }

    /// A block with so much more is gone.
    pub(crate) fn shrink(&self, bytes: u64) {
        self.grown.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(crate) fn sync(&self) -> MutexGuard<'_, SyncTable> {
        self.sync.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The allocation that holds `address`, by index.
    pub(crate) fn find(&self, address: u64) -> Option<usize> {
        let after = self.allocations.partition_point(|a| a.base <= address);
        let i = after.checked_sub(1)?;
        (address < self.allocations[i].end()).then_some(i)
    }

    pub(crate) fn block_index(&self, linear: u64) -> [u32; 3] {
        let [x, y, _] = self.config.grid.map(u64::from);
        [(linear % x) as u32, (linear / x % y) as u32, (linear / x / y) as u32]
    }

    pub(crate) fn thread_index(&self, thread: u32) -> [u32; 3] {
        let [x, y, _] = self.config.block;
        [thread % x, thread / x % y, thread / x / y]
    }
}

/// Mixes a number: for seeds.
pub(crate) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A permutation of `0..n` by a seed: repeated half-round mixing of the index (a Feistel network, cycle-walked).
fn permute(i: u64, n: u64, seed: u64) -> u64 {
    let bits = (64 - (n.max(2) - 1).leading_zeros()).div_ceil(2);
    let low = (1u64 << bits) - 1;
    let mut x = i;
    loop {
        let (mut l, mut r) = (x >> bits, x & low);
        for round in 0..4u64 {
            (l, r) = (r, l ^ (mix(r ^ seed ^ round << 56) & low));
        }
        x = l << bits | r;
        if x < n {
            return x;
        }
    }
}

/// Blocks that wait for others are put aside; at most this many exist at once.
const RESIDENT: u64 = 4096;
/// Most host memory for the blocks that exist at once, and as much again for what they grow by.
const BLOCK_MEMORY: u64 = 4 << 30;

/// Host memory that a warp needs as long as calls do not nest: registers, and local memory with its shadow.
fn warp_bytes(program: &Program) -> u64 {
    let registers: u64 = program.funcs.iter().map(|f| u64::from(f.frame_words) * 4).max().unwrap_or(0);
    registers + u64::from(program.local_bytes.next_power_of_two()) * 64
}

/// Host memory that a block needs, roughly: its warps, and shared memory with its shadows.
fn block_bytes(warp: u64, warps: u32, shared: u32) -> u64 {
    u64::from(warps) * warp + u64::from(shared) * 10 + 4096
}

pub(crate) fn launch(
    arch: &Arch,
    options: &Options,
    memory: &Memory,
    program: &Program,
    config: &LaunchConfig,
    params: &[u8],
) -> Result<LaunchReport, Fault> {
    let threads: u32 = config.block.iter().product();
    let blocks: u64 = config.grid.iter().map(|&g| u64::from(g)).product();
    let dynamic_at = program.static_shared.next_multiple_of(program.dynamic_align);
    let allocations = memory.all();
    let maps = || allocations.iter().map(|_| OnceLock::new()).collect::<Vec<_>>();
    let (races, touched) = (maps(), maps());
    let l = Launch {
        options,
        arch,
        program,
        config,
        memory,
        params,
        allocations,
        races,
        touched,
        threads,
        warps: threads.div_ceil(WARP),
        shared_bytes: if config.dynamic_shared > 0 {
            dynamic_at + config.dynamic_shared
        } else {
            program.static_shared
        },
        dynamic_at,
        races_global: options.sanitizer.races_global && blocks > 1 && blocks < race::MAX_BLOCKS,
        sync: Mutex::new(SyncTable::default()),
        reports: Mutex::new(Reports::new(options.max_reports)),
        stop: AtomicBool::new(false),
        unfinished: AtomicU64::new(blocks),
        warp_bytes: warp_bytes(program),
        grown: AtomicU64::new(0),
        started: Instant::now(),
        last_work: AtomicU64::new(0),
        idle_turns: AtomicU64::new(0),
    };
    let each = block_bytes(l.warp_bytes, l.warps, l.shared_bytes);
    let resident = (BLOCK_MEMORY / each).min(RESIDENT);
    if resident == 0 {
        return Err(Fault::refused(2, format!("kernel {}: a block needs {each} bytes of host memory", program.name)));
    }
    let workers = match options.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    };
    let workers = workers.min(usize::try_from(blocks.min(resident)).unwrap_or(usize::MAX)).max(1);
    let next = AtomicU64::new(0);
    let parked: Mutex<VecDeque<Box<Block<'_>>>> = Mutex::new(VecDeque::new());
    let total = Mutex::new(Stats::new(program.code.len()));
    let work = || worker(&l, blocks, resident as usize, &next, &parked, &total);
    if workers == 1 {
        work();
    } else {
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(work);
            }
        });
    }
    let stats = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    let reports = std::mem::replace(&mut *l.reports.lock().unwrap_or_else(PoisonError::into_inner), Reports::new(0));
    match reports.fault(&l) {
        Some(fault) => Err(fault),
        None => Ok(stats.report(&l)),
    }
}

fn worker<'a>(
    l: &'a Launch<'a>,
    blocks: u64,
    resident: usize,
    next: &AtomicU64,
    parked: &Mutex<VecDeque<Box<Block<'a>>>>,
    total: &Mutex<Stats>,
) {
    let mut stats = Stats::new(l.program.code.len());
    let mut spare: Option<Box<Block<'a>>> = None;
    let queue = || parked.lock().unwrap_or_else(PoisonError::into_inner);
    // Parked blocks wait for others, so new ones come first, up to a limit.
    while !l.stop.load(Ordering::Relaxed) && l.unfinished.load(Ordering::Acquire) > 0 {
        // Those that have grown should end before others begin to grow, unless they all wait for others.
        let parked = queue().len();
        let all_wait = l.idle_turns.load(Ordering::Relaxed) > 2 * parked as u64;
        let small = l.grown.load(Ordering::Relaxed) < BLOCK_MEMORY / 2;
        let fresh = parked == 0 || parked < resident && (small || all_wait);
        let started = if fresh { next.fetch_add(1, Ordering::Relaxed) } else { blocks };
        let mut block = if started < blocks {
            let index = l.options.seed.map_or(started, |s| permute(started, blocks, s));
            match spare.take() {
                Some(mut b) => {
                    b.start(index);
                    b
                }
                None => Box::new(Block::new(l, index)),
            }
        } else {
            match queue().pop_front() {
                Some(b) => b,
                None => {
                    std::thread::yield_now();
                    continue;
                }
            }
        };
        // A panic is a fault of the simulator: it must not take the host down.
        let ran = catch_unwind(AssertUnwindSafe(|| block.run(&mut stats))).unwrap_or_else(|_| {
            block.note(FaultClass::Trap, 0, 0, || "the simulator itself failed here; please report this kernel".into());
            Err(Stop)
        });
        match ran {
            Ok(Outcome::Done) => {
                l.unfinished.fetch_sub(1, Ordering::Release);
                l.worked();
                spare = Some(block);
            }
            Ok(Outcome::Waiting | Outcome::Spinning) => queue().push_back(block),
            Err(Stop) => l.stop.store(true, Ordering::Relaxed),
        }
    }
    total.lock().unwrap_or_else(PoisonError::into_inner).add(&stats);
}
