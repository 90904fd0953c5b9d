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

use super::error::{self, CudaError, LOWEST_CAPABILITY, LOWEST_VERSION, Version};
use super::functions::{self, Functions, Missing};
use cudarc::driver::sys;
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// A GPU's context.
pub(super) struct Driver {
    functions: Functions,
    device: sys::CUdevice,
    /// The primary context, as an integer: the driver takes it on any thread.
    context: usize,
    sticky: OnceLock<CudaError>,
    /// Calls that were made.
    calls: AtomicU64,
}

/// Device memory of [`Driver::allocate`], in bytes behind its address.
pub(super) struct Block(u64);
/// Page-locked host memory of [`Driver::allocate_pinned`].
pub(super) struct PinnedBlock(usize);
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

/// Numbers of a device that never change.
pub(super) struct Attributes {
    pub name: String,
    pub capability: (u32, u32),
    pub version: Version,
    pub memory_bytes: u64,
    pub multiprocessors: u32,
    pub shared_bytes_limit: u32,
    pub copy_engines: u32,
    pub integrated: bool,
    /// Domain, bus, device.
    pub pci: (u32, u32, u32),
}

/// One launch, checked by the caller against the kernel.
pub(super) struct Launch<'a> {
    pub function: FunctionHandle,
    pub blocks: [u32; 3],
    pub threads: [u32; 3],
    pub shared_bytes: u32,
    /// One cell per parameter, its bytes first in memory.
    pub cells: &'a [u64],
}

/// What the driver says of a kernel.
pub(super) struct FunctionAttributes {
    pub threads_limit: u32,
    pub registers: u32,
    pub shared_bytes: u32,
    pub local_bytes: u32,
    /// Bytes of each parameter.
    pub parameters: Vec<usize>,
}

