//! The developer's option: kernels compiled from their sources at run time by
//! NVRTC, NVIDIA's compiler as a library, with a cache on disk.
//!
//! Guarantee that the `unsafe` blocks rely on: the library was found, and a
//! program is destroyed once, by [`Program`].

use super::error::CudaError;
use cudarc::nvrtc::sys;
use std::ffi::{CStr, CString, c_char, c_int};
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr;

/// As `cargo xtask ptx` compiles, but for the target and the headers' place.
/// Nothing may be fused or approximated that the source does not fuse.
const OPTIONS: &str = include_str!("../../cuda/options.txt");

/// The PTX of `<sources>/<module>.cu` for a compute capability (times ten).
pub(super) fn ptx(
    module: &str,
    target: u32,
    sources: &Path,
    cache: Option<&Path>,
) -> Result<String, CudaError> {
    let bad = |problem: String| CudaError::BadModule { module: module.to_string(), problem };
    // SAFETY: loads NVRTC, whose initialisers are NVIDIA's own.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        let problem = "NVRTC (libnvrtc.so.12) is not on this machine: install it, or use the \
                       kernels that are part of the program";
        return Err(bad(problem.to_string()));
    }
    let (mut major, mut minor): (c_int, c_int) = (0, 0);
    // SAFETY: the library is there; pointers to locals.
    check("nvrtcVersion", unsafe { sys::nvrtcVersion(&mut major, &mut minor) }).map_err(bad)?;
    let mut options: Vec<String> = OPTIONS.split_whitespace().map(str::to_string).collect();
    options.push(format!("--gpu-architecture=compute_{target}"));
    let key = key(module, sources, &options, &format!("{major}.{minor}")).map_err(bad)?;
    let place = cache.map(|folder| folder.join(file_name(module, target, &key)));
    if let Some(text) = place.as_deref().and_then(|place| stored(place, &key)) {
        return Ok(text);
    }
    options.push(format!("--include-path={}", sources.display()));
    let source = read(&sources.join(format!("{module}.cu"))).map_err(bad)?;
    let text = compile(module, &source, &options).map_err(bad)?;
    if let Some(place) = place {
        store(&place, &key, &text)
            .map_err(|error| bad(format!("cannot keep its PTX in {}: {error}", place.display())))?;
    }
    Ok(text)
}

/// Everything that the PTX depends on: compiler, options, and every source.
fn key(module: &str, sources: &Path, options: &[String], version: &str) -> Result<String, String> {
    let mut key = format!("module {module}\nNVRTC {version}\n{}\n", options.join(" "));
    let entries = fs::read_dir(sources).map_err(|e| format!("{}: {e}", sources.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    files.retain(|file| {
        let header = file.extension().is_some_and(|e| e == "cuh" || e == "h");
        header || file.file_name().is_some_and(|name| *name == *format!("{module}.cu"))
    });
    files.sort();
    for file in files {
        let text = read(&file)?;
        key += &format!("file {:?} {}\n{text}\n", file.file_name(), text.len());
    }
    Ok(key)
}

fn read(file: &Path) -> Result<String, String> {
    fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))
}

/// A name that differs where keys do; the file itself holds the whole key.
fn file_name(module: &str, target: u32, key: &str) -> String {
    // FNV-1a, 64 bits.
    let hash = key.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("{module}.sm{target}.{hash:016x}.ptx")
}

/// What the cache has for exactly this key.
fn stored(place: &Path, key: &str) -> Option<String> {
    let text = fs::read_to_string(place).ok()?;
    let ptx = text.strip_prefix(key)?.strip_prefix(DIVIDER)?.strip_suffix(END)?;
    Some(ptx.to_string())
}

const DIVIDER: &str = "\n==== PTX ====\n";
/// Tells a whole file from one that a crash or a full disk cut off.
const END: &str = "\n==== END ====\n";

/// Writes beside the place and renames, so that other processes see all or
/// nothing.
fn store(place: &Path, key: &str, ptx: &str) -> std::io::Result<()> {
    if let Some(folder) = place.parent() {
        fs::create_dir_all(folder)?;
    }
    let beside = place.with_extension(format!("{}.part", std::process::id()));
    fs::write(&beside, format!("{key}{DIVIDER}{ptx}{END}"))?;
    fs::rename(&beside, place)
}

struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by `compile`, and destroyed only here.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn compile(module: &str, source: &str, options: &[String]) -> Result<String, String> {
    let name = CString::new(format!("{module}.cu")).map_err(|error| error.to_string())?;
    let source = CString::new(source).map_err(|error| error.to_string())?;
    let options = options.iter().map(|option| CString::new(option.as_str()));
    let options = options.collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut program = Program(ptr::null_mut());
    // SAFETY: strings that end with a zero byte; no headers; pointer to a
    // local. A failed call leaves the null pointer, which may be destroyed.
    check("nvrtcCreateProgram", unsafe {
        sys::nvrtcCreateProgram(
            &mut program.0,
            source.as_ptr(),
            name.as_ptr(),
            0,
            ptr::null(),
            ptr::null(),
        )
    })?;
    // SAFETY: a live program, and as many options as the count says.
    let compiled = check("nvrtcCompileProgram", unsafe {
        sys::nvrtcCompileProgram(program.0, options.len() as c_int, options.as_ptr())
    });
    // SAFETY: live programs and local buffers of the size that was asked for.
    let log = text(
        |size| unsafe { sys::nvrtcGetProgramLogSize(program.0, size) },
        |buffer| unsafe { sys::nvrtcGetProgramLog(program.0, buffer) },
    );
    compiled.map_err(|error| format!("{error}: {}", log.unwrap_or_default().trim()))?;
    // SAFETY: as above.
    text(
        |size| unsafe { sys::nvrtcGetPTXSize(program.0, size) },
        |buffer| unsafe { sys::nvrtcGetPTX(program.0, buffer) },
    )
}

/// A text of NVRTC, which tells its size, with the zero byte, first.
fn text(
    size: impl FnOnce(*mut usize) -> sys::nvrtcResult,
    fill: impl FnOnce(*mut c_char) -> sys::nvrtcResult,
) -> Result<String, String> {
    let mut bytes = 0usize;
    check("nvrtcGetSize", size(&mut bytes))?;
    let mut buffer = vec![0u8; bytes + 1];
    check("nvrtcGetText", fill(buffer.as_mut_ptr().cast()))?;
    let text = CStr::from_bytes_until_nul(&buffer).map_err(|error| error.to_string())?;
    text.to_str().map(ToString::to_string).map_err(|error| error.to_string())
}

fn check(call: &str, result: sys::nvrtcResult) -> Result<(), String> {
    match result {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok(()),
        error => Err(format!("{call}: {error:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let name = format!("pregate-compile-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn the_cache_answers_only_for_what_it_was_made_from() {
        let folder = scratch("cache");
        fs::write(folder.join("a.cu"), "one").unwrap();
        fs::write(folder.join("common.cuh"), "two").unwrap();
        fs::write(folder.join("b.cu"), "three").unwrap();
        let options = ["-x".to_string()];
        let of = |module: &str, version: &str| key(module, &folder, &options, version).unwrap();
        let first = of("a", "12.4");
        let place = folder.join(file_name("a", 80, &first));
        store(&place, &first, "ptx").unwrap();
        assert_eq!(stored(&place, &first).as_deref(), Some("ptx"));

        // Another module's source does not matter; compiler, headers and the
        // source itself do, also where names of files collide.
        fs::write(folder.join("b.cu"), "four").unwrap();
        assert_eq!(of("a", "12.4"), first);
        assert_eq!(stored(&place, &of("a", "12.9")), None);
        fs::write(folder.join("common.cuh"), "2").unwrap();
        let second = of("a", "12.4");
        assert_eq!(stored(&place, &second), None);
        assert_ne!(file_name("a", 80, &first), file_name("a", 80, &second));

        // A file that was cut off is none.
        let whole = fs::read_to_string(&place).unwrap();
        fs::write(&place, &whole[..whole.len() - 3]).unwrap();
        assert_eq!(stored(&place, &first), None);
        fs::remove_dir_all(folder).unwrap();
    }
}
