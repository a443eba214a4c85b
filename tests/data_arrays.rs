//! Arrays of images and latents: what is accepted, what comes out, and the sentences for the rest.

use std::path::{Path, PathBuf};

use dtr_fused::data::array_file::ArrayFile;
use dtr_fused::data::{Dataset, OpenOptions, hold_out, may_flip, npy, open};
use dtr_fused::element::Element;
use safetensors::tensor::{Dtype, TensorView};

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn i64s(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// A `.safetensors` file of the tensors given as name, dtype, shape and bytes.
fn save(dir: &Path, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> PathBuf {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
    let path = dir.join("set.safetensors");
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    path
}

fn sample(set: &ArrayFile, index: usize, flip: bool) -> (u32, Vec<f32>) {
    let mut out = vec![f32::NAN; set.shape().iter().product()];
    (set.read(index, flip, &mut out).unwrap(), out)
}

fn refusal(path: &Path, num_classes: Option<usize>) -> String {
    let error = ArrayFile::open(path, num_classes, None).err().expect("should be refused").to_string();
    assert!(!error.contains('\n') && error.len() < 400, "{error}");
    error
}

#[test]
fn classes_may_have_names() {
    let dir = tempfile::tempdir().unwrap();
    let (data, labels) = (f32s(&latents()), i64s(&[2, 0]));
    let save = |names: Option<&str>| {
        let latents = TensorView::new(Dtype::F32, vec![2, 4, 1, 2], &data).unwrap();
        let tensors = [("latents", latents), ("labels", TensorView::new(Dtype::I64, vec![2], &labels).unwrap())];
        let metadata = names.map(|names| [("classes".to_string(), names.to_string())].into());
        let path = dir.path().join("set.safetensors");
        std::fs::write(&path, safetensors::serialize(tensors, metadata).unwrap()).unwrap();
        let path = dir.path().join("set.npy");
        npy::write(&path, Element::F32, &[2, 4, 1, 2], &data).unwrap();
        npy::write(dir.path().join("labels.npy"), Element::I64, &[2], &labels).unwrap();
        let path = dir.path().join("set.classes.json");
        names.map_or_else(|| drop(std::fs::remove_file(&path)), |text| std::fs::write(&path, text).unwrap());
    };
    for name in ["set.safetensors", "set.npy"] {
        let path = dir.path().join(name);
        save(Some(r#"["ant", "bee", "grün", "dog"]"#));
        for num_classes in [None, Some(4), Some(1000)] {
            let set = ArrayFile::open(&path, num_classes, None).unwrap();
            assert_eq!(set.class_names(), ["ant", "bee", "grün", "dog"]);
            assert!(
                set.note().unwrap().ends_with("no sample has 2 of the 4 labels, 1 ('bee') for one"),
                "{:?}",
                set.note()
            );
        }
        for (names, num_classes, what) in [
            (r#"["ant", "bee", "cat"]"#, Some(2), "names 3 classes; 1 to 2 are expected"),
            ("[]", None, "names 0 classes; 1 to 65536 are expected"),
            (r#"["ant", "bee"]"#, None, "has label 2 for sample 0; labels are 0 to 1: 2 classes have names"),
            (r#"["ant", "b\nee", "cat"]"#, None, r#"names the class "b\nee", with control characters"#),
            (r#"["ant", "bee", "ant"]"#, None, "names the class 'ant' twice"),
        ] {
            save(Some(names));
            let error = refusal(&path, num_classes);
            assert!(error.contains(what), "{error}");
        }
        save(None);
        assert_eq!(ArrayFile::open(&path, None, None).unwrap().class_names(), ["0", "1", "2"]);
    }
    // In the metadata of others the word may mean something else; the file beside an array is ours.
    save(Some(r#"{"ant": 0}"#));
    let set = ArrayFile::open(dir.path().join("set.safetensors"), None, None).unwrap();
    assert_eq!(set.class_names(), ["0", "1", "2"]);
    let error = refusal(&dir.path().join("set.npy"), None);
    assert!(error.contains("set.classes.json: is no JSON list of names: invalid type: map"), "{error}");
    // One class: its name is read where there are labels, of which a model without classes needs none.
    npy::write(dir.path().join("labels.npy"), Element::I64, &[2], &i64s(&[0, 0])).unwrap();
    std::fs::write(dir.path().join("set.classes.json"), r#"["ant"]"#).unwrap();
    let name = |num_classes| {
        let set = ArrayFile::open(dir.path().join("set.npy"), num_classes, None).unwrap();
        set.class_names().join(" ")
    };
    assert_eq!([name(None), name(Some(1))], ["ant", "ant"]);
    std::fs::remove_file(dir.path().join("labels.npy")).unwrap();
    assert_eq!(name(Some(1)), "0");
}

/// 2 latents of 4x1x2: 0 to 15 in tenths.
fn latents() -> Vec<f32> {
    (0..16).map(|i| i as f32 * 0.125).collect()
}

#[test]
fn latents_of_every_float_type_come_out_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let values = latents();
    let bytes: [(Dtype, Vec<u8>); 4] = [
        (Dtype::F32, f32s(&values)),
        (Dtype::F64, values.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect()),
        (Dtype::F16, values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect()),
        (Dtype::BF16, values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()),
    ];
    for (dtype, data) in bytes {
        let labels = ("labels", Dtype::I64, &[2][..], i64s(&[4, 0]));
        let path = save(dir.path(), &[("latents", dtype, &[2, 4, 1, 2], data), labels]);
        let set = ArrayFile::open(&path, None, None).unwrap();
        assert_eq!((set.len(), set.shape(), set.num_classes(), set.is_pictures()), (2, [4, 1, 2], 5, false));
        assert_eq!(set.class_names(), ["0", "1", "2", "3", "4"]);
        assert_eq!(sample(&set, 0, false), (4, values[..8].to_vec()));
        assert_eq!(sample(&set, 1, false), (0, values[8..].to_vec()));
        let mirrored: Vec<f32> = values[..8].chunks(2).flat_map(|row| [row[1], row[0]]).collect();
        assert_eq!(sample(&set, 0, true), (4, mirrored));
        assert_eq!(ArrayFile::open(&path, Some(1000), None).unwrap().num_classes(), 1000);
        assert_eq!(open(path.to_str().unwrap(), OpenOptions::default()).unwrap().len(), 2);
    }
}

/// 2 samples as [`latents`] are means, with standard deviations of `dtype` in this shape.
fn distributions(dir: &Path, dtype: Dtype, shape: &[usize], std: Vec<u8>) -> PathBuf {
    let labels = ("labels", Dtype::I64, &[2][..], i64s(&[0, 1]));
    let means = ("latents", Dtype::F32, &[2, 4, 1, 2][..], f32s(&latents()));
    save(dir, &[means, ("latents_std", dtype, shape, std), labels])
}

#[test]
fn standard_deviations_are_read_beside_their_means() {
    let dir = tempfile::tempdir().unwrap();
    let values: Vec<f32> = (0..16).map(|i| (15 - i) as f32 * 0.25).collect();
    let halves = values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    for (dtype, std) in [(Dtype::F32, f32s(&values)), (Dtype::F16, halves)] {
        let path = distributions(dir.path(), dtype, &[2, 4, 1, 2], std);
        let set = ArrayFile::open(&path, None, None).unwrap();
        assert_eq!(sample(&set, 1, false), (1, latents()[8..].to_vec()), "the means");
        let mut out = [f32::NAN; 8];
        assert!(set.read_std(1, false, &mut out).unwrap());
        assert_eq!(out, values[8..]);
        assert!(set.read_std(0, true, &mut out).unwrap());
        let mirrored: Vec<f32> = values[..8].chunks(2).flat_map(|row| [row[1], row[0]]).collect();
        assert_eq!(out, mirrored[..]);
        // Parts of it have them too.
        for part in hold_out(open(path.to_str().unwrap(), OpenOptions::default()).unwrap(), 1, 3).unwrap() {
            assert!(part.read_std(0, false, &mut out).unwrap());
            assert_eq!(out, values[8 * part.number_of(0)..][..8]);
        }
    }
    // Without, there are none.
    let labels = ("labels", Dtype::I64, &[2][..], i64s(&[0, 1]));
    let path = save(dir.path(), &[("latents", Dtype::F32, &[2, 4, 1, 2], f32s(&latents())), labels]);
    assert!(!ArrayFile::open(&path, None, None).unwrap().read_std(0, false, &mut [0.0; 8]).unwrap());
}

#[test]
fn standard_deviations_that_are_none_are_refused_or_named_when_they_are_read() {
    let dir = tempfile::tempdir().unwrap();
    for (dtype, shape, bytes) in
        [(Dtype::F32, [2, 4, 2, 1], 64), (Dtype::F32, [1, 4, 1, 2], 32), (Dtype::U8, [2, 4, 1, 2], 16)]
    {
        let says = refusal(&distributions(dir.path(), dtype, &shape, vec![0; bytes]), None);
        let of = format!("has 'latents_std' {shape:?} of {dtype:?}; floating-point numbers [2, 4, 1, 2] are expected");
        assert!(says.contains(&of), "{says}");
    }
    for bad in [f32::NAN, f32::INFINITY, -0.25] {
        let mut std = vec![0.5; 16];
        (std[3], std[11]) = (-0.0, bad);
        let set =
            ArrayFile::open(distributions(dir.path(), Dtype::F32, &[2, 4, 1, 2], f32s(&std)), None, None).unwrap();
        assert!(set.read_std(0, false, &mut [0.0; 8]).unwrap());
        let error = set.read_std(1, false, &mut [0.0; 8]).unwrap_err().to_string();
        assert!(
            error.contains(&format!("set.safetensors: has {bad} at place 3 of 'latents_std' of sample 1")),
            "{error}"
        );
    }
}

/// That of what is drawn: of means with a variance of 1/16 and standard deviations of 0.5, the root of 5/16.
#[test]
fn the_spread_of_latents_is_that_of_their_draws() {
    let dir = tempfile::tempdir().unwrap();
    let note = |std: f32| {
        let means: Vec<f32> = (0..16).map(|i| if i % 2 == 0 { 3.25 } else { 2.75 }).collect();
        let tensors = [
            ("latents", Dtype::F32, &[2, 4, 1, 2][..], f32s(&means)),
            ("latents_std", Dtype::F32, &[2, 4, 1, 2], f32s(&[std; 16])),
            ("labels", Dtype::I64, &[2], i64s(&[0, 1])),
        ];
        ArrayFile::open(save(dir.path(), &tensors), None, None).unwrap().note().map(str::to_string)
    };
    assert!(note(0.0).unwrap().contains("standard deviation of about 0.25, where"));
    assert_eq!(note(0.5), None);
    assert!(note(4.0).unwrap().contains("standard deviation of about 4.01, where"));
}

#[test]
fn bytes_become_minus_one_to_one_in_both_layouts() {
    let dir = tempfile::tempdir().unwrap();
    // Two RGB pixels beside each other.
    let (first, last) = ([0u8, 51, 255, 102, 153, 204], [1u8; 6]);
    let scaled = |values: [u8; 6]| values.map(|v| f32::from(v) / 127.5 - 1.0).to_vec();
    let labels = || ("labels", Dtype::U8, &[2][..], vec![1, 0]);
    let path = save(dir.path(), &[("images", Dtype::U8, &[2, 1, 2, 3], [first, last].concat()), labels()]);
    let set = ArrayFile::open(&path, None, None).unwrap();
    assert_eq!((set.shape(), set.is_pictures()), ([1, 2, 3], true), "one channel first is no channels last");
    assert_eq!(sample(&set, 0, false), (1, scaled(first)));

    npy::write(dir.path().join("p.npy"), Element::U8, &[1, 2, 1, 3], &first).unwrap();
    npy::write(dir.path().join("labels.npy"), Element::I32, &[1], &2i32.to_le_bytes()).unwrap();
    let set = ArrayFile::open(dir.path().join("p.npy"), None, None).unwrap();
    assert_eq!((set.shape(), set.num_classes(), set.is_pictures()), ([3, 2, 1], 3, true));
    assert_eq!(sample(&set, 0, false), (2, scaled([0, 102, 51, 153, 255, 204])));
    // Own labels come before the common ones.
    npy::write(dir.path().join("p.labels.npy"), Element::U16, &[1], &7u16.to_le_bytes()).unwrap();
    assert_eq!(sample(&ArrayFile::open(dir.path().join("p.npy"), None, None).unwrap(), 0, false).0, 7);
}

#[test]
fn npy_latents_and_pictures_are_told_apart_by_their_channels() {
    let dir = tempfile::tempdir().unwrap();
    npy::write(dir.path().join("labels.npy"), Element::I64, &[2], &i64s(&[0, 1])).unwrap();
    let values: Vec<f32> = latents().iter().map(|x| x - 1.0).collect();
    for (shape, pictures) in [([2, 4, 1, 2], false), ([2, 1, 4, 2], true)] {
        let path = dir.path().join("x.npy");
        npy::write(&path, Element::F32, &shape, &f32s(&values)).unwrap();
        let set = ArrayFile::open(&path, None, None).unwrap();
        assert_eq!((set.is_pictures(), &set.shape()[..]), (pictures, &shape[1..]));
        // Unless it is said.
        for said in [false, true] {
            assert_eq!(ArrayFile::open(&path, None, Some(said)).unwrap().is_pictures(), said);
        }
        assert_eq!(sample(&set, 1, false), (1, values[8..].to_vec()));
        assert_eq!(set.note(), None, "{shape:?}");
    }
}

#[test]
fn labels_that_no_sample_has_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let note = |labels: &[i64], classes| {
        let values: Vec<f32> = (0..2 * labels.len()).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let tensors = [
            ("latents", Dtype::F32, &[labels.len(), 1, 1, 2][..], f32s(&values)),
            ("labels", Dtype::I64, &[labels.len()][..], i64s(labels)),
        ];
        let set = ArrayFile::open(save(dir.path(), &tensors), classes, None).unwrap();
        set.note().map(|note| note.rsplit_once(".safetensors: ").unwrap().1.to_string())
    };
    assert_eq!(note(&[2, 0, 1, 0], None), None);
    let from_one = "no sample has 1 of the 4 labels, 0 for one: if labels are counted from 1, subtract 1";
    assert_eq!(note(&[2, 1, 3], None).as_deref(), Some(from_one));
    assert_eq!(note(&[0, 100, 0, 200], None).as_deref(), Some("no sample has 198 of the 201 labels, 1 for one"));
    assert_eq!(note(&[1, 0], Some(4)).as_deref(), Some("no sample has 2 of the 4 labels, 2 for one"));
}

#[test]
fn images_of_another_range_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let labels = |n: usize| ("labels", Dtype::U8, vec![n], vec![0; n]);
    let save = |name, values: &[f32]| {
        let (label, dtype, shape, bytes) = labels(values.len() / 2);
        save(
            dir.path(),
            &[(name, Dtype::F32, &[values.len() / 2, 1, 1, 2], f32s(values)), (label, dtype, &shape, bytes)],
        )
    };
    let says = refusal(&save("images", &[0.0, 255.0, 3.0, 7.0]), None);
    assert!(says.contains("has 255 in image 0, but images are numbers from -1 to 1, or bytes"), "{says}");
    assert_eq!(ArrayFile::open(save("latents", &[-1.0, 1.9, 0.3, -0.7]), None, None).unwrap().note(), None);
    for (factor, spread) in [(5.0, "5.66"), (0.25, "0.28"), (0.0, "0.00")] {
        let latents = [-1.0, 1.9, 0.3, -0.7].map(|x| factor * x);
        let note = ArrayFile::open(save("latents", &latents), None, None).unwrap().note().unwrap().to_string();
        assert!(note.contains(&format!("standard deviation of about {spread}, where 1 is expected")), "{note}");
    }
    // Resizing overshoots, and no image needs all of the range.
    assert_eq!(ArrayFile::open(save("images", &[-1.4, 1.4]), None, None).unwrap().note(), None);
    assert!(refusal(&save("images", &[-1.0, 1.6]), None).contains("has 1.6 in image 0"));
    let note = ArrayFile::open(save("images", &[0.0, 0.9]), None, None).unwrap().note().unwrap().to_string();
    assert!(note.contains("seem to be from 0 to 1"), "{note}");
    // Images from all of the file are looked at.
    let mut values = vec![-0.5; 2 * 1000];
    values[1000..].fill(9.0);
    assert!(refusal(&save("images", &values), None).contains("has 9 in image 500"));
    // A single one among many is met when it is read.
    let mut values = vec![-0.5; 2 * 1000];
    values[2 * 999] = 9.0;
    let set = ArrayFile::open(save("images", &values), None, None).unwrap();
    let error = set.read(999, false, &mut [0.0; 2]).unwrap_err().to_string();
    assert!(error.contains("has 9 in image 999"), "{error}");
}

/// What is not finite says nothing of the spread of the others, and is told instead.
#[test]
fn samples_that_are_not_finite_are_counted_and_not_estimated_from() {
    let dir = tempfile::tempdir().unwrap();
    let note = |factor: f32, bad: &[usize]| {
        let mut latents: Vec<f32> = (0..200).map(|i| if i % 2 == 0 { factor } else { -factor }).collect();
        bad.iter().for_each(|&sample| latents[2 * sample + 1] = f32::NAN);
        let tensors =
            [("latents", Dtype::F32, &[100, 1, 1, 2][..], f32s(&latents)), ("labels", Dtype::U8, &[100], vec![0; 100])];
        let set = ArrayFile::open(save(dir.path(), &tensors), None, None).unwrap();
        set.note().map(|note| note.replace(&format!("{}: ", dir.path().join("set.safetensors").display()), ""))
    };
    let half: Vec<usize> = (50..100).collect();
    assert_eq!(note(1.0, &half).as_deref(), Some("32 of the 64 samples looked at are not finite"));
    assert_eq!(
        note(1.0, &(0..100).collect::<Vec<_>>()).as_deref(),
        Some("64 of the 64 samples looked at are not finite")
    );
    let both = note(5.0, &[0]).unwrap();
    let spread = "\nthe latents have a standard deviation of about 5.00, where 1 is expected";
    assert!(both.starts_with(&format!("1 of the 64 samples looked at are not finite{spread}")), "{both}");
    assert_eq!(note(1.0, &[]), None);
}

#[test]
fn values_that_are_not_finite_are_named_when_they_are_read() {
    let dir = tempfile::tempdir().unwrap();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = latents();
        values[11] = bad;
        let labels = ("labels", Dtype::I64, &[2][..], i64s(&[0, 0]));
        let set = ArrayFile::open(
            save(dir.path(), &[("latents", Dtype::F32, &[2, 4, 1, 2], f32s(&values)), labels]),
            None,
            None,
        )
        .unwrap();
        let mut out = [0.0; 8];
        set.read(0, false, &mut out).unwrap();
        let error = set.read(1, false, &mut out).unwrap_err().to_string();
        assert!(error.contains(&format!("set.safetensors: has {bad} at place 3 of sample 1")), "{error}");
    }
}

#[test]
fn safetensors_that_are_no_data_set_are_refused_in_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let labels = |values: &[i64]| ("labels", Dtype::I64, vec![values.len()], i64s(values));
    let with = |name: &str, dtype, shape: &[usize], labels: (&str, Dtype, Vec<usize>, Vec<u8>), num_classes| {
        let size = shape.iter().product::<usize>() * if dtype == Dtype::F32 { 4 } else { 1 };
        let (labels_name, labels_dtype, labels_shape, labels) = labels;
        let tensors = [(name, dtype, shape, vec![0; size]), (labels_name, labels_dtype, &labels_shape[..], labels)];
        refusal(&save(dir.path(), &tensors), num_classes)
    };
    let good: &[usize] = &[2, 4, 1, 2];
    let two = || labels(&[0, 1]);
    for name in ["pixels", "moments"] {
        let says = with(name, Dtype::F32, good, two(), None);
        assert!(says.contains("has no tensor 'images' or 'latents'") && says.contains("'latents_std'"), "{says}");
    }
    assert!(
        with("latents", Dtype::F32, &[2, 4, 2], two(), None).contains("has shape [2, 4, 2]; [N, C, H, W] is expected")
    );
    assert!(with("latents", Dtype::F32, &[0, 4, 2, 2], labels(&[]), None).contains("there is nothing in it"));
    assert!(with("latents", Dtype::F32, &[2, 0, 2, 2], two(), None).contains("there is nothing in it"));
    assert!(with("latents", Dtype::F32, good, labels(&[0, 1, 2]), None).contains("has 2 samples but 3 labels"));
    assert!(with("latents", Dtype::U8, good, two(), None).contains("latents of type u8"));
    assert!(with("latents", Dtype::I8, good, two(), None).contains("elements of type I8"));
    assert!(
        with("latents", Dtype::F32, good, labels(&[0, -1]), None)
            .contains("has label -1 for sample 1; labels are 0 to")
    );
    assert!(
        with("latents", Dtype::F32, good, labels(&[0, 1 << 60]), None).contains("has label 1152921504606846976 for")
    );
    assert!(with("latents", Dtype::F32, good, labels(&[0, 10]), Some(10)).contains("labels are 0 to 9"));
    assert!(with("latents", Dtype::F32, good, two(), Some(0)).contains("num_classes is 0"));
    assert!(with("latents", Dtype::F32, good, two(), Some(1 << 60)).contains("num_classes is 1152921504606846976"));
    let floats = ("labels", Dtype::F32, vec![2], vec![0; 8]);
    assert!(with("latents", Dtype::F32, good, floats, None).contains("labels [2] of F32; integers [N] are expected"));
    let square = ("labels", Dtype::I64, vec![2, 1], vec![0; 16]);
    assert!(with("latents", Dtype::F32, good, square, None).contains("labels [2, 1] of I64"));
    assert!(
        with("latents", Dtype::F32, good, ("classes", Dtype::I64, vec![2], vec![0; 16]), None)
            .contains("no tensor 'labels'")
    );
    assert!(with("latents", Dtype::F32, good, ("images", Dtype::U8, vec![2], vec![0; 2]), None).contains("has both"));
    assert!(refusal(&dir.path().join("missing.safetensors"), None).contains("cannot be read"));
}

#[test]
fn npy_files_that_are_no_data_set_are_refused_in_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.npy");
    npy::write(&path, Element::F32, &[2, 4, 1, 2], &f32s(&latents())).unwrap();
    let error = refusal(&path, None);
    assert!(error.contains("has no labels beside it: neither") && error.contains("x.labels.npy"), "{error}");
    assert!(error.ends_with("(of samples without classes all may be 0, and with --label-dropout 1 none are needed)"));
    npy::write(dir.path().join("labels.npy"), Element::I64, &[1], &i64s(&[0])).unwrap();
    assert!(refusal(&path, None).contains("has 2 samples but 1 labels"));
    std::fs::write(dir.path().join("labels.npy"), "nonsense").unwrap();
    assert!(refusal(&path, None).contains("labels.npy: is no .npy file"));
}

#[test]
fn samples_of_one_class_need_no_labels() {
    let dir = tempfile::tempdir().unwrap();
    let npy = dir.path().join("x.npy");
    npy::write(&npy, Element::F32, &[2, 4, 1, 2], &f32s(&latents())).unwrap();
    let safetensors = save(dir.path(), &[("latents", Dtype::F32, &[2, 4, 1, 2], f32s(&latents()))]);
    for path in [npy, safetensors] {
        let set = ArrayFile::open(&path, Some(1), None).unwrap();
        assert_eq!((set.len(), set.num_classes(), set.note()), (2, 1, None));
        assert_eq!(sample(&set, 1, false), (0, latents()[8..].to_vec()));
        assert!(refusal(&path, Some(2)).contains("labels"));
    }
}

#[test]
fn only_photographs_are_mirrored_unless_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("photos.npy");
    std::fs::create_dir(&folder).unwrap();
    assert!(may_flip(folder.to_str().unwrap()) && may_flip("photos"));
    assert!(!["digits", "latents.safetensors", "somewhere/images.npy"].into_iter().any(may_flip));
}

#[test]
fn other_things_are_no_data() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = |what: &str| open(what, OpenOptions::default()).err().expect("should be refused").to_string();
    let file = dir.path().join("set.tar");
    std::fs::write(&file, "").unwrap();
    assert!(refusal(file.to_str().unwrap()).contains("is neither a folder of images nor a .safetensors or .npy file"));
    assert!(refusal("digitz").contains("digitz: does not exist; data is 'digits', a folder"));
}

/// What is mapped of a file and is not there any more would end the process when it is touched.
#[cfg(unix)] // elsewhere a mapped file cannot be cut
#[test]
fn a_file_that_is_cut_short_while_it_is_in_use_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.npy");
    npy::write(dir.path().join("labels.npy"), Element::I64, &[2], &i64s(&[0, 1])).unwrap();
    npy::write(&path, Element::F32, &[2, 4, 32, 32], &f32s(&[0.5; 2 * 4096])).unwrap();
    let set = ArrayFile::open(&path, None, None).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    for error in [set.read(1, false, &mut [0.0; 4096]).err(), set.read_std(1, false, &mut [0.0; 4096]).err()] {
        let error = error.unwrap().to_string();
        assert!(error.contains("x.npy: was cut short"), "{error}");
    }
}
