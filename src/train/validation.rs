//! The validation loss: that of weights on samples that they have not learned from.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::average::{Average, images_at_once};
use super::config::{TrainConfig, ValidationWeights};
use super::learner::{Batch, Losses};
use super::metrics::{self, Means, Meter};
use super::pass::measure;
use super::progress::Progress;
use super::trainer::Trainer;
use crate::autograd::{Memory, Weights};
use crate::data::{Dataset, Loader, LoaderOptions};
use crate::diffusion::{LossWeight, Schedule};
use crate::error::{Error, Result};
use crate::model::config::TASKS;
use crate::model::dit::Dit;
use crate::rng::{Philox, Stream};

/// Samples to validate on, each `repeats` times. Each time a sample has a noise of its own, the same in every validation (as is its draw,
/// where it is a distribution), and a timestep: of `n` in all, in an order of their own, number `i` that in the middle of part `i` of `n` of
/// all timesteps. So two validations differ by the weights alone.
pub(crate) struct Validation {
    loader: Loader,
    repeats: usize,
}

/// What is validated: a model with its weights, and the loss that is measured.
pub(crate) struct Validated<'a> {
    pub(crate) dit: &'a Dit,
    pub(crate) weights: Weights<'a>,
    pub(crate) memory: &'a mut Memory,
    pub(crate) schedule: &'a Schedule,
    pub(crate) loss_weight: LossWeight,
}

impl Validation {
    /// Validation of `dit`, which computes on the CPU or on a device, on `samples`.
    ///
    /// # Errors
    /// As [`Loader::new`].
    pub(crate) fn new(samples: Arc<dyn Dataset>, config: &TrainConfig, dit: &Dit, on_device: bool) -> Result<Self> {
        let batch = images_at_once(dit, on_device, config, 1).min(samples.len() * config.validation_repeats);
        let loader =
            Loader::new(samples, LoaderOptions { batch, seed: config.validation_seed, flip: false, threads: 0 })?;
        Ok(Validation { loader, repeats: config.validation_repeats })
    }

    /// Number of samples.
    pub(crate) fn len(&self) -> usize {
        self.loader.dataset().len()
    }

    /// How many losses are measured: each sample has one for each repeat.
    pub(crate) fn measured(&self) -> usize {
        self.len() * self.repeats
    }

    /// What there is to say about them.
    pub(crate) fn note(&self) -> Option<&str> {
        self.loader.dataset().note()
    }

    /// Samples that are computed at once.
    pub(crate) fn at_once(&self) -> usize {
        self.loader.batch_size()
    }

    /// How many samples were met so far that cannot be read.
    pub(crate) fn damaged(&self) -> usize {
        self.loader.bad_samples()
    }

    /// One sentence for each sample that could not be read since the last call (the first few of many), and one that counts all.
    pub(crate) fn take_warnings(&self) -> Vec<String> {
        let mut warnings = self.loader.take_warnings();
        if !warnings.is_empty() {
            let (damaged, all) = (self.damaged(), self.len());
            warnings.push(format!("damaged and left out: {damaged} of the {all} samples to validate on"));
        }
        warnings
    }

