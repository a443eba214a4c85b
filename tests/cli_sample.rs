//! `dtr-fused sample` as a user runs it.

mod program;

use std::fs;
use std::path::{Path, PathBuf};
#[cfg(unix)]
use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    thread::sleep,
    time::{Duration, Instant},
};

use dtr_fused::safetensors_file::SafetensorsFile;
use dtr_fused::train::checkpoint::{self, FileOut, Metadata, TensorOut};
use program::{fails, run, stderr, succeeds, train};

/// A run of a step in `place/run`, on the CPU: the tests are the same on a machine with a GPU.
fn short_run(place: &Path, args: &[&str]) {
    let step = ["--out", "run", "--steps", "1", "--samples-per-class", "1", "--device", "cpu"];
    succeeds(train(place, &[&step, args].concat()));
}

/// A run that learned something, so that samples of it are more than black and white.
fn long_run(place: &Path, args: &[&str]) {
    short_run(place, &[&["--steps", "100", "--lr", "0.01", "--ema-decay", "0.9"], args].concat());
}

/// `dtr-fused sample` of that run, on the CPU.
fn sample_in(steps: &str, place: &Path, args: &[&str]) -> std::process::Output {
    run(place, &[&["sample", "--checkpoint", "run", "--steps", steps, "--device", "cpu"], args].concat())
}

/// [`sample_in`] two denoising steps.
fn sample(place: &Path, args: &[&str]) -> std::process::Output {
    sample_in("2", place, args)
}

/// Replaces `from` by `to` in the run's configuration and in that of its checkpoint.
fn edit_config(place: &Path, from: &str, to: &str) {
    for file in ["run/config.toml", "run/checkpoints/0000001/config.toml"] {
        let text = fs::read_to_string(place.join(file)).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(place.join(file), text.replace(from, to)).unwrap();
    }
}

#[test]
fn a_run_in_bf16_is_sampled_and_resumed_in_f32_without_amx() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    short_run(place, &[]);
    let on_cpu = |command: &[&str], more: &[&str]| {
        let args = [command, &["--device", "cpu"], more].concat();
        program::command(place, &args).env("DTR_CPU", "avx2").output().unwrap()
    };
    let sample = |out: &str| on_cpu(&["sample", "--checkpoint", "run", "--steps", "2"], &["--out", out]);
    succeeds(sample("f32.png"));
    // As a run looks that a GPU, or a CPU with AMX, trained in bf16.
    edit_config(place, "precision = \"f32\"", "precision = \"bf16\"");
    let output = sample("bf16.png");
    assert!(stderr(&output).contains("computing in f32: without AMX"), "{}", stderr(&output));
    succeeds(output);
    assert!(fs::read(place.join("f32.png")).unwrap() == fs::read(place.join("bf16.png")).unwrap());
    let asked_for = on_cpu(&["sample", "--checkpoint", "run", "--steps", "2"], &["--precision", "bf16"]);
    fails(asked_for, 2, &["only with AMX"]);
    fails(
        self::sample(place, &["--precision", "f16"]),
        2,
        &["invalid value 'f16' for '--precision <f32|bf16>': 'f16' is none of f32, bf16"],
    );
    // A file of its weights says so, too.
    let average = fs::read(average(place)).unwrap();
    let header =
        String::from_utf8_lossy(&average[8..][..u64::from_le_bytes(average[..8].try_into().unwrap()) as usize]);
    assert!(header.contains("\"precision\":\"f32\""), "{header}");
    let of_bf16 = header.replace("\"precision\":\"f32\"", "\"precision\":\"bf16\"");
    let file = [&(of_bf16.len() as u64).to_le_bytes(), of_bf16.as_bytes(), &average[8 + header.len()..]].concat();
    fs::write(place.join("bf16.safetensors"), file).unwrap();
    let output = on_cpu(&["sample", "--checkpoint", "bf16.safetensors", "--steps", "2"], &[]);
    assert!(stderr(&output).contains("computing in f32: without AMX"), "{}", stderr(&output));
    succeeds(output);
    let resume = |more: &[&str]| on_cpu(&["train", "--resume", "run", "--steps", "2"], more);
    fails(resume(&[]), 2, &["only with AMX, which this one has not, or DTR_CPU leaves out: give --precision f32"]);
    succeeds(resume(&["--precision", "f32"]));
}

