//! Checkpoints: a directory `checkpoints/STEP/` of a run with `model.safetensors`, `ema.safetensors`, `optimizer.safetensors`
//! and the run's `config.toml`.
//!
//! A checkpoint is written under a temporary name in `checkpoints/`, every file and the directory are synced, and only then
//! is it renamed: whatever has a step for its name is whole. Names that begin with a dot are the leftovers of a run that was
//! killed while it wrote or deleted; they are cleared by the next write.

use rayon::prelude::*;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::atomic_file::{rename_synced, sync_directory, write_synced};
use crate::error::{Error, Result};
use crate::params::Layout;
use crate::safetensors_file::SafetensorsFile;

/// The weights.
pub const MODEL: &str = "model.safetensors";
/// Their moving average.
pub const EMA: &str = "ema.safetensors";
/// The moments of AdamW (`m.NAME`, `v.NAME`) and the state of the trainer.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// The configuration of the run.
pub const CONFIG: &str = "config.toml";

/// Where a file has its free text, among the names of its tensors.
const METADATA: &str = "__metadata__";

/// Free text of a file: what the trainer must remember beside tensors.
pub type Metadata = BTreeMap<String, String>;

/// Where a run has its checkpoints.
pub(super) const DIRECTORY: &str = "checkpoints";
/// A checkpoint being written or deleted.
const TEMPORARY: &str = ".tmp-";
/// A checkpoint being replaced by another of the same step.
const REPLACED: &str = ".old-";

// The tensors are written as they lie in memory, and the format is little-endian.
const _: () = assert!(cfg!(target_endian = "little"));

/// A tensor to write.
#[derive(Clone, Debug)]
pub struct TensorOut<'a> {
    /// Its name in the file.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: &'a [usize],
    /// The numbers, row-major: as many as `shape` says.
    pub data: &'a [f32],
}

/// A `.safetensors` file to write.
#[derive(Clone, Debug)]
pub struct FileOut<'a> {
    /// Name in the checkpoint's directory.
    pub name: &'a str,
    /// Its tensors.
    pub tensors: Vec<TensorOut<'a>>,
    /// Its free text.
    pub metadata: Metadata,
}

impl<'a> TensorOut<'a> {
    /// Every parameter of `layout` with the numbers in `buffer`, its name after `prefix` (`""`, `m.`, `v.`).
    ///
    /// # Panics
    /// When `buffer` is not as long as the layout.
    pub fn of_layout(layout: &'a Layout, buffer: &'a [f32], prefix: &str) -> Vec<TensorOut<'a>> {
        assert_eq!(buffer.len(), layout.len(), "the numbers of a layout");
        let entries = layout.entries().iter();
        let tensor = |entry: &'a crate::params::Entry| TensorOut {
            name: format!("{prefix}{}", entry.name),
            shape: &entry.shape,
            data: &buffer[entry.param.range()],
        };
        entries.map(tensor).collect()
    }
}

/// Writes the checkpoint of `step` and returns its directory. A checkpoint of the same step is replaced.
///
/// # Errors
/// [`Error::File`] when a directory or file cannot be written (no permission, disk full), a tensor has not as many numbers as its shape
/// says, or two of a file have one name; [`Error::Stopped`] when a number is not finite. All earlier checkpoints are intact, and what was
/// written of this one is removed.
pub fn write(run: &Path, step: u64, files: &[FileOut], config: &str) -> Result<PathBuf> {
    let directory = run.join(DIRECTORY);
    let target = directory.join(name_of(step));
    let temporary = directory.join(format!("{TEMPORARY}{}", name_of(step)));
    // Reading would refuse it, when the checkpoints before it may be gone.
    let finite = |tensor: &&TensorOut| {
        tensor.data.par_chunks(1 << 16).all(|part| part.iter().fold(true, |all, x| all & x.is_finite()))
    };
    if let Some(bad) = files.iter().flat_map(|file| &file.tensors).find(|tensor| !finite(tensor)) {
        let what = format!("is not written, as tensor '{}' is not finite: training diverged", bad.name);
        return Err(Error::Stopped(format!("{}: {what} (a smaller --lr may help)", target.display())));
    }
    files.iter().try_for_each(|file| check_tensors(file)).map_err(|what| Error::file(&target, what))?;
    let result = clear_leftovers(&directory)
        .and_then(|()| fs::create_dir_all(&temporary))
        .and_then(|()| sync_directory(run))
        .and_then(|()| write_files(&temporary, files, config))
        .and_then(|()| put_in_place(&directory, &temporary, &target));
    result.map_err(|e| {
        let _ = fs::remove_dir_all(&temporary);
        Error::file(&target, format!("the checkpoint cannot be written: {e}"))
    })?;
    Ok(target)
}

