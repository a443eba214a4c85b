//! `dtr-fused info` of several runs.

mod program;

use dtr_fused::train::metrics;
use program::{fails, run, succeeds, train};

#[test]
fn several_runs_are_told_apart() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let validated = ["--validation-samples", "20", "--validation-every", "1", "--steps", "3"];
    // Too fast to get better: the best validation is not the last.
    let seed = i64::MAX.to_string();
    succeeds(train(place, &[&validated[..], &["--out", "a", "--lr", "0.9", "--seed", &seed]].concat()));
    succeeds(train(place, &["--out", "b", "--routing", "dense", "--steps", "2", "--data-kind", "images"]));
    let shown = succeeds(run(place, &["info", "a", "b"]));
    let lines: Vec<Vec<&str>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
    let knobs = ["routing", "validation_samples", "steps", "lr", "seed", "validation_every"];
    assert_eq!(lines[0], [&["run"], &knobs[..], &["step", "loss", "validation", "best"]].concat());
    let metrics = |name: &str| metrics::read(&place.join(name)).unwrap();
    let text = |loss: Option<f64>| metrics::loss_text(loss.unwrap());
    let losses: Vec<_> = metrics("a").iter().map(|line| (line.step, line.validation.as_ref().unwrap().loss)).collect();
    let best = losses.iter().min_by(|a, b| a.1.unwrap().total_cmp(&b.1.unwrap())).unwrap();
    assert!(best.0 < 3, "{losses:?}");
    let (last, best_step) = (metrics("a").pop().unwrap(), best.0.to_string());
    let of_a = ["a", "paper", "20", "3", "0.9", &seed, "1", "3", &text(last.loss), &text(losses[2].1), &text(best.1)];
    assert_eq!(lines[1], [&of_a[..], &["at", &best_step]].concat());
    let of_b = ["b", "dense", "0", "2", "0.003", "0", "100", "2", &text(metrics("b")[0].loss), "-", "-"];
    assert_eq!(lines[2], of_b);
    assert_eq!(lines.len(), 3);

    let json = succeeds(run(place, &["info", "--json", "a", "b"]));
    let of: Vec<serde_json::Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(of.len(), 2);
    assert_eq!(of[0]["loss"].as_f64(), last.loss);
    assert_eq!(of[0]["validation"]["step"], 3);
    assert_eq!(
        (of[0]["best_validation"]["loss"].as_f64(), of[0]["best_validation"]["step"].as_u64()),
        (best.1, Some(best.0))
    );
    assert_eq!((&of[0]["config"]["seed"], &of[0]["config"]["beta"]), (&i64::MAX.into(), &0.8.into()));
    assert!(of[1]["validation"].is_null() && of[1]["config"]["routing"] == "dense", "{json}");

    // Others are shown all the same.
    std::fs::write(place.join("notes.txt"), "").unwrap();
    for (flags, lines) in [(&["info"][..], 3), (&["info", "--json"], 2)] {
        let output = run(place, &[flags, &["a", "notes.txt", "b", "nowhere"]].concat());
        assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), lines);
        fails(output, 1, &["notes.txt", "; 1 more could not be shown either"]);
    }
    fails(run(place, &["info", "nowhere", "neither"]), 1, &["nowhere"]);
    let weights = "a/checkpoints/0000003/ema.safetensors";
    fails(run(place, &["info", "a", weights]), 1, &[weights]);
    fails(run(place, &["info", "--tensors", "a", "b"]), 2, &["give one directory or file"]);
}
