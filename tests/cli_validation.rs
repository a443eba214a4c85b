//! The validation loss of `dtr-fused train`, as a user meets it.

mod program;

use std::fs;
use std::path::Path;

use dtr_fused::data::npy;
use dtr_fused::element::Element;
use dtr_fused::train::{checkpoint, metrics};
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

/// Beside the latest, in a run that gets worse, and after a resume too.
#[test]
fn the_best_checkpoint_is_kept_and_taken() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let worse = ["--lr", "0.9", "--validation-samples", "20", "--keep-checkpoints", "1", "--keep-best"];
    let of = |out: &str, steps: &str, [checkpoint, validation]: [&str; 2], more: &[&str]| {
        let every = ["--checkpoint-every", checkpoint, "--validation-every", validation, "--steps", steps];
        let output = train(place, &[&worse[..], &every, &["--out", out], more].concat());
        let said = stderr(&output);
        succeeds(output);
        said
    };
    let losses = |out: &str| -> Vec<(u64, f64)> {
        let lines = metrics::read(&place.join(out)).unwrap();
        lines.iter().filter_map(|line| Some((line.step, line.validation.as_ref()?.loss?))).collect()
    };
    let lowest = |losses: Vec<(u64, f64)>| losses.into_iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    let kept = |out: &str| -> Vec<u64> {
        checkpoint::list(&place.join(out)).unwrap().into_iter().map(|(step, _)| step).collect()
    };
    let info = |out: &str, more: &[&str]| succeeds(run(place, &[&["info", out], more].concat()));
    assert!(!of("run", "8", ["1", "1"], &[]).contains("keep_best"));
    let (best, loss) = lowest(losses("run"));
    assert!(best < 8, "{:?}", losses("run"));
    assert_eq!(kept("run"), [best, 8]);
    succeeds(run(place, &["train", "--resume", "run", "--steps", "11"]));
    assert_eq!((lowest(losses("run")), kept("run")), ((best, loss), vec![best, 11]));
    let shown = format!("best validation {} at step {best} (kept)\n", metrics::loss_text(loss));
    assert!(info("run", &[]).contains(&shown), "{}", info("run", &[]));
    let its = format!("run/checkpoints/{best:07}");
    assert!(info("run", &["--best"]).contains(&format!("checkpoint    {its}\n")));
    assert_eq!(validated(place, &["--checkpoint", "run", "--best"]), loss);
    let grid = |out: &str, of: &[&str]| {
        succeeds(run(place, &[&["sample", "--num", "1", "--steps", "2", "--out", out, "--checkpoint"], of].concat()));
        fs::read(place.join(out)).unwrap()
    };
    assert!(grid("best.png", &["run", "--best"]) == grid("its.png", &[&its]));

    // Losses of other weights say nothing of those of before, of which the best stays.
    succeeds(run(place, &["train", "--resume", "run", "--steps", "15", "--validation-weights", "model"]));
    let (later, loss) = lowest(losses("run").into_iter().filter(|(step, _)| *step > 11).collect());
    let mut all = vec![best, later, 15];
    all.dedup();
    assert_eq!(kept("run"), all);
    let shown = format!("best validation {} at step {later} (kept)\n", metrics::loss_text(loss));
    assert!(info("run", &[]).contains(&shown), "{}", info("run", &[]));
    assert_eq!(validated(place, &["--checkpoint", "run", "--best"]), loss);

    // Only where both fall on a step: here 6, and at the end; of the lower losses before there is no checkpoint.
    of("some", "9", ["3", "2"], &["--keep-checkpoints", "9"]);
    let both = lowest(losses("some").into_iter().filter(|(step, _)| [6, 9].contains(step)).collect()).0;
    assert!(both < 9 && ![6, 9].contains(&lowest(losses("some")).0), "{:?}", losses("some"));
    of("fewer", "9", ["3", "2"], &[]);
    assert_eq!(kept("fewer"), [both, 9]);
    assert!(info("fewer", &[]).contains("(not kept)\n"));
    let best = |path: &str| run(place, &["validate", "--checkpoint", path, "--best"]);
    assert!(succeeds(best("fewer")).contains(&format!("fewer/checkpoints/{both:07}")));
    let every = ["--checkpoint-every", "1", "--validation-every", "1", "--steps", "8", "--out", "lost"];
    succeeds(train(place, &[&worse[..6], &every].concat()));
    let others = "or give lost/checkpoints/0000008, the best that is";
    fails(best("lost"), 1, &["its lowest validation loss is", "whose checkpoint is not kept", others]);
    assert!(of("never", "6", ["3", "2"], &[]).contains("keep_best has no effect: before the last step none has both"));

    let output = train(place, &["--keep-best", "--steps", "1", "--out", "plain"]);
    assert!(stderr(&output).contains("keep_best has no effect: give validation_samples"), "{}", stderr(&output));
    succeeds(output);
    fails(best("plain"), 2, &["--best takes the lowest validation loss, but plain has none"]);
    fails(best(&its), 2, &["--best chooses among the checkpoints of a run", &its]);
    fails(run(place, &["info", "run", "some", "--best"]), 2, &["--best shows a checkpoint of one run"]);
}

