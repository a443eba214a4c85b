//! Counted work of the CUDA kernels: the simulated driver counts what each launch does.
//!
//! One test a process, because the driver reads its settings once.

mod common;

use common::cuda::device;
use common::numbers;
use dtr_fused::autograd::Memory;
use dtr_fused::autograd::cuda::{DeviceWeights, pass};
use dtr_fused::backend::cuda::{Allocation, Arg, DType, Device, Launch};
use dtr_fused::diffusion::{LossWeight, Schedule, ScheduleKind};
use dtr_fused::model::config::{ModelConfig, TASKS};
use dtr_fused::model::dit::Dit;
use dtr_fused::ops::cuda::work::{Batch, SQUARE, WGMMA};
use dtr_fused::ops::modulation::modulation;
use dtr_fused::routing::{Routing, Window};
use dtr_fused::train::device::{DeviceState, How};
use dtr_fused::train::learner::{Batch as Samples, Losses};
use std::path::Path;
use std::sync::Arc;

/// What one launch did.
#[derive(Clone, Debug)]
struct Counted {
    kernel: String,
    counters: serde_json::Value,
}

impl Counted {
    fn number(&self, name: &str) -> f64 {
        self.counters[name].as_u64().unwrap_or_else(|| panic!("no counter {name}")) as f64
    }

    fn class(&self, name: &str) -> f64 {
        self.counters["by_class"][name].as_u64().unwrap_or(0) as f64
    }

    fn matrix_flops(&self) -> u64 {
        self.counters["matrix_flops"].as_object().unwrap().values().map(|flops| flops.as_u64().unwrap()).sum()
    }
}

/// The launches that `work` makes.
fn counted(file: &Path, work: impl FnOnce()) -> Vec<Counted> {
    std::fs::write(file, "").unwrap();
    work();
    let text = std::fs::read_to_string(file).unwrap();
    let launches = text.lines().map(|line| {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        Counted { kernel: value["kernel"].as_str().unwrap().into(), counters: value["counters"].clone() }
    });
    launches.collect()
}

/// (That test asks for less there: the main loops are others.)
#[test]
fn on_sm_90() {
    if std::env::var_os("CUDA_SIM_ARCH").is_none() {
        common::cuda::again_on_sm_90("counts");
    }
}

