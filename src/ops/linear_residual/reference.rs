//! The specification of [`linear_residual`](super::linear_residual): plain loops.

use crate::ops::real::Real;
use crate::routing::Window;

/// Sizes and inputs.
pub struct Inputs<'a, R> {
    /// `[B, T, K]`
    pub a: &'a [R],
    /// `[C, K]`
    pub weight: &'a [R],
    /// `[C]`
    pub bias: &'a [R],
    /// `[B, C]`
    pub gate: &'a [R],
    /// `[B, T, C]`
    pub base: &'a [R],
    /// B windows.
    pub base_window: &'a [Window],
    /// `[B, T, C]` and B windows, or nothing.
    pub bypass: Option<(&'a [R], &'a [Window])>,
    /// B windows.
    pub write: &'a [Window],
    /// T
    pub tokens: usize,
}

/// Gradients of everything [`Inputs`] holds.
pub struct Gradients<R> {
    /// `[B, T, K]`
    pub da: Vec<R>,
    /// `[C, K]`
    pub dweight: Vec<R>,
    /// `[C]`
    pub dbias: Vec<R>,
    /// `[B, C]`
    pub dgate: Vec<R>,
    /// `[B, T, C]`
    pub dbase: Vec<R>,
    /// `[B, T, C]`, zero without a bypass.
    pub dbypass: Vec<R>,
}

/// `out`, `[B, T, C]`.
pub fn forward<R: Real>(inputs: &Inputs<R>) -> Vec<R> {
    let channels = inputs.bias.len();
    let mut out = Vec::new();
    for b in 0..inputs.write.len() {
        for t in 0..inputs.tokens {
            for c in 0..channels {
                let i = (b * inputs.tokens + t) * channels + c;
                let mut sum = R::zero();
                if inputs.base_window[b].range().contains(&c) {
                    sum += inputs.base[i];
                }
                if inputs.write[b].range().contains(&c) {
                    sum += inputs.gate[b * channels + c] * linear(inputs, b * inputs.tokens + t, c);
                }
                if let Some((x, windows)) = inputs.bypass
                    && !windows[b].range().contains(&c)
                {
                    sum += x[i];
                }
                out.push(sum.stored());
            }
        }
    }
    out
}

/// One element of the linear layer.
fn linear<R: Real>(inputs: &Inputs<R>, row: usize, c: usize) -> R {
    let k = inputs.weight.len() / inputs.bias.len();
    let mut z = inputs.bias[c];
    for j in 0..k {
        z += inputs.a[row * k + j] * inputs.weight[c * k + j];
    }
    z.stored()
}

/// Gradients of `sum(out * dout)`.
pub fn backward<R: Real>(inputs: &Inputs<R>, dout: &[R]) -> Gradients<R> {
    let channels = inputs.bias.len();
    let k = inputs.weight.len() / channels;
    let zeros = |n: usize| vec![R::zero(); n];
    let mut grads = Gradients {
        da: zeros(inputs.a.len()),
        dweight: zeros(inputs.weight.len()),
        dbias: zeros(channels),
        dgate: zeros(inputs.gate.len()),
        dbase: zeros(dout.len()),
        dbypass: zeros(dout.len()),
    };
    for b in 0..inputs.write.len() {
        for t in 0..inputs.tokens {
            let row = b * inputs.tokens + t;
            for c in 0..channels {
                let d = dout[row * channels + c];
                if inputs.base_window[b].range().contains(&c) {
                    grads.dbase[row * channels + c] = d;
                }
                if inputs.bypass.is_some_and(|(_, windows)| !windows[b].range().contains(&c)) {
                    grads.dbypass[row * channels + c] = d;
                }
                if inputs.write[b].range().contains(&c) {
                    grads.dgate[b * channels + c] += d * linear(inputs, row, c);
                    let dz = (d * inputs.gate[b * channels + c]).stored();
                    grads.dbias[c] += dz;
                    for j in 0..k {
                        grads.da[row * k + j] += dz * inputs.weight[c * k + j];
                        grads.dweight[c * k + j] += dz * inputs.a[row * k + j];
                    }
                }
            }
            for da in &mut grads.da[row * k..(row + 1) * k] {
                *da = da.stored();
            }
        }
    }
    grads
}
