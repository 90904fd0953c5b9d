//! Queues of work on the device, and events that mark a place in them.

use super::args::{Args, MOST};
use super::driver::{Driver, EventHandle, EventKind, GraphHandle, Launch, StreamHandle};
use super::error::CudaError;
use super::graph::Kept;
use super::memory::{HostMemory, Span, Staging};
use super::module::Kernel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// Bytes that [`Stream::upload`] and [`Stream::download`] move at once.
const STAGING_BYTES: usize = 1 << 20;

/// A queue of copies and launches that run one after the other. Work on
/// different streams is ordered only by events.
#[derive(Clone)]
pub struct Stream(Arc<Inner>);

struct Inner {
    driver: Arc<Driver>,
    /// Taken by `drop`.
    handle: Option<StreamHandle>,
    events: Arc<Events>,
    /// What `upload` and `download` copy through; made by the first of them.
    staging: Mutex<Option<Staging>>,
    /// What the launches use, while they are captured.
    capture: Mutex<Option<Kept>>,
    /// Whose launches are only prepared.
    rehearsal: Mutex<Option<ThreadId>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            self.driver.destroy_stream(handle);
        }
    }
}

/// How a launch is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    pub blocks: [u32; 3],
    /// Of a block.
    pub threads: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Grid {
    /// One dimension, no dynamic shared memory.
    pub fn new(blocks: u32, threads: u32) -> Self {
        Self { blocks: [blocks, 1, 1], threads: [threads, 1, 1], shared_bytes: 0 }
    }
}

impl Stream {
    pub(super) fn new(
        driver: &Arc<Driver>,
        events: &Arc<Events>,
        urgent: bool,
    ) -> Result<Self, CudaError> {
        let handle = Some(driver.stream(urgent)?);
        let (driver, events) = (driver.clone(), events.clone());
        let (staging, capture) = (Mutex::default(), Mutex::default());
        let rehearsal = Mutex::default();
        Ok(Self(Arc::new(Inner { driver, handle, events, staging, capture, rehearsal })))
    }

    pub(super) fn driver(&self) -> &Arc<Driver> {
        &self.0.driver
    }

    /// For everything but launches.
    pub(super) fn handle(&self) -> Result<&StreamHandle, CudaError> {
        if self.capture().is_some() {
            let problem = "only launches can be captured: no copies, no waiting, no events";
            return Err(CudaError::shape("stream", problem));
        }
        if self.rehearses() {
            return Err(CudaError::shape("stream", "only launches can be rehearsed"));
        }
        self.any_handle()
    }

    fn any_handle(&self) -> Result<&StreamHandle, CudaError> {
        let gone = || CudaError::shape("stream", "used while it is dropped");
        self.0.handle.as_ref().ok_or_else(gone)
    }

    fn capture(&self) -> MutexGuard<'_, Option<Kept>> {
        self.0.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Launches of this thread are kept from now on.
    pub(super) fn begin_capture(&self) -> Result<(), CudaError> {
        self.driver().begin_capture(self.handle()?)?;
        *self.capture() = Some(Kept::default());
        Ok(())
    }

    /// What was launched since, and what it uses.
    pub(super) fn end_capture(&self) -> Result<(GraphHandle, Kept), CudaError> {
        let kept = self.capture().take();
        let graph = self.driver().end_capture(self.any_handle()?)?;
        Ok((graph, kept.unwrap_or_default()))
    }

