//! The decoded program: what the executor runs.

mod kind;

use crate::device::Param;
use crate::ptx::ast::Attributes;
use std::collections::HashMap;
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

impl Program {
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
