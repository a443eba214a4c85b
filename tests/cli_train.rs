//! `dtr-fused train` as a user runs it: killed, interrupted, resumed, twice at once.

mod program;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

#[cfg(unix)]
use libc::{SIGHUP, SIGINT, SIGTERM};

use dtr_fused::data::npy;
use dtr_fused::element::Element;
use dtr_fused::safetensors_file::SafetensorsFile;
use dtr_fused::train::{checkpoint, metrics};
#[cfg(unix)]
use program::kill;
use program::{command, fails, run, stderr, succeeds, train};
use safetensors::tensor::{Dtype, TensorView};

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
        line.remove("seconds").expect("a time");
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
    // Ever later, so that every part of a run is hit: start, steps, checkpoints, samples. The whole run may have been slowed down by
    // other tests.
    let (mut slice, mut kills, mut round) = (began.elapsed() / 24, 0, 1);
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
                if kills >= 3 {
                    break;
                }
                fs::remove_dir_all(place.join("killed")).unwrap();
                (slice, kills, round) = (slice / 2, 0, 1);
            }
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
            }
        }
    }
    assert_same(&place.join("whole"), &place.join("killed"));
}

/// Learned weights of the loss, mirrored images, batches in parts: all of it goes on as if it had not stopped.
#[test]
fn a_run_with_learned_loss_weights_goes_on_bit_for_bit() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let knobs = ["--loss-weight", "uw", "--uw-lr", "0.3", "--flip", "--grad-accumulation", "2", "--grad-clip", "0.5"];
    let start = |steps, out| {
        let more = ["--lr-decay", "constant", "--steps", steps, "--out", out];
        succeeds(train(place, &[STEPS, &knobs, &more].concat()));
    };
    start("24", "whole");
    start("12", "cut");
    succeeds(run(place, &["train", "--resume", "cut", "--steps", "24"]));
    assert_same(&place.join("whole"), &place.join("cut"));
    let state = place.join("cut/checkpoints/0000024/optimizer.safetensors");
    let state = SafetensorsFile::open(state).unwrap();
    for name in ["loss_scale", "m.loss_scale", "v.loss_scale"] {
        let mut numbers = [0.0; 8];
        state.tensor(name).unwrap().to_f32(&mut numbers);
        assert!(numbers.iter().all(|&x| x != 0.0), "{name}: {numbers:?}");
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let place = tempfile::tempdir().unwrap();
    succeeds(train(place.path(), &[STEPS, &["--out", "one", "--threads", "1"]].concat()));
    succeeds(train(place.path(), &[STEPS, &["--out", "three", "--threads", "3"]].concat()));
    assert_same(&place.path().join("one"), &place.path().join("three"));
}

/// Waits until the run of `child` has a checkpoint: then it trains.
#[cfg(unix)]
fn until_a_checkpoint(child: &mut std::process::Child, run: &Path) {
    let waiting = Instant::now();
    let whole = |name: std::ffi::OsString| name.to_str().is_some_and(|name| name.parse::<u64>().is_ok());
    let has_one = || {
        let mut found = fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
        found.any(|entry| whole(entry.file_name()))
    };
    while !has_one() {
        assert!(waiting.elapsed() < Duration::from_secs(60), "no checkpoint after a minute");
        assert!(child.try_wait().unwrap().is_none(), "it ended before its first checkpoint");
        sleep(Duration::from_millis(1));
    }
}

/// The last step of `run` that has a checkpoint.
#[cfg(unix)]
fn last_checkpoint(run: &Path) -> u64 {
    let names = fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter_map(|name| name.to_str()?.parse().ok()).max().expect("a checkpoint")
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_saves_and_goes_on() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    succeeds(train(place, &[STEPS, &["--out", "whole"]].concat()));
    let long = [&["train"], program::TINY, STEPS, &["--out", "cut", "--steps", "1000000"]].concat();
    let mut child = command(place, &long).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    until_a_checkpoint(&mut child, &place.join("cut"));
    // A trainer that is already at work on a run keeps others out.
    let second = run(place, &["train", "--resume", "cut"]);
    kill(SIGINT, &child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "for the shell it was interrupted");
    let said = String::from_utf8(output.stdout).unwrap();
    fails(second, 1, &["cut", "another process"]);
    assert!(said.contains("dtr-fused train --resume cut"), "{said}");
    let step: u64 = said.split_whitespace().find_map(|word| word.parse().ok()).expect("the step in the message");
    assert!(place.join(format!("cut/checkpoints/{step:07}")).exists(), "{said}");
    let more = (step + 2).to_string();
    let said = succeeds(run(place, &["train", "--resume", "cut", "--steps", &more]));
    assert!(said.contains(&format!("cut/samples/{:07}.png", step + 2)), "{said}");
}