#[test]
fn with_amx_a_run_in_bf16_is_trained_resumed_and_sampled_on_the_cpu() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let train = |args: &[&str]| train(place, &[&["--device", "cpu", "--samples-per-class", "1"], args].concat());
    let output = train(&["--precision", "bf16", "--steps", "3", "--out", "at_once"]);
    if !dtr_fused::backend::cpu::has_bf16() {
        return fails(output, 2, &["only with AMX"]);
    }
    assert!(stderr(&output).contains("the products of the blocks are in bf16"), "{}", stderr(&output));
    succeeds(output);
    // In two parts: the same bits.
    succeeds(train(&["--precision", "bf16", "--steps", "1", "--out", "run"]));
    succeeds(run(place, &["train", "--resume", "run", "--steps", "3"]));
    // In f32: others.
    succeeds(train(&["--precision", "f32", "--steps", "3", "--out", "f32"]));
    let [at_once, resumed, in_f32] = ["at_once", "run", "f32"].map(|run| {
        let weights = fs::read(place.join(run).join("checkpoints/0000003/model.safetensors")).unwrap();
        let sampled = self::run(place, &["sample", "--checkpoint", run, "--steps", "2", "--out", "sampled.png"]);
        assert!(!stderr(&sampled).contains("computing in f32"), "{}", stderr(&sampled));
        succeeds(sampled);
        (weights, fs::read(place.join("sampled.png")).unwrap())
    });
    assert!(at_once == resumed, "a run in two parts has other bits");
    assert!(at_once.0 != in_f32.0, "bf16 is no other than f32");
    // A run can be sampled in the other.
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    long_run(place, &[]);
    let [as_trained, in_f32, in_bf16] = [&[][..], &["--precision", "f32"], &["--precision", "bf16"]].map(|precision| {
        succeeds(sample(place, precision));
        fs::read(place.join("grid.png")).unwrap()
    });
    assert!(as_trained == in_f32 && in_bf16 != in_f32, "sampled in another precision than was asked for");
}

/// The run's moving average.
fn average(place: &Path) -> PathBuf {
    checkpoint::latest(&place.join("run")).unwrap().unwrap().1.join(checkpoint::EMA)
}

/// A file `weights.safetensors` with those tensors of the run's moving average that `keep` chooses, and nothing else, as another
/// program may write it.
fn write_foreign(place: &Path, keep: impl Fn(&str) -> bool) {
    let file = SafetensorsFile::open(average(place)).unwrap();
    let tensors: Vec<_> =
        file.names().filter(|name| keep(name)).map(|name| (name, file.tensor(name).unwrap())).collect();
    let numbers: Vec<Vec<f32>> = tensors.iter().map(|(_, tensor)| bytemuck::pod_collect_to_vec(tensor.bytes)).collect();
    let tensors = tensors.iter().zip(&numbers).map(|((name, tensor), data)| TensorOut {
        name: name.to_string(),
        shape: tensor.shape,
        data,
    });
    let file = FileOut { name: "weights.safetensors", tensors: tensors.collect(), metadata: Metadata::new() };
    let written = checkpoint::write(&place.join("elsewhere"), 1, &[file], "").unwrap();
    fs::rename(written.join("weights.safetensors"), place.join("weights.safetensors")).unwrap();
}

#[test]
fn a_file_of_weights_is_sampled_without_its_run() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    // What no shape tells, and only the file's own words do. Without label dropout there is no guidance.
    long_run(place, &["--routing", "random", "--seed", "7", "--label-dropout", "0"]);
    let sample = |checkpoint: &str, more: &[&str]| {
        let args = [
            "sample",
            "--checkpoint",
            checkpoint,
            "--steps",
            "2",
            "--device",
            "cpu",
            "--npz",
            "all.npz",
            "--overwrite",
        ];
        let output = run(place, &[&args, more].concat());
        let said = stderr(&output);
        succeeds(output);
        (fs::read(place.join("all.npz")).unwrap(), said)
    };
    let of_run = sample("run", &[]).0;
    fs::copy(average(place), place.join("copy.safetensors")).unwrap();
    let (of_file, said) = sample("copy.safetensors", &[]);
    assert!(of_file == of_run, "the file alone is another model");
    assert!(!said.contains("does not say"), "{said}");
    let (of_other, said) = sample("copy.safetensors", &["--set", "seed=8"]);
    assert!(of_other != of_run, "--set changes nothing");
    assert!(said.contains("copy.safetensors says seed 7, and --set otherwise"), "{said}");
    assert!(!sample("copy.safetensors", &["--set", "alpha=4"]).1.contains("alpha"), "4 is 4.0");
    let said = succeeds(run(place, &["info", "copy.safetensors"]));
    for part in
        ["custom (32 wide, 1 blocks, 2 heads, patch 2)", "random, beta", "images of 1 x 8 x 8, 10 classes", "cosine"]
    {
        assert!(said.contains(part), "'{part}' is not in: {said}");
    }

    write_foreign(place, |_| true);
    let told = ["num_heads=2", "routing=random", "seed=7", "schedule=cosine", "label_dropout=0"];
    let (of_foreign, said) = sample("weights.safetensors", &[&["--set"], &told[..]].concat());
    assert!(of_foreign == of_run, "what --set says is another model");
    let assumed = "weights.safetensors does not say beta 0.8, alpha 4.0, prediction noise, data_kind images, loss_weight constant: this is assumed (--set";
    assert!(said.contains(assumed), "{said}");
    // As the published weights.
    let said = sample("weights.safetensors", &["--set", "num_heads=2"]).1;
    let assumed = "does not say routing dense, schedule linear, prediction noise, data_kind images, label_dropout 0.1, loss_weight constant: this is assumed";
    assert!(said.contains(assumed), "{said}");

    let refused = |checkpoint: &str, more: &[&str], code, says: &[&str]| {
        fails(run(place, &[&["sample", "--checkpoint", checkpoint, "--steps", "2"], more].concat()), code, says);
    };
    refused("weights.safetensors", &[], 1, &["weights.safetensors: does not tell num_heads: give --set num_heads=X"]);
    refused("weights.safetensors", &["--set", "depth=2"], 2, &["--set gives 'depth', but", "num_heads, routing"]);
    refused(
        "weights.safetensors",
        &["--set", "num_heads=5"],
        2,
        &["num_heads 5", "the weights in weights.safetensors"],
    );
    let dense = ["--set", "num_heads=2", "routing=dense", "beta=0.5"];
    refused("weights.safetensors", &dense, 2, &["--set gives beta, but routing is dense, which has none"]);
    refused("weights.safetensors", &["--set", "num_heads=2", "image_size=0"], 2, &["image_size is 0"]);
    let said = succeeds(run(place, &["info", "--tensors", "weights.safetensors"]));
    assert!(said.contains("does not tell num_heads") && said.contains("y_embedder.embedding_table.weight "), "{said}");
    refused("weights.safetensors", &["--set", "num_heads=2", "--out", "weights.safetensors"], 1, &["and no .png"]);
    fs::copy(place.join("weights.safetensors"), place.join("weights.png")).unwrap();
    refused("weights.png", &["--set", "num_heads=2", "--out", "weights.png"], 1, &["holds the weights"]);
    refused("nowhere", &["--set", "num_heads=2"], 1, &["nowhere: cannot be opened"]);
    refused("weights.safetensors", &["--weights", "ema"], 2, &["weights.safetensors is a file: leave it out"]);
    refused("run", &["--set", "routing=dense"], 2, &["run says itself what its model is: leave it out"]);
    write_foreign(place, |name| name != "pos_embed");
    refused("weights.safetensors", &["--set", "num_heads=2"], 1, &["give --set image_size=X"]);
    let told = [&told[..], &["image_size=8"]].concat();
    assert!(sample("weights.safetensors", &[&["--set"], &told[..]].concat()).0 == of_run);
    write_foreign(place, |name| !name.starts_with("x_embedder"));
    refused("weights.safetensors", &[], 1, &["has no tensor 'x_embedder.proj.weight'"]);
    let moments = average(place).with_file_name(checkpoint::OPTIMIZER);
    refused(moments.to_str().unwrap(), &[], 1, &["they are moments of AdamW"]);

    fs::remove_file(average(place).with_file_name(checkpoint::MODEL)).unwrap();
    let instead = "sample takes run/checkpoints/0000100/ema.safetensors by itself";
    refused("run/checkpoints/0000100", &[], 1, &["no model.safetensors", instead]);
    assert!(sample("run/checkpoints/0000100/ema.safetensors", &[]).0 == of_run);
}

