//! Training on a CUDA device: the CPU's losses, the same bits when run twice, checkpoints that resume on either.

mod common;

use common::cuda::device;
use common::same_bits;
use dtr_fused::autograd::Memory;
use dtr_fused::backend::cuda::{Arg, DType, Device, Launch};
use dtr_fused::model::config::ModelConfig;
use dtr_fused::model::dit::Dit;
use dtr_fused::rng::{Philox, Stream};
use dtr_fused::safetensors_file::SafetensorsFile;
use dtr_fused::train::device::{DeviceState, DeviceUpdate, DrawnNoise, How};
use dtr_fused::train::learner::{Batch, Learner, Losses};
use dtr_fused::train::optimizer::{Update, adamw};
use dtr_fused::train::timing::time_steps;
use dtr_fused::train::{TrainConfig, checkpoint, metrics, setup, trainer};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// A small model on the digits with a batch of four: every kernel, no long wait.
fn config(out: &Path, set: &[(&str, &str)]) -> TrainConfig {
    // Opens nothing, but says where the simulator and NVRTC are.
    drop(device());
    let base = [
        ("model", "custom"),
        ("hidden_size", "64"),
        ("depth", "2"),
        ("num_heads", "2"),
        ("patch_size", "2"),
        ("mlp_ratio", "2"),
        ("batch_size", "4"),
        ("steps", "20"),
        ("log_every", "1"),
        ("sample_every", "0"),
        ("sample_steps", "1"),
        ("sample_classes", "1"),
        ("samples_per_class", "1"),
        ("checkpoint_every", "10"),
        ("device", "cuda"),
    ];
    let mut text = String::new();
    for (key, value) in base.iter().filter(|(key, _)| !set.iter().any(|(other, _)| other == key)).chain(set) {
        let quoted = value.parse::<f64>().is_err() && *value != "true" && *value != "false";
        text += &if quoted { format!("{key} = \"{value}\"\n") } else { format!("{key} = {value}\n") };
    }
    let file = out.with_extension("toml");
    std::fs::write(&file, text).unwrap();
    let mut config = TrainConfig::from_file(&file).unwrap();
    config.out = out.display().to_string();
    config
}

/// Trains, and gives the run's folder and its losses by step.
fn train(out: PathBuf, set: &[(&str, &str)]) -> (PathBuf, Vec<f64>) {
    let outcome = trainer::start(config(&out, set), &AtomicBool::new(false)).unwrap();
    assert!(outcome.finished);
    let losses = metrics::read(&outcome.run).unwrap().iter().map(|line| line.loss.unwrap()).collect();
    (outcome.run, losses)
}

/// The bytes of a run's last checkpoint.
fn bytes(run: &Path) -> Vec<Vec<u8>> {
    let (_, folder) = checkpoint::latest(run).unwrap().unwrap();
    [checkpoint::MODEL, checkpoint::EMA, checkpoint::OPTIMIZER]
        .map(|file| std::fs::read(folder.join(file)).unwrap())
        .into()
}

#[test]
fn losses_follow_the_cpu_in_both_precisions_and_every_routing() {
    let folder = tempfile::tempdir().unwrap();
    for routing in ["paper", "sublayer", "dense", "random"] {
        let steps = if routing == "paper" { "20" } else { "3" };
        // Coefficients that depend on the losses of the step before.
        let (weight, batch) = if routing == "sublayer" { ("uw", "8") } else { ("constant", "4") };
        let set = |device, precision| {
            [
                ("routing", routing),
                ("beta", "0.5"),
                ("steps", steps),
                ("loss_weight", weight),
                ("batch_size", batch),
                ("device", device),
                ("precision", precision),
            ]
        };
        let run = |name: &str, set: &[(&str, &str)]| train(folder.path().join(format!("{routing}-{name}")), set).1;
        let cpu = run("cpu", &set("cpu", "f32"));
        let f32 = run("f32", &set("cuda", "f32"));
        let bf16 = run("bf16", &set("cuda", "bf16"));
        assert_eq!((cpu.len(), f32.len(), bf16.len()), (steps.parse().unwrap(), cpu.len(), cpu.len()));
        for step in 0..cpu.len() {
            let err = |losses: &[f64]| (losses[step] - cpu[step]).abs() / cpu[step].abs();
            assert!(err(&f32) <= 1e-4, "{routing}, step {step}: {} in f32, {} on the CPU", f32[step], cpu[step]);
            assert!(err(&bf16) <= 2e-2, "{routing}, step {step}: {} in bf16, {} on the CPU", bf16[step], cpu[step]);
        }
    }
}

