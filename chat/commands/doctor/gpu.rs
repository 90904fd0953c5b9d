//! What `pregate doctor` says of CUDA: no driver, one that is too old, no
//! device, or the devices.

use super::{
    Finding, Measuring, State,
    pci::{self, Links},
};
use crate::{
    bandwidth, device,
    expert_speed::{self, Experts, USUAL},
    link_speed::{self, LinkSpeed},
    output::bytes,
};
use pregate_kernels::cuda::{CudaError, Device, DeviceInfo, DeviceOptions};
use serde::Serialize;
use std::path::Path;

/// Where Linux tells of devices.
const PCI_DEVICES: &str = "/sys/bus/pci/devices";

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
    /// The link to the host, read while it was in use if it was measured;
    /// `null` where the system does not say.
    pub link: Option<Links>,
    /// Kernels that run for seconds are ended: a screen hangs on it.
    pub has_watchdog: bool,
    /// The tests' stand-in, whose times mean nothing.
    pub is_standin: bool,
    /// `null` where it was not measured.
    pub speed: Option<Speed>,
}

/// What a GPU and the host reach, GB/s and microseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Speed {
    /// The GPU reading its own memory.
    pub read_gb_s: f64,
    #[serde(flatten)]
    pub link: LinkSpeed,
}

impl Speed {
    fn measure(device: &Device, with: &Measuring) -> Result<Self, CudaError> {
        let read_gb_s = bandwidth::gpu_read_gb_s(device)?;
        let at_once = expert_speed::AT_ONCE;
        let mut experts = Experts::new(USUAL, with.pool.bytes(), at_once)
            .expect("the pool holds so many of the usual experts");
        let link = link_speed::measure(device, &with.cpu, &mut experts, at_once)?;
        Ok(Self { read_gb_s, link })
    }

    fn words(&self) -> String {
        let LinkSpeed { pinned_gb_s, pin_refused, pageable_gb_s, copy_us, visit_us, both } =
            &self.link;
        let pinned = match (pinned_gb_s, pin_refused) {
            (Some(gb_s), _) => format!("{gb_s:.1} GB/s from page-locked memory"),
            (None, Some(why)) => format!("no page-locked memory ({why})"),
            (None, None) => "no page-locked memory".to_string(),
        };
        format!(
            "reads {:.1} GB/s; copies to it: {pinned}, {pageable_gb_s:.1} from other; \
             {copy_us:.0} us for a small one, {visit_us:.0} for an empty kernel; at once: experts \
             on the processor {:.1}, copies {:.1} GB/s",
            self.read_gb_s, both.cpu_gb_s, both.link_gb_s
        )
    }
}

