//! Comparison with tensors that another implementation made, such as the published PyTorch code: `dtr-fused parity`.
//!
//! A case is a directory of safetensors files; `docs/parity-format.md` says what each may hold and how near this
//! implementation must come. What is not understood fails, and so does a directory in which nothing could be compared.
//!
//! ```text
//! report     rows, checks and the table
//! archive    one file of a case as numbers          config    its config.json
//! network    the model with the case's weights
//! forward    losses    training    sampling         one kind of file each
//! tables     windows, schedules, likelihoods: no model
//! ```

mod archive;
mod config;
mod forward;
mod losses;
mod network;
pub mod report;
mod sampling;
mod tables;
mod training;

pub use report::{Check, Report, Row};

use crate::backend::Compute;
use crate::backend::DType;
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::routing::Routing;
use archive::Archive;
use losses::Objective;
use network::{Evaluation, Network};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Most files of one case.
const MAX_FILES: usize = 4096;

/// What a file of a case holds, by its name.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Params,
    Routing,
    Forward,
    Loss(Objective),
    Grads(Objective),
    Train,
    Sampling,
    Masks,
    Schedules,
    Nll,
    /// Loss of published code that does not do what its paper says.
    Official,
}

impl Kind {
    /// The kind of a file with this name (without extension), and whether it is one of sublayer routing.
    fn of(stem: &str) -> Option<(Self, bool)> {
        let (name, sublayer) = match stem.strip_prefix("sublayer_").or_else(|| stem.strip_suffix("_sublayer")) {
            Some(rest) => (rest, true),
            None => (stem, false),
        };
        let kind = match name {
            "params" if !sublayer => Kind::Params,
            "routing" if !sublayer => Kind::Routing,
            "masks" if !sublayer => Kind::Masks,
            "schedules" if !sublayer => Kind::Schedules,
            "nll" if !sublayer => Kind::Nll,
            "forward" => Kind::Forward,
            "sampling" => Kind::Sampling,
            _ if name.ends_with("_official") => Kind::Official,
            _ => match (name.strip_prefix("loss_"), name.strip_prefix("grads_"), name.strip_prefix("train")) {
                (Some(rest), _, _) => Kind::Loss(Objective::parse(rest)?),
                (_, Some(rest), _) => Kind::Grads(Objective::parse(rest)?),
                (_, _, Some(steps)) if steps.bytes().all(|b| b.is_ascii_digit()) => Kind::Train,
                _ => return None,
            },
        };
        Some((kind, sublayer))
    }
}

/// The files of one directory.
#[derive(Default)]
struct Files {
    config: Option<PathBuf>,
    /// By name, so that they are compared in the same order everywhere.
    tensors: BTreeMap<String, Archive>,
    directories: Vec<PathBuf>,
}

/// Compares the case in `dir`. A directory that holds only directories is a set of cases: each is compared in turn.
///
/// # Errors
/// When `dir` cannot be read. Whatever is wrong with a file of it is a row that fails.
pub fn check_dir(dir: &Path, compute: &Compute) -> Result<Vec<(PathBuf, Report)>> {
    each_case(dir, |files, listed| compared(files, compute, listed))
}

/// [`check_dir`] of the plain loops in f64 ([`crate::model::reference`]).
///
/// # Errors
/// As [`check_dir`].
pub fn check_reference(dir: &Path) -> Result<Vec<(PathBuf, Report)>> {
    each_case(dir, |files, mut report| {
        check_case(files, &Evaluation::Truth { draw: 0 }, &mut report);
        report
    })
}

