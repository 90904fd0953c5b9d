//! What `pregate doctor` says of CUDA: no driver, one that is too old, no
//! device, or the devices.

use super::{Finding, State};
use crate::output::bytes;
use pregate_kernels::cuda::{CudaError, Device, DeviceInfo, DeviceOptions};
use serde::Serialize;
use std::{fs, path::Path};

/// A device, for `--json`.
#[derive(Clone, Debug, Serialize)]
pub struct Gpu {
    pub ordinal: usize,
    pub name: String,
    /// "8.9".
    pub compute_capability: String,
    pub memory_bytes: u64,
    /// `null` where the driver does not say.
    pub free_bytes: Option<u64>,
    pub multiprocessors: u32,
    /// The CUDA version that the driver supports, "12.4".
    pub driver: String,
    /// Where it is plugged in.
    pub pci: String,
    /// The link to the host; `null` where the system does not say.
    pub link: Option<String>,
}

/// Every device, and a finding for each, or for why there is none.
pub fn look() -> (Vec<Gpu>, Vec<Finding>) {
    let (mut gpus, mut findings) = (Vec::new(), Vec::new());
    for ordinal in 0.. {
        match Device::open(ordinal, &DeviceOptions::default()) {
            Ok(device) => {
                let link = link(Path::new("/sys/bus/pci/devices"), &device.info().pci);
                let free = device.memory().ok().map(|(free, _)| free);
                let gpu = gpu(device.info(), free, link);
                findings.push(present(&gpu));
                gpus.push(gpu);
            }
            Err(CudaError::NoSuchDevice { devices, .. }) if ordinal >= devices => break,
            Err(error) => {
                findings.push(failed(&error));
                // Another device may be well, where this one is only unfit.
                if !matches!(error, CudaError::Unsupported { .. } | CudaError::OutOfMemory { .. }) {
                    break;
                }
            }
        }
    }
    (gpus, findings)
}

fn gpu(info: &DeviceInfo, free_bytes: Option<u64>, link: Option<String>) -> Gpu {
    let (major, minor) = info.compute_capability;
    Gpu {
        ordinal: info.ordinal,
        name: info.name.clone(),
        compute_capability: format!("{major}.{minor}"),
        memory_bytes: info.memory_bytes,
        free_bytes,
        multiprocessors: info.multiprocessors,
        driver: info.driver_version.to_string(),
        pci: info.pci.clone(),
        link,
    }
}

fn present(gpu: &Gpu) -> Finding {
    let free = gpu.free_bytes.map(|free| format!(" ({} free)", bytes(free))).unwrap_or_default();
    let link = gpu.link.as_deref().unwrap_or("of unknown speed");
    let found = format!(
        "{}: {}, {}{free}, compute capability {}, {} multiprocessors, driver for CUDA {}, link {link}",
        gpu.ordinal,
        gpu.name,
        bytes(gpu.memory_bytes),
        gpu.compute_capability,
        gpu.multiprocessors,
        gpu.driver
    );
    Finding::new("gpu", State::Note, found)
        .next("used with --device cuda; the GPU path was never tried on one")
}

/// The messages say what to do.
fn failed(error: &CudaError) -> Finding {
    Finding::new("gpu", State::Note, error.to_string())
}

/// "16.0 GT/s PCIe x16 (of 32.0 GT/s PCIe x16)", as Linux says. Idle devices
/// may say less than they reach.
fn link(devices: &Path, pci: &str) -> Option<String> {
    let folder = devices.join(pci);
    let read = |name: &str| {
        let text = fs::read_to_string(folder.join(name)).ok()?;
        Some(text.trim().to_string())
    };
    let of = |which: &str| {
        let (speed, width) = (format!("{which}_link_speed"), format!("{which}_link_width"));
        Some(format!("{} x{}", read(&speed)?, read(&width)?))
    };
    let now = of("current")?;
    Some(match of("max") {
        Some(most) if most != now => format!("{now} (of {most})"),
        _ => now,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pregate_kernels::cuda::Version;

    #[test]
    fn a_device_is_told_with_its_link() {
        let folder = tempfile::tempdir().unwrap();
        let device = folder.path().join("0000:65:00.0");
        fs::create_dir(&device).unwrap();
        let write = |name: &str, text: &str| fs::write(device.join(name), text).unwrap();
        assert_eq!(link(folder.path(), "0000:65:00.0"), None);
        write("current_link_speed", "8.0 GT/s PCIe\n");
        write("current_link_width", "8\n");
        assert_eq!(link(folder.path(), "0000:65:00.0").as_deref(), Some("8.0 GT/s PCIe x8"));
        write("max_link_speed", "16.0 GT/s PCIe\n");
        write("max_link_width", "16\n");
        let link = link(folder.path(), "0000:65:00.0");
        assert_eq!(link.as_deref(), Some("8.0 GT/s PCIe x8 (of 16.0 GT/s PCIe x16)"));
        let info = DeviceInfo {
            ordinal: 0,
            name: "RTX".to_string(),
            compute_capability: (8, 9),
            driver_version: Version(12_040),
            memory_bytes: 24_000_000_000,
            multiprocessors: 128,
            shared_bytes_limit: 101_376,
            copy_engines: 2,
            integrated: false,
            pci: "0000:65:00.0".to_string(),
        };
        let found = present(&gpu(&info, Some(23_000_000_000), link)).found;
        for words in ["RTX, 24.0 GB (23.0 GB free)", "capability 8.9", "CUDA 12.4", "(of 16.0 GT/s"]
        {
            assert!(found.contains(words), "{found}");
        }
    }

    #[test]
    fn failures_say_what_to_do_and_harm_nothing() {
        let old = CudaError::OldDriver { found: Version(11_080), needed: Version(12_040) };
        for (error, words) in [
            (CudaError::NoDriver, "install"),
            (old, "550"),
            (CudaError::NoDevice, "nvidia-smi"),
            (CudaError::AfterResume, "nvidia_uvm"),
        ] {
            let finding = failed(&error);
            assert_eq!(finding.state, State::Note, "{error}");
            assert!(finding.found.contains(words), "{error}");
        }
    }
}
