//! Classes on the command line: their names, and models that learn none.

mod program;

use std::fs;
use std::path::Path;

use dtr_fused::data::npy;
use dtr_fused::element::Element;
use dtr_fused::safetensors_file::SafetensorsFile;
use safetensors::tensor::{Dtype, TensorView};

use program::{fails, run, stderr, succeeds, train};

/// A run of the tiny model in `place/run`.
fn trained(place: &Path, args: &[&str]) -> String {
    let step = ["--out", "run", "--steps", "1", "--device", "cpu", "--samples-per-class", "1"];
    let output = train(place, &[&step, args].concat());
    let said = stderr(&output);
    succeeds(output);
    said
}

/// `sample` of `checkpoint` to `place/FILE.png` and `place/FILE.npz`.
fn sample(place: &Path, checkpoint: &str, file: &str, args: &[&str]) -> std::process::Output {
    let [png, npz] = ["png", "npz"].map(|ending| format!("{file}.{ending}"));
    let way = ["sample", "--checkpoint", checkpoint, "--device", "cpu", "--steps", "3"];
    run(place, &[&way[..], &["--out", &png, "--npz", &npz, "--overwrite"], args].concat())
}

/// The labels in the archive, whose last array they are.
fn labels(place: &Path, file: &str, n: usize) -> Vec<i64> {
    let npz = fs::read(place.join(file).with_extension("npz")).unwrap();
    // It ends after the numbers with a directory, which begins with a signature.
    let end = npz.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
    npz[end - 8 * n..end].chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn put(place: &Path, name: &str) {
    let path = place.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    image::RgbImage::from_fn(8, 8, |x, y| image::Rgb([x, y, x * y].map(|v| 4 * v as u8))).save(path).unwrap();
}

#[test]
fn classes_are_sampled_by_name() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    for name in ["pets/dog/a.png", "pets/cat/a.png", "pets/cow/a.png"] {
        put(place, name);
    }
    trained(place, &["--data", "pets", "--image-size", "8"]);
    let ema = "run/checkpoints/0000001/ema.safetensors";
    for checkpoint in ["run", ema] {
        for (classes, expected) in
            [("dog,cat", [2, 0, 2, 0]), ("2,cat", [2, 0, 2, 0]), ("1..3", [1, 2, 1, 2]), ("..1,1", [0, 1, 0, 1])]
        {
            succeeds(sample(place, checkpoint, "some", &["--classes", classes, "--num", "4"]));
            assert_eq!(labels(place, "some", 4), expected, "{classes} of {checkpoint}");
        }
        let says = "'ox', but there is no such class: give numbers from 0 to 2 or ranges such as 0..3, or of 'cat', 'cow', 'dog'";
        fails(sample(place, checkpoint, "none", &["--classes", "cat,ox"]), 2, &[says]);
        assert!(succeeds(run(place, &["info", checkpoint])).contains("classes       0 cat, 1 cow, 2 dog"));
    }
    // Once names were beside the moments alone.
    for name in ["model", "ema"] {
        let path = place.join(format!("run/checkpoints/0000001/{name}.safetensors"));
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.windows(9).position(|bytes| bytes == b"\"classes\"").unwrap();
        bytes[at + 1..at + 8].copy_from_slice(b"another");
        fs::write(path, bytes).unwrap();
    }
    succeeds(sample(place, "run", "some", &["--classes", "cow", "--num", "1"]));
    assert_eq!(labels(place, "some", 1), [1]);
    assert!(succeeds(run(place, &["info", "run"])).contains("classes       0 cat, 1 cow, 2 dog"));
    fails(sample(place, ema, "none", &["--classes", "cow"]), 2, &["'cow', but there is no such class"]);
}

#[test]
fn other_classes_than_given_weights_learned_are_told() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    for name in ["pets/cat/a.png", "pets/cow/a.png", "others/cat/a.png", "others/dog/a.png"] {
        put(place, name);
    }
    trained(place, &["--data", "pets", "--image-size", "8"]);
    let on = |data, more: &[&str]| {
        let from = ["--image-size", "8", "--init-from", "run/checkpoints/0000001/ema.safetensors"];
        trained(place, &[&from, &["--data", data, "--out", &format!("of-{data}")][..], more].concat())
    };
    let note = "whose class 1 was 'cow', and is 'dog' in these data (--init-labels new draws all anew)";
    assert!(on("others", &[]).contains(note));
    assert!(!on("pets", &["--out", "same"]).contains("whose class"));
    assert!(!on("others", &["--out", "new", "--init-labels", "new"]).contains("whose class"));
}

#[test]
fn images_without_class_folders_are_one_class() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    ["faces/a.png", "faces/b.png", "faces/c.png"].iter().for_each(|name| put(place, name));
    fs::write(place.join("faces/readme.txt"), "faces").unwrap();
    let said = trained(place, &["--data", "faces", "--image-size", "8"]);
    let note =
        "faces: there are no class folders, so all images are of one class; 1 files that are no PNG, JPEG or WebP";
    assert!(said.contains("3 images of 3 x 8 x 8 in 1 classes") && said.contains(note), "{said}");
    // Moved, they are the same.
    fs::rename(place.join("faces"), place.join("people")).unwrap();
    succeeds(run(place, &["train", "--resume", "run", "--data", "people", "--steps", "2"]));
}

