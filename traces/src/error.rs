//! What can be wrong with a trace.

use std::fmt;
use std::path::{Path, PathBuf};

/// Names the file, the place, what was found and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: {place}{what}", path.display())]
    Format { path: PathBuf, place: Place, what: String },
}

/// Where in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere in particular.
    Whole,
    /// So many bytes from its start.
    Byte(u64),
    /// Of a text; the first is 1.
    Line(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => Ok(()),
            Self::Byte(offset) => write!(f, "byte {offset}: "),
            Self::Line(number) => write!(f, "line {number}: "),
        }
    }
}

impl TraceError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn whole(path: &Path, what: impl Into<String>) -> Self {
        Self::at(path, Place::Whole, what)
    }

    pub(crate) fn byte(path: &Path, offset: u64, what: impl Into<String>) -> Self {
        Self::at(path, Place::Byte(offset), what)
    }

    pub(crate) fn line(path: &Path, number: u64, what: impl Into<String>) -> Self {
        Self::at(path, Place::Line(number), what)
    }

    fn at(path: &Path, place: Place, what: impl Into<String>) -> Self {
        Self::Format { path: path.to_path_buf(), place, what: what.into() }
    }
}