/// The names of the published models come with their heads.
#[test]
fn weights_of_a_published_model_need_no_flag() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let step =
        ["train", "--model", "DiT-S/8", "--image-size", "8", "--batch-size", "2", "--steps", "1", "--out", "run"];
    let samples = ["--sample-classes", "1", "--samples-per-class", "1", "--sample-steps", "1"];
    succeeds(run(place, &[&step[..], &samples].concat()));
    write_foreign(place, |_| true);
    let one = ["--num", "1", "--classes", "3", "--steps", "1"];
    let output = run(place, &[&["sample", "--checkpoint", "weights.safetensors"], &one[..]].concat());
    assert!(
        stderr(&output).contains("does not say num_heads 6, routing dense, schedule linear"),
        "{}",
        stderr(&output)
    );
    succeeds(output);
}

/// Names of what is in `place`.
fn names(place: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(place).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn batches_of_any_size_give_the_same_files_and_other_ways_to_sample_others() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    long_run(place, &[]);
    let made = |name: &str, batch: &str, way: &[&str]| {
        let (png, npz) = (format!("{name}.png"), format!("{name}.npz"));
        let num = ["--num", "45", "--classes", "1,3", "--batch-size", batch, "--out", &png, "--npz", &npz];
        succeeds(sample_in("10", place, &[&num[..], &["--overwrite"], way].concat()));
        (fs::read(place.join(png)).unwrap(), fs::read(place.join(npz)).unwrap())
    };
    let ways: [&[&str]; 7] = [
        &["--cfg-interval", "..600"],
        &[],
        &["--sampler", "ddpm"],
        &["--sampler", "dpm++"],
        &["--eta", "1"],
        &["--weights", "model"],
        &["--seed", "1"],
    ];
    let mut archives: Vec<Vec<u8>> = Vec::new();
    for way in ways {
        let (few, whole) = (made("few", "7", way), made("whole", "45", way));
        assert!(few.0 == whole.0, "{way:?}: the grids differ");
        assert!(few.1 == whole.1, "{way:?}: the archives differ");
        // 45 images of 8 x 8, 45 labels of 8 bytes, and headers.
        assert!((45 * 72..45 * 72 + 1000).contains(&whole.1.len()), "{}", whole.1.len());
        assert!(!archives.contains(&whole.1), "{way:?}: as another way");
        archives.push(whole.1);
    }
    assert_eq!(names(place), ["few.npz", "few.png", "run", "whole.npz", "whole.png"]);
}

/// What an archive holds after the header of its array `number`.
fn array(npz: &[u8], number: usize) -> &[u8] {
    let (start, _) = npz.windows(6).enumerate().filter(|(_, bytes)| bytes == b"\x93NUMPY").nth(number).unwrap();
    let header = u16::from_le_bytes([npz[start + 8], npz[start + 9]]);
    &npz[start + 10 + usize::from(header)..]
}

