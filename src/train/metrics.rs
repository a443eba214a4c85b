//! What a run measures: averages over the steps between two lines of `metrics.jsonl`, and the files that keep them.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::events::{EventFile, MAX_FILE_BYTES};
use super::run_dir::RunDir;
use crate::error::{Error, Result};
use crate::model::config::TASKS;
use crate::regular_file;

/// Name of the file with one JSON object per line.
pub const METRICS: &str = "metrics.jsonl";

/// Groups of 125 timesteps over which the loss is also averaged.
pub const OCTILES: usize = 8;

/// Largest picture that goes into an event file.
const MAX_PICTURE_BYTES: u64 = 1 << 26;

/// Longest line that is read back; ours have a few hundred bytes.
const MAX_LINE_BYTES: u64 = 1 << 16;

/// Means over samples. `null` where there was nothing to average, or the mean is not finite.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Means {
    /// Mean loss per sample.
    pub loss: Option<f64>,
    /// Mean squared error, its part of the loss.
    pub mse: Option<f64>,
    /// Variational bound in bits, its part of the loss.
    pub vb: Option<f64>,
    /// Mean loss of the samples with timesteps 0..125, 125..250, ..., 875..1000.
    pub loss_by_timestep: [Option<f64>; OCTILES],
    /// Of a validation, the standard error of `loss`: how far other noise and timesteps would move it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_stderr: Option<f64>,
}

/// One line of `metrics.jsonl`: averages over the steps since the line before it. `null` where there was nothing to average.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Steps done so far.
    pub step: u64,
    /// Mean loss per sample.
    pub loss: Option<f64>,
    /// Mean squared error, its part of the loss.
    pub mse: Option<f64>,
    /// Variational bound in bits, its part of the loss.
    pub vb: Option<f64>,
    /// L2 norm of the gradient over all parameters, before clipping.
    pub grad_norm: Option<f64>,
    /// Mean loss of the samples with timesteps 0..125, 125..250, ..., 875..1000.
    pub loss_by_timestep: [Option<f64>; OCTILES],
    /// Learning rate of the last step.
    pub lr: f64,
    /// Steps skipped since the start of the run because a loss or gradient was not finite.
    pub skipped: u64,
    /// Images per second since the line before.
    pub images_per_s: Option<f64>,
    /// Seconds of training since the run began, without validations, checkpoints and samples. Runs that were begun before this was written
    /// down have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// The log-variances of uncertainty weighting (`uw`), by groups of timesteps as the losses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uw_log_variances: Option<[f32; OCTILES]>,
    /// What the moving average, or the weights (`validation_weights`), have on the samples that are held out, where it was measured after this
    /// step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<Means>,
}

/// Sums since the last line. Its text goes into the checkpoint, so that a resumed run averages over the same steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meter {
    steps: u64,
    skipped: u64,
    samples: u64,
    loss: f64,
    mse: f64,
    vb: f64,
    grad_norm: f64,
    octiles: [(f64, u64); OCTILES],
}

impl Meter {
    /// Counts one sample: its timestep (below [`TASKS`]), loss, squared error and variational bound.
    pub fn add_sample(&mut self, t: usize, loss: f64, mse: f64, vb: f64) {
        self.samples += 1;
        self.loss += loss;
        self.mse += mse;
        self.vb += vb;
        let octile = &mut self.octiles[(t * OCTILES / TASKS).min(OCTILES - 1)];
        octile.0 += loss;
        octile.1 += 1;
    }

    /// Counts one step with the norm of its gradient; its samples were added before.
    pub fn add_step(&mut self, grad_norm: f64) {
        self.steps += 1;
        self.grad_norm += grad_norm;
    }

    /// Counts a step that was skipped; nothing of it is averaged.
    pub fn add_skipped(&mut self) {
        self.skipped += 1;
    }

