//! Runs a few PTX instructions on lists of operands, one thread an element.
#![allow(dead_code)]

pub mod exact;

use cuda_sim::{Arch, Device, Fault, LaunchConfig, LaunchReport, LoadError, Options};

/// Declarations that snippets may use besides `%a %b %c` and `%d`.
const SCRATCH: &str =
    ".reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .f32 %f<32>; .reg .b64 %rd<32>; .reg .f64 %fd<8>;";

fn load(width: usize) -> &'static str {
    match width {
        1 => "u8",
        2 => "b16",
        4 => "b32",
        _ => "b64",
    }
}

/// Applies `body` to each row of operands. `widths` are the bytes of `%a %b %c`, `out` those of `%d`.
pub fn map(body: &str, widths: &[usize], out: usize, rows: &[Vec<u64>]) -> Vec<u64> {
    try_map(body, widths, out, rows).unwrap_or_else(|e| panic!("{body}: {e}"))
}

/// As [`map`], with the error of loading.
pub fn try_map(body: &str, widths: &[usize], out: usize, rows: &[Vec<u64>]) -> Result<Vec<u64>, LoadError> {
    let n = rows.len();
    let names = ["a", "b", "c", "e"];
    let reg = |w: usize| {
        if w == 8 {
            "b64"
        } else if w == 4 {
            "b32"
        } else {
            "b16"
        }
    };
    let mut text = String::from(
        ".version 8.5\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 in, .param .u64 out, .param .u32 n) {\n",
    );
    text += SCRATCH;
    text += &format!(".reg .{} %d; .reg .b32 %i, %n; .reg .b64 %in, %out, %at; .reg .pred %q;\n", reg(out));
    for (name, w) in names.iter().zip(widths) {
        text += &format!(".reg .{} %{name};\n", reg(*w));
    }
    text += "ld.param.u64 %in, [in];\nld.param.u64 %out, [out];\nld.param.u32 %n, [n];\nmov.u32 %i, %ctaid.x;\nmov.u32 %d1, %tid.x;\n";
    text = text.replace(".reg .b32 %i, %n;", ".reg .b32 %i, %n, %d1;");
    text += "mad.lo.u32 %i, %i, 64, %d1;\nsetp.ge.u32 %q, %i, %n;\n@%q bra DONE;\n";
    for (k, (name, w)) in names.iter().zip(widths).enumerate() {
        text += &format!(
            "mad.wide.u32 %at, %i, {}, %in;\nld.global.{} %{name}, [%at+{}];\n",
            8 * widths.len(),
            load(*w),
            8 * k
        );
    }
    text += body;
    text += &format!("\nmad.wide.u32 %at, %i, 8, %out;\nst.global.{} [%at], %d;\nDONE:\nret;\n}}\n", load(out));
    let device = Device::new(Arch::SM_90, Options::default());
    let module = device.load_module(&text)?;
    let bytes: Vec<u8> = rows.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
    let input = device.alloc(bytes.len() as u64).unwrap();
    device.write(input, &bytes).unwrap();
    let output = device.alloc(8 * n as u64).unwrap();
    device.memset(output, &[0], 8 * n as u64).unwrap();
    let params =
        [input.to_le_bytes().to_vec(), output.to_le_bytes().to_vec(), (n as u32).to_le_bytes().to_vec()].concat();
    let config = LaunchConfig::new([(n as u32).div_ceil(64), 1, 1], [64, 1, 1]);
    let f = module.function("k").unwrap();
    device.launch(&f, &config, &params).unwrap_or_else(|e| panic!("{body}: {e}"));
    let mut raw = vec![0; 8 * n];
    device.read(output, &mut raw).unwrap();
    Ok(raw.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect())
}

/// Launches a whole kernel `k` over zeroed 32-bit words `out` (its only parameter) and gives them back.
pub fn kernel(
    text: &str,
    arch: Arch,
    grid: u32,
    block: u32,
    shared: u32,
    words: usize,
) -> (Vec<u32>, Result<LaunchReport, Fault>) {
    kernel_with(text, arch, grid, block, shared, words, Options::default())
}

pub fn kernel_with(
    text: &str,
    arch: Arch,
    grid: u32,
    block: u32,
    shared: u32,
    words: usize,
    options: Options,
) -> (Vec<u32>, Result<LaunchReport, Fault>) {
    let device = Device::new(arch, options);
    let target = if arch == Arch::SM_90 { "sm_90a" } else { arch.name };
    let text = format!(".version 8.5\n.target {target}\n.address_size 64\n{text}");
    let module = device.load_module(&text).unwrap_or_else(|e| panic!("{e}"));
    let out = device.alloc_named(4 * words as u64, "out").unwrap();
    device.memset(out, &[0], 4 * words as u64).unwrap();
    let f = module.function("k").unwrap();
    let result =
        device.launch(&f, &LaunchConfig::new([grid, 1, 1], [block, 1, 1]).with_shared(shared), &out.to_le_bytes());
    let mut raw = vec![0; 4 * words];
    device.read(out, &mut raw).unwrap();
    (raw.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect(), result)
}

/// Launches a whole kernel `k(in, out)` in one block over 32-bit words; `out` starts as zeros.
pub fn transform(text: &str, block: u32, shared: u32, input: &[u32], words: usize) -> Vec<u32> {
    let device = Device::new(Arch::SM_90, Options::default());
    let text = format!(".version 8.5\n.target sm_90a\n.address_size 64\n{text}");
    let module = device.load_module(&text).unwrap_or_else(|e| panic!("{e}"));
    let bytes: Vec<u8> = input.iter().flat_map(|w| w.to_le_bytes()).collect();
    let from = device.alloc_named(bytes.len().max(4) as u64, "in").unwrap();
    device.write(from, &bytes).unwrap();
    let out = device.alloc_named(4 * words as u64, "out").unwrap();
    device.memset(out, &[0], 4 * words as u64).unwrap();
    let f = module.function("k").unwrap();
    let params = [from.to_le_bytes(), out.to_le_bytes()].concat();
    let config = LaunchConfig::new([1; 3], [block, 1, 1]).with_shared(shared);
    device.launch(&f, &config, &params).unwrap_or_else(|e| panic!("{e}"));
    let mut raw = vec![0; 4 * words];
    device.read(out, &mut raw).unwrap();
    raw.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The start of a kernel for [`transform`]: `%r0` is the thread, `%rd0` and `%rd1` are `in` and `out`.
pub const PROLOGUE: &str = ".visible .entry k(.param .u64 in, .param .u64 out) {\n\
    .reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<512>; .reg .b64 %rd<32>; .reg .f32 %f<32>; .reg .f64 %fd<64>;\n\
    ld.param.u64 %rd0, [in]; ld.param.u64 %rd1, [out]; mov.u32 %r0, %tid.x;\n";

/// Reproducible random numbers: a multiplicative congruential generator.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    pub fn below(&mut self, n: u32) -> u32 {
        self.next() % n
    }
}