impl Driver {
    /// Loads the driver, checks what it is, and makes GPU `ordinal`'s context.
    pub fn open(ordinal: usize) -> Result<(Self, Attributes), CudaError> {
        let functions = Functions::load().map_err(|missing| match missing {
            Missing::Library => CudaError::NoDriver,
            Missing::Function(function) => match Version(functions::version()) {
                found if found < LOWEST_VERSION => {
                    CudaError::OldDriver { found, needed: LOWEST_VERSION }
                }
                _ => CudaError::IncompleteDriver { function },
            },
        })?;
        let mut version: c_int = 0;
        // SAFETY: the pointer is to a local.
        let (found, started) =
            unsafe { ((functions.cuDriverGetVersion)(&mut version), (functions.cuInit)(0)) };
        let version = Version(u32::try_from(version).unwrap_or(0));
        let opening = |call, code| match code {
            0 => Ok(()),
            code => Err(CudaError::of_opening(call, code, version)),
        };
        opening("cuInit", started)?;
        opening("cuDriverGetVersion", found)?;
        if version < LOWEST_VERSION {
            return Err(CudaError::OldDriver { found: version, needed: LOWEST_VERSION });
        }
        let mut devices: c_int = 0;
        // SAFETY: the driver is initialised; the pointer is to a local.
        opening("cuDeviceGetCount", unsafe { (functions.cuDeviceGetCount)(&mut devices) })?;
        let devices = usize::try_from(devices).unwrap_or(0);
        if devices == 0 {
            return Err(CudaError::NoDevice);
        }
        if ordinal >= devices {
            return Err(CudaError::NoSuchDevice { ordinal, devices });
        }
        let mut device: sys::CUdevice = 0;
        // SAFETY: as above; the ordinal is below the count.
        opening("cuDeviceGet", unsafe { (functions.cuDeviceGet)(&mut device, ordinal as c_int) })?;
        let attributes = attributes(&functions, device, version, &opening)?;
        if attributes.capability < LOWEST_CAPABILITY {
            let ((major, minor), (low, lower)) = (attributes.capability, LOWEST_CAPABILITY);
            return Err(CudaError::unsupported(format!(
                "{} has compute capability {major}.{minor}; {low}.{lower} (Turing: RTX 20, \
                 GTX 16) or higher is needed",
                attributes.name
            )));
        }
        let mut context: sys::CUcontext = ptr::null_mut();
        // SAFETY: the device is the driver's; the pointer is to a local.
        let code = unsafe { (functions.cuDevicePrimaryCtxRetain)(&mut context, device) };
        opening("cuDevicePrimaryCtxRetain", code)?;
        let context = context as usize;
        let (sticky, calls) = (OnceLock::new(), AtomicU64::new(0));
        let driver = Self { functions, device, context, sticky, calls };
        driver.bind()?;
        Ok((driver, attributes))
    }

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
        let mut pointer: *mut c_void = ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE as c_uint;
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
        // SAFETY: the block is of `allocate_pinned` and gone after this; no
        // copy uses it (`Ticket` and `Link` own what copies use). Errors as in
        // `free`.
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
        match self
            .with_context("cuEventQuery", || unsafe { (self.functions.cuEventQuery)(event.raw()) })
        {
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
        // SAFETY: both ranges lie in spans of live arenas (`Stream::copy`).
        self.with_context("cuMemcpyDtoDAsync", || unsafe {
            (self.functions.cuMemcpyDtoDAsync_v2)(to, from, bytes, stream.raw())
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
        // SAFETY: the range lies in a span of a live arena (`Stream::fill`).
        self.with_context("cuMemsetD8Async", || unsafe {
            (self.functions.cuMemsetD8Async)(to, byte, bytes, stream.raw())
        })
    }

    /// Loads PTX. The error carries what the driver's compiler said.
    pub fn load(&self, module: &str, image: &CStr) -> Result<ModuleHandle, CudaError> {
        let mut log = vec![0u8; 8192];
        let mut options = [
            sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
            sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
        ];
        // Option values travel in the pointer's place.
        let mut values = [log.as_mut_ptr().cast::<c_void>(), log.len() as *mut c_void];
        let mut handle: sys::CUmodule = ptr::null_mut();
        let count = options.len() as c_uint;
        // SAFETY: the image ends with a zero byte; as many options as values;
        // the log's buffer and length are those of a live vector.
        let result = self.with_context("cuModuleLoadDataEx", || unsafe {
            (self.functions.cuModuleLoadDataEx)(
                &mut handle,
                image.as_ptr().cast(),
                count,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        });
        match result {
            Ok(()) => Ok(ModuleHandle(handle as usize)),
            Err(CudaError::Api { code, name, .. }) if code != error::OUT_OF_MEMORY => {
                let said = log.split(|byte| *byte == 0).next().unwrap_or_default();
                let said = String::from_utf8_lossy(said);
                let problem = format!("the driver does not load it ({code} {name}) {said}");
                Err(CudaError::BadModule {
                    module: module.to_string(),
                    problem: problem.trim_end().to_string(),
                })
            }
            Err(error) => Err(error),
        }
    }

    pub fn unload(&self, module: ModuleHandle) {
        // SAFETY: made by `load`, gone after this; kernels hold their module.
        let _ = self.with_context("cuModuleUnload", || unsafe {
            (self.functions.cuModuleUnload)(module.0 as sys::CUmodule)
        });
    }

    pub fn function(
        &self,
        module: &ModuleHandle,
        name: &CStr,
    ) -> Result<FunctionHandle, CudaError> {
        let mut function: sys::CUfunction = ptr::null_mut();
        // SAFETY: a live module, a name that ends with a zero byte, pointer
        // to a local.
        self.with_context("cuModuleGetFunction", || unsafe {
            (self.functions.cuModuleGetFunction)(
                &mut function,
                module.0 as sys::CUmodule,
                name.as_ptr(),
            )
        })?;
        Ok(FunctionHandle(function as usize))
    }

    pub fn function_attributes(
        &self,
        function: FunctionHandle,
    ) -> Result<FunctionAttributes, CudaError> {
        use sys::CUfunction_attribute as Attribute;
        let get = |which| {
            let mut value: c_int = 0;
            // SAFETY: a function of a module that the caller holds, pointer
            // to a local.
            self.with_context("cuFuncGetAttribute", || unsafe {
                (self.functions.cuFuncGetAttribute)(
                    &mut value,
                    which,
                    function.0 as sys::CUfunction,
                )
            })?;
            Ok::<_, CudaError>(u32::try_from(value).unwrap_or(0))
        };
        Ok(FunctionAttributes {
            threads_limit: get(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            registers: get(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            shared_bytes: get(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            local_bytes: get(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            parameters: self.parameters(function)?,
        })
    }

    /// Bytes of each parameter of a kernel, so that a launch never reads
    /// arguments that were not given.
    fn parameters(&self, function: FunctionHandle) -> Result<Vec<usize>, CudaError> {
        let mut sizes = Vec::new();
        // The end of the list has the code of any wrong value: it is asked
        // for twice.
        let mut ends = 0;
        while ends < 2 && sizes.len() <= super::args::MOST {
            match self.parameter(function, sizes.len()) {
                Ok(bytes) => sizes.push(bytes),
                Err(CudaError::Api { code: error::INVALID_VALUE, .. }) => ends += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(sizes)
    }

    fn parameter(&self, function: FunctionHandle, index: usize) -> Result<usize, CudaError> {
        let (mut offset, mut bytes) = (0usize, 0usize);
        let function = function.0 as sys::CUfunction;
        // SAFETY: as in `function_attributes`; pointers to locals.
        self.with_context("cuFuncGetParamInfo", || unsafe {
            (self.functions.cuFuncGetParamInfo)(function, index, &mut offset, &mut bytes)
        })?;
        Ok(bytes)
    }

    /// Allows launches of this function with so much dynamic shared memory.
    pub fn allow_shared(&self, function: FunctionHandle, bytes: u32) -> Result<(), CudaError> {
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a function of a module that the caller holds.
        self.with_context("cuFuncSetAttribute", || unsafe {
            (self.functions.cuFuncSetAttribute)(
                function.0 as sys::CUfunction,
                which,
                bytes as c_int,
            )
        })
    }

    pub fn launch(&self, launch: &Launch<'_>, stream: &StreamHandle) -> Result<(), CudaError> {
        let mut pointers: [*mut c_void; super::args::MOST] = [ptr::null_mut(); super::args::MOST];
        for (pointer, cell) in pointers.iter_mut().zip(launch.cells) {
            *pointer = ptr::from_ref(cell).cast_mut().cast();
        }
        let ([x, y, z], [a, b, c]) = (launch.blocks, launch.threads);
        // SAFETY: a live function and stream; `Stream::launch` has compared
        // number and sizes of the cells with the kernel's parameters; the
        // driver copies them before it returns. What the kernel does with
        // device memory is its own matter: it cannot reach memory that Rust
        // manages.
        self.with_context("cuLaunchKernel", || unsafe {
            (self.functions.cuLaunchKernel)(
                launch.function.0 as sys::CUfunction,
                x,
                y,
                z,
                a,
                b,
                c,
                launch.shared_bytes,
                stream.raw(),
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
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

fn attributes(
    functions: &Functions,
    device: sys::CUdevice,
    version: Version,
    opening: &impl Fn(&'static str, u32) -> Result<(), CudaError>,
) -> Result<Attributes, CudaError> {
    use sys::CUdevice_attribute as Attribute;
    let get = |which| {
        let mut value: c_int = 0;
        // SAFETY: a device of this driver, pointer to a local.
        let code = unsafe { (functions.cuDeviceGetAttribute)(&mut value, which, device) };
        opening("cuDeviceGetAttribute", code)?;
        Ok::<_, CudaError>(u32::try_from(value).unwrap_or(0))
    };
    let mut name = [0u8; 256];
    // SAFETY: writes a zero-terminated name of at most that many bytes.
    let code = unsafe {
        (functions.cuDeviceGetName)(name.as_mut_ptr().cast(), name.len() as c_int, device)
    };
    opening("cuDeviceGetName", code)?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let mut memory_bytes = 0usize;
    // SAFETY: a device of this driver, pointer to a local.
    let code = unsafe { (functions.cuDeviceTotalMem_v2)(&mut memory_bytes, device) };
    opening("cuDeviceTotalMem", code)?;
    Ok(Attributes {
        name: String::from_utf8_lossy(name).into_owned(),
        capability: (
            get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        version,
        memory_bytes: memory_bytes as u64,
        multiprocessors: get(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_limit: get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        copy_engines: get(Attribute::CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT)?,
        integrated: get(Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0,
        pci: (
            get(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
            get(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
            get(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?,
        ),
    })
}
