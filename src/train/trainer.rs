//! The training loop, top to bottom. What it starts from is made in [`setup`](super::setup); `state.rs` saves and loads it, `samples.rs` shows what it
//! has learned.

use super::batches::Batches;
use super::checkpoint;
use super::config::{DataKind, TrainConfig};
use super::device::{DeviceUpdate, LARGEST_NORM};
use super::learner::{Learner, Losses};
use super::metrics::{self, Meter, MetricsLog};
use super::optimizer::Update;
use super::progress::Progress;
use super::resume;
use super::run_dir::RunDir;
use super::setup::{learner_on, open_data};
use super::state::last_after_a_good_step;
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
pub fn start(mut config: TrainConfig, stop: &AtomicBool) -> Result<Outcome> {
    config.validate()?;
    config.check_cfg("sample_cfg", config.sample_cfg)?;
    let dataset = open_data(&mut config, false)?;
    in_pool(&config, || {
        let (mut learner, mut notes) = learner_on(&config)?;
        notes.extend(start_from_given_weights(&config, &mut learner)?);
        let run = RunDir::create(&config)?;
        let trainer = Trainer::new(&config, dataset, learner, notes)?;
        trainer.run(&run, stop)
    })
}

/// Goes on with a run exactly as if it had never stopped: from `checkpoint`, without one from the latest, and from the start if there is
/// none.
///
/// # Errors
/// As [`start`], and when the checkpoint is damaged or another model's, or the run had checkpoints that are gone.
pub fn resume(mut config: TrainConfig, run: &Path, checkpoint: Option<&Path>, stop: &AtomicBool) -> Result<Outcome> {
    config.validate()?;
    let dataset = open_data(&mut config, true)?;
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
            notes.extend(start_from_given_weights(&config, &mut learner)?);
        }
        let mut trainer = Trainer::new(&config, dataset, learner, notes)?;
        let note = match &checkpoint {
            Some(checkpoint) => {
                let about_data = trainer.go_on_from(checkpoint, &run)?;
                trainer.notes.splice(0..0, about_data);
                format!("going on after step {} of {}, from {}", trainer.step, config.steps, checkpoint.display())
            }
            None => "the run has no checkpoint yet: starting it over".to_string(),
        };
        trainer.notes.insert(0, note);
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
    batches: Batches,
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
    fn new(config: &'a TrainConfig, dataset: Arc<dyn Dataset>, learner: Learner, notes: Vec<String>) -> Result<Self> {
        Ok(Trainer {
            config,
            batches: Batches::new(config, dataset, learner.on_device.is_some())?,
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

    fn run(mut self, run: &RunDir, stop: &AtomicBool) -> Result<Outcome> {
        let config = self.config;
        let mut log = MetricsLog::open(run, self.step)?;
        let mut progress = Progress::new("training", self.step, config.steps);
        self.announce(run, &progress);
        let due = |step: u64, every: u64| step == config.steps || every > 0 && step.is_multiple_of(every);
        let began = self.step;
        let (mut samples, mut figures) = (None, String::new());
        if self.step > 0 && due(self.step, config.sample_every) {
            // A run that ended between a checkpoint and the samples of its step makes them now, from the same weights.
            let there = run.samples(self.step).ok().filter(|path| path.exists());
            samples = there.or_else(|| self.samples(run, stop, &mut progress));
        }
        let mut since = (Instant::now(), self.step);
        while self.step < config.steps && !stop.load(Ordering::Relaxed) {
            let trained = self.train_step();
            trained.map_err(|error| self.saved_before(error, run, &progress))?;
            self.batches.loader.take_warnings().iter().for_each(|warning| progress.say(warning));
            if due(self.step, config.log_every) {
                let images = (self.step - since.1) * config.batch_size as u64;
                let logged = self.log(&mut log, images as f64 / since.0.elapsed().as_secs_f64());
                figures = logged.map_err(|error| self.saved_before(error, run, &progress))?;
                since = (Instant::now(), self.step);
            }
            progress.set(self.step, &figures);
            if self.nonfinite_in_a_row >= config.max_nonfinite_steps {
                return Err(self.diverged(run, &progress));
            }
            let pause = Instant::now();
            if due(self.step, config.checkpoint_every) {
                self.save(run, &progress)?;
            }
            // After the checkpoint, which nothing that goes wrong here can cost then.
            if due(self.step, config.sample_every) {
                samples = self.samples(run, stop, &mut progress);
            }
            // Images a second are those of training alone.
            since.0 += pause.elapsed();
        }
        let stopped = stop.load(Ordering::Relaxed);
        if stopped && self.saved != Some(self.step) {
            self.save(run, &progress)?;
        }
        progress.finish();
        let finished = self.step >= config.steps && !(stopped && samples.is_none());
        Ok(Outcome { run: run.path().to_path_buf(), began, step: self.step, finished, samples })
    }

    /// Says what is trained on what, and what there is to note about it.
    fn announce(&self, run: &RunDir, progress: &Progress) {
        let config = self.config;
        progress.say(&format!(
            "{} with {} routing, {:.1} M parameters, {} {} of {} x {} x {} in {} classes from '{}' -> {}",
            config.model,
            config.toml_of("routing").trim_matches('"'),
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
        self.notes.iter().for_each(|note| progress.say(note));
    }

    /// Appends the averages since the last line to `log`, and returns what the progress bar shows of them.
    fn log(&mut self, log: &mut MetricsLog, images_per_s: f64) -> Result<String> {
        let mut meter = self.meter.clone();
        let line = meter.line(self.step, self.config.lr_at(self.step - 1), images_per_s);
        log.append(&line)?;
        self.meter = meter;
        let loss = line.loss.map_or("not finite".into(), metrics::loss_text);
        let mut figures = format!("loss {loss}  {:.0} images/s", line.images_per_s.unwrap_or(0.0));
        let damaged = self.batches.loader.bad_samples();
        if damaged > 0 {
            figures += &format!("  {damaged} damaged images skipped");
        }
        Ok(figures)
    }

    /// Saves what the last finite step left, and says how to go on from it.
    fn diverged(&mut self, run: &RunDir, progress: &Progress) -> Error {
        let good = last_after_a_good_step(run).map_or(String::new(), |path| {
            format!("; if that does not help, move the checkpoints after {} away first", path.display())
        });
        let end = match self.save(run, progress) {
            Ok(()) => format!(
                "no such step changed the weights, and {0} holds them: try --resume {0} with a smaller --lr or --grad-clip 1{good}",
                run.path().display()
            ),
            Err(error) => error.to_string(),
        };
        Error::Stopped(format!(
            "training stopped at step {}: loss or gradient was not finite {} steps in a row; {end}",
            self.step, self.nonfinite_in_a_row
        ))
    }

    /// Saves what was trained before `error` ends the run (a full disk, data that cannot be read), and says so in it.
    fn saved_before(&mut self, error: Error, run: &RunDir, progress: &Progress) -> Error {
        let unsaved = self.whole && self.step > 0 && self.saved != Some(self.step);
        if unsaved && let Err(why) = self.save(run, progress) {
            return error.and(&format!("; nor could step {} be saved: {why}", self.step));
        }
        match self.saved {
            Some(step) => {
                error.and(&format!("; step {step} is saved: mend this, then --resume {} goes on", run.path().display()))
            }
            None => error,
        }
    }

    /// One step: draw, gradients part by part, and the update, unless something is not finite. On a device, the next part is
    /// gathered and sent while this one is computed.
    fn train_step(&mut self) -> Result<()> {
        let config = self.config;
        let on_device = self.learner.on_device.is_some();
        let update = Update {
            lr: config.lr_at(self.step),
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            eps: config.adam_eps,
            weight_decay: config.weight_decay,
            ema_decay: config.ema_decay_at(self.learner.updates),
            number: self.learner.updates + 1,
            grad_scale: 1.0,
        };
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
                true => learner.updated_on_device(update, config.uw_lr),
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
        if batches.gather(config, step, index)? && learner.on_device.is_some() {
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
mod tests {
    use super::super::config::{Assignment, DataKind, Layer};
    use super::super::optimizer::adamw;
    use super::super::setup::learner;
    use super::*;
    use crate::diffusion::{ImageDims, ScheduleKind};
    use crate::model::dit::Init;
    use crate::train::learner::Batch;
    use std::sync::atomic::AtomicUsize;

    /// Four samples that cannot be read any more after some reads.
    struct Failing {
        left: AtomicUsize,
        names: Vec<String>,
    }

    impl Dataset for Failing {
        fn shape(&self) -> [usize; 3] {
            [1, 4, 4]
        }

        fn class_names(&self) -> &[String] {
            &self.names
        }

        fn len(&self) -> usize {
            4
        }

        fn read(&self, index: usize, _flip: bool, out: &mut [f32]) -> Result<u32> {
            let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            left.map_err(|_| Error::file("sample", "is gone"))?;
            out.fill(index as f32 / 4.0);
            Ok(0)
        }
    }

    /// Data that can be read `reads` times.
    fn data(reads: usize) -> Arc<Failing> {
        Arc::new(Failing { left: AtomicUsize::new(reads), names: vec!["all".into()] })
    }

    fn tiny(steps: u64) -> TrainConfig {
        let mut config = TrainConfig {
            hidden_size: 32,
            depth: 1,
            batch_size: 4,
            steps,
            checkpoint_every: steps.saturating_sub(1),
            keep_checkpoints: 1,
            sample_steps: 1,
            device: "cpu".into(),
            // None of the defaults, which must not take their place.
            adam_beta1: 0.8,
            adam_beta2: 0.95,
            adam_eps: 1e-3,
            weight_decay: 0.3,
            ..TrainConfig::default()
        };
        config.fit_to_data(4, 1, 1).unwrap();
        config
    }

    /// A tiny run in `out`, whose data can be read `reads` times, after `before` has seen its directory.
    fn train(out: &Path, steps: u64, reads: usize, before: impl FnOnce(&Path) + Send) -> Result<Outcome> {
        let config = TrainConfig { out: out.display().to_string(), ..tiny(steps) };
        let dataset = data(reads);
        in_pool(&config, || {
            let run = RunDir::create(&config)?;
            before(run.path());
            let trainer = Trainer::new(&config, dataset, learner(&config)?, Vec::new())?;
            trainer.run(&run, &AtomicBool::new(false))
        })
    }

    /// The first moments tell: the update itself hardly changes with the scale of its gradients.
    #[test]
    fn gradients_are_clipped_to_the_norm_that_is_asked_for() {
        let step = |clip: f64| {
            let config = TrainConfig { grad_clip: clip, ..tiny(10) };
            let mut trainer = Trainer::new(&config, data(usize::MAX), learner(&config)?, Vec::new())?;
            trainer.train_step().map(|()| trainer.learner)
        };
        let norm = step(0.0).unwrap().gradient_norm();
        assert!(norm > 0.01, "too small a norm: {norm}");
        // Half the norm; a bound that is not reached; none.
        for (clip, grad_scale) in [(norm / 2.0, 0.5), (norm * 2.0, 1.0), (0.0, 1.0)] {
            let found = step(clip).unwrap();
            let config = tiny(10);
            let mut start = learner(&config).unwrap();
            let update = Update {
                lr: config.lr_at(0),
                beta1: config.adam_beta1,
                beta2: config.adam_beta2,
                eps: config.adam_eps,
                weight_decay: config.weight_decay,
                ema_decay: config.ema_decay_at(0),
                number: 1,
                grad_scale,
            };
            let Learner { weights, ema, m, v, .. } = &mut start;
            adamw(weights, ema, m, v, &found.grads, update);
            let pairs = [(&found.weights, weights), (&found.ema, ema), (&found.m, m), (&found.v, v)];
            for ((found, expected), name) in pairs.into_iter().zip(["weights", "average", "m", "v"]) {
                assert!(**found == **expected, "{name} are others when a norm of {norm} is clipped to {clip}");
            }
        }
    }

    /// Sixteen samples of three classes, none like its mirror image; the first is `first` times as bright.
    struct Slopes {
        first: f32,
        names: Vec<String>,
    }

    impl Slopes {
        fn new(first: f32) -> Arc<Self> {
            Arc::new(Slopes { first, names: ["a", "b", "c"].map(String::from).into() })
        }
    }

    impl Dataset for Slopes {
        fn shape(&self) -> [usize; 3] {
            [1, 4, 4]
        }

        fn class_names(&self) -> &[String] {
            &self.names
        }

        fn len(&self) -> usize {
            16
        }

        fn read(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<u32> {
            let bright = if index == 0 { self.first } else { 1.0 };
            for (i, x) in out.iter_mut().enumerate() {
                let column = if flip { 3 - i % 4 } else { i % 4 };
                *x = bright * ((index * 5 % 16) as f32 / 20.0 - column as f32 / 4.0 + (i / 4) as f32 / 9.0);
            }
            Ok(index as u32 % 3)
        }
    }

    /// A step that is not finite is left out: weights, average and the count of updates stay.
    #[test]
    fn only_steps_that_are_made_count() {
        let config = TrainConfig { num_classes: 3, ..tiny(100) };
        let mut trainer =
            Trainer::new(&config, Slopes::new(f32::INFINITY), learner(&config).unwrap(), Vec::new()).unwrap();
        let (mut skipped, mut in_a_row) = (0, 0);
        for step in 0..40 {
            let state = |learner: &Learner| {
                let Learner { weights, ema, m, v, .. } = learner;
                [weights, ema, m, v].map(|numbers| numbers.to_vec())
            };
            let (updates, mut expected) = (trainer.learner.updates, state(&trainer.learner));
            trainer.train_step(&config).unwrap();
            if trainer.learner.updates == updates {
                (skipped, in_a_row) = (skipped + 1, in_a_row + 1);
            } else {
                in_a_row = 0;
                let update = Update {
                    lr: config.lr_at(step),
                    beta1: config.adam_beta1,
                    beta2: config.adam_beta2,
                    eps: config.adam_eps,
                    weight_decay: config.weight_decay,
                    ema_decay: config.ema_decay_at(updates),
                    number: updates + 1,
                    grad_scale: 1.0,
                };
                let [weights, ema, m, v] = &mut expected;
                adamw(weights, ema, m, v, &trainer.learner.grads, update);
            }
            assert!(state(&trainer.learner) == expected, "step {step}, {skipped} were left out");
            assert_eq!((trainer.meter.skipped(), trainer.nonfinite_in_a_row), (skipped, in_a_row), "step {step}");
            assert_eq!(trainer.step, step + 1);
        }
        // The first sample is in one of the four batches of an epoch.
        assert_eq!(skipped, 10);
    }

    /// The losses are finite, and so is the gradient; but see [`LARGEST_NORM`].
    #[test]
    fn a_step_with_too_large_a_gradient_is_left_out() {
        let mut trainer = Trainer::new(&tiny(10), data(usize::MAX), learner(&tiny(10)).unwrap(), Vec::new()).unwrap();
        let bias = trainer.learner.dit.layout.get("final_layer.linear.bias").unwrap().param.range();
        // The first half of the channels, of each pixel: the noise.
        trainer.learner.weights[bias].iter_mut().step_by(2).for_each(|b| *b = 1e19);
        trainer.train_step(&tiny(10)).unwrap();
        assert!(trainer.losses.loss.iter().all(|loss| loss.is_finite()), "the gradient alone is too large");
        assert_eq!((trainer.learner.updates, trainer.meter.skipped()), (0, 1));
    }

    /// In parts or not, a step learns from all of its samples and measures them, each at its timestep.
    #[test]
    fn what_is_measured_is_what_was_computed() {
        let config = |parts| {
            let config = TrainConfig { batch_size: 8, grad_accumulation: parts, init: Init::Small, ..tiny(10) };
            TrainConfig { num_classes: 3, ..config }
        };
        let trainer = |parts| {
            let config = config(parts);
            let mut learner = learner(&config).unwrap();
            // No gate or last layer of zeros.
            learner.weights.iter_mut().enumerate().for_each(|(i, w)| *w += (i * 37 % 101) as f32 / 2000.0 - 0.025);
            Trainer::new(&config, Slopes::new(1.0), learner, Vec::new()).unwrap()
        };
        let Trainer { mut learner, mut batches, .. } = trainer(1);
        batches.gather(&config(1), 0, 0).unwrap();
        let batch = Batch { coefficients: &[1.0 / 8.0; 8], ..batches.part.batch() };
        let mut losses = Losses::default();
        learner.gradients(batch, false, &mut losses).unwrap();
        let mean = |numbers: &[f32]| numbers.iter().map(|&x| f64::from(x)).sum::<f64>() / numbers.len() as f64;
        let of_octile = |octile: u32| {
            let of = batch.t.iter().zip(&losses.loss).filter(|(t, _)| **t / 125 == octile);
            let losses: Vec<f32> = of.map(|(_, &loss)| loss).collect();
            (!losses.is_empty()).then(|| mean(&losses))
        };
        let octiles: Vec<Option<f64>> = (0..8).map(of_octile).collect();
        assert!(octiles.iter().flatten().count() > 3, "{octiles:?}");
        let expected = [&losses.loss, &losses.mse, &losses.vb].map(|numbers| Some(mean(numbers)));
        let expected = [&expected[..], &[Some(learner.gradient_norm())], &octiles].concat();
        for parts in [1, 2, 4] {
            let mut trainer = trainer(parts);
            trainer.train_step(&config(parts)).unwrap();
            let line = trainer.meter.line(1, 0.0, 0.0);
            let found = [&[line.loss, line.mse, line.vb, line.grad_norm][..], &line.loss_by_timestep].concat();
            for (found, expected) in found.iter().zip(&expected) {
                let near = found.zip(*expected).map_or(found == expected, |(a, b)| (a - b).abs() <= 1e-5 * b.abs());
                assert!(near, "in {parts} parts: {found:?} for {expected:?}");
            }
            let largest = learner.grads.iter().fold(0.0, |most: f32, g| most.max(g.abs()));
            let grads = trainer.learner.grads.iter().zip(&learner.grads[..]);
            assert!(grads.into_iter().all(|(a, b)| (a - b).abs() <= 1e-5 * largest), "gradients in {parts} parts");
        }
    }

    /// Four samples, each of which takes a while to read.
    struct Slow(Arc<Failing>);

    impl Dataset for Slow {
        fn shape(&self) -> [usize; 3] {
            self.0.shape()
        }

        fn class_names(&self) -> &[String] {
            self.0.class_names()
        }

        fn len(&self) -> usize {
            self.0.len()
        }

        fn read(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<u32> {
            std::thread::sleep(std::time::Duration::from_millis(3));
            self.0.read(index, flip, out)
        }
    }

    #[test]
    fn lines_tell_the_rate_and_the_speed_of_their_own_steps() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("run");
        let config = TrainConfig { log_every: 5, out: out.display().to_string(), ..tiny(60) };
        in_pool(&config, || {
            let run = RunDir::create(&config)?;
            let trainer = Trainer::new(&config, Arc::new(Slow(data(usize::MAX))), learner(&config)?, Vec::new())?;
            trainer.run(&config, &run, &AtomicBool::new(false))
        })
        .unwrap();
        let lines = metrics::read(&out).unwrap();
        assert!(lines.iter().map(|line| line.step).eq((5..=60).step_by(5)));
        for line in &lines {
            let lr = config.lr_at(line.step - 1);
            assert!((line.lr - lr).abs() <= 1e-12, "step {}: {} for {lr}", line.step, line.lr);
        }
        // A batch of four takes 3 ms at least, and two may have been read before.
        let speed = lines[11].images_per_s.unwrap();
        assert!(speed <= 20.0 / 0.009, "{speed} images a second");
    }

    #[test]
    fn a_knob_that_is_turned_is_felt() {
        let learned = |knobs: &[(&str, &str)]| {
            let base = [("hidden_size", "32"), ("depth", "1"), ("batch_size", "8"), ("steps", "6"), ("device", "cpu")];
            let base = [&base[..], &[("warmup_steps", "2"), ("threads", "2"), ("lr", "0.01")], knobs].concat();
            let assignments = base.iter().map(|&(key, text)| Assignment { key: key.into(), text: text.into() });
            let layer = Layer { origin: "test".into(), assignments: assignments.collect() };
            let mut config = TrainConfig::from_layers(&[layer]).unwrap();
            config.fit_to_data(4, 1, 3).unwrap();
            in_pool(&config, || {
                let mut trainer = Trainer::new(&config, Slopes::new(1.0), learner(&config)?, Vec::new())?;
                (0..config.steps).try_for_each(|_| trainer.train_step(&config))?;
                let Learner { weights, ema, uncertainty, .. } = trainer.learner;
                Ok((weights.to_vec(), ema.to_vec(), uncertainty.map(|learned| learned.log_variances)))
            })
            .unwrap()
        };
        let base = learned(&[]);
        for knob in [
            ("seed", "1"),
            ("init", "published"),
            ("routing", "sublayer"),
            ("routing", "random"),
            ("routing", "dense"),
            ("beta", "0.5"),
            ("alpha", "1"),
            ("mlp_ratio", "2"),
            ("flip", "true"),
            ("label_dropout", "0.9"),
            ("schedule", "linear"),
            ("loss_weight", "min-snr-5"),
            ("loss_weight", "p2"),
            ("loss_weight", "uw"),
            ("lr", "0.02"),
            ("warmup_steps", "3"),
            ("lr_decay", "constant"),
            ("min_lr_ratio", "0.5"),
            ("weight_decay", "0.1"),
            ("adam_beta1", "0.8"),
            ("adam_beta2", "0.9"),
            ("adam_eps", "0.001"),
            ("grad_clip", "0.001"),
        ] {
            let found = learned(&[knob]);
            assert!(found.0 != base.0 && found.1 != base.1, "{knob:?} changes nothing");
        }
        for knob in [("ema_decay", "0.01"), ("ema_warmup", "false")] {
            let found = learned(&[knob]);
            assert!(found.0 == base.0 && found.1 != base.1, "{knob:?} changes the average alone");
        }
        let uncertain = |more: &[(&str, &str)]| learned(&[&[("loss_weight", "uw")], more].concat());
        let (uw, faster) = (uncertain(&[]), uncertain(&[("uw_lr", "0.5")]));
        let gone = uw.2.expect("log-variances are learned");
        assert!(gone.iter().all(|s| *s != 0.0) && faster.2 != uw.2 && faster.0 != uw.0, "uw_lr changes nothing");
        // They are no weights, which decay.
        assert_eq!(
            uncertain(&[("lr", "1e-9"), ("weight_decay", "0")]).2,
            uncertain(&[("lr", "1e-9"), ("weight_decay", "1")]).2
        );
        // Nor are their gradients clipped with those of the weights: with this epsilon one would see it.
        let first = [("steps", "1"), ("adam_eps", "0.1")];
        assert_eq!(uncertain(&first).2, uncertain(&[&first[..], &[("grad_clip", "0.001")]].concat()).2);
        for knob in [("threads", "1"), ("checkpoint_activations", "true"), ("log_every", "1"), ("sample_cfg", "3")] {
            assert!(learned(&[knob]) == base, "{knob:?} changes what is learned");
        }
    }

    /// From pure noise the estimate of an image is far outside of -1 to 1.
    #[test]
    fn images_are_clipped_and_latents_are_not() {
        let sample = |data_kind, schedule| {
            let config = TrainConfig { data_kind, schedule, ..tiny(1) };
            let sampler = sampler(&config, SamplerKind::Ddim, "2", 0.0, 1.0).unwrap();
            let mut x = [0.5; 16];
            let no_noise = |_: &[f32], _, out: &mut [f32]| {
                out.fill(0.0);
                Ok(())
            };
            let dims = ImageDims { channels: 1, pixels: 16, learn_sigma: true };
            sampler.sample(&mut x, no_noise, |_, _| (), |_, _| Ok(()), dims).unwrap();
            x[0]
        };
        for schedule in [ScheduleKind::Linear, ScheduleKind::Cosine] {
            assert_eq!(sample(DataKind::Images, schedule), 1.0);
            let bar = Schedule::new(schedule, TASKS).unwrap().alphas_cumprod[TASKS - 1];
            let (found, expected) = (sample(DataKind::Latents, schedule), 0.5 / bar.sqrt() as f32);
            assert!((found - expected).abs() <= 1e-3 * expected, "{schedule}: {found} for {expected}");
        }
    }

    #[test]
    fn an_old_checkpoint_that_cannot_be_deleted_costs_nothing() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("run");
        // A file is no directory that can be deleted: the checkpoint of step 2 meets it under this name, that of step 3 as a
        // leftover.
        let blocked = |run: &Path| {
            std::fs::create_dir(run.join(checkpoint::DIRECTORY)).unwrap();
            std::fs::write(run.join(checkpoint::DIRECTORY).join("0000001"), "").unwrap();
        };
        assert!(train(&out, 3, usize::MAX, blocked).unwrap().finished);
        assert!(out.join("checkpoints/.tmp-0000001").exists(), "it could be deleted: the test proves nothing");
        assert_eq!(checkpoint::latest(&out).unwrap().map(|(step, _)| step), Some(3));
    }

    #[test]
    fn what_was_trained_before_an_error_is_saved() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("run");
        let error = train(&out, 1000, 200, |_| ());
        let error = error.unwrap_err().to_string();
        let (step, _) = checkpoint::latest(&out).unwrap().expect("a checkpoint");
        assert!(step >= 10, "only {step} steps");
        assert!(error.contains(&format!("step {step} is saved")) && error.contains("--resume"), "{error}");
    }
}