/// Refuses what no `.safetensors` file can hold.
fn check_tensors(file: &FileOut) -> std::result::Result<(), String> {
    let mut names = HashSet::from([METADATA]);
    for TensorOut { name, shape, data } in &file.tensors {
        if shape.iter().try_fold(1, |len: usize, &size| len.checked_mul(size)) != Some(data.len()) {
            return Err(format!(
                "is not written, as tensor '{name}' has {} numbers for the shape {shape:?}",
                data.len()
            ));
        }
        if !names.insert(name) {
            return Err(format!("is not written, as {} has two tensors '{name}', or it is no name of one", file.name));
        }
    }
    Ok(())
}

fn write_files(directory: &Path, files: &[FileOut], config: &str) -> io::Result<()> {
    for file in files {
        write_synced(&directory.join(file.name), |out| write_safetensors(out, &file.tensors, &file.metadata))?;
    }
    write_synced(&directory.join(CONFIG), |out| out.write_all(config.as_bytes()))?;
    sync_directory(directory)
}

fn put_in_place(directory: &Path, temporary: &Path, target: &Path) -> io::Result<()> {
    if target.exists() {
        let name = target.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let old = directory.join(format!("{REPLACED}{name}"));
        fs::rename(target, &old)?;
        rename_synced(temporary, target)?;
        // Under a name that is never put back: it may be deleted in part only. What stays, the next write tries again.
        let _ = fs::rename(&old, temporary).and_then(|()| fs::remove_dir_all(temporary));
        return Ok(());
    }
    rename_synced(temporary, target)
}

/// Removes what killed runs left behind, unless that fails: it is in nobody's way. A checkpoint that was being replaced is put
/// back if its successor never came.
fn clear_leftovers(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some(step) = name.strip_prefix(REPLACED)
            && !directory.join(step).exists()
        {
            fs::rename(entry.path(), directory.join(step))?;
        } else if name.starts_with(TEMPORARY) || name.starts_with(REPLACED) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// Writes a `.safetensors` file: the header's length, the header, the tensors one after the other.
fn write_safetensors(out: &mut dyn Write, tensors: &[TensorOut], metadata: &Metadata) -> io::Result<()> {
    let mut header = serde_json::Map::new();
    let mut text: Metadata = metadata.clone();
    // Readers in Python look here for the framework that wrote the file.
    text.insert("format".into(), "pt".into());
    header.insert(METADATA.into(), serde_json::to_value(text)?);
    let mut end = 0;
    for tensor in tensors {
        let begin = end;
        end += size_of_val(tensor.data);
        let info = serde_json::json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end]});
        header.insert(tensor.name.clone(), info);
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    tensors.iter().try_for_each(|tensor| out.write_all(bytemuck::cast_slice(tensor.data)))
}

/// Deletes checkpoints of `run` except the latest `keep_last`, those whose step is a multiple of `keep_every` (0: none), and those of the
/// steps `best`.
///
/// # Errors
/// [`Error::File`] of the first that cannot be deleted; the others are.
pub fn prune(run: &Path, keep_last: usize, keep_every: u64, best: &[u64]) -> Result<()> {
    let (all, mut result) = (list(run)?, Ok(()));
    for (step, path) in &all[..all.len().saturating_sub(keep_last.max(1))] {
        if keep_every > 0 && step.is_multiple_of(keep_every) || best.contains(step) {
            continue;
        }
        // Renamed first, so that a kill while its files go does not leave half a checkpoint under a step's name.
        let temporary = path.with_file_name(format!("{TEMPORARY}{}", name_of(*step)));
        let deleted = match fs::rename(path, &temporary) {
            Ok(()) => fs::remove_dir_all(&temporary).map_err(|e| (&temporary, e)),
            Err(e) => Err((path, e)),
        };
        result = result
            .and(deleted.map_err(|(at, e)| Error::file(at, format!("the old checkpoint cannot be deleted: {e}"))));
    }
    result
}

