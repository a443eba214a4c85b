//! `dtr-fused bench`.

use std::time::Instant;

use clap::Args;

use super::bench_cuda;
use super::knobs::KnobFlags;
use crate::autograd::Weights;
use crate::backend::Compute;
use crate::backend::cpu::profile::{Entry, profile};
use crate::diffusion::sampler::{Method, Sampler};
use crate::error::{Error, Result};
use crate::generate::{Generator, IMAGES_AT_ONCE, predict};
use crate::model::config::TASKS;
use crate::model::flops::forward_flops;
use crate::model::parts::{largest_part, parts};
use crate::rng::{Philox, Stream};
use crate::train::learner::{Batch, Learner, Losses};
use crate::train::progress::say;
use crate::train::{TrainConfig, setup, trainer};

const EXAMPLES: &str = "\
Examples:
  dtr-fused bench                                       the digits model
  dtr-fused bench --model DiT-S/2 --batch-size 8 --routing sublayer --beta 0.5
  dtr-fused bench --model DiT-S/2 --batch-size 8 --threads 1 --json
  dtr-fused bench --model DiT-S/4 --profile             where the time of a step goes
DiT models are timed on 32 x 32 x 4 latents of 1000 classes unless --image-size, --in-channels, --num-classes say otherwise.
";

/// Time a training step, a forward pass and a sampling step of a model on random data
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct BenchArgs {
    /// How many of each are timed, after two that are not
    #[arg(long, default_value_t = 7, allow_negative_numbers = true)]
    runs: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Also print where the time of a step goes, by operation; on a GPU, by kernel
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    knobs: KnobFlags,
}

/// What was measured.
#[derive(Debug, serde::Serialize)]
struct Report {
    model: String,
    routing: String,
    beta: f64,
    image_size: usize,
    in_channels: usize,
    num_classes: usize,
    batch_size: usize,
    grad_accumulation: usize,
    threads: usize,
    precision: String,
    parameters: usize,
    step_seconds: f64,
    /// Of a batch with the timesteps of the training step.
    forward_seconds: f64,
    /// A DDIM step of the batch without guidance: a forward pass at one timestep, and the next images.
    sampling_seconds: f64,
    /// Processor time of all threads in a step and in a forward pass, when the system tells. Less than the time times the
    /// threads: other processes had the processor, or threads waited.
    step_cpu_seconds: Option<f64>,
    forward_cpu_seconds: Option<f64>,
    images_per_s: f64,
    /// Products computed in a step (forward and backward), in 1e9 operations a second.
    step_gflop_per_s: f64,
    /// The same of a forward pass.
    forward_gflop_per_s: f64,
    /// Products of a step, in 1e9 operations.
    step_gflop: f64,
    /// Those that the dense model would take on top.
    step_gflop_saved: f64,
    /// Highest memory use of the process, when the system tells.
    peak_memory_mb: Option<f64>,
    /// With `--profile`: a step by operation, the mean of as many runs again.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profile: Vec<Entry>,
    /// With `--profile`: the mean time of those runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    profile_seconds: Option<f64>,
}

