//! `dtr-fused sample`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::atomic_file::AtomicFile;
use crate::autograd::cuda::DeviceWeights;
use crate::autograd::{Memory, Weights as ModelWeights};
use crate::backend::Compute;
use crate::data::npz::NpzWriter;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::generate::{generate, steps};
use crate::model::dit::Dit;
use crate::picture::grid_png;
use crate::train::config::{Precision, SamplerKind};
use crate::train::progress::Progress;
use crate::train::{TrainConfig, checkpoint, trainer};

/// A grid shows at most this many images of a class.
const GRID_COLUMNS: usize = 16;
/// A grid shows at most this many classes.
const GRID_ROWS: usize = 64;

const EXAMPLES: &str = "\
Examples:
  dtr-fused sample --checkpoint runs/digits-paper-0001
  dtr-fused sample --checkpoint runs/digits-paper-0001 --classes 3,7 --num 40 --cfg 2 --seed 1
  dtr-fused sample --checkpoint runs/digits-paper-0001 --num 50000 --sampler ddpm --steps 250 --npz samples.npz
";

/// Which weights of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Weights {
    /// The moving average
    Ema,
    /// Those of the last step
    Model,
}

/// Sampling algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Algorithm {
    /// Deterministic with --eta 0; good with few steps
    Ddim,
    /// Ancestral sampling
    Ddpm,
}

/// Make images with a trained model: a PNG grid, a row for each class, and an .npz for evaluation
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct SampleArgs {
    /// A run's directory (its latest checkpoint), or one of its checkpoints
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Sampling algorithm
    #[arg(long, value_enum, default_value = "ddim")]
    sampler: Algorithm,
    /// Denoising steps: a number, ddimN, or A,B,.. for parts of the schedule [default: 50 for ddim, 250 for ddpm]
    #[arg(long)]
    steps: Option<String>,
    /// Noise of ddim, as a share of that of ddpm
    #[arg(long, default_value_t = 0.0)]
    eta: f64,
    /// Strength of classifier-free guidance; 1 = none
    #[arg(long, default_value_t = 1.5)]
    cfg: f64,
    /// Classes to make, by number [default: all]
    #[arg(long, value_delimiter = ',')]
    classes: Vec<u32>,
    /// Images in all, shared equally among the classes [default: 10 for each]
    #[arg(long)]
    num: Option<usize>,
    /// Images computed at a time; more are faster and need more memory
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Seed of the noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Which weights
    #[arg(long, value_enum, default_value = "ema")]
    weights: Weights,
    /// The grid of images
    #[arg(long, default_value = "grid.png", value_name = "FILE")]
    out: PathBuf,
    /// All images for evaluation suites: arr_0 uint8 [N, H, W, C] (latents: float32 [N, C, H, W]) and arr_1 int64 labels
    #[arg(long, value_name = "FILE")]
    npz: Option<PathBuf>,
    /// Threads; 0 = one per core (the images are the same)
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
}

pub(super) fn run(args: SampleArgs) -> Result<()> {
    let place = checkpoint::resolve(&args.checkpoint)?;
    let Some(directory) = place.checkpoint else {
        return Err(Error::file(
            &args.checkpoint,
            "has no checkpoint yet: wait for the first one, or finish training with dtr-fused train --resume",
        ));
    };
    let mut config = TrainConfig::from_file(&directory.join(checkpoint::CONFIG))?;
    config.threads = args.threads;
    config.device = args.device.clone();
    config.validate()?;
    let labels = labels(&args, &config)?;
    if args.batch_size == 0 {
        return Err(Error::usage("--batch-size is 0, but at least one image must be computed at a time"));
    }
    let (kind, default_steps) = match args.sampler {
        Algorithm::Ddim => (SamplerKind::Ddim, "50"),
        Algorithm::Ddpm => (SamplerKind::Ddpm, "250"),
    };
    let respacing = args.steps.as_deref().unwrap_or(default_steps);
    let sampler = trainer::sampler(&config, kind, respacing, args.eta, args.cfg)?;

    // Hours of work must not end in a directory that cannot be written.
    for path in [Some(&args.out), args.npz.as_ref()].into_iter().flatten() {
        AtomicFile::create(path)?;
    }

    let dit = Dit::new(config.model_config())?;
    let mut weights = vec![0.0; dit.layout.len()];
    let name = if args.weights == Weights::Ema { checkpoint::EMA } else { checkpoint::MODEL };
    trainer::read_weights(&directory.join(name), &dit, &mut weights)?;

    let total = steps(&sampler, labels.len(), args.batch_size) as u64;
    let mut progress = Progress::new("sampling", 0, total);
    let images = format!("{} images", labels.len());
    let pixels = trainer::in_pool(&config, || {
        // Checkpoints hold f32, so what a GPU trained in bf16 can be sampled anywhere.
        let (compute, note) = Compute::open_or_f32(&config.device, config.precision == Precision::Bf16)?;
        if let Compute::Cuda { elem, .. } = &compute {
            config.model_config().check_cuda(*elem)?;
        }
        note.iter().for_each(|note| progress.say(note));
        let mut memory = Memory::on(&compute);
        let uploaded = match &compute {
            Compute::Cpu => None,
            Compute::Cuda { device, elem } => Some(DeviceWeights::upload(device, &weights, *elem)?),
        };
        let weights = uploaded.as_ref().map_or(ModelWeights::Cpu(&weights), ModelWeights::Cuda);
        generate(&dit, weights, &mut memory, &sampler, &labels, args.seed, args.batch_size, |done| {
            progress.set(done as u64, &images);
            Ok(())
        })
    })?;
    progress.finish();
    if let Some(path) = &args.npz {
        write_npz(path, &pixels, &labels, &config)?;
        println!("{} images of {} are in {}", labels.len(), directory.display(), path.display());
    }
    write_grid(&args.out, &pixels, &labels, &config)?;
    println!("Samples of {} are in {}", directory.display(), args.out.display());
    Ok(())
}

