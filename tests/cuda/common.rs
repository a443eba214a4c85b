//! The simulated device, and the error rule.

use dtr_fused::backend::cuda::{Allocation, Buffer, DType, Device};
use std::path::{Path, PathBuf};
use std::sync::Once;

/// Where `scripts/fetch-nvrtc` puts NVRTC.
fn nvrtc_folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/nvrtc");
    assert!(
        folder.join("libnvrtc.so.13").is_file(),
        "NVRTC is missing in {}: run scripts/fetch-nvrtc",
        folder.display()
    );
    folder
}

/// The simulated driver: cargo builds examples together with the tests of a workspace.
fn simulator() -> PathBuf {
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
const CANARY: f32 = -12345.0;

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
        let all = device.download(self.memory.buffer()).unwrap();
        let canary = match self.memory.buffer().dtype {
            DType::Bf16 => half::bf16::from_f32(CANARY).to_f32(),
            _ => CANARY,
        };
        let (before, rest) = all.split_at(CANARIES);
        let (numbers, after) = rest.split_at(self.len);
        assert!(before.iter().chain(after).all(|&x| x == canary), "a kernel wrote beyond its output");
        numbers.to_vec()
    }
}

/// Numbers as `dtype` holds them.
pub fn rounded(numbers: &[f32], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::Bf16 => numbers.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect(),
        _ => numbers.to_vec(),
    }
}

/// Root mean square and largest difference.
fn errors(found: &[f32], truth: &[f64]) -> [f64; 2] {
    assert_eq!(found.len(), truth.len());
    let (mut squares, mut largest) = (0.0, 0.0f64);
    for (&f, &t) in found.iter().zip(truth) {
        let err = (f64::from(f) - t).abs();
        squares += err * err;
        // A NaN must not be lost in `max`.
        largest = if err <= largest { largest } else { err };
    }
    [(squares / truth.len().max(1) as f64).sqrt(), largest]
}

/// The rule: against the truth in f64, the fused version is at most `factor` times as wrong as the plain one at the same
/// precision (2 for values, 3 for gradients), up to a tiny floor.
pub fn check(what: &str, fused: &[f32], plain: &[f32], truth: &[f64], factor: f64) {
    let scale = truth.iter().fold(0.0f64, |m, t| m.max(t.abs()));
    let floor = 4.0 * f64::from(f32::EPSILON) * scale + 1e-12;
    for (name, (f, p)) in ["rms", "largest"].iter().zip(errors(fused, truth).into_iter().zip(errors(plain, truth))) {
        assert!(p.is_finite(), "{what}: the plain version is not finite");
        assert!(
            f <= factor * p + floor,
            "{what}: {name} error {f:e}, but the plain version's is {p:e} (largest value {scale:e})"
        );
    }
}

/// Repeatable, asymmetric numbers: mean 0.1, deviation about 0.6.
pub fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 0.9
        })
        .collect()
}
