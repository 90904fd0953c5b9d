//! Tensors read into memory of our own, for models that do not fit: what is
//! used in every token must not compete with experts for the page cache, and
//! a file that changes underneath must be an error, not a signal. Nothing is
//! read through the mapping then.

use super::mapping::{Mapping, changed};
use super::table::TensorTable;
use crate::error::{Error, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of one read, between calls of the progress function.
const READ_BYTES: usize = 8 << 20;
/// Tensors start at cache lines.
const ALIGN: usize = 64;

pub(super) struct Held {
    /// Anonymous, in pages of 2 MiB where the system has them.
    memory: memmap2::MmapMut,
    /// Per tensor: its first byte in `memory`.
    starts: Vec<Option<usize>>,
    /// Per file, for reads of parts of tensors that are not held.
    readers: Vec<File>,
}

/// Bytes of memory that `which` will take.
pub(super) fn size(tensors: &TensorTable, which: &[usize]) -> usize {
    which.iter().map(|&index| tensors.all()[index].bytes.next_multiple_of(ALIGN)).sum()
}

impl Held {
    /// Reads the tensors `which` (indices into `tensors`). `progress` is told
    /// the bytes done and all bytes.
    pub fn read(
        files: &[Mapping],
        tensors: &TensorTable,
        which: &[usize],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let readers = files.iter().map(Mapping::reopen).collect::<Result<Vec<_>>>()?;
        let mut starts = vec![None; tensors.all().len()];
        let mut total = 0usize;
        for &index in which {
            starts[index] = Some(total);
            total += tensors.all()[index].bytes.next_multiple_of(ALIGN);
        }
        let first = files.first().map_or(Path::new(""), Mapping::path);
        let mut memory = memmap2::MmapMut::map_anon(total.max(1)).map_err(|source| Error::Io {
            file: first.to_path_buf(),
            action: "take memory for the weights that are used in every token",
            source,
        })?;
        // Refused where the kernel has no huge pages: small ones serve.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        let mut done = 0;
        for &index in which {
            let tensor = &tensors.all()[index];
            let start = starts[index].unwrap_or(0);
            let path = files[tensor.file].path();
            let parts = memory[start..start + tensor.bytes].chunks_mut(READ_BYTES);
            for (part, offset) in parts.zip((tensor.offset..).step_by(READ_BYTES)) {
                read_exact_at(&readers[tensor.file], path, part, offset)?;
                done += part.len() as u64;
                progress(done, total as u64);
            }
        }
        files.iter().try_for_each(Mapping::unchanged)?;
        Ok(Self { memory, starts, readers })
    }

    /// The bytes of a tensor, if it is held.
    pub fn bytes(&self, index: usize, len: usize) -> Option<&[u8]> {
        let start = self.starts.get(index).copied()??;
        self.memory.get(start..start + len)
    }

    /// Reads from `offset` of a file.
    pub fn read_file(&self, file: usize, path: &Path, into: &mut [u8], offset: u64) -> Result<()> {
        read_exact_at(&self.readers[file], path, into, offset)
    }

    /// Bytes of memory taken.
    pub fn len(&self) -> usize {
        self.memory.len()
    }
}

fn read_exact_at(file: &File, path: &Path, into: &mut [u8], offset: u64) -> Result<()> {
    file.read_exact_at(into, offset).map_err(|source| match source.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            changed(path, &format!("fewer than {} bytes", offset + into.len() as u64))
        }
        _ => Error::Io { file: path.to_path_buf(), action: "read", source },
    })
}
