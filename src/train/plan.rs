//! The device memory that training takes, known before anything is trained: passes on paper take every buffer of a real one.

use super::config::TrainConfig;
use super::device::{DeviceState, DrawnNoise, How};
use super::learner::Batch;
use crate::autograd::Memory;
use crate::autograd::cuda::{DeviceWeights, pass};
use crate::backend::cuda::device::Recorded;
use crate::backend::cuda::{DType, Device};
use crate::error::{Error, Result};
use crate::generate::IMAGES_AT_ONCE;
use crate::model::config::TASKS;
use crate::model::dit::Dit;
use std::fmt;
use std::sync::Arc;

/// Most samples of a pass: along one side a grid has a block for each, and 65535 at most.
const MOST_SAMPLES: usize = 65_535;

/// Bytes of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Weights (and their bf16 copy), moving average, two moments, gradients.
    pub parameters: usize,
    /// What a step keeps for its backward pass, and what that computes with, at the worst moment.
    pub activations: usize,
    /// Images, noise schedule, timesteps, windows and labels of the part that is computed and of the next one.
    pub inputs: usize,
    /// The moving average as products read it, and activations: for grids of samples and the validation loss.
    pub samples: usize,
}

impl Plan {
    /// What training with `config` takes on a device like `device`, in parts of `part` images.
    ///
    /// # Errors
    /// When the kernels do not take these sizes.
    pub fn new(config: &TrainConfig, dit: &Dit, device: &Device, elem: DType, part: usize) -> Result<Self> {
        let device = Arc::new(Device::on_paper(device.name(), device.arch(), device.multiprocessors()));
        let len = dit.layout.len();
        let of_elem = if elem == DType::Bf16 { elem.bytes() } else { 0 };
        let mut memory = Memory::on_device(&device, elem);
        on_paper(dit, &device, elem, part, &mut memory)?;
        let [activations, inputs] = memory.device_parts();

        let at_once = |images: usize| images.min(part).min(IMAGES_AT_ONCE);
        let images = at_once(config.samples_per_class * config.sample_classes.min(config.num_classes));
        let halves = if config.sample_cfg == 1.0 { 1 } else { 2 };
        // How many samples data of their own have is not known here.
        let held_out = config.validation_samples.saturating_mul(config.validation_repeats);
        let validated = if config.validation_data.is_empty() { held_out } else { IMAGES_AT_ONCE };
        let count = (halves * images).max(at_once(validated));
        let mut memory = Memory::on_device(&device, elem);
        sample_on_paper(dit, &device, elem, count, &mut memory)?;
        Ok(Plan {
            parameters: len * (5 * DType::F32.bytes() + of_elem),
            activations,
            inputs: 2 * inputs,
            samples: len * (DType::F32.bytes() + of_elem) + memory.device_bytes(),
        })
    }

    /// All of it.
    pub fn total(&self) -> usize {
        self.parameters + self.activations + self.inputs + self.samples
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Plan { parameters, activations, inputs, samples } = *self;
        let [total, parameters, activations, inputs, samples] =
            [self.total(), parameters, activations, inputs, samples].map(readable);
        write!(
            f,
            "{total} (parameters and what goes with them {parameters}, activations {activations}, inputs {inputs}, \
             samples {samples})"
        )
    }
}

/// The plan of a run on `device`.
///
/// # Errors
/// When it is more than the device has free: by how much, and what would fit.
pub fn check(config: &TrainConfig, dit: &mut Dit, device: &Device, elem: DType) -> Result<Plan> {
    let part = config.batch_size / config.grad_accumulation;
    if part > MOST_SAMPLES {
        let (batch, parts) = (config.batch_size, config.grad_accumulation);
        let accumulation = (parts..=batch).find(|n| batch.is_multiple_of(*n) && batch / n <= MOST_SAMPLES);
        return Err(Error::usage(format!(
            "parts of {part} images are more than the {MOST_SAMPLES} that kernels take at once: give --grad-accumulation {} (the same \
             steps, in smaller parts), or a smaller --batch-size",
            accumulation.unwrap_or(batch)
        )));
    }
    let plan = Plan::new(config, dit, device, elem, part)?;
    let (free, _) = device.memory()?;
    if plan.total() <= free {
        return Ok(plan);
    }
    let mut remedies = Vec::new();
    let largest = most_that_fits(config, dit, device, elem, part, free)?;
    if let Some(largest) = largest {
        let accumulation = (1..=config.batch_size)
            .find(|n| config.batch_size.is_multiple_of(*n) && config.batch_size / n <= largest)
            .unwrap_or(config.batch_size);
        remedies.extend(batch_of(config, largest).map(|batch| format!("--batch-size {batch}")));
        remedies.push(format!("--grad-accumulation {accumulation} (the same steps, in smaller parts)"));
    }
    if !dit.checkpoint_activations {
        dit.checkpoint_activations = true;
        let largest = most_that_fits(config, dit, device, elem, part, free);
        dit.checkpoint_activations = false;
        remedies.extend(largest?.and_then(|largest| match largest == part {
            true => Some("--checkpoint-activations".to_string()),
            false => {
                batch_of(config, largest).map(|batch| format!("--checkpoint-activations with --batch-size {batch}"))
            }
        }));
    }
    let remedy = match remedies.as_slice() {
        [] => "not even one image at a time fits: choose a smaller model".to_string(),
        [only] => format!("{only} fits"),
        [first @ .., last] => format!("{} or {last} fits", first.join(", ")),
    };
    Err(Error::usage(format!(
        "training {} in parts of {part} images takes {plan}, but {} has only {} free, {} too few: {remedy}",
        config.model,
        device.name(),
        readable(free),
        readable(plan.total() - free)
    )))
}

