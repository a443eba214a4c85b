//! The golden cases on a CUDA device: in f32 within their tolerances, in bf16 within three times the error of plain loops on
//! tensors in bf16.

mod common;

use common::cuda::device;
use dtr_fused::backend::Compute;
use dtr_fused::backend::cuda::DType;
use dtr_fused::parity::{Report, Row, check_dir};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn check(cases: &Path, elem: DType) -> Vec<(String, Report)> {
    let compute = Compute::Cuda { device: Arc::new(device()), elem };
    let cases = check_dir(cases, &compute).unwrap();
    cases.into_iter().map(|(dir, report)| (dir.file_name().unwrap().to_string_lossy().into_owned(), report)).collect()
}

/// A copy of the golden cases without the files that `leave_out` names by case and file.
fn copy_without(leave_out: impl Fn(&str, &str) -> bool) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for case in std::fs::read_dir(golden()).unwrap() {
        let (from, case) = case.map(|case| (case.path(), case.file_name().into_string().unwrap())).unwrap();
        if !from.is_dir() {
            continue; // its README
        }
        std::fs::create_dir(copy.path().join(&case)).unwrap();
        for file in std::fs::read_dir(from).unwrap() {
            let (from, name) = file.map(|file| (file.path(), file.file_name().into_string().unwrap())).unwrap();
            if !leave_out(&case, &name) {
                std::fs::copy(from, copy.path().join(&case).join(name)).unwrap();
            }
        }
    }
    copy
}

/// (The trajectories of the small case are the same code, and take the simulator half a minute less.)
#[test]
fn golden_cases_agree_in_f32() {
    let cases = copy_without(|case, name| case == "a" && name.starts_with("sampling"));
    let mut compared = 0;
    for (case, report) in check(cases.path(), DType::F32) {
        assert!(report.passed(), "{case}\n{report}");
        compared += report.compared();
    }
    assert!(compared > 1000, "{compared} tensors");
}

/// Outputs, activations, losses and gradients of every routing. (Trajectories and training in bf16 take the simulator
/// minutes; `dtr-fused parity --device cuda --precision bf16` compares them too.)
#[test]
fn golden_cases_agree_in_bf16_as_well_as_plain_loops_do() {
    let models = ["a", "c", "d", "small"];
    let cases = copy_without(|case, name| {
        !models.contains(&case) || ["sampling", "train"].iter().any(|long| name.starts_with(long))
    });
    for tables in ["masks", "nll", "schedules"] {
        std::fs::remove_dir(cases.path().join(tables)).unwrap();
    }
    let (mut compared, mut widest) = (0, 0.0f64);
    for (case, report) in check(cases.path(), DType::Bf16) {
        if case == "small" {
            // Heads of 14 channels, which bf16 does not have.
            assert!(report.left_out() && report.to_string().contains("head size is 14"), "{report}");
            continue;
        }
        assert!(report.passed(), "{case}\n{report}");
        compared += report.compared();
        let tolerances = report.rows.iter().filter_map(|row| match row {
            Row::Compared { name, check } if name == "forward out" => Some(check.tolerance),
            _ => None,
        });
        widest = tolerances.fold(widest, f64::max);
    }
    assert!(compared > 600, "{compared} tensors");
    // Not so wide that anything passes: a number in bf16 is good for 1 / 256.
    assert!(widest > 1e-3 && widest < 0.05, "outputs may be off by {widest}");
}