/// Every device, and a finding for each, or for why there is none.
pub fn look(with: Option<&Measuring>) -> (Vec<Gpu>, Vec<Finding>) {
    let (mut gpus, mut findings) = (Vec::new(), Vec::new());
    for ordinal in 0.. {
        match Device::open(ordinal, &DeviceOptions::default()) {
            Ok(device) => {
                let speed = with.map(|with| Speed::measure(&device, with)).transpose();
                let link = Links::of(Path::new(PCI_DEVICES), &device.info().pci);
                let free = device.memory().ok().map(|(free, _)| free);
                let mut gpu = gpu(device.info(), free, link);
                findings.push(present(&gpu));
                match speed {
                    Ok(speed) => gpu.speed = speed,
                    Err(error) => findings.push(failed(&error)),
                }
                findings.extend(gpu.speed.as_ref().map(|speed| measured(&gpu, speed)));
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
    if gpus.is_empty() {
        findings.extend(without_driver(Path::new(PCI_DEVICES)));
    }
    (gpus, findings)
}

/// GPUs that are there although CUDA has none.
fn without_driver(devices: &Path) -> Vec<Finding> {
    let found = |pci: String| {
        let link = Links::of(devices, &pci).map(|links| format!(", {}", links.words()));
        let found = format!("one of NVIDIA's is plugged in at {pci}{}", link.unwrap_or_default());
        Finding::new("gpu", State::Note, found).next("with its driver it could be used")
    };
    pci::nvidia(devices).into_iter().map(found).collect()
}

fn measured(gpu: &Gpu, speed: &Speed) -> Finding {
    let words = speed.words();
    match gpu.is_standin {
        true => Finding::new("link", State::Note, format!("{}: {words}", gpu.ordinal))
            .next("a stand-in for a GPU: its times mean nothing"),
        false => Finding::new("link", State::Ok, format!("{}: {words}", gpu.ordinal)),
    }
}

fn gpu(info: &DeviceInfo, free_bytes: Option<u64>, link: Option<Links>) -> Gpu {
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
        has_watchdog: info.has_watchdog,
        is_standin: device::is_standin(info),
        speed: None,
    }
}

fn present(gpu: &Gpu) -> Finding {
    let free = gpu.free_bytes.map(|free| format!(" ({} free)", bytes(free))).unwrap_or_default();
    let link = gpu.link.map_or_else(|| "link of unknown speed".to_string(), |link| link.words());
    let watchdog = match gpu.has_watchdog {
        true => ", a watchdog ends kernels that run for seconds (a screen hangs on it)",
        false => "",
    };
    let found = format!(
        "{}: {}, {}{free}, compute capability {}, {} multiprocessors, driver for CUDA {}, \
         {link}{watchdog}",
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link_speed::Both;
    use pregate_kernels::cuda::Version;
    use std::fs;

    #[test]
    fn a_device_is_told_with_its_link_and_what_it_reaches() {
        let folder = tempfile::tempdir().unwrap();
        let device = folder.path().join("0000:65:00.0");
        fs::create_dir(&device).unwrap();
        let files = [
            ("current_link_speed", "8.0 GT/s PCIe"),
            ("current_link_width", "8"),
            ("max_link_speed", "16.0 GT/s PCIe"),
            ("max_link_width", "16"),
            ("vendor", "0x10de"),
            ("class", "0x030000"),
        ];
        for (name, text) in files {
            fs::write(device.join(name), format!("{text}\n")).unwrap();
        }
        let link = Links::of(folder.path(), "0000:65:00.0");
        let absent = without_driver(folder.path());
        assert_eq!(absent.len(), 1);
        assert!(absent[0].found.contains("0000:65:00.0, PCIe 3.0 x8"), "{absent:?}");
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
            has_watchdog: true,
            pci: "0000:65:00.0".to_string(),
        };
        let gpu = gpu(&info, Some(23_000_000_000), link);
        let found = present(&gpu).found;
        let parts = ["RTX, 24.0 GB (23.0 GB free)", "capability 8.9", "CUDA 12.4", "(of PCIe 4.0"];
        assert!(found.contains("a watchdog ends kernels"), "{found}");
        let without = Gpu { has_watchdog: false, ..gpu.clone() };
        assert!(!present(&without).found.contains("watchdog"), "{without:?}");
        assert!(parts.iter().all(|words| found.contains(words)), "{found}");

        let link = LinkSpeed {
            pinned_gb_s: Some(7.1),
            pin_refused: None,
            pageable_gb_s: 4.2,
            copy_us: 12.0,
            visit_us: 8.0,
            both: Both { cpu_gb_s: 31.0, link_gb_s: 6.5 },
        };
        let speed = Speed { read_gb_s: 912.0, link };
        let found = measured(&gpu, &speed);
        assert_eq!((found.state, found.next), (State::Ok, None));
        let found = found.found;
        let parts =
            ["912.0 GB/s", "7.1 GB/s from page-locked", "4.2 from other", "31.0, copies 6.5"];
        assert!(parts.iter().all(|words| found.contains(words)), "{found}");
        let refused = Some("no more".to_string());
        let link = LinkSpeed { pinned_gb_s: None, pin_refused: refused, ..speed.link };
        let standin = Gpu { is_standin: true, ..gpu };
        let found = measured(&standin, &Speed { link, ..speed });
        assert!(found.found.contains("no page-locked memory (no more)"), "{found:?}");
        assert!(found.next.unwrap().contains("mean nothing"));
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
