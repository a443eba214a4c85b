//! The specification of [`patch_embed`](super::patch_embed): plain loops.

use super::Dims;
use crate::ops::real::Real;

/// `y`, `[B, T, C]`.
pub fn forward<R: Real>(x: &[R], weight: &[R], bias: &[R], positions: &[R], d: Dims) -> Vec<R> {
    let channels = bias.len();
    let mut y = Vec::new();
    for b in 0..d.batch {
        for t in 0..d.tokens() {
            for c in 0..channels {
                let mut sum = bias[c] + positions[t * channels + c];
                for k in 0..d.patch_len() {
                    sum += weight[c * d.patch_len() + k] * x[pixel(d, b, t, k)];
                }
                y.push(sum.stored());
            }
        }
    }
    y
}

/// Index in the images of element `k` (channel, row, column) of patch `t` of sample `b`.
fn pixel(d: Dims, b: usize, t: usize, k: usize) -> usize {
    let across = d.width / d.patch;
    let (channel, i, j) = (k / (d.patch * d.patch), k / d.patch % d.patch, k % d.patch);
    let (row, column) = (t / across * d.patch + i, t % across * d.patch + j);
    ((b * d.image_channels + channel) * d.height + row) * d.width + column
}

/// `(dx, dweight, dbias)` of `sum(y * dy)`.
pub fn backward<R: Real>(x: &[R], weight: &[R], dy: &[R], d: Dims) -> (Vec<R>, Vec<R>, Vec<R>) {
    let channels = weight.len() / d.patch_len();
    let mut dx = vec![R::zero(); x.len()];
    let mut dweight = vec![R::zero(); weight.len()];
    let mut dbias = vec![R::zero(); channels];
    for b in 0..d.batch {
        for t in 0..d.tokens() {
            for c in 0..channels {
                let g = dy[(b * d.tokens() + t) * channels + c];
                dbias[c] += g;
                for k in 0..d.patch_len() {
                    dweight[c * d.patch_len() + k] += g * x[pixel(d, b, t, k)];
                    dx[pixel(d, b, t, k)] += g * weight[c * d.patch_len() + k];
                }
            }
        }
    }
    (dx, dweight, dbias)
}
