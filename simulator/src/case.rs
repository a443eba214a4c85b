//! Case directories: a kernel, how to launch it, its inputs, and what must come out.
//!
//! A directory holds `kernel.ptx`, `manifest.json`, `inputs.safetensors` and `expected.safetensors`.

use crate::{Arch, Device, LaunchConfig, LaunchReport, Options};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

#[derive(Deserialize)]
struct Manifest {
    name: String,
    entry: String,
    target: String,
    grid: [u32; 3],
    block: [u32; 3],
    #[serde(default = "one")]
    cluster: [u32; 3],
    shared_dynamic_bytes: u32,
    params: Vec<Param>,
    buffers: BTreeMap<String, Buffer>,
    outputs: BTreeMap<String, Tolerance>,
    negative: Option<String>,
    #[serde(default)]
    ptxas: Option<Ptxas>,
}

fn one() -> [u32; 3] {
    [1; 3]
}

#[derive(Deserialize)]
struct Ptxas {
    registers: Option<u32>,
}

#[derive(Deserialize)]
struct Param {
    bytes: u64,
    name: String,
    kind: String,
    tensor: Option<String>,
    dtype: Option<String>,
    value: Option<serde_json::Value>,
    hex: Option<String>,
    bytes_per_block: Option<u64>,
}

#[derive(Deserialize)]
struct Buffer {
    bytes: u64,
    init: String,
}

#[derive(Deserialize)]
struct Tolerance {
    atol: f64,
    rtol: f64,
}

/// How a case ended.
#[derive(Debug)]
pub struct Outcome {
    /// Name in the manifest.
    pub name: String,
    /// Whether it did what the manifest says.
    pub passed: bool,
    /// One line for the table.
    pub summary: String,
    /// The sanitizer's text, or where outputs differ.
    pub details: String,
    /// Work of a launch that ended.
    pub report: Option<LaunchReport>,
}

/// Largest file that is read, and most of all buffers, bytes.
const MAX_FILE: u64 = 4 << 30;

fn read(dir: &Path, name: &str) -> Result<Vec<u8>, String> {
    let path = dir.join(name);
    let fail = |e: std::io::Error| format!("{}: {e}", path.display());
    let bytes = std::fs::metadata(&path).map_err(fail)?.len();
    if bytes > MAX_FILE {
        return Err(format!("{}: {bytes} bytes are too many", path.display()));
    }
    std::fs::read(&path).map_err(fail)
}

/// Runs the case in `dir`. `arch` overrides the GPU that the manifest's target implies. An error is a case that cannot
/// be run at all.
pub fn run(dir: &Path, arch: Option<Arch>, options: Options) -> Result<Outcome, String> {
    let text = read(dir, "manifest.json")?;
    let m: Manifest = serde_json::from_slice(&text).map_err(|e| format!("{}/manifest.json: {e}", dir.display()))?;
    let arch = match arch {
        Some(a) => a,
        None => Arch::by_name(&m.target).ok_or_else(|| format!("{}: target {} is not simulated", m.name, m.target))?,
    };
    let ptx = String::from_utf8(read(dir, "kernel.ptx")?).map_err(|_| format!("{}: kernel.ptx is not text", m.name))?;
    let device = Device::new(arch, options);
    let failed = |summary: String, details: String| Outcome {
        name: m.name.clone(),
        passed: false,
        summary,
        details,
        report: None,
    };
    let module = match device.load_module(&ptx) {
        Ok(module) => module,
        Err(e) => return Ok(failed("refused at load".into(), e.to_string())),
    };
    let Some(function) = module.function(&m.entry) else {
        return Err(format!("{}: there is no kernel {}", m.name, m.entry));
    };
    let inputs = read(dir, "inputs.safetensors")?;
    let inputs = SafeTensors::deserialize(&inputs).map_err(|e| format!("{}: inputs.safetensors: {e}", m.name))?;
    let blocks = m.grid.iter().fold(1u64, |n, g| n.saturating_mul(u64::from(*g)));
    let scratch = m.params.iter().filter_map(|p| p.bytes_per_block).map(|n| n.saturating_mul(blocks));
    let bytes = m.buffers.values().map(|b| b.bytes).chain(scratch).fold(0u64, u64::saturating_add);
    if bytes > MAX_FILE {
        return Err(format!("{}: {bytes} bytes of buffers and scratch are too many", m.name));
    }
    let mut addresses = BTreeMap::new();
    for (name, b) in &m.buffers {
        let address = device.alloc_named(b.bytes, name).map_err(|e| format!("{}: buffer {name}: {e}", m.name))?;
        if b.init == "fill_0xFF" {
            device.memset(address, &[0xff], b.bytes).map_err(|e| e.to_string())?;
            device.poison(address, b.bytes).map_err(|e| e.to_string())?;
        } else {
            let t = inputs.tensor(name).map_err(|e| format!("{}: input {name}: {e}", m.name))?;
            if t.data().len() as u64 != b.bytes {
                return Err(format!(
                    "{}: input {name} has {} bytes, the manifest says {}",
                    m.name,
                    t.data().len(),
                    b.bytes
                ));
            }
            device.write(address, t.data()).map_err(|e| e.to_string())?;
        }
        addresses.insert(name.as_str(), address);
    }
    let params = parameters(&m, &device, &addresses, &function, blocks)?;
    let mut config = LaunchConfig::new(m.grid, m.block).with_shared(m.shared_dynamic_bytes);
    config.cluster = m.cluster;
    config.registers = m.ptxas.as_ref().and_then(|p| p.registers).filter(|r| *r > 0);
    let launched = device.launch(&function, &config, &params);
    let outcome = |passed, summary: String, details: String, report| Outcome {
        name: m.name.clone(),
        passed,
        summary,
        details,
        report,
    };
    match (&m.negative, launched) {
        (Some(class), Err(fault)) => {
            let exactly = fault.reports.iter().all(|r| r.class.name() == class);
            let summary =
                if exactly { format!("reports {class}") } else { format!("reports {}, not {class}", fault.class) };
            Ok(outcome(exactly, summary, fault.text, None))
        }
        (Some(class), Ok(report)) => {
            Ok(outcome(false, format!("reports nothing, not {class}"), String::new(), Some(report)))
        }
        (None, Err(fault)) => Ok(outcome(false, format!("reports {}", fault.class), fault.text, None)),
        (None, Ok(report)) => {
            let problems = compare(dir, &m, &device, &addresses)?;
            let summary = if problems.is_empty() {
                format!("{} outputs agree", m.outputs.len())
            } else {
                "outputs differ".into()
            };
            Ok(outcome(problems.is_empty(), summary, problems.join("\n"), Some(report)))
        }
    }
}

