//! Floating-point formats in software: exact values, one rounding, every rounding mode.
//!
//! The common case (f32 and f64 to nearest) runs on the host's own arithmetic; this module does the rest.

/// Rounding modes of PTX.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Round {
    /// To nearest, ties to even.
    Rn,
    /// Towards zero.
    Rz,
    /// Towards minus infinity.
    Rm,
    /// Towards plus infinity.
    Rp,
    /// To nearest, ties away from zero.
    Rna,
}

/// A binary format: exponent and mantissa bits, and what its largest exponent means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Format {
    pub exponent: u32,
    pub mantissa: u32,
    /// e4m3: no infinity, only the all-ones pattern is NaN.
    pub finite: bool,
    pub nan: u64,
}

pub(crate) const F16: Format = Format { exponent: 5, mantissa: 10, finite: false, nan: 0x7fff };
pub(crate) const BF16: Format = Format { exponent: 8, mantissa: 7, finite: false, nan: 0x7fff };
pub(crate) const TF32: Format = Format { exponent: 8, mantissa: 10, finite: false, nan: 0x3_ffff };
pub(crate) const F32: Format = Format { exponent: 8, mantissa: 23, finite: false, nan: 0x7fff_ffff };
pub(crate) const F64: Format = Format { exponent: 11, mantissa: 52, finite: false, nan: 0x7fff_ffff_ffff_ffff };
pub(crate) const E4M3: Format = Format { exponent: 4, mantissa: 3, finite: true, nan: 0x7f };
pub(crate) const E5M2: Format = Format { exponent: 5, mantissa: 2, finite: false, nan: 0x7f };

impl Format {
    fn bias(self) -> i32 {
        (1 << (self.exponent - 1)) - 1
    }
    pub(crate) fn bits(self) -> u32 {
        1 + self.exponent + self.mantissa
    }
    fn sign(self) -> u64 {
        1 << (self.exponent + self.mantissa)
    }
    fn infinity(self) -> u64 {
        if self.finite { self.nan } else { ((1 << self.exponent) - 1) << self.mantissa }
    }
    fn largest(self) -> u64 {
        self.infinity() - 1
    }
}

/// An exact value: `mantissa * 2^exponent`. An inexact one carries a sticky lowest bit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Value {
    Nan,
    Inf(bool),
    Num { negative: bool, mantissa: u128, exponent: i32 },
}

/// Reads `bits` as a number of format `f`.
pub(crate) fn unpack(f: Format, bits: u64) -> Value {
    let negative = bits & f.sign() != 0;
    let magnitude = bits & (f.sign() - 1);
    let mantissa = magnitude & ((1 << f.mantissa) - 1);
    let exponent = (magnitude >> f.mantissa) as i32;
    if f.finite && magnitude == f.nan {
        return Value::Nan;
    }
    if !f.finite && exponent == (1 << f.exponent) - 1 {
        return if mantissa == 0 { Value::Inf(negative) } else { Value::Nan };
    }
    let unit = 1 - f.bias() - f.mantissa as i32;
    if exponent == 0 {
        return Value::Num { negative, mantissa: mantissa.into(), exponent: unit };
    }
    Value::Num { negative, mantissa: u128::from(mantissa | 1 << f.mantissa), exponent: unit + exponent - 1 }
}

/// Rounds a value once. With `finite`, overflow and infinities become the largest finite number.
pub(crate) fn pack(f: Format, v: Value, round: Round, finite: bool) -> u64 {
    let (negative, mantissa, exponent) = match v {
        Value::Nan => return f.nan,
        Value::Inf(n) => {
            let magnitude = if finite { f.largest() } else { f.infinity() };
            return magnitude | if n { f.sign() } else { 0 };
        }
        Value::Num { negative, mantissa, exponent } => (negative, mantissa, exponent),
    };
    let sign = if negative { f.sign() } else { 0 };
    if mantissa == 0 {
        return sign;
    }
    let top = exponent + 127 - mantissa.leading_zeros() as i32;
    let mut unit = (top - f.mantissa as i32).max(1 - f.bias() - f.mantissa as i32);
    let mut q = round_shift(mantissa, unit - exponent, negative, round);
    if q >> (f.mantissa + 1) != 0 {
        q >>= 1;
        unit += 1;
    }
    let bits = if q >> f.mantissa == 0 {
        q
    } else {
        let field = unit + f.mantissa as i32 + f.bias();
        if field > (1 << f.exponent) { u64::MAX >> 1 } else { ((field as u64) << f.mantissa) + (q - (1 << f.mantissa)) }
    };
    if bits < f.infinity() {
        return sign | bits;
    }
    let away = match round {
        Round::Rn | Round::Rna => true,
        Round::Rz => false,
        Round::Rm => negative,
        Round::Rp => !negative,
    };
    sign | if away && !finite { f.infinity() } else { f.largest() }
}

