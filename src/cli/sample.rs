//! `dtr-fused sample`.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use clap::{Args, ValueEnum};

use super::signals::{self, STOP};
use crate::atomic_file::{AtomicFile, check_target};
use crate::autograd::cuda::DeviceWeights;
use crate::autograd::{Memory, Weights as ModelWeights};
use crate::backend::Compute;
use crate::data::npz::NpzWriter;
use crate::element::Element;
use crate::error::{Error, Result, printable};
use crate::generate::{Generator, IMAGES_AT_ONCE, steps};
use crate::model::dit::Dit;
use crate::picture::grid_png;
use crate::safetensors_file::SafetensorsFile;
use crate::train::config::{Assignment, Layer, Precision, SamplerKind};
use crate::train::progress::{Progress, say};
use crate::train::weights::{self, read_weights};
use crate::train::{TrainConfig, checkpoint, samples, setup, trainer};

/// A grid shows at most this many images of a class.
const GRID_COLUMNS: usize = 16;
/// A grid shows at most this many classes.
const GRID_ROWS: usize = 64;
/// Most images that are computed at a time: with guidance they are twice as many samples, of which kernels take 65535.
const MOST_AT_ONCE: usize = 32_767;

const EXAMPLES: &str = "\
Examples:
  dtr-fused sample --checkpoint runs/digits-paper-0001
  dtr-fused sample --checkpoint runs/digits-paper-0001 --classes 3,7 --num 40 --cfg 2 --seed 1
  dtr-fused sample --checkpoint runs/digits-paper-0001 --num 5000 --sampler ddpm --npz samples.npz
  dtr-fused sample --checkpoint runs/digits-paper-0001 --num 5000 --only 2560..5000 --npz rest.npz
  dtr-fused sample --checkpoint DiT-XL-2.safetensors --classes 207,360 --cfg 4 --npz latents.npz

A file of weights tells the sizes of its model, that of the images if it has pos_embed. Where
dtr-fused did not write it, routing is taken to be dense, the schedule linear and the heads those of
the DiT of this width and depth, as in the published weights; what was assumed is said. For weights
of the DTR paper's code, give --set routing=paper schedule=cosine.
";

/// Which weights of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Weights {
    /// The moving average
    Ema,
    /// Those of the last step
    Model,
}

/// Make images with a trained model: a PNG grid, a row a class, and an .npz for evaluation
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct SampleArgs {
    /// A run's directory (its latest checkpoint), one of its checkpoints, or a file of weights with the official names
    #[arg(long, value_name = "DIR|FILE")]
    checkpoint: PathBuf,
    /// What is to be assumed of a file of weights: routing, beta, alpha, seed (of random routing), schedule, num_heads, image_size,
    /// data_kind, label_dropout
    #[arg(long, value_name = "KEY=VALUE", num_args = 1..)]
    set: Vec<String>,
    /// Sampling algorithm: ddim (deterministic with --eta 0, good with few steps) or ddpm (ancestral)
    #[arg(long, value_name = SamplerKind::NAMES, default_value_t = SamplerKind::Ddim)]
    sampler: SamplerKind,
    /// Denoising steps: a number, ddimN, or A,B,.. for parts of the schedule [default: 50 for ddim, 250 for ddpm]
    #[arg(long, allow_negative_numbers = true)]
    steps: Option<String>,
    /// Noise of ddim, as a share of that of ddpm
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    eta: f64,
    /// Strength of classifier-free guidance; 1 = none [default: 1.5; 1 for a model trained with label_dropout 0]
    #[arg(long, allow_negative_numbers = true)]
    cfg: Option<f64>,
    /// Classes to make, by number [default: all; without --num and --npz, those that the grid has rows for]
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    classes: Vec<u32>,
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
    /// Which weights of a run or a checkpoint [default: ema]
    #[arg(long, value_enum)]
    weights: Option<Weights>,
    /// The grid of images: a row for each of the first 64 classes, with 16 images at most
    #[arg(long, default_value = "grid.png", value_name = "FILE")]
    out: PathBuf,
    /// All images for evaluation suites: arr_0 uint8 [N, H, W, C] (latents: float32 [N, C, H, W]) and arr_1 int64 labels
    #[arg(long, value_name = "FILE")]
    npz: Option<PathBuf>,
    /// Threads; 0 = one per core (the images are the same)
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    threads: usize,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// Number format of products [default: that of training if it is told, but f32 on a CPU without AMX]
    #[arg(long, value_name = Precision::NAMES)]
    precision: Option<Precision>,
}