#[cfg(unix)]
#[test]
fn a_run_whose_messages_nobody_reads_saves_too() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    // No checkpoint is due: what there is in the end, the signal brought.
    let endless = ["--checkpoint-every", "0", "--log-every", "1", "--steps", "1000000", "--out"];
    // Of two kinds that wait at once, the system does not say which a program gets first.
    let cases = [
        (&[SIGINT][..], &[130][..]),
        (&[SIGTERM], &[143]),
        (&[SIGHUP], &[129]),
        (&[SIGHUP, SIGHUP, SIGTERM], &[129, 143]),
    ];
    for (case, (signals, codes)) in cases.into_iter().enumerate() {
        let out = format!("run{case}");
        let args = [&["train"], program::TINY, &endless, &[&out]].concat();
        let mut child = command(place, &args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // As when a terminal closes, or the program after a pipe ends.
        drop((child.stdout.take(), child.stderr.take()));
        let waiting = Instant::now();
        while fs::read(place.join(&out).join("metrics.jsonl")).map_or(0, |text| text.len()) < 1000 {
            assert!(waiting.elapsed() < Duration::from_secs(60), "it does not train");
            assert!(child.try_wait().unwrap().is_none(), "it ended");
            sleep(Duration::from_millis(1));
        }
        signals.iter().for_each(|&signal| kill(signal, &child));
        let code = child.wait().unwrap().code();
        assert!(code.is_some_and(|code| codes.contains(&code)), "{signals:?}: {code:?}, expected one of {codes:?}");
        let step = last_checkpoint(&place.join(&out));
        let metrics = fs::read_to_string(place.join(&out).join("metrics.jsonl")).unwrap_or_default();
        let logged = metrics
            .lines()
            .last()
            .map_or(0, |line| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap());
        assert!(step == logged && step > 0, "a checkpoint of step {step}, but {logged} were done");
    }
    if let Ok(full) = fs::OpenOptions::new().write(true).open("/dev/full") {
        let args = [&["train"], program::TINY, &["--steps", "2", "--out", "full"]].concat();
        let status = command(place, &args).stdout(Stdio::null()).stderr(full).status().unwrap();
        assert!(status.success(), "{status}");
        assert_eq!(last_checkpoint(&place.join("full")), 2);
    }
}

#[test]
fn pictures_that_cannot_be_made_cost_nothing_and_are_made_later() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    succeeds(train(place, &[STEPS, &["--out", "whole"]].concat()));
    let start: Vec<&str> = STEPS.iter().map(|&word| if word == "24" { "3" } else { word }).collect();
    succeeds(train(place, &[&start, &["--out", "run"][..]].concat()));
    fs::remove_dir_all(place.join("run/samples")).unwrap();
    fs::write(place.join("run/samples"), "in the way").unwrap();
    fs::remove_file(place.join("run/loss.png")).unwrap();
    fs::create_dir(place.join("run/loss.png")).unwrap();
    let resume = |more: &[&str]| run(place, &[&["train", "--resume", "run"], more].concat());
    let output = resume(&["--steps", "24"]);
    let said = program::stderr(&output);
    succeeds(output);
    assert!(said.contains("no samples of step 12") && said.contains("no samples of step 24"), "{said}");
    assert!(said.contains("no curve of the loss") && said.contains("loss.png"), "{said}");
    // As after a kill between a checkpoint and its samples.
    fs::remove_file(place.join("run/samples")).unwrap();
    let said = succeeds(resume(&[]));
    assert!(said.contains("run/samples/0000024.png"), "{said}");
    for file in ["checkpoints/0000024/ema.safetensors", "samples/0000024.png"] {
        let [whole, late] = ["whole", "run"].map(|run| fs::read(place.join(run).join(file)).unwrap());
        assert!(whole == late, "{file} differs");
    }
}

