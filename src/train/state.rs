//! A trainer's state in checkpoints: everything that a run needs to go on bit for bit.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::changes;
use super::checkpoint::{self, FileOut, Metadata, TensorOut};
use super::learner::{Learner, Uncertainty};
use super::metrics::{self, Line, Meter};
use super::plot;
use super::progress::Progress;
use super::run_dir::RunDir;
use super::trainer::Trainer;
use super::weights::{self, read_weights};
use crate::data::fingerprint::difference;
use crate::data::{Dataset, is_array_file};
use crate::diffusion::weighting::CLUSTERS;
use crate::error::{Error, Result};
use crate::safetensors_file::SafetensorsFile;

/// What a checkpoint's files say of the data: a JSON list of the names of classes, if they have names.
const CLASSES: &str = "classes";
/// And, beside the state of the trainer, how many samples there are, and which.
const SAMPLES: &str = "samples";
const FINGERPRINT: &str = "fingerprint";

/// Steps that were skipped in a row before it was saved.
const NONFINITE: &str = "nonfinite_in_a_row";

/// Most bytes of that list that are written: of a longer header no reader takes the file.
const MOST_NAMES: usize = 1 << 20;

/// What [`CLASSES`] says; a list that is too long is as good as none.
fn text_of_names(names: Option<&[String]>) -> String {
    let text = serde_json::to_string(&names).expect("a list of names");
    if text.len() <= MOST_NAMES { text } else { "null".into() }
}

/// The names of classes that the metadata of a file tell, if they do.
pub(crate) fn told_names(metadata: &Metadata) -> Option<Vec<String>> {
    // What is no such list is as good as none.
    serde_json::from_str(metadata.get(CLASSES)?).unwrap_or_default()
}

/// The names of classes that the files of `checkpoint` tell: those of weights, or, before they did, that of the moments.
pub(crate) fn names_in(checkpoint: &Path) -> Option<Vec<String>> {
    let files = [checkpoint::EMA, checkpoint::MODEL, checkpoint::OPTIMIZER].map(|name| checkpoint.join(name));
    files.into_iter().find_map(|path| told_names(SafetensorsFile::open(path).ok()?.metadata()))
}

/// How many samples there were to train on when `checkpoint` was saved, if it tells.
pub(super) fn samples_in(checkpoint: &Path) -> Option<usize> {
    recorded_in(checkpoint, SAMPLES)?.parse().ok()
}

/// The fingerprint of these samples, if `checkpoint` tells.
pub(super) fn fingerprint_in(checkpoint: &Path) -> Option<String> {
    recorded_in(checkpoint, FINGERPRINT)
}

fn recorded_in(checkpoint: &Path, key: &str) -> Option<String> {
    SafetensorsFile::open(checkpoint.join(checkpoint::OPTIMIZER)).ok()?.metadata().get(key).cloned()
}

/// The names of the classes, unless they are only numbers: those of arrays.
pub(super) fn names_of_classes(dataset: &dyn Dataset) -> Option<&[String]> {
    let names = dataset.class_names();
    names.iter().enumerate().any(|(class, name)| *name != class.to_string()).then_some(names)
}

/// The last checkpoint of a run that was not saved amid steps that were skipped.
pub(super) fn last_after_a_good_step(run: &RunDir) -> Option<PathBuf> {
    let good = |path: &PathBuf| {
        let file = SafetensorsFile::open(path.join(checkpoint::OPTIMIZER));
        file.is_ok_and(|file| file.metadata().get(NONFINITE).is_some_and(|steps| steps == "0"))
    };
    checkpoint::list(run.path()).ok()?.into_iter().rev().map(|(_, path)| path).find(good)
}

/// Names of classes that are labels: `07` is label 7, if there is no `7`.
pub(super) fn labels_in(names: &[String]) -> Option<Vec<String>> {
    let label = |name: &String| Some(name.parse::<usize>().ok()?.to_string());
    let labels: Vec<String> = names.iter().map(label).collect::<Option<_>>()?;
    let differ = labels.iter().collect::<HashSet<_>>().len() == labels.len();
    differ.then_some(labels)
}

