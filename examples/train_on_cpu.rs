//! Training as a library, on the CPU: a small model learns images whose upper (class 0) or left half (class 1) is white.
//! `cargo run --release --example train_on_cpu`

use std::path::Path;

use dtr_fused::autograd::Memory;
use dtr_fused::diffusion::{LossWeight, Method, Sampler, Schedule, ScheduleKind, Timesteps, sampling_timesteps};
use dtr_fused::generate::Generator;
use dtr_fused::model::{Dit, Init, ModelConfig, TASKS};
use dtr_fused::rng::{Philox, Stream};
use dtr_fused::routing::{Routing, windows};
use dtr_fused::train::checkpoint::{self, FileOut, Metadata, TensorOut};
use dtr_fused::train::learner::{Batch, Learner, Losses};
use dtr_fused::train::optimizer::Update;

const B: usize = 32; // images of a batch
const SIDE: usize = 8; // of an image

pub fn main() -> dtr_fused::Result<()> {
    train(&std::env::temp_dir().join("train_on_cpu")).map(|_| ())
}

/// Trains, writes the weights to `place`, and samples: the mean loss of the last steps, and two images of each class.
pub fn train(place: &Path) -> dtr_fused::Result<(f64, Vec<f32>)> {
    // Each timestep has its own channels: those of noisy images lie to the right of those of clear ones.
    for t in [0, 500, 999] {
        println!("timestep {t:>3}: channels {:?} of 64", windows(TASKS, 64, 4.0, 0.8)?[t].range());
    }
    let (hidden_size, depth, num_heads, input_size, in_channels, num_classes) = (64, 2, 2, SIDE, 1, 2);
    let published = ModelConfig::published("DiT-S/2").expect("DiT-S/2 is published");
    let sizes = ModelConfig { hidden_size, depth, num_heads, input_size, in_channels, num_classes, ..published };
    let dit = Dit::new(ModelConfig { routing: Routing::Paper, ..sizes })?;
    let weights = dit.init(1, Init::Small);
    let mut learner = Learner::new(dit, Schedule::new(ScheduleKind::Linear, TASKS)?, LossWeight::Constant, weights);

    // White is 1, black -1.
    let class = |i: usize| i as u32 % 2;
    let white = |i: usize, at: usize| [at / SIDE, at % SIDE][class(i) as usize] < SIDE / 2;
    let pixel = |i| if white(i / (SIDE * SIDE), i % (SIDE * SIDE)) { 1.0 } else { -1.0 };
    let x_start: [f32; B * SIDE * SIDE] = std::array::from_fn(pixel);
    let (normal, random) = (Philox::new(1, Stream::Noise), Philox::new(1, Stream::Timestep));
    let (mut noise, mut coefficients) = ([0.0; B * SIDE * SIDE], [0.0; B]);
    let (mut losses, mut sum, mut loss) = (Losses::default(), 0.0, 0.0);
    for step in 0..400 {
        // Every eighth image loses its label: class 2 is the null class, which guidance compares with.
        let labels: [u32; B] = std::array::from_fn(|i| if (i as u64 + step).is_multiple_of(8) { 2 } else { class(i) });
        let t: [u32; B] = std::array::from_fn(|i| Timesteps::Uniform.draw(&random, step, i, 0..TASKS));
        normal.normal(&mut noise, step, 0);
        learner.coefficients(&mut coefficients); // of the mean
        let batch = Batch { x_start: &x_start, noise: &noise, t: &t, labels: &labels, coefficients: &coefficients };
        learner.gradients(batch, false, &mut losses)?;
        let norm = learner.gradient_norm();
        let update = Update {
            lr: 2e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            ema_decay: 0.99,
            grad_scale: (1.0 / norm).min(1.0), // clips to a norm of 1
        };
        learner.update(update, 0.0);
        sum += learner.objective(&losses.loss);
        if (step + 1).is_multiple_of(80) {
            (loss, sum) = (sum / 80.0, 0.0);
            println!("step {:>3}: loss {loss:.3}, norm of the last gradients {norm:.2}", step + 1);
        }
    }

    let tensors = TensorOut::of_layout(&learner.dit.layout, &learner.ema, "");
    let file = FileOut { name: checkpoint::EMA, tensors, metadata: Metadata::new() };
    let place = checkpoint::write(place, 400, &[file], "")?;
    println!("the averaged weights are in {}", place.display());

    let few = learner.schedule.respaced(&sampling_timesteps(TASKS, "25")?)?;
    let sampler = Sampler::new(few, Method::Ddim { eta: 0.0 }, true, Some(2.0))?; // guided
    let generator = Generator { dit: &learner.dit, weights: (&learner.ema).into(), sampler: &sampler, seed: 7 };
    let images = generator.images(&mut Memory::new(), &[0, 0, 1, 1], 4, |_| Ok(()))?;
    for row in 0..SIDE {
        let drawn =
            |image: &[f32]| image[row * SIDE..][..SIDE].iter().map(|&x| if x > 0.0 { '#' } else { '.' }).collect();
        println!("{}", images.chunks(SIDE * SIDE).map(drawn).collect::<Vec<String>>().join("  "));
    }
    Ok((loss, images))
}
