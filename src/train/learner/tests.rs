//! A step and an update are what they should be, whole, in parts and in halves.

use super::*;
use crate::diffusion::ScheduleKind;
use crate::model::config::ModelConfig;
use crate::model::dit::Init;
use crate::routing::Routing;

fn learner() -> Learner {
    let config = ModelConfig {
        hidden_size: 72,
        depth: 2,
        num_heads: 3,
        patch_size: 2,
        input_size: 6,
        in_channels: 1,
        num_classes: 10,
        null_class: true,
        mlp_ratio: 4.0,
        learn_sigma: true,
        routing: Routing::Sublayer,
        beta: 0.6,
        alpha: 4.0,
        routing_seed: 3,
    };
    let dit = Dit::new(config).unwrap();
    let weights = dit.init(1, Init::Small);
    let mut learner =
        Learner::new(dit, Schedule::new(ScheduleKind::Linear, TASKS).unwrap(), LossWeight::Constant, weights);
    // No gate or last layer of zeros.
    learner.weights.iter_mut().enumerate().for_each(|(i, w)| *w += (i * 37 % 101) as f32 / 2000.0 - 0.025);
    learner
}

/// Gradients of `count` samples: of 29 on, they are computed in halves.
fn compute(learner: &mut Learner, count: usize, add: bool) -> Losses {
    compute_some(learner, count, 0..count, add)
}

/// Gradients of some of `count` samples.
fn compute_some(learner: &mut Learner, count: usize, some: Range<usize>, add: bool) -> Losses {
    let x: Vec<f32> = (0..count * 36).map(|i| (i % 17) as f32 / 9.0 - 0.8).collect();
    let t: Vec<_> = (0..count as u32).map(|i| (1 + 499 * i) % 1000).collect();
    let labels: Vec<_> = (0..count as u32).map(|i| 3 * i % 11).collect();
    let coefficients: Vec<_> = (0..count).map(|i| 0.25 + (i % 3) as f64 / 4.0).collect();
    let batch = Batch { x_start: &x, noise: &x, t: &t, labels: &labels, coefficients: &coefficients };
    let mut losses = Losses::default();
    learner.gradients(batch.samples(some), add, &mut losses).unwrap();
    losses
}

/// The norm, which must be that of the gradients.
fn norm(learner: &mut Learner) -> f64 {
    let expected = learner.grads.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    let norm = learner.gradient_norm();
    assert!((norm - expected).abs() <= 1e-12 * norm, "{norm} for {expected}");
    norm
}

/// What is known of the squares of gradients is what they are, after batches in halves and others; by any number of threads the
/// gradients have the same bits.
#[test]
fn the_norm_is_that_of_all_gradients() {
    for halves in [false, true] {
        let found = [1, 2, 5].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut learner = learner();
                learner.second_half.take_if(|_| !halves);
                [(29, false), (30, true), (1, true), (3, false), (29, true)].map(|(count, add)| {
                    compute(&mut learner, count, add);
                    let known = match (halves && count >= 29, add) {
                        (true, _) => 1, // all of them
                        (false, true) => 0,
                        (false, false) => 13, // weights, one by one
                    };
                    assert_eq!(learner.memory.squares_mut().len(), known, "squares that are known");
                    (norm(&mut learner), learner.grads.to_vec())
                })
            })
        });
        assert!(found.iter().all(|of| *of == found[0]), "the number of threads changes gradients, halves: {halves}");
    }
}

/// What the caller does to gradients counts, in halves or not.
#[test]
fn the_norm_is_that_of_gradients_that_were_changed() {
    for count in [3, 30] {
        let mut learner = learner();
        compute(&mut learner, count, false);
        let before = norm(&mut learner);
        learner.grads_mut().iter_mut().for_each(|g| *g *= 3.0);
        assert!((norm(&mut learner) / before - 3.0).abs() < 1e-6);
        learner.grads_mut()[7] = f32::NAN;
        assert!(learner.gradient_norm().is_nan());
    }
}

#[test]
fn a_half_that_is_not_finite_shows_in_the_norm() {
    let mut learner = learner();
    let x = [0.1; 4 * 36];
    for at in [0, 3] {
        let mut coefficients = [1.0; 4];
        coefficients[at] = f64::NAN;
        let batch = Batch { x_start: &x, noise: &x, t: &[1, 5, 9, 3], labels: &[0; 4], coefficients: &coefficients };
        learner.gradients(batch, false, &mut Losses::default()).unwrap();
        assert!(learner.gradient_norm().is_nan());
    }
}

