//! `forward`: output, gradient of the input, guided output, activations.

use super::archive::{Archive, widen};
use super::network::Network;
use super::report::{Check, Report};
use crate::diffusion::sampler::guide;
use crate::error::Result;

/// Activations that exist only inside a fused operation here.
const FUSED: [&str; 4] = ["attn_in", "attn", "mlp_in", "mlp"];

/// Compares everything in a forward file.
///
/// # Errors
/// When an input is missing or does not fit the model.
pub fn check(file: &Archive, network: &mut Network, report: &mut Report) -> Result<()> {
    let batch = file.shape("t")?.first().copied().unwrap_or(0);
    let images = network.images(batch);
    let x = file.f32s_of("x", &images)?;
    let (t, y) = (file.indices("t", &[batch])?, file.indices("y", &[batch])?);
    let out_shape = [batch, network.dit.config.out_channels(), images[2], images[3]];
    let upstream = match file.has("upstream") {
        true => file.f32s_of("upstream", &out_shape)?,
        false => vec![0.0; out_shape.iter().product()],
    };
    let traced = network.forward_backward(&x, &t, &y, |_| Ok(upstream.clone()))?;
    for name in file.names() {
        let row = format!("{} {name}", file.stem);
        let mut compare = |found: &[f32], tolerance: f64| -> Result<()> {
            report.compare(&row, &widen(found), &file.f64s(&name)?, |f, r| vec![Check::max(f, r, tolerance)]);
            Ok(())
        };
        match name.as_str() {
            "x" | "t" | "y" | "upstream" | "x_start" | "noise" => {}
            "out" => compare(&traced.out, 3e-5)?,
            "grad_x" if file.has("upstream") => compare(&traced.grad_x, 3e-5)?,
            _ => match (name.strip_prefix("out_cfg"), name.strip_prefix("act.")) {
                (Some(scale), _) if scale.parse::<f64>().is_ok_and(f64::is_finite) => {
                    let rows = file.shape(&name)?.first().copied().unwrap_or(0);
                    match guided(network, &x, &t, &y, rows, scale.parse().unwrap_or(1.0))? {
                        Some(out) => compare(&out, 3e-5)?,
                        None => report.fail(row, format!("has {rows} rows, expected twice 1 to {batch}")),
                    }
                }
                (_, Some(activation)) => {
                    let inside = activation.split_once('.').is_some_and(|(_, part)| FUSED.contains(&part));
                    match traced.activations.iter().find(|(known, _)| known == activation) {
                        Some((_, found)) => compare(found, if activation == "t_freq" { 2e-4 } else { 3e-5 })?,
                        None if inside => report.note(row, "it never leaves a fused operation"),
                        None => report.fail(row, "there is no such activation".into()),
                    }
                }
                _ => report.fail(row, "this tensor is not understood".into()),
            },
        }
    }
    Ok(())
}

/// Guided output of the first `rows / 2` samples: the batch is doubled, the second half has the null class.
fn guided(network: &mut Network, x: &[f32], t: &[u32], y: &[u32], rows: usize, scale: f64) -> Result<Option<Vec<f32>>> {
    let half = rows / 2;
    if half == 0 || !rows.is_multiple_of(2) || half > t.len() {
        return Ok(None);
    }
    let dims = network.dims();
    let null = network.dit.config.num_classes as u32;
    let x = x[..half * dims.elements()].repeat(2);
    let y = [&y[..half], &vec![null; half]].concat();
    let mut out = network.forward(&x, &t[..half].repeat(2), &y)?;
    guide(&mut out, scale, dims, dims.channels);
    Ok(Some(out))
}
