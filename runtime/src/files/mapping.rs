//! A file of a model, memory-mapped for reading.

use crate::error::{Error, Result};
use std::{
    fs::{self, File},
    ops::Range,
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
    pub(crate) fn of(metadata: &fs::Metadata) -> Self {
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
        let map = map(&file).map_err(io("map into memory"))?;
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

    /// Reads the whole file into the page cache and maps it, in pages of
    /// 2 MiB where the system can: a sequential reader gets about half as
    /// much again from them as from 4 KiB pages (`docs/measurements.md`).
    /// Cached bytes keep the page size that they came in with, so a file that
    /// is cached in small pages is dropped from the cache and read once more,
    /// if a trial with its first part shows that it helps. `progress` is told
    /// the bytes that are there.
    pub fn make_resident(&mut self, progress: &mut dyn FnMut(u64)) -> Result<()> {
        self.populate(0..self.map.len(), progress)?;
        #[cfg(target_os = "linux")]
        if self.map.len() >= 2 * TRIAL_BYTES && self.huge_share()? < ENOUGH_HUGE {
            self.read_again(0..TRIAL_BYTES, progress)?;
            // The trial's pages alone, out of all.
            let trial_share = TRIAL_BYTES as f64 / self.map.len() as f64;
            if self.huge_share()? >= ENOUGH_HUGE * trial_share {
                self.read_again(0..self.map.len(), progress)?;
            }
        }
        Ok(())
    }

    fn populate(&self, range: Range<usize>, progress: &mut dyn FnMut(u64)) -> Result<()> {
        #[cfg(target_os = "linux")]
        {
            use memmap2::Advice;
            // Refused where the kernel has no huge pages: small ones serve.
            let _ = self.map.advise(Advice::HugePage);
            let mut start = range.start;
            while start < range.end {
                let len = POPULATE_BYTES.min(range.end - start);
                match self.map.advise_range(Advice::PopulateRead, start, len) {
                    Ok(()) => {}
                    // Before Linux 5.14: pages come when they are touched.
                    Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => break,
                    Err(source) => {
                        let file = self.path.clone();
                        return Err(Error::Io { file, action: "read into memory", source });
                    }
                }
                start += len;
                progress(start as u64);
            }
        }
        progress(range.end as u64);
        Ok(())
    }

    /// The same file for positioned reads.
    pub fn reopen(&self) -> Result<File> {
        let io = |action| {
            let file = self.path.clone();
            move |source| Error::Io { file, action, source }
        };
        let file = File::open(&self.path).map_err(io("open"))?;
        if Identity::of(&file.metadata().map_err(io("read the size"))?) != self.identity {
            return Err(changed(&self.path, "another file than a moment ago"));
        }
        Ok(file)
    }

    /// Drops `range` from the page cache and reads it again.
    #[cfg(target_os = "linux")]
    fn read_again(&mut self, range: Range<usize>, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let file = self.reopen()?;
        let path = self.path.clone();
        let io = |source| Error::Io { file: path.clone(), action: "map into memory", source };
        // Mapped pages stay in the cache, so the mapping goes first.
        let nothing = memmap2::MmapMut::map_anon(1).and_then(memmap2::MmapMut::make_read_only);
        self.map = nothing.map_err(&io)?;
        let length = std::num::NonZeroU64::new(range.len() as u64);
        let dropped =
            rustix::fs::fadvise(&file, range.start as u64, length, rustix::fs::Advice::DontNeed);
        self.map = map(&file).map_err(&io)?;
        // Refusal means that the bytes stay as they are.
        match dropped {
            Ok(()) => self.populate(range, progress),
            Err(_) => Ok(()),
        }
    }

    /// The share of the mapping that has 2 MiB pages, as the kernel reports
    /// it; 1 where it reports nothing.
    #[cfg(target_os = "linux")]
    fn huge_share(&self) -> Result<f64> {
        let Ok(report) = fs::read_to_string("/proc/self/smaps") else { return Ok(1.0) };
        let start = format!("{:x}-", self.map.as_ptr() as usize);
        let kilobytes = report
            .lines()
            .skip_while(|line| !line.trim_start_matches('0').starts_with(&start))
            .find_map(|line| line.strip_prefix("FilePmdMapped:"))
            .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
        Ok(kilobytes.map_or(1.0, |kb| kb * 1024.0 / self.map.len() as f64))
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

/// Bytes of one step of reading, between calls of the progress function.
const POPULATE_BYTES: usize = 64 << 20;
/// What is read again to find out whether huge pages can be had.
#[cfg(target_os = "linux")]
const TRIAL_BYTES: usize = 64 << 20;
/// With this share of a mapping in huge pages there is little left to gain.
#[cfg(target_os = "linux")]
const ENOUGH_HUGE: f64 = 0.8;

fn map(file: &File) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the mapping is read-only and private to the value that owns it
    // for as long as any slice of it lives. Nothing in this process writes to
    // the file. Another process that changes the file underneath is the
    // documented hazard of mapped model files: changed bytes would be read as
    // weights (bit patterns without invalid values; the parsed headers are
    // owned copies), and a truncated file ends the process with SIGBUS.
    // `Mapping::unchanged` detects both where a caller wants to know.
    unsafe { memmap2::Mmap::map(file) }
}

pub(super) fn changed(path: &Path, found: &str) -> Error {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn reading_into_memory_keeps_the_bytes() {
        let path = std::env::temp_dir().join(format!("pregate-resident-{}", std::process::id()));
        // Sparse: long enough for the trial, cheap to write.
        let len = 3 * POPULATE_BYTES + 5;
        let file = File::create(&path).unwrap();
        file.set_len(len as u64).unwrap();
        let marks = [0, 12345, POPULATE_BYTES, 2 * POPULATE_BYTES + 77, len - 1];
        for (value, &mark) in (1u8..).zip(&marks) {
            file.write_all_at(&[value], mark as u64).unwrap();
        }
        drop(file);
        let mut mapping = Mapping::open(&path).unwrap();
        let mut told = Vec::new();
        mapping.make_resident(&mut |bytes| told.push(bytes)).unwrap();
        for (value, &mark) in (1u8..).zip(&marks) {
            assert_eq!(mapping.bytes()[mark], value, "at {mark}");
        }
        assert_eq!(mapping.bytes().len(), len);
        assert_eq!(told.last(), Some(&(len as u64)));
        mapping.unchanged().unwrap();
        fs::remove_file(&path).unwrap();
    }
}
