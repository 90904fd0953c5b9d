//! What a link asks of the device: to start a chunk, and to say when it has
//! ended.
//!
//! Guarantee that the `unsafe` block relies on: the link's state
//! (`link_state.rs`) owns a transfer's memory and span from before its first
//! chunk is started until every chunk has ended, and leaks them where that
//! cannot be learnt.

use super::error::CudaError;
use super::memory::{HostMemory, Span};
use super::stream::{Event, Stream};
use std::ops::Range;
use std::time::Duration;

/// A device's copies, in the order in which they are started.
pub(super) trait Copies: Send + Sync + 'static {
    /// A chunk's end.
    type Mark: Clone + Send;

    /// Starts copying bytes `from` of `memory` to `to`, of the same length.
    /// The caller keeps both until the mark has ended.
    fn start(
        &self,
        memory: &impl HostMemory,
        from: Range<usize>,
        to: &Span,
        after: Option<&Event>,
    ) -> Result<Self::Mark, Start>;

    /// Waits for a chunk, and so for those before it.
    fn finish(&self, mark: &Self::Mark) -> Result<(), CudaError>;

    fn is_complete(&self, mark: &Self::Mark) -> Result<bool, CudaError>;

    /// Waits for everything that was started.
    fn finish_all(&self) -> Result<(), CudaError>;

    /// The device hangs: no more calls are made. The error says so.
    fn give_up(&self, after: Duration) -> CudaError;

    /// Whether no more calls are made.
    fn failed_for_good(&self) -> bool;
}

/// Why a chunk has no mark.
#[derive(Debug)]
pub(super) enum Start {
    /// Nothing was started.
    Refused(CudaError),
    /// The copy runs, but its end could not be marked.
    Unmarked(CudaError),
}

/// Copies on a stream.
pub(super) struct DeviceCopies {
    stream: Stream,
}

impl DeviceCopies {
    pub fn new(stream: &Stream) -> Self {
        Self { stream: stream.clone() }
    }
}

impl Copies for DeviceCopies {
    type Mark = Event;

    fn start(
        &self,
        memory: &impl HostMemory,
        from: Range<usize>,
        to: &Span,
        after: Option<&Event>,
    ) -> Result<Event, Start> {
        let bytes = memory.bytes().get(from).ok_or_else(|| {
            Start::Refused(CudaError::shape("link", "a part is outside its memory"))
        })?;
        self.stream.check_spans("link", to, bytes.len()).map_err(Start::Refused)?;
        if let Some(event) = after {
            self.stream.wait(event).map_err(Start::Refused)?;
        }
        let mark = self.stream.spare_event().map_err(Start::Refused)?;
        let handle = self.stream.handle().map_err(Start::Refused)?;
        let driver = self.stream.driver();
        // SAFETY: see the head of this file; the memory does not move with
        // its owner and is not written (`HostMemory`).
        unsafe { driver.copy_in(to.address(), bytes.as_ptr(), bytes.len(), handle) }
            .map_err(Start::Refused)?;
        self.stream.record_into(&mark).map_err(Start::Unmarked)?;
        Ok(mark)
    }

    fn finish(&self, mark: &Event) -> Result<(), CudaError> {
        mark.synchronize()
    }

    fn is_complete(&self, mark: &Event) -> Result<bool, CudaError> {
        mark.is_complete()
    }

    fn finish_all(&self) -> Result<(), CudaError> {
        self.stream.synchronize()
    }

    fn give_up(&self, after: Duration) -> CudaError {
        let seconds = after.as_secs();
        self.stream.driver().keep(CudaError::Hung { at: "a copy", seconds })
    }

    fn failed_for_good(&self) -> bool {
        self.stream.driver().healthy().is_err()
    }
}
