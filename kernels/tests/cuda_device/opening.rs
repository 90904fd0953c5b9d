//! Opening a device: each way to have none says so in its own words.

use crate::world::{Settings, standin};
use pregate_kernels::cuda::{
    CudaError, Device, DeviceOptions, Modules, Version, built_in_modules, probe_empty,
};

fn open(ordinal: usize) -> Result<Device, CudaError> {
    Device::open(ordinal, &DeviceOptions { modules: Modules::Named })
}

/// The error of opening a device on a machine with these settings; nothing
/// stays behind.
fn refusal(settings: Settings, ordinal: usize) -> Option<CudaError> {
    let world = standin(settings)?;
    let error = open(ordinal).expect_err("this machine has no usable device");
    world.assert_nothing_alive();
    Some(error)
}

#[test]
fn every_missing_device_has_its_own_error() {
    let usual = Settings::default;
    let expected = [
        (Settings { devices: 0, ..usual() }, 0, CudaError::NoDevice),
        (Settings { init_code: 100, ..usual() }, 0, CudaError::NoDevice),
        (Settings { init_code: 34, ..usual() }, 0, CudaError::NoDriver),
        (Settings { init_code: 999, ..usual() }, 0, CudaError::AfterResume),
        (
            Settings { init_code: 803, ..usual() },
            0,
            CudaError::DriverMismatch { code: 803, name: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" },
        ),
        (
            Settings { driver_version: 12_030, ..usual() },
            0,
            CudaError::OldDriver { found: Version(12_030), needed: Version(12_040) },
        ),
        (usual(), 1, CudaError::NoSuchDevice { ordinal: 1, devices: 1 }),
    ];
    for (settings, ordinal, error) in expected {
        let Some(found) = refusal(settings, ordinal) else { return };
        assert_eq!(found, error);
    }
}

#[test]
fn a_gpu_before_turing_is_refused_by_name() {
    let settings = Settings { capability: (6, 1), ..Settings::default() };
    let Some(error) = refusal(settings, 0) else { return };
    assert!(matches!(&error, CudaError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("6.1"), "{error}");
}

#[test]
fn a_device_that_opens_tells_what_it_is_and_leaves_nothing() {
    let settings = Settings { capability: (7, 5), driver_version: 13_000, ..Settings::default() };
    let Some(world) = standin(settings) else { return };
    let device = open(0).unwrap();
    assert_eq!(device.info().compute_capability, (7, 5));
    assert_eq!(device.info().driver_version, Version(13_000));
    assert!(device.info().multiprocessors > 0);
    let (free, total) = device.memory().unwrap();
    assert!(free <= total && total == device.info().memory_bytes);
    let twin = device.clone();
    drop(device);
    twin.compute().synchronize().unwrap();
    drop(twin);
    world.assert_nothing_alive();
}

/// A program may have a context of its own on a thread, or none: it has the same
/// again.
#[test]
fn a_thread_has_its_context_back() {
    let Some(world) = standin(Settings::default()) else { return };
    let is_current = || world.count("current") == 1;
    let device = open(0).unwrap();
    assert!(!is_current(), "after opening");
    let entered = device.enter();
    let arena = device.arena(64).unwrap();
    assert!(is_current());
    drop(entered);
    assert!(!is_current(), "after leaving");
    drop(arena);
    assert!(is_current(), "a call alone");
    let again = device.enter();
    device.compute().synchronize().unwrap();
    drop(again);
    assert!(is_current(), "as it was before");
    let other = std::thread::scope(|scope| {
        let other = scope.spawn(|| (drop(device), is_current()).1);
        other.join().unwrap()
    });
    assert!(!other, "after the last clone");
    // The device's own was current on this thread: with one that retains it, it
    // stays, and goes with the last.
    let (first, last) = (open(0).unwrap(), open(0).unwrap());
    first.compute().synchronize().unwrap();
    drop(first);
    assert!(is_current(), "another device retains it");
    last.compute().synchronize().unwrap();
    drop(last);
    assert!(!is_current(), "nobody retains it");
    world.assert_nothing_alive();
}

#[test]
fn devices_may_be_opened_again_and_at_the_same_time() {
    let Some(world) = standin(Settings::default()) else { return };
    for _ in 0..3 {
        let (first, second) = (open(0).unwrap(), open(0).unwrap());
        let span = first.arena(64).unwrap().take(64, 1).unwrap();
        // Memory of one is not memory of the other.
        let error = second.compute().upload(&span, &[0; 64]).unwrap_err();
        assert!(matches!(error, CudaError::Shape { .. }), "{error}");
        first.compute().upload(&span, &[0; 64]).unwrap();
    }
    world.assert_nothing_alive();
}

/// The PTX in the program: for every device, with the parameters of the
/// sources, and taken by the oldest driver.
#[test]
fn devices_take_the_kernels_of_the_program() {
    for capability in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)] {
        let oldest = Settings { capability, driver_version: 12_040, ..Settings::default() };
        let Some(world) = standin(oldest) else { return };
        let device = Device::open(0, &DeviceOptions { modules: Modules::BuiltIn }).unwrap();
        let modules = built_in_modules();
        assert!(modules.contains(&"experts") && modules.contains(&"probe"), "{modules:?}");
        for module in &modules {
            device.load_module(module).unwrap();
        }
        let loads = world.calls_of("cuModuleLoadDataEx");
        assert_eq!(loads, modules.len() as u64, "{capability:?}");
        probe_empty(&device, device.compute()).unwrap();
        assert_eq!(world.calls_of("cuModuleLoadDataEx"), loads);
        let error = device.load_module("nothing").unwrap_err();
        assert!(error.to_string().contains("nothing"), "{error}");
    }
}
