//! The loss and the sampling steps as plain loops, in f32 or f64: the specification that the fast versions are compared with.
//!
//! Written as the papers write them, quantity by quantity, with no thought of speed or of cancellation.

use crate::diffusion::loss::ImageDims;
use crate::diffusion::prediction::Prediction;
use crate::diffusion::schedule::Schedule;
use crate::ops::real::Real;

/// `x_t = signal x_start + spread noise`, all `[B, channels, pixels]`, `t` `[B]`.
pub fn q_sample<R: Real>(x_t: &mut [R], x_start: &[R], noise: &[R], t: &[u32], schedule: &Schedule) {
    let per_sample = x_t.len() / t.len();
    for (b, &t) in t.iter().enumerate() {
        let signal = R::from_f64(schedule.signal(t as usize));
        let spread = R::from_f64(schedule.spread(t as usize));
        for i in b * per_sample..(b + 1) * per_sample {
            x_t[i] = signal * x_start[i] + spread * noise[i];
        }
    }
}

/// What a model is to answer to one element `x_t = signal x_start + spread noise`.
pub fn target<R: Real>(x_start: R, noise: R, t: usize, s: &Schedule) -> R {
    match s.prediction {
        Prediction::Noise => noise,
        Prediction::V => R::from_f64(s.signal(t)) * noise - R::from_f64(s.spread(t)) * x_start,
        Prediction::Flow => noise - x_start,
    }
}

/// The noise that is in one element of `x_t`, as the model was given it, by its answer.
pub fn noise_by_answer<R: Real>(answer: R, x_t: R, t: usize, s: &Schedule) -> R {
    match s.prediction {
        Prediction::Noise => answer,
        Prediction::V => R::from_f64(s.spread(t)) * x_t + R::from_f64(s.signal(t)) * answer,
        Prediction::Flow => x_t + R::from_f64(s.signal(t)) * answer,
    }
}

/// Mean and log-variance of the model's `p(x_{t-1} | x_t)` for one element, and its estimate of `x_0`.
///
/// `epsilon` is the noise by the model's answer, `v` the second half of its output; without `v`, the variance is the fixed larger one
/// (beta). `x_t` is `sqrt(alphas_cumprod) x_0 + sqrt(1 - alphas_cumprod) noise`, of a flow too.
pub fn p_mean_variance<R: Real>(x_t: R, epsilon: R, v: Option<R>, t: usize, s: &Schedule, clip: bool) -> (R, R, R) {
    let log_variance = match v {
        Some(v) => {
            let share = (v + R::one()) / R::from_f64(2.0);
            share * R::from_f64(s.log_betas[t]) + (R::one() - share) * R::from_f64(s.posterior_log_variance_clipped[t])
        }
        None if t == 0 => R::from_f64(s.posterior_log_variance_clipped[0]),
        None => R::from_f64(s.log_betas[t]),
    };
    let mut x_0 =
        R::from_f64(s.sqrt_recip_alphas_cumprod[t]) * x_t - R::from_f64(s.sqrt_recipm1_alphas_cumprod[t]) * epsilon;
    if clip && x_0 > R::one() {
        x_0 = R::one();
    }
    if clip && x_0 < R::from_f64(-1.0) {
        x_0 = R::from_f64(-1.0);
    }
    let mean = R::from_f64(s.posterior_mean_coef1[t]) * x_0 + R::from_f64(s.posterior_mean_coef2[t]) * x_t;
    (mean, log_variance, x_0)
}

/// KL divergence in nats between two normal distributions, given by mean and log-variance.
pub fn normal_kl<R: Real>(mean1: R, log_variance1: R, mean2: R, log_variance2: R) -> R {
    let difference = mean1 - mean2;
    R::from_f64(0.5)
        * (R::from_f64(-1.0) + log_variance2 - log_variance1
            + (log_variance1 - log_variance2).exp()
            + difference * difference * (-log_variance2).exp())
}

