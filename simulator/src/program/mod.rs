//! The decoded program: what the executor runs.

mod kind;

use crate::device::Param;
use crate::ptx::ast::Attributes;
use std::collections::{HashMap, HashSet};
use std::fmt::Write;

pub(crate) use kind::*;

/// Computes one instruction for the lanes of a mask.
///
/// # Safety
/// The pointer is the frame of a function whose decoder made the instruction: aligned to 128 bytes, and every operand
/// offset of the instruction with its 32 values lies inside (the decoder compares the widths, see `lanes::Alu`).
pub(crate) type AluFn = unsafe fn(*mut u32, &Inst, u32);

/// No operand, no guard.
pub(crate) const NONE: u32 = u32::MAX;

/// One instruction. Operands are word offsets into the frame: a register is 32 words (64 for 64-bit values), a
/// predicate one word with a bit per lane.
#[derive(Clone)]
pub(crate) struct Inst {
    pub alu: AluFn,
    pub d: u32,
    pub a: u32,
    pub b: u32,
    pub c: u32,
    /// Fourth operand or parameter of the operation.
    pub e: u32,
    pub guard: u32,
    pub guard_not: bool,
    pub kind: Kind,
}

/// In place of a number of words: a register of 16 bits, whose upper half stays zero.
pub(crate) const HALF: u32 = 3;

/// Values that a frame starts with besides constants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    NWarpId,
    SmId,
    NSmId,
    GridId,
    LaneMask(u8),
    DynamicShared,
    /// Bytes of shared memory; true for the dynamic part only.
    TotalShared(bool),
    /// Byte offset in the frame's local memory, as an address in local space.
    Local(u32),
}

pub(crate) struct FuncInfo {
    pub name: String,
    pub start: u32,
    /// Words of a frame, a multiple of 32.
    pub frame_words: u32,
    /// Constants: word offset, words (0 for a predicate word), value.
    pub consts: Vec<(u32, u32, u64)>,
    pub specials: Vec<(Special, u32)>,
    pub local_bytes: u32,
    pub params: Vec<Slot>,
    pub returns: Vec<Slot>,
}

pub(crate) struct Program {
    pub name: String,
    pub params: Vec<Param>,
    pub param_bytes: u32,
    pub static_shared: u32,
    pub local_bytes: u32,
    pub const_bytes: u32,
    pub registers: u32,
    pub attributes: Attributes,
    pub ptx_version: u32,
    pub code: Vec<Inst>,
    /// Per instruction: PTX line, index in `texts`, class.
    pub source: Vec<Source>,
    pub texts: Vec<String>,
    pub funcs: Vec<FuncInfo>,
    /// Number of a function in the module (function pointers hold it) to its index in `funcs`.
    pub pointers: HashMap<u32, u32>,
    /// Index of the kernel in `funcs`.
    pub entry: u32,
    /// Alignment of dynamic shared memory.
    pub dynamic_align: u32,
    /// Whether the asynchronous proxy may read shared memory: there are products of warpgroups or bulk stores.
    pub async_reads: bool,
    /// Per instruction: the lines of its frame that it writes and that products of warpgroups use as accumulators or as
    /// A, or that are moved there. Empty without such products.
    pub product_lines: Vec<Box<[u32]>>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Source {
    pub line: u32,
    pub text: u32,
    pub class: Class,
    /// f32 operations of a lane (an FMA is 2), for counters.
    pub flops: u8,
}

/// Classes of instructions in counters. `Part` is a continuation of the instruction before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    Part,
    Integer,
    Float,
    Half,
    Double,
    Convert,
    Special,
    Move,
    Control,
    Global,
    Shared,
    Local,
    Generic,
    Param,
    Atomic,
    Barrier,
    Warp,
    Matrix,
    Async,
}

impl Class {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Class::Part => "part",
            Class::Integer => "integer",
            Class::Float => "float",
            Class::Half => "half",
            Class::Double => "double",
            Class::Convert => "convert",
            Class::Special => "special function",
            Class::Move => "move",
            Class::Control => "control",
            Class::Global => "global",
            Class::Shared => "shared",
            Class::Local => "local",
            Class::Generic => "generic",
            Class::Param => "param",
            Class::Atomic => "atomic",
            Class::Barrier => "barrier",
            Class::Warp => "warp",
            Class::Matrix => "matrix",
            Class::Async => "asynchronous",
        }
    }
}

