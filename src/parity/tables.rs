//! `masks`, `schedules`, `nll`: tables that need no model.

use super::archive::Archive;
use super::report::{Check, Report};
use crate::diffusion::reference::{discretized_log_likelihood, normal_kl};
use crate::diffusion::{Schedule, ScheduleKind, space_timesteps};
use crate::error::Result;
use crate::model::config::TASKS;
use crate::routing::windows;

/// Most channels and timesteps of a table: no network has more.
const LIMIT: usize = 1 << 20;

/// Windows: `C{C}_beta{beta}_alpha{alpha}.start` `[tasks]` and `.width` `[1]`.
///
/// # Errors
/// When a tensor cannot be read.
pub fn check_masks(file: &Archive, report: &mut Report) -> Result<()> {
    for name in file.names() {
        let row = format!("{} {name}", file.stem);
        let Some((group, part)) = parse_mask(&name) else {
            report.fail(row, "this tensor is not understood".into());
            continue;
        };
        let (channels, beta, alpha) = group;
        let stem = name.rsplit_once('.').map_or("", |(stem, _)| stem);
        let tasks = file.shape(&format!("{stem}.start"))?.iter().product::<usize>();
        if channels > LIMIT || tasks > LIMIT {
            report.fail(row, format!("{channels} channels of {tasks} timesteps are more than any network has"));
            continue;
        }
        let expected = windows(tasks, channels, alpha, beta)?;
        let found: Vec<f64> = match part {
            "start" => expected.iter().map(|w| w.start as f64).collect(),
            _ => vec![expected[0].width as f64],
        };
        report.compare(row, &found, &file.f64s(&name)?, |f, r| vec![Check::exact(f, r)]);
    }
    Ok(())
}

fn parse_mask(name: &str) -> Option<((usize, f64, f64), &str)> {
    let (group, part) = name.rsplit_once('.')?;
    let (channels, rest) = group.strip_prefix('C')?.split_once("_beta")?;
    let (beta, alpha) = rest.split_once("_alpha")?;
    let numbers = (channels.parse().ok()?, beta.parse().ok()?, alpha.parse().ok()?);
    ["start", "width"].contains(&part).then_some((numbers, part))
}

/// Noise schedules: `{linear|cosine}_{full|RESPACING}.{array}` and `space_timesteps[_STEPS].RESPACING`.
///
/// # Errors
/// When a tensor cannot be read, or a name asks for a schedule that cannot be.
pub fn check_schedules(file: &Archive, report: &mut Report) -> Result<()> {
    for name in file.names() {
        let row = format!("{} {name}", file.stem);
        let reference = file.f64s(&name)?;
        if let Some(rest) = name.strip_prefix("space_timesteps") {
            let (steps, respacing) = rest.split_once('.').unwrap_or(("", ""));
            let steps = if steps.is_empty() { Some(TASKS) } else { steps[1..].parse().ok().filter(|&n| n <= LIMIT) };
            let Some(steps) = steps else {
                report.fail(row, "its name has no number of timesteps".into());
                continue;
            };
            let found: Vec<f64> = space_timesteps(steps, respacing)?.into_iter().map(f64::from).collect();
            report.compare(row, &found, &reference, |f, r| vec![Check::exact(f, r)]);
            continue;
        }
        let parsed = name.split_once('_').and_then(|(kind, rest)| Some((kind.parse().ok()?, rest.rsplit_once('.')?)));
        let Some((kind, (respacing, array))): Option<(ScheduleKind, _)> = parsed else {
            report.fail(row, "this tensor is not understood".into());
            continue;
        };
        let full = Schedule::new(kind, TASKS)?;
        let schedule = if respacing == "full" { full } else { full.respaced(&space_timesteps(TASKS, respacing)?)? };
        let found = match array {
            "betas" => &schedule.betas,
            "alphas_cumprod" => &schedule.alphas_cumprod,
            "alphas_cumprod_prev" => &schedule.alphas_cumprod_prev,
            "sqrt_alphas_cumprod" => &schedule.sqrt_alphas_cumprod,
            "sqrt_one_minus_alphas_cumprod" => &schedule.sqrt_one_minus_alphas_cumprod,
            "sqrt_recip_alphas_cumprod" => &schedule.sqrt_recip_alphas_cumprod,
            "sqrt_recipm1_alphas_cumprod" => &schedule.sqrt_recipm1_alphas_cumprod,
            "posterior_variance" => &schedule.posterior_variance,
            "posterior_log_variance_clipped" => &schedule.posterior_log_variance_clipped,
            "posterior_mean_coef1" => &schedule.posterior_mean_coef1,
            "posterior_mean_coef2" => &schedule.posterior_mean_coef2,
            "timestep_map" => {
                let map: Vec<f64> = schedule.timestep_map.iter().map(|&t| f64::from(t)).collect();
                report.compare(row, &map, &reference, |f, r| vec![Check::exact(f, r)]);
                continue;
            }
            _ => {
                report.fail(row, "this tensor is not understood".into());
                continue;
            }
        };
        // Others recompute the respaced product from 1 - beta, which loses digits.
        let tolerance = if array == "alphas_cumprod" && respacing != "full" { 6e-10 } else { 1e-12 };
        report.compare(row, found, &reference, |f, r| vec![Check::max(f, r, tolerance)]);
    }
    Ok(())
}

