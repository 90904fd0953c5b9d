//! Model files on disk, memory-mapped: GGUF (single and split) and Hugging
//! Face folders of safetensors. Every number in them is checked here, before
//! anything else sees it.
//!
//! What is refused although some reader takes it: GGUF data with gaps, in
//! another order than the headers say, or in big-endian order; a key, tensor
//! name or JSON field that is there twice; arrays of arrays; bools other than
//! 0 and 1; text that is not UTF-8; tensors without elements; shards with
//! different values for one key. What is let through: bytes after the last
//! tensor of a GGUF file (a note), missing padding at its end, symbolic links
//! to regular files (Hugging Face's cache is made of them).
//!
//! | limit | value |
//! |---|---|
//! | GGUF tensors, keys | 65,536 each in a file |
//! | GGUF key, string, tensor name | 64 KiB, 16 MiB, 256 bytes |
//! | GGUF keys and values in memory | 256 MiB |
//! | GGUF dimensions, alignment | 4, a power of two from 8 to 65,536 |
//! | safetensors header, tensors, name, dimensions | 100 MB, 1,048,576 in a file, 1 KiB, 8 |
//! | `config.json`, index | 1 MiB, 64 MiB |
//! | JSON depth | 64 |
//! | files of a model | 4096 |

mod cursor;
mod folder;
pub mod gguf;
#[cfg(unix)]
mod held;
mod json;
mod mapping;
mod metadata;
pub mod safetensors;
mod split;
mod table;
mod values;

pub use mapping::Identity;
pub use metadata::{Array, Metadata, Value};
pub use table::TensorTable;

use crate::error::{Error, Result};
use mapping::Mapping;
use pregate_kernels::Format;
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// The element type of a tensor: a format that we compute with, or raw bytes
/// that only a loader interprets (the MXFP4 blocks and scales of Hugging Face
/// folders).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    Format(Format),
    U8,
}

/// A tensor of a model file; its bytes are known to lie inside the file.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    pub name: String,
    pub element: ElementType,
    /// Outermost dimension first, whatever the file's own order is.
    pub shape: Vec<usize>,
    /// Which of [`ModelFiles::paths`].
    pub file: usize,
    /// Absolute, in bytes. A multiple of the element size in most files, but
    /// not by any rule.
    pub offset: u64,
    pub bytes: usize,
}

/// What describes the model beside its tensors.
#[derive(Debug)]
pub enum Container {
    Gguf(Metadata),
    /// `config.json` of a Hugging Face folder.
    HuggingFace {
        folder: PathBuf,
        config: serde_json::Map<String, serde_json::Value>,
    },
}

/// An opened model: mapped files, tensors and description.
///
/// The files must not change while this exists: changed bytes would be read
/// as weights, and a truncated file ends the process (see
/// [`ModelFiles::unchanged`]).
pub struct ModelFiles {
    container: Container,
    files: Vec<Mapping>,
    paths: Vec<PathBuf>,
    /// Per file, where the tensor data starts.
    data_offsets: Vec<u64>,
    tensors: TensorTable,
    notes: Vec<String>,
    /// Of a model that is streamed.
    #[cfg(unix)]
    held: Option<held::Held>,
    /// The fingerprint of what describes the model outside `files`.
    description: Fnv,
}

