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
    let told = "; they were trained with num_heads 2, routing dense, schedule linear, and go on with num_heads 2, routing paper, beta 0.8, \
                alpha 4.0, schedule cosine: another model at first";
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
        (
            "final_layer.linear.bias",
            4,
            "[4], but this model needs [8]: outputs for the noise, and as many for its variance",
        ),
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
    fails(train(place, &["--init-from", &path]), 1, &["for all of its classes, give --num-classes 21"]);
    for start in [&b"PK\x03\x04\0\0\x08\x08\0\0"[..], b"\x80\x02ctorch._utils\n"] {
        std::fs::write(place.join("w.pt"), start).unwrap();
        fails(train(place, &["--init-from", "w.pt"]), 1, &["w.pt: seems to be a PyTorch file: save its tensors with"]);
    }
}
