//! A warp: 32 lanes with their own program counters, the frames of their functions, their local memory.

use super::Launch;
use super::fences::ProductRegisters;
use crate::program::{FuncInfo, NONE, Special};
use std::collections::HashMap;

/// 32 registers' worth of words, aligned for vector code.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
pub(crate) struct Line([u32; 32]);

/// An activation of a function by some lanes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    pub func: u32,
    /// Words before this frame, a multiple of 32.
    pub base: u32,
    pub local_base: u32,
    /// Frame of the caller, and the call instruction.
    pub parent: u16,
    pub call: u32,
    pub depth: u16,
}

/// A copy that has been issued and has not landed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pending {
    pub lane: u32,
    pub to: u32,
    pub bytes: u32,
    pub data: [u8; 16],
    /// Which of the source bytes were written by anyone.
    pub valid: u16,
    /// Group number of the lane; `NONE` before the commit.
    pub group: u32,
}

pub(crate) struct Warp {
    pub id: u32,
    /// Lanes that exist.
    pub all: u32,
    /// Lanes that have not exited.
    pub live: u32,
    /// Lanes that wait at a barrier, and where.
    pub at_barrier: u32,
    pub barrier_pc: [u32; 32],
    /// Lanes that wait for others of the warp at a `.sync` instruction.
    pub at_sync: u32,
    pub pc: [u32; 32],
    pub frame: [u16; 32],
    pub frames: Vec<Frame>,
    lines: Vec<Line>,
    pub local: Vec<u8>,
    pub local_state: Vec<u8>,
    pub local_stride: u32,
    /// Host memory for nested calls.
    pub grown: u64,
    pub instructions: u64,
    /// Turns spent waiting.
    pub spins: u32,
    pub copies: Vec<Pending>,
    /// Groups committed by each lane.
    pub groups: [u32; 32],
    /// Groups of bulk copies committed by each lane.
    pub bulk_groups: [u32; 32],
    /// Groups of products committed.
    pub product_groups: u32,
    /// Products that have not been waited for.
    pub products: u32,
    /// Which instructions of warpgroups it executed.
    pub together: Together,
    /// What `wgmma.fence` orders.
    pub products_fenced: ProductRegisters,
    /// The program has products of warpgroups, and their fences are checked.
    pub has_products: bool,
    pub checks_fences: bool,
    /// Registers with values that nobody wrote, read from local memory: register and lanes.
    pub unwritten: HashMap<u32, u32>,
    /// Last access to memory since the lane's last barrier, where the warp was split.
    pub effect: [u32; 32],
    /// Lets groups of lanes with higher program counters run, when lower ones go round in circles.
    pub unfair: bool,
    pub turns: u32,
    /// Since the last backward branch: a synchronising access was made; a plain store was made.
    pub saw_sync: bool,
    pub saw_store: bool,
    /// In this turn it did something besides waiting.
    pub worked: bool,
    /// The constants of the kernel are in its frame, which nothing writes over.
    prepared: bool,
    /// The allocation that was used last.
    pub hint: usize,
}

/// The instructions of warpgroups that a warp executed: their hash, the last of them, and whether lanes were missing.
#[derive(Default, Clone, Copy)]
pub(crate) struct Together {
    pub hash: u64,
    pub last: u32,
    pub partly: bool,
}

/// Most words of registers of one warp: calls nest no deeper.
const MAX_WORDS: usize = 4 << 20;
/// Most bytes of local memory of one thread.
const MAX_LOCAL: u32 = 512 << 10;
const MAX_DEPTH: usize = 2000;

