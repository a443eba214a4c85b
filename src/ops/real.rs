//! The numbers that the references are generic over: f64 for the truth, f32 for the error a plain version makes.

use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

/// A floating-point number.
pub trait Real:
    Copy
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
{
    /// The nearest number to `x`.
    fn from_f64(x: f64) -> Self;
    /// The same number in f64.
    fn to_f64(self) -> f64;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Exponential.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// The number as a tensor in memory holds it: the references call it on everything that a plain implementation, one
    /// operator after the other, writes to memory.
    fn stored(self) -> Self {
        self
    }
    /// Zero.
    fn zero() -> Self {
        Self::from_f64(0.0)
    }
    /// One.
    fn one() -> Self {
        Self::from_f64(1.0)
    }
}

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            #[inline]
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            #[inline]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline]
            fn exp(self) -> Self {
                <$t>::exp(self)
            }
            #[inline]
            fn ln(self) -> Self {
                <$t>::ln(self)
            }
            #[inline]
            fn tanh(self) -> Self {
                <$t>::tanh(self)
            }
        }
    };
}
real!(f32);
real!(f64);

/// Arithmetic in f32 on tensors in bf16: what a plain implementation in bf16 computes.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct InBf16(pub f32);

macro_rules! in_bf16 {
    ($($operator:ident $method:ident)+) => {
        $(impl $operator for InBf16 {
            type Output = Self;
            #[inline]
            fn $method(self, other: Self) -> Self {
                InBf16($operator::$method(self.0, other.0))
            }
        })+
    };
}
in_bf16!(Add add Sub sub Mul mul Div div);

impl Neg for InBf16 {
    type Output = Self;
    #[inline]
    fn neg(self) -> Self {
        InBf16(-self.0)
    }
}

impl AddAssign for InBf16 {
    #[inline]
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl Real for InBf16 {
    #[inline]
    fn from_f64(x: f64) -> Self {
        InBf16(x as f32)
    }
    #[inline]
    fn to_f64(self) -> f64 {
        f64::from(self.0)
    }
    #[inline]
    fn sqrt(self) -> Self {
        InBf16(self.0.sqrt())
    }
    #[inline]
    fn exp(self) -> Self {
        InBf16(self.0.exp())
    }
    #[inline]
    fn ln(self) -> Self {
        InBf16(self.0.ln())
    }
    #[inline]
    fn tanh(self) -> Self {
        InBf16(self.0.tanh())
    }
    #[inline]
    fn stored(self) -> Self {
        InBf16(half::bf16::from_f32(self.0).to_f32())
    }
}

/// GELU, tanh form.
pub fn gelu<R: Real>(x: R) -> R {
    let k = R::from_f64((2.0 / std::f64::consts::PI).sqrt());
    let c = R::from_f64(0.044715);
    R::from_f64(0.5) * x * (R::one() + (k * (x + c * x * x * x)).tanh())
}

/// Derivative of [`gelu`].
pub fn gelu_derivative<R: Real>(x: R) -> R {
    let k = R::from_f64((2.0 / std::f64::consts::PI).sqrt());
    let c = R::from_f64(0.044715);
    let half = R::from_f64(0.5);
    let tanh = (k * (x + c * x * x * x)).tanh();
    half * (R::one() + tanh) + half * x * (R::one() - tanh * tanh) * k * (R::one() + R::from_f64(3.0) * c * x * x)
}

/// SiLU, `x / (1 + e^-x)`.
pub fn silu<R: Real>(x: R) -> R {
    x / (R::one() + (-x).exp())
}

/// Derivative of [`silu`].
pub fn silu_derivative<R: Real>(x: R) -> R {
    let s = R::one() / (R::one() + (-x).exp());
    s * (R::one() + x * (R::one() - s))
}
