//! The specification of [`modulation`](super::modulation): plain loops.

use crate::ops::real::{Real, silu, silu_derivative};

/// `y`, `[B, M]`, of `c` `[B, C]`, `weight` `[M, C]` and `bias` `[M]`.
pub fn forward<R: Real>(c: &[R], weight: &[R], bias: &[R]) -> Vec<R> {
    let channels = weight.len() / bias.len();
    let mut y = Vec::new();
    for row in c.chunks_exact(channels) {
        for (o, &bias) in bias.iter().enumerate() {
            let mut sum = bias;
            for k in 0..channels {
                sum += weight[o * channels + k] * silu(row[k]);
            }
            y.push(sum);
        }
    }
    y
}

/// `(dc, dweight, dbias)` of `sum(y * dy)`.
pub fn backward<R: Real>(c: &[R], weight: &[R], dy: &[R], outputs: usize) -> (Vec<R>, Vec<R>, Vec<R>) {
    let channels = weight.len() / outputs;
    let mut dc = vec![R::zero(); c.len()];
    let mut dweight = vec![R::zero(); weight.len()];
    let mut dbias = vec![R::zero(); outputs];
    for (b, row) in c.chunks_exact(channels).enumerate() {
        for o in 0..outputs {
            let g = dy[b * outputs + o];
            dbias[o] += g;
            for k in 0..channels {
                dweight[o * channels + k] += g * silu(row[k]);
                dc[b * channels + k] += g * weight[o * channels + k] * silu_derivative(row[k]);
            }
        }
    }
    (dc, dweight, dbias)
}