#[test]
fn the_same_run_has_the_same_bits_and_resumes_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    for precision in ["f32", "bf16"] {
        let path = |name: &str| folder.path().join(format!("{precision}-{name}"));
        let set = [("precision", precision), ("routing", "sublayer"), ("grad_accumulation", "2"), ("grad_clip", "1")];
        let (whole, losses) = train(path("whole"), &[&set[..], &[("steps", "6"), ("checkpoint_every", "3")]].concat());
        let (again, again_losses) =
            train(path("again"), &[&set[..], &[("steps", "6"), ("checkpoint_every", "3")]].concat());
        assert_eq!(losses, again_losses);
        assert!(bytes(&whole) == bytes(&again), "{precision}: other bits when run twice");

        let (half, _) = train(path("half"), &[&set[..], &[("steps", "3"), ("checkpoint_every", "3")]].concat());
        let (_, at) = checkpoint::latest(&half).unwrap().unwrap();
        let mut config = TrainConfig::from_file(&half.join(checkpoint::CONFIG)).unwrap();
        config.steps = 6;
        trainer::resume(config, &half, Some(&at), &AtomicBool::new(false)).unwrap();
        let [model, ema, optimizer] = [0, 1, 2].map(|i| bytes(&half)[i] == bytes(&whole)[i]);
        assert!(model && ema && optimizer, "{precision}: other bits after resuming");
    }
}

/// The moments tell: the weights hardly change with the scale of the gradients.
#[test]
fn gradients_are_clipped_as_on_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let run = |device: &str, clip: &str| {
        let set = [("device", device), ("grad_clip", clip), ("steps", "2"), ("checkpoint_every", "2")];
        let (run, _) = train(folder.path().join(format!("{device}-{clip}")), &set);
        let norms: Vec<f64> = metrics::read(&run).unwrap().iter().map(|line| line.grad_norm.unwrap()).collect();
        let (_, at) = checkpoint::latest(&run).unwrap().unwrap();
        let file = SafetensorsFile::open(at.join(checkpoint::OPTIMIZER)).unwrap();
        let moments = file.names().map(|name| {
            let mut numbers = vec![0.0; file.tensor(name).unwrap().elements()];
            file.tensor(name).unwrap().to_f32(&mut numbers);
            (name.to_string(), numbers)
        });
        (norms, moments.collect::<BTreeMap<_, _>>())
    };
    let (norms, _) = run("cpu", "0");
    let [smallest, largest] = [f64::min, f64::max].map(|pick| norms.iter().copied().reduce(pick).unwrap());
    // A bound that both steps reach, and one that none does.
    for clip in [smallest / 3.0, 3.0 * largest] {
        let [(on_cpu, cpu), (on_device, cuda)] = ["cpu", "cuda"].map(|device| run(device, &clip.to_string()));
        for (a, b) in on_device.iter().zip(&on_cpu) {
            assert!((a - b).abs() <= 1e-4 * b, "clipped to {clip}: norm {a}, on the CPU {b}");
        }
        assert!(cpu.keys().eq(cuda.keys()), "{:?}", cuda.keys());
        let largest = |numbers: &Vec<f32>| numbers.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        // The gates of the blocks open later.
        let learning = cpu.iter().filter(|(_, numbers)| largest(numbers) > 0.0).count();
        assert!(learning >= 10, "only {learning} moments are not zero");
        for (name, expected) in &cpu {
            let most = largest(expected);
            for (found, expected) in cuda[name].iter().zip(expected) {
                let err = (found - expected).abs();
                assert!(err <= 1e-3 * most, "clipped to {clip}, {name}: {found}, on the CPU {expected}");
            }
        }
    }
}

