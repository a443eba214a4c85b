//! Every class of fault, end to end: a wrong kernel fails with the CUDA error a GPU would give and a report that says
//! why; its corrected twin passes.

mod common;

use common::kernels::{bytes, floats, random};
use common::{child, compile, is_child};
use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
use std::path::PathBuf;

const SOURCE: &str = include_str!("../../tests/kernels/faults.cu");

/// Runs a kernel of the file on 128 numbers. The error of the first call that has one, and what later calls give.
fn launch(kernel: &str, faulty: bool) -> Result<Vec<f32>, (u32, u32)> {
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let ptx = compile(SOURCE, "compute_80", &[if faulty { "FAULTY=1" } else { "FAULTY=0" }]);
    let function = context.load_module(ptx.into()).unwrap().load_function(kernel).unwrap();
    let x = stream.clone_htod(&bytes(&random(128, 9))).unwrap();
    // SAFETY: what the kernel leaves unwritten is reported.
    let mut y = unsafe { stream.alloc::<u8>(512) }.unwrap();
    let mut builder = stream.launch_builder(&function);
    let n = 128i32;
    builder.arg(&mut y).arg(&x).arg(&n);
    let config = LaunchConfig { grid_dim: (2, 1, 1), block_dim: (64, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: the arguments are those of the kernel's header, in order.
    let launched = unsafe { builder.launch(config) }.map(|_| ());
    match launched {
        Err(e) => Err((e.0 as u32, stream.synchronize().unwrap_err().0 as u32)),
        Ok(()) => Ok(floats(&stream.clone_dtoh(&y).unwrap())),
    }
}

fn report(test: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("cuda-sim-{}-{test}.jsonl", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

/// Reads a file of reports and removes it.
fn lines(path: &PathBuf) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let _ = std::fs::remove_file(path);
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// What the right kernel makes of x.
fn expected(kernel: &str) -> Vec<f32> {
    let mut want = random(128, 9);
    match kernel {
        "race_shared" | "race_shared_reuse" => want.chunks_mut(64).for_each(<[f32]>::reverse),
        "race_global" => want[0] += want[0],
        "warp_hazard" => want.chunks_mut(2).for_each(<[f32]>::reverse),
        "lock" => want[0] += want[64],
        "last_block" => want[0] = want.chunks(64).map(|block| block.iter().sum::<f32>()).sum(),
        "release_acquire" => want.copy_within(..64, 64),
        _ => {}
    }
    want
}

/// The wrong kernel gives `code`, once from the launch and from then on from every call, and one report of `class`
/// with `words`; the right one gives x back and no report.
fn twins(test: &str, kernel: &str, code: u32, class: &str, words: &[&str]) {
    if is_child() {
        if std::env::var_os("FAULTY").is_some() {
            assert_eq!(launch(kernel, true), Err((code, code)));
        } else {
            assert_eq!(launch(kernel, false).unwrap(), expected(kernel));
        }
        return;
    }
    let path = report(test);
    let file = path.to_str().unwrap();
    let budget = ("CUDA_SIM_BUDGET", "100000");
    let out = child(test, &[("FAULTY", "1"), ("CUDA_SIM_REPORT", file), budget], true);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}\n{stderr}", String::from_utf8_lossy(&out.stdout));
    let found = lines(&path);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0]["event"], "fault");
    assert_eq!((&found[0]["class"], &found[0]["kernel"]), (&class.into(), &kernel.into()));
    assert_eq!(found[0]["cuda_error"], code);
    let text = found[0]["reports"][0]["text"].as_str().unwrap();
    for word in words {
        assert!(text.contains(word), "no `{word}` in: {text}");
        assert!(stderr.contains(word), "no `{word}` on standard error: {stderr}");
    }
    assert!(found[0]["reports"][0]["line"].as_u64().unwrap() > 0, "no PTX line: {}", found[0]);

    let twin = child(test, &[("CUDA_SIM_REPORT", file), ("CUDA_SIM_EXIT_CODE", "97"), budget], true);
    let stderr = String::from_utf8_lossy(&twin.stderr);
    assert!(twin.status.success(), "{}\n{stderr}", String::from_utf8_lossy(&twin.stdout));
    assert_eq!(lines(&path), Vec::<serde_json::Value>::new(), "the corrected kernel is accused");

    // The same wrong kernel makes the process fail when asked to.
    let failed = child(test, &[("FAULTY", "1"), ("CUDA_SIM_EXIT_CODE", "97"), budget], true);
    assert_eq!(failed.status.code(), Some(97));
}

macro_rules! fault {
    ($test:ident, $code:literal, $class:literal, $($words:literal),*) => {
        #[test]
        fn $test() {
            twins(stringify!($test), stringify!($test), $code, $class, &[$($words),*]);
        }
    };
}

fault!(out_of_bounds, 700, "oob_global", "block", "thread", "512 bytes");
fault!(out_of_bounds_shared, 700, "oob_shared", "block", "thread");
fault!(out_of_bounds_local, 700, "oob_local", "block", "thread");
fault!(misaligned, 716, "misaligned", "block", "thread");
fault!(misaligned_shared, 716, "misaligned", "block", "thread");
fault!(uninitialised_global, 719, "uninitialised_global", "block", "thread");
fault!(uninitialised_shared, 719, "uninitialised_shared", "block", "thread");
fault!(uninitialised_local, 719, "uninitialised_local", "block", "thread");
fault!(race_shared, 719, "data_race_shared", "block");
fault!(race_shared_reuse, 719, "data_race_shared", "block");
fault!(warp_hazard, 719, "data_race_shared", "block", "warp");
fault!(race_global, 719, "data_race_global", "block");
fault!(lock, 719, "data_race_global", "block");
fault!(last_block, 719, "data_race_global", "block");
fault!(release_acquire, 719, "data_race_global", "block");
fault!(barrier_divergence, 719, "barrier_divergence", "block");
fault!(barrier_too_large, 719, "barrier_divergence", "block");
fault!(deadlock, 719, "barrier_divergence", "block");
fault!(waits_for_ever, 702, "timeout", "block");
fault!(async_copy, 719, "async_copy_hazard", "block");
fault!(async_copy_groups, 719, "async_copy_hazard", "block");
fault!(endless, 702, "timeout", "block");
fault!(trap, 719, "trap", "block");

/// Locks, the block that finishes last, releases and acquires, barriers of parts of a block: right code is not accused,
/// whatever the order of blocks and warps.
#[test]
fn correct_synchronisation_is_not_accused_in_any_order() {
    let test = "correct_synchronisation_is_not_accused_in_any_order";
    if is_child() {
        for kernel in
            ["lock", "last_block", "release_acquire", "waits_for_ever", "deadlock", "warp_hazard", "async_copy_groups"]
        {
            assert_eq!(launch(kernel, false).unwrap(), expected(kernel), "{kernel}");
        }
        return;
    }
    for seed in 1..=6 {
        let out = child(test, &[("CUDA_SIM_SEED", &seed.to_string()), ("CUDA_SIM_EXIT_CODE", "97")], true);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "seed {seed}: {}\n{stderr}", String::from_utf8_lossy(&out.stdout));
    }
}

