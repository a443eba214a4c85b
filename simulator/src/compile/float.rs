//! Floating-point arithmetic: f32, f64, f16, bf16 and their pairs.
//!
//! To nearest, f32 and f64 use the host's arithmetic; other rounding modes go through [`crate::numeric`]. Halves are
//! computed in f32 (exact enough for one operation, see `numeric::fma_odd` for the fused one) and rounded once.
//! Approximate functions are computed in f64 and rounded, which is within every documented error bound.

use super::Result;
use super::body::Body;
use super::convert::round_of;
use crate::lanes::{op1, op1p, op2, op2p, op3, op3p, test};
use crate::numeric::{self, Format, Round, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, flush, fma_odd};
use crate::program::*;
use crate::ptx::ast::{Operand, Ty};

fn f(x: u32) -> f32 {
    f32::from_bits(x)
}
fn d(x: u64) -> f64 {
    f64::from_bits(x)
}
/// What the approximations of f64 read and write: the upper 32 bits, subnormal numbers as zeros.
fn upper(x: f64) -> u64 {
    (if x.is_subnormal() { 0f64.copysign(x) } else { x }).to_bits() & !0xffff_ffff
}

const ADD: u32 = 0;
const SUB: u32 = 1;
const MUL: u32 = 2;
const FMA: u32 = 3;
const DIV: u32 = 4;
const SQRT: u32 = 5;

const FTZ: u32 = 1 << 8;
const SAT: u32 = 1 << 9;
const RELU: u32 = 1 << 10;
/// min and max: a NaN operand makes the result NaN.
const NAN: u32 = 1 << 11;
/// The result takes the product of the signs, of absolute values compared.
const XORSIGN: u32 = 1 << 12;

fn saturate(x: f32) -> f32 {
    if x.is_nan() || x <= 0.0 { 0.0 } else { x.min(1.0) }
}

/// One operation by exact arithmetic. Parameter: operation in bits 0..4, rounding in 4..8, flags.
fn exact(fmt: Format, a: u64, b: u64, c: u64, p: u32) -> u64 {
    let round = round_of(p >> 4 & 7);
    let single = fmt == numeric::F32;
    let read = |x: u64| {
        let flushed = p & FTZ != 0 && single && x & 0x7f80_0000 == 0;
        numeric::unpack(fmt, if flushed { x & 0x8000_0000 } else { x })
    };
    let value = match p & 15 {
        ADD => read(a).add(read(b), round),
        SUB => read(a).add(read(b).negate(), round),
        MUL => read(a).mul(read(b)),
        FMA => read(a).mul(read(b)).add(read(c), round),
        DIV => read(a).div(read(b)),
        _ => read(a).sqrt(),
    };
    let bits = numeric::pack(fmt, value, round, false);
    if single {
        let x = f(bits as u32);
        let x = if p & FTZ != 0 { flush(x) } else { x };
        return (if p & SAT != 0 { saturate(x) } else { x }).to_bits().into();
    }
    if p & SAT != 0 {
        let x = d(bits);
        return if x.is_nan() || x <= 0.0 { 0 } else { x.min(1.0).to_bits() };
    }
    bits
}

/// `min` and `max` of f32 with all their modifiers; bit 0 of the parameter is max.
fn extreme(a: f32, b: f32, p: u32) -> f32 {
    let (a, b) = if p & FTZ != 0 { (flush(a), flush(b)) } else { (a, b) };
    let sign = (a.to_bits() ^ b.to_bits()) & 0x8000_0000;
    let (a, b) = if p & XORSIGN != 0 { (a.abs(), b.abs()) } else { (a, b) };
    let r = match (a.is_nan(), b.is_nan()) {
        (true, true) => f(0x7fff_ffff),
        (true, false) | (false, true) if p & NAN != 0 => f(0x7fff_ffff),
        (true, false) => b,
        (false, true) => a,
        // -0 is less than +0.
        _ if a == b => {
            if (p & 1 != 0) == a.is_sign_negative() {
                b
            } else {
                a
            }
        }
        _ if p & 1 != 0 => {
            if a > b {
                a
            } else {
                b
            }
        }
        _ => {
            if a < b {
                a
            } else {
                b
            }
        }
    };
    if p & XORSIGN != 0 && !r.is_nan() { f(r.to_bits() | sign) } else { r }
}

