//! One error type for the library: every message is one sentence that names what was wrong with what, and what to do.

use std::path::PathBuf;

/// What can go wrong, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request contradicts itself or is out of range (a flag, a configuration key, a model size).
    #[error("{0}")]
    Usage(String),
    /// An operation was given tensors whose shapes do not fit together.
    #[error("{operation}: {what}")]
    Shape {
        /// The operation that refused.
        operation: &'static str,
        /// The shape found, the shape expected.
        what: String,
    },
    /// A file is missing, cannot be read or written, or does not hold what it should.
    #[error("{}: {what}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it and what to do.
        what: String,
    },
    /// A run had to stop (for example after too many non-finite steps in a row).
    #[error("{0}")]
    Stopped(String),
}

/// Result of the library's fallible functions.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A [`Error::Usage`] from anything printable.
    pub fn usage(what: impl Into<String>) -> Self {
        Error::Usage(what.into())
    }

    /// The same error with `more` at the end of its sentence.
    #[must_use]
    pub fn and(mut self, more: &str) -> Self {
        let (Error::Usage(what) | Error::Stopped(what) | Error::Shape { what, .. } | Error::File { what, .. }) =
            &mut self;
        what.push_str(more);
        self
    }

    /// A [`Error::File`] for `path`.
    pub fn file(path: impl Into<PathBuf>, what: impl std::fmt::Display) -> Self {
        Error::File { path: path.into(), what: what.to_string() }
    }
}

/// `text` for a terminal: names from files may hold control characters, which would command it. Line feeds stay.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() && c != '\n' {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_spelled_out() {
        assert_eq!(printable("größe 'a'\\\n"), "größe 'a'\\\n");
        assert_eq!(printable("\x1b[31m\u{9b}2J\r\0"), "\\u{1b}[31m\\u{9b}2J\\r\\u{0}");
    }
}