/// Log-likelihood in nats of a pixel `x`, which is one of 256 levels in -1..1, under a normal distribution with `mean` and
/// standard deviation `exp(log_scale)`, and its derivatives with respect to `mean` and `log_scale`.
///
/// The lowest and the highest level own their whole tail. The cumulative distribution is the tanh approximation of Page
/// (1977); probabilities are at least 1e-12, and where that bound holds the derivatives are 0.
pub fn discretized_log_likelihood<R: Real>(x: R, mean: R, log_scale: R) -> (R, R, R) {
    let one = R::one();
    let zero = R::zero();
    let c = R::from_f64((2.0 / std::f64::consts::PI).sqrt());
    // Cumulative distribution at z, and its derivative.
    let cdf = |z: R| {
        let tanh = (c * (z + R::from_f64(0.044715) * z * z * z)).tanh();
        let slope = R::from_f64(0.5) * (one - tanh * tanh) * c * (one + R::from_f64(3.0 * 0.044715) * z * z);
        (R::from_f64(0.5) * (one + tanh), slope)
    };
    let inverse_scale = (-log_scale).exp();
    let upper = inverse_scale * (x - mean + R::from_f64(1.0 / 255.0));
    let lower = inverse_scale * (x - mean - R::from_f64(1.0 / 255.0));
    let (cdf_upper, slope_upper) = cdf(upper);
    let (cdf_lower, slope_lower) = cdf(lower);
    // The probability, and its derivatives with respect to `upper` and `lower`.
    let (probability, d_upper, d_lower) = if x < R::from_f64(-0.999) {
        (cdf_upper, slope_upper, zero)
    } else if x > R::from_f64(0.999) {
        (one - cdf_lower, zero, -slope_lower)
    } else {
        (cdf_upper - cdf_lower, slope_upper, -slope_lower)
    };
    let least = R::from_f64(1e-12);
    if probability < least {
        return (least.ln(), zero, zero);
    }
    // d upper / d mean = d lower / d mean = -inverse_scale; d upper / d log_scale = -upper.
    let d_mean = -inverse_scale * (d_upper + d_lower) / probability;
    let d_log_scale = -(d_upper * upper + d_lower * lower) / probability;
    (probability.ln(), d_mean, d_log_scale)
}

/// The training loss of one batch and its gradient: see [`crate::diffusion::losses`], which takes the same arguments except
/// that here `x_t` is given. The bound's mean is not differentiated.
#[expect(clippy::too_many_arguments, reason = "outputs, inputs, sizes: one list, in that order")]
pub fn losses<R: Real>(
    mse: &mut [R],         // [B]
    vb: &mut [R],          // [B]
    d_model_out: &mut [R], // as model_out
    model_out: &[R],       // [B, 2 * channels or channels, pixels]
    x_start: &[R],         // [B, channels, pixels]
    x_t: &[R],             // [B, channels, pixels]
    noise: &[R],           // [B, channels, pixels]
    t: &[u32],             // [B]
    weights: &[f64],       // [B]
    coefficients: &[f64],  // [B]
    schedule: &Schedule,
    dims: ImageDims,
) {
    let n = dims.elements();
    let count = R::from_f64(n as f64);
    let nats_per_bit = R::from_f64(std::f64::consts::LN_2);
    let out_elements = dims.out_elements();
    for (b, &t) in t.iter().enumerate() {
        let t = t as usize;
        let (weight, coefficient) = (R::from_f64(weights[b]), R::from_f64(coefficients[b]));
        mse[b] = R::zero();
        vb[b] = R::zero();
        for i in 0..n {
            let (x_0, x_t, noise) = (x_start[b * n + i], x_t[b * n + i], noise[b * n + i]);
            let answer = model_out[b * out_elements + i];
            let error = answer - target(x_0, noise, t, schedule);
            mse[b] += weight * error * error / count;
            d_model_out[b * out_elements + i] = coefficient * weight * R::from_f64(2.0) * error / count;
            if !dims.learn_sigma {
                continue;
            }
            let epsilon = noise_by_answer(answer, x_t, t, schedule);
            let x_t = x_t / R::from_f64(schedule.input_scale(t));
            let v = model_out[b * out_elements + n + i];
            let (mean, log_variance, _) = p_mean_variance(x_t, epsilon, Some(v), t, schedule, false);
            let (nats, d_log_variance) = if t == 0 {
                let (ll, _, d_log_scale) = discretized_log_likelihood(x_0, mean, R::from_f64(0.5) * log_variance);
                (-ll, R::from_f64(-0.5) * d_log_scale)
            } else {
                let true_mean = R::from_f64(schedule.posterior_mean_coef1[t]) * x_0
                    + R::from_f64(schedule.posterior_mean_coef2[t]) * x_t;
                let true_log_variance = R::from_f64(schedule.posterior_log_variance_clipped[t]);
                let difference = true_mean - mean;
                let slope = R::from_f64(0.5)
                    * (R::one()
                        - (true_log_variance - log_variance).exp()
                        - difference * difference * (-log_variance).exp());
                (normal_kl(true_mean, true_log_variance, mean, log_variance), slope)
            };
            let range = R::from_f64(schedule.log_betas[t]) - R::from_f64(schedule.posterior_log_variance_clipped[t]);
            vb[b] += nats / (count * nats_per_bit);
            d_model_out[b * out_elements + n + i] =
                coefficient * d_log_variance * range / (R::from_f64(2.0) * count * nats_per_bit);
        }
    }
}