pub(super) fn run(args: SampleArgs) -> Result<ExitCode> {
    let Source { mut config, name, weights: file, note: assumed } = source(&args)?;
    config.threads = args.threads;
    config.device = args.device.clone();
    config.validate()?;
    let all = labels(&args, &config)?;
    let only = args.only.as_ref().map_or(Ok(0..all.len()), |text| part(text, all.len()))?;
    let labels = &all[only.clone()];
    if !(1..=MOST_AT_ONCE).contains(&args.batch_size) {
        return Err(Error::usage(format!(
            "--batch-size is {}, but it must be between 1 and {MOST_AT_ONCE}",
            args.batch_size
        )));
    }
    let default_steps = if args.sampler == SamplerKind::Ddim { "50" } else { "250" };
    let respacing = args.steps.as_deref().unwrap_or(default_steps);
    let cfg = args.cfg.unwrap_or(config.default_cfg());
    config.check_cfg("--cfg", cfg)?;
    let sampler = samples::sampler(&config, args.sampler, respacing, args.eta, cfg)?;

    // Where signals cannot be caught, and when Ctrl-C is pressed twice, at worst a temporary file stays.
    let says = if args.npz.is_some() { "with the images of whole batches" } else { "without files" };
    let _ = signals::stop_on_signals(says);
    // Hours of work must not end in a directory that cannot be written.
    check_outputs(&args.out, args.npz.as_deref(), &file)?;
    AtomicFile::create(&args.out)?;
    let mut npz = args.npz.as_ref().map(|path| Archive::create(path, labels.len(), &config)).transpose()?;

    // Checkpoints hold f32, so what was trained in bf16 can be sampled anywhere.
    let (compute, note) = match args.precision {
        Some(precision) => Compute::open(&config.device, precision.elem())?,
        None => Compute::open_or_f32(&config.device, config.precision.elem())?,
    };
    let in_main_memory = match &compute {
        Compute::Cpu { .. } => args.batch_size.min(labels.len()) * if sampler.guided() { 2 } else { 1 },
        Compute::Cuda { elem, .. } => config.model_config().check_cuda(*elem).map(|()| 0)?,
    };
    // Before the model: its tables of positions and masks may be large, too.
    setup::check_sampling_memory(&config, in_main_memory)?;
    let dit = Dit::new(config.model_config())?;
    let mut weights = vec![0.0; dit.layout.len()];
    read_weights(&file, &dit, &mut weights)?;

    let total = steps(&sampler, labels.len(), args.batch_size) as u64;
    let mut progress = Progress::new("sampling", 0, total);
    let images = format!("{} images", labels.len());
    let mut grid = Grid::new(labels, &config);
    grid.note(labels.len(), args.npz.is_some(), !args.classes.is_empty()).iter().for_each(|note| progress.say(note));
    assumed.iter().chain(&note).for_each(|note| progress.say(note));
    let (mut made, mut stopped) = (0, false);
    let ended = trainer::in_pool(&config, || {
        let mut memory = Memory::on(&compute);
        let uploaded = match &compute {
            Compute::Cpu { .. } => None,
            Compute::Cuda { device, elem } => Some(DeviceWeights::upload(device, &weights, *elem)?),
        };
        let weights = uploaded.as_ref().map_or(ModelWeights::Cpu(&weights), ModelWeights::Cuda);
        let generator = Generator { dit: &dit, weights, sampler: &sampler, seed: args.seed };
        let mut done = 0;
        for labels in labels.chunks(args.batch_size) {
            let pixels = generator.batch(&mut memory, labels, only.start + made, || {
                done += 1;
                progress.set(done, &images);
                // An error, and not the end of the process: what is finished is kept, and no temporary file is left behind.
                stopped = STOP.load(Ordering::Relaxed);
                if stopped { Err(Error::Stopped("sampling was stopped".into())) } else { Ok(()) }
            })?;
            grid.take(made, &pixels);
            if let Err(error) = npz.as_mut().map_or(Ok(()), |npz| npz.write(&pixels)) {
                npz = None;
                return Err(error);
            }
            made += labels.len();
        }
        Ok(())
    });
    progress.finish();
    let [name, out] = [&name, &args.out].map(|path| printable(&path.display().to_string()));
    let archived = args.npz.as_ref().map(|path| printable(&path.display().to_string()));
    if let Err(error) = ended {
        let error = match (npz, archived) {
            (Some(npz), Some(archived)) if made > 0 => {
                npz.finish(&labels[..made])?;
                grid.write(&args.out, made).unwrap_or_else(|e| say(&format!("no grid: {}", printable(&e.to_string()))));
                let (n, next, end) = (labels.len(), only.start + made, only.end);
                error.and(&format!(
                    "; {made} of {n} images are in {archived}, and --only {next}..{end} with another --npz makes the rest"
                ))
            }
            _ if stopped => error.and(": no file was written"),
            _ => error,
        };
        if !stopped {
            return Err(error);
        }
        say(&error.to_string());
        return Ok(ExitCode::from(signals::exit_code()));
    }
    // Either file is written even if the other cannot be.
    let archive = npz.map_or(Ok(()), |npz| npz.finish(labels));
    grid.write(&args.out, made)?;
    println!("Samples of {name} are in {out}");
    archive?;
    if let Some(archived) = archived {
        println!("{} images of {name} are in {archived}", labels.len());
    }
    Ok(ExitCode::SUCCESS)
}

