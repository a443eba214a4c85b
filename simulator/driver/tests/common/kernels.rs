//! Kernels on any device that can run one, and what they must compute.

use half::bf16;

/// A kernel argument.
#[derive(Clone)]
pub enum Arg {
    /// A buffer with contents.
    In(Vec<u8>),
    /// An uninitialised buffer of so many bytes, which is read back.
    Out(usize),
    /// A 32-bit integer.
    Int(i32),
    /// A 32-bit float.
    Float(f32),
}

/// Something that runs kernels of one module.
pub trait Gpu {
    /// Runs a kernel and gives the contents of its `Out` buffers.
    fn run(&mut self, kernel: &str, grid: [u32; 3], block: [u32; 3], args: &[Arg]) -> Vec<Vec<u8>>;
}

/// A kernel file with the check of what is in it.
pub struct Check {
    /// Text of the file.
    pub source: &'static str,
    /// Runs it with awkward shapes and compares.
    pub check: fn(&mut dyn Gpu),
}

/// All kernel files.
pub const ALL: [Check; 4] = [
    Check { source: include_str!("../../../tests/kernels/matmul.cu"), check: matmul },
    Check { source: include_str!("../../../tests/kernels/matmul_bf16.cu"), check: matmul_bf16 },
    Check { source: include_str!("../../../tests/kernels/softmax.cu"), check: softmax },
    Check { source: include_str!("../../../tests/kernels/layernorm.cu"), check: layernorm },
];

/// Numbers in -1..1, asymmetric, from a seed.
pub fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1 << 23) as f32 - 0.9
    };
    (0..n).map(|_| next()).collect()
}

/// Bytes of floats.
pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Floats of bytes.
pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
}

/// Fails unless every value is within `tolerance(index)` of the expected one; NaN fails.
pub fn close(what: &str, got: &[f32], want: &[f64], tolerance: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let (error, limit) = ((f64::from(*g) - w).abs(), tolerance(i));
        assert!(error <= limit, "{what}: element {i} is {g}, must be {w} (error {error:e}, allowed {limit:e})");
    }
}

/// a (m, k) times b (k, n), and the sums of absolute products, to which rounding errors are relative.
fn product(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> (Vec<f64>, Vec<f64>) {
    let mut sums = (vec![0.0; m * n], vec![0.0; m * n]);
    for row in 0..m {
        for col in 0..n {
            for i in 0..k {
                let p = f64::from(a[row * k + i]) * f64::from(b[i * n + col]);
                sums.0[row * n + col] += p;
                sums.1[row * n + col] += p.abs();
            }
        }
    }
    sums
}

fn ints(values: [usize; 3]) -> impl Iterator<Item = Arg> {
    values.into_iter().map(|v| Arg::Int(v as i32))
}

fn matmul(gpu: &mut dyn Gpu) {
    for [m, n, k] in [[1, 1, 1], [33, 17, 50], [48, 64, 32]] {
        let (a, b) = (random(m * k, 1), random(k * n, 2));
        let (want, size) = product(&a, &b, m, n, k);
        for kernel in ["matmul_naive", "matmul_tiled"] {
            let mut args = vec![Arg::Out(m * n * 4), Arg::In(bytes(&a)), Arg::In(bytes(&b))];
            args.extend(ints([m, n, k]));
            let grid = [n.div_ceil(16) as u32, m.div_ceil(16) as u32, 1];
            let out = gpu.run(kernel, grid, [16, 16, 1], &args);
            close(kernel, &floats(&out[0]), &want, |i| k as f64 * 6e-8 * size[i]);
        }
    }
}

fn matmul_bf16(gpu: &mut dyn Gpu) {
    for [m, n, k] in [[1, 8, 8], [64, 64, 64], [77, 136, 104]] {
        let narrow = |values: Vec<f32>| values.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
        let (a, b) = (narrow(random(m * k, 3)), narrow(random(k * n, 4)));
        let wide = |values: &[bf16]| values.iter().map(|v| v.to_f32()).collect::<Vec<_>>();
        let raw = |values: &[bf16]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        let (want, size) = product(&wide(&a), &wide(&b), m, n, k);
        let mut args = vec![Arg::Out(m * n * 4), Arg::In(raw(&a)), Arg::In(raw(&b))];
        args.extend(ints([m, n, k]));
        let grid = [n.div_ceil(64) as u32, m.div_ceil(64) as u32, 1];
        let out = gpu.run("matmul_bf16", grid, [128, 1, 1], &args);
        // Products of bf16 are exact in f32; the tensor core may truncate its sums.
        close("matmul_bf16", &floats(&out[0]), &want, |i| k as f64 * 1.2e-7 * size[i]);
    }
}

fn softmax(gpu: &mut dyn Gpu) {
    for (r, c, threads) in [(1, 1, 32), (3, 77, 128), (2, 1500, 256)] {
        // An offset that overflows exp unless the maximum is subtracted.
        let x: Vec<f32> = random(r * c, 5).iter().map(|v| v * 8.0 + 200.0).collect();
        let mut want = Vec::new();
        for row in x.chunks(c) {
            let most = row.iter().copied().fold(f32::MIN, f32::max);
            let e: Vec<f64> = row.iter().map(|v| f64::from(v - most).exp()).collect();
            let sum: f64 = e.iter().sum();
            want.extend(e.iter().map(|v| v / sum));
        }
        let args = [Arg::Out(r * c * 4), Arg::In(bytes(&x)), Arg::Int(c as i32)];
        let out = gpu.run("softmax", [r as u32, 1, 1], [threads, 1, 1], &args);
        close("softmax", &floats(&out[0]), &want, |i| 5e-6 * want[i] + 1e-12);
    }
}

fn layernorm(gpu: &mut dyn Gpu) {
    for (r, c, offset) in [(1, 1, 0.0), (7, 100, 0.0), (5, 1023, 1000.0)] {
        let x: Vec<f32> = random(r * c, 6).iter().map(|v| v + offset).collect();
        let (weight, bias) = (random(c, 7), random(c, 8));
        let (mut want, mut scales) = (Vec::new(), Vec::new());
        for row in x.chunks(c) {
            let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / c as f64;
            let var = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / c as f64;
            let scale = 1.0 / (var + 1e-5).sqrt();
            scales.push(scale);
            for (i, v) in row.iter().enumerate() {
                want.push((f64::from(*v) - mean) * scale * f64::from(weight[i]) + f64::from(bias[i]));
            }
        }
        let args = [
            Arg::Out(r * c * 4),
            Arg::Out(r * 4),
            Arg::In(bytes(&x)),
            Arg::In(bytes(&weight)),
            Arg::In(bytes(&bias)),
            Arg::Int(r as i32),
            Arg::Int(c as i32),
            Arg::Float(1e-5),
        ];
        let out = gpu.run("layernorm", [r.div_ceil(4) as u32, 1, 1], [128, 1, 1], &args);
        // The mean of values near 1000 is rounded to 6e-5 of a unit.
        let error = 2e-5 + f64::from(offset) * 4e-7;
        close("layernorm", &floats(&out[0]), &want, |_| error);
        close("layernorm rstd", &floats(&out[1]), &scales, |i| (1e-5 + error) * scales[i]);
    }
}
