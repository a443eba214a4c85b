//! `dtr-fused kernels`: what the CUDA kernels of a training step take, without a GPU.

use std::collections::BTreeMap;

use clap::Args;

use crate::autograd::Memory;
use crate::backend::cuda::device::Recorded;
use crate::backend::cuda::{DType, Device, nvrtc};
use crate::error::{Error, Result};
use crate::model::dit::Dit;
use crate::routing::Routing;
use crate::train::TrainConfig;
use crate::train::config::Precision;
use crate::train::plan;

const EXAMPLES: &str = "\
Needs NVRTC (scripts/fetch-nvrtc, then DTR_NVRTC_FOLDER=target/nvrtc), but no GPU and no driver.

Examples:
  dtr-fused kernels                               DiT-XL/2, L/2 and S/2 in bf16 on sm_80
  dtr-fused kernels --arch sm_90 --model DiT-B/4 --routing sublayer --beta 0.5
  dtr-fused kernels --json
";

/// Compile the CUDA kernels of a training step and show what they take: registers, spills, shared memory, warps, launches
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct KernelsArgs {
    /// Architecture: sm_80 (A100), sm_86 (RTX 30), sm_89 (RTX 40), sm_90 (H100) or sm_120 (RTX 50)
    #[arg(long, default_value = "sm_80")]
    arch: String,
    /// Models whose shapes to compile for
    #[arg(long, default_values = ["DiT-XL/2", "DiT-L/2", "DiT-S/2"])]
    model: Vec<String>,
    /// Images per step
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
    /// paper, sublayer, random or dense
    #[arg(long, default_value = "paper")]
    routing: String,
    /// Share of active channels
    #[arg(long, default_value_t = 0.8)]
    beta: f64,
    /// f32 or bf16
    #[arg(long, default_value = "bf16")]
    precision: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What an architecture has, per multiprocessor (CUDA C++ Programming Guide, table of technical specifications).
struct Arch {
    number: u32,
    name: &'static str,
    multiprocessors: u32,
    warps: u32,
    blocks: u32,
    shared: u32,
}

const ARCHS: [Arch; 5] = [
    Arch { number: 80, name: "A100", multiprocessors: 108, warps: 64, blocks: 32, shared: 164 << 10 },
    Arch { number: 86, name: "RTX 3090", multiprocessors: 82, warps: 48, blocks: 16, shared: 100 << 10 },
    Arch { number: 89, name: "RTX 4090", multiprocessors: 128, warps: 48, blocks: 24, shared: 100 << 10 },
    Arch { number: 90, name: "H100", multiprocessors: 132, warps: 64, blocks: 32, shared: 228 << 10 },
    Arch { number: 120, name: "RTX 5090", multiprocessors: 170, warps: 48, blocks: 24, shared: 100 << 10 },
];

impl Arch {
    /// Warps of a kernel that fit a multiprocessor at once: 65536 registers handed out in 256s a warp, and 1 KB of shared
    /// memory a block for the system.
    fn resident_warps(&self, registers: u32, threads: u32, shared: u32) -> u32 {
        let warps = threads.div_ceil(32);
        let by_registers = 65536 / ((registers * 32).next_multiple_of(256).max(256) * warps);
        let by_shared = self.shared / (shared + 1024);
        by_registers.min(by_shared).min(self.warps / warps).min(self.blocks) * warps
    }
}

/// One kernel as it is launched.
#[derive(Debug, serde::Serialize)]
struct Row {
    kernel: &'static str,
    defines: String,
    launches: usize,
    registers: u32,
    spills: u32,
    shared: u32,
    resident_warps: u32,
}

/// A training step of one model.
#[derive(Debug, serde::Serialize)]
struct Step {
    model: String,
    launches: usize,
    launches_per_block: f64,
    activation_bytes: usize,
    weight_bytes: usize,
    kernels: Vec<Row>,
}

pub(super) fn run(args: KernelsArgs) -> Result<()> {
    let number = args.arch.strip_prefix("sm_").and_then(|n| n.trim_end_matches('a').parse().ok());
    let arch = ARCHS.iter().find(|arch| Some(arch.number) == number).ok_or_else(|| {
        Error::usage(format!("--arch is '{}', but it must be sm_80, sm_86, sm_89, sm_90 or sm_120", args.arch))
    })?;
    if !(1..=4096).contains(&args.batch_size) {
        return Err(Error::usage(format!("--batch-size is {}, but it must be between 1 and 4096", args.batch_size)));
    }
    let mut compiled = BTreeMap::new();
    let mut steps = Vec::new();
    for model in &args.model {
        steps.push(step(&args, arch, model, &mut compiled)?);
    }
    if args.json {
        println!("{}", serde_json::to_string(&steps).map_err(|e| Error::Stopped(e.to_string()))?);
        return Ok(());
    }
    for step in &steps {
        show(&args, arch, step);
    }
    Ok(())
}

type Key = (&'static str, bool, Vec<(&'static str, i64)>);

