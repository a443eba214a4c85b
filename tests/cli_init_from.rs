//! Runs that start from weights of others, and what is said of weights that are another model's.

mod program;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dtr_fused::model::embed::position_embedding;
use dtr_fused::safetensors_file::SafetensorsFile;
use dtr_fused::train::checkpoint::{self, FileOut, Metadata, TensorOut};
use program::{fails, run, stderr, succeeds, train};

/// Tensors by name: shape and numbers.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn weights_of(run: &Path) -> PathBuf {
    checkpoint::latest(run).unwrap().unwrap().1.join(checkpoint::MODEL)
}

fn read(path: &Path) -> Tensors {
    let file = SafetensorsFile::open(path).unwrap();
    let of = |name: &str| {
        let tensor = file.tensor(name).unwrap();
        let mut numbers = vec![0.0; tensor.elements()];
        tensor.to_f32(&mut numbers);
        (name.to_string(), (tensor.shape.to_vec(), numbers))
    };
    file.names().map(of).collect()
}

/// A file `place/checkpoints/STEP/model.safetensors` without a word of how it was trained, as another program may write it.
fn write(place: &Path, step: u64, tensors: &Tensors) -> String {
    let tensors = tensors.iter().map(|(name, (shape, data))| TensorOut { name: name.clone(), shape, data }).collect();
    let metadata = Metadata::from([("seed".into(), "42".into())]);
    let file = FileOut { name: checkpoint::MODEL, tensors, metadata };
    let path = checkpoint::write(place, step, &[file], "").unwrap().join(checkpoint::MODEL);
    path.display().to_string()
}

#[test]
fn a_run_starts_from_given_weights() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    succeeds(train(place, &["--out", "first", "--steps", "2"]));
    let weights = |run: &str| read(&weights_of(&place.join(run)));
    let average = |run: &str| read(&weights_of(&place.join(run)).with_file_name(checkpoint::EMA));
    let from = ["--init-from", "first/checkpoints/0000002/model.safetensors", "--steps", "1"];
    let still = ["--lr", "1e-20", "--warmup-steps", "0", "--out"];
    let output = train(place, &[&from[..], &still, &["second"]].concat());
    let said = stderr(&output);
    succeeds(output);
    assert!(said.contains("starting from the weights in first/checkpoints/0000002/model.safetensors\n"), "{said}");
    succeeds(train(place, &[&still[..], &["third", "--steps", "1"]].concat()));
    let [first, second, third] = ["first", "second", "third"].map(weights);
    let near = |a: &Tensors, b: &Tensors| {
        let same = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-18;
        a.keys().eq(b.keys()) && a.values().zip(b.values()).all(|(a, b)| a.1.iter().zip(&b.1).all(same))
    };
    assert!(near(&first, &second) && !near(&first, &third), "drawn weights are those that were trained");
    // The average starts there too, and so does a run that was killed before its first checkpoint.
    let apart = |(a, b): (&f32, &f32)| (a - b).abs();
    let farthest = |(a, b): (&Vec<f32>, &Vec<f32>)| a.iter().zip(b).map(apart).fold(0.0, f32::max);
    let mean = average("second");
    assert!(
        mean.values().zip(first.values()).all(|(a, b)| farthest((&a.1, &b.1)) <= 1e-6),
        "the average is of other weights"
    );
    std::fs::remove_dir_all(place.join("second/checkpoints")).unwrap();
    succeeds(run(place, &["train", "--resume", "second"]));
    assert!(near(&first, &weights("second")));
    fails(
        train(place, &[&from[..], &["--depth", "2", "--out", "other"]].concat()),
        1,
        &["first/checkpoints", "blocks.1."],
    );
    assert!(!place.join("other").exists());
}

/// No shape of a tensor shows these.
#[test]
fn what_is_another_than_when_the_weights_were_trained_is_told() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    succeeds(train(place, &["--out", "first", "--steps", "1", "--routing", "dense", "--schedule", "linear"]));
    let path = weights_of(&place.join("first"));
    let from = ["--init-from", path.to_str().unwrap(), "--steps", "1"];
    let said = |more: &[&str]| {
        let output = train(place, &[&from[..], more].concat());
        let said = stderr(&output);
        succeeds(output);
        said
    };
    let same = said(&["--routing", "dense", "--schedule", "linear", "--beta", "0.3"]);
    assert!(same.contains("model.safetensors\n"), "{same}");
    let other = said(&[]);
    let told = "; they were trained with num_heads 2, routing dense, schedule linear, prediction noise, and go on with num_heads 2, \
                routing paper, beta 0.8, alpha 4.0, schedule cosine, prediction noise: another model at first";
    assert!(other.contains(told), "{other}");
    fails(train(place, &[&from[..], &["--num-heads", "1"]].concat()), 1, &["2 heads: give --num-heads 2"]);

    let tensors = read(&path);
    let unknown = write(place, 1, &tensors);
    let output = train(place, &["--init-from", &unknown, "--steps", "1"]);
    assert!(
        stderr(&output).contains("they do not say how they were trained, and go on with num_heads 2, routing paper")
    );
    fails(train(place, &["--init-from", "first", "--steps", "1"]), 1, &["is a directory", "0000001/ema.safetensors"]);
}

