//! A model that learns: weights, their gradients and moments, and one training step over given batches.
//!
//! Everything random is drawn by the caller, so that a step can be compared with another implementation's.

use super::device::{Decision, DeviceState, DeviceUpdate, How};
use super::optimizer::{self, Update};
use crate::autograd::{Memory, Tape};
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cpu::threads::awake;
use crate::backend::cuda::{DType, Device};
use crate::diffusion::weighting::{CLUSTERS, uncertainty_coefficients, uncertainty_loss};
use crate::diffusion::{ImageDims, LossTerms, LossWeight, Schedule, losses, q_sample};
use crate::error::{Error, Result};
use crate::model::dit::Dit;
use std::ops::Range;
use std::sync::Arc;

/// Samples to learn from.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    /// `[B, IC, H, W]`
    pub x_start: &'a [f32],
    /// `[B, IC, H, W]`
    pub noise: &'a [f32],
    /// `[B]`
    pub t: &'a [u32],
    /// `[B]`, the null class where the label was dropped.
    pub labels: &'a [u32],
    /// `[B]`: derivative of the objective with respect to the loss of each sample, 1 / B for their mean.
    pub coefficients: &'a [f64],
}

/// Loss of each sample, `[B]`.
#[derive(Clone, Debug, Default)]
pub struct Losses {
    /// Weighted squared error.
    pub mse: Vec<f32>,
    /// Variational bound in bits.
    pub vb: Vec<f32>,
    /// Their sum.
    pub loss: Vec<f32>,
}

/// The learned log-variances of uncertainty weighting, with their own AdamW.
#[derive(Clone, Debug)]
pub struct Uncertainty {
    /// s, one a cluster of timesteps.
    pub log_variances: [f32; CLUSTERS],
    /// First moments.
    pub m: [f32; CLUSTERS],
    /// Second moments.
    pub v: [f32; CLUSTERS],
    gradient: [f32; CLUSTERS],
}

/// Weights and everything that changes them.
pub struct Learner {
    /// The model.
    pub dit: Dit,
    /// Noise schedule over all timesteps.
    pub schedule: Schedule,
    /// Weight of the loss by timestep.
    pub loss_weight: LossWeight,
    /// `[P]`, in the model's layout, as are the next four.
    pub weights: AlignedVec,
    /// Moving average of the weights.
    pub ema: AlignedVec,
    /// First moments of AdamW.
    pub m: AlignedVec,
    /// Second moments of AdamW.
    pub v: AlignedVec,
    /// Gradients of the last batch.
    pub grads: AlignedVec,
    /// Uncertainty weighting, when `loss_weight` asks for it.
    pub uncertainty: Option<Uncertainty>,
    /// Updates made so far.
    pub updates: u64,
    /// Buffers of the model's passes.
    pub memory: Memory,
    /// Where everything is while training on a CUDA device: `weights`, `ema`, `m` and `v` here are then as old as when they
    /// were last fetched, arbitrary before the first time, and `grads` is empty.
    pub on_device: Option<DeviceState>,
    x_t: Vec<f32>,
    d_out: Vec<f32>,
    sample_weights: Vec<f64>,
    norm_parts: Vec<(Range<usize>, f64)>,
}

impl Learner {
    /// A learner whose weights are those of `start` (in the layout of `dit`).
    pub fn new(dit: Dit, schedule: Schedule, loss_weight: LossWeight, start: AlignedVec) -> Self {
        let (ema, grads) = (start.clone(), AlignedVec::zeros(start.len()));
        Self::with(dit, schedule, loss_weight, [start, ema, grads])
    }

    /// [`Learner::new`] on a CUDA device, for products in `elem`.
    ///
    /// # Errors
    /// When it does not fit, or the device fails.
    pub fn on_device(
        dit: Dit,
        schedule: Schedule,
        loss_weight: LossWeight,
        start: AlignedVec,
        device: &Arc<Device>,
        elem: DType,
    ) -> Result<Self> {
        let state = DeviceState::new(device, elem, &start)?;
        // A large model's buffers take seconds to fill in main memory, and nobody reads these before they are fetched.
        let ema = AlignedVec::zeros(start.len());
        let learner = Self::with(dit, schedule, loss_weight, [start, ema, AlignedVec::new()]);
        Ok(Learner { memory: Memory::on_device(device, elem), on_device: Some(state), ..learner })
    }

