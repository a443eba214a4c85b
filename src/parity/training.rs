//! `train20`: some steps of AdamW with a moving average of the weights.

use super::archive::{Archive, widen};
use super::losses::{Batch, Objective, evaluate};
use super::network::Network;
use super::report::{Check, Report};
use super::sampling::number_after;
use crate::diffusion::LossWeight;
use crate::diffusion::weighting::CLUSTERS;
use crate::error::Result;
use crate::train::optimizer::{Update, adamw};

/// Largest error of a weight after training, and of one whose true gradient is 0: there AdamW turns rounding errors into
/// steps as large as any.
const ABSOLUTE: f64 = 1e-4;
const ABSOLUTE_KEY_BIAS: f64 = 2e-3;

/// Trains as the file says and compares losses, final weights, their moving average, and the answers of both.
///
/// # Errors
/// When an input is missing or does not fit the model, or the description names no objective.
pub fn check(file: &Archive, network: &mut Network, report: &mut Report) -> Result<()> {
    let initial = network.weights.clone();
    let result = train(file, network, &initial, report);
    network.weights = initial;
    result
}

fn train(file: &Archive, network: &mut Network, initial: &[f32], report: &mut Report) -> Result<()> {
    let meaning = file.meaning();
    let words = meaning.split([' ', ',', '(', ')', ';']);
    let objective = words.filter_map(|word| Objective::parse(&word.replace('/', "_"))).next();
    let Some(objective) = objective.filter(|objective| objective.weight != LossWeight::Uncertainty) else {
        return Err(
            file.error("must say in its metadata which SCHEDULE/WEIGHT it trains, such as cosine/constant".into())
        );
    };
    let lr = number_after(meaning, "lr ").unwrap_or(1e-4);
    let weight_decay = number_after(meaning, "wd ").or(number_after(meaning, "weight decay ")).unwrap_or(0.0);
    let ema_decay = number_after(meaning, "EMA ").unwrap_or(0.9999);
    let [steps, batch] = file.shape("t")? else {
        return Err(file.error("tensor 't' must have the shape [steps, batch]".into()));
    };
    let (steps, batch) = (*steps, *batch);
    let images = network.images(batch);
    let all_images = [&[steps], &images[..]].concat();
    let (x_start, noise) = (file.f32s_of("x_start", &all_images)?, file.f32s_of("noise", &all_images)?);
    let (t, y) = (file.indices("t", &[steps, batch])?, file.indices("y", &[steps, batch])?);
    let per_step = images.iter().product::<usize>();
    let mut ema = initial.to_vec();
    let (mut first, mut second) = (vec![0.0; initial.len()], vec![0.0; initial.len()]);
    let mut losses = Vec::with_capacity(steps);
    for step in 0..steps {
        let batch = Batch {
            x_start: x_start[step * per_step..][..per_step].to_vec(),
            noise: noise[step * per_step..][..per_step].to_vec(),
            t: t[step * batch..][..batch].to_vec(),
            y: y[step * batch..][..batch].to_vec(),
            log_variances: [0.0; CLUSTERS],
        };
        losses.push(evaluate(network, &batch, objective)?.total);
        let number = step as u64 + 1;
        let (beta1, beta2, eps, grad_scale) = (0.9, 0.999, 1e-8, 1.0);
        let update = Update { lr, beta1, beta2, eps, weight_decay, ema_decay, grad_scale };
        adamw(&mut network.weights, &mut ema, &mut first, &mut second, &network.grads, number, update);
    }
    // Share of the weights' way that the average has followed.
    let followed = 1.0 - ema_decay.powf(steps as f64);
    for name in file.names() {
        let row = format!("{} {name}", file.stem);
        let reference = file.f64s(&name)?;
        match name.as_str() {
            "x_start" | "noise" | "t" | "y" | "probe_x" | "probe_t" | "probe_y" => {}
            "loss_per_step" => report.compare(row, &losses, &reference, |f, r| vec![Check::each(f, r, 5e-6)]),
            "probe_out" | "probe_out_ema" => {
                let weights = if name == "probe_out" { network.weights.clone() } else { ema.clone() };
                let out = probe(file, network, weights)?;
                report.compare(row, &widen(&out), &reference, |f, r| vec![Check::max(f, r, 3e-5)]);
            }
            _ => {
                let parsed = name.split_once('.').and_then(|(what, rest)| Some((what, network.dit.layout.get(rest)?)));
                let Some((what @ ("updnorm" | "final" | "ema"), entry)) = parsed else {
                    report.fail(row, "this tensor is not understood".into());
                    continue;
                };
                let range = entry.param.range();
                let keys = network.key_bias(&entry.name);
                let start = widen(&initial[range.clone()]);
                let found = widen(if what == "ema" { &ema[range] } else { &network.weights[range] });
                match what {
                    "updnorm" => {
                        // Without the keys, whose true update is 0.
                        let update = without(&keys, &difference(&found, &start));
                        let norm = update.iter().map(|u| u * u).sum::<f64>().sqrt();
                        report.compare(row, &[norm], &reference, |f, r| vec![Check::each(f, r, 2e-3)]);
                    }
                    "final" => report.compare(row, &found, &reference, |f, r| {
                        let (f, r) = (difference(f, &start), difference(r, &start));
                        updates(&keys, &f, &r)
                    }),
                    _ => report.compare(row, &found, &reference, |f, r| {
                        // The tolerance of the weights, scaled by the way, and the rounding of f32: in every step, and of
                        // the reference itself.
                        let rounding = 5e-8 * (steps + 2) as f64 * r.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
                        average(&keys, f, r, followed, rounding)
                    }),
                }
            }
        }
    }
    Ok(())
}

