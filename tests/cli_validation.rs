//! The validation loss of `dtr-fused train`, as a user meets it.

mod program;

use std::fs;
use std::path::Path;

use dtr_fused::data::npy;
use dtr_fused::element::Element;
use dtr_fused::train::metrics;
use program::{fails, run, stderr, succeeds, train};

/// An `.npy` file of `n` samples of 1 x 8 x 8 in two classes, and its labels.
fn save_samples(path: &Path, n: usize) {
    let pixels: Vec<u8> = (0..n * 64).map(|i| (i * 37 % 251) as u8).collect();
    npy::write(path, Element::U8, &[n, 1, 8, 8], &pixels).unwrap();
    let labels: Vec<u8> = (0..n).map(|i| (i % 2) as u8).collect();
    npy::write(path.with_extension("labels.npy"), Element::U8, &[n], &labels).unwrap();
}

#[test]
fn it_is_told_and_kept() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let args = ["--out", "run", "--steps", "4", "--log-every", "3", "--validation-samples", "30"];
    let output = train(place, &[&args[..], &["--validation-every", "2"]].concat());
    let said = stderr(&output);
    succeeds(output);
    for part in ["1767 images", "30 more samples are held out", "step 2: validation loss ", "step 4: validation loss "]
    {
        assert!(said.contains(part), "'{part}' is not in\n{said}");
    }
    let lines = metrics::read(&place.join("run")).unwrap();
    let losses: Vec<_> =
        lines.iter().map(|line| (line.step, line.validation.as_ref().map(|of| of.loss.unwrap()))).collect();
    let [(2, Some(first)), (3, None), (4, Some(last))] = losses[..] else { panic!("{losses:?}") };
    assert!(first > 0.0 && last > 0.0 && first != last, "{first} and {last}");
    for (step, loss) in [(2, first), (4, last)] {
        assert!(said.contains(&format!("step {step}: validation loss {}\n", metrics::loss_text(loss))), "{said}");
    }
    // A line without one says nothing of it: as in the files of those who never asked.
    let text = fs::read_to_string(place.join("run").join(metrics::METRICS)).unwrap();
    assert_eq!(text.matches("validation").count(), 2, "{text}");
    let info = succeeds(run(place, &["info", "run"]));
    assert!(info.contains(&format!("validation    {} at step 4", metrics::loss_text(last))), "{info}");
    let events = fs::read_dir(place.join("run")).unwrap().map(|entry| entry.unwrap().path());
    let events = events.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("events."));
    let events = fs::read(events.last().unwrap()).unwrap();
    for (name, times) in [("validation/total", 2), ("validation_by_timestep/000-124", 2), ("loss/total", 3)] {
        let found = events.windows(name.len()).filter(|bytes| *bytes == name.as_bytes()).count();
        assert_eq!(found, times, "{name}");
    }
}

#[test]
fn what_is_held_out_stays_so() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    fails(train(place, &["--validation-samples", "1797"]), 2, &["validation_samples is 1797", "'digits' have 1797"]);
    assert!(!place.join("runs").exists(), "a run that cannot be");
    save_samples(&place.join("some.npy"), 40);
    succeeds(train(place, &["--data", "some.npy", "--out", "run", "--steps", "1", "--validation-samples", "10"]));
    let resume = |args: &[&str]| run(place, &[&["train", "--resume", "run", "--steps", "2"], args].concat());
    for other in ["0", "9"] {
        fails(resume(&["--validation-samples", other]), 2, &["validation_samples"]);
    }
    save_samples(&place.join("some.npy"), 44);
    let output = resume(&["--validation-every", "1"]);
    let said = stderr(&output);
    succeeds(output);
    assert!(
        said.contains("the data have 44 samples, but had 40") && said.contains("others of them are held out"),
        "{said}"
    );
}
