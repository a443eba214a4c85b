//! The training loop, top to bottom. What it starts from is made in [`setup`](super::setup); `state.rs` saves and loads it, `samples.rs` shows what it
//! has learned.

use super::batches::Batches;
use super::changes;
use super::checkpoint;
use super::config::{DataKind, Decay, TrainConfig};
use super::device::{DeviceUpdate, LARGEST_NORM};
use super::learner::{Learner, Losses};
use super::metrics::{self, Line, Meter, MetricsLog};
use super::optimizer::Update;
use super::progress::Progress;
use super::resume;
use super::run_dir::RunDir;
use super::setup::{Data, fit_to_data, learner_on, open_data};
use super::state::last_after_a_good_step;
use super::validation::Validation;
use super::weights::start_from_given_weights;
use crate::data::Dataset;
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The run's directory.
    pub run: PathBuf,
    /// Steps that were done before.
    pub began: u64,
    /// Steps done.
    pub step: u64,
    /// Whether all steps of the configuration are done, and the samples after the last (else it was interrupted).
    pub finished: bool,
    /// The last grid of samples, unless it failed.
    pub samples: Option<PathBuf>,
}

/// Trains a new run. `stop` may be set at any time: the step in progress is finished and a checkpoint is written.
///
/// # Errors
/// When the configuration, the data or the run's directory are not usable, or too many steps in a row are not finite.
pub fn start(config: TrainConfig, stop: &AtomicBool) -> Result<Outcome> {
    config.validate()?;
    let dataset = open_data(&config, false)?;
    start_on(config, dataset, stop)
}

/// [`start`] on a data set of one's own: `config.data` is only its name, and should be none that `train` would open, as [`resume_on`] alone
/// goes on with such a run.
///
/// ```
/// # use dtr_fused::Result;
/// # use dtr_fused::data::Dataset;
/// # use dtr_fused::train::{TrainConfig, trainer};
/// # use std::sync::Arc;
/// # use std::sync::atomic::AtomicBool;
/// /// White squares, large ones (class 0) and small ones, on black.
/// struct Squares([String; 2]);
///
/// impl Dataset for Squares {
///     fn shape(&self) -> [usize; 3] {
///         [1, 8, 8]
///     }
///     fn class_names(&self) -> &[String] {
///         &self.0
///     }
///     fn len(&self) -> usize {
///         12
///     }
///     fn read(&self, index: usize, _: bool, out: &mut [f32]) -> Result<u32> {
///         let (class, left) = (index % 2, index / 2 % 3);
///         let square = left..left + [5, 2][class];
///         let white = |i: usize| square.contains(&(i / 8)) && square.contains(&(i % 8));
///         out.iter_mut().enumerate().for_each(|(i, x)| *x = if white(i) { 1.0 } else { -1.0 });
///         Ok(class as u32)
///     }
/// }
///
/// # let place = tempfile::tempdir().unwrap();
/// # let out = place.path().join("squares").display().to_string();
/// let config = TrainConfig { data: "squares".into(), steps: 2, out, ..TrainConfig::default() };
/// let squares = Arc::new(Squares(["large", "small"].map(String::from)));
/// let outcome = trainer::start_on(config, squares, &AtomicBool::new(false))?;
/// assert!(outcome.run.join("checkpoints/0000002/ema.safetensors").exists());
/// # Ok::<(), dtr_fused::Error>(())
/// ```
///
/// # Errors
/// As [`start`].
pub fn start_on(mut config: TrainConfig, dataset: Arc<dyn Dataset>, stop: &AtomicBool) -> Result<Outcome> {
    config.validate()?;
    config.check_cfg("sample_cfg", config.sample_cfg)?;
    let data = fit_to_data(&mut config, dataset, false)?;
    in_pool(&config, || {
        let (mut learner, mut notes) = learner_on(&config)?;
        notes.extend(start_from_given_weights(&config, &mut learner, &*data.training)?);
        let run = RunDir::create(&config)?;
        let trainer = Trainer::new(&config, data, learner, notes)?;
        trainer.run(&run, stop)
    })
}

/// Goes on with a run exactly as if it had never stopped: from `checkpoint`, without one from the latest, and from the start if there is
/// none.
///
/// # Errors
/// As [`start`], and when the checkpoint is damaged or another model's, or the run had checkpoints that are gone.
pub fn resume(config: TrainConfig, run: &Path, checkpoint: Option<&Path>, stop: &AtomicBool) -> Result<Outcome> {
    config.validate()?;
    let dataset = open_data(&config, true)?;
    resume_on(config, dataset, run, checkpoint, stop)
}

