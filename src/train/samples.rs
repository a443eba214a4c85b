//! Pictures while a run trains: what it learns from, and grids of samples of its moving average.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use super::average::{Average, images_at_once};
use super::config::{SamplerKind, TrainConfig, ValidationWeights};
use super::learner::Learner;
use super::metrics::MetricsLog;
use super::progress::Progress;
use super::run_dir::{DATA_PNG, RunDir};
use super::trainer::Trainer;
use crate::diffusion::{Method, Sampler, sampling_timesteps};
use crate::error::{Error, Result};
use crate::generate::{self, Generator};
use crate::model::config::TASKS;
use crate::picture::grid_png;

/// The sampler of a model: `respacing` is one such as `50`, for dpm++ a number in any case; images are clipped, latents are not, and begin
/// where their estimates do not need it.
///
/// # Errors
/// When the respacing or the guidance is not usable.
pub fn sampler(config: &TrainConfig, kind: SamplerKind, respacing: &str, eta: f64, cfg: f64) -> Result<Sampler> {
    let full = config.noise_schedule()?;
    let (method, timesteps) = match kind {
        SamplerKind::Ddim => (Method::Ddim { eta }, sampling_timesteps(TASKS, respacing)?),
        SamplerKind::Ddpm => (Method::Ddpm, sampling_timesteps(TASKS, respacing)?),
        SamplerKind::DpmPlusPlus => {
            let steps = respacing.trim().parse().map_err(|_| {
                Error::usage(format!(
                    "steps of dpm++ are {respacing}, but it spreads them itself: give a number from 1 to {TASKS}"
                ))
            })?;
            (Method::DpmPlusPlus, full.evenly_by_log_snr(steps)?)
        }
    };
    let clip = config.are_images();
    let timesteps = if clip { timesteps } else { full.estimable(&timesteps) };
    Sampler::new(full.respaced(&timesteps)?, method, clip, (cfg != 1.0).then_some(cfg))
}

/// How much a picture of images of this side is enlarged, so that small ones can be seen.
pub(crate) fn scale_of(side: usize) -> usize {
    (64 / side).max(1)
}

/// Side of the picture of the first batch, in pixels, and most images in a row of it.
const DATA_SIDE: usize = 1024;
const DATA_COLUMNS: usize = 8;

impl Trainer<'_> {
    /// Draws images of the first batch as they are trained on, ordered by their labels. A failure is told but does not end training. Of
    /// data that cannot be read the first step tells.
    pub(super) fn picture_data(&mut self, run: &RunDir, progress: &Progress) {
        let config = self.config;
        let Ok(batch) = self.batches.images(config, 0) else { return };
        let scale = scale_of(config.image_size);
        let columns = (DATA_SIDE / (scale * config.image_size)).clamp(2, DATA_COLUMNS);
        let n = batch.labels.len().min(columns * columns);
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by_key(|&i| batch.labels[i]);
        let numbers = batch.pixels.len() / batch.labels.len();
        let pixels: Vec<f32> = order.iter().flat_map(|&i| &batch.pixels[i * numbers..][..numbers]).copied().collect();
        let shape = [n, config.in_channels, config.image_size, config.image_size];
        let drawn = grid_png(run.path().join(DATA_PNG), &pixels, shape, columns, scale, config.are_images());
        drawn.unwrap_or_else(|error| progress.say(&format!("no picture of the data: {error}")));
    }

    /// [`sample_grid`](Self::sample_grid), of which a failure is told but does not end training.
    pub(super) fn samples(
        &mut self,
        run: &RunDir,
        log: &mut MetricsLog,
        stop: &AtomicBool,
        progress: &mut Progress,
    ) -> Option<PathBuf> {
        let made = self.sample_grid(run, stop, progress);
        progress.end_meanwhile();
        if let Ok(path) = &made
            && let Err(error) = log.append_samples(self.step, path)
        {
            progress.say(&format!("the samples of step {} are not in TensorBoard: {error}", self.step));
        }
        made.inspect_err(|error| {
            if !stop.load(Ordering::Relaxed) {
                progress.say(&format!("no samples of step {}: {error}", self.step));
            }
        })
        .ok()
    }

    /// Samples of the moving average in a grid, one row a class. A request to stop ends it.
    fn sample_grid(&mut self, run: &RunDir, stop: &AtomicBool, progress: &mut Progress) -> Result<PathBuf> {
        let config = self.config;
        let path = run.samples(self.step)?;
        let steps = config.sample_steps.to_string();
        let sampler = sampler(config, config.sample_sampler, &steps, 0.0, config.sample_cfg)?;
        let columns = config.samples_per_class;
        let classes = config.sample_classes.min(config.num_classes);
        let class = |i: usize| if config.no_classes() { config.num_classes } else { i / columns };
        let labels: Vec<u32> = (0..classes * columns).map(|i| class(i) as u32).collect();
        // With guidance each image twice: with its label, and without.
        let Learner { dit, device_state, .. } = &self.learner;
        let at_once = images_at_once(dit, device_state.is_some(), config, if sampler.guided() { 2 } else { 1 });
        let mut average = Average::of(&mut self.learner, config, ValidationWeights::Ema)?;
        let (dit, weights, memory) = average.parts();
        let total = generate::steps(&sampler, labels.len(), at_once);
        let show = |done| {
            progress.meanwhile(format!("sampling {done}/{total}"));
            if stop.load(Ordering::Relaxed) { Err(Error::Stopped("sampling was stopped".into())) } else { Ok(()) }
        };
        let generator = Generator { dit, weights, sampler: &sampler, seed: config.seed };
        let pixels = generator.images(memory, &labels, at_once, show)?;
        let shape = [labels.len(), config.in_channels, config.image_size, config.image_size];
        grid_png(&path, &pixels, shape, columns, scale_of(config.image_size), config.are_images())?;
        Ok(path)
    }
}