#[cfg(unix)]
#[test]
fn a_signal_ends_sampling() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    // Sampling would take minutes.
    let slow = ["--steps", "3", "--out", "run", "--sample-steps", "1000", "--samples-per-class", "1000"];
    let args = [&["train"], program::TINY, &slow].concat();
    let mut child = command(place, &args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    until_a_checkpoint(&mut child, &place.join("run"));
    kill(SIGINT, &child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(!place.join("run/samples/0000003.png").exists());
    let said = succeeds(run(place, &["train", "--resume", "run", "--sample-steps", "3", "--samples-per-class", "1"]));
    assert!(said.contains("run/samples/0000003.png"), "{said}");
}

#[cfg(unix)]
#[test]
fn signals_that_the_parent_ignores_stay_ignored() {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    // As nohup does for SIGHUP, and a script for Ctrl-C of its jobs in the background.
    let flags = "--checkpoint-every 3 --keep-checkpoints 1 --steps 1000000 --out run";
    let script = format!(
        "trap '' HUP INT; exec '{}' train {} {flags}",
        env!("CARGO_BIN_EXE_dtr-fused"),
        program::TINY.join(" ")
    );
    let mut shell = std::process::Command::new("sh");
    program::heeding_signals(&mut shell);
    shell.args(["-c", &script]).current_dir(place.path()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = shell.spawn().unwrap();
    until_a_checkpoint(&mut child, &run);
    kill(SIGHUP, &child);
    kill(SIGINT, &child);
    // It saves on: the signals did not set the end going.
    let (before, waiting) = (last_checkpoint(&run), Instant::now());
    while last_checkpoint(&run) < before + 9 {
        assert!(waiting.elapsed() < Duration::from_secs(60), "no checkpoints after the signals");
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        sleep(Duration::from_millis(1));
    }
    kill(SIGTERM, &child);
    assert_eq!(child.wait().unwrap().code(), Some(143));
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
    let output = run(place, &["train", "--resume", "run"]);
    assert!(program::stderr(&output).contains("starting it over"), "{}", program::stderr(&output));
    succeeds(output);
    assert!(place.join("run/checkpoints/0000001").exists());
}

#[test]
fn a_resume_that_would_lose_or_change_the_run_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let resume = |more: &[&str]| run(place, &[&["train", "--resume"], more].concat());
    let each = ["--checkpoint-every", "1", "--keep-checkpoints", "9", "--log-every", "1"];
    succeeds(train(place, &[&each[..], &["--steps", "4", "--out", "run"]].concat()));
    let at = |path: &str| place.join("run").join(path);
    let metrics = fs::read(at("metrics.jsonl")).unwrap();

    fails(resume(&["run", "--steps", "3"]), 2, &["steps is 3, but 4 are done"]);
    let said = succeeds(resume(&["run"]));
    assert!(said.starts_with("All 4 steps were done already") && said.contains("--steps"), "{said}");

    // A configuration that was cut, or edited in what a run keeps for life.
    let config = fs::read_to_string(at("config.toml")).unwrap();
    fs::write(at("config.toml"), "").unwrap();
    fails(resume(&["run"]), 1, &["run/config.toml", "no key 'model'"]);
    fs::write(at("config.toml"), config.replace("\nseed = 0\n", "\n")).unwrap();
    fails(resume(&["run"]), 1, &["run/config.toml", "no key 'seed'"]);
    fs::write(at("config.toml"), config.replace("\nseed = 0\n", "\nseed = 1\n")).unwrap();
    fails(resume(&["run"]), 1, &["run/config.toml", "seed is 1", "trained with 0"]);
    fs::write(at("config.toml"), &config).unwrap();

    // Damaged checkpoints: the good one before them is named, and works when they are moved away.
    fs::write(at("checkpoints/0000004/optimizer.safetensors"), "x").unwrap();
    fs::remove_file(at("checkpoints/0000003/model.safetensors")).unwrap();
    fails(
        resume(&["run"]),
        1,
        &["0000004/optimizer.safetensors", "last good one", "checkpoints/0000002", "--resume run"],
    );
    fails(resume(&["run/checkpoints/0000003"]), 1, &["no whole checkpoint", "model.safetensors"]);
    fails(resume(&["run/checkpoints/0000002"]), 2, &["step 2 is not the last"]);
    assert!(!at("checkpoints/0000003/.lock").exists(), "it is no run");
    for step in ["0000003", "0000004"] {
        fs::rename(at("checkpoints").join(step), place.join(step)).unwrap();
    }
    let output = resume(&["run", "--steps", "5"]);
    let said = program::stderr(&output);
    succeeds(output);
    assert!(said.contains("going on after step 2 of 5"), "{said}");

    // All checkpoints moved away.
    fs::rename(at("checkpoints"), place.join("elsewhere")).unwrap();
    fails(resume(&["run"]), 1, &["run/checkpoints", "no checkpoint", "step 5"]);
    let now = fs::read_to_string(at("metrics.jsonl")).unwrap();
    assert_eq!(now.lines().count(), 5);
    assert!(metrics.starts_with(now.lines().next().unwrap().as_bytes()), "the metrics are kept");
}

/// More steps end a cosine later: the rate, which had fallen, rises.
#[test]
fn another_learning_rate_of_a_resumed_run_is_told() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    succeeds(train(place, &["--out", "run", "--steps", "4", "--warmup-steps", "0"]));
    let resumed = |more: &[&str]| {
        let output = run(place, &[&["train", "--resume", "run"], more].concat());
        let said = program::stderr(&output);
        succeeds(output);
        said
    };
    assert!(!resumed(&[]).contains("learning rate"));
    let said = resumed(&["--steps", "8"]);
    assert!(
        said.contains("learning rate goes from 3.00e-4 to 1.35e-3, as its decay now ends after step 8\n"),
        "{said}"
    );
    let said = resumed(&["--steps", "9", "--lr-decay", "constant", "--lr", "1e-3"]);
    assert!(said.contains("the learning rate goes from 3.00e-4 to 1.00e-3\n"), "{said}");
    assert!(!resumed(&["--steps", "10"]).contains("learning rate"));
    // A rate that was constant falls from where it is.
    let begun = ["--out", "stable", "--steps", "4", "--warmup-steps", "0", "--lr-decay", "constant"];
    let output = train(place, &[&begun[..], &["--decay-start", "2"]].concat());
    assert!(stderr(&output).contains("decay_start has no effect: lr_decay is constant"), "{}", stderr(&output));
    succeeds(output);
    let output =
        run(place, &["train", "--resume", "stable", "--steps", "7", "--lr-decay", "linear", "--decay-start", "4"]);
    assert!(
        !stderr(&output).contains("learning rate") && !stderr(&output).contains("no effect"),
        "{}",
        stderr(&output)
    );
    succeeds(output);
    let last = metrics::read(&place.join("stable")).unwrap().pop().unwrap();
    assert!((last.lr - 3e-4).abs() < 1e-12, "{}", last.lr);
    // The reason is another.
    let said = resumed(&["--steps", "20", "--lr-decay", "cosine", "--lr", "0.5"]);
    assert!(said.contains("the learning rate goes from 1.00e-3 to ") && !said.contains("decay now ends"), "{said}");
}

