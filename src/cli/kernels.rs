//! `dtr-fused kernels`: what the CUDA kernels of a training step take, without a GPU.

use std::collections::{BTreeMap, HashMap, HashSet};

use clap::Args;

use super::offered::offered;
use crate::backend::cuda::device::{ModuleKey, Recorded};
use crate::backend::cuda::{DType, Device, nvrtc};
use crate::error::{Error, Result};
use crate::model::config::{ModelConfig, TASKS};
use crate::model::dit::Dit;
use crate::ops::cuda::tile::{Tile, gradient_tiling, overlapped_tiling, tiling};
use crate::ops::cuda::work::{self, Flops};
use crate::rng::{Philox, Stream};
use crate::routing::{self, Routing, Window};
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
    /// How blocks use the windows
    #[arg(long, value_name = Routing::NAMES, value_parser = offered::<Routing>(Routing::NAMES), hide_possible_values = true, default_value_t = Routing::Paper)]
    routing: Routing,
    /// Share of active channels
    #[arg(long, default_value_t = 0.8)]
    beta: f64,
    /// Number format of products and activations
    #[arg(long, value_name = Precision::NAMES, value_parser = offered::<Precision>(Precision::NAMES), hide_possible_values = true, default_value_t = Precision::Bf16)]
    precision: Precision,
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
    /// Warps of a kernel that fit a multiprocessor at once: each of its quarters has 16384 registers, handed out in 256s a
    /// warp, and 1 KB of shared memory a block is the system's.
    fn resident_warps(&self, registers: u32, threads: u32, shared: u32) -> u32 {
        let warps = threads.div_ceil(32);
        let by_registers = 4 * (16384 / (registers * 32).next_multiple_of(256).max(256)) / warps;
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
    /// Whether the assembler waits after every `wgmma`.
    serialized: bool,
    shared: u32,
    resident_warps: u32,
}

/// A product of a block, forward or backward: floating-point operations of a step, averaged over batches.
#[derive(Debug, serde::Serialize)]
struct ProductRow {
    product: String,
    tile: String,
    /// Without windows.
    dense: f64,
    /// Inside the windows.
    needed: f64,
    /// What the tensor cores are given, corrections for inactive channels included.
    issued: f64,
    /// `issued` over what they are given without windows and the share of active channels.
    over_least: f64,
}

/// A training step of one model.
#[derive(Debug, serde::Serialize)]
struct Step {
    model: String,
    launches: usize,
    launches_per_block: usize,
    activation_bytes: usize,
    weight_bytes: usize,
    kernels: Vec<Row>,
    products: Vec<ProductRow>,
}

pub(super) fn run(args: KernelsArgs) -> Result<()> {
    let number = args.arch.strip_prefix("sm_").and_then(|n| n.trim_end_matches('a').parse().ok());
    let arch = ARCHS.iter().find(|arch| Some(arch.number) == number).ok_or_else(|| {
        Error::usage(format!("--arch is '{}', but it must be sm_80, sm_86, sm_89, sm_90 or sm_120", args.arch))
    })?;
    if !(1..=4096).contains(&args.batch_size) {
        return Err(Error::usage(format!("--batch-size is {}, but it must be between 1 and 4096", args.batch_size)));
    }
    let mut compiled = HashMap::new();
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

/// A step on a device on paper: its launches, each compiled.
fn step(
    args: &KernelsArgs,
    arch: &Arch,
    model: &str,
    compiled: &mut HashMap<ModuleKey, Vec<nvrtc::Resources>>,
) -> Result<Step> {
    let mut config = TrainConfig::preset(model, "latents.npy")?;
    (config.image_size, config.in_channels, config.num_classes) = (32, 4, 1000);
    if !model.starts_with("DiT-") {
        (config.image_size, config.in_channels, config.num_classes) = (8, 1, 10);
    }
    config.beta = args.beta;
    config.routing = args.routing;
    config.precision = args.precision;
    let elem = config.precision.elem();
    let device = Device::on_paper(arch.name, arch.number, arch.multiprocessors);
    let model_config = config.model_config();
    let (recorded, activation_bytes) = launches(&device, model_config.clone(), elem, args.batch_size)?;
    // One block more has the launches of a block more.
    let deeper = ModelConfig { depth: model_config.depth + 1, ..model_config.clone() };
    let (more, _) = launches(&device, deeper, elem, args.batch_size)?;
    let dit = Dit::new(model_config)?;
    let mut counts: BTreeMap<_, (usize, &Recorded)> = BTreeMap::new();
    for launch in &recorded {
        counts.entry((launch.kernel, launch.defines.clone())).or_insert((0, launch)).0 += 1;
    }
    let missing: HashSet<ModuleKey> =
        recorded.iter().map(Recorded::module).filter(|key| !compiled.contains_key(key)).collect();
    let found = device.compile_all(missing)?;
    compiled.extend(found.into_iter().map(|(key, found)| (key, nvrtc::resources(&found.log))));
    let mut kernels = Vec::new();
    for ((kernel, defines), (launches, launch)) in counts {
        let resources = &compiled[&launch.module()];
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
            serialized: found.serialized,
            shared,
            resident_warps: arch.resident_warps(found.registers, launch.block, shared),
        });
    }
    Ok(Step {
        model: model.to_string(),
        launches: recorded.len(),
        launches_per_block: more.len() - recorded.len(),
        activation_bytes,
        weight_bytes: dit.layout.len() * (5 * 4 + if elem == DType::Bf16 { 2 } else { 0 }),
        kernels,
        products: if elem == DType::Bf16 { products(&device, &dit, args.batch_size) } else { Vec::new() },
    })
}

