//! The simulated device, and the error rule.

use super::*;
use dtr_fused::autograd::cuda::{DeviceWeights, pass};
use dtr_fused::backend::cuda::{Allocation, Buffer, DType, Device};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

/// Where `scripts/fetch-nvrtc` puts NVRTC.
pub fn nvrtc_folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/nvrtc");
    assert!(
        folder.join("libnvrtc.so.13").is_file(),
        "NVRTC is missing in {}: run scripts/fetch-nvrtc",
        folder.display()
    );
    folder
}

/// The simulated driver: cargo builds examples together with the tests of a workspace.
pub fn simulator() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let library = exe.parent().unwrap().parent().unwrap().join("examples/libcuda.so");
    assert!(library.is_file(), "there is no {}: run cargo build -p cuda-sim-driver --example cuda", library.display());
    library
}

/// A device: the simulated one, or with `DTR_REQUIRE_CUDA=1` the machine's first GPU.
pub fn device() -> Device {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the first thing each test does, before any other thread reads these variables.
        unsafe {
            if std::env::var_os("DTR_REQUIRE_CUDA").is_none() {
                std::env::set_var("DTR_CUDA_LIBRARY", simulator());
            }
            if std::env::var_os("DTR_NVRTC_FOLDER").is_none() {
                std::env::set_var("DTR_NVRTC_FOLDER", nvrtc_folder());
            }
            if std::env::var_os("DTR_KERNEL_CACHE").is_none() {
                std::env::set_var("DTR_KERNEL_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels"));
            }
        }
    });
    Device::open(0).unwrap()
}

/// Numbers beyond both ends of an output that no kernel may touch.
const CANARIES: usize = 64;

/// An output on the device: NaN everywhere, between canaries.
pub struct Output {
    memory: Allocation,
    len: usize,
}

impl Output {
    pub fn new(device: &Device, len: usize, dtype: DType) -> Self {
        let mut numbers = vec![f32::NAN; len + 2 * CANARIES];
        numbers[..CANARIES].fill(CANARY);
        numbers[len + CANARIES..].fill(CANARY);
        Output { memory: device.upload(&numbers, dtype).unwrap(), len }
    }

    /// An output that starts with these numbers: for kernels that add.
    pub fn with(device: &Device, start: &[f32], dtype: DType) -> Self {
        let canaries = vec![CANARY; CANARIES];
        let numbers = [&canaries, start, &canaries].concat();
        Output { memory: device.upload(&numbers, dtype).unwrap(), len: start.len() }
    }

    pub fn buffer(&self) -> Buffer {
        self.memory.buffer().slice(CANARIES..CANARIES + self.len)
    }

    /// What the kernel wrote; fails when it wrote beyond either end.
    pub fn numbers(&self, device: &Device) -> Vec<f32> {
        let all = device.download(&self.memory).unwrap();
        let canary = match self.memory.buffer().dtype() {
            DType::Bf16 => half::bf16::from_f32(CANARY).to_f32(),
            _ => CANARY,
        };
        let (before, rest) = all.split_at(CANARIES);
        let (numbers, after) = rest.split_at(self.len);
        assert!(before.iter().chain(after).all(|&x| x == canary), "a kernel wrote beyond its output");
        numbers.to_vec()
    }
}

/// Everything that is asked of an operation on a CUDA device, in f32 and in bf16: the error rule for the output and every
/// gradient against the plain version in the same precision, buffers full of NaN or of older numbers before, canaries
/// around the weights' gradients, adding to gradients, the same bits when run again.
#[track_caller]
pub fn check_on_cuda(label: &str, op: &impl Operation) {
    check_on_cuda_in(label, op, DType::F32);
    check_on_cuda_in(label, op, DType::Bf16);
}

#[track_caller]
pub fn check_on_cuda_in(label: &str, op: &impl Operation, elem: DType) {
    check_on(device(), label, op, elem);
}

