//! The directory of a run: where each file is, and that only one trainer at a time writes there.
//!
//! ```text
//! runs/NAME/config.toml, changes.jsonl, metrics.jsonl, events.out.tfevents.*, data.png, loss.png, samples/STEP.png, checkpoints/STEP/
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::changes::CHANGES;
use super::checkpoint::CONFIG;
use super::config::TrainConfig;
use super::events::EVENTS;
use super::metrics::METRICS;
use super::plot::LOSS_PNG;
use crate::atomic_file::{AtomicFile, is_leftover};
use crate::error::{Error, Result};

const LOCK: &str = ".lock";
const SAMPLES: &str = "samples";
/// Name of the picture of the first batch.
pub(super) const DATA_PNG: &str = "data.png";

/// An open run. As long as it lives, no other process can open the run to train.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Makes the directory of a new run and writes its `config.toml`: `config.out`, or `runs/MODEL-ROUTING-NUMBER` with the
    /// first free number.
    ///
    /// # Errors
    /// [`Error::File`] when the directory holds something already, or cannot be made or written.
    pub fn create(config: &TrainConfig) -> Result<Self> {
        let path =
            if config.out.is_empty() { first_free(Path::new("runs"), config)? } else { PathBuf::from(&config.out) };
        fs::create_dir_all(&path)
            .map_err(|e| Error::file(&path, format!("the run's directory cannot be made: {e}")))?;
        if path.join(CONFIG).exists() {
            let path = path.display();
            return Err(Error::usage(format!(
                "{path} already holds a run: go on with it (--resume {path}) or give another directory (--out DIR)"
            )));
        }
        let mut others = fs::read_dir(&path).map_err(|e| Error::file(&path, format!("cannot be read: {e}")))?;
        // A run that was killed, or found no room, before it had its config.toml leaves no more than these.
        let ours = |name: &str| name == LOCK || is_leftover(name, CONFIG);
        if others.any(|entry| entry.is_ok_and(|entry| !entry.file_name().to_str().is_some_and(ours))) {
            return Err(Error::file(
                &path,
                "is not empty, and what is in it is no run: give another directory (--out DIR)",
            ));
        }
        let run = Self::lock(path)?;
        run.replace(CONFIG, |out| out.write_all(config.to_toml().as_bytes()))?;
        Ok(run)
    }

    /// Opens the run in `path` to train on.
    ///
    /// # Errors
    /// [`Error::File`] when there is no run in `path`, another process trains it, or it cannot be written.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        if !path.join(CONFIG).exists() {
            return Err(Error::file(&path, "holds no run to resume: there is no config.toml"));
        }
        Self::lock(path)
    }

    fn lock(path: PathBuf) -> Result<Self> {
        let lock = path.join(LOCK);
        // Not by a link to elsewhere, as a run from others may have.
        if fs::symlink_metadata(&lock).is_ok_and(|there| !there.is_file()) {
            return Err(Error::file(lock, "is not a regular file: remove it"));
        }
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(lock);
        let file = file.map_err(|e| Error::file(&path, format!("cannot be written: {e}")))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                Err(Error::file(&path, "another process trains this run: wait for it, or start a new run"))
            }
            // A file system without locks cannot tell; that must not keep anybody from training.
            Err(TryLockError::Error(_)) => Ok(RunDir { path, _lock: file }),
            Ok(()) => {
                clear_leftovers(&path);
                Ok(RunDir { path, _lock: file })
            }
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The grid of samples of `step`. Its directory is made.
    ///
    /// # Errors
    /// [`Error::File`] when the directory cannot be made.
    pub fn samples(&self, step: u64) -> Result<PathBuf> {
        let directory = self.path.join(SAMPLES);
        fs::create_dir_all(&directory).map_err(|e| Error::file(&directory, format!("cannot be made: {e}")))?;
        Ok(directory.join(picture_of(step)))
    }

    /// Writes the file `name` whole or not at all: temporary name, sync, rename.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be written, as [`AtomicFile::commit`].
    pub fn replace(&self, name: &str, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        let mut file = AtomicFile::create(self.path.join(name))?;
        content(&mut file).map_err(|e| file.error(&e))?;
        file.commit()
    }
}

/// Removes half-written files that killed trainers left in the run in `path` (the next checkpoint clears `checkpoints/`). Where
/// that fails they are in nobody's way.
fn clear_leftovers(path: &Path) {
    let clear = |directory: &Path, ours: &dyn Fn(&str) -> bool| {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(ours) {
                let _ = fs::remove_file(entry.path());
            }
        }
    };
    clear(path, &|name| {
        [CONFIG, CHANGES, METRICS, LOSS_PNG, DATA_PNG, EVENTS].iter().any(|file| is_leftover(name, file))
    });
    let step_of = |name: &str| name.strip_prefix('.')?.split_once('.')?.0.parse().ok();
    clear(&path.join(SAMPLES), &|name| step_of(name).is_some_and(|step| is_leftover(name, &picture_of(step))));
}

