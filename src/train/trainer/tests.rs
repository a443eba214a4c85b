//! The trainer's own tests: a step is what it should be, and nothing that goes wrong costs what was trained.

use super::*;
use crate::data::made::made;
use crate::diffusion::{ImageDims, Prediction, Schedule, ScheduleKind};
use crate::model::config::TASKS;
use crate::model::dit::Init;
use crate::train::config::{Assignment, Layer, SamplerKind};
use crate::train::learner::Batch;
use crate::train::optimizer::adamw;
use crate::train::samples::sampler;
use crate::train::setup::learner;
use std::sync::atomic::AtomicUsize;

/// All samples to learn from.
fn all(training: Arc<dyn Dataset>) -> Data {
    Data { training, validation: None, fingerprint: String::new() }
}

/// Four samples that can be read `reads` times in all.
fn data(reads: usize) -> Arc<dyn Dataset> {
    let left = AtomicUsize::new(reads);
    made(4, 1, move |index, _, out| {
        let left = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        left.map_err(|_| Error::file("sample", "is gone"))?;
        out.fill(index as f32 / 4.0);
        Ok(0)
    })
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
        let trainer = Trainer::new(&config, all(dataset), learner(&config)?, Vec::new())?;
        trainer.run(&run, &AtomicBool::new(false))
    })
}

/// The first moments tell: the update itself hardly changes with the scale of its gradients.
#[test]
fn gradients_are_clipped_to_the_norm_that_is_asked_for() {
    let step = |clip: f64| {
        let config = TrainConfig { grad_clip: clip, ..tiny(10) };
        let mut trainer = Trainer::new(&config, all(data(usize::MAX)), learner(&config)?, Vec::new())?;
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
            grad_scale,
        };
        let Learner { weights, ema, m, v, .. } = &mut start;
        adamw(weights, ema, m, v, found.grads(), 1, update);
        let pairs = [(&found.weights, weights), (&found.ema, ema), (&found.m, m), (&found.v, v)];
        for ((found, expected), name) in pairs.into_iter().zip(["weights", "average", "m", "v"]) {
            assert!(**found == **expected, "{name} are others when a norm of {norm} is clipped to {clip}");
        }
    }
}

/// Sixteen samples of three classes, none like its mirror image; the first is `first` times as bright.
fn slopes(first: f32) -> Arc<dyn Dataset> {
    made(16, 3, move |index, flip, out| {
        let bright = if index == 0 { first } else { 1.0 };
        for (i, x) in out.iter_mut().enumerate() {
            let column = if flip { 3 - i % 4 } else { i % 4 };
            *x = bright * ((index * 5 % 16) as f32 / 20.0 - column as f32 / 4.0 + (i / 4) as f32 / 9.0);
        }
        Ok(index as u32 % 3)
    })
}

/// A step that is not finite is left out: weights, average and the count of updates stay.
#[test]
fn only_steps_that_are_made_count() {
    let config = TrainConfig { num_classes: 3, ..tiny(100) };
    let mut trainer = Trainer::new(&config, all(slopes(f32::INFINITY)), learner(&config).unwrap(), Vec::new()).unwrap();
    let (mut skipped, mut in_a_row) = (0, 0);
    for step in 0..40 {
        let state = |learner: &Learner| {
            let Learner { weights, ema, m, v, .. } = learner;
            [weights, ema, m, v].map(|numbers| numbers.to_vec())
        };
        let (updates, mut expected) = (trainer.learner.updates, state(&trainer.learner));
        trainer.train_step().unwrap();
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
                grad_scale: 1.0,
            };
            let [weights, ema, m, v] = &mut expected;
            adamw(weights, ema, m, v, trainer.learner.grads(), updates + 1, update);
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
    let config = tiny(10);
    let mut trainer = Trainer::new(&config, all(data(usize::MAX)), learner(&config).unwrap(), Vec::new()).unwrap();
    let bias = trainer.learner.dit.layout.get("final_layer.linear.bias").unwrap().param.range();
    // The first half of the channels, of each pixel: the noise.
    trainer.learner.weights[bias].iter_mut().step_by(2).for_each(|b| *b = 1e19);
    trainer.train_step().unwrap();
    assert!(trainer.losses.loss.iter().all(|loss| loss.is_finite()), "the gradient alone is too large");
    assert_eq!((trainer.learner.updates, trainer.meter.skipped()), (0, 1));
}

