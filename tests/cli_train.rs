//! `dtr-fused train` as a user runs it: killed, interrupted, resumed, twice at once.

mod program;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use program::{command, fails, run, stderr, succeeds, train};

const STEPS: &[&str] = &["--steps", "24", "--checkpoint-every", "3", "--log-every", "2", "--sample-every", "12"];

/// Everything that two runs of the same configuration must share, byte by byte.
fn result(run: &Path) -> Vec<(String, Vec<u8>)> {
    let checkpoint = run.join("checkpoints/0000024");
    let files = ["model.safetensors", "ema.safetensors", "optimizer.safetensors"].map(|name| checkpoint.join(name));
    let pictures = ["samples/0000012.png", "samples/0000024.png"].map(|name| run.join(name));
    let mut result: Vec<_> = files
        .iter()
        .chain(&pictures)
        .map(|path| {
            let name = path.strip_prefix(run).unwrap().display().to_string();
            (name, fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        })
        .collect();
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    for line in metrics.lines() {
        let mut line: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
        line.remove("images_per_s").expect("a speed");
        result.push(("metrics.jsonl".into(), serde_json::to_vec(&line).unwrap()));
    }
    result
}

#[track_caller]
fn assert_same(a: &Path, b: &Path) {
    let (a, b) = (result(a), result(b));
    assert_eq!(a.len(), b.len(), "metrics have as many lines");
    for ((name, a), (_, b)) in a.iter().zip(&b) {
        assert!(a == b, "{name} differs");
    }
}

#[test]
fn a_run_killed_again_and_again_ends_in_the_bytes_of_an_uninterrupted_one() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let began = Instant::now();
    succeeds(train(place, &[STEPS, &["--out", "whole"]].concat()));
    // Ever later, so that every part of a run is hit: start, steps, checkpoints, samples.
    let slice = began.elapsed() / 24;
    let (mut kills, mut round) = (0, 1);
    loop {
        let begun = place.join("killed/config.toml").exists();
        let start = [&["train"], program::TINY, STEPS, &["--out", "killed"]].concat();
        let args = if begun { &["train", "--resume", "killed"][..] } else { &start };
        let mut child = command(place, args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        sleep(slice * round);
        round += 1;
        match child.try_wait().unwrap() {
            Some(status) => {
                assert!(status.success(), "{status}");
                break;
            }
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
            }
        }
    }
    assert!(kills >= 3, "only {kills} kills: the test proves little");
    assert_same(&place.join("whole"), &place.join("killed"));
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let place = tempfile::tempdir().unwrap();
    succeeds(train(place.path(), &[STEPS, &["--out", "one", "--threads", "1"]].concat()));
    succeeds(train(place.path(), &[STEPS, &["--out", "three", "--threads", "3"]].concat()));
    assert_same(&place.path().join("one"), &place.path().join("three"));
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_saves_and_goes_on() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    succeeds(train(place, &[STEPS, &["--out", "whole"]].concat()));
    let long = [&["train"], program::TINY, STEPS, &["--out", "cut", "--steps", "1000000"]].concat();
    let mut child = command(place, &long).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    // It trains once its first checkpoint is there.
    let waiting = Instant::now();
    while !place.join("cut/checkpoints/0000003").exists() {
        assert!(waiting.elapsed() < Duration::from_secs(60), "no checkpoint after a minute");
        assert!(child.try_wait().unwrap().is_none(), "it ended before its first checkpoint");
        sleep(Duration::from_millis(1));
    }
    let kill =
        |signal: &str| std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    // A trainer that is already at work on a run keeps others out.
    let second = run(place, &["train", "--resume", "cut"]);
    assert!(kill("-INT").success());
    let said = succeeds(child.wait_with_output().unwrap());
    fails(second, 1, &["cut", "another process"]);
    assert!(said.contains("dtr-fused train --resume cut"), "{said}");
    let step: u64 = said.split_whitespace().find_map(|word| word.parse().ok()).expect("the step in the message");
    assert!(place.join(format!("cut/checkpoints/{step:07}")).exists(), "{said}");
    let more = (step + 2).to_string();
    let said = succeeds(run(place, &["train", "--resume", "cut", "--steps", &more]));
    assert!(said.contains(&format!("cut/samples/{:07}.png", step + 2)), "{said}");
}

#[test]
fn a_run_is_not_overwritten_and_keeps_its_nature() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let output = train(place, &["--out", "run", "--steps", "1"]);
    let first = stderr(&output);
    assert!(first.contains("1797 images of 1 x 8 x 8 in 10 classes from 'digits' -> run"), "{first}");
    let said = succeeds(output);
    assert!(said.ends_with("dtr-fused sample --checkpoint run\n"), "{said}");
    fails(train(place, &["--out", "run", "--steps", "1"]), 2, &["run already holds a run", "--resume", "--out"]);
    fails(run(place, &["train", "--resume", "run", "--beta", "0.5"]), 2, &["beta", "resumed"]);
    fails(run(place, &["train", "--resume", "run", "--model", "DiT-S/2"]), 2, &["resumed"]);
    // The past of a run is not gone on with while its future is there.
    succeeds(train(place, &["--out", "long", "--steps", "4", "--checkpoint-every", "1", "--keep-checkpoints", "4"]));
    let earlier = ["train", "--resume", "long/checkpoints/0000002"];
    fails(run(place, &earlier), 2, &["step 2 is not the last", "0000004"]);
    for later in ["0000003", "0000004"] {
        fs::remove_dir_all(place.join("long/checkpoints").join(later)).unwrap();
    }
    succeeds(run(place, &earlier));
    // A checkpoint that was moved out of its run has no run to go on with.
    fs::rename(place.join("run/checkpoints/0000001"), place.join("moved")).unwrap();
    fails(run(place, &["train", "--resume", "moved"]), 1, &["moved", "outside of its run"]);
    // Killed before its first checkpoint: it starts over.
    fs::remove_dir(place.join("run/checkpoints")).unwrap();
    succeeds(run(place, &["train", "--resume", "run"]));
    assert!(place.join("run/checkpoints/0000001").exists());
}

