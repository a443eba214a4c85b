//! Bad input: one clear sentence, exit code 2 for a request that makes no sense and 1 for one that fails, never a panic.

mod program;

use std::fs;
use std::path::{Path, PathBuf};

use dtr_fused::data::npy;
use dtr_fused::element::Element;
use program::{command, fails, run, succeeds, train};

#[test]
fn values_out_of_range_are_usage_errors() {
    let place = tempfile::tempdir().unwrap();
    for (flag, value, says) in [
        ("--beta", "0", "beta is 0"),
        ("--beta", "1.5", "beta is 1.5"),
        ("--beta", "NaN", "beta is NaN"),
        ("--batch-size", "0", "batch_size is 0"),
        ("--num-heads", "3", "num_heads 3 does not divide hidden_size 32"),
        ("--hidden-size", "34", "multiple of 4"),
        ("--image-size", "9", "patch_size 2 does not divide the image size 9"),
        ("--image-size", "16", "image_size is 16, but the data 'digits' have 8"),
        ("--num-classes", "3", "num_classes is 3"),
        ("--steps", "-5", "whole number"),
        ("--seed", "9223372036854775808", "from 0 to 9223372036854775807"),
        ("--mlp-ratio", "0.01", "MLP of width 0"),
        ("--steps", "0", "steps is 0"),
        ("--lr", "fast", "number such as"),
        ("--routing", "papr", "one of paper, sublayer"),
        ("--model", "DiT-M/2", "there is no model 'DiT-M/2'"),
        ("--device", "tpu", "device is 'tpu'"),
        ("--hidden-size", "1000000", "parameters"),
        ("--loss-weight", "p3", "p2-GAMMA-K"),
        ("--set", "batchsize=3", "did you mean 'batch_size'?"),
        ("--set", "lr", "KEY=VALUE"),
        ("--batchsize", "3", "'--batch-size'"),
    ] {
        fails(train(place.path(), &[flag, value]), 2, &[says]);
    }
    for wrong in ["sse", "AVX2"] {
        let output = command(place.path(), &["bench"]).env("DTR_CPU", wrong).output().unwrap();
        fails(output, 2, &["DTR_CPU", wrong, "baseline, avx2, avx512 or amx"]);
    }
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0, "nothing was written");
}

#[test]
fn commands_that_do_not_exist_are_usage_errors() {
    let place = tempfile::tempdir().unwrap();
    fails(run(place.path(), &["trian"]), 2, &["'trian'", "train"]);
    fails(run(place.path(), &["info"]), 2, &["<DIR|FILE>"]);
    fails(run(place.path(), &["completions", "tcsh"]), 2, &["tcsh", "bash"]);
}

#[test]
fn configuration_files_are_checked() {
    let place = tempfile::tempdir().unwrap();
    let with = |text: &[u8]| {
        fs::write(place.path().join("c.toml"), text).unwrap();
        run(place.path(), &["train", "--config", "c.toml"])
    };
    fails(with(b"learning_rte = 3\n"), 2, &["'learning_rte'", "c.toml"]);
    fails(with(b"beta = 0\n"), 2, &["beta is 0"]);
    fails(with(b"steps = [3]\n"), 1, &["c.toml", "'steps'", "flat"]);
    fails(with(b"steps 3\n"), 1, &["c.toml", "line 1"]);
    fails(with(b"\xff\xfe"), 1, &["c.toml", "UTF-8"]);
    fails(with(&vec![b'#'; 2 << 20]), 1, &["c.toml", "longer than"]);
    fails(run(place.path(), &["train", "--config", "none.toml"]), 1, &["none.toml", "No such file"]);
    fails(run(place.path(), &["train", "--config", "."]), 1, &["not a regular file"]);
}

#[test]
fn data_that_are_not_there_or_empty_are_named() {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("empty")).unwrap();
    fs::write(place.path().join("notes.txt"), "hello").unwrap();
    for data in ["nowhere", "nowhere.npy", "empty", "notes.txt"] {
        fails(train(place.path(), &["--data", data]), 1, &[data]);
    }
    let data = |name: &str, element, shape: &[usize], bytes| {
        let path = place.path().join(name);
        npy::write(&path, element, shape, &vec![0; shape.iter().product::<usize>() * bytes]).unwrap();
        npy::write(path.with_extension("labels.npy"), Element::U8, &shape[..1], &vec![0; shape[0]]).unwrap();
        train(place.path(), &["--data", name])
    };
    fails(data("last.npy", Element::F32, &[2, 8, 8, 3], 4), 2, &["look like [N, H, W, C]", "[N, 3, 8, 8]"]);
    fails(data("oblong.npy", Element::F32, &[2, 3, 8, 6], 4), 2, &["8 x 6", "crop them first"]);
    assert!(!place.path().join("runs").exists(), "no run was begun");
}

