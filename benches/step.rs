//! A training step of DiT-S/2 on latents of 32 x 32 x 4, batch 8, in each routing: `cargo bench --bench step`. Throughput
//! counts the FLOP of the products of the dense model, so that it shows what skipping is worth.

mod common;

use common::*;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dtr_fused::diffusion::{LossWeight, Schedule, ScheduleKind};
use dtr_fused::model::config::TASKS;
use dtr_fused::model::dit::{Dit, Init};
use dtr_fused::model::flops::forward_flops;
use dtr_fused::train::learner::{Batch, Learner, Losses};
use dtr_fused::train::optimizer::Update;
use std::time::Duration;

fn bench_step(c: &mut Criterion) {
    let mut group = group(c, "step");
    group.measurement_time(Duration::from_secs(5));
    let len = BATCH * 4 * 32 * 32;
    let (images, noise) = (numbers(2, len), numbers(3, len));
    let labels = [1000, 3, 999, 0, 3, 512, 77, 1000];
    for (name, routing, beta) in ROUTES {
        let dit = Dit::new(dit_s_2(routing, beta)).expect("a valid configuration");
        let windows: Vec<_> = TIMESTEPS.iter().map(|&t| dit.windows()[t as usize]).collect();
        let flops = forward_flops(&dit.config, &windows);
        let schedule = Schedule::new(ScheduleKind::Linear, TASKS).expect("a valid schedule");
        let weights = dit.init(1, Init::Published);
        let mut learner = Learner::new(dit, schedule, LossWeight::Constant, weights);
        let mut losses = Losses::default();
        let mut step = || {
            let coefficients = [1.0 / BATCH as f64; BATCH];
            let batch =
                Batch { x_start: &images, noise: &noise, t: &TIMESTEPS, labels: &labels, coefficients: &coefficients };
            learner.gradients(batch, false, &mut losses).expect("the shapes fit");
            let update = Update {
                lr: 1e-4,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.0,
                ema_decay: 0.9999,
                grad_scale: 1.0,
            };
            learner.update(update, 0.0);
            learner.objective(&losses.loss)
        };
        // A model that starts at 0 predicts no noise: the squared error is the variance of the noise.
        let first = step();
        assert!((first - 1.0).abs() < 0.1, "{name}: the first loss is {first}");
        for _ in 0..3 {
            assert!(step() < first, "{name}: the loss does not fall");
        }
        group.throughput(Throughput::Elements((3.0 * flops.dense) as u64));
        group.bench_function(name, |bencher| bencher.iter(&mut step));
    }
}

criterion_group!(benches, bench_step);
criterion_main!(benches);
