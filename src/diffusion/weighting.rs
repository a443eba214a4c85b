//! How much each timestep counts in the loss.
//!
//! `snr` is the signal to noise ratio of a timestep, `alphas_cumprod / (1 - alphas_cumprod)`.

use crate::diffusion::Schedule;
use crate::error::{Error, Result};
use std::fmt;
use std::ops::Range;

/// Number of timestep clusters of uncertainty weighting.
pub const CLUSTERS: usize = 8;

/// A loss weight. It multiplies the mean squared error, never the variational bound.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LossWeight {
    /// Every timestep counts the same (Ho et al. 2020, equation 14).
    Constant,
    /// `min(snr, gamma) / snr` (Hang et al. 2023, "Efficient diffusion training via min-SNR weighting", for epsilon prediction).
    MinSnr {
        /// Where the signal to noise ratio is cut off; the paper uses 5.
        gamma: f64,
    },
    /// `1 / (k + snr)^gamma` (Choi et al. 2022, "Perception prioritized training of diffusion models", equation 8).
    P2 {
        /// Strength; the paper uses 1.
        gamma: f64,
        /// Keeps the weight of clean timesteps finite; the paper uses 1.
        k: f64,
    },
    /// Uncertainty weighting (Kendall et al. 2018): a learned log-variance for each of [`CLUSTERS`] equal clusters of
    /// timesteps, see [`uncertainty_loss`]. A batch is stratified: its k-th eighth has timesteps of the k-th cluster.
    Uncertainty,
}

impl LossWeight {
    /// Weight of the mean squared error at timestep `t`; 1 for uncertainty weighting, which weighs the losses instead. Where it depends
    /// on the timestep, it is that of the error of the noise which an answer implies, whatever the model predicts: with min-SNR
    /// `min(snr, gamma) / (snr + 1)` for v.
    ///
    /// # Panics
    /// When `t` is outside the schedule and the weight depends on it.
    pub fn weight(self, schedule: &Schedule, t: usize) -> f64 {
        let of_noise = match self {
            LossWeight::Constant | LossWeight::Uncertainty => return 1.0,
            LossWeight::MinSnr { gamma } => (gamma / schedule.snr(t)).min(1.0),
            LossWeight::P2 { gamma, k } => (k + schedule.snr(t)).powf(-gamma),
        };
        of_noise * schedule.noise_of_answer(t).powi(2)
    }

    /// The timesteps that `sample` in a batch of `batch` may have: all `steps`, or those of its cluster.
    ///
    /// # Panics
    /// Where clusters matter, when `batch` is 0.
    pub fn timesteps_of(self, sample: usize, batch: usize, steps: usize) -> Range<usize> {
        match self {
            LossWeight::Uncertainty => cluster_timesteps(cluster_of(sample, batch), steps),
            _ => 0..steps,
        }
    }

    /// Checks that a batch of `batch` samples has some for every cluster.
    ///
    /// # Errors
    /// For uncertainty weighting, when `batch` is not a multiple of [`CLUSTERS`].
    pub fn check_batch(self, batch: usize) -> Result<()> {
        if self == LossWeight::Uncertainty && (batch == 0 || !batch.is_multiple_of(CLUSTERS)) {
            return Err(Error::usage(format!(
                "the batch size is {batch}, but loss weight uw splits a batch into {CLUSTERS} equal parts: give a multiple of {CLUSTERS}"
            )));
        }
        Ok(())
    }
}

impl fmt::Display for LossWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LossWeight::Constant => f.write_str("constant"),
            LossWeight::MinSnr { gamma } => write!(f, "min-snr-{gamma}"),
            LossWeight::P2 { gamma: 1.0, k: 1.0 } => f.write_str("p2"),
            LossWeight::P2 { gamma, k } => write!(f, "p2-{gamma}-{k}"),
            LossWeight::Uncertainty => f.write_str("uw"),
        }
    }
}

impl std::str::FromStr for LossWeight {
    type Err = Error;

    /// `constant`, `min-snr-GAMMA`, `p2` (gamma 1, k 1), `p2-GAMMA-K` or `uw`.
    fn from_str(name: &str) -> Result<Self> {
        let positive = |text: &str| text.parse::<f64>().ok().filter(|v| v.is_finite() && *v > 0.0);
        let found = match name {
            "constant" => Some(LossWeight::Constant),
            "uw" => Some(LossWeight::Uncertainty),
            "p2" => Some(LossWeight::P2 { gamma: 1.0, k: 1.0 }),
            _ => {
                match (name.strip_prefix("min-snr-"), name.strip_prefix("p2-").and_then(|rest| rest.split_once('-'))) {
                    (Some(gamma), _) => positive(gamma).map(|gamma| LossWeight::MinSnr { gamma }),
                    (_, Some((gamma, k))) => {
                        positive(gamma).zip(positive(k)).map(|(gamma, k)| LossWeight::P2 { gamma, k })
                    }
                    _ => None,
                }
            }
        };
        found.ok_or_else(|| {
            Error::usage(format!("there is no loss weight '{name}': give constant, min-snr-5, p2, p2-GAMMA-K or uw"))
        })
    }
}