/// The launches of a training step, and the bytes that its activations take.
fn launches(device: &Device, model: ModelConfig, elem: DType, batch_size: usize) -> Result<(Vec<Recorded>, usize)> {
    let dit = Dit::new(model)?;
    dit.config.check_cuda(elem)?;
    plan::launches(&dit, device, elem, batch_size)
}

/// Batches over which the work of products is averaged.
const BATCHES: u64 = 32;

/// Counts the work of a product, and that of its correction for inactive channels.
type Work<'a> = dyn Fn(work::Batch) -> (Flops, u64) + 'a;

/// The products of a block, for timesteps that are drawn uniformly.
fn products(device: &Device, dit: &Dit, b: usize) -> Vec<ProductRow> {
    let config = &dit.config;
    let (c, tokens, mlp) = (config.hidden_size, config.tokens(), config.mlp_size());
    let beta = match config.routing {
        Routing::Paper | Routing::Sublayer => config.beta,
        Routing::Dense | Routing::Random => 1.0,
    };
    let all = routing::windows(TASKS, c, config.alpha, beta).expect("the model's routing was checked");
    let full = vec![Window::all(c); b];
    let batches: Vec<Vec<Window>> = (0..BATCHES)
        .map(|batch| {
            let draw = |i| Philox::new(0, Stream::Timestep).below(TASKS as u64, batch, i, 0) as usize;
            (0..b as u64).map(|i| all[draw(i)]).collect()
        })
        .collect();
    let tiled = |tile: Tile, name: &str, windowed: bool, work: &Work| {
        let of = |windows| work(work::Batch { windows, tokens, channels: c, tile });
        let drawn = batches.iter().map(|windows| of(if windowed { windows } else { &full }));
        let (mut needed, mut issued) = (0.0, 0.0);
        for (flops, correction) in drawn {
            needed += flops.needed as f64 / BATCHES as f64;
            // Without inactive channels there is nothing to correct.
            let correction = if flops.needed < flops.dense { correction } else { 0 };
            issued += (flops.issued + correction) as f64 / BATCHES as f64;
        }
        let (dense, _) = of(&full);
        let share = needed / dense.dense as f64;
        ProductRow {
            product: name.into(),
            tile: format!("{} x {}", tile.m, tile.n),
            dense: dense.dense as f64,
            needed,
            issued,
            over_least: issued / (share * dense.issued as f64),
        }
    };
    let rows = b * tokens;
    let of_c = tiling(device, DType::Bf16, rows, c).tile;
    let of_others = |columns| overlapped_tiling(device, DType::Bf16, rows, columns).tile;
    let of_weight = |rows_and_columns, windows_of_rows| {
        gradient_tiling(device, DType::Bf16, rows_and_columns, rows, windows_of_rows).tile
    };
    let sublayer = config.routing == Routing::Sublayer;
    let mut table = Vec::new();
    for (name, outputs, windowed) in [("qkv", 3 * c, true), ("fc1", mlp, sublayer)] {
        let each = |pass: &str| format!("{name} {pass}");
        table.push(tiled(of_others(outputs), &each("forward"), windowed, &|b| (b.reads(outputs), 0)));
        let gradient = |b: work::Batch| (b.writes(outputs), b.corrects_input(outputs));
        table.push(tiled(of_c, &each("input gradient"), windowed, &gradient));
        let gradient = |b: work::Batch| (b.meets_columns(outputs), b.corrects_weight(outputs));
        table.push(tiled(of_weight([outputs, c], false), &each("weight gradient"), windowed, &gradient));
    }
    for (name, inputs) in [("proj", c), ("fc2", mlp)] {
        let each = |pass: &str| format!("{name} {pass}");
        table.push(tiled(of_c, &each("forward"), sublayer, &|b| (b.writes(inputs), 0)));
        table.push(tiled(of_others(inputs), &each("input gradient"), sublayer, &|b| (b.reads(inputs), 0)));
        let gradient = |b: work::Batch| (b.meets_rows(inputs), 0);
        table.push(tiled(of_weight([c, inputs], true), &each("weight gradient"), sublayer, &gradient));
    }
    table
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
        if row.serialized {
            println!("    the assembler waits after every wgmma of it");
        }
    }
    println!(
        "{} launches a step, {} a block; {:.2} GB for activations, {:.2} GB for weights, their average, gradients and moments\n",
        step.launches,
        step.launches_per_block,
        step.activation_bytes as f64 / 1e9,
        step.weight_bytes as f64 / 1e9
    );
    if step.products.is_empty() {
        return;
    }
    println!("Products of a block, GFLOP a step, averaged over {BATCHES} batches of uniform timesteps:");
    println!("{:<22} {:>9} {:>9} {:>9} {:>9} {:>12}", "product", "tile", "dense", "needed", "issued", "issued/least");
    for row in &step.products {
        println!(
            "{:<22} {:>9} {:>9.2} {:>9.2} {:>9.2} {:>12.3}",
            row.product,
            row.tile,
            row.dense / 1e9,
            row.needed / 1e9,
            row.issued / 1e9,
            row.over_least
        );
    }
    println!();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(model: &str, routing: Routing, beta: f64) -> TrainConfig {
        let mut config = TrainConfig::preset(model, "latents.npy").unwrap();
        (config.image_size, config.in_channels, config.num_classes) = (32, 4, 1000);
        (config.routing, config.beta) = (routing, beta);
        config
    }

    #[test]
    fn windows_are_hardly_rounded_out() {
        let device = Device::on_paper("A100", 80, 108);
        for model in ["DiT-XL/2", "DiT-L/2"] {
            for (beta, limit) in [(0.8, 1.06), (0.5, 1.10)] {
                for (routing, windowed) in [(Routing::Paper, 3), (Routing::Sublayer, 12)] {
                    let dit = Dit::new(config(model, routing, beta).model_config()).unwrap();
                    let table = products(&device, &dit, 32);
                    for row in &table {
                        assert!(
                            row.over_least >= 0.999 && row.over_least <= limit,
                            "{model}, {routing:?}, beta {beta}: {row:?}"
                        );
                    }
                    assert_eq!(table.iter().filter(|row| row.needed < 0.9 * row.dense).count(), windowed);
                }
            }
        }
    }

    #[test]
    fn a_block_has_few_launches() {
        let device = Device::on_paper("A100", 80, 108);
        for (routing, most) in
            [(Routing::Dense, 20), (Routing::Paper, 22), (Routing::Sublayer, 24), (Routing::Random, 24)]
        {
            let of = |depth| {
                let model = ModelConfig { depth, ..config("DiT-XL/2", routing, 0.8).model_config() };
                launches(&device, model, DType::Bf16, 8).unwrap().0.len()
            };
            let each = of(2) - of(1);
            assert!(each <= most, "{routing:?}: {each} launches a block");
        }
    }
}
