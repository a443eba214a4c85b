//! A model that learns: weights, their gradients and moments, and one training step over given batches.
//!
//! Everything random is drawn by the caller, so that a step can be compared with another implementation's.

use super::device::{Decision, DeviceState, DeviceUpdate, How};
use super::optimizer::{self, Update};
use super::pass::{Buffers, Model};
use crate::autograd::Memory;
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cpu::profile::side_by_side;
use crate::backend::cpu::threads::awake;
use crate::backend::cuda::{DType, Device};
use crate::diffusion::weighting::{CLUSTERS, uncertainty_coefficients, uncertainty_loss};
use crate::diffusion::{LossWeight, Schedule};
use crate::error::{Error, Result};
use crate::model::config::TASKS;
use crate::model::dit::Dit;
use crate::model::parts::{first_half, halves_mut, is_small, parts, samples_at_once, trains_in_halves};
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

impl<'a> Batch<'a> {
    /// Some of its samples.
    ///
    /// # Panics
    /// When there are fewer, or sizes do not fit.
    pub(crate) fn samples(&self, some: Range<usize>) -> Batch<'a> {
        let of_each = self.x_start.len() / self.t.len().max(1);
        let numbers = some.start * of_each..some.end * of_each;
        Batch {
            x_start: &self.x_start[numbers.clone()],
            noise: &self.noise[numbers],
            t: &self.t[some.clone()],
            labels: &self.labels[some.clone()],
            coefficients: &self.coefficients[some],
        }
    }

    /// Refuses sizes that do not fit together, timesteps and labels out of range.
    fn check(&self, dit: &Dit, schedule: &Schedule) -> Result<()> {
        let (config, b) = (&dit.config, self.t.len());
        let numbers = b * config.in_channels * config.input_size * config.input_size;
        for (name, found, expected) in [
            ("x_start", self.x_start.len(), numbers),
            ("noise", self.noise.len(), numbers),
            ("labels", self.labels.len(), b),
            ("coefficients", self.coefficients.len(), b),
        ] {
            if found != expected {
                let what = format!("{name} has {found} elements, expected {expected} for {b} samples");
                return Err(Error::Shape { operation: "gradients", what });
            }
        }
        let tasks = TASKS.min(schedule.len());
        for (name, numbers, end) in [("timestep", self.t, tasks), ("label", self.labels, config.label_rows())] {
            if let Some(number) = numbers.iter().find(|&&number| number as usize >= end) {
                let what = format!("{name} {number} is outside 0..{end}");
                return Err(Error::Shape { operation: "gradients", what });
            }
        }
        Ok(())
    }
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
    loss_weight: LossWeight,
    /// `[P]`, in the model's layout, as are the next three.
    pub weights: AlignedVec,
    /// Moving average of the weights.
    pub ema: AlignedVec,
    /// First moments of AdamW.
    pub m: AlignedVec,
    /// Second moments of AdamW.
    pub v: AlignedVec,
    grads: AlignedVec, // [P], of the last batch
    /// Uncertainty weighting, when the loss weight asks for it.
    pub uncertainty: Option<Uncertainty>,
    /// Updates made so far.
    pub updates: u64,
    /// Buffers of the model's passes, and what is known of the gradients' squares: a pass of others would say something else of them.
    pub(crate) memory: Memory,
    /// Where everything is while training on a CUDA device: `weights`, `ema`, `m` and `v` here are then as old as when they
    /// were last fetched, arbitrary before the first time, and there are no gradients here.
    pub device_state: Option<DeviceState>,
    buffers: Buffers,
    at_once: usize,                  // most samples of a part, on the CPU
    second_half: Option<SecondHalf>, // of a small model in main memory
    norm_parts: Vec<(Range<usize>, f64)>,
}

/// What the second halves of batches have to themselves.
struct SecondHalf {
    buffers: Buffers,
    grads: AlignedVec,
}

impl Learner {
    /// A learner whose weights are those of `start` (in the layout of `dit`).
    ///
    /// # Panics
    /// When there are more or fewer than in the layout.
    pub fn new(dit: Dit, schedule: Schedule, loss_weight: LossWeight, start: AlignedVec) -> Self {
        let (len, ema) = (start.len(), start.clone());
        let second_half = || SecondHalf { buffers: Buffers::default(), grads: AlignedVec::zeros(len) };
        let second_half = is_small(&dit).then(second_half);
        let learner = Self::with(dit, schedule, loss_weight, [start, ema, AlignedVec::zeros(len)]);
        Learner { second_half, ..learner }
    }