/// The pixels (of 8 x 8, one byte each) and the labels of `n` images in the archive `place/name`.
fn images_and_labels(place: &Path, name: &str, n: usize) -> (Vec<u8>, Vec<u8>) {
    let npz = fs::read(place.join(name)).unwrap();
    for shape in [format!("'shape': ({n}, 8, 8, 1)"), format!("'shape': ({n},)")] {
        assert!(npz.windows(shape.len()).any(|bytes| bytes == shape.as_bytes()), "no {shape} in {name}");
    }
    (array(&npz, 0)[..n * 64].to_vec(), array(&npz, 1)[..n * 8].to_vec())
}

#[test]
fn parts_make_the_images_of_the_whole() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    long_run(place, &[]);
    let way = ["--num", "45", "--classes", "1,3", "--cfg", "2", "--sampler", "ddpm", "--batch-size", "7"];
    let made = |only: &str, n| {
        let part = ["--npz", "x.npz", "--overwrite", "--only", only];
        succeeds(sample_in("10", place, &[&way[..], if only.is_empty() { &part[..3] } else { &part }].concat()));
        images_and_labels(place, "x.npz", n)
    };
    let whole = made("", 45);
    // The classes take turns.
    let labels: Vec<u8> = (0..45).flat_map(|i| [1i64, 3][i % 2].to_le_bytes()).collect();
    assert!(whole.1 == labels, "{:?}", whole.1);
    assert!(made("..", 45) == whole);
    let parts = [made("..14", 14), made("14..35", 21), made("35..", 10)];
    assert!(parts.iter().map(|part| &part.0[..]).collect::<Vec<_>>().concat() == whole.0, "the images differ");
    assert!(parts.iter().map(|part| &part.1[..]).collect::<Vec<_>>().concat() == whole.1, "the labels differ");
    // Batches of others.
    let (pixels, labels) = made("20..45", 25);
    assert!(pixels.iter().zip(&whole.0[20 * 64..]).all(|(a, &b)| a.abs_diff(b) <= 1) && labels == whole.1[20 * 8..]);
    // Without an archive the first 23 are of the first class: the grid shows these alone.
    succeeds(sample_in("10", place, &[&way[..], &["--only", "0..23"]].concat()));
    let part = fs::read(place.join("grid.png")).unwrap();
    let of_one = ["--num", "23", "--classes", "1", "--cfg", "2", "--sampler", "ddpm", "--batch-size", "7"];
    succeeds(sample_in("10", place, &of_one));
    assert!(fs::read(place.join("grid.png")).unwrap() == part, "the grids differ");

    for wrong in ["", "5", "3..3", "9..3", "45..", "0..46", "0..=4", "a..b", "-1", "1..2..3"] {
        let says = format!("--only is {wrong}, but it must be A..B (or A.. or ..B) with A < B and B at most 45");
        fails(sample(place, &[&way[..], &["--only", wrong]].concat()), 2, &[&says]);
    }
}

/// One by one, with the pixels of the archive; parts come together in one folder.
#[test]
fn images_are_pictures_in_a_folder() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    long_run(place, &[]);
    let way = ["--num", "9", "--classes", "1,3", "--batch-size", "4"];
    let says = succeeds(sample(place, &[&way[..], &["--images", "all", "--npz", "all.npz"]].concat()));
    assert!(says.contains("9 images of run/checkpoints/0000100 are in all\n"), "{says}");
    let (pixels, _) = images_and_labels(place, "all.npz", 9);
    let expected: Vec<String> = (0..9).map(|i| format!("{i:06}-{}.png", [1, 3][i % 2])).collect();
    let all = place.join("all");
    assert_eq!(names(&all), expected);
    for (name, pixels) in expected.iter().zip(pixels.chunks_exact(64)) {
        let picture = image::open(all.join(name)).unwrap();
        assert_eq!((picture.color(), picture.width()), (image::ColorType::L8, 8));
        assert!(picture.into_bytes() == pixels, "{name}");
    }
    for only in ["0..4", "4.."] {
        succeeds(sample(place, &[&way[..], &["--images", "parts", "--only", only]].concat()));
    }
    let parts = place.join("parts");
    assert_eq!(names(&parts), expected);
    assert!(expected.iter().all(|name| fs::read(parts.join(name)).unwrap() == fs::read(all.join(name)).unwrap()));
    let whole = [&way[..], &["--images", "all"]].concat();
    fails(
        sample(place, &whole),
        1,
        &["all: holds 00000", "none of the images that --only leaves out: give another folder"],
    );
    let other = ["--num", "9", "--classes", "2", "--images", "all", "--only", "..4"];
    fails(sample(place, &other), 1, &["all: holds 00000"]);
    fails(sample(place, &[&whole[..], &["--only", "3..5"]].concat()), 1, &["all: holds 00000"]);
    fs::write(place.join("grid.txt"), "no folder").unwrap();
    fails(sample(place, &["--images", "grid.txt"]), 1, &["grid.txt: cannot be written"]);
    for (flag, file) in [("--out", "new"), ("--out", "all/grid.png"), ("--npz", "all/all.npz")] {
        let folder = if file == "new" { "new" } else { "all" };
        let says = format!("{flag} is {file} and --images {folder}, but a folder of pictures holds nothing else");
        fails(sample(place, &["--images", folder, flag, file]), 2, &[&says]);
    }
    assert!(!place.join("new").exists());

    save_samples(&place.join("latents.safetensors"), "latents");
    fs::remove_dir_all(place.join("run")).unwrap();
    short_run(place, &["--data", "latents.safetensors"]);
    let why = "--images are pictures, but this model makes latents of 3 channels: give --npz";
    fails(sample(place, &["--images", "more"]), 2, &[why]);
    assert!(!place.join("more").exists());
}

