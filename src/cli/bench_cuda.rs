//! `dtr-fused bench --device cuda`: a training step by the device's own clock.

use super::bench::{batch, data};
use crate::backend::cuda::clock::KernelTime;
use crate::backend::cuda::{DType, Device};
use crate::error::{Error, Result};
use crate::model::config::TASKS;
use crate::model::flops::forward_flops;
use crate::train::{TrainConfig, plan, timing};
use std::sync::Arc;

/// What was measured.
#[derive(Debug, serde::Serialize)]
struct Report {
    device: String,
    model: String,
    routing: String,
    beta: f64,
    precision: String,
    image_size: usize,
    in_channels: usize,
    num_classes: usize,
    grad_accumulation: usize,
    batch_size: usize,
    parameters: usize,
    /// By the events of the device.
    step_seconds: f64,
    /// By the clock of the host, with the next batch made ready meanwhile.
    host_seconds: f64,
    images_per_s: f64,
    /// Products computed in a step (forward and backward), in 1e9 operations a second.
    step_gflop_per_s: f64,
    /// Products of a step, in 1e9 operations.
    step_gflop: f64,
    /// Those that the dense model would take on top.
    step_gflop_saved: f64,
    /// Device memory for activations and inputs, in bytes.
    activation_bytes: usize,
    /// With `--profile`: one more step by kernel.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profile: Vec<KernelTime>,
}

/// Measures, and prints a table or one JSON object.
///
/// # Errors
/// On the simulated device, whose times say nothing; and as training.
pub(super) fn run(
    config: &TrainConfig,
    device: &Arc<Device>,
    elem: DType,
    runs: usize,
    json: bool,
    profiled: bool,
) -> Result<()> {
    if device.is_simulated() {
        return Err(Error::usage(format!(
            "times mean nothing on the {}: bench needs a GPU or --device cpu, and `cargo bench --bench cuda` counts work without one",
            device.name()
        )));
    }
    let (learner, times) = timing::time_steps(config, device, elem, runs, profiled)?;
    let b = config.batch_size;
    let windows: Vec<_> = (0..b).map(|i| learner.dit.windows()[(2 * i + 1) * TASKS / (2 * b)]).collect();
    let flops = forward_flops(&learner.dit.config, &windows);
    let report = Report {
        device: device.name().into(),
        model: config.model.clone(),
        routing: config.routing.to_string(),
        beta: config.beta,
        precision: config.precision.to_string(),
        image_size: config.image_size,
        in_channels: config.in_channels,
        num_classes: config.num_classes,
        grad_accumulation: config.grad_accumulation,
        batch_size: b,
        parameters: times.parameters,
        step_seconds: times.device_seconds,
        host_seconds: times.host_seconds,
        images_per_s: b as f64 / times.host_seconds,
        step_gflop_per_s: 3.0 * flops.done / times.device_seconds / 1e9,
        step_gflop: 3.0 * flops.done / 1e9,
        step_gflop_saved: 3.0 * (flops.dense - flops.done) / 1e9,
        activation_bytes: times.memory,
        profile: times.kernels,
    };
    if json {
        println!("{}", serde_json::to_string(&report).map_err(|e| Error::Stopped(e.to_string()))?);
        return Ok(());
    }
    let row = |name: &str, value: String| println!("{name:<16}{value}");
    row("device", report.device);
    row("model", format!("{}, {:.1} M parameters", report.model, report.parameters as f64 / 1e6));
    row("routing", format!("{}, beta {}", report.routing, report.beta));
    row("data", data(config));
    row("batch", format!("{} in {}", batch(config), report.precision));
    let step = report.step_seconds * 1e3;
    row("training step", format!("{step:.2} ms on the device, {:.0} GFLOP/s", report.step_gflop_per_s));
    row("with the host", format!("{:.2} ms, {:.1} images/s", report.host_seconds * 1e3, report.images_per_s));
    let saved = 100.0 * report.step_gflop_saved / (report.step_gflop + report.step_gflop_saved);
    row(
        "products",
        format!("{:.1} GFLOP a step, {saved:.1} % of the dense model's saved by skipping", report.step_gflop),
    );
    row("activations", plan::readable(report.activation_bytes));
    print!("{}", table(&report.profile));
    Ok(())
}

/// `profile`: a row for each kernel, and their sum; nothing for none.
fn table(kernels: &[KernelTime]) -> String {
    if kernels.is_empty() {
        return String::new();
    }
    let line = |kernel: &str, launches: usize, seconds: f64, share: f64| {
        format!("{kernel:<32}{launches:>8}{:>10.3}{:>7.1}\n", seconds * 1e3, 100.0 * share)
    };
    let (launches, seconds) = kernels.iter().fold((0, 0.0), |sum, k| (sum.0 + k.launches, sum.1 + k.seconds));
    let mut text = format!("\n{:<32}launches        ms      %\n", "kernel");
    for k in kernels {
        text += &line(k.kernel, k.launches, k.seconds, k.seconds / seconds);
    }
    text += &line("sum", launches, seconds, 1.0);
    text + "One more step, launched kernel by kernel: gaps between launches make it slower than the step above, which is a graph.\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_each_kernel_and_their_sum() {
        assert_eq!(table(&[]), "");
        let time = |kernel, launches, seconds| KernelTime { file: "x", kernel, launches, seconds };
        let text = table(&[time("attention_fwd", 28, 0.075), time("adamw", 1, 0.025)]);
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["kernel", "launches", "ms", "%"]);
        assert_eq!(rows[2], ["attention_fwd", "28", "75.000", "75.0"]);
        assert_eq!(rows[3], ["adamw", "1", "25.000", "25.0"]);
        assert_eq!(rows[4], ["sum", "29", "100.000", "100.0"]);
        let widths: Vec<usize> = text.lines().skip(1).take(4).map(str::len).collect();
        assert_eq!(widths, [widths[0]; 4], "columns are not aligned:\n{text}");
    }
}
