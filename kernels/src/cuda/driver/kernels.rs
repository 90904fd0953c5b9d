//! Modules, their functions, and launches. The guarantee of [`super`] holds.

use super::super::args;
use super::super::error::{self, CudaError};
use super::{Driver, FunctionHandle, ModuleHandle, StreamHandle};
use cudarc::driver::sys;
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::ptr;

/// One launch, checked by the caller against the kernel.
pub(in crate::cuda) struct Launch<'a> {
    pub function: FunctionHandle,
    pub blocks: [u32; 3],
    pub threads: [u32; 3],
    pub shared_bytes: u32,
    /// One cell per parameter, its bytes first in memory.
    pub cells: &'a [u64],
}

/// What the driver says of a kernel.
pub(in crate::cuda) struct FunctionAttributes {
    pub threads_limit: u32,
    pub shared_bytes: u32,
    /// Bytes of each parameter.
    pub parameters: Vec<usize>,
}

impl Driver {
    /// Loads PTX. The error carries what the driver's compiler said.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] where the device has no room, with the bytes
    /// of the PTX: the driver does not say how many it wanted.
    pub(in crate::cuda) fn load(
        &self,
        module: &str,
        image: &CStr,
    ) -> Result<ModuleHandle, CudaError> {
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
            Err(CudaError::Api { code: error::OUT_OF_MEMORY, .. }) => {
                Err(self.out_of_memory(image.count_bytes() as u64))
            }
            Err(CudaError::Api { code, name, .. }) => {
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

    pub(in crate::cuda) fn unload(&self, module: ModuleHandle) {
        // SAFETY: made by `load`, gone after this; kernels hold their module.
        let _ = self.with_context("cuModuleUnload", || unsafe {
            (self.functions.cuModuleUnload)(module.0 as sys::CUmodule)
        });
    }

    pub(in crate::cuda) fn function(
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

    /// Brings a kernel to the device now. Drivers load lazily, at the first
    /// launch else, and may wait for the device then.
    ///
    /// # Errors
    /// As [`Driver::load`].
    pub(in crate::cuda) fn load_function(&self, function: FunctionHandle) -> Result<(), CudaError> {
        // SAFETY: a function of a module that the caller holds.
        let loaded = self.with_context("cuFuncLoad", || unsafe {
            (self.functions.cuFuncLoad)(function.0 as sys::CUfunction)
        });
        match loaded {
            Err(CudaError::Api { code: error::OUT_OF_MEMORY, .. }) => Err(self.out_of_memory(0)),
            loaded => loaded,
        }
    }

    pub(in crate::cuda) fn function_attributes(
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
            shared_bytes: get(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
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
        while ends < 2 && sizes.len() <= args::MOST {
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
    pub(in crate::cuda) fn allow_shared(
        &self,
        function: FunctionHandle,
        bytes: u32,
    ) -> Result<(), CudaError> {
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

    pub(in crate::cuda) fn launch(
        &self,
        launch: &Launch<'_>,
        stream: &StreamHandle,
    ) -> Result<(), CudaError> {
        let mut pointers: [*mut c_void; args::MOST] = [ptr::null_mut(); args::MOST];
        for (pointer, cell) in pointers.iter_mut().zip(launch.cells) {
            *pointer = ptr::from_ref(cell).cast_mut().cast();
        }
        let ([x, y, z], [a, b, c]) = (launch.blocks, launch.threads);
        // SAFETY: a live function and stream; `Stream::launch` has compared
        // number and sizes of the cells with the kernel's parameters; the
        // driver copies them before it returns. A kernel can write wherever
        // its arguments point, page-locked memory of the host included (one
        // address space): relied on are the launchers of this crate, which
        // compare every size with the spans that they pass, and the kernels,
        // each of whose accesses the stand-in checks in the tests.
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
