//! The specification of [`timestep_embed`](super::timestep_embed): plain loops.

use super::FREQUENCIES;
use crate::ops::real::{Real, silu, silu_derivative};

/// Weights and biases of the two layers, row-major.
pub struct Weights<'a, R> {
    /// `[C, 256]`
    pub w0: &'a [R],
    /// `[C]`
    pub b0: &'a [R],
    /// `[C, C]`
    pub w2: &'a [R],
    /// `[C]`
    pub b2: &'a [R],
}

/// Gradients of [`Weights`].
pub struct Gradients<R> {
    /// `[C, 256]`
    pub dw0: Vec<R>,
    /// `[C]`
    pub db0: Vec<R>,
    /// `[C, C]`
    pub dw2: Vec<R>,
    /// `[C]`
    pub db2: Vec<R>,
}

/// Cosines, then sines, of one timestep.
pub fn waves<R: Real>(t: u32) -> Vec<R> {
    let half = FREQUENCIES / 2;
    let angle = |i: usize| f64::from(t) * 10_000f64.powf(-(i as f64) / half as f64);
    let cos = (0..half).map(|i| R::from_f64(angle(i).cos()));
    cos.chain((0..half).map(|i| R::from_f64(angle(i).sin()))).collect()
}

/// One row of a linear layer.
fn linear<R: Real>(x: &[R], weight: &[R], bias: &[R]) -> Vec<R> {
    let mut y = bias.to_vec();
    for (o, y) in y.iter_mut().enumerate() {
        for (k, &x) in x.iter().enumerate() {
            *y += weight[o * (weight.len() / bias.len()) + k] * x;
        }
    }
    y
}

/// `y`, `[B, C]`.
pub fn forward<R: Real>(t: &[u32], w: &Weights<R>) -> Vec<R> {
    let mut y = Vec::new();
    for &t in t {
        let hidden = linear(&waves(t), w.w0, w.b0);
        let active: Vec<R> = hidden.into_iter().map(silu).collect();
        y.extend(linear(&active, w.w2, w.b2));
    }
    y
}

/// Gradients of `sum(y * dy)`.
pub fn backward<R: Real>(t: &[u32], w: &Weights<R>, dy: &[R]) -> Gradients<R> {
    let c = w.b2.len();
    let hidden_len = w.b0.len();
    let zeros = |n: usize| vec![R::zero(); n];
    let mut g = Gradients { dw0: zeros(w.w0.len()), db0: zeros(hidden_len), dw2: zeros(w.w2.len()), db2: zeros(c) };
    for (b, &t) in t.iter().enumerate() {
        let wave = waves::<R>(t);
        let hidden = linear(&wave, w.w0, w.b0);
        for j in 0..hidden_len {
            let mut d = R::zero();
            for o in 0..c {
                let dy = dy[b * c + o];
                g.dw2[o * hidden_len + j] += dy * silu(hidden[j]);
                d += dy * w.w2[o * hidden_len + j];
            }
            let d = d * silu_derivative(hidden[j]);
            g.db0[j] += d;
            for (i, &x) in wave.iter().enumerate() {
                g.dw0[j * FREQUENCIES + i] += d * x;
            }
        }
        for o in 0..c {
            g.db2[o] += dy[b * c + o];
        }
    }
    g
}