    fn with(dit: Dit, schedule: Schedule, loss_weight: LossWeight, [weights, ema, grads]: [AlignedVec; 3]) -> Self {
        assert_eq!(weights.len(), dit.layout.len(), "weights have the layout of the model");
        let none = [0.0; CLUSTERS];
        Learner {
            m: AlignedVec::zeros(weights.len()),
            v: AlignedVec::zeros(weights.len()),
            ema,
            grads,
            uncertainty: (loss_weight == LossWeight::Uncertainty).then_some(Uncertainty {
                log_variances: none,
                m: none,
                v: none,
                gradient: none,
            }),
            updates: 0,
            memory: Memory::new(),
            on_device: None,
            x_t: Vec::new(),
            d_out: Vec::new(),
            sample_weights: Vec::new(),
            norm_parts: Vec::new(),
            dit,
            schedule,
            loss_weight,
            weights,
        }
    }

    /// Copies everything from the device, if there is one, to main memory.
    ///
    /// # Errors
    /// When the device fails.
    pub fn fetch(&mut self) -> Result<()> {
        let Learner { weights, ema, m, v, on_device, .. } = self;
        on_device.as_ref().map_or(Ok(()), |state| state.read(weights, [ema, m, v]))
    }

    /// Copies everything from main memory to the device, if there is one.
    ///
    /// # Errors
    /// When the device fails.
    pub fn push(&self) -> Result<()> {
        let rest = [&self.ema[..], &self.m, &self.v];
        self.on_device.as_ref().map_or(Ok(()), |state| state.write(&self.weights, rest))
    }

    /// Sends `batch` to the device, whatever that is doing.
    ///
    /// # Errors
    /// As [`DeviceState::stage`], and on a learner that is not on a device.
    pub fn stage(&mut self, batch: Batch, how: How) -> Result<()> {
        let Learner { dit, memory, on_device, .. } = self;
        on_device.as_mut().ok_or_else(not_on_device)?.stage(dit, memory, batch, how)
    }

    /// Starts the pass over the batch that was staged, and the update if it is the last part.
    ///
    /// # Errors
    /// As [`DeviceState::launch`], and on a learner that is not on a device.
    pub fn launch(&mut self, batch: Batch, how: How, update: Option<DeviceUpdate>) -> Result<()> {
        let Learner { dit, schedule, loss_weight, memory, on_device, .. } = self;
        let state = on_device.as_mut().ok_or_else(not_on_device)?;
        state.launch(dit, schedule, *loss_weight, memory, batch, how, update)
    }

    /// Waits for what was launched.
    ///
    /// # Errors
    /// As [`DeviceState::collect`], and on a learner that is not on a device.
    pub fn collect(&mut self, found: &mut Losses) -> Result<Option<Decision>> {
        self.on_device.as_mut().ok_or_else(not_on_device)?.collect(found)
    }

    /// Coefficients of a whole batch of `coefficients.len()` samples in the order they were drawn: 1 / B, or those of
    /// uncertainty weighting.
    pub fn coefficients(&self, coefficients: &mut [f64]) {
        match &self.uncertainty {
            Some(uncertainty) => uncertainty_coefficients(coefficients, &uncertainty.log_variances),
            None => {
                let batch = coefficients.len();
                coefficients.fill(1.0 / batch as f64);
            }
        }
    }

    /// Loss and gradients of `batch`, computed [`awake`], by a thread of the pool. `add` adds to the gradients of the parts of a
    /// batch before it.
    ///
    /// # Errors
    /// When sizes do not fit, or a timestep or label is out of range.
    pub fn gradients(&mut self, batch: Batch, add: bool, found: &mut Losses) -> Result<()> {
        awake(|| self.pass(batch, add, found))
    }

    fn pass(&mut self, batch: Batch, add: bool, found: &mut Losses) -> Result<()> {
        let config = &self.dit.config;
        let (b, side, channels) = (batch.t.len(), config.input_size, config.in_channels);
        let dims = ImageDims { channels, pixels: side * side, learn_sigma: config.learn_sigma };
        self.x_t.resize(b * dims.elements(), 0.0);
        self.d_out.resize(b * dims.out_elements(), 0.0);
        for losses in [&mut found.mse, &mut found.vb, &mut found.loss] {
            losses.resize(b, 0.0);
        }
        self.sample_weights.clear();
        self.sample_weights.extend(batch.t.iter().map(|&t| self.loss_weight.weight(&self.schedule, t as usize)));
        q_sample(&mut self.x_t, batch.x_start, batch.noise, batch.t, &self.schedule)?;

        let mut tape = Tape::new(&self.weights, &mut self.grads, add, &mut self.memory);
        let x_t = tape.input(&self.x_t, [b, channels, side, side], false)?;
        let out = self.dit.forward(&mut tape, x_t, batch.t, batch.labels)?;
        let terms =
            LossTerms { mse: &mut found.mse, vb: &mut found.vb, loss: &mut found.loss, d_model_out: &mut self.d_out };
        losses(
            terms,
            tape.value(out),
            batch.x_start,
            batch.noise,
            batch.t,
            &self.sample_weights,
            batch.coefficients,
            &self.schedule,
            dims,
        )?;
        tape.backward(out, &self.d_out)
    }