/// Each once, however often the run is resumed there: after a kill, from a checkpoint that was written again, from an earlier one.
#[test]
fn settings_that_a_resume_changes_are_told_and_stay_on_record() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let each = ["--checkpoint-every", "2", "--keep-checkpoints", "9", "--log-every", "4"];
    succeeds(train(place, &[&each[..], &["--steps", "6", "--out", "run"]].concat()));
    let forget = |steps: &[u64]| {
        steps.iter().for_each(|step| fs::remove_dir_all(place.join(format!("run/checkpoints/{step:07}"))).unwrap());
    };
    let resumed = |more: &[&str]| {
        let output = run(place, &[&["train", "--resume", "run"], more].concat());
        let said = stderr(&output);
        succeeds(output);
        said.lines().find(|line| line.starts_with("from step")).unwrap_or_default().to_string()
    };
    let shown = || {
        let info = succeeds(run(place, &["info", "run"]));
        let rows = info.lines().filter_map(|line| line.strip_prefix("resumed       "));
        rows.map(str::to_string).collect::<Vec<_>>()
    };
    let file = place.join("run/changes.jsonl");
    assert_eq!(resumed(&["--threads", "1", "--device", "cpu", "--sample-every", "3"]), "");
    assert!(!file.exists() && shown().is_empty(), "nothing that matters has changed");

    let first = "label_dropout 0.1 -> 0.3, steps 6 -> 8, weight_decay 0.0 -> 0.1";
    let change = ["--steps", "8", "--label-dropout", "0.3", "--weight-decay", "0.1", "--threads", "2"];
    assert_eq!(resumed(&change), format!("from step 6 on: {first}"));
    assert_eq!(shown(), [format!("changed at step 6: {first}")]);
    let lines = fs::read(&file).unwrap();
    assert_eq!(resumed(&[]), "");
    assert_eq!(fs::read(&file).unwrap(), lines);
    // As after a kill before the next checkpoint.
    forget(&[8]);
    assert_eq!(resumed(&[]), format!("from step 6 on: {first}"));
    assert_eq!(
        resumed(&["--steps", "9", "--ema-decay", "0.5"]),
        "from step 8 on: steps 8 -> 9, ema_decay 0.999 -> 0.5"
    );
    let second = "changed at step 8: steps 8 -> 9, ema_decay 0.999 -> 0.5".to_string();
    assert_eq!(shown(), [format!("changed at step 6: {first}"), second]);

    // A line of metrics is due at step 2 now, and so its checkpoint is written again.
    forget(&[4, 6, 8, 9]);
    let earlier = "label_dropout 0.1 -> 0.3, steps 6 -> 9, weight_decay 0.0 -> 0.1, ema_decay 0.999 -> 0.5";
    for _ in 0..2 {
        assert_eq!(resumed(&["--log-every", "2"]), format!("from step 2 on: {earlier}"));
        assert_eq!(shown(), [format!("changed at step 2: {earlier}")]);
        forget(&[4, 6, 8, 9]);
    }
    let back = ["--steps", "6", "--label-dropout", "0.1", "--weight-decay", "0", "--ema-decay", "0.999"];
    assert_eq!(resumed(&back), "");
    assert!(shown().is_empty());
}

