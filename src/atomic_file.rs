//! Files that are there whole or not at all: written under a temporary name beside the final one, synced, then renamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A file being written. Until [`commit`](Self::commit) the path holds what it held before; dropped without it, nothing is
/// left behind. Many threads or processes may write the same path: the last to commit wins.
#[derive(Debug)]
pub struct AtomicFile {
    file: BufWriter<File>,
    path: PathBuf,
    temporary: PathBuf,
}

impl AtomicFile {
    /// Begins to write `path`, whose directory must exist.
    ///
    /// # Errors
    /// [`Error::File`] when the path names no file, or something other than a regular file is there, or its directory cannot be written.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        static COUNT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let path = path.into();
        let Some(name) = path.file_name() else {
            return Err(Error::file(path, "is not the name of a file"));
        };
        check_target(&path)?;
        loop {
            let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let mut hidden = std::ffi::OsString::from(".");
            hidden.push(name);
            hidden.push(format!(".{}.{count}.tmp", std::process::id()));
            let temporary = path.with_file_name(hidden);
            match File::create_new(&temporary) {
                Ok(file) => return Ok(AtomicFile { file: BufWriter::new(file), path, temporary }),
                // A kill left it, or a process of this number on another machine writes it.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::file(&path, format!("cannot be written: {e}"))),
            }
        }
    }

    /// The path it will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes everything to the disk and gives the file its name.
    ///
    /// # Errors
    /// [`Error::File`] when the disk is full or the file cannot be renamed; the path then still holds what it held before. Also
    /// when the directory cannot be synced after that: the path then holds the new content, which a power cut may undo.
    pub fn commit(mut self) -> Result<()> {
        let result = sync(&mut self.file);
        result.and_then(|()| rename_synced(&self.temporary, &self.path)).map_err(|e| self.error(&e))
    }

    /// As [`commit`](Self::commit), but does not wait for the disk: what was written last may be lost in a power cut.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub fn commit_unsynced(mut self) -> Result<()> {
        let result = self.file.flush();
        result.and_then(|()| fs::rename(&self.temporary, &self.path)).map_err(|e| self.error(&e))
    }

    /// As [`commit`](Self::commit), but leaves a file that is at the path by now: then the name is the first that is free of `a-1.npz`,
    /// `a-2.npz` and so on, for `a.npz`. Returns the name.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub fn commit_new(mut self) -> Result<PathBuf> {
        sync(&mut self.file).map_err(|e| self.error(&e))?;
        let [stem, ending] = [self.path.file_stem(), self.path.extension()].map(|part| part.map(ToOwned::to_owned));
        let mut path = self.path.clone();
        // A link that leads nowhere takes its name, too.
        let is_there = |path: &Path| path.symlink_metadata().is_ok();
        for number in 1.. {
            // A hard link replaces nothing. Where there are none, nobody else is likely to take the name just now.
            let named = match fs::hard_link(&self.temporary, &path) {
                Err(_) if !is_there(&path) => fs::rename(&self.temporary, &path),
                linked => linked,
            };
            match named {
                Ok(()) => break,
                Err(_) if is_there(&path) => {}
                Err(e) => return Err(self.error(&e)),
            }
            let mut name = stem.clone().unwrap_or_default();
            name.push(format!("-{number}"));
            path.set_file_name(name);
            if let Some(ending) = &ending {
                path.as_mut_os_string().push(".");
                path.as_mut_os_string().push(ending);
            }
        }
        sync_directory(directory_of(&path)).map_err(|e| self.error(&e))?;
        Ok(path)
    }

    /// What to say when writing failed with `e`.
    pub fn error(&self, e: &dyn std::fmt::Display) -> Error {
        Error::file(&self.path, format!("cannot be written: {e}"))
    }
}

/// Refuses a path at which something is that is no regular file: a device or a pipe would be replaced by one.
pub(crate) fn check_target(path: &Path) -> Result<()> {
    match fs::metadata(path) {
        Ok(there) if there.is_dir() => Err(Error::file(path, "is a directory: give the name of a file")),
        Ok(there) if !there.is_file() => {
            Err(Error::file(path, "is not a regular file, and would be replaced by one: give another name"))
        }
        _ => Ok(()),
    }
}

