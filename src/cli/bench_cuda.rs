//! `dtr-fused bench --device cuda`: a training step by the device's own clock.

use crate::backend::Compute;
use crate::error::{Error, Result};
use crate::model::config::TASKS;
use crate::model::flops::forward_flops;
use crate::train::{TrainConfig, plan, timing, trainer};

/// What was measured.
#[derive(Debug, serde::Serialize)]
struct Report {
    device: String,
    model: String,
    routing: String,
    beta: f64,
    precision: String,
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
}

/// Measures, and prints a table or one JSON object.
///
/// # Errors
/// On the simulated device, whose times say nothing; and as training.
pub(super) fn run(config: &TrainConfig, runs: usize, json: bool) -> Result<()> {
    let (compute, _) = trainer::compute(config)?;
    let Compute::Cuda { device, elem } = compute else {
        return Err(Error::usage(format!("'{}' is no CUDA device", config.device)));
    };
    if device.is_simulated() {
        return Err(Error::usage(format!(
            "times mean nothing on the {}: bench needs a GPU, and `cargo bench --bench cuda` counts work without one",
            device.name()
        )));
    }
    let (learner, times) = timing::time_steps(config, &device, elem, runs)?;
    let b = config.batch_size;
    let windows: Vec<_> = (0..b).map(|i| learner.dit.windows()[(2 * i + 1) * TASKS / (2 * b)]).collect();
    let flops = forward_flops(&learner.dit.config, &windows);
    let report = Report {
        device: device.name().into(),
        model: config.model.clone(),
        routing: config.toml_of("routing").trim_matches('"').into(),
        beta: config.beta,
        precision: config.toml_of("precision").trim_matches('"').into(),
        batch_size: b,
        parameters: times.parameters,
        step_seconds: times.device_seconds,
        host_seconds: times.host_seconds,
        images_per_s: b as f64 / times.host_seconds,
        step_gflop_per_s: 3.0 * flops.done / times.device_seconds / 1e9,
        step_gflop: 3.0 * flops.done / 1e9,
        step_gflop_saved: 3.0 * (flops.dense - flops.done) / 1e9,
        activation_bytes: times.memory,
    };
    if json {
        println!("{}", serde_json::to_string(&report).map_err(|e| Error::Stopped(e.to_string()))?);
        return Ok(());
    }
    let row = |name: &str, value: String| println!("{name:<16}{value}");
    row("device", report.device);
    row("model", format!("{}, {:.1} M parameters", report.model, report.parameters as f64 / 1e6));
    row("routing", format!("{}, beta {}", report.routing, report.beta));
    row("batch", format!("{b} images in {}", report.precision));
    let step = report.step_seconds * 1e3;
    row("training step", format!("{step:.2} ms on the device, {:.0} GFLOP/s", report.step_gflop_per_s));
    row("with the host", format!("{:.2} ms, {:.1} images/s", report.host_seconds * 1e3, report.images_per_s));
    let saved = 100.0 * report.step_gflop_saved / (report.step_gflop + report.step_gflop_saved);
    row(
        "products",
        format!("{:.1} GFLOP a step, {saved:.1} % of the dense model's saved by skipping", report.step_gflop),
    );
    row("activations", plan::readable(report.activation_bytes));
    Ok(())
}
