//! Checkpoints: what is written is read back, a kill or a damaged file never costs an earlier one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use dtr_fused::params::Layout;
use dtr_fused::safetensors_file::SafetensorsFile;
use dtr_fused::train::checkpoint::{self, EMA, FileOut, MODEL, Metadata, OPTIMIZER, TensorOut};
use proptest::prelude::*;

fn layout() -> Layout {
    let mut layout = Layout::default();
    layout.push_linear("blocks.0.attn.qkv", 6, 4);
    layout.push("x_embedder.proj.bias", &[5]);
    layout
}

/// Numbers that tell the step and the place they were written for.
fn numbers(layout: &Layout, step: u64, offset: f32) -> Vec<f32> {
    (0..layout.len()).map(|i| step as f32 + offset + i as f32 / 1024.0).collect()
}

fn write(run: &Path, step: u64) -> dtr_fused::Result<PathBuf> {
    let layout = layout();
    let [model, ema, m, v] = [0.0, 0.125, 0.25, 0.5].map(|offset| numbers(&layout, step, offset));
    let mut moments = TensorOut::of_layout(&layout, &m, "m.");
    moments.extend(TensorOut::of_layout(&layout, &v, "v."));
    let metadata = Metadata::from([("step".into(), step.to_string())]);
    let file = |name, tensors| FileOut { name, tensors, metadata: metadata.clone() };
    let files = [
        file(MODEL, TensorOut::of_layout(&layout, &model, "")),
        file(EMA, TensorOut::of_layout(&layout, &ema, "")),
        file(OPTIMIZER, moments),
    ];
    checkpoint::write(run, step, &files, "steps = 5\n")
}

/// Reads everything in `checkpoint` and asserts that it is what [`write`] wrote for `step`.
fn assert_whole(checkpoint: &Path, step: u64) {
    let layout = layout();
    for (name, prefix, offset) in [(MODEL, "", 0.0), (EMA, "", 0.125), (OPTIMIZER, "m.", 0.25), (OPTIMIZER, "v.", 0.5)]
    {
        let file = SafetensorsFile::open(checkpoint.join(name)).unwrap();
        let mut buffer = vec![f32::NAN; layout.len()];
        checkpoint::read_layout(&file, &layout, prefix, &mut buffer).unwrap();
        assert_eq!(buffer, numbers(&layout, step, offset), "{name}");
        assert_eq!(file.metadata()["step"], step.to_string());
    }
    assert_eq!(fs::read_to_string(checkpoint.join("config.toml")).unwrap(), "steps = 5\n");
}

fn steps(run: &Path) -> Vec<u64> {
    checkpoint::list(run).unwrap().into_iter().map(|(step, _)| step).collect()
}

#[test]
fn what_is_written_is_read_back() {
    let run = tempfile::tempdir().unwrap();
    assert_eq!(checkpoint::latest(run.path()).unwrap(), None);
    let path = write(run.path(), 100).unwrap();
    assert_eq!(path, run.path().join("checkpoints/0000100"));
    assert_whole(&path, 100);
    write(run.path(), 20).unwrap();
    assert_eq!(checkpoint::latest(run.path()).unwrap(), Some((100, path.clone())));
    // A step is written again where a run was resumed from an earlier checkpoint.
    write(run.path(), 100).unwrap();
    assert_whole(&path, 100);
    assert_eq!(steps(run.path()), [20, 100]);
}

#[test]
fn the_safetensors_crate_reads_it() {
    let run = tempfile::tempdir().unwrap();
    let path = write(run.path(), 7).unwrap();
    let bytes = fs::read(path.join(MODEL)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let bias = file.tensor("x_embedder.proj.bias").unwrap();
    assert_eq!((bias.shape(), bias.dtype()), (&[5][..], safetensors::Dtype::F32));
    assert_eq!(file.names().len(), 3);
    // Readers in Python ask for the framework, and the tensors lie where f32 may.
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    assert_eq!(header % 8, 0);
}

#[test]
fn pruning_keeps_the_last_ones_every_mth_and_the_best() {
    let run = tempfile::tempdir().unwrap();
    for step in [10, 20, 30, 40, 50] {
        write(run.path(), step).unwrap();
    }
    checkpoint::prune(run.path(), 2, 20, &[10]).unwrap();
    assert_eq!(steps(run.path()), [10, 20, 40, 50]);
    checkpoint::prune(run.path(), 0, 0, &[]).unwrap();
    assert_eq!(steps(run.path()), [50], "the last one stays whatever is asked");
    assert_eq!(fs::read_dir(run.path().join("checkpoints")).unwrap().count(), 1);
}

#[test]
fn one_that_cannot_be_deleted_does_not_keep_the_others() {
    let run = tempfile::tempdir().unwrap();
    for step in [1, 2, 3] {
        write(run.path(), step).unwrap();
    }
    // Something in the way of the first, which is renamed before it is deleted.
    let taken = run.path().join("checkpoints/.tmp-0000001");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("x"), "").unwrap();
    let error = checkpoint::prune(run.path(), 1, 0, &[]).unwrap_err().to_string();
    assert!(error.contains("0000001") && error.contains("cannot be deleted"), "{error}");
    assert_eq!(steps(run.path()), [1, 3]);
}