/// Where the weights are, and what model they are.
struct Source {
    config: TrainConfig,
    /// The checkpoint or file, as messages call it.
    name: PathBuf,
    weights: PathBuf,
    /// What was assumed of the model, if anything.
    note: Option<String>,
}

/// What `--checkpoint` names.
fn source(args: &SampleArgs) -> Result<Source> {
    let path = &args.checkpoint;
    let kind = std::fs::metadata(path).map_err(|e| Error::file(path, format!("cannot be opened: {e}")))?;
    if !kind.is_dir() {
        if args.weights.is_some() {
            let what = format!(
                "--weights chooses among those of a checkpoint, but {} is a file: leave it out",
                path.display()
            );
            return Err(Error::usage(what));
        }
        let assignments = args.set.iter().map(|argument| Assignment::from_argument(argument)).collect::<Result<_>>()?;
        let set = Layer { origin: "--set".into(), assignments };
        let (config, note) = weights::config_of(&SafetensorsFile::open(path)?, &set)?;
        return Ok(Source { config, name: path.clone(), weights: path.clone(), note });
    }
    if !args.set.is_empty() {
        let what = format!(
            "--set is for a file of weights, but {} says itself what its model is: leave it out",
            path.display()
        );
        return Err(Error::usage(what));
    }
    let Some(name) = checkpoint::resolve(path)?.checkpoint else {
        return Err(Error::file(
            path,
            "has no checkpoint yet: wait for the first one, or finish training with dtr-fused train --resume",
        ));
    };
    let config = TrainConfig::from_file(&name.join(checkpoint::CONFIG))?;
    let weights = name.join(if args.weights == Some(Weights::Model) { checkpoint::MODEL } else { checkpoint::EMA });
    Ok(Source { config, name, weights, note: None })
}

/// Refuses files that cannot both be written, or not without losing the weights.
fn check_outputs(out: &Path, npz: Option<&Path>, weights: &Path) -> Result<()> {
    for (path, ending) in [(Some(out), "png"), (npz, "npz")] {
        let Some(path) = path else { continue };
        check_target(path)?;
        // A slip of the hand must not cost weights.
        if path.exists() && !path.extension().is_some_and(|found| found.eq_ignore_ascii_case(ending)) {
            return Err(Error::file(path, format!("is there already, and no .{ending}: give the name of a new file")));
        }
    }
    // `a` and `./a` are the same file, which need not exist yet.
    let place = |path: &Path| {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        (parent.canonicalize().unwrap_or_else(|_| parent.into()), path.file_name().map(ToOwned::to_owned))
    };
    if let Some(path) = [Some(out), npz].into_iter().flatten().find(|path| place(path) == place(weights)) {
        return Err(Error::file(path, "holds the weights: give the name of another file to write"));
    }
    match npz {
        Some(npz) if place(npz) == place(out) => Err(Error::usage(format!(
            "--out and --npz are both {}, but a file can hold the grid or the archive: give two names",
            npz.display()
        ))),
        _ => Ok(()),
    }
}

/// The label of every image, by class.
fn labels(args: &SampleArgs, config: &TrainConfig) -> Result<Vec<u32>> {
    let all = config.num_classes as u32;
    // Images that nobody asked for and the grid does not show are not made.
    let rows = if args.num.is_some() || args.npz.is_some() { all } else { all.min(GRID_ROWS as u32) };
    let classes = if args.classes.is_empty() { (0..rows).collect() } else { args.classes.clone() };
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

/// What `--only` leaves of `n` images.
fn part(text: &str, n: usize) -> Result<Range<usize>> {
    let number = |text: &str, end| if text.is_empty() { Some(end) } else { text.parse().ok() };
    let range = text.split_once("..").and_then(|(a, b)| Some(number(a, 0)?..number(b, n)?));
    range.filter(|range| range.start < range.end && range.end <= n).ok_or_else(|| {
        let what = "but it must be A..B (or A.. or ..B) with A < B";
        Error::usage(format!("--only is {text}, {what} and B at most {n}, the number of images"))
    })
}

/// The first images of each class, a row a class; classes with fewer end in black.
struct Grid<'a> {
    config: &'a TrainConfig,
    shown: Vec<(usize, usize)>, // number of the image, its place in the grid; by the first
    columns: usize,
    rows: usize,
    pixels: Vec<f32>, // [rows * columns, C, H, W]
}

