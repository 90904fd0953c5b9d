//! One door for every file that is a trace.

use crate::{Source, TraceError, import::rtrace};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Opens a trace by what it begins with: an rtrace-1 manifest (`.json`).
///
/// # Errors
/// A file that cannot be read or is none of these.
pub fn open(path: &Path) -> Result<Box<dyn Source>, TraceError> {
    let mut start = Vec::new();
    let file = File::open(path).map_err(|source| TraceError::io(path, source))?;
    file.take(64).read_to_end(&mut start).map_err(|source| TraceError::io(path, source))?;
    match start.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'{') => Ok(Box::new(rtrace::open(path)?)),
        _ => Err(TraceError::format(path, 0, "not a trace: found no manifest of rtrace-1")),
    }
}
