//! Noisy images, the training loss and its gradient on a CUDA device against the plain reference in f64.

mod common;

use common::cuda::{Output, device};
use dtr_fused::autograd::Memory;
use dtr_fused::backend::cuda::{Arg, DType, Device, Launch};
use dtr_fused::diffusion::{ImageDims, LossWeight, Prediction, Schedule, ScheduleKind, reference};
use dtr_fused::model::config::{ModelConfig, TASKS};
use dtr_fused::model::dit::{Dit, Init};
use dtr_fused::rng::{Philox, Stream};
use dtr_fused::routing::Routing;
use dtr_fused::train::device::{DeviceState, How};
use dtr_fused::train::learner::{self, Losses};
use std::sync::Arc;

/// Both ends, where the bound is something else at 0, in no order.
const TIMESTEPS: [u32; 5] = [998, 0, 500, 999, 1];
/// A weight that is not 1 at any timestep.
const WEIGHT: LossWeight = LossWeight::P2 { gamma: 0.5, k: 2.0 };
/// More numbers in a sample than a block has threads, and no multiple of them.
const SIDE: usize = 10;
const CHANNELS: usize = 3;

/// Samples and what a model answers; some pixels are exactly -1 and 1, where the likelihood has tails.
struct Batch {
    schedule: Schedule,
    dims: ImageDims,
    x_start: Vec<f32>,
    noise: Vec<f32>,
    model_out: Vec<f32>,
    weights: Vec<f64>,
    coefficients: Vec<f64>,
}

/// What the reference says, in f64.
struct Expected {
    x_t: Vec<f64>,
    mse: Vec<f64>,
    vb: Vec<f64>,
    d_model_out: Vec<f64>,
}

impl Batch {
    /// `one_answer`: the model answers the same to every sample.
    fn new(schedule: Schedule, learn_sigma: bool, one_answer: bool) -> Self {
        let dims = ImageDims { channels: CHANNELS, pixels: SIDE * SIDE, learn_sigma };
        let (b, n, n_out) = (TIMESTEPS.len(), dims.elements(), dims.out_elements());
        let normal = |what: u64, len: usize| {
            let mut x = vec![0.0; len];
            Philox::new(11, Stream::Noise).normal(&mut x, what, 0);
            x
        };
        let x_start: Vec<f32> = normal(0, b * n).iter().map(|x| (0.7 * x).clamp(-1.0, 1.0)).collect();
        let answers = normal(1, b * n_out);
        // The variance's half beyond -1..1 too.
        let scale = |i: usize| if i % n_out < n { 1.0 } else { 0.8 };
        let answer = |i: usize| scale(i) * answers[if one_answer { i % n_out } else { i }];
        let model_out: Vec<f32> = (0..b * n_out).map(answer).collect();
        // A model that is off by about 0.3, so that few likelihoods are at their floor.
        let off = normal(2, b * n).into_iter().enumerate();
        let noise = off.map(|(i, r)| model_out[i / n * n_out + i % n] - 0.3 * r).collect();
        let weights = TIMESTEPS.map(|t| WEIGHT.weight(&schedule, t as usize)).to_vec();
        let coefficients = (0..b).map(|b| 0.2 + b as f64 / 7.0).collect();
        Batch { schedule, dims, x_start, noise, model_out, weights, coefficients }
    }

    fn expected(&self) -> Expected {
        let real = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
        let [x_start, noise, model_out] = [&self.x_start, &self.noise, &self.model_out].map(|x| real(x));
        let [mut mse, mut vb] = [(); 2].map(|()| vec![f64::NAN; TIMESTEPS.len()]);
        let (mut x_t, mut d_model_out) = (vec![f64::NAN; noise.len()], vec![f64::NAN; model_out.len()]);
        reference::q_sample(&mut x_t, &x_start, &noise, &TIMESTEPS, &self.schedule);
        reference::losses(
            &mut mse,
            &mut vb,
            &mut d_model_out,
            &model_out,
            &x_start,
            &x_t,
            &noise,
            &TIMESTEPS,
            &self.weights,
            &self.coefficients,
            &self.schedule,
            self.dims,
        );
        Expected { x_t, mse, vb, d_model_out }
    }
}

impl Expected {
    /// Fails where the losses of the samples, `[B]` each, are others.
    #[track_caller]
    fn check_losses(&self, label: &str, [mse, vb, loss]: [&[f32]; 3]) {
        let sum: Vec<f64> = self.mse.iter().zip(&self.vb).map(|(mse, vb)| mse + vb).collect();
        for (what, found, expected) in [("mse", mse, &self.mse), ("vb", vb, &self.vb), ("loss", loss, &sum)] {
            assert_eq!(found.len(), expected.len(), "{label}: {what}");
            for ((t, &found), expected) in TIMESTEPS.iter().zip(found).zip(expected) {
                let err = (f64::from(found) - expected).abs();
                assert!(err <= 2e-7 * expected.abs(), "{label}, t {t}: {what} {found} for {expected}");
            }
        }
    }
}

