//! All given cases, in the usual order of blocks and warps and in others.

use cuda_sim::{Options, Sanitizer, case};
use std::path::{Path, PathBuf};

fn cases() -> Vec<PathBuf> {
    directories("tests/cases", 18)
}

fn directories(name: &str, count: usize) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let mut all: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    all.retain(|p| p.is_dir());
    all.sort();
    assert_eq!(all.len(), count);
    all
}

fn all_pass(options: Options) {
    for dir in cases() {
        let o = case::run(&dir, None, options.clone()).unwrap();
        assert!(o.passed, "{} {options:?}: {}\n{}", o.name, o.summary, o.details);
    }
}

#[test]
fn cases_pass() {
    all_pass(Options::default());
}

#[test]
fn cases_pass_in_other_orders() {
    for seed in 1..4 {
        all_pass(Options { seed: Some(seed), ..Options::default() });
    }
    all_pass(Options { threads: 1, counters: true, ..Options::default() });
}

#[test]
fn positive_cases_pass_without_the_sanitizer() {
    for dir in cases() {
        if !dir.file_name().unwrap().to_str().unwrap().starts_with("neg_") {
            let o = case::run(&dir, None, Options { sanitizer: Sanitizer::OFF, ..Options::default() }).unwrap();
            assert!(o.passed, "{}: {}\n{}", o.name, o.summary, o.details);
        }
    }
}

#[test]
fn a_negative_case_fails_when_the_check_is_off() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/neg_race_shared_sm80");
    let o = case::run(&dir, None, Options { sanitizer: Sanitizer::OFF, ..Options::default() }).unwrap();
    assert!(!o.passed, "{}", o.summary);
}

#[test]
fn reports_name_the_place() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/neg_oob_read_sm80");
    let o = case::run(&dir, None, Options::default()).unwrap();
    for part in
        ["bad_oob_read", "block [3, 0, 0]", "thread [231, 0, 0]", "read of 4 bytes", "0 bytes after the end of x"]
    {
        assert!(o.details.contains(part), "{part} is not in: {}", o.details);
    }
}

/// Kernels by Triton for several architectures: wgmma with tensor copies, flash attention, scan, sort, atomics. The
/// expected values are float64 numpy.
#[test]
fn triton_cases_pass() {
    for dir in directories("tests/triton_cases", 27) {
        for seed in [None, Some(5)] {
            let options = Options { seed, counters: true, ..Options::default() };
            let o = case::run(&dir, None, options).unwrap();
            assert!(o.passed, "{}: {}\n{}", o.name, o.summary, o.details);
        }
    }
}
