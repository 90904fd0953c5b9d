//! Model files on disk, memory-mapped: GGUF (single and split) and Hugging
//! Face folders of safetensors. Every number in them is checked here, before
//! anything else sees it.

mod metadata;

pub use metadata::{Array, Metadata, Value};

use crate::error::Result;
use pregate_kernels::Format;
use std::path::{Path, PathBuf};

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
    /// Absolute, in bytes.
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
pub struct ModelFiles {
    container: Container,
}

impl ModelFiles {
    /// Opens a `.gguf` file (for split files: any shard), or a folder with
    /// `config.json` and `*.safetensors`.
    pub fn open(_path: &Path) -> Result<Self> {
        unimplemented!()
    }

    pub fn container(&self) -> &Container {
        &self.container
    }

    /// The mapped files.
    pub fn paths(&self) -> &[PathBuf] {
        unimplemented!()
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        unimplemented!()
    }

    pub fn tensor(&self, _name: &str) -> Option<&TensorInfo> {
        unimplemented!()
    }

    /// The mapped bytes of a tensor.
    pub fn bytes(&self, _tensor: &TensorInfo) -> &[u8] {
        unimplemented!()
    }
}
