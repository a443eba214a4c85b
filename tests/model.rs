//! The whole model: gradients reach every parameter in every routing, and the result depends on nothing but the numbers.

mod common;

use common::{numbers, pools, same_bits};
use dtr_fused::autograd::{Memory, Tape};
use dtr_fused::backend::cuda::DType;
use dtr_fused::diffusion::{Method, Sampler, Schedule, ScheduleKind};
use dtr_fused::error::Error;
use dtr_fused::generate::Generator;
use dtr_fused::model::config::{ModelConfig, TASKS};
use dtr_fused::model::dit::{Dit, Init};
use dtr_fused::model::memory::activation_numbers;
use dtr_fused::routing::Routing;

const ROUTINGS: [Routing; 4] = [Routing::Dense, Routing::Paper, Routing::Sublayer, Routing::Random];
/// From the first task to the last, in no order; the second sample has the null class.
const TIMESTEPS: [u32; 6] = [0, 999, 500, 970, 3, 860];
const LABELS: [u32; 6] = [4, 5, 0, 2, 2, 1];

fn config(routing: Routing, beta: f64) -> ModelConfig {
    ModelConfig {
        hidden_size: 60,
        depth: 3,
        num_heads: 3,
        patch_size: 2,
        input_size: 10,
        in_channels: 3,
        num_classes: 5,
        null_class: true,
        mlp_ratio: 2.5,
        learn_sigma: true,
        routing,
        beta,
        alpha: 4.0,
        routing_seed: 3,
    }
}

fn model(routing: Routing, beta: f64) -> Dit {
    Dit::new(config(routing, beta)).unwrap()
}

/// Random weights that keep numbers near 1, none of them 0: adaLN-Zero's zeros prove nothing.
fn weights(model: &Dit) -> Vec<f32> {
    let mut weights = numbers(1, model.layout.len());
    for entry in model.layout.entries() {
        let inputs: usize = entry.shape.iter().skip(1).product();
        let factor = 0.6 / (inputs as f32).sqrt();
        weights[entry.param.range()].iter_mut().for_each(|w| *w *= factor);
    }
    weights
}

/// Output and gradients of all weights.
fn step(model: &Dit, weights: &[f32], memory: &mut Memory) -> (Vec<f32>, Vec<f32>) {
    let config = &model.config;
    let shape = [TIMESTEPS.len(), config.in_channels, config.input_size, config.input_size];
    let mut grads = vec![f32::NAN; weights.len()];
    let mut tape = Tape::new(weights, &mut grads, false, memory);
    let x = tape.input(&numbers(2, shape.iter().product()), shape, false).unwrap();
    let y = model.forward(&mut tape, x, &TIMESTEPS, &LABELS).unwrap();
    let output = tape.value(y).to_vec();
    tape.backward(y, &numbers(3, output.len())).unwrap();
    (output, grads)
}

/// Of 36 tokens and heads of 16 channels, so that attention is in bf16 too. Of numbers near 1, each layer's factors are off by up to 2^-9.
#[test]
fn a_model_in_bf16_is_near_the_same_in_f32() {
    for (routing, beta) in [(Routing::Dense, 1.0), (Routing::Paper, 0.6), (Routing::Sublayer, 0.4)] {
        let model = Dit::new(ModelConfig { hidden_size: 48, input_size: 12, ..config(routing, beta) }).unwrap();
        let weights = weights(&model);
        let [(y, grads), (rounded_y, rounded_grads)] =
            [DType::F32, DType::Bf16].map(|elem| step(&model, &weights, &mut Memory::on_cpu(elem)));
        for (what, exact, rounded) in [("output", y, rounded_y), ("gradients", grads, rounded_grads)] {
            let square = |x: f32| f64::from(x).powi(2);
            let error: f64 = exact.iter().zip(&rounded).map(|(x, y)| square(x - y)).sum();
            let off = (error / exact.iter().map(|&x| square(x)).sum::<f64>()).sqrt();
            assert!((1e-4..2e-2).contains(&off), "{what} of {routing:?}: off by {off:.1e}");
        }
    }
}

fn fresh_step(model: &Dit) -> (Vec<f32>, Vec<f32>) {
    step(model, &weights(model), &mut Memory::new())
}