    /// Steps skipped since the start of the run.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Samples that were counted since the last line.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Steps that count since the last line.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The means over the samples since the last line.
    pub fn means(&self) -> Means {
        let [loss, mse, vb] = [self.loss, self.mse, self.vb].map(|sum| mean(sum, self.samples));
        Means { loss, mse, vb, loss_by_timestep: self.octiles.map(|(sum, n)| mean(sum, n)), loss_stderr: None }
    }

    /// The line at `step`; the sums start again.
    pub fn line(&mut self, step: u64, lr: f64, images_per_s: f64) -> Line {
        let Means { loss, mse, vb, loss_by_timestep, .. } = self.means();
        let line = Line {
            step,
            loss,
            mse,
            vb,
            grad_norm: mean(self.grad_norm, self.steps),
            loss_by_timestep,
            lr,
            skipped: self.skipped,
            images_per_s: Some(images_per_s).filter(|x| x.is_finite()),
            seconds: None,
            uw_log_variances: None,
            validation: None,
        };
        self.restart();
        line
    }

    /// Starts the sums again: they are in a line.
    pub fn restart(&mut self) {
        *self = Meter { skipped: self.skipped, ..Meter::default() };
    }

    /// The exact sums as text, for a checkpoint's metadata.
    pub fn to_text(&self) -> String {
        let sums = [self.loss, self.mse, self.vb, self.grad_norm].map(f64::to_bits);
        let octiles = self.octiles.iter().flat_map(|&(sum, n)| [sum.to_bits(), n]);
        let words = [self.steps, self.skipped, self.samples].into_iter().chain(sums).chain(octiles);
        words.map(|word| format!("{word:x}")).collect::<Vec<_>>().join(" ")
    }

    /// The sums that [`to_text`](Self::to_text) wrote; `None` when `text` is something else.
    pub fn from_text(text: &str) -> Option<Self> {
        let words: Option<Vec<u64>> = text.split(' ').map(|word| u64::from_str_radix(word, 16).ok()).collect();
        let words: [u64; 7 + 2 * OCTILES] = words?.try_into().ok()?;
        let [steps, skipped, samples, loss, mse, vb, grad_norm, octiles @ ..] = words;
        let [loss, mse, vb, grad_norm] = [loss, mse, vb, grad_norm].map(f64::from_bits);
        let octiles = std::array::from_fn(|k| (f64::from_bits(octiles[2 * k]), octiles[2 * k + 1]));
        Some(Meter { steps, skipped, samples, loss, mse, vb, grad_norm, octiles })
    }
}

/// A mean for JSON, which has no NaN; a mean over nothing is none.
fn mean(sum: f64, n: u64) -> Option<f64> {
    Some(sum / n as f64).filter(|x| x.is_finite())
}

/// A loss for people, who lose count of the digits of one that diverged.
pub fn loss_text(loss: f64) -> String {
    if loss.abs() < 1e6 { format!("{loss:.4}") } else { format!("{loss:.3e}") }
}

/// The open metric files of a run: `metrics.jsonl` and TensorBoard's events.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    events: EventFile,
    last: Option<Line>,
}

impl MetricsLog {
    /// Opens the files of `run`, which goes on after `step` (0 for a new run): what they hold of later steps is dropped, and
    /// so is a line that a kill cut short.
    ///
    /// # Errors
    /// [`Error::File`] when a file cannot be read or written.
    pub fn open(run: &RunDir, step: u64) -> Result<Self> {
        let path = run.path().join(METRICS);
        let old = match regular_file::read(&path, MAX_FILE_BYTES) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            old => old.map_err(|e| {
                Error::file(&path, format!("cannot be read: {e}; move it away, and only the curves of before are lost"))
            })?,
        };
        let (mut kept, mut last) = (Vec::new(), None);
        for text in old.split_inclusive(|&b| b == b'\n').filter(|text| text.ends_with(b"\n")) {
            if let Ok(line) = serde_json::from_slice::<Line>(text)
                && line.step <= step
            {
                kept.extend_from_slice(text);
                last = Some(line);
            }
        }
        // A link in a run from others may lead anywhere.
        if kept != old || path.is_symlink() {
            run.replace(METRICS, |out| out.write_all(&kept))?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.map_err(|e| Error::file(&path, format!("cannot be written: {e}")))?;
        Ok(MetricsLog { path, file, events: EventFile::open(run, step)?, last })
    }

