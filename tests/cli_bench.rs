//! `dtr-fused bench` as a user runs it, on the CPU.

#[allow(dead_code)] // every test file uses what it needs
mod program;

use program::{fails, run, succeeds};

/// The report of a run that is as short as can be.
fn bench(args: &[&str]) -> serde_json::Value {
    let place = tempfile::tempdir().unwrap();
    let short = ["bench", "--device", "cpu", "--runs", "1", "--json"];
    serde_json::from_str(&succeeds(run(place.path(), &[&short, args].concat()))).unwrap()
}

#[test]
fn a_published_model_of_another_depth_is_timed_on_latents() {
    let report = bench(&["--model", "DiT-S/8", "--depth", "1", "--batch-size", "2"]);
    assert_eq!([&report["image_size"], &report["in_channels"], &report["num_classes"]], [32, 4, 1000]);
    assert_eq!(report["model"], "custom");
    let report = bench(program::TINY);
    assert_eq!([&report["image_size"], &report["in_channels"], &report["num_classes"]], [8, 1, 10]);
}

#[test]
fn the_numbers_of_a_report_agree() {
    let number = |report: &serde_json::Value, key: &str| report[key].as_f64().unwrap_or_else(|| panic!("no {key}"));
    let all = |routing| {
        let report = bench(&[program::TINY, &["--routing", routing, "--beta", "0.5"]].concat());
        let of = |key| number(&report, key);
        let near = |a: f64, b: f64| assert!((a - b).abs() <= 1e-9 * b.abs(), "{a} for {b}: {report}");
        near(of("images_per_s") * of("step_seconds"), 16.0);
        near(of("step_gflop_per_s") * of("step_seconds"), of("step_gflop"));
        // A backward pass takes twice as much as a forward pass.
        near(3.0 * of("forward_gflop_per_s") * of("forward_seconds"), of("step_gflop"));
        [of("step_gflop"), of("step_gflop_saved")]
    };
    let [dense, none] = all("dense");
    let [done, saved] = all("sublayer");
    assert_eq!(none, 0.0);
    assert!((done + saved - dense).abs() <= 1e-9 * dense && saved > 0.2 * dense, "{done} + {saved} for {dense}");
}

#[test]
fn parts_of_a_step_need_less_memory() {
    let sizes = ["--batch-size", "256", "--image-size", "16", "--depth", "2", "--hidden-size", "64"];
    let peak = |parts: &str| {
        let report = bench(&[&sizes[..], &["--grad-accumulation", parts]].concat());
        assert_eq!(report["grad_accumulation"].to_string(), parts);
        report["peak_memory_mb"].as_f64()
    };
    // Where the system tells.
    if let (Some(whole), Some(parts)) = (peak("1"), peak("8")) {
        assert!(parts < 0.5 * whole, "{parts} MB in parts, {whole} MB at once");
    }
}

#[test]
fn a_profile_tells_where_the_time_of_a_step_goes() {
    let place = tempfile::tempdir().unwrap();
    let bench = [&["bench", "--device", "cpu", "--runs", "1"], program::TINY].concat();
    let text = succeeds(run(place.path(), &[&bench[..], &["--profile"]].concat()));
    let (_, table) = text.split_once("\noperation ").unwrap_or_else(|| panic!("no table: {text}"));
    for (operation, pass) in [
        ("ln_linear", "forward"),
        ("ln_linear", "backward"),
        ("attention", "forward"),
        ("attention", "backward"),
        ("linear_residual", "backward"),
        ("patch_embed", "backward"),
        ("adamw", "update"),
    ] {
        let is = |line: &&str| line.starts_with(&format!("{operation} ")) && line.contains(pass);
        let line = table.lines().find(is).unwrap_or_else(|| panic!("no {operation} {pass}: {table}"));
        // Calls, milliseconds, share, and work a second.
        let numbers: Vec<f64> =
            line.split(pass).last().unwrap().split_whitespace().map(|x| x.parse().unwrap()).collect();
        assert!(numbers.len() == 5 && numbers[0] >= 1.0 && numbers[2] <= 100.0, "{line}");
    }
    assert!(table.contains("everything else"), "{table}");
    assert!(!succeeds(run(place.path(), &bench)).contains("operation "), "a profile that nobody asked for");
}

#[test]
fn what_the_cpu_cannot_time_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let bench = |args: &[&str]| run(place.path(), &[&["bench"], program::TINY, args].concat());
    let in_bf16 = [&["bench", "--device", "cpu", "--precision", "bf16"], program::TINY].concat();
    let output = program::command(place.path(), &in_bf16).env("DTR_CPU", "avx2").output().unwrap();
    fails(output, 2, &["the CPU computes in bf16 only with AMX"]);
    fails(bench(&["--device", "cpu", "--grad-accumulation", "3"]), 2, &["it must divide batch_size 16"]);
    fails(bench(&["--init-from", "weights.safetensors"]), 2, &["--init-from is of no use"]);
}