impl<'a> Grid<'a> {
    fn new(labels: &[u32], config: &'a TrainConfig) -> Self {
        let classes: Vec<&[u32]> = labels.chunk_by(|a, b| a == b).take(GRID_ROWS).collect();
        let columns = classes.iter().map(|class| class.len()).max().unwrap_or(1).min(GRID_COLUMNS);
        let (mut shown, mut first) = (Vec::new(), 0);
        for (row, class) in classes.iter().enumerate() {
            shown.extend((0..class.len().min(columns)).map(|i| (first + i, row * columns + i)));
            first += class.len();
        }
        let pixels = vec![-1.0; classes.len() * columns * image_len(config)];
        Grid { config, shown, columns, rows: classes.len(), pixels }
    }

    /// What it leaves out of `made` images or, unless they were `chosen`, of the classes, if anything.
    fn note(&self, made: usize, archived: bool, chosen: bool) -> Option<String> {
        let (shown, all) = (self.shown.len(), self.config.num_classes);
        if shown < made {
            let rest = if archived { "" } else { "; --npz FILE keeps them all" };
            return Some(format!(
                "the grid shows {shown} of {made} images: {GRID_COLUMNS} of a class and {GRID_ROWS} classes at most{rest}"
            ));
        }
        (!chosen && self.rows == GRID_ROWS && all > GRID_ROWS)
            .then(|| format!("the grid shows {GRID_ROWS} of {all} classes: choose others with --classes"))
    }

    /// Keeps what it shows of `images`, of which the first is number `first`.
    fn take(&mut self, first: usize, images: &[f32]) {
        let len = image_len(self.config);
        let after = first + images.len() / len;
        for &(image, place) in self.shown.iter().filter(|(image, _)| (first..after).contains(image)) {
            self.pixels[place * len..][..len].copy_from_slice(&images[(image - first) * len..][..len]);
        }
    }

    /// Writes the rows of the first `made` images.
    fn write(&self, path: &Path, made: usize) -> Result<()> {
        let (channels, side) = (self.config.in_channels, self.config.image_size);
        let last = self.shown.iter().rev().find(|(image, _)| *image < made).map_or(0, |&(_, place)| place);
        let n = (last / self.columns + 1) * self.columns;
        grid_png(
            path,
            &self.pixels[..n * image_len(self.config)],
            [n, channels, side, side],
            self.columns,
            samples::scale_of(side),
            self.config.are_images(),
        )
    }
}

/// Numbers of an image.
fn image_len(config: &TrainConfig) -> usize {
    config.in_channels * config.image_size * config.image_size
}

/// The .npz, written as the images come: all of them may be more than memory holds.
struct Archive<'a> {
    config: &'a TrainConfig,
    file: NpzWriter,
}

impl<'a> Archive<'a> {
    fn create(path: &Path, n: usize, config: &'a TrainConfig) -> Result<Self> {
        let (c, side) = (config.in_channels, config.image_size);
        let mut file = NpzWriter::create(path)?;
        match config.are_images() {
            true => file.begin("arr_0", Element::U8, &[n, side, side, c])?,
            false => file.begin("arr_0", Element::F32, &[n, c, side, side])?,
        }
        Ok(Archive { config, file })
    }

    fn write(&mut self, images: &[f32]) -> Result<()> {
        let c = self.config.in_channels;
        if !self.config.are_images() {
            return self.file.write(bytemuck::cast_slice(images));
        }
        let mut bytes = vec![0u8; image_len(self.config)];
        for image in images.chunks_exact(bytes.len()) {
            for (i, byte) in bytes.iter_mut().enumerate() {
                // As the DiT authors round: half a step up, then down.
                *byte = (127.5 * image[i % c * (image.len() / c) + i / c] + 128.0).clamp(0.0, 255.0) as u8;
            }
            self.file.write(&bytes)?;
        }
        Ok(())
    }

    /// Ends the images, of which the `labels` tell how many there are, and writes these.
    fn finish(mut self, labels: &[u32]) -> Result<()> {
        self.file.cut(labels.len())?;
        self.file.begin("arr_1", Element::I64, &[labels.len()])?;
        for &label in labels {
            self.file.write(&i64::from(label).to_le_bytes())?;
        }
        self.file.finish()
    }
}
