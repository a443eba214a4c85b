//! Integer arithmetic, logic, moves, comparisons and selection.

use super::Result;
use super::body::Body;
use crate::lanes::{carry, choose, cmp, op1, op2, op2p, op3, op3p, op4, preds, spread};
use crate::numeric::{bf16_to_f32, f16_to_f32, flush};
use crate::program::*;
use crate::ptx::ast::{Operand, Ty};

fn s16(x: u32) -> i32 {
    i32::from(x as i16)
}
fn f(x: u32) -> f32 {
    f32::from_bits(x)
}
fn d(x: u64) -> f64 {
    f64::from_bits(x)
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

    fn last_type(&self) -> Option<Ty> {
        self.instr.mods.iter().rev().find_map(|m| match m.as_str() {
            "u16x2" => Some(Ty::U32),
            "s16x2" => Some(Ty::S32),
            m => Ty::parse(m),
        })
    }

    /// Three-register form `d = alu(a, b)` of type `ty`.
    fn binary(&mut self, alu: Option<AluFn>, ty: Ty) -> Result<bool> {
        let Some(alu) = alu else {
            return self.fail(format!(".{ty:?} is not supported here").to_lowercase());
        };
        self.arity(3, 3)?;
        let (a, b) = (self.src(1, ty)?, self.src(2, ty)?);
        let d = self.dst(0, ty)?;
        self.alu(alu, d, &[a, b], 0)?;
        Ok(true)
    }

    fn unary(&mut self, alu: Option<AluFn>, to: Ty, from: Ty) -> Result<bool> {
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
            "and" | "or" | "xor" | "not" | "cnot" | "shl" | "shr" | "shf" | "lop3" | "popc" | "clz" | "bfind"
            | "brev" | "bfe" | "bfi" | "bmsk" | "szext" | "prmt" | "dp4a" | "dp2a" | "fns" => {
                use Ty::*;
                // The operations below choose by width and know no other types.
                if ty.is_some_and(|t| !matches!(t, Pred | B16 | U16 | S16 | B32 | U32 | S32 | B64 | U64 | S64)) {
                    return Ok(false);
                }
                self.bits(op)
            }
            "mov" => self.mov(),
            "setp" | "set" => self.compare(op),
            "selp" => {
                let Some(ty) = self.mods.ty() else {
                    return Ok(false);
                };
                self.class = Class::Move;
                self.arity(4, 4)?;
                let (a, b) = (self.src(1, ty)?, self.src(2, ty)?);
                let o = self.operand(3)?;
                let (p, not) = self.pred(o)?;
                let d = self.dst(0, ty)?;
                let alu = match ty.bytes() {
                    8 => choose(|a: u64, b: u64, p| if p { a } else { b }),
                    _ => choose(|a: u32, b: u32, p| if p { a } else { b }),
                };
                self.alu(alu, d, &[a, b, p], u32::from(not))?;
                Ok(true)
            }
            "slct" => {
                let ftz = self.mods.take("ftz");
                let (Some(ty), Some(by)) = (self.mods.ty(), self.mods.ty()) else {
                    return Ok(false);
                };
                self.class = Class::Move;
                self.arity(4, 4)?;
                let (a, b) = (self.src(1, ty)?, self.src(2, ty)?);
                let c = self.src(3, by)?;
                let d = self.dst(0, ty)?;
                let float = by == Ty::F32;
                // A NaN chooses the second operand; -0 counts as not negative.
                let alu = match (ty.bytes(), float) {
                    (8, false) => op3(|a: u64, b: u64, c: u32| if c as i32 >= 0 { a } else { b }),
                    (8, true) => op3p(|a: u64, b: u64, c: u32, z| if pick(c, z) >= 0.0 { a } else { b }),
                    (_, false) => op3(|a: u32, b: u32, c: u32| if c as i32 >= 0 { a } else { b }),
                    (_, true) => op3p(|a: u32, b: u32, c: u32, z| if pick(c, z) >= 0.0 { a } else { b }),
                };
                self.alu(alu, d, &[a, b, c], u32::from(ftz))?;
                Ok(true)
            }
            "isspacep" => {
                self.arity(2, 2)?;
                let o = self.operand(0)?;
                let d = self.pred_dst(o)?;
                let a = self.src(1, Ty::U64)?;
                let place = self.mods.find(|m| match m {
                    "global" => Some(Place::Global),
                    "shared" | "shared::cta" | "shared::cluster" => Some(Place::Shared),
                    "local" => Some(Place::Local),
                    "param" | "param::entry" | "param::func" => Some(Place::Param),
                    "const" => Some(Place::Generic),
                    _ => None,
                });
                let Some(place) = place else { return Ok(false) };
                self.emit(Inst { d, a, kind: Kind::IsSpace(place), ..self.blank() })?;
                Ok(true)
            }
            "cvta" => self.cvta(),
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
            // Bits 8.. of the 48-bit product go to `hi`, its low 32 to `lo`.
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

    fn bits(&mut self, op: &str) -> Result<bool> {
        match op {
            "and" | "or" | "xor" => {
                let Some(ty) = self.mods.ty() else {
                    return Ok(false);
                };
                if ty == Ty::Pred {
                    self.arity(3, 3)?;
                    let (x, y) = (self.operand(1)?, self.operand(2)?);
                    let ((a, na), (b, nb)) = (self.pred(x)?, self.pred(y)?);
                    let o = self.operand(0)?;
                    let d = self.pred_dst(o)?;
                    let alu = match op {
                        "and" => preds(|a, b| a & b),
                        "or" => preds(|a, b| a | b),
                        _ => preds(|a, b| a ^ b),
                    };
                    self.alu(alu, d, &[a, b], u32::from(na) | u32::from(nb) << 1)?;
                    return Ok(true);
                }
                let alu = match (op, ty.bytes()) {
                    ("and", 8) => op2(|a: u64, b: u64| a & b),
                    ("or", 8) => op2(|a: u64, b: u64| a | b),
                    ("xor", 8) => op2(|a: u64, b: u64| a ^ b),
                    ("and", _) => op2(|a: u32, b: u32| a & b),
                    ("or", _) => op2(|a: u32, b: u32| a | b),
                    _ => op2(|a: u32, b: u32| a ^ b),
                };
                self.binary(Some(alu), ty)
            }
            "not" | "cnot" => {
                let Some(ty) = self.mods.ty() else {
                    return Ok(false);
                };
                if ty == Ty::Pred {
                    self.arity(2, 2)?;
                    let (x, o) = (self.operand(1)?, self.operand(0)?);
                    let (a, na) = self.pred(x)?;
                    let d = self.pred_dst(o)?;
                    self.alu(preds(|a, _| !a), d, &[a, a], u32::from(na))?;
                    return Ok(true);
                }
                let alu = match (op, ty.bytes()) {
                    ("not", 2) => op1(|a: u32| !a & 0xffff),
                    ("not", 4) => op1(|a: u32| !a),
                    ("not", _) => op1(|a: u64| !a),
                    (_, 8) => op1(|a: u64| u64::from(a == 0)),
                    _ => op1(|a: u32| u32::from(a == 0)),
                };
                self.unary(Some(alu), ty, ty)
            }
            "shl" | "shr" => {
                let Some(ty) = self.mods.ty() else {
                    return Ok(false);
                };
                self.arity(3, 3)?;
                let (a, b) = (self.src(1, ty)?, self.src(2, Ty::U32)?);
                let d = self.dst(0, ty)?;
                let alu = match (op, ty) {
                    ("shl", Ty::B16 | Ty::U16 | Ty::S16) => {
                        op2(|a: u32, b: u32| if b > 15 { 0 } else { (a << b) & 0xffff })
                    }
                    ("shl", Ty::B32 | Ty::U32 | Ty::S32) => op2(|a: u32, b: u32| if b > 31 { 0 } else { a << b }),
                    ("shl", _) => op2(|a: u64, b: u32| if b > 63 { 0 } else { a << b }),
                    (_, Ty::B16 | Ty::U16) => op2(|a: u32, b: u32| if b > 15 { 0 } else { a >> b }),
                    (_, Ty::B32 | Ty::U32) => op2(|a: u32, b: u32| if b > 31 { 0 } else { a >> b }),
                    (_, Ty::B64 | Ty::U64) => op2(|a: u64, b: u32| if b > 63 { 0 } else { a >> b }),
                    (_, Ty::S16) => op2(|a: u32, b: u32| (s16(a) >> b.min(15)) as u32 & 0xffff),
                    (_, Ty::S32) => op2(|a: u32, b: u32| ((a as i32) >> b.min(31)) as u32),
                    (_, Ty::S64) => op2(|a: u64, b: u32| ((a as i64) >> b.min(63)) as u64),
                    _ => return Ok(false),
                };
                self.alu(alu, d, &[a, b], 0)?;
                Ok(true)
            }
            "shf" => {
                let (left, right) = (self.mods.take("l"), self.mods.take("r"));
                let (clamp, wrap) = (self.mods.take("clamp"), self.mods.take("wrap"));
                if left == right || clamp == wrap || self.mods.ty() != Some(Ty::B32) {
                    return Ok(false);
                }
                self.arity(4, 4)?;
                let (a, b, c) = (self.src(1, Ty::B32)?, self.src(2, Ty::B32)?, self.src(3, Ty::U32)?);
                let d = self.dst(0, Ty::B32)?;
                // The second operand is the high word.
                let alu = match (left, clamp) {
                    (true, true) => {
                        op3(|a: u32, b: u32, c: u32| (((u64::from(b) << 32 | u64::from(a)) << c.min(32)) >> 32) as u32)
                    }
                    (true, false) => {
                        op3(|a: u32, b: u32, c: u32| (((u64::from(b) << 32 | u64::from(a)) << (c & 31)) >> 32) as u32)
                    }
                    (false, true) => {
                        op3(|a: u32, b: u32, c: u32| ((u64::from(b) << 32 | u64::from(a)) >> c.min(32)) as u32)
                    }
                    (false, false) => {
                        op3(|a: u32, b: u32, c: u32| ((u64::from(b) << 32 | u64::from(a)) >> (c & 31)) as u32)
                    }
                };
                self.alu(alu, d, &[a, b, c], 0)?;
                Ok(true)
            }
            "lop3" => {
                let join = self.mods.find(|m| match m {
                    "or" => Some(2u32),
                    "and" => Some(1),
                    _ => None,
                });
                if self.mods.ty() != Some(Ty::B32) {
                    return Ok(false);
                }
                self.arity(if join.is_some() { 6 } else { 5 }, if join.is_some() { 6 } else { 5 })?;
                let (a, b, c) = (self.src(1, Ty::B32)?, self.src(2, Ty::B32)?, self.src(3, Ty::B32)?);
                let Operand::Int(table @ 0..=255) = *self.operand(4)? else {
                    return self.fail("the table must be 0..=255");
                };
                let alu = match table {
                    0x96 => op3(|a: u32, b: u32, c: u32| a ^ b ^ c),
                    0xea => op3(|a: u32, b: u32, c: u32| (a & b) | c),
                    0xf8 => op3(|a: u32, b: u32, c: u32| a | (b & c)),
                    0x80 => op3(|a: u32, b: u32, c: u32| a & b & c),
                    0xfe => op3(|a: u32, b: u32, c: u32| a | b | c),
                    _ => op3p(|a: u32, b: u32, c: u32, t| {
                        let mut r = 0;
                        for k in 0..8u32 {
                            let pick = |x: u32, bit: u32| if k & bit != 0 { x } else { !x };
                            r |= pick(a, 4) & pick(b, 2) & pick(c, 1) & 0u32.wrapping_sub(t >> k & 1);
                        }
                        r
                    }),
                };
                let Some(join) = join else {
                    let d = self.dst(0, Ty::B32)?;
                    self.alu(alu, d, &[a, b, c], table as u32)?;
                    return Ok(true);
                };
                // `lop3.or d|p, a, b, c, table, q`: p = (d != 0) or q.
                let Operand::Pair(x, p) = self.operand(0)? else {
                    return self.fail("expected `d|p`");
                };
                let d = match x.as_ref() {
                    Operand::Sink => self.temp(1)?,
                    x => self.dst_of(x)?.at,
                };
                let p = self.pred_dst(p)?;
                let o = self.operand(5)?;
                let (q, not) = self.pred(o)?;
                let zero = self.constant(1, 0)?;
                self.alu(alu, d, &[a, b, c], table as u32)?;
                self.alu(cmp(|a: u32, b: u32| a != b), p, &[d, zero], join | u32::from(not) << 3 | q << 4)?;
                Ok(true)
            }
            "popc" | "clz" | "brev" | "bfind" => {
                let amount = self.mods.take("shiftamt");
                let Some(ty) = self.mods.ty() else {
                    return Ok(false);
                };
                if ty.bytes() < 4 || (amount && op != "bfind") {
                    return Ok(false);
                }
                let wide = ty.bytes() == 8;
                let alu = match (op, wide) {
                    ("popc", false) => op1(|a: u32| a.count_ones()),
                    ("popc", true) => op1(|a: u64| a.count_ones()),
                    ("clz", false) => op1(|a: u32| a.leading_zeros()),
                    ("clz", true) => op1(|a: u64| a.leading_zeros()),
                    ("brev", false) => op1(|a: u32| a.reverse_bits()),
                    ("brev", true) => op1(|a: u64| a.reverse_bits()),
                    (_, false) => match (ty.signed(), amount) {
                        (false, false) => op1(|a: u32| a.checked_ilog2().unwrap_or(u32::MAX)),
                        (false, true) => op1(|a: u32| if a == 0 { u32::MAX } else { a.leading_zeros() }),
                        (true, false) => op1(|a: u32| sign_free(a).checked_ilog2().unwrap_or(u32::MAX)),
                        (true, true) => {
                            op1(|a: u32| if sign_free(a) == 0 { u32::MAX } else { sign_free(a).leading_zeros() })
                        }
                    },
                    (_, true) => match (ty.signed(), amount) {
                        (false, false) => op1(|a: u64| a.checked_ilog2().unwrap_or(u32::MAX)),
                        (false, true) => op1(|a: u64| if a == 0 { u32::MAX } else { a.leading_zeros() }),
                        (true, false) => op1(|a: u64| sign_free64(a).checked_ilog2().unwrap_or(u32::MAX)),
                        (true, true) => {
                            op1(|a: u64| if sign_free64(a) == 0 { u32::MAX } else { sign_free64(a).leading_zeros() })
                        }
                    },
                };
                self.unary(Some(alu), if op == "brev" { ty } else { Ty::U32 }, ty)
            }
            "bfe" => {
                let Some(ty) = self.mods.ty() else {
                    return Ok(false);
                };
                self.arity(4, 4)?;
                let (a, b, c) = (self.src(1, ty)?, self.src(2, Ty::U32)?, self.src(3, Ty::U32)?);
                let d = self.dst(0, ty)?;
                let alu = match ty {
                    Ty::U32 => op3(|a: u32, b: u32, c: u32| extract(a.into(), b, c, 32, false) as u32),
                    Ty::S32 => op3(|a: u32, b: u32, c: u32| extract(a.into(), b, c, 32, true) as u32),
                    Ty::U64 => op3(|a: u64, b: u32, c: u32| extract(a, b, c, 64, false)),
                    Ty::S64 => op3(|a: u64, b: u32, c: u32| extract(a, b, c, 64, true)),
                    _ => return Ok(false),
                };
                self.alu(alu, d, &[a, b, c], 0)?;
                Ok(true)
            }
            "bfi" => {
                let Some(ty) = self.mods.ty() else {
                    return Ok(false);
                };
                self.arity(5, 5)?;
                let (a, b) = (self.src(1, ty)?, self.src(2, ty)?);
                let (c, e) = (self.src(3, Ty::U32)?, self.src(4, Ty::U32)?);
                let d = self.dst(0, ty)?;
                let alu = match ty {
                    Ty::B32 => op4(|a: u32, b: u32, c: u32, l: u32| insert(a.into(), b.into(), c, l, 32) as u32),
                    Ty::B64 => op4(|a: u64, b: u64, c: u32, l: u32| insert(a, b, c, l, 64)),
                    _ => return Ok(false),
                };
                self.alu(alu, d, &[a, b, c], e)?;
                Ok(true)
            }
            "bmsk" => {
                let (clamp, wrap) = (self.mods.take("clamp"), self.mods.take("wrap"));
                if clamp == wrap || self.mods.ty() != Some(Ty::B32) {
                    return Ok(false);
                }
                let alu = match clamp {
                    true => op2(|a: u32, b: u32| mask(a.min(32), b.min(32))),
                    false => op2(|a: u32, b: u32| mask(a & 31, b & 31)),
                };
                self.binary(Some(alu), Ty::U32)
            }
            "szext" => {
                let (clamp, wrap) = (self.mods.take("clamp"), self.mods.take("wrap"));
                let Some(ty @ (Ty::U32 | Ty::S32)) = self.mods.ty() else {
                    return Ok(false);
                };
                if clamp == wrap {
                    return Ok(false);
                }
                let alu = match (clamp, ty) {
                    (true, Ty::U32) => op2(|a: u32, b: u32| if b > 31 { a } else { a & mask(0, b) }),
                    (false, Ty::U32) => op2(|a: u32, b: u32| a & mask(0, b & 31)),
                    (true, _) => op2(|a: u32, b: u32| if b > 31 { a } else { extend(a, b) }),
                    (false, _) => op2(|a: u32, b: u32| extend(a, b & 31)),
                };
                self.binary(Some(alu), ty)
            }
            "prmt" => {
                if self.mods.ty() != Some(Ty::B32) {
                    return Ok(false);
                }
                let mode = self.mods.find(|m| match m {
                    "f4e" => Some(1),
                    "b4e" => Some(2),
                    "rc8" => Some(3),
                    "ecl" => Some(4),
                    "ecr" => Some(5),
                    "rc16" => Some(6),
                    _ => None,
                });
                self.arity(4, 4)?;
                let (a, b, c) = (self.src(1, Ty::B32)?, self.src(2, Ty::B32)?, self.src(3, Ty::B32)?);
                let d = self.dst(0, Ty::B32)?;
                let alu = match mode {
                    None => op3(|a: u32, b: u32, c: u32| {
                        let all = u64::from(b) << 32 | u64::from(a);
                        let byte = |k: u32| {
                            let s = c >> (4 * k) & 15;
                            let v = (all >> (8 * (s & 7))) as u32 & 0xff;
                            let v = if s & 8 != 0 { 0u32.wrapping_sub(v >> 7) & 0xff } else { v };
                            v << (8 * k)
                        };
                        byte(0) | byte(1) | byte(2) | byte(3)
                    }),
                    Some(_) => op3p(|a: u32, b: u32, c: u32, mode| {
                        let all = u64::from(b) << 32 | u64::from(a);
                        let n = c & 3;
                        let pick = match mode {
                            1 => [n, n + 1, n + 2, n + 3],
                            2 => [n, n.wrapping_sub(1) & 7, n.wrapping_sub(2) & 7, n.wrapping_sub(3) & 7],
                            3 => [n; 4],
                            4 => [n, n.max(1), n.max(2), 3],
                            5 => [0, n.min(1), n.min(2), n],
                            _ => [2 * (n & 1), 2 * (n & 1) + 1, 2 * (n & 1), 2 * (n & 1) + 1],
                        };
                        (0..4).fold(0, |r, k| r | ((all >> (8 * pick[k])) as u32 & 0xff) << (8 * k))
                    }),
                };
                self.alu(alu, d, &[a, b, c], mode.unwrap_or(0))?;
                Ok(true)
            }
            "dp4a" | "dp2a" => {
                let hi = self.mods.take("hi");
                self.mods.take("lo");
                let (Some(at), Some(bt)) = (self.mods.ty(), self.mods.ty()) else {
                    return Ok(false);
                };
                self.arity(4, 4)?;
                let (a, b, c) = (self.src(1, Ty::B32)?, self.src(2, Ty::B32)?, self.src(3, Ty::B32)?);
                let d = self.dst(0, Ty::B32)?;
                let alu = match op {
                    "dp4a" => op3p(|a: u32, b: u32, c: u32, e| {
                        (0..4).fold(c, |s, k| s.wrapping_add((part(a, k, 8, e & 1) * part(b, k, 8, e & 2)) as u32))
                    }),
                    _ => op3p(|a: u32, b: u32, c: u32, e| {
                        let first = if e & 4 != 0 { 2 } else { 0 };
                        (0..2).fold(c, |s, k| {
                            s.wrapping_add((part(a, k, 16, e & 1) * part(b, first + k, 8, e & 2)) as u32)
                        })
                    }),
                };
                let flags = u32::from(at.signed()) | u32::from(bt.signed()) << 1 | u32::from(hi) << 2;
                self.alu(alu, d, &[a, b, c], flags)?;
                Ok(true)
            }
            "fns" => {
                if self.mods.ty() != Some(Ty::B32) {
                    return Ok(false);
                }
                self.arity(4, 4)?;
                let (a, b, c) = (self.src(1, Ty::B32)?, self.src(2, Ty::B32)?, self.src(3, Ty::B32)?);
                let d = self.dst(0, Ty::B32)?;
                let alu = op3(|a: u32, base: u32, offset: u32| {
                    let offset = offset as i32;
                    let base = (base & 31) as i32;
                    let mut left = offset.unsigned_abs();
                    if left == 0 {
                        return if a >> base & 1 != 0 { base as u32 } else { u32::MAX };
                    }
                    let mut at = base;
                    while (0..32).contains(&at) {
                        if a >> at & 1 != 0 {
                            left -= 1;
                            if left == 0 {
                                return at as u32;
                            }
                        }
                        at += offset.signum();
                    }
                    u32::MAX
                });
                self.alu(alu, d, &[a, b, c], 0)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn mov(&mut self) -> Result<bool> {
        let Some(ty) = self.mods.ty() else {
            return Ok(false);
        };
        self.class = Class::Move;
        self.arity(2, 2)?;
        if ty == Ty::Pred {
            let (x, o) = (self.operand(1)?, self.operand(0)?);
            let (a, na) = self.pred(x)?;
            let d = self.pred_dst(o)?;
            self.alu(preds(|a, _| a), d, &[a, a], u32::from(na))?;
            return Ok(true);
        }
        match (self.operand(0)?, self.operand(1)?) {
            (Operand::Vector(parts), _) if parts.len() > 1 => self.unpack(parts, ty),
            (_, Operand::Vector(parts)) if parts.len() > 1 => self.pack(parts, ty),
            (_, Operand::Name(n))
                if matches!(
                    n.as_str(),
                    "%clock" | "%clock_hi" | "%clock64" | "%globaltimer" | "%globaltimer_lo" | "%globaltimer_hi"
                ) =>
            {
                let wide = ty.bytes() == 8;
                let d = self.dst(0, ty)?;
                self.emit(Inst { d, kind: Kind::Clock { wide }, ..self.blank() })?;
                Ok(true)
            }
            (to, from) => {
                let single = |o: &Operand| match o {
                    Operand::Vector(v) if v.len() == 1 => v[0].clone(),
                    o => o.clone(),
                };
                let a = self.value(&single(from), ty)?;
                let to = self.dst_of(&single(to))?;
                let alu = match to.words {
                    2 if ty.bytes() == 8 => op1(|a: u64| a),
                    1 if ty.bytes() < 8 => op1(|a: u32| a),
                    _ => return self.fail("the destination does not fit the type"),
                };
                self.alu(alu, to.at, &[a], 0)?;
                Ok(true)
            }
        }
    }

    /// `mov.b64 {a, b}, c`
    fn unpack(&mut self, parts: &[Operand], ty: Ty) -> Result<bool> {
        let bits = ty.bytes() * 8 / parts.len() as u32;
        if bits < 8 || !bits.is_power_of_two() {
            return self.fail("this vector does not fit the type");
        }
        let mut a = self.src(1, ty)?;
        // A part may overwrite the source.
        if ty.bytes() < 8 && bits == 8 {
            let t = self.temp(1)?;
            self.part(Inst { alu: op1(|a: u32| a), d: t, a, ..self.blank() })?;
            a = t;
        }
        for (k, part) in parts.iter().enumerate() {
            if *part == Operand::Sink {
                continue;
            }
            let d = self.dst_of(part)?;
            if d.words != 1 || (d.ty.bytes() * 8 != bits && d.ty.bytes() * 8 < bits) {
                return self.fail("a part of the vector does not fit");
            }
            let alu = match (ty.bytes() == 8, bits) {
                (true, 32) => op2p(|a: u64, _: u32, e| (a >> e) as u32),
                (true, 16) => op2p(|a: u64, _: u32, e| (a >> e) as u32 & 0xffff),
                (true, _) => op2p(|a: u64, _: u32, e| (a >> e) as u32 & 0xff),
                (false, 16) => op2p(|a: u32, _: u32, e| a >> e & 0xffff),
                (false, _) => op2p(|a: u32, _: u32, e| a >> e & 0xff),
            };
            self.alu(alu, d.at, &[a, a], bits * k as u32)?;
        }
        Ok(true)
    }

    /// `mov.b64 c, {a, b}`
    fn pack(&mut self, parts: &[Operand], ty: Ty) -> Result<bool> {
        let bits = ty.bytes() * 8 / parts.len() as u32;
        let part_ty = match bits {
            8 => Ty::B8,
            16 => Ty::B16,
            32 => Ty::B32,
            _ => return self.fail("this vector does not fit the type"),
        };
        let d = self.dst(0, ty)?;
        let regs = parts.iter().map(|p| self.value(p, part_ty)).collect::<Result<Vec<_>>>()?;
        if let (&[lo, hi], 8) = (regs.as_slice(), ty.bytes()) {
            self.alu(op2(|a: u32, b: u32| u64::from(a) | u64::from(b) << 32), d, &[lo, hi], 0)?;
            return Ok(true);
        }
        if let (&[lo, hi], 32) = (regs.as_slice(), ty.bytes() * 8) {
            self.alu(op2(|a: u32, b: u32| (a & 0xffff) | b << 16), d, &[lo, hi], 0)?;
            return Ok(true);
        }
        let wide = ty.bytes() == 8;
        let t = self.temp(if wide { 2 } else { 1 })?;
        let zero = self.constant(if wide { 2 } else { 1 }, 0)?;
        for (k, reg) in regs.iter().enumerate() {
            let last = k + 1 == regs.len();
            let from = if k == 0 { zero } else { t };
            let shift = (bits * k as u32) | (bits << 8);
            let alu = match wide {
                true => op2p(|a: u64, b: u32, e| a | (u64::from(b) & ((1 << (e >> 8)) - 1)) << (e & 0xff)),
                false => op2p(|a: u32, b: u32, e| a | (b & ((1 << (e >> 8)) - 1)) << (e & 0xff)),
            };
            self.alu(alu, if last { d } else { t }, &[from, *reg], shift)?;
        }
        Ok(true)
    }

    fn compare(&mut self, op: &str) -> Result<bool> {
        const RELATIONS: [&str; 18] = [
            "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu",
            "num", "nan",
        ];
        let relation = self.mods.find(|m| RELATIONS.iter().position(|r| *r == m));
        let Some(relation) = relation.map(|i| RELATIONS[i]) else {
            return self.fail("the comparison is missing");
        };
        let join = self.mods.find(|m| match m {
            "and" => Some(1u32),
            "or" => Some(2),
            "xor" => Some(3),
            _ => None,
        });
        let ftz = self.mods.take("ftz");
        let to = if op == "set" { self.mods.ty() } else { None };
        let Some(ty) = self.mods.ty() else {
            return Ok(false);
        };
        let n = if join.is_some() { 4 } else { 3 };
        self.arity(n, n)?;
        let Some(alu) = comparison(relation, ty, ftz) else {
            return self.fail(format!("the comparison .{relation} does not go with this type"));
        };
        let (a, b) = (self.src(1, ty)?, self.src(2, ty)?);
        let e = match join {
            None => 0,
            Some(j) => {
                let o = self.operand(3)?;
                let (p, not) = self.pred(o)?;
                j | u32::from(not) << 3 | p << 4
            }
        };
        if matches!(ty, Ty::F16x2 | Ty::Bf16x2) {
            return self.compare_halves(relation, ty, ftz, op, to, (a, b), e);
        }
        if op == "setp" {
            let (p, q) = match self.operand(0)? {
                Operand::Pair(p, q) => (self.pred_dst(p)?, self.pred_dst(q)?),
                p => (self.pred_dst(p)?, NONE),
            };
            self.alu(alu, p, &[a, b, q], e)?;
            return Ok(true);
        }
        // set: all ones, or 1.0 for a float destination.
        let t = self.carry()?;
        let one = match to {
            Some(Ty::F32) => 1.0f32.to_bits(),
            Some(Ty::U32 | Ty::S32) => u32::MAX,
            Some(Ty::U16 | Ty::S16) => 0xffff,
            Some(Ty::F16) => 0x3c00,
            Some(Ty::Bf16) => 0x3f80,
            _ => return Ok(false),
        };
        let d = self.dst(0, to.unwrap_or(Ty::U32))?;
        self.alu(alu, t, &[a, b, NONE], e)?;
        self.alu(spread(), d, &[t], one)?;
        Ok(true)
    }

    /// Packed comparisons give one predicate (or one half of a register) for each half.
    #[allow(clippy::too_many_arguments)]
    fn compare_halves(
        &mut self,
        relation: &str,
        ty: Ty,
        ftz: bool,
        op: &str,
        to: Option<Ty>,
        (a, b): (u32, u32),
        e: u32,
    ) -> Result<bool> {
        let single = if ty == Ty::F16x2 { Ty::F16 } else { Ty::Bf16 };
        let Some(alu) = comparison(relation, single, ftz) else {
            return Ok(false);
        };
        let (al, ah, bl, bh) = (self.temp(1)?, self.temp(1)?, self.temp(1)?, self.temp(1)?);
        for (d, s, high) in [(al, a, 0), (ah, a, 16), (bl, b, 0), (bh, b, 16)] {
            self.alu(op2p(|a: u32, _: u32, e| a >> e & 0xffff), d, &[s, s], high)?;
        }
        if op == "setp" {
            let Operand::Pair(p, q) = self.operand(0)? else {
                return self.fail("expected `p|q`");
            };
            let (p, q) = (self.pred_dst(p)?, self.pred_dst(q)?);
            self.alu(alu, p, &[al, bl, NONE], e)?;
            self.alu(alu, q, &[ah, bh, NONE], e)?;
            return Ok(true);
        }
        let one = match to {
            Some(Ty::F16x2) => 0x3c00,
            Some(Ty::Bf16x2) => 0x3f80,
            Some(Ty::U32 | Ty::S32 | Ty::B32) => 0xffff,
            _ => return Ok(false),
        };
        let d = self.dst(0, Ty::B32)?;
        let t = self.carry()?;
        self.alu(alu, t, &[al, bl, NONE], e)?;
        self.alu(spread(), al, &[t], one)?;
        self.alu(alu, t, &[ah, bh, NONE], e)?;
        self.alu(spread(), ah, &[t], one)?;
        self.alu(op2(|a: u32, b: u32| a | b << 16), d, &[al, ah], 0)?;
        Ok(true)
    }

    /// Generic addresses to and from those of a space: adds or subtracts the space's window.
    fn cvta(&mut self) -> Result<bool> {
        let to = self.mods.take("to");
        let window = self.mods.find(|m| match m {
            "global" | "const" | "param" | "param::entry" => Some(0),
            "shared" | "shared::cta" | "shared::cluster" => Some(super::SHARED_WINDOW),
            "local" => Some(super::LOCAL_WINDOW),
            _ => None,
        });
        let (Some(window), Some(ty)) = (window, self.mods.ty()) else {
            return Ok(false);
        };
        if ty.bytes() != 8 {
            return self.fail("only 64-bit addresses are supported");
        }
        self.arity(2, 2)?;
        let a = self.src(1, Ty::U64)?;
        let d = self.dst(0, Ty::U64)?;
        let b = self.constant(2, window)?;
        let alu = if to { op2(|a: u64, b: u64| a.wrapping_sub(b)) } else { op2(|a: u64, b: u64| a.wrapping_add(b)) };
        self.alu(alu, d, &[a, b], 0)?;
        Ok(true)
    }
}

fn pick(c: u32, ftz: u32) -> f32 {
    if ftz != 0 { flush(f(c)) } else { f(c) }
}

fn part(x: u32, k: u32, bits: u32, signed: u32) -> i32 {
    let up = 32 - bits;
    let x = (x >> (k * bits)) << up;
    if signed != 0 { x as i32 >> up } else { (x >> up) as i32 }
}

fn mask(start: u32, length: u32) -> u32 {
    ((((1u64 << length) - 1) << start) & 0xffff_ffff) as u32
}

fn extend(a: u32, bits: u32) -> u32 {
    if bits == 0 { 0 } else { ((a << (32 - bits)) as i32 >> (32 - bits)) as u32 }
}

fn sign_free(a: u32) -> u32 {
    a ^ ((a as i32) >> 31) as u32
}

fn sign_free64(a: u64) -> u64 {
    a ^ ((a as i64) >> 63) as u64
}

/// `bfe`: only the low 8 bits of position and length count; beyond the top, the sign (or zero) goes on.
fn extract(a: u64, position: u32, length: u32, bits: u32, signed: bool) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if length == 0 {
        return 0;
    }
    let top = (position + length - 1).min(bits - 1);
    let sign = signed && a >> top & 1 != 0;
    let body = if position >= bits { 0 } else { a >> position };
    let have = if position >= bits { 0 } else { (bits - position).min(length) };
    let keep = if have >= 64 { u64::MAX } else { (1 << have) - 1 };
    if sign { body & keep | !keep } else { body & keep }
}

/// `bfi`
fn insert(a: u64, b: u64, position: u32, length: u32, bits: u32) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if length == 0 || position >= bits {
        return b;
    }
    let keep = if length >= 64 { u64::MAX } else { (1 << length) - 1 };
    b & !(keep << position) | (a & keep) << position
}

/// The comparison function for a relation and type.
// Unordered relations are true of NaN: `!(a >= b)` is what `ltu` means.
#[allow(clippy::neg_cmp_op_on_partial_ord)]
fn comparison(relation: &str, ty: Ty, ftz: bool) -> Option<AluFn> {
    macro_rules! ints {
        ($r:expr, |$a:ident, $b:ident: $t:ty| $x:expr, $y:expr) => {
            match $r {
                "eq" => Some(cmp(|$a: $t, $b: $t| $x == $y)),
                "ne" => Some(cmp(|$a: $t, $b: $t| $x != $y)),
                "lt" | "lo" => Some(cmp(|$a: $t, $b: $t| $x < $y)),
                "le" | "ls" => Some(cmp(|$a: $t, $b: $t| $x <= $y)),
                "gt" | "hi" => Some(cmp(|$a: $t, $b: $t| $x > $y)),
                "ge" | "hs" => Some(cmp(|$a: $t, $b: $t| $x >= $y)),
                _ => None,
            }
        };
    }
    macro_rules! floats {
        ($r:expr, |$a:ident, $b:ident: $t:ty| $x:expr, $y:expr) => {
            match $r {
                "eq" => Some(cmp(|$a: $t, $b: $t| $x == $y)),
                "ne" => Some(cmp(|$a: $t, $b: $t| $x < $y || $x > $y)),
                "lt" => Some(cmp(|$a: $t, $b: $t| $x < $y)),
                "le" => Some(cmp(|$a: $t, $b: $t| $x <= $y)),
                "gt" => Some(cmp(|$a: $t, $b: $t| $x > $y)),
                "ge" => Some(cmp(|$a: $t, $b: $t| $x >= $y)),
                "equ" => Some(cmp(|$a: $t, $b: $t| !($x < $y || $x > $y))),
                "neu" => Some(cmp(|$a: $t, $b: $t| $x != $y)),
                "ltu" => Some(cmp(|$a: $t, $b: $t| !($x >= $y))),
                "leu" => Some(cmp(|$a: $t, $b: $t| !($x > $y))),
                "gtu" => Some(cmp(|$a: $t, $b: $t| !($x <= $y))),
                "geu" => Some(cmp(|$a: $t, $b: $t| !($x < $y))),
                "num" => Some(cmp(|$a: $t, $b: $t| !$x.is_nan() && !$y.is_nan())),
                "nan" => Some(cmp(|$a: $t, $b: $t| $x.is_nan() || $y.is_nan())),
                _ => None,
            }
        };
    }
    let unsigned_only = matches!(relation, "lo" | "ls" | "hi" | "hs");
    if unsigned_only && (ty.signed() || matches!(ty, Ty::F32 | Ty::F64)) {
        return None;
    }
    match ty {
        Ty::U16 | Ty::B16 | Ty::U32 | Ty::B32 => ints!(relation, |a, b: u32| a, b),
        Ty::S16 => ints!(relation, |a, b: u32| s16(a), s16(b)),
        Ty::S32 => ints!(relation, |a, b: u32| a as i32, b as i32),
        Ty::U64 | Ty::B64 => ints!(relation, |a, b: u64| a, b),
        Ty::S64 => ints!(relation, |a, b: u64| a as i64, b as i64),
        Ty::F32 if ftz => floats!(relation, |a, b: u32| flush(f(a)), flush(f(b))),
        Ty::F32 => floats!(relation, |a, b: u32| f(a), f(b)),
        Ty::F64 => floats!(relation, |a, b: u64| d(a), d(b)),
        Ty::F16 | Ty::F16x2 if ftz => floats!(relation, |a, b: u32| flush16(a), flush16(b)),
        Ty::F16 | Ty::F16x2 => floats!(relation, |a, b: u32| f16_to_f32(a as u16), f16_to_f32(b as u16)),
        Ty::Bf16 | Ty::Bf16x2 => floats!(relation, |a, b: u32| bf16_to_f32(a as u16), bf16_to_f32(b as u16)),
        _ => None,
    }
}

fn flush16(a: u32) -> f32 {
    if a & 0x7c00 == 0 { f16_to_f32((a & 0x8000) as u16) } else { f16_to_f32(a as u16) }
}
