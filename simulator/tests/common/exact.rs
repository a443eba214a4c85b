//! Exact arithmetic on numbers `mantissa * 2^exponent`, and rounding of them by definition: what instructions must
//! compute, written without any of the simulator's code.
#![allow(dead_code)]

/// A binary floating-point format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Float {
    /// All bits.
    pub bits: u32,
    /// Bits of the fraction.
    pub fraction: u32,
    /// The largest finite number's bits.
    pub max: u64,
    /// Whether the number after the largest is infinity; otherwise there is none.
    pub infinity: bool,
}

pub const F64: Float = Float { bits: 64, fraction: 52, max: 0x7fef_ffff_ffff_ffff, infinity: true };
pub const F32: Float = Float { bits: 32, fraction: 23, max: 0x7f7f_ffff, infinity: true };
pub const F16: Float = Float { bits: 16, fraction: 10, max: 0x7bff, infinity: true };
pub const BF16: Float = Float { bits: 16, fraction: 7, max: 0x7f7f, infinity: true };
/// The upper 19 bits of an f32.
pub const TF32: Float = Float { bits: 19, fraction: 10, max: 0x3_fbff, infinity: true };
pub const E5M2: Float = Float { bits: 8, fraction: 2, max: 0x7b, infinity: true };
pub const E4M3: Float = Float { bits: 8, fraction: 3, max: 0x7e, infinity: false };

/// Rounding: to nearest with ties to even or away, towards zero, down, up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Even,
    Away,
    Zero,
    Down,
    Up,
}

/// The PTX names of the modes that arithmetic has.
pub const MODES: [(&str, Mode); 4] = [("rn", Mode::Even), ("rz", Mode::Zero), ("rm", Mode::Down), ("rp", Mode::Up)];

/// A value: `mantissa * 2^exponent`, and with `sticky` a little more (less than one unit of the mantissa).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Number {
    Nan,
    Infinite { negative: bool },
    Finite { negative: bool, mantissa: u128, exponent: i32, sticky: bool },
}

use Number::{Finite, Infinite, Nan};

pub fn zero(negative: bool) -> Number {
    Finite { negative, mantissa: 0, exponent: 0, sticky: false }
}

pub fn integer(v: i128) -> Number {
    Finite { negative: v < 0, mantissa: v.unsigned_abs(), exponent: 0, sticky: false }
}

impl Number {
    pub fn negative(self) -> bool {
        matches!(self, Infinite { negative: true } | Finite { negative: true, .. })
    }

    pub fn is_zero(self) -> bool {
        matches!(self, Finite { mantissa: 0, sticky: false, .. })
    }

    pub fn with_sign(self, negative: bool) -> Number {
        match self {
            Nan => Nan,
            Infinite { .. } => Infinite { negative },
            Finite { mantissa, exponent, sticky, .. } => Finite { negative, mantissa, exponent, sticky },
        }
    }
}

impl Float {
    fn bias(self) -> i32 {
        (1 << (self.bits - 2 - self.fraction)) - 1
    }

    /// Exponent of one unit of the smallest numbers.
    fn lowest(self) -> i32 {
        1 - self.bias() - self.fraction as i32
    }

    fn sign(self) -> u64 {
        1 << (self.bits - 1)
    }

    pub fn decode(self, bits: u64) -> Number {
        let (negative, rest) = (bits & self.sign() != 0, bits & (self.sign() - 1));
        if rest > self.max {
            return if self.infinity && rest == self.max + 1 { Infinite { negative } } else { Nan };
        }
        let (e, f) = ((rest >> self.fraction) as i32, rest & ((1 << self.fraction) - 1));
        let mantissa = if e == 0 { f } else { f | 1 << self.fraction };
        Finite { negative, mantissa: mantissa.into(), exponent: self.lowest() + (e - 1).max(0), sticky: false }
    }

