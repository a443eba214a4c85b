//! What the benchmarks share: sizes of DiT-S/2, batches, windows, and timing of forward and backward passes.

#![allow(dead_code)] // Every benchmark uses a part of this.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use dtr_fused::autograd::{Memory, Tape, Var};
use dtr_fused::error::Result;
use dtr_fused::model::config::{ModelConfig, TASKS};
use dtr_fused::rng::{Philox, Stream};
use dtr_fused::routing::{Routing, Window, windows};
use std::time::{Duration, Instant};

/// Samples of a batch.
pub const BATCH: usize = 8;
/// Timesteps of a batch, from noise to image, as training sorts them.
pub const TIMESTEPS: [u32; BATCH] = [990, 870, 740, 610, 480, 350, 130, 10];

/// DiT-S/2 on latents of 32 x 32 x 4.
pub fn dit_s_2(routing: Routing, beta: f64) -> ModelConfig {
    ModelConfig { routing, beta, ..ModelConfig::published("DiT-S/2").expect("it is published") }
}

/// The routings that are compared, and their names.
pub const ROUTES: [(&str, Routing, f64); 4] = [
    ("dense", Routing::Dense, 1.0),
    ("paper 0.8", Routing::Paper, 0.8),
    ("sublayer 0.8", Routing::Sublayer, 0.8),
    ("sublayer 0.5", Routing::Sublayer, 0.5),
];

/// The windows of [`TIMESTEPS`].
pub fn batch_windows(channels: usize, beta: f64) -> Vec<Window> {
    let all = windows(TASKS, channels, 4.0, beta).expect("a share in (0, 1]");
    TIMESTEPS.iter().map(|&t| all[t as usize]).collect()
}

/// Random numbers, never 0.
pub fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut x = vec![0.0; len];
    Philox::new(seed, Stream::Noise).normal(&mut x, 1, 2);
    x
}

/// A group with few and short samples: these are large operations.
pub fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(800));
    group
}

/// Times `build` forward on an inference tape and backward on a recording one, after the first numbers of its output agreed
/// with `expected`. `flops` are those of a forward pass, 0 where bytes are what matters; throughput is then FLOP/s.
pub fn forward_and_backward(
    group: &mut BenchmarkGroup<WallTime>,
    name: &str,
    flops: f64,
    weights: &[f32],
    expected: &[f32],
    build: impl Fn(&mut Tape) -> Result<Var>,
) {
    let mut memory = Memory::new();
    let output = {
        let mut tape = Tape::inference(weights, &mut memory);
        let y = build(&mut tape).expect("the shapes fit");
        tape.value(y).to_vec()
    };
    let largest = expected.iter().fold(0.0, |a: f32, x| a.max(x.abs()));
    assert!(largest > 0.0 && expected.len() <= output.len(), "{name}: nothing to compare with");
    for (i, (y, e)) in output.iter().zip(expected).enumerate() {
        assert!((y - e).abs() <= 1e-4 * largest, "{name}: output {i} is {y}, expected {e}");
    }
    if flops > 0.0 {
        group.throughput(Throughput::Elements(flops as u64));
    }
    group.bench_function(format!("{name}/forward"), |bencher| {
        bencher.iter_custom(|count| {
            let mut time = Duration::ZERO;
            for _ in 0..count {
                let mut tape = Tape::inference(weights, &mut memory);
                let start = Instant::now();
                std::hint::black_box(build(&mut tape).expect("the shapes fit"));
                time += start.elapsed();
            }
            time
        });
    });
    if flops > 0.0 {
        group.throughput(Throughput::Elements(2 * flops as u64));
    }
    let (mut grads, upstream) = (vec![0.0; weights.len()], numbers(9, output.len()));
    group.bench_function(format!("{name}/backward"), |bencher| {
        bencher.iter_custom(|count| {
            let mut time = Duration::ZERO;
            for _ in 0..count {
                let mut tape = Tape::new(weights, &mut grads, false, &mut memory);
                let y = build(&mut tape).expect("the shapes fit");
                let start = Instant::now();
                tape.backward(y, &upstream).expect("the upstream gradient fits");
                time += start.elapsed();
            }
            time
        });
    });
    assert!(grads.iter().all(|g| g.is_finite()), "{name}: a gradient is not finite");
}