#[test]
fn every_parameter_gets_a_gradient_in_every_routing() {
    for routing in ROUTINGS {
        for beta in [0.8, 0.5, 0.02] {
            let model = model(routing, beta);
            let (output, grads) = fresh_step(&model);
            assert!(output.iter().all(|y| y.is_finite()), "{routing:?} {beta}: the output is not finite");
            assert_eq!(model.layout.entries().len(), 4 + 5 + 3 * 10 + 4 - 2);
            for entry in model.layout.entries() {
                let grad = &grads[entry.param.range()];
                assert!(grad.iter().all(|g| g.is_finite()), "{routing:?} {beta}: {} is not finite", entry.name);
                assert!(grad.iter().any(|&g| g != 0.0), "{routing:?} {beta}: {} gets no gradient", entry.name);
            }
        }
    }
}

#[test]
fn in_dense_routing_every_number_of_every_parameter_gets_a_gradient() {
    let model = model(Routing::Dense, 1.0);
    let (_, grads) = fresh_step(&model);
    for entry in model.layout.entries() {
        let mut grads = grads[entry.param.range()].to_vec();
        if entry.name.ends_with("attn.qkv.bias") {
            // Softmax is the same whatever is added to all keys: the gradient of their bias is rounding errors, which may cancel.
            let keys = grads.len() / 3..grads.len() / 3 * 2;
            assert!(grads[keys.clone()].iter().all(|g| g.abs() < 1e-3), "{}", entry.name);
            grads.drain(keys);
        }
        let without = grads.iter().filter(|&&g| g == 0.0).count();
        // Class 3 is not in the batch.
        let expected = if entry.name.starts_with("y_embedder") { 60 } else { 0 };
        assert_eq!(without, expected, "{}", entry.name);
    }
}

#[test]
fn routings_agree_where_all_channels_are_active() {
    let (output, grads) = fresh_step(&model(Routing::Dense, 1.0));
    for routing in [Routing::Paper, Routing::Sublayer, Routing::Random] {
        let (y, g) = fresh_step(&model(routing, 1.0));
        assert_eq!(y, output, "{routing:?}");
        assert_eq!(g, grads, "{routing:?}");
    }
}

#[test]
fn routings_differ_where_they_should() {
    let outputs = ROUTINGS.map(|routing| fresh_step(&model(routing, 0.5)).0);
    for i in 0..4 {
        for j in 0..i {
            assert_ne!(outputs[i], outputs[j], "{:?} and {:?}", ROUTINGS[i], ROUTINGS[j]);
        }
    }
}

#[test]
fn checkpoints_change_memory_and_no_bit() {
    for routing in ROUTINGS {
        let mut model = model(routing, 0.5);
        let weights = weights(&model);
        let [mut all, mut few] = [Memory::new(), Memory::new()];
        let (output, grads) = step(&model, &weights, &mut all);
        model.checkpoint_activations = true;
        for _ in 0..2 {
            let (y, g) = step(&model, &weights, &mut few);
            assert!(same_bits(&y, &output) && same_bits(&g, &grads), "{routing:?}");
        }
        // Three blocks: the inside of one is kept at a time. All keep what is before a GELU, not what is after.
        assert!(few.bytes() * 4 < all.bytes() * 3, "{routing:?}: {} of {} bytes", few.bytes(), all.bytes());
    }
}

/// Random routing masks and then computes everything. Given the windows of the paper's routing as masks it must agree with
/// the kernels that skip.
#[test]
fn windows_are_the_masks_of_the_same_channels() {
    for beta in [0.8, 0.35, 0.02] {
        let skipping = model(Routing::Paper, beta);
        let c = skipping.config.hidden_size;
        let mut mask = vec![0.0; TASKS * c];
        for (mask, window) in mask.chunks_exact_mut(c).zip(skipping.windows()) {
            mask[window.range()].fill(1.0);
        }
        let mut masking = model(Routing::Random, beta);
        masking.set_masks(vec![mask; 3]).unwrap();
        let weights = weights(&skipping);
        let (y, g) = step(&skipping, &weights, &mut Memory::new());
        let (expected_y, expected_g) = step(&masking, &weights, &mut Memory::new());
        close("output", &y, &expected_y);
        for entry in skipping.layout.entries() {
            close(&entry.name, &g[entry.param.range()], &expected_g[entry.param.range()]);
        }
    }
}

