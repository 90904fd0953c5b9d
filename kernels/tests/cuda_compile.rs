//! The developer's option: kernels compiled at run time, over the stand-in.
//! Where there is no NVRTC, that is said; with `PREGATE_REQUIRE_NVRTC=1`, as in
//! `.ci/run`, it must be there.

use pregate_kernels::cuda::{CudaError, Device, DeviceOptions, Modules, probe_copy};
use pregate_standin::testing;
use std::fs;
use std::path::{Path, PathBuf};

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda")
}

/// Copies a few bytes with a kernel that was compiled from `sources`.
fn copy(sources: &Path, cache: &Path) -> Result<Device, CudaError> {
    let modules = Modules::Compile { sources: sources.into(), cache: Some(cache.into()) };
    let device = Device::open(0, &DeviceOptions { modules })?;
    let arena = device.arena(256)?;
    let (from, to) = (arena.take(48, 16)?, arena.take(48, 16)?);
    let bytes: Vec<u8> = (1..=48).collect();
    device.compute().upload(&from, &bytes)?;
    probe_copy(&device, device.compute(), 1, &from, &to)?;
    let mut copied = [0; 48];
    device.compute().download(&to, &mut copied)?;
    assert_eq!(copied[..], bytes);
    Ok(device)
}

/// What NVRTC makes, or `None`: there is none.
fn with_nvrtc<T>(result: Result<T, CudaError>) -> Option<Result<T, CudaError>> {
    let absent = matches!(&result, Err(CudaError::BadModule { problem, .. })
        if problem.starts_with("NVRTC (libnvrtc.so.12) is not on this machine"));
    let is_required = std::env::var_os("PREGATE_REQUIRE_NVRTC").is_some_and(|value| value == "1");
    assert!(!(absent && is_required), "PREGATE_REQUIRE_NVRTC=1, and there is no NVRTC");
    if absent {
        println!("not run: no NVRTC");
        return None;
    }
    Some(result)
}

fn only_file(folder: &Path) -> PathBuf {
    let files: Vec<_> = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    let [file] = &files[..] else { panic!("{files:?}") };
    file.clone()
}

#[test]
fn a_kernel_compiled_at_run_time_is_the_one_of_the_program_and_is_kept() {
    if testing::standin().is_none() {
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let Some(device) = with_nvrtc(copy(&sources(), cache.path())) else { return };
    let (major, minor) = device.unwrap().info().compute_capability;
    let target = if (major, minor) < (8, 0) { 75 } else { 80 };
    let kept = only_file(cache.path());
    let text = fs::read_to_string(&kept).unwrap();
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("ptx/probe.sm{target}.ptx"));
    let ours = fs::read_to_string(ours).unwrap();
    assert!(text.contains(ours.trim()), "{} differs from the PTX checked in", kept.display());

    // What was kept is what the driver is given.
    copy(&sources(), cache.path()).unwrap();
    fs::write(&kept, text.replace(".version", ".versiom")).unwrap();
    let error = copy(&sources(), cache.path()).unwrap_err();
    assert!(matches!(error, CudaError::BadModule { .. }), "{error}");
    // And only while it is whole.
    fs::write(&kept, &text[..text.len() / 2]).unwrap();
    copy(&sources(), cache.path()).unwrap();
    assert_eq!(fs::read_to_string(&kept).unwrap(), text);
}

#[test]
fn what_nvrtc_says_of_a_source_is_told() {
    if testing::standin().is_none() {
        return;
    }
    let (folder, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(folder.path().join("probe.cu"), "// A comment.\nextern \"C\" what;\n").unwrap();
    let Some(result) = with_nvrtc(copy(folder.path(), cache.path())) else { return };
    let words = result.unwrap_err().to_string();
    assert!(words.contains("probe.cu(2): error") && words.contains("what"), "{words}");
    assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
}
