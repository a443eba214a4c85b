//! `cvt`: every pair of types, rounding mode, saturation.

use super::Result;
use super::body::{Body, Reg};
use crate::lanes::{Alu, op1, op1p, op2p};
use crate::numeric::{self, Format, Round, Value};
use crate::program::*;
use crate::ptx::ast::Ty;

/// What a conversion reads or writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Num {
    Int { bits: u32, signed: bool },
    Float(Format),
}

fn num(name: &str) -> Option<Num> {
    let int = |bits, signed| Some(Num::Int { bits, signed });
    match name {
        "u8" => int(8, false),
        "u16" => int(16, false),
        "u32" => int(32, false),
        "u64" => int(64, false),
        "s8" => int(8, true),
        "s16" => int(16, true),
        "s32" => int(32, true),
        "s64" => int(64, true),
        "f16" => Some(Num::Float(numeric::F16)),
        "bf16" => Some(Num::Float(numeric::BF16)),
        "tf32" => Some(Num::Float(numeric::TF32)),
        "f32" => Some(Num::Float(numeric::F32)),
        "f64" => Some(Num::Float(numeric::F64)),
        _ => None,
    }
}

const CODES: [&str; 13] = ["u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64", "f16", "bf16", "tf32", "f32", "f64"];

const SAT: u32 = 1 << 12;
const SATFINITE: u32 = 1 << 13;
const FTZ: u32 = 1 << 14;
const RELU: u32 = 1 << 15;
const TO_INTEGRAL: u32 = 1 << 16;

fn round_code(r: Round) -> u32 {
    match r {
        Round::Rn => 0,
        Round::Rz => 1,
        Round::Rm => 2,
        Round::Rp => 3,
        Round::Rna => 4,
    }
}

pub(super) fn round_of(code: u32) -> Round {
    [Round::Rn, Round::Rz, Round::Rm, Round::Rp, Round::Rna][code.min(4) as usize]
}

/// One conversion. The parameter holds the source code in bits 0..4, target in 4..8, rounding in 8..11, flags above.
/// Integer results fill 64 bits by their sign; the caller cuts.
fn cvt(a: u64, p: u32) -> u64 {
    let at = |i: u32| num(CODES[(i & 15) as usize]).unwrap_or(Num::Int { bits: 64, signed: false });
    let (from, to, round) = (at(p), at(p >> 4), round_of(p >> 8 & 7));
    let mut value = match from {
        Num::Int { bits, signed } => {
            let up = 64 - bits;
            let v = if signed { i128::from(((a << up) as i64) >> up) } else { i128::from((a << up) >> up) };
            match to {
                Num::Int { bits, signed } => {
                    let (low, high) = limits(bits, signed);
                    let v = if p & SAT != 0 { v.clamp(low, high) } else { v };
                    return wrap(v as u64, bits, signed);
                }
                Num::Float(_) => Value::from_int(v),
            }
        }
        // tf32 sits in an f32 register.
        Num::Float(f) if f == numeric::TF32 => numeric::unpack(numeric::F32, a),
        Num::Float(f) => {
            let bits = f.bits();
            let a = if bits == 64 { a } else { a & ((1 << bits) - 1) };
            let subnormal = f == numeric::F32 && a & 0x7f80_0000 == 0;
            numeric::unpack(f, if p & FTZ != 0 && subnormal { a & 0x8000_0000 } else { a })
        }
    };
    match to {
        Num::Int { bits, signed } => {
            let (low, high) = limits(bits, signed);
            // NaN becomes 0; from f64, or to 64 bits, it becomes the target's top bit alone.
            if value == Value::Nan {
                let wide = bits == 64 || from == Num::Float(numeric::F64);
                return if wide { wrap(1 << (bits - 1), bits, signed) } else { 0 };
            }
            wrap(value.to_int(round, low, high) as u64, bits, signed)
        }
        Num::Float(f) => {
            let negative = matches!(value, Value::Inf(true) | Value::Num { negative: true, .. });
            if p & RELU != 0 && (negative || value == Value::Nan) {
                value =
                    if value == Value::Nan { value } else { Value::Num { negative: false, mantissa: 0, exponent: 0 } };
            }
            if p & TO_INTEGRAL != 0
                && let Value::Num { negative, mantissa, exponent } = value
                && exponent < 0
            {
                value = Value::Num {
                    negative,
                    mantissa: numeric::round_shift(mantissa, -exponent, negative, round).into(),
                    exponent: 0,
                };
            }
            if p & SAT != 0 {
                value = match value {
                    Value::Nan | Value::Inf(true) | Value::Num { negative: true, .. } => {
                        Value::Num { negative: false, mantissa: 0, exponent: 0 }
                    }
                    Value::Inf(false) => Value::from_int(1),
                    v => v,
                };
                let bits = numeric::pack(f, value, round, false);
                let one = numeric::pack(f, Value::from_int(1), Round::Rn, false);
                return bits.min(one);
            }
            if f == numeric::TF32 {
                // Ten mantissa bits in the place of an f32's upper ten.
                return if value == Value::Nan {
                    0x7fff_ffff
                } else {
                    numeric::pack(f, value, round, p & SATFINITE != 0) << 13
                };
            }
            let bits = numeric::pack(f, value, round, p & SATFINITE != 0);
            let subnormal = f == numeric::F32 && bits & 0x7f80_0000 == 0;
            if p & FTZ != 0 && subnormal { bits & 0x8000_0000 } else { bits }
        }
    }
}

