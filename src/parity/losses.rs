//! `loss_*` and `grads_*`: the loss of a batch and the gradients of every parameter.

use super::archive::{Archive, widen};
use super::network::Network;
use super::report::{Check, Report};
use crate::diffusion::weighting::{CLUSTERS, cluster_timesteps, uncertainty_coefficients, uncertainty_loss};
use crate::diffusion::{LossTerms, LossWeight, Schedule, ScheduleKind, losses, q_sample};
use crate::error::Result;
use crate::model::config::TASKS;

/// Which loss: the part of a file's name after `loss_` or `grads_`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// The noise schedule.
    pub schedule: ScheduleKind,
    /// The loss weight.
    pub weight: LossWeight,
}

impl Objective {
    /// `SCHEDULE_WEIGHT` with the weight `constant`, `min_snr_GAMMA`, `p2weight_GAMMA_K` (also with `_persample`) or `uw`.
    pub fn parse(name: &str) -> Option<Self> {
        let (schedule, weight) = name.split_once('_')?;
        let weight = match weight.strip_prefix("p2weight_") {
            Some(rest) => format!("p2-{}", rest.strip_suffix("_persample").unwrap_or(rest)),
            None => weight.to_string(),
        };
        Some(Objective { schedule: schedule.parse().ok()?, weight: weight.replace('_', "-").parse().ok()? })
    }
}

/// One batch and everything that its loss gives.
pub struct Evaluated {
    /// `[B]` each.
    pub mse: Vec<f32>,
    /// Bits.
    pub vb: Vec<f32>,
    /// Their sum.
    pub loss: Vec<f32>,
    /// The training objective: the mean of `loss`, or its uncertainty-weighted sum.
    pub total: f64,
    x_t: Vec<f32>,
    out: Vec<f32>,
    d_model_out: Vec<f32>,
    d_log_variances: [f32; CLUSTERS],
    weights: Vec<f64>,
}

/// The inputs of a loss.
pub struct Batch {
    /// `[B, IC, H, W]`
    pub x_start: Vec<f32>,
    /// `[B, IC, H, W]`
    pub noise: Vec<f32>,
    /// `[B]`
    pub t: Vec<u32>,
    /// `[B]`
    pub y: Vec<u32>,
    /// Log-variances of uncertainty weighting.
    pub log_variances: [f32; CLUSTERS],
}

impl Batch {
    fn read(inputs: &Archive, loss: Option<&Archive>, network: &Network) -> Result<Self> {
        let batch = inputs.shape("t")?.first().copied().unwrap_or(0);
        let images = network.images(batch);
        let mut log_variances = [0.0; CLUSTERS];
        if let Some(loss) = loss.filter(|loss| loss.has("loss_scale")) {
            log_variances.copy_from_slice(&loss.f32s_of("loss_scale", &[CLUSTERS])?);
        }
        Ok(Batch {
            x_start: inputs.f32s_of("x_start", &images)?,
            noise: inputs.f32s_of("noise", &images)?,
            t: inputs.indices("t", &[batch])?,
            y: inputs.indices("y", &[batch])?,
            log_variances,
        })
    }
}

/// The loss of `batch`, and the gradients of the weights in [`Network::grads`].
///
/// # Errors
/// When a timestep or label is out of range.
pub fn evaluate(network: &mut Network, batch: &Batch, objective: Objective) -> Result<Evaluated> {
    let schedule = Schedule::new(objective.schedule, TASKS)?;
    let (n, dims) = (batch.t.len(), network.dims());
    let mut x_t = vec![0.0; batch.x_start.len()];
    q_sample(&mut x_t, &batch.x_start, &batch.noise, &batch.t, &schedule)?;
    let uncertain = objective.weight == LossWeight::Uncertainty;
    let weights: Vec<f64> = batch.t.iter().map(|&t| objective.weight.weight(&schedule, t as usize)).collect();
    let mut coefficients = vec![1.0 / n as f64; n];
    if uncertain {
        uncertainty_coefficients(&mut coefficients, &batch.log_variances);
    }
    let [mut mse, mut vb, mut loss] = std::array::from_fn(|_| vec![0.0; n]);
    let mut d_model_out = vec![0.0; n * dims.out_elements()];
    let traced = network.forward_backward(&x_t, &batch.t, &batch.y, |out| {
        let terms = LossTerms { mse: &mut mse, vb: &mut vb, loss: &mut loss, d_model_out: &mut d_model_out };
        let Batch { x_start, noise, t, .. } = batch;
        losses(terms, out, x_start, noise, t, &weights, &coefficients, &schedule, dims)?;
        Ok(d_model_out.clone())
    })?;
    let mut d_log_variances = [0.0; CLUSTERS];
    let total = match uncertain {
        true => uncertainty_loss(&mut d_log_variances, &loss, &batch.log_variances),
        false => loss.iter().map(|&l| f64::from(l)).sum::<f64>() / n as f64,
    };
    Ok(Evaluated { mse, vb, loss, total, x_t, out: traced.out, d_model_out, d_log_variances, weights })
}