/// The loss that `validate` prints as JSON.
fn validated(place: &Path, args: &[&str]) -> f64 {
    let text = succeeds(run(place, &[&["validate", "--json"], args].concat()));
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(
        report["mse"].as_f64().unwrap() > 0.0 && report["loss_by_timestep"].as_array().unwrap().len() == 8,
        "{text}"
    );
    report["loss"].as_f64().unwrap()
}

/// `validate` finds what training did, and with other weights, samples or noise something else.
#[test]
fn it_is_measured_afterwards_too() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let args =
        ["--steps", "30", "--lr", "0.01", "--seed", "3", "--validation-samples", "30", "--loss-weight", "min-snr-5"];
    succeeds(train(place, &[&args[..], &["--out", "run", "--validation-seed", "4"]].concat()));
    let lines = metrics::read(&place.join("run")).unwrap();
    let expected = lines.last().unwrap().validation.as_ref().unwrap().loss.unwrap();
    assert_eq!(validated(place, &["--checkpoint", "run"]), expected);
    assert_eq!(validated(place, &["--checkpoint", "run", "--threads", "1"]), expected);
    let text = succeeds(run(place, &["validate", "--checkpoint", "run"]));
    let loss = format!("\nloss          {} ± ", metrics::loss_text(expected));
    let says =
        ["checkpoint    run/checkpoints/0000030\nsamples       30\nloss weight   min-snr-5\n", &loss, "  t 875-999"];
    assert!(says.iter().all(|part| text.contains(part)), "{text}");
    assert_eq!(validated(place, &["--checkpoint", "run", "--seed", "4"]), expected);
    for other in [&["--weights", "model"][..], &["--seed", "3"], &["--data", "digits"]] {
        assert!(validated(place, &[&["--checkpoint", "run"], other].concat()) != expected, "{other:?}");
    }
    let digits = ["--checkpoint", "run", "--data", "digits", "--seed", "0"];
    assert_eq!(validated(place, &digits), validated(place, &digits[..4]));

    let ema = "run/checkpoints/0000030/ema.safetensors";
    let of_file = |more: &[&str]| run(place, &[&["validate", "--checkpoint", ema], more].concat());
    assert_eq!(validated(place, &["--checkpoint", ema, "--data", "digits"]), validated(place, &digits));
    // What the file says of the loss may be nonsense, and said otherwise.
    let mut bytes = fs::read(place.join(ema)).unwrap();
    let at = bytes.windows(9).position(|bytes| bytes == b"min-snr-5").unwrap();
    bytes[at..][..9].copy_from_slice(b"nonsense5");
    fs::write(place.join("odd.safetensors"), bytes).unwrap();
    let odd = ["--checkpoint", "odd.safetensors", "--data", "digits"];
    fails(run(place, &[&["validate"], &odd[..]].concat()), 1, &["odd.safetensors", "loss_weight is 'nonsense5'"]);
    let set = [&odd[..], &["--set", "loss_weight=min-snr-5"]].concat();
    assert_eq!(validated(place, &set), validated(place, &digits));
    fails(of_file(&[]), 2, &["a file of weights names no data: give --data"]);
    save_samples(&place.join("two.npy"), 30);
    npy::write(place.join("wide.npy"), Element::U8, &[2, 1, 12, 12], &[7; 288]).unwrap();
    npy::write(place.join("wide.labels.npy"), Element::U8, &[2], &[0, 1]).unwrap();
    assert!(validated(place, &["--checkpoint", "run", "--data", "two.npy"]).is_finite());
    fails(
        of_file(&["--data", "wide.npy"]),
        2,
        &[
            "are images of 1 x 12 x 12 in 10 classes, but this model learned images of 1 x 8 x 8 in 10 classes: validate",
        ],
    );
    succeeds(train(place, &["--steps", "1", "--out", "plain"]));
    fails(run(place, &["validate", "--checkpoint", "plain"]), 2, &["this run was not validated: say with --data"]);
}