#[test]
fn directories_that_cannot_take_a_run_are_named() {
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("file"), "").unwrap();
    fs::create_dir(place.path().join("full")).unwrap();
    fs::write(place.path().join("full/thesis.tex"), "").unwrap();
    fails(train(place.path(), &["--out", "file/run"]), 1, &["file/run"]);
    fails(train(place.path(), &["--out", "full"]), 1, &["full", "not empty"]);
    // Nobody, root included, can make a directory there.
    fails(train(place.path(), &["--out", "/proc/run"]), 1, &["/proc/run"]);
    assert_eq!(fs::read_dir(place.path().join("full")).unwrap().count(), 1);
}

#[cfg(unix)]
#[test]
fn a_read_only_directory_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let place = tempfile::tempdir().unwrap();
    let closed = place.path().join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    // Root writes everywhere, so it takes another user to see a closed door.
    let root = fs::write(closed.join("probe"), "").is_ok();
    let tiny = program::TINY.join(" ");
    let program = env!("CARGO_BIN_EXE_dtr-fused");
    let output = if root {
        let _ = fs::remove_file(closed.join("probe"));
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let copy = place.path().join("program");
        fs::copy(program, &copy).unwrap();
        let command = format!("exec '{}' train {tiny} --out '{}/run'", copy.display(), closed.display());
        let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", &command];
        std::process::Command::new("setpriv").args(nobody).current_dir("/").output().expect("setpriv of util-linux")
    } else {
        train(place.path(), &["--out", "closed/run"])
    };
    fails(output, 1, &["closed/run", "Permission denied"]);
}

/// A run of two steps in `place/run`; returns its last checkpoint.
fn short_run(place: &Path) -> PathBuf {
    succeeds(train(place, &["--out", "run", "--steps", "2"]));
    place.join("run/checkpoints/0000002")
}

#[test]
fn checkpoints_that_are_missing_or_damaged_are_named() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let resume = || run(place, &["train", "--resume", "run", "--steps", "3"]);
    let sample = || run(place, &["sample", "--checkpoint", "run", "--steps", "2", "--num", "10", "--out", "grid.png"]);
    fails(resume(), 1, &["run", "No such file"]);
    fails(sample(), 1, &["run", "No such file"]);
    fs::create_dir(place.join("run")).unwrap();
    fails(resume(), 1, &["run", "neither a run nor a checkpoint"]);
    fails(sample(), 1, &["run", "neither a run nor a checkpoint"]);
    fails(run(place, &["info", "run"]), 1, &["run", "neither a run nor a checkpoint"]);

    let checkpoint = short_run(place);
    for name in ["model.safetensors", "ema.safetensors", "optimizer.safetensors"] {
        let file = checkpoint.join(name);
        let good = fs::read(&file).unwrap();
        let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
        let says = |damaged: &[u8], says: &str| {
            fs::write(&file, damaged).unwrap();
            fails(resume(), 1, &[name, says]);
            if name == "ema.safetensors" {
                fails(sample(), 1, &[name, says]);
            }
        };
        says(&good[..good.len() / 2], "");
        says(&good[..5], "5 bytes");
        says(&[&(1u64 << 60).to_le_bytes()[..], &good[8..]].concat(), "1152921504606846976");
        let mut nan = good.clone();
        nan[header + 400..header + 404].copy_from_slice(&f32::NAN.to_le_bytes());
        says(&nan, "NaN");
        fs::remove_file(&file).unwrap();
        fails(resume(), 1, &["run/checkpoints/0000002"]);
        fs::write(&file, &good).unwrap();
    }
    // Another model's weights under this run's configuration.
    succeeds(train(place, &["--out", "other", "--steps", "1", "--hidden-size", "64"]));
    let good = fs::read(checkpoint.join("model.safetensors")).unwrap();
    fs::copy(place.join("other/checkpoints/0000001/model.safetensors"), checkpoint.join("model.safetensors")).unwrap();
    fails(resume(), 1, &["model.safetensors", "has shape", "needs"]);
    fs::write(checkpoint.join("model.safetensors"), good).unwrap();
    succeeds(resume());
}

