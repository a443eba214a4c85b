//! Noise schedules: how much noise each timestep adds, and everything that follows from it.
//!
//! Ho et al., "Denoising diffusion probabilistic models" (2020), sections 2 and 3; the cosine schedule, the learned variance
//! and respacing are from Nichol and Dhariwal, "Improved denoising diffusion probabilistic models" (2021).

use crate::choice::choice;
use crate::diffusion::prediction::Prediction;
use crate::error::{Error, Result};

/// Which betas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScheduleKind {
    /// From 1e-4 to 2e-2 in equal steps, scaled by `1000 / steps` (Ho et al., section 4).
    Linear,
    /// `alphas_cumprod` follows a squared cosine, betas at most 0.999 (Nichol and Dhariwal, equation 17).
    Cosine,
}

choice!(ScheduleKind: Linear = "linear", Cosine = "cosine");

impl ScheduleKind {
    fn betas(self, steps: usize) -> Vec<f64> {
        match self {
            ScheduleKind::Linear => {
                let scale = 1000.0 / steps as f64;
                let (first, last) = (scale * 1e-4, scale * 2e-2);
                let difference = (last - first) / steps.saturating_sub(1).max(1) as f64;
                let mut betas: Vec<f64> = (0..steps).map(|i| i as f64 * difference + first).collect();
                if steps > 1 {
                    betas[steps - 1] = last;
                }
                betas
            }
            ScheduleKind::Cosine => {
                let alpha_bar = |i: usize| {
                    let t = i as f64 / steps as f64;
                    ((t + 0.008) / 1.008 * std::f64::consts::PI / 2.0).cos().powi(2)
                };
                (0..steps).map(|i| (1.0 - alpha_bar(i + 1) / alpha_bar(i)).min(0.999)).collect()
            }
        }
    }
}

/// A noise schedule. Every array has one entry per step; index 0 is the least noise.
///
/// `alpha = 1 - beta`; a name with `prev` is the array one step earlier, with 1 (no noise) before the first step.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// What the model predicts.
    pub prediction: Prediction,
    /// The timestep of the full schedule that each step stands for; `0, 1, 2, ..` unless respaced. The model is given these.
    pub timestep_map: Vec<u32>,
    /// Variance added by the step.
    pub betas: Vec<f64>,
    /// Logarithm of `betas`: the upper end of the learned range of log-variances.
    pub log_betas: Vec<f64>,
    /// Product of all alphas up to and including the step: the share of `x_start` in the variance of `x_t`.
    pub alphas_cumprod: Vec<f64>,
    /// `alphas_cumprod` of the step before.
    pub alphas_cumprod_prev: Vec<f64>,
    /// Square root of `alphas_cumprod`.
    pub sqrt_alphas_cumprod: Vec<f64>,
    /// Square root of `1 - alphas_cumprod`.
    pub sqrt_one_minus_alphas_cumprod: Vec<f64>,
    /// Square root of `1 / alphas_cumprod`.
    pub sqrt_recip_alphas_cumprod: Vec<f64>,
    /// Square root of `1 / alphas_cumprod - 1`.
    pub sqrt_recipm1_alphas_cumprod: Vec<f64>,
    /// Variance of `q(x_{t-1} | x_t, x_0)` (Ho et al., equation 7); 0 at the first step.
    pub posterior_variance: Vec<f64>,
    /// Its logarithm, with the second step's value at the first step: the lower end of the learned range.
    pub posterior_log_variance_clipped: Vec<f64>,
    /// Factor of `x_0` in the mean of `q(x_{t-1} | x_t, x_0)`.
    pub posterior_mean_coef1: Vec<f64>,
    /// Factor of `x_t` in that mean.
    pub posterior_mean_coef2: Vec<f64>,
}