/// [`resume()`] on the data set that the run was started on with [`start_on`]. The run's configuration is
/// [`resume::config_of`]`(run)`, whose `steps`, say, may be changed.
///
/// # Errors
/// As [`resume()`].
pub fn resume_on(
    mut config: TrainConfig,
    dataset: Arc<dyn Dataset>,
    run: &Path,
    checkpoint: Option<&Path>,
    stop: &AtomicBool,
) -> Result<Outcome> {
    config.validate()?;
    let data = fit_to_data(&mut config, dataset, true)?;
    // From here on no other process adds a checkpoint.
    let run = RunDir::open(run)?;
    let latest = || checkpoint::latest(run.path()).map(|latest| latest.map(|(_, path)| path));
    let checkpoint = checkpoint.map_or_else(latest, |checkpoint| Ok(Some(checkpoint.into())))?;
    match &checkpoint {
        Some(checkpoint) => resume::check_same_run(&config, run.path(), checkpoint)?,
        None => resume::check_never_saved(run.path())?,
    }
    in_pool(&config, || {
        let (mut learner, mut notes) = learner_on(&config)?;
        if checkpoint.is_none() {
            notes.extend(start_from_given_weights(&config, &mut learner, &*data.training)?);
        }
        let mut trainer = Trainer::new(&config, data, learner, notes)?;
        let note = match &checkpoint {
            Some(checkpoint) => {
                let about_data = trainer.go_on_from(checkpoint, &run)?;
                let changes = resume::notes_on_changes(&config, checkpoint, trainer.step)?;
                trainer.notes.splice(0..0, about_data.into_iter().chain(changes));
                format!("going on after step {} of {}, from {}", trainer.step, config.steps, checkpoint.display())
            }
            None => "the run has no checkpoint yet: starting it over".to_string(),
        };
        trainer.notes.insert(0, note);
        let changed = changes::record(&run, &config, checkpoint.as_deref(), trainer.step)?;
        if !changed.is_empty() {
            trainer.notes.insert(1, format!("from step {} on: {}", trainer.step, changes::listed(&changed)));
        }
        // What was changed for this run (more steps, say) holds for the next resume too.
        run.replace(checkpoint::CONFIG, |out| out.write_all(config.to_toml().as_bytes()))?;
        trainer.run(&run, stop)
    })
}

/// Runs `work` inside a pool of the configured number of threads: entering it once is cheaper than at every product.
pub fn in_pool<R: Send>(config: &TrainConfig, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(config.threads)
        .build()
        .map_err(|e| Error::usage(format!("cannot start {} threads: {e}", config.threads)))?;
    pool.install(work)
}

pub(super) struct Trainer<'a> {
    pub(super) config: &'a TrainConfig,
    pub(super) learner: Learner,
    pub(super) batches: Batches,
    pub(super) validation: Option<Validation>,
    pub(super) told_of_average: bool, // that it still holds the initial weights
    pub(super) fingerprint: String,   // of the data
    pub(super) step: u64,
    pub(super) saved: Option<u64>, // step of the last checkpoint
    whole: bool,                   // whether the numbers are those after a step, not in the middle of one
    pub(super) meter: Meter,
    pub(super) nonfinite_in_a_row: u64,
    coefficients: Vec<f64>, // [B], as drawn
    losses: Losses,         // [B], as drawn
    computed: Losses,       // of a part on the CPU, of all parts on a device; in the order of computation
    notes: Vec<String>,
}

impl<'a> Trainer<'a> {
    pub(super) fn new(config: &'a TrainConfig, data: Data, learner: Learner, notes: Vec<String>) -> Result<Self> {
        let validation = data
            .validation
            .map(|samples| Validation::new(samples, config, &learner.dit, learner.device_state.is_some()));
        Ok(Trainer {
            config,
            batches: Batches::new(config, data.training, learner.device_state.is_some())?,
            validation: validation.transpose()?,
            told_of_average: false,
            fingerprint: data.fingerprint,
            learner,
            step: 0,
            saved: None,
            whole: true,
            meter: Meter::default(),
            nonfinite_in_a_row: 0,
            coefficients: vec![0.0; config.batch_size],
            losses: Losses {
                mse: vec![0.0; config.batch_size],
                vb: vec![0.0; config.batch_size],
                loss: vec![0.0; config.batch_size],
            },
            computed: Losses::default(),
            notes,
        })
    }