fn limits(bits: u32, signed: bool) -> (i128, i128) {
    if signed { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) }
}

fn wrap(v: u64, bits: u32, signed: bool) -> u64 {
    let up = 64 - bits;
    if signed { (((v << up) as i64) >> up) as u64 } else { (v << up) >> up }
}

/// fp8 pairs: two f32 (first operand is the upper half) to 8-bit formats, saturating.
fn to_fp8(hi: u32, lo: u32, p: u32) -> u32 {
    let f = if p & 1 != 0 { numeric::E5M2 } else { numeric::E4M3 };
    let one = |x: u32| {
        let mut v = numeric::unpack(numeric::F32, x.into());
        if p & 2 != 0 && matches!(v, Value::Inf(true) | Value::Num { negative: true, .. }) {
            v = Value::from_int(0);
        }
        numeric::pack(f, v, Round::Rn, true) as u32
    };
    one(hi) << 8 | one(lo)
}

impl Body<'_, '_> {
    pub(super) fn convert(&mut self) -> Result<bool> {
        if self.instr.opcode != "cvt" {
            return Ok(false);
        }
        self.class = Class::Convert;
        if self.mods.take("pack") {
            return self.cvt_pack();
        }
        let (rni, rounding) = (
            self.mods.find(|m| match m {
                "rni" => Some(Round::Rn),
                "rzi" => Some(Round::Rz),
                "rmi" => Some(Round::Rm),
                "rpi" => Some(Round::Rp),
                _ => None,
            }),
            self.mods.find(|m| match m {
                "rn" => Some(Round::Rn),
                "rz" => Some(Round::Rz),
                "rm" => Some(Round::Rm),
                "rp" => Some(Round::Rp),
                "rna" => Some(Round::Rna),
                _ => None,
            }),
        );
        let (ftz, sat) = (self.mods.take("ftz"), self.mods.take("sat"));
        let (finite, relu) = (self.mods.take("satfinite"), self.mods.take("relu"));
        const PACKED: [&str; 4] = ["f16x2", "bf16x2", "e4m3x2", "e5m2x2"];
        if self.instr.mods.iter().any(|m| PACKED.contains(&m.as_str())) {
            return self.cvt_packed(rounding.unwrap_or(Round::Rn), finite, relu);
        }
        let take = |b: &mut Self| b.mods.find(|m| CODES.iter().position(|c| *c == m).map(|i| i as u32));
        let (Some(to), Some(from)) = (take(self), take(self)) else {
            return Ok(false);
        };
        self.arity(2, 2)?;
        let (Some(to_num), Some(from_num)) = (num(CODES[to as usize]), num(CODES[from as usize])) else {
            return Ok(false);
        };
        let reg_ty = |n: Num| match n {
            Num::Int { bits: 64, .. } => Ty::B64,
            Num::Int { bits: 8 | 16, .. } => Ty::B16,
            Num::Int { .. } => Ty::B32,
            Num::Float(f) if f.bits() == 64 => Ty::F64,
            Num::Float(f) if f.bits() == 16 => Ty::B16,
            Num::Float(_) => Ty::F32,
        };
        let a = self.src_any(1, reg_ty(from_num))?;
        let d = self.dst_any(0)?;
        // Registers may be wider than the types, never narrower.
        let bytes = |n: Num| if let Num::Int { bits, .. } = n { bits / 8 } else { reg_ty(n).bytes() };
        if a.ty.bytes() < bytes(from_num) || d.ty.bytes() < bytes(to_num) {
            return self.fail("a register is narrower than its type");
        }
        let round = rni.or(rounding).unwrap_or(match (from_num, to_num) {
            (Num::Float(_), Num::Int { .. }) => Round::Rz,
            _ => Round::Rn,
        });
        let same_kind = |a: Num, b: Num| matches!((a, b), (Num::Float(x), Num::Float(y)) if x == y);
        let needs = match (from_num, to_num) {
            (Num::Int { .. }, Num::Int { .. }) => false,
            (Num::Float(x), Num::Float(y)) => y.bits() < x.bits() || (y.mantissa < x.mantissa),
            (Num::Float(_), Num::Int { .. }) => rni.is_none(),
            (Num::Int { .. }, Num::Float(_)) => true,
        };
        if needs && rounding.is_none() && rni.is_none() {
            return self.fail("this conversion needs a rounding modifier");
        }
        if d.words == 0 {
            return self.fail("the destination is a predicate");
        }
        let integral = rni.is_some() && same_kind(from_num, to_num);
        let p = from
            | to << 4
            | round_code(round) << 8
            | if sat { SAT } else { 0 }
            | if finite { SATFINITE } else { 0 }
            | if ftz { FTZ } else { 0 }
            | if relu { RELU } else { 0 }
            | if integral { TO_INTEGRAL } else { 0 };
        let plain = !(sat || finite || relu || ftz || integral);
        let alu = if plain { fast(CODES[from as usize], CODES[to as usize], round, a, d) } else { None };
        let alu = alu.unwrap_or_else(|| general(a.words, d.words, d.ty.bytes()));
        self.alu(alu, d.at, &[a.at], p)?;
        Ok(true)
    }