/// What `message` calls the part that is to be made: `--only A..B`.
fn rest_of(message: &str) -> (usize, usize) {
    let range = message.split("--only ").nth(1).and_then(|rest| rest.split(' ').next()).expect("a flag");
    let (from, to) = range.split_once("..").unwrap();
    (from.parse().unwrap(), to.parse().unwrap())
}

#[cfg(unix)]
#[test]
fn what_is_finished_when_a_signal_comes_is_kept() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    long_run(place, &[]);
    // Seconds of work, of which hundredths of a second fill the first buffer of the archive.
    // Of one thread: several wait for each other where others are at work, too.
    let way = ["sample", "--checkpoint", "run", "--device", "cpu", "--sampler", "ddpm", "--steps", "10"];
    let way = [&way[..], &["--num", "10240", "--batch-size", "8", "--threads", "1"]].concat();
    let files = |name| ["--npz", name, "--out", "grid.png"];
    let mut child = program::command(place, &[&way[..], &files("cut.npz")].concat());
    let mut child = child.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let waiting = Instant::now();
    let begun = |entry: fs::DirEntry| {
        entry.file_name().to_string_lossy().starts_with(".cut.npz.")
            && entry.metadata().is_ok_and(|file| file.len() > 0)
    };
    while !fs::read_dir(place).unwrap().flatten().any(begun) {
        assert!(waiting.elapsed() < Duration::from_secs(60), "no images after a minute");
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        sleep(Duration::from_millis(1));
    }
    program::kill(libc::SIGTERM, &child);
    let output = child.wait_with_output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(143), "{said}");
    assert_eq!(names(place), ["cut.npz", "grid.png", "run"]);
    let last = said.lines().last().unwrap();
    let (made, end) = rest_of(last);
    assert!(last.contains(&format!("{made} of 10240 images are in cut.npz")), "{last}");
    assert!(made > 0 && made % 8 == 0 && end == 10240, "{last}");

    succeeds(run(place, &[&way[..], &files("whole.npz")].concat()));
    let only = format!("{made}..{end}");
    succeeds(run(place, &[&way[..], &files("rest.npz"), &["--only", &only]].concat()));
    let whole = images_and_labels(place, "whole.npz", 10240);
    let cut = images_and_labels(place, "cut.npz", made);
    let rest = images_and_labels(place, "rest.npz", end - made);
    assert!([cut.0, rest.0].concat() == whole.0, "the images differ");
    assert!([cut.1, rest.1].concat() == whole.1, "the labels differ");
}

#[cfg(unix)]
#[test]
fn a_signal_before_anything_is_finished_or_without_an_archive_leaves_no_file() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    short_run(place, &[]);
    let endless = ["sample", "--checkpoint", "run", "--device", "cpu", "--threads", "1", "--num", "1000000"];
    // With the archive, the first batch takes minutes.
    let cases: [&[&str]; 2] = [&["--npz", "x.npz", "--steps", "1000", "--batch-size", "10000"], &["--batch-size", "1"]];
    for more in cases {
        let mut child = program::command(place, &[&endless, more].concat());
        let mut child = child.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let line = lines.find(|line| line.starts_with("sampling 1/"));
        assert!(line.is_some(), "it ended");
        program::kill(libc::SIGTERM, &child);
        assert_eq!(lines.last().as_deref(), Some("sampling was stopped: no file was written"));
        assert_eq!(child.wait().unwrap().code(), Some(143));
        assert_eq!(names(place), ["run"]);
    }
}

