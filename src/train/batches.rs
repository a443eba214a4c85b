//! What a run computes next: the samples of each step, in parts, in the order in which they are computed.
//!
//! All of it depends on the seed, the step and the data alone; so a part can be gathered ahead, and a resumed run sees what
//! an uninterrupted one sees.

use super::config::TrainConfig;
use super::device::{DrawnNoise, How};
use super::learner::Batch;
use crate::data::Dataset;
use crate::data::loader::{self, Loader, LoaderOptions};
use crate::error::Result;
use crate::model::config::TASKS;
use crate::rng::{Philox, Stream};
use std::sync::Arc;

/// The samples of a step as they are drawn, and the order in which they are computed.
#[derive(Default)]
pub(super) struct Drawn {
    of: Option<u64>, // step
    images: Option<loader::Batch>,
    pub(super) t: Vec<u32>,     // [B], as drawn
    pub(super) order: Vec<u32>, // [B], sorted by t: neighbours share their windows
}

/// A part of a batch, in the order in which it is computed.
#[derive(Default)]
pub(super) struct Part {
    of: Option<(u64, usize)>, // step and number of the part
    samples: Vec<u32>,        // their numbers in the batch
    x_start: Vec<f32>,
    noise: Vec<f32>, // empty where the device draws it
    t: Vec<u32>,
    labels: Vec<u32>,
    coefficients: Vec<f64>,
}

/// The batches of a run.
pub(super) struct Batches {
    pub(super) loader: Loader,
    pub(super) part: Part,
    drawn: [Drawn; 2], // of even and of odd steps: one may be drawn ahead
    noise_elsewhere: bool,
}

impl Batches {
    /// The batches of `dataset`; `noise_elsewhere` when a device draws the noise.
    ///
    /// # Errors
    /// As [`Loader::new`].
    pub(super) fn new(config: &TrainConfig, dataset: Arc<dyn Dataset>, noise_elsewhere: bool) -> Result<Self> {
        let options = LoaderOptions { batch: config.batch_size, seed: config.seed, flip: config.flip, threads: 0 };
        let loader = Loader::new(dataset, options)?;
        Ok(Batches { loader, part: Part::default(), drawn: Default::default(), noise_elsewhere })
    }

    /// Makes [`Batches::part`] part `index` of `step`; false when it was that already.
    ///
    /// # Errors
    /// When the data cannot be read.
    pub(super) fn gather(&mut self, config: &TrainConfig, step: u64, index: usize) -> Result<bool> {
        if self.part.of == Some((step, index)) {
            return Ok(false);
        }
        self.draw(config, step)?;
        let drawn = &self.drawn[(step % 2) as usize];
        let size = config.batch_size / config.grad_accumulation;
        self.part.gather(&drawn.order[index * size..][..size], drawn, config, step, self.noise_elsewhere);
        self.part.of = Some((step, index));
        Ok(true)
    }

    /// The images and labels of `step`.
    ///
    /// # Errors
    /// When the data cannot be read.
    pub(super) fn images(&mut self, config: &TrainConfig, step: u64) -> Result<&loader::Batch> {
        self.draw(config, step)?;
        let Some(images) = &self.drawn(step).images else { unreachable!("loaded when drawn") };
        Ok(images)
    }

    /// Forgets the part, so that it is gathered again.
    pub(super) fn forget(&mut self) {
        self.part.of = None;
    }

    /// What was drawn for `step`, whose parts were gathered.
    pub(super) fn drawn(&self, step: u64) -> &Drawn {
        &self.drawn[(step % 2) as usize]
    }

    /// Loads the batch of `step`, draws its timesteps and sorts it by them, unless that is done.
    fn draw(&mut self, config: &TrainConfig, step: u64) -> Result<()> {
        let Drawn { of, images, t, order } = &mut self.drawn[(step % 2) as usize];
        if *of == Some(step) {
            return Ok(());
        }
        *of = None;
        *images = Some(self.loader.next(step)?);
        let batch = config.batch_size;
        let rng = Philox::new(config.seed, Stream::Timestep);
        t.clear();
        t.extend(
            (0..batch).map(|i| config.timesteps.draw(&rng, step, i, config.loss_weight.timesteps_of(i, batch, TASKS))),
        );
        order.clear();
        order.extend(0..batch as u32);
        order.sort_unstable_by_key(|&i| (t[i as usize], i));
        *of = Some(step);
        Ok(())
    }
}