/// The least half log-SNR that tells timesteps apart: that of the linear schedule's end. The cosine schedule goes to -10, where `x_t` of
/// a model's training are all alike, and its errors in the noise 20000 times as large in `x_0`.
const LEAST_HALF_LOG_SNR: f64 = -5.1;

impl Schedule {
    /// The full schedule of `steps` timesteps (the published models have 1000) for a model that predicts the noise.
    ///
    /// # Errors
    /// When `steps` is 0, or so small that the linear schedule would add more variance than there is.
    pub fn new(kind: ScheduleKind, steps: usize) -> Result<Self> {
        Self::predicting(Prediction::Noise, kind, steps)
    }

    /// The same for a model that predicts something else. A flow does not ask for `kind`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn predicting(prediction: Prediction, kind: ScheduleKind, steps: usize) -> Result<Self> {
        let cannot = |needed: String| {
            let what =
                format!("a noise schedule cannot have {steps} steps: give {needed} (the published models have 1000)");
            Err(Error::usage(what))
        };
        if steps == 0 || steps > u32::MAX as usize {
            return cannot(format!("1 to {}", u32::MAX));
        }
        let betas = match prediction {
            Prediction::Noise | Prediction::V => kind.betas(steps),
            Prediction::Flow => Prediction::betas_of_flow(steps),
        };
        if !betas.iter().all(|&b| b > 0.0 && b < 1.0) {
            return cannot("at least 21 for the linear one".into());
        }
        Ok(Self::from_betas(prediction, betas, (0..steps as u32).collect()))
    }

    /// The schedule of only the timesteps `kept` (increasing), with the same noise at each of them. `kept` are indices
    /// into `self`.
    ///
    /// # Errors
    /// When `kept` is empty, not strictly increasing, or outside the schedule.
    pub fn respaced(&self, kept: &[u32]) -> Result<Self> {
        let increasing = kept.windows(2).all(|pair| pair[0] < pair[1]);
        let last = match kept.last() {
            Some(&last) if increasing => last as usize,
            _ => {
                return Err(Error::usage("the timesteps of a sampler must be one or more numbers in increasing order"));
            }
        };
        if last >= self.len() {
            return Err(Error::usage(format!(
                "timestep {last} is outside the noise schedule of {} steps: give timesteps below {}",
                self.len(),
                self.len()
            )));
        }
        if kept.len() == self.len() {
            return Ok(self.clone());
        }
        let mut previous = 1.0;
        let mut betas = Vec::with_capacity(kept.len());
        for &t in kept {
            let alpha_cumprod = self.alphas_cumprod[t as usize];
            betas.push(1.0 - alpha_cumprod / previous);
            previous = alpha_cumprod;
        }
        Ok(Self::from_betas(self.prediction, betas, kept.iter().map(|&t| self.timestep_map[t as usize]).collect()))
    }

    /// Number of steps.
    #[expect(clippy::len_without_is_empty, reason = "a schedule is never empty")]
    pub fn len(&self) -> usize {
        self.betas.len()
    }

    /// Signal to noise ratio of `x_t`: `alphas_cumprod / (1 - alphas_cumprod)`.
    ///
    /// # Panics
    /// When `t` is not below [`len`](Self::len).
    pub fn snr(&self, t: usize) -> f64 {
        self.alphas_cumprod[t] / (1.0 - self.alphas_cumprod[t])
    }

    /// Half the logarithm of [`snr`](Self::snr): `lambda` of DPM-Solver (Lu et al. 2022).
    ///
    /// # Panics
    /// As [`snr`](Self::snr).
    pub fn half_log_snr(&self, t: usize) -> f64 {
        0.5 * self.snr(t).ln()
    }

    /// `steps` timesteps (increasing) from the first to the last, as evenly spread over [`half_log_snr`](Self::half_log_snr) as whole
    /// timesteps are; of a single one the last. Where the noise is all but pure, as at the end of the cosine schedule, it counts as -5.1.
    ///
    /// # Errors
    /// When `steps` is 0, or more than the schedule has.
    pub fn evenly_by_log_snr(&self, steps: usize) -> Result<Vec<u32>> {
        let len = self.len();
        if steps == 0 || steps > len {
            return Err(Error::usage(format!("{steps} timesteps cannot be chosen of {len}: give 1 to {len}")));
        }
        let lambda: Vec<f64> = (0..len).map(|t| self.half_log_snr(t).max(LEAST_HALF_LOG_SNR)).collect();
        let mut kept = Vec::with_capacity(steps);
        let mut first = 0;
        for i in 0..steps - 1 {
            let wanted = lambda[0] + (lambda[len - 1] - lambda[0]) * i as f64 / (steps - 1) as f64;
            let far = |t: &usize| (lambda[*t] - wanted).abs();
            // One that is not taken yet, and so that there is one for each of those to come.
            let nearest = (first..=len - steps + i).min_by(|a, b| far(a).total_cmp(&far(b))).expect("at least one");
            kept.push(nearest as u32);
            first = nearest + 1;
        }
        kept.push(len as u32 - 1);
        Ok(kept)
    }

    /// `kept` (increasing timesteps) for samplers that do not clip: those at which a model that predicts the noise cannot tell `x_0`, as at
    /// the end of the cosine schedule, give way to the last at which it can.
    pub fn estimable(&self, kept: &[u32]) -> Vec<u32> {
        let lost = |t: &usize| self.prediction == Prediction::Noise && self.half_log_snr(*t) < LEAST_HALF_LOG_SNR;
        let last = (0..self.len()).rfind(|t| !lost(t)).unwrap_or(0) as u32;
        let mut kept: Vec<u32> = kept.iter().map(|&t| t.min(last)).collect();
        kept.dedup();
        kept
    }

    fn from_betas(prediction: Prediction, betas: Vec<f64>, timestep_map: Vec<u32>) -> Self {
        let n = betas.len();
        let map = |f: &dyn Fn(usize) -> f64| -> Vec<f64> { (0..n).map(f).collect() };
        let mut product = 1.0;
        let alphas_cumprod = betas.iter().map(|b| {
            product *= 1.0 - b;
            product
        });
        let acp: Vec<f64> = alphas_cumprod.collect();
        let prev = map(&|t| if t == 0 { 1.0 } else { acp[t - 1] });
        let posterior_variance = map(&|t| betas[t] * (1.0 - prev[t]) / (1.0 - acp[t]));
        // The variance of the first step is 0. A schedule of one step has no second: any finite value serves, because
        // the first step draws no noise.
        let posterior_log_variance_clipped = map(&|t| match t {
            0 if n > 1 => posterior_variance[1].ln(),
            0 => betas[0].ln(),
            _ => posterior_variance[t].ln(),
        });
        Schedule {
            prediction,
            log_betas: map(&|t| betas[t].ln()),
            sqrt_alphas_cumprod: map(&|t| acp[t].sqrt()),
            sqrt_one_minus_alphas_cumprod: map(&|t| (1.0 - acp[t]).sqrt()),
            sqrt_recip_alphas_cumprod: map(&|t| (1.0 / acp[t]).sqrt()),
            sqrt_recipm1_alphas_cumprod: map(&|t| (1.0 / acp[t] - 1.0).sqrt()),
            posterior_mean_coef1: map(&|t| betas[t] * prev[t].sqrt() / (1.0 - acp[t])),
            posterior_mean_coef2: map(&|t| (1.0 - prev[t]) * (1.0 - betas[t]).sqrt() / (1.0 - acp[t])),
            timestep_map,
            betas,
            alphas_cumprod: acp,
            alphas_cumprod_prev: prev,
            posterior_variance,
            posterior_log_variance_clipped,
        }
    }
}