#[test]
fn checkpointed_activations_change_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    for (routing, precision) in [("sublayer", "bf16"), ("random", "f32")] {
        let [without, with] = ["false", "true"].map(|checkpoint| {
            let set = [
                ("routing", routing),
                ("precision", precision),
                ("beta", "0.5"),
                ("steps", "3"),
                ("grad_accumulation", "2"),
                ("checkpoint_activations", checkpoint),
            ];
            train(folder.path().join(format!("{routing}-{checkpoint}")), &set).0
        });
        assert!(bytes(&without) == bytes(&with), "{routing}, {precision}: other bits");
    }
}

#[test]
fn a_checkpoint_resumes_on_the_other_device() {
    let folder = tempfile::tempdir().unwrap();
    let validated = [("checkpoint_every", "2"), ("validation_samples", "5"), ("validation_every", "2")];
    for (first, second, weights) in [("cuda", "cpu", "ema"), ("cpu", "cuda", "model")] {
        let validated = [&validated[..], &[("validation_weights", weights)]].concat();
        let whole = folder.path().join(format!("whole-{weights}"));
        let (whole, _) = train(whole, &[&validated[..], &[("device", "cpu"), ("steps", "4")]].concat());
        let set = [&validated[..], &[("device", first), ("steps", "2")]].concat();
        let (run, _) = train(folder.path().join(first), &set);
        let (_, at) = checkpoint::latest(&run).unwrap().unwrap();
        let mut config = TrainConfig::from_file(&run.join(checkpoint::CONFIG)).unwrap();
        (config.steps, config.device) = (4, second.into());
        trainer::resume(config, &run, Some(&at), &AtomicBool::new(false)).unwrap();
        // Of all four steps, and on what is held out after two of them.
        let losses = |run: &Path| -> Vec<f64> {
            let lines = metrics::read(run).unwrap();
            let validation = lines.iter().filter_map(|line| line.validation.as_ref()?.loss);
            lines.iter().map(|line| line.loss.unwrap()).chain(validation).collect()
        };
        for (a, b) in losses(&run).iter().zip(losses(&whole)) {
            assert!((a - b).abs() <= 1e-4 * b.abs(), "{first} then {second}: loss {a}, on the CPU alone {b}");
        }
        assert_eq!((losses(&run).len(), losses(&whole).len()), (6, 6));
    }
}

#[test]
fn steps_that_are_not_finite_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    // Updates throw the weights out of range; the steps after them are left out.
    let set = [
        ("lr", "1000"),
        ("warmup_steps", "0"),
        ("adam_eps", "1e-30"),
        ("max_nonfinite_steps", "2"),
        ("steps", "40"),
        ("checkpoint_every", "1"),
        ("keep_checkpoints", "40"),
    ];
    let error = trainer::start(config(&out, &set), &AtomicBool::new(false)).unwrap_err().to_string();
    assert!(error.contains("not finite 2 steps in a row"), "{error}");
    // The last two steps were left out: the checkpoint before them is of the last update.
    let kept = checkpoint::list(&out).unwrap();
    let [.., (_, updated), (_, left_out), (_, again)] = &kept[..] else { panic!("too few checkpoints: {kept:?}") };
    let numbers = |at: &Path| -> Vec<Vec<u32>> {
        let mut found = Vec::new();
        for file in [checkpoint::MODEL, checkpoint::EMA, checkpoint::OPTIMIZER] {
            let file = SafetensorsFile::open(at.join(file)).unwrap();
            for name in file.names() {
                let tensor = file.tensor(name).unwrap();
                let mut numbers = vec![0.0; tensor.elements()];
                tensor.to_f32(&mut numbers);
                found.push(numbers.iter().map(|x| x.to_bits()).collect());
            }
        }
        found
    };
    let before = numbers(updated);
    assert!(before.len() > 100, "only {} tensors", before.len());
    for after in [left_out, again] {
        assert!(numbers(after) == before, "a step that was left out changed something");
    }
}