/// In parts or not, a step learns from all of its samples and measures them, each at its timestep.
#[test]
fn what_is_measured_is_what_was_computed() {
    let configs = [1, 2, 4].map(|parts| {
        let config = TrainConfig { batch_size: 8, grad_accumulation: parts, init: Init::Small, ..tiny(10) };
        TrainConfig { num_classes: 3, ..config }
    });
    let trainer = |index: usize| {
        let config = &configs[index];
        let mut learner = learner(config).unwrap();
        // No gate or last layer of zeros.
        learner.weights.iter_mut().enumerate().for_each(|(i, w)| *w += (i * 37 % 101) as f32 / 2000.0 - 0.025);
        Trainer::new(config, all(slopes(1.0)), learner, Vec::new()).unwrap()
    };
    let Trainer { config, mut learner, mut batches, .. } = trainer(0);
    batches.gather(config, 0, 0).unwrap();
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
    for (index, parts) in [1, 2, 4].into_iter().enumerate() {
        let mut trainer = trainer(index);
        trainer.train_step().unwrap();
        let line = trainer.meter.line(1, 0.0, 0.0);
        let found = [&[line.loss, line.mse, line.vb, line.grad_norm][..], &line.loss_by_timestep].concat();
        for (found, expected) in found.iter().zip(&expected) {
            let near = found.zip(*expected).map_or(found == expected, |(a, b)| (a - b).abs() <= 1e-5 * b.abs());
            assert!(near, "in {parts} parts: {found:?} for {expected:?}");
        }
        let largest = learner.grads().iter().fold(0.0, |most: f32, g| most.max(g.abs()));
        let grads = trainer.learner.grads().iter().zip(learner.grads());
        assert!(grads.into_iter().all(|(a, b)| (a - b).abs() <= 1e-5 * largest), "gradients in {parts} parts");
    }
}

#[test]
fn lines_tell_the_rate_and_the_speed_of_their_own_steps() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("run");
    let config = TrainConfig { log_every: 5, out: out.display().to_string(), ..tiny(60) };
    in_pool(&config, || {
        let run = RunDir::create(&config)?;
        let slow = made(4, 1, |index, _, out| {
            std::thread::sleep(std::time::Duration::from_millis(3));
            out.fill(index as f32 / 4.0);
            Ok(0)
        });
        let trainer = Trainer::new(&config, all(slow), learner(&config)?, Vec::new())?;
        trainer.run(&run, &AtomicBool::new(false))
    })
    .unwrap();
    let lines = metrics::read(&out).unwrap();
    assert!(lines.iter().map(|line| line.step).eq((5..=60).step_by(5)));
    for line in &lines {
        let lr = config.lr_at(line.step - 1);
        assert!((line.lr - lr).abs() <= 1e-12, "step {}: {} for {lr}", line.step, line.lr);
    }
    // A batch of four takes 3 ms at least, and two may have been read before.
    // The seconds of all before, and of twenty images at this speed.
    let mut before = 0.0;
    for line in &lines {
        let seconds = line.seconds.unwrap();
        assert!(((seconds - before) * line.images_per_s.unwrap() - 20.0).abs() < 1e-6, "{line:?} after {before}");
        before = seconds;
    }
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
            let mut trainer = Trainer::new(&config, all(slopes(1.0)), learner(&config)?, Vec::new())?;
            (0..config.steps).try_for_each(|_| trainer.train_step())?;
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
        ("prediction", "v"),
        ("prediction", "flow"),
        ("schedule", "linear"),
        ("loss_weight", "min-snr-5"),
        ("loss_weight", "p2"),
        ("loss_weight", "uw"),
        ("lr", "0.02"),
        ("warmup_steps", "3"),
        ("lr_decay", "constant"),
        ("lr_decay", "linear"),
        ("decay_start", "4"),
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