/// Applies an f32 function to 16-bit values: bit 16 of the parameter means bf16.
const BF16: u32 = 1 << 16;
/// Both halves of a 32-bit register.
const PAIR: u32 = 1 << 17;

fn half_in(x: u32, p: u32) -> f32 {
    let v = if p & BF16 != 0 { bf16_to_f32(x as u16) } else { f16_to_f32(x as u16) };
    if p & FTZ != 0 && p & BF16 == 0 && x & 0x7c00 == 0 { f(v.to_bits() & 0x8000_0000) } else { v }
}

fn half_out(v: f32, p: u32) -> u32 {
    let v = if p & SAT != 0 { saturate(v) } else { v };
    let v = if p & RELU != 0 && v <= 0.0 { 0.0 } else { v };
    let h = u32::from(if p & BF16 != 0 { f32_to_bf16(v) } else { f32_to_f16(v) });
    if p & FTZ != 0 && p & BF16 == 0 && h & 0x7c00 == 0 { h & 0x8000 } else { h }
}

fn half1(a: u32, p: u32, g: impl Fn(f32) -> f32) -> u32 {
    let one = |x: u32| half_out(g(half_in(x, p)), p);
    if p & PAIR != 0 { one(a) | one(a >> 16) << 16 } else { one(a) }
}

fn half2(a: u32, b: u32, p: u32, g: impl Fn(f32, f32) -> f32) -> u32 {
    let one = |x: u32, y: u32| half_out(g(half_in(x, p), half_in(y, p)), p);
    if p & PAIR != 0 { one(a, b) | one(a >> 16, b >> 16) << 16 } else { one(a, b) }
}

/// Rounds a round-to-odd f64 to a half once.
fn half_fma(a: u32, b: u32, c: u32, p: u32) -> u32 {
    let fmt = if p & BF16 != 0 { numeric::BF16 } else { numeric::F16 };
    let one = |a: u32, b: u32, c: u32| {
        let v = fma_odd(half_in(a, p).into(), half_in(b, p).into(), half_in(c, p).into());
        let h = numeric::convert(numeric::F64, v.to_bits(), fmt, Round::Rn, false) as u32;
        let x = half_in(h, p & BF16);
        if p & (SAT | RELU | FTZ) != 0 && !x.is_nan() || p & SAT != 0 { half_out(x, p) } else { h }
    };
    if p & PAIR != 0 { one(a, b, c) | one(a >> 16, b >> 16, c >> 16) << 16 } else { one(a, b, c) }
}

impl Body<'_, '_> {
    fn float_mods(&mut self) -> u32 {
        let mut p = 0;
        for (name, flag) in [("ftz", FTZ), ("sat", SAT), ("relu", RELU), ("NaN", NAN)] {
            if self.mods.take(name) {
                p |= flag;
            }
        }
        if self.mods.take("xorsign") {
            p |= XORSIGN;
            self.mods.take("abs");
        }
        p
    }

    fn rounding(&mut self) -> Option<u32> {
        self.mods.find(|m| ["rn", "rz", "rm", "rp"].iter().position(|r| *r == m).map(|i| i as u32))
    }

