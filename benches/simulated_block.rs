//! One whole block of DiT-S/2 in bf16, batch 2, forward and backward, on the simulated driver:
//! `cargo bench --bench simulated_block`. What it prints is how long the simulator takes, which says nothing about a GPU.
//! `CUDA_SIM_SANITIZER=off` and the other variables of the simulator work as always.

mod common;

use common::{batch_windows, numbers};
use dtr_fused::Result;
use dtr_fused::autograd::cuda::{DeviceWeights, pass};
use dtr_fused::autograd::{Memory, Tape, Var};
use dtr_fused::backend::cuda::{DType, Device};
use dtr_fused::model::block::{Block, Route};
use dtr_fused::params::Layout;
use dtr_fused::routing::Window;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

const B: usize = 2;
const T: usize = 256;
const C: usize = 384;
const PASSES: usize = 3;

fn main() {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    // SAFETY: the first thing this program does, before any other thread reads these variables.
    unsafe {
        std::env::set_var("DTR_CUDA_LIBRARY", target.join("release/examples/libcuda.so"));
        std::env::set_var("DTR_NVRTC_FOLDER", target.join("nvrtc"));
    }
    let device = match Device::open(0) {
        Ok(device) => Arc::new(device),
        Err(why) => {
            println!("{why}: needs cargo build --release -p cuda-sim-driver --example cuda, and scripts/fetch-nvrtc");
            return;
        }
    };
    let mut layout = Layout::default();
    let block = Block::new(&mut layout, 0, C, 4 * C, 6);
    let weights: Vec<f32> = numbers(1, layout.len()).iter().map(|w| 0.05 * w).collect();
    let (x, modulation) = (numbers(2, B * T * C), numbers(3, B * 6 * C));
    // Paper routing at its share of 0.8: the first and the last timesteps' windows.
    let windows: Vec<Window> = [batch_windows(C, 0.8)[0], batch_windows(C, 0.8)[7]].into();
    let forward = |tape: &mut Tape| -> Result<Var> {
        let (x, modulation) = (tape.input(&x, [B, T, C], true)?, tape.input(&modulation, [B, 6 * C], true)?);
        let active = tape.windows(windows.iter().copied());
        let written = tape.windows(vec![Window::all(C); B]);
        block.forward(tape, x, modulation, Route { active, written })
    };
    let mut host = Memory::new();
    let mut tape = Tape::inference(&weights, &mut host);
    let y = forward(&mut tape).expect("the shapes fit");
    let expected = tape.value(y).to_vec();

    let on_device = DeviceWeights::upload(&device, &weights, DType::Bf16).expect("weights fit");
    let grads = device.alloc(weights.len(), DType::F32).expect("gradients fit");
    let mut memory = Memory::on_device(&device, DType::Bf16);
    let upstream = numbers(9, B * T * C);
    println!("{}", device.name());
    // The first pass also compiles the kernels, if they are not in the cache.
    for i in 0..=PASSES {
        let start = Instant::now();
        let output = pass(&on_device, Some((&grads, false)), &mut memory, |tape| {
            let y = forward(tape)?;
            let upstream = tape.input(&upstream, [B, T, C], false)?;
            tape.backward_with(y, upstream)?;
            tape.read(y)
        });
        let output = output.expect("the kernels run");
        let seconds = start.elapsed().as_secs_f64();
        let largest = expected.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
        for (i, (y, e)) in output.iter().zip(&expected).enumerate() {
            assert!((y - e).abs() <= 0.02 * largest, "output {i} is {y}, expected {e}");
        }
        let got = device.download(&grads).expect("the gradients are there");
        assert!(got.iter().all(|g| g.is_finite()) && got.iter().any(|g| *g != 0.0), "gradients are not there");
        let what = if i == 0 { " (with compilation)" } else { "" };
        println!("DiT-S/2 block, bf16, batch {B}, forward and backward: {seconds:.2} s{what}");
    }
}
