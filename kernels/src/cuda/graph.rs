//! Launches that are submitted as one: a CUDA graph.

use super::driver::{Driver, GraphHandle};
use super::error::CudaError;
use super::memory::Span;
use super::module::Kernel;
use super::stream::Stream;
use std::fmt;
use std::sync::Arc;

/// Launches in the order in which they were captured, with their arguments.
/// It keeps alive every span that they were given and the kernels; what
/// tables of addresses name is the caller's to keep.
pub struct Graph {
    driver: Arc<Driver>,
    /// Taken by `drop`.
    handle: Option<GraphHandle>,
    kept: Kept,
}

/// What the launches of a capture use.
#[derive(Default)]
pub(super) struct Kept {
    /// One of each allocation.
    spans: Vec<Span>,
    kernels: Vec<Kernel>,
    launches: usize,
}

impl Kept {
    pub fn launch(&mut self, kernel: &Kernel, spans: &[Span]) {
        self.launches += 1;
        if self.kernels.iter().all(|kept| !kept.is_same(kernel)) {
            self.kernels.push(kernel.clone());
        }
        for span in spans {
            if self.spans.iter().all(|kept| !kept.shares_memory(span)) {
                self.spans.push(span.clone());
            }
        }
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph({} launches)", self.launches())
    }
}

impl Graph {
    /// What `work` launches on this stream, which does not run. `work` may
    /// launch, and load modules; copies, waits, events and questions on the
    /// stream are refused meanwhile, with an error that leaves the stream and
    /// the capture as they are. Memory must be neither taken nor freed in it:
    /// the driver gives the capture up then. Other streams and other threads
    /// are not concerned.
    ///
    /// # Errors
    /// Those of `work`; [`CudaError::Shape`] when the stream is being
    /// captured; the driver's. The stream is an ordinary one again after each
    /// of them, and after a panic.
    pub fn capture(
        stream: &Stream,
        work: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<Self, CudaError> {
        let capture = Capture::begin(stream)?;
        work()?;
        let (handle, kept) = capture.end()?;
        Ok(Self { driver: stream.driver().clone(), handle: Some(handle), kept })
    }

    /// Submits all launches, behind what was submitted to the stream before.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for a stream of another device; the driver's.
    pub fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        if !Arc::ptr_eq(stream.driver(), &self.driver) {
            return Err(CudaError::shape("graph", "the stream is of another device"));
        }
        let gone = || CudaError::shape("graph", "used while it is dropped");
        self.driver.launch_graph(self.handle.as_ref().ok_or_else(gone)?, stream.handle()?)
    }

    /// How many launches it has.
    pub fn launches(&self) -> usize {
        self.kept.launches
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            self.driver.destroy_graph(handle);
        }
    }
}

/// A stream while it is captured; an ordinary one again when this goes.
struct Capture<'a> {
    stream: &'a Stream,
    has_ended: bool,
}

impl<'a> Capture<'a> {
    fn begin(stream: &'a Stream) -> Result<Self, CudaError> {
        stream.begin_capture()?;
        Ok(Self { stream, has_ended: false })
    }

    fn end(mut self) -> Result<(GraphHandle, Kept), CudaError> {
        self.has_ended = true;
        self.stream.end_capture()
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if !self.has_ended
            && let Ok((handle, _)) = self.stream.end_capture()
        {
            self.stream.driver().destroy_graph(handle);
        }
    }
}