    /// The objective of a whole batch from the losses of its samples, in the order they were drawn: their mean, or that of
    /// uncertainty weighting (whose own gradient is kept for the update).
    pub fn objective(&mut self, losses: &[f32]) -> f64 {
        match &mut self.uncertainty {
            Some(uncertainty) => uncertainty_loss(&mut uncertainty.gradient, losses, &uncertainty.log_variances),
            None => losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / losses.len() as f64,
        }
    }

    /// L2 norm of the gradients as the last [`Learner::gradients`] left them: not finite when any of them is not.
    pub fn gradient_norm(&mut self) -> f64 {
        optimizer::norm(&self.grads, self.memory.squares_mut(), &mut self.norm_parts)
    }

    /// One update of the weights and their moving average. `update.number` is set here; `uncertainty_lr` is the learning
    /// rate of the log-variances.
    pub fn update(&mut self, update: Update, uncertainty_lr: f64) {
        self.updates += 1;
        let update = Update { number: self.updates, ..update };
        let Learner { weights, ema, m, v, grads, .. } = self;
        optimizer::adamw(weights, ema, m, v, grads, update);
        self.update_uncertainty(update, uncertainty_lr);
    }

    /// What is left of an update that the device made: its number and the log-variances.
    pub fn updated_on_device(&mut self, update: Update, uncertainty_lr: f64) {
        self.updates += 1;
        self.update_uncertainty(Update { number: self.updates, ..update }, uncertainty_lr);
    }

    fn update_uncertainty(&mut self, update: Update, uncertainty_lr: f64) {
        if let Some(Uncertainty { log_variances, m, v, gradient }) = &mut self.uncertainty {
            let update = Update { lr: uncertainty_lr, weight_decay: 0.0, grad_scale: 1.0, ..update };
            // Nobody asks for their moving average.
            optimizer::adamw(log_variances, &mut [0.0; CLUSTERS], m, v, gradient, update);
        }
    }
}

fn not_on_device() -> Error {
    Error::Stopped("this learner is not on a CUDA device".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::ScheduleKind;
    use crate::model::config::{ModelConfig, TASKS};
    use crate::model::dit::Init;
    use crate::routing::Routing;

    /// What backward says of the gradients of weights is what they are, by any number of threads, and nothing of those it adds to.
    #[test]
    fn the_norm_is_that_of_all_gradients() {
        let config = ModelConfig {
            hidden_size: 72,
            depth: 2,
            num_heads: 3,
            patch_size: 2,
            input_size: 6,
            in_channels: 1,
            num_classes: 10,
            null_class: true,
            mlp_ratio: 4.0,
            learn_sigma: false,
            routing: Routing::Sublayer,
            beta: 0.6,
            alpha: 4.0,
            routing_seed: 3,
        };
        let norms = [1, 2, 5].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let dit = Dit::new(config.clone()).unwrap();
                let weights = dit.init(1, Init::Small);
                let schedule = Schedule::new(ScheduleKind::Linear, TASKS).unwrap();
                let mut learner = Learner::new(dit, schedule, LossWeight::Constant, weights);
                let x: Vec<f32> = (0..3 * 36).map(|i| (i % 17) as f32 / 9.0 - 0.8).collect();
                let batch =
                    Batch { x_start: &x, noise: &x, t: &[1, 500, 998], labels: &[0, 3, 9], coefficients: &[1.0; 3] };
                [false, true].map(|add| {
                    learner.gradients(batch, add, &mut Losses::default()).unwrap();
                    assert_eq!(
                        learner.memory.squares_mut().len(),
                        if add { 0 } else { 13 },
                        "weights of which the squares are known"
                    );
                    let squares: f64 = learner.grads.iter().map(|&g| f64::from(g).powi(2)).sum();
                    let norm = learner.gradient_norm();
                    assert!((norm - squares.sqrt()).abs() <= 1e-12 * norm, "{norm} for {}", squares.sqrt());
                    norm
                })
            })
        });
        assert!(norms.iter().all(|of| *of == norms[0]), "{norms:?}");
    }
}
