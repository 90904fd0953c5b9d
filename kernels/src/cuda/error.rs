//! What can go wrong with a CUDA device, and which of it is final.
//!
//! The driver's codes fall in three classes. Those of opening a device have a
//! message each that says what the user can do. Most others are ordinary
//! errors: the call had no effect. The sticky ones say that the context is
//! gone: nothing that was asked of it before can be trusted, every further
//! call fails alike, and only a new process gets a working one. After a sticky
//! error no call is made any more (`driver.rs` keeps that), also not by
//! destructors.
//!
//! Source of the codes: `CUresult` in the CUDA driver API's reference.

use std::fmt;
use thiserror::Error;

/// The oldest CUDA version that a driver must support: the checked-in PTX is
/// of ISA 8.4. Driver 550 is the first with it.
pub const LOWEST_VERSION: Version = Version(12_040);

/// The lowest compute capability: the checked-in PTX is for 7.5 (Turing).
pub const LOWEST_CAPABILITY: (u32, u32) = (7, 5);

/// A CUDA version as the driver counts them: `1000 * major + 10 * minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// Why the device did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no libcuda on this machine, or only the toolkit's stub of it.
    #[error(
        "no CUDA driver on this machine (libcuda.so.1, nvcuda.dll): install NVIDIA's driver 550 \
         or newer, or run on the CPU"
    )]
    NoDriver,

    /// libcuda lacks a function of its API.
    #[error(
        "the CUDA driver has no {function}, which every driver since 550 has: install NVIDIA's \
         driver again"
    )]
    IncompleteDriver { function: &'static str },

    /// The driver cannot read the kernels.
    #[error(
        "the CUDA driver is too old: it supports CUDA {found}, {needed} is needed; install \
         NVIDIA's driver 550 or newer"
    )]
    OldDriver { found: Version, needed: Version },

    /// The parts of the driver do not fit together (`cuInit` returned 803 or
    /// 804): mostly after an update without a restart.
    #[error(
        "the CUDA library and the kernel's driver are of different versions ({code} {name}): \
         restart the machine, or install the driver again"
    )]
    DriverMismatch { code: u32, name: &'static str },

    /// The driver is there and sees no GPU.
    #[error(
        "the CUDA driver sees no GPU: look at the output of nvidia-smi and at \
         CUDA_VISIBLE_DEVICES, or run on the CPU"
    )]
    NoDevice,

    /// There are GPUs, but not this one.
    #[error("there is no GPU {ordinal}: the driver sees {devices}, counted from 0")]
    NoSuchDevice { ordinal: usize, devices: usize },

    /// Device memory. Not sticky: it may be asked for again.
    #[error(
        "the GPU has not enough free memory: {} MiB were asked for, {} MiB are free",
        needed.div_ceil(1 << 20), free >> 20
    )]
    OutOfMemory {
        /// In bytes.
        needed: u64,
        /// In bytes, at the time of the error.
        free: u64,
    },

    /// Page-locked host memory. Systems limit it (WSL, Windows, `ulimit -l`).
    #[error(
        "the system refuses {} MiB of page-locked memory ({code} {name}): ask for less",
        needed.div_ceil(1 << 20)
    )]
    OutOfPinned {
        /// In bytes.
        needed: u64,
        code: u32,
        name: &'static str,
    },

    /// The driver answers 999 from the start.
    #[error(
        "the CUDA driver does not work (999 CUDA_ERROR_UNKNOWN), as happens after the machine \
         was suspended: reload its module (rmmod nvidia_uvm; modprobe nvidia_uvm) or restart the \
         machine"
    )]
    AfterResume,

    /// The context is gone; only a new process gets a working one.
    #[error(
        "the GPU failed: {code} {name}, {} {at}{}; end this program and start it again, and look for \
         \"Xid\" in the kernel's log (dmesg) if that does not help",
        if *delayed { "caused by earlier work and seen by" } else { "at" },
        if *code == 999 { " (after a suspended machine resumed, reload nvidia_uvm first)" } else { "" }
    )]
    Sticky {
        code: u32,
        name: &'static str,
        /// The driver's function that returned it.
        at: &'static str,
        /// The code tells of something that the device did while it worked:
        /// the cause is work that was submitted before this call.
        delayed: bool,
    },

    /// Work on the device has not ended for so long that it never will.
    /// Sticky.
    #[error(
        "the GPU has not finished {at} for {seconds} s: look for \"Xid\" in the kernel's log \
         (dmesg), then end this program and start it again"
    )]
    Hung { at: &'static str, seconds: u64 },

    /// A kernel has waited for the host for longer than it may. Nothing is
    /// lost but what was being computed.
    #[error(
        "the GPU has waited {seconds} s for the processor and gave {what} up; was this program or \
         machine stopped meanwhile? If not, look for \"Xid\" in the kernel's log (dmesg)"
    )]
    Late { what: &'static str, seconds: u64 },

    /// An ordinary error of one call, which had no effect.
    #[error("{call} failed: {code} {name}")]
    Api { call: &'static str, code: u32, name: &'static str },

    /// Kernels that the driver does not take, or a kernel that is not there.
    #[error("CUDA module {module}: {problem}")]
    BadModule { module: String, problem: String },

    /// The device cannot do what is asked.
    #[error("the GPU cannot do this: {what}")]
    Unsupported { what: String },

    /// Sizes of a call that do not fit together: a mistake of the caller.
    #[error("{call}: {problem}")]
    Shape { call: &'static str, problem: String },
}

impl CudaError {
    /// The error of a launcher whose arguments do not fit together.
    pub fn shape(call: &'static str, problem: impl Into<String>) -> Self {
        Self::Shape { call, problem: problem.into() }
    }

    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into() }
    }

    /// Whether the context is gone: no CUDA call is made after this error.
    pub fn is_sticky(&self) -> bool {
        matches!(self, Self::Sticky { .. } | Self::Hung { .. })
    }

    /// The error for the code that `call` returned; not for success.
    pub(super) fn of_call(call: &'static str, code: u32) -> Self {
        let name = name(code);
        match class(code) {
            Class::Ordinary => Self::Api { call, code, name },
            Class::Final => Self::Sticky { code, name, at: call, delayed: false },
            Class::Asynchronous => Self::Sticky { code, name, at: call, delayed: true },
        }
    }

    /// The error for a code that a call returned while the device was being
    /// opened, where several codes have another meaning than later.
    pub(super) fn of_opening(call: &'static str, code: u32, driver: Version) -> Self {
        match code {
            STUB_LIBRARY => Self::NoDriver,
            INSUFFICIENT_DRIVER => Self::OldDriver { found: driver, needed: LOWEST_VERSION },
            NO_DEVICE => Self::NoDevice,
            DRIVER_MISMATCH | COMPAT_NOT_SUPPORTED => {
                Self::DriverMismatch { code, name: name(code) }
            }
            UNKNOWN => Self::AfterResume,
            code => Self::of_call(call, code),
        }
    }
}

