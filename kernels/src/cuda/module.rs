//! Kernels: which PTX a device gets, loaded once per file of `kernels/cuda`.

use super::args::Args;
use super::compile;
use super::device::DeviceInfo;
use super::driver::{Driver, FunctionAttributes, FunctionHandle, ModuleHandle};
use super::error::CudaError;
use super::kernel_table::{KernelName, KernelTable};
use super::stream::Grid;
use flate2::read::ZlibDecoder;
use std::collections::HashMap;
use std::ffi::CString;
use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
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

/// Module, target and text (zlib, RFC 1950) of every file of `kernels/ptx`.
static BUILT_IN: &[(&str, u32, &[u8])] = include!(concat!(env!("OUT_DIR"), "/ptx.rs"));

/// All modules that a device has loaded.
pub(super) struct ModuleCache {
    source: Modules,
    target: u32,
    shared_bytes_limit: u32,
    modules: Mutex<HashMap<String, Loaded>>,
    /// The kernels of all modules that were asked for.
    table: KernelTable,
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

/// A function that a device can run, as `Device::kernel` finds it.
#[derive(Clone)]
pub(super) struct Kernel(Arc<Entry>);

struct Entry {
    module: Arc<Module>,
    module_name: String,
    name: String,
    function: FunctionHandle,
    attributes: FunctionAttributes,
    /// Of a block, static and dynamic together.
    shared_bytes_limit: u32,
    /// Launches may ask for all of it.
    is_shared_allowed: AtomicBool,
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
            table: KernelTable::new(),
        }
    }

    /// A kernel, loaded on first use, and found without a lock after that.
    pub fn kernel(&self, driver: &Arc<Driver>, name: KernelName<'_>) -> Result<Kernel, CudaError> {
        if let Some(kernel) = self.table.find(name) {
            return Ok(kernel.clone());
        }
        let kernel = self.find(driver, name.module, &name.pieces.concat())?;
        self.table.keep(name, &kernel);
        Ok(kernel)
    }

    fn find(&self, driver: &Arc<Driver>, module: &str, name: &str) -> Result<Kernel, CudaError> {
        let bad = |problem: String| CudaError::BadModule { module: module.to_string(), problem };
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = self.loaded(&mut modules, driver, module)?;
        if let Some(kernel) = loaded.kernels.get(name) {
            return Ok(kernel.clone());
        }
        let handle = loaded.module.handle.as_ref();
        let handle = handle.ok_or_else(|| bad("is being unloaded".to_string()))?;
        let name_bytes = CString::new(name).map_err(|error| bad(error.to_string()))?;
        let (function, attributes) = driver.beside_captures(|| {
            let function = driver.function(handle, &name_bytes).map_err(|error| match error {
                CudaError::Api { code: NOT_FOUND, .. } => bad(format!("has no kernel {name}")),
                error => error,
            })?;
            driver.load_function(function)?;
            Ok((function, driver.function_attributes(function)?))
        })?;
        let kernel = Kernel(Arc::new(Entry {
            module: loaded.module.clone(),
            module_name: module.to_string(),
            name: name.to_string(),
            function,
            attributes,
            shared_bytes_limit: self.shared_bytes_limit,
            is_shared_allowed: AtomicBool::new(false),
        }));
        loaded.kernels.insert(name.to_string(), kernel.clone());
        Ok(kernel)
    }

    /// Loads a module if it is not.
    pub fn load(&self, driver: &Arc<Driver>, module: &str) -> Result<(), CudaError> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        self.loaded(&mut modules, driver, module).map(drop)
    }

    fn loaded<'a>(
        &self,
        modules: &'a mut HashMap<String, Loaded>,
        driver: &Arc<Driver>,
        module: &str,
    ) -> Result<&'a mut Loaded, CudaError> {
        if !modules.contains_key(module) {
            let image = self.image(module)?;
            let handle = driver.beside_captures(|| driver.load(module, &image))?;
            let handle = Module { driver: driver.clone(), handle: Some(handle) };
            let loaded = Loaded { module: Arc::new(handle), kernels: HashMap::new() };
            modules.insert(module.to_string(), loaded);
        }
        let (module, problem) = (module.to_string(), "is not loaded".to_string());
        modules.get_mut(&module).ok_or(CudaError::BadModule { module, problem })
    }

    /// What the driver is given to load.
    fn image(&self, module: &str) -> Result<CString, CudaError> {
        let bad = |problem: String| CudaError::BadModule { module: module.to_string(), problem };
        let text = match &self.source {
            Modules::BuiltIn => built_in(module, self.target).map_err(bad)?,
            Modules::Compile { sources, cache } => {
                compile::ptx(module, self.target, sources, cache.as_deref())?
            }
            Modules::Named => module.to_string(),
        };
        CString::new(text).map_err(|error| bad(error.to_string()))
    }
}

const NOT_FOUND: u32 = 500;

