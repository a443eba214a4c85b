//! The plan of device memory: what a step really takes, what checkpoints save, and what does not fit is told before it starts.

mod common;

use common::cuda::device;
use dtr_fused::autograd::Memory;
use dtr_fused::backend::cuda::{DType, Device};
use dtr_fused::model::dit::Dit;
use dtr_fused::rng::{Philox, Stream};
use dtr_fused::train::device::{DeviceState, DrawnNoise, How};
use dtr_fused::train::learner::Batch;
use dtr_fused::train::plan::{self, Plan};
use dtr_fused::train::{TrainConfig, trainer};
use std::sync::{Arc, Mutex, MutexGuard};

/// Held by the tests that look at free memory or take some: they share one device.
fn memory_is_mine() -> MutexGuard<'static, ()> {
    static MINE: Mutex<()> = Mutex::new(());
    MINE.lock().unwrap_or_else(|e| e.into_inner())
}

/// A published model on latents of 32 x 32 x 4.
fn latents(model: &str) -> (TrainConfig, Dit) {
    let mut config = TrainConfig::preset(model, "latents.npy").unwrap();
    (config.image_size, config.in_channels, config.num_classes) = (32, 4, 1000);
    let dit = Dit::new(config.model_config()).unwrap();
    (config, dit)
}

#[test]
fn checkpoints_cut_the_activations_of_deep_models() {
    let card = Device::on_paper("A100", 80, 108);
    // Published depths: 12, 24 and 28 blocks.
    for (model, factor) in [("DiT-S/2", 4.0), ("DiT-L/2", 6.5), ("DiT-XL/2", 7.0)] {
        let (config, mut dit) = latents(model);
        let mut activations = |checkpoint| {
            dit.checkpoint_activations = checkpoint;
            Plan::new(&config, &dit, &card, DType::Bf16, 32).unwrap().activations as f64
        };
        let (all, few) = (activations(false), activations(true));
        assert!(all / few >= factor, "{model}: {all} bytes without checkpoints, {few} with");
    }
}

#[test]
fn the_plan_is_what_a_step_takes() {
    let _mine = memory_is_mine();
    let device = Arc::new(device());
    if !device.is_simulated() {
        // A GPU hands memory out in larger pieces.
        return;
    }
    let mut config = TrainConfig::preset("custom", "digits").unwrap();
    (config.image_size, config.in_channels, config.num_classes) = (8, 1, 10);
    (config.hidden_size, config.num_heads, config.depth, config.samples_per_class) = (64, 2, 3, 1);
    let mut dit = Dit::new(config.model_config()).unwrap();
    let (b, n) = (4, 64);
    let mut x_start = vec![0.0; b * n];
    Philox::new(1, Stream::Noise).normal(&mut x_start, 0, 0);
    let (t, labels, samples) = ([0, 300, 600, 999], [1, 10, 3, 3], [0, 1, 2, 3]);
    let batch = Batch { x_start: &x_start, noise: &[], t: &t, labels: &labels, coefficients: &[0.25; 4] };
    let drawn = Some(DrawnNoise { seed: 1, step: 0, samples: &samples });
    for elem in [DType::F32, DType::Bf16] {
        // A validation takes as much as samples without guidance.
        let sizes = [(1, 0, ""), (10, 0, ""), (1, 9, ""), (1, 0, "others")];
        let [few, many, validated, others] = sizes.map(|(sample_classes, validation_samples, data)| {
            let validation_data = data.into();
            let config =
                TrainConfig { sample_cfg: 1.0, sample_classes, validation_samples, validation_data, ..config.clone() };
            Plan::new(&config, &dit, &device, elem, b).unwrap().samples
        });
        assert!(validated == many && others == many && many > few, "{elem:?}: {validated}, {others}, {many} and {few}");
        for checkpoint in [false, true] {
            dit.checkpoint_activations = checkpoint;
            let plan = Plan::new(&config, &dit, &device, elem, b).unwrap();
            let weights = vec![0.01; dit.layout.len()];
            let free = device.memory().unwrap().0;
            let mut memory = Memory::on_device(&device, elem);
            let mut state = DeviceState::new(&device, elem, &weights).unwrap();
            let mut stage = || state.stage(&dit, &mut memory, batch, How { drawn, add: false, updates: true }).unwrap();
            stage();
            let taken = free - device.memory().unwrap().0;
            let planned = plan.parameters + plan.activations + plan.inputs;
            // Allocations are rounded up to 256 bytes or so, each.
            assert!(taken >= planned && taken <= planned + 16 * 512, "{elem:?}: {taken} taken, {planned} planned");

            let (launches, bytes) = plan::launches(&dit, &device, elem, b).unwrap();
            device.record();
            stage();
            assert_eq!(launches, device.record(), "what is compiled ahead is not what is launched");
            assert_eq!(bytes, memory.device_parts().iter().sum::<usize>());
        }
    }
}