    pub(super) fn dataset(&self) -> &dyn Dataset {
        &**self.batches.loader.dataset()
    }

    pub(super) fn run(mut self, run: &RunDir, stop: &AtomicBool) -> Result<Outcome> {
        let config = self.config;
        let mut log = MetricsLog::open(run, self.step)?;
        let mut progress = Progress::new("training", self.step, config.steps);
        self.announce(run, &progress);
        let began = self.step;
        if began == 0 {
            self.picture_data(run, &progress);
        }
        let (mut samples, mut figures) = (None, String::new());
        if log.last() == Some(self.step) {
            // One that was resumed made up for this line, and was killed before its checkpoint said so.
            self.meter.restart();
        } else if self.step > 0 && self.meter.steps() > 0 && self.line_due() {
            let logged = self.log(&mut log, (0, 0.0), stop, &mut progress);
            figures = logged.map_err(|error| self.saved_before(error, run, &progress))?.unwrap_or_default();
            self.save_or_go_on(run, &progress)?;
        }
        if self.step > 0 && self.due(config.sample_every) {
            // A run that ended between a checkpoint and the samples of its step makes them now, from the same weights.
            let there = run.samples(self.step).ok().filter(|path| path.exists());
            samples = there.or_else(|| self.samples(run, &mut log, stop, &mut progress));
        }
        let mut since = (Instant::now(), self.step);
        while self.step < config.steps && !stop.load(Ordering::Relaxed) {
            let trained = self.train_step();
            trained.map_err(|error| self.saved_before(error, run, &progress))?;
            self.batches.loader.take_warnings().iter().for_each(|warning| progress.say(warning));
            if self.line_due() {
                let images = (self.step - since.1) * config.batch_size as u64;
                let seconds = since.0.elapsed().as_secs_f64();
                let logged = self.log(&mut log, (images, seconds), stop, &mut progress);
                figures = logged.map_err(|error| self.saved_before(error, run, &progress))?.unwrap_or(figures);
                since = (Instant::now(), self.step);
            }
            progress.set(self.step, &figures);
            if self.nonfinite_in_a_row >= config.max_nonfinite_steps {
                return Err(self.diverged(run, &progress));
            }
            let pause = Instant::now();
            if self.due(config.checkpoint_every) {
                self.save_or_go_on(run, &progress)?;
            }
            // After the checkpoint, which nothing that goes wrong here can cost then.
            if self.due(config.sample_every) {
                samples = self.samples(run, &mut log, stop, &mut progress);
            }
            // Images a second are those of training alone.
            since.0 += pause.elapsed();
        }
        let stopped = stop.load(Ordering::Relaxed);
        if stopped && self.saved != Some(self.step) {
            self.save(run, &progress).map_err(|error| self.and_what_is_saved(error, run))?;
        }
        progress.finish();
        let finished = self.step >= config.steps && !(stopped && samples.is_none());
        Ok(Outcome { run: run.path().to_path_buf(), began, step: self.step, finished, samples })
    }

    /// Whether what is done every so many steps, and at the end, is done after this one.
    fn due(&self, every: u64) -> bool {
        self.step == self.config.steps || every > 0 && self.step.is_multiple_of(every)
    }

    fn validation_due(&self) -> bool {
        self.validation.is_some() && self.due(self.config.validation_every)
    }

    fn line_due(&self) -> bool {
        self.due(self.config.log_every) || self.validation_due()
    }

    /// Says what is trained on what, and what there is to note about it.
    fn announce(&self, run: &RunDir, progress: &Progress) {
        let config = self.config;
        progress.say(&format!(
            "{} with {} routing, {:.1} M parameters, {} {} of {} x {} x {} in {} classes from '{}' -> {}",
            config.model,
            config.routing,
            self.learner.weights.len() as f64 / 1e6,
            self.dataset().len(),
            config.data_kind,
            config.in_channels,
            config.image_size,
            config.image_size,
            config.num_classes,
            config.data,
            run.path().display()
        ));
        if let Some(note) = self.dataset().note() {
            progress.say(note);
        }
        if config.flip && config.data_kind == DataKind::Latents {
            progress.say("flip mirrors latents, which do not decode to mirrored images: encode mirrored images, and give --flip false");
        }
        if let Some(validation) = &self.validation {
            let (samples, own) = (validation.len(), &config.validation_data);
            let are = if samples == 1 { " is" } else { "s are" };
            progress.say(&match own.is_empty() {
                true => format!("{samples} more sample{are} held out to validate on"),
                false => format!("{samples} sample{are} there to validate on, from '{own}'"),
            });
            validation.note().filter(|_| !own.is_empty()).iter().for_each(|note| progress.say(note));
        }
        if config.decay_start > 0 && config.lr_decay == Decay::Constant {
            progress.say("decay_start has no effect: lr_decay is constant");
        }
        self.note_on_keep_best().iter().for_each(|note| progress.say(note));
        self.notes.iter().for_each(|note| progress.say(note));
    }