    pub(super) fn float(&mut self) -> Result<bool> {
        let op = self.instr.opcode.as_str();
        let known = [
            "add", "sub", "mul", "fma", "mad", "div", "rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh",
            "neg", "abs", "min", "max", "copysign", "testp",
        ];
        if !known.contains(&op) {
            return Ok(false);
        }
        let approx = self.mods.take("approx");
        let full = self.mods.take("full");
        let round = self.rounding();
        let p = self.float_mods();
        if op == "testp" {
            return self.testp();
        }
        if self.mods.take("f32x2") {
            return self.float_pair(op, round, p);
        }
        let Some(ty) = self.mods.ty() else {
            return Ok(false);
        };
        if ty == Ty::F32
            && matches!(op, "add" | "sub" | "fma")
            && let Some(half @ (Ty::F16 | Ty::Bf16)) = self.mods.ty()
        {
            return self.mixed(op, half, round, p);
        }
        self.class = match ty {
            Ty::F32 => Class::Float,
            Ty::F64 => Class::Double,
            _ => Class::Half,
        };
        self.flops = match op {
            "fma" | "mad" => 2,
            "add" | "sub" | "mul" => 1,
            _ => 0,
        };
        if ty == Ty::F64 {
            self.flops *= 2;
        }
        if matches!(op, "rcp" | "rsqrt" | "sqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" | "div") {
            self.class = Class::Special;
        }
        match ty {
            Ty::F32 => self.single(op, approx || full, round, p),
            Ty::F64 => self.double(op, approx, round, p),
            Ty::F16 | Ty::F16x2 | Ty::Bf16 | Ty::Bf16x2 => self.half(op, ty, approx, round, p),
            _ => Ok(false),
        }
    }

    /// Two f32 in a 64-bit register.
    fn float_pair(&mut self, op: &str, round: Option<u32>, p: u32) -> Result<bool> {
        let (code, n) = match op {
            "add" => (ADD, 2),
            "sub" => (SUB, 2),
            "mul" => (MUL, 2),
            "fma" => (FMA, 3),
            _ => return Ok(false),
        };
        (self.class, self.flops) = (Class::Float, if n == 3 { 4 } else { 2 });
        let (d, s) = self.sources(n, Ty::B64)?;
        let pair = |a: u64, b: u64, c: u64, p: u32| {
            let one = |shift: u32| {
                let [a, b, c] = [a, b, c].map(|x| f((x >> shift) as u32));
                let [a, b, c] = if p & FTZ != 0 { [a, b, c].map(flush) } else { [a, b, c] };
                let r = match p & 15 {
                    _ if p >> 4 & 7 != 0 => {
                        return exact(numeric::F32, a.to_bits().into(), b.to_bits().into(), c.to_bits().into(), p)
                            << shift;
                    }
                    ADD => a + b,
                    SUB => a - b,
                    MUL => a * b,
                    _ => a.mul_add(b, c),
                };
                u64::from(if p & FTZ != 0 { flush(r) } else { r }.to_bits()) << shift
            };
            one(0) | one(32)
        };
        let (alu, s) = (op3p(pair), [s[0], s[1], s.get(2).copied().unwrap_or(s[0])]);
        self.alu(alu, d, &s, code | round.unwrap_or(0) << 4 | p)?;
        Ok(true)
    }

    /// `add.f32.bf16 d, a, c`: a half widened first.
    fn mixed(&mut self, op: &str, half: Ty, round: Option<u32>, p: u32) -> Result<bool> {
        (self.class, self.flops) = (Class::Float, 1);
        let n = if op == "fma" { 3 } else { 2 };
        self.arity(n + 1, n + 1)?;
        let mut s = Vec::new();
        for i in 1..n {
            let (a, t) = (self.src(i, half)?, self.temp(1)?);
            let widen =
                if half == Ty::F16 { op1(|a: u32| f16_to_f32(a as u16).to_bits()) } else { op1(|a: u32| a << 16) };
            self.part(Inst { alu: widen, d: t, a, ..self.blank() })?;
            s.push(t);
        }
        s.push(self.src(n, Ty::F32)?);
        let d = self.dst(0, Ty::F32)?;
        let code = match op {
            "add" => ADD,
            "sub" => SUB,
            _ => FMA,
        };
        let alu = match n {
            2 => op2p(|a: u32, b: u32, p| exact(numeric::F32, a.into(), b.into(), 0, p) as u32),
            _ => op3p(|a: u32, b: u32, c: u32, p| exact(numeric::F32, a.into(), b.into(), c.into(), p) as u32),
        };
        self.alu(alu, d, &s, code | round.unwrap_or(0) << 4 | p)?;
        Ok(true)
    }

