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
mod tests {
    use super::*;
    use crate::diffusion::ScheduleKind;
    use crate::model::config::ModelConfig;
    use crate::model::dit::Init;
    use crate::routing::Routing;

    fn learner() -> Learner {
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
            learn_sigma: true,
            routing: Routing::Sublayer,
            beta: 0.6,
            alpha: 4.0,
            routing_seed: 3,
        };
        let dit = Dit::new(config).unwrap();
        let weights = dit.init(1, Init::Small);
        let mut learner =
            Learner::new(dit, Schedule::new(ScheduleKind::Linear, TASKS).unwrap(), LossWeight::Constant, weights);
        // No gate or last layer of zeros.
        learner.weights.iter_mut().enumerate().for_each(|(i, w)| *w += (i * 37 % 101) as f32 / 2000.0 - 0.025);
        learner
    }

    /// Gradients of `count` samples: of 29 on, they are computed in halves.
    fn compute(learner: &mut Learner, count: usize, add: bool) -> Losses {
        compute_some(learner, count, 0..count, add)
    }

    /// Gradients of some of `count` samples.
    fn compute_some(learner: &mut Learner, count: usize, some: Range<usize>, add: bool) -> Losses {
        let x: Vec<f32> = (0..count * 36).map(|i| (i % 17) as f32 / 9.0 - 0.8).collect();
        let t: Vec<_> = (0..count as u32).map(|i| (1 + 499 * i) % 1000).collect();
        let labels: Vec<_> = (0..count as u32).map(|i| 3 * i % 11).collect();
        let coefficients: Vec<_> = (0..count).map(|i| 0.25 + (i % 3) as f64 / 4.0).collect();
        let batch = Batch { x_start: &x, noise: &x, t: &t, labels: &labels, coefficients: &coefficients };
        let mut losses = Losses::default();
        learner.gradients(batch.samples(some), add, &mut losses).unwrap();
        losses
    }

    /// The norm, which must be that of the gradients.
    fn norm(learner: &mut Learner) -> f64 {
        let expected = learner.grads.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let norm = learner.gradient_norm();
        assert!((norm - expected).abs() <= 1e-12 * norm, "{norm} for {expected}");
        norm
    }

    /// What is known of the squares of gradients is what they are, after batches in halves and others; by any number of threads the
    /// gradients have the same bits.
    #[test]
    fn the_norm_is_that_of_all_gradients() {
        for halves in [false, true] {
            let found = [1, 2, 5].map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let mut learner = learner();
                    learner.second_half.take_if(|_| !halves);
                    [(29, false), (30, true), (1, true), (3, false), (29, true)].map(|(count, add)| {
                        compute(&mut learner, count, add);
                        let known = match (halves && count >= 29, add) {
                            (true, _) => 1, // all of them
                            (false, true) => 0,
                            (false, false) => 13, // weights, one by one
                        };
                        assert_eq!(learner.memory.squares_mut().len(), known, "squares that are known");
                        (norm(&mut learner), learner.grads.to_vec())
                    })
                })
            });
            assert!(
                found.iter().all(|of| *of == found[0]),
                "the number of threads changes gradients, halves: {halves}"
            );
        }
    }

    /// What the caller does to gradients counts, in halves or not.
    #[test]
    fn the_norm_is_that_of_gradients_that_were_changed() {
        for count in [3, 30] {
            let mut learner = learner();
            compute(&mut learner, count, false);
            let before = norm(&mut learner);
            learner.grads_mut().iter_mut().for_each(|g| *g *= 3.0);
            assert!((norm(&mut learner) / before - 3.0).abs() < 1e-6);
            learner.grads_mut()[7] = f32::NAN;
            assert!(learner.gradient_norm().is_nan());
        }
    }

    #[test]
    fn a_half_that_is_not_finite_shows_in_the_norm() {
        let mut learner = learner();
        let x = [0.1; 4 * 36];
        for at in [0, 3] {
            let mut coefficients = [1.0; 4];
            coefficients[at] = f64::NAN;
            let batch =
                Batch { x_start: &x, noise: &x, t: &[1, 5, 9, 3], labels: &[0; 4], coefficients: &coefficients };
            learner.gradients(batch, false, &mut Losses::default()).unwrap();
            assert!(learner.gradient_norm().is_nan());
        }
    }

    /// Side by side or in one pass: losses and gradients are the same but for rounding.
    #[test]
    fn halves_of_a_batch_are_the_whole() {
        let [mut whole, mut halves] = [learner(), learner()];
        assert!(whole.second_half.take().is_some(), "a small model computes in halves");
        for add in [false, true] {
            let [of_whole, of_halves] = [&mut whole, &mut halves].map(|learner| compute(learner, 31, add));
            let pairs =
                [(&of_whole.mse, &of_halves.mse), (&of_whole.vb, &of_halves.vb), (&of_whole.loss, &of_halves.loss)];
            for (expected, found) in pairs {
                assert_eq!(found.len(), 31);
                for (expected, found) in expected.iter().zip(found) {
                    assert!((expected - found).abs() <= 1e-5 * expected.abs(), "a loss of {found} for {expected}");
                }
            }
            for (entry, (expected, found)) in whole
                .dit
                .layout
                .entries()
                .iter()
                .map(|e| (e, (&whole.grads[e.param.range()], &halves.grads[e.param.range()])))
            {
                let largest = expected.iter().fold(0.0, |most: f32, g| most.max(g.abs()));
                assert!(largest > 0.0, "{}: no gradient", entry.name);
                for (expected, found) in expected.iter().zip(found) {
                    assert!((expected - found).abs() <= 1e-5 * largest, "{}: {found} for {expected}", entry.name);
                }
            }
        }
    }

    #[test]
    fn the_objective_is_the_mean_and_coefficients_its_slope() {
        let mut learner = learner();
        let mut coefficients = [f64::NAN; 5];
        learner.coefficients(&mut coefficients);
        assert_eq!(coefficients, [0.2; 5]);
        assert_eq!(learner.objective(&[1.0, 2.0, 3.0, 4.0, 10.0]), 4.0);
    }

    /// A weight is one more coefficient of the squared error. Without learned variance there is nothing else.
    #[test]
    fn a_loss_weight_scales_losses_and_gradients() {
        let of = |loss_weight, learn_sigma| {
            let dit = Dit::new(ModelConfig { learn_sigma, ..learner().dit.config }).unwrap();
            let weights = dit.init(1, Init::Small);
            let schedule = Schedule::new(ScheduleKind::Linear, TASKS).unwrap();
            let mut learner = Learner::new(dit, schedule, loss_weight, weights);
            learner.weights.iter_mut().enumerate().for_each(|(i, w)| *w += (i * 37 % 101) as f32 / 2000.0 - 0.025);
            learner
        };
        let x: Vec<f32> = (0..5 * 36).map(|i| (i % 17) as f32 / 9.0 - 0.8).collect();
        let t = [0, 20, 80, 300, 999];
        let coefficients = [0.3, 2.0, 0.5, 0.7, 0.25];
        let run = |learner: &mut Learner, coefficients: &[f64]| {
            let batch = Batch { x_start: &x, noise: &x, t: &t, labels: &[1, 2, 3, 4, 10], coefficients };
            let mut losses = Losses::default();
            learner.gradients(batch, false, &mut losses).unwrap();
            losses
        };
        let min_snr = LossWeight::MinSnr { gamma: 5.0 };
        for learn_sigma in [false, true] {
            let [mut constant, mut weighted] = [LossWeight::Constant, min_snr].map(|weight| of(weight, learn_sigma));
            let weights = t.map(|t| min_snr.weight(&constant.schedule, t as usize));
            assert!(weights[0] < 0.01 && weights[2] < 0.9 && weights[4] == 1.0, "{weights:?}");
            let scaled: Vec<f64> = coefficients.iter().zip(weights).map(|(c, w)| c * w).collect();
            let found = run(&mut weighted, &coefficients);
            let expected = run(&mut constant, &scaled);
            for b in 0..t.len() {
                let mse = expected.mse[b] * weights[b] as f32;
                assert!((found.mse[b] - mse).abs() <= 1e-6 * mse, "t {}: mse {} for {mse}", t[b], found.mse[b]);
                assert_eq!(found.vb[b], expected.vb[b], "t {}: the bound has no weight", t[b]);
                assert_eq!(found.vb[b] != 0.0, learn_sigma);
                let loss = mse + expected.vb[b];
                assert!((found.loss[b] - loss).abs() <= 1e-6 * loss.abs(), "t {}: {} for {loss}", t[b], found.loss[b]);
            }
            // What the bias of the last layer is told are sums of the gradient of the output: its first half is the squared error's.
            let bias = constant.dit.layout.entries().iter().find(|e| e.name == "final_layer.linear.bias").unwrap();
            let channels = constant.dit.config.out_channels();
            let compared: Vec<usize> = match learn_sigma {
                false => (0..constant.grads.len()).collect(),
                true => bias.param.range().filter(|i| (i - bias.param.offset) % channels == 0).collect(),
            };
            let largest = compared.iter().fold(0.0, |most: f32, &i| most.max(constant.grads[i].abs()));
            assert!(largest > 1e-3, "gradients of at most {largest}");
            for i in compared {
                let (found, expected) = (weighted.grads[i], constant.grads[i]);
                let err = (found - expected).abs();
                assert!(err <= 1e-5 * largest, "learn_sigma {learn_sigma}, gradient {i}: {found} for {expected}");
            }
        }
    }

    /// A batch of more samples than are computed at once gives the bits of its parts, with their buffers.
    #[test]
    fn parts_of_a_batch_are_added() {
        let [mut whole, mut in_parts] = [learner(), learner()];
        assert_eq!(whole.at_once, samples_at_once(&whole.dit));
        whole.at_once = 30;
        for (count, parts) in [(60, &[0..30, 30..60][..]), (61, &[0..21, 21..41, 41..61])] {
            for add in [false, true] {
                let of_whole = compute(&mut whole, count, add);
                let part =
                    |some: &Range<usize>| compute_some(&mut in_parts, count, some.clone(), add || some.start > 0);
                let of_parts: Vec<_> = parts.iter().map(part).collect();
                for losses in [
                    |losses: &Losses| losses.loss.clone(),
                    |losses: &Losses| losses.mse.clone(),
                    |losses: &Losses| losses.vb.clone(),
                ] {
                    assert_eq!(losses(&of_whole), of_parts.iter().map(losses).collect::<Vec<_>>().concat());
                }
                assert!(*whole.grads == *in_parts.grads && whole.grads.iter().any(|&g| g != 0.0));
                assert_eq!(norm(&mut whole), norm(&mut in_parts));
            }
        }
        let held = whole.memory.bytes();
        compute(&mut whole, 120, false);
        compute(&mut whole, 119, false);
        assert_eq!(whole.memory.bytes(), held, "twice as many images take more memory");
    }

    /// Where half of a batch does not fit the model, it is said.
    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let mut learner = learner();
        let x = [0.1; 33 * 36];
        let (t, mut late) = ([5; 33], [5; 32]);
        let (labels, mut unknown) = ([1; 33], [1; 32]);
        (late[31], unknown[31]) = (1000, 11);
        let (t, labels, images) = (&t[..32], &labels[..32], &x[..32 * 36]);
        let good = Batch { x_start: images, noise: images, t, labels, coefficients: &[1.0; 32] };
        for bad in [
            Batch { x_start: &x[..32 * 36 - 1], ..good },
            Batch { x_start: &x, ..good },
            Batch { noise: &x[..40], ..good },
            Batch { t: &t[1..], ..good },
            Batch { t: &late, ..good },
            Batch { labels: &labels[..30], ..good },
            Batch { labels: &[1; 33], ..good },
            Batch { labels: &unknown, ..good },
            Batch { coefficients: &[], ..good },
        ] {
            assert!(learner.gradients(bad, true, &mut Losses::default()).is_err());
        }
        assert!(learner.grads.iter().all(|&g| g == 0.0), "a batch that was refused left gradients");
        learner.gradients(good, false, &mut Losses::default()).unwrap();
        // A model has more timesteps than this schedule, in which the loss looks up its weights.
        learner.schedule = Schedule::new(ScheduleKind::Linear, 100).unwrap();
        learner.loss_weight = LossWeight::MinSnr { gamma: 5.0 };
        learner.gradients(Batch { t: &[99; 32], ..good }, false, &mut Losses::default()).unwrap();
        let beyond = Batch { t: &[100; 32], ..good };
        let message = learner.gradients(beyond, false, &mut Losses::default()).unwrap_err().to_string();
        assert!(message.contains("timestep 100 is outside 0..100"), "{message}");
    }
}
