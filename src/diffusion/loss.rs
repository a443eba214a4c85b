//! The training loss of a denoising model with learned variance, and its gradient, in one pass over the model output.
//!
//! ```text
//! x_t  = signal x_start + spread noise
//! mse  = weight * mean((answer - target)^2),   target = a noise - b x_start
//! vb   = mean(KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))) in bits, with the mean of p detached;
//!        at t = 0 the negative log-likelihood of the discretised x_start instead
//! loss = mse + vb
//! ```
//!
//! `answer` and `v` are the first and second half of the model's channels; `v` in -1..1 interpolates the log-variance of p
//! between its two bounds (Nichol and Dhariwal 2021, equations 15 and 16). What the answer should be, and the factors, are the
//! [`prediction`](super::prediction)'s: of a model that predicts the noise, `signal = sqrt(alphas_cumprod)`,
//! `spread = sqrt(1 - alphas_cumprod)`, and the target is `noise`.
//!
//! Because `x_t` comes from `noise`, the two means differ by `k (answer - target)` with one factor `k` per timestep, so the
//! bound needs neither `x_t` nor the difference of two almost equal numbers, and with
//! `d = log-variance of p - log-variance of q` it costs one exponential for each element:
//!
//! ```text
//! KL = (d - 1 + q) / 2,   dKL/dd = (1 - q) / 2,   q = (1 + k^2 (answer - target)^2 / variance of q) exp(-d)
//! ```

use crate::diffusion::reference::discretized_log_likelihood;
use crate::diffusion::schedule::Schedule;
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::f64::consts::LN_2;

/// Below this many model outputs, a second thread costs more than it gives.
const PARALLEL_ELEMENTS: usize = 8192;

/// The size of one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageDims {
    /// Channels of the image.
    pub channels: usize,
    /// Height times width.
    pub pixels: usize,
    /// Whether the model's output has a second half of channels, for the variance.
    pub learn_sigma: bool,
}

impl ImageDims {
    /// Elements of a sample.
    pub fn elements(self) -> usize {
        self.channels * self.pixels
    }

    /// Elements of the model output for a sample: twice as many when it learns the variance.
    pub fn out_elements(self) -> usize {
        self.elements() * if self.learn_sigma { 2 } else { 1 }
    }
}

/// Where [`losses`] writes.
pub struct LossTerms<'a> {
    /// `[B]`: weighted mean squared error.
    pub mse: &'a mut [f32],
    /// `[B]`: variational bound in bits; 0 without learned variance.
    pub vb: &'a mut [f32],
    /// `[B]`: their sum.
    pub loss: &'a mut [f32],
    /// `[B, 2 * channels or channels, pixels]`: gradient of `sum_b coefficients[b] * loss[b]`.
    pub d_model_out: &'a mut [f32],
}

/// What the elements of a sample share at its timestep.
pub(crate) struct Step {
    pub(crate) first: bool,        // t = 0
    pub(crate) target: (f64, f64), // a and b of the module documentation
    pub(crate) mean_factor: f64,   // k there
    pub(crate) precision: f64,     // 1 / variance of q
    pub(crate) min_log: f64,       // log-variance of q, the lower bound for p
    pub(crate) range: f64,         // the upper bound for p above it
}

impl Step {
    pub(crate) fn new(schedule: &Schedule, t: usize) -> Self {
        let min_log = schedule.posterior_log_variance_clipped[t];
        Step {
            first: t == 0,
            target: schedule.target(t),
            mean_factor: schedule.posterior_mean_coef1[t]
                * schedule.sqrt_recipm1_alphas_cumprod[t]
                * schedule.noise_of_answer(t),
            precision: (-min_log).exp(),
            min_log,
            range: schedule.log_betas[t] - min_log,
        }
    }

    /// The bound in nats for one element, and its derivative with respect to `v`.
    #[inline]
    fn bound(&self, error: f64, v: f64, x_start: f64) -> (f64, f64) {
        let above = 0.5 * (v + 1.0) * self.range;
        let difference = self.mean_factor * error;
        if self.first {
            // Here the mean of q is x_start itself.
            let log_scale = 0.5 * (self.min_log + above);
            let (ll, _, d_log_scale) = discretized_log_likelihood(x_start, x_start - difference, log_scale);
            return (-ll, -0.25 * self.range * d_log_scale);
        }
        let q = (1.0 + difference * difference * self.precision) * (-above).exp();
        (0.5 * (above - 1.0 + q), 0.25 * self.range * (1.0 - q))
    }
}

/// Noisy images, as the model is given them: `x_t = signal x_start + spread noise` ([`Schedule::signal`], [`Schedule::spread`]).
///
/// `x_t`, `x_start` and `noise` are `[B, channels, pixels]`, `t` is `[B]`, each below the schedule's length.
///
/// # Errors
/// When the sizes do not fit together or a timestep is outside the schedule.
pub fn q_sample(x_t: &mut [f32], x_start: &[f32], noise: &[f32], t: &[u32], schedule: &Schedule) -> Result<()> {
    let per_sample = x_t.len() / t.len().max(1);
    check("q_sample", "x_t", x_t.len(), t.len() * per_sample)?;
    check("q_sample", "x_start", x_start.len(), x_t.len())?;
    check("q_sample", "noise", noise.len(), x_t.len())?;
    check_timesteps("q_sample", t, schedule)?;
    if per_sample == 0 {
        return Ok(());
    }
    for (b, x_t) in x_t.chunks_exact_mut(per_sample).enumerate() {
        let (signal, spread) = (schedule.signal(t[b] as usize), schedule.spread(t[b] as usize));
        let range = b * per_sample..(b + 1) * per_sample;
        for ((x_t, &x), &e) in x_t.iter_mut().zip(&x_start[range.clone()]).zip(&noise[range]) {
            *x_t = (signal * f64::from(x) + spread * f64::from(e)) as f32;
        }
    }
    Ok(())
}