/// One element of a DDPM step: a draw from `p(x_{t-1} | x_t)` (Ho et al. 2020, algorithm 2), the mean alone at step 0.
pub fn ddpm_step<R: Real>(x_t: R, epsilon: R, v: Option<R>, noise: R, t: usize, s: &Schedule, clip: bool) -> R {
    let (mean, log_variance, _) = p_mean_variance(x_t, epsilon, v, t, s, clip);
    if t == 0 { mean } else { mean + (R::from_f64(0.5) * log_variance).exp() * noise }
}

/// One element of a step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), and the estimate of `x_0`, which the next step takes as
/// `before`. Without it the step is of first order.
pub fn dpm_plus_plus_step<R: Real>(
    x_t: R,
    epsilon: R,
    before: Option<R>,
    t: usize,
    s: &Schedule,
    clip: bool,
) -> (R, R) {
    let (_, _, x_0) = p_mean_variance(x_t, epsilon, None, t, s, clip);
    if t == 0 {
        return (x_0, x_0);
    }
    let signal = |t: usize| R::from_f64(s.sqrt_alphas_cumprod[t]);
    let spread = |t: usize| R::from_f64(s.sqrt_one_minus_alphas_cumprod[t]);
    let lambda = |t: usize| (signal(t) / spread(t)).ln();
    let h = lambda(t - 1) - lambda(t);
    let d = match before {
        Some(before) => {
            let half_r = R::from_f64(2.0) * (lambda(t) - lambda(t + 1)) / h;
            (R::one() + R::one() / half_r) * x_0 - before / half_r
        }
        None => x_0,
    };
    let x = spread(t - 1) / spread(t) * x_t - signal(t - 1) * ((-h).exp() - R::one()) * d;
    (x, x_0)
}

/// One element of a DDIM step (Song et al. 2021, equation 12) with the noise share `eta`.
pub fn ddim_step<R: Real>(x_t: R, epsilon: R, noise: R, eta: f64, t: usize, s: &Schedule, clip: bool) -> R {
    let (_, _, x_0) = p_mean_variance(x_t, epsilon, None, t, s, clip);
    // The noise that the (clipped) estimate implies.
    let epsilon =
        (R::from_f64(s.sqrt_recip_alphas_cumprod[t]) * x_t - x_0) / R::from_f64(s.sqrt_recipm1_alphas_cumprod[t]);
    let (bar, bar_prev) = (R::from_f64(s.alphas_cumprod[t]), R::from_f64(s.alphas_cumprod_prev[t]));
    let one = R::one();
    let sigma = R::from_f64(eta) * ((one - bar_prev) / (one - bar)).sqrt() * (one - bar / bar_prev).sqrt();
    // The rest of the variance; where eta is 1 it may round to just below 0.
    let rest = one - bar_prev - sigma * sigma;
    let rest = if rest < R::zero() { R::zero() } else { rest };
    let mean = x_0 * bar_prev.sqrt() + rest.sqrt() * epsilon;
    if t == 0 { mean } else { mean + sigma * noise }
}
