//! Floating-point arithmetic: f32, f64, f16, bf16 and their pairs. `float_lane` has what a lane computes.

use super::Result;
use super::body::Body;
use super::float_lane::*;
use crate::lanes::{op1, op1p, op2, op2p, op3, op3p, test};
use crate::numeric::{self, f16_to_f32, flush};
use crate::program::*;
use crate::ptx::ast::{Operand, Ty};

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
            self.part(widen, t, a)?;
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
            "neg" => (op1p(|a: u32, p| half_flush(a, p) ^ if p & PAIR != 0 { 0x8000_8000 } else { 0x8000 }), e),
            "abs" => (op1p(|a: u32, p| half_flush(a, p) & if p & PAIR != 0 { 0x7fff_7fff } else { 0x7fff }), e),
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
