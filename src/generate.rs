//! Samples from a model: the sampler of `diffusion` around the network of `model`.

use crate::autograd::{Memory, Tape, Weights, infer};
use crate::backend::cpu::profile::side_by_side;
use crate::backend::cpu::threads::awake;
use crate::diffusion::loss::ImageDims;
use crate::diffusion::sampler::Sampler;
use crate::error::{Error, Result};
use crate::model::dit::Dit;
use crate::model::parts::{halves, halves_mut, in_halves};
use crate::rng::{Philox, Stream};

/// Most images that are made at a time unless more are asked for.
pub(crate) const IMAGES_AT_ONCE: usize = 64;

/// Makes images (or latents) with a model.
///
/// The noise of sample i depends only on `seed` and i, so how many are made at a time changes nothing but speed (and rounding, where
/// products of another size add in another order). All samples of a step share its timestep, hence its window: one product covers
/// them all.
#[derive(Clone, Copy)]
pub struct Generator<'a> {
    /// The model.
    pub dit: &'a Dit,
    /// Its weights.
    pub weights: Weights<'a>,
    /// How it is asked.
    pub sampler: &'a Sampler,
    /// Seed of the noise.
    pub seed: u64,
}

impl Generator<'_> {
    /// Images of the classes in `labels`, made `batch` at a time: `[labels.len(), IC, H, W]`. `progress` is called with the number of
    /// denoising steps done, out of [`steps`].
    ///
    /// # Errors
    /// When a label is out of range, there are too few weights, numbers stop being finite, or `progress` returns an error. Also with
    /// guidance when the model has no null class.
    pub fn images(
        &self,
        memory: &mut Memory,
        labels: &[u32],
        batch: usize,
        mut progress: impl FnMut(usize) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let batch = batch.max(1);
        let mut images = Vec::new();
        let mut done = 0;
        for (index, labels) in labels.chunks(batch).enumerate() {
            let made = self.batch(memory, labels, index * batch, || {
                done += 1;
                progress(done)
            })?;
            images.extend(made);
        }
        Ok(images)
    }

    /// One batch, for those who do not keep all images in memory: the images of `labels`, of which the first is number `first` of
    /// all. `progress` is called after every denoising step.
    ///
    /// # Errors
    /// As [`Generator::images`].
    pub fn batch(
        &self,
        memory: &mut Memory,
        labels: &[u32],
        first: usize,
        mut progress: impl FnMut() -> Result<()>,
    ) -> Result<Vec<f32>> {
        let &Generator { dit, weights, sampler, seed } = self;
        let config = &dit.config;
        if sampler.guided() && !config.null_class {
            return Err(Error::usage(
                "guidance compares with the null class, which this model does not have: make it with null_class, or sample without guidance",
            ));
        }
        let (side, channels) = (config.input_size, config.in_channels);
        let dims = ImageDims { channels, pixels: side * side, learn_sigma: config.learn_sigma };
        let row = dims.elements();
        let start = Philox::new(seed, Stream::SampleStart);
        let noise = Philox::new(seed, Stream::SampleStep);
        // With guidance the batch is doubled: once with the labels, once with the null class.
        let copies = if sampler.guided() { 2 } else { 1 };
        let mut x = vec![0.0; copies * labels.len() * row];
        let mut y = labels.to_vec();
        y.resize(copies * labels.len(), config.num_classes as u32);
        let mut times = vec![0; y.len()];
        for (i, x) in x.chunks_exact_mut(row).enumerate() {
            start.normal(x, 0, (first + i % labels.len()) as u64);
        }
        sampler.sample(
            &mut x,
            |x, t, out| {
                let b = x.len() / row;
                times.fill(t);
                predict(dit, weights, memory, x, &times[..b], &y[..b], out)
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
}

/// What the model answers to noisy images `x` `[B, IC, H, W]` at timesteps `t` with labels `y`: `out` `[B, OC, H, W]`. On the CPU a small
/// model computes the halves of the batch side by side.
///
/// # Errors
/// When sizes do not fit, a timestep or label is out of range, or a device fails.
pub(crate) fn predict(
    dit: &Dit,
    weights: Weights,
    memory: &mut Memory,
    x: &[f32],
    t: &[u32],
    y: &[u32],
    out: &mut [f32],
) -> Result<()> {
    match weights {
        Weights::Cpu(weights) if in_halves(dit, t.len()) => {
            let b = t.len();
            let (x, t, y, out) = (halves(x, b), halves(t, b), halves(y, b), halves_mut(out, b));
            let (done, second_done) = memory.for_halves(|first, second| {
                awake(|| {
                    side_by_side(
                        || answer(dit, &mut Tape::inference(weights, first), x.0, t.0, y.0, out.0),
                        || answer(dit, &mut Tape::inference(weights, second), x.1, t.1, y.1, out.1),
                    )
                })
            });
            done.and(second_done)
        }
        _ => infer(weights, memory, |tape| answer(dit, tape, x, t, y, out)),
    }
}

fn answer(dit: &Dit, tape: &mut Tape, x: &[f32], t: &[u32], y: &[u32], out: &mut [f32]) -> Result<()> {
    let (channels, side) = (dit.config.in_channels, dit.config.input_size);
    let x = tape.input(x, [t.len(), channels, side, side], false)?;
    let made = dit.forward(tape, x, t, y)?;
    let numbers = tape.read(made)?;
    if numbers.len() != out.len() {
        let what = format!("an answer of {} numbers, and room for {}", numbers.len(), out.len());
        return Err(Error::Shape { operation: "predict", what });
    }
    out.copy_from_slice(&numbers);
    Ok(())
}

/// Number of denoising steps of a call of [`Generator::images`].
pub fn steps(sampler: &Sampler, samples: usize, batch: usize) -> usize {
    samples.div_ceil(batch.max(1)) * sampler.steps()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::{Method, Schedule, ScheduleKind};
    use crate::model::config::ModelConfig;
    use crate::model::dit::Init;
    use crate::routing::Routing;

    /// A model whose answers depend on everything, and its weights.
    fn model() -> (Dit, Vec<f32>) {
        let config = ModelConfig {
            hidden_size: 24,
            depth: 1,
            num_heads: 2,
            patch_size: 2,
            input_size: 4,
            in_channels: 1,
            num_classes: 3,
            null_class: true,
            mlp_ratio: 4.0,
            learn_sigma: true,
            routing: Routing::Paper,
            beta: 0.7,
            alpha: 4.0,
            routing_seed: 0,
        };
        let dit = Dit::new(config).unwrap();
        let mut weights = dit.init(2, Init::Small).to_vec();
        weights.iter_mut().enumerate().for_each(|(i, w)| *w += (i * 37 % 101) as f32 / 1000.0 - 0.05);
        (dit, weights)
    }

    /// Each sample made on its own, with the noise and the labels that the documentation promises.
    #[test]
    fn noise_and_labels_of_a_sample_are_those_of_its_number() {
        let (dit, weights) = model();
        let dims = ImageDims { channels: 1, pixels: 16, learn_sigma: true };
        let (labels, seed, first) = ([2, 0, 1, 1, 0], 7, 3);
        let mut memory = Memory::new();
        for guidance in [None, Some(2.5)] {
            let schedule = Schedule::new(ScheduleKind::Cosine, 1000).unwrap().respaced(&[10, 400, 700, 950]).unwrap();
            let sampler = Sampler::new(schedule, Method::Ddpm, true, guidance).unwrap();
            let mut steps = 0;
            let made = Generator { dit: &dit, weights: Weights::Cpu(&weights), sampler: &sampler, seed }.batch(
                &mut memory,
                &labels,
                first,
                || {
                    steps += 1;
                    Ok(())
                },
            );
            assert_eq!(steps, sampler.steps());
            for (i, (&label, made)) in labels.iter().zip(made.unwrap().chunks_exact(16)).enumerate() {
                let (number, rows) = ((first + i) as u64, 1 + usize::from(guidance.is_some()));
                let mut x = vec![0.0; rows * 16];
                Philox::new(seed, Stream::SampleStart).normal(&mut x[..16], 0, number);
                let model = |x: &[f32], t: u32, out: &mut [f32]| {
                    // The null class is that after the last.
                    let y = [label, 3];
                    infer(Weights::Cpu(&weights), &mut memory, |tape| {
                        answer(&dit, tape, x, &vec![t; rows], &y[..rows], out)
                    })
                };
                let noise = |k: usize, out: &mut [f32]| {
                    Philox::new(seed, Stream::SampleStep).normal(&mut out[..16], k as u64, number);
                };
                sampler.sample(&mut x, model, noise, |_, _| Ok(()), dims).unwrap();
                for (made, expected) in made.iter().zip(&x[..16]) {
                    assert!((made - expected).abs() <= 1e-3, "sample {i}, {guidance:?}: {made} for {expected}");
                }
            }
        }
    }

    #[test]
    fn the_last_batch_counts_though_it_is_not_full() {
        let (dit, weights) = model();
        let schedule = Schedule::new(ScheduleKind::Cosine, 1000).unwrap().respaced(&[10, 950]).unwrap();
        let sampler = Sampler::new(schedule, Method::Ddpm, true, None).unwrap();
        let mut told = Vec::new();
        let generator = Generator { dit: &dit, weights: Weights::Cpu(&weights), sampler: &sampler, seed: 0 };
        let tell = |done| {
            told.push(done);
            Ok(())
        };
        generator.images(&mut Memory::new(), &[1; 5], 2, tell).unwrap();
        assert_eq!(told, (1..=steps(&sampler, 5, 2)).collect::<Vec<_>>());
    }

    #[test]
    fn halves_of_a_batch_are_answered_as_batches_of_their_own() {
        let (dit, weights) = model();
        let mut memory = Memory::new();
        let x: Vec<f32> = (0..5 * 16).map(|i| (i * 29 % 67) as f32 / 40.0 - 0.8).collect();
        let (t, y) = ([900, 500, 20, 999, 0], [0, 1, 2, 3, 0]);
        let mut out = [f32::NAN; 5 * 32];
        predict(&dit, Weights::Cpu(&weights), &mut memory, &x, &t, &y, &mut out).unwrap();
        for samples in [0..3, 3..5] {
            let (from, to) = (samples.start, samples.end);
            let mut expected = vec![f32::NAN; samples.len() * 32];
            infer(Weights::Cpu(&weights), &mut memory, |tape| {
                answer(&dit, tape, &x[from * 16..to * 16], &t[samples.clone()], &y[samples.clone()], &mut expected)
            })
            .unwrap();
            assert!(expected.iter().any(|&x| x != 0.0) && expected == out[from * 32..to * 32]);
        }
        let mut whole = [f32::NAN; 5 * 32];
        infer(Weights::Cpu(&weights), &mut memory, |tape| answer(&dit, tape, &x, &t, &y, &mut whole)).unwrap();
        let largest = whole.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        assert!(whole.iter().zip(&out).all(|(whole, half)| (whole - half).abs() <= 1e-5 * largest));
        let mut answers = |x: &[f32], t: &[u32], y: &[u32], room: usize| {
            predict(&dit, Weights::Cpu(&weights), &mut memory, x, t, y, &mut vec![0.0; room]).is_ok()
        };
        assert!(answers(&x[..16], &t[..1], &y[..1], 32) && answers(&x, &t, &y, 5 * 32));
        for (count, labels, room) in [(80, 4, 160), (64, 5, 160), (80, 5, 159), (80, 5, 200), (3, 0, 0)] {
            assert!(!answers(&x[..count], &t, &y[..labels], room), "{count} numbers, {labels} labels, room for {room}");
        }
    }
}