#[test]
fn the_weights_themselves_may_be_validated() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let args = ["--out", "run", "--steps", "3", "--lr", "0.01", "--validation-samples", "30", "--ema-decay", "0.9"];
    let args = [&args[..], &["--ema-warmup", "false"]].concat();
    let output = train(place, &args);
    let said = stderr(&output);
    succeeds(output);
    let told = "the moving average, which is validated, still holds 73 % of the initial weights: ";
    assert_eq!(said.matches(told).count(), 1, "{said}");
    let last = || metrics::read(&place.join("run")).unwrap().pop().unwrap().validation.unwrap().loss.unwrap();
    let of = |weights| validated(place, &["--checkpoint", "run", "--weights", weights]);
    assert_eq!(last(), of("ema"));
    let resumed = ["train", "--resume", "run", "--steps", "4", "--validation-weights", "model"];
    let output = run(place, &resumed);
    assert!(!stderr(&output).contains("still holds"), "{}", stderr(&output));
    succeeds(output);
    assert_eq!(last(), of("model"));
    assert!(last() != of("ema"));
}

/// Each time with other noise and timesteps, in training as afterwards.
#[test]
fn samples_may_be_measured_several_times() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let validated = ["--validation-samples", "40", "--validation-every", "3", "--validation-repeats", "3"];
    succeeds(train(place, &[&validated[..], &["--out", "run", "--steps", "3"]].concat()));
    let measured = |args: &[&str]| -> Vec<f64> {
        let text = succeeds(run(place, &[&["validate", "--checkpoint", "run", "--json"], args].concat()));
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        ["loss", "loss_stderr", "repeats", "samples"].map(|key| report[key].as_f64().unwrap()).to_vec()
    };
    let [thrice, once] = [&[][..], &["--repeats", "1"]].map(&measured);
    let line = metrics::read(&place.join("run")).unwrap().pop().unwrap().validation.unwrap();
    assert_eq!([line.loss.unwrap(), line.loss_stderr.unwrap(), 3.0, 40.0], thrice[..]);
    assert!(once[0] != thrice[0] && once[2..] == [1.0, 40.0], "{once:?} and {thrice:?}");

    // The errors are those of draws: the losses of as many seeds lie around each other as far as they say.
    let seeds: Vec<String> = (0..16).map(|seed| seed.to_string()).collect();
    let of_seeds: Vec<_> = seeds.iter().map(|seed| measured(&["--repeats", "1", "--seed", seed])).collect();
    let mean = of_seeds.iter().map(|of| of[0]).sum::<f64>() / 16.0;
    let spread = (of_seeds.iter().map(|of| (of[0] - mean).powi(2)).sum::<f64>() / 15.0).sqrt();
    let told = of_seeds.iter().map(|of| of[1]).sum::<f64>() / 16.0;
    assert!((0.5..2.0).contains(&(told / spread)), "{told} for {spread}");
    assert!((mean - thrice[0]).abs() < 4.0 * told && thrice[1] < 0.8 * told, "{thrice:?}, {mean} and {told}");
    fails(run(place, &["validate", "--checkpoint", "run", "--repeats", "0"]), 2, &["--repeats is 0, but it must be"]);

    // Losses of others cannot be compared: the best is one of those since.
    let resumed = ["train", "--resume", "run", "--steps", "6", "--validation-repeats", "1", "--lr", "0.9"];
    succeeds(run(place, &resumed));
    let info = succeeds(run(place, &["info", "run"]));
    assert!(info.contains(" at step 6 (kept)"), "{info}");
}