    /// The means over all samples that can be read. `progress` is told how many are done, and may end it.
    ///
    /// # Errors
    /// When too many samples cannot be read, a device fails, and that of `progress`.
    pub(crate) fn means(
        &mut self,
        of: Validated,
        config: &TrainConfig,
        mut progress: impl FnMut(usize) -> Result<()>,
    ) -> Result<Means> {
        let Validated { dit, weights, memory, schedule, loss_weight } = of;
        let (n, batch) = (self.measured(), self.loader.batch_size());
        let numbers: usize = self.loader.dataset().shape().iter().product();
        let rng = Philox::new(config.validation_seed, Stream::ValidationNoise);
        let mut meter = Meter::default();
        let (mut before, mut squares) = (None, 0.0);
        for (index, first) in (0..n).step_by(batch).enumerate() {
            progress(first)?;
            // The last batch goes on with samples that were there before: they are left out.
            let b = batch.min(n - first);
            let images = self.loader.next(index as u64)?;
            let (x_start, labels) = (&images.pixels[..b * numbers], &images.labels[..b]);
            let labels = if config.no_classes() { &vec![config.num_classes as u32; b] } else { labels };
            let t: Vec<u32> = (first..first + b).map(|i| ((2 * i + 1) * TASKS / (2 * n)) as u32).collect();
            let mut noise = vec![0.0; x_start.len()];
            for (i, noise) in noise.chunks_exact_mut(numbers).enumerate() {
                rng.normal(noise, 0, (first + i) as u64);
            }
            let samples = Batch { x_start, noise: &noise, t: &t, labels, coefficients: &vec![0.0; b] };
            let Losses { mse, vb, loss } = measure(dit, schedule, loss_weight, weights, memory, samples)?;
            // One that is there in place of a damaged one was measured, or the sums of its neighbours might be rounded otherwise.
            for i in (0..b).filter(|&i| !images.replaced[i]) {
                let [loss, mse, vb] = [loss[i], mse[i], vb[i]].map(f64::from);
                meter.add_sample(t[i] as usize, loss, mse, vb);
                squares += before.replace(loss).map_or(0.0, |before| (loss - before).powi(2));
            }
        }
        // Neighbours have nearly the same timestep, so that they differ by what is drawn: a mean over timesteps in turn has this variance
        // (Wolter, Introduction to Variance Estimation, section 8.2).
        let measured = meter.samples() as f64;
        let error = (squares / (2.0 * (measured - 1.0) * measured)).sqrt();
        Ok(Means { loss_stderr: Some(error).filter(|error| error.is_finite()), ..meter.means() })
    }
}

