//! The loaded library and its functions.
//!
//! Guarantee that the `unsafe` blocks rely on: the library is the one that
//! `build.rs` has made, whose functions have the types below
//! (`driver/control.cpp`), take zero-terminated text, lock for themselves, and
//! stay loaded until the process ends.

use libc::{c_char, c_int, c_void};
use std::ffi::{CStr, CString};
use std::mem;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

type Control = unsafe extern "C" fn(*const c_char) -> c_int;
type Count = unsafe extern "C" fn(*const c_char) -> u64;
type Violation = unsafe extern "C" fn(u64, *mut c_char, u64) -> u64;
type Kernels = unsafe extern "C" fn(*mut c_char, u64) -> u64;

pub struct Library {
    control: Control,
    count: Count,
    violation: Violation,
    kernels: Kernels,
}

fn loader_error() -> String {
    // SAFETY: called after a failed dlopen or dlsym on this thread; the text
    // stays until the next call.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "the loader gives no reason".to_string();
    }
    // SAFETY: not null, and zero-terminated text of the loader.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

impl Library {
    /// Loads the library for the whole process: its name (SONAME) is the first
    /// that cudarc asks for, so that cudarc gets this one.
    pub fn open(path: &Path) -> Result<Self, String> {
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
        // SAFETY: a path; the library's initialisers register kernels.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        if handle.is_null() {
            return Err(format!("the stand-in driver cannot be loaded: {}", loader_error()));
        }
        let find = |name: &CStr| {
            // SAFETY: a handle of dlopen, which is never closed.
            let symbol: *mut c_void = unsafe { libc::dlsym(handle, name.as_ptr()) };
            if symbol.is_null() { Err(loader_error()) } else { Ok(symbol) }
        };
        // SAFETY: the functions have these types; see above.
        unsafe {
            Ok(Self {
                control: mem::transmute::<*mut c_void, Control>(find(c"pregate_standin_control")?),
                count: mem::transmute::<*mut c_void, Count>(find(c"pregate_standin_count")?),
                violation: mem::transmute::<*mut c_void, Violation>(find(
                    c"pregate_standin_violation",
                )?),
                kernels: mem::transmute::<*mut c_void, Kernels>(find(c"pregate_standin_kernels")?),
            })
        }
    }

    /// Whether the library knows the line.
    pub fn control(&self, line: &str) -> bool {
        let Ok(line) = CString::new(line) else {
            return false;
        };
        // SAFETY: zero-terminated text.
        unsafe { (self.control)(line.as_ptr()) == 0 }
    }

    pub fn count(&self, what: &str) -> u64 {
        let Ok(what) = CString::new(what) else {
            return 0;
        };
        // SAFETY: zero-terminated text.
        unsafe { (self.count)(what.as_ptr()) }
    }

    pub fn violation(&self, index: u64) -> String {
        // SAFETY: `text` passes a buffer of the length that it names, or none.
        text(|out, bytes| unsafe { (self.violation)(index, out, bytes) })
    }

    pub fn kernels(&self) -> String {
        // SAFETY: as above.
        text(|out, bytes| unsafe { (self.kernels)(out, bytes) })
    }
}

/// The text of a function that answers its length, and writes as much of it as
/// fits.
fn text(read: impl Fn(*mut c_char, u64) -> u64) -> String {
    let bytes = read(ptr::null_mut(), 0);
    let mut buffer = vec![0u8; bytes as usize + 1];
    read(buffer.as_mut_ptr().cast(), bytes + 1);
    let end = buffer.iter().position(|byte| *byte == 0).unwrap_or(buffer.len());
    String::from_utf8_lossy(&buffer[..end]).into_owned()
}
