//! Which timesteps a batch draws.

use crate::error::{Error, Result};
use crate::rng::Philox;
use std::fmt;
use std::ops::Range;

/// A distribution of timesteps. The loss of a timestep counts as often as it is drawn: nothing makes up for that.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Timesteps {
    /// Each as often as every other.
    Uniform,
    /// `sigmoid(mean + std n)` of the way to noise, n a standard normal number (Esser et al. 2024, "Scaling rectified flow
    /// transformers for high-resolution image synthesis", section 3.1): more of those in the middle.
    LogitNormal {
        /// Above 0, more of those with much noise; the paper's best is 0.
        mean: f64,
        /// Up to the square root of 2 most are in the middle; beyond, there are two peaks, which move to the ends. The paper's best is 1.
        std: f64,
    },
}

impl Timesteps {
    /// The timestep of `sample` at `step`, one of `range` (0 when that is empty).
    ///
    /// `rng` is the generator of [`crate::rng::Stream::Timestep`]; the draw depends on its seed, `step` and `sample` alone.
    pub fn draw(self, rng: &Philox, step: u64, sample: usize, range: Range<usize>) -> u32 {
        let len = range.len().max(1);
        let drawn = match self {
            Timesteps::Uniform => rng.below(len as u64, step, sample as u64, 0) as usize,
            Timesteps::LogitNormal { mean, std } => {
                let mut n = [0.0];
                rng.normal(&mut n, step, sample as u64);
                let share = 1.0 / (1.0 + (-(mean + std * f64::from(n[0]))).exp());
                ((share * len as f64) as usize).min(len - 1)
            }
        };
        (range.start + drawn) as u32
    }
}

impl fmt::Display for Timesteps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Timesteps::Uniform => f.write_str("uniform"),
            Timesteps::LogitNormal { mean: 0.0, std: 1.0 } => f.write_str("logit-normal"),
            Timesteps::LogitNormal { mean, std } => write!(f, "logit-normal-{mean}-{std}"),
        }
    }
}

impl std::str::FromStr for Timesteps {
    type Err = Error;

    /// `uniform`, `logit-normal` (mean 0, std 1) or `logit-normal-MEAN-STD`, as in `logit-normal-0.5-1` and `logit-normal--0.5-1`.
    fn from_str(name: &str) -> Result<Self> {
        let number = |text: &str| text.parse::<f64>().ok().filter(|v| v.abs() <= 100.0);
        let found = match name {
            "uniform" => Some(Timesteps::Uniform),
            "logit-normal" => Some(Timesteps::LogitNormal { mean: 0.0, std: 1.0 }),
            _ => (name.strip_prefix("logit-normal-").and_then(|rest| rest.rsplit_once('-')))
                .and_then(|(mean, std)| number(mean).zip(number(std).filter(|&std| std > 0.0)))
                .map(|(mean, std)| Timesteps::LogitNormal { mean, std }),
        };
        found.ok_or_else(|| {
            let forms = "give uniform, logit-normal, or logit-normal-MEAN-STD (up to 100)";
            Error::usage(format!("there are no timesteps '{name}': {forms}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn names_round_trip_and_bad_ones_are_refused() {
        for name in ["uniform", "logit-normal", "logit-normal-0.5-1", "logit-normal--0.5-1.25", "logit-normal-0-0.5"] {
            assert_eq!(name.parse::<Timesteps>().unwrap().to_string(), name);
        }
        assert_eq!("logit-normal-0-1".parse::<Timesteps>().unwrap().to_string(), "logit-normal");
        for name in [
            "",
            "Uniform",
            "logit-normal-",
            "logit-normal-1",
            "logit-normal-0-0",
            "logit-normal-0--1",
            "logit-normal-nan-1",
        ] {
            assert!(name.parse::<Timesteps>().is_err(), "{name}");
        }
    }

    #[test]
    fn uniform_timesteps_are_all_drawn_and_every_sample_draws_its_own() {
        let rng = Philox::new(3, Stream::Timestep);
        let mut counts = [0; 16];
        for (step, sample) in (0..100).flat_map(|step| (0..64).map(move |sample| (step, sample))) {
            counts[Timesteps::Uniform.draw(&rng, step, sample, 0..16) as usize] += 1;
        }
        // 400 each, with a standard deviation of 20.
        assert!(counts.iter().all(|n| (300..500).contains(n)), "{counts:?}");
        for timesteps in [Timesteps::Uniform, Timesteps::LogitNormal { mean: 0.0, std: 1.0 }] {
            let mut of_step: Vec<u32> = (0..64).map(|sample| timesteps.draw(&rng, 5, sample, 0..1000)).collect();
            of_step.sort_unstable();
            of_step.dedup();
            assert!(of_step.len() > 50, "64 samples have only {} timesteps", of_step.len());
        }
    }

    /// The logits of what is drawn are normal: their mean, their deviation, and the share within one deviation.
    #[test]
    fn logit_normal_timesteps_have_normal_logits() {
        let rng = Philox::new(4, Stream::Timestep);
        for (mean, std) in [(0.0, 1.0), (-0.6, 1.2), (1.0, 0.5)] {
            let timesteps = Timesteps::LogitNormal { mean, std };
            let logits: Vec<f64> = (0..10_000)
                .map(|i| (f64::from(timesteps.draw(&rng, i / 100, i as usize % 100, 0..100_000)) + 0.5) / 1e5)
                .map(|share| (share / (1.0 - share)).ln())
                .collect();
            let of = |f: &dyn Fn(f64) -> f64| logits.iter().map(|&x| f(x)).sum::<f64>() / logits.len() as f64;
            let (found, spread) = (of(&|x| x), of(&|x| (x - mean) * (x - mean)).sqrt());
            let near = of(&|x| f64::from((x - mean).abs() < std));
            // Four standard deviations of each.
            assert!((found - mean).abs() < 0.04 * std && (spread - std).abs() < 0.03 * std, "{found} {spread}");
            assert!((near - 0.6827).abs() < 0.019, "{near}");
        }
    }

    #[test]
    fn timesteps_stay_in_their_range() {
        let rng = Philox::new(5, Stream::Timestep);
        for text in ["uniform", "logit-normal", "logit-normal-100-100", "logit-normal--100-1", "logit-normal-100-0.1"] {
            let timesteps: Timesteps = text.parse().unwrap();
            for step in 0..1000 {
                assert!((125..250).contains(&timesteps.draw(&rng, step, 3, 125..250)), "{text}");
            }
        }
    }
}