    fn sources(&mut self, n: usize, ty: Ty) -> Result<(u32, Vec<u32>)> {
        self.arity(n + 1, n + 1)?;
        let s = (1..=n).map(|i| self.src(i, ty)).collect::<Result<Vec<_>>>()?;
        Ok((self.dst(0, ty)?, s))
    }

    fn single(&mut self, op: &str, approx: bool, round: Option<u32>, p: u32) -> Result<bool> {
        let slow = round.is_some_and(|r| r != 0) || p & SAT != 0;
        let q = round.unwrap_or(0) << 4 | p;
        let ftz = p & FTZ != 0;
        let n = match op {
            "fma" | "mad" => 3,
            "add" | "sub" | "mul" | "div" | "min" | "max" | "copysign" => 2,
            _ => 1,
        };
        // Three-operand min and max.
        if matches!(op, "min" | "max") && self.count() == 4 {
            let (d, s) = self.sources(3, Ty::F32)?;
            let alu = op3p(|a: u32, b: u32, c: u32, p| extreme(extreme(f(a), f(b), p), f(c), p).to_bits());
            self.alu(alu, d, &s, p | u32::from(op == "max"))?;
            return Ok(true);
        }
        let (d, s) = self.sources(n, Ty::F32)?;
        let code = match op {
            "add" => ADD,
            "sub" => SUB,
            "mul" => MUL,
            "fma" | "mad" => FMA,
            "div" | "rcp" => DIV,
            _ => SQRT,
        };
        let (alu, e) = match op {
            "add" | "sub" | "mul" if slow => {
                (op2p(|a: u32, b: u32, p| exact(numeric::F32, a.into(), b.into(), 0, p) as u32), q | code)
            }
            "fma" | "mad" if slow => (
                op3p(|a: u32, b: u32, c: u32, p| exact(numeric::F32, a.into(), b.into(), c.into(), p) as u32),
                q | code,
            ),
            "add" if ftz => (op2(|a: u32, b: u32| flush(flush(f(a)) + flush(f(b))).to_bits()), 0),
            "sub" if ftz => (op2(|a: u32, b: u32| flush(flush(f(a)) - flush(f(b))).to_bits()), 0),
            "mul" if ftz => (op2(|a: u32, b: u32| flush(flush(f(a)) * flush(f(b))).to_bits()), 0),
            "add" => (op2(|a: u32, b: u32| (f(a) + f(b)).to_bits()), 0),
            "sub" => (op2(|a: u32, b: u32| (f(a) - f(b)).to_bits()), 0),
            "mul" => (op2(|a: u32, b: u32| (f(a) * f(b)).to_bits()), 0),
            "fma" | "mad" if ftz => {
                (op3(|a: u32, b: u32, c: u32| flush(flush(f(a)).mul_add(flush(f(b)), flush(f(c)))).to_bits()), 0)
            }
            "fma" | "mad" => (op3(|a: u32, b: u32, c: u32| f(a).mul_add(f(b), f(c)).to_bits()), 0),
            "div" if !approx && slow => {
                (op2p(|a: u32, b: u32, p| exact(numeric::F32, a.into(), b.into(), 0, p) as u32), q | code)
            }
            "div" if ftz => (op2(|a: u32, b: u32| flush(flush(f(a)) / flush(f(b))).to_bits()), 0),
            "div" => (op2(|a: u32, b: u32| (f(a) / f(b)).to_bits()), 0),
            "rcp" if !approx && slow => {
                (op1p(|a: u32, p| exact(numeric::F32, 1.0f32.to_bits().into(), a.into(), 0, p) as u32), q | code)
            }
            "rcp" if ftz => (op1(|a: u32| flush(1.0 / flush(f(a))).to_bits()), 0),
            "rcp" => (op1(|a: u32| (1.0 / f(a)).to_bits()), 0),
            "sqrt" if !approx && slow => (op1p(|a: u32, p| exact(numeric::F32, a.into(), 0, 0, p) as u32), q | code),
            "sqrt" if ftz => (op1(|a: u32| flush(flush(f(a)).sqrt()).to_bits()), 0),
            "sqrt" => (op1(|a: u32| f(a).sqrt().to_bits()), 0),
            "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" => (function(op, ftz), 0),
            "neg" if ftz => (op1(|a: u32| flush(f(a)).to_bits() ^ 0x8000_0000), 0),
            "neg" => (op1(|a: u32| a ^ 0x8000_0000), 0),
            "abs" if ftz => (op1(|a: u32| flush(f(a)).to_bits() & 0x7fff_ffff), 0),
            "abs" => (op1(|a: u32| a & 0x7fff_ffff), 0),
            // PTX: the sign of a, the magnitude of b.
            "copysign" => (op2(|a: u32, b: u32| (a & 0x8000_0000) | (b & 0x7fff_ffff)), 0),
            "max" if p == 0 => (op2(|a: u32, b: u32| fast_max(f(a), f(b)).to_bits()), 0),
            "min" | "max" => (op2p(|a: u32, b: u32, p| extreme(f(a), f(b), p).to_bits()), p | u32::from(op == "max")),
            _ => return Ok(false),
        };
        self.alu(alu, d, &s, e)?;
        Ok(true)
    }