/// Side by side or in one pass: losses and gradients are the same but for rounding.
#[test]
fn halves_of_a_batch_are_the_whole() {
    let [mut whole, mut halves] = [learner(), learner()];
    assert!(whole.second_half.take().is_some(), "a small model computes in halves");
    for add in [false, true] {
        let [of_whole, of_halves] = [&mut whole, &mut halves].map(|learner| compute(learner, 31, add));
        let pairs = [(&of_whole.mse, &of_halves.mse), (&of_whole.vb, &of_halves.vb), (&of_whole.loss, &of_halves.loss)];
        for (expected, found) in pairs {
            assert_eq!(found.len(), 31);
            for (expected, found) in expected.iter().zip(found) {
                assert!((expected - found).abs() <= 1e-5 * expected.abs(), "a loss of {found} for {expected}");
            }
        }
        for (entry, (expected, found)) in whole
            .dit
            .layout
            .entries()
            .iter()
            .map(|e| (e, (&whole.grads[e.param.range()], &halves.grads[e.param.range()])))
        {
            let largest = expected.iter().fold(0.0, |most: f32, g| most.max(g.abs()));
            assert!(largest > 0.0, "{}: no gradient", entry.name);
            for (expected, found) in expected.iter().zip(found) {
                assert!((expected - found).abs() <= 1e-5 * largest, "{}: {found} for {expected}", entry.name);
            }
        }
    }
}

#[test]
fn the_objective_is_the_mean_and_coefficients_its_slope() {
    let mut learner = learner();
    let mut coefficients = [f64::NAN; 5];
    learner.coefficients(&mut coefficients);
    assert_eq!(coefficients, [0.2; 5]);
    assert_eq!(learner.objective(&[1.0, 2.0, 3.0, 4.0, 10.0]), 4.0);
}

/// A weight is one more coefficient of the squared error. Without learned variance there is nothing else.
#[test]
fn a_loss_weight_scales_losses_and_gradients() {
    let of = |loss_weight, learn_sigma| {
        let dit = Dit::new(ModelConfig { learn_sigma, ..learner().dit.config }).unwrap();
        let weights = dit.init(1, Init::Small);
        let schedule = Schedule::new(ScheduleKind::Linear, TASKS).unwrap();
        let mut learner = Learner::new(dit, schedule, loss_weight, weights);
        learner.weights.iter_mut().enumerate().for_each(|(i, w)| *w += (i * 37 % 101) as f32 / 2000.0 - 0.025);
        learner
    };
    let x: Vec<f32> = (0..5 * 36).map(|i| (i % 17) as f32 / 9.0 - 0.8).collect();
    let t = [0, 20, 80, 300, 999];
    let coefficients = [0.3, 2.0, 0.5, 0.7, 0.25];
    let run = |learner: &mut Learner, coefficients: &[f64]| {
        let batch = Batch { x_start: &x, noise: &x, t: &t, labels: &[1, 2, 3, 4, 10], coefficients };
        let mut losses = Losses::default();
        learner.gradients(batch, false, &mut losses).unwrap();
        losses
    };
    let min_snr = LossWeight::MinSnr { gamma: 5.0 };
    for learn_sigma in [false, true] {
        let [mut constant, mut weighted] = [LossWeight::Constant, min_snr].map(|weight| of(weight, learn_sigma));
        let weights = t.map(|t| min_snr.weight(&constant.schedule, t as usize));
        assert!(weights[0] < 0.01 && weights[2] < 0.9 && weights[4] == 1.0, "{weights:?}");
        let scaled: Vec<f64> = coefficients.iter().zip(weights).map(|(c, w)| c * w).collect();
        let found = run(&mut weighted, &coefficients);
        let expected = run(&mut constant, &scaled);
        for b in 0..t.len() {
            let mse = expected.mse[b] * weights[b] as f32;
            assert!((found.mse[b] - mse).abs() <= 1e-6 * mse, "t {}: mse {} for {mse}", t[b], found.mse[b]);
            assert_eq!(found.vb[b], expected.vb[b], "t {}: the bound has no weight", t[b]);
            assert_eq!(found.vb[b] != 0.0, learn_sigma);
            let loss = mse + expected.vb[b];
            assert!((found.loss[b] - loss).abs() <= 1e-6 * loss.abs(), "t {}: {} for {loss}", t[b], found.loss[b]);
        }
        // What the bias of the last layer is told are sums of the gradient of the output: its first half is the squared error's.
        let bias = constant.dit.layout.entries().iter().find(|e| e.name == "final_layer.linear.bias").unwrap();
        let channels = constant.dit.config.out_channels();
        let compared: Vec<usize> = match learn_sigma {
            false => (0..constant.grads.len()).collect(),
            true => bias.param.range().filter(|i| (i - bias.param.offset) % channels == 0).collect(),
        };
        let largest = compared.iter().fold(0.0, |most: f32, &i| most.max(constant.grads[i].abs()));
        assert!(largest > 1e-3, "gradients of at most {largest}");
        for i in compared {
            let (found, expected) = (weighted.grads[i], constant.grads[i]);
            let err = (found - expected).abs();
            assert!(err <= 1e-5 * largest, "learn_sigma {learn_sigma}, gradient {i}: {found} for {expected}");
        }
    }
}