/// Compares a loss file and the gradients that go with it. Inputs that the loss file does not hold are in `forward`.
///
/// # Errors
/// When an input is missing or does not fit the model.
pub fn check(
    loss: Option<&Archive>,
    grads: Option<&Archive>,
    forward: Option<&Archive>,
    objective: Objective,
    network: &mut Network,
    report: &mut Report,
) -> Result<()> {
    let any = loss.or(grads);
    let inputs = loss.filter(|loss| loss.has("x_start")).or(forward);
    let (Some(any), Some(inputs)) = (any, inputs) else {
        let name = any.map_or("loss", |file| &file.stem);
        report
            .fail(name, "its inputs are missing: it needs x_start, noise, t and y, or a forward file with them".into());
        return Ok(());
    };
    let batch = Batch::read(inputs, loss, network)?;
    if objective.weight == LossWeight::Uncertainty && !loss.is_some_and(|loss| loss.has("loss_scale")) {
        return Err(any.error("belongs to uncertainty weighting, so loss_scale must be in its loss file".into()));
    }
    let found = evaluate(network, &batch, objective)?;
    if let Some(loss) = loss {
        check_loss(loss, &found, objective, network, report)?;
    }
    if let Some(grads) = grads {
        check_grads(grads, network, report)?;
    }
    Ok(())
}

fn check_loss(
    file: &Archive,
    found: &Evaluated,
    objective: Objective,
    network: &Network,
    report: &mut Report,
) -> Result<()> {
    let uncertain = objective.weight == LossWeight::Uncertainty;
    for name in file.names() {
        let row = format!("{} {name}", file.stem);
        let reference = file.f64s(&name)?;
        let mut compare = |found: &[f64], check: fn(&[f64], &[f64], f64) -> Check, tolerance: f64| {
            report.compare(&row, found, &reference, |f, r| vec![check(f, r, tolerance)]);
        };
        match name.as_str() {
            "x_start" | "noise" | "t" | "y" | "loss_scale" => {}
            "x_t" => compare(&widen(&found.x_t), Check::max, 1e-6),
            "model_out" => compare(&widen(&found.out), Check::max, 3e-5),
            "mse" => compare(&widen(&found.mse), Check::max, 5e-6),
            "vb" => compare(&widen(&found.vb), Check::each, 2e-5),
            "loss" if !uncertain => compare(&widen(&found.loss), Check::each, 2e-5),
            "loss" | "loss_mean" => compare(&[found.total], Check::each, 2e-5),
            "weight" => compare(&found.weights, Check::max, 1e-12),
            "d_model_out" => {
                report.compare(row, &widen(&found.d_model_out), &reference, |f, r| halves(f, r, network));
            }
            "grad.loss_scale" => report.compare(row, &widen(&found.d_log_variances), &reference, gradient_checks),
            "cluster_bounds" => {
                let bounds = (0..CLUSTERS).map(|k| cluster_timesteps(k, TASKS));
                let bounds: Vec<f64> = bounds.flat_map(|r| [r.start as f64, r.end as f64]).collect();
                report.compare(row, &bounds, &reference, |f, r| vec![Check::exact(f, r)]);
            }
            _ => match name.strip_prefix("gradnorm.").and_then(|name| network.dit.layout.get(name)) {
                Some(entry) => {
                    let grad = &network.grads[entry.param.range()];
                    let norm = grad.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
                    compare(&[norm], Check::each, 5e-5);
                }
                None => report.fail(row, "this tensor is not understood".into()),
            },
        }
    }
    Ok(())
}

/// Both halves of the gradient of the model output, each by its own largest value.
fn halves(found: &[f64], reference: &[f64], network: &Network) -> Vec<Check> {
    let dims = network.dims();
    let half = |x: &[f64], second: bool| -> Vec<f64> {
        let elements = x.iter().enumerate();
        elements.filter(|(i, _)| (i / dims.elements() % 2 == 1) == second).map(|(_, &v)| v).collect()
    };
    if !dims.learn_sigma {
        return vec![Check::max(found, reference, 1e-5)];
    }
    vec![
        Check::max(&half(found, false), &half(reference, false), 1e-5).named("mean"),
        Check::max(&half(found, true), &half(reference, true), 1e-4).named("var"),
    ]
}

/// How gradients of parameters are compared.
fn gradient_checks(found: &[f64], reference: &[f64]) -> Vec<Check> {
    vec![Check::max(found, reference, 2e-4), Check::l2(found, reference, 5e-5)]
}

fn check_grads(file: &Archive, network: &Network, report: &mut Report) -> Result<()> {
    for name in file.names() {
        let row = format!("{} {name}", file.stem);
        match name.strip_prefix("grad.").and_then(|name| network.dit.layout.get(name)) {
            Some(entry) => {
                file.check_shape(&name, &entry.shape)?;
                let found = widen(&network.grads[entry.param.range()]);
                report.compare(row, &found, &file.f64s(&name)?, gradient_checks);
            }
            None => report.fail(row, "this tensor is not understood".into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_losses() {
        let weight = |name| Objective::parse(name).map(|o| (o.schedule.to_string(), o.weight.to_string()));
        assert_eq!(weight("linear_constant"), Some(("linear".into(), "constant".into())));
        assert_eq!(weight("cosine_min_snr_5"), Some(("cosine".into(), "min-snr-5".into())));
        assert_eq!(weight("cosine_p2weight_1_1_persample"), Some(("cosine".into(), "p2".into())));
        assert_eq!(weight("linear_p2weight_0.5_2"), Some(("linear".into(), "p2-0.5-2".into())));
        assert_eq!(weight("linear_uw"), Some(("linear".into(), "uw".into())));
        for bad in ["", "linear", "sqrt_constant", "linear_", "linear_min_snr_x", "linear_p2weight_1", "linear_uwx"] {
            assert_eq!(weight(bad), None, "{bad}");
        }
    }
}
