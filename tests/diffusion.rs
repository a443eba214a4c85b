//! The fast loss and samplers against the plain reference, against finite differences, and against golden tensors.

use dtr_fused::Result;
use dtr_fused::diffusion::loss::{ImageDims, LossTerms, losses, q_sample};
use dtr_fused::diffusion::sampler::guide;
use dtr_fused::diffusion::{
    LossWeight, Method, Prediction, Sampler, Schedule, ScheduleKind, reference, space_timesteps, weighting,
};
use dtr_fused::ops::real::Real;
use dtr_fused::rng::{Philox, Stream};
use dtr_fused::safetensors_file::SafetensorsFile;

/// One batch with timesteps at both ends, values as large as those of real runs, and some pixels at exactly -1 and 1.
struct Batch {
    schedule: Schedule,
    dims: ImageDims,
    t: Vec<u32>,
    x_start: Vec<f32>,
    noise: Vec<f32>,
    model_out: Vec<f32>,
    weights: Vec<f64>,
    coefficients: Vec<f64>,
}

impl Batch {
    fn new(schedule: Schedule, t: &[u32], dims: ImageDims) -> Self {
        let n = dims.elements();
        let normal = |what: u64, len: usize| {
            let mut x = vec![0.0; len];
            Philox::new(11, Stream::Noise).normal(&mut x, what, 0);
            x
        };
        let mut x_start: Vec<f32> = normal(0, t.len() * n).iter().map(|x| (0.7 * x).clamp(-1.0, 1.0)).collect();
        x_start[0] = -1.0;
        x_start[n - 1] = 1.0;
        let noise = normal(1, t.len() * n);
        // A model that is off by about 0.3; the variance's half beyond -1..1 too.
        let model_out = normal(2, t.len() * dims.out_elements()).into_iter().enumerate();
        let model_out = model_out.map(|(i, r)| {
            let (b, i) = (i / dims.out_elements(), i % dims.out_elements());
            let target = |i: usize| reference::target(x_start[i], noise[i], t[b] as usize, &schedule);
            if i < n { target(b * n + i) + 0.3 * r } else { 0.8 * r }
        });
        let model_out: Vec<f32> = model_out.collect();
        let weights = (0..t.len()).map(|b| 0.5 + b as f64 / 3.0).collect();
        let coefficients = (0..t.len()).map(|b| 0.2 + b as f64 / 7.0).collect();
        let t = t.to_vec();
        Batch { schedule, dims, t, x_start, noise, model_out, weights, coefficients }
    }

    /// mse, vb, loss and gradient of the fast version; the outputs start as NaN.
    fn fast(&self) -> [Vec<f32>; 4] {
        let [mut mse, mut vb, mut loss] = std::array::from_fn(|_| vec![f32::NAN; self.t.len()]);
        let mut d = vec![f32::NAN; self.model_out.len()];
        let terms = LossTerms { mse: &mut mse, vb: &mut vb, loss: &mut loss, d_model_out: &mut d };
        let (out, x, e) = (&self.model_out, &self.x_start, &self.noise);
        losses(terms, out, x, e, &self.t, &self.weights, &self.coefficients, &self.schedule, self.dims).unwrap();
        [mse, vb, loss, d]
    }

    /// mse, vb and gradient of the reference in the precision `R`, for a given model output.
    fn plain<R: Real>(&self, model_out: &[R]) -> [Vec<f64>; 3] {
        let real = |x: &[f32]| -> Vec<R> { x.iter().map(|&v| R::from_f64(f64::from(v))).collect() };
        let (x_start, noise) = (real(&self.x_start), real(&self.noise));
        let nan = R::from_f64(f64::NAN);
        let mut x_t = vec![nan; noise.len()];
        reference::q_sample(&mut x_t, &x_start, &noise, &self.t, &self.schedule);
        let (mut mse, mut vb, mut d) = (vec![nan; self.t.len()], vec![nan; self.t.len()], vec![nan; model_out.len()]);
        let (w, c) = (&self.weights, &self.coefficients);
        let dims = self.dims;
        reference::losses(
            &mut mse,
            &mut vb,
            &mut d,
            model_out,
            &x_start,
            &x_t,
            &noise,
            &self.t,
            w,
            c,
            &self.schedule,
            dims,
        );
        [mse, vb, d].map(|v| v.into_iter().map(R::to_f64).collect())
    }

    fn out64(&self) -> Vec<f64> {
        self.model_out.iter().map(|&v| f64::from(v)).collect()
    }
}

const DIMS: ImageDims = ImageDims { channels: 3, pixels: 35, learn_sigma: true };
const TIMESTEPS: [u32; 9] = [0, 999, 1, 500, 0, 998, 2, 37, 750];

