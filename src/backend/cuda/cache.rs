//! Compiled kernels on disk, so that each is compiled once a machine.
//!
//! A file holds its whole key (texts, options, NVRTC's version) before what was compiled, and a checksum after it: another
//! key with the same name, or a damaged file, is compiled again. Files appear whole by renaming, so processes may race.

use super::launch::SOURCES;
use super::library::variable;
use super::nvrtc::{self, Compiled};
use crate::atomic_file::AtomicFile;
use crate::error::Result;
use std::io::{Read, Write};
use std::path::PathBuf;

/// Folder of the compiled kernels, instead of the user's cache folder.
pub const KERNEL_CACHE: &str = "DTR_KERNEL_CACHE";

/// No compiled kernel is larger, so no larger file is read.
const LARGEST_FILE: u64 = 64 << 20;

fn folder() -> Option<PathBuf> {
    let variable = |name| variable(name).map(PathBuf::from);
    variable(KERNEL_CACHE)
        .or_else(|| variable("XDG_CACHE_HOME").map(|home| home.join("dtr-fused")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/dtr-fused")))
}

/// [`nvrtc::compile`], from disk where possible. A cache that cannot be used only costs time.
///
/// # Errors
/// As [`nvrtc::compile`].
pub fn compile(file: &str, options: &[String]) -> Result<Compiled> {
    let key = key(file, options)?;
    let path = folder().map(|folder| folder.join(format!("{file}-{:016x}.kernel", hash(&key))));
    if let Some(found) = path.as_ref().and_then(|path| read(path, &key)) {
        return Ok(found);
    }
    let compiled = nvrtc::compile(file, options)?;
    if let Some(path) = path {
        let written = path.parent().is_some_and(|folder| std::fs::create_dir_all(folder).is_ok())
            && AtomicFile::create(path).is_ok_and(|out| write(out, &key, &compiled).is_ok());
        // A read-only home is no reason to stop: the next process compiles again.
        let _ = written;
    }
    Ok(compiled)
}

/// Everything that what was compiled depends on.
fn key(file: &str, options: &[String]) -> Result<String> {
    let (major, minor) = nvrtc::version()?;
    let mut key = format!("nvrtc {major}.{minor} {} {file}.cu\n", options.join(" "));
    for (name, text) in SOURCES.iter().filter(|(name, _)| name.ends_with(".cuh") || *name == format!("{file}.cu")) {
        key += &format!("{name} {}\n{text}", text.len());
    }
    Ok(key)
}

/// FNV-1a.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The parts of a file, each after its length.
fn parts<'a>(key: &'a str, compiled: &'a Compiled) -> [&'a [u8]; 4] {
    [key.as_bytes(), &compiled.cubin, &compiled.ptx, compiled.log.as_bytes()]
}

fn write(mut out: AtomicFile, key: &str, compiled: &Compiled) -> std::io::Result<()> {
    let mut checksum = crc32fast::Hasher::new();
    for part in parts(key, compiled) {
        let length = (part.len() as u64).to_le_bytes();
        for bytes in [length.as_slice(), part] {
            checksum.update(bytes);
            out.write_all(bytes)?;
        }
    }
    out.write_all(&checksum.finalize().to_le_bytes())?;
    out.commit().map_err(std::io::Error::other)
}

fn read(path: &std::path::Path, key: &str) -> Option<Compiled> {
    let mut bytes = Vec::new();
    std::fs::File::open(path).ok()?.take(LARGEST_FILE).read_to_end(&mut bytes).ok()?;
    let (body, checksum) = bytes.split_last_chunk::<4>()?;
    if crc32fast::hash(body) != u32::from_le_bytes(*checksum) {
        return None;
    }
    let mut rest = body;
    let mut next = || {
        let (length, after) = rest.split_first_chunk::<8>()?;
        let (part, after) = after.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        rest = after;
        Some(part)
    };
    let (found, cubin, ptx, log) = (next()?, next()?, next()?, next()?);
    let log = String::from_utf8(log.to_vec()).ok()?;
    (found == key.as_bytes() && rest.is_empty()).then(|| Compiled { cubin: cubin.to_vec(), ptx: ptx.to_vec(), log })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.kernel");
        let compiled = Compiled { cubin: vec![1, 2, 3], ptx: b".version 9.0".to_vec(), log: "fine".into() };
        write(AtomicFile::create(&path).unwrap(), "key", &compiled).unwrap();
        assert_eq!(read(&path, "key"), Some(compiled));
        assert_eq!(read(&path, "another"), None);
        let bytes = std::fs::read(&path).unwrap();
        for end in 0..bytes.len() {
            std::fs::write(&path, &bytes[..end]).unwrap();
            assert_eq!(read(&path, "key"), None, "cut to {end} bytes");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(read(&path, "key"), None, "damaged at {at}");
        }
    }
}
