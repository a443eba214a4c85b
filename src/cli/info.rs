//! `dtr-fused info`: what a run's directory, a checkpoint or a file of weights holds.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;

use super::info_runs;
use super::source::best_of;
use crate::diffusion::Prediction;
use crate::error::{Error, Result, printable};
use crate::safetensors_file::SafetensorsFile;
use crate::train::config::{KNOBS, Layer};
use crate::train::state::{names_in, told_names};
use crate::train::{TrainConfig, changes, checkpoint, metrics, weights};

const EXAMPLES: &str = "\
Examples:
  dtr-fused info runs/digits-paper-0001                         the run and its checkpoints
  dtr-fused info runs/digits-paper-0001/checkpoints/0000600     one checkpoint
  dtr-fused info --tensors runs/digits-paper-0001               also every tensor of the weights
  dtr-fused info DiT-XL-2.safetensors                           what sample takes weights without a run for
  dtr-fused info runs                                           all runs in a folder: what differs, losses, best validation
  dtr-fused info --json runs/pets*                              these, and all settings, a line of JSON for each run
";

/// Show what a run's directory, a checkpoint or a file of weights holds: configuration, steps, sizes, last loss
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct InfoArgs {
    /// A run's directory, one of its checkpoints, or a file of weights; or the directories of several runs, or of a folder that holds them
    #[arg(value_name = "DIR|FILE", required = true)]
    paths: Vec<PathBuf>,
    /// Show the run's checkpoint with the lowest validation loss, not the latest
    #[arg(long, conflicts_with = "json")]
    best: bool,
    /// List name and shape of every tensor of the weights
    #[arg(long)]
    tensors: bool,
    /// Print a line of JSON for each run: step, losses, last and best validation, number of parameters and all settings; for a file of
    /// weights parameters, the settings of the model and the names of its classes
    #[arg(long, conflicts_with = "tensors")]
    json: bool,
}

pub(super) fn run(args: InfoArgs) -> Result<()> {
    let paths: Vec<PathBuf> = args.paths.iter().flat_map(|path| runs_in(path)).collect();
    match &paths[..] {
        runs if args.json => info_runs::show(runs, true),
        [path] if paths == args.paths => show(path, args.best, args.tensors),
        _ if args.tensors => Err(Error::usage("--tensors lists those of one run: give one directory or file")),
        _ if args.best => Err(Error::usage("--best shows a checkpoint of one run: give one directory")),
        runs => info_runs::show(runs, false),
    }
}

/// The runs in the folder `path`, by name; `path` itself where it has none.
fn runs_in(path: &Path) -> Vec<PathBuf> {
    // A checkpoint has a configuration too.
    let is_run = |path: &PathBuf| path.join(checkpoint::CONFIG).exists() && !path.join(checkpoint::MODEL).exists();
    let mut runs: Vec<PathBuf> = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    runs.retain(is_run);
    runs.sort();
    if runs.is_empty() || path.join(checkpoint::CONFIG).exists() { vec![path.into()] } else { runs }
}

fn show(path: &Path, best: bool, tensors: bool) -> Result<()> {
    let best = best.then(|| best_of(path)).transpose()?;
    if path.is_file() {
        return show_weights(path, tensors);
    }
    let place = checkpoint::resolve(path)?;
    if let Some(run) = &place.run {
        show_run(run)?;
    }
    match best.or(place.checkpoint) {
        Some(checkpoint) => show_checkpoint(&checkpoint, place.run.is_none(), tensors),
        None => {
            println!("\nIt has no checkpoint yet.");
            Ok(())
        }
    }
}

/// Prints a name and what it is.
pub(super) fn row(name: &str, what: impl std::fmt::Display) {
    println!("{name:<14}{}", printable(&what.to_string()));
}

fn show_run(run: &Path) -> Result<()> {
    row("run", run.display());
    let config = TrainConfig::from_file(&run.join(checkpoint::CONFIG))?;
    show_config(&config);
    for of_step in changes::read(run)?.chunk_by(|a, b| a.step == b.step) {
        row("resumed", format!("changed at step {}: {}", of_step[0].step, changes::listed(of_step)));
    }
    let (lines, all) = (metrics::read(run)?, checkpoint::list(run)?);
    if let Some(last) = lines.last() {
        let loss = last.loss.map_or("not measured".into(), metrics::loss_text);
        row("last loss", format!("{loss} at step {} of {}", last.step, config.steps));
        let validated = |line: &metrics::Line| Some((line.step, line.validation.as_ref()?.loss));
        if let Some((step, loss)) = lines.iter().rev().find_map(validated) {
            let loss = loss.map_or("not finite".into(), metrics::loss_text);
            row("validation", format!("{loss} at step {step}"));
        }
        if let Some((best, loss)) = metrics::best_validation(&lines, changes::comparable_since(run)?) {
            let kept = if all.iter().any(|(step, _)| *step == best) { "kept" } else { "not kept" };
            row("best validation ", format!("{} at step {best} ({kept})", metrics::loss_text(loss)));
        }
        if last.skipped > 0 {
            row("skipped", format!("{} steps that were not finite", last.skipped));
        }
    }
    for (index, (step, path)) in all.iter().enumerate() {
        let name = if index == 0 { "checkpoints" } else { "" };
        row(name, format!("step {step:<9}{:>9}  {}", bytes(size_of_directory(path)?), path.display()));
    }
    Ok(())
}