/// Has `compare` go on with the report of each case in `dir`, where its files were listed.
fn each_case(dir: &Path, compare: impl Fn(&Files, Report) -> Report) -> Result<Vec<(PathBuf, Report)>> {
    let mut report = Report::default();
    let files = list(dir, &mut report)?;
    if files.tensors.is_empty() && files.config.is_none() && !files.directories.is_empty() && report.failures() == 0 {
        let mut cases = Vec::new();
        for inner in &files.directories {
            let mut report = Report::default();
            let files = list(inner, &mut report)?;
            cases.push((inner.clone(), compare(&files, report)));
        }
        return Ok(cases);
    }
    Ok(vec![(dir.to_path_buf(), compare(&files, report))])
}

/// Compares a case, of which `listed` says what is wrong with its files. In bf16 what is tolerated is measured: three times
/// the error of plain loops on tensors in bf16.
fn compared(files: &Files, compute: &Compute, listed: Report) -> Report {
    let mut report = match compute {
        Compute::Cpu { elem: DType::Bf16 } | Compute::Cuda { elem: DType::Bf16, .. } => {
            Report::tolerating(&plain_in_bf16(files))
        }
        _ => Report::default(),
    };
    report.rows = listed.rows;
    check_case(files, &Evaluation::Fused(compute.clone()), &mut report);
    report
}

/// The errors of plain loops in bf16 in every row of a case, in some draws: of a row with few numbers a single draw may come
/// out right by chance.
fn plain_in_bf16(files: &Files) -> Vec<Report> {
    const DRAWS: u64 = 4;
    let draws: Vec<u64> = (0..DRAWS).collect();
    let of_draw = |&draw: &u64| {
        let mut truth = Report::keeping();
        check_case(files, &Evaluation::Truth { draw }, &mut truth);
        let mut plain = Report::of_truth(truth);
        check_case(files, &Evaluation::PlainBf16 { draw }, &mut plain);
        plain
    };
    draws.par_iter().map(of_draw).collect()
}

/// Finds the files of `dir` and opens them.
fn list(dir: &Path, report: &mut Report) -> Result<Files> {
    let fail = |e: std::io::Error| Error::file(dir, format!("cannot be read as a directory of tensors: {e}"));
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        paths.push(entry.map_err(fail)?.path());
        if paths.len() > MAX_FILES {
            return Err(Error::file(dir, format!("holds more than {MAX_FILES} files: it is no case directory")));
        }
    }
    paths.sort();
    let mut files = Files::default();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match name.strip_suffix(".safetensors") {
            _ if path.is_dir() => files.directories.push(path),
            _ if name == "config.json" => files.config = Some(path),
            _ if name == "README.md" => {}
            Some(stem) if Kind::of(stem).is_some() => match Archive::open(&path, stem) {
                Ok(archive) => _ = files.tensors.insert(stem.to_string(), archive),
                Err(e) => report.fail(name, e.to_string()),
            },
            _ => report.fail(name, "this file is not understood".into()),
        }
    }
    Ok(files)
}

fn check_case(files: &Files, how: &Evaluation, report: &mut Report) {
    for directory in &files.directories {
        if !files.tensors.is_empty() || files.config.is_some() {
            report.fail(directory.display().to_string(), "a directory inside a case is not understood".into());
        }
    }
    let mut of_model = BTreeMap::new();
    for (stem, archive) in &files.tensors {
        // Only files with a known kind are opened.
        let Some((kind, sublayer)) = Kind::of(stem) else { continue };
        let result = match kind {
            Kind::Masks => tables::check_masks(archive, report),
            Kind::Schedules => tables::check_schedules(archive, report),
            Kind::Nll => tables::check_nll(archive, report),
            Kind::Official => {
                report.note(stem, "information only: the published code does not do here what its paper says");
                Ok(())
            }
            // Trajectories have many numbers, and take long: one draw tells their error.
            Kind::Sampling if how.is_further_draw() => Ok(()),
            _ => {
                of_model.insert((sublayer, stem.as_str()), (kind, archive));
                Ok(())
            }
        };
        note_error(stem, result, report);
    }
    if of_model.is_empty() && files.config.is_none() {
        if report.rows.is_empty() {
            report.fail("files", "there is nothing to compare here".into());
        }
        return;
    }
    let (params, config) = match model_of(files) {
        Ok(model) => model,
        Err(e) => return report.fail("model", e.to_string()),
    };
    for sublayer in [false, true] {
        let mine: Vec<(Kind, &Archive)> =
            of_model.iter().filter(|((s, _), _)| *s == sublayer).map(|(_, &(kind, archive))| (kind, archive)).collect();
        if !sublayer || !mine.is_empty() {
            let routing = if sublayer { Routing::Sublayer } else { config.routing };
            let config = ModelConfig { routing, ..config.clone() };
            let network = Network::new(config, params, files.tensors.get("routing"), how);
            let result = network.and_then(|mut network| {
                if let Evaluation::Fused(Compute::Cuda { elem, .. }) = how
                    && let Err(why) = network.dit.config.check_cuda(*elem)
                {
                    report.note("model", why.to_string());
                    return Ok(());
                }
                if !sublayer {
                    network.check_params(params, report)?;
                }
                check_model_files(&mine, files.tensors.get("forward"), &mut network, report);
                Ok(())
            });
            note_error("model", result, report);
        }
    }
}