/// Every noise schedule, and everything that a model may predict.
fn schedules() -> impl Iterator<Item = (String, Schedule)> {
    let of_noise = [ScheduleKind::Linear, ScheduleKind::Cosine].map(|kind| (Prediction::Noise, kind));
    let others = [Prediction::V, Prediction::Flow].map(|prediction| (prediction, ScheduleKind::Cosine));
    let named = |(prediction, kind): (Prediction, ScheduleKind)| {
        (format!("{prediction}, {kind}"), Schedule::predicting(prediction, kind, 1000).unwrap())
    };
    of_noise.into_iter().chain(others).map(named)
}

fn cosine() -> Schedule {
    Schedule::new(ScheduleKind::Cosine, 1000).unwrap()
}

fn linear() -> Schedule {
    Schedule::new(ScheduleKind::Linear, 1000).unwrap()
}

fn max_abs(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |m: f64, v| if v.is_nan() { f64::NAN } else { m.max(v.abs()) })
}

/// Largest difference divided by the largest value of `expected`; where all of these are 0, any difference is large.
fn error(found: impl IntoIterator<Item = impl Into<f64>>, expected: &[f64]) -> f64 {
    let found: Vec<f64> = found.into_iter().map(Into::into).collect();
    assert_eq!(found.len(), expected.len());
    let difference: Vec<f64> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
    max_abs(&difference) / max_abs(expected).max(f64::MIN_POSITIVE)
}

#[test]
fn the_fast_loss_is_the_reference() {
    for (kind, schedule) in schedules() {
        for learn_sigma in [true, false] {
            let batch = Batch::new(schedule.clone(), &TIMESTEPS, ImageDims { learn_sigma, ..DIMS });
            let [mse, vb, loss, d] = batch.fast();
            let [mse_ref, vb_ref, d_ref] = batch.plain(&batch.out64());
            for b in 0..TIMESTEPS.len() {
                let close = |found: f32, expected: f64| (f64::from(found) - expected).abs() <= 2e-7 * expected.abs();
                assert!(close(mse[b], mse_ref[b]), "{kind} mse of sample {b}: {} {}", mse[b], mse_ref[b]);
                assert!(close(vb[b], vb_ref[b]), "{kind} vb of sample {b}: {} {}", vb[b], vb_ref[b]);
                assert!(close(loss[b], mse_ref[b] + vb_ref[b]), "{kind} loss of sample {b}");
                // Each half of each sample by its own scale: they span orders of magnitude.
                let out = DIMS.elements() * if learn_sigma { 2 } else { 1 };
                for half in (b * out..(b + 1) * out).step_by(DIMS.elements()) {
                    let range = half..half + DIMS.elements();
                    let err = error(d[range.clone()].iter().copied(), &d_ref[range]);
                    assert!(err <= 2e-7, "{kind} gradient of sample {b}: off by {err}");
                }
            }
        }
    }
}

#[test]
fn noisy_images_are_those_of_the_reference() {
    for (kind, schedule) in schedules() {
        let batch = Batch::new(schedule, &TIMESTEPS, DIMS);
        let real = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
        let (mut found, mut expected) = (vec![f32::NAN; batch.noise.len()], vec![f64::NAN; batch.noise.len()]);
        q_sample(&mut found, &batch.x_start, &batch.noise, &TIMESTEPS, &batch.schedule).unwrap();
        let (x_start, noise) = (real(&batch.x_start), real(&batch.noise));
        reference::q_sample(&mut expected, &x_start, &noise, &TIMESTEPS, &batch.schedule);
        let err = error(found, &expected);
        assert!(err <= 1e-7, "{kind}: off by {err}");
    }
}

#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    // A scale of the loss that finite differences resolve: small means, so that the likelihood is not at its floor.
    for (kind, schedule) in schedules() {
        let mut batch = Batch::new(schedule, &TIMESTEPS, ImageDims { channels: 1, pixels: 7, learn_sigma: true });
        for (i, out) in batch.model_out.iter_mut().enumerate() {
            *out *= 0.6 + 0.01 * i as f32;
        }
        let [_, _, d] = batch.plain(&batch.out64());
        let n = batch.dims.elements();
        for i in 0..d.len() {
            let (b, is_variance) = (i / (2 * n), i % (2 * n) >= n);
            let loss = |step: f64| {
                let mut out = batch.out64();
                out[i] += step;
                let [mse, vb, _] = batch.plain(&out);
                // The bound is not differentiated with respect to the answer.
                batch.coefficients[b] * if is_variance { vb[b] } else { mse[b] }
            };
            let h = 1e-5;
            let slope = (loss(h) - loss(-h)) / (2.0 * h);
            let scale = max_abs(&d[b * 2 * n..(b + 1) * 2 * n]);
            assert!((slope - d[i]).abs() <= 1e-6 * scale, "{kind} output {i}: slope {slope}, gradient {}", d[i]);
        }
    }
}

