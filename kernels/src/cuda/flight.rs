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

/// Why a chunk has no mark.
#[derive(Debug)]
pub(super) enum Start {
    /// Nothing was started.
    Refused(CudaError),
    /// The copy runs, but its end could not be marked.
    Unmarked(CudaError),
    /// The copy runs unmarked, and what was to be published was not.
    Unpublished(CudaError),
}

/// A device's copies, in the order in which they are started.
pub(super) struct Copies {
    stream: Stream,
}

impl Copies {
    pub fn new(stream: &Stream) -> Self {
        Self { stream: stream.clone() }
    }

    /// Starts copying bytes `from` of `memory` to `to`, of the same length,
    /// after the work that `after` marks; then the word `publish` gets its
    /// value. The caller keeps all until the event has completed.
    pub fn start(
        &self,
        memory: &impl HostMemory,
        from: Range<usize>,
        to: &Span,
        after: Option<&Event>,
        publish: Option<&(Span, u32)>,
    ) -> Result<Event, Start> {
        let bytes = memory.bytes().get(from).ok_or_else(|| {
            Start::Refused(CudaError::shape("link", "a part is outside its memory"))
        })?;
        self.stream.check_spans("link", to, bytes.len()).map_err(Start::Refused)?;
        if let Some((word, _)) = publish {
            self.stream.check_spans("link", word, 4).map_err(Start::Refused)?;
        }
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
        if let Some((word, value)) = publish {
            driver.set_word(word.address(), *value, handle).map_err(Start::Unpublished)?;
        }
        self.stream.record_into(&mark).map_err(Start::Unmarked)?;
        Ok(mark)
    }

    /// Waits for everything that was started.
    pub fn finish_all(&self) -> Result<(), CudaError> {
        self.stream.synchronize()
    }

    /// The device hangs: no more calls are made. The error says so.
    pub fn give_up(&self, after: Duration) -> CudaError {
        self.stream.driver().give_up("a copy", after)
    }

    /// Whether the device was given up.
    pub fn hangs(&self) -> bool {
        matches!(self.stream.driver().healthy(), Err(CudaError::Hung { .. }))
    }
}
