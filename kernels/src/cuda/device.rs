//! A GPU: one context, a stream for computing and one for copies.

use super::driver::{CallersContext, Driver};
use super::error::{CudaError, Version};
use super::gate::{Entered, Gate};
use super::kernel_table::KernelName;
use super::mapped::Mapped;
use super::memory::{Arena, Pinned};
use super::module::{Kernel, ModuleCache, Modules};
use super::stream::{Events, Stream};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

const BESIDE_A_WATCHDOG: Duration = Duration::from_secs(1);

/// How a device is opened.
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    pub modules: Modules,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    pub ordinal: usize,
    pub name: String,
    /// Major, minor.
    pub compute_capability: (u32, u32),
    /// The CUDA version that the driver supports.
    pub driver_version: Version,
    pub memory_bytes: u64,
    pub multiprocessors: u32,
    /// Shared memory that a block may have when it asks.
    pub shared_bytes_limit: u32,
    /// Copies that run beside kernels.
    pub copy_engines: u32,
    /// It shares the machine's memory.
    pub integrated: bool,
    /// The system ends kernels that run for seconds: a screen hangs on it.
    pub has_watchdog: bool,
    /// Where it is, as `/sys/bus/pci/devices` and `nvidia-smi` write it:
    /// `0000:65:00.0`.
    pub pci: String,
}

/// A GPU that is open. Clones are the same device.
///
/// Everything made from it keeps its context alive. After a sticky error
/// ([`CudaError::is_sticky`]) every method answers with that error and calls
/// the driver no more; destructors leave to the end of the process what they
/// would free.
///
/// Calls leave the device's context current on their thread, as the driver has
/// it. Opening a device, dropping the last of its clones, and [`Device::enter`]
/// give the thread back the one that it had.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    info: DeviceInfo,
    gate: Arc<Gate>,
    // In the order of dropping: what is in the context before the driver.
    modules: ModuleCache,
    compute: Stream,
    copy: Stream,
    visits: Stream,
    events: Arc<Events>,
    driver: Arc<Driver>,
    /// Set while all fields above are dropped.
    leaving: Option<CallersContext>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.leaving = Some(CallersContext::of(&self.driver));
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0.info, f)
    }
}

impl DeviceInfo {
    /// For people: "CUDA, NVIDIA GeForce RTX 3060, 12.0 GiB, compute capability
    /// 8.6".
    pub fn describe(&self) -> String {
        let (major, minor) = self.compute_capability;
        let gib = self.memory_bytes as f64 / (1u64 << 30) as f64;
        format!("CUDA, {}, {gib:.1} GiB, compute capability {major}.{minor}", self.name)
    }
}

impl Device {
    /// Opens GPU `ordinal`, counted from 0 in the driver's order. Once in a
    /// process, and cloned for every model: what is opened apart knows nothing of
    /// who has entered ([`Device::enter`]), and has the same context.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::OldDriver`],
    /// [`CudaError::DriverMismatch`], [`CudaError::NoDevice`],
    /// [`CudaError::NoSuchDevice`], [`CudaError::AfterResume`],
    /// [`CudaError::Unsupported`] for a GPU older than Turing, and the
    /// driver's own.
    pub fn open(ordinal: usize, options: &DeviceOptions) -> Result<Self, CudaError> {
        let (driver, attributes) = Driver::open(ordinal)?;
        let driver = Arc::new(driver);
        let _context = CallersContext::of(&driver);
        let (domain, bus, slot) = attributes.pci;
        let info = DeviceInfo {
            ordinal,
            name: attributes.name,
            compute_capability: attributes.capability,
            driver_version: attributes.version,
            memory_bytes: attributes.memory_bytes,
            multiprocessors: attributes.multiprocessors,
            shared_bytes_limit: attributes.shared_bytes_limit,
            copy_engines: attributes.copy_engines,
            integrated: attributes.integrated,
            has_watchdog: attributes.has_watchdog,
            pci: format!("{domain:04x}:{bus:02x}:{slot:02x}.0"),
        };
        let events = Events::new(&driver);
        // Copies wait for the link, not for multiprocessors: what little the
        // copy stream computes goes first.
        let compute = Stream::new(&driver, &events, false)?;
        let copy = Stream::new(&driver, &events, true)?;
        let visits = Stream::new(&driver, &events, true)?;
        let modules = ModuleCache::new(options.modules.clone(), &info);
        let gate = Arc::default();
        let leaving = None;
        let inner = Inner { info, gate, modules, compute, copy, visits, events, driver, leaving };
        Ok(Self(Arc::new(inner)))
    }

    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// Waits until nobody is at the device. For whoever launches, takes or frees
    /// memory, or loads kernels while others may be computing: models are loaded
    /// and dropped so, and sessions made, dropped, and computed with. Who is at
    /// the device already would wait for ever.
    ///
    /// A context of the caller's own that is current on this thread has to live
    /// until what is answered here is dropped, which makes it current again.
    pub fn enter(&self) -> Entered {
        self.enter_unless(&|| false).unwrap_or_else(|| unreachable!("nothing ends the wait"))
    }

