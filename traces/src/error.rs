//! What can be wrong with a trace.

use std::path::{Path, PathBuf};

/// Names the file, the place, what was found and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// `offset` counts bytes, or lines in a text file.
    #[error("{}: at {offset}: {what}", path.display())]
    Format { path: PathBuf, offset: u64, what: String },
}

impl TraceError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn format(path: &Path, offset: u64, what: impl Into<String>) -> Self {
        Self::Format { path: path.to_path_buf(), offset, what: what.into() }
    }
}