/// Fails where a row's largest error is more than `tolerance` of its largest number.
#[track_caller]
fn check_rows(label: &str, found: &[f32], expected: &[f64], row: usize, tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{label}");
    for (k, (found, expected)) in found.chunks_exact(row).zip(expected.chunks_exact(row)).enumerate() {
        let largest = expected.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
            let err = (f64::from(found) - expected).abs();
            assert!(err <= tolerance * largest, "{label}, row {k}: number {i} is {found} for {expected}");
        }
    }
}

/// Every noise schedule and prediction, with and without learned variance.
fn cases() -> impl Iterator<Item = (Schedule, bool, String)> {
    let (noise, v, flow) = (Prediction::Noise, Prediction::V, Prediction::Flow);
    let (linear, cosine) = (ScheduleKind::Linear, ScheduleKind::Cosine);
    [(noise, linear), (noise, cosine), (v, cosine), (flow, cosine)].into_iter().flat_map(|(prediction, kind)| {
        [true, false].map(|learn_sigma| {
            let schedule = Schedule::predicting(prediction, kind, TASKS).unwrap();
            (schedule, learn_sigma, format!("{prediction}, {kind}, learn_sigma {learn_sigma}"))
        })
    })
}

/// A model of one token whose output is the bias of its last layer, whatever it sees: the weights of that layer are too small to
/// change a bit of it, yet gradients go back through them to the image.
fn model(batch: &Batch) -> (Dit, Vec<f32>) {
    let config = ModelConfig {
        hidden_size: 64,
        depth: 1,
        num_heads: 2,
        patch_size: SIDE,
        input_size: SIDE,
        in_channels: CHANNELS,
        num_classes: 1,
        null_class: false,
        mlp_ratio: 1.0,
        learn_sigma: batch.dims.learn_sigma,
        routing: Routing::Dense,
        beta: 1.0,
        alpha: 1.0,
        routing_seed: 0,
    };
    let dit = Dit::new(config).unwrap();
    let mut weights = dit.init(1, Init::Small).to_vec();
    let last = weights_of(&dit, "final_layer.linear.weight");
    weights[last].iter_mut().enumerate().for_each(|(i, w)| *w = 1e-15 * (1.0 + (i % 7) as f32));
    let bias = weights_of(&dit, "final_layer.linear.bias");
    weights[bias].iter_mut().zip(places(batch.dims)).for_each(|(w, place)| *w = batch.model_out[place]);
    (dit, weights)
}

fn weights_of(dit: &Dit, name: &str) -> std::ops::Range<usize> {
    dit.layout.entries().iter().find(|entry| entry.name == name).expect("a parameter of this name").param.range()
}

/// Where in an image each number of its one patch lies: pixels, and of each its channels.
fn places(dims: ImageDims) -> impl Iterator<Item = usize> {
    let channels = dims.out_elements() / dims.pixels;
    (0..dims.out_elements()).map(move |i| i % channels * dims.pixels + i / channels)
}

#[test]
fn a_training_pass_has_the_loss_of_the_reference() {
    let device = Arc::new(device());
    for (schedule, learn_sigma, label) in cases() {
        let batch = Batch::new(schedule, learn_sigma, true);
        let expected = batch.expected();
        let (dit, weights) = model(&batch);
        let mut state = DeviceState::new(&device, DType::F32, &weights).unwrap();
        let mut memory = Memory::on_device(&device, DType::F32);
        let (n, n_out) = (batch.dims.elements(), batch.dims.out_elements());
        for (b, t) in TIMESTEPS.iter().enumerate() {
            // Of this sample alone: gradients of weights are sums over the batch.
            let mut coefficients = [0.0; TIMESTEPS.len()];
            coefficients[b] = batch.coefficients[b];
            let samples = learner::Batch {
                x_start: &batch.x_start,
                noise: &batch.noise,
                t: &TIMESTEPS,
                labels: &[0; TIMESTEPS.len()],
                coefficients: &coefficients,
            };
            let how = How { drawn: None, add: false, updates: false };
            let mut losses = Losses::default();
            state.stage(&dit, &mut memory, samples, how).unwrap();
            state.launch(&dit, &batch.schedule, WEIGHT, &mut memory, samples, how, None).unwrap();
            state.collect(&mut losses).unwrap();
            expected.check_losses(&label, [&losses.mse, &losses.vb, &losses.loss]);

            let label = format!("{label}, t {t}");
            let grads = state.gradients().unwrap();
            let of = |name: &str| &grads[weights_of(&dit, name)];
            // With one token, the gradient of the bias is that of the output.
            let mut d_model_out = vec![f32::NAN; n_out];
            places(batch.dims).zip(of("final_layer.linear.bias")).for_each(|(place, &d)| d_model_out[place] = d);
            let range = b * n_out..(b + 1) * n_out;
            check_rows(&format!("{label}: d_model_out"), &d_model_out, &expected.d_model_out[range], n, 2e-7);
            // And the gradients of the first layer are d x_t and d, a number of each channel.
            let (dw, db) = (of("x_embedder.proj.weight"), of("x_embedder.proj.bias"));
            let (c, d) = db.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())).expect("channels");
            assert!(d.abs() > 1e-30, "{label}: no gradient reaches the image");
            let x_t: Vec<f32> = dw[c * n..][..n].iter().map(|dw| dw / d).collect();
            check_rows(&format!("{label}: x_t"), &x_t, &expected.x_t[b * n..(b + 1) * n], n, 5e-7);
        }
    }
}