/// All but the rows of classes are those of the file, whatever it has of these.
#[test]
fn other_classes_are_learned_from_given_weights() {
    const LABELS: &str = "y_embedder.embedding_table.weight";
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    succeeds(train(place, &["--out", "first", "--steps", "2"]));
    let first = read(&weights_of(&place.join("first")));
    let still = ["--steps", "1", "--lr", "1e-20", "--warmup-steps", "0"];
    let started = |run: &str, more: &[&str]| {
        let output = train(place, &[&still[..], &["--out", run], more].concat());
        let said = stderr(&output);
        succeeds(output);
        (read(&weights_of(&place.join(run))), said)
    };
    let (drawn, _) = started("drawn", &[]);
    let row = |tensors: &Tensors, row: usize| tensors[LABELS].1[row * 32..][..32].to_vec();
    for rows in [5, 11, 31] {
        let mut given = first.clone();
        let (shape, numbers) = given.get_mut(LABELS).unwrap();
        *numbers = numbers.iter().map(|x| x + 0.5).cycle().take(rows * 32).collect();
        shape[0] = rows;
        let path = write(place, 1, &given);
        let name = rows.to_string();
        let (found, said) = started(&name, &["--init-from", &path, "--init-labels", "new"]);
        assert!(said.contains(&format!("starting from the weights in {path}, with new labels; ")), "{said}");
        let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-18);
        for (name, (shape, numbers)) in found.iter().filter(|(name, _)| *name != LABELS) {
            assert!(*shape == first[name].0 && near(numbers, &first[name].1), "{name}");
        }
        assert!((0..10).all(|class| near(&row(&found, class), &row(&drawn, class))), "other rows than are drawn");
        assert!(near(&row(&found, 10), &row(&given, rows - 1)), "another row for no class");
    }
    let mut flat = first.clone();
    flat.get_mut(LABELS).unwrap().0 = vec![11 * 32];
    let path = write(place, 1, &flat);
    fails(train(place, &["--init-from", &path, "--init-labels", "new"]), 1, &["has shape [352], but this model needs"]);
    let (shape, numbers) = flat.get_mut(LABELS).unwrap();
    (*shape, *numbers) = (vec![0, 32], Vec::new());
    let path = write(place, 1, &flat);
    fails(
        train(place, &["--init-from", &path, "--init-labels", "new"]),
        1,
        &["has shape [0, 32], but this model needs"],
    );
    fails(train(place, &["--init-labels", "new"]), 2, &["init_labels is new", "give --init-from FILE"]);
    // The hint is for labels alone.
    let path = write(place, 1, &first);
    let output = train(place, &["--init-from", &path, "--hidden-size", "64", "--num-classes", "12"]);
    assert!(!stderr(&output).contains("--init-labels"), "{}", stderr(&output));
    fails(output, 1, &["but this model needs"]);
}

/// Trained, resumed, sampled with its file of weights or without, and started from.
#[test]
fn a_model_need_not_learn_its_variance() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    succeeds(train(place, &["--out", "run", "--steps", "2", "--learn-sigma", "false"]));
    succeeds(run(place, &["train", "--resume", "run", "--steps", "3"]));
    let lines = std::fs::read_to_string(place.join("run/metrics.jsonl")).unwrap();
    assert!(lines.lines().last().unwrap().contains("\"vb\":0.0"), "{lines}");
    let path = weights_of(&place.join("run"));
    assert_eq!(read(&path)["final_layer.linear.weight"].0, [4, 32]);
    let sample = |checkpoint: &str, sampler: &str, npz: &str| {
        let way = ["sample", "--checkpoint", checkpoint, "--device", "cpu", "--steps", "3", "--num", "10"];
        succeeds(run(place, &[&way[..], &["--sampler", sampler, "--npz", npz, "--overwrite"]].concat()));
        std::fs::read(place.join(npz)).unwrap()
    };
    let ema = path.with_file_name(checkpoint::EMA).display().to_string();
    for sampler in ["ddim", "ddpm", "dpm++"] {
        assert!(sample("run", sampler, "run.npz") == sample(&ema, sampler, "file.npz"), "{sampler}");
    }
    let from = ["--init-from", &ema, "--steps", "1"];
    fails(
        train(place, &from),
        1,
        &["needs [8, 32]: outputs for what it predicts, and with --learn-sigma true as many for its variance"],
    );
    succeeds(train(place, &[&from[..], &["--learn-sigma", "false"]].concat()));
}