#[test]
fn what_is_finished_when_numbers_stop_being_finite_is_kept() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    long_run(place, &[]);
    let file = SafetensorsFile::open(average(place)).unwrap();
    let table = file.tensor("y_embedder.embedding_table.weight").unwrap().bytes;
    let row = &table[3 * 128..][..128];
    let mut bytes = fs::read(average(place)).unwrap();
    let at = bytes.windows(128).position(|bytes| bytes == row).unwrap();
    // Finite, but so large that no sum of such numbers is.
    bytes[at..][..128].fill(0x7F);
    fs::write(place.join("damaged.safetensors"), bytes).unwrap();
    // 12 of five classes, of which class 3 comes with the second batch.
    let made_of = |classes, checkpoint, num, files: &[&str]| {
        let way = ["sample", "--checkpoint", checkpoint, "--steps", "3", "--device", "cpu", "--classes", classes];
        run(place, &[&way[..], &["--num", num, "--batch-size", "4"], files].concat())
    };
    let made = |checkpoint, num, files: &[&str]| made_of("1,0,2,4,3", checkpoint, num, files);
    let not_finite = "gave a number that is not finite";
    let output = made("damaged.safetensors", "12", &["--npz", "x.npz", "--images", "pictures", "--out", "grid.png"]);
    assert!(!stderr(&output).contains("--only"), "the rest is no better: {}", stderr(&output));
    fails(output, 1, &[not_finite, "; 4 of 12 images are in pictures and x.npz"]);
    assert_eq!(names(&place.join("pictures")), [0, 1, 2, 3].map(|i| format!("00000{i}-{}.png", [1, 0, 2, 4][i])));
    fs::remove_dir_all(place.join("pictures")).unwrap();
    let (pixels, labels) = images_and_labels(place, "x.npz", 4);
    succeeds(made("run", "12", &["--npz", "whole.npz", "--out", "whole.png"]));
    let whole = images_and_labels(place, "whole.npz", 12);
    assert!(pixels == whole.0[..4 * 64] && labels == whole.1[..4 * 8]);
    // The row of the last class is left out.
    let [height, of_whole] = ["grid.png", "whole.png"].map(|name| image::open(place.join(name)).unwrap().height());
    assert_eq!((height, of_whole), (4 * 66 + 2, 5 * 66 + 2));
    // A whole archive is not replaced by a part of one.
    let before = fs::read(place.join("whole.npz")).unwrap();
    let output = made("damaged.safetensors", "12", &["--npz", "whole.npz", "--overwrite"]);
    assert!(!stderr(&output).contains(" are in "), "{}", stderr(&output));
    fails(output, 1, &[not_finite]);
    assert!(fs::read(place.join("whole.npz")).unwrap() == before, "another archive");
    // Nothing was finished.
    for file in ["grid.png", "whole.png", "x.npz", "whole.npz"] {
        fs::remove_file(place.join(file)).unwrap();
    }
    let output = made_of("1,3", "damaged.safetensors", "2", &["--npz", "x.npz"]);
    assert!(!stderr(&output).contains(" are in "), "{}", stderr(&output));
    fails(output, 1, &[not_finite]);
    assert_eq!(names(place), ["damaged.safetensors", "run"]);
}

#[test]
fn the_archive_holds_pixels_by_row_and_labels_and_the_grid_shows_them() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let values: Vec<u8> = (0..8 * 48).map(|i| (i * 37 % 251) as u8).collect();
    let labels: Vec<u8> = (0..8).map(|i| i % 2).collect();
    use safetensors::tensor::{Dtype, TensorView};
    let view = |shape: &[usize], data| TensorView::new(Dtype::U8, shape.to_vec(), data).unwrap();
    let tensors = [("images", view(&[8, 3, 4, 4], &values)), ("labels", view(&[8], &labels))];
    fs::write(place.join("images.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    long_run(place, &["--data", "images.safetensors"]);
    let files = ["--npz", "samples.npz", "--out", "grid.png"];
    succeeds(sample_in("10", place, &[&["--num", "5", "--classes", "1,0"], &files[..]].concat()));
    let npz = fs::read(place.join("samples.npz")).unwrap();
    let labels: Vec<i64> = array(&npz, 1).as_chunks().0[..5].iter().map(|&bytes| i64::from_le_bytes(bytes)).collect();
    assert_eq!(labels, [1, 0, 1, 0, 1]);
    let pixels = &array(&npz, 0)[..5 * 48]; // [5, 4, 4, 3]
    assert!((10..246).filter(|value| pixels.contains(value)).count() > 20, "little but black and white");
    let grid = image::open(place.join("grid.png")).unwrap().into_rgb8();
    // A row a class; squares of 16 pixels a side, and 2 between images and around them.
    let mut others = 0;
    for (image, [row, column]) in [[0, 0], [1, 0], [0, 1], [1, 1], [0, 2]].into_iter().enumerate() {
        for (i, rgb) in pixels[image * 48..][..48].as_chunks::<3>().0.iter().enumerate() {
            let (x, y) = (2 + column * 66 + i as u32 % 4 * 16, 2 + row * 66 + i as u32 / 4 * 16);
            let shown = grid.get_pixel(x, y).0;
            assert!(shown.iter().zip(rgb).all(|(a, &b)| a.abs_diff(b) <= 1), "image {image}: {shown:?} for {rgb:?}");
            others += shown.iter().zip(rgb).filter(|(a, b)| a != b).count();
        }
    }
    // Both round to the nearest, up to rounding errors where two are as near.
    assert!(others <= 2, "{others} of 240 numbers differ");
}

#[test]
fn every_sampler_takes_the_steps_that_help_promises() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    short_run(place, &[]);
    for (sampler, steps) in [("ddim", "50/50"), ("dpm++", "20/20"), ("ddpm", "250/250")] {
        let args = ["sample", "--checkpoint", "run", "--device", "cpu", "--num", "1", "--sampler", sampler];
        let output = run(place, &args);
        assert!(stderr(&output).contains(steps), "{}", stderr(&output));
        succeeds(output);
    }
    let says = "steps of dpm++ are ddim50, but it spreads them itself: give a number from 1 to 1000";
    fails(sample_in("ddim50", place, &["--sampler", "dpm++"]), 2, &[says]);
    for (interval, why) in
        [("3..2", "A < B and B at most 1000"), ("0..1001", "it must be A..B"), ("9", "it must be A..B")]
    {
        fails(sample(place, &["--cfg-interval", interval]), 2, &[&format!("--cfg-interval is {interval}, but"), why]);
    }
    fails(sample_in("2", place, &["--out", "grid.jpg"]), 2, &["--out is grid.jpg, but the grid is a PNG"]);
    for flag in [["--cfg-interval", "1..2"], ["--cfg-channels", "1"]] {
        let says = format!("{} is given, but nothing is guided: give --cfg", flag[0]);
        fails(sample(place, &[&["--cfg", "1"], &flag[..]].concat()), 2, &[&says]);
    }
    for channels in ["0", "2"] {
        let says = format!("--cfg-channels is {channels}, but it must be between 1 and 1, the channels");
        fails(sample(place, &["--cfg-channels", channels]), 2, &[&says]);
    }
    fails(
        sample(place, &["--cfg-interval", "1..999"]),
        2,
        &["but none of the 2 steps, from timestep 999 down, is there: widen it"],
    );
    fails(sample(place, &["--sampler", "dpm++", "--eta", "0.5"]), 2, &["--eta is 0.5, but dpm++ has none"]);
}