/// It goes on as if it had never stopped since.
#[test]
fn the_batch_of_a_resumed_run_may_be_another() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let args = ["--steps", "2", "--warmup-steps", "0", "--lr-decay", "constant", "--checkpoint-every", "1"];
    let resumed = |run_of: &str, more: &[&str]| {
        let output = run(place, &[&["train", "--resume", run_of], more].concat());
        let said = program::stderr(&output);
        succeeds(output);
        said
    };
    for out in ["whole", "parts", "split", "same"] {
        succeeds(train(place, &[&args[..], &["--out", out]].concat()));
    }
    let said = resumed("whole", &["--steps", "6", "--batch-size", "8"]);
    let note = "the batch size goes from 16 to 8: in the order of the samples 16 come again, as after 2 steps of 8\n";
    assert!(said.contains(note), "{said}");
    assert!(resumed("parts", &["--steps", "4", "--batch-size", "8"]).contains(note));
    assert!(!resumed("parts", &["--steps", "6"]).contains("batch size"));
    let files = |run: &str| {
        ["model", "ema", "optimizer"]
            .map(|name| fs::read(place.join(run).join(format!("checkpoints/0000006/{name}.safetensors"))).unwrap())
    };
    assert!(files("whole") == files("parts"));
    assert!(!resumed("same", &["--steps", "6"]).contains("batch size"));
    assert!(files("whole") != files("same"), "the batch is that of before");
    // Parts of a batch change no more than rounding.
    let last = |run: &str| metrics::read(&place.join(run)).unwrap().pop().unwrap().loss.unwrap();
    resumed("split", &["--steps", "6", "--batch-size", "8", "--grad-accumulation", "2"]);
    let (whole, split) = (last("whole"), last("split"));
    assert!((whole - split).abs() <= 1e-5 * whole, "{whole} and {split}");
    fails(run(place, &["train", "--resume", "split", "--batch-size", "7"]), 2, &["it must divide batch_size 7"]);
}

#[test]
fn steps_that_are_not_finite_stop_the_run_with_a_good_checkpoint() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let diverging =
        ["--lr", "1000", "--warmup-steps", "0", "--steps", "60", "--max-nonfinite-steps", "3", "--out", "run"];
    let again =
        "is saved, but the steps before may have ruined its weights: start again with a smaller --lr or --grad-clip 1";
    fails(train(place, &diverging), 1, &["not finite 3 steps in a row; that step ", again]);
    // The checkpoint holds no NaN and no infinity: loading would name them instead of going on to the next bad step.
    fails(run(place, &["train", "--resume", "run"]), 1, &["not finite 3 steps in a row", again]);

    // Whatever is tried then, the checkpoints of before stay, and are named.
    succeeds(train(place, &["--steps", "6", "--checkpoint-every", "3", "--out", "good"]));
    for _ in 0..2 {
        let again = ["train", "--resume", "good", "--checkpoint-every", "0", "--lr", "1000", "--lr-decay", "constant"];
        let output = run(place, &[&again[..], &["--steps", "60", "--max-nonfinite-steps", "3"]].concat());
        let says = "to go on from good/checkpoints/0000006, move those after it away and give --resume good with a smaller --lr";
        fails(output, 1, &["not finite 3 steps in a row", says]);
        assert!(place.join("good/checkpoints/0000003").exists() && place.join("good/checkpoints/0000006").exists());
    }
    // What it says to do helps.
    for (step, path) in checkpoint::list(&place.join("good")).unwrap().into_iter().filter(|(step, _)| *step > 6) {
        fs::rename(path, place.join(format!("ruined-{step}"))).unwrap();
    }
    succeeds(run(place, &["train", "--resume", "good", "--lr", "0.001", "--steps", "8"]));

    // A step whose loss and gradient are finite, but not the weights it makes.
    let decay = ["--lr", "1", "--weight-decay", "1e39", "--warmup-steps", "0", "--steps", "60", "--out", "decay"];
    fails(train(place, &decay), 1, &["decay/checkpoints/0000011", "not finite: training diverged"]);
    assert!(!place.join("decay/checkpoints/0000011").exists());
    fails(train(place, &["--adam-eps", "1e-46"]), 2, &["adam_eps is", "1.2e-38"]);

    // With this seed some samples of the skipped steps have finite losses; no step that is skipped is averaged.
    let partly = [&diverging[..diverging.len() - 1], &["partly", "--seed", "2", "--log-every", "1"]].concat();
    fails(train(place, &partly), 1, &["not finite 3 steps in a row"]);
    let (mut lines, mut skipped) = (0, 0);
    for line in fs::read_to_string(place.join("partly/metrics.jsonl")).unwrap().lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let counts = line["skipped"].as_u64().unwrap() == skipped;
        assert_eq!(line["loss"].is_number(), counts, "{line}");
        skipped = line["skipped"].as_u64().unwrap();
        lines += 1;
    }
    assert!(skipped == 3 && lines > 3, "{skipped} of {lines}");
}

