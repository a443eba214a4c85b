//! `dtr-fused info` of several runs.

mod program;

use dtr_fused::safetensors_file::SafetensorsFile;
use dtr_fused::train::metrics;
use program::{fails, run, succeeds, train};

#[test]
fn several_runs_are_told_apart() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let validated = ["--validation-samples", "20", "--validation-every", "1", "--steps", "3", "--log-every", "2"];
    // Too fast to get better: the best validation is not the last.
    let seed = i64::MAX.to_string();
    succeeds(train(place, &[&validated[..], &["--out", "a", "--lr", "0.9", "--seed", &seed]].concat()));
    succeeds(train(place, &["--out", "b", "--routing", "dense", "--steps", "2", "--data-kind", "images"]));
    let shown = succeeds(run(place, &["info", "a", "b"]));
    let lines: Vec<Vec<&str>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
    let knobs = ["routing", "validation_samples", "steps", "lr", "seed", "log_every", "validation_every"];
    assert_eq!(lines[0], [&["run"], &knobs[..], &["step", "loss", "mse", "validation", "best"]].concat());
    let metrics = |name: &str| metrics::read(&place.join(name)).unwrap();
    let text = |loss: Option<f64>| metrics::loss_text(loss.unwrap());
    let losses: Vec<_> = metrics("a").iter().map(|line| (line.step, line.validation.as_ref().unwrap().loss)).collect();
    let best = losses.iter().min_by(|a, b| a.1.unwrap().total_cmp(&b.1.unwrap())).unwrap();
    assert!(best.0 < 3, "{losses:?}");
    let (last, best_step) = (metrics("a").pop().unwrap(), best.0.to_string());
    // A line for each step: of the two last.
    let mean = |of: fn(&metrics::Line) -> Option<f64>| {
        let two: Vec<f64> = metrics("a")[1..].iter().filter_map(of).collect();
        Some((two[0] + two[1]) / 2.0)
    };
    let (loss, mse) = (mean(|line| line.loss), mean(|line| line.mse));
    let of_a = ["a", "paper", "20", "3", "0.9", &seed, "2", "1", "3", &text(loss), &text(mse), &text(losses[2].1)];
    assert_eq!(lines[1], [&of_a[..], &[&text(best.1), "at", &best_step]].concat());
    let only = &metrics("b")[0];
    let of_b = ["b", "dense", "0", "2", "0.003", "0", "10", "100", "2", &text(only.loss), &text(only.mse), "-", "-"];
    assert_eq!(lines[2], of_b);
    assert_eq!(lines.len(), 3);

    let json = succeeds(run(place, &["info", "--json", "a", "b"]));
    let of: Vec<serde_json::Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(of.len(), 2);
    let near = |a: &serde_json::Value, b: Option<f64>| (a.as_f64().unwrap() - b.unwrap()).abs() < 1e-12;
    assert!(near(&of[0]["loss"], loss) && near(&of[0]["mse"], mse), "{json}");
    assert_eq!(of[0]["validation"]["step"], 3);
    let (found, measured) = (&of[0]["validation"], last.validation.as_ref().unwrap());
    assert!(near(&found["mse"], measured.mse) && near(&found["vb"], measured.vb), "{json}");
    assert!(near(&found["loss_by_timestep"][3], measured.loss_by_timestep[3]), "{json}");
    let weights = SafetensorsFile::open(place.join("a/checkpoints/0000003/ema.safetensors")).unwrap();
    let sizes = weights.names().filter(|&name| name != "pos_embed").map(|name| weights.get(name).unwrap().elements());
    assert_eq!(of[0]["parameters"], sizes.sum::<usize>());
    assert_eq!(of[0]["changes"], serde_json::json!([]));
    assert_eq!(
        (of[0]["best_validation"]["loss"].as_f64(), of[0]["best_validation"]["step"].as_u64()),
        (best.1, Some(best.0))
    );
    assert_eq!((&of[0]["config"]["seed"], &of[0]["config"]["beta"]), (&i64::MAX.into(), &0.8.into()));
    assert!(of[1]["validation"].is_null() && of[1]["config"]["routing"] == "dense", "{json}");

    let json = succeeds(run(place, &["info", "--json", "a/checkpoints/0000003/ema.safetensors", "b"]));
    let of_file: serde_json::Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert_eq!((json.lines().count(), &of_file["parameters"]), (2, &of[0]["parameters"]));
    let config = of_file["config"].as_object().unwrap();
    assert_eq!((&config["hidden_size"], &config["routing"]), (&32.into(), &"paper".into()));
    assert!(!["lr", "steps", "init"].iter().any(|key| config.contains_key(*key)) && of_file["classes"].is_null());

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

    // The runs of a folder, by name; a checkpoint is none.
    std::fs::create_dir_all(place.join("all/notes")).unwrap();
    let rename = |from: &str, to: &str| std::fs::rename(place.join(from), place.join(to)).unwrap();
    [("b", "all/b"), ("a", "all/a"), ("all/a/checkpoints/0000003", "all/0")]
        .iter()
        .for_each(|(from, to)| rename(from, to));
    assert_eq!(succeeds(run(place, &["info", "all"])), succeeds(run(place, &["info", "all/a", "all/b"])));
    rename("all/b", "b");
    assert_eq!(succeeds(run(place, &["info", "all"])).lines().count(), 2, "a table of one run");
    assert_eq!(succeeds(run(place, &["info", "--json", "all", "b"])).lines().count(), 2);
    rename("all/a", "a");
    fails(run(place, &["info", "all"]), 1, &["all", "holds neither a run nor a checkpoint"]);
}
