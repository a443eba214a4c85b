//! Whether a run can be resumed: what is checked before anything of it is changed, but for what killed trainers left.

use std::path::Path;

use super::checkpoint::{self, CONFIG};
use super::config::{KNOBS, Layer, TrainConfig};
use super::metrics;
use super::plot::LOSS_PNG;
use crate::error::{Error, Result};

/// The configuration of the run in the directory `run`.
///
/// # Errors
/// As [`TrainConfig::from_file`], and when the file has lost what every run's has: the defaults in its place would make
/// another run of this one.
pub fn config_of(run: &Path) -> Result<TrainConfig> {
    let path = run.join(CONFIG);
    let layer = Layer::from_file(&path)?;
    let there = |key: &str| layer.assignments.iter().any(|assignment| assignment.key == key);
    if let Some(missing) = ["model", "seed"].into_iter().find(|key| !there(key)) {
        return Err(Error::file(
            &path,
            format!(
                "has no key '{missing}', so it is not whole: copy the config.toml of the run's latest checkpoint over it"
            ),
        ));
    }
    TrainConfig::from_file(&path)
}

/// Refuses a configuration under which `checkpoint` of `run` was not trained.
pub(super) fn check_same_run(config: &TrainConfig, run: &Path, checkpoint: &Path) -> Result<()> {
    let path = checkpoint.join(CONFIG);
    if !path.exists() {
        return Ok(());
    }
    let mut saved = TrainConfig::from_file(&path)?;
    saved.keep_what_is_left_open(config);
    // The run may have been moved.
    for knob in KNOBS.iter().filter(|knob| knob.fixed && knob.name != "out") {
        let (is, was) = (config.toml_of(knob.name), saved.toml_of(knob.name));
        if is != was {
            let what = format!("{} is {is}, but its checkpoint was trained with {was}", knob.name);
            return Err(Error::file(run.join(CONFIG), what + ": put that back, or start a new run"));
        }
    }
    if config.no_classes() != saved.no_classes() {
        return Err(Error::usage(format!(
            "label_dropout is {}, but this run was trained with {}, and a model without classes is another: start a new run, with \
             --init-from its weights",
            config.label_dropout, saved.label_dropout
        )));
    }
    // A model that has learned the null class still has it where it is no longer trained; so what was saved is left alone.
    if saved.label_dropout == 0.0 && config.sample_cfg != saved.sample_cfg {
        config.check_cfg("sample_cfg", config.sample_cfg)?;
    }
    Ok(())
}

/// Sentences where learning rate and batch size of the next step are others than in the configuration of `checkpoint`, which was saved
/// after `step`.
pub(super) fn notes_on_changes(config: &TrainConfig, checkpoint: &Path, step: u64) -> Result<Vec<String>> {
    let path = checkpoint.join(CONFIG);
    if !path.exists() || step >= config.steps {
        return Ok(Vec::new());
    }
    let saved = TrainConfig::from_file(&path)?;
    let mut notes = Vec::new();
    let [was, is] = [&saved, config].map(|config| config.lr_at(step));
    if (is - was).abs() > 0.01 * was {
        // Under cosine decay more steps end later.
        let later = TrainConfig { steps: config.steps, ..saved.clone() }.lr_at(step) == is;
        let why = if later { format!(", as its decay now ends after step {}", config.steps) } else { String::new() };
        notes.push(format!("the learning rate goes from {was:.2e} to {is:.2e}{why}"));
    }
    if config.batch_size != saved.batch_size {
        let [was, is] = [saved.batch_size, config.batch_size];
        let samples = was.abs_diff(is) as u64 * step;
        let what = if is < was { "come again" } else { "are left out" };
        notes.push(format!(
            "the batch size goes from {was} to {is}: in the order of the samples {samples} {what}, as after {step} steps of {is}"
        ));
    }
    Ok(notes)
}

/// Refuses to start `run` over when it has come as far as a checkpoint, which may have been moved away.
pub(super) fn check_never_saved(run: &Path) -> Result<()> {
    let every = config_of(run)?.checkpoint_every;
    let last = metrics::read(run)?.last().map_or(0, |line| line.step);
    // A step's line is written before its checkpoint, and the curve of the loss after one. Perhaps none could be written, though.
    if every > 0 && last > every || run.join(LOSS_PNG).exists() {
        return Err(Error::file(
            run.join(checkpoint::DIRECTORY),
            format!(
                "holds no checkpoint, though metrics.jsonl goes to step {last}: put the checkpoints back, or start a new run (--out DIR) if \
                 none could be written"
            ),
        ));
    }
    Ok(())
}
