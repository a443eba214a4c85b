//! Files of others, read with care: what is no regular file is not opened, and no more is read than may be.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::Path;

/// Opens the regular file `path`.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    // Asked before opening: opening a pipe would wait for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is not a regular file"));
    }
    File::open(path)
}

/// Reads the regular file `path` of at most `most` bytes.
pub(crate) fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::new(ErrorKind::FileTooLarge, format!("it is longer than {most} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_files_and_long_ones_are_not_read() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("file");
        fs::write(&path, "12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        assert_eq!(read(&path, 4).unwrap_err().to_string(), "it is longer than 4 bytes");
        assert_eq!(read(place.path(), 5).unwrap_err().to_string(), "it is not a regular file");
        assert_eq!(read(&place.path().join("none"), 5).unwrap_err().kind(), ErrorKind::NotFound);
        if cfg!(unix) {
            assert_eq!(open(Path::new("/dev/zero")).unwrap_err().to_string(), "it is not a regular file");
        }
    }
}