fn parameters(
    m: &Manifest,
    device: &Device,
    addresses: &BTreeMap<&str, u64>,
    function: &crate::Function,
    blocks: u64,
) -> Result<Vec<u8>, String> {
    let mut out = vec![0u8; function.param_bytes() as usize];
    if m.params.len() != function.params().len() {
        return Err(format!("{}: {} parameters, the kernel takes {}", m.name, m.params.len(), function.params().len()));
    }
    for (p, slot) in m.params.iter().zip(function.params()) {
        let fail = |what: &str| format!("{}: parameter {}: {what}", m.name, p.name);
        let bytes: Vec<u8> = match p.kind.as_str() {
            "buffer" => {
                let name = p.tensor.as_deref().unwrap_or(&p.name);
                addresses.get(name).ok_or_else(|| fail("its buffer does not exist"))?.to_le_bytes().to_vec()
            }
            "null" => vec![0; 8],
            "scratch" => {
                let n = p.bytes_per_block.unwrap_or(0).saturating_mul(blocks);
                device.alloc_named(n, &p.name).map_err(|e| fail(&e.to_string()))?.to_le_bytes().to_vec()
            }
            "bytes" => hex(p.hex.as_deref().unwrap_or("")).ok_or_else(|| fail("its hex text is wrong"))?,
            "scalar" => {
                let value = p.value.as_ref().ok_or_else(|| fail("it has no value"))?;
                scalar(p.dtype.as_deref().unwrap_or("i32"), value)
                    .ok_or_else(|| fail("its value does not fit its type"))?
            }
            _ => return Err(fail("its kind is unknown")),
        };
        let at = slot.offset as usize;
        if bytes.len() != slot.bytes as usize || bytes.len() as u64 != p.bytes {
            return Err(fail(&format!("{} bytes, the kernel takes {}", bytes.len(), slot.bytes)));
        }
        out[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    Ok(out)
}

fn scalar(dtype: &str, v: &serde_json::Value) -> Option<Vec<u8>> {
    let int = v.as_i64().or_else(|| v.as_u64().map(|u| u as i64));
    Some(match dtype {
        "f32" => (v.as_f64()? as f32).to_le_bytes().to_vec(),
        "f64" => v.as_f64()?.to_le_bytes().to_vec(),
        "i64" | "u64" => int?.to_le_bytes().to_vec(),
        "i32" | "u32" => (int? as i32).to_le_bytes().to_vec(),
        "i16" | "u16" => (int? as i16).to_le_bytes().to_vec(),
        "i8" | "u8" | "bool" => vec![int.or(v.as_bool().map(i64::from))? as u8],
        _ => return None,
    })
}

fn hex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()).collect()
}