#[test]
fn labels_out_of_range_are_usage_errors() {
    let place = tempfile::tempdir().unwrap();
    short_run(place.path());
    let sample = |classes| run(place.path(), &["sample", "--checkpoint", "run", "--steps", "2", "--classes", classes]);
    fails(sample("10"), 2, &["10"]);
    fails(sample("x"), 2, &["'x'"]);
    fails(sample("-1"), 2, &["'-1'", "--classes"]);
}

#[test]
fn negative_numbers_reach_the_check_of_their_flag() {
    let place = tempfile::tempdir().unwrap();
    short_run(place.path());
    for (flag, says) in [
        ("--cfg", "--cfg is -1"),
        ("--eta", "eta is -1"),
        ("--num", "'-1' for '--num"),
        ("--seed", "'-1' for '--seed"),
        ("--batch-size", "'-1' for '--batch-size"),
        ("--threads", "'-1' for '--threads"),
    ] {
        fails(run(place.path(), &["sample", "--checkpoint", "run", flag, "-1"]), 2, &[says]);
    }
    fails(run(place.path(), &["bench", "--runs", "-1"]), 2, &["'-1' for '--runs"]);
}

#[cfg(unix)]
#[test]
fn a_full_disk_costs_no_checkpoint() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let checkpoint = short_run(place);
    let before = fs::read(checkpoint.join("optimizer.safetensors")).unwrap();
    // No file may grow beyond half of optimizer.safetensors: the second of the three files fails in the middle.
    let blocks = before.len() / 2 / 512;
    let program = env!("CARGO_BIN_EXE_dtr-fused");
    let limited = format!("ulimit -f {blocks}; exec '{program}' train --resume run --steps 4 --sample-every 0");
    let output = std::process::Command::new("sh").args(["-c", &limited]).current_dir(place).output().unwrap();
    let says = [
        "checkpoints/0000004: the checkpoint cannot be written: ",
        "; step 2 is saved: mend this, then --resume run goes on",
    ];
    fails(output, 1, &says);
    let names: Vec<_> = fs::read_dir(place.join("run/checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["0000002"], "nothing half-written is left");
    assert_eq!(fs::read(checkpoint.join("optimizer.safetensors")).unwrap(), before);
    succeeds(run(place, &["train", "--resume", "run", "--steps", "4"]));

    // Those in the middle do not end the run, and are told.
    let middle =
        "train --hidden-size 32 --depth 1 --num-heads 2 --batch-size 16 --steps 3 --checkpoint-every 1 --out new";
    let limited = format!("ulimit -f {blocks}; exec '{program}' {middle}");
    let output = std::process::Command::new("sh").args(["-c", &limited]).current_dir(place).output().unwrap();
    let said = program::stderr(&output);
    fails(output, 1, &["new/checkpoints/0000003: the checkpoint cannot be written: ", "; no step before is saved"]);
    for step in [1, 2] {
        let told = format!("new/checkpoints/000000{step}: the checkpoint cannot be written: ");
        let line = said.lines().find(|line| line.starts_with(&told)).unwrap_or_else(|| panic!("{said}"));
        assert!(line.ends_with("; training goes on, and tries again when the next one is due"), "{line}");
    }
    assert_eq!(fs::read_dir(place.join("new/checkpoints")).unwrap().count(), 0, "nothing half-written is left");
    let says =
        ["new/checkpoints: holds no checkpoint, though metrics.jsonl goes to step 3", "if none could be written"];
    fails(run(place, &["train", "--resume", "new"]), 1, &says);
}

#[test]
fn a_closed_pipe_is_quiet() {
    let place = tempfile::tempdir().unwrap();
    // Closed before the program starts, so that there is no race.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = program::command(place.path(), &["train", "--print-config"]).stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), program::stderr(&output).as_str()), (Some(141), ""));
}

#[test]
fn names_in_files_do_not_command_the_terminal() {
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("c.toml"), "\"\\u001b[31m\" = 3\n").unwrap();
    let output = run(place.path(), &["train", "--config", "c.toml"]);
    assert!(!program::stderr(&output).contains('\x1b'));
    fails(output, 2, &["\\u{1b}[31m", "c.toml"]);
}

#[cfg(unix)]
#[test]
fn arguments_that_are_not_utf_8_are_named() {
    use std::os::unix::ffi::OsStrExt;
    let place = tempfile::tempdir().unwrap();
    let bad = std::ffi::OsStr::from_bytes(b"caf\xe9");
    let output = program::command(place.path(), &["train", "--data"]).arg(bad).output().unwrap();
    fails(output, 2, &["of --data is not UTF-8"]);
}
