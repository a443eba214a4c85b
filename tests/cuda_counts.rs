//! Counted work of the CUDA kernels on a block of DiT-XL/2 (the simulated driver counts).

mod common;

use common::cuda::device;
use dtr_fused::autograd::Memory;
use dtr_fused::backend::cuda::DType;
use dtr_fused::diffusion::{LossWeight, Schedule, ScheduleKind};
use dtr_fused::model::config::TASKS;
use dtr_fused::model::dit::Dit;
use dtr_fused::routing::Routing;
use dtr_fused::train::TrainConfig;
use dtr_fused::train::device::DeviceState;
use dtr_fused::train::learner::{Batch, Losses};
use std::sync::Arc;

#[test]
fn table() {
    let file = std::env::temp_dir().join("counts.jsonl");
    let _ = std::fs::remove_file(&file);
    // SAFETY: the only test of this binary, before any other thread reads these variables.
    unsafe {
        std::env::set_var("CUDA_SIM_SANITIZER", "off");
        std::env::set_var("CUDA_SIM_COUNTERS", &file);
    }
    let device = Arc::new(device());
    let mut config = TrainConfig::preset("DiT-XL/2", "latents.npy").unwrap();
    (config.image_size, config.in_channels, config.num_classes) = (32, 4, 10);
    let routing = std::env::var("ROUTING").unwrap_or("paper".into());
    config.routing = match routing.as_str() {
        "paper" => Routing::Paper,
        "dense" => Routing::Dense,
        _ => Routing::Sublayer,
    };
    config.beta = std::env::var("BETA").map_or(0.8, |b| b.parse().unwrap());
    let mut model = config.model_config();
    model.depth = 1;
    let dit = Dit::new(model).unwrap();
    let weights = common::numbers(3, dit.layout.len()).iter().map(|x| x * 0.02).collect::<Vec<f32>>();
    let state = DeviceState::new(&device, DType::Bf16, &weights, [&weights, &weights, &weights]).unwrap();
    let mut memory = Memory::on_device(&device, DType::Bf16);
    let schedule = Schedule::new(ScheduleKind::Linear, TASKS).unwrap();
    let b = 2;
    let images = common::numbers(1, b * 4 * 32 * 32);
    let noise = common::numbers(2, b * 4 * 32 * 32);
    let t = [250, 750];
    let batch = Batch { x_start: &images, noise: &noise, t: &t, labels: &[1, 2], coefficients: &[0.5, 0.5] };
    let start = std::time::Instant::now();
    let mut losses = Losses::default();
    state.step(&dit, &schedule, LossWeight::Constant, &mut memory, batch, None, false, None, &mut losses).unwrap();
    println!("{:?} in {:?}", losses, start.elapsed());
    println!(
        "{:<28} {:>14} {:>9} {:>6} {:>7} {:>7} {:>8} {:>9} {:>9}",
        "kernel", "grid", "Minstr", "mma%", "sectors", "shared", "GFLOP", "MB read", "MB writ"
    );
    for line in std::fs::read_to_string(&file).unwrap().lines() {
        let v: serde_json::Value = serde_json::from_str(line).unwrap();
        let c = &v["counters"];
        let n = |name: &str| c[name].as_u64().unwrap() as f64;
        let mma = c["by_class"]["matrix"].as_u64().unwrap_or(0) as f64;
        let flops = c["matrix_flops"]["16-bit"]
            .as_u64()
            .or(c["matrix_flops"].as_object().and_then(|o| o.values().next()).and_then(|v| v.as_u64()))
            .unwrap_or(0) as f64;
        println!(
            "{:<28} {:>14} {:>9.3} {:>6.1} {:>7.3} {:>7.3} {:>8.3} {:>9.2} {:>9.2} {}",
            v["kernel"].as_str().unwrap(),
            v["grid"].to_string(),
            n("warp_instructions") / 1e6,
            100.0 * mma / n("warp_instructions"),
            n("global_sectors") / n("global_sectors_needed"),
            n("shared_wavefronts") / n("shared_wavefronts_least").max(1.0),
            flops / 1e9,
            n("dram_bytes_read") / 1e6,
            n("dram_bytes_written") / 1e6,
            if mma > 0.0 { c["by_class"].to_string() } else { String::new() }
        );
        for l in c["conflicts"].as_array().unwrap().iter().take(2) {
            println!("      {l}");
        }
    }
}
