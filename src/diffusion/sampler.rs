//! From noise to images: DDPM (Ho et al. 2020, algorithm 2), DDIM (Song et al. 2021, equation 12) and DPM-Solver++(2M) (Lu et al. 2022,
//! algorithm 2), with classifier-free guidance (Ho and Salimans 2022).
//!
//! ```text
//! x_0    = a x_t + b answer                                    (optionally clipped to -1..1)
//! DDPM   x_{t-1} = coef1 x_0 + coef2 x_t + sigma noise          (sigma: learned, or the fixed larger one)
//! DDIM   x_{t-1} = sqrt(bar') x_0 + sqrt(1 - bar' - sigma^2) epsilon' + sigma noise
//! DPM++  x_{t-1} = sqrt(bar') D + sqrt(1 - bar') epsilon',   D = x_0 + h / (2 h_last) (x_0 - x_0 of the step before)
//! ```
//!
//! with `bar = alphas_cumprod`, `bar'` one step earlier, a and b from [`Schedule::estimate`] (of a model that predicts the noise
//! `sqrt(1/bar)` and `-sqrt(1/bar - 1)`), `epsilon'` the noise that the clipped `x_0`, or `D`, implies, and for DDIM
//! `sigma = eta sqrt((1 - bar') / (1 - bar)) sqrt(1 - bar / bar')`. The last step adds no noise. `h` is by how much
//! `ln sqrt(bar / (1 - bar))` grows in a step, `h_last` in the one before; the first step, which has none before it, and the last, whose
//! `h` is infinite, take `x_0` for `D`: then DPM++ is DDIM without noise, of which it is the second order.

use crate::diffusion::loss::ImageDims;
use crate::diffusion::schedule::Schedule;
use crate::error::{Error, Result};
use std::ops::Range;

/// Which sampler.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// A draw from the model's own distribution at each step.
    Ddpm,
    /// Fewer steps with less noise.
    Ddim {
        /// Share of the DDPM noise, 0 to 1; 0 is deterministic.
        eta: f64,
    },
    /// Fewer still, without noise: DPM-Solver++(2M), for timesteps spread evenly over the logarithm of the signal-to-noise ratio
    /// ([`Schedule::evenly_by_log_snr`]). Where one step is much longer than the one before, it carries `x_0` too far.
    DpmPlusPlus,
}

/// A sampler: a (respaced) schedule and how to walk it.
#[derive(Clone, Debug)]
pub struct Sampler {
    schedule: Schedule,
    method: Method,
    clip: bool,
    guidance: Option<f64>,
    guided_at: Range<u32>,
    guided_channels: usize,
}

/// The factors that all elements share at one step.
struct Step {
    estimate: (f64, f64), // factors of x_t and of the answer in x_0
    sqrt_recip: f64,
    sqrt_recipm1: f64,
    coef1: f64,         // of x_0
    coef2: f64,         // DDPM: of x_t; others: of epsilon'
    ahead: f64,         // how far x_0 is carried on, in changes since the step before
    sigma: Option<f64>, // the noise factor; none: learned
    min_log: f64,       // bounds of the learned log-variance
    range: f64,
    last: bool,
}

impl Sampler {
    /// A sampler over all steps of `schedule` (see [`Schedule::respaced`]), from the last to the first.
    ///
    /// `clip` cuts the estimate of `x_0` to -1..1 at every step: right for pixels, wrong for latents. With `guidance`, a batch is
    /// two equal halves, conditional and unconditional, and the answer is
    /// `unconditional + guidance (conditional - unconditional)`.
    ///
    /// # Errors
    /// When eta is outside 0..=1 or the guidance is not a finite number.
    pub fn new(schedule: Schedule, method: Method, clip: bool, guidance: Option<f64>) -> Result<Self> {
        if let Method::Ddim { eta } = method
            && !(0.0..=1.0).contains(&eta)
        {
            return Err(Error::usage(format!("eta is {eta}, but it is a share of the DDPM noise: give 0 to 1")));
        }
        if let Some(scale) = guidance
            && !scale.is_finite()
        {
            return Err(Error::usage(format!("the guidance scale is {scale}: give a finite number such as 1.5")));
        }
        Ok(Sampler { schedule, method, clip, guidance, guided_at: 0..u32::MAX, guided_channels: usize::MAX })
    }