/// The cluster that sample `sample` of a batch of `batch` belongs to, by its position alone.
///
/// # Panics
/// When `batch` is 0.
pub fn cluster_of(sample: usize, batch: usize) -> usize {
    sample * CLUSTERS / batch
}

/// The timesteps of cluster `k` of a schedule with `steps`: for 1000, `125 k .. 125 (k + 1)`.
pub fn cluster_timesteps(k: usize, steps: usize) -> Range<usize> {
    k * steps / CLUSTERS..(k + 1) * steps / CLUSTERS
}

/// Derivative of [`uncertainty_loss`] with respect to each sample's loss, into `coefficients` `[B]`. It does not depend on
/// the losses, so that it can be known before them. `log_variances` is s.
pub fn uncertainty_coefficients(coefficients: &mut [f64], log_variances: &[f32; CLUSTERS]) {
    let batch = coefficients.len();
    let mut sizes = [0usize; CLUSTERS];
    (0..batch).for_each(|i| sizes[cluster_of(i, batch)] += 1);
    for (i, coefficient) in coefficients.iter_mut().enumerate() {
        let k = cluster_of(i, batch);
        *coefficient = 0.5 * (-f64::from(log_variances[k])).exp() / (CLUSTERS * sizes[k]) as f64;
    }
}

