//! What a lane computes in floating-point instructions.
//!
//! To nearest, f32 and f64 use the host's arithmetic; other rounding modes go through [`crate::numeric`]. Halves are
//! computed in f32 (exact enough for one operation, see `numeric::fma_odd` for the fused one) and rounded once.
//! Approximate functions are computed in f64 and rounded, which is within every documented error bound.

use super::convert::round_of;
use crate::lanes::{Alu, op1};
use crate::numeric::{self, Format, Round, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, flush, fma_odd};

pub(super) fn f(x: u32) -> f32 {
    f32::from_bits(x)
}
pub(super) fn d(x: u64) -> f64 {
    f64::from_bits(x)
}
/// What the approximations of f64 read and write: the upper 32 bits, subnormal numbers as zeros.
pub(super) fn upper(x: f64) -> u64 {
    (if x.is_subnormal() { 0f64.copysign(x) } else { x }).to_bits() & !0xffff_ffff
}

pub(super) const ADD: u32 = 0;
pub(super) const SUB: u32 = 1;
pub(super) const MUL: u32 = 2;
pub(super) const FMA: u32 = 3;
pub(super) const DIV: u32 = 4;
pub(super) const SQRT: u32 = 5;

pub(super) const FTZ: u32 = 1 << 8;
pub(super) const SAT: u32 = 1 << 9;
pub(super) const RELU: u32 = 1 << 10;
/// min and max: a NaN operand makes the result NaN.
pub(super) const NAN: u32 = 1 << 11;
/// The result takes the product of the signs, of absolute values compared.
pub(super) const XORSIGN: u32 = 1 << 12;

pub(super) fn saturate(x: f32) -> f32 {
    if x.is_nan() || x <= 0.0 { 0.0 } else { x.min(1.0) }
}

/// One operation by exact arithmetic. Parameter: operation in bits 0..4, rounding in 4..8, flags.
pub(super) fn exact(fmt: Format, a: u64, b: u64, c: u64, p: u32) -> u64 {
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
pub(super) fn extreme(a: f32, b: f32, p: u32) -> f32 {
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
pub(super) const BF16: u32 = 1 << 16;
/// Both halves of a 32-bit register.
pub(super) const PAIR: u32 = 1 << 17;

/// With `.ftz`, zeros in place of the subnormal f16 in either half of `x`. bf16 has no `.ftz`.
pub(super) fn half_flush(x: u32, p: u32) -> u32 {
    let one = |h: u32| if h & 0x7c00 == 0 { h & 0x8000 } else { h };
    if p & FTZ != 0 && p & BF16 == 0 { one(x & 0xffff) | one(x >> 16) << 16 } else { x }
}

pub(super) fn half_in(x: u32, p: u32) -> f32 {
    let x = half_flush(x & 0xffff, p) as u16;
    if p & BF16 != 0 { bf16_to_f32(x) } else { f16_to_f32(x) }
}

pub(super) fn half_out(v: f32, p: u32) -> u32 {
    let v = if p & SAT != 0 { saturate(v) } else { v };
    let v = if p & RELU != 0 && v <= 0.0 { 0.0 } else { v };
    half_flush(u32::from(if p & BF16 != 0 { f32_to_bf16(v) } else { f32_to_f16(v) }), p)
}

pub(super) fn half1(a: u32, p: u32, g: impl Fn(f32) -> f32) -> u32 {
    let one = |x: u32| half_out(g(half_in(x, p)), p);
    if p & PAIR != 0 { one(a) | one(a >> 16) << 16 } else { one(a) }
}

pub(super) fn half2(a: u32, b: u32, p: u32, g: impl Fn(f32, f32) -> f32) -> u32 {
    let one = |x: u32, y: u32| half_out(g(half_in(x, p), half_in(y, p)), p);
    if p & PAIR != 0 { one(a, b) | one(a >> 16, b >> 16) << 16 } else { one(a, b) }
}

/// Rounds a round-to-odd f64 to a half once.
pub(super) fn half_fma(a: u32, b: u32, c: u32, p: u32) -> u32 {
    let fmt = if p & BF16 != 0 { numeric::BF16 } else { numeric::F16 };
    let one = |a: u32, b: u32, c: u32| {
        let v = fma_odd(half_in(a, p).into(), half_in(b, p).into(), half_in(c, p).into());
        let h = numeric::convert(numeric::F64, v.to_bits(), fmt, Round::Rn, false) as u32;
        let x = half_in(h, p & BF16);
        if p & (SAT | RELU | FTZ) != 0 && !x.is_nan() || p & SAT != 0 { half_out(x, p) } else { h }
    };
    if p & PAIR != 0 { one(a, b, c) | one(a >> 16, b >> 16, c >> 16) << 16 } else { one(a, b, c) }
}

/// Maximum without modifiers: a NaN loses, and of two zeros +0 wins.
pub(super) fn fast_max(a: f32, b: f32) -> f32 {
    let larger = if a > b { a } else { b };
    let larger = if a == b { f(a.to_bits() & b.to_bits()) } else { larger };
    let larger = if b.is_nan() { a } else { larger };
    if a.is_nan() && b.is_nan() { f(0x7fff_ffff) } else { larger }
}

pub(super) fn extreme64(a: f64, b: f64, max: bool) -> f64 {
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
pub(super) fn function(op: &str, ftz: bool) -> Alu {
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
pub(super) fn exp2(x: f32) -> f32 {
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