    /// The same, guided at these timesteps of the full schedule only (Kynkäänniemi et al. 2024). At others the model is asked for the
    /// conditional half alone, which takes half as long.
    pub fn guided_at(self, timesteps: Range<u32>) -> Self {
        Sampler { guided_at: timesteps, ..self }
    }

    /// The same, with only the first `channels` of the image guided: the published sampling script of DiT guides 3 of 4. The others have
    /// the conditional answer.
    pub fn guided_channels(self, channels: usize) -> Self {
        Sampler { guided_channels: channels, ..self }
    }

    /// Number of steps, which is also the number of model evaluations.
    pub fn steps(&self) -> usize {
        self.schedule.len()
    }

    /// The timesteps of the full schedule that it walks, in rising order.
    pub fn timesteps(&self) -> &[u32] {
        &self.schedule.timestep_map
    }

    /// Whether a batch is two halves, conditional and unconditional.
    pub fn guided(&self) -> bool {
        self.guidance.is_some()
    }

    /// Turns the noise in `x` `[R, channels, pixels]` into samples.
    ///
    /// - `model(x, t, out)`: the model's answer `[R, 2 * channels or channels, pixels]` for `x` at timestep `t` of the full
    ///   schedule, the same for all rows. With guidance, rows `R/2..` are its answer without a condition; there `x` repeats
    ///   its first half. At timesteps without guidance both end with that half.
    /// - `noise(k, out)`: standard normal numbers `[R, channels, pixels]` for the k-th step, counted from 0. It is not called
    ///   for steps that need none.
    /// - `after_step(k, x)`: the state after the k-th step; an error stops the sampler.
    ///
    /// With guidance only the first half of `x` is a sample; the second half follows the same answer with its own variance, where it is
    /// asked for.
    ///
    /// # Errors
    /// When `x` does not hold whole rows (an even number of them with guidance), when a number is not finite, and whatever
    /// `model` and `after_step` return.
    pub fn sample(
        &self,
        x: &mut [f32],
        mut model: impl FnMut(&[f32], u32, &mut [f32]) -> Result<()>,
        mut noise: impl FnMut(usize, &mut [f32]),
        mut after_step: impl FnMut(usize, &[f32]) -> Result<()>,
        dims: ImageDims,
    ) -> Result<()> {
        let row = dims.elements();
        let halves = if self.guidance.is_some() { 2 } else { 1 };
        if row == 0 || !x.len().is_multiple_of(row * halves) {
            let what =
                format!("x has {} elements, expected a multiple of {} ({halves} x {row})", x.len(), halves * row);
            return Err(Error::Shape { operation: "sample", what });
        }
        let mut input = vec![0.0; x.len()];
        let mut step_noise = vec![0.0; x.len()];
        let mut out = vec![0.0; x.len() / row * dims.out_elements()];
        let mut estimates = vec![0.0; x.len()];
        for (k, t) in (0..self.steps()).rev().enumerate() {
            let step = self.step(t, dims.learn_sigma);
            let timestep = self.schedule.timestep_map[t];
            let guidance = self.guidance.filter(|_| self.guided_at.contains(&timestep));
            let half = x.len() / halves;
            let rows = if guidance.is_some() { x.len() / row } else { half / row };
            let (input, out) = (&mut input[..rows * row], &mut out[..rows * dims.out_elements()]);
            let input_scale = self.schedule.input_scale(t);
            for part in input.chunks_exact_mut(half.max(1)) {
                part.iter_mut().zip(&x[..half]).for_each(|(to, &x)| *to = (input_scale * f64::from(x)) as f32);
            }
            model(input, timestep, out)?;
            if let Some(scale) = guidance {
                guide(out, scale, dims, self.guided_channels);
            }
            if step.sigma != Some(0.0) && !step.last {
                noise(k, &mut step_noise);
            }
            let rows = x.chunks_exact_mut(row).zip(out.chunks_exact(dims.out_elements()));
            for (((x, out), noise), x_0) in rows.zip(step_noise.chunks_exact(row)).zip(estimates.chunks_exact_mut(row))
            {
                self.advance(x, x_0, out, noise, &step);
            }
            // A clipped estimate would hide an answer that is infinite.
            if !out.iter().chain(&*x).all(|v| v.is_finite()) {
                return Err(Error::Stopped(format!(
                    "sampling step {k} (timestep {timestep}) gave a number that is not finite: the weights are damaged or diverged"
                )));
            }
            after_step(k, x)?;
        }
        Ok(())
    }