/// Of the same weights, on the run's own samples: those of a run that was trained with the other weight.
#[test]
fn another_loss_weight_may_be_measured() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let args = ["--out", "run", "--steps", "2", "--validation-samples", "30", "--loss-weight", "min-snr-5"];
    succeeds(train(place, &args));
    let ema = "run/checkpoints/0000002/ema.safetensors";
    let init = ["--init-from", ema, "--steps", "1", "--lr", "1e-30", "--validation-samples", "30"];
    succeeds(train(place, &[&init[..], &["--out", "plain", "--loss-weight", "constant"]].concat()));
    let of_run = |more: &[&str]| validated(place, &[&["--checkpoint", "run"], more].concat());
    let constant = of_run(&["--loss-weight", "constant"]);
    assert_eq!(constant, validated(place, &["--checkpoint", "plain"]));
    assert_eq!(of_run(&[]), of_run(&["--loss-weight", "min-snr-5"]));
    assert_eq!(of_run(&[]), validated(place, &["--checkpoint", "plain", "--loss-weight", "min-snr-5"]));
    assert!(of_run(&[]) != constant && of_run(&["--loss-weight", "p2"]) != constant);
    let text = succeeds(run(place, &["validate", "--checkpoint", "run", "--loss-weight", "constant"]));
    assert!(text.contains("\nloss weight   constant\n"), "{text}");
    // What a file of weights says of it is overruled too.
    let of_file = |more: &[&str]| validated(place, &[&["--checkpoint", ema, "--data", "digits"], more].concat());
    let on_digits = of_run(&["--data", "digits", "--loss-weight", "constant"]);
    assert_eq!(of_file(&["--loss-weight", "constant"]), on_digits);
    assert!(of_file(&[]) != on_digits);
    let refused = |weight| run(place, &["validate", "--checkpoint", "run", "--loss-weight", weight]);
    fails(refused("uw"), 2, &["uw learns its weights in training: give another --loss-weight, such as constant"]);
    fails(refused("heavy"), 2, &["there is no loss weight 'heavy'"]);
}

/// Their neighbours do not count in their place: what is measured is that of the others, each with its own noise.
#[test]
fn damaged_samples_are_named_and_left_out() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let save = |name: &str, n: usize, damaged: usize| {
        let pixels: Vec<f32> = (0..n * 64).map(|i| (i * 37 % 251) as f32 / 126.0 - 1.0).collect();
        let pixels = [pixels, vec![f32::NAN; damaged * 64]].concat();
        let bytes: Vec<u8> = pixels.iter().flat_map(|x| x.to_le_bytes()).collect();
        npy::write(place.join(name), Element::F32, &[n + damaged, 1, 8, 8], &bytes).unwrap();
        npy::write(place.join("labels.npy"), Element::U8, &[n + damaged], &vec![0; n + damaged]).unwrap();
    };
    save("some.npy", 30, 10);
    let trained = train(place, &["--data", "some.npy", "--out", "run", "--steps", "2", "--validation-samples", "9"]);
    let said = stderr(&trained);
    succeeds(trained);
    assert!(said.contains("\ndamaged and left out: ") && said.contains(" of the 9 samples to validate on\n"), "{said}");
    save("half.npy", 20, 20);
    let validate =
        |more: &[&str]| run(place, &[&["validate", "--checkpoint", "run", "--data", "half.npy"], more].concat());
    let output = validate(&[]);
    let said = stderr(&output);
    let report = succeeds(output);
    assert!(report.contains("\nsamples       20\ndamaged       20\n"), "{report}");
    assert_eq!(said.matches("has NaN at place 0 of sample ").count(), 16, "{said}");
    assert!(said.ends_with("damaged and left out: 20 of the 40 samples to validate on\n"), "{said}");
    assert!(succeeds(validate(&["--json"])).contains("\"samples\":20,\"damaged\":20,\"repeats\":1,\"loss_weight\""));
    save("half.npy", 40, 0);
    let report = succeeds(validate(&["--json"]));
    assert!(report.contains("\"samples\":40,\"damaged\":0,"), "{report}");
    save("half.npy", 20, 21);
    fails(validate(&[]), 1, &["21 of 41 samples cannot be read, the last: half.npy: has NaN at place 0 of sample "]);
}