/// Both are of the moving average, with the same noise.
#[test]
fn the_grid_of_training_is_what_sample_makes() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    save_samples(&place.join("latents.safetensors"), "latents");
    let knobs = ["--seed", "5", "--schedule", "linear", "--lr", "0.02", "--warmup-steps", "0", "--sample-steps", "4"];
    let grid = ["--samples-per-class", "3", "--sample-sampler", "ddpm", "--sample-cfg", "2.5", "--steps", "6"];
    let knobs = [&knobs[..], &grid, &["--device", "cpu"]].concat();
    for (data, num, classes) in [("digits", "12", "0,1,2,3"), ("latents.safetensors", "6", "0,1")] {
        succeeds(train(place, &[&knobs[..], &["--data", data, "--sample-classes", "4", "--out", "run"]].concat()));
        let same = ["4", "ddpm", "2.5", "5", "ema"];
        let sampled = |[steps, sampler, cfg, seed, weights]: [&str; 5]| {
            let way = ["--sampler", sampler, "--cfg", cfg, "--seed", seed, "--weights", weights];
            succeeds(sample_in(steps, place, &[&["--num", num, "--classes", classes], &way[..]].concat()));
            fs::read(place.join("grid.png")).unwrap()
        };
        let made = fs::read(place.join("run/samples/0000006.png")).unwrap();
        assert!(sampled(same) == made, "{data}: the grids differ");
        for (i, other) in ["5", "ddim", "2", "6", "model"].into_iter().enumerate() {
            let mut way = same;
            way[i] = other;
            assert!(sampled(way) != made, "{data}: {other} for {} changes nothing", same[i]);
        }
        fs::remove_dir_all(place.join("run")).unwrap();
    }
}

#[test]
fn files_that_cannot_be_written_are_refused_before_anything_is_computed() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    short_run(place, &[]);
    fs::create_dir(place.join("folder")).unwrap();
    fails(sample(place, &["--out", "x", "--npz", "x"]), 2, &["--out and --npz are both x"]);
    fails(sample(place, &["--out", "folder/x", "--npz", "./folder/../folder/x"]), 2, &["--out and --npz are both"]);
    fails(sample(place, &["--npz", "-"]), 2, &["--npz is -, but what it names must be a file"]);
    fails(sample(place, &["--out", "-"]), 2, &["--out is -, but what it names must be a file"]);
    fails(sample(place, &["--npz", "folder"]), 1, &["folder: is a directory"]);
    fails(sample(place, &["--out", "folder/"]), 1, &["folder/: is a directory"]);
    fails(sample(place, &["--npz", "nowhere/x.npz"]), 1, &["nowhere/x.npz", "cannot be written"]);
    // A slip of the hand.
    let weights = "run/checkpoints/0000001/ema.safetensors";
    for flag in ["--out", "--npz"] {
        fails(sample(place, &[flag, weights]), 1, &[weights, "is there already"]);
    }
    assert_eq!(names(place), ["folder", "run"]);
}

/// It may hold hours of work.
#[test]
fn an_archive_is_replaced_only_when_that_is_asked_for() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    short_run(place, &[]);
    let made = |num: &str, more: &[&str]| sample(place, &[&["--num", num, "--npz", "x.npz"], more].concat());
    succeeds(made("2", &[]));
    let before = fs::read(place.join("x.npz")).unwrap();
    assert_eq!(names(place), ["run", "x.npz"], "a grid that nobody asked for");
    let says = "x.npz: is there already: give another file, or --overwrite to replace it";
    fails(made("3", &["--images", "pictures"]), 1, &[says]);
    assert_eq!(names(place), ["run", "x.npz"], "it was begun");
    assert!(fs::read(place.join("x.npz")).unwrap() == before);
    succeeds(made("3", &["--overwrite"]));
    images_and_labels(place, "x.npz", 3);
    // Pictures of others are not replaced in any case.
    let output = sample(place, &["--images", "pictures", "--overwrite"]);
    assert!(output.status.code() == Some(2) && stderr(&output).contains("--npz <FILE>"), "{}", stderr(&output));
}