/// The test of this name in another process, on the simulator as a GPU of sm_90: its products have kernels of their own.
pub fn again_on_sm_90(test: &str) {
    if std::env::var_os("DTR_REQUIRE_CUDA").is_some() {
        // A GPU is of one architecture, and the test itself has run on it.
        return;
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let output = command.args([test, "--exact"]).env("CUDA_SIM_ARCH", "sm_90").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "on sm_90: {said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// [`check_on_cuda`] with the tiles that large products take.
#[track_caller]
pub fn check_with_large_tiles(label: &str, op: &impl Operation, elem: DType) {
    check_on(device().with_multiprocessors(1), label, op, elem);
}

/// [`check_on_cuda`] on this device, in `elem`.
#[track_caller]
pub fn check_on(device: Device, label: &str, op: &impl Operation, elem: DType) {
    let device = Arc::new(device);
    let inputs = inputs_in(op, elem);
    let (expected_y, expected, upstream) = expectations(op, &inputs, elem);
    let mut memory = Memory::on_device(&device, elem);
    let found = run_on_cuda(&device, op, &inputs, &upstream, None, &mut memory, elem);
    let judge = |result: std::result::Result<(), String>| {
        if let Err(what) = result {
            panic!("{label}, {elem:?}: {what}");
        }
    };
    judge(expected_y.check("y", 2.0, &found.y));
    for ((input, grad), expected) in inputs.iter().zip(&found.grads).zip(&expected) {
        judge(expected.check(&format!("d{}", input.name), 3.0, grad));
    }
    // Again, with gradients of weights that are added to what is there: the same bits, and the same sums.
    let start: Vec<Vec<f32>> = inputs.iter().map(|x| numbers(5, x.data.len())).collect();
    let again = run_on_cuda(&device, op, &inputs, &upstream, Some(&start), &mut memory, elem);
    assert!(same_bits(&again.y, &found.y), "{label}, {elem:?}: other bits in y when run again");
    for (i, input) in inputs.iter().enumerate() {
        let mut once = found.grads[i].clone();
        if let Place::Weight = input.place {
            once.iter_mut().zip(&start[i]).for_each(|(g, s)| *g += s);
        }
        let name = input.name;
        assert!(same_bits(&again.grads[i], &once), "{label}, {elem:?}: other bits in d{name} when run again");
    }
}

/// Sizes and windows that no list of cases has thought of, drawn with `seed`: few samples or many, of a token or of more than a
/// chunk has; `[B, T, channels, other]`, where channels are up to five tiles, or few; each sample's window starts and ends anywhere.
pub fn drawn_sizes(seed: u64) -> ([usize; 4], Vec<Window>) {
    let draw = |what: usize, n: usize| below(seed, what, n);
    let rows = 1 + draw(0, 300);
    let b = (1 + draw(1, [3, 12, 300][draw(2, 3)])).min(rows);
    let (wide, narrow) = (8 * (1 + draw(3, 80)), 8 * (1 + draw(4, 12)));
    let (channels, other) = if draw(5, 3) == 0 { (narrow, wide) } else { (wide, narrow) };
    let edge =
        |i: usize| [draw(i, channels + 1), draw(i, channels / 8 + 1) * 8, draw(i, 9).min(channels)][draw(i + 1, 3)];
    let windows = (0..b).map(|i| {
        let (start, end) = (edge(10 + 4 * i).min(channels - 1), edge(12 + 4 * i));
        let (start, end) = (start.min(end), start.max(end));
        Window { start, width: (end - start).max(1) }
    });
    ([b, rows / b, channels, other], windows.collect())
}

/// How many numbers of which type an operation takes for its backward pass, given what has it take them.
pub fn taken<S>(
    scratch: impl FnOnce(&mut dyn FnMut(usize, DType) -> dtr_fused::Result<Buffer>) -> dtr_fused::Result<S>,
) -> Vec<(usize, DType)> {
    let mut taken = Vec::new();
    let mut take = |len, dtype| {
        taken.push((len, dtype));
        Ok(Buffer::none(dtype))
    };
    scratch(&mut take).unwrap();
    taken
}

/// The number of counters among them.
pub fn counters(taken: &[(usize, DType)]) -> usize {
    taken.iter().find(|(_, dtype)| *dtype == DType::U32).expect("there are counters").0
}

/// The most parts of a tile in a plan for `blocks` blocks (`Piece` in kernels/gemm_shares.cuh).
pub fn most_parts(plan: &[i32], blocks: usize) -> i32 {
    let (begin, pieces) = plan.split_at(blocks + 1);
    let pieces = &pieces[..begin[blocks] as usize * 8];
    pieces.chunks_exact(8).map(|piece| piece[7]).max().expect("there are pieces")
}

/// Windows that make tiles of different lengths: few samples need the channels on the right, and none the last 8.
pub fn uneven_windows(b: usize, channels: usize) -> Vec<Window> {
    (0..b)
        .map(|i| match i % 5 {
            0 => Window { start: 40, width: channels - 48 },
            _ => Window { start: 3, width: channels / 2 - i % 7 },
        })
        .collect()
}

fn run_on_cuda(
    device: &Arc<Device>,
    op: &impl Operation,
    inputs: &[Input],
    upstream: &[f32],
    start: Option<&[Vec<f32>]>,
    memory: &mut Memory,
    elem: DType,
) -> Outcome {
    let (mut weights, mut grads) = (vec![f32::NAN; 8], vec![CANARY; 8]);
    let mut params = HashMap::new();
    for (i, input) in inputs.iter().enumerate() {
        if let Place::Weight = input.place {
            params.insert(input.name, Param { offset: weights.len(), len: input.data.len() });
            weights.extend(&input.data);
            match start {
                Some(start) => grads.extend(&start[i]),
                None => grads.resize(weights.len(), f32::NAN),
            }
            // Parameters of a model start at multiples of 8 too: its channels are such.
            weights.resize(weights.len().next_multiple_of(8) + 8, f32::NAN);
            grads.resize(weights.len(), CANARY);
        }
    }
    let weights = DeviceWeights::upload(device, &weights, elem).unwrap();
    let grads = device.upload(&grads, DType::F32).unwrap();
    let add = start.is_some();
    let mut found = pass(&weights, Some((&grads, add)), memory, |tape| {
        let (given, modulation) = put(tape, inputs, params.clone());
        let y = op.on_tape(tape, &given)?;
        let output = tape.read(y)?;
        tape.backward(y, upstream)?;
        let dmodulation = modulation.map(|(var, _)| tape.read_gradient(var)).transpose()?.flatten();
        let mut found = Vec::new();
        for input in inputs {
            found.push(match input.place {
                Place::Activation(_) => {
                    tape.read_gradient(given.var(input.name))?.unwrap_or_else(|| vec![0.0; input.data.len()])
                }
                Place::PerSample(batch) => {
                    let (c, columns) = (input.data.len() / batch, modulation.expect("there is one").1);
                    let at = given.per_sample(input.name).offset;
                    let rows = dmodulation.as_ref().expect("it has a gradient").chunks_exact(columns);
                    rows.flat_map(|row| row[at..at + c].to_vec()).collect()
                }
                Place::Constant(_) | Place::Weight => Vec::new(),
            });
        }
        Ok(Outcome { y: output, grads: found })
    })
    .unwrap();
    let mut grads = device.download(&grads).unwrap();
    for (input, found) in inputs.iter().zip(&mut found.grads) {
        if let Some(param) = params.get(input.name) {
            found.extend_from_slice(&grads[param.range()]);
            grads[param.range()].fill(CANARY);
        }
    }
    assert!(grads.iter().all(|&g| g == CANARY), "wrote beside the gradients of its weights");
    found
}
