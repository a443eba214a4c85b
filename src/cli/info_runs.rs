//! `dtr-fused info` of several runs: what tells them apart and what came of each, as a table or as JSON; files of weights as JSON.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result, printable};
use crate::safetensors_file::SafetensorsFile;
use crate::train::changes::{self, Change};
use crate::train::config::{KNOBS, Knob, Layer};
use crate::train::metrics::{self, Line, Means};
use crate::train::state::told_names;
use crate::train::{TrainConfig, checkpoint, weights};

/// What a run has come to.
#[derive(Serialize)]
struct Summary {
    run: String,
    /// Steps of the last line of its metrics.
    step: u64,
    /// Means over the last lines that cover `log_every` steps.
    loss: Option<f64>,
    mse: Option<f64>,
    validation: Option<Measured>,
    best_validation: Option<Measured>,
    parameters: u64,
    /// All knobs, as they are now.
    config: toml::Table,
    /// What a resume changed in them.
    changes: Vec<Change>,
}

/// A validation whose loss is finite.
#[derive(Clone, Serialize)]
struct Measured {
    step: u64,
    #[serde(flatten)]
    means: Means,
}

/// What a file of weights holds.
#[derive(Serialize)]
struct WeightsFile {
    weights: String,
    parameters: u64,
    /// The knobs that say what the model is and makes, unless its tensors or what the file says are those of none.
    config: Option<toml::Table>,
    /// What was assumed of them, or is wrong.
    note: Option<String>,
    /// Names, if they are told.
    classes: Option<Vec<String>>,
}

/// Knobs that a file of weights tells, beside those of the sections of the model and its routing.
const OF_WEIGHTS: [&str; 8] =
    ["image_size", "in_channels", "num_classes", "data_kind", "label_dropout", "prediction", "learn_sigma", "schedule"];