    /// A sentence where no checkpoint but the last can be the best.
    fn note_on_keep_best(&self) -> Option<String> {
        let TrainConfig { validation_every, checkpoint_every, steps, keep_best, .. } = *self.config;
        if !keep_best {
            return None;
        }
        if self.validation.is_none() {
            return Some("keep_best has no effect: give validation_samples or validation_data to validate on".into());
        }
        // Their least common multiple; of 0 none.
        let (mut a, mut b) = (validation_every, checkpoint_every);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        let both = validation_every.checked_div(a).map_or(0, |part| part.saturating_mul(checkpoint_every));
        (both == 0 || both >= steps).then(|| {
            format!(
                "keep_best has no effect: before the last step none has both a checkpoint and a validation loss (checkpoint_every is \
                 {checkpoint_every}, validation_every {validation_every})"
            )
        })
    }

    /// Validates if it is time, appends the averages since the last line to `log`, and returns what the progress bar shows of them. Told to
    /// stop meanwhile, it does neither. So many images were trained on since that line, in so many seconds.
    fn log(
        &mut self,
        log: &mut MetricsLog,
        (images, seconds): (u64, f64),
        stop: &AtomicBool,
        progress: &mut Progress,
    ) -> Result<Option<String>> {
        let validates = self.validation_due();
        let validation = if validates { self.validate(stop, progress) } else { None };
        if validates && validation.is_none() && stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let mut meter = self.meter.clone();
        let line = meter.line(self.step, self.config.lr_at(self.step - 1), images as f64 / seconds);
        let seconds = log.seconds().map(|before| before + seconds);
        let uw_log_variances = self.learner.uncertainty.as_ref().map(|learned| learned.log_variances);
        let line = Line { validation, seconds, uw_log_variances, ..line };
        log.append(&line)?;
        self.meter = meter;
        let loss = line.loss.map_or("not finite".into(), metrics::loss_text);
        let mut figures = format!("loss {loss}");
        if let Some(images_per_s) = line.images_per_s {
            figures += &format!("  {images_per_s:.0} images/s");
        }
        let damaged = self.batches.loader.bad_samples();
        if damaged > 0 {
            figures += &format!("  {damaged} damaged images skipped");
        }
        Ok(Some(figures))
    }

    /// Saves what the last finite step left, which may be ruined already, and says what to go on from.
    fn diverged(&mut self, run: &RunDir, progress: &Progress) -> Error {
        let good = last_after_a_good_step(run);
        let saved = match self.save(run, progress) {
            Ok(()) => "is saved, but the steps before may have ruined its weights".into(),
            Err(error) => format!("is not saved ({error})"),
        };
        let how = "with a smaller --lr or --grad-clip 1";
        let from = good.map_or(format!("start again {how}"), |good| {
            let (good, run) = (good.display(), run.path().display());
            format!("to go on from {good}, move those after it away and give --resume {run} {how}")
        });
        Error::Stopped(format!(
            "training stopped at step {}: loss or gradient was not finite {} steps in a row; that step {saved}: {from}",
            self.step, self.nonfinite_in_a_row
        ))
    }

    /// [`save`](Self::save). That a checkpoint cannot be written (a full disk) is told and does not end training before the last step, as
    /// the next may be.
    fn save_or_go_on(&mut self, run: &RunDir, progress: &Progress) -> Result<()> {
        match self.save(run, progress) {
            Err(error @ Error::File { .. }) if self.step < self.config.steps => {
                progress.say(&format!("{error}; training goes on, and tries again when the next one is due"));
                Ok(())
            }
            saved => saved.map_err(|error| self.and_what_is_saved(error, run)),
        }
    }

    /// `error`, which ends the run, and what there is to go on from.
    fn and_what_is_saved(&self, error: Error, run: &RunDir) -> Error {
        match self.saved {
            Some(step) => {
                error.and(&format!("; step {step} is saved: mend this, then --resume {} goes on", run.path().display()))
            }
            None => error.and("; no step before is saved"),
        }
    }