impl Part {
    /// Collects `samples` of a batch: images and labels from the data, timesteps as drawn, noise and label dropout from
    /// their number in the batch alone.
    fn gather(&mut self, samples: &[u32], drawn: &Drawn, config: &TrainConfig, step: u64, noise_elsewhere: bool) {
        let Some(loader::Batch { pixels, labels, .. }) = &drawn.images else { unreachable!("loaded when drawn") };
        let row = pixels.len() / labels.len();
        let noise = Philox::new(config.seed, Stream::Noise);
        let dropout = Philox::new(config.seed, Stream::LabelDropout);
        self.samples.clear();
        self.samples.extend_from_slice(samples);
        self.x_start.resize(samples.len() * row, 0.0);
        self.noise.resize(if noise_elsewhere { 0 } else { samples.len() * row }, 0.0);
        self.t.clear();
        self.labels.clear();
        for (k, &sample) in samples.iter().enumerate() {
            let (i, place) = (sample as usize, k * row..(k + 1) * row);
            self.x_start[place.clone()].copy_from_slice(&pixels[i * row..][..row]);
            if !noise_elsewhere {
                noise.normal(&mut self.noise[place], step, u64::from(sample));
            }
            self.t.push(drawn.t[i]);
            let dropped = f64::from(dropout.uniform(step, u64::from(sample), 0)) < config.label_dropout;
            self.labels.push(if dropped { config.num_classes as u32 } else { labels[i] });
        }
    }

    /// Takes the coefficients of its samples from those of the batch, as drawn.
    pub(super) fn set_coefficients(&mut self, of_batch: &[f64]) {
        self.coefficients.clear();
        self.coefficients.extend(self.samples.iter().map(|&sample| of_batch[sample as usize]));
    }

