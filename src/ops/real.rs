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
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            fn exp(self) -> Self {
                <$t>::exp(self)
            }
            fn ln(self) -> Self {
                <$t>::ln(self)
            }
            fn tanh(self) -> Self {
                <$t>::tanh(self)
            }
        }
    };
}
real!(f32);
real!(f64);

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
