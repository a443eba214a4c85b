//! The specification of [`ln_linear`](super::ln_linear): plain loops over the masked, dense computation.

use super::{Activation, EPS};
use crate::ops::real::{Real, gelu, gelu_derivative};
use crate::routing::Window;

/// Sizes and inputs.
pub struct Inputs<'a, R> {
    /// `[B, T, C]`
    pub x: &'a [R],
    /// B windows.
    pub read: &'a [Window],
    /// `[B, C]`
    pub shift: &'a [R],
    /// `[B, C]`
    pub scale: &'a [R],
    /// `[N, C]`
    pub weight: &'a [R],
    /// `[N]`
    pub bias: &'a [R],
    /// What follows the linear layer.
    pub activation: Activation,
    /// T
    pub tokens: usize,
    /// C
    pub channels: usize,
}

/// Gradients of everything [`Inputs`] holds.
pub struct Gradients<R> {
    /// `[B, T, C]`, zero outside the windows.
    pub dx: Vec<R>,
    /// `[B, C]`
    pub dshift: Vec<R>,
    /// `[B, C]`
    pub dscale: Vec<R>,
    /// `[N, C]`
    pub dweight: Vec<R>,
    /// `[N]`
    pub dbias: Vec<R>,
}

/// Mean and 1 / standard deviation of the masked row.
fn statistics<R: Real>(row: &[R], window: Window) -> (R, R) {
    let c = R::from_f64(row.len() as f64);
    let masked = |i: usize| if window.range().contains(&i) { row[i] } else { R::zero() };
    let mut mean = R::zero();
    for i in 0..row.len() {
        mean += masked(i);
    }
    mean = mean / c;
    let mut variance = R::zero();
    for i in 0..row.len() {
        variance += (masked(i) - mean) * (masked(i) - mean);
    }
    (mean, R::one() / (variance / c + R::from_f64(EPS)).sqrt())
}

/// `y` before the activation, `[B, T, N]`.
fn before_activation<R: Real>(inputs: &Inputs<R>) -> Vec<R> {
    let Inputs { x, read, shift, scale, weight, bias, tokens, channels, .. } = *inputs;
    let n = bias.len();
    let mut y = Vec::with_capacity(read.len() * tokens * n);
    for (b, &window) in read.iter().enumerate() {
        for t in 0..tokens {
            let row = &x[(b * tokens + t) * channels..][..channels];
            let (mean, rstd) = statistics(row, window);
            for o in 0..n {
                let mut sum = bias[o];
                for c in 0..channels {
                    let value = if window.range().contains(&c) { row[c] } else { R::zero() };
                    let z = (value - mean) * rstd;
                    let h = (z * (R::one() + scale[b * channels + c]) + shift[b * channels + c]).stored();
                    sum += weight[o * channels + c] * h;
                }
                y.push(sum.stored());
            }
        }
    }
    y
}

/// `y`, `[B, T, N]`.
pub fn forward<R: Real>(inputs: &Inputs<R>) -> Vec<R> {
    let mut y = before_activation(inputs);
    if inputs.activation == Activation::Gelu {
        for v in &mut y {
            *v = gelu(*v).stored();
        }
    }
    y
}

/// Gradients of `sum(y * dy)`.
pub fn backward<R: Real>(inputs: &Inputs<R>, dy: &[R]) -> Gradients<R> {
    let Inputs { x, read, shift, scale, weight, bias, tokens, channels, .. } = *inputs;
    let n = bias.len();
    let mut g = dy.to_vec();
    if inputs.activation == Activation::Gelu {
        for (g, pre) in g.iter_mut().zip(before_activation(inputs)) {
            *g = (*g * gelu_derivative(pre)).stored();
        }
    }
    let mut out = Gradients {
        dx: vec![R::zero(); x.len()],
        dshift: vec![R::zero(); shift.len()],
        dscale: vec![R::zero(); scale.len()],
        dweight: vec![R::zero(); weight.len()],
        dbias: vec![R::zero(); n],
    };
    let count = R::from_f64(channels as f64);
    for (b, &window) in read.iter().enumerate() {
        for t in 0..tokens {
            let row = &x[(b * tokens + t) * channels..][..channels];
            let g = &g[(b * tokens + t) * n..][..n];
            let (mean, rstd) = statistics(row, window);
            let mut dz = vec![R::zero(); channels];
            let mut z = vec![R::zero(); channels];
            for c in 0..channels {
                let value = if window.range().contains(&c) { row[c] } else { R::zero() };
                z[c] = (value - mean) * rstd;
                let h = (z[c] * (R::one() + scale[b * channels + c]) + shift[b * channels + c]).stored();
                let mut dh = R::zero();
                for o in 0..n {
                    dh += g[o] * weight[o * channels + c];
                    out.dweight[o * channels + c] += g[o] * h;
                }
                let dh = dh.stored();
                out.dshift[b * channels + c] += dh;
                out.dscale[b * channels + c] += dh * z[c];
                dz[c] = dh * (R::one() + scale[b * channels + c]);
            }
            for o in 0..n {
                out.dbias[o] += g[o];
            }
            let (mut s1, mut s2) = (R::zero(), R::zero());
            for c in 0..channels {
                s1 += dz[c];
                s2 += dz[c] * z[c];
            }
            for c in window.range() {
                out.dx[(b * tokens + t) * channels + c] = (rstd * (dz[c] - s1 / count - z[c] * s2 / count)).stored();
            }
        }
    }
    out
}