pub(super) fn run(args: BenchArgs) -> Result<()> {
    if !(1..=1_000_000).contains(&args.runs) {
        return Err(Error::usage(format!("--runs is {}, but it must be between 1 and 1000000", args.runs)));
    }
    // Whoever gives these expects other numbers than without them.
    for (key, instead) in [
        ("data", ": give --image-size, --in-channels and --num-classes for others"),
        ("data_kind", ""),
        ("init_from", ""),
        ("validation_data", ""),
        ("out", ""),
    ] {
        if args.knobs.layer.last(key).is_some() {
            let flag = key.replace('_', "-");
            return Err(Error::usage(format!(
                "--{flag} is of no use here: bench computes with random weights and data, and writes nothing{instead}"
            )));
        }
    }
    let mut config = TrainConfig::from_layers(std::slice::from_ref(&args.knobs.layer))?;
    // By the name that was given: a DiT of another depth is `custom` by now, and still one for latents.
    let latents = args.knobs.layer.last("model").is_some_and(|model| model.starts_with("DiT-"));
    let (size, channels, classes) = if latents { (32, 4, 1000) } else { (8, 1, 10) };
    let given = |value: usize, default| if value == 0 { default } else { value };
    config.image_size = given(config.image_size, size);
    config.in_channels = given(config.in_channels, channels);
    config.num_classes = given(config.num_classes, classes);
    config.validate()?;
    let (compute, note) = setup::compute(&config)?;
    note.iter().for_each(|note| say(note));
    if let Compute::Cuda { device, elem } = compute {
        return bench_cuda::run(&config, &device, elem, args.runs, args.json, args.profile);
    }
    let report = trainer::in_pool(&config, || measure(&config, args.runs, args.profile))?;
    if args.json {
        println!("{}", serde_json::to_string(&report).map_err(|e| Error::Stopped(e.to_string()))?);
        return Ok(());
    }
    let row = |name: &str, value: String| println!("{name:<16}{value}");
    row("model", format!("{}, {:.1} M parameters", report.model, report.parameters as f64 / 1e6));
    row("routing", format!("{}, beta {}", report.routing, report.beta));
    row("data", data(&config));
    row("batch", format!("{} in {}, {} threads", batch(&config), report.precision, report.threads));
    let (step, forward) = (report.step_seconds * 1e3, report.forward_seconds * 1e3);
    row(
        "training step",
        format!("{step:.1} ms, {:.1} images/s, {:.0} GFLOP/s", report.images_per_s, report.step_gflop_per_s),
    );
    row("forward pass", format!("{forward:.1} ms, {:.0} GFLOP/s", report.forward_gflop_per_s));
    row("sampling step", format!("{:.1} ms (DDIM, without guidance)", report.sampling_seconds * 1e3));
    let saved = 100.0 * report.step_gflop_saved / (report.step_gflop + report.step_gflop_saved);
    row(
        "products",
        format!("{:.1} GFLOP a step, {saved:.1} % of the dense model's saved by skipping", report.step_gflop),
    );
    if let Some(peak) = report.peak_memory_mb {
        row("peak memory", format!("{peak:.0} MB"));
    }
    print_profile(&report);
    Ok(())
}

/// What a step is trained on.
pub(super) fn data(config: &TrainConfig) -> String {
    let (size, channels) = (config.image_size, config.in_channels);
    format!("random, {channels} x {size} x {size} in {} classes", config.num_classes)
}

/// How many images a step has.
pub(super) fn batch(config: &TrainConfig) -> String {
    let parts = config.grad_accumulation;
    let parts = if parts == 1 { String::new() } else { format!(" in {parts} parts") };
    format!("{} images{parts}", config.batch_size)
}