impl Inst {
    /// Gives the registers that an instruction writes to `f`; the accumulators of products are left out.
    fn results(&self, mut f: impl FnMut(u32)) {
        let mut list = |regs: &mut dyn Iterator<Item = u32>| regs.filter(|r| *r != NONE).for_each(&mut f);
        match &self.kind {
            Kind::Access(x) if x.store => {}
            Kind::Access(x) => list(&mut x.regs.iter().map(|r| r.0)),
            Kind::Atom(x) => list(&mut x.elements.iter().map(|e| e.0)),
            Kind::LdMatrix { regs, .. } => list(&mut regs.iter().copied()),
            Kind::Mma(m) => list(&mut m.d.iter().copied()),
            Kind::Call(c) => list(&mut c.returns.iter().map(|s| match s {
                Slot::Reg(at, _) => *at,
                _ => NONE,
            })),
            Kind::StMatrix { .. } | Kind::Wgmma(_) => {}
            _ => list(&mut [self.d].into_iter()),
        }
    }
}

/// See [`Program::product_lines`]. `is_move` says which instructions only copy registers, at most two into one.
pub(crate) fn product_lines(code: &[Inst], funcs: &[FuncInfo], is_move: impl Fn(usize) -> bool) -> Vec<Box<[u32]>> {
    if !code.iter().any(|i| matches!(i.kind, Kind::Wgmma(_))) {
        return Vec::new();
    }
    let mut out = vec![Box::default(); code.len()];
    for (k, func) in funcs.iter().enumerate() {
        let body = func.start as usize..funcs.get(k + 1).map_or(code.len(), |f| f.start as usize);
        let mut lines: HashSet<u32> = HashSet::new();
        let mut moves: Vec<(u32, [u32; 2])> = Vec::new();
        for pc in body.clone() {
            match &code[pc].kind {
                Kind::Wgmma(w) => lines.extend(w.d.iter().chain(&w.a).map(|r| r / 32)),
                Kind::Alu if is_move(pc) => moves.push((code[pc].d / 32, [code[pc].a / 32, code[pc].b / 32])),
                _ => {}
            }
        }
        // Sources of moves to such registers count as well.
        loop {
            let before = lines.len();
            for (d, sources) in &moves {
                if lines.contains(d) {
                    lines.extend(sources);
                }
            }
            if lines.len() == before {
                break;
            }
        }
        for pc in body {
            let mut written = Vec::new();
            code[pc].results(|r| written.extend(lines.contains(&(r / 32)).then_some(r / 32)));
            out[pc] = written.into();
        }
    }
    out
}

impl Program {
    /// Whether the instruction only copies registers.
    pub(crate) fn is_move(&self, pc: u32) -> bool {
        self.text(pc).starts_with("mov.")
    }

    pub(crate) fn text(&self, pc: u32) -> &str {
        self.source.get(pc as usize).and_then(|s| self.texts.get(s.text as usize)).map_or("", String::as_str)
    }

    pub(crate) fn line(&self, pc: u32) -> u32 {
        self.source.get(pc as usize).map_or(0, |s| s.line)
    }

    pub(crate) fn disassemble(&self) -> String {
        let mut out =
            format!("{}: {} instructions, {} registers (nominal)\n", self.name, self.code.len(), self.registers);
        for (pc, (inst, source)) in self.code.iter().zip(&self.source).enumerate() {
            if let Some(f) = self.funcs.iter().find(|f| f.start as usize == pc) {
                // Writing to a string cannot fail.
                let _ = writeln!(out, "{}:  frame of {} words, {} bytes local", f.name, f.frame_words, f.local_bytes);
            }
            let operand = |o: u32| {
                if o == NONE { "-".to_owned() } else { o.to_string() }
            };
            let guard = match inst.guard {
                NONE => String::new(),
                g => format!("@{}{g} ", if inst.guard_not { "!" } else { "" }),
            };
            let operands = [inst.d, inst.a, inst.b, inst.c].map(operand).join(" ");
            let text = self.texts.get(source.text as usize).map_or("", String::as_str);
            let _ =
                writeln!(out, "{pc:6}  {:>16}  {guard}[{operands}]  line {}: {text}", source.class.name(), source.line);
        }
        out
    }
}