    /// With products in `elem`, f32 or bf16: see [`Memory::on_cpu`].
    ///
    /// # Panics
    /// With another type, and of a learner on a CUDA device, whose type is that of [`Learner::on_device`].
    #[must_use]
    pub fn with_products_in(self, elem: DType) -> Self {
        assert!(self.device_state.is_none(), "a learner on a CUDA device has its type");
        Learner { memory: Memory::on_cpu(elem), ..self }
    }

    /// [`Learner::new`] on a CUDA device, for products in `elem`.
    ///
    /// # Errors
    /// When it does not fit, or the device fails.
    ///
    /// # Panics
    /// As [`Learner::new`].
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
        Ok(Learner { memory: Memory::on_device(device, elem), device_state: Some(state), ..learner })
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
            device_state: None,
            buffers: Buffers::default(),
            at_once: samples_at_once(&dit),
            second_half: None,
            norm_parts: Vec::new(),
            dit,
            schedule,
            loss_weight,
            weights,
        }
    }

    /// Weight of the loss by timestep. What it needs was made with the learner, so it stays.
    pub fn loss_weight(&self) -> LossWeight {
        self.loss_weight
    }

    /// Copies everything from the device, if there is one, to main memory.
    ///
    /// # Errors
    /// When the device fails.
    pub fn fetch(&mut self) -> Result<()> {
        let Learner { weights, ema, m, v, device_state, .. } = self;
        device_state.as_ref().map_or(Ok(()), |state| state.read(weights, [ema, m, v]))
    }

    /// Copies everything from main memory to the device, if there is one.
    ///
    /// # Errors
    /// When the device fails.
    pub fn push(&self) -> Result<()> {
        let rest = [&self.ema[..], &self.m, &self.v];
        self.device_state.as_ref().map_or(Ok(()), |state| state.write(&self.weights, rest))
    }

    /// Sends `batch` to the device, whatever that is doing.
    ///
    /// # Errors
    /// As [`DeviceState::stage`], and on a learner that is not on a device.
    pub fn stage(&mut self, batch: Batch, how: How) -> Result<()> {
        let Learner { dit, memory, device_state, .. } = self;
        device_state.as_mut().ok_or_else(not_on_device)?.stage(dit, memory, batch, how)
    }

    /// Starts the pass over the batch that was staged, and the update if it is the last part.
    ///
    /// # Errors
    /// As [`DeviceState::launch`], and on a learner that is not on a device.
    pub fn launch(&mut self, batch: Batch, how: How, update: Option<DeviceUpdate>) -> Result<()> {
        let Learner { dit, schedule, loss_weight, memory, device_state, updates, .. } = self;
        let state = device_state.as_mut().ok_or_else(not_on_device)?;
        let update = update.map(|update| (update, *updates + 1));
        state.launch(dit, schedule, *loss_weight, memory, batch, how, update)
    }

    /// Waits for what was launched. An update that was made is counted; what is left of it is for
    /// [`Learner::update_log_variances`].
    ///
    /// # Errors
    /// As [`DeviceState::collect`], and on a learner that is not on a device.
    pub fn collect(&mut self, found: &mut Losses) -> Result<Option<Decision>> {
        let decision = self.device_state.as_mut().ok_or_else(not_on_device)?.collect(found)?;
        self.updates += u64::from(decision.is_some_and(|decision| decision.updated));
        Ok(decision)
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

    /// Loss and gradients of `batch`, computed by a thread of the pool, while the others stay awake. `add` adds to the gradients of
    /// the parts of a batch before it.
    ///
    /// # Errors
    /// When sizes do not fit, or a timestep or label is out of range: the gradients are then as they were. On a device, where
    /// [`Learner::launch`] makes them.
    pub fn gradients(&mut self, batch: Batch, add: bool, found: &mut Losses) -> Result<()> {
        awake(|| self.compute(batch, add, found))
    }

    fn compute(&mut self, batch: Batch, add: bool, found: &mut Losses) -> Result<()> {
        if self.device_state.is_some() {
            return Err(Error::usage("this learner is on a CUDA device: stage and launch its batches"));
        }
        // Before any part adds to the gradients.
        batch.check(&self.dit, &self.schedule)?;
        let b = batch.t.len();
        let mut found = [&mut found.mse, &mut found.vb, &mut found.loss].map(|losses| {
            losses.resize(b, 0.0);
            &mut losses[..]
        });
        for some in parts(self.at_once, b) {
            let found = found.each_mut().map(|losses| &mut losses[some.clone()]);
            self.compute_part(batch.samples(some.clone()), add || some.start > 0, found)?;
        }
        Ok(())
    }

    /// Losses and gradients of one part.
    fn compute_part(&mut self, batch: Batch, add: bool, found: [&mut [f32]; 3]) -> Result<()> {
        let Learner { dit, schedule, loss_weight, weights, grads, memory, buffers, second_half, .. } = self;
        let model = Model { dit, schedule, loss_weight: *loss_weight, weights };
        let b = batch.t.len();
        let Some(second_half) = second_half.as_mut().filter(|_| trains_in_halves(dit, b)) else {
            return buffers.pass(memory, model, batch, found, grads, add);
        };
        let [first, second] = [0..first_half(b), first_half(b)..b].map(|some| batch.samples(some));
        let [mse, vb, loss] = found.map(|losses| halves_mut(losses, b));
        let SecondHalf { buffers: second_buffers, grads: second_grads } = second_half;
        let (done, second_done) = memory.for_halves(|memory, second_memory| {
            side_by_side(
                || buffers.pass(memory, model, first, [mse.0, vb.0, loss.0], grads, add),
                || second_buffers.pass(second_memory, model, second, [mse.1, vb.1, loss.1], second_grads, false),
            )
        });
        done.and(second_done)?;
        let squares = optimizer::add(grads, second_grads);
        memory.know_squares(squares, grads.len());
        Ok(())
    }

    /// The objective of a whole batch from the losses of its samples, in the order they were drawn: their mean, or that of
    /// uncertainty weighting (whose own gradient is kept for the update).
    pub fn objective(&mut self, losses: &[f32]) -> f64 {
        match &mut self.uncertainty {
            Some(uncertainty) => uncertainty_loss(&mut uncertainty.gradient, losses, &uncertainty.log_variances),
            None => losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / losses.len() as f64,
        }
    }

    /// Buffers of the model's passes.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Gradients of the last batch, `[P]`; none on a device, where [`DeviceState::gradients`] reads them.
    pub fn grads(&self) -> &[f32] {
        &self.grads
    }

    /// The gradients, to be changed before the update: clipped otherwise, or added to those of other machines.
    pub fn grads_mut(&mut self) -> &mut [f32] {
        // What backward found of their squares is no longer so.
        self.memory.forget_squares();
        &mut self.grads
    }

    /// L2 norm of the gradients: not finite when any of them is not.
    ///
    /// # Panics
    /// On a device, which has the gradients: [`Learner::collect`] tells their norm.
    pub fn gradient_norm(&mut self) -> f64 {
        assert!(self.device_state.is_none(), "the gradients of this learner are on a CUDA device");
        optimizer::norm(&self.grads, self.memory.squares_mut(), &mut self.norm_parts)
    }

    /// One update of the weights and their moving average. `uncertainty_lr` is the learning rate of the log-variances.
    ///
    /// # Panics
    /// On a device, which has the gradients: there an update is part of [`Learner::launch`].
    pub fn update(&mut self, update: Update, uncertainty_lr: f64) {
        assert!(
            self.device_state.is_none(),
            "the gradients of this learner are on a CUDA device, which makes its updates"
        );
        self.updates += 1;
        let Learner { weights, ema, m, v, grads, updates, .. } = self;
        optimizer::adamw(weights, ema, m, v, grads, *updates, update);
        self.update_log_variances(update, uncertainty_lr);
    }

    /// The part of the last update that a device leaves to its host: the log-variances of uncertainty weighting, if there are any.
    pub fn update_log_variances(&mut self, update: Update, uncertainty_lr: f64) {
        if let Some(Uncertainty { log_variances, m, v, gradient }) = &mut self.uncertainty {
            let update = Update { lr: uncertainty_lr, weight_decay: 0.0, grad_scale: 1.0, ..update };
            // Nobody asks for their moving average.
            optimizer::adamw(log_variances, &mut [0.0; CLUSTERS], m, v, gradient, self.updates, update);
        }
    }
}

fn not_on_device() -> Error {
    Error::usage("this learner is not on a CUDA device: compute its gradients with Learner::gradients")
}

#[cfg(test)]
mod tests;