    /// Saves what was trained before `error` ends the run (a full disk, data that cannot be read), and says so in it.
    fn saved_before(&mut self, error: Error, run: &RunDir, progress: &Progress) -> Error {
        let unsaved = self.whole && self.step > 0 && self.saved != Some(self.step);
        let error = match unsaved.then(|| self.save(run, progress)) {
            Some(Err(why)) => error.and(&format!("; nor could step {} be saved: {why}", self.step)),
            // Nothing was trained that could be.
            _ if self.saved.is_none() => return error,
            _ => error,
        };
        self.and_what_is_saved(error, run)
    }

    /// One step: draw, gradients part by part, and the update, unless something is not finite. On a device, the next part is
    /// gathered and sent while this one is computed.
    fn train_step(&mut self) -> Result<()> {
        let config = self.config;
        let on_device = self.learner.device_state.is_some();
        let update = config.update_at(self.step, self.learner.updates);
        self.learner.coefficients(&mut self.coefficients);
        let parts = config.grad_accumulation;
        for index in 0..parts {
            self.prepare(self.step, index)?;
            let Trainer { learner, batches: Batches { part, .. }, coefficients, computed, whole, .. } = self;
            part.set_coefficients(coefficients);
            if !on_device {
                learner.gradients(part.batch(), index > 0, computed)?;
                self.note_losses(index * config.batch_size / parts);
                continue;
            }
            let update = (index + 1 == parts).then_some(DeviceUpdate { update, clip: config.grad_clip });
            // From here on the device may have made the update.
            *whole = update.is_none();
            learner.launch(part.batch(), part.how(config), update)?;
            let (step, index) = if index + 1 < parts { (self.step, index + 1) } else { (self.step + 1, 0) };
            if step < config.steps {
                // What goes wrong here is met again, and told, when it is this part's turn.
                let _ = self.prepare(step, index);
            }
        }
        let mut decision = None;
        if on_device {
            decision = self.learner.collect(&mut self.computed)?;
            self.note_losses(0);
        }
        let learner = &mut self.learner;
        let objective = learner.objective(&self.losses.loss);
        let norm = decision.map_or_else(|| learner.gradient_norm(), |decision| decision.norm);
        let fit = decision.map_or(objective.is_finite() && norm < LARGEST_NORM, |decision| decision.updated);
        if fit {
            let clip = config.grad_clip;
            let grad_scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
            match on_device {
                true => learner.update_log_variances(update, config.uw_lr),
                false => learner.update(Update { grad_scale, ..update }, config.uw_lr),
            }
            self.measure(norm);
            self.nonfinite_in_a_row = 0;
        } else {
            self.meter.add_skipped();
            self.nonfinite_in_a_row += 1;
        }
        self.step += 1;
        self.whole = true;
        Ok(())
    }

    /// Makes part `index` of the batch of `step` ready, unless it is: collects it, and sends it to the device if there is one.
    fn prepare(&mut self, step: u64, index: usize) -> Result<()> {
        let Trainer { config, learner, batches, .. } = self;
        if batches.gather(config, step, index)? && learner.device_state.is_some() {
            let staged = learner.stage(batches.part.batch(), batches.part.how(config));
            staged.inspect_err(|_| batches.forget())?;
        }
        Ok(())
    }

    /// Notes the losses that were computed: of the samples of this step from number `first` of its order on.
    fn note_losses(&mut self, first: usize) {
        let order = &self.batches.drawn(self.step).order[first..];
        let Trainer { losses, computed, .. } = self;
        for (i, &sample) in order.iter().take(computed.loss.len()).enumerate() {
            losses.mse[sample as usize] = computed.mse[i];
            losses.vb[sample as usize] = computed.vb[i];
            losses.loss[sample as usize] = computed.loss[i];
        }
    }

    /// Adds this step, which counts, to the averages, in the order of computation.
    fn measure(&mut self, norm: f64) {
        let drawn = self.batches.drawn(self.step);
        let Losses { mse, vb, loss } = &self.losses;
        for sample in drawn.order.iter().map(|&sample| sample as usize) {
            let [loss, mse, vb] = [loss[sample], mse[sample], vb[sample]].map(f64::from);
            self.meter.add_sample(drawn.t[sample] as usize, loss, mse, vb);
        }
        self.meter.add_step(norm);
    }
}

#[cfg(test)]
mod tests;