pub(super) const INVALID_VALUE: u32 = 1;
pub(super) const OUT_OF_MEMORY: u32 = 2;
pub(super) const NOT_READY: u32 = 600;
const STUB_LIBRARY: u32 = 34;
const INSUFFICIENT_DRIVER: u32 = 35;
const NO_DEVICE: u32 = 100;
const DRIVER_MISMATCH: u32 = 803;
const COMPAT_NOT_SUPPORTED: u32 = 804;
const UNKNOWN: u32 = 999;

/// What a code says about the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// The call had no effect; the next may work.
    Ordinary,
    /// The context or the driver is gone.
    Final,
    /// As `Final`; something failed on the device while it worked, so this
    /// call is not the one that caused it.
    Asynchronous,
}

fn class(code: u32) -> Class {
    match code {
        // Uncorrectable memory or NVLink errors; illegal addresses,
        // time-outs, assertions, traps, misaligned accesses, wrong address
        // spaces and program counters, launches that failed; errors that the
        // device contained; leaked tensor memory.
        214 | 220 | 226 | 700 | 702 | 710 | 714..=719 | 721 => Class::Asynchronous,
        // The driver is shutting down; the context was destroyed; nobody
        // knows.
        4 | 709 | UNKNOWN => Class::Final,
        _ => Class::Ordinary,
    }
}

