//! How the program ends: one message, one code.

use crate::tui;
use pregate_kernels::cuda::CudaError;
use pregate_runtime::Error;
use pregate_traces::TraceError;
use std::{fmt, io};

pub const USAGE: u8 = 2;
pub const MODEL: u8 = 3;
pub const RESOURCES: u8 = 4;
/// The GPU failed; a supervisor may start the program again (EX_TEMPFAIL).
pub const DEVICE_FAILED: u8 = 75;
pub const INTERRUPTED: u8 = 130;
const OTHER: u8 = 1;

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub enum Failure {
    /// The request makes no sense.
    Usage(String),
    /// The machine lacks memory or a device.
    Resources(String),
    /// A file that is not what it should be.
    File(String),
    /// The engine refused.
    Runtime(Error),
    /// A file or stream of the user's.
    Io {
        what: String,
        source: io::Error,
    },
    /// Nobody reads standard output any more: a quiet end.
    OutputClosed,
    Interrupted,
    /// Something that should not happen.
    Internal(String),
}

impl Failure {
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        Failure::Io { what: what.into(), source }
    }

    /// A failed write to standard output.
    pub fn output(source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::BrokenPipe => Failure::OutputClosed,
            _ => Failure::io("standard output", source),
        }
    }

    pub fn code(&self) -> u8 {
        match self {
            Failure::OutputClosed => 0,
            Failure::Usage(_) => USAGE,
            Failure::File(_) => MODEL,
            Failure::Resources(_) => RESOURCES,
            Failure::Interrupted | Failure::Runtime(Error::Cancelled) => INTERRUPTED,
            Failure::Runtime(Error::Request(_) | Error::ContextFull { .. }) => USAGE,
            Failure::Runtime(Error::Cuda(error)) if error.is_sticky() => DEVICE_FAILED,
            Failure::Runtime(Error::Cuda(CudaError::Late { .. })) => DEVICE_FAILED,
            Failure::Runtime(Error::Memory { .. } | Error::Budget(_) | Error::Cuda(_)) => RESOURCES,
            Failure::Runtime(Error::Io { source, .. }) if out_of_memory(source) => RESOURCES,
            Failure::Runtime(_) => MODEL,
            Failure::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => USAGE,
            Failure::Io { .. } | Failure::Internal(_) => OTHER,
        }
    }

    /// False where the end is quiet.
    pub fn has_message(&self) -> bool {
        !matches!(
            self,
            Failure::OutputClosed | Failure::Interrupted | Failure::Runtime(Error::Cancelled)
        )
    }
}

fn out_of_memory(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::OutOfMemory
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage(text) | Failure::Resources(text) | Failure::File(text) => told(f, text),
            Failure::Runtime(error) => told(f, &error.to_string()),
            Failure::Io { what, source } => told(f, &format!("{what}: {source}")),
            Failure::OutputClosed => f.write_str("standard output was closed"),
            Failure::Interrupted => f.write_str("interrupted"),
            Failure::Internal(text) => write!(f, "internal error: {text}"),
        }
    }
}

/// Messages quote files, which may hold what would move the cursor.
fn told(f: &mut fmt::Formatter<'_>, message: &str) -> fmt::Result {
    f.write_str(&tui::clean(message))
}

impl From<TraceError> for Failure {
    fn from(error: TraceError) -> Self {
        match error {
            TraceError::Io { path, source } => Failure::io(path.display().to_string(), source),
            TraceError::Format { .. } => Failure::File(error.to_string()),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Runtime(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_follow_the_documented_table() {
        let invalid = Error::invalid("m.gguf", None, "magic", "x", "GGUF");
        assert_eq!(Failure::from(invalid).code(), MODEL);
        assert_eq!(Failure::from(Error::Cancelled).code(), INTERRUPTED);
        assert_eq!(Failure::from(Error::ContextFull { needed: 2, limit: 1 }).code(), USAGE);
        let no_memory = Error::Io {
            file: "m.gguf".into(),
            action: "map",
            source: io::ErrorKind::OutOfMemory.into(),
        };
        assert_eq!(Failure::from(no_memory).code(), RESOURCES);
        assert_eq!(Failure::output(io::ErrorKind::BrokenPipe.into()).code(), 0);
        assert!(!Failure::output(io::ErrorKind::BrokenPipe.into()).has_message());
    }

    #[test]
    fn messages_move_no_cursor() {
        let hostile = "m.toml: unknown field `\x1b[2J`\nadd --model";
        let wanted = "m.toml: unknown field `\u{fffd}[2J`\nadd --model";
        for failure in [Failure::Usage(hostile.into()), Failure::File(hostile.into())] {
            assert_eq!(failure.to_string(), wanted);
        }
        let named = Failure::io("a\x1bb", io::ErrorKind::NotFound.into()).to_string();
        assert!(named.starts_with("a\u{fffd}b: "), "{named}");
    }
}