#[test]
fn the_fast_loss_is_no_less_accurate_than_the_plain_one_in_f32() {
    let batch = Batch::new(cosine(), &TIMESTEPS, DIMS);
    let [_, vb, _, d] = batch.fast();
    let [_, vb_ref, d_ref] = batch.plain(&batch.out64());
    let [_, vb_plain, d_plain] = batch.plain(&batch.model_out);
    let fast = error(vb.iter().copied(), &vb_ref);
    let plain = error(vb_plain, &vb_ref);
    assert!(fast <= 2.0 * plain, "vb: {fast}, plain {plain}");
    let fast = error(d.iter().copied(), &d_ref);
    let plain = error(d_plain, &d_ref);
    assert!(fast <= 3.0 * plain, "gradient: {fast}, plain {plain}");
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let t: Vec<u32> = (0..33).map(|i| i * 31).collect();
    let batch = Batch::new(linear(), &t, ImageDims { channels: 4, pixels: 64, learn_sigma: true });
    assert!(batch.model_out.len() > 8192, "too small to run in parallel");
    let run = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| batch.fast());
    let one = run(1);
    assert!(one.iter().flatten().all(|v| v.is_finite()));
    for threads in [2, 3, 8] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let batch = Batch::new(linear(), &[5, 7], DIMS);
    let run = |t: &[u32], noise: &[f32], outputs: usize| {
        let (mut mse, mut vb, mut loss) = (vec![0.0; outputs], vec![0.0; 2], vec![0.0; 2]);
        let mut d = vec![0.0; batch.model_out.len()];
        let terms = LossTerms { mse: &mut mse, vb: &mut vb, loss: &mut loss, d_model_out: &mut d };
        let (out, x) = (&batch.model_out, &batch.x_start);
        losses(terms, out, x, noise, t, &[1.0; 2], &[1.0; 2], &batch.schedule, DIMS).map_err(|e| e.to_string())
    };
    assert_eq!(run(&[5, 7], &batch.noise, 2), Ok(()));
    let err = run(&[5, 1000], &batch.noise, 2).unwrap_err();
    assert!(err.contains("timestep 1000"), "{err}");
    let err = run(&[5, 7], &batch.noise[1..], 2).unwrap_err();
    assert!(err.contains("noise has 209 elements, expected 210"), "{err}");
    assert!(run(&[5, 7], &batch.noise, 1).is_err());
    let mut x_t = vec![0.0; 209];
    assert!(q_sample(&mut x_t, &batch.x_start, &batch.noise, &[5, 7], &batch.schedule).is_err());
}

// Samplers.

/// A stand-in for a network: smooth, different for each row, with a variance half beyond -1..1.
fn model(x: &[f32], t: u32, out: &mut [f32], dims: ImageDims) {
    let n = dims.elements();
    for (i, out) in out.iter_mut().enumerate() {
        let (row, i) = (i / dims.out_elements(), i % dims.out_elements());
        let x = x[row * n + i % n];
        let shift = 0.1 * row as f32 + 0.01 * i as f32;
        *out = if i < n { (0.8 * x + shift + t as f32 / 1000.0).sin() } else { 1.3 * (x - shift).cos() };
    }
}

