//! The CUDA kernels: `cargo bench --bench cuda`.
//!
//! On a GPU each operation is timed by the events of its stream, forward and backward, at the sizes of the published models:
//! criterion's throughput is FLOP/s of the work done, and a line says that and the bytes a second as a share of what the
//! device can do at best. Dense products are timed with cuBLASLt too, where it is installed.
//!
//! Without a GPU the simulated driver counts the work of smaller batches; no time is given then, because none would mean
//! anything. Results are compared with the plain loops before anything is timed or counted.

mod common;

use common::{group, numbers};
use criterion::{Criterion, Throughput};
use dtr_fused::Result;
use dtr_fused::autograd::cuda::{DeviceWeights, pass};
use dtr_fused::autograd::{Memory, Tape, Var};
use dtr_fused::backend::cuda::clock::Moment;
use dtr_fused::backend::cuda::cudarc::cublaslt::{self, CudaBlasLT, Matmul, MatmulConfig};
use dtr_fused::backend::cuda::{Allocation, DType, Device};
use dtr_fused::model::config::{ModelConfig, TASKS};
use dtr_fused::ops::PerSample;
use dtr_fused::ops::attention::{self, attention};
use dtr_fused::ops::linear_residual::{self, Residual, linear_residual};
use dtr_fused::ops::ln_linear::{self, Activation, ln_linear};
use dtr_fused::ops::modulation::{self, modulation};
use dtr_fused::params::{Linear, Param};
use dtr_fused::routing::{Window, windows};
use half::bf16;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Rows that are compared with the reference.
const ROWS: usize = 3;
/// Largest difference of a result in bf16 from the plain loops, of the largest number.
const NEAR: f32 = 0.02;

/// Samples of a batch, tokens of each, and the channels, heads and blocks of a model.
#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    t: usize,
    c: usize,
    heads: usize,
    depth: usize,
}

/// Puts the inputs of an operation on a tape.
type Inputs = Box<dyn Fn(&mut Tape) -> Result<Vec<Var>>>;
/// Computes the operation of them.
type Operation = Box<dyn Fn(&mut Tape, &[Var]) -> Result<Var>>;

/// An operation with its inputs.
struct Case {
    name: String,
    weights: Vec<f32>,
    /// Floating-point operations that the forward pass needs; a backward pass of products needs twice as many.
    flops: f64,
    /// Bytes of the tensors that it reads and writes.
    bytes: f64,
    /// First numbers of the output.
    expected: Vec<f32>,
    inputs: Inputs,
    op: Operation,
    /// Rows, outputs and inputs of the product, where it is a dense one.
    dense: Option<[usize; 3]>,
}

fn linear(outputs: usize, inputs: usize) -> Linear {
    let weight = Param { offset: 0, len: outputs * inputs };
    Linear { weight, bias: Param { offset: weight.len, len: outputs }, inputs, outputs }
}

/// Weights of a linear layer that keep numbers near 1, as bf16 holds them, then its biases.
fn linear_weights(outputs: usize, inputs: usize) -> Vec<f32> {
    let factor = 1.0 / (inputs as f32).sqrt();
    let mut weights = numbers(1, outputs * inputs + outputs);
    weights.iter_mut().for_each(|w| *w *= factor);
    round(&mut weights[..outputs * inputs]);
    weights
}

fn round(numbers: &mut [f32]) {
    numbers.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
}

fn activations(seed: u64, len: usize) -> Vec<f32> {
    let mut x = numbers(seed, len);
    round(&mut x);
    x
}

/// The windows of timesteps spread over all tasks.
fn batch_windows(sizes: Sizes, beta: f64) -> Vec<Window> {
    let all = windows(TASKS, sizes.c, 4.0, beta).expect("a share in (0, 1]");
    (0..sizes.b).map(|i| all[(2 * i + 1) * TASKS / (2 * sizes.b)]).collect()
}

