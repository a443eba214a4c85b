//! Integer arithmetic.

use super::Result;
use super::body::Body;
use crate::lanes::{Alu, carry, op1, op2, op3, op3p};
use crate::program::*;
use crate::ptx::ast::Ty;

pub(super) fn s16(x: u32) -> i32 {
    i32::from(x as i16)
}

/// Two 16-bit halves computed apart.
fn halves(a: u32, b: u32, g: impl Fn(u32, u32) -> u32) -> u32 {
    (g(a & 0xffff, b & 0xffff) & 0xffff) | g(a >> 16, b >> 16) << 16
}

/// Picks the function for a type: 16-bit unsigned, signed, 32, 64.
macro_rules! by_type {
    ($ty:expr, $u16:expr, $s16:expr, $u32:expr, $s32:expr, $u64:expr, $s64:expr) => {
        match $ty {
            Ty::U16 | Ty::B16 => Some($u16),
            Ty::S16 => Some($s16),
            Ty::U32 | Ty::B32 => Some($u32),
            Ty::S32 => Some($s32),
            Ty::U64 | Ty::B64 => Some($u64),
            Ty::S64 => Some($s64),
            _ => None,
        }
    };
}

/// Wrapping two-operand arithmetic, the same for both signs.
macro_rules! wrapping {
    ($ty:expr, $m:ident) => {
        by_type!(
            $ty,
            op2(|a: u32, b: u32| a.$m(b) & 0xffff),
            op2(|a: u32, b: u32| a.$m(b) & 0xffff),
            op2(|a: u32, b: u32| a.$m(b)),
            op2(|a: u32, b: u32| a.$m(b)),
            op2(|a: u64, b: u64| a.$m(b)),
            op2(|a: u64, b: u64| a.$m(b))
        )
    };
}

impl Body<'_, '_> {
    fn is_integer(ty: Option<Ty>) -> bool {
        matches!(ty, Some(Ty::U16 | Ty::S16 | Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64))
    }

    pub(super) fn last_type(&self) -> Option<Ty> {
        self.instr.mods.iter().rev().find_map(|m| match m.as_str() {
            "u16x2" => Some(Ty::U32),
            "s16x2" => Some(Ty::S32),
            m => Ty::parse(m),
        })
    }

    /// Three-register form `d = alu(a, b)` of type `ty`.
    pub(super) fn binary(&mut self, alu: Option<Alu>, ty: Ty) -> Result<bool> {
        let Some(alu) = alu else {
            return self.fail(format!(".{ty:?} is not supported here").to_lowercase());
        };
        self.arity(3, 3)?;
        let (a, b) = (self.src(1, ty)?, self.src(2, ty)?);
        let d = self.dst(0, ty)?;
        self.alu(alu, d, &[a, b], 0)?;
        Ok(true)
    }

    pub(super) fn unary(&mut self, alu: Option<Alu>, to: Ty, from: Ty) -> Result<bool> {
        let Some(alu) = alu else {
            return self.fail(format!(".{from:?} is not supported here").to_lowercase());
        };
        self.arity(2, 2)?;
        let a = self.src(1, from)?;
        let d = self.dst(0, to)?;
        self.alu(alu, d, &[a], 0)?;
        Ok(true)
    }

    pub(super) fn integer(&mut self) -> Result<bool> {
        let op = self.instr.opcode.as_str();
        let ty = self.last_type();
        match op {
            "add" | "sub" | "mul" | "mad" | "div" | "rem" | "abs" | "neg" | "min" | "max" | "sad" | "addc" | "subc"
            | "madc" | "mul24" | "mad24"
                if Self::is_integer(ty) =>
            {
                self.arithmetic(op)
            }
            _ => Ok(false),
        }
    }

