//! A copy between host and device that owns what it uses.
//!
//! Guarantee that the `unsafe` blocks rely on: a [`Ticket`] holds the host
//! memory and the span from before the copy is submitted until its event has
//! completed. Where that cannot be learnt any more (the device failed), the
//! host memory is leaked, so nobody reads, writes or frees it. A ticket that
//! is forgotten leaks it as well.

use super::error::CudaError;
use super::memory::{HostMemory, HostTarget, Span};
use super::stream::{Event, Stream};
use std::fmt;
use std::mem;
use std::ops::Range;

/// A copy on its way. Dropping it waits for the copy's end.
pub struct Ticket<M> {
    /// `None` once it was given back.
    held: Option<Held<M>>,
    stream: Stream,
    /// `None`: the copy could not be marked; the stream's end stands for it.
    event: Option<Event>,
}

struct Held<M> {
    memory: M,
    /// Kept alive.
    _span: Span,
}

/// A copy that was not submitted.
pub struct Refused<M> {
    pub error: CudaError,
    /// The host memory; `None` if the copy may have started, so that it
    /// cannot be given back.
    pub memory: Option<M>,
}

impl<M> fmt::Debug for Refused<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.error, f)
    }
}

impl<M> From<Refused<M>> for CudaError {
    fn from(refused: Refused<M>) -> Self {
        refused.error
    }
}

impl Stream {
    /// Starts copying bytes `range` of `memory` to a span of that length.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when lengths differ; the driver's.
    pub fn copy_in<M: HostMemory>(
        &self,
        memory: M,
        range: Range<usize>,
        to: &Span,
    ) -> Result<Ticket<M>, Refused<M>> {
        let bytes = memory.bytes().get(range.clone());
        let checked = match bytes {
            Some(bytes) => self.check_spans("copy_in", to, bytes.len()).map(|()| bytes.as_ptr()),
            None => Err(CudaError::shape("copy_in", format!("{range:?} is outside the memory"))),
        };
        let from = match checked {
            Ok(from) => from,
            Err(error) => return Err(Refused { error, memory: Some(memory) }),
        };
        self.submit(memory, to, |handle| {
            // SAFETY: `from` is `range` of memory that the ticket holds until
            // the copy has ended, and that does not move with its owner
            // (`HostMemory`).
            unsafe { self.driver().copy_in(to.address(), from, to.bytes(), handle) }
        })
    }

    /// Starts copying a span to the bytes of `memory` from `at` on.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when it does not fit; the driver's.
    pub fn copy_out<M: HostTarget>(
        &self,
        from: &Span,
        mut memory: M,
        at: usize,
    ) -> Result<Ticket<M>, Refused<M>> {
        let len = memory.bytes().len();
        let room = len.checked_sub(at).is_some_and(|room| room >= from.bytes());
        let checked = if room {
            self.check_spans("copy_out", from, from.bytes())
        } else {
            let problem = format!("{} bytes at {at} of {len}", from.bytes());
            Err(CudaError::shape("copy_out", problem))
        };
        if let Err(error) = checked {
            return Err(Refused { error, memory: Some(memory) });
        }
        // SAFETY: `at` is inside the memory or at its end.
        let to = unsafe { memory.start().add(at) };
        self.submit(memory, from, |handle| {
            // SAFETY: the memory has room for the span from `at` on, and the
            // ticket holds it, its only owner, until the copy has ended.
            unsafe { self.driver().copy_out(to, from.address(), from.bytes(), handle) }
        })
    }

    fn submit<M>(
        &self,
        memory: M,
        span: &Span,
        copy: impl FnOnce(&super::driver::StreamHandle) -> Result<(), CudaError>,
    ) -> Result<Ticket<M>, Refused<M>> {
        // All that can fail before the copy comes before it.
        let event = self.handle().and_then(|handle| Ok((handle, self.spare_event()?)));
        let started = event.and_then(|(handle, event)| {
            if span.bytes() > 0 {
                copy(handle)?;
            }
            Ok(event)
        });
        let event = match started {
            Ok(event) => event,
            // A call that failed has no effect, unless the context is gone.
            Err(error) if error.is_sticky() => {
                mem::forget(memory);
                return Err(Refused { error, memory: None });
            }
            Err(error) => return Err(Refused { error, memory: Some(memory) }),
        };
        let held = Some(Held { memory, _span: span.clone() });
        let mut ticket = Ticket { held, stream: self.clone(), event: None };
        match self.record_into(&event) {
            Ok(()) => {
                ticket.event = Some(event);
                Ok(ticket)
            }
            Err(error) => Err(Refused { error, memory: ticket.finish().ok() }),
        }
    }
}

impl<M> Ticket<M> {
    /// Whether the copy has ended. Does not wait.
    pub fn is_complete(&self) -> Result<bool, CudaError> {
        self.event.as_ref().map_or(Ok(false), Event::is_complete)
    }

    /// The copy's event, for other streams to wait for.
    pub fn event(&self) -> Option<&Event> {
        self.event.as_ref()
    }

    /// Waits for the copy's end and gives the host memory back.
    ///
    /// # Errors
    /// The driver's. The memory is leaked if the device failed, since the
    /// copy may still be using it.
    pub fn wait(mut self) -> Result<M, CudaError> {
        self.finish()
    }

    fn finish(&mut self) -> Result<M, CudaError> {
        let Some(held) = self.held.take() else {
            return Err(CudaError::shape("ticket", "its memory was given back"));
        };
        // From here to the end of the wait a panic leaks the memory.
        let held = mem::ManuallyDrop::new(held);
        let ended = match &self.event {
            Some(event) => event.synchronize(),
            None => self.stream.synchronize(),
        };
        let result = match ended {
            Ok(()) => Ok(()),
            // An error of the event alone: when the stream is done, so is
            // the copy.
            Err(error) if !error.is_sticky() && self.stream.synchronize().is_ok() => {
                drop(mem::ManuallyDrop::into_inner(held));
                return Err(error);
            }
            Err(error) => Err(error),
        };
        result.map(|()| mem::ManuallyDrop::into_inner(held).memory)
    }
}

impl<M> Drop for Ticket<M> {
    fn drop(&mut self) {
        if self.held.is_some() {
            // On an error the memory was leaked or dropped as it must be.
            let _ = self.finish();
        }
    }
}
