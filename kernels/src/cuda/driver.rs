//! The one place that calls the CUDA driver.
//!
//! Built on `cudarc::driver::sys`: its types and its loading of libcuda
//! (`functions.rs`). The safe layer of `cudarc` stays out: its slices record events
//! around every use unless told not to, and when told not to its pinned
//! slices hand their memory out while a copy still reads it; and its
//! destructors call the driver after sticky errors. Here events are recorded
//! where the code asks for one, [`super::Ticket`] owns what a copy uses, and
//! every call goes through [`Driver::call`], which makes none after a sticky
//! error.
//!
//! Guarantee that the `unsafe` blocks rely on: a handle is made by the driver
//! and destroyed once, by the method that takes it by value; who holds a
//! handle holds the [`Driver`], whose context lives until the last of them is
//! gone; [`Driver::open`] is the only way to a `Driver`, and makes one only
//! when the library is there and has every function.

mod graphs;
mod kernels;
mod memory;
mod opening;
mod streams;
mod waiting;

pub(super) use graphs::GraphHandle;
pub(super) use kernels::{FunctionAttributes, Launch};
pub(super) use memory::{Block, MappedBlock, PinnedBlock};

use super::error::CudaError;
use super::functions::Functions;
use cudarc::driver::sys;
use std::ffi::c_uint;
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, ThreadId};
use streams::Known;

/// A GPU's context.
pub(super) struct Driver {
    functions: Functions,
    device: sys::CUdevice,
    /// The primary context, as an integer: the driver takes it on any thread.
    context: usize,
    sticky: OnceLock<CudaError>,
    /// Calls that were made.
    calls: AtomicU64,
    /// Captures under way.
    captures: AtomicUsize,
    /// All that are there.
    streams: Mutex<Vec<Known>>,
    /// See [`Driver::patience`], in milliseconds.
    patience_ms: AtomicU64,
}

pub(super) struct StreamHandle(usize);
pub(super) struct EventHandle(usize);
pub(super) struct ModuleHandle(usize);
/// Lives as long as its module.
#[derive(Clone, Copy)]
pub(super) struct FunctionHandle(usize);

impl StreamHandle {
    fn raw(&self) -> sys::CUstream {
        self.0 as sys::CUstream
    }
}

impl EventHandle {
    fn raw(&self) -> sys::CUevent {
        self.0 as sys::CUevent
    }
}

/// What an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EventKind {
    /// Order and completion; waiting for it does not spin.
    Order,
    /// Also the time.
    Timed,
}

impl Driver {
    /// Makes a call of the driver, unless a sticky error came before.
    fn call(&self, name: &'static str, call: impl FnOnce() -> u32) -> Result<(), CudaError> {
        self.healthy()?;
        self.calls.fetch_add(1, Ordering::Relaxed);
        match call() {
            0 => Ok(()),
            code => Err(self.keep(CudaError::of_call(name, code))),
        }
    }

    /// [`Driver::call`] with the context current on this thread.
    fn with_context(
        &self,
        name: &'static str,
        call: impl FnOnce() -> u32,
    ) -> Result<(), CudaError> {
        self.bind()?;
        self.call(name, call)
    }

    fn bind(&self) -> Result<(), CudaError> {
        self.make_current(self.context)
    }

    fn make_current(&self, context: usize) -> Result<(), CudaError> {
        let context = context as sys::CUcontext;
        // SAFETY: no context; `self.context`, which is released only with `self`;
        // or the one that was current on this thread when its caller came here,
        // which outlives the call: contexts are destroyed by unsafe calls of the
        // driver, whose caller owes that none is in use
        // ([`super::Device::enter`] says for how long).
        self.call("cuCtxSetCurrent", || unsafe { (self.functions.cuCtxSetCurrent)(context) })
    }

    /// The context that is current on this thread, as an integer; 0: none.
    fn current(&self) -> Result<usize, CudaError> {
        let mut context: sys::CUcontext = ptr::null_mut();
        // SAFETY: pointer to a local.
        self.call("cuCtxGetCurrent", || unsafe { (self.functions.cuCtxGetCurrent)(&mut context) })?;
        Ok(context as usize)
    }