#[test]
fn a_leak_is_reported_when_the_context_ends() {
    let test = "a_leak_is_reported_when_the_context_ends";
    if is_child() {
        let context = CudaContext::new(0).unwrap();
        let stream = context.default_stream();
        let x = stream.clone_htod(&[1u8; 300]).unwrap();
        if std::env::var_os("FAULTY").is_some() {
            x.leak();
        }
        return;
    }
    let path = report(test);
    let file = path.to_str().unwrap();
    let out = child(test, &[("FAULTY", "1"), ("CUDA_SIM_REPORT", file), ("CUDA_SIM_EXIT_CODE", "97")], true);
    assert_eq!(out.status.code(), Some(97));
    let found = lines(&path);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((&found[0]["event"], &found[0]["bytes"]), (&"leak".into(), &300.into()));
    assert!(String::from_utf8_lossy(&out.stderr).contains("300 bytes"));

    let silent = [("FAULTY", "1"), ("CUDA_SIM_SANITIZER", "-leaks"), ("CUDA_SIM_EXIT_CODE", "97")];
    assert!(child(test, &silent, true).status.success());
    assert!(child(test, &[("CUDA_SIM_EXIT_CODE", "97")], true).status.success());
}

#[test]
fn a_leak_is_reported_at_exit_when_the_context_stays() {
    let test = "a_leak_is_reported_at_exit_when_the_context_stays";
    if is_child() {
        let context = CudaContext::new(0).unwrap();
        std::mem::forget(context.default_stream().clone_htod(&[1u8; 300]).unwrap());
        return;
    }
    let out = child(test, &[("CUDA_SIM_EXIT_CODE", "97")], true);
    assert_eq!(out.status.code(), Some(97));
    assert!(String::from_utf8_lossy(&out.stderr).contains("leak: 300 bytes"));
}