/// The parameters of the case, and the sizes and routing of its model.
fn model_of(files: &Files) -> Result<(&Archive, ModelConfig)> {
    let missing = |name| Error::usage(format!("{name} is missing: without it the other files cannot be compared"));
    let params = files.tensors.get("params").ok_or_else(|| missing("params.safetensors"))?;
    let config = config::read(files.config.as_ref().ok_or_else(|| missing("config.json"))?, params)?;
    Ok((params, config))
}

/// Compares the files of one routing. `fallback` holds the inputs of losses where this routing has no forward file.
fn check_model_files(
    files: &[(Kind, &Archive)],
    fallback: Option<&Archive>,
    network: &mut Network,
    report: &mut Report,
) {
    let find = |kind: Kind| files.iter().find(|(k, _)| *k == kind).map(|(_, archive)| *archive);
    let forward = find(Kind::Forward).or(fallback);
    for (kind, archive) in files {
        let result = match *kind {
            Kind::Forward => forward::check(archive, network, report),
            // A loss and its gradients come from one pass.
            Kind::Loss(objective) => {
                losses::check(Some(archive), find(Kind::Grads(objective)), forward, objective, network, report)
            }
            Kind::Grads(objective) if find(Kind::Loss(objective)).is_none() => {
                losses::check(None, Some(archive), forward, objective, network, report)
            }
            Kind::Train => training::check(archive, network, report),
            Kind::Sampling => sampling::check(archive, network, report),
            _ => Ok(()),
        };
        note_error(&archive.stem, result, report);
    }
}

/// A file that cannot be compared to its end fails, and the others go on.
fn note_error(name: &str, result: Result<()>, report: &mut Report) {
    if let Err(e) = result {
        report.fail(name, e.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_files() {
        assert_eq!(Kind::of("forward"), Some((Kind::Forward, false)));
        assert_eq!(Kind::of("sublayer_forward"), Some((Kind::Forward, true)));
        assert_eq!(Kind::of("forward_sublayer"), Some((Kind::Forward, true)));
        assert!(matches!(Kind::of("loss_cosine_constant_sublayer"), Some((Kind::Loss(_), true))));
        assert!(matches!(Kind::of("grads_linear_min_snr_5"), Some((Kind::Grads(_), false))));
        assert_eq!(Kind::of("loss_linear_p2weight_1_1_official"), Some((Kind::Official, false)));
        assert_eq!(Kind::of("train20"), Some((Kind::Train, false)));
        assert_eq!(Kind::of("sublayer_train5"), Some((Kind::Train, true)));
        for bad in ["", "paramsx", "loss_", "loss_linear", "grads", "trainer", "sublayer_params", "forward2"] {
            assert_eq!(Kind::of(bad), None, "{bad}");
        }
    }
}