#[test]
fn steps_that_are_left_out_are_counted_on_after_a_resume() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let diverging = ["--lr", "1000", "--lr-decay", "constant", "--warmup-steps", "0", "--max-nonfinite-steps", "3"];
    let diverging = [&diverging[..], &["--log-every", "1"]].concat();
    let output = train(place, &[&diverging[..], &["--steps", "60", "--out", "whole"]].concat());
    let said = stderr(&output);
    fails(output, 1, &["training stopped at step", "not finite 3 steps in a row"]);
    let (_, last) = said.split_once("training stopped at step ").unwrap();
    let last: u64 = last.split(':').next().unwrap().parse().unwrap();
    // Two of the three, and then the third.
    let before = (last - 1).to_string();
    succeeds(train(place, &[&diverging[..], &["--steps", &before, "--out", "cut"]].concat()));
    let output = run(place, &["train", "--resume", "cut", "--steps", "60"]);
    fails(output, 1, &[&format!("training stopped at step {last}:"), "not finite 3 steps in a row"]);
    // They are no updates, whose number AdamW corrects for.
    for out in ["whole", "cut"] {
        let path = place.join(out).join(format!("checkpoints/{last:07}/optimizer.safetensors"));
        let state = SafetensorsFile::open(path).unwrap();
        assert_eq!(state.metadata()["updates"], (last - 3).to_string(), "{out}");
        let shown = succeeds(run(place, &["info", out]));
        let row = |name: &str| shown.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{shown}"));
        assert!(row("step ").ends_with(&format!(" {last}")) && row("skipped").contains(" 3 steps"), "{shown}");
    }
}

/// They are summed over all parts of a run. One of before they were written down has none, and gets none.
#[test]
fn lines_tell_the_seconds_since_the_run_began() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    succeeds(train(place, &["--steps", "4", "--log-every", "2", "--out", "run"]));
    let resume = |steps: &str| succeeds(run(place, &["train", "--resume", "run", "--steps", steps]));
    resume("8");
    let seconds = || metrics::read(&place.join("run")).unwrap().iter().map(|line| line.seconds).collect::<Vec<_>>();
    let found: Vec<f64> = seconds().into_iter().map(Option::unwrap).collect();
    assert!(found.len() == 4 && found[0] > 0.0 && found.windows(2).all(|two| two[0] < two[1]), "{found:?}");
    let path = place.join("run/metrics.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    let old: String = text
        .lines()
        .map(|line| {
            let mut line: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
            line.remove("seconds").unwrap();
            serde_json::to_string(&line).unwrap() + "\n"
        })
        .collect();
    fs::write(&path, &old).unwrap();
    resume("10");
    assert_eq!(seconds(), [None; 5]);
    assert!(fs::read_to_string(&path).unwrap().starts_with(&old));
}

#[test]
fn the_first_batch_is_pictured_by_class() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    // Black ones of class 0, and white ones.
    let labels: Vec<u8> = (0..16).map(|i| i % 2).collect();
    let pixels: Vec<u8> = (0..16 * 64).map(|i| 255 * labels[i / 64]).collect();
    npy::write(place.join("x.npy"), Element::U8, &[16, 1, 8, 8], &pixels).unwrap();
    npy::write(place.join("x.labels.npy"), Element::U8, &[16], &labels).unwrap();
    succeeds(train(place, &["--data", "x.npy", "--steps", "1", "--out", "run"]));
    let picture = image::open(place.join("run/data.png")).unwrap().to_luma8();
    assert_eq!(picture.dimensions(), (8 * 66 + 2, 2 * 66 + 2));
    let shown: Vec<u8> = (0..16).map(|i| picture.get_pixel(30 + i % 8 * 66, 30 + i / 8 * 66).0[0]).collect();
    assert_eq!(shown, [[0; 8], [255; 8]].concat());
}