#[test]
fn an_unwritten_copy_is_reported() {
    let test = "an_unwritten_copy_is_reported";
    if is_child() {
        let stream = CudaContext::new(0).unwrap().default_stream();
        // SAFETY: reading it is the mistake that must be reported; the simulator gives zeros.
        let x = unsafe { stream.alloc::<u8>(64) }.unwrap();
        stream.clone_dtoh(&x).unwrap();
        return;
    }
    let out = child(test, &[("CUDA_SIM_EXIT_CODE", "97")], true);
    assert_eq!(out.status.code(), Some(97));
    assert!(String::from_utf8_lossy(&out.stderr).contains("memory that nobody wrote"));
    let silent = [("CUDA_SIM_SANITIZER", "-unwritten_copies"), ("CUDA_SIM_EXIT_CODE", "97")];
    assert!(child(test, &silent, true).status.success());
}

#[test]
fn memory_used_after_it_was_freed_is_named_as_such() {
    let test = "memory_used_after_it_was_freed_is_named_as_such";
    if is_child() {
        let context = CudaContext::new(0).unwrap();
        let stream = context.default_stream();
        let ptx = compile(SOURCE, "compute_80", &["FAULTY=0"]);
        let function = context.load_module(ptx.into()).unwrap().load_function("out_of_bounds").unwrap();
        let x = stream.clone_htod(&bytes(&random(128, 9))).unwrap();
        let mut y = stream.alloc_zeros::<u8>(512).unwrap();
        let address = {
            use cudarc::driver::DevicePtr;
            x.device_ptr(&stream).0
        };
        drop(x);
        let n = 128i32;
        let mut builder = stream.launch_builder(&function);
        builder.arg(&mut y).arg(&address).arg(&n);
        let config = LaunchConfig { grid_dim: (2, 1, 1), block_dim: (64, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the dangling pointer is the mistake that the simulator must catch.
        assert_eq!(unsafe { builder.launch(config) }.unwrap_err().0 as u32, 700);
        return;
    }
    let out = child(test, &[], true);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{stderr}");
    assert!(stderr.contains("which was freed"), "{stderr}");
}

#[test]
fn a_context_can_be_made_anew_after_a_fault() {
    if is_child() {
        // The first is dropped with its sticky error before the second is made.
        assert_eq!(launch("out_of_bounds", true), Err((700, 700)));
        assert_eq!(launch("out_of_bounds", false).unwrap(), random(128, 9));
        return;
    }
    let out = child("a_context_can_be_made_anew_after_a_fault", &[], true);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}\n{stderr}", String::from_utf8_lossy(&out.stdout));
    assert!(!stderr.contains("leak"), "{stderr}");
}