    /// The step of the last line.
    pub fn last(&self) -> Option<u64> {
        self.last.as_ref().map(|line| line.step)
    }

    /// Those of the last line, if it has any.
    pub(super) fn seconds(&self) -> Option<f64> {
        self.last.as_ref().map_or(Some(0.0), |line| line.seconds)
    }

    /// Appends a line to both files.
    ///
    /// # Errors
    /// [`Error::File`] when a file cannot be written. `metrics.jsonl` then has not got the line.
    pub fn append(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_vec(line).expect("numbers and names");
        text.push(b'\n');
        let fail = |e: std::io::Error| Error::file(&self.path, format!("cannot be written: {e}"));
        let before = self.file.metadata().map_err(fail)?.len();
        let written = self.file.write_all(&text).map_err(fail).and_then(|()| self.append_events(line));
        written.inspect_err(|_| {
            // Where that fails too, half of a line stays, which a resumed run takes away.
            let _ = self.file.set_len(before);
        })?;
        self.last = Some(line.clone());
        Ok(())
    }

    /// Shows the picture `path`, a PNG, in TensorBoard as the samples of `step`.
    ///
    /// # Errors
    /// [`Error::File`] when one of the two files cannot be read or written, or the picture has more than 64 MiB.
    pub fn append_samples(&mut self, step: u64, path: &Path) -> Result<()> {
        let fail = |e: std::io::Error| Error::file(path, format!("cannot be read: {e}"));
        let png = regular_file::read(path, MAX_PICTURE_BYTES).map_err(fail)?;
        self.events.append_picture(step, "samples", &png)
    }

    fn append_events(&mut self, line: &Line) -> Result<()> {
        let mut scalars =
            vec![("learning_rate".to_string(), line.lr), ("skipped_steps".to_string(), line.skipped as f64)];
        let named = [
            ("loss/total", line.loss),
            ("loss/mse", line.mse),
            ("loss/vb", line.vb),
            ("gradient_norm", line.grad_norm),
            ("images_per_second", line.images_per_s),
        ];
        scalars.extend(named.iter().filter_map(|&(name, value)| Some((name.to_string(), value?))));
        scalars.extend(by_timestep("loss_by_timestep", &line.loss_by_timestep));
        if let Some(log_variances) = line.uw_log_variances {
            scalars.extend(by_timestep("uw_log_variance", &log_variances.map(|s| Some(s.into()))));
        }
        if let Some(Means { loss, mse, vb, loss_by_timestep, loss_stderr }) = &line.validation {
            let named = [
                ("validation/total", loss),
                ("validation/mse", mse),
                ("validation/vb", vb),
                ("validation/stderr", loss_stderr),
            ];
            scalars.extend(named.iter().filter_map(|&(name, value)| Some((name.to_string(), (*value)?))));
            scalars.extend(by_timestep("validation_by_timestep", loss_by_timestep));
        }
        self.events.append(line.step, &scalars)
    }
}

/// A loss by timestep as curves of `group`.
fn by_timestep(group: &str, losses: &[Option<f64>; OCTILES]) -> impl Iterator<Item = (String, f64)> {
    losses.iter().enumerate().filter_map(move |(k, &loss)| Some((format!("{group}/{}", octile_name(k)), loss?)))
}

/// The timesteps of group `k`, first and last: `125-249`.
pub(crate) fn octile_name(k: usize) -> String {
    format!("{:03}-{:03}", k * TASKS / OCTILES, (k + 1) * TASKS / OCTILES - 1)
}