/// `mantissa / 2^shift`, rounded to an integer. Saturates far beyond any format's mantissa.
pub(crate) fn round_shift(mantissa: u128, shift: i32, negative: bool, round: Round) -> u64 {
    if shift <= 0 {
        let up = shift.unsigned_abs().min(128);
        return if mantissa.leading_zeros() >= 64 + up { (mantissa << up) as u64 } else { u64::MAX };
    }
    let (mut q, rest, half) = match shift {
        1..=127 => (mantissa >> shift, mantissa & ((1 << shift) - 1), 1u128 << (shift - 1)),
        // 2^127 counts as half of 2^128: anything below rounds as "less than half".
        _ => (0, mantissa.min(1), 2),
    };
    let up = match round {
        Round::Rn => rest > half || (rest == half && q & 1 == 1),
        Round::Rna => rest >= half,
        Round::Rz => false,
        Round::Rm => negative && rest != 0,
        Round::Rp => !negative && rest != 0,
    };
    q += u128::from(up);
    u64::try_from(q).unwrap_or(u64::MAX)
}

impl Value {
    pub(crate) fn negate(self) -> Value {
        match self {
            Value::Nan => Value::Nan,
            Value::Inf(n) => Value::Inf(!n),
            Value::Num { negative, mantissa, exponent } => Value::Num { negative: !negative, mantissa, exponent },
        }
    }

    fn is_negative(self) -> bool {
        matches!(self, Value::Inf(true) | Value::Num { negative: true, .. })
    }

    /// Product of two values with at most 53 mantissa bits: exact.
    pub(crate) fn mul(self, other: Value) -> Value {
        let negative = self.is_negative() != other.is_negative();
        match (self, other) {
            (Value::Nan, _) | (_, Value::Nan) => Value::Nan,
            (Value::Inf(_), Value::Num { mantissa: 0, .. }) | (Value::Num { mantissa: 0, .. }, Value::Inf(_)) => {
                Value::Nan
            }
            (Value::Inf(_), _) | (_, Value::Inf(_)) => Value::Inf(negative),
            (Value::Num { mantissa: a, exponent: x, .. }, Value::Num { mantissa: b, exponent: y, .. }) => {
                Value::Num { negative, mantissa: a * b, exponent: x + y }
            }
        }
    }

    /// Sum with a sticky lowest bit. `round` only decides the sign of an exact zero.
    pub(crate) fn add(self, other: Value, round: Round) -> Value {
        let (an, am, ae, bn, bm, be) = match (self, other) {
            (Value::Nan, _) | (_, Value::Nan) => return Value::Nan,
            (Value::Inf(a), Value::Inf(b)) => {
                return if a == b { Value::Inf(a) } else { Value::Nan };
            }
            (Value::Inf(a), _) | (_, Value::Inf(a)) => return Value::Inf(a),
            (
                Value::Num { negative: an, mantissa: am, exponent: ae },
                Value::Num { negative: bn, mantissa: bm, exponent: be },
            ) => (an, am, ae, bn, bm, be),
        };
        let zero = |negative| Value::Num { negative, mantissa: 0, exponent: 0 };
        if am == 0 && bm == 0 {
            return zero(if an == bn { an } else { round == Round::Rm });
        }
        if am == 0 {
            return other;
        }
        if bm == 0 {
            return self;
        }
        // Both to bit 125, so that a shift by one (all that cancellation allows) loses nothing.
        let norm = |m: u128, e: i32| {
            let up = m.leading_zeros() as i32 - 2;
            (m << up, e - up)
        };
        let (am, ae) = norm(am, ae);
        let (bm, be) = norm(bm, be);
        let ((hn, hm, he), (ln, lm, le)) = match (ae, am) >= (be, bm) {
            true => ((an, am, ae), (bn, bm, be)),
            false => ((bn, bm, be), (an, am, ae)),
        };
        let shift = (he - le) as u32;
        let low = match shift {
            0 => lm,
            1..=126 => lm >> shift | u128::from(lm & ((1 << shift) - 1) != 0),
            _ => 1,
        };
        let mantissa = if hn == ln { hm + low } else { hm - low };
        if mantissa == 0 { zero(round == Round::Rm) } else { Value::Num { negative: hn, mantissa, exponent: he } }
    }

    /// Quotient with a sticky lowest bit.
    pub(crate) fn div(self, other: Value) -> Value {
        let negative = self.is_negative() != other.is_negative();
        match (self, other) {
            (Value::Nan, _) | (_, Value::Nan) | (Value::Inf(_), Value::Inf(_)) => Value::Nan,
            (Value::Inf(_), _) => Value::Inf(negative),
            (_, Value::Inf(_)) => Value::Num { negative, mantissa: 0, exponent: 0 },
            (Value::Num { mantissa: 0, .. }, Value::Num { mantissa: 0, .. }) => Value::Nan,
            (_, Value::Num { mantissa: 0, .. }) => Value::Inf(negative),
            (Value::Num { mantissa: a, exponent: x, .. }, Value::Num { mantissa: b, exponent: y, .. }) => {
                if a == 0 {
                    return Value::Num { negative, mantissa: 0, exponent: 0 };
                }
                let up = a.leading_zeros() as i32;
                let a = a << up;
                let (q, rest) = (a / b, a % b);
                // At least 74 quotient bits, so one more for the sticky bit is there.
                Value::Num { negative, mantissa: q << 1 | u128::from(rest != 0), exponent: x - up - y - 1 }.shrunk(q)
            }
        }
    }