    /// Does anybody retain the device's primary context?
    fn is_primary_active(&self) -> Result<bool, CudaError> {
        let (mut flags, mut active) = (0, 0);
        // SAFETY: pointers to locals.
        self.call("cuDevicePrimaryCtxGetState", || unsafe {
            (self.functions.cuDevicePrimaryCtxGetState)(self.device, &mut flags, &mut active)
        })?;
        Ok(active != 0)
    }

    /// The sticky error that came before, if one did.
    pub fn healthy(&self) -> Result<(), CudaError> {
        self.sticky.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Remembers a sticky error; no call is made after it.
    pub fn keep(&self, error: CudaError) -> CudaError {
        if error.is_sticky() {
            return self.sticky.get_or_init(|| error).clone();
        }
        error
    }

    /// Calls that were made of the driver.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    pub fn synchronize(&self, stream: &StreamHandle) -> Result<(), CudaError> {
        // SAFETY: a live stream.
        self.with_context("cuStreamSynchronize", || unsafe {
            (self.functions.cuStreamSynchronize)(stream.raw())
        })
    }

    pub fn event(&self, kind: EventKind) -> Result<EventHandle, CudaError> {
        let mut flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as c_uint;
        if kind == EventKind::Order {
            flags |= sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        }
        let mut event: sys::CUevent = ptr::null_mut();
        // SAFETY: pointer to a local.
        self.with_context("cuEventCreate", || unsafe {
            (self.functions.cuEventCreate)(&mut event, flags)
        })?;
        Ok(EventHandle(event as usize))
    }

    pub fn destroy_event(&self, event: EventHandle) {
        // SAFETY: made by `event`, gone after this.
        let _ = self.with_context("cuEventDestroy", || unsafe {
            (self.functions.cuEventDestroy_v2)(event.raw())
        });
    }

    pub fn record(&self, event: &EventHandle, stream: &StreamHandle) -> Result<(), CudaError> {
        // SAFETY: live handles.
        self.with_context("cuEventRecord", || unsafe {
            (self.functions.cuEventRecord)(event.raw(), stream.raw())
        })
    }

    /// Work that comes later on `stream` starts after `event`.
    pub fn wait(&self, stream: &StreamHandle, event: &EventHandle) -> Result<(), CudaError> {
        // SAFETY: live handles; no flags.
        self.with_context("cuStreamWaitEvent", || unsafe {
            (self.functions.cuStreamWaitEvent)(stream.raw(), event.raw(), 0)
        })
    }

    /// Milliseconds between two completed timed events.
    pub fn elapsed(&self, from: &EventHandle, to: &EventHandle) -> Result<f32, CudaError> {
        let mut milliseconds = 0.0f32;
        // SAFETY: live events, pointer to a local.
        self.with_context("cuEventElapsedTime", || unsafe {
            (self.functions.cuEventElapsedTime)(&mut milliseconds, from.raw(), to.raw())
        })?;
        Ok(milliseconds)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let before = self.current();
        self.destroy_streams();
        if let Ok(before) = before {
            let _ = self.make_current(before);
        }
        // SAFETY: retained by `open`; everything that was made in the context
        // held this `Driver` and is gone.
        let _ = self.call("cuDevicePrimaryCtxRelease", || unsafe {
            (self.functions.cuDevicePrimaryCtxRelease_v2)(self.device)
        });
        if before == Ok(self.context) && self.is_primary_active() == Ok(false) {
            // Nobody else retains it: what was current here is gone.
            let _ = self.make_current(0);
        }
    }
}

/// The caller's context, which is current again when this goes, on the thread
/// that made it: every call makes the device's own current. After a sticky
/// error it stays as it is, because no call is made.
pub(super) struct CallersContext {
    driver: Arc<Driver>,
    /// `None`: it is not known.
    context: Option<usize>,
    thread: ThreadId,
}

impl CallersContext {
    pub fn of(driver: &Arc<Driver>) -> Self {
        let thread = thread::current().id();
        Self { driver: driver.clone(), context: driver.current().ok(), thread }
    }
}

impl Drop for CallersContext {
    fn drop(&mut self) {
        let Some(context) = self.context else { return };
        if self.thread == thread::current().id() && context != self.driver.context {
            let _ = self.driver.make_current(context);
        }
    }
}