/// A step on a device on paper: its launches, each compiled.
fn step(
    args: &KernelsArgs,
    arch: &Arch,
    model: &str,
    compiled: &mut BTreeMap<Key, Vec<nvrtc::Resources>>,
) -> Result<Step> {
    let mut config = TrainConfig::preset(model, "latents.npy")?;
    (config.image_size, config.in_channels, config.num_classes) = (32, 4, 1000);
    if !model.starts_with("DiT-") {
        (config.image_size, config.in_channels, config.num_classes) = (8, 1, 10);
    }
    config.beta = args.beta;
    config.routing = match args.routing.as_str() {
        "paper" => Routing::Paper,
        "sublayer" => Routing::Sublayer,
        "random" => Routing::Random,
        "dense" => Routing::Dense,
        other => {
            return Err(Error::usage(format!("--routing is '{other}': give paper, sublayer, random or dense")));
        }
    };
    config.precision = match args.precision.as_str() {
        "f32" => Precision::F32,
        "bf16" => Precision::Bf16,
        other => return Err(Error::usage(format!("--precision is '{other}': give f32 or bf16"))),
    };
    let elem = if config.precision == Precision::Bf16 { DType::Bf16 } else { DType::F32 };
    let dit = Dit::new(config.model_config())?;
    dit.config.check_cuda(elem)?;
    let device = std::sync::Arc::new(Device::on_paper(arch.name, arch.number, arch.multiprocessors));
    let mut memory = Memory::on_device(&device, elem);
    let mut one_pass = || {
        device.record();
        plan::on_paper(&dit, &device, elem, args.batch_size, &mut memory)
    };
    // The first pass plans the memory and runs twice for it.
    one_pass()?;
    one_pass()?;
    let recorded = device.record();
    let mut counts: BTreeMap<_, (usize, &Recorded)> = BTreeMap::new();
    for launch in &recorded {
        counts.entry((launch.kernel, launch.defines.clone())).or_insert((0, launch)).0 += 1;
    }
    let mut kernels = Vec::new();
    for ((kernel, defines), (launches, launch)) in counts {
        let key = (launch.file, elem == DType::Bf16, defines.clone());
        let resources = match compiled.entry(key) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let mut all = defines.clone();
                if elem == DType::Bf16 {
                    all.push(("ELEM_BF16", 1));
                }
                let found = nvrtc::compile(launch.file, &nvrtc::options(arch.number, &all))?;
                entry.insert(nvrtc::resources(&found.log))
            }
        };
        let found = resources.iter().find(|r| r.kernel == kernel).ok_or_else(|| {
            Error::Stopped(format!("the assembler's log says nothing of {kernel}: this NVRTC is not 13.0"))
        })?;
        let shared = found.shared + launch.shared;
        kernels.push(Row {
            kernel,
            defines: defines.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" "),
            launches,
            registers: found.registers,
            spills: found.spill_stores + found.spill_loads,
            shared,
            resident_warps: arch.resident_warps(found.registers, launch.block, shared),
        });
    }
    // What does not grow with the depth: everything outside of the blocks.
    let outside = ["diffusion", "adamw", "patch_embed", "timestep_embed", "label_embed", "modulation", "unpatchify"];
    let in_blocks = recorded.iter().filter(|l| !outside.iter().any(|name| l.kernel.starts_with(name))).count();
    Ok(Step {
        model: model.to_string(),
        launches: recorded.len(),
        // The final layer's are in them, and spread over all blocks.
        launches_per_block: in_blocks as f64 / dit.config.depth as f64,
        activation_bytes: memory.device_bytes(),
        weight_bytes: dit.layout.len() * (5 * 4 + if elem == DType::Bf16 { 2 } else { 0 }),
        kernels,
    })
}

fn show(args: &KernelsArgs, arch: &Arch, step: &Step) {
    println!(
        "{}, batch {}, {} routing, beta {}, {} on sm_{} ({})",
        step.model, args.batch_size, args.routing, args.beta, args.precision, arch.number, arch.name
    );
    println!(
        "{:<28} {:<22} {:>8} {:>9} {:>7} {:>8} {:>6}",
        "kernel", "specialised", "launches", "registers", "spills", "shared", "warps"
    );
    for row in &step.kernels {
        println!(
            "{:<28} {:<22} {:>8} {:>9} {:>7} {:>8} {:>6}",
            row.kernel, row.defines, row.launches, row.registers, row.spills, row.shared, row.resident_warps
        );
    }
    println!(
        "{} launches a step, {:.1} a block; {:.2} GB for activations, {:.2} GB for weights, gradients and moments\n",
        step.launches,
        step.launches_per_block,
        step.activation_bytes as f64 / 1e9,
        step.weight_bytes as f64 / 1e9
    );
}