    fn double(&mut self, op: &str, approx: bool, round: Option<u32>, p: u32) -> Result<bool> {
        let slow = round.is_some_and(|r| r != 0) || p & SAT != 0;
        let q = round.unwrap_or(0) << 4 | p;
        let n = match op {
            "fma" | "mad" => 3,
            "add" | "sub" | "mul" | "div" | "min" | "max" | "copysign" => 2,
            _ => 1,
        };
        let (dst, s) = self.sources(n, Ty::F64)?;
        let (alu, e) = match op {
            "add" if slow => (op2p(|a: u64, b: u64, p| exact(numeric::F64, a, b, 0, p)), q | ADD),
            "sub" if slow => (op2p(|a: u64, b: u64, p| exact(numeric::F64, a, b, 0, p)), q | SUB),
            "mul" if slow => (op2p(|a: u64, b: u64, p| exact(numeric::F64, a, b, 0, p)), q | MUL),
            "div" if slow => (op2p(|a: u64, b: u64, p| exact(numeric::F64, a, b, 0, p)), q | DIV),
            "fma" | "mad" if slow => (op3p(|a: u64, b: u64, c: u64, p| exact(numeric::F64, a, b, c, p)), q | FMA),
            "sqrt" if slow => (op1p(|a: u64, p| exact(numeric::F64, a, 0, 0, p)), q | SQRT),
            "rcp" if slow => (op1p(|a: u64, p| exact(numeric::F64, 1.0f64.to_bits(), a, 0, p)), q | DIV),
            "add" => (op2(|a: u64, b: u64| (d(a) + d(b)).to_bits()), 0),
            "sub" => (op2(|a: u64, b: u64| (d(a) - d(b)).to_bits()), 0),
            "mul" => (op2(|a: u64, b: u64| (d(a) * d(b)).to_bits()), 0),
            "fma" | "mad" => (op3(|a: u64, b: u64, c: u64| d(a).mul_add(d(b), d(c)).to_bits()), 0),
            "div" => (op2(|a: u64, b: u64| (d(a) / d(b)).to_bits()), 0),
            "sqrt" => (op1(|a: u64| d(a).sqrt().to_bits()), 0),
            "rcp" if approx => (op1(|a: u64| upper(1.0 / d(upper(d(a))))), 0),
            "rcp" => (op1(|a: u64| (1.0 / d(a)).to_bits()), 0),
            "rsqrt" if p & FTZ != 0 => (op1(|a: u64| upper(1.0 / d(upper(d(a))).sqrt())), 0),
            "rsqrt" => (op1(|a: u64| (1.0 / d(a).sqrt()).to_bits()), 0),
            "neg" => (op1(|a: u64| a ^ 1 << 63), 0),
            "abs" => (op1(|a: u64| a & !(1 << 63)), 0),
            "copysign" => (op2(|a: u64, b: u64| (a & 1 << 63) | (b & !(1 << 63))), 0),
            "min" => (op2(|a: u64, b: u64| extreme64(d(a), d(b), false).to_bits()), 0),
            "max" => (op2(|a: u64, b: u64| extreme64(d(a), d(b), true).to_bits()), 0),
            _ => return Ok(false),
        };
        self.alu(alu, dst, &s, e)?;
        Ok(true)
    }