fn sampler_error(
    full: &Schedule,
    method: Method,
    clip: bool,
    guidance: Option<f64>,
    respacing: &str,
    learn_sigma: bool,
) -> f64 {
    // Four channels, as latents have: all of them are guided.
    let dims = ImageDims { channels: 4, pixels: 6, learn_sigma };
    let (rows, n) = (6, dims.elements());
    let schedule = full.respaced(&space_timesteps(1000, respacing).unwrap()).unwrap();
    let rng = Philox::new(5, Stream::SampleStep);
    let mut x = vec![0.0; rows * n];
    rng.normal(&mut x, 999, 0);
    let mut expected: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
    let mut estimates = vec![None; x.len()];
    for t in (0..schedule.len()).rev() {
        let half = if guidance.is_some() { x.len() / 2 } else { x.len() };
        let given = |i: usize| schedule.input_scale(t) * expected[i % half];
        let input: Vec<f32> = (0..x.len()).map(|i| given(i) as f32).collect();
        let mut out = vec![0.0; rows * dims.out_elements()];
        model(&input, schedule.timestep_map[t], &mut out, dims);
        let mut noise = vec![0.0; x.len()];
        rng.normal(&mut noise, (schedule.len() - 1 - t) as u64, 0);
        let out_at = |row: usize, i: usize| f64::from(out[row * dims.out_elements() + i]);
        for row in 0..rows {
            for i in 0..n {
                let answer = match guidance {
                    Some(scale) => {
                        let (c, u) = (out_at(row % 3, i), out_at(row % 3 + 3, i));
                        u + scale * (c - u)
                    }
                    None => out_at(row, i),
                };
                let v = learn_sigma.then(|| out_at(row, n + i));
                let given = schedule.input_scale(t) * expected[row * n + i];
                let epsilon = reference::noise_by_answer(answer, given, t, &schedule);
                let (x_t, e) = (expected[row * n + i], f64::from(noise[row * n + i]));
                expected[row * n + i] = match method {
                    Method::Ddpm => reference::ddpm_step(x_t, epsilon, v, e, t, &schedule, clip),
                    Method::Ddim { eta } => reference::ddim_step(x_t, epsilon, e, eta, t, &schedule, clip),
                    Method::DpmPlusPlus => {
                        let before = &mut estimates[row * n + i];
                        let (x, x_0) = reference::dpm_plus_plus_step(x_t, epsilon, *before, t, &schedule, clip);
                        *before = Some(x_0);
                        x
                    }
                };
            }
        }
    }
    let mut steps = Vec::new();
    let sampler = Sampler::new(schedule, method, clip, guidance).unwrap();
    sampler
        .sample(
            &mut x,
            |x, t, out| {
                model(x, t, out, dims);
                Ok(())
            },
            |k, out| rng.normal(out, k as u64, 0),
            |k, _| {
                steps.push(k);
                Ok(())
            },
            dims,
        )
        .unwrap();
    assert_eq!(steps, (0..sampler.steps()).collect::<Vec<_>>());
    error(x, &expected)
}

#[test]
fn samplers_follow_the_reference() {
    let ddim = [0.0, 0.5, 1.0].map(|eta| Method::Ddim { eta });
    for (kind, schedule) in schedules() {
        for method in [Method::Ddpm, Method::DpmPlusPlus].into_iter().chain(ddim) {
            for (clip, guidance) in [(false, None), (true, None), (false, Some(1.5)), (true, Some(4.0))] {
                for (respacing, learn_sigma) in [("10", true), ("ddim50", false), ("3,1,2", true), ("1", false)] {
                    let err = sampler_error(&schedule, method, clip, guidance, respacing, learn_sigma);
                    // The cosine schedule amplifies the rounding of its first step, from almost pure noise, 1000 times.
                    assert!(
                        err <= 1e-4,
                        "{kind} {method:?} clip {clip} {guidance:?} {respacing} {learn_sigma}: off by {err}"
                    );
                }
            }
        }
    }
}

#[test]
fn ddim_finds_the_image_that_the_noise_hides() {
    // With the true noise as the model, DDIM without clipping goes straight back to x_start.
    let dims = ImageDims { channels: 1, pixels: 16, learn_sigma: false };
    let schedule = Schedule::new(ScheduleKind::Linear, 1000).unwrap();
    let schedule = schedule.respaced(&space_timesteps(1000, "ddim25").unwrap()).unwrap();
    let last = schedule.len() as u32 - 1;
    let (mut x_start, mut noise, mut x) = (vec![0.0; 16], vec![0.0; 16], vec![0.0; 16]);
    Philox::new(1, Stream::Noise).normal(&mut x_start, 0, 0);
    Philox::new(1, Stream::Noise).normal(&mut noise, 1, 0);
    q_sample(&mut x, &x_start, &noise, &[last], &schedule).unwrap();
    let sampler = Sampler::new(schedule, Method::Ddim { eta: 0.0 }, false, None).unwrap();
    let model = |_: &[f32], _: u32, out: &mut [f32]| -> Result<()> {
        out.copy_from_slice(&noise);
        Ok(())
    };
    sampler.sample(&mut x, model, |_, _| panic!("eta 0 needs no noise"), |_, _| Ok(()), dims).unwrap();
    let expected: Vec<f64> = x_start.iter().map(|&v| f64::from(v)).collect();
    let err = error(x, &expected);
    assert!(err <= 1e-4, "off by {err}");
}

