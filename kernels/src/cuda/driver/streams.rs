//! Streams, all of which the driver knows: memory that kernels use in place is
//! freed when none of them works. The guarantee of [`super`] holds.

use super::super::error::CudaError;
use super::{Driver, StreamHandle};
use cudarc::driver::sys;
use std::ffi::{c_int, c_uint};
use std::ptr;
use std::sync::{MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks at whether the device is idle.
const PAUSE: Duration = Duration::from_micros(200);

/// A stream of the context.
pub(super) struct Known {
    handle: StreamHandle,
    /// Its launches are kept in a graph: it must not be asked.
    is_captured: bool,
    /// It belongs to nobody and is destroyed when its work has ended.
    is_left: bool,
}

impl Driver {
    fn known(&self) -> MutexGuard<'_, Vec<Known>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `urgent`: of the highest priority that the device has, else the lowest.
    pub fn stream(&self, urgent: bool) -> Result<StreamHandle, CudaError> {
        let (mut lowest, mut highest): (c_int, c_int) = (0, 0);
        // SAFETY: pointers to locals.
        self.with_context("cuCtxGetStreamPriorityRange", || unsafe {
            (self.functions.cuCtxGetStreamPriorityRange)(&mut lowest, &mut highest)
        })?;
        let priority = if urgent { highest } else { lowest };
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        let mut stream: sys::CUstream = ptr::null_mut();
        // SAFETY: pointer to a local.
        self.with_context("cuStreamCreateWithPriority", || unsafe {
            (self.functions.cuStreamCreateWithPriority)(&mut stream, flags, priority)
        })?;
        let handle = StreamHandle(stream as usize);
        self.known().push(Known { handle, is_captured: false, is_left: false });
        Ok(StreamHandle(stream as usize))
    }

    /// Its work goes on; the stream ends with it.
    pub fn destroy_stream(&self, stream: StreamHandle) {
        let mut known = self.known();
        if let Some(known) = known.iter_mut().find(|known| known.handle.0 == stream.0) {
            known.is_left = true;
        }
        self.clear_away(&mut known);
    }

    /// Destroys all streams: nobody has one any more. Work of theirs goes on.
    pub(super) fn destroy_streams(&self) {
        for Known { handle, .. } in self.known().drain(..) {
            self.destroy(&handle);
        }
    }

    fn destroy(&self, handle: &StreamHandle) {
        // SAFETY: made by `stream`; the callers forget it.
        let _ = self.with_context("cuStreamDestroy", || unsafe {
            (self.functions.cuStreamDestroy_v2)(handle.raw())
        });
    }

    /// Destroys streams that nobody has and whose work has ended.
    fn clear_away(&self, known: &mut Vec<Known>) {
        known.retain(|Known { handle, is_left, .. }| {
            // An error says that nothing of it will run.
            let is_over = *is_left && !matches!(self.is_idle(handle), Ok(false));
            if is_over {
                self.destroy(handle);
            }
            !is_over
        });
    }

    /// What a stream is given from now on is kept in a graph, or no more.
    pub(super) fn set_captured(&self, stream: &StreamHandle, is_captured: bool) {
        if let Some(known) = self.known().iter_mut().find(|known| known.handle.0 == stream.0) {
            known.is_captured = is_captured;
        }
    }

    /// Waits until everything that the device was given has ended. `false`: that
    /// cannot be learnt. A device that has not after [`Driver::patience`] is
    /// given up.
    pub(super) fn wait_for_all(&self) -> bool {
        let started = Instant::now();
        let mut is_late = false;
        loop {
            let mut known = self.known();
            self.clear_away(&mut known);
            if known.iter().any(|known| known.is_captured) {
                return false;
            }
            let busy = known
                .iter()
                .map(|known| self.is_idle(&known.handle))
                .find(|idle| *idle != Ok(true));
            drop(known);
            match busy {
                None => return true,
                Some(Err(_)) => return false,
                Some(Ok(_)) if is_late => {
                    self.give_up("work that uses the host's memory", self.patience());
                    return false;
                }
                Some(Ok(_)) => is_late = started.elapsed() > self.patience(),
            }
            thread::sleep(PAUSE);
        }
    }
}