/// The checkpoint of `run` with the lowest validation loss in `lines` after step `since`, if it has one.
pub(crate) fn best_saved(run: &Path, lines: &[Line], since: u64) -> Result<Option<(u64, PathBuf)>> {
    let mut saved = checkpoint::list(run)?;
    let both = lines.iter().filter(|line| saved.iter().any(|(step, _)| *step == line.step));
    let best = metrics::best_validation(both, since);
    saved.retain(|(step, _)| best.is_some_and(|(best, _)| *step == best));
    Ok(saved.pop())
}

/// Names of classes to compare, of data that have been and are, if they can be. Classes without names have their labels, which the names
/// of folders may be too.
fn comparable_names(names: [Option<Vec<String>>; 2]) -> Option<[Vec<String>; 2]> {
    let labels = |names: &[String]| (0..names.len()).map(|label| label.to_string()).collect();
    match names {
        [Some(were), Some(are)] => Some([were, are]),
        [Some(were), None] => Some([labels_in(&were)?, labels(&were)]),
        [None, Some(are)] => Some([labels(&are), labels_in(&are)?]),
        [None, None] => None,
    }
}

/// The first class that has another name in the second list, with both names, if the lists can be compared.
pub(super) fn other_class(names: [Option<Vec<String>>; 2]) -> Option<(usize, [String; 2])> {
    let names = comparable_names(names)?;
    let most = names.iter().map(Vec::len).max()?;
    let class = (0..most).find(|&class| names[0].get(class) != names[1].get(class))?;
    Some((class, names.map(|names| names.get(class).map_or("missing".into(), |name| format!("'{name}'")))))
}