fn compare(dir: &Path, m: &Manifest, device: &Device, addresses: &BTreeMap<&str, u64>) -> Result<Vec<String>, String> {
    let expected = read(dir, "expected.safetensors")?;
    let expected = SafeTensors::deserialize(&expected).map_err(|e| format!("{}: expected.safetensors: {e}", m.name))?;
    let mut problems = Vec::new();
    if m.outputs.is_empty() {
        problems.push("no output is compared".to_string());
    }
    for (name, tolerance) in &m.outputs {
        let t = expected.tensor(name).map_err(|e| format!("{}: expected {name}: {e}", m.name))?;
        let no_buffer = || format!("{}: output {name} is no buffer", m.name);
        let buffer = m.buffers.get(name).ok_or_else(no_buffer)?;
        let address = addresses.get(name.as_str()).ok_or_else(no_buffer)?;
        if t.data().len() as u64 != buffer.bytes {
            problems.push(format!("{name}: {} bytes are expected of a buffer of {}", t.data().len(), buffer.bytes));
            continue;
        }
        let mut got = vec![0u8; t.data().len()];
        device.read(*address, &mut got).map_err(|e| format!("{}: output {name}: {e}", m.name))?;
        if let Some(problem) = differ(t.dtype(), &got, t.data(), tolerance) {
            problems.push(format!("{name}: {problem}"));
        }
    }
    Ok(problems)
}

/// Compares element by element; `None` if all agree.
fn differ(dtype: Dtype, got: &[u8], expected: &[u8], t: &Tolerance) -> Option<String> {
    let size = dtype.bitsize() / 8;
    if size == 0 || size > 8 {
        return Some(format!("elements of {dtype:?} cannot be compared"));
    }
    let (mut wrong, mut first, mut worst) = (0u64, None, 0f64);
    for (i, (g, e)) in got.chunks_exact(size).zip(expected.chunks_exact(size)).enumerate() {
        let exact = t.atol == 0.0 && t.rtol == 0.0;
        if exact && g == e && !number(dtype, g).is_nan() {
            continue;
        }
        let (g, e) = (number(dtype, g), number(dtype, e));
        let error = (g - e).abs();
        // A NaN is wrong, and so are infinities, but for those that agree and have no difference to measure.
        let agree = (error.is_finite() && error <= t.atol + t.rtol * e.abs()) || (g == e && !exact);
        if !agree {
            wrong += 1;
            worst = worst.max(error);
            first.get_or_insert((i, g, e));
        }
    }
    let (i, g, e) = first?;
    Some(format!(
        "{wrong} of {} elements are wrong, the first at {i}: {g} instead of {e}; largest error {worst:e}",
        expected.len() / size
    ))
}

fn number(dtype: Dtype, b: &[u8]) -> f64 {
    let raw = b.iter().rev().fold(0u64, |v, x| v << 8 | u64::from(*x));
    use crate::numeric::*;
    let float = |f: Format| f64::from_bits(convert(f, raw, F64, Round::Rn, false));
    match dtype {
        Dtype::F64 => f64::from_bits(raw),
        Dtype::F32 => float(F32),
        Dtype::F16 => float(F16),
        Dtype::BF16 => float(BF16),
        Dtype::F8_E4M3 => float(E4M3),
        Dtype::F8_E5M2 => float(E5M2),
        Dtype::I8 => f64::from(raw as i8),
        Dtype::I16 => f64::from(raw as i16),
        Dtype::I32 => f64::from(raw as i32),
        Dtype::I64 => raw as i64 as f64,
        _ => raw as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_agree_within_the_tolerance() {
        let wrong = |got: f32, expected: f32, atol: f64, rtol: f64| {
            differ(Dtype::F32, &got.to_le_bytes(), &expected.to_le_bytes(), &Tolerance { atol, rtol }).is_some()
        };
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        for (got, expected) in [(1.0, 1.0), (1.01, 1.0), (inf, inf), (-inf, -inf)] {
            assert!(!wrong(got, expected, 0.0, 0.02), "{got} instead of {expected}");
        }
        for (got, expected) in [(1.03, 1.0), (1.0, inf), (-inf, inf), (inf, 1.0), (nan, 1.0), (1.0, nan), (nan, nan)] {
            assert!(wrong(got, expected, 0.0, 0.02), "{got} instead of {expected}");
        }
        assert!(!wrong(inf, inf, 0.0, 0.0) && wrong(1.0, 1.000_000_1, 0.0, 0.0) && wrong(nan, nan, 0.0, 0.0));
    }
}
