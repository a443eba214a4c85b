//! Shared by the driver's tests: processes of their own, NVRTC, and the kernels with their expected results.
#![allow(dead_code)] // each test file uses a part

pub mod kernels;
pub mod raw;

use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Set in a child process.
const CHILD: &str = "DRIVER_TEST_CHILD";

/// Where `scripts/fetch-nvrtc` puts NVRTC.
pub fn nvrtc_folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/nvrtc");
    assert!(
        folder.join("libnvrtc.so.13").is_file(),
        "NVRTC is missing in {}: run scripts/fetch-nvrtc",
        folder.display()
    );
    folder.canonicalize().unwrap()
}

/// The folder of the built `libcuda.so`: cargo builds examples together with tests.
pub fn driver_folder() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let folder = exe.parent().unwrap().parent().unwrap().join("examples");
    assert!(
        folder.join("libcuda.so").is_file(),
        "there is no libcuda.so in {}: run cargo build -p cuda-sim-driver --example cuda",
        folder.display()
    );
    folder
}

/// Runs one test of this file in a process of its own, in which cudarc finds the simulator and NVRTC. `variables` are
/// added to the environment; `on_path` says whether the library path leads to both.
pub fn child(test: &str, variables: &[(&str, &str)], on_path: bool) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(CHILD, "1");
    for (name, _) in std::env::vars() {
        if name.starts_with("CUDA_SIM_") {
            command.env_remove(name);
        }
    }
    command.env_remove("LD_LIBRARY_PATH");
    if on_path {
        let path = [driver_folder(), nvrtc_folder()];
        command.env("LD_LIBRARY_PATH", std::env::join_paths(path).unwrap());
    }
    command.envs(variables.iter().copied());
    let out = command.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    // A test that was not found passes: that must not count.
    assert!(text.contains("running 1 test"), "{test} is no test of this file:\n{text}");
    out
}

/// True in the process that `child` started.
pub fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Runs `body` in a process of its own. Whatever the simulator finds (a fault, a leak, an unwritten copy) fails it.
pub fn own_process(test: &str, variables: &[(&str, &str)], body: impl FnOnce()) {
    if is_child() {
        return body();
    }
    let variables = [&[("CUDA_SIM_EXIT_CODE", "97")], variables].concat();
    let out = child(test, &variables, true);
    assert!(
        out.status.success(),
        "{test} ended with {}\n{}\n{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

/// PTX of a kernel file for `arch` (`compute_80`, ...).
pub fn compile(source: &str, arch: &'static str, defines: &[&str]) -> String {
    nvrtc_folder();
    let options = CompileOptions {
        arch: Some(arch),
        options: defines.iter().map(|d| format!("-D{d}")).collect(),
        ..CompileOptions::default()
    };
    compile_ptx_with_opts(source, options).unwrap_or_else(|e| panic!("{e:?}")).to_src()
}

/// A kernel's source text.
#[macro_export]
macro_rules! source {
    ($name:literal) => {
        include_str!(concat!("../../tests/kernels/", $name, ".cu"))
    };
}