#[test]
fn steps_that_are_not_finite_stop_the_run_with_a_good_checkpoint() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let diverging =
        ["--lr", "1000", "--warmup-steps", "0", "--steps", "60", "--max-nonfinite-steps", "3", "--out", "run"];
    fails(train(place, &diverging), 1, &["not finite 3 steps in a row", "run", "--lr"]);
    // The checkpoint holds no NaN and no infinity: loading would name them instead of going on to the next bad step.
    fails(run(place, &["train", "--resume", "run"]), 1, &["not finite 4 steps in a row"]);
}

#[test]
fn default_names_are_readable_and_unique() {
    let place = tempfile::tempdir().unwrap();
    for name in ["custom-paper-0001", "custom-paper-0002"] {
        let said = succeeds(train(place.path(), &["--steps", "1"]));
        assert!(said.contains(&format!("runs/{name}/samples/0000001.png")), "{said}");
    }
}

#[test]
fn the_printed_configuration_is_the_configuration() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let printed = succeeds(run(
        place,
        &["train", "--model", "DiT-S/4", "--lr", "3e-5", "--set", "seed=7", "flip=true", "--print-config"],
    ));
    fs::write(place.join("c.toml"), &printed).unwrap();
    assert_eq!(succeeds(run(place, &["train", "--config", "c.toml", "--print-config"])), printed);
    assert!(
        printed.contains("\nlr = 3e-5\n") && printed.contains("\nseed = 7\n") && printed.contains("\nflip = true\n")
    );
    // Flags win over --set, --set over the file.
    let other = succeeds(run(
        place,
        &[
            "train",
            "--config",
            "c.toml",
            "--set",
            "lr=1",
            "seed=8",
            "--set",
            "beta=0.5",
            "--seed",
            "9",
            "--print-config",
        ],
    ));
    assert!(other.contains("\nlr = 1.0\n") && other.contains("\nbeta = 0.5\n") && other.contains("\nseed = 9\n"));
}

#[test]
fn info_shows_runs_and_checkpoints() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    succeeds(train(place, &["--out", "run", "--steps", "3", "--log-every", "1", "--checkpoint-every", "2"]));
    let said = succeeds(run(place, &["info", "run"]));
    for part in [
        "custom (32 wide, 1 blocks, 2 heads, patch 2)",
        "at step 3 of 3",
        "checkpoints/0000002",
        "checkpoints/0000003",
        "parameters",
    ] {
        assert!(said.contains(part), "'{part}' is not in\n{said}");
    }
    let said = succeeds(run(place, &["info", "--tensors", "run/checkpoints/0000002"]));
    assert!(said.contains("blocks.0.attn.qkv.weight") && said.contains("F32 [96, 32]"), "{said}");
    assert!(said.lines().any(|line| line.starts_with("step") && line.ends_with(" 2")), "{said}");
}

/// An `.npy` file of `n` samples of 1 x 8 x 8 (bytes), of which the last has label `last`, and its labels.
fn save_samples(path: &Path, n: usize, last: u8) {
    use dtr_fused::data::npy;
    use dtr_fused::element::Element;
    npy::write(path, Element::U8, &[n, 1, 8, 8], &vec![9; n * 64]).unwrap();
    let labels: Vec<u8> = (0..n).map(|i| if i + 1 == n { last } else { 0 }).collect();
    npy::write(path.with_extension("labels.npy"), Element::U8, &[n], &labels).unwrap();
}

#[test]
fn data_that_were_moved_are_found_again() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    save_samples(&place.join("here.npy"), 20, 3);
    succeeds(train(place, &["--data", "here.npy", "--out", "run", "--steps", "1"]));
    save_samples(&place.join("there.npy"), 20, 3);
    fs::remove_file(place.join("here.npy")).unwrap();
    let resume = |args: &[&str]| run(place, &[&["train", "--resume", "run", "--steps", "2"], args].concat());
    fails(resume(&[]), 1, &["here.npy", "not there", "--data"]);
    // A class more is another model.
    save_samples(&place.join("other.npy"), 20, 4);
    fails(resume(&["--data", "other.npy"]), 1, &["has label 4 for sample 19; labels are 0 to 3"]);
    fails(resume(&["--data", "digits"]), 2, &["1 x 8 x 8 in 10 classes", "begun with 1 x 8 x 8 in 4", "--data"]);
    succeeds(resume(&["--data", "there.npy"]));
    // It is where the run looks from now on.
    succeeds(run(place, &["train", "--resume", "run", "--steps", "3"]));
}