/// The same samples with the same noise, whatever the seed; but by the seed in runs of before this was a key of its own.
#[test]
fn runs_with_several_seeds_are_validated_on_the_same() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let first = ["--steps", "1", "--validation-samples", "30", "--device", "cpu"];
    succeeds(train(place, &[&first[..], &["--out", "first", "--steps", "20", "--lr", "0.01"]].concat()));
    // The weights of one model, which hardly move.
    let same = [&first[..], &["--init-from", "first/checkpoints/0000020/ema.safetensors", "--lr", "1e-30"]].concat();
    let loss = |out: &str, seeds: &[&str]| {
        succeeds(train(place, &[&same[..], &["--out", out], seeds].concat()));
        validated(place, &["--checkpoint", out])
    };
    let of_1 = loss("of-1", &["--seed", "1"]);
    assert_eq!(loss("of-2", &["--seed", "2"]), of_1);
    let of_old = loss("old", &["--seed", "1", "--validation-seed", "2"]);
    assert!(of_old != of_1, "{of_1} of others");
    let edit = |run: &str, from: &str, to: &str| {
        for file in ["config.toml", "checkpoints/0000001/config.toml"] {
            let path = place.join(run).join(file);
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{text}");
            fs::write(path, text.replace(from, to)).unwrap();
        }
    };
    // As a run of before with seed 2.
    edit("old", "validation_seed = 2\n", "");
    edit("old", "\nseed = 1\n", "\nseed = 2\n");
    assert_eq!(validated(place, &["--checkpoint", "old"]), of_old);
    let resume = |steps, more: &[&str]| run(place, &[&["train", "--resume", "old", "--steps", steps], more].concat());
    fails(resume("2", &["--validation-seed", "0"]), 2, &["validation_seed cannot change from 2 to 0"]);
    succeeds(resume("2", &[]));
    assert_eq!(validated(place, &["--checkpoint", "old"]), of_old);
    succeeds(resume("3", &[]));
    assert!(fs::read_to_string(place.join("old/config.toml")).unwrap().contains("\nvalidation_seed = 2\n"));
}