    fn half(&mut self, op: &str, ty: Ty, approx: bool, round: Option<u32>, p: u32) -> Result<bool> {
        if round.is_some_and(|r| r != 0) {
            return self.fail("halves round to nearest only");
        }
        let pair = matches!(ty, Ty::F16x2 | Ty::Bf16x2);
        let b = matches!(ty, Ty::Bf16 | Ty::Bf16x2);
        let e = p | if pair { PAIR } else { 0 } | if b { BF16 } else { 0 };
        let n = match op {
            "fma" => 3,
            "add" | "sub" | "mul" | "min" | "max" | "copysign" => 2,
            _ => 1,
        };
        let (d, s) = self.sources(n, ty)?;
        let (alu, e) = match op {
            "add" => (op2p(|a: u32, b: u32, p| half2(a, b, p, |x, y| x + y)), e),
            "sub" => (op2p(|a: u32, b: u32, p| half2(a, b, p, |x, y| x - y)), e),
            "mul" => (op2p(|a: u32, b: u32, p| half2(a, b, p, |x, y| x * y)), e),
            "fma" => (op3p(half_fma), e),
            "neg" => (op1p(|a: u32, p| a ^ if p & PAIR != 0 { 0x8000_8000 } else { 0x8000 }), e),
            "abs" => (op1p(|a: u32, p| a & if p & PAIR != 0 { 0x7fff_7fff } else { 0x7fff }), e),
            "min" => (op2p(|a: u32, b: u32, p| half2(a, b, p, |x, y| extreme(x, y, p & (NAN | XORSIGN)))), e),
            "max" => (op2p(|a: u32, b: u32, p| half2(a, b, p, |x, y| extreme(x, y, p & (NAN | XORSIGN) | 1))), e),
            "tanh" if approx => (op1p(|a: u32, p| half1(a, p, |x| f64::from(x).tanh() as f32)), e),
            "ex2" if approx => (op1p(|a: u32, p| half1(a, p, |x| f64::from(x).exp2() as f32)), e),
            _ => return Ok(false),
        };
        self.alu(alu, d, &s, e)?;
        Ok(true)
    }

