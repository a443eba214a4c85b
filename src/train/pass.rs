//! One pass over samples: noise, the model forward, the loss, and, where it learns, backward to the gradients of all weights.

use super::learner::{Batch, Losses};
use crate::autograd::{Memory, Tape, Weights};
use crate::diffusion::{ImageDims, LossTerms, LossWeight, Schedule, losses, q_sample};
use crate::error::Result;
use crate::generate::predict;
use crate::model::dit::Dit;

/// A model and what it is asked to learn.
#[derive(Clone, Copy)]
pub(super) struct Model<'a> {
    pub(super) dit: &'a Dit,
    pub(super) schedule: &'a Schedule,
    pub(super) loss_weight: LossWeight,
    /// `[P]`
    pub(super) weights: &'a [f32],
}

/// What a pass needs beside the tape's memory, kept from one to the next.
#[derive(Default)]
pub(super) struct Buffers {
    x_t: Vec<f32>,            // [B, IC, H, W]
    d_out: Vec<f32>,          // [B, OC, H, W]
    sample_weights: Vec<f64>, // [B]
}

impl Buffers {
    /// Loss (mse, vb and their sum, `[B]`) and gradients `[P]` of `batch`; `add` adds to the gradients.
    pub(super) fn pass(
        &mut self,
        memory: &mut Memory,
        model: Model,
        batch: Batch,
        [mse, vb, loss]: [&mut [f32]; 3],
        grads: &mut [f32],
        add: bool,
    ) -> Result<()> {
        let Model { dit, schedule, loss_weight, weights } = model;
        let (b, side, channels) = (batch.t.len(), dit.config.input_size, dit.config.in_channels);
        let dims = ImageDims { channels, pixels: side * side, learn_sigma: dit.config.learn_sigma };
        self.x_t.resize(b * dims.elements(), 0.0);
        self.d_out.resize(b * dims.out_elements(), 0.0);
        self.sample_weights.clear();
        self.sample_weights.extend(batch.t.iter().map(|&t| loss_weight.weight(schedule, t as usize)));
        q_sample(&mut self.x_t, batch.x_start, batch.noise, batch.t, schedule)?;

        let mut tape = Tape::new(weights, grads, add, memory);
        let x_t = tape.input(&self.x_t, [b, channels, side, side], false)?;
        let out = dit.forward(&mut tape, x_t, batch.t, batch.labels)?;
        let terms = LossTerms { mse, vb, loss, d_model_out: &mut self.d_out };
        losses(
            terms,
            tape.value(out),
            batch.x_start,
            batch.noise,
            batch.t,
            &self.sample_weights,
            batch.coefficients,
            schedule,
            dims,
        )?;
        tape.backward(out, &self.d_out)
    }
}

/// Losses of a batch that is not learned from; its coefficients do not matter. The weights may be on a CUDA device.
pub(super) fn measure(
    dit: &Dit,
    schedule: &Schedule,
    loss_weight: LossWeight,
    weights: Weights,
    memory: &mut Memory,
    batch: Batch,
) -> Result<Losses> {
    let Batch { x_start, noise, t, labels, coefficients } = batch;
    let (b, side, channels) = (t.len(), dit.config.input_size, dit.config.in_channels);
    let dims = ImageDims { channels, pixels: side * side, learn_sigma: dit.config.learn_sigma };
    let mut x_t = vec![0.0; b * dims.elements()];
    q_sample(&mut x_t, x_start, noise, t, schedule)?;
    let [mut out, mut d_model_out] = [0, 1].map(|_| vec![0.0; b * dims.out_elements()]);
    predict(dit, weights, memory, &x_t, t, labels, &mut out)?;
    let weights: Vec<f64> = t.iter().map(|&t| loss_weight.weight(schedule, t as usize)).collect();
    let [mut mse, mut vb, mut loss] = [0, 1, 2].map(|_| vec![0.0; b]);
    let terms = LossTerms { mse: &mut mse, vb: &mut vb, loss: &mut loss, d_model_out: &mut d_model_out };
    losses(terms, &out, x_start, noise, t, &weights, coefficients, schedule, dims)?;
    Ok(Losses { mse, vb, loss })
}