#[test]
fn leftovers_are_ignored_and_cleared() {
    let run = tempfile::tempdir().unwrap();
    let path = write(run.path(), 3).unwrap();
    let half = run.path().join("checkpoints/.tmp-0000009");
    fs::create_dir(&half).unwrap();
    fs::write(half.join(MODEL), b"half").unwrap();
    // Killed between the two renames of a replacement: the old one still counts.
    let replaced = run.path().join("checkpoints/.old-0000003");
    fs::rename(&path, &replaced).unwrap();
    assert_eq!(checkpoint::latest(run.path()).unwrap(), Some((3, replaced.clone())));
    write(run.path(), 4).unwrap();
    assert_eq!(steps(run.path()), [3, 4]);
    assert_whole(&path, 3);
    assert!(!half.exists() && !replaced.exists());
    // Killed after the second: the new one counts. What has another name than a step's is somebody else's.
    for other in [&replaced, &run.path().join("checkpoints/9")] {
        fs::create_dir(other).unwrap();
        fs::write(other.join(MODEL), b"old").unwrap();
    }
    assert_eq!(checkpoint::list(run.path()).unwrap()[0], (3, path.clone()));
    write(run.path(), 5).unwrap();
    assert_eq!(steps(run.path()), [3, 4, 5]);
    assert_whole(&path, 3);
    assert!(!replaced.exists());
}

#[test]
fn of_a_checkpoint_and_the_one_it_replaces_the_new_one_counts() {
    let run = tempfile::tempdir().unwrap();
    let inside = run.path().join("checkpoints");
    for step in 10..20 {
        let mut names = [format!("{step:07}"), format!(".old-{step:07}")];
        // Directories are listed in any order, often that of the names' creation.
        if step % 2 == 0 {
            names.reverse();
        }
        names.iter().for_each(|name| fs::create_dir_all(inside.join(name)).unwrap());
    }
    let found = checkpoint::list(run.path()).unwrap();
    assert!(
        found.len() == 10 && found.iter().all(|(step, path)| *path == inside.join(format!("{step:07}"))),
        "{found:?}"
    );
}

/// Writes checkpoints and prunes: three of them, or without end when another test started this one to kill it.
#[test]
fn writer() {
    let own = tempfile::tempdir().unwrap();
    let given = std::env::var_os("DTR_TEST_WRITE_WITHOUT_END").map(PathBuf::from);
    let run = given.as_deref().unwrap_or(own.path());
    for step in 1.. {
        write(run, step).unwrap();
        write(run, step).unwrap();
        checkpoint::prune(run, 2, 0, &[]).unwrap();
        if given.is_none() && step == 3 {
            break;
        }
    }
    assert_eq!(steps(run), [2, 3]);
}