fn measure(config: &TrainConfig, runs: usize, profiled: bool) -> Result<Report> {
    let mut learner = setup::learner(config)?;
    let (b, n) = (config.batch_size, config.in_channels * config.image_size * config.image_size);
    let rng = Philox::new(config.seed, Stream::Noise);
    let (mut x_start, mut noise) = (vec![0.0; b * n], vec![0.0; b * n]);
    rng.normal(&mut x_start, 0, 0);
    rng.normal(&mut noise, 0, 1);
    // adaLN-Zero starts with gates of zero, which no kernel must profit from.
    rng.normal(&mut learner.weights, 0, 2);
    learner.weights.iter_mut().for_each(|w| *w *= 0.02);
    let t: Vec<u32> = (0..b).map(|i| ((2 * i + 1) * TASKS / (2 * b)) as u32).collect();
    let labels: Vec<u32> = (0..b).map(|i| (i % config.num_classes) as u32).collect();
    let mut coefficients = vec![0.0; b];
    learner.coefficients(&mut coefficients);
    let batch = Batch { x_start: &x_start, noise: &noise, t: &t, labels: &labels, coefficients: &coefficients };
    let update = config.update_at(0, 0);
    // Parts of a step as training computes them.
    let part = b / config.grad_accumulation;
    let (mut found, mut losses) = (Losses::default(), vec![0.0; b]);
    let mut step = || {
        for first in (0..b).step_by(part) {
            let some = first..first + part;
            learner.gradients(batch.samples(some.clone()), first > 0, &mut found)?;
            losses[some].copy_from_slice(&found.loss);
        }
        learner.objective(&losses);
        learner.gradient_norm();
        learner.update(update, config.uw_lr);
        Ok(())
    };
    let (step_seconds, step_cpu_seconds) = median(runs, &mut step)?;
    let (mut entries, mut profile_seconds) = (Vec::new(), None);
    if profiled {
        let start = Instant::now();
        let (result, found) = profile(|| (0..runs).try_for_each(|_| step()));
        result?;
        profile_seconds = Some(start.elapsed().as_secs_f64() / runs as f64);
        entries = found;
        for entry in &mut entries {
            entry.calls /= runs;
            for total in [&mut entry.seconds, &mut entry.flops, &mut entry.bytes] {
                *total /= runs as f64;
            }
        }
    }
    // Two steps far from the ends of the schedule, where windows do not start or end with the channels.
    let schedule = learner.schedule.respaced(&[TASKS as u32 / 3, 2 * TASKS as u32 / 3])?;
    let sampler = Sampler::new(schedule, Method::Ddim { eta: 0.0 }, false, None)?;
    let Learner { dit, weights, memory, .. } = &mut learner;
    let out_len = dit.config.out_channels() * config.image_size * config.image_size;
    let mut out = vec![0.0; b * out_len];
    let at_once = largest_part(dit, part);
    let (forward_seconds, forward_cpu_seconds) = median(runs, || {
        for first in (0..b).step_by(part) {
            for some in parts(at_once, part) {
                let some = first + some.start..first + some.end;
                let (x, out) =
                    (&x_start[some.start * n..some.end * n], &mut out[some.start * out_len..some.end * out_len]);
                predict(dit, Weights::Cpu(weights), memory, x, &t[some.clone()], &labels[some], out)?;
            }
        }
        Ok(())
    })?;
    let at_once = at_once.min(IMAGES_AT_ONCE);
    let (both_seconds, _) = median(runs, || {
        let generator = Generator { dit, weights: Weights::Cpu(weights), sampler: &sampler, seed: config.seed };
        generator.images(memory, &labels, at_once, |_| Ok(())).map(std::hint::black_box)?;
        Ok(())
    })?;

    let windows: Vec<_> = t.iter().map(|&t| dit.windows()[t as usize]).collect();
    let flops = forward_flops(&dit.config, &windows);
    Ok(Report {
        model: config.model.clone(),
        routing: config.routing.to_string(),
        beta: config.beta,
        image_size: config.image_size,
        in_channels: config.in_channels,
        num_classes: config.num_classes,
        batch_size: b,
        grad_accumulation: config.grad_accumulation,
        threads: rayon::current_num_threads(),
        precision: config.precision.to_string(),
        parameters: dit.layout.len(),
        step_seconds,
        forward_seconds,
        sampling_seconds: both_seconds / sampler.steps() as f64,
        step_cpu_seconds,
        forward_cpu_seconds,
        images_per_s: b as f64 / step_seconds,
        step_gflop_per_s: 3.0 * flops.done / step_seconds / 1e9,
        forward_gflop_per_s: flops.done / forward_seconds / 1e9,
        step_gflop: 3.0 * flops.done / 1e9,
        step_gflop_saved: 3.0 * (flops.dense - flops.done) / 1e9,
        peak_memory_mb: peak_memory_mb(),
        profile: entries,
        profile_seconds,
    })
}

/// The step by operation, and what is left.
fn print_profile(report: &Report) {
    let Some(all) = report.profile_seconds else { return };
    println!("\noperation           sizes            pass      calls       ms      %  GFLOP/s   GB/s");
    let mut rest = all;
    for e in &report.profile {
        rest -= e.seconds;
        let sizes = format!("{} -> {}", e.sizes[0], e.sizes[1]);
        let pass = format!("{:?}", e.pass).to_lowercase();
        let share = 100.0 * e.seconds / all;
        let rate = |work: f64| work / e.seconds / 1e9;
        let (flops, bytes) = (rate(e.flops), rate(e.bytes));
        println!(
            "{:<20}{sizes:<17}{pass:<10}{:>5}{:>9.1}{share:>7.1}{flops:>9.0}{bytes:>7.1}",
            e.operation,
            e.calls,
            e.seconds * 1e3
        );
    }
    println!("{:<52}{:>9.1}{:>7.1}", "everything else", rest * 1e3, 100.0 * rest / all);
}

/// Median seconds of `work` over `runs`, after two that are not timed; and the mean processor time.
fn median(runs: usize, mut work: impl FnMut() -> Result<()>) -> Result<(f64, Option<f64>)> {
    for _ in 0..2 {
        work()?;
    }
    let mut seconds = Vec::with_capacity(runs);
    let before = cpu_seconds();
    for _ in 0..runs {
        let start = Instant::now();
        work()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let cpu = before.zip(cpu_seconds()).map(|(before, after)| (after - before) / runs as f64);
    seconds.sort_by(f64::total_cmp);
    Ok((seconds[runs / 2], cpu))
}

/// Processor time of all threads of this process so far; Linux tells.
fn cpu_seconds() -> Option<f64> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?;
    let of_task = |entry: std::io::Result<std::fs::DirEntry>| {
        let text = std::fs::read_to_string(entry.ok()?.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    };
    Some(tasks.filter_map(of_task).sum::<f64>() * 1e-9)
}

/// Highest resident memory of this process so far; Linux tells.
fn peak_memory_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kibibytes: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024.0 / 1e6)
}