    /// The numbers.
    pub(super) fn batch(&self) -> Batch<'_> {
        let Part { x_start, noise, t, labels, coefficients, .. } = self;
        Batch { x_start, noise, t, labels, coefficients }
    }

    /// How a device computes this part.
    pub(super) fn how(&self, config: &TrainConfig) -> How<'_> {
        let (step, index) = self.of.unwrap_or_default();
        How {
            drawn: Some(DrawnNoise { seed: config.seed, step, samples: &self.samples }),
            add: index > 0,
            updates: index + 1 == config.grad_accumulation,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::made::made;

    /// Four samples of class 0 of three.
    fn few() -> Arc<dyn Dataset> {
        made(4, 3, |_, _, out| {
            out.fill(0.0);
            Ok(0)
        })
    }

    /// Samples that say who they are: the first pixel is the index, the second tells a mirrored one.
    fn told() -> Arc<dyn Dataset> {
        made(20, 3, |index, flip, out| {
            out.fill(0.0);
            (out[0], out[1]) = (index as f32, f32::from(u8::from(flip)));
            Ok(index as u32 % 3)
        })
    }

    /// What is drawn for a sample: its image's index, whether it is mirrored, its noise (the bits), timestep and label.
    #[derive(Clone, Debug, PartialEq)]
    struct Draw {
        index: usize,
        flip: bool,
        noise: Vec<u32>,
        t: u32,
        label: u32,
    }

    /// The samples of the first steps, as drawn, when each step is gathered in `parts`.
    fn draws(seed: u64, flip: bool, parts: usize) -> Vec<Vec<Draw>> {
        let mut config = TrainConfig {
            batch_size: 12,
            label_dropout: 0.3,
            grad_accumulation: parts,
            seed,
            flip,
            ..TrainConfig::default()
        };
        config.fit_to_data(4, 1, 3).unwrap();
        let mut batches = Batches::new(&config, told(), false).unwrap();
        let of_step = |step| {
            let mut drawn = vec![None; config.batch_size];
            for index in 0..parts {
                batches.gather(&config, step, index).unwrap();
                let of_batch: Vec<f64> = (0..config.batch_size).map(|sample| sample as f64).collect();
                batches.part.set_coefficients(&of_batch);
                let Part { samples, x_start, noise, t, labels, coefficients, .. } = &batches.part;
                assert!(t.is_sorted(), "neighbours share their windows");
                assert!(coefficients.iter().zip(samples).all(|(c, &sample)| *c == f64::from(sample)));
                for (k, &sample) in samples.iter().enumerate() {
                    drawn[sample as usize] = Some(Draw {
                        index: x_start[16 * k] as usize,
                        flip: x_start[16 * k + 1] == 1.0,
                        noise: noise[16 * k..][..16].iter().map(|x| x.to_bits()).collect(),
                        t: t[k],
                        label: labels[k],
                    });
                }
            }
            drawn.into_iter().map(|draw| draw.expect("every sample is in a part")).collect()
        };
        (0..5).map(of_step).collect()
    }

    #[test]
    fn every_step_and_every_seed_draws_anew_and_parts_draw_the_same() {
        let (found, other) = (draws(1, true, 1), draws(2, true, 1));
        assert_eq!(draws(1, true, 4), found);
        let mut noises = std::collections::HashSet::new();
        for draw in found.iter().chain(&other).flatten() {
            assert!(noises.insert(draw.noise.clone()), "two samples have the same noise");
            assert!([draw.index as u32 % 3, 3].contains(&draw.label), "a label of another sample: {draw:?}");
        }
        assert!(draws(1, false, 1).iter().flatten().all(|draw| !draw.flip));
        type Of = fn(&Draw) -> u32;
        let parts: [(&str, Of); 4] = [
            ("images", |draw| draw.index as u32),
            ("flips", |draw| draw.flip.into()),
            ("timesteps", |draw| draw.t),
            ("dropped labels", |draw| (draw.label == 3).into()),
        ];
        for (what, of) in parts {
            let steps = |found: &[Vec<Draw>]| -> Vec<Vec<u32>> {
                found.iter().map(|step| step.iter().map(of).collect()).collect()
            };
            let (found, other) = (steps(&found), steps(&other));
            assert!(found.iter().zip(&other).all(|(a, b)| a != b), "{what} are those of another seed");
            assert!(found.windows(2).all(|pair| pair[0] != pair[1]), "{what} are those of the step before");
        }
    }

    /// Whether the label of each sample was dropped, as drawn, by step, when `share` of them are.
    fn dropped(share: f64, parts: usize) -> Vec<Vec<bool>> {
        let mut config =
            TrainConfig { batch_size: 64, label_dropout: share, grad_accumulation: parts, ..TrainConfig::default() };
        config.fit_to_data(4, 1, 3).unwrap();
        let mut batches = Batches::new(&config, few(), true).unwrap();
        let of_step = |step| {
            let mut dropped = vec![None; config.batch_size];
            for index in 0..parts {
                assert!(batches.gather(&config, step, index).unwrap());
                for (&sample, &label) in batches.part.samples.iter().zip(&batches.part.labels) {
                    assert!([0, 3].contains(&label), "label {label} is neither the sample's nor the null class");
                    dropped[sample as usize] = Some(label == 3);
                }
            }
            dropped.into_iter().map(|dropped| dropped.expect("every sample is in a part")).collect()
        };
        (0..40).map(of_step).collect()
    }

    #[test]
    fn every_timestep_is_trained_on() {
        let mut config = TrainConfig { batch_size: 1000, ..TrainConfig::default() };
        config.fit_to_data(4, 1, 3).unwrap();
        let mut batches = Batches::new(&config, few(), true).unwrap();
        let mut drawn = std::collections::BTreeSet::<u32>::new();
        for step in 0..12 {
            batches.gather(&config, step, 0).unwrap();
            drawn.extend(&batches.part.t);
        }
        assert!(drawn.into_iter().eq(0..TASKS as u32));
    }

    #[test]
    fn labels_are_dropped_as_often_as_asked_for() {
        for share in [0.0, 0.1, 0.6, 1.0] {
            let found = dropped(share, 1);
            let draws = found.concat();
            let there = draws.iter().filter(|&&dropped| dropped).count() as f64 / draws.len() as f64;
            // Four standard deviations: nothing is left of them at 0 and 1.
            let slack = 4.0 * (share * (1.0 - share) / draws.len() as f64).sqrt();
            assert!((there - share).abs() <= slack, "{there} of the labels are dropped for {share}");
        }
    }

    #[test]
    fn other_labels_are_dropped_in_every_step_and_the_same_in_parts() {
        let found = dropped(0.3, 1);
        for (step, later) in found.iter().enumerate() {
            assert!(!found[..step].contains(later), "step {step} drops the labels of another step");
        }
        // Nor does a sample's place in the batch decide.
        for sample in 0..64 {
            let count = found.iter().filter(|step| step[sample]).count();
            assert!((1..30).contains(&count), "sample {sample} has no label in {count} of 40 steps");
        }
        assert_eq!(dropped(0.3, 4), found);
    }
}