impl Warp {
    pub(crate) fn new(id: u32) -> Warp {
        Warp {
            id,
            all: 0,
            live: 0,
            at_barrier: 0,
            barrier_pc: [0; 32],
            at_sync: 0,
            pc: [0; 32],
            frame: [0; 32],
            frames: Vec::new(),
            lines: Vec::new(),
            local: Vec::new(),
            local_state: Vec::new(),
            local_stride: 0,
            grown: 0,
            instructions: 0,
            spins: 0,
            copies: Vec::new(),
            groups: [0; 32],
            bulk_groups: [0; 32],
            product_groups: 0,
            products: 0,
            together: Together::default(),
            products_fenced: ProductRegisters::default(),
            has_products: false,
            checks_fences: false,
            unwritten: HashMap::new(),
            effect: [0; 32],
            unfair: false,
            turns: 0,
            saw_sync: false,
            saw_store: false,
            prepared: false,
            worked: false,
            hint: 0,
        }
    }

    /// It executes the instruction at `pc`, which all warps of its warpgroup must.
    pub(crate) fn goes_together(&mut self, pc: u32) {
        let Together { hash, partly, .. } = self.together;
        self.together = Together {
            hash: hash.wrapping_add(1 + u64::from(pc)).wrapping_mul(0x9E37_79B9_7F4A_7C15),
            last: pc,
            partly: partly || self.live != u32::MAX,
        };
    }

    /// A warp that stands in while the real one is away.
    pub(crate) fn placeholder() -> Warp {
        Warp::new(0)
    }

