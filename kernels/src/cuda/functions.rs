//! The functions of the CUDA driver that are used, found in the library that
//! `cudarc` has loaded.
//!
//! They are `cudarc`'s bindings but for two things: a function that the
//! library lacks is an error here, not a panic; and a result is a number, so
//! that a newer driver's codes are numbers as well and not values outside an
//! enumeration.

use cudarc::driver::sys;
use std::ffi::{c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};

/// What is not on this machine.
pub(super) enum Missing {
    Library,
    Function(&'static str),
}

/// The CUDA version of a driver that lacks a function: which is why, if it is
/// an old one. 0 if it does not say.
pub(super) fn version() -> u32 {
    type Get = unsafe extern "C" fn(*mut c_int) -> u32;
    let mut version: c_int = 0;
    // SAFETY: as in `Functions::load`, which has found the library; pointer
    // to a local.
    unsafe {
        if let Ok(get) = sys::culib().get::<Get>(b"cuDriverGetVersion\0") {
            get(&mut version);
        }
    }
    u32::try_from(version).unwrap_or(0)
}

macro_rules! functions {
    ($(fn $name:ident($($argument:ty),*);)*) => {
        /// Pointers to the driver's functions, by their names.
        #[allow(non_snake_case)]
        pub(super) struct Functions {
            $(pub $name: unsafe extern "C" fn($($argument),*) -> u32,)*
        }

        impl Functions {
            pub fn load() -> Result<Self, Missing> {
                // SAFETY: loads libcuda, whose initialisers are the driver's
                // own; asking for it panics where it is not, so the question
                // comes first.
                let library = unsafe {
                    if !sys::is_culib_present() {
                        return Err(Missing::Library);
                    }
                    sys::culib()
                };
                // SAFETY: the names are those of the CUDA driver API, and so
                // are the types: `sys` declares each function like this, with
                // an enumeration of four bytes in the place of the `u32`. The
                // library is never unloaded.
                unsafe {
                    Ok(Self {
                        $($name: *library
                            .get(concat!(stringify!($name), "\0").as_bytes())
                            .map_err(|_| Missing::Function(stringify!($name)))?,)*
                    })
                }
            }
        }

        /// The types above are those that `cudarc` declares.
        #[cfg(test)]
        #[allow(dead_code)]
        fn types_are_those_of_the_bindings() {
            $(let _: unsafe fn($($argument),*) -> sys::CUresult = sys::$name;)*
        }
    };
}

functions! {
    fn cuCtxGetCurrent(*mut sys::CUcontext);
    fn cuCtxGetStreamPriorityRange(*mut c_int, *mut c_int);
    fn cuCtxSetCurrent(sys::CUcontext);
    fn cuDeviceGet(*mut sys::CUdevice, c_int);
    fn cuDeviceGetAttribute(*mut c_int, sys::CUdevice_attribute, sys::CUdevice);
    fn cuDeviceGetCount(*mut c_int);
    fn cuDeviceGetName(*mut c_char, c_int, sys::CUdevice);
    fn cuDevicePrimaryCtxGetState(sys::CUdevice, *mut c_uint, *mut c_int);
    fn cuDevicePrimaryCtxRelease_v2(sys::CUdevice);
    fn cuDevicePrimaryCtxRetain(*mut sys::CUcontext, sys::CUdevice);
    fn cuDeviceTotalMem_v2(*mut usize, sys::CUdevice);
    fn cuDriverGetVersion(*mut c_int);
    fn cuEventCreate(*mut sys::CUevent, c_uint);
    fn cuEventDestroy_v2(sys::CUevent);
    fn cuEventElapsedTime(*mut f32, sys::CUevent, sys::CUevent);
    fn cuEventQuery(sys::CUevent);
    fn cuEventRecord(sys::CUevent, sys::CUstream);
    fn cuFuncGetAttribute(*mut c_int, sys::CUfunction_attribute, sys::CUfunction);
    fn cuFuncGetParamInfo(sys::CUfunction, usize, *mut usize, *mut usize);
    fn cuFuncLoad(sys::CUfunction);
    fn cuFuncSetAttribute(sys::CUfunction, sys::CUfunction_attribute, c_int);
    fn cuGraphDestroy(sys::CUgraph);
    fn cuGraphExecDestroy(sys::CUgraphExec);
    fn cuGraphInstantiateWithFlags(*mut sys::CUgraphExec, sys::CUgraph, c_ulonglong);
    fn cuGraphLaunch(sys::CUgraphExec, sys::CUstream);
    fn cuInit(c_uint);
    fn cuLaunchKernel(sys::CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, sys::CUstream, *mut *mut c_void, *mut *mut c_void);
    fn cuMemAlloc_v2(*mut sys::CUdeviceptr, usize);
    fn cuMemFreeHost(*mut c_void);
    fn cuMemFree_v2(sys::CUdeviceptr);
    fn cuMemGetInfo_v2(*mut usize, *mut usize);
    fn cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    fn cuMemHostGetDevicePointer_v2(*mut sys::CUdeviceptr, *mut c_void, c_uint);
    fn cuMemcpyDtoDAsync_v2(sys::CUdeviceptr, sys::CUdeviceptr, usize, sys::CUstream);
    fn cuMemcpyDtoHAsync_v2(*mut c_void, sys::CUdeviceptr, usize, sys::CUstream);
    fn cuMemcpyHtoDAsync_v2(sys::CUdeviceptr, *const c_void, usize, sys::CUstream);
    fn cuMemsetD32Async(sys::CUdeviceptr, c_uint, usize, sys::CUstream);
    fn cuMemsetD8Async(sys::CUdeviceptr, c_uchar, usize, sys::CUstream);
    fn cuModuleGetFunction(*mut sys::CUfunction, sys::CUmodule, *const c_char);
    fn cuModuleLoadDataEx(*mut sys::CUmodule, *const c_void, c_uint, *mut sys::CUjit_option, *mut *mut c_void);
    fn cuModuleUnload(sys::CUmodule);
    fn cuStreamBeginCapture_v2(sys::CUstream, sys::CUstreamCaptureMode);
    fn cuStreamCreateWithPriority(*mut sys::CUstream, c_uint, c_int);
    fn cuStreamDestroy_v2(sys::CUstream);
    fn cuStreamEndCapture(sys::CUstream, *mut sys::CUgraph);
    fn cuStreamQuery(sys::CUstream);
    fn cuStreamSynchronize(sys::CUstream);
    fn cuStreamWaitEvent(sys::CUstream, sys::CUevent, c_uint);
    fn cuThreadExchangeStreamCaptureMode(*mut sys::CUstreamCaptureMode);
}
