//! `--device`: what is missing or does not fit is one sentence, and `auto` falls back to the CPU with one that says why.

mod common;
#[allow(dead_code)] // every test file uses what it needs
mod program;

use common::cuda::{nvrtc_folder, simulator};
use program::{command, fails, stderr, succeeds};
use std::fs;
use std::path::Path;
use std::process::Output;

/// Variables that say where the libraries are.
const DRIVER: &str = "DTR_CUDA_LIBRARY";
const NVRTC: &str = "DTR_NVRTC_FOLDER";

/// `dtr-fused train` of a tiny model for a step, with the simulated driver and NVRTC but for `variables`.
fn train(place: &Path, variables: &[(&str, &Path)], args: &[&str]) -> Output {
    let few = ["--steps", "1", "--batch-size", "2", "--samples-per-class", "1", "--sample-classes", "1"];
    run(place, variables, &[&["train"], program::TINY, &few, args].concat())
}

/// The program with the simulated driver and NVRTC but for `variables`.
fn run(place: &Path, variables: &[(&str, &Path)], args: &[&str]) -> Output {
    command(place, args)
        .env(DRIVER, simulator())
        .env(NVRTC, nvrtc_folder())
        .env("DTR_KERNEL_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels"))
        .envs(variables.iter().copied())
        .output()
        .expect("the program starts")
}

#[test]
fn auto_takes_the_device_that_is_there() {
    let place = tempfile::tempdir().unwrap();
    let output = train(place.path(), &[], &["--device", "auto"]);
    let text = stderr(&output);
    succeeds(output);
    assert!(text.contains("computing on CUDA simulator (sm_80"), "{text}");
    assert!(text.contains("memory of the device: ") && text.contains("activations "), "{text}");
}

#[test]
fn libraries_that_are_missing_or_something_else_are_named() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let garbage = place.join("garbage.so");
    fs::write(&garbage, "not a library").unwrap();
    let cut = place.join("cut.so");
    fs::write(&cut, &fs::read(simulator()).unwrap()[..5000]).unwrap();
    let (nowhere, empty) = (place.join("nowhere.so"), place.join("empty"));
    fs::create_dir(&empty).unwrap();
    let damaged = place.join("damaged");
    fs::create_dir(&damaged).unwrap();
    fs::write(damaged.join("libnvrtc-builtins.so.13.0"), "not a library").unwrap();
    let another = place.join("another");
    fs::create_dir(&another).unwrap();
    let nvrtc = nvrtc_folder();
    for name in ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"] {
        // The builtins under both names: a library without NVRTC's functions.
        fs::copy(nvrtc.join("libnvrtc-builtins.so.13.0"), another.join(name)).unwrap();
    }
    let builtins = nvrtc.join("libnvrtc-builtins.so.13.0");
    for (variable, path, says) in [
        (DRIVER, &nowhere, ["nowhere.so", "cannot be loaded"]),
        (DRIVER, &garbage, ["garbage.so", "cannot be loaded"]),
        (DRIVER, &cut, ["cut.so", "cannot be loaded"]),
        (DRIVER, &builtins, ["libnvrtc-builtins", "it has no cuInit"]),
        (NVRTC, &empty, ["libnvrtc-builtins.so.13.0", "cannot be loaded"]),
        (NVRTC, &damaged, ["libnvrtc-builtins.so.13.0", "cannot be loaded"]),
        (NVRTC, &another, ["libnvrtc.so.13", "it has no nvrtcVersion"]),
    ] {
        fails(train(place, &[(variable, path)], &["--device", "cuda"]), 1, &[&[variable], &says[..]].concat());
        assert!(!place.join("runs").exists(), "no run was begun");
    }
    // The same, where the CPU will do.
    for (variable, path) in [(DRIVER, &garbage), (NVRTC, &empty)] {
        let output = train(place, &[(variable, path)], &["--device", "auto"]);
        let text = stderr(&output);
        succeeds(output);
        let lines: Vec<&str> = text.lines().filter(|line| line.contains("computing on the CPU: ")).collect();
        assert!(lines.len() == 1 && lines[0].contains(variable), "{text}");
        fs::remove_dir_all(place.join("runs")).unwrap();
    }
    let without_amx = ("DTR_CPU", Path::new("avx2"));
    let output = train(place, &[(DRIVER, &garbage), without_amx], &["--device", "auto", "--precision", "bf16"]);
    fails(output, 2, &["garbage.so", "the CPU computes in bf16 only with AMX"]);
}

#[test]
fn devices_and_sizes_that_do_not_exist_are_usage_errors() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    for (args, says) in [
        (&["--device", "cuda:7"][..], "there is no CUDA device 7: the driver sees 1"),
        (&["--device", "cuda:x"], "device is 'cuda:x'"),
        (&["--device", "cudas"], "device is 'cudas'"),
        (&["--device", "cuda", "--hidden-size", "264"], "heads of 132 channels"),
        (&["--device", "cuda", "--precision", "bf16", "--hidden-size", "40"], "the head size is 20, but bf16"),
        (&["--device", "cuda", "--precision", "bf16", "--mlp-ratio", "1.125"], "the MLP size is 36, but bf16"),
    ] {
        fails(train(place, &[], args), 2, &[says]);
    }
    // A driver that cannot start says so in its own words.
    let output = train(place, &[("CUDA_SIM_ARCH", Path::new("sm_70"))], &["--device", "cuda"]);
    fails(output, 2, &["CUDA device 0 cannot be opened"]);
    assert!(!place.join("runs").exists(), "no run was begun");
}

#[test]
fn bench_times_no_simulated_device() {
    let place = tempfile::tempdir().unwrap();
    // `auto` takes the device that is there, as in training.
    for device in ["cuda", "auto"] {
        let output = run(place.path(), &[], &["bench", "--device", device, "--runs", "1"]);
        fails(output, 2, &["times mean nothing on the CUDA simulator", "--device cpu", "cargo bench --bench cuda"]);
    }
}

#[test]
fn every_command_that_computes_says_the_same() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    fs::write(place.join("garbage.so"), "not a library").unwrap();
    succeeds(train(place, &[], &["--device", "cpu", "--out", "run"]));
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/small");
    let golden = golden.to_str().unwrap();
    for args in [
        &["sample", "--checkpoint", "run", "--steps", "2", "--device", "cuda"][..],
        &["parity", golden, "--device", "cuda"],
    ] {
        let output = run(place, &[(DRIVER, &place.join("garbage.so"))], args);
        fails(output, 1, &["garbage.so", "cannot be loaded"]);
    }
}

#[test]
fn a_comparison_of_nothing_is_no_success() {
    let place = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/small");
    let args = ["parity", golden.to_str().unwrap(), "--device", "cuda", "--precision", "bf16"];
    fails(run(place.path(), &[], &args), 1, &["nothing was compared, as 1 cases were left out: see above"]);
}
