//! Models that predict something else than the noise, as a user meets them.

mod program;

use std::fs;

use dtr_fused::safetensors_file::SafetensorsFile;
use dtr_fused::train::{checkpoint, metrics};
use program::{fails, run, stderr, succeeds, train};

const RUN: [&str; 8] = ["--out", "run", "--steps", "4", "--validation-samples", "20", "--checkpoint-every", "2"];

/// Trained, resumed, validated and sampled, with its file of weights alone too.
#[test]
fn a_run_and_its_weights_know_what_they_predict() {
    let shown =
        [("noise", "noise and variance, cosine schedule"), ("v", "v and variance, cosine schedule"), ("flow", "flow")];
    for (prediction, shown) in shown {
        let place = tempfile::tempdir().unwrap();
        let place = place.path();
        succeeds(train(place, &[&RUN[..], &["--prediction", prediction]].concat()));
        let info = succeeds(run(place, &["info", "run"]));
        assert!(info.contains(&format!("predicts {shown}, loss weight")), "{info}");
        let loss =
            metrics::read(&place.join("run")).unwrap().last().unwrap().validation.as_ref().unwrap().loss.unwrap();
        let path = checkpoint::latest(&place.join("run")).unwrap().unwrap().1.join(checkpoint::EMA);
        let told = SafetensorsFile::open(&path).unwrap().metadata().get("prediction").cloned();
        assert_eq!(told.as_deref(), Some(prediction));
        fs::copy(&path, place.join("alone.safetensors")).unwrap();
        let info = succeeds(run(place, &["info", "alone.safetensors"]));
        assert!(info.lines().any(|line| line.starts_with("predicts") && line.ends_with(shown)), "{info}");

        let validated = |checkpoint: &str, more: &[&str]| {
            let args = ["validate", "--json", "--device", "cpu", "--checkpoint", checkpoint];
            let text = succeeds(run(place, &[&args, more].concat()));
            serde_json::from_str::<serde_json::Value>(&text).unwrap()["loss"].as_f64().unwrap()
        };
        assert_eq!(validated("run", &[]), loss, "{prediction}");
        let of_file = validated("alone.safetensors", &["--data", "digits"]);
        assert_eq!(of_file, validated("run", &["--data", "digits"]), "{prediction}");
        let other = if prediction == "v" { "flow" } else { "v" };
        let set = format!("prediction={other}");
        // A flow tells no schedule.
        let set = ["--data", "digits", "--set", &set, "schedule=cosine"];
        let set = &set[..if prediction == "flow" { 5 } else { 4 }];
        let output = run(place, &[&["validate", "--checkpoint", "alone.safetensors"], set].concat());
        let said = stderr(&output);
        assert!(said.contains(&format!("says prediction {prediction}, and --set otherwise")), "{said}");
        assert!(of_file != validated("alone.safetensors", set), "{prediction}");

        let sampled = |checkpoint: &str, sampler: &str, npz: &str| {
            let args = ["sample", "--device", "cpu", "--steps", "3", "--num", "10", "--checkpoint", checkpoint];
            succeeds(run(place, &[&args[..], &["--sampler", sampler, "--npz", npz]].concat()));
            fs::read(place.join(npz)).unwrap()
        };
        for sampler in ["ddim", "ddpm", "dpm++"] {
            let [whole, alone] = [("run", "run"), ("alone.safetensors", "alone")]
                .map(|(checkpoint, name)| sampled(checkpoint, sampler, &format!("{name}-{sampler}.npz")));
            assert!(whole == alone, "{prediction} {sampler}");
        }

        let resumed = ["train", "--resume", "run", "--steps", "5"];
        fails(run(place, &[&resumed[..], &["--prediction", other]].concat()), 2, &["prediction cannot change"]);
        succeeds(run(place, &resumed));
    }
}

#[test]
fn weights_that_predicted_something_else_are_told() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    succeeds(train(place, &RUN));
    let path = checkpoint::latest(&place.join("run")).unwrap().unwrap().1.join(checkpoint::EMA);
    let from = ["--init-from", path.to_str().unwrap(), "--steps", "1", "--prediction"];
    let output = train(place, &[&from[..], &["v", "--out", "v"]].concat());
    let said = stderr(&output);
    for part in [
        "trained with num_heads 2, ",
        "cosine, prediction noise, and go on with ",
        "cosine, prediction v: another model at first",
    ] {
        assert!(said.contains(part), "{said}");
    }
    succeeds(output);
    // A flow learns no variance unless it is asked to.
    fails(train(place, &[&from[..], &["flow"]].concat()), 1, &["needs [4, 32]", "--learn-sigma"]);
    succeeds(train(place, &[&from[..], &["flow", "--learn-sigma", "true"]].concat()));
    // What a flow has no schedule for does not tell it from another.
    succeeds(train(place, &[&RUN[2..], &["--out", "one", "--prediction", "flow"]].concat()));
    let path = checkpoint::latest(&place.join("one")).unwrap().unwrap().1.join(checkpoint::EMA);
    let weights = path.to_str().unwrap();
    let output =
        train(place, &["--init-from", weights, "--steps", "1", "--prediction", "flow", "--schedule", "linear"]);
    let said = stderr(&output);
    assert!(said.contains("schedule has no effect: a flow has its own") && !said.contains("another model"), "{said}");
    succeeds(output);
    let sample = ["sample", "--steps", "1", "--checkpoint", weights, "--set", "schedule=linear"];
    fails(run(place, &sample), 2, &["--set gives schedule, but a flow has its own: leave it out"]);
}