/// Uncertainty-weighted loss of a stratified batch, and its derivative with respect to the log-variances s:
///
/// ```text
/// sum_k 0.5 (exp(-s_k) l_k + s_k),   l_k = mean(losses of the k-th eighth of the batch) / 8
/// ```
///
/// `losses` is `[B]`. A cluster without a sample (`B < 8`) takes no part. The derivative with respect to the losses is
/// [`uncertainty_coefficients`].
pub fn uncertainty_loss(d_log_variances: &mut [f32; CLUSTERS], losses: &[f32], log_variances: &[f32; CLUSTERS]) -> f64 {
    let mut total = 0.0;
    for k in 0..CLUSTERS {
        let (sum, count) = (losses.iter().enumerate())
            .filter(|(i, _)| cluster_of(*i, losses.len()) == k)
            .fold((0.0, 0usize), |(sum, count), (_, &loss)| (sum + f64::from(loss), count + 1));
        d_log_variances[k] = 0.0;
        if count > 0 {
            let s = f64::from(log_variances[k]);
            let weighted = (-s).exp() * sum / (CLUSTERS * count) as f64;
            total += 0.5 * (weighted + s);
            d_log_variances[k] = (0.5 * (1.0 - weighted)) as f32;
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::{Prediction, ScheduleKind, Timesteps};
    use crate::rng::{Philox, Stream};

    #[test]
    fn names_round_trip_and_bad_ones_are_refused() {
        for name in ["constant", "min-snr-5", "min-snr-2.5", "p2", "p2-0.5-2", "p2-0.5-1", "p2-1-2", "uw"] {
            assert_eq!(name.parse::<LossWeight>().unwrap().to_string(), name);
        }
        for name in ["", "min-snr-", "min-snr-0", "min-snr--1", "min-snr-nan", "p2-1", "p2-1-inf", "UW", "p3"] {
            assert!(name.parse::<LossWeight>().is_err(), "{name}");
        }
    }

    #[test]
    fn weights_follow_the_signal_to_noise_ratio() {
        let schedule = Schedule::new(ScheduleKind::Cosine, 1000).unwrap();
        let min_snr = LossWeight::MinSnr { gamma: 5.0 };
        assert_eq!(min_snr.weight(&schedule, 900), 1.0); // snr below gamma
        let clean = min_snr.weight(&schedule, 3);
        assert!((clean * schedule.snr(3) - 5.0).abs() < 1e-12, "{clean}");
        let p2 = LossWeight::P2 { gamma: 0.5, k: 2.0 };
        assert!((p2.weight(&schedule, 500).powi(-2) - 2.0 - schedule.snr(500)).abs() < 1e-12);
        assert!(p2.weight(&schedule, 3) < p2.weight(&schedule, 900));
    }

    /// Of what a model answers: an error of it is another one of the noise.
    #[test]
    fn the_error_of_the_noise_is_weighed_whatever_is_predicted() {
        let of = |prediction| Schedule::predicting(prediction, ScheduleKind::Cosine, 1000).unwrap();
        let [v, flow] = [Prediction::V, Prediction::Flow].map(of);
        let (min_snr, p2) = (LossWeight::MinSnr { gamma: 5.0 }, LossWeight::P2 { gamma: 1.0, k: 1.0 });
        for t in [0, 3, 250, 500, 999] {
            let snr = v.snr(t);
            let near = |found: f64, expected: f64| assert!((found - expected).abs() <= 1e-9 * expected, "{t}: {found}");
            near(min_snr.weight(&v, t), snr.min(5.0) / (snr + 1.0));
            near(p2.weight(&v, t), snr / (1.0 + snr).powi(2));
            let signal = 1.0 - (t as f64 + 0.5) / 1000.0;
            let snr = (signal / (1.0 - signal)).powi(2);
            near(min_snr.weight(&flow, t), (5.0 / snr).min(1.0) * signal.powi(2));
            assert_eq!((LossWeight::Constant.weight(&v, t), LossWeight::Uncertainty.weight(&flow, t)), (1.0, 1.0));
        }
    }

    #[test]
    fn a_stratified_batch_draws_each_cluster_from_its_own_timesteps() {
        let rng = Philox::new(3, Stream::Timestep);
        let mut seen = [[0usize; 2]; CLUSTERS];
        for step in 0..500 {
            for i in 0..16 {
                let range = LossWeight::Uncertainty.timesteps_of(i, 16, 1000);
                assert_eq!(range, 125 * (i / 2)..125 * (i / 2 + 1));
                let t = Timesteps::Uniform.draw(&rng, step, i, range.clone()) as usize;
                assert!(range.contains(&t), "sample {i} has timestep {t}");
                seen[i / 2][usize::from(t - range.start > 62)] += 1;
            }
        }
        // About half of each cluster's draws in each half of it.
        assert!(seen.iter().flatten().all(|n| (400..600).contains(n)), "{seen:?}");
        assert_eq!(LossWeight::Constant.timesteps_of(0, 16, 1000), 0..1000);
    }

    #[test]
    fn uncertainty_gradients_agree_with_finite_differences() {
        let losses: Vec<f32> = (0..19).map(|i| 0.3 + (i as f32 * 1.7).sin().abs()).collect();
        let s: [f32; CLUSTERS] = std::array::from_fn(|k| 0.25 * k as f32 - 0.5);
        let (mut ds, mut ignored) = ([0.0; CLUSTERS], [0.0; CLUSTERS]);
        uncertainty_loss(&mut ds, &losses, &s);
        let mut coefficients = vec![0.0; losses.len()];
        uncertainty_coefficients(&mut coefficients, &s);
        // Powers of two, so that the f32 steps are exact.
        let h = 1.0 / 256.0_f32;
        for k in 0..CLUSTERS {
            let (mut up, mut down) = (s, s);
            up[k] += h;
            down[k] -= h;
            let slope = (uncertainty_loss(&mut ignored, &losses, &up) - uncertainty_loss(&mut ignored, &losses, &down))
                / f64::from(up[k] - down[k]);
            let err = (slope - f64::from(ds[k])).abs();
            assert!(err <= 1e-5, "s[{k}]: {slope} {}", ds[k]);
        }
        for i in 0..losses.len() {
            let (mut up, mut down) = (losses.clone(), losses.clone());
            up[i] += h;
            down[i] -= h;
            let slope = (uncertainty_loss(&mut ignored, &up, &s) - uncertainty_loss(&mut ignored, &down, &s))
                / f64::from(up[i] - down[i]);
            assert!((slope - coefficients[i]).abs() <= 1e-6, "loss[{i}]: {slope} {}", coefficients[i]);
        }
    }

    #[test]
    fn a_batch_too_small_for_its_clusters_is_refused_and_still_harmless() {
        assert!(LossWeight::Uncertainty.check_batch(12).is_err() && LossWeight::Uncertainty.check_batch(0).is_err());
        assert!(LossWeight::Uncertainty.check_batch(16).is_ok() && LossWeight::Constant.check_batch(3).is_ok());
        let mut ds = [f32::NAN; CLUSTERS];
        assert!(uncertainty_loss(&mut ds, &[1.0, 2.0], &[0.5; CLUSTERS]).is_finite());
        assert_eq!(ds.iter().filter(|d| **d != 0.0).count(), 2);
    }
}