    fn testp(&mut self) -> Result<bool> {
        let what = self.mods.find(|m| {
            ["finite", "infinite", "number", "notanumber", "normal", "subnormal"].iter().position(|w| *w == m)
        });
        let (Some(what), Some(ty)) = (what, self.mods.ty()) else {
            return Ok(false);
        };
        self.arity(2, 2)?;
        let a = self.src(1, ty)?;
        let o: &Operand = self.operand(0)?;
        let p = self.pred_dst(o)?;
        let alu = match (what, ty) {
            (0, Ty::F32) => test(|a: u32| f(a).is_finite()),
            (1, Ty::F32) => test(|a: u32| f(a).is_infinite()),
            (2, Ty::F32) => test(|a: u32| !f(a).is_nan()),
            (3, Ty::F32) => test(|a: u32| f(a).is_nan()),
            // Zeros count as normal.
            (4, Ty::F32) => test(|a: u32| f(a).is_normal() || f(a) == 0.0),
            (5, Ty::F32) => test(|a: u32| f(a).is_subnormal()),
            (0, Ty::F64) => test(|a: u64| d(a).is_finite()),
            (1, Ty::F64) => test(|a: u64| d(a).is_infinite()),
            (2, Ty::F64) => test(|a: u64| !d(a).is_nan()),
            (3, Ty::F64) => test(|a: u64| d(a).is_nan()),
            (4, Ty::F64) => test(|a: u64| d(a).is_normal() || d(a) == 0.0),
            (5, Ty::F64) => test(|a: u64| d(a).is_subnormal()),
            _ => return Ok(false),
        };
        self.alu(alu, p, &[a], 0)?;
        Ok(true)
    }
}

/// Maximum without modifiers: a NaN loses, and of two zeros +0 wins.
fn fast_max(a: f32, b: f32) -> f32 {
    let larger = if a > b { a } else { b };
    let larger = if a == b { f(a.to_bits() & b.to_bits()) } else { larger };
    let larger = if b.is_nan() { a } else { larger };
    if a.is_nan() && b.is_nan() { f(0x7fff_ffff) } else { larger }
}

fn extreme64(a: f64, b: f64, max: bool) -> f64 {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => f64::from_bits(numeric::F64.nan),
        (true, false) => b,
        (false, true) => a,
        _ if a == b => {
            if max == a.is_sign_negative() {
                b
            } else {
                a
            }
        }
        _ if (a > b) == max => a,
        _ => b,
    }
}

/// The approximate functions of f32.
fn function(op: &str, ftz: bool) -> AluFn {
    macro_rules! both {
        ($g:expr) => {
            if ftz {
                op1(|a: u32| flush($g(f64::from(flush(f(a)))) as f32).to_bits())
            } else {
                op1(|a: u32| ($g(f64::from(f(a))) as f32).to_bits())
            }
        };
    }
    match op {
        "rsqrt" => both!(|x: f64| 1.0 / x.sqrt()),
        "sin" => both!(f64::sin),
        "cos" => both!(f64::cos),
        "lg2" => both!(f64::log2),
        "ex2" if ftz => op1(|a: u32| flush(exp2(flush(f(a)))).to_bits()),
        "ex2" => op1(|a: u32| exp2(f(a)).to_bits()),
        _ => both!(f64::tanh),
    }
}

// Comparisons instead of `clamp`: they vectorise, and a NaN passes through.
#[allow(clippy::manual_clamp)]
/// 2^x by a polynomial on the fraction, in f64: error below 1e-9, and it vectorises.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    let x = f64::from(x);
    let y = if x > 1100.0 {
        1100.0
    } else if x < -1100.0 {
        -1100.0
    } else {
        x
    };
    // Adding 1.5 * 2^52 rounds to an integer in the low mantissa bits.
    let shifted = y + 6_755_399_441_055_744.0;
    let n = shifted - 6_755_399_441_055_744.0;
    let t = (y - n) * std::f64::consts::LN_2;
    let p = 1.0
        + t * (1.0
            + t * (0.5 + t * (1.0 / 6.0 + t * (1.0 / 24.0 + t * (1.0 / 120.0 + t * (1.0 / 720.0 + t / 5040.0))))));
    let n = if n < -1020.0 {
        -1020.0
    } else if n > 1020.0 {
        1020.0
    } else {
        n
    };
    let scale = f64::from_bits((((n as i32 + 1023) as u64) << 52) & (0x7ff << 52));
    let r = (p * scale) as f32;
    if x.is_nan() { f32::from_bits(0x7fff_ffff) } else { r }
}
