//! Linear layers of few rows, and SiLU, on the CPU: the timestep network and the modulation.

use crate::backend::cpu::linear;
use crate::backend::cpu::profile::{Pass, span};
use crate::backend::cpu::simd::{column_sums, fma, sigmoid, simd_fn};

/// `y = x W^T + b`.
pub fn linear(y: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32]) {
    let n = bias.len();
    let (rows, k) = (y.len() / n, weight.len() / n);
    let _span = span("linear", Pass::Forward, [k, n], 2 * rows * k * n, rows * (k + n) + k * n);
    linear::linear(y, x, weight, bias);
}

/// `dx` (unless it is empty), and weight and bias, which `add` adds to. Gives the sum of squares of what is written, or added, to
/// `dweight`.
pub fn linear_backward(
    dx: &mut [f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
    add: bool,
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
) -> f64 {
    let n = dbias.len();
    let (rows, k) = (dy.len() / n, weight.len() / n);
    let products = if dx.is_empty() { 1 } else { 2 };
    let flops = 2 * products * rows * k * n;
    let _span = span("linear", Pass::Backward, [k, n], flops, rows * (products * k + n) + products * k * n);
    if !dx.is_empty() {
        linear::input_gradient(dx, dy, weight, k);
    }
    column_sums(dbias, dy, add);
    linear::weight_gradient(dweight, add, dy, x, k)
}

simd_fn! {
    /// `y = x / (1 + e^-x)`.
    pub fn silu_to<F>(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * sigmoid::<F>(x);
        }
    }
}

simd_fn! {
    /// `d *= silu'(x)`.
    pub fn silu_backward<F>(d: &mut [f32], x: &[f32]) {
        for (d, &x) in d.iter_mut().zip(x) {
            let s = sigmoid::<F>(x);
            *d *= s * fma::<F>(x, 1.0 - s, 1.0);
        }
    }
}
