//! TensorBoard's event files as a run writes them.

mod program;

use std::fs;
use std::path::{Path, PathBuf};

use dtr_fused::train::metrics;
use program::{stderr, succeeds, train};

fn events_of(run: &Path) -> PathBuf {
    let is_events = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents.");
    fs::read_dir(run).unwrap().map(|entry| entry.unwrap().path()).find(is_events).unwrap()
}

#[test]
fn tensorboard_gets_the_samples_too() {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    succeeds(train(place.path(), &["--out", "run", "--steps", "4", "--sample-every", "2"]));
    let events = fs::read(events_of(&run)).unwrap();
    for name in ["samples/0000002.png", "samples/0000004.png"] {
        let png = fs::read(run.join(name)).unwrap();
        assert!(events.windows(png.len()).any(|part| part == png), "{name} is not there");
    }
}

#[test]
fn learned_log_variances_are_curves() {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    let args = ["--out", "run", "--steps", "2", "--log-every", "1", "--loss-weight", "uw", "--uw-lr", "0.5"];
    succeeds(train(place.path(), &args));
    let lines = metrics::read(&run).unwrap();
    let [first, second] = [0, 1].map(|i| lines[i].uw_log_variances.unwrap());
    assert!(first != second && second.iter().all(|s| *s != 0.0), "{first:?} and {second:?}");
    let events = fs::read(events_of(&run)).unwrap();
    let name = b"uw_log_variance/875-999";
    assert_eq!(events.windows(name.len()).filter(|part| part == name).count(), 2);
}

/// A record cut short would hide those after it.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_whole_records_for_tensorboard() {
    let place = tempfile::tempdir().unwrap();
    // No file may grow beyond 500 kB: that of the events does with some twenty pictures, a checkpoint does not.
    let args =
        [&["train"], program::TINY, &["--out", "run", "--steps", "60", "--sample-every", "1", "--log-every", "1"]];
    let args = [args.concat(), vec!["--checkpoint-every", "0", "--sample-steps", "1"]].concat().join(" ");
    let limited = format!("trap '' XFSZ; ulimit -f 1000; exec '{}' {args}", env!("CARGO_BIN_EXE_dtr-fused"));
    let output = std::process::Command::new("sh").args(["-c", &limited]).current_dir(place.path()).output().unwrap();
    assert!(stderr(&output).contains("are not in TensorBoard"), "{}", stderr(&output));
    let events = fs::read(events_of(&place.path().join("run"))).unwrap();
    let (mut rest, mut records) = (&events[..], 0);
    while let Some(length) = rest.first_chunk() {
        rest = &rest[u64::from_le_bytes(*length) as usize + 16..];
        records += 1;
    }
    assert!(rest.is_empty() && records > 20, "{records} records, and {} bytes", rest.len());
}