/// Prints a table with a line for each of the runs in `paths`, or `as_json` a line of JSON, also for files of weights.
///
/// # Errors
/// When one is no run, or cannot be read: the others are shown all the same.
pub(super) fn show(paths: &[PathBuf], as_json: bool) -> Result<()> {
    let mut errors = Vec::new();
    let lines: Vec<String> = if as_json {
        let line = |path: &PathBuf| match path.is_file() {
            true => WeightsFile::of(path).map(|file| json(&file)),
            false => Summary::of(path).map(|run| json(&run)),
        };
        paths.iter().filter_map(|path| line(path).map_err(|error| errors.push(error)).ok()).collect()
    } else {
        let runs = paths.iter().filter_map(|path| Summary::of(path).map_err(|error| errors.push(error)).ok());
        table(&runs.collect::<Vec<_>>()).iter().map(|line| printable(line).to_string()).collect()
    };
    lines.iter().for_each(|line| println!("{line}"));
    let others = errors.len().saturating_sub(1);
    match errors.into_iter().next() {
        Some(error) if others > 0 => Err(error.and(&format!("; {others} more could not be shown either"))),
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// A line of JSON. Control characters beyond those of ASCII, which JSON may have as they are, would command a terminal: they are spelled
/// out too.
fn json(what: &impl Serialize) -> String {
    let text = serde_json::to_string(what).expect("numbers and names");
    let spelled = |c: char| if c.is_control() { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() };
    text.chars().map(spelled).collect()
}

impl WeightsFile {
    fn of(path: &Path) -> Result<Self> {
        let file = SafetensorsFile::open(path)?;
        let (config, note) = match weights::config_of(&file, &Layer::default()) {
            Ok((config, note)) => (Some(config), note),
            Err(error) => (None, Some(error.to_string())),
        };
        let told = |knob: &&Knob| {
            let of_model = ["Model", "Routing"].contains(&knob.section) && !knob.name.starts_with("init");
            of_model || OF_WEIGHTS.contains(&knob.name)
        };
        let as_toml = |config: TrainConfig| {
            let mut all: toml::Table = config.to_toml().parse().expect("knobs as TOML");
            all.retain(|name, _| KNOBS.iter().filter(told).any(|knob| knob.name == name));
            all
        };
        let of_model = file.names().filter(|name| *name != weights::POSITIONS).filter_map(|name| file.get(name));
        Ok(WeightsFile {
            weights: path.display().to_string(),
            parameters: of_model.map(|tensor| tensor.elements() as u64).sum(),
            config: config.map(as_toml),
            note,
            classes: told_names(file.metadata()),
        })
    }
}

impl Summary {
    fn of(path: &Path) -> Result<Self> {
        let run = checkpoint::resolve(path)?.run;
        let run = run.ok_or_else(|| Error::file(path, "is no run: give the directories of runs"))?;
        let config = TrainConfig::from_file(&run.join(checkpoint::CONFIG))?;
        let lines = metrics::read(&run)?;
        let last = lines.last();
        let best = metrics::best_validation(&lines, changes::comparable_since(&run)?).map(|(step, _)| step);
        let mut validations = lines.iter().filter_map(Measured::of);
        Ok(Summary {
            run: run.display().to_string(),
            step: last.map_or(0, |line| line.step),
            loss: last_mean(&lines, config.log_every, |line| line.loss),
            mse: last_mean(&lines, config.log_every, |line| line.mse),
            validation: validations.clone().next_back(),
            best_validation: validations.find(|validation| Some(validation.step) == best),
            parameters: config.model_config().parameters() as u64,
            config: config.to_toml().parse().expect("knobs as TOML"),
            changes: changes::read(&run)?,
        })
    }
}

impl Measured {
    fn of(line: &Line) -> Option<Self> {
        let means = line.validation.clone().filter(|means| means.loss.is_some())?;
        Some(Measured { step: line.step, means })
    }
}

/// The mean of what `of` tells over the last lines that cover `log_every` steps: a line alone may be of a single one.
fn last_mean(lines: &[Line], log_every: u64, of: fn(&Line) -> Option<f64>) -> Option<f64> {
    let (mut covered, mut measured, mut sum) = (0, 0, 0.0);
    for (i, line) in lines.iter().enumerate().rev() {
        let steps = line.step.saturating_sub(i.checked_sub(1).map_or(0, |before| lines[before].step));
        covered += steps;
        if let Some(mean) = of(line) {
            measured += steps;
            sum += mean * steps as f64;
        }
        if covered >= log_every {
            break;
        }
    }
    Some(sum / measured as f64).filter(|mean| mean.is_finite())
}

/// A head, and a line for each run, with a column for every knob that has several values.
fn table(runs: &[Summary]) -> Vec<String> {
    if runs.is_empty() {
        return Vec::new();
    }
    let differs = |name: &&str| runs.iter().any(|run| run.config[*name] != runs[0].config[*name]);
    // The directory is the first column.
    let knobs: Vec<&str> = KNOBS.iter().map(|knob| knob.name).filter(|name| *name != "out").filter(differs).collect();
    let head =
        ["run"].iter().chain(&knobs).chain(&["step", "loss", "mse", "validation", "best"]).map(ToString::to_string);
    let mut rows: Vec<Vec<String>> = vec![head.collect()];
    for run in runs {
        let loss = |loss: Option<f64>| loss.map_or("-".to_string(), metrics::loss_text);
        let best = run.best_validation.as_ref();
        let best = best.map_or("-".into(), |best| format!("{} at {}", loss(best.means.loss), best.step));
        let validation = loss(run.validation.as_ref().and_then(|last| last.means.loss));
        let last = [run.step.to_string(), loss(run.loss), loss(run.mse), validation, best];
        let values = knobs.iter().map(|name| match &run.config[*name] {
            toml::Value::String(text) => text.clone(),
            other => other.to_string(),
        });
        rows.push([run.run.clone()].into_iter().chain(values).chain(last).collect());
    }
    let widths: Vec<usize> =
        (0..rows[0].len()).map(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0)).collect();
    let padded = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_string()
    };
    rows.iter().map(padded).collect()
}
