//! Capture of launches into graphs. The guarantee of [`super`] holds.

use super::super::error::CudaError;
use super::{Driver, StreamHandle};
use cudarc::driver::sys;
use std::ptr;
use std::sync::atomic::Ordering;

/// A graph that can be launched.
pub(in crate::cuda) struct GraphHandle(usize);

impl Driver {
    /// What comes on this stream from this thread is kept, not run, until
    /// [`Driver::end_capture`]. Other threads and streams go on as before.
    pub(in crate::cuda) fn begin_capture(&self, stream: &StreamHandle) -> Result<(), CudaError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // Nobody asks it from before the call on: that would spoil the capture.
        self.set_captured(stream, true);
        // SAFETY: a live stream.
        let begun = self.with_context("cuStreamBeginCapture", || unsafe {
            (self.functions.cuStreamBeginCapture_v2)(stream.raw(), mode)
        });
        if begun.is_ok() {
            self.captures.fetch_add(1, Ordering::Relaxed);
        } else {
            self.set_captured(stream, false);
        }
        begun
    }

    /// Ends a capture of this thread. On an error nothing is left of it,
    /// and the stream is an ordinary one again.
    pub(in crate::cuda) fn end_capture(
        &self,
        stream: &StreamHandle,
    ) -> Result<GraphHandle, CudaError> {
        let mut graph: sys::CUgraph = ptr::null_mut();
        let mut end = || {
            // SAFETY: a live stream, pointer to a local.
            self.with_context("cuStreamEndCapture", || unsafe {
                (self.functions.cuStreamEndCapture)(stream.raw(), &mut graph)
            })
        };
        let ended = match end() {
            // A capture that was spoilt has ended; a call that had no effect
            // is made once more.
            Err(CudaError::Api { code, .. }) if !(900..=908).contains(&code) => end(),
            ended => ended,
        };
        self.captures.fetch_sub(1, Ordering::Relaxed);
        self.set_captured(stream, false);
        ended?;
        let mut executable: sys::CUgraphExec = ptr::null_mut();
        // SAFETY: a graph of the driver, pointer to a local, no flags.
        let made = self.with_context("cuGraphInstantiate", || unsafe {
            (self.functions.cuGraphInstantiateWithFlags)(&mut executable, graph, 0)
        });
        // SAFETY: a graph of the driver, gone after this; what was made of it
        // stays.
        let _ = self
            .with_context("cuGraphDestroy", || unsafe { (self.functions.cuGraphDestroy)(graph) });
        made.map(|()| GraphHandle(executable as usize))
    }

    pub(in crate::cuda) fn launch_graph(
        &self,
        graph: &GraphHandle,
        stream: &StreamHandle,
    ) -> Result<(), CudaError> {
        // SAFETY: a live graph and stream; the graph's owner keeps alive what
        // its launches use. What they may touch was checked when they were
        // captured.
        self.with_context("cuGraphLaunch", || unsafe {
            (self.functions.cuGraphLaunch)(graph.0 as sys::CUgraphExec, stream.raw())
        })
    }

    pub(in crate::cuda) fn destroy_graph(&self, graph: GraphHandle) {
        // SAFETY: made by `end_capture`, gone after this; launches that are
        // under way go on.
        let _ = self.with_context("cuGraphExecDestroy", || unsafe {
            (self.functions.cuGraphExecDestroy)(graph.0 as sys::CUgraphExec)
        });
    }

    /// Makes calls that a capture of this thread would forbid and that have
    /// nothing to do with it: loading modules.
    pub(in crate::cuda) fn beside_captures<T>(
        &self,
        calls: impl FnOnce() -> Result<T, CudaError>,
    ) -> Result<T, CudaError> {
        if self.captures.load(Ordering::Relaxed) == 0 {
            return calls();
        }
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        let mut exchange = || {
            // SAFETY: pointer to a local, which holds one of the modes; the
            // driver puts the one before there.
            self.with_context("cuThreadExchangeStreamCaptureMode", || unsafe {
                (self.functions.cuThreadExchangeStreamCaptureMode)(&mut mode)
            })
        };
        exchange()?;
        let result = calls();
        // A thread that stays as it is may do more than before, not less.
        let _ = exchange();
        result
    }
}
