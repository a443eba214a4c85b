//! Samples from a model: the sampler of `diffusion` around the network of `model`.

use crate::autograd::{Memory, Weights, infer};
use crate::diffusion::loss::ImageDims;
use crate::diffusion::sampler::Sampler;
use crate::error::Result;
use crate::model::dit::Dit;
use crate::rng::{Philox, Stream};

/// Images (or latents) of the classes in `labels`: `[labels.len(), IC, H, W]`.
///
/// They are made `batch` at a time. The noise of sample i depends only on `seed` and i, so the batch size changes
/// nothing but speed (and rounding, where products of another size add in another order). All samples of a step share its
/// timestep, hence its window: one product covers them all.
/// `progress` is called with the number of denoising steps done, out of [`steps`].
///
/// # Errors
/// When a label is out of range, numbers stop being finite, or `progress` returns an error.
#[expect(clippy::too_many_arguments, reason = "what, how, from what, and who is told")]
pub fn generate(
    dit: &Dit,
    weights: Weights,
    memory: &mut Memory,
    sampler: &Sampler,
    labels: &[u32],
    seed: u64,
    batch: usize,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<f32>> {
    let batch = batch.max(1);
    let mut images = Vec::new();
    let mut done = 0;
    for (index, labels) in labels.chunks(batch).enumerate() {
        let made = generate_batch(dit, weights, memory, sampler, labels, seed, index * batch, || {
            done += 1;
            progress(done)
        })?;
        images.extend(made);
    }
    Ok(images)
}

/// One batch of [`generate`], for those who do not keep all images in memory: the images of `labels`, of which the first is
/// number `first` of all. `progress` is called after every denoising step.
///
/// # Errors
/// As [`generate`].
#[expect(clippy::too_many_arguments, reason = "what, how, from what, and who is told")]
pub fn generate_batch(
    dit: &Dit,
    weights: Weights,
    memory: &mut Memory,
    sampler: &Sampler,
    labels: &[u32],
    seed: u64,
    first: usize,
    mut progress: impl FnMut() -> Result<()>,
) -> Result<Vec<f32>> {
    let config = &dit.config;
    let (side, channels) = (config.input_size, config.in_channels);
    let dims = ImageDims { channels, pixels: side * side, learn_sigma: config.learn_sigma };
    let row = dims.elements();
    let start = Philox::new(seed, Stream::SampleStart);
    let noise = Philox::new(seed, Stream::SampleStep);
    // With guidance the batch is doubled: once with the labels, once with the null class.
    let halves = if sampler.guided() { 2 } else { 1 };
    let mut x = vec![0.0; halves * labels.len() * row];
    let mut y = labels.to_vec();
    y.resize(halves * labels.len(), config.num_classes as u32);
    for (i, x) in x.chunks_exact_mut(row).enumerate() {
        start.normal(x, 0, (first + i % labels.len()) as u64);
    }
    sampler.sample(
        &mut x,
        |x, t, out| {
            infer(weights, memory, |tape| {
                let input = tape.input(x, [y.len(), channels, side, side], false)?;
                let answer = dit.forward(tape, input, &vec![t; y.len()], &y)?;
                out.copy_from_slice(&tape.read(answer)?);
                Ok(())
            })
        },
        |k, out| {
            for (i, out) in out.chunks_exact_mut(row).enumerate() {
                noise.normal(out, k as u64, (first + i % labels.len()) as u64);
            }
        },
        |_, _| progress(),
        dims,
    )?;
    x.truncate(labels.len() * row);
    Ok(x)
}

/// Number of denoising steps of a call of [`generate`].
pub fn steps(sampler: &Sampler, samples: usize, batch: usize) -> usize {
    samples.div_ceil(batch.max(1)) * sampler.steps()
}
