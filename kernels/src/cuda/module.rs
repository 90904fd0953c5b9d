//! Kernels: which PTX a device gets, loaded once per file of `kernels/cuda`.

use super::args::Args;
use super::compile;
use super::device::DeviceInfo;
use super::driver::{Driver, FunctionAttributes, FunctionHandle, ModuleHandle};
use super::error::CudaError;
use super::stream::Grid;
use std::collections::HashMap;
use std::ffi::CString;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Where kernels come from.
#[derive(Clone, Debug, Default)]
pub enum Modules {
    /// The PTX of `kernels/ptx`, which is part of the program.
    #[default]
    BuiltIn,
    /// For developers: the sources in a folder, compiled by NVRTC when they
    /// are first needed.
    Compile {
        /// With `<module>.cu` and the headers.
        sources: PathBuf,
        /// Where the PTX is kept, under everything that it depends on; `None`:
        /// nowhere.
        cache: Option<PathBuf>,
    },
    /// For the stand-in driver of the tests, which has the kernels: a module's
    /// name in the place of its PTX.
    #[doc(hidden)]
    Named,
}

/// The compute capabilities, times ten, that PTX is made for.
const TARGETS: [u32; 2] = [80, 75];

/// Module, target and text of every file of `kernels/ptx`.
static BUILT_IN: &[(&str, u32, &str)] = include!(concat!(env!("OUT_DIR"), "/ptx.rs"));

/// All modules that a device has loaded.
pub(super) struct ModuleCache {
    source: Modules,
    target: u32,
    shared_bytes_limit: u32,
    modules: Mutex<HashMap<String, Loaded>>,
}

struct Loaded {
    module: Arc<Module>,
    kernels: HashMap<String, Kernel>,
}

struct Module {
    driver: Arc<Driver>,
    /// Taken by `drop`.
    handle: Option<ModuleHandle>,
}

impl Drop for Module {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            self.driver.unload(handle);
        }
    }
}

/// A function that a device can run, as [`super::Device::kernel`] finds it.
#[derive(Clone)]
pub struct Kernel(Arc<Entry>);

struct Entry {
    module: Arc<Module>,
    name: String,
    function: FunctionHandle,
    attributes: FunctionAttributes,
    /// Of a block, static and dynamic together.
    shared_bytes_limit: u32,
    /// Dynamic shared memory that launches may ask for so far.
    shared_bytes_allowed: AtomicU32,
}

/// Shared memory of a block that needs no permission.
const SHARED_BYTES: u32 = 48 << 10;

impl ModuleCache {
    pub fn new(source: Modules, info: &DeviceInfo) -> Self {
        let (major, minor) = info.compute_capability;
        let capability = 10 * major + minor;
        let target = TARGETS.into_iter().find(|target| *target <= capability);
        Self {
            source,
            target: target.unwrap_or(TARGETS[TARGETS.len() - 1]),
            shared_bytes_limit: info.shared_bytes_limit,
            modules: Mutex::default(),
        }
    }

    /// Kernel `name` of `module`, loaded on first use.
    pub fn kernel(
        &self,
        driver: &Arc<Driver>,
        module: &str,
        name: &str,
    ) -> Result<Kernel, CudaError> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if !modules.contains_key(module) {
            let handle = driver.load(module, &self.image(module)?)?;
            let handle = Module { driver: driver.clone(), handle: Some(handle) };
            let loaded = Loaded { module: Arc::new(handle), kernels: HashMap::new() };
            modules.insert(module.to_string(), loaded);
        }
        let bad = |problem: String| CudaError::BadModule { module: module.to_string(), problem };
        let loaded = modules.get_mut(module).ok_or_else(|| bad("is not loaded".to_string()))?;
        if let Some(kernel) = loaded.kernels.get(name) {
            return Ok(kernel.clone());
        }
        let handle = loaded.module.handle.as_ref();
        let handle = handle.ok_or_else(|| bad("is being unloaded".to_string()))?;
        let name_bytes = CString::new(name).map_err(|error| bad(error.to_string()))?;
        let function = driver.function(handle, &name_bytes).map_err(|error| match error {
            CudaError::Api { code: NOT_FOUND, .. } => bad(format!("has no kernel {name}")),
            error => error,
        })?;
        let kernel = Kernel(Arc::new(Entry {
            module: loaded.module.clone(),
            name: name.to_string(),
            function,
            attributes: driver.function_attributes(function)?,
            shared_bytes_limit: self.shared_bytes_limit,
            shared_bytes_allowed: AtomicU32::new(0),
        }));
        loaded.kernels.insert(name.to_string(), kernel.clone());
        Ok(kernel)
    }

    /// What the driver is given to load.
    fn image(&self, module: &str) -> Result<CString, CudaError> {
        let bad = |problem: String| CudaError::BadModule { module: module.to_string(), problem };
        let text = match &self.source {
            Modules::BuiltIn => built_in(module, self.target)
                .ok_or_else(|| {
                    bad(format!("no PTX for compute_{} is in this program", self.target))
                })?
                .to_string(),
            Modules::Compile { sources, cache } => {
                compile::ptx(module, self.target, sources, cache.as_deref())?
            }
            Modules::Named => module.to_string(),
        };
        CString::new(text).map_err(|error| bad(error.to_string()))
    }
}