/// Whether a kill may have left a file of this name of the writing of one called `of`.
pub(crate) fn is_leftover(name: &str, of: &str) -> bool {
    let rest = name.strip_prefix('.').and_then(|name| name.strip_prefix(of));
    rest.is_some_and(|rest| rest.starts_with('.') && rest.ends_with(".tmp"))
}

/// Creates `path`, lets `content` write it and waits until it is on the disk.
pub(crate) fn write_synced(path: &Path, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    content(&mut out)?;
    sync(&mut out)
}

/// Renames `from`, whose content is on the disk, to `to` in the same directory and waits until that is on the disk too.
pub(crate) fn rename_synced(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync_directory(directory_of(to))
}

/// The parent of a bare name is the empty path.
fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Waits until the names in `directory` are on the disk.
pub(crate) fn sync_directory(directory: &Path) -> io::Result<()> {
    use io::ErrorKind::{InvalidInput, PermissionDenied, Unsupported};
    // Elsewhere a directory cannot be opened as a file; renames are in order there.
    if !cfg!(unix) {
        return Ok(());
    }
    match File::open(directory).and_then(|directory| directory.sync_all()) {
        // A directory may be writable but not readable, and not every file system syncs directories.
        Err(e) if matches!(e.kind(), InvalidInput | PermissionDenied | Unsupported) => Ok(()),
        synced => synced,
    }
}

fn sync(file: &mut BufWriter<File>) -> io::Result<()> {
    file.flush()?;
    file.get_ref().sync_all()
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        // Fails after a commit, when the name is gone already.
        let _ = fs::remove_file(&self.temporary);
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_replaces_none() {
        let place = tempfile::tempdir().unwrap();
        for (name, others) in [("a.npz", ["a-1.npz", "a-2.npz"]), ("a", ["a-1", "a-2"])] {
            let path = place.path().join(name);
            for (i, expected) in [name].iter().chain(&others).enumerate() {
                let mut file = AtomicFile::create(&path).unwrap();
                write!(file, "{i}").unwrap();
                assert_eq!(file.commit_new().unwrap(), place.path().join(expected));
            }
            for (i, expected) in [name].iter().chain(&others).enumerate() {
                assert_eq!(fs::read_to_string(place.path().join(expected)).unwrap(), i.to_string());
            }
        }
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 6, "nothing is left behind");
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("/nowhere/at/all", place.path().join("b")).unwrap();
            let named = AtomicFile::create(place.path().join("b")).unwrap().commit_new().unwrap();
            assert_eq!(named, place.path().join("b-1"));
        }
    }

    /// Two machines that share a folder may have processes of one number, and a link may be where the temporary file would be.
    #[test]
    fn temporary_files_of_others_are_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("file");
        let number = |file: &AtomicFile| -> usize {
            let name = file.temporary.to_str().unwrap().strip_suffix(".tmp").unwrap();
            name.rsplit('.').next().unwrap().parse().unwrap()
        };
        let next = number(&AtomicFile::create(&path).unwrap()) + 1;
        // Other tests take numbers, too.
        let others = next..next + 50;
        let other = |count| place.path().join(format!(".file.{}.{count}.tmp", std::process::id()));
        others.clone().for_each(|count| fs::write(other(count), "other").unwrap());
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"mine").unwrap();
        file.commit_unsynced().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        for count in others {
            assert_eq!(fs::read(other(count)).unwrap(), b"other");
        }
    }

    #[test]
    fn only_regular_files_are_replaced() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("file");
        assert!(check_target(&path).is_ok());
        AtomicFile::create(&path).unwrap().commit().unwrap();
        assert!(check_target(&path).is_ok());
        assert!(check_target(place.path()).unwrap_err().to_string().contains("is a directory"));
        if cfg!(unix) {
            assert!(check_target(Path::new("/dev/null")).unwrap_err().to_string().contains("not a regular file"));
            assert!(AtomicFile::create("/dev/null").unwrap_err().to_string().contains("not a regular file"));
        }
    }
}
