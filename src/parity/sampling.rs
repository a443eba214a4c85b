//! `sampling`: trajectories of the samplers.

use super::archive::{Archive, widen};
use super::network::Network;
use super::report::{Check, Report};
use crate::diffusion::{Method, Sampler, Schedule, ScheduleKind, space_timesteps};
use crate::error::Result;
use crate::model::config::TASKS;

/// What the name of a trajectory says: `METHOD_SCHEDULE_clip|noclip[_etaETA]`.
struct Variant {
    method: Method,
    schedule: ScheduleKind,
    clip: bool,
}

impl Variant {
    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.split('_');
        let (method, schedule, clip) = (parts.next()?, parts.next()?.parse().ok()?, parts.next()?);
        let eta = parts.next().map(|part| part.strip_prefix("eta")?.parse::<f64>().ok());
        let method = match (method, eta) {
            ("ddpm", None) => Method::Ddpm,
            ("ddim", None) => Method::Ddim { eta: 0.0 },
            ("ddim", Some(Some(eta))) => Method::Ddim { eta },
            _ => return None,
        };
        let clip = match clip {
            "clip" => true,
            "noclip" => false,
            _ => return None,
        };
        parts.next().is_none().then_some(Variant { method, schedule, clip })
    }
}

/// Compares every trajectory of the file.
///
/// # Errors
/// When an input is missing or does not fit the model.
pub fn check(file: &Archive, network: &mut Network, report: &mut Report) -> Result<()> {
    let rows = file.shape("z")?.first().copied().unwrap_or(0);
    let images = network.images(rows);
    let z = file.f32s_of("z", &images)?;
    let y = file.indices("y", &[rows])?;
    let steps = file.shape("timestep_map")?.first().copied().unwrap_or(0);
    let kept = file.indices("timestep_map", &[steps])?;
    let noise = file.f32s_of("step_noise", &[&[steps], &images[..]].concat())?;
    let scale = number_after(file.meaning(), "scale ").unwrap_or(1.5);
    let mut done: Option<(String, Vec<f32>)> = None;
    for name in file.names() {
        let row = format!("{} {name}", file.stem);
        match name.as_str() {
            "z" | "y" | "step_noise" => continue,
            "timestep_map" => {
                let respacing = file.meaning().split_once("respacing '").and_then(|(_, rest)| rest.split_once('\''));
                let respacing = respacing.map_or(steps.to_string(), |(respacing, _)| respacing.to_string());
                let found: Vec<f64> = space_timesteps(TASKS, &respacing)?.into_iter().map(f64::from).collect();
                report.compare(row, &found, &file.f64s(&name)?, |f, r| vec![Check::exact(f, r)]);
                continue;
            }
            _ => {}
        }
        let Some((variant_name, part @ ("traj" | "final"))) = name.rsplit_once('.') else {
            report.fail(row, "this tensor is not understood".into());
            continue;
        };
        let Some(variant) = Variant::parse(variant_name) else {
            report.fail(row, "its name is no sampler: it must be like ddim_cosine_clip_eta0.5".into());
            continue;
        };
        if done.as_ref().is_none_or(|(done, _)| done != variant_name) {
            let trajectory = run(network, &variant, &kept, scale, &z, &y, &noise)?;
            done = Some((variant_name.to_string(), trajectory));
        }
        let (_, trajectory) = done.as_ref().expect("set above");
        let found = if part == "traj" { &trajectory[..] } else { &trajectory[trajectory.len() - z.len()..] };
        // Each step by its own largest value.
        report.compare(row, &widen(found), &file.f64s(&name)?, |f, r| {
            f.chunks(z.len()).zip(r.chunks(z.len())).map(|(f, r)| step_check(f, r, variant.clip)).collect()
        });
    }
    Ok(())
}

/// Clipped samples are of size 1, so that an absolute tolerance fits them. But the noise that a network adds before the
/// last step may be of any size when its variance is untrained; then the relative tolerance is the wider one.
fn step_check(found: &[f64], reference: &[f64], clip: bool) -> Check {
    const RELATIVE: f64 = 5e-5;
    let largest = reference.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    match clip {
        true => Check::absolute(found, reference, f64::max(1e-3, RELATIVE * largest)),
        false => Check::max(found, reference, RELATIVE),
    }
}

/// The state after every step, `[steps, R, IC, H, W]`.
fn run(
    network: &mut Network,
    variant: &Variant,
    kept: &[u32],
    scale: f64,
    z: &[f32],
    y: &[u32],
    noise: &[f32],
) -> Result<Vec<f32>> {
    let schedule = Schedule::new(variant.schedule, TASKS)?.respaced(kept)?;
    let sampler = Sampler::new(schedule, variant.method, variant.clip, Some(scale))?;
    let (mut x, mut trajectory, dims) = (z.to_vec(), Vec::new(), network.dims());
    sampler.sample(
        &mut x,
        |x, t, out| {
            out.copy_from_slice(&network.forward(x, &vec![t; y.len()], y)?);
            Ok(())
        },
        |k, out| out.copy_from_slice(&noise[k * z.len()..][..z.len()]),
        |_, x| {
            trajectory.extend_from_slice(x);
            Ok(())
        },
        dims,
    )?;
    Ok(trajectory)
}

/// The number that follows `key` in a description.
pub fn number_after(text: &str, key: &str) -> Option<f64> {
    let rest = text.split_once(key)?.1;
    let end = rest.find(|c: char| !(c.is_ascii_digit() || ".eE+-".contains(c))).unwrap_or(rest.len());
    let number = rest[..end].trim_end_matches(['.', '-', '+', 'e', 'E']);
    number.parse().ok().filter(|n: &f64| n.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_absolute_tolerance_yields_only_to_large_states() {
        assert!(step_check(&[1.0009], &[1.0], true).passes() && !step_check(&[1.0011], &[1.0], true).passes());
        assert!(!step_check(&[1.0009], &[1.0], false).passes());
        assert!(step_check(&[1000.04], &[1000.0], true).passes() && !step_check(&[1000.06], &[1000.0], true).passes());
        for (found, reference) in
            [(f64::NAN, 1.0), (1.0, f64::NAN), (f64::INFINITY, f64::INFINITY), (1.0, f64::INFINITY)]
        {
            assert!(!step_check(&[found], &[reference], true).passes(), "{found} {reference}");
        }
    }

    #[test]
    fn names_of_samplers() {
        let variant = Variant::parse("ddim_cosine_clip_eta0.5").unwrap();
        assert!(variant.clip && variant.method == Method::Ddim { eta: 0.5 });
        assert!(!Variant::parse("ddpm_linear_noclip").unwrap().clip);
        for bad in ["", "ddpm", "ddpm_linear", "ddpm_linear_clip_eta0", "ddim_linear_clip_x", "plms_linear_clip"] {
            assert!(Variant::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn numbers_in_descriptions() {
        assert_eq!(number_after("AdamW (lr 1e-4, wd 0.0), x", "lr "), Some(1e-4));
        assert_eq!(number_after("scale 1.5, batch", "scale "), Some(1.5));
        assert_eq!(number_after("weight decay 0.1.", "decay "), Some(0.1));
        assert_eq!(number_after("lr none", "lr "), None);
        assert_eq!(number_after("", "lr "), None);
    }
}