/// It asks the model for what it was trained to answer.
#[test]
fn samples_of_a_model_that_knows_the_image_are_the_image() {
    for prediction in [Prediction::Noise, Prediction::V, Prediction::Flow] {
        let config = TrainConfig { prediction, data_kind: DataKind::Latents, ..tiny(1) };
        let schedule = config.noise_schedule().unwrap();
        for kind in [SamplerKind::Ddim, SamplerKind::Ddpm, SamplerKind::DpmPlusPlus] {
            let sampler = sampler(&config, kind, "10", 0.0, 1.0).unwrap();
            let mut x: [f32; 16] = std::array::from_fn(|i| i as f32 / 8.0 - 1.0);
            let image = |i: usize| 0.9 - i as f64 / 9.0;
            let knows = |x: &[f32], t: u32, out: &mut [f32]| {
                let (signal, spread) = (schedule.signal(t as usize), schedule.spread(t as usize));
                for i in 0..16 {
                    let noise = (f64::from(x[i]) - signal * image(i)) / spread;
                    out[i] = match prediction {
                        Prediction::Noise => noise,
                        Prediction::V => signal * noise - spread * image(i),
                        Prediction::Flow => noise - image(i),
                    } as f32;
                }
                Ok(())
            };
            let dims = ImageDims { channels: 1, pixels: 16, learn_sigma: false };
            sampler.sample(&mut x, knows, |_, noise| noise.fill(0.3), |_, _| Ok(()), dims).unwrap();
            for (i, &x) in x.iter().enumerate() {
                assert!((f64::from(x) - image(i)).abs() <= 1e-5, "{prediction}, {kind}: {x} for {}", image(i));
            }
        }
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
        // The cosine schedule ends in pure noise: there nothing can be estimated.
        let full = Schedule::new(schedule, TASKS).unwrap();
        let last = full.estimable(&[0, 999])[1];
        assert_eq!(last, if schedule == ScheduleKind::Linear { 999 } else { 995 });
        let bar = full.alphas_cumprod[last as usize];
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

/// A full disk, say, on which there is room again later.
#[test]
fn a_checkpoint_that_cannot_be_written_is_tried_again_at_the_next() {
    let place = tempfile::tempdir().unwrap();
    let steps_of = |out: &Path| checkpoint::list(out).unwrap().into_iter().map(|(step, _)| step).collect::<Vec<_>>();
    for (steps, keep_checkpoints, left) in [(6, 9, &[2, 6][..]), (4, 1, &[2])] {
        let out = place.path().join(steps.to_string());
        let out_text = out.display().to_string();
        let config = TrainConfig { out: out_text, checkpoint_every: 2, keep_checkpoints, ..tiny(steps) };
        let ended = in_pool(&config, || {
            let run = RunDir::create(&config)?;
            // A file where the checkpoint of step 4 is to be written.
            std::fs::create_dir(out.join(checkpoint::DIRECTORY)).unwrap();
            std::fs::write(out.join(checkpoint::DIRECTORY).join(".tmp-0000004"), "").unwrap();
            let trainer = Trainer::new(&config, all(data(usize::MAX)), learner(&config)?, Vec::new())?;
            trainer.run(&run, &AtomicBool::new(false))
        });
        assert_eq!(steps_of(&out), left, "of {steps} steps");
        match ended {
            Ok(outcome) => assert!(outcome.finished && steps == 6),
            Err(error) => {
                let error = error.to_string();
                let says = format!("; step 2 is saved: mend this, then --resume {} goes on", out.display());
                assert!(steps == 4 && error.contains("0000004: the checkpoint cannot be written: "), "{error}");
                assert!(error.ends_with(&says), "{error}");
            }
        }
    }
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

/// As with data that are opened: a run in two parts is one, and data of another size are refused.
#[test]
fn a_run_on_data_of_ones_own_goes_on() {
    let place = tempfile::tempdir().unwrap();
    let model =
        |run: &str| std::fs::read(place.path().join(run).join("checkpoints/0000003/model.safetensors")).unwrap();
    let config = |name: &str, steps| {
        let out = place.path().join(name).display().to_string();
        let (data, sizes) =
            ("slopes".to_string(), TrainConfig { image_size: 0, in_channels: 0, num_classes: 0, ..tiny(steps) });
        TrainConfig { data, out, checkpoint_every: 1, validation_samples: 3, ..sizes }
    };
    let never = AtomicBool::new(false);
    start_on(config("whole", 3), slopes(1.0), &never).unwrap();
    let run = start_on(config("halves", 2), slopes(1.0), &never).unwrap().run;
    let saved = TrainConfig { steps: 3, ..TrainConfig::from_file(&run.join(checkpoint::CONFIG)).unwrap() };
    assert_eq!((saved.data.as_str(), saved.image_size, saved.num_classes), ("slopes", 4, 3));
    let fewer = made(16, 4, |_, _, _| Ok(0));
    let message = resume_on(saved.clone(), fewer, &run, None, &never).unwrap_err().to_string();
    assert!(message.contains("'slopes' are 1 x 4 x 4 in 4 classes, but this run was begun with"), "{message}");
    assert!(resume_on(saved, slopes(1.0), &run, None, &never).unwrap().finished);
    assert!(model("halves") == model("whole"), "other weights in two parts");
}