#[test]
fn checkpoints_are_kept_as_asked() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    for (keep, expected) in [
        (["--keep-checkpoints", "1", "--keep-every", "3"], &[3, 6, 7][..]),
        (["--keep-checkpoints", "3", "--keep-every", "0"], &[5, 6, 7]),
    ] {
        succeeds(train(place, &[&["--steps", "7", "--checkpoint-every", "1", "--out", "run"], &keep[..]].concat()));
        let steps: Vec<u64> = checkpoint::list(&place.join("run")).unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, expected, "{keep:?}");
        fs::remove_dir_all(place.join("run")).unwrap();
    }
}

/// A kill may come between the line of a step and its checkpoint, but not much later.
#[test]
fn a_run_starts_over_only_if_it_never_had_a_checkpoint() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    succeeds(train(place, &["--steps", "4", "--checkpoint-every", "3", "--log-every", "1", "--out", "run"]));
    let lose =
        |path: &str| fs::remove_dir_all(place.join("run/checkpoints")).and_then(|()| fs::remove_file(place.join(path)));
    let resume = || run(place, &["train", "--resume", "run"]);
    // Step 4 was done, so step 3 was saved.
    lose("run/loss.png").unwrap();
    fails(resume(), 1, &["run/checkpoints", "no checkpoint", "step 4"]);
    let metrics = fs::read_to_string(place.join("run/metrics.jsonl")).unwrap();
    let until_3: String = metrics.split_inclusive('\n').take(3).collect();
    fs::write(place.join("run/metrics.jsonl"), &until_3).unwrap();
    // The curve is drawn after a checkpoint.
    fs::write(place.join("run/loss.png"), "").unwrap();
    fails(resume(), 1, &["run/checkpoints", "no checkpoint", "step 3"]);
    fs::remove_file(place.join("run/loss.png")).unwrap();
    let output = resume();
    assert!(stderr(&output).contains("starting it over"), "{}", stderr(&output));
    succeeds(output);
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
    let output = run(place, &["train", "--config", "c.toml", "--model", "digits", "--print-config"]);
    assert!(
        stderr(&output).starts_with("note: ") && stderr(&output).contains("are those of c.toml"),
        "{}",
        stderr(&output)
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
        "cosine schedule, loss weight constant",
        "log_every = 1",
        "checkpoint_every = 2",
    ] {
        assert!(said.contains(part), "'{part}' is not in\n{said}");
    }
    assert!(!said.contains("\nclasses"), "{said}");
    let said = succeeds(run(place, &["info", "--tensors", "run/checkpoints/0000002"]));
    assert!(said.contains("blocks.0.attn.qkv.weight") && said.contains("F32 [96, 32]"), "{said}");
    assert!(said.lines().any(|line| line.starts_with("step") && line.ends_with(" 2")), "{said}");
    save_folders(&place.join("pets"), &["cat", "dog"]);
    succeeds(train(
        place,
        &["--data", "pets", "--image-size", "8", "--steps", "1", "--batch-size", "2", "--out", "pets-run"],
    ));
    let said = succeeds(run(place, &["info", "pets-run"]));
    assert!(said.contains("\nclasses       0 cat, 1 dog\n"), "{said}");
}

/// An `.npy` file of `n` samples of 1 x 8 x 8 (bytes), of which the last has label `last`, and its labels.
fn save_samples(path: &Path, n: usize, last: u8) {
    use dtr_fused::data::npy;
    use dtr_fused::element::Element;
    npy::write(path, Element::U8, &[n, 1, 8, 8], &vec![9; n * 64]).unwrap();
    let labels: Vec<u8> = (0..n).map(|i| if i + 1 == n { last } else { 0 }).collect();
    npy::write(path.with_extension("labels.npy"), Element::U8, &[n], &labels).unwrap();
}

