//! `dtr-fused sample` as a user runs it.

mod program;

use std::fs;
use std::path::Path;

use program::{fails, run, stderr, succeeds, train};

/// A run of a step in `place/run`.
fn short_run(place: &Path, args: &[&str]) {
    succeeds(train(place, &[&["--out", "run", "--steps", "1", "--samples-per-class", "1"], args].concat()));
}

/// `dtr-fused sample` of that run in two denoising steps.
fn sample(place: &Path, args: &[&str]) -> std::process::Output {
    run(place, &[&["sample", "--checkpoint", "run", "--steps", "2"], args].concat())
}

/// Replaces `from` by `to` in the run's configuration and in that of its checkpoint.
fn edit_config(place: &Path, from: &str, to: &str) {
    for file in ["run/config.toml", "run/checkpoints/0000001/config.toml"] {
        let text = fs::read_to_string(place.join(file)).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(place.join(file), text.replace(from, to)).unwrap();
    }
}

#[test]
fn a_run_in_bf16_is_sampled_and_resumed_on_the_cpu() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    short_run(place, &[]);
    succeeds(sample(place, &["--out", "f32.png"]));
    // As a run looks that a GPU trained in bf16.
    edit_config(place, "precision = \"f32\"", "precision = \"bf16\"");
    let output = sample(place, &["--out", "bf16.png", "--device", "cpu"]);
    assert!(stderr(&output).contains("computing in f32: the CPU has no bf16"), "{}", stderr(&output));
    succeeds(output);
    assert!(fs::read(place.join("f32.png")).unwrap() == fs::read(place.join("bf16.png")).unwrap());
    let resume = |more: &[&str]| {
        run(place, &[&["train", "--resume", "run", "--steps", "2", "--device", "cpu"], more].concat())
    };
    fails(resume(&[]), 2, &["the CPU computes in f32 only: give --precision f32"]);
    succeeds(resume(&["--precision", "f32"]));
}