/// Launches by file and kernel of a step in two parts of `samples` each, planned on paper.
fn launches_on_paper(dit: &Dit, like: &Device, samples: usize) -> BTreeMap<(&'static str, &'static str), usize> {
    let paper = Arc::new(Device::on_paper(like.name(), like.arch(), like.multiprocessors()));
    let mut state = DeviceState::planned(&paper, DType::Bf16, dit.layout.len()).unwrap();
    let mut memory = Memory::on_device(&paper, DType::Bf16);
    let x_start = vec![0.0; samples * dit.config.in_channels * dit.config.input_size.pow(2)];
    let numbers: Vec<u32> = (0..samples as u32).collect();
    let drawn = Some(DrawnNoise { seed: 0, step: 0, samples: &numbers });
    let batch = Batch { x_start: &x_start, noise: &[], t: &numbers, labels: &numbers, coefficients: &[] };
    let mut launches = BTreeMap::new();
    for updates in [false, true] {
        let how = How { drawn, add: updates, updates };
        // The first pass finds how much memory there must be, and may be planned more than once.
        state.stage(dit, &mut memory, batch, how).unwrap();
        paper.record();
        state.stage(dit, &mut memory, batch, how).unwrap();
        for launch in paper.record() {
            *launches.entry((launch.file, launch.kernel)).or_default() += 1;
        }
    }
    launches
}

#[test]
fn steps_can_be_timed() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&folder.path().join("run"), &[("grad_accumulation", "2"), ("precision", "bf16")]);
    (config.image_size, config.in_channels, config.num_classes) = (8, 1, 10);
    let device = Arc::new(device());
    let (learner, times) = time_steps(&config, &device, DType::Bf16, 2, true).unwrap();
    // The simulator's times say nothing, but there must be some.
    assert!(times.device_seconds > 0.0 && times.host_seconds > 0.0 && times.memory > 0);
    assert_eq!(times.parameters, learner.dit.layout.len());

    let timed: BTreeMap<_, _> = times.kernels.iter().map(|k| ((k.file, k.kernel), k.launches)).collect();
    assert_eq!(timed.len(), times.kernels.len(), "a kernel has two rows");
    assert_eq!(timed, launches_on_paper(&learner.dit, &device, 2));
    assert!(times.kernels.iter().all(|k| k.seconds > 0.0), "{:?}", times.kernels);
    assert!(times.kernels.is_sorted_by(|a, b| a.seconds >= b.seconds), "{:?}", times.kernels);
}

/// A loop of one's own over a learner, as examples/train_on_cpu.rs has on the CPU.
#[test]
fn a_learner_on_a_device_makes_the_updates_of_one_on_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&folder.path().join("run"), &[]);
    (config.image_size, config.in_channels, config.num_classes) = (8, 1, 10);
    let mut cpu = setup::learner(&config).unwrap();
    let (device, dit) = (Arc::new(device()), Dit::new(config.model_config()).unwrap());
    let start = |dit: &Dit| dit.init(config.seed, config.init);
    let mut learner = setup::learner_on_device(&config, dit, &device, DType::F32, start).unwrap();
    let (x_start, noise) = (common::numbers(1, 2 * 64), common::numbers(2, 2 * 64));
    let batch = Batch { x_start: &x_start, noise: &noise, t: &[3, 700], labels: &[1, 10], coefficients: &[0.5, 0.5] };
    let mut losses = Losses::default();
    let how = How { drawn: None, add: false, updates: true };
    for step in 0..3 {
        let update = config.update_at(step, step);
        let update_on_device = DeviceUpdate { update, clip: 0.0 };
        learner.stage(batch, how).unwrap();
        let error = learner.launch(batch, how, None).unwrap_err().to_string();
        assert!(error.contains("how.updates is true, but none is given"), "{error}");
        let short = Batch { coefficients: &[], ..batch };
        let error = learner.launch(short, how, Some(update_on_device)).unwrap_err().to_string();
        assert!(error.contains("0 coefficients for 2 samples"), "{error}");
        learner.launch(batch, how, Some(update_on_device)).unwrap();
        assert!(learner.collect(&mut losses).unwrap().unwrap().updated);
        let error = learner.launch(batch, how, Some(update_on_device)).unwrap_err().to_string();
        assert!(error.contains("was not staged"), "{error}");
        cpu.gradients(batch, false, &mut losses).unwrap();
        cpu.update(update, 0.0);
    }
    learner.fetch().unwrap();
    assert_eq!((learner.updates, cpu.updates), (3, 3));
    let moved = |learner: &Learner| {
        learner.weights.iter().zip(start(&learner.dit).iter()).map(|(w, s)| w - s).collect::<Vec<_>>()
    };
    let (found, expected) = (moved(&learner), moved(&cpu));
    let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let apart: Vec<f32> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
    // Adam's steps are alike where gradients are not near zero.
    assert!(norm(&expected) > 0.0 && norm(&apart) <= 0.02 * norm(&expected), "{} of {}", norm(&apart), norm(&expected));
}