    /// Does everything for the launches of `work` on this stream but launch
    /// them: kernels are found and brought to the device, and have the shared
    /// memory that they ask for. Where the same launches come later, none of
    /// them loads anything: that may wait for the device, and so for ever where
    /// the device waits for the host ([`super::settle`]). Launches of other
    /// threads go on.
    ///
    /// # Errors
    /// Those of `work`, and what its launches would meet but for the driver's
    /// own; [`CudaError::Shape`] for anything but launches.
    pub fn rehearse(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<(), CudaError> {
        self.handle()?;
        match &mut *self.rehearsal() {
            Some(_) => return Err(CudaError::shape("stream", "it is being rehearsed")),
            free => *free = Some(thread::current().id()),
        }
        let _ends = Rehearsal(self);
        work()
    }

    fn rehearsal(&self) -> MutexGuard<'_, Option<ThreadId>> {
        self.0.rehearsal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this thread's launches are only prepared.
    fn rehearses(&self) -> bool {
        self.rehearsal().is_some_and(|thread| thread == thread::current().id())
    }

    /// Launches a kernel; returns before it runs. For launchers alone: number
    /// and sizes of the arguments are checked, but not where they point. A
    /// kernel that is told a wrong address or length writes there, into
    /// page-locked host memory too.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when the arguments are not the kernel's or the
    /// grid is not one that it can have; the driver's.
    pub(super) fn launch(&self, kernel: &Kernel, grid: Grid, args: Args) -> Result<(), CudaError> {
        kernel.check(self.driver(), grid, &args)?;
        if args.spans().iter().any(|span| !span.is_of(self.driver())) {
            return Err(CudaError::shape("launch", "a span is of another device"));
        }
        debug_assert!(args.cells().len() <= MOST);
        if self.rehearses() {
            return Ok(());
        }
        let launch = Launch {
            function: kernel.function(),
            blocks: grid.blocks,
            threads: grid.threads,
            shared_bytes: grid.shared_bytes,
            cells: args.cells(),
        };
        self.driver().launch(&launch, self.any_handle()?)?;
        if let Some(kept) = self.capture().as_mut() {
            kept.launch(kernel, args.spans());
        }
        Ok(())
    }

    /// Whether everything that was submitted here has ended. Does not wait;
    /// finds errors of the work.
    pub fn query(&self) -> Result<bool, CudaError> {
        self.driver().is_idle(self.handle()?)
    }

    /// Waits until everything that was submitted here has ended.
    ///
    /// # Errors
    /// [`CudaError::Hung`] after the device's patience
    /// ([`super::Device::patience`]); the driver's.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // The driver itself would wait for ever: it is asked for what cannot
        // be marked alone.
        match self.record().and_then(|mark| mark.synchronize()) {
            Err(error) if !error.is_sticky() => self.driver().synchronize(self.handle()?),
            ended => ended,
        }
    }

    /// Marks the work that was submitted here so far.
    pub fn record(&self) -> Result<Event, CudaError> {
        self.record_as(EventKind::Order)
    }

    /// [`Stream::record`] with the time at which the work ended; for
    /// [`Event::seconds_since`].
    pub fn record_timed(&self) -> Result<Event, CudaError> {
        self.record_as(EventKind::Timed)
    }

    fn record_as(&self, kind: EventKind) -> Result<Event, CudaError> {
        let event = Events::take(&self.0.events, kind)?;
        self.driver().record(event.handle()?, self.handle()?)?;
        Ok(event)
    }

    /// An event for [`Stream::record_into`].
    pub(super) fn spare_event(&self) -> Result<Event, CudaError> {
        Events::take(&self.0.events, EventKind::Order)
    }

    /// Moves an event of this stream to the end of what was submitted.
    pub(super) fn record_into(&self, event: &Event) -> Result<(), CudaError> {
        self.driver().record(event.handle()?, self.handle()?)
    }

    /// Work that is submitted here from now on starts after `event`.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        self.driver().wait(self.handle()?, event.handle()?)
    }

    /// Copies `from` to `to`, of the same length, both on this device.
    pub fn copy(&self, from: &Span, to: &Span) -> Result<(), CudaError> {
        self.check_spans("copy", from, to.bytes())?;
        self.check_spans("copy", to, from.bytes())?;
        if from.bytes() == 0 {
            return Ok(());
        }
        self.driver().copy_on_device(to.address(), from.address(), from.bytes(), self.handle()?)
    }

    /// Sets every byte of a span.
    pub fn fill(&self, span: &Span, byte: u8) -> Result<(), CudaError> {
        self.check_spans("fill", span, span.bytes())?;
        if span.bytes() == 0 {
            return Ok(());
        }
        self.driver().fill(span.address(), byte, span.bytes(), self.handle()?)
    }

    /// Copies `bytes` to a span of the same length, behind what was submitted
    /// here, and waits for it. For tests and set-up.
    pub fn upload(&self, span: &Span, bytes: &[u8]) -> Result<(), CudaError> {
        self.check_spans("upload", span, bytes.len())?;
        let mut staging = self.staging();
        for (piece, start) in bytes.chunks(STAGING_BYTES).zip((0..).step_by(STAGING_BYTES)) {
            let mut block = self.take_staging(&mut staging)?;
            block.bytes_mut()[..piece.len()].copy_from_slice(piece);
            let part = span.part(start..start + piece.len());
            *staging = Some(self.copy_in(block, 0..piece.len(), &part)?.wait()?);
        }
        Ok(())
    }

    /// Copies a span to `bytes` of the same length, behind what was submitted
    /// here, and waits for it. For tests and results.
    pub fn download(&self, span: &Span, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.check_spans("download", span, bytes.len())?;
        let mut staging = self.staging();
        for (piece, start) in bytes.chunks_mut(STAGING_BYTES).zip((0..).step_by(STAGING_BYTES)) {
            let block = self.take_staging(&mut staging)?;
            let part = span.part(start..start + piece.len());
            let block = self.copy_out(&part, block, 0)?.wait()?;
            piece.copy_from_slice(&block.bytes()[..piece.len()]);
            *staging = Some(block);
        }
        Ok(())
    }

    fn staging(&self) -> MutexGuard<'_, Option<Staging>> {
        self.0.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_staging(&self, staging: &mut Option<Staging>) -> Result<Staging, CudaError> {
        self.handle()?;
        staging.take().map_or_else(|| Staging::new(self.driver(), STAGING_BYTES), Ok)
    }

    pub(super) fn check_spans(
        &self,
        call: &'static str,
        span: &Span,
        bytes: usize,
    ) -> Result<(), CudaError> {
        if span.bytes() != bytes {
            let problem = format!("{bytes} bytes and a span of {}", span.bytes());
            return Err(CudaError::shape(call, problem));
        }
        if !span.is_of(self.driver()) {
            return Err(CudaError::shape(call, "the span is of another device"));
        }
        if span.is_mapped() {
            return Err(CudaError::shape(call, "the span is mapped memory of the host"));
        }
        Ok(())
    }
}

