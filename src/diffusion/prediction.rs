//! What a model predicts, and what a timestep means for that.
//!
//! ```text
//!        x_t, which the model is given                what it predicts                        x_0 by its answer u
//! noise  sqrt(bar) x_0 + sqrt(1 - bar) noise          noise                                   (x_t - sqrt(1 - bar) u) / sqrt(bar)
//! v      the same                                     sqrt(bar) noise - sqrt(1 - bar) x_0     sqrt(bar) x_t - sqrt(1 - bar) u
//! flow   (1 - s) x_0 + s noise, s = (t + 1/2) / T     noise - x_0                             x_t - s u
//! ```
//!
//! `bar` is `alphas_cumprod[t]`, T the number of timesteps. Noise: Ho et al. 2020, equation 14; v: Salimans and Ho 2022, "Progressive
//! distillation", appendix D; flow: rectified flow, Liu et al. 2023, "Flow straight and fast", equation 1, and Ma et al. 2024 (SiT).
//!
//! A flow is a noise schedule too: `x_t / sqrt((1 - s)^2 + s^2)` is what `bar = (1 - s)^2 / ((1 - s)^2 + s^2)` makes of `x_0` and
//! noise. So the variational bound and all samplers are those of the others, with [`Schedule::input_scale`] before the model; DDIM
//! without noise is Euler's method for `dx/ds = u`.

use crate::choice::choice;
use crate::diffusion::schedule::Schedule;

/// What a model predicts of `x_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise in it.
    Noise,
    /// The velocity of a rotation from `x_0` to noise.
    V,
    /// The velocity of the straight way from `x_0` to noise, which has a noise schedule of its own.
    Flow,
}

choice!(Prediction: Noise = "noise", V = "v", Flow = "flow");

impl Prediction {
    /// Betas of the flow: `1 - bar_t / bar_{t-1}`.
    pub(super) fn betas_of_flow(steps: usize) -> Vec<f64> {
        let alpha_cumprod = |t: usize| {
            let s = (t as f64 + 0.5) / steps as f64;
            let signal = (1.0 - s) * (1.0 - s);
            signal / (signal + s * s)
        };
        (0..steps).map(|t| 1.0 - alpha_cumprod(t) / if t == 0 { 1.0 } else { alpha_cumprod(t - 1) }).collect()
    }
}

/// # Panics
/// All of these when `t` is outside the schedule.
impl Schedule {
    /// Factor of `x_0` in the `x_t` that the model is given.
    pub fn signal(&self, t: usize) -> f64 {
        self.input_scale(t) * self.sqrt_alphas_cumprod[t]
    }

    /// Factor of the noise in it.
    pub fn spread(&self, t: usize) -> f64 {
        self.input_scale(t) * self.sqrt_one_minus_alphas_cumprod[t]
    }

    /// The `x_t` that the model is given, as a multiple of `sqrt(alphas_cumprod) x_0 + sqrt(1 - alphas_cumprod) noise`.
    pub fn input_scale(&self, t: usize) -> f64 {
        match self.prediction {
            Prediction::Noise | Prediction::V => 1.0,
            // Signal and spread are 1 together.
            Prediction::Flow => 1.0 / (self.sqrt_alphas_cumprod[t] + self.sqrt_one_minus_alphas_cumprod[t]),
        }
    }

    /// The model is to predict `a noise - b x_0`: a and b.
    pub fn target(&self, t: usize) -> (f64, f64) {
        match self.prediction {
            Prediction::Noise => (1.0, 0.0),
            Prediction::V => (self.signal(t), self.spread(t)),
            Prediction::Flow => (1.0, 1.0),
        }
    }

    /// How far the noise that an answer implies is off, for each unit that the answer is off.
    pub fn noise_of_answer(&self, t: usize) -> f64 {
        match self.prediction {
            Prediction::Noise => 1.0,
            Prediction::V | Prediction::Flow => self.signal(t),
        }
    }

    /// The estimate of `x_0` is `a x + b answer`, where the model was given `input_scale x`: a and b.
    pub fn estimate(&self, t: usize) -> (f64, f64) {
        match self.prediction {
            Prediction::Noise => (self.sqrt_recip_alphas_cumprod[t], -self.sqrt_recipm1_alphas_cumprod[t]),
            Prediction::V => (self.signal(t), -self.spread(t)),
            Prediction::Flow => (self.input_scale(t), -self.spread(t)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::ScheduleKind;

    #[test]
    fn a_flow_goes_straight_from_the_image_to_noise() {
        let schedule = Schedule::predicting(Prediction::Flow, ScheduleKind::Cosine, 1000).unwrap();
        for t in 0..1000 {
            let s = (t as f64 + 0.5) / 1000.0;
            let (signal, spread) = (schedule.signal(t), schedule.spread(t));
            assert!((signal - (1.0 - s)).abs() <= 1e-12 && (spread - s).abs() <= 1e-12, "{t}: {signal} {spread}");
        }
    }

    /// Where x_0 and noise are known, so is the answer, and what is made of it.
    #[test]
    fn the_right_answer_leads_back_to_the_image() {
        let (x_0, noise) = (0.7, -1.3);
        for prediction in [Prediction::Noise, Prediction::V, Prediction::Flow] {
            for kind in [ScheduleKind::Linear, ScheduleKind::Cosine] {
                let full = Schedule::predicting(prediction, kind, 1000).unwrap();
                for schedule in [full.respaced(&[0, 3, 500, 990]).unwrap(), full] {
                    for t in 0..schedule.len().min(991) {
                        let (a, b) = schedule.target(t);
                        let answer = a * noise - b * x_0;
                        let x =
                            schedule.sqrt_alphas_cumprod[t] * x_0 + schedule.sqrt_one_minus_alphas_cumprod[t] * noise;
                        let given = schedule.signal(t) * x_0 + schedule.spread(t) * noise;
                        assert!((given - schedule.input_scale(t) * x).abs() <= 1e-12, "{prediction} {t}");
                        let (of_x, of_answer) = schedule.estimate(t);
                        let found = of_x * x + of_answer * answer;
                        assert!((found - x_0).abs() <= 1e-12 * of_x.max(1.0), "{prediction} {kind} {t}: {found}");
                        // Off by 1, it implies another noise, of the same x.
                        let x_0_off = of_x * x + of_answer * (answer + 1.0);
                        let noise_off =
                            (x - schedule.sqrt_alphas_cumprod[t] * x_0_off) / schedule.sqrt_one_minus_alphas_cumprod[t];
                        let off = noise_off - noise - schedule.noise_of_answer(t);
                        let slack = 1e-12 / schedule.sqrt_one_minus_alphas_cumprod[t];
                        assert!(off.abs() <= slack, "{prediction} {kind} {t}: {off}");
                    }
                }
            }
        }
    }
}