fn ln_linear_case(sizes: Sizes, layer: &str, n: usize, activation: Activation, beta: f64) -> Case {
    let Sizes { b, t, c, .. } = sizes;
    let (x, vectors) = (activations(2, b * t * c), numbers(3, b * 2 * c));
    let (weights, windows) = (linear_weights(n, c), batch_windows(sizes, beta));
    let expected = ln_linear::reference::forward(&ln_linear::reference::Inputs {
        x: &x[..ROWS * c],
        read: &windows[..1],
        shift: &vectors[..c],
        scale: &vectors[c..2 * c],
        weight: &weights[..n * c],
        bias: &weights[n * c..],
        activation,
        tokens: ROWS,
        channels: c,
    });
    let width: f64 = windows.iter().map(|w| w.width as f64).sum();
    Case {
        name: format!("ln_linear {layer} {beta}"),
        flops: 2.0 * t as f64 * n as f64 * width,
        bytes: 2.0 * (t as f64 * width + (n * c + b * t * n) as f64),
        expected,
        inputs: Box::new(move |tape| {
            Ok(vec![tape.input(&x, [b, t, c], true)?, tape.input(&vectors, [b, 2 * c], true)?])
        }),
        op: Box::new(move |tape, inputs| {
            let read = tape.windows(windows.iter().copied());
            let [shift, scale] = [0, c].map(|offset| PerSample { var: inputs[1], offset });
            ln_linear(tape, inputs[0], read, shift, scale, linear(n, c), activation)
        }),
        weights,
        dense: (beta == 1.0).then_some([b * t, n, c]),
    }
}

fn linear_residual_case(sizes: Sizes, layer: &str, k: usize, beta: f64) -> Case {
    let Sizes { b, t, c, .. } = sizes;
    let (a, base, gate) = (activations(2, b * t * k), activations(3, b * t * c), numbers(4, b * c));
    let (weights, windows) = (linear_weights(c, k), batch_windows(sizes, beta));
    let expected = linear_residual::reference::forward(&linear_residual::reference::Inputs {
        a: &a[..ROWS * k],
        weight: &weights[..c * k],
        bias: &weights[c * k..],
        gate: &gate[..c],
        base: &base[..ROWS * c],
        base_window: &windows[..1],
        bypass: Some((&base[..ROWS * c], &windows[..1])),
        write: &windows[..1],
        tokens: ROWS,
    });
    let width: f64 = windows.iter().map(|w| w.width as f64).sum();
    Case {
        name: format!("linear_residual {layer} {beta}"),
        flops: 2.0 * t as f64 * k as f64 * width,
        bytes: 2.0 * (b * t * k + c * k + 2 * b * t * c) as f64,
        expected,
        inputs: Box::new(move |tape| {
            let activations = [tape.input(&a, [b, t, k], true)?, tape.input(&base, [b, t, c], true)?];
            Ok(vec![activations[0], activations[1], tape.input(&gate, [b, c], true)?])
        }),
        op: Box::new(move |tape, inputs| {
            let write = tape.windows(windows.iter().copied());
            let residual = Residual { base: inputs[1], base_window: write, bypass: Some((inputs[1], write)) };
            let gate = PerSample { var: inputs[2], offset: 0 };
            linear_residual(tape, inputs[0], linear(c, k), gate, residual, write)
        }),
        weights,
        dense: (beta == 1.0).then_some([b * t, c, k]),
    }
}

fn attention_case(sizes: Sizes) -> Case {
    let Sizes { b, t, c, heads, .. } = sizes;
    let qkv = activations(2, b * t * 3 * c);
    let dims = attention::Dims { b: 1, t, c, heads };
    Case {
        name: "attention".into(),
        weights: vec![0.0; 8],
        flops: 4.0 * (b * t * t * c) as f64,
        bytes: 2.0 * (b * t * 4 * c) as f64,
        expected: attention::reference::forward(&qkv[..t * 3 * c], dims),
        inputs: Box::new(move |tape| Ok(vec![tape.input(&qkv, [b, t, 3 * c], true)?])),
        op: Box::new(move |tape, inputs| attention(tape, inputs[0], heads)),
        dense: None,
    }
}

fn modulation_case(sizes: Sizes) -> Case {
    let Sizes { b, c, depth, .. } = sizes;
    let m = 6 * c * depth + 2 * c;
    let (condition, weights) = (numbers(2, b * c), linear_weights(m, c));
    Case {
        name: "modulation".into(),
        flops: (2 * b * c * m) as f64,
        bytes: (2 * m * c + 4 * b * (c + m)) as f64,
        expected: modulation::reference::forward(&condition[..c], &weights[..m * c], &weights[m * c..]),
        weights,
        inputs: Box::new(move |tape| Ok(vec![tape.input(&condition, [b, c], true)?])),
        op: Box::new(move |tape, inputs| modulation(tape, inputs[0], linear(m, c))),
        dense: None,
    }
}

fn cases(sizes: Sizes, betas: &[f64]) -> Vec<Case> {
    let c = sizes.c;
    let mut cases = Vec::new();
    for &beta in betas {
        cases.push(ln_linear_case(sizes, "qkv", 3 * c, Activation::None, beta));
        cases.push(linear_residual_case(sizes, "proj", c, beta));
        cases.push(ln_linear_case(sizes, "fc1", 4 * c, Activation::Gelu, beta));
        cases.push(linear_residual_case(sizes, "fc2", 4 * c, beta));
    }
    cases.push(attention_case(sizes));
    cases.push(modulation_case(sizes));
    cases
}