fn show_weights(path: &Path, tensors: bool) -> Result<()> {
    let file = SafetensorsFile::open(path)?;
    row("weights", path.display());
    match weights::config_of(&file, &Layer::default()) {
        Ok((config, note)) => {
            show_model(&config);
            row("samples", samples(&config));
            row("predicts", predicts(&config));
            note.iter().for_each(|note| row("note", note));
        }
        // What it holds is shown all the same: that may tell why.
        Err(error) => row("note", error),
    }
    show_classes(told_names(file.metadata()));
    show_tensors(&file, tensors);
    Ok(())
}

/// Kind, sizes and classes of what a model makes.
fn samples(config: &TrainConfig) -> String {
    let kind = if config.are_images() { "images" } else { "latents" };
    let (channels, side) = (config.in_channels, config.image_size);
    let classes = if config.no_classes() { "of no class".into() } else { format!("{} classes", config.num_classes) };
    format!("{kind} of {channels} x {side} x {side}, {classes}")
}

/// What the model predicts, and with which noise schedule it learned to.
fn predicts(config: &TrainConfig) -> String {
    let variance = if config.learn_sigma { " and variance" } else { "" };
    match config.prediction {
        Prediction::Flow => format!("flow{variance}"),
        prediction => format!("{prediction}{variance}, {} schedule", config.schedule),
    }
}

fn show_model(config: &TrainConfig) {
    let shape = format!(
        "{} ({} wide, {} blocks, {} heads, patch {})",
        config.model, config.hidden_size, config.depth, config.num_heads, config.patch_size
    );
    row("model", shape);
    row("routing", format!("{}, beta {}, alpha {}", config.routing, config.beta, config.alpha));
}

fn show_config(config: &TrainConfig) {
    show_model(config);
    row("data", format!("{}, {}", config.data, samples(config)));
    row(
        "training",
        format!("{} steps of {} images, lr {}, seed {}", config.steps, config.batch_size, config.lr, config.seed),
    );
    row("diffusion", format!("predicts {}, loss weight {}", predicts(config), config.loss_weight));
    let preset = TrainConfig::preset(&config.model, &config.data).unwrap_or_default();
    let shown = [
        "model",
        "data",
        "routing",
        "beta",
        "alpha",
        "image_size",
        "in_channels",
        "data_kind",
        "num_classes",
        "prediction",
        "learn_sigma",
        "schedule",
        "loss_weight",
        "steps",
        "batch_size",
        "lr",
        "seed",
        "out",
    ];
    let changed = KNOBS
        .iter()
        .map(|knob| knob.name)
        .filter(|name| !shown.contains(name) && config.toml_of(name) != preset.toml_of(name));
    let changed: Vec<String> = changed.map(|name| format!("{name} = {}", config.toml_of(name))).collect();
    if !changed.is_empty() {
        row("changed", changed.join(", "));
    }
}

fn show_checkpoint(path: &Path, with_config: bool, tensors: bool) -> Result<()> {
    println!();
    row("checkpoint", path.display());
    let config = path.join(checkpoint::CONFIG);
    if with_config && config.exists() {
        show_config(&TrainConfig::from_file(&config)?);
    }
    let model = SafetensorsFile::open(path.join(checkpoint::MODEL))?;
    let state = path.join(checkpoint::OPTIMIZER);
    if state.exists() {
        let state = SafetensorsFile::open(state)?;
        if let Some(step) = state.metadata().get("step") {
            row("step", step);
        }
    }
    show_classes(names_in(path));
    for name in [checkpoint::MODEL, checkpoint::EMA, checkpoint::OPTIMIZER] {
        let file = path.join(name);
        match fs::metadata(&file) {
            Ok(metadata) => row(name.trim_end_matches(".safetensors"), bytes(metadata.len())),
            Err(error) => row(name.trim_end_matches(".safetensors"), format!("missing ({error})")),
        }
    }
    show_tensors(&model, tensors);
    Ok(())
}

/// The names of classes, if they are told.
fn show_classes(names: Option<Vec<String>>) {
    if let Some(names) = names {
        let named = names.iter().enumerate().map(|(class, name)| format!("{class} {}", name.replace('\n', "\\n")));
        row("classes", named.collect::<Vec<_>>().join(", "));
    }
}

/// How many numbers `file` holds, and `each` of its tensors.
fn show_tensors(file: &SafetensorsFile, each: bool) {
    let tensors = || file.names().filter_map(|name| Some((name, file.get(name)?)));
    let parameters = tensors().map(|(_, tensor)| tensor.elements() as u64).sum();
    row("parameters", format!("{} in {} tensors", grouped(parameters), tensors().count()));
    if each {
        println!();
        for (name, tensor) in tensors() {
            println!("{:<44} {:?} {:?}", printable(name), tensor.element, tensor.shape);
        }
    }
}

fn size_of_directory(path: &Path) -> Result<u64> {
    let fail = |e: std::io::Error| Error::file(path, format!("cannot be read: {e}"));
    let mut total = 0;
    for entry in fs::read_dir(path).map_err(fail)? {
        total += entry.and_then(|entry| entry.metadata()).map_err(fail)?.len();
    }
    Ok(total)
}

/// `12.3 MB`
fn bytes(n: u64) -> String {
    match n {
        ..1_000 => format!("{n} B"),
        1_000..1_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

/// `1,234,567`
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!([0, 7, 1234, 1_000_000].map(grouped), ["0", "7", "1,234", "1,000,000"]);
        assert_eq!([0, 999, 1500, 2_700_000_000].map(bytes), ["0 B", "999 B", "1.5 kB", "2.70 GB"]);
    }
}