impl ModelFiles {
    /// Opens a `.gguf` file (for split files: any shard), a folder with
    /// `config.json` and `*.safetensors`, or a folder with one GGUF model.
    pub fn open(path: &Path) -> Result<Self> {
        if mapping::stat(path)?.is_dir() {
            return match folder::look(path)? {
                folder::Content::Gguf(file) => Self::open_gguf(&file),
                folder::Content::HuggingFace(content) => Self::open_hugging_face(path, content),
            };
        }
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            return Err(Error::invalid(
                path,
                None,
                "model",
                "a safetensors file, which does not say how to compute with its tensors",
                "its folder (with config.json), or a .gguf file",
            ));
        }
        Self::open_gguf(path)
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let mut opened = Opening::default();
        let first = opened.add_gguf(path)?;
        let count = split::count(&first)?;
        if count == 1 {
            return Ok(opened.finish(Container::Gguf(first), Fnv::new()));
        }
        let mut opened = Opening::default();
        let mut first: Option<Metadata> = None;
        for (index, path) in split::paths(path, count)?.iter().enumerate() {
            let metadata = opened.add_gguf(path)?;
            split::check(&metadata, index, count, first.as_ref().unwrap_or(&metadata))?;
            first.get_or_insert(metadata);
        }
        let first = first.unwrap_or_else(|| Metadata::new(path));
        split::check_tensor_count(&first, opened.tensors.all().len())?;
        Ok(opened.finish(Container::Gguf(first), Fnv::new()))
    }

    fn open_hugging_face(folder: &Path, content: folder::HuggingFace) -> Result<Self> {
        let mut opened = Opening::default();
        for path in &content.files {
            opened.add_safetensors(path)?;
        }
        if let Some(index) = &content.index {
            let unlisted = index.check(&content.files, &opened.tensors)?;
            if unlisted > 0 {
                opened.notes.push(format!(
                    "{}: the index does not list {unlisted} of the tensors",
                    folder.display()
                ));
            }
        }
        let mut description = Fnv::new();
        description.write(&content.config_bytes);
        let container =
            Container::HuggingFace { folder: folder.to_path_buf(), config: content.config };
        Ok(opened.finish(container, description))
    }

    /// Reads all files into memory, in large pages where the system has them
    /// (see [`Mapping::make_resident`]). `progress` is told the bytes that
    /// are there and all bytes.
    pub fn make_resident(&mut self, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let total = self.total_bytes();
        let mut before = 0;
        for file in &mut self.files {
            file.make_resident(&mut |bytes| progress(before + bytes, total))?;
            before += file.identity().len;
        }
        Ok(())
    }

    pub fn container(&self) -> &Container {
        &self.container
    }

    /// The mapped files.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        self.tensors.all()
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Index of a tensor into [`ModelFiles::tensors`].
    pub fn tensor_index(&self, name: &str) -> Option<usize> {
        self.tensors.index(name)
    }

    /// The mapped bytes of one of [`ModelFiles::tensors`]; nothing for a
    /// tensor of another model whose range is not in these files.
    pub fn bytes(&self, tensor: &TensorInfo) -> &[u8] {
        let range = usize::try_from(tensor.offset)
            .ok()
            .and_then(|begin| Some(begin..begin.checked_add(tensor.bytes)?));
        range.and_then(|range| self.files.get(tensor.file)?.bytes().get(range)).unwrap_or_default()
    }

    /// Reads the tensors `which` into memory of our own; from then on nothing
    /// but [`ModelFiles::bytes`] of other tensors touches the mapping.
    #[cfg(unix)]
    pub(crate) fn hold(
        &mut self,
        which: &[usize],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        self.held = Some(held::Held::read(&self.files, &self.tensors, which, progress)?);
        Ok(())
    }

    /// Bytes of memory that [`ModelFiles::hold`] takes for `which`.
    #[cfg(unix)]
    pub(crate) fn size_to_hold(&self, which: &[usize]) -> u64 {
        held::size(&self.tensors, which) as u64
    }

    /// Bytes of memory that [`ModelFiles::hold`] took.
    pub fn held_bytes(&self) -> usize {
        #[cfg(unix)]
        return self.held.as_ref().map_or(0, held::Held::len);
        #[cfg(not(unix))]
        0
    }

    /// The bytes of tensor `index`: held ones if there are, else mapped ones.
    pub(crate) fn weight_bytes(&self, index: usize) -> &[u8] {
        let tensor = &self.tensors()[index];
        #[cfg(unix)]
        if let Some(bytes) = self.held.as_ref().and_then(|held| held.bytes(index, tensor.bytes)) {
            return bytes;
        }
        self.bytes(tensor)
    }

    /// A part of tensor `index`, without touching the mapping of a model that
    /// is streamed: borrowed where it is in memory, else read into `scratch`.
    pub(crate) fn weight_part<'a>(
        &'a self,
        index: usize,
        start: usize,
        len: usize,
        scratch: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        #[cfg(unix)]
        if let Some(held) = &self.held {
            let tensor = &self.tensors()[index];
            if held.bytes(index, tensor.bytes).is_none() {
                scratch.resize(len, 0);
                let offset = tensor.offset + start as u64;
                held.read_file(tensor.file, &self.paths[tensor.file], scratch, offset)?;
                return Ok(scratch);
            }
        }
        let _ = scratch;
        Ok(&self.weight_bytes(index)[start..start + len])
    }

    /// Size of all files, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.identity().len).sum()
    }

    /// What a user may want to know about the files and need not act on.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Size, time and inode of each of [`ModelFiles::paths`] when it was
    /// opened.
    pub fn identities(&self) -> Vec<Identity> {
        self.files.iter().map(Mapping::identity).collect()
    }

    /// An error if a file was replaced, resized or written to since it was
    /// opened, as far as size, time and inode tell.
    pub fn unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(Mapping::unchanged)
    }

    /// A hash of sizes and headers (names, shapes, offsets and description,
    /// not weights): the same for the same files on any machine, whatever
    /// their paths. FNV-1a with 64 bits, so it tells models apart and proves
    /// nothing. Reads all headers (10 MB where the vocabulary is large).
    pub fn fingerprint(&self) -> u64 {
        let mut hash = self.description;
        for (file, &data_offset) in self.files.iter().zip(&self.data_offsets) {
            hash.write(&file.identity().len.to_le_bytes());
            let header = usize::try_from(data_offset).ok().and_then(|end| file.bytes().get(..end));
            hash.write(header.unwrap_or_default());
        }
        hash.0
    }
}

impl fmt::Debug for ModelFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelFiles")
            .field("paths", &self.paths)
            .field("tensors", &self.tensors().len())
            .field("notes", &self.notes)
            .finish_non_exhaustive()
    }
}

/// Files that have been opened so far.
#[derive(Default)]
struct Opening {
    files: Vec<Mapping>,
    data_offsets: Vec<u64>,
    tensors: TensorTable,
    notes: Vec<String>,
}

impl Opening {
    fn add_gguf(&mut self, path: &Path) -> Result<Metadata> {
        let file = Mapping::open(path)?;
        let header = gguf::parse(path, self.files.len(), file.bytes(), &mut self.tensors)?;
        self.files.push(file);
        self.data_offsets.push(header.data_offset);
        self.notes.extend(header.notes);
        Ok(header.metadata)
    }

    fn add_safetensors(&mut self, path: &Path) -> Result<()> {
        let file = Mapping::open(path)?;
        let header = safetensors::parse(path, self.files.len(), file.bytes(), &mut self.tensors)?;
        self.files.push(file);
        self.data_offsets.push(header.data_offset);
        Ok(())
    }

    fn finish(self, container: Container, description: Fnv) -> ModelFiles {
        let Self { files, data_offsets, tensors, notes } = self;
        let paths = files.iter().map(|file| file.path().to_path_buf()).collect();
        ModelFiles {
            container,
            files,
            paths,
            data_offsets,
            tensors,
            notes,
            #[cfg(unix)]
            held: None,
            description,
        }
    }
}

/// FNV-1a, 64 bits (Fowler, Noll, Vo).
#[derive(Clone, Copy)]
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
