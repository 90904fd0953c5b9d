//! What can be wrong with a trace.

use std::path::PathBuf;

/// Names the file, the place, what was found and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// `offset` counts bytes, or lines in a text file.
    #[error("{}: at {offset}: {what}", path.display())]
    Format { path: PathBuf, offset: u64, what: String },
}