/// Of pixels that are normal with a standard deviation of 0.02 to 2 the denoiser is known, and where the probability flow leads: noise
/// `z` becomes `deviation * z`. Half of the steps err so much more; it falls with the square of their number, and for DDIM with the number.
#[test]
fn dpm_plus_plus_is_of_second_order() {
    const PIXELS: usize = 100;
    let deviation: [f64; PIXELS] = std::array::from_fn(|i| 0.02 * 100f64.powf(i as f64 / (PIXELS - 1) as f64));
    let dims = ImageDims { channels: 1, pixels: PIXELS, learn_sigma: false };
    for (kind, full) in schedules() {
        let total = |bar: f64, i: usize| bar * deviation[i].powi(2) + 1.0 - bar;
        let err = |method, steps| {
            let schedule = full.respaced(&full.evenly_by_log_snr(steps).unwrap()).unwrap();
            let mut x: Vec<f32> = (0..PIXELS).map(|i| total(full.alphas_cumprod[999], i).sqrt() as f32).collect();
            let model = |x: &[f32], t: u32, out: &mut [f32]| -> Result<()> {
                let bar = full.alphas_cumprod[t as usize];
                let (a, b) = full.target(t as usize);
                out.iter_mut().enumerate().for_each(|(i, out)| {
                    // What noise and image are in x on average.
                    let x = f64::from(x[i]) / full.input_scale(t as usize) / total(bar, i);
                    *out = (a * (1.0 - bar).sqrt() * x - b * bar.sqrt() * deviation[i].powi(2) * x) as f32;
                });
                Ok(())
            };
            let sampler = Sampler::new(schedule, method, false, None).unwrap();
            sampler.sample(&mut x, model, |_, _| panic!("no noise"), |_, _| Ok(()), dims).unwrap();
            let squares = x.iter().zip(deviation).map(|(&x, deviation)| (f64::from(x) - deviation).powi(2));
            (squares.sum::<f64>() / PIXELS as f64).sqrt()
        };
        let [second, ddim] =
            [Method::DpmPlusPlus, Method::Ddim { eta: 0.0 }].map(|method| [15, 30].map(|steps| err(method, steps)));
        assert!((3.0..5.0).contains(&(second[0] / second[1])), "{kind}: {second:?}");
        assert!((1.7..2.5).contains(&(ddim[0] / ddim[1])), "{kind}, DDIM: {ddim:?}");
        // The flow begins nearer to pure noise.
        let most = if full.prediction == Prediction::Flow { 0.025 } else { 0.02 };
        assert!(second[0] < most && ddim[0] > 5.0 * second[0], "{kind}: {second:?} {ddim:?}");
    }
}

/// Where a step is not guided, as if both answers were the conditional one; and the other is not asked for.
#[test]
fn guidance_may_be_for_some_timesteps() {
    let dims = ImageDims { channels: 2, pixels: 6, learn_sigma: true };
    let (rows, n) = (6, dims.elements());
    let schedule = Schedule::new(ScheduleKind::Cosine, 1000).unwrap();
    let schedule = schedule.respaced(&space_timesteps(1000, "10").unwrap()).unwrap();
    let rng = Philox::new(5, Stream::SampleStep);
    for method in [Method::Ddpm, Method::Ddim { eta: 0.5 }, Method::DpmPlusPlus] {
        let guided = Sampler::new(schedule.clone(), method, true, Some(3.0)).unwrap();
        let sampled = |sampler: &Sampler, at: std::ops::Range<u32>| {
            let mut asked = Vec::new();
            let mut x = vec![0.0; rows * n];
            rng.normal(&mut x, 999, 0);
            let answer = |x: &[f32], t: u32, out: &mut [f32]| {
                asked.push((t, x.len() / n));
                assert_eq!(out.len() / dims.out_elements(), x.len() / n);
                model(x, t, out, dims);
                if x.len() == rows * n && !at.contains(&t) {
                    out.copy_within(..3 * dims.out_elements(), 3 * dims.out_elements());
                }
                Ok(())
            };
            sampler.sample(&mut x, answer, |k, out| rng.normal(out, k as u64, 0), |_, _| Ok(()), dims).unwrap();
            (x[..3 * n].to_vec(), asked)
        };
        let (expected, all) = sampled(&guided, 222..778);
        let (found, asked) = sampled(&guided.clone().guided_at(222..778), 0..1000);
        assert!(found == expected && all.iter().all(|&(_, asked)| asked == rows), "{method:?}");
        let times: Vec<u32> = asked.iter().map(|&(t, _)| t).collect();
        assert_eq!(times, [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]);
        for (t, asked) in asked {
            assert_eq!(asked, if (222..778).contains(&t) { rows } else { rows / 2 }, "{t}");
        }
        assert!(found != sampled(&guided, 0..1000).0, "{method:?}: guidance counts nowhere");
    }
}

