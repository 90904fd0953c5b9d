//! Finding the driver and a device. The guarantee of [`super`] holds.

use super::super::error::{CudaError, LOWEST_CAPABILITY, LOWEST_VERSION, Version};
use super::super::functions::{self, Functions, Missing};
use super::Driver;
use super::waiting::PATIENCE_MS;
use cudarc::driver::sys;
use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Mutex, OnceLock};

/// Numbers of a device that never change.
pub(in crate::cuda) struct Attributes {
    pub name: String,
    pub capability: (u32, u32),
    pub version: Version,
    pub memory_bytes: u64,
    pub multiprocessors: u32,
    pub shared_bytes_limit: u32,
    pub copy_engines: u32,
    pub integrated: bool,
    pub has_watchdog: bool,
    /// Domain, bus, device.
    pub pci: (u32, u32, u32),
}

impl Driver {
    /// Loads the driver, checks what it is, and makes GPU `ordinal`'s context.
    pub(in crate::cuda) fn open(ordinal: usize) -> Result<(Self, Attributes), CudaError> {
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
        let (captures, streams) = (AtomicUsize::new(0), Mutex::default());
        let patience_ms = AtomicU64::new(PATIENCE_MS);
        let driver =
            Self { functions, device, context, sticky, calls, captures, streams, patience_ms };
        Ok((driver, attributes))
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
        has_watchdog: get(Attribute::CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT)? != 0,
        pci: (
            get(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
            get(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
            get(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?,
        ),
    })
}