    /// `div` of a quotient that fills all 128 bits: drops one bit instead of overflowing.
    fn shrunk(self, q: u128) -> Value {
        match self {
            Value::Num { negative, mantissa, exponent } if q >> 127 != 0 => {
                Value::Num { negative, mantissa: q | (mantissa & 1), exponent: exponent + 1 }
            }
            other => other,
        }
    }

    /// Square root with a sticky lowest bit.
    pub(crate) fn sqrt(self) -> Value {
        match self {
            Value::Nan | Value::Inf(true) => Value::Nan,
            Value::Inf(false) => self,
            Value::Num { mantissa: 0, .. } => self,
            Value::Num { negative: true, .. } => Value::Nan,
            Value::Num { mantissa, exponent, .. } => {
                let mut up = mantissa.leading_zeros() as i32 - 1;
                up -= (exponent - up) & 1;
                let m = mantissa << up;
                let root = m.isqrt();
                let mantissa = root << 1 | u128::from(root * root != m);
                Value::Num { negative: false, mantissa, exponent: (exponent - up) / 2 - 1 }
            }
        }
    }

    pub(crate) fn from_int(v: i128) -> Value {
        Value::Num { negative: v < 0, mantissa: v.unsigned_abs(), exponent: 0 }
    }

    /// The integer nearest in the given direction, saturated to `low..=high`; NaN gives 0.
    pub(crate) fn to_int(self, round: Round, low: i128, high: i128) -> i128 {
        match self {
            Value::Nan => 0,
            Value::Inf(true) => low,
            Value::Inf(false) => high,
            Value::Num { negative, mantissa, exponent } => {
                let magnitude = i128::from(round_shift(mantissa, -exponent, negative, round));
                (if negative { -magnitude } else { magnitude }).clamp(low, high)
            }
        }
    }
}

/// One value from one format to another.
pub(crate) fn convert(from: Format, bits: u64, to: Format, round: Round, finite: bool) -> u64 {
    pack(to, unpack(from, bits), round, finite)
}

#[inline(always)]
pub(crate) fn f16_to_f32(h: u16) -> f32 {
    let shifted = (u32::from(h) & 0x7fff) << 13;
    let scaled = f32::from_bits(shifted) * f32::from_bits(0x7780_0000); // 2^112
    let special = if shifted >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | special | (u32::from(h) & 0x8000) << 16)
}

#[inline(always)]
pub(crate) fn f32_to_f16(x: f32) -> u16 {
    let sign = ((x.to_bits() >> 16) & 0x8000) as u16;
    let a = x.to_bits() & 0x7fff_ffff;
    let magnitude = if a > 0x7f80_0000 {
        return 0x7fff;
    } else if a >= 0x4780_0000 {
        0x7c00
    } else if a < 0x3880_0000 {
        // Adding one half moves the subnormal's unit to the lowest mantissa bit: the host rounds.
        ((f32::from_bits(a) + 0.5).to_bits() - 0x3f00_0000) as u16
    } else {
        (a.wrapping_add(0xc800_0fff + ((a >> 13) & 1)) >> 13) as u16
    };
    sign | magnitude
}

#[inline(always)]
pub(crate) fn bf16_to_f32(h: u16) -> f32 {
    f32::from_bits(u32::from(h) << 16)
}

#[inline(always)]
pub(crate) fn f32_to_bf16(x: f32) -> u16 {
    let b = x.to_bits();
    let rounded = (b.wrapping_add(0x7fff + ((b >> 16) & 1)) >> 16) as u16;
    if b & 0x7fff_ffff > 0x7f80_0000 { 0x7fff } else { rounded }
}

/// `a * b + c` in f64, rounded to odd, so that a second rounding to at most 51 bits is exact.
pub(crate) fn fma_odd(a: f64, b: f64, c: f64) -> f64 {
    let p = a * b; // exact: the factors have at most 24 bits each
    let s = p + c;
    if !s.is_finite() {
        return s;
    }
    let t = s - p;
    let error = (p - (s - t)) + (c - t);
    if error != 0.0 && s.to_bits() & 1 == 0 {
        let towards_larger = (error > 0.0) == (s > 0.0);
        return f64::from_bits(if towards_larger { s.to_bits() + 1 } else { s.to_bits() - 1 });
    }
    s
}

#[inline(always)]
pub(crate) fn flush(x: f32) -> f32 {
    if x.to_bits() & 0x7f80_0000 == 0 { f32::from_bits(x.to_bits() & 0x8000_0000) } else { x }
}