impl Trainer<'_> {
    /// The validation loss, of which a failure is told but does not end training.
    pub(super) fn validate(&mut self, stop: &AtomicBool, progress: &mut Progress) -> Option<Means> {
        if let Some(note) = self.note_on_average() {
            progress.say(&note);
        }
        let Trainer { config, learner, validation, step, .. } = self;
        let validation = validation.as_mut()?;
        let (n, schedule, loss_weight) = (validation.measured(), learner.schedule.clone(), learner.loss_weight());
        let means = Average::of(learner, config, config.validation_weights).and_then(|mut average| {
            let (dit, weights, memory) = average.parts();
            validation.means(Validated { dit, weights, memory, schedule: &schedule, loss_weight }, config, |done| {
                progress.meanwhile(format!("validating {done}/{n}"));
                if stop.load(Ordering::Relaxed) { Err(Error::Stopped("validation was stopped".into())) } else { Ok(()) }
            })
        });
        progress.end_meanwhile();
        validation.take_warnings().iter().for_each(|warning| progress.say(warning));
        match means {
            Ok(means) => {
                let loss = means.loss.map_or("not finite".into(), metrics::loss_text);
                progress.say(&format!("step {step}: validation loss {loss}"));
                Some(means)
            }
            Err(error) => {
                if !stop.load(Ordering::Relaxed) {
                    progress.say(&format!("no validation loss of step {step}: {error}"));
                }
                None
            }
        }
    }

    /// A sentence, once, where an average is validated that is the initial weights for the most part.
    fn note_on_average(&mut self) -> Option<String> {
        let initial = self.config.initial_share_after(self.learner.updates);
        if self.told_of_average || self.config.validation_weights != ValidationWeights::Ema || initial <= 0.5 {
            return None;
        }
        self.told_of_average = true;
        let percent = 100.0 * initial;
        Some(format!(
            "the moving average, which is validated, still holds {percent:.0} % of the initial weights: give --validation-weights model, or \
             --ema-warmup true"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::Tape;
    use crate::data::made::made;
    use crate::diffusion::{ImageDims, LossTerms, losses, q_sample};
    use crate::train::RunDir;
    use crate::train::learner::Learner;
    use crate::train::metrics::{self, Line};
    use crate::train::setup::{Data, learner};
    use crate::train::trainer::in_pool;
    use std::path::Path;
    use std::sync::Mutex;

    fn config(steps: u64) -> TrainConfig {
        let mut config = TrainConfig {
            hidden_size: 32,
            depth: 1,
            batch_size: 4,
            steps,
            log_every: 3,
            validation_samples: 10,
            validation_seed: 7,
            validation_every: 2,
            checkpoint_every: 2,
            sample_steps: 1,
            ema_decay: 0.5,
            device: "cpu".into(),
            ..TrainConfig::default()
        };
        config.fit_to_data(4, 1, 3).unwrap();
        config
    }

    fn training() -> Arc<dyn Dataset> {
        made(8, 3, |index, _, out| {
            out.iter_mut().enumerate().for_each(|(i, x)| *x = ((index * 7 + i * 3) % 11) as f32 / 6.0 - 0.9);
            Ok(index as u32 % 3)
        })
    }

    /// Ten that are not alike.
    fn ten_samples() -> Arc<dyn Dataset> {
        made(10, 3, |index, _, out| {
            out.iter_mut().enumerate().for_each(|(i, x)| *x = ((i * 5 + index * index) % 16) as f32 / 8.0 - 0.9);
            Ok(index as u32 % 3)
        })
    }

    fn trainer(config: &TrainConfig, held_out: Option<Arc<dyn Dataset>>) -> Trainer<'_> {
        let data = Data { training: training(), validation: held_out, fingerprint: String::new() };
        Trainer::new(config, data, learner(config).unwrap(), Vec::new()).unwrap()
    }

    /// The lines of a run in `out`, from its checkpoint on if there is one.
    fn lines(out: &Path, config: &TrainConfig, held_out: Option<Arc<dyn Dataset>>, stop: &AtomicBool) -> Vec<Line> {
        in_pool(config, || {
            let mut trainer = trainer(config, held_out);
            let latest = crate::train::checkpoint::latest(out).ok().flatten();
            let run = match &latest {
                Some(_) => RunDir::open(out)?,
                None => RunDir::create(&TrainConfig { out: out.display().to_string(), ..config.clone() })?,
            };
            latest.map(|(_, checkpoint)| trainer.go_on_from(&checkpoint, &run)).transpose()?;
            trainer.run(&run, stop)
        })
        .unwrap();
        let mut lines = metrics::read(out).unwrap();
        lines.iter_mut().for_each(|line| (line.images_per_s, line.seconds) = (None, None));
        lines
    }

    /// The order in which held-out samples are measured: that of their first epoch.
    fn order(config: &TrainConfig) -> Vec<usize> {
        let numbers = made(10, 10, |index, _, _| Ok(index as u32));
        let options = LoaderOptions { batch: 10, seed: config.validation_seed, flip: false, threads: 1 };
        let batch = Loader::new(numbers, options).unwrap().next(0).unwrap();
        batch.labels.iter().map(|&label| label as usize).collect()
    }

    /// Sample by sample, in f64 but for the model.
    #[test]
    fn it_is_the_mean_loss_of_the_average_over_all_timesteps() {
        // A weight that tells timesteps apart.
        let loss_weight = LossWeight::MinSnr { gamma: 5.0 };
        for label_dropout in [0.1, 1.0] {
            check_mean(&TrainConfig { loss_weight, label_dropout, ..config(6) }, &[]);
        }
    }

    /// Each of the others has its own timestep and noise, and none counts twice.
    #[test]
    fn samples_that_cannot_be_read_are_left_out() {
        for damaged in [&[3][..], &[0, 1, 7, 8, 9]] {
            check_mean(&config(6), damaged);
        }
    }

    #[test]
    fn it_may_be_that_of_the_weights_themselves() {
        check_mean(&TrainConfig { validation_weights: ValidationWeights::Model, ..config(6) }, &[]);
    }

    /// Once, and only while most of it is what it began with: 0.99^68 is 0.505.
    #[test]
    fn an_average_that_has_hardly_moved_is_told() {
        let slow = TrainConfig { ema_decay: 0.99, ema_warmup: false, ..config(6) };
        let note = |config: &TrainConfig, updates| {
            let mut trainer = trainer(config, Some(ten_samples()));
            trainer.learner.updates = updates;
            [trainer.note_on_average(), trainer.note_on_average()]
        };
        let [Some(told), None] = note(&slow, 10) else { panic!("not told, or twice") };
        assert!(told.contains("still holds 90 % of the initial weights: give --validation-weights model"), "{told}");
        assert!(note(&slow, 68)[0].as_ref().is_some_and(|told| told.contains("still holds 50 %")));
        assert_eq!(note(&slow, 69), [None, None]);
        assert_eq!(note(&TrainConfig { ema_warmup: true, ..slow.clone() }, 10), [None, None]);
        assert_eq!(note(&TrainConfig { validation_weights: ValidationWeights::Model, ..slow }, 10), [None, None]);
    }

    fn check_mean(config: &TrainConfig, damaged: &'static [usize]) {
        let held_out = made(10, 3, move |index, flip, out| match damaged.contains(&index) {
            true => Err(Error::file(index.to_string(), "is damaged")),
            false => ten_samples().read(index, flip, out),
        });
        let mut trainer = trainer(config, Some(held_out));
        // No gate or last layer of zeros, and an average that is not the weights.
        let learner = &mut trainer.learner;
        learner.ema.iter_mut().enumerate().for_each(|(i, w)| *w += (i * 37 % 101) as f32 / 2000.0 - 0.025);
        let found = trainer.validate(&AtomicBool::new(false), &mut Progress::new("test", 0, 1)).unwrap();
        let Learner { dit, weights, ema, schedule, .. } = &trainer.learner;
        let weights = if config.validation_weights == ValidationWeights::Model { weights } else { ema };
        let dims = ImageDims { channels: 1, pixels: 16, learn_sigma: true };
        let (mut x_start, mut noise, mut x_t, mut scratch) = ([0.0; 16], [0.0; 16], [0.0; 16], [0.0; 32]);
        let mut sums = [0.0; 3];
        let mut memory = Memory::new();
        let good = (10 - damaged.len()) as f64;
        for (i, index) in order(config).into_iter().enumerate().filter(|(_, index)| !damaged.contains(index)) {
            let t = [i as u32 * 100 + 50];
            let label = ten_samples().read(index, false, &mut x_start).unwrap();
            let label = if config.label_dropout == 1.0 { 3 } else { label };
            Philox::new(config.validation_seed, Stream::ValidationNoise).normal(&mut noise, 0, i as u64);
            q_sample(&mut x_t, &x_start, &noise, &t, schedule).unwrap();
            let mut tape = Tape::inference(weights, &mut memory);
            let x = tape.input(&x_t, [1, 1, 4, 4], false).unwrap();
            let out = dit.forward(&mut tape, x, &t, &[label]).unwrap();
            let weight = config.loss_weight.weight(schedule, t[0] as usize);
            let [mut mse, mut vb, mut loss] = [[f32::NAN]; 3];
            let terms = LossTerms { mse: &mut mse, vb: &mut vb, loss: &mut loss, d_model_out: &mut scratch };
            losses(terms, tape.value(out), &x_start, &noise, &t, &[weight], &[0.0], schedule, dims).unwrap();
            [loss, mse, vb].into_iter().zip(&mut sums).for_each(|(found, sum)| *sum += f64::from(found[0]) / good);
        }
        for (found, expected) in [found.loss, found.mse, found.vb].into_iter().zip(sums) {
            let found = found.unwrap();
            assert!((found - expected).abs() <= 1e-5 * expected, "{found} for {expected}");
        }
        assert!(!damaged.is_empty() || found.loss_by_timestep.iter().all(Option::is_some));
        let validation = trainer.validation.as_ref().unwrap();
        assert_eq!((validation.damaged(), validation.take_warnings().len()), (damaged.len(), 0), "told already");
    }

    #[test]
    fn every_sample_is_read_as_it_is_every_time() {
        let config = TrainConfig { flip: true, ..config(6) };
        let read = Arc::new(Mutex::new(Vec::new()));
        let seen = read.clone();
        let held_out = made(10, 3, move |index, flip, out| {
            out.fill(index as f32 / 10.0);
            seen.lock().unwrap().push((index, flip));
            Ok(0)
        });
        let mut trainer = trainer(&config, Some(held_out));
        let mut validate = || trainer.validate(&AtomicBool::new(false), &mut Progress::new("test", 0, 1)).unwrap();
        let first = validate();
        assert_eq!(validate(), first, "the same weights on the same samples");
        let mut seen = read.lock().unwrap().clone();
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.into_iter().eq((0..10).map(|index| (index, false))));
    }

    /// With and without: the weights have the same bits. And it is measured when it should be, on a line of its own where there is none.
    #[test]
    fn training_does_not_notice() {
        let place = tempfile::tempdir().unwrap();
        let [with, without] = ["with", "without"].map(|name| place.path().join(name));
        let config = config(7);
        let validated = lines(&with, &config, Some(ten_samples()), &AtomicBool::new(false));
        let plain = lines(&without, &config, None, &AtomicBool::new(false));
        let steps =
            |lines: &[Line]| lines.iter().map(|line| (line.step, line.validation.is_some())).collect::<Vec<_>>();
        assert_eq!(steps(&validated), [(2, true), (3, false), (4, true), (6, true), (7, true)]);
        assert_eq!(steps(&plain), [(3, false), (6, false), (7, false)]);
        let file = |run: &Path, name: &str| std::fs::read(run.join("checkpoints/0000007").join(name)).unwrap();
        for name in ["model.safetensors", "ema.safetensors"] {
            assert!(file(&with, name) == file(&without, name), "{name} is another");
        }
        let losses: Vec<_> = validated.iter().filter_map(|line| line.validation.as_ref()?.loss).collect();
        assert!(losses.len() == 4 && losses.windows(2).all(|pair| pair[0] != pair[1]), "{losses:?}");
    }

    /// Stopped while it validates, at any step, a run goes on to the lines of one that was not stopped.
    #[test]
    fn a_stop_amid_a_validation_costs_no_line() {
        let place = tempfile::tempdir().unwrap();
        let config = config(7);
        let whole = lines(&place.path().join("whole"), &config, Some(ten_samples()), &AtomicBool::new(false));
        // Each validation makes four batches of four, one of them ahead.
        for at in [1, 2, 3].map(|before| 16 * before + 5) {
            let out = place.path().join(at.to_string());
            let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(0)));
            let told = stop.clone();
            let held_out = made(10, 3, move |index, flip, out| {
                let mut asked = asked.lock().unwrap();
                *asked += 1;
                told.fetch_or(*asked == at, Ordering::SeqCst);
                ten_samples().read(index, flip, out)
            });
            let stopped = lines(&out, &config, Some(held_out), &stop);
            assert!(stop.load(Ordering::SeqCst) && stopped.len() < whole.len(), "{at}: {} lines", stopped.len());
            let resumed = lines(&out, &config, Some(ten_samples()), &AtomicBool::new(false));
            assert_eq!(resumed, whole, "stopped at read {at}");
        }
    }

    /// The line is made up for, the curve has it, and its steps are not counted again when more are made.
    #[test]
    fn a_stop_amid_the_last_validation_costs_no_line_and_makes_none_twice() {
        let place = tempfile::tempdir().unwrap();
        let [whole, stopped] = ["whole", "stopped"].map(|name| place.path().join(name));
        let config = |steps| TrainConfig { validation_every: 0, ..config(steps) };
        let steps = |lines: &[Line]| lines.iter().map(|line| line.step).collect::<Vec<_>>();
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let held_out = made(10, 3, move |index, flip, out| {
            told.store(true, Ordering::SeqCst);
            ten_samples().read(index, flip, out)
        });
        assert_eq!(steps(&lines(&stopped, &config(7), Some(held_out), &stop)), [3, 6]);
        for (last, expected) in [(7, &[3, 6, 7][..]), (11, &[3, 6, 7, 9, 11])] {
            let [found, of_whole] =
                [&stopped, &whole].map(|out| lines(out, &config(last), Some(ten_samples()), &AtomicBool::new(false)));
            assert_eq!(steps(&of_whole), expected);
            assert_eq!(found, of_whole, "{last} steps");
            for file in ["loss.png".to_string(), format!("checkpoints/{last:07}/optimizer.safetensors")] {
                let [found, expected] = [&stopped, &whole].map(|run| std::fs::read(run.join(&file)).unwrap());
                assert!(found == expected, "{last} steps: {file}");
            }
        }
    }

    #[test]
    fn samples_that_cannot_be_read_do_not_end_training() {
        let place = tempfile::tempdir().unwrap();
        let gone = made(10, 3, |_, _, _| Err(Error::file("sample", "is gone")));
        let lines = lines(&place.path().join("run"), &config(5), Some(gone), &AtomicBool::new(false));
        assert!(lines.iter().all(|line| line.validation.is_none() && line.loss.is_some()));
        assert_eq!(lines.last().unwrap().step, 5);
    }
}