/// The model of a learner may be replaced by one of the same layout: what was captured for one is not replayed for the other.
#[test]
fn another_model_has_a_graph_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&folder.path().join("run"), &[]);
    (config.image_size, config.in_channels, config.num_classes) = (8, 1, 10);
    let device = Arc::new(device());
    let model = |num_heads| Dit::new(ModelConfig { num_heads, ..config.model_config() }).unwrap();
    // Gates that are not 0, as they are before training: else heads change nothing.
    let start = |dit: &Dit| {
        let mut weights = dit.init(config.seed, config.init);
        weights.iter_mut().zip(common::numbers(3, dit.layout.len())).for_each(|(w, x)| *w += 0.1 * x);
        weights
    };
    let learner = |heads| setup::learner_on_device(&config, model(heads), &device, DType::F32, start).unwrap();
    let (x_start, noise) = (common::numbers(1, 2 * 64), common::numbers(2, 2 * 64));
    let batch = Batch { x_start: &x_start, noise: &noise, t: &[3, 700], labels: &[1, 10], coefficients: &[0.5, 0.5] };
    let losses_of = |learner: &mut Learner| {
        let (mut losses, how) = (Losses::default(), How { drawn: None, add: false, updates: false });
        learner.stage(batch, how).unwrap();
        learner.launch(batch, how, None).unwrap();
        learner.collect(&mut losses).unwrap();
        losses.loss
    };
    let mut replaced = learner(2);
    // Captured by the first step, replayed by the next.
    let of_two = [(); 3].map(|()| losses_of(&mut replaced));
    let of_four = losses_of(&mut learner(4));
    assert!(of_two[1..] == [of_two[0].clone(), of_two[0].clone()] && of_two[0] != of_four, "{of_two:?}, {of_four:?}");
    replaced.dit = model(4);
    assert_eq!([(); 3].map(|()| losses_of(&mut replaced)), [(); 3].map(|()| of_four.clone()));
    // Two models of one configuration, which was changed afterwards, are two nevertheless.
    replaced.dit = model(2);
    replaced.dit.config.num_heads = 4;
    assert_eq!(losses_of(&mut replaced), of_two[0]);
}

#[test]
fn a_device_starts_with_what_the_cpu_does() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&folder.path().join("run"), &[]);
    (config.image_size, config.in_channels, config.num_classes) = (8, 1, 10);
    let cpu = setup::learner(&config).unwrap();
    let device = Arc::new(device());
    for elem in [DType::F32, DType::Bf16] {
        let dit = Dit::new(config.model_config()).unwrap();
        let start = |dit: &Dit| dit.init(config.seed, config.init);
        let mut learner = setup::learner_on_device(&config, dit, &device, elem, start).unwrap();
        for buffer in [&mut learner.weights, &mut learner.ema, &mut learner.m, &mut learner.v] {
            buffer.fill(f32::NAN);
        }
        learner.fetch().unwrap();
        assert!(same_bits(&learner.weights, &cpu.weights), "{elem:?}: weights are others");
        assert!(same_bits(&learner.ema, &cpu.weights), "{elem:?}: average is another");
        for moments in [&learner.m, &learner.v] {
            assert!(same_bits(moments, &vec![0.0; cpu.weights.len()]), "{elem:?}: moments are others");
        }
        let read = learner.device_state.as_ref().unwrap().weights().elem();
        let expected = common::rounded(&cpu.weights, elem);
        assert!(
            same_bits(&device.download(read).unwrap(), &expected),
            "{elem:?}: weights as products read them are others"
        );
    }
}