    /// Puts the warp at the start of the kernel in block `block`.
    pub(crate) fn start(&mut self, l: &Launch<'_>, block: u64) {
        let threads = l.threads - self.id * 32;
        self.all = if threads >= 32 { u32::MAX } else { (1 << threads) - 1 };
        self.live = self.all;
        self.at_barrier = 0;
        self.at_sync = 0;
        let entry = &l.program.funcs[l.program.entry as usize];
        self.pc = [entry.start; 32];
        self.frame = [0; 32];
        self.frames.clear();
        self.instructions = 0;
        self.spins = 0;
        self.copies.clear();
        self.groups = [0; 32];
        self.bulk_groups = [0; 32];
        self.product_groups = 0;
        self.products = 0;
        self.together = Together::default();
        self.products_fenced.clear();
        self.has_products = !l.program.product_lines.is_empty();
        self.checks_fences = self.has_products && l.options.sanitizer.fences;
        self.unwritten.clear();
        self.effect = [0; 32];
        self.unfair = false;
        self.turns = 0;
        self.saw_sync = false;
        self.saw_store = false;
        let frame = Frame { func: l.program.entry, base: 0, local_base: 0, parent: 0, call: 0, depth: 0 };
        self.frames.push(frame);
        let lines = (entry.frame_words / 32) as usize;
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; 32]));
        }
        self.local_state.fill(0);
        self.local.fill(0xff);
        self.ensure_local(entry.local_bytes);
        self.prepare(l, block, frame, entry, self.prepared);
        self.prepared = true;
    }

    pub(crate) fn ready(&self) -> u32 {
        self.live & !self.at_barrier & !self.at_sync
    }

    /// Whether operands of instructions must be looked at.
    #[inline(always)]
    pub(crate) fn watched(&self) -> bool {
        self.has_products || !self.unwritten.is_empty()
    }

    /// Number of the register at `at` of a frame, among all of the warp.
    pub(crate) fn line(&self, frame: u16, at: u32) -> u32 {
        (self.frames[frame as usize].base + at) / 32
    }

    /// The first word of a frame.
    #[inline(always)]
    pub(crate) fn words(&mut self, frame: u16) -> *mut u32 {
        let base = self.frames[frame as usize].base as usize / 32;
        self.lines[base..].as_mut_ptr().cast()
    }

    /// One lane of a 32-bit register.
    #[inline(always)]
    pub(crate) fn get32(&self, frame: u16, at: u32, lane: u32) -> u32 {
        let word = (self.frames[frame as usize].base + at + lane) as usize;
        self.lines[word / 32].0[word % 32]
    }

    #[inline(always)]
    pub(crate) fn set32(&mut self, frame: u16, at: u32, lane: u32, value: u32) {
        let word = (self.frames[frame as usize].base + at + lane) as usize;
        self.lines[word / 32].0[word % 32] = value;
    }

    #[inline(always)]
    pub(crate) fn get64(&self, frame: u16, at: u32, lane: u32) -> u64 {
        u64::from(self.get32(frame, at, 2 * lane)) | u64::from(self.get32(frame, at, 2 * lane + 1)) << 32
    }

    #[inline(always)]
    pub(crate) fn set64(&mut self, frame: u16, at: u32, lane: u32, value: u64) {
        self.set32(frame, at, 2 * lane, value as u32);
        self.set32(frame, at, 2 * lane + 1, (value >> 32) as u32);
    }

    /// All lanes of a 32-bit register.
    pub(crate) fn lane_values(&self, frame: u16, at: u32) -> [u32; 32] {
        self.lines[((self.frames[frame as usize].base + at) / 32) as usize].0
    }

    /// All lanes of a 64-bit register.
    #[inline(always)]
    pub(crate) fn lane_values64(&self, frame: u16, at: u32) -> [u64; 32] {
        let line = ((self.frames[frame as usize].base + at) / 32) as usize;
        let halves = [&self.lines[line].0, &self.lines[line + 1].0];
        std::array::from_fn(|i| {
            let half = halves[i / 16];
            u64::from(half[i % 16 * 2]) | u64::from(half[i % 16 * 2 + 1]) << 32
        })
    }

    /// Sets the lanes of `mask` of a 32-bit register.
    #[inline(always)]
    pub(crate) fn set_lanes(&mut self, frame: u16, at: u32, values: &[u32; 32], mask: u32) {
        let line = &mut self.lines[((self.frames[frame as usize].base + at) / 32) as usize].0;
        if mask == u32::MAX {
            *line = *values;
        } else {
            for i in 0..32 {
                if mask >> i & 1 != 0 {
                    line[i] = values[i];
                }
            }
        }
    }

    pub(crate) fn pred(&self, frame: u16, at: u32, not: bool) -> u32 {
        let word = self.get32(frame, at, 0);
        if not { !word } else { word }
    }

    pub(crate) fn set_pred(&mut self, frame: u16, at: u32, value: u32, mask: u32) {
        if at != NONE {
            let old = self.get32(frame, at, 0);
            self.set32(frame, at, 0, old & !mask | value & mask);
        }
    }

    /// Asks for the host memory of so many words of registers and bytes of local memory.
    fn grow(&mut self, l: &Launch<'_>, words: usize, local: u32) -> bool {
        let needed = 4 * words as u64 + 64 * u64::from(local.next_power_of_two());
        let more = needed.saturating_sub(l.warp_bytes + self.grown);
        self.grown += more;
        more == 0 || l.grow(more)
    }

    /// Room for `bytes` of local memory in every lane.
    fn ensure_local(&mut self, bytes: u32) {
        if bytes <= self.local_stride {
            return;
        }
        let (old, stride) = (self.local_stride as usize, bytes.next_power_of_two() as usize);
        let spread = |from: &[u8], empty: u8| {
            let mut to = vec![empty; stride * 32];
            for l in 0..32 {
                to[l * stride..l * stride + old].copy_from_slice(&from[l * old..(l + 1) * old]);
            }
            to
        };
        self.local = spread(&self.local, 0xff);
        self.local_state = spread(&self.local_state, 0);
        self.local_stride = stride as u32;
    }

    /// Makes a frame for `func`; `None` when the stack is full, or all blocks together need too much memory.
    pub(crate) fn push(&mut self, l: &Launch<'_>, block: u64, func: u32, parent: u16, call: u32) -> Option<u16> {
        let info = &l.program.funcs[func as usize];
        let (top, depth) = (*self.frames.last()?, self.frames.get(parent as usize)?.depth);
        let below = &l.program.funcs[top.func as usize];
        let base = top.base + below.frame_words;
        let end = base as usize + info.frame_words as usize;
        let local_base = top.local_base + below.local_bytes;
        let frame = Frame { func, base, local_base, parent, call, depth: depth + 1 };
        let local = local_base + info.local_bytes;
        if self.frames.len() >= MAX_DEPTH || end > MAX_WORDS || local > MAX_LOCAL || !self.grow(l, end, local) {
            return None;
        }
        self.ensure_local(local);
        if self.lines.len() < end / 32 {
            self.lines.resize(end / 32, Line([0; 32]));
        }
        for lane in 0..32 {
            let from = (lane * self.local_stride + local_base) as usize;
            self.local_state[from..from + info.local_bytes as usize].fill(0);
        }
        // Registers of frames that are gone.
        self.unwritten.retain(|line, _| *line < base / 32);
        self.frames.push(frame);
        // Frames of other functions come and go in the same place.
        self.prepare(l, block, frame, info, false);
        Some(self.frames.len() as u16 - 1)
    }

    /// Drops frames that no lane is in or will return to.
    pub(crate) fn trim(&mut self) {
        while self.frames.len() > 1 {
            let last = self.frames.len() as u16 - 1;
            if (0..32).any(|i| self.live >> i & 1 != 0 && self.frame[i] == last) {
                return;
            }
            self.frames.pop();
        }
    }

    /// Writes constants and special registers into a frame; `again` if only the block is another one.
    fn prepare(&mut self, l: &Launch<'_>, block: u64, frame: Frame, info: &FuncInfo, again: bool) {
        let base = (frame.base / 32) as usize;
        for &(at, words, value) in info.consts.iter().filter(|_| !again) {
            match words {
                0 => self.lines[base + at as usize / 32].0[at as usize % 32] = value as u32,
                1 => self.lines[base + at as usize / 32].0 = [value as u32; 32],
                _ => {
                    let pair: [u32; 32] =
                        std::array::from_fn(|i| if i % 2 == 0 { value as u32 } else { (value >> 32) as u32 });
                    self.lines[base + at as usize / 32].0 = pair;
                    self.lines[base + at as usize / 32 + 1].0 = pair;
                }
            }
        }
        let index = l.block_index(block);
        let of_block = |s: Special| matches!(s, Special::Ctaid(_) | Special::SmId);
        for &(special, at) in info.specials.iter().filter(|s| !again || of_block(s.0)) {
            let thread = |lane: u32| l.thread_index((self.id * 32 + lane).min(l.threads - 1));
            let value = |lane: u32| match special {
                Special::Tid(a) => thread(lane)[a as usize].into(),
                Special::Ntid(a) => l.config.block[a as usize].into(),
                Special::Ctaid(a) => index[a as usize].into(),
                Special::Nctaid(a) => l.config.grid[a as usize].into(),
                Special::LaneId => u64::from(lane),
                Special::WarpId => self.id.into(),
                Special::NWarpId => l.warps.into(),
                Special::SmId => block % u64::from(l.arch.multiprocessors),
                Special::NSmId => l.arch.multiprocessors.into(),
                Special::GridId => 1,
                Special::LaneMask(0) => 1 << lane,
                Special::LaneMask(1) => (2u64 << lane) - 1,
                Special::LaneMask(2) => (1u64 << lane) - 1,
                Special::LaneMask(3) => 0xffff_ffff & !((1u64 << lane) - 1),
                Special::LaneMask(_) => 0xffff_ffff & !((2u64 << lane) - 1),
                Special::DynamicShared => l.dynamic_at.into(),
                Special::TotalShared(true) => l.config.dynamic_shared.into(),
                Special::TotalShared(false) => l.shared_bytes.into(),
                Special::Local(offset) => u64::from(frame.local_base + offset),
            };
            let line = base + at as usize / 32;
            if matches!(special, Special::GridId | Special::Local(_) | Special::DynamicShared) {
                for lane in 0..32 {
                    let v = value(lane);
                    let w = 2 * lane as usize;
                    self.lines[line + w / 32].0[w % 32] = v as u32;
                    self.lines[line + w / 32].0[w % 32 + 1] = (v >> 32) as u32;
                }
            } else {
                let values: [u32; 32] = std::array::from_fn(|lane| value(lane as u32) as u32);
                self.lines[line].0 = values;
            }
        }
    }
}