/// The timesteps that a respacing keeps of `0..steps`, in increasing order.
///
/// `"250"` spreads 250 over all; `"10,15,20"` takes 10 from the first third, 15 from the second, 20 from the last, spread in
/// each; `"ddim50"` takes every k-th from 0, where a whole k gives exactly 50.
///
/// # Errors
/// When the text is none of these, or asks for more timesteps than there are.
pub fn space_timesteps(steps: usize, respacing: &str) -> Result<Vec<u32>> {
    let bad = |why: String| Error::usage(format!("timestep respacing '{respacing}': {why}"));
    let number = |text: &str| match text.trim().parse::<usize>() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(bad(format!("'{text}' is not a number of steps: give something like 250, ddim50 or 10,15,20"))),
    };
    if steps == 0 || steps > u32::MAX as usize {
        return Err(bad(format!("there are {steps} timesteps to choose from: give at least 1")));
    }
    if let Some(count) = respacing.strip_prefix("ddim") {
        let count = number(count)?;
        let stride = (1..=steps).find(|&stride| steps.div_ceil(stride) == count);
        let stride =
            stride.ok_or_else(|| bad(format!("no whole stride takes exactly {count} of {steps} timesteps")))?;
        return Ok((0..steps as u32).step_by(stride).collect());
    }
    let sections = respacing.split(',').count();
    let mut kept = Vec::new();
    let mut start = 0;
    for (i, count) in respacing.split(',').enumerate() {
        let size = steps / sections + usize::from(i < steps % sections);
        let count = number(count)?;
        if count > size {
            return Err(bad(format!("a section of {size} timesteps cannot give {count}")));
        }
        let stride = if count == 1 { 1.0 } else { (size - 1) as f64 / (count - 1) as f64 };
        // Summed, not multiplied: the last bits decide the rounding, and published samplers sum.
        let mut position = 0.0_f64;
        for _ in 0..count {
            kept.push((start as f64 + position.round_ties_even()) as u32);
            position += stride;
        }
        start += size;
    }
    Ok(kept)
}