/// The PTX of a module for a target.
fn built_in(module: &str, target: u32) -> Result<String, String> {
    let wanted = |(name, of, _): &&(&str, u32, &[u8])| *name == module && *of == target;
    let found = BUILT_IN.iter().find(wanted);
    let (_, _, packed) =
        found.ok_or_else(|| format!("no PTX for compute_{target} is in this program"))?;
    let mut text = String::new();
    let read = ZlibDecoder::new(*packed).read_to_string(&mut text);
    read.map_err(|error| format!("its PTX cannot be unpacked: {error}"))?;
    Ok(text)
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
    pub(super) fn function(&self) -> FunctionHandle {
        self.0.function
    }

    pub(super) fn name(&self) -> &str {
        &self.0.name
    }

    /// Of the file of `kernels/cuda`.
    pub(super) fn module_name(&self) -> &str {
        &self.0.module_name
    }

    pub(super) fn is_same(&self, other: &Kernel) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Refuses a launch that the kernel cannot take.
    pub(super) fn check(
        &self,
        driver: &Arc<Driver>,
        grid: Grid,
        args: &Args,
    ) -> Result<(), CudaError> {
        let Entry { name, attributes, module, .. } = &*self.0;
        if !Arc::ptr_eq(driver, &module.driver) {
            return Err(CudaError::shape("launch", format!("{name} is of another device")));
        }
        fits(name, attributes, grid, args)?;
        self.allow_shared(driver, grid.shared_bytes)
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
        // One value for all launches: of two threads that ask for different ones
        // the last would win, and the other's launch fail.
        if !self.0.is_shared_allowed.load(Ordering::Relaxed) {
            driver.allow_shared(self.0.function, limit - attributes.shared_bytes)?;
            self.0.is_shared_allowed.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Refuses arguments that are not those of a kernel, and a grid that it cannot
/// be launched with on any device.
fn fits(
    name: &str,
    attributes: &FunctionAttributes,
    grid: Grid,
    args: &Args,
) -> Result<(), CudaError> {
    let fail = |problem: String| Err(CudaError::shape("launch", problem));
    let FunctionAttributes { parameters, threads_limit: limit, .. } = attributes;
    if !args.sizes().eq(parameters.iter().copied()) {
        let given: Vec<usize> = args.sizes().collect();
        return fail(format!("{name} takes parameters of {parameters:?} bytes, not {given:?}"));
    }
    let Grid { blocks, threads, .. } = grid;
    let count = threads.iter().try_fold(1u32, |product, n| product.checked_mul(*n));
    if !count.is_some_and(|count| (1..=*limit).contains(&count)) {
        return fail(format!("{name} in blocks of {threads:?} threads; 1 to {limit} allowed"));
    }
    let [x, y, z] = blocks;
    if x == 0 || x > i32::MAX as u32 || [y, z].iter().any(|n| !(1..=0xffff).contains(n)) {
        return fail(format!("{name} in a grid of {blocks:?} blocks"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel of two pointers, a u64 and an i32.
    fn kernel() -> FunctionAttributes {
        let parameters = vec![8, 8, 8, 4];
        FunctionAttributes { threads_limit: 256, shared_bytes: 0, parameters }
    }

    fn args() -> Args {
        Args::new().address(16).address(32).u64(1).i32(2)
    }

    #[test]
    fn arguments_of_other_number_or_size_are_refused() {
        let grid = Grid::new(1, 256);
        assert!(fits("k", &kernel(), grid, &args()).is_ok());
        let short = Args::new().address(16).address(32).u64(1);
        let narrow = Args::new().address(16).address(32).i32(1).i32(2);
        let wide = Args::new().address(16).address(32).u64(1).u64(2);
        for wrong in [Args::new(), short, narrow, wide, args().f32(0.0)] {
            let error = fits("k", &kernel(), grid, &wrong).unwrap_err();
            assert!(matches!(error, CudaError::Shape { .. }), "{error}");
        }
    }

    #[test]
    fn grids_that_no_device_takes_are_refused() {
        let grid = |blocks, threads| Grid { blocks, threads, shared_bytes: 0 };
        for right in [grid([1, 1, 1], [16, 16, 1]), grid([i32::MAX as u32, 0xffff, 1], [1, 1, 1])] {
            assert!(fits("k", &kernel(), right, &args()).is_ok(), "{right:?}");
        }
        for wrong in [
            grid([0, 1, 1], [256, 1, 1]),
            grid([1, 0x10000, 1], [256, 1, 1]),
            grid([1, 1, 0], [256, 1, 1]),
            grid([1, 1, 1], [0, 1, 1]),
            grid([1, 1, 1], [257, 1, 1]),
            grid([1, 1, 1], [128, 3, 1]),
            grid([1, 1, 1], [0x10000, 0x10000, 1]),
            grid([u32::MAX, 1, 1], [1, 1, 1]),
        ] {
            let error = fits("k", &kernel(), wrong, &args()).unwrap_err();
            assert!(matches!(error, CudaError::Shape { .. }), "{error}");
        }
    }
}