fn close(what: &str, a: &[f32], b: &[f32]) {
    let largest = b.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        // Not of a largest error: NaN is not above any bound.
        assert!((a - b).abs() <= 3e-5 * largest, "{what}: {a} instead of {b} at {i}, where the largest is {largest}");
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for routing in ROUTINGS {
        let model = model(routing, 0.6);
        let (output, grads) = fresh_step(&model);
        for pool in pools() {
            let (y, g) = pool.install(|| fresh_step(&model));
            let threads = pool.current_num_threads();
            assert!(same_bits(&y, &output) && same_bits(&g, &grads), "{routing:?} with {threads} threads");
        }
    }
}

#[test]
fn an_inference_tape_gives_the_same_bits() {
    for routing in ROUTINGS {
        let model = model(routing, 0.6);
        let weights = weights(&model);
        let (output, _) = step(&model, &weights, &mut Memory::new());
        let mut memory = Memory::new();
        let mut tape = Tape::inference(&weights, &mut memory);
        let x = tape.input(&numbers(2, 6 * 300), [6, 3, 10, 10], false).unwrap();
        let y = model.forward(&mut tape, x, &TIMESTEPS, &LABELS).unwrap();
        assert!(same_bits(tape.value(y), &output), "{routing:?}");
        assert!(tape.backward(y, &output).is_err());
    }
}

#[test]
fn a_used_memory_changes_no_bit() {
    let mut memory = Memory::new();
    for routing in ROUTINGS {
        let model = model(routing, 0.6);
        let weights = weights(&model);
        let poison = vec![f32::NAN; weights.len()];
        step(&model, &poison, &mut memory);
        let (y, g) = step(&model, &weights, &mut memory);
        let (expected_y, expected_g) = step(&model, &weights, &mut Memory::new());
        assert!(same_bits(&y, &expected_y) && same_bits(&g, &expected_g), "{routing:?}");
    }
}

/// The estimate is of what the tape really holds, and a second step holds no more.
#[test]
fn activations_take_the_memory_that_was_told() {
    for (routing, checkpointed) in ROUTINGS.into_iter().flat_map(|r| [(r, false), (r, true)]) {
        for (hidden_size, depth, mlp_ratio) in [(60, 3, 2.5), (96, 8, 4.0)] {
            let mut model = Dit::new(ModelConfig { hidden_size, depth, mlp_ratio, ..config(routing, 0.6) }).unwrap();
            model.checkpoint_activations = checkpointed;
            let (weights, mut memory) = (weights(&model), Memory::new());
            step(&model, &weights, &mut memory);
            let held = memory.bytes();
            step(&model, &weights, &mut memory);
            assert_eq!(memory.bytes(), held, "{routing:?}, checkpointed {checkpointed}: a second step took more");
            let told = 4.0 * activation_numbers(&model.config, TIMESTEPS.len(), checkpointed);
            let ratio = told / held as f64;
            let what = format!("{routing:?}, C {hidden_size}, depth {depth}, checkpointed {checkpointed}");
            assert!((0.9..1.2).contains(&ratio), "{what}: told {ratio:.2} of the {held} bytes that are held");
        }
    }
}

#[test]
fn gradients_accumulate_over_micro_batches() {
    for routing in ROUTINGS {
        let model = model(routing, 0.6);
        let weights = weights(&model);
        let (_, expected) = step(&model, &weights, &mut Memory::new());
        let (mut grads, mut memory) = (vec![f32::NAN; weights.len()], Memory::new());
        let (x, upstream) = (numbers(2, 6 * 300), numbers(3, 6 * 600));
        for (part, add) in [(0..2, false), (2..5, true), (5..6, true)] {
            let mut tape = Tape::new(&weights, &mut grads, add, &mut memory);
            let images = &x[part.start * 300..part.end * 300];
            let images = tape.input(images, [part.len(), 3, 10, 10], false).unwrap();
            let y = model.forward(&mut tape, images, &TIMESTEPS[part.clone()], &LABELS[part.clone()]).unwrap();
            tape.backward(y, &upstream[part.start * 600..part.end * 600]).unwrap();
        }
        for entry in model.layout.entries() {
            close(&entry.name, &grads[entry.param.range()], &expected[entry.param.range()]);
        }
    }
}