/// A stream whose launches are only prepared; launched again when this goes.
struct Rehearsal<'a>(&'a Stream);

impl Drop for Rehearsal<'_> {
    fn drop(&mut self) {
        *self.0.rehearsal() = None;
    }
}

/// A place in a stream: everything that was submitted there before it was
/// recorded.
#[derive(Clone)]
pub struct Event(Arc<Recorded>);

struct Recorded {
    events: Arc<Events>,
    kind: EventKind,
    /// Taken by `drop`.
    handle: Option<EventHandle>,
}

impl Event {
    fn handle(&self) -> Result<&EventHandle, CudaError> {
        let gone = || CudaError::shape("event", "used while it is dropped");
        self.0.handle.as_ref().ok_or_else(gone)
    }

    /// Whether all that work has ended. Does not wait.
    pub fn is_complete(&self) -> Result<bool, CudaError> {
        self.0.events.driver.is_complete(self.handle()?)
    }

    /// Waits until all that work has ended, without keeping the CPU busy.
    ///
    /// # Errors
    /// [`CudaError::Hung`] after the device's patience
    /// ([`super::Device::patience`]); the driver's.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.0.events.driver.finish(self.handle()?)
    }

    /// Time on the device from `earlier` to this event; both completed and of
    /// [`Stream::record_timed`]. Resolution: about half a microsecond.
    pub fn seconds_since(&self, earlier: &Event) -> Result<f64, CudaError> {
        if self.0.kind != EventKind::Timed || earlier.0.kind != EventKind::Timed {
            return Err(CudaError::shape("event", "it was recorded without its time"));
        }
        let milliseconds = self.0.events.driver.elapsed(earlier.handle()?, self.handle()?)?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            self.events.lock(self.kind).push(handle);
        }
    }
}

/// Events that nobody holds, to be recorded again: making one takes the
/// driver longer than recording it, and dropping one makes no call.
pub(super) struct Events {
    driver: Arc<Driver>,
    order: Mutex<Vec<EventHandle>>,
    timed: Mutex<Vec<EventHandle>>,
}

impl Events {
    pub fn new(driver: &Arc<Driver>) -> Arc<Self> {
        Arc::new(Self { driver: driver.clone(), order: Mutex::default(), timed: Mutex::default() })
    }

    fn take(events: &Arc<Self>, kind: EventKind) -> Result<Event, CudaError> {
        let spare = events.lock(kind).pop();
        let handle = match spare {
            Some(handle) => handle,
            None => events.driver.event(kind)?,
        };
        Ok(Event(Arc::new(Recorded { events: events.clone(), kind, handle: Some(handle) })))
    }

    fn lock(&self, kind: EventKind) -> MutexGuard<'_, Vec<EventHandle>> {
        let list = match kind {
            EventKind::Order => &self.order,
            EventKind::Timed => &self.timed,
        };
        list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        for kind in [EventKind::Order, EventKind::Timed] {
            let handles = std::mem::take(&mut *self.lock(kind));
            for handle in handles {
                self.driver.destroy_event(handle);
            }
        }
    }
}