/// The largest batch in parts of at most `part` images that the weight of the loss takes.
fn batch_of(config: &TrainConfig, part: usize) -> Option<usize> {
    let batches = (1..=part).rev().map(|part| part * config.grad_accumulation);
    batches.into_iter().find(|&batch| config.loss_weight.check_batch(batch).is_ok())
}

/// The largest part of up to `part` images that fits; None when not even one does.
fn most_that_fits(
    config: &TrainConfig,
    dit: &Dit,
    device: &Device,
    elem: DType,
    part: usize,
    free: usize,
) -> Result<Option<usize>> {
    let fits = |part| Ok::<_, Error>(Plan::new(config, dit, device, elem, part)?.total() <= free);
    if fits(part)? {
        return Ok(Some(part));
    }
    // `low` fits (0 always does), `high` does not.
    let (mut low, mut high) = (0, part);
    while high - low > 1 {
        let middle = low.midpoint(high);
        if fits(middle)? { low = middle } else { high = middle }
    }
    Ok((low > 0).then_some(low))
}

/// The launches of a training step of `part` images on a device like `device`, and the bytes that its activations and inputs
/// take.
///
/// # Errors
/// When the kernels do not take these sizes.
pub fn launches(dit: &Dit, device: &Device, elem: DType, part: usize) -> Result<(Vec<Recorded>, usize)> {
    let device = Arc::new(Device::on_paper(device.name(), device.arch(), device.multiprocessors()));
    let mut memory = Memory::on_device(&device, elem);
    // The first pass plans the memory and runs twice for it.
    for _ in 0..2 {
        device.record();
        on_paper(dit, &device, elem, part, &mut memory)?;
    }
    Ok((device.record(), memory.device_bytes()))
}

/// A training step of `part` images on paper: its buffers and launches.
///
/// # Errors
/// When the kernels do not take these sizes.
fn on_paper(dit: &Dit, device: &Arc<Device>, elem: DType, part: usize, memory: &mut Memory) -> Result<()> {
    let config = &dit.config;
    let mut state = DeviceState::planned(device, elem, dit.layout.len())?;
    let x_start = vec![0.0; part * config.in_channels * config.input_size * config.input_size];
    let t: Vec<u32> = (0..part).map(|i| ((2 * i + 1) * TASKS / (2 * part)) as u32).collect();
    let samples: Vec<u32> = (0..part as u32).collect();
    let batch = Batch { x_start: &x_start, noise: &[], t: &t, labels: &vec![0; part], coefficients: &[] };
    let drawn = Some(DrawnNoise { seed: 0, step: 0, samples: &samples });
    state.stage(dit, memory, batch, How { drawn, add: false, updates: true })
}

/// A pass of `count` samples on paper.
fn sample_on_paper(dit: &Dit, device: &Arc<Device>, elem: DType, count: usize, memory: &mut Memory) -> Result<()> {
    let config = &dit.config;
    let shape = [count, config.in_channels, config.input_size, config.input_size];
    let x = vec![0.0; shape.iter().product()];
    let weights = DeviceWeights::planned(device, dit.layout.len(), elem)?;
    pass(&weights, None, memory, |tape| {
        let x = tape.input(&x, shape, false)?;
        dit.forward(tape, x, &vec![0; count], &vec![0; count]).map(|_| ())
    })
}

/// `1.5 GB`, or the unit that suits.
pub fn readable(bytes: usize) -> String {
    let bytes = bytes as f64;
    match bytes {
        _ if bytes >= 1e9 => format!("{:.2} GB", bytes / 1e9),
        _ if bytes >= 1e6 => format!("{:.1} MB", bytes / 1e6),
        _ => format!("{:.1} kB", bytes / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::LossWeight;

    #[test]
    fn the_batch_that_is_advised_is_one_that_is_taken() {
        let mut config = TrainConfig::default();
        assert_eq!([1, 13, 128].map(|part| batch_of(&config, part)), [Some(1), Some(13), Some(128)]);
        config.loss_weight = LossWeight::Uncertainty;
        assert_eq!([7, 13, 128].map(|part| batch_of(&config, part)), [None, Some(8), Some(128)]);
        config.grad_accumulation = 4;
        assert_eq!([1, 13].map(|part| batch_of(&config, part)), [None, Some(48)]);
    }
}