/// Data of its own change nothing of training, and may be given when it goes on.
#[test]
fn data_of_its_own_are_validated_on() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    save_samples(&place.join("other.npy"), 30);
    let of = |out, more: &[&str]| {
        let output = train(place, &[&["--out", out, "--steps", "2"], more].concat());
        let said = stderr(&output);
        succeeds(output);
        said
    };
    let said = of("with", &["--validation-data", "other.npy"]);
    assert!(said.contains("30 samples are there to validate on, from 'other.npy'"), "{said}");
    of("without", &[]);
    let weights =
        |out: &str, step| fs::read(place.join(format!("{out}/checkpoints/{step:07}/model.safetensors"))).unwrap();
    assert!(weights("with", 2) == weights("without", 2), "other weights");
    for out in ["with", "without"] {
        succeeds(run(place, &["train", "--resume", out, "--steps", "4", "--validation-data", "other.npy"]));
    }
    assert!(weights("with", 4) == weights("without", 4), "other weights");
    let last = |out: &str| metrics::read(&place.join(out)).unwrap().pop().unwrap().validation.unwrap();
    assert_eq!(last("with"), last("without"));
    assert_eq!(validated(place, &["--checkpoint", "with"]), last("with").loss.unwrap());
    fails(
        train(place, &["--validation-data", "other.npy", "--validation-samples", "3"]),
        2,
        &["validation_samples is 3 and validation_data is 'other.npy', but a run has one of them"],
    );
    fails(train(place, &["--validation-data", "gone.npy"]), 1, &["gone.npy: the data to validate on are not there"]);
    // It needs no data of training, and is not needed for it.
    fs::rename(place.join("other.npy"), place.join("moved.npy")).unwrap();
    let resumed = |more: &[&str]| run(place, &[&["train", "--resume", "with", "--steps", "5"], more].concat());
    fails(
        resumed(&[]),
        1,
        &["other.npy: the data to validate on are not there: say where they are with --validation-data"],
    );
    fs::rename(place.join("other.labels.npy"), place.join("moved.labels.npy")).unwrap();
    fails(
        resumed(&["--validation-samples", "3"]),
        2,
        &["validation_samples cannot change from 0 to 3", "leave it out, give --validation-data, or start a new run"],
    );
    succeeds(resumed(&["--validation-data", "moved.npy"]));
    succeeds(run(place, &["train", "--resume", "with", "--steps", "6", "--validation-data", ""]));

    for (data, classes) in [("pets", ["cat", "dog"]), ("same", ["cat", "dog"]), ("others", ["cat", "cow"])] {
        for class in classes {
            let folder = place.join(data).join(class);
            fs::create_dir_all(&folder).unwrap();
            image::RgbImage::from_pixel(8, 8, image::Rgb([9, 90, 200])).save(folder.join("a.png")).unwrap();
        }
    }
    let on = |data| train(place, &["--steps", "1", "--data", "pets", "--image-size", "8", "--validation-data", data]);
    succeeds(on("same"));
    fails(on("others"), 2, &["the data 'others' have a class 'cow', but the model learned cat, dog: leave out"]);
    // Some of the classes, which have other places there.
    fs::remove_dir_all(place.join("others/cow")).unwrap();
    fs::remove_dir_all(place.join("others/cat")).unwrap();
    let blue = image::RgbImage::from_pixel(8, 8, image::Rgb([9, 90, 200]));
    fs::create_dir_all(place.join("others/dog")).unwrap();
    blue.save(place.join("others/dog/a.png")).unwrap();
    succeeds(on("others"));
    fs::create_dir_all(place.join("others/cow")).unwrap();
    blue.save(place.join("others/cow/a.png")).unwrap();
    let none = ["--label-dropout", "1", "--validation-data", "others"];
    succeeds(train(place, &[&["--steps", "1", "--data", "pets", "--image-size", "8"][..], &none].concat()));
}

/// Not others, of which some may have been trained on.
#[test]
fn what_was_held_out_is_found_again_or_not_measured() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let put = |name: &str| {
        let path = place.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::RgbImage::from_pixel(8, 8, image::Rgb([9, 90, 200])).save(path).unwrap();
    };
    ["pets/cat/a.png", "pets/cat/b.png", "pets/dog/a.png", "pets/dog/b.png"].iter().for_each(|name| put(name));
    let data = ["--data", "pets", "--image-size", "8", "--validation-samples", "2"];
    succeeds(train(place, &[&["--out", "run", "--steps", "1"], &data[..]].concat()));
    let validate = || run(place, &["validate", "--checkpoint", "run"]);
    succeeds(validate());
    put("pets/dog/c.png");
    fails(validate(), 2, &["'pets' have 5 samples, but had 4 in training, of which others were held out", "--data"]);
    fs::remove_file(place.join("pets/dog/c.png")).unwrap();
    fs::rename(place.join("pets/cat"), place.join("pets/zebra")).unwrap();
    fails(validate(), 2, &["the data 'pets' have a class 'zebra', but the model learned cat, dog"]);
    fs::rename(place.join("pets"), place.join("zoo")).unwrap();
    fails(validate(), 1, &["pets: the data of which this run held out 2 samples are not there: give the same"]);
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
        fails(
            resume(&["--validation-samples", other]),
            2,
            &["validation_samples", ": leave it out, or start a new run"],
        );
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