    /// The nearest number of the format in the mode's sense; `None` stands for any NaN.
    pub fn encode(self, v: Number, mode: Mode) -> Option<u64> {
        let (negative, mantissa, exponent, sticky) = match v {
            Nan => return None,
            Infinite { negative } => {
                return Some(if negative { self.sign() } else { 0 } | (self.max + u64::from(self.infinity)));
            }
            Finite { negative, mantissa, exponent, sticky } => (negative, mantissa, exponent, sticky),
        };
        let sign = if negative { self.sign() } else { 0 };
        if mantissa == 0 && !sticky {
            return Some(sign);
        }
        let top = 127 - mantissa.leading_zeros() as i32 + exponent;
        let unit = (top - self.fraction as i32).max(self.lowest());
        let whole = integral(mantissa, exponent - unit, sticky, negative, mode);
        // A whole number of units is the number's bits, counted from the binade of the unit.
        let bits = whole + (((unit - self.lowest()) as u128) << self.fraction);
        if bits <= self.max.into() {
            return Some(sign | bits as u64);
        }
        let outward = match mode {
            Mode::Even | Mode::Away => true,
            Mode::Zero => false,
            Mode::Down => negative,
            Mode::Up => !negative,
        };
        Some(sign | if outward && self.infinity { self.max + 1 } else { self.max })
    }

    pub fn is_nan(self, bits: u64) -> bool {
        self.decode(bits) == Nan
    }

    pub fn is_subnormal(self, bits: u64) -> bool {
        let rest = bits & (self.sign() - 1);
        rest != 0 && rest >> self.fraction == 0
    }

    /// A subnormal number becomes a zero of its sign.
    pub fn flush(self, bits: u64) -> u64 {
        if self.is_subnormal(bits) { bits & self.sign() } else { bits }
    }
}

/// `mantissa * 2^shift`, rounded to a whole number without its sign.
pub fn integral(mantissa: u128, shift: i32, sticky: bool, negative: bool, mode: Mode) -> u128 {
    if shift >= 0 {
        assert!(!sticky && mantissa.leading_zeros() as i32 >= shift, "the mantissa is too short");
        return mantissa << shift;
    }
    let right = shift.unsigned_abs();
    let (whole, rest) = if right > 127 { (0, mantissa) } else { (mantissa >> right, mantissa & ((1 << right) - 1)) };
    // The part after the point against a half.
    let against_half = match right {
        1..=128 => rest.cmp(&(1 << (right - 1))),
        _ => std::cmp::Ordering::Less,
    }
    .then(if sticky { std::cmp::Ordering::Greater } else { std::cmp::Ordering::Equal });
    let up = match mode {
        Mode::Even => against_half.is_gt() || against_half.is_eq() && whole & 1 == 1,
        Mode::Away => against_half.is_ge(),
        Mode::Zero => false,
        Mode::Down => negative && (rest != 0 || sticky),
        Mode::Up => !negative && (rest != 0 || sticky),
    };
    whole + u128::from(up)
}

/// A fixed-point number wide enough for every product of two f64: two's complement, the lowest bit is 2^-2300.
#[derive(Clone, PartialEq, Eq)]
struct Wide([u64; 80]);

const WIDE_LOWEST: i32 = -2300;

impl Wide {
    fn new(mantissa: u128, exponent: i32, negative: bool) -> Wide {
        let mut words = [0u64; 80];
        let at = (exponent - WIDE_LOWEST) as usize;
        for (i, part) in [mantissa as u64, (mantissa >> 64) as u64].into_iter().enumerate() {
            let (word, bit) = (at / 64 + i, at % 64);
            words[word] |= part << bit;
            if bit > 0 {
                words[word + 1] |= part >> (64 - bit);
            }
        }
        if negative { Wide(words).negated() } else { Wide(words) }
    }

    fn negated(&self) -> Wide {
        let mut carry = true;
        Wide(self.0.map(|w| {
            let (n, c) = (!w).overflowing_add(carry.into());
            carry = c;
            n
        }))
    }

