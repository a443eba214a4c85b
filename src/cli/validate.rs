//! `dtr-fused validate`.

use clap::Args;
use serde::Serialize;

use super::compute::ComputeArgs;
use super::info::row;
use super::offered::offered;
use super::source::{Source, SourceArgs, source};
use crate::autograd::cuda::DeviceWeights;
use crate::autograd::{Memory, Weights};
use crate::backend::Compute;
use crate::diffusion::LossWeight;
use crate::error::{Error, Result};
use crate::model::dit::Dit;
use crate::train::config::MOST_REPEATS;
use crate::train::metrics::{self, Means};
use crate::train::progress::Progress;
use crate::train::validation::{Validated, Validation};
use crate::train::weights::read_weights;
use crate::train::{TrainConfig, setup, trainer};

const EXAMPLES: &str = "\
Examples:
  dtr-fused validate --checkpoint runs/digits-paper-0001       on what the run was validated on
  dtr-fused validate --checkpoint runs/pets-0001 --data pets-test
  dtr-fused validate --checkpoint DiT-XL-2.safetensors --data latents.npy --json

Every sample has a timestep and noise of its own, the same for every model. So values on the
same data, with the same --seed, differ by the models alone, if these have the same noise schedule,
which is that of training, and the same loss weight: --loss-weight constant for all of them, say.
";

/// Measure the loss of a model on data that it has not learned from
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ValidateArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Samples of the model's sizes and classes: digits, a folder of images, or an array file [default: those that the run was
    /// validated on]
    #[arg(long, value_name = "digits|DIR|FILE")]
    data: Option<String>,
    /// Seed of noise and timesteps [default: 0; the run's validation_seed without --data]
    #[arg(long, allow_negative_numbers = true)]
    seed: Option<u64>,
    /// Times that each sample is measured, with other noise and timesteps: the mean over more is less noisy [default: 1; the run's
    /// validation_repeats without --data]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    repeats: Option<usize>,
    /// Weight of the loss by timestep: constant (none), min-snr-5 (any number) or p2 (or p2-GAMMA-K) [default: that of training]
    #[arg(long, value_name = "constant|min-snr-5|p2", hide_possible_values = true, value_parser = offered::<LossWeight>("constant|min-snr-5|p2"))]
    loss_weight: Option<LossWeight>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

pub(super) fn run(args: ValidateArgs) -> Result<()> {
    let Source { mut config, name, weights: file, names, note: assumed } = source(&args.source)?;
    args.compute.put_into(&mut config)?;
    if args.loss_weight == Some(LossWeight::Uncertainty) {
        return Err(Error::usage("uw learns its weights in training: give another --loss-weight, such as constant"));
    }
    config.loss_weight = args.loss_weight.unwrap_or(config.loss_weight);
    let samples = match &args.data {
        Some(what) => setup::validation_data(&config, what, names)?,
        None if file == name => return Err(Error::usage("a file of weights names no data: give --data")),
        None => setup::validated_data(&config, &name)?,
    };
    let (seed, repeats) =
        if args.data.is_some() { (0, 1) } else { (config.validation_seed, config.validation_repeats) };
    let (validation_seed, validation_repeats) = (args.seed.unwrap_or(seed), args.repeats.unwrap_or(repeats));
    if !(1..=MOST_REPEATS).contains(&validation_repeats) {
        let what = format!("--repeats is {validation_repeats}, but it must be between 1 and {MOST_REPEATS}");
        return Err(Error::usage(what));
    }
    let (compute, note) = args.compute.open(&config)?;
    let dit = Dit::new(config.model_config())?;
    let of_seed = TrainConfig { validation_seed, validation_repeats, ..config.clone() };
    let mut validation = Validation::new(samples, &of_seed, &dit, matches!(compute, Compute::Cuda { .. }))?;
    let in_main_memory = match &compute {
        Compute::Cpu { .. } => validation.at_once(),
        Compute::Cuda { elem, .. } => config.model_config().check_cuda(*elem).map(|()| 0)?,
    };
    setup::check_inference_memory(&config, in_main_memory, "validating", "a machine with more memory can")?;
    let mut weights = vec![0.0; dit.layout.len()];
    read_weights(&file, &dit, &mut weights)?;

    let measured = validation.measured() as u64;
    let mut progress = Progress::new("validating", 0, measured);
    assumed.iter().chain(&note).map(String::as_str).chain(validation.note()).for_each(|note| progress.say(note));
    let schedule = config.noise_schedule()?;
    let means = trainer::in_pool(&config, || {
        let uploaded = DeviceWeights::upload_to(&compute, &weights)?;
        let of = Validated {
            dit: &dit,
            weights: uploaded.as_ref().map_or(Weights::Cpu(&weights), Weights::Cuda),
            memory: &mut Memory::on(&compute),
            schedule: &schedule,
            loss_weight: config.loss_weight,
        };
        validation.means(of, &of_seed, |done| {
            progress.set(done as u64, "");
            Ok(())
        })
    });
    if means.is_ok() {
        progress.set(measured, "");
    }
    progress.finish();
    validation.take_warnings().iter().for_each(|warning| progress.say(warning));
    let means = means?;
    let (checkpoint, loss_weight) = (name.display().to_string(), config.loss_weight.to_string());
    let (damaged, repeats) = (validation.damaged(), validation_repeats);
    let samples = validation.len() - damaged;
    show(&Report { checkpoint, samples, damaged, repeats, loss_weight, means: &means }, args.json);
    Ok(())
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    checkpoint: String,
    samples: usize,
    damaged: usize,
    repeats: usize,
    loss_weight: String,
    #[serde(flatten)]
    means: &'a Means,
}

fn show(report: &Report, as_json: bool) {
    if as_json {
        println!("{}", serde_json::to_string(report).expect("numbers and names"));
        return;
    }
    let text = |loss: Option<f64>| loss.map_or("not finite".into(), metrics::loss_text);
    let means = report.means;
    row("checkpoint", &report.checkpoint);
    row("samples", report.samples);
    if report.damaged > 0 {
        row("damaged", report.damaged);
    }
    if report.repeats > 1 {
        row("repeats", report.repeats);
    }
    row("loss weight", &report.loss_weight);
    let error = means.loss_stderr.map_or(String::new(), |error| format!(" ± {}", metrics::loss_text(error)));
    row("loss", text(means.loss) + &error);
    for (name, loss) in [("mse", means.mse), ("vb", means.vb)] {
        row(name, text(loss));
    }
    for (k, loss) in means.loss_by_timestep.iter().enumerate().filter(|(_, loss)| loss.is_some()) {
        row(&format!("  t {}", metrics::octile_name(k)), text(*loss));
    }
}
