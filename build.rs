//! Reads the signatures of the CUDA kernels, so that launches can be checked against them, and puts their texts into the
//! program. Needs no CUDA: kernels are compiled at run time.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=kernels");
    let folder = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo")).join("kernels");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.expect("a folder's entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu" || e == "cuh"))
        .collect();
    files.sort();
    let mut sources = String::from("pub(super) static SOURCES: &[(&str, &str)] = &[\n");
    let mut signatures = String::from("pub(super) static SIGNATURES: &[Signature] = &[\n");
    for path in files {
        println!("cargo:rerun-if-changed={}", path.display());
        let name = path.file_name().and_then(|n| n.to_str()).expect("kernel files have ASCII names");
        writeln!(sources, "    ({name:?}, include_str!({:?})),", path.display().to_string()).unwrap();
        if let Some(file) = name.strip_suffix(".cu") {
            let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            signatures += &kernels(file, &without_comments(&text));
        }
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("set by cargo"));
    let generated = format!("{sources}];\n\n{signatures}];\n");
    write_if_changed(&out.join("kernels.rs"), &generated);
}

fn write_if_changed(path: &Path, text: &str) {
    if std::fs::read_to_string(path).is_ok_and(|old| old == text) {
        return;
    }
    std::fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// The text with `//` and `/* */` comments blanked.
fn without_comments(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('/') {
        out += &rest[..at];
        rest = &rest[at..];
        let end = match rest.as_bytes().get(1) {
            Some(b'/') => rest.find('\n').unwrap_or(rest.len()),
            Some(b'*') => rest.find("*/").map_or(rest.len(), |end| end + 2),
            _ => {
                out.push('/');
                1
            }
        };
        rest = &rest[end..];
    }
    out + rest
}

/// One line of the table for each `extern "C" __global__` function.
fn kernels(file: &str, text: &str) -> String {
    let mut table = String::new();
    for (at, _) in text.match_indices("__global__") {
        let before = text[..at].trim_end();
        assert!(before.ends_with("extern \"C\""), "kernels/{file}.cu: every __global__ function must be extern \"C\"");
        let mut head = text[at..].to_string();
        if let Some(bounds) = head.find("__launch_bounds__").filter(|&b| b < head.find('{').unwrap_or(0)) {
            let close = bounds + head[bounds..].find(')').expect("launch bounds end");
            head.replace_range(bounds..=close, "");
        }
        let open = head.find('(').unwrap_or_else(|| panic!("kernels/{file}.cu: no parameters after __global__"));
        let close = open + head[open..].find(')').expect("parameters end");
        let name = head[..open].split_whitespace().last().expect("a kernel has a name").to_string();
        let parameters: Vec<String> = head[open + 1..close]
            .split(',')
            .filter(|p| !p.trim().is_empty())
            .map(|p| {
                parameter(p).unwrap_or_else(|| panic!("kernels/{file}.cu, {name}: cannot read the parameter '{p}'"))
            })
            .collect();
        writeln!(
            table,
            "    Signature {{ file: {file:?}, kernel: {name:?}, parameters: &[{}] }},",
            parameters.join(", ")
        )
        .unwrap();
    }
    table
}

/// A parameter as an entry of the table: its name and what may be given for it.
fn parameter(text: &str) -> Option<String> {
    let spaced = text.replace('*', " * ");
    let words: Vec<&str> = spaced
        .split_whitespace()
        .filter(|w| !matches!(*w, "const" | "__restrict__" | "volatile" | "__grid_constant__"))
        .collect();
    let (name, kind) = words.split_last()?;
    let kind = match kind {
        ["elem", "*"] => "Buffer(None)",
        ["float", "*"] => "Buffer(Some(DType::F32))",
        ["double", "*"] => "Buffer(Some(DType::F64))",
        ["bf16", "*"] => "Buffer(Some(DType::Bf16))",
        ["int", "*"] => "Buffer(Some(DType::I32))",
        ["unsigned", "int", "*"] => "Buffer(Some(DType::U32))",
        ["TensorMap"] => "Map",
        ["int"] => "I32",
        ["unsigned", "int"] => "U32",
        ["float"] => "F32",
        ["double"] => "F64",
        ["unsigned", "long", "long"] => "U64",
        _ => return None,
    };
    Some(format!("(\"{name}\", Kind::{kind})"))
}