    fn arithmetic(&mut self, op: &str) -> Result<bool> {
        let hi = self.mods.take("hi");
        let wide = self.mods.take("wide");
        let lo = self.mods.take("lo");
        let sat = self.mods.take("sat");
        let cc = self.mods.take("cc");
        let packed = self.mods.find(|m| match m {
            "u16x2" => Some(false),
            "s16x2" => Some(true),
            _ => None,
        });
        if let Some(signed) = packed {
            let alu = match (op, signed) {
                ("add", _) => Some(op2(|a: u32, b: u32| halves(a, b, |x, y| x.wrapping_add(y)))),
                ("sub", _) => Some(op2(|a: u32, b: u32| halves(a, b, |x, y| x.wrapping_sub(y)))),
                ("min", false) => Some(op2(|a: u32, b: u32| halves(a, b, |x, y| x.min(y)))),
                ("max", false) => Some(op2(|a: u32, b: u32| halves(a, b, |x, y| x.max(y)))),
                ("min", true) => Some(op2(|a: u32, b: u32| halves(a, b, |x, y| s16(x).min(s16(y)) as u32))),
                ("max", true) => Some(op2(|a: u32, b: u32| halves(a, b, |x, y| s16(x).max(s16(y)) as u32))),
                _ => None,
            };
            return self.binary(alu, Ty::U32);
        }
        let Some(ty) = self.mods.ty() else {
            return Ok(false);
        };
        if sat && !(ty == Ty::S32 && matches!(op, "add" | "sub" | "mad")) {
            return self.fail(".sat goes with .s32 only");
        }
        if cc || matches!(op, "addc" | "subc" | "madc") {
            return self.with_carry(op, ty, hi, cc);
        }
        match op {
            "add" if sat => self.binary(Some(op2(|a: u32, b: u32| (a as i32).saturating_add(b as i32) as u32)), ty),
            "sub" if sat => self.binary(Some(op2(|a: u32, b: u32| (a as i32).saturating_sub(b as i32) as u32)), ty),
            "add" => self.binary(wrapping!(ty, wrapping_add), ty),
            "sub" => self.binary(wrapping!(ty, wrapping_sub), ty),
            "mul" | "mad" if wide => {
                let to = match ty {
                    Ty::U16 | Ty::S16 => Ty::U32,
                    Ty::U32 | Ty::S32 => Ty::U64,
                    _ => return self.fail(".wide needs 16 or 32 bits"),
                };
                self.arity(if op == "mul" { 3 } else { 4 }, if op == "mul" { 3 } else { 4 })?;
                let (a, b) = (self.src(1, ty)?, self.src(2, ty)?);
                let c = if op == "mad" { self.src(3, to)? } else { NONE };
                let d = self.dst(0, to)?;
                let alu = match (op, ty) {
                    ("mul", Ty::U16) => op2(|a: u32, b: u32| a * b),
                    ("mul", Ty::S16) => op2(|a: u32, b: u32| (s16(a) * s16(b)) as u32),
                    ("mul", Ty::U32) => op2(|a: u32, b: u32| u64::from(a) * u64::from(b)),
                    ("mul", _) => op2(|a: u32, b: u32| (i64::from(a as i32) * i64::from(b as i32)) as u64),
                    (_, Ty::U16) => op3(|a: u32, b: u32, c: u32| (a * b).wrapping_add(c)),
                    (_, Ty::S16) => op3(|a: u32, b: u32, c: u32| ((s16(a) * s16(b)) as u32).wrapping_add(c)),
                    (_, Ty::U32) => op3(|a: u32, b: u32, c: u64| (u64::from(a) * u64::from(b)).wrapping_add(c)),
                    (_, _) => op3(|a: u32, b: u32, c: u64| {
                        ((i64::from(a as i32) * i64::from(b as i32)) as u64).wrapping_add(c)
                    }),
                };
                self.alu(alu, d, &[a, b, c], 0)?;
                Ok(true)
            }
            "mul" | "mad" if hi || lo => {
                let mul = if hi {
                    by_type!(
                        ty,
                        op2(|a: u32, b: u32| (a * b) >> 16),
                        op2(|a: u32, b: u32| ((s16(a) * s16(b)) >> 16) as u32 & 0xffff),
                        op2(|a: u32, b: u32| ((u64::from(a) * u64::from(b)) >> 32) as u32),
                        op2(|a: u32, b: u32| ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32),
                        op2(|a: u64, b: u64| ((u128::from(a) * u128::from(b)) >> 64) as u64),
                        op2(|a: u64, b: u64| ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64)
                    )
                } else {
                    wrapping!(ty, wrapping_mul)
                };
                if op == "mul" {
                    return self.binary(mul, ty);
                }
                self.arity(4, 4)?;
                let (a, b, c) = (self.src(1, ty)?, self.src(2, ty)?, self.src(3, ty)?);
                let d = self.dst(0, ty)?;
                if lo {
                    let alu = match ty.bytes() {
                        2 => op3(|a: u32, b: u32, c: u32| a.wrapping_mul(b).wrapping_add(c) & 0xffff),
                        4 => op3(|a: u32, b: u32, c: u32| a.wrapping_mul(b).wrapping_add(c)),
                        _ => op3(|a: u64, b: u64, c: u64| a.wrapping_mul(b).wrapping_add(c)),
                    };
                    self.alu(alu, d, &[a, b, c], 0)?;
                    return Ok(true);
                }
                let Some(mul) = mul else { return Ok(false) };
                let t = self.temp(if ty.bytes() == 8 { 2 } else { 1 })?;
                self.alu(mul, t, &[a, b], 0)?;
                let add = match (ty.bytes(), sat) {
                    (2, _) => op2(|a: u32, b: u32| a.wrapping_add(b) & 0xffff),
                    (4, true) => op2(|a: u32, b: u32| (a as i32).saturating_add(b as i32) as u32),
                    (4, _) => op2(|a: u32, b: u32| a.wrapping_add(b)),
                    _ => op2(|a: u64, b: u64| a.wrapping_add(b)),
                };
                self.alu(add, d, &[t, c], 0)?;
                Ok(true)
            }
            // Bits 16.. of the 48-bit product go to `hi`, its low 32 to `lo`.
            "mul24" | "mad24" => {
                let signed = ty == Ty::S32;
                if !matches!(ty, Ty::U32 | Ty::S32) || hi == lo {
                    return Ok(false);
                }
                let n = if op == "mul24" { 3 } else { 4 };
                self.arity(n, n)?;
                let (a, b) = (self.src(1, ty)?, self.src(2, ty)?);
                let c = if n == 4 { self.src(3, ty)? } else { self.constant(1, 0)? };
                let d = self.dst(0, ty)?;
                let alu = op3p(|a: u32, b: u32, c: u32, e| {
                    let cut = |x: u32| {
                        if e & 1 != 0 { i64::from((x << 8) as i32 >> 8) } else { i64::from(x & 0xff_ffff) }
                    };
                    let p = cut(a) * cut(b);
                    let r = (if e & 2 != 0 { p >> 16 } else { p }) as u32;
                    if e & 4 != 0 { (r as i32).saturating_add(c as i32) as u32 } else { r.wrapping_add(c) }
                });
                self.alu(alu, d, &[a, b, c], u32::from(signed) | u32::from(hi) << 1 | u32::from(sat) << 2)?;
                Ok(true)
            }
            // Division by zero gives all ones, as on the hardware; the remainder then is the dividend.
            "div" => self.binary(
                by_type!(
                    ty,
                    op2(|a: u32, b: u32| a.checked_div(b).unwrap_or(0xffff)),
                    op2(|a: u32, b: u32| if s16(b) == 0 {
                        0xffff
                    } else {
                        s16(a).wrapping_div(s16(b)) as u32 & 0xffff
                    }),
                    op2(|a: u32, b: u32| a.checked_div(b).unwrap_or(u32::MAX)),
                    op2(|a: u32, b: u32| if b == 0 { u32::MAX } else { (a as i32).wrapping_div(b as i32) as u32 }),
                    op2(|a: u64, b: u64| a.checked_div(b).unwrap_or(u64::MAX)),
                    op2(|a: u64, b: u64| if b == 0 { u64::MAX } else { (a as i64).wrapping_div(b as i64) as u64 })
                ),
                ty,
            ),
            "rem" => self.binary(
                by_type!(
                    ty,
                    op2(|a: u32, b: u32| a.checked_rem(b).unwrap_or(a)),
                    op2(|a: u32, b: u32| if s16(b) == 0 { a } else { s16(a).wrapping_rem(s16(b)) as u32 & 0xffff }),
                    op2(|a: u32, b: u32| a.checked_rem(b).unwrap_or(a)),
                    op2(|a: u32, b: u32| if b == 0 { a } else { (a as i32).wrapping_rem(b as i32) as u32 }),
                    op2(|a: u64, b: u64| a.checked_rem(b).unwrap_or(a)),
                    op2(|a: u64, b: u64| if b == 0 { a } else { (a as i64).wrapping_rem(b as i64) as u64 })
                ),
                ty,
            ),
            "min" | "max" if self.mods.take("relu") => {
                let alu = match (op, ty) {
                    ("min", Ty::S32) => Some(op2(|a: u32, b: u32| (a as i32).min(b as i32).max(0) as u32)),
                    ("max", Ty::S32) => Some(op2(|a: u32, b: u32| (a as i32).max(b as i32).max(0) as u32)),
                    _ => None,
                };
                self.binary(alu, ty)
            }
            "min" => self.binary(
                by_type!(
                    ty,
                    op2(|a: u32, b: u32| a.min(b)),
                    op2(|a: u32, b: u32| s16(a).min(s16(b)) as u32 & 0xffff),
                    op2(|a: u32, b: u32| a.min(b)),
                    op2(|a: u32, b: u32| (a as i32).min(b as i32) as u32),
                    op2(|a: u64, b: u64| a.min(b)),
                    op2(|a: u64, b: u64| (a as i64).min(b as i64) as u64)
                ),
                ty,
            ),
            "max" => self.binary(
                by_type!(
                    ty,
                    op2(|a: u32, b: u32| a.max(b)),
                    op2(|a: u32, b: u32| s16(a).max(s16(b)) as u32 & 0xffff),
                    op2(|a: u32, b: u32| a.max(b)),
                    op2(|a: u32, b: u32| (a as i32).max(b as i32) as u32),
                    op2(|a: u64, b: u64| a.max(b)),
                    op2(|a: u64, b: u64| (a as i64).max(b as i64) as u64)
                ),
                ty,
            ),
            "abs" => {
                let alu = match ty {
                    Ty::S16 => Some(op1(|a: u32| s16(a).wrapping_abs() as u32 & 0xffff)),
                    Ty::S32 => Some(op1(|a: u32| (a as i32).wrapping_abs() as u32)),
                    Ty::S64 => Some(op1(|a: u64| (a as i64).wrapping_abs() as u64)),
                    _ => None,
                };
                self.unary(alu, ty, ty)
            }
            "neg" => {
                let alu = match ty {
                    Ty::S16 => Some(op1(|a: u32| a.wrapping_neg() & 0xffff)),
                    Ty::S32 => Some(op1(|a: u32| a.wrapping_neg())),
                    Ty::S64 => Some(op1(|a: u64| a.wrapping_neg())),
                    _ => None,
                };
                self.unary(alu, ty, ty)
            }
            "sad" => {
                self.arity(4, 4)?;
                let (a, b, c) = (self.src(1, ty)?, self.src(2, ty)?, self.src(3, ty)?);
                let d = self.dst(0, ty)?;
                let alu = by_type!(
                    ty,
                    op3(|a: u32, b: u32, c: u32| a.abs_diff(b).wrapping_add(c) & 0xffff),
                    op3(|a: u32, b: u32, c: u32| s16(a).abs_diff(s16(b)).wrapping_add(c) & 0xffff),
                    op3(|a: u32, b: u32, c: u32| a.abs_diff(b).wrapping_add(c)),
                    op3(|a: u32, b: u32, c: u32| (a as i32).abs_diff(b as i32).wrapping_add(c)),
                    op3(|a: u64, b: u64, c: u64| a.abs_diff(b).wrapping_add(c)),
                    op3(|a: u64, b: u64, c: u64| (a as i64).abs_diff(b as i64).wrapping_add(c))
                );
                let Some(alu) = alu else { return Ok(false) };
                self.alu(alu, d, &[a, b, c], 0)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Extended-precision sums: `.cc` writes the carry, `addc`, `subc`, `madc` read it.
    fn with_carry(&mut self, op: &str, ty: Ty, hi: bool, cc: bool) -> Result<bool> {
        let wide = ty.bytes() == 8;
        if ty.bytes() < 4 {
            return Ok(false);
        }
        let reads = matches!(op, "addc" | "subc" | "madc");
        let flags = u32::from(reads) | u32::from(cc) << 1;
        let c = self.carry()?;
        let add = match wide {
            true => carry(|a: u64, b: u64, c: bool| {
                let (s, x) = a.overflowing_add(b);
                let (s, y) = s.overflowing_add(c.into());
                (s, x | y)
            }),
            false => carry(|a: u32, b: u32, c: bool| {
                let (s, x) = a.overflowing_add(b);
                let (s, y) = s.overflowing_add(c.into());
                (s, x | y)
            }),
        };
        let sub = match wide {
            true => carry(|a: u64, b: u64, c: bool| {
                let (s, x) = a.overflowing_sub(b);
                let (s, y) = s.overflowing_sub(c.into());
                (s, x | y)
            }),
            false => carry(|a: u32, b: u32, c: bool| {
                let (s, x) = a.overflowing_sub(b);
                let (s, y) = s.overflowing_sub(c.into());
                (s, x | y)
            }),
        };
        if op.starts_with("mad") {
            self.arity(4, 4)?;
            let (a, b, addend) = (self.src(1, ty)?, self.src(2, ty)?, self.src(3, ty)?);
            let d = self.dst(0, ty)?;
            let mul = match (wide, hi, ty.signed()) {
                (false, false, _) => op2(|a: u32, b: u32| a.wrapping_mul(b)),
                (true, false, _) => op2(|a: u64, b: u64| a.wrapping_mul(b)),
                (false, true, false) => op2(|a: u32, b: u32| ((u64::from(a) * u64::from(b)) >> 32) as u32),
                (false, true, true) => op2(|a: u32, b: u32| ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32),
                (true, true, false) => op2(|a: u64, b: u64| ((u128::from(a) * u128::from(b)) >> 64) as u64),
                (true, true, true) => {
                    op2(|a: u64, b: u64| ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64)
                }
            };
            let t = self.temp(if wide { 2 } else { 1 })?;
            self.alu(mul, t, &[a, b], 0)?;
            self.alu(add, d, &[t, addend, c], flags)?;
            return Ok(true);
        }
        self.arity(3, 3)?;
        let (a, b) = (self.src(1, ty)?, self.src(2, ty)?);
        let d = self.dst(0, ty)?;
        self.alu(if op.starts_with("add") { add } else { sub }, d, &[a, b, c], flags)?;
        Ok(true)
    }
}