/// The name of the grid of samples of `step`.
fn picture_of(step: u64) -> String {
    format!("{step:07}.png")
}

/// Makes `parent/MODEL-ROUTING-NUMBER` with the first number that is free.
fn first_free(parent: &Path, config: &TrainConfig) -> Result<PathBuf> {
    fs::create_dir_all(parent)
        .map_err(|e| Error::file(parent, format!("cannot be made: {e}; give a directory with --out")))?;
    let stem = format!("{}-{}", config.model.replace('/', "-"), config.routing);
    for number in 1..=9999 {
        let path = parent.join(format!("{stem}-{number:04}"));
        // create_dir fails where something is, so two trainers that start together do not take the same.
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::file(&path, format!("cannot be made: {e}; give a directory with --out"))),
        }
    }
    Err(Error::file(parent, format!("all names {stem}-0001 to {stem}-9999 are taken: give a directory with --out")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(out: &Path) -> TrainConfig {
        TrainConfig { out: out.display().to_string(), ..TrainConfig::default() }
    }

    #[test]
    fn a_run_is_never_overwritten() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("a/b");
        let run = RunDir::create(&config(&out)).unwrap();
        assert_eq!(TrainConfig::from_file(&out.join(CONFIG)).unwrap(), config(&out));
        drop(run);
        assert!(RunDir::create(&config(&out)).unwrap_err().to_string().contains("--resume"));
        let other = place.path().join("other");
        fs::create_dir(&other).unwrap();
        // What a run leaves that was killed while it wrote its configuration, and something else.
        fs::write(other.join(".config.toml.123.0.tmp"), "model").unwrap();
        RunDir::create(&config(&other)).unwrap();
        assert!(!other.join(".config.toml.123.0.tmp").exists());
        fs::remove_file(other.join(CONFIG)).unwrap();
        fs::write(other.join("thesis.tex"), "x").unwrap();
        assert!(RunDir::create(&config(&other)).unwrap_err().to_string().contains("not empty"));
    }

    #[test]
    fn one_trainer_at_a_time() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("run");
        let run = RunDir::create(&config(&out)).unwrap();
        assert!(RunDir::open(&out).unwrap_err().to_string().contains("another process"));
        drop(run);
        RunDir::open(&out).unwrap();
        assert!(RunDir::open(place.path()).unwrap_err().to_string().contains("no run"));
    }

    /// Where a run from others has a link for its lock, the file that it leads to is left alone.
    #[cfg(unix)]
    #[test]
    fn a_lock_is_no_link() {
        let place = tempfile::tempdir().unwrap();
        let (out, other) = (place.path().join("run"), place.path().join("thesis.tex"));
        drop(RunDir::create(&config(&out)).unwrap());
        fs::remove_file(out.join(LOCK)).unwrap();
        fs::write(&other, "x").unwrap();
        std::os::unix::fs::symlink(&other, out.join(LOCK)).unwrap();
        assert!(RunDir::open(&out).unwrap_err().to_string().contains("not a regular file"));
        assert_eq!(fs::read(&other).unwrap(), b"x");
    }

    #[test]
    fn what_a_kill_left_is_cleared() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("run");
        let picture = RunDir::create(&config(&out)).unwrap().samples(12).unwrap();
        let samples = picture.parent().unwrap();
        let leftovers = [out.join(".metrics.jsonl.123.0.tmp"), samples.join(".0000012.png.123.0.tmp")];
        let others = [picture.clone(), samples.join(".notes.tmp"), samples.join(".12.txt.1.0.tmp")];
        leftovers.iter().chain(&others).for_each(|path| fs::write(path, "x").unwrap());
        RunDir::open(&out).unwrap();
        assert_eq!(leftovers.map(|path| path.exists()), [false; 2]);
        assert_eq!(others.map(|path| path.exists()), [true; 3]);
    }

    #[test]
    fn default_names_count_up() {
        let place = tempfile::tempdir().unwrap();
        let config = TrainConfig::preset("DiT-S/2", "digits").unwrap();
        let names: Vec<_> = (0..3).map(|_| first_free(place.path(), &config).unwrap()).collect();
        assert!(names[0].ends_with("DiT-S-2-paper-0001") && names[2].ends_with("DiT-S-2-paper-0003"), "{names:?}");
    }

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let place = tempfile::tempdir().unwrap();
        let run = RunDir::create(&config(&place.path().join("run"))).unwrap();
        run.replace("notes", |out| out.write_all(b"first")).unwrap();
        let failed = run.replace("notes", |out| {
            out.write_all(b"sec")?;
            Err(io::Error::other("disk full"))
        });
        assert!(failed.unwrap_err().to_string().contains("disk full"));
        assert_eq!(fs::read(run.path().join("notes")).unwrap(), b"first");
        assert_eq!(fs::read_dir(run.path()).unwrap().count(), 3, "config, lock, notes: nothing temporary is left");
    }
}