/// All lines of the run in `run`, in order; none when it has no metrics yet. Lines that are no metrics are left out.
///
/// # Errors
/// [`Error::File`] when the file is there but cannot be read.
pub fn read(run: &Path) -> Result<Vec<Line>> {
    let path = run.join(METRICS);
    let fail = |e: std::io::Error| Error::file(&path, format!("cannot be read: {e}"));
    let mut reader = match regular_file::open(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => BufReader::new(file.map_err(fail)?.take(MAX_FILE_BYTES)),
    };
    let (mut lines, mut text) = (Vec::new(), Vec::new());
    loop {
        text.clear();
        if reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut text).map_err(fail)? == 0 {
            return Ok(lines);
        }
        lines.extend(serde_json::from_slice::<Line>(&text).ok());
    }
}

/// Step and loss of the lowest validation loss in `lines` that is finite, of those after step `since`.
pub fn best_validation<'a>(lines: impl IntoIterator<Item = &'a Line>, since: u64) -> Option<(u64, f64)> {
    let measured = |line: &Line| Some((line.step, line.validation.as_ref()?.loss?));
    lines.into_iter().filter(|line| line.step > since).filter_map(measured).min_by(|(_, a), (_, b)| a.total_cmp(b))
}

#[cfg(test)]
mod tests {
    use super::super::config::TrainConfig;
    use super::*;
    use std::fs;

    fn run(place: &Path) -> RunDir {
        RunDir::create(&TrainConfig { out: place.join("run").display().to_string(), ..TrainConfig::default() }).unwrap()
    }

    /// A meter that saw a few uneven samples.
    fn meter(seed: u64) -> Meter {
        let mut meter = Meter::default();
        for i in 0..5 {
            let x = 1.0 / (seed + i + 3) as f64;
            meter.add_sample((seed as usize * 131 + i as usize * 251) % 1000, x, x * x, x / 7.0);
        }
        meter.add_step(0.1 + seed as f64);
        meter
    }

    /// A run from others may have anything there.
    #[cfg(unix)]
    #[test]
    fn what_is_no_file_is_not_read() {
        let place = tempfile::tempdir().unwrap();
        let run = run(place.path());
        for name in [METRICS, "events.out.tfevents.0000000001.dtr-fused"] {
            let path = run.path().join(name);
            std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
            assert!(MetricsLog::open(&run, 3).unwrap_err().to_string().contains("not a regular file"), "{name}");
            assert_eq!(read(run.path()).is_err(), name == METRICS);
            fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn a_line_holds_the_means() {
        let mut meter = Meter::default();
        meter.add_sample(0, 1.0, 0.5, 0.25);
        meter.add_sample(124, 3.0, 1.5, 0.75);
        meter.add_sample(999, 5.0, 1.0, 4.0);
        meter.add_step(2.0);
        meter.add_step(4.0);
        meter.add_skipped();
        let line = meter.line(2, 1e-3, 100.0);
        assert_eq!((line.loss, line.mse, line.vb), (Some(3.0), Some(1.0), Some(5.0 / 3.0)));
        assert_eq!((line.grad_norm, line.skipped, line.step), (Some(3.0), 1, 2));
        assert_eq!(
            (line.loss_by_timestep[0], line.loss_by_timestep[1], line.loss_by_timestep[7]),
            (Some(2.0), None, Some(5.0))
        );
        for (t, octile) in [(124, 0), (125, 1), (499, 3), (500, 4), (874, 6), (875, 7)] {
            let mut meter = Meter::default();
            meter.add_sample(t, 1.0, 0.5, 0.5);
            assert!(meter.line(1, 0.0, 0.0).loss_by_timestep[octile].is_some(), "timestep {t}");
        }
        let empty = meter.line(3, 1e-3, f64::INFINITY);
        assert_eq!((empty.loss, empty.images_per_s, empty.skipped), (None, None, 1));
        let text = serde_json::to_string(&empty).unwrap();
        assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), empty, "{text}");
    }

    #[test]
    fn losses_are_readable() {
        assert_eq!([0.123_456, -1.0, 999_999.0].map(loss_text), ["0.1235", "-1.0000", "999999.0000"]);
        assert_eq!([1_883_881_395_451_313.0, -1e6].map(loss_text), ["1.884e15", "-1.000e6"]);
    }