#[test]
fn the_published_start_is_the_identity_and_trains() {
    let model = model(Routing::Paper, 0.8);
    let weights = model.init(1, Init::Published);
    let (output, grads) = step(&model, &weights, &mut Memory::new());
    assert!(output.iter().all(|&y| y == 0.0), "adaLN-Zero starts with an output of 0");
    let last = model.layout.get("final_layer.linear.weight").unwrap();
    assert!(grads[last.param.range()].iter().all(|&g| g.is_finite() && g != 0.0));
    assert!(grads.iter().all(|g| g.is_finite()));
}

/// Biases, adaLN and the last layer are zero; the rest is spread as the two starts promise, and no two layers are the same.
#[test]
fn initial_weights_are_spread_as_they_should() {
    let model = model(Routing::Paper, 0.8);
    for init in [Init::Published, Init::Small] {
        let weights = model.init(1, init);
        let again = model.init(2, init);
        let mut firsts = Vec::new();
        for entry in model.layout.entries() {
            let (name, w) = (&entry.name, &weights[entry.param.range()]);
            if name.ends_with(".bias") || name.contains("adaLN_modulation") || name.starts_with("final_layer") {
                assert!(w.iter().all(|&w| w == 0.0), "{init:?}: {name} is not zero");
                continue;
            }
            let n = w.len() as f32;
            let deviation = (w.iter().map(|w| w * w).sum::<f32>() / n).sqrt();
            let largest = w.iter().fold(0.0, |most: f32, w| most.max(w.abs()));
            let normal = match (init, name.split('.').next().unwrap()) {
                (Init::Published, "t_embedder" | "y_embedder") => Some(0.02),
                (Init::Small, "y_embedder") => Some(0.5),
                _ => None,
            };
            // Xavier: uniform within a bound, whose deviation is the bound by the root of 3.
            let rows = entry.shape[0];
            let bound = (6.0 / (rows + w.len() / rows) as f32).sqrt();
            let expected = normal.unwrap_or(bound / 3f32.sqrt());
            let err = (deviation / expected - 1.0).abs();
            assert!(err <= 4.0 / (2.0 * n).sqrt(), "{init:?}: {name} deviates by {deviation}, not {expected}");
            assert!(normal.is_some() || largest <= bound, "{init:?}: {name} has {largest} beyond {bound}");
            assert!(*w != again[entry.param.range()], "{init:?}: {name} is that of another seed");
            firsts.push((w[0] / expected, w[1] / expected));
        }
        for (i, a) in firsts.iter().enumerate() {
            let same = |b: &(f32, f32)| (a.0 - b.0).abs() < 1e-4 && (a.1 - b.1).abs() < 1e-4;
            assert!(!firsts[..i].iter().any(same), "{init:?}: two layers start with the same numbers");
        }
    }
}

/// Peebles and Xie, ICCV 2023, table 1: millions of parameters, and heads of 64 channels or, in the largest, 72.
#[test]
fn published_models_have_their_sizes() {
    for (name, millions, head) in [("S/2", 33, 64), ("B/2", 130, 64), ("L/2", 458, 64), ("XL/2", 675, 72)] {
        let config = ModelConfig::published(&format!("DiT-{name}")).unwrap();
        let (hidden_size, num_heads, patch_size) = (config.hidden_size, config.num_heads, config.patch_size);
        let model = Dit::new(config).unwrap();
        assert_eq!((model.layout.len() as f64 / 1e6).round() as usize, millions, "{name}");
        assert_eq!((hidden_size / num_heads, hidden_size % num_heads, patch_size), (head, 0, 2), "{name}");
    }
    for name in ["DiT-S/3", "DiT-M/2", "S/2", "DiT-XL", "DiT-XL/", "dit-s/2"] {
        assert_eq!(ModelConfig::published(name), None, "{name}");
    }
}

