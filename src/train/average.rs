//! The moving average of the weights while a run trains, or the weights themselves, for passes that record nothing.

use super::config::{TrainConfig, ValidationWeights};
use super::learner::Learner;
use crate::autograd::cuda::DeviceWeights;
use crate::autograd::{Memory, Weights};
use crate::error::Result;
use crate::generate::IMAGES_AT_ONCE;
use crate::model::dit::Dit;
use crate::model::parts::samples_at_once;

/// The moving average, or the weights in its place, where training computes.
pub(super) struct Average<'a> {
    dit: &'a Dit,
    weights: &'a [f32],
    uploaded: Option<DeviceWeights>,
    own: Option<Memory>,
    memory: &'a mut Memory,
}

impl<'a> Average<'a> {
    /// That of `learner`.
    ///
    /// # Errors
    /// When the device has no memory for it, or fails.
    pub(super) fn of(learner: &'a mut Learner, config: &TrainConfig, which: ValidationWeights) -> Result<Self> {
        let Learner { dit, weights, ema, memory, device_state, .. } = learner;
        let weights = match which {
            ValidationWeights::Ema => ema,
            ValidationWeights::Model => weights,
        };
        if let Some(state) = device_state {
            match which {
                ValidationWeights::Ema => state.read_ema(weights)?,
                ValidationWeights::Model => state.read_weights(weights)?,
            }
        }
        let elem = config.precision.elem();
        let uploaded =
            device_state.as_ref().map(|state| DeviceWeights::upload(state.device(), weights, elem)).transpose()?;
        // A memory of its own on a device: that of training keeps its place, and its graphs with it.
        let own = uploaded.as_ref().map(|weights| Memory::on_device(weights.device(), elem));
        Ok(Average { dit, weights, uploaded, own, memory })
    }

    /// The model, its weights and the memory of its passes.
    pub(super) fn parts(&mut self) -> (&Dit, Weights<'_>, &mut Memory) {
        let Average { dit, weights, uploaded, own, memory } = self;
        (dit, uploaded.as_ref().map_or(Weights::Cpu(weights), Weights::Cuda), own.as_mut().unwrap_or(memory))
    }
}

/// Images whose passes, of `copies` samples each, are computed at once: as many as the plan of a device's memory counts with, or as training
/// computes. How many changes only how sums are rounded.
pub(super) fn images_at_once(dit: &Dit, on_device: bool, config: &TrainConfig, copies: usize) -> usize {
    let fit = if on_device { IMAGES_AT_ONCE } else { samples_at_once(dit) / copies };
    let part = config.batch_size / config.grad_accumulation;
    part.min(IMAGES_AT_ONCE).min(fit).max(1)
}