    #[test]
    fn the_meter_survives_a_checkpoint_bit_for_bit() {
        let meter = meter(4);
        assert_eq!(Meter::from_text(&meter.to_text()).unwrap(), meter);
        for bad in ["", "1 2 3", "x", &format!("{} 0", meter.to_text())] {
            assert_eq!(Meter::from_text(bad), None, "{bad}");
        }
    }

    /// Each scalar is its name and its value as a float (field 2) behind that.
    #[test]
    fn the_events_of_a_line_have_its_numbers() {
        let place = tempfile::tempdir().unwrap();
        let run = run(place.path());
        let mut log = MetricsLog::open(&run, 0).unwrap();
        let mut meter = meter(1);
        meter.add_skipped();
        let line = meter.line(300, 0.25, 12.5);
        log.append(&line).unwrap();
        let name = fs::read_dir(run.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let name = name.filter_map(|name| name.into_string().ok()).find(|name| name.starts_with("events."));
        let events = fs::read(run.path().join(name.unwrap())).unwrap();
        let holds = |bytes: &[u8]| events.windows(bytes.len()).any(|found| found == bytes);
        // Field 2 of the event.
        assert!(holds(&[16, 0xAC, 2]), "step 300");
        for (name, value) in [
            ("loss/total", line.loss),
            ("loss/mse", line.mse),
            ("loss/vb", line.vb),
            ("gradient_norm", line.grad_norm),
            ("learning_rate", Some(0.25)),
            ("skipped_steps", Some(1.0)),
            ("images_per_second", Some(12.5)),
            ("loss_by_timestep/125-249", line.loss_by_timestep[1]),
            ("loss_by_timestep/875-999", line.loss_by_timestep[7]),
        ] {
            let value = value.unwrap_or_else(|| panic!("{name} was not measured")) as f32;
            assert!(holds(&[name.as_bytes(), &[0x15], &value.to_le_bytes()].concat()), "{name} {value}");
        }
        assert!(line.loss_by_timestep[4].is_none() && !holds(b"500-624"), "what was not measured is not there");
    }

    #[test]
    fn a_line_whose_events_cannot_be_written_is_not_there() {
        let place = tempfile::tempdir().unwrap();
        let run = run(place.path());
        let mut log = MetricsLog::open(&run, 0).unwrap();
        log.append(&meter(1).line(1, 0.1, 10.0)).unwrap();
        // Opened to read only.
        log.events.file = File::open(run.path().join(METRICS)).unwrap();
        log.append(&meter(2).line(2, 0.1, 10.0)).unwrap_err();
        // The meter still has step 2, and the run is saved after it.
        MetricsLog::open(&run, 2).unwrap();
        assert_eq!(read(run.path()).unwrap().iter().map(|line| line.step).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn a_resumed_run_leaves_the_file_of_an_uninterrupted_one() {
        let place = tempfile::tempdir().unwrap();
        let run = run(place.path());
        let write = |log: &mut MetricsLog, steps: std::ops::Range<u64>| {
            for step in steps {
                log.append(&meter(step).line(step, 0.1, 10.0)).unwrap();
            }
        };
        write(&mut MetricsLog::open(&run, 0).unwrap(), 1..8);
        let path = run.path().join(METRICS);
        let whole = fs::read(&path).unwrap();
        // Killed in the middle of a line after step 5's checkpoint.
        fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        let mut log = MetricsLog::open(&run, 5).unwrap();
        assert_eq!(read(run.path()).unwrap().len(), 5);
        write(&mut log, 6..8);
        assert_eq!(fs::read(&path).unwrap(), whole);
        let last = &read(run.path()).unwrap()[6];
        assert_eq!((last.step, last.lr, last.loss_by_timestep[0]), (7, 0.1, None));
        assert!((last.loss.unwrap() - meter(7).line(7, 0.1, 10.0).loss.unwrap()).abs() < 1e-12);
    }
}