/// A channel that is not guided goes its way by the conditional answer.
#[test]
fn guidance_may_be_for_some_channels() {
    let dims = ImageDims { channels: 3, pixels: 4, learn_sigma: true };
    let out: Vec<f32> = (0..2 * dims.out_elements()).map(|i| (i as f32).sin()).collect();
    for channels in 0..=4 {
        let mut found = out.clone();
        guide(&mut found, 3.0, dims, channels);
        for (i, &found) in found.iter().enumerate() {
            let at = i % dims.out_elements();
            let (c, u) = (out[at], out[dims.out_elements() + at]);
            let guided = at < channels.min(3) * dims.pixels;
            let expected = if guided { u + 3.0 * (c - u) } else { out[i] };
            assert!((found - expected).abs() <= 1e-6, "{channels} channels, number {i}: {found} for {expected}");
        }
    }
    let schedule = Schedule::new(ScheduleKind::Cosine, 1000).unwrap().respaced(&[0, 500, 990]).unwrap();
    let sampled = |channels: Option<usize>, cfg: f64| {
        let sampler = Sampler::new(schedule.clone(), Method::Ddim { eta: 0.0 }, false, Some(cfg)).unwrap();
        let sampler = channels.map_or(sampler.clone(), |channels| sampler.guided_channels(channels));
        let mut x: Vec<f32> = (0..2 * dims.elements()).map(|i| (i as f32).cos()).collect();
        // Of each element alone: what happens to one channel says nothing to another.
        let answer = |x: &[f32], _: u32, out: &mut [f32]| {
            out.fill(0.0);
            for (row, (x, out)) in x.chunks(dims.elements()).zip(out.chunks_mut(dims.out_elements())).enumerate() {
                out.iter_mut().zip(x).for_each(|(out, x)| *out = (0.5 + 0.3 * row as f32) * x);
            }
            Ok(())
        };
        sampler.sample(&mut x, answer, |_, _| (), |_, _| Ok(()), dims).unwrap();
        x.truncate(dims.elements());
        x
    };
    let (all, none, two) = (sampled(None, 3.0), sampled(None, 1.0), sampled(Some(2), 3.0));
    assert!(all.iter().zip(&none).all(|(all, none)| (all - none).abs() > 1e-3));
    assert_eq!(two, [&all[..8], &none[8..]].concat());
}

#[test]
fn a_sampler_refuses_what_it_cannot_do() {
    let schedule = Schedule::new(ScheduleKind::Linear, 1000).unwrap().respaced(&[0, 500, 999]).unwrap();
    for eta in [-0.1, 1.1, f64::NAN] {
        assert!(Sampler::new(schedule.clone(), Method::Ddim { eta }, false, None).is_err());
    }
    assert!(Sampler::new(schedule.clone(), Method::Ddpm, false, Some(f64::NAN)).is_err());
    let dims = ImageDims { channels: 1, pixels: 4, learn_sigma: true };
    let run = |len: usize, value: f32, stop: bool| {
        let sampler = Sampler::new(schedule.clone(), Method::Ddpm, false, Some(1.5)).unwrap();
        let mut calls = 0;
        let after = |_: usize, _: &[f32]| {
            calls += 1;
            if stop { Err(dtr_fused::Error::Stopped("enough".into())) } else { Ok(()) }
        };
        let fill = |_: &[f32], _: u32, out: &mut [f32]| {
            out.fill(value);
            Ok(())
        };
        let result = sampler.sample(&mut vec![0.5; len], fill, |_, out| out.fill(0.1), after, dims);
        (result.map_err(|e| e.to_string()), calls)
    };
    assert_eq!(run(8, 0.1, false), (Ok(()), 3));
    assert_eq!(run(8, 0.1, true), (Err("enough".into()), 1));
    assert!(run(12, 0.1, false).0.unwrap_err().contains("expected a multiple of 8"));
    assert!(run(8, f32::NAN, false).0.unwrap_err().contains("not finite"));
}

/// Of an infinite answer, clipping would make a white picture.
#[test]
fn a_clipped_sampler_refuses_infinite_answers() {
    let schedule = Schedule::new(ScheduleKind::Linear, 1000).unwrap().respaced(&[0, 999]).unwrap();
    let dims = ImageDims { channels: 1, pixels: 4, learn_sigma: true };
    for method in [Method::Ddpm, Method::Ddim { eta: 0.0 }, Method::DpmPlusPlus] {
        let sampler = Sampler::new(schedule.clone(), method, true, None).unwrap();
        let result = [1.0, f32::INFINITY].map(|value| {
            let model = |_: &[f32], _: u32, out: &mut [f32]| -> Result<()> {
                out.fill(0.0);
                out[0] = value;
                Ok(())
            };
            sampler.sample(&mut [0.5; 4], model, |_, out| out.fill(0.1), |_, _| Ok(()), dims)
        });
        assert!(result[0].is_ok() && result[1].as_ref().is_err_and(|e| e.to_string().contains("not finite")));
    }
}

/// With all noise of DDPM nothing is left for the direction to x_t, in f32 sometimes less than nothing.
#[test]
fn ddim_in_f32_with_all_noise_is_finite() {
    for kept in [&[0, 999][..], &[0, 500, 999]] {
        let schedule = Schedule::new(ScheduleKind::Cosine, 1000).unwrap().respaced(kept).unwrap();
        for t in 0..kept.len() {
            let x = reference::ddim_step(0.3f32, 0.2, 0.1, 1.0, t, &schedule, true);
            assert!(x.is_finite(), "step {t} of {kept:?} gives {x}");
        }
    }
}