/// The timesteps at which samples are made: those of [`space_timesteps`], but of a single one the last. (The published function keeps the
/// first, at which a model takes the noise that sampling starts from for an image all but done, and the sample would be that noise.)
///
/// # Errors
/// As [`space_timesteps`].
pub fn sampling_timesteps(steps: usize, respacing: &str) -> Result<Vec<u32>> {
    let mut kept = space_timesteps(steps, respacing)?;
    if let [only] = &mut kept[..] {
        *only = steps as u32 - 1;
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_step_starts_from_noise() {
        for one in ["1", "ddim1"] {
            assert_eq!(space_timesteps(1000, one).unwrap(), [0]);
            assert_eq!(sampling_timesteps(1000, one).unwrap(), [999]);
        }
        for several in ["2", "250", "1,1", "ddim50", "1000"] {
            assert_eq!(sampling_timesteps(1000, several).unwrap(), space_timesteps(1000, several).unwrap());
        }
        assert!(sampling_timesteps(1000, "0").is_err());
    }

    #[test]
    fn timesteps_are_even_by_log_snr() {
        for kind in [ScheduleKind::Linear, ScheduleKind::Cosine] {
            let full = Schedule::new(kind, 1000).unwrap();
            for steps in [1, 2, 3, 10, 20, 50, 250, 999, 1000] {
                let kept = full.evenly_by_log_snr(steps).unwrap();
                assert!(kept.len() == steps && kept.windows(2).all(|pair| pair[0] < pair[1]), "{kept:?}");
                assert!(kept[steps - 1] == 999 && (steps == 1 || kept[0] == 0), "{kept:?}");
            }
            // In the middle, where timesteps are close to each other, each is where it should be.
            let kept = full.evenly_by_log_snr(21).unwrap();
            let lambda: Vec<f64> = kept.iter().map(|&t| full.half_log_snr(t as usize).max(-5.1)).collect();
            let width = (lambda[0] - lambda[20]) / 20.0;
            for i in 3..=20 {
                let err = (lambda[i] - (lambda[0] - i as f64 * width)).abs();
                assert!(err <= 0.2 * width, "{kind}: timestep {} is off by {err} of {width}", kept[i]);
            }
            for steps in [0, 1001] {
                let message = full.evenly_by_log_snr(steps).unwrap_err().to_string();
                assert!(message.contains(&format!("{steps} timesteps")), "{message}");
            }
        }
    }

    /// Where they are lost, 1 / sqrt(alphas_cumprod) is above 160.
    #[test]
    fn of_pure_noise_no_model_of_it_estimates_the_image() {
        let all: Vec<u32> = (0..1000).collect();
        for kind in [ScheduleKind::Linear, ScheduleKind::Cosine] {
            for prediction in [Prediction::Noise, Prediction::V, Prediction::Flow] {
                let full = Schedule::predicting(prediction, kind, 1000).unwrap();
                let lost = prediction == Prediction::Noise && kind == ScheduleKind::Cosine;
                let kept = full.estimable(&all);
                assert_eq!(kept, all[..if lost { 996 } else { 1000 }], "{kind} {prediction}");
                let amplified = full.sqrt_recip_alphas_cumprod[kept.len() - 1];
                assert!(prediction != Prediction::Noise || (140.0..165.0).contains(&amplified), "{kind}: {amplified}");
                let last = if lost { 995 } else { 999 };
                assert_eq!(full.estimable(&[0, 500, 999]), [0, 500, last]);
                assert_eq!(full.estimable(&[999]), [last]);
            }
        }
    }

    #[test]
    fn a_respaced_schedule_keeps_the_noise_of_its_timesteps() {
        for kind in [ScheduleKind::Linear, ScheduleKind::Cosine] {
            let full = Schedule::new(kind, 1000).unwrap();
            let kept = space_timesteps(1000, "7").unwrap();
            assert_eq!((kept[0], kept[6]), (0, 999));
            let few = full.respaced(&kept).unwrap();
            assert_eq!(few.timestep_map, kept);
            for (i, &t) in kept.iter().enumerate() {
                let expected = full.alphas_cumprod[t as usize];
                let err = (few.alphas_cumprod[i] - expected).abs();
                assert!(err <= 1e-12, "{kind} step {i}: off by {err}");
            }
            // Respacing twice speaks of the original timesteps.
            assert_eq!(few.respaced(&[1, 4]).unwrap().timestep_map, [kept[1], kept[4]]);
        }
    }

    /// The positions are multiples of 166.5; published samplers are in Python, which rounds half to even.
    #[test]
    fn timesteps_halfway_are_rounded_to_the_even_ones() {
        assert_eq!(space_timesteps(1000, "7").unwrap(), [0, 166, 333, 500, 666, 832, 999]);
    }

    #[test]
    fn a_single_step_has_finite_log_variances() {
        let one = Schedule::new(ScheduleKind::Linear, 1000).unwrap().respaced(&[999]).unwrap();
        assert!(one.posterior_log_variance_clipped[0].is_finite() && one.log_betas[0].is_finite());
    }

    #[test]
    fn bad_requests_are_refused() {
        for text in ["", "0", "ddim", "ddim0", "ddim999", "1001", "500,501", "-3", "1e3", "10,,10", "ddim50,2", "x"] {
            let err = space_timesteps(1000, text).unwrap_err().to_string();
            assert!(err.contains(text), "{err}");
        }
        assert!(space_timesteps(0, "1").is_err());
        assert!(Schedule::new(ScheduleKind::Linear, 0).is_err());
        assert!(Schedule::new(ScheduleKind::Linear, 20).is_err());
        let full = Schedule::new(ScheduleKind::Cosine, 100).unwrap();
        for kept in [&[][..], &[3, 3], &[5, 4], &[100]] {
            assert!(full.respaced(kept).is_err(), "{kept:?}");
        }
    }
}
