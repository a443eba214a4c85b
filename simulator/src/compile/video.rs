//! SIMD video instructions: two or four small integers in a register.

use super::Result;
use super::body::Body;
use crate::lanes::op3p;
use crate::program::Class;
use crate::ptx::ast::Ty;

/// Bits of the parameter: operation 3, four lanes instead of two, signed a, b and d, saturate, add up.
const FOUR: u32 = 8;
const SIGNED_A: u32 = 16;
const SIGNED_B: u32 = 32;
const SIGNED_D: u32 = 64;
const SATURATE: u32 = 128;
const ADD: u32 = 256;

fn video(a: u32, b: u32, c: u32, how: u32) -> u32 {
    let bits = if how & FOUR != 0 { 8 } else { 16 };
    let mask = (1u32 << bits) - 1;
    let read = |v: u32, lane: u32, signed: bool| {
        let x = i64::from(v >> (lane * bits) & mask);
        if signed && x >> (bits - 1) & 1 != 0 { x - (1 << bits) } else { x }
    };
    let (mut lanes, mut sum) = (0, c);
    for lane in 0..32 / bits {
        let (x, y) = (read(a, lane, how & SIGNED_A != 0), read(b, lane, how & SIGNED_B != 0));
        let v = match how & 7 {
            0 => x + y,
            1 => x - y,
            // Halves away from zero.
            2 => (x + y + i64::from(x + y >= 0)) >> 1,
            3 => (x - y).abs(),
            4 => x.min(y),
            _ => x.max(y),
        };
        let v = if how & SATURATE == 0 {
            v
        } else if how & SIGNED_D != 0 {
            v.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        } else {
            v.clamp(0, mask.into())
        };
        lanes |= (v as u32 & mask) << (lane * bits);
        sum = sum.wrapping_add(v as u32);
    }
    if how & ADD != 0 { sum } else { lanes }
}

impl Body<'_, '_> {
    pub(super) fn video(&mut self) -> Result<bool> {
        let names = ["vadd", "vsub", "vavrg", "vabsdiff", "vmin", "vmax"];
        let (name, four) = match self.instr.opcode.as_bytes() {
            [.., b'2'] => (&self.instr.opcode[..self.instr.opcode.len() - 1], false),
            [.., b'4'] => (&self.instr.opcode[..self.instr.opcode.len() - 1], true),
            _ => return Ok(false),
        };
        let Some(operation) = names.iter().position(|n| *n == name) else {
            return Ok(false);
        };
        let (sat, add) = (self.mods.take("sat"), self.mods.take("add"));
        let (Some(d_ty), Some(a_ty), Some(b_ty)) = (self.mods.ty(), self.mods.ty(), self.mods.ty()) else {
            return Ok(false);
        };
        if [d_ty, a_ty, b_ty].iter().any(|t| !matches!(t, Ty::U32 | Ty::S32)) {
            return Ok(false);
        }
        self.class = Class::Integer;
        self.arity(4, 4)?;
        let sources = [self.src(1, Ty::B32)?, self.src(2, Ty::B32)?, self.src(3, Ty::B32)?];
        let d = self.dst(0, Ty::B32)?;
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        let how = operation as u32
            | flag(four, FOUR)
            | flag(a_ty.signed(), SIGNED_A)
            | flag(b_ty.signed(), SIGNED_B)
            | flag(d_ty.signed(), SIGNED_D)
            | flag(sat, SATURATE)
            | flag(add, ADD);
        self.alu(op3p(|a: u32, b: u32, c: u32, how| video(a, b, c, how)), d, &sources, how)?;
        Ok(true)
    }
}
