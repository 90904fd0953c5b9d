//! What a link asks of the device: to start a chunk, and to say when it has
//! ended.
//!
//! Guarantee that the `unsafe` blocks rely on: the link's state
//! (`link_state.rs`) owns a transfer's memory and span from before its first
//! chunk is started until every chunk has ended, and leaks them where that
//! cannot be learnt. [`Words`] live as long as the link, whose end waits for
//! all chunks or leaks them as well.

use super::device::Device;
use super::error::CudaError;
use super::memory::{HostMemory, Pinned, Span};
use super::stream::{Event, Stream};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
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
    /// What is published is copied from here: setting memory is a kernel on
    /// most devices, and might wait for a token's graph that waits for it.
    /// `None`: the system gives no page-locked memory, and it is set.
    words: Option<Mutex<Words>>,
}

/// Words on their way, in page-locked memory: more than there are chunks with
/// the device, so that the next one is no flight's any more.
struct Words {
    block: Pinned,
    next: usize,
}

impl Words {
    fn put(&mut self, value: u32) -> *const u8 {
        let words = self.block.len() / 4;
        let at = 4 * (self.next % words);
        self.next += 1;
        let word = &mut self.block[at..at + 4];
        word.copy_from_slice(&value.to_ne_bytes());
        word.as_ptr()
    }
}

impl Copies {
    /// For at most `in_flight` chunks that are with the device.
    pub fn new(device: &Device, in_flight: usize) -> Self {
        let block = device.pinned(4 * (in_flight + 1)).ok();
        let words = block.map(|block| Mutex::new(Words { block, next: 0 }));
        Self { stream: device.copy().clone(), words }
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
            self.publish(word, *value).map_err(Start::Unpublished)?;
        }
        self.stream.record_into(&mark).map_err(Start::Unmarked)?;
        Ok(mark)
    }

    fn publish(&self, to: &Span, value: u32) -> Result<(), CudaError> {
        let (driver, handle) = (self.stream.driver(), self.stream.handle()?);
        let Some(words) = &self.words else {
            return driver.set_word(to.address(), value, handle);
        };
        let word = words.lock().unwrap_or_else(PoisonError::into_inner).put(value);
        // SAFETY: see the head of this file; the word is written again when so
        // many others were published that this one's chunk has ended.
        unsafe { driver.copy_in(to.address(), word, 4, handle) }
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
