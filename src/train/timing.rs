//! How long training steps take on a CUDA device.

use super::config::TrainConfig;
use super::device::{DeviceUpdate, DrawnNoise, How};
use super::learner::{Batch, Learner, Losses};
use super::setup;
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cuda::clock::KernelTime;
use crate::backend::cuda::{DType, Device};
use crate::error::{Error, Result};
use crate::model::config::TASKS;
use crate::model::dit::Dit;
use crate::rng::{Philox, Stream};
use rayon::prelude::*;
use std::sync::Arc;
use std::time::Instant;

/// Steps that are not timed: memory is planned, and the step is captured as a graph.
const WARM_UP: usize = 3;

/// What was measured.
#[derive(Clone, Debug)]
pub struct StepTimes {
    /// Seconds on the device of a step of the whole batch: the median.
    pub device_seconds: f64,
    /// Seconds of a step by the clock of the host, when it makes the next one ready meanwhile, as training does.
    pub host_seconds: f64,
    /// Bytes of device memory for activations and inputs.
    pub memory: usize,
    /// Number of parameters.
    pub parameters: usize,
    /// One more step by kernel, when asked for; those that took longest first.
    pub kernels: Vec<KernelTime>,
}

/// Times `runs` training steps of `config` on random data, with random weights (adaLN-Zero starts with gates of zero, which
/// no kernel must profit from); and when `profiled`, the kernels of one more step.
///
/// # Errors
/// When the model does not fit the device, or the device fails.
pub fn time_steps(
    config: &TrainConfig,
    device: &Arc<Device>,
    elem: DType,
    runs: usize,
    profiled: bool,
) -> Result<(Learner, StepTimes)> {
    let rng = Philox::new(config.seed, Stream::Noise);
    let weights = |dit: &Dit| {
        let mut weights = AlignedVec::zeros(dit.layout.len());
        rng.normal(&mut weights, 0, 2);
        weights.par_iter_mut().for_each(|w| *w *= 0.02);
        weights
    };
    let mut learner = setup::learner_on_device(config, setup::model(config)?, device, elem, weights)?;
    let b = config.batch_size / config.grad_accumulation;
    let mut x_start = vec![0.0; b * config.in_channels * config.image_size * config.image_size];
    rng.normal(&mut x_start, 0, 0);
    let t: Vec<u32> = (0..b).map(|i| ((2 * i + 1) * TASKS / (2 * b)) as u32).collect();
    let labels: Vec<u32> = (0..b).map(|i| (i % config.num_classes) as u32).collect();
    let coefficients = vec![1.0 / config.batch_size as f64; b];
    let samples: Vec<u32> = (0..b as u32).collect();
    let batch = Batch { x_start: &x_start, noise: &[], t: &t, labels: &labels, coefficients: &coefficients };
    let update = DeviceUpdate { update: config.update_at(0, 0), clip: config.grad_clip };
    let parts = config.grad_accumulation;
    let how = |step: u64, part: usize| How {
        drawn: Some(DrawnNoise { seed: config.seed, step, samples: &samples }),
        add: part > 0,
        updates: part + 1 == parts,
    };
    let launch = |learner: &mut Learner, step: u64| {
        for part in 0..parts {
            let last = part + 1 == parts;
            learner.launch(batch, how(step, part), last.then_some(update))?;
            if !last {
                learner.stage(batch, how(step, part + 1))?;
            }
        }
        Ok(())
    };
    let (mut seconds, mut losses) = (Vec::with_capacity(runs), Losses::default());
    let mut begun = Instant::now();
    learner.stage(batch, how(0, 0))?;
    let steps = WARM_UP + runs;
    for step in 0..steps {
        if step == WARM_UP {
            begun = Instant::now();
        }
        let start = device.moment()?;
        launch(&mut learner, step as u64)?;
        let end = device.moment()?;
        learner.stage(batch, how(step as u64 + 1, 0))?;
        learner.collect(&mut losses)?;
        if let (Some(start), Some(end), true) = (start, end, step >= WARM_UP) {
            seconds.push(start.milliseconds_until(&end)? / 1e3);
        }
    }
    let host_seconds = begun.elapsed().as_secs_f64() / runs as f64;
    let mut kernels = Vec::new();
    // Twice: the first time memory for two steps' results is taken, which may wait for the device.
    for step in (steps as u64..).step_by(2).take(if profiled { 2 } else { 0 }) {
        // A graph keeps the device busy while the host launches the step after it, or kernels would be charged for the host.
        launch(&mut learner, step)?;
        learner.stage(batch, how(step + 1, 0))?;
        kernels = device.time_launches(|| launch(&mut learner, step + 1))?;
        learner.stage(batch, how(step + 2, 0))?;
        learner.collect(&mut losses)?;
    }
    if let Some(bad) = losses.loss.iter().find(|loss| !loss.is_finite()) {
        return Err(Error::Stopped(format!("a loss is {bad}: what was timed is not a training step")));
    }
    seconds.sort_by(f64::total_cmp);
    let device_seconds = seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN);
    let memory = learner.memory.device_bytes();
    let parameters = learner.dit.layout.len();
    Ok((learner, StepTimes { device_seconds, host_seconds, memory, parameters, kernels }))
}