/// A case on a device.
struct Runner<'a> {
    device: Arc<Device>,
    case: &'a Case,
    weights: DeviceWeights,
    grads: Allocation,
    memory: Memory,
    upstream: Vec<f32>,
}

impl<'a> Runner<'a> {
    /// Uploads the weights, and compares the output with the reference.
    fn new(device: &Arc<Device>, case: &'a Case) -> Self {
        let weights = DeviceWeights::upload(device, &case.weights, DType::Bf16).expect("weights fit");
        let grads = device.alloc(case.weights.len(), DType::F32).expect("gradients fit");
        let memory = Memory::on_device(device, DType::Bf16);
        let mut runner = Runner { device: device.clone(), case, weights, grads, memory, upstream: Vec::new() };
        let work = |tape: &mut Tape| {
            let inputs = (case.inputs)(tape)?;
            let y = (case.op)(tape, &inputs)?;
            tape.read(y)
        };
        let output = pass(&runner.weights, None, &mut runner.memory, work).expect("the kernels run");
        let largest = case.expected.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
        assert!(largest > 0.0 && case.expected.len() <= output.len(), "{}: nothing to compare with", case.name);
        for (i, (y, e)) in output.iter().zip(&case.expected).enumerate() {
            assert!((y - e).abs() <= NEAR * largest, "{}: output {i} is {y}, expected {e}", case.name);
        }
        runner.upstream = numbers(9, output.len());
        runner
    }

    /// One pass: the moments before and after the forward or the backward kernels.
    fn run(&mut self, backward: bool) -> Option<(Moment, Moment)> {
        let Runner { device, case, weights, grads, memory, upstream } = self;
        let grads = backward.then_some((&*grads, false));
        let moments = pass(weights, grads, memory, |tape| {
            let inputs = (case.inputs)(tape)?;
            if !backward {
                let start = device.moment()?;
                (case.op)(tape, &inputs)?;
                return Ok(start.zip(device.moment()?));
            }
            let y = (case.op)(tape, &inputs)?;
            let shape: Vec<usize> = tape.shape(y).to_vec();
            let upstream = match shape[..] {
                [b, t, c] => tape.input(upstream, [b, t, c], false)?,
                _ => tape.input(upstream, [upstream.len()], false)?,
            };
            let start = device.moment()?;
            tape.backward_with(y, upstream)?;
            Ok(start.zip(device.moment()?))
        });
        moments.expect("the kernels run")
    }
}

/// Operations of a pass, forward or backward, and the bytes of its tensors. Attention computes five products of the size of
/// the forward pass's two going back, all others two for one; tensors and their gradients are read and written.
fn work(case: &Case, backward: bool) -> (f64, f64) {
    match (backward, case.name.as_str()) {
        (false, _) => (case.flops, case.bytes),
        (true, "attention") => (2.5 * case.flops, 2.0 * case.bytes),
        (true, _) => (2.0 * case.flops, 2.0 * case.bytes),
    }
}

fn phase(backward: bool) -> &'static str {
    if backward { "backward" } else { "forward" }
}

/// Operations a second in bf16 on matrices with f32 sums, at the device's own clock: per multiprocessor and clock as in the
/// vendor's data sheets (A100 312, RTX 3090 71, RTX 4090 165, H100 SXM 989, RTX 5090 210 TFLOP/s).
fn peak_flops(device: &Device) -> Option<f64> {
    let per_clock = match device.arch() {
        80 => 2048.0,
        86..=89 | 120..=129 => 512.0,
        90 => 4096.0,
        100..=109 => 8192.0,
        _ => return None,
    };
    device.rates()[0].map(|khz| per_clock * f64::from(device.multiprocessors()) * khz * 1e3)
}

fn published(model: &str) -> ModelConfig {
    ModelConfig::published(model).expect("it is published")
}