/// Steps and directories of all checkpoints of `run`, by step.
///
/// # Errors
/// [`Error::File`] when `checkpoints/` is there but cannot be read.
pub fn list(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let directory = run.join(DIRECTORY);
    let fail = |e: io::Error| Error::file(&directory, format!("cannot be read: {e}"));
    let entries = match fs::read_dir(&directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(fail)?,
    };
    let mut found = BTreeMap::new();
    for entry in entries {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some(step) = step_of(name) {
            found.insert(step, entry.path());
        } else if let Some(step) = name.strip_prefix(REPLACED).and_then(step_of) {
            // Counts only if the one that was to replace it never came.
            found.entry(step).or_insert(entry.path());
        }
    }
    Ok(found.into_iter().collect())
}

/// Step and directory of the latest checkpoint of `run`, if it has one.
///
/// # Errors
/// As [`list`].
pub fn latest(run: &Path) -> Result<Option<(u64, PathBuf)>> {
    Ok(list(run)?.pop())
}

/// What a path given to `--checkpoint` or `--resume` means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The run's directory; `None` for a checkpoint that was copied out of its run.
    pub run: Option<PathBuf>,
    /// The checkpoint's directory; `None` for a run without one.
    pub checkpoint: Option<PathBuf>,
}

/// Finds the run and the checkpoint that `path` names: a run's directory (then the latest checkpoint) or a checkpoint's.
///
/// # Errors
/// [`Error::File`] when `path` is neither.
pub fn resolve(path: &Path) -> Result<Location> {
    let kind = fs::metadata(path).map_err(|e| Error::file(path, format!("cannot be opened: {e}")))?;
    if !kind.is_dir() {
        return Err(Error::file(path, "is not a directory: give a run's directory or one of its checkpoints/STEP"));
    }
    let run = run_around(path)?;
    if path.join(MODEL).exists() {
        return Ok(Location { run, checkpoint: Some(path.to_path_buf()) });
    }
    // Its config.toml does not make it a run.
    let is_step = path.file_name().and_then(|name| step_of(name.to_str()?)).is_some();
    if run.is_some() && is_step || [EMA, OPTIMIZER].iter().any(|name| path.join(name).exists()) {
        let what = format!("is no whole checkpoint, as it has no {MODEL}: give another one");
        let ema = path.join(EMA);
        let alone = if ema.exists() { format!(" (sample takes {} by itself)", ema.display()) } else { String::new() };
        return Err(Error::file(path, what + &alone));
    }
    let checkpoint = latest(path)?.map(|(_, checkpoint)| checkpoint);
    if checkpoint.is_none() && !path.join(CONFIG).exists() {
        return Err(Error::file(
            path,
            "holds neither a run nor a checkpoint: there is no config.toml and no model.safetensors",
        ));
    }
    Ok(Location { run: Some(path.to_path_buf()), checkpoint })
}

/// The run that has `path` in its `checkpoints/`.
fn run_around(path: &Path) -> Result<Option<PathBuf>> {
    // The path may be relative or end in dots, so its parents are only known of the absolute one; as it is written, where `checkpoints`
    // is a link to elsewhere.
    let fail = |e: std::io::Error| Error::file(path, format!("cannot be opened: {e}"));
    let run_of = |path: PathBuf| {
        let parent = path.parent().filter(|parent| parent.file_name().is_some_and(|name| name == DIRECTORY));
        parent.and_then(Path::parent).filter(|run| run.join(CONFIG).exists()).map(Path::to_path_buf)
    };
    let as_written = std::path::absolute(path).map_err(fail)?;
    Ok(run_of(fs::canonicalize(path).map_err(fail)?).or_else(|| run_of(as_written)))
}

/// The name of a step's directory: sorts as text up to ten million steps.
fn name_of(step: u64) -> String {
    format!("{step:07}")
}

fn step_of(name: &str) -> Option<u64> {
    let step: u64 = name.parse().ok()?;
    (name_of(step) == name).then_some(step)
}