/// As many other samples, of which those that are held out now were learned from.
#[test]
fn other_data_than_those_of_the_run_are_told_and_not_validated_on() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    save_samples(&place.join("some.npy"), 40);
    let train = |out: &str, more: &[&str]| {
        succeeds(train(place, &[&["--data", "some.npy", "--out", out, "--steps", "1"], more].concat()));
    };
    train("run", &["--validation-samples", "10"]);
    train("plain", &[]);
    let resume = |out: &str, steps: &str, more: &[&str]| {
        run(place, &[&["train", "--resume", out, "--steps", steps], more].concat())
    };
    // What it says of other data.
    let told = |output: std::process::Output| {
        let said = stderr(&output);
        succeeds(output);
        said.lines().find(|line| line.contains("are others")).unwrap_or_default().to_string()
    };
    let validate = |out: &str| run(place, &["validate", "--checkpoint", out]);
    succeeds(validate("run"));
    for file in ["npy", "labels.npy"] {
        fs::copy(place.join("some").with_extension(file), place.join("moved").with_extension(file)).unwrap();
    }
    // Replaced: the same but for the labels, or the numbers.
    let labels: Vec<u8> = (0..40).map(|i| 1 - (i % 2) as u8).collect();
    npy::write(place.join("some.labels.npy"), Element::U8, &[40], &labels).unwrap();
    fs::copy(place.join("moved.labels.npy"), place.join("other.labels.npy")).unwrap();
    npy::write(place.join("other.npy"), Element::U8, &[40, 1, 8, 8], &[7; 40 * 64]).unwrap();
    let says = "the data 'some.npy' are others than in training (30 of 30 samples that were compared), so others would be held out: give";
    fails(validate("run"), 2, &[says]);
    // What was moved is the same.
    for out in ["run", "plain"] {
        assert_eq!(told(resume(out, "2", &["--data", "moved.npy"])), "");
    }
    succeeds(validate("run"));
    let says = "the data 'other.npy' are others than when this run was last saved (30 of 30 samples that were compared): it goes on \
                with these, and others of them are held out now";
    assert_eq!(told(resume("run", "3", &["--data", "other.npy"])), says);
    // They are those of the run from then on.
    assert_eq!(told(resume("run", "4", &[])), "");
    succeeds(validate("run"));
    let says = "the data 'other.npy' are others than when this run was last saved (32 of 32 samples that were compared): it goes on \
                with these";
    assert_eq!(told(resume("plain", "3", &["--data", "other.npy"])), says);
    // A run of before remembers no samples, and goes on with what there is.
    let path = place.join("run/checkpoints/0000004/optimizer.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(13).position(|bytes| bytes == b"\"fingerprint\"").unwrap();
    bytes[at + 1..at + 12].copy_from_slice(b"otherthings");
    fs::write(path, bytes).unwrap();
    succeeds(validate("run"));
    assert_eq!(told(resume("run", "5", &["--data", "moved.npy"])), "");
}

/// Whether they were damaged before or are now.
#[test]
fn damaged_images_are_not_taken_for_others() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let path = |name: &str| place.join("pets/cat").join(name);
    let put = |name: &str, brightness| {
        fs::create_dir_all(place.join("pets/cat")).unwrap();
        image::RgbImage::from_pixel(8, 8, image::Rgb([brightness; 3])).save(path(name)).unwrap();
    };
    (0..9).for_each(|i| put(&format!("{i}.png"), 10 * i));
    fs::write(path("1.png"), "no image").unwrap();
    let data = ["--data", "pets", "--image-size", "8", "--validation-samples", "2"];
    succeeds(train(place, &[&["--out", "run", "--steps", "1"], &data[..]].concat()));
    let goes_on = |steps| {
        succeeds(run(place, &["validate", "--checkpoint", "run"]));
        succeeds(run(place, &["train", "--resume", "run", "--steps", steps]));
    };
    goes_on("2");
    fs::write(path("2.png"), "no image").unwrap();
    fs::write(path("3.png"), "no image").unwrap();
    goes_on("3");
    (1..4).for_each(|i| put(&format!("{i}.png"), 10 * i));
    goes_on("4");
    // One more before the others, and one less after them: all have other places.
    put("+.png", 200);
    fs::remove_file(path("8.png")).unwrap();
    fails(run(place, &["validate", "--checkpoint", "run"]), 2, &["the data 'pets' are others than in training"]);
    let output = run(place, &["train", "--resume", "run", "--steps", "5"]);
    assert!(stderr(&output).contains("the data 'pets' are others than when"), "{}", stderr(&output));
    succeeds(output);
}
