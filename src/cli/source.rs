//! What `--checkpoint` names.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::error::{Error, Result};
use crate::safetensors_file::SafetensorsFile;
use crate::train::config::{Assignment, Layer, ValidationWeights};
use crate::train::state::{best_saved, names_in, told_names};
use crate::train::{TrainConfig, changes, checkpoint, metrics, weights};

/// Which weights of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Weights {
    /// The moving average
    Ema,
    /// Those of the last step
    Model,
}

/// The flags that name weights.
#[derive(Debug, Args)]
pub(super) struct SourceArgs {
    /// A run's directory (its latest checkpoint), one of its checkpoints, or a file of weights with the official names
    #[arg(long, value_name = "DIR|FILE")]
    checkpoint: PathBuf,
    /// Of a run take the checkpoint with the lowest validation loss, not the latest
    #[arg(long)]
    best: bool,
    /// Which weights of a run or a checkpoint [default: ema; with --best those that were validated]
    #[arg(long, value_enum)]
    weights: Option<Weights>,
    /// What is to be assumed of a file of weights: routing, beta, alpha, seed (of random routing), schedule, num_heads, image_size,
    /// data_kind, label_dropout, precision, prediction, loss_weight
    #[arg(long, value_name = "KEY=VALUE", num_args = 1..)]
    set: Vec<String>,
}

/// Where the weights are, and what model they are.
pub(super) struct Source {
    pub(super) config: TrainConfig,
    /// The checkpoint or file, as messages call it.
    pub(super) name: PathBuf,
    pub(super) weights: PathBuf,
    /// Names of the classes, if they are told.
    pub(super) names: Option<Vec<String>>,
    /// What was assumed of the model, if anything.
    pub(super) note: Option<String>,
}

/// What `--checkpoint` names.
pub(super) fn source(args: &SourceArgs) -> Result<Source> {
    let path = &args.checkpoint;
    let kind = std::fs::metadata(path).map_err(|e| Error::file(path, format!("cannot be opened: {e}")))?;
    let best = args.best.then(|| best_of(path)).transpose()?;
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
        let file = SafetensorsFile::open(path)?;
        let (config, note) = weights::config_of(&file, &set)?;
        let names = told_names(file.metadata());
        return Ok(Source { config, name: path.clone(), weights: path.clone(), names, note });
    }
    let place = checkpoint::resolve(path)?;
    if !args.set.is_empty() {
        let what = format!(
            "--set is for a file of weights, but {} says itself what its model is: leave it out",
            path.display()
        );
        return Err(Error::usage(what));
    }
    let Some(name) = best.or(place.checkpoint) else {
        return Err(Error::file(
            path,
            "has no checkpoint yet: wait for the first one, or finish training with dtr-fused train --resume",
        ));
    };
    let config = TrainConfig::from_file(&name.join(checkpoint::CONFIG))?;
    // Those whose loss was the lowest.
    let validated = args.best && config.validation_weights == ValidationWeights::Model;
    let model = args.weights.map_or(validated, |weights| weights == Weights::Model);
    let weights = name.join(if model { checkpoint::MODEL } else { checkpoint::EMA });
    let names = names_in(&name);
    Ok(Source { config, name, weights, names, note: None })
}

/// The checkpoint of the run `path` that has its lowest validation loss.
///
/// # Errors
/// When `path` is no run, no such loss was measured, or that checkpoint is not there.
pub(super) fn best_of(path: &Path) -> Result<PathBuf> {
    if checkpoint::resolve(path)?.run.as_deref() != Some(path) {
        let what =
            format!("--best chooses among the checkpoints of a run, but {} is none: leave it out", path.display());
        return Err(Error::usage(what));
    }
    let (lines, since) = (metrics::read(path)?, changes::comparable_since(path)?);
    let Some((step, loss)) = metrics::best_validation(&lines, since) else {
        let what = format!("--best takes the lowest validation loss, but {} has none: leave it out", path.display());
        return Err(Error::usage(what));
    };
    // With keep_best that of the steps that had both was kept.
    let all_kept = TrainConfig::from_file(&path.join(checkpoint::CONFIG))?.keep_best;
    match best_saved(path, &lines, since)? {
        Some((saved, checkpoint)) if saved == step || all_kept => Ok(checkpoint),
        saved => {
            let others =
                saved.map_or(String::new(), |(_, path)| format!(", or give {}, the best that is", path.display()));
            Err(Error::file(
                path,
                format!(
                    "its lowest validation loss is {} at step {step}, whose checkpoint is not kept (see --keep-best of train): leave \
                     --best out{others}",
                    metrics::loss_text(loss)
                ),
            ))
        }
    }
}
