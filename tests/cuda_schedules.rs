//! Every operation, forward and backward in both precisions, under several orders of blocks and warps: the sanitizer finds
//! nothing (what it finds fails the launch), and the bits are the same.
//!
//! The simulated driver reads its seed once in a process, so each schedule is a process of its own: this program again.

mod common;

use common::cuda::device;
use common::numbers;
use dtr_fused::autograd::cuda::{DeviceWeights, pass};
use dtr_fused::autograd::{Memory, Tape, Var};
use dtr_fused::backend::cuda::DType;
use dtr_fused::error::Result;
use dtr_fused::model::config::ModelConfig;
use dtr_fused::model::dit::Dit;
use dtr_fused::routing::Routing;
use std::process::Command;
use std::sync::Arc;

/// The variable that makes this program a schedule's process.
const SEED: &str = "CUDA_SIM_SEED";
const SEEDS: [&str; 4] = ["1", "2", "77", "123456789"];

/// A model with every operation. Random routing has the mask, sublayer routing windows in all products.
fn config(routing: Routing) -> ModelConfig {
    ModelConfig {
        hidden_size: 48,
        depth: 1,
        num_heads: 2,
        patch_size: 2,
        input_size: 6,
        in_channels: 3,
        num_classes: 5,
        null_class: true,
        mlp_ratio: 3.0,
        learn_sigma: true,
        routing,
        beta: 0.5,
        alpha: 4.0,
        routing_seed: 3,
    }
}

/// FNV-1a of the bits.
fn hash(numbers: &[f32]) -> u64 {
    let bytes = numbers.iter().flat_map(|x| x.to_bits().to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Output and gradients of a model in one line for each precision and routing.
fn lines() -> Vec<String> {
    let device = Arc::new(device());
    let mut lines = Vec::new();
    for (routing, elem) in [
        (Routing::Sublayer, DType::F32),
        (Routing::Sublayer, DType::Bf16),
        (Routing::Random, DType::F32),
        (Routing::Random, DType::Bf16),
    ] {
        let dit = Dit::new(config(routing)).unwrap();
        let mut weights = numbers(1, dit.layout.len());
        weights.iter_mut().for_each(|w| *w *= 0.1);
        // Windows at both ends, a null class.
        let (t, y) = ([0, 500, 999], [4, 5, 0]);
        let x = numbers(2, 3 * 3 * 36);
        let weights = DeviceWeights::upload(&device, &weights, elem).unwrap();
        let grads = device.upload(&vec![f32::NAN; dit.layout.len()], DType::F32).unwrap();
        let mut memory = Memory::on_device(&device, elem);
        let work = |tape: &mut Tape| -> Result<(Vec<f32>, Vec<f32>)> {
            let x: Var = tape.input(&x, [3, 3, 6, 6], true)?;
            let out = dit.forward(tape, x, &t, &y)?;
            let found = tape.read(out)?;
            tape.backward(out, &numbers(3, found.len()))?;
            Ok((found, tape.read_gradient(x)?.unwrap()))
        };
        let (out, dx) = pass(&weights, Some((&grads, false)), &mut memory, work).unwrap();
        let dweights = device.download(&grads).unwrap();
        for numbers in [&out, &dx, &dweights] {
            assert!(numbers.iter().all(|x| x.is_finite()) && numbers.iter().any(|&x| x != 0.0));
        }
        lines.push(format!("bits {routing:?} {elem:?} {:x} {:x} {:x}", hash(&out), hash(&dx), hash(&dweights)));
    }
    lines
}

#[test]
fn no_schedule_changes_a_bit_or_worries_the_sanitizer() {
    let here = lines();
    if std::env::var_os(SEED).is_some() {
        // A schedule's process: the one below reads this.
        here.iter().for_each(|line| println!("{line}"));
        return;
    }
    if std::env::var_os("DTR_REQUIRE_CUDA").is_some() {
        // A GPU has no seed, but must give the same bits again.
        assert_eq!(lines(), here);
        return;
    }
    let start = |seed| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "no_schedule_changes_a_bit_or_worries_the_sanitizer", "--nocapture"]);
        // Any finding at all, leaks included, is an exit code.
        command.env(SEED, seed).env("CUDA_SIM_EXIT_CODE", "97").output().unwrap()
    };
    for seed in SEEDS {
        let output = start(seed);
        let (out, err) = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text)).into();
        assert!(output.status.success(), "seed {seed} ({}): {out}\n{err}", output.status);
        let found: Vec<&str> = out.lines().filter(|line| line.starts_with("bits ")).collect();
        assert_eq!(found, here, "seed {seed}");
    }
}