/// Checks of an update: as a whole without the keys, and element by element.
fn updates(keys: &Option<std::ops::Range<usize>>, found: &[f64], reference: &[f64]) -> Vec<Check> {
    let (f, r) = (without(keys, found), without(keys, reference));
    let mut checks = vec![Check::l2(&f, &r, 2e-3), Check::absolute(&f, &r, ABSOLUTE)];
    if let Some(keys) = keys {
        let keys = keys.clone();
        checks.push(Check::absolute(&found[keys.clone()], &reference[keys], ABSOLUTE_KEY_BIAS).named("keys"));
    }
    checks
}

/// Checks of a moving average that has followed the weights by the share `followed` of their way.
fn average(
    keys: &Option<std::ops::Range<usize>>,
    found: &[f64],
    reference: &[f64],
    followed: f64,
    rounding: f64,
) -> Vec<Check> {
    let (f, r) = (without(keys, found), without(keys, reference));
    let mut checks = vec![Check::absolute(&f, &r, ABSOLUTE * followed + rounding)];
    if let Some(keys) = keys {
        let (f, r) = (&found[keys.clone()], &reference[keys.clone()]);
        checks.push(Check::absolute(f, r, ABSOLUTE_KEY_BIAS * followed + rounding).named("keys"));
    }
    checks
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

fn without(keys: &Option<std::ops::Range<usize>>, x: &[f64]) -> Vec<f64> {
    let keys = keys.clone().unwrap_or(0..0);
    x.iter().enumerate().filter(|(i, _)| !keys.contains(i)).map(|(_, &v)| v).collect()
}

/// The model's answer to the probe with `weights`.
fn probe(file: &Archive, network: &mut Network, weights: Vec<f32>) -> Result<Vec<f32>> {
    let batch = file.shape("probe_t")?.first().copied().unwrap_or(0);
    let x = file.f32s_of("probe_x", &network.images(batch))?;
    let (t, y) = (file.indices("probe_t", &[batch])?, file.indices("probe_y", &[batch])?);
    let trained = std::mem::replace(&mut network.weights, weights);
    let out = network.forward(&x, &t, &y);
    network.weights = trained;
    out
}
