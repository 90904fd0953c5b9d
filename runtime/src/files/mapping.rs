//! A file of a model, memory-mapped for reading.

use crate::error::{Error, Result};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::SystemTime,
};

/// What tells a file from another one of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub len: u64,
    pub modified: Option<SystemTime>,
    /// Device and inode; zero where the platform has none.
    pub device: u64,
    pub inode: u64,
}

impl Identity {
    fn of(metadata: &fs::Metadata) -> Self {
        #[cfg(unix)]
        let (device, inode) = {
            use std::os::unix::fs::MetadataExt;
            (metadata.dev(), metadata.ino())
        };
        #[cfg(not(unix))]
        let (device, inode) = (0, 0);
        Self { len: metadata.len(), modified: metadata.modified().ok(), device, inode }
    }
}

/// The read-only mapping of one regular, non-empty file.
#[derive(Debug)]
pub struct Mapping {
    path: PathBuf,
    map: memmap2::Mmap,
    identity: Identity,
}

impl Mapping {
    /// Maps `path`. Directories, pipes, devices and empty files are refused
    /// before they are opened, because opening a pipe may wait for ever.
    pub fn open(path: &Path) -> Result<Self> {
        regular_file(path, &stat(path)?)?;
        let io = |action| move |source| Error::Io { file: path.to_path_buf(), action, source };
        let file = File::open(path).map_err(io("open"))?;
        let metadata = file.metadata().map_err(io("read the size"))?;
        // Again: the name may have come to mean another file in between.
        regular_file(path, &metadata)?;
        if metadata.len() == 0 {
            return Err(Error::invalid(path, Some(0), "file", "0 bytes", "a model file"));
        }
        // SAFETY: the mapping is read-only and private to this value, which
        // owns it for as long as any slice of it lives. Nothing in this
        // process writes to the file. Another process that changes the file
        // underneath is the documented hazard of mapped model files: changed
        // bytes would be read as weights (bit patterns without invalid
        // values; the parsed headers are owned copies), and a truncated file
        // ends the process with SIGBUS. `Mapping::unchanged` detects both
        // where a caller wants to know.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io("map into memory"))?;
        let identity = Identity::of(&metadata);
        if u64::try_from(map.len()) != Ok(identity.len) {
            return Err(changed(path, "another size than a moment ago"));
        }
        Ok(Self { path: path.to_path_buf(), map, identity })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Size, time and inode at the time of opening.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// An error if the file's name now stands for another file, or if its
    /// size or time of modification differ from those at opening.
    pub fn unchanged(&self) -> Result<()> {
        let now = Identity::of(&stat(&self.path)?);
        if now == self.identity {
            return Ok(());
        }
        let found = if now.len != self.identity.len {
            format!("{} bytes instead of {}", now.len, self.identity.len)
        } else if (now.device, now.inode) != (self.identity.device, self.identity.inode) {
            "another file of the same name".to_string()
        } else {
            "a newer time of modification".to_string()
        };
        Err(changed(&self.path, &found))
    }
}

fn changed(path: &Path, found: &str) -> Error {
    Error::invalid(
        path,
        None,
        "model file",
        found,
        "a file that stays as it was when it was opened; open the model again",
    )
}

pub(super) fn stat(path: &Path) -> Result<fs::Metadata> {
    fs::metadata(path).map_err(|source| Error::Io {
        file: path.to_path_buf(),
        action: "look up",
        source,
    })
}

/// An error unless `metadata` is that of a regular file.
pub(super) fn regular_file(path: &Path, metadata: &fs::Metadata) -> Result<()> {
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok(());
    }
    let found = if kind.is_dir() { "a directory" } else { "a pipe, socket or device" };
    Err(Error::invalid(path, None, "file type", found, "a regular file"))
}