#[test]
fn a_kill_at_any_moment_leaves_a_whole_checkpoint() {
    let run = tempfile::tempdir().unwrap();
    write(run.path(), 0).unwrap();
    let mut latest_seen = 0;
    for round in 0.. {
        // A disk may take a while to have a file.
        if round >= 25 && latest_seen > 0 {
            break;
        }
        assert!(round < 250, "no writer ever got to write: the test proves nothing");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer"])
            .env("DTR_TEST_WRITE_WITHOUT_END", run.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(10_000 + 2_713 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let all = checkpoint::list(run.path()).unwrap();
        assert!(!all.is_empty(), "round {round}: every checkpoint is gone");
        for (step, path) in &all {
            assert_whole(path, *step);
        }
        latest_seen = latest_seen.max(all[all.len() - 1].0);
    }
}

#[test]
fn a_place_that_cannot_be_written_is_one_sentence_and_costs_nothing() {
    let run = tempfile::tempdir().unwrap();
    let path = write(run.path(), 1).unwrap();
    // A file where the temporary directory must go.
    fs::write(run.path().join("checkpoints/blocked"), b"").unwrap();
    let message = write(&run.path().join("checkpoints/blocked"), 2).unwrap_err().to_string();
    assert!(
        message.contains("blocked") && message.contains("cannot be written") && !message.contains('\n'),
        "{message}"
    );
    assert_whole(&path, 1);
}

#[test]
fn resolve_tells_runs_from_checkpoints() {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    let path = write(&run, 12).unwrap();
    let found = checkpoint::resolve(&run).unwrap();
    assert_eq!((found.run, found.checkpoint), (Some(run.clone()), Some(path.clone())));
    fs::write(run.join("config.toml"), "").unwrap();
    let found = checkpoint::resolve(&path).unwrap();
    assert_eq!(found.run, Some(fs::canonicalize(&run).unwrap()));
    assert_eq!(found.checkpoint, Some(path.clone()));
    // Kept on another disk.
    #[cfg(unix)]
    {
        let (inside, elsewhere) = (run.join("checkpoints"), place.path().join("elsewhere"));
        fs::rename(&inside, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &inside).unwrap();
        assert_eq!(checkpoint::resolve(&path).unwrap().run, Some(run.clone()));
        fs::remove_file(&inside).unwrap();
        fs::rename(&elsewhere, &inside).unwrap();
    }
    // A copy that was cut short is neither, though a run may have such a configuration.
    for (place, file) in [(run.join("checkpoints/0000013"), "config.toml"), (place.path().join("part"), EMA)] {
        fs::create_dir(&place).unwrap();
        fs::write(place.join("config.toml"), "").unwrap();
        fs::write(place.join(file), "").unwrap();
        let message = checkpoint::resolve(&place).unwrap_err().to_string();
        assert!(message.contains("is no whole checkpoint"), "{message}");
        fs::remove_dir_all(place).unwrap();
    }
    // Copied out of its run.
    let copy = place.path().join("copy");
    fs::rename(&path, &copy).unwrap();
    let found = checkpoint::resolve(&copy).unwrap();
    assert_eq!((found.run, found.checkpoint), (None, Some(copy)));
    // Killed before its first checkpoint.
    let found = checkpoint::resolve(&run).unwrap();
    assert_eq!((found.run, found.checkpoint), (Some(run.clone()), None));
    for bad in [place.path().join("nowhere"), run.join("config.toml"), place.path().to_path_buf()] {
        let message = checkpoint::resolve(&bad).unwrap_err().to_string();
        assert!(message.contains(&bad.display().to_string()) && !message.contains('\n'), "{message}");
    }
}

/// Writes one file and reads it for `layout`: the message.
fn refused(tensors: Vec<TensorOut>, layout: &Layout) -> String {
    let run = tempfile::tempdir().unwrap();
    let files = [FileOut { name: MODEL, tensors, metadata: Metadata::new() }];
    let path = checkpoint::write(run.path(), 1, &files, "").unwrap();
    let file = SafetensorsFile::open(path.join(MODEL)).unwrap();
    let read = checkpoint::read_layout(&file, layout, "", &mut vec![0.0; layout.len()]);
    let message = read.and_then(|()| checkpoint::check_names(&file, layout, &[""], &[])).unwrap_err().to_string();
    assert!(message.contains(MODEL) && !message.contains('\n'), "{message}");
    message
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name() {
    let layout = layout();
    let good = numbers(&layout, 1, 0.0);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut buffer = good.clone();
        buffer[25] = bad;
        // Such numbers are not written, and refused where something else wrote them.
        let run = tempfile::tempdir().unwrap();
        let tensors = TensorOut::of_layout(&layout, &buffer, "");
        let files = [FileOut { name: MODEL, tensors, metadata: Metadata::new() }];
        let message = checkpoint::write(run.path(), 1, &files, "").unwrap_err().to_string();
        assert!(message.contains("'blocks.0.attn.qkv.bias' is not finite"), "{message}");
        assert_eq!(steps(run.path()), [0; 0]);
        let mut bytes = model_file();
        let place = bytes.len() - 4 * layout.len() + 4 * 25;
        bytes[place..place + 4].copy_from_slice(&bad.to_le_bytes());
        let message = open(&bytes).unwrap_err();
        assert!(message.contains("'blocks.0.attn.qkv.bias'") && message.contains("element 1"), "{message}");
    }
    let mut bytes = model_file();
    let dtype = bytes.windows(5).position(|bytes| bytes == b"\"F32\"").unwrap();
    bytes[dtype + 1] = b'I';
    assert!(open(&bytes).unwrap_err().contains("holds I32, but must hold floats"));
    let mut missing = TensorOut::of_layout(&layout, &good, "");
    missing.remove(1);
    assert!(refused(missing, &layout).contains("no tensor 'blocks.0.attn.qkv.bias'"));
    let mut reshaped = TensorOut::of_layout(&layout, &good, "");
    reshaped[0].shape = &[4, 6];
    assert!(refused(reshaped, &layout).contains("[4, 6], but this model needs [6, 4]"));
    let mut more = TensorOut::of_layout(&layout, &good, "");
    more.push(TensorOut { name: "lora".into(), shape: &[1], data: &[1.0] });
    assert!(refused(more, &layout).contains("'lora'"));
}

#[test]
fn tensors_that_no_file_can_hold_are_refused_and_leave_nothing() {
    let data = [1.0; 6];
    let tensor = |name: &str, shape| TensorOut { name: name.into(), shape, data: &data };
    for (tensors, what) in [
        (vec![tensor("a", &[2, 2])], "tensor 'a' has 6 numbers for the shape [2, 2]"),
        (vec![tensor("a", &[1 << 32, 1 << 32, 6])], "6 numbers for the shape"),
        (vec![tensor("a", &[6]), tensor("b", &[6]), tensor("a", &[2, 3])], "two tensors 'a'"),
        (vec![tensor("__metadata__", &[6])], "'__metadata__'"),
    ] {
        let run = tempfile::tempdir().unwrap();
        write(run.path(), 1).unwrap();
        let files = [FileOut { name: MODEL, tensors, metadata: Metadata::new() }];
        let message = checkpoint::write(run.path(), 2, &files, "").unwrap_err().to_string();
        assert!(message.contains(what) && message.contains("0000002"), "{message}");
        let names: Vec<_> =
            fs::read_dir(run.path().join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["0000001"]);
    }
}

/// The bytes of a model file, written once.
fn model_file() -> Vec<u8> {
    let run = tempfile::tempdir().unwrap();
    fs::read(write(run.path(), 1).unwrap().join(MODEL)).unwrap()
}

/// Opens `bytes` as a model file and reads all of it: the sum of the weights, or the message.
fn open(bytes: &[u8]) -> Result<f32, String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, bytes).unwrap();
    let file = SafetensorsFile::open(file.path()).map_err(|e| e.to_string())?;
    let layout = layout();
    let mut buffer = vec![0.0; layout.len()];
    checkpoint::read_layout(&file, &layout, "", &mut buffer).map_err(|e| e.to_string())?;
    Ok(buffer.iter().sum())
}

