//! `dtr-fused sample`.

mod archive;
mod files;
mod labels;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use clap::Args;

use self::files::{All, Files};
use self::labels::{labels, part, range};
use super::compute::ComputeArgs;
use super::offered::offered;
use super::signals::{self, STOP};
use super::source::{Source, SourceArgs, source};
use crate::autograd::cuda::DeviceWeights;
use crate::autograd::{Memory, Weights as ModelWeights};
use crate::backend::Compute;
use crate::error::{Error, Result};
use crate::generate::{Generator, IMAGES_AT_ONCE, steps};
use crate::model::config::TASKS;
use crate::model::dit::Dit;
use crate::train::config::SamplerKind;
use crate::train::progress::{Progress, say};
use crate::train::weights::read_weights;
use crate::train::{samples, setup, trainer};

/// Most images that are computed at a time: with guidance they are twice as many samples, of which kernels take 65535.
const MOST_AT_ONCE: usize = 32_767;

const EXAMPLES: &str = "\
Examples:
  dtr-fused sample --checkpoint runs/digits-paper-0001
  dtr-fused sample --checkpoint runs/digits-paper-0001 --classes 3,7 --num 40 --cfg 2 --seed 1
  dtr-fused sample --checkpoint runs/digits-paper-0001 --num 5000 --sampler ddpm --npz samples.npz
  dtr-fused sample --checkpoint runs/digits-paper-0001 --num 5000 --only 2560..5000 --npz rest.npz
  dtr-fused sample --checkpoint runs/pets-0001 --classes cat,dog --sampler dpm++ --num 100 --images pets
  dtr-fused sample --checkpoint DiT-XL-2.safetensors --classes 207,360 --cfg 4 --npz latents.npz

A file of weights tells the sizes of its model, that of the images if it has pos_embed. Where
dtr-fused did not write it, routing is taken to be dense, the schedule linear and the heads those of
the DiT of this width and depth, as in the published weights; what was assumed is said. For weights
of the DTR paper's code, give --set routing=paper schedule=cosine.
";

/// Make images with a trained model: a PNG grid, a row a class, and an .npz or a folder of all for evaluation
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct SampleArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Sampling algorithm: ddim (deterministic with --eta 0, good with few steps), dpm++ (DPM-Solver++(2M): deterministic, good with fewer
    /// steps) or ddpm (ancestral)
    #[arg(long, value_name = SamplerKind::NAMES, value_parser = offered::<SamplerKind>(SamplerKind::NAMES), hide_possible_values = true, default_value_t = SamplerKind::Ddim)]
    sampler: SamplerKind,
    /// Denoising steps: a number, or for ddim and ddpm also ddimN, or A,B,.. for parts of the schedule; of latents the last four timesteps
    /// of the cosine schedule are none where the model predicts the noise [default: 50 for ddim, 20 for dpm++, 250 for ddpm]
    #[arg(long, allow_negative_numbers = true)]
    steps: Option<String>,
    /// Noise of ddim, as a share of that of ddpm
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    eta: f64,
    /// Strength of classifier-free guidance; 1 = none, 0 = of no class [default: 1.5; 1 for a model trained with label_dropout 0 or 1]
    #[arg(long, allow_negative_numbers = true)]
    cfg: Option<f64>,
    /// Timesteps that are guided, from A on and before B; others take half as long [default: all, 0..1000]
    #[arg(long, value_name = "A..B", allow_negative_numbers = true)]
    cfg_interval: Option<String>,
    /// Channels that are guided, from the first on: 3 of 4 in the published sampling script of DiT [default: all]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    cfg_channels: Option<usize>,
    /// Classes to make, with commas between them: numbers, ranges A..B (without B), or names if the data had some [default: all; without
    /// --num, --npz and --images, those that the grid has rows for]
    #[arg(long, allow_negative_numbers = true)]
    classes: Vec<String>,
    /// Images in all, shared equally among the classes [default: 10 for each]
    #[arg(long, allow_negative_numbers = true)]
    num: Option<usize>,
    /// Of these images, those to make: from number A on and before number B, with the noise and the labels that they have among all
    #[arg(long, value_name = "A..B", allow_negative_numbers = true)]
    only: Option<String>,
    /// Images computed at a time; more are faster and need more memory
    #[arg(long, default_value_t = IMAGES_AT_ONCE, allow_negative_numbers = true)]
    batch_size: usize,
    /// Seed of the noise
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
    /// The grid of images: a row for each of the first 64 classes, with 16 images at most [default: grid.png; none with --npz or --images]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// All images for evaluation suites, the classes in turn: arr_0 uint8 [N, H, W, C] (latents: float32 [N, C, H, W]) and arr_1 int64 labels
    /// (of a model without classes, their number)
    #[arg(long, value_name = "FILE")]
    npz: Option<PathBuf>,
    /// Replace the archive that --npz names, if there is one; not by a part of one, which a signal or an error leaves
    #[arg(long, requires = "npz")]
    overwrite: bool,
    /// All images, the classes in turn, as pictures NUMBER-CLASS.png in this folder, which must be new, or hold none but those that --only leaves out
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    #[command(flatten)]
    compute: ComputeArgs,
}

