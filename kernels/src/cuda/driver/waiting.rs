//! Questions to the device about its work, and waiting for it. The guarantee
//! of [`super`] holds.
//!
//! Nobody waits inside the driver: a device that hangs, or that has left its
//! bus, would never let a thread out of there. So waiting is asking again,
//! without a pause at first, then with pauses as long as an interrupt takes
//! to wake a thread.

use super::super::error::{self, CudaError};
use super::{Driver, EventHandle, StreamHandle};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

/// What a device has for work that somebody waits for, unless told otherwise.
pub(super) const PATIENCE_MS: u64 = 30_000;
/// Before the first pause.
const AT_ONCE: Duration = Duration::from_micros(50);
const PAUSE: Duration = Duration::from_micros(50);
/// Of work that takes a second and more.
const LONG_PAUSE: Duration = Duration::from_millis(1);

impl Driver {
    /// After so long work that has not ended never will.
    pub fn patience(&self) -> Duration {
        Duration::from_millis(self.patience_ms.load(Ordering::Relaxed))
    }

    pub fn set_patience(&self, patience: Duration) {
        let ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        self.patience_ms.store(ms, Ordering::Relaxed);
    }

    /// Whether everything that was submitted has ended.
    pub fn is_idle(&self, stream: &StreamHandle) -> Result<bool, CudaError> {
        // SAFETY: a live stream.
        let query = || unsafe { (self.functions.cuStreamQuery)(stream.raw()) };
        match self.with_context("cuStreamQuery", query) {
            Ok(()) => Ok(true),
            Err(CudaError::Api { code: error::NOT_READY, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits until the event's last record has completed.
    ///
    /// # Errors
    /// [`CudaError::Hung`] where it has not after [`Driver::patience`]: the
    /// device is given up, and no call is made any more.
    pub fn finish(&self, event: &EventHandle) -> Result<(), CudaError> {
        let started = Instant::now();
        let mut is_late = false;
        while !self.is_complete(event)? {
            let waited = started.elapsed();
            let patience = self.patience();
            // This thread may have been stopped between question and clock.
            if is_late {
                return Err(self.give_up("its work", patience));
            }
            is_late = waited > patience;
            match waited {
                waited if waited < AT_ONCE => std::hint::spin_loop(),
                waited if waited < Duration::from_secs(1) => thread::sleep(PAUSE),
                _ => thread::sleep(LONG_PAUSE),
            }
        }
        Ok(())
    }

    /// The device hangs: no more calls are made. The error says so.
    pub fn give_up(&self, at: &'static str, after: Duration) -> CudaError {
        self.keep(CudaError::Hung { at, seconds: after.as_secs() })
    }

    pub fn is_complete(&self, event: &EventHandle) -> Result<bool, CudaError> {
        // SAFETY: a live event.
        let query = || unsafe { (self.functions.cuEventQuery)(event.raw()) };
        match self.with_context("cuEventQuery", query) {
            Ok(()) => Ok(true),
            Err(CudaError::Api { code: error::NOT_READY, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