#[test]
fn noise_has_the_bits_of_the_cpu() {
    let device = device();
    let (seed, step, samples, n) = (0x1234_5678_9abc_def0u64, 77u64, [3u32, 0, 1_000_000], 4099usize);
    let counters: Vec<u32> = [step as u32].iter().chain(&samples).copied().collect();
    let counters = device.upload_u32(&counters).unwrap();
    let noise = device.alloc(samples.len() * n, DType::F32).unwrap();
    let threads = samples.len() * n.div_ceil(4);
    let launch = Launch {
        file: "diffusion_loss",
        kernel: "diffusion_loss_noise",
        elem: DType::F32,
        defines: &[],
        grid: [threads.div_ceil(256) as u32, 1, 1],
        block: 256,
        shared: 0,
    };
    let key = [seed as u32, (seed >> 32) as u32].map(Arg::U32);
    let args = [noise.buffer().into(), counters.buffer().into(), key[0], key[1], Arg::U32(Stream::Noise as u32)];
    let sizes = [Arg::I32(samples.len() as i32), Arg::I32(n as i32)];
    // SAFETY: noise and counters are as long as the sizes say.
    unsafe { device.launch(&launch, &[&args[..], &sizes].concat()) }.unwrap();
    let found = device.download(&noise).unwrap();
    for (row, &sample) in found.chunks_exact(n).zip(&samples) {
        let mut expected = vec![0.0; n];
        Philox::new(seed, Stream::Noise).normal(&mut expected, step, u64::from(sample));
        assert!(same_bits(row, &expected), "sample {sample}");
    }
}

#[test]
fn adamw_has_the_bits_of_the_cpu() {
    let device = device();
    let n = 3001;
    let mut host: Vec<Vec<f32>> = (0..5).map(|seed| common::numbers(seed, n)).collect();
    host[3].iter_mut().for_each(|v| *v = v.abs());
    let [weights, ema, m, v, grads] = [0, 1, 2, 3, 4].map(|i| device.upload(&host[i], DType::F32).unwrap());
    let rounded = device.alloc(n, DType::Bf16).unwrap();
    let update =
        Update { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, ema_decay: 0.95, grad_scale: 0.5 };
    let factors: Vec<f32> = update.factors(3).into_iter().chain([0.0]).collect();
    let factors = device.upload(&factors, DType::F32).unwrap();
    for (skip, name) in [(1.0, "left out"), (0.0, "made")] {
        let decision = device.upload(&[1.0, 0.5, skip], DType::F64).unwrap();
        let launch = Launch {
            file: "adamw",
            kernel: "adamw",
            elem: DType::Bf16,
            defines: &[],
            grid: [n.div_ceil(256) as u32, 1, 1],
            block: 256,
            shared: 0,
        };
        let buffers = [&weights, &rounded, &ema, &m, &v, &grads, &factors, &decision];
        let args: Vec<Arg> = buffers.iter().map(|b| Arg::Buffer(b.buffer())).chain([Arg::U64(n as u64)]).collect();
        // SAFETY: all have n numbers, but for the factors and the decision, which have theirs.
        unsafe { device.launch(&launch, &args) }.unwrap();
        if skip == 0.0 {
            let [w, e, m, v, g] = &mut host[..] else { unreachable!("five buffers") };
            adamw(w, e, m, v, g, 3, update);
            let bf16: Vec<f32> = host[0].iter().map(|&w| half::bf16::from_f32(w).to_f32()).collect();
            assert!(same_bits(&device.download(&rounded).unwrap(), &bf16));
        }
        for (on_device, expected) in [&weights, &ema, &m, &v].iter().zip(&host) {
            let found = device.download(on_device).unwrap();
            assert!(same_bits(&found, expected), "an update that is {name}");
        }
    }
}