#[test]
fn weights_of_other_models_are_refused_with_what_would_help() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    succeeds(train(place, &["--out", "first", "--steps", "1"]));
    let tensors = read(&weights_of(&place.join("first")));
    let start =
        |tensors: &Tensors| train(place, &["--init-from", &write(place, 1, tensors), "--steps", "1", "--lr", "1e-9"]);

    let wrapped = tensors.iter().map(|(name, tensor)| (format!("module.{name}"), tensor.clone())).collect();
    fails(start(&wrapped), 1, &["take 'module.' off the names"]);

    let renamed = |name: &String| name.replace("x_embedder.", "pos_embed.").replace("blocks.", "transformer_blocks.");
    let of_diffusers: Tensors = tensors.iter().map(|(name, tensor)| (renamed(name), tensor.clone())).collect();
    let says = ["'pos_embed.proj.bias'", "it is a name of diffusers, and scripts/convert_weights.py"];
    fails(start(&of_diffusers), 1, &says);
    fails(run(place, &["sample", "--checkpoint", &write(place, 1, &of_diffusers)]), 1, &says);

    let moments = ["--init-from", "first/checkpoints/0000001/optimizer.safetensors", "--steps", "1"];
    fails(train(place, &moments), 1, &["they are moments of AdamW, and the weights are in ema.safetensors"]);

    let mut learned = tensors.clone();
    learned.get_mut("pos_embed").unwrap().1[5] += 0.5;
    fails(start(&learned), 1, &["'pos_embed' is up to 0.50 away"]);
    // As in bf16.
    learned.get_mut("pos_embed").unwrap().1[5] -= 0.496;
    succeeds(start(&learned));
    let mut other = tensors.clone();
    let (shape, numbers) = other.get_mut("pos_embed").unwrap();
    (shape[1], *numbers) = (36, position_embedding(6, 32));
    let output = start(&other);
    assert!(stderr(&output).contains("trained on images of 36 tokens; these have 16"), "{}", stderr(&output));
    succeeds(output);
    other.get_mut("pos_embed").unwrap().1[700] += 0.5;
    fails(start(&other), 1, &["'pos_embed' is up to 0.50 away"]);
    let (shape, numbers) = other.get_mut("pos_embed").unwrap();
    (shape[1], *numbers) = (32, numbers[..32 * 32].to_vec());
    fails(start(&other), 1, &["'pos_embed' has shape [1, 32, 32], but this model needs [1, 16, 32]"]);
    let mut without = tensors.clone();
    without.remove("pos_embed");
    succeeds(start(&without));

    for (name, rows, says) in [
        (
            "y_embedder.embedding_table.weight",
            10,
            "[10, 32], but this model needs [11, 32]: a row a class, and one for no class",
        ),
        ("final_layer.linear.bias", 4, "[4], but this model needs [8]: outputs for what it predicts"),
    ] {
        let mut cut = tensors.clone();
        let (shape, numbers) = cut.get_mut(name).unwrap();
        numbers.truncate(numbers.len() / shape[0] * rows);
        shape[0] = rows;
        fails(start(&cut), 1, &[says]);
    }
    let mut wide = tensors.clone();
    let (shape, numbers) = wide.get_mut("y_embedder.embedding_table.weight").unwrap();
    (shape[0], *numbers) = (22, numbers.repeat(2));
    let path = write(place, 1, &wide);
    let says = ["for all of its classes, give --num-classes 21", "; to learn other classes, give --init-labels new"];
    fails(train(place, &["--init-from", &path]), 1, &says);
    for start in [&b"PK\x03\x04\0\0\x08\x08\0\0"[..], b"\x80\x02ctorch._utils\n"] {
        std::fs::write(place.join("w.pt"), start).unwrap();
        fails(train(place, &["--init-from", "w.pt"]), 1, &["w.pt: seems to be a PyTorch file: scripts/convert"]);
    }
}