/// The name of a code, without asking the driver (which must not be asked
/// any more after a sticky error).
pub(super) fn name(code: u32) -> &'static str {
    match code {
        0 => "CUDA_SUCCESS",
        1 => "CUDA_ERROR_INVALID_VALUE",
        2 => "CUDA_ERROR_OUT_OF_MEMORY",
        3 => "CUDA_ERROR_NOT_INITIALIZED",
        4 => "CUDA_ERROR_DEINITIALIZED",
        34 => "CUDA_ERROR_STUB_LIBRARY",
        35 => "CUDA_ERROR_INSUFFICIENT_DRIVER",
        46 => "CUDA_ERROR_DEVICE_UNAVAILABLE",
        100 => "CUDA_ERROR_NO_DEVICE",
        101 => "CUDA_ERROR_INVALID_DEVICE",
        200 => "CUDA_ERROR_INVALID_IMAGE",
        201 => "CUDA_ERROR_INVALID_CONTEXT",
        209 => "CUDA_ERROR_NO_BINARY_FOR_GPU",
        214 => "CUDA_ERROR_ECC_UNCORRECTABLE",
        215 => "CUDA_ERROR_UNSUPPORTED_LIMIT",
        218 => "CUDA_ERROR_INVALID_PTX",
        220 => "CUDA_ERROR_NVLINK_UNCORRECTABLE",
        221 => "CUDA_ERROR_JIT_COMPILER_NOT_FOUND",
        222 => "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        223 => "CUDA_ERROR_JIT_COMPILATION_DISABLED",
        226 => "CUDA_ERROR_CONTAINED",
        300 => "CUDA_ERROR_INVALID_SOURCE",
        301 => "CUDA_ERROR_FILE_NOT_FOUND",
        304 => "CUDA_ERROR_OPERATING_SYSTEM",
        400 => "CUDA_ERROR_INVALID_HANDLE",
        401 => "CUDA_ERROR_ILLEGAL_STATE",
        500 => "CUDA_ERROR_NOT_FOUND",
        600 => "CUDA_ERROR_NOT_READY",
        700 => "CUDA_ERROR_ILLEGAL_ADDRESS",
        701 => "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
        702 => "CUDA_ERROR_LAUNCH_TIMEOUT",
        709 => "CUDA_ERROR_CONTEXT_IS_DESTROYED",
        710 => "CUDA_ERROR_ASSERT",
        712 => "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
        713 => "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
        714 => "CUDA_ERROR_HARDWARE_STACK_ERROR",
        715 => "CUDA_ERROR_ILLEGAL_INSTRUCTION",
        716 => "CUDA_ERROR_MISALIGNED_ADDRESS",
        717 => "CUDA_ERROR_INVALID_ADDRESS_SPACE",
        718 => "CUDA_ERROR_INVALID_PC",
        719 => "CUDA_ERROR_LAUNCH_FAILED",
        720 => "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE",
        721 => "CUDA_ERROR_TENSOR_MEMORY_LEAK",
        800 => "CUDA_ERROR_NOT_PERMITTED",
        801 => "CUDA_ERROR_NOT_SUPPORTED",
        802 => "CUDA_ERROR_SYSTEM_NOT_READY",
        803 => "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        804 => "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
        900..=908 => "CUDA_ERROR_STREAM_CAPTURE",
        999 => "CUDA_ERROR_UNKNOWN",
        _ => "unknown code",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sticky_codes_are_told_from_ordinary_ones() {
        for code in [214, 700, 710, 714, 716, 719, 999] {
            assert!(CudaError::of_call("cuStreamSynchronize", code).is_sticky(), "{code}");
        }
        // Out of memory, a missing image, a wrong value, an unfinished event:
        // the next call may work.
        for code in [1, 2, 100, 209, 500, 600, 701, 801] {
            assert!(!CudaError::of_call("cuMemAlloc", code).is_sticky(), "{code}");
        }
    }

    #[test]
    fn asynchronous_errors_do_not_blame_the_call_that_saw_them() {
        let error = CudaError::of_call("cuMemcpyHtoDAsync", 700);
        assert!(matches!(error, CudaError::Sticky { delayed: true, .. }));
        let text = error.to_string();
        assert!(text.contains("caused by earlier work and seen by cuMemcpyHtoDAsync"), "{text}");
        let error = CudaError::of_call("cuMemcpyHtoDAsync", 999);
        assert!(matches!(error, CudaError::Sticky { delayed: false, .. }));
        assert!(error.to_string().contains("nvidia_uvm"), "{error}");
    }

    #[test]
    fn failures_of_opening_have_a_message_each() {
        let of = |code| CudaError::of_opening("cuInit", code, Version(11_080));
        let all = [of(34), of(35), of(100), of(803), of(999), of(46)];
        for (i, a) in all.iter().enumerate() {
            for b in &all[i + 1..] {
                assert_ne!(a.to_string(), b.to_string());
            }
        }
        assert_eq!(of(35), CudaError::OldDriver { found: Version(11_080), needed: LOWEST_VERSION });
        assert!(of(35).to_string().contains("CUDA 11.8, 12.4 is needed"), "{}", of(35));
    }
}