fn timed(device: &Arc<Device>) {
    let mut criterion = Criterion::default().configure_from_args();
    println!("times by the events of {}", device.name());
    for model in ["DiT-S/2", "DiT-L/2", "DiT-XL/2"] {
        let ModelConfig { hidden_size: c, depth, num_heads: heads, .. } = published(model);
        let sizes = Sizes { b: 32, t: 256, c, heads, depth };
        let mut group = group(&mut criterion, model);
        for case in cases(sizes, &[1.0, 0.8, 0.5]) {
            let mut runner = Runner::new(device, &case);
            for backward in [false, true] {
                let (flops, bytes) = work(&case, backward);
                let mut all: Vec<f64> = Vec::new();
                group.throughput(Throughput::Elements(flops as u64));
                group.bench_function(format!("{}/{}", case.name, phase(backward)), |bencher| {
                    bencher.iter_custom(|count| {
                        let mut total = 0.0;
                        for _ in 0..count {
                            let (start, end) = runner.run(backward).expect("a GPU has moments");
                            let seconds = start.milliseconds_until(&end).expect("the kernels ran") / 1e3;
                            all.push(seconds);
                            total += seconds;
                        }
                        Duration::from_secs_f64(total)
                    });
                });
                all.sort_by(f64::total_cmp);
                if let Some(&median) = all.get(all.len() / 2) {
                    let name = format!("{model} {} {}", case.name, phase(backward));
                    say(device, &name, flops / median, bytes / median);
                }
            }
            if let Some(dense) = case.dense {
                cublaslt(device, &format!("{model} {}", case.name), dense);
            }
        }
    }
}

/// Rates, and what share of the device's best they are.
fn say(device: &Device, name: &str, flops: f64, bytes: f64) {
    let share = |rate: f64, best: Option<f64>| {
        best.map_or(String::new(), |best| format!(" ({:.0} % of the peak)", 100.0 * rate / best))
    };
    println!(
        "{name}: {:.0} GFLOP/s{}, {:.0} GB/s{}",
        flops / 1e9,
        share(flops, peak_flops(device)),
        bytes / 1e9,
        share(bytes, device.rates()[1])
    );
}

/// The same dense product by cuBLASLt, if it is installed: nothing fused, only the product.
fn cublaslt(device: &Arc<Device>, name: &str, [rows, n, k]: [usize; 3]) {
    // SAFETY: only tries to open libraries by their names.
    let Some(stream) = device.stream().filter(|_| unsafe { cublaslt::sys::is_culib_present() }) else { return };
    let product = || -> std::result::Result<f64, Box<dyn std::error::Error>> {
        let library = CudaBlasLT::new(stream.clone())?;
        let narrow = |x: Vec<f32>| x.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
        let x = stream.clone_htod(&narrow(numbers(2, rows * k)))?;
        let weight = stream.clone_htod(&narrow(numbers(3, n * k)))?;
        let mut y = stream.alloc_zeros::<bf16>(rows * n)?;
        // In its column-major terms: y^T [N, rows] = W^T^T x^T.
        let config = MatmulConfig {
            transa: true,
            transb: false,
            transc: false,
            m: n as u64,
            n: rows as u64,
            k: k as u64,
            alpha: 1.0,
            lda: k as i64,
            ldb: k as i64,
            beta: 0.0,
            ldc: n as i64,
            stride_a: None,
            stride_b: None,
            stride_c: None,
            stride_bias: None,
            batch_size: None,
        };
        let mut seconds = Vec::new();
        for _ in 0..20 {
            let start = device.moment()?;
            // SAFETY: the three matrices have the sizes that the configuration names.
            unsafe { library.matmul(config, &weight, &x, &mut y, None, None) }?;
            let (start, end) = start.zip(device.moment()?).ok_or("a GPU has moments")?;
            seconds.push(start.milliseconds_until(&end)? / 1e3);
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[seconds.len() / 2])
    };
    match product() {
        Ok(seconds) => {
            let (flops, bytes) = ((2 * rows * n * k) as f64, (2 * (rows * k + n * k + rows * n)) as f64);
            say(device, &format!("{name} forward by cuBLASLt"), flops / seconds, bytes / seconds);
        }
        Err(why) => println!("{name}: cuBLASLt cannot be timed: {why}"),
    }
}

/// Work that the simulated driver counted.
#[derive(Default)]
struct Counts {
    launches: usize,
    warp_instructions: f64,
    matrix: f64,
    matrix_flops: f64,
    sectors: f64,
    sectors_needed: f64,
    wavefronts: f64,
    wavefronts_least: f64,
    bytes: f64,
}