#[test]
fn sizes_that_the_kernels_do_not_take_are_refused() {
    let fits =
        ModelConfig { hidden_size: 64, num_heads: 4, in_channels: 1, mlp_ratio: 4.0, ..config(Routing::Paper, 0.8) };
    let refused = |config: &ModelConfig, elem| config.check_cuda(elem).err().map(|e| e.to_string());
    assert_eq!([DType::F32, DType::Bf16].map(|elem| refused(&fits, elem)), [None, None]);
    for (odd, what) in [
        (ModelConfig { num_heads: 16, ..fits.clone() }, "the head size is 4,"),
        (ModelConfig { mlp_ratio: 1.0625, ..fits.clone() }, "the MLP size is 68,"),
        (ModelConfig { patch_size: 1, ..fits.clone() }, "the numbers of an output patch is 2,"),
    ] {
        assert!(refused(&odd, DType::Bf16).is_some_and(|message| message.contains(what)), "{what}");
        assert_eq!(refused(&odd, DType::F32), None, "{what}");
    }
    for (hidden_size, fits_f32) in [(512, true), (516, false)] {
        let wide = ModelConfig { hidden_size, ..fits.clone() };
        assert_eq!(refused(&wide, DType::F32).is_none(), fits_f32, "heads of {} channels", hidden_size / 4);
    }
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let model = model(Routing::Paper, 0.8);
    let weights = weights(&model);
    let refused = |what: &str, shape: [usize; 4], t: &[u32], y: &[u32]| {
        let mut memory = Memory::new();
        let mut tape = Tape::inference(&weights, &mut memory);
        let x = common::zeros(&mut tape, shape);
        match model.forward(&mut tape, x, t, y) {
            Err(Error::Shape { what: message, .. }) => assert!(message.contains(what), "'{message}' for '{what}'"),
            other => panic!("{other:?} where an error was due ({what})"),
        }
    };
    refused("expected [2, 3, 10, 10]", [2, 3, 10, 8], &[1, 2], &[0, 1]);
    refused("expected [2, 3, 10, 10]", [3, 3, 10, 10], &[1, 2], &[0, 1]);
    refused("with 1 labels", [2, 3, 10, 10], &[1, 2], &[0]);
    refused("timestep 1000 is outside 0..1000", [2, 3, 10, 10], &[1, 1000], &[0, 1]);
    refused("label 6 is outside 0..6", [2, 3, 10, 10], &[1, 2], &[0, 6]);
    refused("no size may be 0", [0, 3, 10, 10], &[], &[]);
}

#[test]
fn a_tape_goes_back_once() {
    let model = model(Routing::Sublayer, 0.5);
    let weights = weights(&model);
    let (mut grads, mut memory) = (vec![0.0; weights.len()], Memory::new());
    let mut tape = Tape::new(&weights, &mut grads, false, &mut memory);
    let x = common::zeros(&mut tape, [2, 3, 10, 10]);
    let out = model.forward(&mut tape, x, &[1, 2], &[0, 1]).unwrap();
    let upstream = vec![1.0; tape.value(out).len()];
    tape.backward(out, &upstream).unwrap();
    assert!(matches!(tape.backward(out, &upstream), Err(Error::Shape { operation: "backward", .. })));
}

#[test]
fn too_few_weights_and_guidance_without_a_null_class_are_refused() {
    let dit = Dit::new(ModelConfig { null_class: false, ..config(Routing::Paper, 0.8) }).unwrap();
    let weights = weights(&dit);
    let few = Schedule::new(ScheduleKind::Linear, TASKS).unwrap().respaced(&[0, 999]).unwrap();
    let sample = |weights: &[f32], guidance| {
        let sampler = Sampler::new(few.clone(), Method::Ddpm, true, guidance).unwrap();
        let generator = Generator { dit: &dit, weights: weights.into(), sampler: &sampler, seed: 1 };
        generator.images(&mut Memory::new(), &[0, 4], 2, |_| Ok(()))
    };
    assert!(sample(&weights, None).is_ok());
    let message = sample(&weights, Some(1.5)).unwrap_err().to_string();
    assert!(message.contains("null class"), "{message}");
    let mut memory = Memory::new();
    let mut tape = Tape::inference(&weights, &mut memory);
    let x = tape.input(&[0.0; 300], [1, 3, 10, 10], false).unwrap();
    let message = dit.forward(&mut tape, x, &[0], &[5]).unwrap_err().to_string();
    assert!(message.contains("label 5 is outside 0..5, as this model has no null class"), "{message}");
    let message = sample(&weights[1..], None).unwrap_err().to_string();
    let (found, needed) = (weights.len() - 1, weights.len());
    assert!(message.contains(&format!("{found} weights, but the model {needed} parameters")), "{message}");
}