/// A `.safetensors` file of 20 latents of 4 x 4 x 4 with these standard deviations, of two classes.
fn save_distributions(path: &Path, std: Option<f32>) {
    let bytes = |value: &dyn Fn(usize) -> f32| (0..20 * 64).flat_map(|i| value(i).to_le_bytes()).collect::<Vec<u8>>();
    let means = bytes(&|i| (i * 37 % 41) as f32 / 10.0 - 2.0);
    let std = std.map(|std| bytes(&|_| std));
    let labels: Vec<u8> = (0..20).map(|i| i % 2).collect();
    let view = |dtype, shape: &[usize], data| TensorView::new(dtype, shape.to_vec(), data).unwrap();
    let latents = |data| view(Dtype::F32, &[20, 4, 4, 4], data);
    let tensors = [("latents", latents(&means)), ("labels", view(Dtype::U8, &[20], &labels))];
    let std = std.as_ref().map(|std| ("latents_std", latents(std)));
    fs::write(path, safetensors::serialize(tensors.into_iter().chain(std), None).unwrap()).unwrap();
}

/// Of standard deviations of 0 the means are trained on, bit for bit, and of others something else, which a resumed run sees again.
#[test]
fn latents_that_are_distributions_are_trained_on() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let weights = |out: &str, std: Option<f32>, steps: &[&str]| {
        let data = format!("{out}.safetensors");
        save_distributions(&place.join(&data), std);
        let validation = ["--validation-samples", "4", "--checkpoint-every", "2"];
        let output = train(place, &[&["--out", out, "--data", &data, "--steps", steps[0]], &validation[..]].concat());
        assert!(!stderr(&output).contains("standard deviation"), "{}", stderr(&output));
        succeeds(output);
        for steps in &steps[1..] {
            succeeds(run(place, &["train", "--resume", out, "--steps", steps]));
        }
        let model = fs::read(place.join(out).join("checkpoints/0000004/model.safetensors")).unwrap();
        let text = succeeds(run(place, &["validate", "--checkpoint", out, "--json"]));
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        let validated = dtr_fused::train::metrics::read(&place.join(out)).unwrap().pop().unwrap().validation.unwrap();
        assert_eq!(report["loss"].as_f64(), validated.loss);
        (model, validated.loss)
    };
    let plain = weights("plain", None, &["4"]);
    assert!(weights("zero", Some(0.0), &["4"]) == plain);
    let drawn = weights("drawn", Some(0.5), &["4"]);
    assert!(drawn.0 != plain.0 && drawn.1 != plain.1);
    assert!(weights("resumed", Some(0.5), &["2", "4"]) == drawn);
}

/// A folder `place` of a class folder for each of these names, with two images each.
fn save_folders(place: &Path, classes: &[&str]) {
    for class in classes {
        fs::create_dir_all(place.join(class)).unwrap();
        for name in ["a.png", "b.png"] {
            image::RgbImage::new(8, 8).save(place.join(class).join(name)).unwrap();
        }
    }
}

#[test]
fn a_resume_with_other_classes_is_refused_and_with_other_samples_told() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    save_folders(&place.join("photos"), &["ape", "bear", "cat"]);
    // More classes than there are folders are allowed.
    let size = ["--image-size", "8", "--num-classes", "5"];
    succeeds(train(place, &[&["--data", "photos", "--out", "run", "--steps", "1"][..], &size].concat()));
    let resume = |steps: &str| run(place, &["train", "--resume", "run", "--steps", steps]);
    fs::rename(place.join("photos/bear"), place.join("bear")).unwrap();
    fails(resume("2"), 2, &["class 1 of the data 'photos' is 'cat', but was 'bear'", "--data", "new run"]);
    save_folders(&place.join("photos"), &["dog"]);
    fails(resume("2"), 2, &["class 1 of the data 'photos' is 'cat', but was 'bear'"]);
    save_folders(&place.join("photos"), &["bear"]);
    fails(resume("2"), 2, &["class 3 of the data 'photos' is 'dog', but was missing"]);
    fs::remove_dir_all(place.join("photos/dog")).unwrap();
    let output = resume("2");
    assert!(!stderr(&output).contains("samples, but had"), "{}", stderr(&output));
    succeeds(output);
    fs::remove_file(place.join("photos/cat/b.png")).unwrap();
    let output = resume("3");
    assert!(stderr(&output).contains("the data have 5 samples, but had 6"), "{}", stderr(&output));
    succeeds(output);
    // A checkpoint of before this was written down.
    let path = place.join("run/checkpoints/0000003/optimizer.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    for key in [b"\"classes\"", b"\"samples\""] {
        let at = bytes.windows(key.len()).position(|bytes| bytes == key).expect("the key");
        bytes[at + 1] = b'x';
    }
    fs::write(&path, bytes).unwrap();
    fs::remove_dir_all(place.join("photos/cat")).unwrap();
    let output = resume("4");
    assert!(stderr(&output).contains("the data have 2 classes and the model 5"), "{}", stderr(&output));
    succeeds(output);
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