    fn cvt_packed(&mut self, round: Round, finite: bool, relu: bool) -> Result<bool> {
        let name = |m: &str| match m {
            "f16x2" => Some("f16x2"),
            "bf16x2" => Some("bf16x2"),
            "e4m3x2" => Some("e4m3x2"),
            "e5m2x2" => Some("e5m2x2"),
            "f32" => Some("f32"),
            _ => None,
        };
        let (Some(to), Some(from)) = (self.mods.find(name), self.mods.find(name)) else {
            return Ok(false);
        };
        match (to, from) {
            ("f16x2" | "bf16x2", "f32") => {
                self.arity(3, 3)?;
                let (hi, lo) = (self.src(1, Ty::F32)?, self.src(2, Ty::F32)?);
                let d = self.dst(0, Ty::B32)?;
                let to = if to == "f16x2" { 8 } else { 9 };
                let p = 11
                    | to << 4
                    | round_code(round) << 8
                    | if finite { SATFINITE } else { 0 }
                    | if relu { RELU } else { 0 };
                let alu = match (to, round, finite || relu) {
                    (8, Round::Rn, false) => op2p(|h: u32, l: u32, _| {
                        u32::from(numeric::f32_to_f16(f32::from_bits(h))) << 16
                            | u32::from(numeric::f32_to_f16(f32::from_bits(l)))
                    }),
                    (9, Round::Rn, false) => op2p(|h: u32, l: u32, _| {
                        u32::from(numeric::f32_to_bf16(f32::from_bits(h))) << 16
                            | u32::from(numeric::f32_to_bf16(f32::from_bits(l)))
                    }),
                    _ => op2p(|h: u32, l: u32, p| (cvt(h.into(), p) as u32) << 16 | cvt(l.into(), p) as u32),
                };
                self.alu(alu, d, &[hi, lo], p)?;
            }
            ("e4m3x2" | "e5m2x2", "f32") => {
                if !finite {
                    return self.fail("conversions to 8-bit floats need .satfinite");
                }
                self.arity(3, 3)?;
                let (hi, lo) = (self.src(1, Ty::F32)?, self.src(2, Ty::F32)?);
                let d = self.dst(0, Ty::B16)?;
                self.alu(op2p(to_fp8), d, &[hi, lo], u32::from(to == "e5m2x2") | u32::from(relu) << 1)?;
            }
            ("e4m3x2" | "e5m2x2", "f16x2" | "bf16x2") => {
                if !finite {
                    return self.fail("conversions to 8-bit floats need .satfinite");
                }
                self.arity(2, 2)?;
                let a = self.src(1, Ty::B32)?;
                let d = self.dst(0, Ty::B16)?;
                let alu = match from {
                    "f16x2" => op1p(|a: u32, p| {
                        let half = |h: u32| numeric::f16_to_f32(h as u16).to_bits();
                        to_fp8(half(a >> 16), half(a), p)
                    }),
                    _ => op1p(|a: u32, p| to_fp8(a & 0xffff_0000, a << 16, p)),
                };
                self.alu(alu, d, &[a], u32::from(to == "e5m2x2") | u32::from(relu) << 1)?;
            }
            ("f16x2", "e4m3x2" | "e5m2x2") => {
                self.arity(2, 2)?;
                let a = self.src(1, Ty::B16)?;
                let d = self.dst(0, Ty::B32)?;
                let alu = op1p(|a: u32, p| {
                    let f = if p & 1 != 0 { numeric::E5M2 } else { numeric::E4M3 };
                    let one = |x: u32| {
                        let mut v = numeric::unpack(f, u64::from(x & 0xff));
                        if p & 2 != 0 && matches!(v, Value::Inf(true) | Value::Num { negative: true, .. }) {
                            v = Value::from_int(0);
                        }
                        numeric::pack(numeric::F16, v, Round::Rn, false) as u32
                    };
                    one(a >> 8) << 16 | one(a)
                });
                self.alu(alu, d, &[a], u32::from(from == "e5m2x2") | u32::from(relu) << 1)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// `cvt.pack.sat.u8.s32.b32 d, a, b, c`: d = c shifted up, then b and a saturated in the low parts.
    fn cvt_pack(&mut self) -> Result<bool> {
        if !self.mods.take("sat") {
            return Ok(false);
        }
        let (Some(to), Some(Ty::S32)) = (self.mods.ty(), self.mods.ty()) else {
            return Ok(false);
        };
        let with_c = self.mods.take("b32");
        let (bits, signed) = match to {
            Ty::U16 => (16, 0),
            Ty::S16 => (16, 1),
            Ty::U8 => (8, 0),
            Ty::S8 => (8, 1),
            _ => return Ok(false),
        };
        self.arity(if with_c { 4 } else { 3 }, if with_c { 4 } else { 3 })?;
        let (a, b) = (self.src(1, Ty::S32)?, self.src(2, Ty::S32)?);
        let c = if with_c { self.src(3, Ty::B32)? } else { self.constant(1, 0)? };
        let d = self.dst(0, Ty::B32)?;
        let alu = crate::lanes::op3p(|a: u32, b: u32, c: u32, e| {
            let bits = e >> 1;
            let (low, high) = limits(bits, e & 1 != 0);
            let one = |x: u32| (i128::from(x as i32).clamp(low, high) as u32) & ((1 << bits) - 1);
            let kept = if bits == 16 { 0 } else { c << 16 };
            kept | one(a) << bits | one(b)
        });
        self.alu(alu, d, &[a, b, c], bits << 1 | signed)?;
        Ok(true)
    }
}

fn general(from_words: u32, to_words: u32, to_bytes: u32) -> Alu {
    match (from_words, to_words, to_bytes) {
        (1, 1, 4) => op1p(|a: u32, p| cvt(a.into(), p) as u32),
        (1, 1, 2) => op1p(|a: u32, p| cvt(a.into(), p) as u32 & 0xffff),
        (1, 1, _) => op1p(|a: u32, p| cvt(a.into(), p) as u32 & 0xff),
        (1, ..) => op1p(|a: u32, p| cvt(a.into(), p)),
        (_, 1, 4) => op1p(|a: u64, p| cvt(a, p) as u32),
        (_, 1, 2) => op1p(|a: u64, p| cvt(a, p) as u32 & 0xffff),
        (_, 1, _) => op1p(|a: u64, p| cvt(a, p) as u32 & 0xff),
        (..) => op1p(cvt),
    }
}

/// The common conversions on the host's own arithmetic.
fn fast(from: &str, to: &str, round: Round, a: Reg, d: Reg) -> Option<Alu> {
    Some(match (from, to, a.words, d.words) {
        ("u32", "u64" | "s64", 1, 2) => op1(|a: u32| u64::from(a)),
        ("s32", "u64" | "s64", 1, 2) => op1(|a: u32| a as i32 as i64 as u64),
        ("u64" | "s64", "u32" | "s32", 2, 1) if d.ty.bytes() == 4 => op1(|a: u64| a as u32),
        ("u16", "u32" | "s32", 1, 1) if d.ty.bytes() == 4 => op1(|a: u32| a & 0xffff),
        ("u32" | "s32", "u16", 1, 1) => op1(|a: u32| a & 0xffff),
        ("s32", "f32", 1, 1) if round == Round::Rn => op1(|a: u32| (a as i32 as f32).to_bits()),
        ("u32", "f32", 1, 1) if round == Round::Rn => op1(|a: u32| (a as f32).to_bits()),
        ("f32", "s32", 1, 1) if round == Round::Rz => op1(|a: u32| f32::from_bits(a) as i32 as u32),
        ("f32", "u32", 1, 1) if round == Round::Rz => op1(|a: u32| f32::from_bits(a) as u32),
        ("f32", "f64", 1, 2) => op1(|a: u32| f64::from(f32::from_bits(a)).to_bits()),
        ("f64", "f32", 2, 1) if round == Round::Rn => op1(|a: u64| (f64::from_bits(a) as f32).to_bits()),
        ("f16", "f32", 1, 1) => op1(|a: u32| numeric::f16_to_f32(a as u16).to_bits()),
        ("bf16", "f32", 1, 1) => op1(|a: u32| a << 16),
        ("f32", "f16", 1, 1) if round == Round::Rn => op1(|a: u32| u32::from(numeric::f32_to_f16(f32::from_bits(a)))),
        ("f32", "bf16", 1, 1) if round == Round::Rn => op1(|a: u32| u32::from(numeric::f32_to_bf16(f32::from_bits(a)))),
        _ => return None,
    })
}
