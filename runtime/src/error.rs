//! The one error type of this crate.

use crate::budget::TooSmall;
use crate::store::mover::MoveError;
use std::{fmt, path::PathBuf};
use thiserror::Error;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, Error)]
pub enum Error {
    /// The operating system refused.
    #[error("{}: {action}: {source}", file.display())]
    Io { file: PathBuf, action: &'static str, source: std::io::Error },

    /// A file says something that it must not say.
    #[error(transparent)]
    Invalid(#[from] Box<Invalid>),

    /// A file is well-formed and asks for something that we do not have.
    #[error("{}: {what} {found} is not supported; supported: {supported}", file.display())]
    Unsupported { file: PathBuf, what: &'static str, found: String, supported: String },

    /// A chat template could not be compiled or rendered.
    #[error("chat template: {0}")]
    Template(String),

    /// An expert could not be read.
    #[error(transparent)]
    Move(MoveError),

    /// Text could not be turned into tokens or back.
    #[error("tokenizer: {0}")]
    Tokenizer(String),

    /// The request cannot be served as asked.
    #[error("{0}")]
    Request(String),

    /// Memory that was asked for cannot be had.
    #[error("{bytes} bytes of memory for {what}: {source}; give a smaller --ram")]
    Memory { what: &'static str, bytes: usize, source: std::io::Error },

    /// More tokens than the context holds.
    #[error(
        "context full: {needed} tokens needed, {limit} fit; shorten the prompt or raise --context"
    )]
    ContextFull { needed: usize, limit: usize },

    /// The model needs more memory than the budget.
    #[error(transparent)]
    Budget(#[from] Box<TooSmall>),

    /// The computation produced NaN or infinite logits.
    #[error("the model computed {found} logits at position {position}: its weights are damaged")]
    NotFinite { position: usize, found: &'static str },

    /// The GPU failed, or cannot do what it was asked for.
    #[error(transparent)]
    Cuda(#[from] pregate_kernels::cuda::CudaError),

    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// What is wrong where: file, offset, field, found, allowed.
#[derive(Debug)]
pub struct Invalid {
    pub file: PathBuf,
    /// Byte offset in the file, where one is known.
    pub offset: Option<u64>,
    pub field: String,
    pub found: String,
    pub allowed: String,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(offset) = self.offset {
            write!(f, " at byte {offset}")?;
        }
        write!(f, ": {}: found {}; allowed: {}", self.field, self.found, self.allowed)
    }
}

impl std::error::Error for Invalid {}

impl From<MoveError> for Error {
    fn from(error: MoveError) -> Self {
        match error {
            MoveError::Cuda(error) => Self::Cuda(error),
            error => Self::Move(error),
        }
    }
}

impl Error {
    /// An [`Invalid`] value; long `found` texts are cut so that a message
    /// never repeats a file's content.
    pub fn invalid(
        file: impl Into<PathBuf>,
        offset: Option<u64>,
        field: impl Into<String>,
        found: impl Into<String>,
        allowed: impl Into<String>,
    ) -> Self {
        Error::Invalid(Box::new(Invalid {
            file: file.into(),
            offset,
            field: printable(field.into()),
            found: printable(found.into()),
            allowed: allowed.into(),
        }))
    }
}

const LONGEST_QUOTE_CHARS: usize = 120;

/// Text from a file, safe to print: control characters escaped, cut short.
pub(crate) fn printable(text: String) -> String {
    let mut safe = String::with_capacity(text.len().min(4 * LONGEST_QUOTE_CHARS));
    for (count, c) in text.chars().enumerate() {
        if count == LONGEST_QUOTE_CHARS {
            safe.push('…');
            break;
        }
        if c.is_control() {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_everything_and_stay_short() {
        let error =
            Error::invalid("model.gguf", Some(24), "key\n", "x".repeat(5000), "at most 64 KiB");
        let text = error.to_string();
        assert!(text.starts_with("model.gguf at byte 24: key\\n: found xxx"), "{text}");
        assert!(text.ends_with("allowed: at most 64 KiB"), "{text}");
        assert!(text.len() < 400);
    }
}