/// A batch of more samples than are computed at once gives the bits of its parts, with their buffers.
#[test]
fn parts_of_a_batch_are_added() {
    let [mut whole, mut in_parts] = [learner(), learner()];
    assert_eq!(whole.at_once, samples_at_once(&whole.dit));
    whole.at_once = 30;
    for (count, parts) in [(60, &[0..30, 30..60][..]), (61, &[0..21, 21..41, 41..61])] {
        for add in [false, true] {
            let of_whole = compute(&mut whole, count, add);
            let part = |some: &Range<usize>| compute_some(&mut in_parts, count, some.clone(), add || some.start > 0);
            let of_parts: Vec<_> = parts.iter().map(part).collect();
            for losses in [
                |losses: &Losses| losses.loss.clone(),
                |losses: &Losses| losses.mse.clone(),
                |losses: &Losses| losses.vb.clone(),
            ] {
                assert_eq!(losses(&of_whole), of_parts.iter().map(losses).collect::<Vec<_>>().concat());
            }
            assert!(*whole.grads == *in_parts.grads && whole.grads.iter().any(|&g| g != 0.0));
            assert_eq!(norm(&mut whole), norm(&mut in_parts));
        }
    }
    let held = whole.memory.bytes();
    compute(&mut whole, 120, false);
    compute(&mut whole, 119, false);
    assert_eq!(whole.memory.bytes(), held, "twice as many images take more memory");
}

/// Where half of a batch does not fit the model, it is said.
#[test]
fn sizes_that_do_not_fit_are_refused() {
    let mut learner = learner();
    let x = [0.1; 33 * 36];
    let (t, mut late) = ([5; 33], [5; 32]);
    let (labels, mut unknown) = ([1; 33], [1; 32]);
    (late[31], unknown[31]) = (1000, 11);
    let (t, labels, images) = (&t[..32], &labels[..32], &x[..32 * 36]);
    let good = Batch { x_start: images, noise: images, t, labels, coefficients: &[1.0; 32] };
    for bad in [
        Batch { x_start: &x[..32 * 36 - 1], ..good },
        Batch { x_start: &x, ..good },
        Batch { noise: &x[..40], ..good },
        Batch { t: &t[1..], ..good },
        Batch { t: &late, ..good },
        Batch { labels: &labels[..30], ..good },
        Batch { labels: &[1; 33], ..good },
        Batch { labels: &unknown, ..good },
        Batch { coefficients: &[], ..good },
    ] {
        assert!(learner.gradients(bad, true, &mut Losses::default()).is_err());
    }
    assert!(learner.grads.iter().all(|&g| g == 0.0), "a batch that was refused left gradients");
    learner.gradients(good, false, &mut Losses::default()).unwrap();
    // A model has more timesteps than this schedule, in which the loss looks up its weights.
    learner.schedule = Schedule::new(ScheduleKind::Linear, 100).unwrap();
    learner.loss_weight = LossWeight::MinSnr { gamma: 5.0 };
    learner.gradients(Batch { t: &[99; 32], ..good }, false, &mut Losses::default()).unwrap();
    let beyond = Batch { t: &[100; 32], ..good };
    let message = learner.gradients(beyond, false, &mut Losses::default()).unwrap_err().to_string();
    assert!(message.contains("timestep 100 is outside 0..100"), "{message}");
}
