//! `changes.jsonl`: what was set otherwise when a run was resumed, a line for each key. `config.toml` has only the last values.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::checkpoint::CONFIG;
use super::config::{KNOBS, Knob, TrainConfig};
use super::run_dir::RunDir;
use crate::error::{Error, Result};
use crate::regular_file;

/// Name of the file. A run whose settings never changed has none.
pub(super) const CHANGES: &str = "changes.jsonl";

/// Most bytes of it that are read; a line takes about 80.
const MAX_FILE_BYTES: u64 = 1 << 24;

/// A key that has another value from a step on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Change {
    /// Steps that were done with the value of before.
    pub(crate) step: u64,
    pub(crate) key: String,
    /// As TOML writes it, like the next.
    was: String,
    is: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} {} -> {}", self.key, self.was, self.is)
    }
}

/// Several changes in one line.
pub(crate) fn listed(changes: &[Change]) -> String {
    changes.iter().map(Change::to_string).collect::<Vec<_>>().join(", ")
}

/// Knobs with other values of which validation losses are others.
const HOW_VALIDATED: [&str; 3] = ["validation_data", "validation_weights", "validation_repeats"];

/// Whether a change of `knob` stays on record: it may change the weights or what is measured of them. Those of the machine and of what is
/// written when do not, but for the precision and how it is validated.
fn matters(knob: &Knob) -> bool {
    !["Machine", "Output"].contains(&knob.section) || knob.name == "precision" || HOW_VALIDATED.contains(&knob.name)
}

/// All changes of `run`, in order. Lines that are none are left out.
///
/// # Errors
/// [`Error::File`] when the file is there but cannot be read.
pub(crate) fn read(run: &Path) -> Result<Vec<Change>> {
    let path = run.join(CHANGES);
    match regular_file::read(&path, MAX_FILE_BYTES) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        text => {
            let text = text.map_err(|e| Error::file(&path, format!("cannot be read: {e}; move it away")))?;
            Ok(text.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect())
        }
    }
}

/// The step after which all validation losses of `run` are of the same samples, noise and kind of weights, and can be compared.
///
/// # Errors
/// As [`read`].
pub(crate) fn comparable_since(run: &Path) -> Result<u64> {
    let validated = |change: &&Change| HOW_VALIDATED.contains(&change.key.as_str());
    Ok(read(run)?.iter().filter(validated).map(|change| change.step).max().unwrap_or(0))
}

/// Puts on record what `config` has otherwise than the steps until `step` had, and returns that: their values are in `checkpoint`, the one
/// of this step. What was recorded of later steps is dropped, and of a run that starts over everything.
pub(super) fn record(run: &RunDir, config: &TrainConfig, checkpoint: Option<&Path>, step: u64) -> Result<Vec<Change>> {
    let old = read(run.path())?;
    let mut changes: Vec<Change> = old.iter().filter(|change| change.step < step).cloned().collect();
    let before = changes.len();
    let saved = checkpoint.map(|checkpoint| checkpoint.join(CONFIG)).filter(|path| path.exists());
    let saved = saved.map(|path| TrainConfig::from_file(&path)).transpose()?;
    for knob in KNOBS.iter().filter(|knob| step > 0 && !knob.fixed && matters(knob)) {
        // A checkpoint that was written again when it was resumed, for a line of metrics that was due, has the values of later steps.
        let recorded = old.iter().find(|change| change.step == step && change.key == knob.name);
        let was = recorded.map(|change| change.was.clone()).or_else(|| Some(saved.as_ref()?.toml_of(knob.name)));
        let is = config.toml_of(knob.name);
        if let Some(was) = was.filter(|was| *was != is) {
            changes.push(Change { step, key: knob.name.into(), was, is });
        }
    }
    if changes != old {
        run.replace(CHANGES, |out| {
            changes.iter().try_for_each(|change| writeln!(out, "{}", serde_json::to_string(change)?))
        })?;
    }
    Ok(changes.split_off(before))
}