impl Trainer<'_> {
    /// Writes a checkpoint and the loss curve, and deletes checkpoints that are no longer kept.
    pub(super) fn save(&mut self, run: &RunDir, progress: &Progress) -> Result<()> {
        let config = self.config;
        self.learner.fetch()?;
        let names = names_of_classes(self.dataset());
        let Learner { dit, weights: model, ema, m, v, uncertainty, updates, .. } = &self.learner;
        let tokens = [1, dit.config.tokens(), dit.config.hidden_size];
        let weights_file = |name, data| {
            let mut tensors = TensorOut::of_layout(&dit.layout, data, "");
            tensors.push(TensorOut { name: "pos_embed".into(), shape: &tokens, data: dit.positions() });
            let mut metadata = weights::metadata(config);
            metadata.extend(names.map(|_| (CLASSES.to_string(), text_of_names(names))));
            FileOut { name, tensors, metadata }
        };
        let mut moments = TensorOut::of_layout(&dit.layout, m, "m.");
        moments.extend(TensorOut::of_layout(&dit.layout, v, "v."));
        if let Some(Uncertainty { log_variances, m, v, .. }) = uncertainty {
            for (name, data) in [("loss_scale", log_variances), ("m.loss_scale", m), ("v.loss_scale", v)] {
                moments.push(TensorOut { name: name.into(), shape: &[CLUSTERS], data });
            }
        }
        let state = [
            ("step", self.step.to_string()),
            ("updates", updates.to_string()),
            (NONFINITE, self.nonfinite_in_a_row.to_string()),
            ("meter", self.meter.to_text()),
            (CLASSES, text_of_names(names)),
            (SAMPLES, self.dataset().len().to_string()),
            (FINGERPRINT, self.fingerprint.clone()),
        ];
        let metadata: Metadata = state.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
        let files = [
            weights_file(checkpoint::MODEL, model),
            weights_file(checkpoint::EMA, ema),
            FileOut { name: checkpoint::OPTIMIZER, tensors: moments, metadata },
        ];
        checkpoint::write(run.path(), self.step, &files, &config.to_toml())?;
        self.saved = Some(self.step);
        // While steps are skipped, the weights may be ruined already: what was saved before stays.
        if self.nonfinite_in_a_row == 0
            && let Err(error) = self.prune(run)
        {
            progress.say(&format!("more checkpoints stay than should: {error}"));
        }
        let drawn = metrics::read(run.path()).and_then(|lines| plot::write_loss(run, &lines, &config.model));
        if let Err(error) = drawn {
            progress.say(&format!("no curve of the loss: {error}"));
        }
        Ok(())
    }

    /// Deletes the checkpoints that are no longer kept.
    fn prune(&self, run: &RunDir) -> Result<()> {
        let config = self.config;
        let mut best = Vec::new();
        if config.keep_best {
            let lines = metrics::read(run.path())?;
            // Other data may be harder; the best on those of before stays too, as they may only have been moved.
            for since in [0, changes::comparable_since(run.path())?] {
                best.extend(best_saved(run.path(), &lines, since)?);
            }
        }
        let best: Vec<u64> = best.into_iter().map(|(step, _)| step).collect();
        checkpoint::prune(run.path(), config.keep_checkpoints, config.keep_every, &best)
    }

    /// Takes everything from the last checkpoint of a run. What there is to say about its data is returned.
    pub(super) fn go_on_from(&mut self, checkpoint: &Path, run: &RunDir) -> Result<Option<String>> {
        let config = self.config;
        let all = checkpoint::list(run.path())?;
        if let Err(error) = self.load(checkpoint) {
            let this = all.iter().find(|(_, path)| path.file_name() == checkpoint.file_name());
            let mut before = all.iter().rev().filter(|(step, _)| this.is_none_or(|(this, _)| step < this));
            let Some((_, good)) = before.find(|(_, path)| self.load(path).is_ok()) else { return Err(error) };
            return Err(error.and(&format!(
                "; the last good one before it is {}: move those after that away, then --resume {} goes on from there",
                good.display(),
                run.path().display()
            )));
        }
        // Later checkpoints would be taken for the run's newest, and those written from here on pruned before them.
        if let Some((latest, path)) = all.last().filter(|(latest, _)| *latest > self.step) {
            return Err(Error::usage(format!(
                "step {} is not the last of this run, {latest} is: move {} and others after it away to go on from here",
                self.step,
                path.display()
            )));
        }
        if config.steps < self.step {
            return Err(Error::usage(format!(
                "steps is {}, but {} are done: give more to train on",
                config.steps, self.step
            )));
        }
        // A run that stopped for such steps is given another try.
        if self.nonfinite_in_a_row >= config.max_nonfinite_steps {
            self.nonfinite_in_a_row = 0;
        }
        self.check_data(checkpoint)
    }

    /// Refuses data whose classes have other names than those `checkpoint` was trained on, if both have names, or numbers for names: labels
    /// would mean something else. A note if they are others, or another number. Checkpoints of before this was written down say nothing.
    fn check_data(&self, checkpoint: &Path) -> Result<Option<String>> {
        let config = self.config;
        let file = SafetensorsFile::open(checkpoint.join(checkpoint::OPTIMIZER))?;
        let recorded = |key: &str| file.metadata().get(key);
        let (classes, samples) = (self.dataset().num_classes(), self.dataset().len());
        if recorded(CLASSES).is_none() {
            return Ok((classes < config.num_classes).then(|| {
                format!(
                    "the data have {classes} classes and the model {}: if class folders are gone, labels mean other classes now",
                    config.num_classes
                )
            }));
        }
        let were = told_names(file.metadata());
        // Where arrays have got names since, their labels are those of before.
        let named_since = were.is_none() && is_array_file(Path::new(&config.data));
        let are = names_of_classes(self.dataset()).filter(|_| !named_since).map(<[String]>::to_vec);
        if let Some((class, [was, is])) = other_class([were, are]) {
            return Err(Error::usage(format!(
                "class {class} of the data '{}' is {is}, but was {was} when this run was saved, so labels would mean other classes: give \
                 it the same classes with --data, or start a new run",
                config.data
            )));
        }
        let was = recorded(SAMPLES).and_then(|was| was.parse::<usize>().ok());
        let held_out = if config.validation_samples > 0 { ", and others of them are held out now" } else { "" };
        let other = recorded(FINGERPRINT).and_then(|were| difference(were, &self.fingerprint));
        if let Some(how) = other.filter(|_| was == Some(samples)) {
            return Ok(Some(format!(
                "the data '{}' are others than when this run was last saved ({how}): it goes on with these{held_out}",
                config.data
            )));
        }
        Ok(was.filter(|&was| was != samples).map(|was| {
            let [samples, was] = [samples, was].map(|count| count.saturating_add(config.validation_samples));
            format!(
                "the data have {samples} samples, but had {was} when this run was last saved: it goes on with those there are{held_out}"
            )
        }))
    }

    /// Takes everything from a checkpoint.
    fn load(&mut self, directory: &Path) -> Result<()> {
        let learner = &mut self.learner;
        let layout = &learner.dit.layout;
        for (name, buffer) in [(checkpoint::MODEL, &mut learner.weights), (checkpoint::EMA, &mut learner.ema)] {
            read_weights(&directory.join(name), &learner.dit, buffer)?;
        }
        let path = directory.join(checkpoint::OPTIMIZER);
        let file = SafetensorsFile::open(&path)?;
        let extra = ["loss_scale", "m.loss_scale", "v.loss_scale"];
        let extra = if learner.uncertainty.is_some() { &extra[..] } else { &[] };
        checkpoint::check_names(&file, layout, &["m.", "v."], extra)?;
        checkpoint::read_layout(&file, layout, "m.", &mut learner.m)?;
        checkpoint::read_layout(&file, layout, "v.", &mut learner.v)?;
        if let Some(Uncertainty { log_variances, m, v, .. }) = &mut learner.uncertainty {
            for (name, out) in extra.iter().zip([log_variances, m, v]) {
                checkpoint::read_tensor(&file, name, &[CLUSTERS], out)?;
            }
        }
        let text = |key: &str| {
            let missing =
                || Error::file(&path, format!("says nothing usable of '{key}': it was not written by dtr-fused"));
            file.metadata().get(key).ok_or_else(missing)
        };
        let number = |key: &str| {
            let bad = |_| Error::file(&path, format!("'{key}' is no number: the file is damaged"));
            text(key)?.parse::<u64>().map_err(bad)
        };
        self.step = number("step")?;
        self.saved = Some(self.step);
        learner.updates = number("updates")?;
        self.nonfinite_in_a_row = number(NONFINITE)?;
        self.meter = Meter::from_text(text("meter")?)
            .ok_or_else(|| Error::file(&path, "the running sums are unreadable: the file is damaged"))?;
        self.learner.push()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_classes_are_written_unless_they_would_make_a_file_unreadable() {
        let names = |n: usize| vec!["n".repeat(200); n];
        let read = |n: usize| serde_json::from_str::<Option<Vec<String>>>(&text_of_names(Some(&names(n)))).unwrap();
        assert_eq!(read(5000), Some(names(5000)));
        assert_eq!(read(6000), None);
        assert_eq!(text_of_names(None), "null");
    }

    #[test]
    fn folders_of_numbers_are_compared_with_labels() {
        let names = |names: &[&str]| Some(names.iter().map(|name| name.to_string()).collect::<Vec<_>>());
        let differ = |were, are| comparable_names([were, are]).map(|[were, are]| were != are);
        let fewer = || names(&["0", "1", "3"]);
        // Folder 2 is gone, or has come.
        assert_eq!(differ(None, fewer()), Some(true));
        assert_eq!(differ(fewer(), None), Some(true));
        assert_eq!(differ(None, names(&["00", "01", "02"])), Some(false));
        assert_eq!(differ(fewer(), fewer()), Some(false));
        // Names say nothing of labels.
        assert_eq!(differ(None, names(&["ape", "bear"])), None);
        assert_eq!(differ(names(&["ape", "7"]), None), None);
        assert_eq!(differ(None, None), None);
    }
}