/// Fills `buffer` with every parameter of `layout` from `file`, where its name follows `prefix`.
///
/// `F64`, `F16` and `BF16` are converted.
///
/// # Errors
/// [`Error::File`] when a tensor is missing, has another shape or no floating-point numbers, or holds a NaN or an infinity;
/// the message names it.
///
/// # Panics
/// When `buffer` is not as long as the layout.
pub fn read_layout(file: &SafetensorsFile, layout: &Layout, prefix: &str, buffer: &mut [f32]) -> Result<()> {
    assert_eq!(buffer.len(), layout.len(), "room for the numbers of a layout");
    for entry in layout.entries() {
        read_tensor(file, &format!("{prefix}{}", entry.name), &entry.shape, &mut buffer[entry.param.range()])?;
    }
    Ok(())
}

/// Reads the tensor `name` of `shape` from `file` into `out`.
///
/// # Errors
/// As [`read_layout`].
///
/// # Panics
/// When `out` has not as many elements as `shape`.
pub fn read_tensor(file: &SafetensorsFile, name: &str, shape: &[usize], out: &mut [f32]) -> Result<()> {
    let tensor = file.tensor(name)?;
    if tensor.shape != shape {
        // What the official models leave out on demand.
        let why = match (name, tensor.shape) {
            ("y_embedder.embedding_table.weight", &[rows, _]) if rows > shape[0] => {
                format!("for all of its classes, give --num-classes {}", rows - 1)
            }
            ("y_embedder.embedding_table.weight", _) => "a row a class, and one for no class".into(),
            ("final_layer.linear.weight" | "final_layer.linear.bias", _) => {
                "outputs for what it predicts, and with --learn-sigma true as many for its variance".into()
            }
            _ => String::from("was it made with another --model or data?"),
        };
        let what = format!("tensor '{name}' has shape {:?}, but this model needs {shape:?}: {why}", tensor.shape);
        return Err(Error::file(file.path(), what));
    }
    if !tensor.element.is_float() {
        return Err(Error::file(
            file.path(),
            format!("tensor '{name}' holds {:?}, but must hold floats", tensor.element),
        ));
    }
    tensor.to_f32(out);
    match out.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(Error::file(
            file.path(),
            format!("tensor '{name}' holds {} at element {at}: the file is damaged or its training diverged", out[at]),
        )),
        None => Ok(()),
    }
}

/// Checks that `file` holds nothing beyond `layout` (each name after one of `prefixes`) and the names in `also`.
///
/// # Errors
/// [`Error::File`] that names the first tensor too many: most likely the file belongs to another model.
pub fn check_names(file: &SafetensorsFile, layout: &Layout, prefixes: &[&str], also: &[&str]) -> Result<()> {
    let names: HashSet<&str> = layout.entries().iter().map(|entry| entry.name.as_str()).collect();
    let known = |name: &str| {
        also.contains(&name) || prefixes.iter().any(|p| name.strip_prefix(p).is_some_and(|rest| names.contains(rest)))
    };
    let Some(name) = file.names().find(|name| !known(name)) else { return Ok(()) };
    // Wrappers of PyTorch put their name before those of the model.
    let wrapped = name.match_indices('.').find(|&(dot, _)| names.contains(&name[dot + 1..]));
    let other = if is_of_diffusers(name) { OF_DIFFUSERS } else { "it is another model's" };
    let why = wrapped.map_or(other.into(), |(dot, _)| why_prefixed(&name[..=dot]));
    Err(Error::file(file.path(), format!("holds tensor '{name}', which this model does not have: {why}")))
}

/// What to do about the names of diffusers.
pub(super) const OF_DIFFUSERS: &str =
    "it is a name of diffusers, and scripts/convert_weights.py makes a file with those of DiT";

/// Whether a DiT of diffusers has a tensor of this name.
pub(super) fn is_of_diffusers(name: &str) -> bool {
    ["transformer_blocks.", "pos_embed.proj.", "proj_out_"].iter().any(|start| name.starts_with(start))
}

/// What to do about names of tensors that begin with `prefix`.
pub(super) fn why_prefixed(prefix: &str) -> String {
    match prefix {
        "m." | "v." => format!("they are moments of AdamW, and the weights are in {EMA} and {MODEL}"),
        _ => format!("take '{prefix}' off the names of its tensors"),
    }
}
