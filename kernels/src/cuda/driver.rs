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
mod opening;

pub(super) use graphs::GraphHandle;
pub(super) use kernels::{FunctionAttributes, Launch};

use super::error::{self, CudaError};
use super::functions::Functions;
use cudarc::driver::sys;
use std::ffi::{c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

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
}

/// Device memory of [`Driver::allocate`], in bytes behind its address.
pub(super) struct Block(u64);
/// Page-locked host memory of [`Driver::allocate_pinned`].
pub(super) struct PinnedBlock(usize);
/// The same of [`Driver::allocate_mapped`], and where the device finds it.
pub(super) struct MappedBlock {
    host: PinnedBlock,
    address: u64,
}
pub(super) struct StreamHandle(usize);
pub(super) struct EventHandle(usize);
pub(super) struct ModuleHandle(usize);
/// Lives as long as its module.
#[derive(Clone, Copy)]
pub(super) struct FunctionHandle(usize);

impl Block {
    pub fn address(&self) -> u64 {
        self.0
    }
}

impl PinnedBlock {
    pub fn pointer(&self) -> *mut u8 {
        self.0 as *mut u8
    }
}

impl MappedBlock {
    pub fn pointer(&self) -> *mut u8 {
        self.host.pointer()
    }

    pub fn address(&self) -> u64 {
        self.address
    }
}

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
        let context = self.context as sys::CUcontext;
        // SAFETY: the context is released only with `self`.
        self.call("cuCtxSetCurrent", || unsafe { (self.functions.cuCtxSetCurrent)(context) })
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

    /// Free and total device memory, in bytes.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: pointers to locals.
        self.with_context("cuMemGetInfo", || unsafe {
            (self.functions.cuMemGetInfo_v2)(&mut free, &mut total)
        })?;
        Ok((free as u64, total as u64))
    }

    /// Device memory, at least 256-byte aligned, contents unspecified.
    pub fn allocate(&self, bytes: usize) -> Result<Block, CudaError> {
        let mut address: sys::CUdeviceptr = 0;
        // SAFETY: pointer to a local.
        let result = self.with_context("cuMemAlloc", || unsafe {
            (self.functions.cuMemAlloc_v2)(&mut address, bytes)
        });
        match result {
            Ok(()) => Ok(Block(address)),
            Err(CudaError::Api { code: error::OUT_OF_MEMORY, .. }) => {
                let (free, _) = self.memory()?;
                Err(CudaError::OutOfMemory { needed: bytes as u64, free })
            }
            Err(error) => Err(error),
        }
    }

    pub fn free(&self, block: Block) {
        // SAFETY: the block is of `allocate` and gone after this. The driver
        // waits for work that uses it. An error is kept if it is sticky and
        // else means nothing: the block is gone.
        let _ =
            self.with_context("cuMemFree", || unsafe { (self.functions.cuMemFree_v2)(block.0) });
    }

    /// Page-locked memory of every context, cached by the CPU as usual,
    /// page-aligned.
    pub fn allocate_pinned(&self, bytes: usize) -> Result<PinnedBlock, CudaError> {
        self.allocate_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE as c_uint)
    }

    /// The same that kernels may read and write.
    pub fn allocate_mapped(&self, bytes: usize) -> Result<MappedBlock, CudaError> {
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let host = self.allocate_host(bytes, flags as c_uint)?;
        let mut address: sys::CUdeviceptr = 0;
        // SAFETY: pointer to a local; a live block; no flags.
        let found = self.with_context("cuMemHostGetDevicePointer", || unsafe {
            (self.functions.cuMemHostGetDevicePointer_v2)(&mut address, host.pointer().cast(), 0)
        });
        match found {
            Ok(()) => Ok(MappedBlock { host, address }),
            Err(error) => {
                self.free_pinned(host);
                Err(error)
            }
        }
    }

    /// Waits for the device, which may be using the block.
    pub fn free_mapped(&self, block: MappedBlock) {
        // SAFETY: no arguments.
        let ended = self
            .with_context("cuCtxSynchronize", || unsafe { (self.functions.cuCtxSynchronize)() });
        // Else it is leaked: the device may go on using it.
        if ended.is_ok() {
            self.free_pinned(block.host);
        }
    }

    fn allocate_host(&self, bytes: usize, flags: c_uint) -> Result<PinnedBlock, CudaError> {
        let mut pointer: *mut c_void = ptr::null_mut();
        // SAFETY: pointer to a local.
        let result = self.with_context("cuMemHostAlloc", || unsafe {
            (self.functions.cuMemHostAlloc)(&mut pointer, bytes, flags)
        });
        match result {
            Ok(()) => Ok(PinnedBlock(pointer as usize)),
            // Systems refuse with any code.
            Err(CudaError::Api { code, name, .. }) => {
                Err(CudaError::OutOfPinned { needed: bytes as u64, code, name })
            }
            Err(error) => Err(error),
        }
    }

    pub fn free_pinned(&self, block: PinnedBlock) {
        // SAFETY: the block is of `allocate_host` and gone after this; no
        // copy uses it (`Ticket` and `Link` own what copies use), and no
        // kernel (`free_mapped` has waited). Errors as in `free`.
        let _ = self.with_context("cuMemFreeHost", || unsafe {
            (self.functions.cuMemFreeHost)(block.0 as *mut c_void)
        });
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
        Ok(StreamHandle(stream as usize))
    }

    pub fn destroy_stream(&self, stream: StreamHandle) {
        // SAFETY: made by `stream`, gone after this; its work goes on.
        let _ = self.with_context("cuStreamDestroy", || unsafe {
            (self.functions.cuStreamDestroy_v2)(stream.raw())
        });
    }

    pub fn synchronize(&self, stream: &StreamHandle) -> Result<(), CudaError> {
        // SAFETY: a live stream.
        self.with_context("cuStreamSynchronize", || unsafe {
            (self.functions.cuStreamSynchronize)(stream.raw())
        })
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

    /// Waits until the event's last record has completed.
    pub fn finish(&self, event: &EventHandle) -> Result<(), CudaError> {
        // SAFETY: a live event.
        self.with_context("cuEventSynchronize", || unsafe {
            (self.functions.cuEventSynchronize)(event.raw())
        })
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

    /// Milliseconds between two completed timed events.
    pub fn elapsed(&self, from: &EventHandle, to: &EventHandle) -> Result<f32, CudaError> {
        let mut milliseconds = 0.0f32;
        // SAFETY: live events, pointer to a local.
        self.with_context("cuEventElapsedTime", || unsafe {
            (self.functions.cuEventElapsedTime)(&mut milliseconds, from.raw(), to.raw())
        })?;
        Ok(milliseconds)
    }

    /// # Safety
    /// `from` is readable for `bytes`, and neither freed nor written before
    /// the copy has ended on the stream.
    pub unsafe fn copy_in(
        &self,
        to: u64,
        from: *const u8,
        bytes: usize,
        stream: &StreamHandle,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        self.with_context("cuMemcpyHtoDAsync", || unsafe {
            (self.functions.cuMemcpyHtoDAsync_v2)(to, from.cast(), bytes, stream.raw())
        })
    }

    /// # Safety
    /// `to` is writable for `bytes`, and neither freed nor touched before the
    /// copy has ended on the stream.
    pub unsafe fn copy_out(
        &self,
        to: *mut u8,
        from: u64,
        bytes: usize,
        stream: &StreamHandle,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        self.with_context("cuMemcpyDtoHAsync", || unsafe {
            (self.functions.cuMemcpyDtoHAsync_v2)(to.cast(), from, bytes, stream.raw())
        })
    }

    /// Copies device memory; host memory is not touched.
    pub fn copy_on_device(
        &self,
        to: u64,
        from: u64,
        bytes: usize,
        stream: &StreamHandle,
    ) -> Result<(), CudaError> {
        // SAFETY: both ranges lie in spans of live arenas: the only caller,
        // `Stream::copy`, takes them from there.
        self.with_context("cuMemcpyDtoDAsync", || unsafe {
            (self.functions.cuMemcpyDtoDAsync_v2)(to, from, bytes, stream.raw())
        })
    }

    /// Sets a word of device memory.
    pub fn set_word(&self, to: u64, word: u32, stream: &StreamHandle) -> Result<(), CudaError> {
        // SAFETY: the word lies in a span of a live arena: the only caller,
        // `flight.rs`, takes it from there.
        self.with_context("cuMemsetD32Async", || unsafe {
            (self.functions.cuMemsetD32Async)(to, word, 1, stream.raw())
        })
    }

    /// Sets device memory to one byte.
    pub fn fill(
        &self,
        to: u64,
        byte: u8,
        bytes: usize,
        stream: &StreamHandle,
    ) -> Result<(), CudaError> {
        // SAFETY: the range lies in a span of a live arena: the only caller,
        // `Stream::fill`, takes it from there.
        self.with_context("cuMemsetD8Async", || unsafe {
            (self.functions.cuMemsetD8Async)(to, byte, bytes, stream.raw())
        })
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: retained by `open`; everything that was made in the context
        // held this `Driver` and is gone.
        let _ = self.call("cuDevicePrimaryCtxRelease", || unsafe {
            (self.functions.cuDevicePrimaryCtxRelease_v2)(self.device)
        });
    }
}