/// The label of every image, by class.
fn labels(args: &SampleArgs, config: &TrainConfig) -> Result<Vec<u32>> {
    let all = config.num_classes as u32;
    let classes = if args.classes.is_empty() { (0..all).collect() } else { args.classes.clone() };
    if let Some(class) = classes.iter().find(|&&class| class >= all) {
        return Err(Error::usage(format!("class {class} is outside 0..{all}: this model knows {all} classes")));
    }
    let num = args.num.unwrap_or(10 * classes.len());
    if num == 0 || num > 1 << 24 {
        return Err(Error::usage(format!("--num is {num}, but it must be between 1 and {}", 1 << 24)));
    }
    let share = |i: usize| num / classes.len() + usize::from(i < num % classes.len());
    Ok(classes.iter().enumerate().flat_map(|(i, &class)| std::iter::repeat_n(class, share(i))).collect())
}

/// The first images of each class, a row a class; classes with fewer end in black.
fn write_grid(path: &Path, pixels: &[f32], labels: &[u32], config: &TrainConfig) -> Result<()> {
    let row = pixels.len() / labels.len();
    let classes: Vec<&[u32]> = labels.chunk_by(|a, b| a == b).take(GRID_ROWS).collect();
    let columns = classes.iter().map(|class| class.len()).max().unwrap_or(1).min(GRID_COLUMNS);
    let mut shown = vec![-1.0; classes.len() * columns * row];
    let mut first = 0;
    for (class, line) in classes.iter().zip(shown.chunks_exact_mut(columns * row)) {
        let len = class.len().min(columns) * row;
        line[..len].copy_from_slice(&pixels[first * row..][..len]);
        first += class.len();
    }
    let (channels, side) = (config.in_channels, config.image_size);
    grid_png(path, &shown, [classes.len() * columns, channels, side, side], columns, trainer::scale_of(side))
}

fn write_npz(path: &Path, pixels: &[f32], labels: &[u32], config: &TrainConfig) -> Result<()> {
    let (n, c, side) = (labels.len(), config.in_channels, config.image_size);
    let mut file = NpzWriter::create(path)?;
    if matches!(c, 1 | 3) {
        file.begin("arr_0", Element::U8, &[n, side, side, c])?;
        let mut bytes = vec![0u8; c * side * side];
        for image in pixels.chunks_exact(bytes.len()) {
            for (i, byte) in bytes.iter_mut().enumerate() {
                // As the DiT authors round: half a step up, then down.
                *byte = (127.5 * image[i % c * side * side + i / c] + 128.0).clamp(0.0, 255.0) as u8;
            }
            file.write(&bytes)?;
        }
    } else {
        file.begin("arr_0", Element::F32, &[n, c, side, side])?;
        file.write(bytemuck::cast_slice(pixels))?;
    }
    file.begin("arr_1", Element::I64, &[n])?;
    for &label in labels {
        file.write(&i64::from(label).to_le_bytes())?;
    }
    file.finish()
}