    fn plus(&self, other: &Wide) -> Wide {
        let mut carry = 0u128;
        Wide(std::array::from_fn(|i| {
            let sum = u128::from(self.0[i]) + u128::from(other.0[i]) + carry;
            carry = sum >> 64;
            sum as u64
        }))
    }

    fn number(&self) -> Number {
        let negative = self.0[79] >> 63 == 1;
        let all = if negative { self.negated() } else { self.clone() };
        let Some(top) = (0..80).rev().find(|&i| all.0[i] != 0) else {
            return zero(false);
        };
        let first = top.saturating_sub(1);
        let mantissa = u128::from(all.0[first + 1]) << 64 | u128::from(all.0[first]);
        let sticky = all.0[..first].iter().any(|&w| w != 0);
        Finite { negative, mantissa, exponent: WIDE_LOWEST + 64 * first as i32, sticky }
    }
}

/// `a * b + c`, exact. The sign of a zero sum is that of its terms where they agree, and otherwise minus when rounding
/// down.
pub fn fma(a: Number, b: Number, c: Number, mode: Mode) -> Number {
    let product = mul(a, b);
    let (Finite { .. }, Finite { .. }) = (product, c) else {
        return match (product, c) {
            (Nan, _) | (_, Nan) => Nan,
            (Infinite { negative: x }, Infinite { negative: y }) if x != y => Nan,
            (Infinite { .. }, _) => product,
            _ => c,
        };
    };
    if product.is_zero() && c.is_zero() {
        let (x, y) = (product.negative(), c.negative());
        return zero(if x == y { x } else { mode == Mode::Down });
    }
    let wide = |v: Number| match v {
        Finite { negative, mantissa, exponent, .. } => Wide::new(mantissa, exponent, negative),
        _ => unreachable!("both are finite"),
    };
    match wide(product).plus(&wide(c)).number() {
        sum if sum.is_zero() => zero(mode == Mode::Down),
        sum => sum,
    }
}

pub fn add(a: Number, b: Number, mode: Mode) -> Number {
    fma(a, integer(1), b, mode)
}

pub fn mul(a: Number, b: Number) -> Number {
    let negative = a.negative() != b.negative();
    match (a, b) {
        (Nan, _) | (_, Nan) => Nan,
        (Infinite { .. }, v) | (v, Infinite { .. }) => {
            if v.is_zero() {
                Nan
            } else {
                Infinite { negative }
            }
        }
        (Finite { mantissa: m, exponent: e, .. }, Finite { mantissa: n, exponent: f, .. }) => {
            Finite { negative, mantissa: m * n, exponent: e + f, sticky: false }
        }
    }
}

pub fn div(a: Number, b: Number) -> Number {
    let negative = a.negative() != b.negative();
    match (a, b) {
        (Nan, _) | (_, Nan) | (Infinite { .. }, Infinite { .. }) => Nan,
        _ if a.is_zero() && b.is_zero() => Nan,
        (Infinite { .. }, _) => Infinite { negative },
        (_, Infinite { .. }) => zero(negative),
        _ if b.is_zero() => Infinite { negative },
        _ if a.is_zero() => zero(negative),
        (Finite { mantissa: m, exponent: e, .. }, Finite { mantissa: n, exponent: f, .. }) => {
            let up = m.leading_zeros() as i32;
            let m = m << up;
            Finite { negative, mantissa: m / n, exponent: e - up - f, sticky: !m.is_multiple_of(n) }
        }
    }
}

pub fn sqrt(a: Number) -> Number {
    match a {
        _ if a.is_zero() => a,
        Nan => Nan,
        _ if a.negative() => Nan,
        Infinite { .. } => a,
        Finite { mantissa, exponent, .. } => {
            // An even exponent, and as many bits as there is room for.
            let up = mantissa.leading_zeros() as i32;
            let up = up - ((exponent - up) & 1);
            let m = mantissa << up;
            let root = m.isqrt();
            Finite { negative: false, mantissa: root, exponent: (exponent - up) / 2, sticky: root * root != m }
        }
    }
}