    /// [`Device::enter`]; `None`: `is_over` ended the wait.
    pub fn enter_unless(&self, is_over: &dyn Fn() -> bool) -> Option<Entered> {
        let inside = self.0.gate.enter_unless(is_over)?;
        Some(Entered::new(&self.0.driver, inside))
    }

    /// The stream of kernels.
    pub fn compute(&self) -> &Stream {
        &self.0.compute
    }

    /// The stream of copies that run beside them.
    pub fn copy(&self) -> &Stream {
        &self.0.copy
    }

    /// The stream of what the host and a layer tell each other, which must not
    /// queue behind experts on [`Device::copy`].
    pub fn visits(&self) -> &Stream {
        &self.0.visits
    }

    /// One more stream, of the priority of [`Device::compute`].
    pub fn stream(&self) -> Result<Stream, CudaError> {
        Stream::new(&self.0.driver, &self.0.events, false)
    }

    /// Allocates device memory; contents are unspecified.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], and the driver's.
    pub fn arena(&self, bytes: usize) -> Result<Arena, CudaError> {
        Arena::new(&self.0.driver, bytes)
    }

    /// Allocates page-locked host memory; contents are unspecified.
    ///
    /// # Errors
    /// [`CudaError::OutOfPinned`], and the driver's.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned, CudaError> {
        Pinned::new(&self.0.driver, bytes)
    }

    /// Allocates page-locked host memory that kernels and the host use at the
    /// same time; all zeros.
    ///
    /// # Errors
    /// [`CudaError::OutOfPinned`], and the driver's.
    pub fn mapped(&self, bytes: usize) -> Result<Mapped, CudaError> {
        Mapped::new(&self.0.driver, bytes)
    }

    /// A kernel of `kernels/cuda/<module>.cu`, whose name is `pieces` one
    /// behind the other; its module is loaded when it is first asked for.
    ///
    /// # Errors
    /// [`CudaError::BadModule`] when there is no such module or kernel, or the
    /// driver does not take it.
    pub(super) fn kernel(&self, module: &str, pieces: &[&str]) -> Result<Kernel, CudaError> {
        self.0.modules.kernel(&self.0.driver, KernelName { module, pieces })
    }

    /// Loads `kernels/cuda/<module>.cu` now: a driver that has not seen its PTX
    /// compiles it first, which takes seconds. [`super::built_in_modules`]
    /// lists all.
    ///
    /// # Errors
    /// [`CudaError::BadModule`] when there is no such module, or the driver
    /// does not take it.
    pub fn load_module(&self, module: &str) -> Result<(), CudaError> {
        self.0.modules.load(&self.0.driver, module)
    }

    /// How long the device may take for what somebody waits for, before it is
    /// given up ([`CudaError::Hung`]): 30 s, unless
    /// [`Device::set_patience`] says otherwise.
    pub fn patience(&self) -> Duration {
        self.0.driver.patience()
    }

    /// How long a kernel may wait for the host: as long, but where a watchdog
    /// ends kernels ([`DeviceInfo::has_watchdog`]; the shortest has two
    /// seconds) no longer than one.
    pub fn kernel_patience(&self) -> Duration {
        let most = if self.0.info.has_watchdog { BESIDE_A_WATCHDOG } else { Duration::MAX };
        self.patience().min(most)
    }

    pub fn set_patience(&self, patience: Duration) {
        self.0.driver.set_patience(patience);
    }

    /// Ends the use of the device, for whoever waits by questions of their own
    /// and has waited for longer than [`Device::patience`]: `at` has not ended
    /// in that time. The answer is the error that every call has from now on.
    pub fn give_up(&self, at: &'static str) -> CudaError {
        self.0.driver.give_up(at, self.patience())
    }

    /// Free and total device memory in bytes, as the driver sees them now.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.0.driver.memory()
    }

    /// The sticky error that ended the use of this device, if one did. Makes
    /// no call.
    pub fn failure(&self) -> Option<CudaError> {
        self.0.driver.healthy().err()
    }

    /// Calls of the driver that were made for this device.
    pub fn driver_calls(&self) -> u64 {
        self.0.driver.calls()
    }
}
