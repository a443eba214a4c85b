//! The CPU version: patches are gathered, the rest is products.

use super::Dims;
use crate::backend::cpu::linear::{input_gradient, linear, weight_gradient};
use crate::backend::cpu::profile::{Pass, span};
use crate::backend::cpu::simd::{add_assign, column_sums};
use rayon::prelude::*;

/// See [`super::patch_embed`].
pub fn forward(
    y: &mut [f32],       // [B, T, C]
    patches: &mut [f32], // [B, T, IC p p]
    x: &[f32],           // [B, IC, H, W]
    weight: &[f32],      // [C, IC p p]
    bias: &[f32],        // [C]
    positions: &[f32],   // [T, C]
    d: Dims,
) {
    let (rows, k, c) = (d.batch * d.tokens(), d.patch_len(), bias.len());
    let _span = span("patch_embed", Pass::Forward, [k, c], 2 * rows * k * c, rows * (2 * k + c));
    let of_sample = d.tokens() * k;
    patches.par_chunks_mut(of_sample).zip(x.par_chunks(of_sample)).for_each(|(patches, x)| {
        each_line(d, |line, pixels| patches[line].copy_from_slice(&x[pixels]));
    });
    linear(y, patches, weight, bias);
    y.par_chunks_mut(d.tokens() * c).for_each(|y| add_assign(y, positions));
}

/// Gradients of weight and bias; `add` adds to them. Gives the sum of squares of what is written, or added, to the weight's.
pub fn backward(dweight: &mut [f32], dbias: &mut [f32], add: bool, dy: &[f32], patches: &[f32]) -> f64 {
    let c = dbias.len();
    let (rows, k) = (dy.len() / c, dweight.len() / c);
    let _span = span("patch_embed", Pass::Backward, [k, c], 2 * rows * k * c, rows * (k + c));
    column_sums(dbias, dy, add);
    weight_gradient(dweight, add, dy, patches, k)
}

/// Gradient of the images.
pub fn image_gradient(dx: &mut [f32], dpatches: &mut [f32], dy: &[f32], weight: &[f32], d: Dims) {
    input_gradient(dpatches, dy, weight, d.patch_len());
    let of_sample = d.tokens() * d.patch_len();
    dx.par_chunks_mut(of_sample).zip(dpatches.par_chunks(of_sample)).for_each(|(dx, dpatches)| {
        each_line(d, |line, pixels| dx[pixels].copy_from_slice(&dpatches[line]));
    });
}

/// Calls `copy` with every line of every patch of a sample: its place in the patches, and in the image.
fn each_line(d: Dims, mut copy: impl FnMut(std::ops::Range<usize>, std::ops::Range<usize>)) {
    let (p, across) = (d.patch, d.width / d.patch);
    for t in 0..d.tokens() {
        for channel in 0..d.image_channels {
            for i in 0..p {
                let line = (t * d.image_channels + channel) * p * p + i * p;
                let row = channel * d.height + t / across * p + i;
                let pixel = row * d.width + t % across * p;
                copy(line..line + p, pixel..pixel + p);
            }
        }
    }
}