    fn step(&self, t: usize, learn_sigma: bool) -> Step {
        let s = &self.schedule;
        let min_log = s.posterior_log_variance_clipped[t];
        let (bar, prev) = (s.alphas_cumprod[t], s.alphas_cumprod_prev[t]);
        let mut ahead = 0.0;
        let (coef1, coef2, sigma) = match self.method {
            Method::Ddpm => {
                let fixed = if t == 0 { min_log } else { s.log_betas[t] };
                let sigma = (!learn_sigma).then(|| (0.5 * fixed).exp());
                (s.posterior_mean_coef1[t], s.posterior_mean_coef2[t], sigma)
            }
            Method::Ddim { eta } => {
                let sigma = eta * ((1.0 - prev) / (1.0 - bar)).sqrt() * (1.0 - bar / prev).sqrt();
                // The difference may round to just below 0 where eta is 1.
                (prev.sqrt(), (1.0 - prev - sigma * sigma).max(0.0).sqrt(), Some(sigma))
            }
            Method::DpmPlusPlus => {
                if t > 0 && t + 1 < s.len() {
                    let [next, now, before] = [t - 1, t, t + 1].map(|t| s.half_log_snr(t));
                    ahead = (next - now) / (2.0 * (now - before));
                }
                (prev.sqrt(), (1.0 - prev).sqrt(), Some(0.0))
            }
        };
        Step {
            estimate: s.estimate(t),
            sqrt_recip: s.sqrt_recip_alphas_cumprod[t],
            sqrt_recipm1: s.sqrt_recipm1_alphas_cumprod[t],
            coef1,
            coef2,
            ahead,
            sigma,
            min_log,
            range: s.log_betas[t] - min_log,
            last: t == 0,
        }
    }

    /// One step of one row: `x` and `noise` `[channels, pixels]`, `out` the model output with or without its second half. `estimates` of
    /// `x_0` are replaced by those of this step.
    fn advance(&self, x: &mut [f32], estimates: &mut [f64], out: &[f32], noise: &[f32], step: &Step) {
        let (answer, v) = out.split_at(x.len());
        let (of_x, of_answer) = step.estimate;
        for i in 0..x.len() {
            let x_t = f64::from(x[i]);
            let mut x_0 = of_x * x_t + of_answer * f64::from(answer[i]);
            if self.clip {
                x_0 = x_0.clamp(-1.0, 1.0);
            }
            let before = std::mem::replace(&mut estimates[i], x_0);
            x_0 += step.ahead * (x_0 - before);
            let other = match self.method {
                Method::Ddpm => x_t,
                Method::Ddim { .. } | Method::DpmPlusPlus => (step.sqrt_recip * x_t - x_0) / step.sqrt_recipm1,
            };
            let mut next = step.coef1 * x_0 + step.coef2 * other;
            if !step.last {
                let sigma = step.sigma.unwrap_or_else(|| {
                    let log_variance = step.min_log + 0.5 * (f64::from(v[i]) + 1.0) * step.range;
                    (0.5 * log_variance).exp()
                });
                next += sigma * f64::from(noise[i]);
            }
            x[i] = next as f32;
        }
    }
}

/// Classifier-free guidance: both halves' answer in `out` becomes `unconditional + scale (conditional - unconditional)` in the first
/// `channels`; other channels and the variance stay. Rows `..R/2` of `out` are conditional, the rest unconditional. Ho and Salimans (2022)
/// guide every channel, the published sampling script of DiT the first three.
///
/// `out` is `[R, 2 * channels or channels, pixels]` with an even R.
///
/// # Panics
/// When R is odd, or a row has no elements.
pub fn guide(out: &mut [f32], scale: f64, dims: ImageDims, channels: usize) {
    let (half, row) = (out.len() / 2, dims.out_elements());
    assert!(row > 0 && out.len().is_multiple_of(2 * row), "{} numbers are not two halves of rows of {row}", out.len());
    let (conditional, unconditional) = out.split_at_mut(half);
    let rows = conditional.chunks_exact_mut(row);
    for (c, u) in rows.zip(unconditional.chunks_exact_mut(row)) {
        for (c, u) in c.iter_mut().zip(u).take(channels.min(dims.channels) * dims.pixels) {
            let guided = f64::from(*u) + scale * (f64::from(*c) - f64::from(*u));
            *c = guided as f32;
            *u = guided as f32;
        }
    }
}
