//! Files that appear whole or not at all: written beside their place, then
//! renamed.

use crate::TraceError;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// A file that replaces an older one when it is committed. Dropped before,
/// nothing of it is left and the older one is as it was. A link stays, and what
/// it points to is replaced; what is no file (a pipe, a device) is written to.
pub struct Whole {
    /// As its user calls it.
    path: PathBuf,
    place: PathBuf,
    /// Beside the place; `None` where there is nothing to rename.
    temporary: Option<PathBuf>,
    out: BufWriter<File>,
}

impl Whole {
    /// # Errors
    /// A folder in which no file can be made; a folder of that name.
    pub fn create(path: &Path) -> Result<Self, TraceError> {
        let io = |error| TraceError::io(path, error);
        let place = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        let is_file = place.metadata().map_or(true, |about| about.is_file());
        let temporary = if is_file { beside(&place) } else { None };
        let file = match &temporary {
            Some(temporary) => File::create_new(temporary),
            None => File::create(&place),
        };
        let out = BufWriter::new(file.map_err(io)?);
        Ok(Self { path: path.to_path_buf(), place, temporary, out })
    }

    /// Hands everything to the disk, so that committing only renames.
    ///
    /// # Errors
    /// A disk that does not take it.
    pub fn settle(&mut self) -> Result<(), TraceError> {
        let settled = self.out.flush().and_then(|()| match self.temporary {
            Some(_) => self.out.get_ref().sync_all(),
            None => Ok(()),
        });
        settled.map_err(|error| TraceError::io(&self.path, error))
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// A disk that does not take it.
    pub fn commit(mut self) -> Result<(), TraceError> {
        self.settle()?;
        let Some(temporary) = &self.temporary else { return Ok(()) };
        let renamed = fs::rename(temporary, &self.place);
        renamed.map_err(|error| TraceError::io(&self.path, error))?;
        self.temporary = None;
        Ok(())
    }
}

impl Write for Whole {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // It does no harm where it stays.
            let _ = fs::remove_file(temporary);
        }
    }
}

fn beside(place: &Path) -> Option<PathBuf> {
    let mut name = OsString::from(".");
    name.push(place.file_name()?);
    name.push(format!(".{}.tmp", std::process::id()));
    Some(place.with_file_name(name))
}
