//! `dtr-fused kernels`: what the assembler says of every kernel, on every architecture.

mod common;
#[allow(dead_code)] // every test file uses what it needs
mod program;

use common::cuda::nvrtc_folder;
use program::{command, fails, run, succeeds};

#[test]
fn no_kernel_spills_and_products_leave_room_for_eight_warps() {
    let place = tempfile::tempdir().unwrap();
    // What is said of sm_89 is what is said of sm_86.
    for arch in ["sm_80", "sm_86", "sm_90", "sm_120"] {
        let args = ["kernels", "--json", "--arch", arch, "--model", "DiT-XL/2", "--model", "DiT-S/2"];
        let mut command = command(place.path(), &args);
        command.env("DTR_NVRTC_FOLDER", nvrtc_folder()).env("DTR_KERNEL_CACHE", place.path().join("kernels"));
        let output = command.output().unwrap();
        let steps: serde_json::Value = serde_json::from_str(&succeeds(output)).unwrap();
        let mut products = 0;
        for step in steps.as_array().unwrap() {
            let kernels = step["kernels"].as_array().unwrap();
            for row in kernels {
                let label = format!("{arch}, {}: {row}", step["model"]);
                assert_eq!(row["spills"], 0, "{label}");
                assert_eq!(row["serialized"], false, "{label}");
                assert!(row["registers"].as_u64().unwrap() > 0, "{label}");
                assert!(row["resident_warps"].as_u64().unwrap() >= 8, "{label}");
                products += usize::from(row["kernel"].as_str().unwrap().ends_with("_weight"));
            }
            assert!(kernels.len() > 20, "{arch}: {} kernels", kernels.len());
        }
        assert!(products > 0);
    }
}

#[test]
fn what_cannot_be_compiled_for_is_refused() {
    let place = tempfile::tempdir().unwrap();
    fails(run(place.path(), &["kernels", "--arch", "sm_70"]), 2, &["sm_70", "sm_80"]);
    fails(run(place.path(), &["kernels", "--batch-size", "0"]), 2, &["batch-size", "0"]);
    fails(run(place.path(), &["kernels", "--routing", "spiral"]), 2, &["spiral"]);
    fails(run(place.path(), &["kernels", "--model", "DiT-Q/2"]), 2, &["DiT-Q/2"]);
}