/// The loss of each sample and the gradient with respect to the model output (formulas: module documentation).
///
/// `model_out` is the model's answer to `x_t = q_sample(x_start, noise, t)`. `weights` multiply the mse, `coefficients` are
/// the derivative of the training objective with respect to each sample's loss (`1 / B` for the mean). The result is the
/// same to the bit for any number of threads; nothing is allocated.
///
/// # Errors
/// When the sizes do not fit together or a timestep is outside the schedule.
#[expect(clippy::too_many_arguments, reason = "outputs, inputs, sizes: one list, in that order")]
pub fn losses(
    terms: LossTerms<'_>,
    model_out: &[f32],    // [B, 2 * channels or channels, pixels]
    x_start: &[f32],      // [B, channels, pixels]
    noise: &[f32],        // [B, channels, pixels]
    t: &[u32],            // [B]
    weights: &[f64],      // [B]
    coefficients: &[f64], // [B]
    schedule: &Schedule,
    dims: ImageDims,
) -> Result<()> {
    let batch = t.len();
    let (n, n_out) = (dims.elements(), dims.out_elements());
    for (name, found, expected) in [
        ("mse", terms.mse.len(), batch),
        ("vb", terms.vb.len(), batch),
        ("loss", terms.loss.len(), batch),
        ("d_model_out", terms.d_model_out.len(), batch * n_out),
        ("model_out", model_out.len(), batch * n_out),
        ("x_start", x_start.len(), batch * n),
        ("noise", noise.len(), batch * n),
        ("weights", weights.len(), batch),
        ("coefficients", coefficients.len(), batch),
    ] {
        check("losses", name, found, expected)?;
    }
    check_timesteps("losses", t, schedule)?;
    if n == 0 {
        return Err(Error::Shape { operation: "losses", what: "a sample has no elements".into() });
    }
    let LossTerms { mse, vb, loss, d_model_out } = terms;
    let samples_at_once = if d_model_out.len() < PARALLEL_ELEMENTS { batch.max(1) } else { 1 };
    (mse.par_iter_mut(), vb.par_iter_mut(), loss.par_iter_mut(), d_model_out.par_chunks_exact_mut(n_out))
        .into_par_iter()
        .with_min_len(samples_at_once)
        .enumerate()
        .for_each(|(b, (mse, vb, loss, d))| {
            let (out, images) = (b * n_out..(b + 1) * n_out, b * n..(b + 1) * n);
            let (x, e) = (&x_start[images.clone()], &noise[images]);
            let step = Step::new(schedule, t[b] as usize);
            let (m, v) = sample_loss(d, &model_out[out], x, e, &step, weights[b], coefficients[b]);
            (*mse, *vb, *loss) = (m as f32, v as f32, (m + v) as f32);
        });
    Ok(())
}

/// Weighted mse and bound (bits) of one sample; writes its gradient.
fn sample_loss(
    d: &mut [f32],   // as out
    out: &[f32],     // [channels, pixels] of the answer, then the same of v
    x_start: &[f32], // [channels, pixels]
    noise: &[f32],   // [channels, pixels]
    step: &Step,
    weight: f64,
    coefficient: f64,
) -> (f64, f64) {
    let n = noise.len();
    let (answer, v) = out.split_at(n);
    let (d_answer, d_v) = d.split_at_mut(n);
    let (a, b) = step.target;
    let error = |i: usize| f64::from(answer[i]) - (a * f64::from(noise[i]) - b * f64::from(x_start[i]));
    let per_element = 1.0 / n as f64;
    let mse_slope = coefficient * weight * 2.0 * per_element;
    let mut squares = 0.0;
    for i in 0..n {
        squares += error(i) * error(i);
        d_answer[i] = (mse_slope * error(i)) as f32;
    }
    let bits = per_element / LN_2;
    let mut bound = 0.0;
    for i in 0..v.len() {
        let (nats, slope) = step.bound(error(i), f64::from(v[i]), f64::from(x_start[i]));
        bound += nats;
        d_v[i] = (coefficient * bits * slope) as f32;
    }
    (weight * squares * per_element, bound * bits)
}

fn check(operation: &'static str, name: &str, found: usize, expected: usize) -> Result<()> {
    if found != expected {
        return Err(Error::Shape { operation, what: format!("{name} has {found} elements, expected {expected}") });
    }
    Ok(())
}

fn check_timesteps(operation: &'static str, t: &[u32], schedule: &Schedule) -> Result<()> {
    if let Some(bad) = t.iter().find(|t| **t as usize >= schedule.len()) {
        let what = format!("timestep {bad} is outside the noise schedule of {} steps", schedule.len());
        return Err(Error::Shape { operation, what });
    }
    Ok(())
}