/// The discretised Gaussian log-likelihood with its derivatives, and the KL divergence, element by element.
///
/// # Errors
/// When an input is missing or has another length.
pub fn check_nll(file: &Archive, report: &mut Report) -> Result<()> {
    let n = file.shape("x")?.first().copied().unwrap_or(0);
    let read = |name: &str| -> Result<Vec<f64>> {
        file.check_shape(name, &[n])?;
        file.f64s(name)
    };
    let (x, mean, log_scale) = (read("x")?, read("means")?, read("log_scales")?);
    let z: Vec<f64> = (0..n).map(|i| ((x[i] - mean[i]) * (-log_scale[i]).exp()).abs()).collect();
    let found: Vec<_> = (0..n).map(|i| discretized_log_likelihood(x[i], mean[i], log_scale[i])).collect();
    for name in file.names() {
        let row = format!("{} {name}", file.stem);
        let found: Vec<f64> = match name.as_str() {
            "x" | "means" | "log_scales" | "kl_mean2" | "kl_logvar1" => continue,
            "ll" => found.iter().map(|(ll, _, _)| *ll).collect(),
            "dll_dmeans" => found.iter().map(|(_, d_mean, _)| *d_mean).collect(),
            "dll_dlog_scales" => found.iter().map(|(_, _, d_log_scale)| *d_log_scale).collect(),
            "kl" => {
                let (mean2, log_variance1) = (read("kl_mean2")?, read("kl_logvar1")?);
                let kl = (0..n).map(|i| normal_kl(mean[i], log_variance1[i], mean2[i], 2.0 * log_scale[i])).collect();
                let kl: Vec<f64> = kl;
                report.compare(row, &kl, &read(&name)?, |f, r| vec![Check::max(f, r, 2e-5)]);
                continue;
            }
            _ => {
                report.fail(row, "this tensor is not understood".into());
                continue;
            }
        };
        // Far from the mean the probability is a difference of almost equal numbers: nothing is asked of |z| >= 4, but
        // numbers must be finite there.
        let reference = read(&name)?;
        report.compare(row, &found, &reference, |found, reference| {
            let pick = |x: &[f64], from: f64, to: f64| -> Vec<f64> {
                x.iter().zip(&z).filter(|(_, z)| (from..to).contains(*z)).map(|(v, _)| *v).collect()
            };
            let far = (3.0, f64::INFINITY);
            vec![
                Check::absolute(&pick(found, 0.0, 3.0), &pick(reference, 0.0, 3.0), 1e-3).named("|z|<3"),
                Check::absolute(&pick(found, 3.0, 4.0), &pick(reference, 3.0, 4.0), 1e-2).named("|z|<4"),
                Check::absolute(&pick(found, far.0, far.1), &pick(reference, far.0, far.1), f64::MAX).named("finite"),
            ]
        });
    }
    Ok(())
}