/// What is asked of a model that never saw a label has none either: the rows of classes may be anything.
#[test]
fn a_model_without_classes_is_asked_for_none() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let grid = ["--sample-classes", "1", "--samples-per-class", "12", "--lr", "0.01", "--ema-decay", "0.9"];
    trained(place, &[&["--label-dropout", "1", "--steps", "50"], &grid[..]].concat());
    let ema = "run/checkpoints/0000050/ema.safetensors";
    succeeds(sample(place, "run", "of-run", &["--num", "12"]));
    assert_eq!(labels(place, "of-run", 12), [10; 12]);
    let made = fs::read(place.join("of-run.png")).unwrap();
    assert!(made == fs::read(place.join("run/samples/0000050.png")).unwrap(), "another grid than that of training");
    let table = {
        let file = SafetensorsFile::open(place.join(ema)).unwrap();
        file.tensor("y_embedder.embedding_table.weight").unwrap().bytes.to_vec()
    };
    let mut bytes = fs::read(place.join(ema)).unwrap();
    let at = bytes.windows(table.len()).position(|bytes| bytes == table).unwrap();
    bytes[at..][..10 * 32 * 4].chunks_exact_mut(4).for_each(|x| x.copy_from_slice(&3f32.to_le_bytes()));
    fs::write(place.join("other.safetensors"), bytes).unwrap();
    succeeds(sample(place, "other.safetensors", "of-other", &["--num", "12"]));
    assert!(made == fs::read(place.join("of-other.png")).unwrap(), "rows of classes count");
    fails(sample(place, "run", "none", &["--classes", "3"]), 2, &["trained without (label_dropout 1): leave them out"]);
    fails(sample(place, "run", "none", &["--cfg", "2"]), 2, &["knows no class to guide to: give 1"]);
    fails(train(place, &["--label-dropout", "1", "--sample-cfg", "2"]), 2, &["sample_cfg is 2, but a model"]);
    assert!(succeeds(run(place, &["info", "run"])).contains("images of 1 x 8 x 8, of no class"));
    // It cannot begin to learn classes, nor stop.
    let resumed = |share: &str| run(place, &["train", "--resume", "run", "--steps", "60", "--label-dropout", share]);
    fails(resumed("0.1"), 2, &["label_dropout is 0.1, but this run was trained with 1, and a model without classes"]);
}

#[test]
fn a_model_without_classes_needs_no_labels() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let pixels: Vec<u8> = (0..20 * 64).map(|i| (i * 37 % 251) as u8).collect();
    let bytes = TensorView::new(Dtype::U8, vec![20, 1, 8, 8], &pixels).unwrap();
    npy::write(place.join("bare.npy"), Element::U8, &[20, 1, 8, 8], &pixels).unwrap();
    fs::write(place.join("bare.safetensors"), safetensors::serialize([("images", bytes)], None).unwrap()).unwrap();
    for data in ["bare.npy", "bare.safetensors"] {
        let of = |more: &[&str]| train(place, &[&["--data", data, "--out", data, "--steps", "1"][..], more].concat());
        let out = format!("run-{data}");
        fails(of(&[]), 1, &[data, "labels"]);
        let none = ["--label-dropout", "1", "--validation-data", data, "--out", &out];
        let output = of(&none);
        assert!(stderr(&output).contains("20 images of 1 x 8 x 8 in 1 classes"), "{}", stderr(&output));
        succeeds(output);
        succeeds(run(place, &["train", "--resume", &out, "--steps", "2"]));
        succeeds(run(place, &["validate", "--checkpoint", &out]));
    }
}

/// `n` samples of 1 x 8 x 8 in `classes` classes.
fn save_array(path: &Path, n: usize, classes: usize) {
    let pixels: Vec<u8> = (0..n * 64).map(|i| (i * 37 % 251) as u8).collect();
    npy::write(path, Element::U8, &[n, 1, 8, 8], &pixels).unwrap();
    let labels: Vec<u8> = (0..n).map(|i| (i % classes) as u8).collect();
    npy::write(path.with_extension("labels.npy"), Element::U8, &[n], &labels).unwrap();
}

/// Labels of arrays are numbers, whatever the classes are called.
#[test]
fn arrays_may_get_names_of_classes_later() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    save_array(&place.join("x.npy"), 12, 3);
    succeeds(train(place, &["--data", "x.npy", "--steps", "1", "--out", "run"]));
    let validated = || succeeds(run(place, &["validate", "--checkpoint", "run", "--data", "x.npy", "--json"]));
    let before = validated();
    fs::write(place.join("x.classes.json"), r#"["0", "10", "2"]"#).unwrap();
    assert_eq!(validated(), before);
    let go_on = |steps| run(place, &["train", "--resume", "run", "--steps", steps]);
    succeeds(go_on("2"));
    assert!(succeeds(run(place, &["info", "run"])).contains("\nclasses       0 0, 1 10, 2 2\n"));
    // From then on they are those of the run.
    fs::write(place.join("x.classes.json"), r#"["0", "2", "10"]"#).unwrap();
    fails(go_on("3"), 2, &["class 1 of the data 'x.npy' is '2', but was '10'"]);

    save_array(&place.join("one.npy"), 12, 1);
    fs::write(place.join("one.classes.json"), r#"["cat"]"#).unwrap();
    succeeds(train(place, &["--data", "one.npy", "--steps", "1", "--out", "cats"]));
    succeeds(run(place, &["train", "--resume", "cats", "--steps", "2"]));
    succeeds(run(place, &["sample", "--checkpoint", "cats", "--classes", "cat", "--num", "1", "--steps", "1"]));
}