/// The numbers of `steps` in kernels/diffusion_loss.cu, as its formulas ask for them.
fn steps(batch: &Batch) -> Vec<f64> {
    let s = &batch.schedule;
    let of_sample = |(b, t): (usize, usize)| {
        let bar = s.alphas_cumprod[t];
        let min_log = s.posterior_log_variance_clipped[t];
        let mut mean_factor = s.posterior_mean_coef1[t] * (1.0 / bar - 1.0).sqrt();
        let bounds = [min_log, s.betas[t].ln() - min_log];
        let [weight, coefficient] = [batch.weights[b], batch.coefficients[b]];
        let first = if t == 0 { 1.0 } else { 0.0 };
        let way = (t as f64 + 0.5) / TASKS as f64;
        let [signal, spread, of_noise, of_start] = match s.prediction {
            Prediction::Noise => [bar.sqrt(), (1.0 - bar).sqrt(), 1.0, 0.0],
            Prediction::V => [bar.sqrt(), (1.0 - bar).sqrt(), bar.sqrt(), (1.0 - bar).sqrt()],
            Prediction::Flow => [1.0 - way, way, 1.0, 1.0],
        };
        if s.prediction != Prediction::Noise {
            mean_factor *= signal;
        }
        let of_mean = [mean_factor, 1.0 / min_log.exp()];
        let rest = [bounds[0], bounds[1], weight, coefficient, first];
        [&[signal, spread, of_noise, of_start], &of_mean[..], &rest].concat()
    };
    TIMESTEPS.iter().map(|&t| t as usize).enumerate().flat_map(of_sample).collect()
}

#[test]
fn every_sample_has_the_loss_of_its_own_answer() {
    let device = device();
    for (schedule, learn_sigma, label) in cases() {
        let batch = Batch::new(schedule, learn_sigma, false);
        let expected = batch.expected();
        let (b, n, n_out) = (TIMESTEPS.len(), batch.dims.elements(), batch.dims.out_elements());
        let upload = |numbers: &[f32]| device.upload(numbers, DType::F32).unwrap();
        let [x_start, noise, model_out] = [&batch.x_start, &batch.noise, &batch.model_out].map(|x| upload(x));
        let numbers = steps(&batch);
        let steps = device.alloc(numbers.len(), DType::F64).unwrap();
        device.write_bytes(&steps, bytemuck::cast_slice(&numbers)).unwrap();
        let [x_t, losses, d] = [b * n, 3 * b, b * n_out].map(|len| Output::new(&device, len, DType::F32));
        let [x_start, noise, model_out, steps] =
            [&x_start, &noise, &model_out, &steps].map(|x| Arg::Buffer(x.buffer()));
        let parts = Arg::I32(if learn_sigma { 2 } else { 1 });
        let sizes = [b, n].map(|size| Arg::I32(size as i32));
        let args = [&[x_t.buffer().into(), x_start, noise, steps], &sizes[..]].concat();
        // SAFETY: all are as long as these sizes ask for.
        unsafe { launch(&device, "diffusion_loss_q_sample", (b * n).div_ceil(256), &args) };
        let outputs = [losses.buffer().into(), d.buffer().into()];
        let args = [&outputs[..], &[model_out, x_start, noise, steps, parts], &sizes].concat();
        // SAFETY: as above.
        unsafe { launch(&device, "diffusion_loss", b, &args) };

        check_rows(&format!("{label}: x_t"), &x_t.numbers(&device), &expected.x_t, n, 2e-7);
        check_rows(&format!("{label}: d_model_out"), &d.numbers(&device), &expected.d_model_out, n, 2e-7);
        let losses = losses.numbers(&device);
        expected.check_losses(&label, [&losses[..b], &losses[b..2 * b], &losses[2 * b..]]);
    }
}

/// # Safety
/// As of [`Device::launch`].
unsafe fn launch(device: &Device, kernel: &'static str, blocks: usize, args: &[Arg]) {
    let launch = Launch {
        file: "diffusion_loss",
        kernel,
        elem: DType::F32,
        defines: &[],
        grid: [blocks as u32, 1, 1],
        block: 256,
        shared: 0,
    };
    // SAFETY: the contract is the same.
    unsafe { device.launch(&launch, args) }.unwrap();
}