// Golden tensors.

fn golden(path: &str) -> SafetensorsFile {
    SafetensorsFile::open(format!("{}/tests/golden/{path}.safetensors", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn floats(file: &SafetensorsFile, name: &str) -> Vec<f64> {
    let tensor = file.tensor(name).unwrap();
    if tensor.element == dtr_fused::element::Element::F64 {
        return tensor.bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
    }
    let mut out = vec![0.0; tensor.elements()];
    tensor.to_f32(&mut out);
    out.into_iter().map(f64::from).collect()
}

fn floats32(file: &SafetensorsFile, name: &str) -> Vec<f32> {
    floats(file, name).into_iter().map(|v| v as f32).collect()
}

#[test]
fn losses_of_golden_model_outputs() {
    let forward = golden("a/forward");
    let dims = ImageDims { channels: 4, pixels: 64, learn_sigma: true };
    for kind in [ScheduleKind::Linear, ScheduleKind::Cosine] {
        for (name, weight) in [
            ("constant", LossWeight::Constant),
            ("min_snr_5", LossWeight::MinSnr { gamma: 5.0 }),
            ("p2weight_1_1_persample", LossWeight::P2 { gamma: 1.0, k: 1.0 }),
            ("uw", LossWeight::Uncertainty),
        ] {
            let file = golden(&format!("a/loss_{kind}_{name}"));
            let inputs = if name == "uw" { &file } else { &forward };
            let t: Vec<u32> = floats(inputs, "t").into_iter().map(|t| t as u32).collect();
            let schedule = Schedule::new(kind, 1000).unwrap();
            let weights: Vec<f64> = t.iter().map(|&t| weight.weight(&schedule, t as usize)).collect();
            if file.get("weight.f64").is_some() {
                let err = error(weights.iter().copied(), &floats(&file, "weight.f64"));
                assert!(err <= 1e-12, "{kind} {name}: weights are off by {err}");
            }
            let mut coefficients = vec![1.0 / t.len() as f64; t.len()];
            let s: Option<[f32; 8]> = (name == "uw").then(|| floats32(&file, "loss_scale").try_into().unwrap());
            if let Some(s) = &s {
                weighting::uncertainty_coefficients(&mut coefficients, s);
            }
            let x_start = floats32(inputs, "x_start");
            let noise = floats32(inputs, "noise");
            let mut x_t = vec![f32::NAN; x_start.len()];
            q_sample(&mut x_t, &x_start, &noise, &t, &schedule).unwrap();
            let err = error(x_t.iter().copied(), &floats(&file, "x_t.f32"));
            assert!(err <= 1e-6, "{kind} {name}: x_t is off by {err}");
            let batch = Batch {
                schedule,
                dims,
                t,
                x_start,
                noise,
                model_out: floats32(&file, "model_out.f32"),
                weights,
                coefficients,
            };
            let [mse, vb, loss, d] = batch.fast();
            for (what, found, tolerance) in [("mse", &mse, 5e-6), ("vb", &vb, 2e-5), ("loss", &loss, 2e-5)] {
                let expected = floats(&file, &format!("{what}.f64"));
                if expected.len() != found.len() {
                    continue; // uw: one loss for the batch, compared below
                }
                for (b, (found, expected)) in found.iter().zip(expected).enumerate() {
                    let err = (f64::from(*found) - expected).abs() / expected.abs();
                    assert!(err <= tolerance, "{kind} {name}: {what} of sample {b} is off by {err}");
                }
            }
            if let Some(s) = &s {
                let mut ds = [f32::NAN; 8];
                let total = weighting::uncertainty_loss(&mut ds, &loss, s);
                let err = error([total], &floats(&file, "loss.f64"));
                assert!(err <= 2e-5, "{kind} {name}: loss is off by {err}");
                let err = error(ds, &floats(&file, "grad.loss_scale.f64"));
                assert!(err <= 2e-5, "{kind} {name}: gradient of s is off by {err}");
            }
            let expected = floats(&file, "d_model_out");
            for (half, tolerance) in [(0, 1e-5), (1, 1e-4)] {
                let pick = |x: &mut dyn Iterator<Item = f64>| -> Vec<f64> {
                    x.enumerate().filter(|(i, _)| i / 256 % 2 == half).map(|(_, v)| v).collect()
                };
                let found = pick(&mut d.iter().map(|&v| f64::from(v)));
                let err = error(found, &pick(&mut expected.iter().copied()));
                assert!(err <= tolerance, "{kind} {name}: half {half} of the gradient is off by {err}");
            }
        }
    }
}

#[test]
fn golden_likelihoods_and_their_derivatives() {
    let file = golden("nll/nll");
    let [x, mean, log_scale] = ["x", "means", "log_scales"].map(|name| floats(&file, name));
    let [ll, d_mean, d_log_scale] = ["ll.f64", "dll_dmeans.f64", "dll_dlog_scales.f64"].map(|name| floats(&file, name));
    let mut at_the_floor = 0;
    for i in 0..x.len() {
        let (found, found_d_mean, found_d_log_scale) =
            reference::discretized_log_likelihood(x[i], mean[i], log_scale[i]);
        // In f64 there is nothing but rounding, which the smallest probability, 1e-12, amplifies to 1e-4.
        let slack = 1e-9 + 1e-16 / ll[i].exp();
        assert!((found - ll[i]).abs() <= slack * ll[i].abs().max(1.0), "ll {i}: {found} {}", ll[i]);
        let err = (found_d_mean - d_mean[i]).abs() / (1.0 + d_mean[i].abs());
        assert!(err <= 10.0 * slack, "d ll / d mean {i}: {found_d_mean} {}", d_mean[i]);
        let err = (found_d_log_scale - d_log_scale[i]).abs() / (1.0 + d_log_scale[i].abs());
        assert!(err <= 10.0 * slack, "d ll / d log_scale {i}: {found_d_log_scale} {}", d_log_scale[i]);
        at_the_floor += usize::from(found == 1e-12_f64.ln());
    }
    assert!(at_the_floor > 0, "the clamp was not reached");
    let [kl, mean2, log_variance1] = ["kl.f64", "kl_mean2", "kl_logvar1"].map(|name| floats(&file, name));
    let found = (0..x.len()).map(|i| reference::normal_kl(mean[i], log_variance1[i], mean2[i], 2.0 * log_scale[i]));
    let err = error(found, &kl);
    assert!(err <= 1e-12, "kl is off by {err}");
}

#[test]
fn golden_schedules() {
    let file = golden("schedules/schedules");
    for kind in [ScheduleKind::Linear, ScheduleKind::Cosine] {
        let full = Schedule::new(kind, 1000).unwrap();
        for respacing in ["full", "10", "250", "ddim50"] {
            let kept =
                if respacing == "full" { (0..1000).collect() } else { space_timesteps(1000, respacing).unwrap() };
            let schedule = full.respaced(&kept).unwrap();
            let mut compared = 0;
            for (name, found) in [
                ("betas", &schedule.betas),
                ("alphas_cumprod", &schedule.alphas_cumprod),
                ("posterior_variance", &schedule.posterior_variance),
                ("posterior_log_variance_clipped", &schedule.posterior_log_variance_clipped),
                ("posterior_mean_coef1", &schedule.posterior_mean_coef1),
                ("posterior_mean_coef2", &schedule.posterior_mean_coef2),
            ] {
                let name = format!("{kind}_{respacing}.{name}");
                if file.get(&name).is_some() {
                    let err = error(found.iter().copied(), &floats(&file, &name));
                    assert!(err <= 1e-12, "{name} is off by {err}");
                    compared += 1;
                }
            }
            assert!(compared >= 3, "{kind} {respacing}: only {compared} arrays");
            assert_eq!(error(schedule.timestep_map, &floats(&file, &format!("{kind}_{respacing}.timestep_map"))), 0.0);
        }
    }
    for (steps, respacing) in
        [(1000, "1"), (1000, "10"), (1000, "250"), (1000, "1000"), (1000, "ddim50"), (1000, "10,15,20")]
    {
        let expected = floats(&file, &format!("space_timesteps.{respacing}"));
        let found: Vec<f64> = space_timesteps(steps, respacing).unwrap().into_iter().map(f64::from).collect();
        assert_eq!(found, expected, "{respacing}");
    }
    let found: Vec<f64> = space_timesteps(300, "10,15,20").unwrap().into_iter().map(f64::from).collect();
    assert_eq!(found, floats(&file, "space_timesteps_300.10,15,20"));
}

#[test]
fn guidance_of_what_is_not_two_halves_is_refused() {
    let dims = ImageDims { channels: 2, pixels: 3, learn_sigma: true };
    for (len, dims) in [(12, dims), (36, dims), (23, dims), (24, ImageDims { pixels: 0, ..dims })] {
        let guided = std::panic::catch_unwind(|| guide(&mut vec![1.0; len], 1.5, dims, 1));
        let message = guided.expect_err("rows without a partner").downcast::<String>().unwrap();
        assert!(message.contains("not two halves"), "{message}");
    }
    guide(&mut [1.0; 24], 1.5, dims, 1);
}