impl Counts {
    /// Adds a line of the file of counters; of a pass that is asked for its backward half, only the kernels of that.
    fn add(&mut self, line: &str, backward: bool) {
        let launch: Value = serde_json::from_str(line).expect("the simulator writes JSON");
        if backward && launch["kernel"].as_str().is_some_and(|kernel| kernel.contains("_fwd")) {
            return;
        }
        let counters = &launch["counters"];
        let number = |name: &str| counters[name].as_f64().unwrap_or_else(|| panic!("no {name} in {line}"));
        self.launches += 1;
        self.warp_instructions += number("warp_instructions");
        self.matrix += counters["by_class"]["matrix"].as_f64().unwrap_or(0.0);
        let flops = counters["matrix_flops"].as_object().into_iter().flatten();
        self.matrix_flops += flops.filter_map(|(_, flops)| flops.as_f64()).sum::<f64>();
        self.sectors += number("global_sectors");
        self.sectors_needed += number("global_sectors_needed");
        self.wavefronts += number("shared_wavefronts");
        self.wavefronts_least += number("shared_wavefronts_least");
        self.bytes += number("dram_bytes_read") + number("dram_bytes_written");
    }
}

fn counted(device: &Arc<Device>, file: &Path) {
    println!("COUNTS, not times: work of small batches, by {}", device.name());
    println!(
        "needed: matrix FLOPs of the windows alone; sectors and wavefronts: moved, of the least for the same bytes"
    );
    println!(
        "{:<38} {:>8} {:>10} {:>9} {:>8} {:>8} {:>10} {:>8}",
        "operation", "launches", "MFLOP", "of needed", "matrix %", "sectors", "wavefronts", "MB"
    );
    // A file of the user's may have lines already.
    let mut seen = std::fs::read_to_string(file).map_or(0, |text| text.lines().count());
    let mut since = |backward: bool| {
        let text = std::fs::read_to_string(file).expect("the simulator wrote its counters");
        let mut counts = Counts::default();
        text.lines().skip(seen).for_each(|line| counts.add(line, backward));
        seen = text.lines().count();
        counts
    };
    for (model, betas) in [("DiT-S/2", &[1.0, 0.8, 0.5][..]), ("DiT-XL/2", &[0.8])] {
        let ModelConfig { hidden_size: c, num_heads: heads, .. } = published(model);
        // One block: the modulation of all of them is the same product, many times larger.
        let sizes = Sizes { b: 2, t: 64, c, heads, depth: 1 };
        for case in cases(sizes, betas) {
            let mut runner = Runner::new(device, &case);
            let forward = since(false);
            runner.run(true);
            let backward = since(true);
            for (counts, back) in [(forward, false), (backward, true)] {
                let ratio = |a: f64, b: f64| if b > 0.0 { format!("{:.2}", a / b) } else { "-".into() };
                println!(
                    "{:<38} {:>8} {:>10.1} {:>9} {:>8.1} {:>8} {:>10} {:>8.2}",
                    format!("{model} {} {}", case.name, phase(back)),
                    counts.launches,
                    counts.matrix_flops / 1e6,
                    ratio(counts.matrix_flops, work(&case, back).0),
                    100.0 * counts.matrix / counts.warp_instructions,
                    ratio(counts.sectors, counts.sectors_needed),
                    ratio(counts.wavefronts, counts.wavefronts_least),
                    counts.bytes / 1e6
                );
            }
        }
    }
}

/// Names the simulated driver and NVRTC of this checkout where there is nothing else; the file of counters.
fn find_libraries() -> PathBuf {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    // SAFETY: this program has no other thread yet. (Opening a device that is not there starts none.)
    let name = |variable: &str, value: &Path| unsafe {
        if std::env::var_os(variable).is_none() {
            std::env::set_var(variable, value);
        }
    };
    // Counting is slow enough without the sanitizer, which the tests run with.
    name("CUDA_SIM_SANITIZER", Path::new("off"));
    let own = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench-counters.jsonl");
    let _ = std::fs::remove_file(&own);
    name("CUDA_SIM_COUNTERS", &own);
    let counters = PathBuf::from(std::env::var_os("CUDA_SIM_COUNTERS").unwrap_or_default());
    if target.join("nvrtc/libnvrtc.so.13").is_file() {
        name("DTR_NVRTC_FOLDER", &target.join("nvrtc"));
    }
    let simulator = ["release", "debug"].map(|profile| target.join(profile).join("examples/libcuda.so"));
    if let (Err(_), Some(simulator)) = (Device::open(0), simulator.iter().find(|path| path.is_file())) {
        name("DTR_CUDA_LIBRARY", simulator);
    }
    counters
}

fn main() {
    let counters = find_libraries();
    match Device::open(0).map(Arc::new) {
        Ok(device) if !device.is_simulated() => timed(&device),
        Ok(device) => counted(&device, &counters),
        Err(why) => println!(
            "no GPU and no simulated driver: {why} (for counts: cargo build --release -p cuda-sim-driver --example cuda)"
        ),
    }
}