#[cfg(unix)]
#[test]
fn an_archive_that_a_full_disk_cuts_short_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    short_run(place, &[]);
    // No file may grow beyond 16 kB.
    let program = env!("CARGO_BIN_EXE_dtr-fused");
    let limited = format!(
        "trap '' XFSZ; ulimit -f 32; exec '{program}' sample --checkpoint run --device cpu --steps 1 --num 1000 --npz samples.npz"
    );
    let output = std::process::Command::new("sh").args(["-c", &limited]).current_dir(place).output().unwrap();
    fails(output, 1, &["samples.npz: cannot be written"]);
    assert_eq!(names(place), ["run"]);
}

#[test]
fn of_many_classes_only_what_the_grid_shows_is_made() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    short_run(place, &["--num-classes", "70", "--sample-classes", "1"]);
    let said = |args: &[&str]| {
        let output = sample(place, args);
        let text = stderr(&output);
        succeeds(output);
        text
    };
    let text = said(&[]);
    assert!(text.contains("the grid shows 64 of 70 classes: choose others with --classes"), "{text}");
    assert!(text.contains(" 640 images"), "{text}");
    let text = said(&["--classes", "69", "--num", "17"]);
    assert!(text.contains("the grid shows 16 of 17 images") && text.contains("--npz FILE"), "{text}");
    let text = said(&["--npz", "all.npz", "--out", "grid.png"]);
    assert!(text.contains(" 700 images") && text.contains("the grid shows 640 of 700 images"), "{text}");
    assert!(!said(&["--classes", "69"]).contains("the grid shows"));
    // As many as the grid has rows, and just those that were asked for.
    let chosen: Vec<String> = (6..70).map(|class| class.to_string()).collect();
    assert!(!said(&["--classes", &chosen.join(",")]).contains("the grid shows"));
}

#[test]
fn a_model_that_saw_every_label_is_sampled_without_guidance() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    fails(train(place, &["--label-dropout", "0", "--sample-cfg", "1.5"]), 2, &["sample_cfg is 1.5", "label_dropout"]);
    short_run(place, &["--label-dropout", "0"]);
    assert!(fs::read_to_string(place.join("run/config.toml")).unwrap().contains("\nsample_cfg = 1.0\n"));
    fails(sample(place, &["--cfg", "1.5"]), 2, &["--cfg is 1.5", "label_dropout"]);
    succeeds(sample(place, &["--out", "default.png"]));
    succeeds(sample(place, &["--out", "none.png", "--cfg", "1"]));
    assert!(fs::read(place.join("default.png")).unwrap() == fs::read(place.join("none.png")).unwrap());
    let go_on = |more: &[&str]| run(place, &[&["train", "--resume", "run"], more].concat());
    fails(go_on(&["--sample-cfg", "1.5", "--steps", "9"]), 2, &["sample_cfg is 1.5", "label_dropout"]);
    succeeds(go_on(&["--sample-cfg", "1.5", "--label-dropout", "0.1", "--steps", "9"]));
    // It has learned the null class by now, and keeps it.
    succeeds(go_on(&["--label-dropout", "0", "--steps", "12"]));
    succeeds(run(place, &["train", "--resume", "run", "--steps", "15"]));
}

/// A `.safetensors` file of 8 samples of 3 x 4 x 4 between -20 and 20 under this name, with labels 0 and 1.
fn save_samples(path: &Path, name: &str) {
    let values: Vec<u8> = (0..8 * 48).flat_map(|i| ((i * 37 % 41) as f32 - 20.0).to_le_bytes()).collect();
    let labels: Vec<u8> = (0..8u8).map(|i| i % 2).collect();
    let view =
        |dtype, shape: &[usize], data| safetensors::tensor::TensorView::new(dtype, shape.to_vec(), data).unwrap();
    use safetensors::tensor::Dtype;
    let tensors = [(name, view(Dtype::F32, &[8, 3, 4, 4], &values)), ("labels", view(Dtype::U8, &[8], &labels))];
    fs::write(path, safetensors::serialize(tensors, None).unwrap()).unwrap();
}

#[test]
fn latents_of_three_channels_are_no_images() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    save_samples(&place.join("latents.safetensors"), "latents");
    short_run(place, &["--data", "latents.safetensors"]);
    assert!(fs::read_to_string(place.join("run/config.toml")).unwrap().contains("\ndata_kind = \"latents\"\n"));
    let made = |npz: &str| {
        succeeds(sample(place, &["--num", "4", "--npz", npz]));
        fs::read(place.join(npz)).unwrap()
    };
    let latents = made("latents.npz");
    // 4 samples of 48 f32, and not bytes.
    assert!(latents.len() > 4 * 48 * 4, "{}", latents.len());
    assert!(latents.windows(5).any(|bytes| bytes == b"'<f4'"));
    // A run of before that was written down tells by the channels, as it did.
    edit_config(place, "data_kind = \"latents\"\n", "");
    assert!(made("images.npz").windows(5).any(|bytes| bytes == b"'|u1'"));
    // It goes on all the same.
    succeeds(run(place, &["train", "--resume", "run", "--steps", "2", "--device", "cpu"]));
    fails(train(place, &["--data", "digits", "--data-kind", "latents"]), 2, &["data_kind is latents", "are images"]);
}
