//! One door for every file that is a trace.

use crate::{Source, TraceError, format, import::rtrace};
use std::fs::File;
use std::io::Read;
use std::path::Path;

const NEITHER: &str = "not a trace: neither a file of pregate nor a manifest of rtrace-1; \
     pregate trace import reads others";

/// Opens a trace by what it begins with: a file of ours, or an rtrace-1
/// manifest (`.json`).
///
/// # Errors
/// A file that cannot be read or is none of these.
pub fn open(path: &Path) -> Result<Box<dyn Source>, TraceError> {
    let mut start = Vec::new();
    let file = File::open(path).map_err(|source| TraceError::io(path, source))?;
    file.take(64).read_to_end(&mut start).map_err(|source| TraceError::io(path, source))?;
    if start.starts_with(&format::MAGIC) {
        return Ok(Box::new(format::Reader::open(path)?));
    }
    match start.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'{') => Ok(Box::new(rtrace::open(path)?)),
        _ => Err(TraceError::format(path, 0, NEITHER)),
    }
}