#[test]
fn every_truncation_is_refused() {
    let bytes = model_file();
    open(&bytes).unwrap();
    for length in 0..bytes.len() {
        let message = open(&bytes[..length]).expect_err("a truncated file");
        assert!(!message.contains('\n'), "{message}");
    }
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    assert!(open(&huge).unwrap_err().contains("1152921504606846976"));
}

proptest! {
    #[test]
    fn damaged_headers_never_panic(damage in prop::collection::vec((0usize..400, any::<u8>()), 1..6), cut in 0usize..600) {
        let mut bytes = model_file();
        for (at, value) in damage {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        bytes.truncate(bytes.len().max(cut) - cut.min(bytes.len() - 1) % 7);
        if let Ok(sum) = open(&bytes) {
            prop_assert!(sum.is_finite());
        }
    }

    #[test]
    fn hostile_headers_never_panic(
        dtype in prop::sample::select(vec!["F32", "F64", "I64", "Q8", ""]),
        shape in prop::collection::vec(prop::sample::select(vec![0u64, 1, 4, 6, 1 << 31, 1 << 62, u64::MAX]), 0..4),
        offsets in prop::array::uniform2(prop::sample::select(vec![0u64, 96, 1 << 40, u64::MAX])),
        data in 0usize..200,
    ) {
        let header = format!(r#"{{"blocks.0.attn.qkv.weight":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":{offsets:?}}}}}"#);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        prop_assert!(open(&bytes).is_err());
    }
}