const NOT_FOUND: u32 = 500;

fn built_in(module: &str, target: u32) -> Option<&'static str> {
    let wanted = |(name, of, _): &&(&str, u32, &str)| *name == module && *of == target;
    BUILT_IN.iter().find(wanted).map(|(_, _, text)| *text)
}

/// Names of the modules whose PTX is part of the program.
pub fn built_in_modules() -> Vec<&'static str> {
    let mut names: Vec<_> = BUILT_IN.iter().map(|(name, _, _)| *name).collect();
    names.sort_unstable();
    names.dedup();
    names
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kernel({})", self.0.name)
    }
}

impl Kernel {
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Registers of a thread.
    pub fn registers(&self) -> u32 {
        self.0.attributes.registers
    }

    /// Local memory of a thread in bytes: more than none means spills, or
    /// arrays that are indexed at run time.
    pub fn local_bytes(&self) -> u32 {
        self.0.attributes.local_bytes
    }

    /// Static shared memory of a block in bytes.
    pub fn shared_bytes(&self) -> u32 {
        self.0.attributes.shared_bytes
    }

    /// Threads that a block may have.
    pub fn threads_limit(&self) -> u32 {
        self.0.attributes.threads_limit
    }

    pub(super) fn function(&self) -> FunctionHandle {
        self.0.function
    }

    /// Refuses a launch that the kernel cannot take.
    pub(super) fn check(
        &self,
        driver: &Arc<Driver>,
        grid: Grid,
        args: &Args,
    ) -> Result<(), CudaError> {
        let fail = |problem: String| Err(CudaError::shape("launch", problem));
        let Entry { name, attributes, .. } = &*self.0;
        if !Arc::ptr_eq(driver, &self.0.module.driver) {
            return fail(format!("{name} is of another device"));
        }
        if !args.sizes().eq(attributes.parameters.iter().copied()) {
            let given: Vec<usize> = args.sizes().collect();
            let wanted = &attributes.parameters;
            return fail(format!("{name} takes parameters of {wanted:?} bytes, not {given:?}"));
        }
        let Grid { blocks, threads, shared_bytes } = grid;
        let count = threads.iter().try_fold(1u32, |product, n| product.checked_mul(*n));
        if !count.is_some_and(|count| (1..=attributes.threads_limit).contains(&count)) {
            let limit = attributes.threads_limit;
            return fail(format!("{name} in blocks of {threads:?} threads; 1 to {limit} allowed"));
        }
        let [x, y, z] = blocks;
        if x == 0 || x > i32::MAX as u32 || [y, z].iter().any(|n| !(1..=0xffff).contains(n)) {
            return fail(format!("{name} in a grid of {blocks:?} blocks"));
        }
        self.allow_shared(driver, shared_bytes)
    }

    /// Asks for more dynamic shared memory than every launch may have.
    fn allow_shared(&self, driver: &Arc<Driver>, bytes: u32) -> Result<(), CudaError> {
        let Entry { name, attributes, shared_bytes_limit: limit, .. } = &*self.0;
        let total = u64::from(bytes) + u64::from(attributes.shared_bytes);
        if total <= u64::from(SHARED_BYTES) {
            return Ok(());
        }
        if total > u64::from(*limit) {
            return Err(CudaError::unsupported(format!(
                "{name} needs {total} bytes of shared memory in a block, the device has {limit}"
            )));
        }
        if self.0.shared_bytes_allowed.load(Ordering::Relaxed) < bytes {
            driver.allow_shared(self.0.function, bytes)?;
            self.0.shared_bytes_allowed.fetch_max(bytes, Ordering::Relaxed);
        }
        Ok(())
    }
}