#[test]
fn counts() {
    if std::env::var_os("DTR_REQUIRE_CUDA").is_some() {
        // A GPU does not count.
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("counters.jsonl");
    // SAFETY: the only test of this binary that reads these variables.
    unsafe {
        std::env::set_var("CUDA_SIM_SANITIZER", "off");
        std::env::set_var("CUDA_SIM_COUNTERS", &file);
    }
    let device = Arc::new(device());
    issued_work_is_what_is_said(&device, &file);
    if device.arch() == 90 {
        return;
    }
    main_loops_are_products(&device, &file);
    weights_of_few_rows_are_read_once(&device, &file);
    a_block_moves_few_bytes(&device, &file);
}

/// A training step of one block in bf16, and its launches.
fn step(device: &Arc<Device>, file: &Path, model: ModelConfig, t: &[u32]) -> Vec<Counted> {
    let dit = Dit::new(model).unwrap();
    let weights: Vec<f32> = numbers(3, dit.layout.len()).iter().map(|x| x * 0.02).collect();
    let mut state = DeviceState::new(device, DType::Bf16, &weights).unwrap();
    let mut memory = Memory::on_device(device, DType::Bf16);
    let schedule = Schedule::new(ScheduleKind::Linear, TASKS).unwrap();
    let pixels = t.len() * dit.config.in_channels * dit.config.input_size.pow(2);
    let (images, noise) = (numbers(1, pixels), numbers(2, pixels));
    let labels = vec![1; t.len()];
    let coefficients = vec![1.0 / t.len() as f64; t.len()];
    let batch = Samples { x_start: &images, noise: &noise, t, labels: &labels, coefficients: &coefficients };
    counted(file, || {
        let mut losses = Losses::default();
        let how = How { drawn: None, add: false, updates: false };
        state.stage(&dit, &mut memory, batch, how).unwrap();
        state.launch(&dit, &schedule, LossWeight::Constant, &mut memory, batch, how, None).unwrap();
        state.collect(&mut losses).unwrap();
        assert!(losses.loss.iter().all(|loss| loss.is_finite()));
    })
}

fn model(hidden_size: usize, num_heads: usize, input_size: usize, routing: Routing, beta: f64) -> ModelConfig {
    ModelConfig {
        hidden_size,
        depth: 1,
        num_heads,
        patch_size: 2,
        input_size,
        in_channels: 4,
        num_classes: 10,
        null_class: true,
        mlp_ratio: 4.0,
        learn_sigma: true,
        routing,
        beta,
        alpha: 4.0,
        routing_seed: 0,
    }
}

/// The products of a block issue exactly the matrix instructions that `ops::cuda::work` says.
fn issued_work_is_what_is_said(device: &Arc<Device>, file: &Path) {
    let cases = [
        (model(72, 3, 8, Routing::Sublayer, 0.4), vec![990, 3, 999, 640, 900]),
        (model(200, 5, 10, Routing::Paper, 0.7), vec![0, 999, 950]),
        (model(136, 17, 12, Routing::Sublayer, 0.9), vec![999, 980]),
        (model(136, 17, 16, Routing::Dense, 1.0), vec![1, 500]),
    ];
    for (model, t) in cases {
        let (c, tokens, mlp) = (model.hidden_size, model.tokens(), model.mlp_size());
        let label = format!("{:?}, C {c}, T {tokens}", model.routing);
        let all = dtr_fused::routing::windows(TASKS, c, model.alpha, model.beta).unwrap();
        let windows: Vec<Window> = t.iter().map(|&t| all[t as usize]).collect();
        let full = vec![Window::all(c); t.len()];
        let masked = match model.routing {
            Routing::Sublayer => &windows,
            _ => &full,
        };
        let found = step(device, file, model.clone(), &t);
        // Few rows: every product takes the smallest tile.
        let tile = if device.arch() == 90 { WGMMA[2] } else { SQUARE[1] };
        let of = |windows| Batch { windows, tokens, channels: c, tile };
        let corrected = |windows: &[Window], outputs| {
            let needs = windows.iter().any(|w| w.width < c);
            let own = Batch { windows, tokens, channels: c, tile };
            if needs { [own.corrects_input(outputs), own.corrects_weight(outputs)] } else { [0, 0] }
        };
        let (qkv, fc1) = (corrected(&windows, 3 * c), corrected(masked, mlp));
        let patch = model.patch_size.pow(2) * model.out_channels();
        let expected = [
            (
                "ln_linear_fwd",
                vec![of(&windows).reads(3 * c).issued, of(masked).reads(mlp).issued, of(&full).reads(patch).issued],
            ),
            ("linear_residual_fwd", vec![of(masked).writes(c).issued, of(masked).writes(mlp).issued]),
            ("linear_residual_bwd_input", vec![of(masked).reads(mlp).issued, of(masked).reads(c).issued]),
            ("linear_residual_bwd_weight", vec![of(masked).meets_rows(mlp).issued, of(masked).meets_rows(c).issued]),
            (
                "ln_linear_bwd_input",
                vec![
                    of(&full).writes(patch).issued,
                    of(masked).writes(mlp).issued + fc1[0],
                    of(&windows).writes(3 * c).issued + qkv[0],
                ],
            ),
            (
                "ln_linear_bwd_weight",
                vec![
                    of(&full).meets_columns(patch).issued,
                    of(masked).meets_columns(mlp).issued + fc1[1],
                    of(&windows).meets_columns(3 * c).issued + qkv[1],
                ],
            ),
        ];
        for (kernel, flops) in expected {
            let issued: Vec<u64> = found.iter().filter(|l| l.kernel == kernel).map(Counted::matrix_flops).collect();
            assert_eq!(issued, flops, "{label}: matrix FLOPs of {kernel}");
        }
    }
}

/// What a product kernel is launched with: numbers of the right shapes, one sample, a window of all channels.
struct Operands {
    device: Arc<Device>,
    held: Vec<Allocation>,
}

impl Operands {
    fn elems(&mut self, len: usize) -> Arg {
        let memory = self.device.upload(&vec![0.5; len], DType::Bf16).unwrap();
        self.keep(memory)
    }

    fn floats(&mut self, len: usize) -> Arg {
        let memory = self.device.upload(&vec![0.5; len], DType::F32).unwrap();
        self.keep(memory)
    }

    fn window(&mut self, c: usize) -> Arg {
        let memory = self.device.alloc(2, DType::I32).unwrap();
        self.device.write_bytes(&memory, bytemuck::cast_slice(&[0, c as i32])).unwrap();
        self.keep(memory)
    }

    /// The plan of one block with one tile, over all `rows` of the reduction.
    fn plan(&mut self, rows: usize) -> Arg {
        let memory = self.device.alloc(10, DType::I32).unwrap();
        let words = [0, 1, 0, 0, 0, rows as i32, 1, -1, 0, 0];
        self.device.write_bytes(&memory, bytemuck::cast_slice(&words)).unwrap();
        self.keep(memory)
    }

    fn counters(&mut self) -> Arg {
        let memory = self.device.upload_u32(&[0]).unwrap();
        self.keep(memory)
    }

    fn keep(&mut self, memory: Allocation) -> Arg {
        self.held.push(memory);
        Arg::Buffer(self.held.last().expect("just pushed").buffer())
    }
}

/// One large tile of each product, with reductions of two lengths: what the longer one does more is the main loop.
fn main_loops_are_products(device: &Arc<Device>, file: &Path) {
    let none = |dtype| Arg::Buffer(dtr_fused::backend::cuda::Buffer::none(dtype));
    let int = |n: usize| Arg::I32(n as i32);
    // Tensor copies are those of wgmma.
    let no_map = Arg::Map(None);
    println!("{:<28} {:>6} {:>8} {:>8} {:>8}", "main loop of a large tile", "mma", "sectors", "shared", "16 bytes");
    for (source, kernel) in [
        ("ln_linear", "ln_linear_fwd"),
        ("ln_linear", "ln_linear_bwd_input"),
        ("ln_linear", "ln_linear_bwd_weight"),
        ("linear_residual", "linear_residual_fwd"),
        ("linear_residual", "linear_residual_bwd_input"),
        ("linear_residual", "linear_residual_bwd_weight"),
    ] {
        let run = |length: usize| {
            let mut own = Operands { device: device.clone(), held: Vec::new() };
            let (t, n) = (128, 128);
            // The reduction runs over C, over outputs, or over tokens.
            let args = match kernel {
                "ln_linear_fwd" => vec![
                    own.elems(t * n),
                    none(DType::Bf16),
                    own.elems(t * length),
                    own.window(length),
                    own.elems(n * length),
                    own.floats(n),
                    own.floats(2 * n),
                    own.floats(t),
                    own.floats(t),
                    no_map,
                    no_map,
                    int(0),
                    int(1),
                    int(t),
                    int(length),
                    int(n),
                ],
                "ln_linear_bwd_input" => vec![
                    own.elems(t * n),
                    none(DType::F32),
                    own.counters(),
                    own.elems(t * length),
                    none(DType::Bf16),
                    own.elems(length * n),
                    own.window(n),
                    no_map,
                    no_map,
                    no_map,
                    int(1),
                    int(1),
                    int(t),
                    int(n),
                    int(length),
                ],
                "ln_linear_bwd_weight" => vec![
                    own.floats(n * n),
                    own.floats(n),
                    none(DType::F32),
                    own.counters(),
                    own.plan(length),
                    own.elems(length * n),
                    own.elems(length * n),
                    own.window(n),
                    own.elems(2 * 2 * n),
                    own.elems(2 * n),
                    own.floats(n),
                    no_map,
                    no_map,
                    no_map,
                    no_map,
                    int(0),
                    int(1),
                    int(length),
                    int(n),
                    int(n),
                ],
                "linear_residual_fwd" => vec![
                    own.elems(t * n),
                    own.elems(t * n),
                    own.elems(t * length),
                    own.elems(n * length),
                    own.floats(n),
                    own.floats(n),
                    own.elems(t * n),
                    none(DType::Bf16),
                    own.window(n),
                    none(DType::I32),
                    own.window(n),
                    no_map,
                    no_map,
                    int(n),
                    int(1),
                    int(t),
                    int(length),
                    int(n),
                ],
                "linear_residual_bwd_input" => vec![
                    own.elems(t * n),
                    own.counters(),
                    own.elems(t * length),
                    own.elems(length * n),
                    own.elems(t * n),
                    own.window(length),
                    no_map,
                    no_map,
                    int(1),
                    int(1),
                    int(t),
                    int(n),
                    int(length),
                ],
                _ => vec![
                    own.floats(n * n),
                    own.floats(n),
                    none(DType::F32),
                    own.counters(),
                    own.plan(length),
                    own.elems(length * n),
                    own.elems(length * n),
                    own.floats(n),
                    own.window(n),
                    no_map,
                    no_map,
                    int(0),
                    int(1),
                    int(length),
                    int(n),
                    int(n),
                ],
            };
            let launch = Launch {
                file: source,
                kernel,
                elem: DType::Bf16,
                defines: &[("TILE_M", 128), ("TILE_N", 128)],
                grid: [1, 1, 1],
                block: 128,
                // Three stages of two tiles of 128 by 32.
                shared: 3 * 2 * 128 * 32 * 2,
            };
            // SAFETY: `own` holds the operands, each as long as these sizes ask for; the window is of all channels, the plan of one tile.
            let mut found = counted(file, || unsafe { device.launch(&launch, &args) }.unwrap());
            assert_eq!(found.len(), 1);
            found.pop().unwrap()
        };
        let (short, long) = (run(1152), run(4608));
        let more = |name: &str| long.number(name) - short.number(name);
        let mma = (long.class("matrix") - short.class("matrix")) / more("warp_instructions");
        let sectors = more("global_sectors") / more("global_sectors_needed");
        let shared = more("shared_wavefronts") / more("shared_wavefronts_least");
        // A warp's request for 16 bytes a lane moves 16 sectors.
        let wide = more("global_sectors_needed") / more("global_requests") / 16.0;
        println!("{kernel:<28} {mma:>6.3} {sectors:>8.3} {shared:>8.3} {wide:>8.3}");
        assert!(mma >= 0.6, "{kernel}: {mma:.3} of the main loop's instructions are mma");
        assert!(sectors <= 1.1, "{kernel}: {sectors:.3} of the sectors that its loads need");
        assert!(shared <= 1.05, "{kernel}: {shared:.3} of the least wavefronts");
        assert!((wide - 1.0).abs() < 1e-9, "{kernel}: loads of {} bytes", wide * 16.0);
    }
}

/// The modulation of one block of XL/2 and the final layer, for 32 samples: with each weight a block moves as many bytes of rows.
fn weights_of_few_rows_are_read_once(device: &Arc<Device>, file: &Path) {
    let (b, c, outputs) = (32, 1152, 8 * 1152);
    let weights = DeviceWeights::upload(device, &vec![0.01; (c + 1) * outputs], DType::Bf16).unwrap();
    let grads = device.alloc((c + 1) * outputs, DType::F32).unwrap();
    let mut memory = Memory::on_device(device, DType::Bf16);
    let (condition, upstream) = (numbers(1, b * c), numbers(2, b * outputs));
    let launches = counted(file, || {
        pass(&weights, Some((&grads, false)), &mut memory, |tape| {
            let condition = tape.input(&condition, [b, c], true)?;
            let y = modulation(tape, condition, common::any_linear(outputs, c))?;
            tape.backward(y, &upstream)
        })
        .unwrap();
    });
    println!("{:<28} {:>14} {:>6} {:>28}", "32 rows", "instructions", "mma", "bytes moved / of the weight");
    for l in launches.iter().filter(|l| l.kernel.starts_with("modulation")) {
        let instructions = l.number("warp_instructions");
        let mma = 100.0 * l.class("matrix") / instructions;
        let moved = l.number("global_sectors") * 32.0 / (2 * c * outputs) as f64;
        println!("{:<28} {:>12.3} M {mma:>5.1}% {moved:>28.2}", l.kernel, instructions / 1e6);
        if ["modulation_fwd", "modulation_bwd_input"].contains(&l.kernel.as_str()) {
            assert!(moved <= 2.2, "{} moves {moved:.2} times the weight's bytes", l.kernel);
        }
    }
}

/// Activations that the operators of the authors' PyTorch block read and write, in tensors of [B, T, C]; scores, [B, NH, T, T],
/// are `s` of them. Forward and backward together. What is per sample or per token is left out.
fn unfused_tensors(s: f64) -> f64 {
    // (what, read, written)
    let forward = [
        ("mask the input", 1.0, 1.0),
        ("LayerNorm", 1.0, 1.0),
        ("times 1 + scale", 1.0, 1.0),
        ("plus shift", 1.0, 1.0),
        ("qkv", 1.0, 3.0),
        ("q over the root of HS", 1.0, 1.0),
        ("q k^T", 2.0, s),
        ("softmax", s, s),
        ("times v", s + 1.0, 1.0),
        ("heads to channels", 1.0, 1.0),
        ("proj", 1.0, 1.0),
        ("times gate", 1.0, 1.0),
        ("plus residual", 2.0, 1.0),
        ("LayerNorm", 1.0, 1.0),
        ("times 1 + scale", 1.0, 1.0),
        ("plus shift", 1.0, 1.0),
        ("fc1", 1.0, 4.0),
        ("GELU", 4.0, 4.0),
        ("fc2", 4.0, 1.0),
        ("times gate", 1.0, 1.0),
        ("plus residual", 2.0, 1.0),
        ("inactive channels", 1.0, 1.0),
        ("plus inactive channels", 2.0, 1.0),
    ];
    let backward = [
        ("inactive channels", 1.0, 1.0),
        ("times gate, for the product", 1.0, 1.0),
        ("times the product, for the gate", 2.0, 1.0),
        ("sum for the gate", 1.0, 0.0),
        ("fc2, input", 1.0, 4.0),
        ("fc2, weight", 5.0, 0.0),
        ("fc2, bias", 1.0, 0.0),
        ("GELU", 8.0, 4.0),
        ("fc1, input", 4.0, 1.0),
        ("fc1, weight", 5.0, 0.0),
        ("fc1, bias", 4.0, 0.0),
        ("sum for shift", 1.0, 0.0),
        ("times 1 + scale", 1.0, 1.0),
        ("times the normalised, for scale", 2.0, 1.0),
        ("sum for scale", 1.0, 0.0),
        ("LayerNorm", 2.0, 1.0),
        ("plus the residual's", 2.0, 1.0),
        ("times gate, for the product", 1.0, 1.0),
        ("times the product, for the gate", 2.0, 1.0),
        ("sum for the gate", 1.0, 0.0),
        ("proj, input", 1.0, 1.0),
        ("proj, weight", 2.0, 0.0),
        ("proj, bias", 1.0, 0.0),
        ("channels to heads", 1.0, 1.0),
        ("times v, for the probabilities", 2.0, s),
        ("times v, for v", s + 1.0, 1.0),
        ("softmax", 2.0 * s, s),
        ("q k^T, for q", s + 1.0, 1.0),
        ("q k^T, for k", s + 1.0, 1.0),
        ("q over the root of HS", 1.0, 1.0),
        ("q, k and v to qkv", 3.0, 3.0),
        ("qkv, input", 3.0, 1.0),
        ("qkv, weight", 4.0, 0.0),
        ("qkv, bias", 3.0, 0.0),
        ("sum for shift", 1.0, 0.0),
        ("times 1 + scale", 1.0, 1.0),
        ("times the normalised, for scale", 2.0, 1.0),
        ("sum for scale", 1.0, 0.0),
        ("LayerNorm", 2.0, 1.0),
        ("plus the residual's", 2.0, 1.0),
        ("mask the input", 1.0, 1.0),
        ("plus the inactive channels'", 2.0, 1.0),
    ];
    forward.iter().chain(&backward).map(|(_, read, written)| read + written).sum()
}

/// The activations of a block of XL/2 that pass through global memory, in [B, T, C] of bf16: one sample more moves them, and the
/// same weights.
fn a_block_moves_few_bytes(device: &Arc<Device>, file: &Path) {
    let xl = model(1152, 16, 32, Routing::Paper, 0.8);
    let tensor = (xl.tokens() * xl.hidden_size * 2) as f64;
    let scores = (xl.num_heads * xl.tokens()) as f64 / xl.hidden_size as f64;
    let bytes = |samples: usize| {
        let launches = step(device, file, xl.clone(), &vec![500; samples]);
        let position = |kernel: &str, number: usize| {
            let of = launches.iter().enumerate().filter(|(_, l)| l.kernel == kernel).map(|(i, _)| i);
            of.clone().nth(number).unwrap_or_else(|| panic!("launch {number} of {kernel}"))
        };
        let forward = position("ln_linear_fwd_normalise", 0)..position("linear_residual_fwd", 1) + 1;
        let backward = position("linear_residual_bwd_split", 0)..position("patch_embed_bwd_parts", 0);
        let block: Vec<&Counted> = launches[forward].iter().chain(&launches[backward]).collect();
        if samples == 2 {
            println!("{:<28} {:>14} {:>6}", "a block of XL/2, batch 2", "instructions", "mma");
            for l in &block {
                let instructions = l.number("warp_instructions");
                println!(
                    "{:<28} {:>12.3} M {:>5.1}%",
                    l.kernel,
                    instructions / 1e6,
                    100.0 * l.class("matrix") / instructions
                );
            }
        }
        assert!(block.len() <= 24, "{} launches", block.len());
        let bytes = |l: &&Counted| [l.number("dram_bytes_read"), l.number("dram_bytes_written")];
        block.iter().map(|l| (l.kernel.clone(), bytes(l))).collect::<Vec<_>>()
    };
    let (one, two) = (bytes(1), bytes(2));
    println!("{:<28} {:>6} {:>8}   [T, C] of bf16 a sample", "activations of a block", "read", "written");
    let mut sum = 0.0;
    for ((kernel, one), (same, two)) in one.iter().zip(&two) {
        assert_eq!(kernel, same);
        let [read, written] = [0, 1].map(|i| (two[i] - one[i]) / tensor);
        println!("{kernel:<28} {read:>6.2} {written:>8.2}");
        sum += read + written;
    }
    let unfused = unfused_tensors(scores);
    println!(
        "{sum:.1} in all; the unfused graph moves {unfused:.1}, {:.1} of them scores",
        unfused - unfused_tensors(0.0)
    );
    assert!(sum <= 0.5 * unfused, "{sum:.1} of {unfused:.1}");
}