pub(super) fn run(args: SampleArgs) -> Result<ExitCode> {
    let Source { mut config, name, weights: file, names, note: assumed } = source(&args.source)?;
    args.compute.put_into(&mut config)?;
    let all = labels(&args, &config, &names.unwrap_or_default())?;
    let only = args.only.as_ref().map_or(Ok(0..all.len()), |text| part(text, all.len()))?;
    if !(1..=MOST_AT_ONCE).contains(&args.batch_size) {
        return Err(Error::usage(format!(
            "--batch-size is {}, but it must be between 1 and {MOST_AT_ONCE}",
            args.batch_size
        )));
    }
    let default_steps = match args.sampler {
        SamplerKind::Ddim => "50",
        SamplerKind::DpmPlusPlus => "20",
        SamplerKind::Ddpm => "250",
    };
    let respacing = args.steps.as_deref().unwrap_or(default_steps);
    let cfg = args.cfg.unwrap_or(config.default_cfg());
    config.check_cfg("--cfg", cfg)?;
    if args.eta != 0.0 && args.sampler != SamplerKind::Ddim {
        return Err(Error::usage(format!("--eta is {}, but {} has none: leave it out", args.eta, args.sampler)));
    }
    let mut sampler = samples::sampler(&config, args.sampler, respacing, args.eta, cfg)?;
    if !sampler.guided() && (args.cfg_interval.is_some() || args.cfg_channels.is_some()) {
        let flag = if args.cfg_interval.is_some() { "--cfg-interval" } else { "--cfg-channels" };
        let can = if config.default_cfg() == 1.0 { "" } else { "give --cfg, or " };
        return Err(Error::usage(format!("{flag} is given, but nothing is guided: {can}leave it out")));
    }
    if let Some(channels) = args.cfg_channels {
        if !(1..=config.in_channels).contains(&channels) {
            return Err(Error::usage(format!(
                "--cfg-channels is {channels}, but it must be between 1 and {}, the channels of the samples",
                config.in_channels
            )));
        }
        sampler = sampler.guided_channels(channels);
    }
    if let Some(text) = &args.cfg_interval {
        let timesteps = range(text, TASKS).ok_or_else(|| {
            Error::usage(format!("--cfg-interval is {text}, but it must be A..B with A < B and B at most {TASKS}"))
        })?;
        if !sampler.timesteps().iter().any(|&t| timesteps.contains(&(t as usize))) {
            let (steps, from) = (sampler.steps(), sampler.timesteps().last().copied().unwrap_or(0));
            return Err(Error::usage(format!(
                "--cfg-interval is {text}, but none of the {steps} steps, from timestep {from} down, is there: widen it"
            )));
        }
        sampler = sampler.guided_at(timesteps.start as u32..timesteps.end as u32);
    }

    // Where signals cannot be caught, and when Ctrl-C is pressed twice, at worst a temporary file stays.
    let kept = All { npz: args.npz.as_deref(), overwrite: args.overwrite, folder: args.images.as_deref() };
    let says = if kept.are_kept() { "with the images of whole batches" } else { "without files" };
    let _ = signals::stop_on_signals(says);
    // Hours of work must not end in a directory that cannot be written.
    let grid = if kept.are_kept() { None } else { Some(Path::new("grid.png")) };
    let mut files = Files::create(args.out.as_deref().or(grid), kept, &file, &all, only.clone(), &config)?;
    let labels = &all[only.clone()];

    let (compute, note) = args.compute.open(&config)?;
    let in_main_memory = match &compute {
        Compute::Cpu { .. } => args.batch_size.min(labels.len()) * if sampler.guided() { 2 } else { 1 },
        Compute::Cuda { elem, .. } => config.model_config().check_cuda(*elem).map(|()| 0)?,
    };
    // Before the model: its tables of positions and masks may be large, too.
    setup::check_inference_memory(&config, in_main_memory, "sampling", "give a smaller --batch-size")?;
    let dit = Dit::new(config.model_config())?;
    let mut weights = vec![0.0; dit.layout.len()];
    read_weights(&file, &dit, &mut weights)?;

    let total = steps(&sampler, labels.len(), args.batch_size) as u64;
    let mut progress = Progress::new("sampling", 0, total);
    let images = format!("{} images", labels.len());
    files.note(!args.classes.is_empty()).iter().for_each(|note| progress.say(note));
    assumed.iter().chain(&note).for_each(|note| progress.say(note));
    let mut stopped = false;
    let ended = trainer::in_pool(&config, || {
        let mut memory = Memory::on(&compute);
        let uploaded = DeviceWeights::upload_to(&compute, &weights)?;
        let weights = uploaded.as_ref().map_or(ModelWeights::Cpu(&weights), ModelWeights::Cuda);
        let generator = Generator { dit: &dit, weights, sampler: &sampler, seed: args.seed };
        let mut done = 0;
        for labels in labels.chunks(args.batch_size) {
            let images = generator.batch(&mut memory, labels, only.start + files.made(), || {
                done += 1;
                progress.set(done, &images);
                // An error, and not the end of the process: what is finished is kept, and no temporary file is left behind.
                stopped = STOP.load(Ordering::Relaxed);
                if stopped { Err(Error::Stopped("sampling was stopped".into())) } else { Ok(()) }
            })?;
            files.take(&images)?;
        }
        Ok(())
    });
    progress.finish();
    let Err(error) = ended else { return files.finish(&name).map(|()| ExitCode::SUCCESS) };
    let next = only.start + files.made();
    let error = match files.keep() {
        // After an error, the same might end the rest.
        Some(kept) if stopped => {
            let end = only.end;
            let named = [("--out", args.out.is_some()), ("--npz", args.npz.is_some())];
            let named: Vec<&str> = named.into_iter().filter(|(_, given)| *given).map(|(flag, _)| flag).collect();
            let another =
                if named.is_empty() { String::new() } else { format!(" with another {}", named.join(" and ")) };
            error.and(&format!("{kept}, and --only {next}..{end}{another} makes the rest"))
        }
        Some(kept) => error.and(&kept),
        None if stopped => error.and(": no file was written"),
        None => error,
    };
    if !stopped {
        return Err(error);
    }
    say(&error.to_string());
    Ok(ExitCode::from(signals::exit_code()))
}