#[test]
fn what_does_not_fit_is_told_with_what_would() {
    let _mine = memory_is_mine();
    let device = device();
    let (mut config, mut dit) = latents("DiT-XL/2");
    let (free, whole) = device.memory().unwrap();
    config.batch_size = 4;
    let plan = plan::check(&config, &mut dit, &device, DType::Bf16).unwrap();
    assert!(plan.total() <= free);

    config.batch_size = 1024;
    let error = plan::check(&config, &mut dit, &device, DType::Bf16).unwrap_err();
    assert!(matches!(error, dtr_fused::Error::Usage(_)));
    let says = error.to_string();
    assert!(!dit.checkpoint_activations, "the model is as it was");
    let total_of = |part| Plan::new(&config, &dit, &device, DType::Bf16, part).unwrap().total();
    let total = total_of(1024);
    for part in [
        "training DiT-XL/2 in parts of 1024 images takes".to_string(),
        plan::readable(total),
        "--checkpoint-activations".to_string(),
    ] {
        assert!(says.contains(&part), "'{part}' is not in: {says}");
    }
    let number = |before: &str, after: &str| -> f64 {
        let found = says.split_once(before).and_then(|(_, rest)| rest.split_once(after));
        found.and_then(|(number, _)| number.parse().ok()).unwrap_or_else(|| panic!("no {before}N{after} in: {says}"))
    };
    // Other tests and programs take and return memory of a GPU between two looks at it; nobody else uses the simulator's.
    let others = if device.is_simulated() { 0.0 } else { whole as f64 / 8.0 };
    let rounding = 0.005e9;
    let said = number("only ", " GB free") * 1e9;
    assert!((said - free as f64).abs() <= rounding + others, "{free} bytes were free, but: {says}");
    let too_few = number("free, ", " GB too few") * 1e9;
    assert!((said + too_few - total as f64).abs() <= 2.0 * rounding, "{total} bytes are needed, but: {says}");

    // The largest batch that fits in what the message says, and the fewest parts.
    let fits = |part| total_of(part) as f64 <= said + rounding;
    let too_large = |part| total_of(part) as f64 > said - rounding;
    let batch = number("--batch-size ", ",") as usize;
    let parts = number("--grad-accumulation ", " (") as usize;
    assert!(fits(batch) && too_large(batch + 1), "{says}");
    assert!(fits(1024 / parts) && too_large(1024 / (parts / 2)), "{says}");

    // A model whose weights alone are too many.
    let (mut config, _) = latents("DiT-XL/2");
    (config.model, config.hidden_size, config.num_heads) = ("custom".into(), 8192, 64);
    let mut dit = Dit::new(config.model_config()).unwrap();
    let says = plan::check(&config, &mut dit, &device, DType::F32).unwrap_err().to_string();
    assert!(says.contains("not even one image at a time fits: choose a smaller model"), "{says}");
}

#[test]
fn a_run_that_does_not_fit_begins_nothing() {
    drop(device());
    let place = tempfile::tempdir().unwrap();
    let mut config = TrainConfig::preset("custom", "digits").unwrap();
    (config.hidden_size, config.num_heads, config.depth) = (768, 12, 12);
    (config.batch_size, config.device) = (60_000, "cuda".into());
    config.out = place.path().join("run").display().to_string();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let error = trainer::start(config, &stop).unwrap_err().to_string();
    assert!(error.contains("too few: --batch-size"), "{error}");
    assert!(!place.path().join("run").exists());
}
