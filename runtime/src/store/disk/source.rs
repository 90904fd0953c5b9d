//! The model's files as the disk tier reads them: opened once, by position,
//! and watched for changes.

use super::super::mover::{MoveError, Notice};
use crate::{
    error::{Error, Result},
    files::Identity,
};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

/// A file that can be read by position; the seam for tests with a bad disk.
pub(super) trait ReadAt: Send + Sync {
    /// Up to `bytes.len()` bytes from `offset`; 0 at the end.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize>;
    fn identity(&self) -> io::Result<Identity>;
    /// The file itself, for io_uring.
    fn file(&self) -> Option<&File> {
        None
    }
}

impl ReadAt for File {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        #[cfg(unix)]
        return std::os::unix::fs::FileExt::read_at(self, bytes, offset);
        #[cfg(windows)]
        return std::os::windows::fs::FileExt::seek_read(self, bytes, offset);
    }

    fn identity(&self) -> io::Result<Identity> {
        Ok(Identity::of(&self.metadata()?))
    }

    fn file(&self) -> Option<&File> {
        Some(self)
    }
}

/// Opens for reading around the page cache.
pub(super) fn open_direct(path: &Path) -> io::Result<File> {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::fs::OpenOptionsExt;
        let flags = rustix::fs::OFlags::DIRECT.bits();
        fs::OpenOptions::new().read(true).custom_flags(flags.cast_signed()).open(path)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = path;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Opens for reading through the page cache, without reading ahead: the
/// next expert is seldom the next in the file.
pub(super) fn open_buffered(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    // Advice; whoever does not take it only reads slower.
    #[cfg(target_os = "linux")]
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random);
    Ok(file)
}

pub(super) struct Source {
    pub path: PathBuf,
    pub reader: Box<dyn ReadAt>,
    /// What was opened when the model was.
    expected: Identity,
    /// Set once it is found to have changed; nothing is read after that.
    changed: OnceLock<MoveError>,
    is_replaced: AtomicBool,
}

/// All files of a model, in its order.
pub(super) struct Sources {
    files: Vec<Source>,
    /// When the names were last looked up, on the mover's clock.
    looked_ns: AtomicU64,
}

/// How often names are looked up at most.
const LOOK_NS: u64 = 50_000_000;

impl Sources {
    /// Files that were opened as `expected`. An error if one is another by
    /// now.
    pub fn new(
        files: impl IntoIterator<Item = (PathBuf, Identity, Box<dyn ReadAt>)>,
    ) -> Result<Self> {
        let source = |(path, expected, reader)| Source {
            path,
            reader,
            expected,
            changed: OnceLock::new(),
            is_replaced: AtomicBool::new(false),
        };
        let files: Vec<Source> = files.into_iter().map(source).collect();
        for (index, source) in files.iter().enumerate() {
            let io =
                |from| Error::Io { file: source.path.clone(), action: "look up", source: from };
            let found = source.reader.identity().map_err(io)?;
            if found != source.expected {
                let found = source.difference(&found);
                return Err(Error::invalid(
                    &source.path,
                    None,
                    "model file",
                    format!("{found} (file {index} of the model)"),
                    "the file whose description was read a moment ago; open the model again",
                ));
            }
        }
        Ok(Self { files, looked_ns: AtomicU64::new(0) })
    }

    pub fn all(&self) -> &[Source] {
        &self.files
    }

    /// An error if the file was written to or resized since it was opened;
    /// once it was, for ever. The system sets the time of modification before
    /// it changes a byte, so bytes that were read before an `Ok` are the
    /// file's of old (except changes through a shared mapping, whose time is
    /// set when a page is first written).
    pub fn check(&self, file: usize) -> Result<(), MoveError> {
        let source = &self.files[file];
        if let Some(error) = source.changed.get() {
            return Err(error.clone());
        }
        match source.reader.identity() {
            Ok(found) if found == source.expected => Ok(()),
            Ok(found) => Err(self.changed(file, source.difference(&found))),
            Err(from) => Err(MoveError::Io {
                file: source.path.clone(),
                offset: 0,
                source: std::sync::Arc::new(from),
            }),
        }
    }

    /// Remembers that `file` has changed, and how.
    pub fn changed(&self, file: usize, found: String) -> MoveError {
        let source = &self.files[file];
        let expected = format!("{} bytes, not written to since", source.expected.len);
        let error = MoveError::Changed { file: source.path.clone(), expected, found };
        source.changed.get_or_init(|| error).clone()
    }

    /// What is known about a change of `file`, without asking the system.
    pub fn known_change(&self, file: usize) -> Option<MoveError> {
        self.files[file].changed.get().cloned()
    }

    /// Looks up the names, if that was not done in the last 50 ms, and gives
    /// out the first file whose name stands for another one, or for none;
    /// each file once.
    pub fn replaced(&self, now_ns: u64) -> Option<Notice> {
        let looked_ns = self.looked_ns.load(Relaxed);
        let is_due = looked_ns == 0 || now_ns.saturating_sub(looked_ns) >= LOOK_NS;
        if is_due && self.looked_ns.swap(now_ns.max(1), Relaxed) == looked_ns {
            // The last look was given out completely only if nothing is found.
            let is_new =
                |source: &&Source| !source.is_replaced.load(Relaxed) && source.is_elsewhere();
            let source = self.files.iter().find(is_new)?;
            source.is_replaced.store(true, Relaxed);
            self.looked_ns.store(0, Relaxed);
            return Some(Notice::Replaced { file: source.path.clone() });
        }
        None
    }
}

impl Source {
    pub fn len(&self) -> u64 {
        self.expected.len
    }

    fn difference(&self, found: &Identity) -> String {
        if found.len != self.expected.len {
            format!("{} bytes instead of {}", found.len, self.expected.len)
        } else if (found.device, found.inode) != (self.expected.device, self.expected.inode) {
            "another file of the same name".into()
        } else {
            "a newer time of modification".into()
        }
    }

    /// Whether the name stands for another file now, or for none.
    fn is_elsewhere(&self) -> bool {
        let is_same = |metadata: fs::Metadata| {
            let found = Identity::of(&metadata);
            (found.device, found.inode) == (self.expected.device, self.expected.inode)
        };
        !fs::metadata(&self.path).is_ok_and(is_same)
    }
}
