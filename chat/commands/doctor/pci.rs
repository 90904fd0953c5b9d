//! Where GPUs are plugged in, as Linux says, with or without a driver.

use serde::Serialize;
use std::{fs, path::Path};

/// A PCI Express link.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Link {
    /// 1 to 6 and so on; 0 for a speed that is not known.
    pub generation: u32,
    pub width: u32,
    /// Of each lane.
    pub gt_s: f64,
    /// What it carries in one direction at most, GB/s.
    pub gb_s: f64,
}

/// A device's link as negotiated now, and the most that it can be. Idle
/// devices may say less than they reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Links {
    pub now: Link,
    /// `null` where the system does not say.
    pub most: Option<Link>,
}

/// Gigatransfers of each generation.
const SPEEDS: [f64; 6] = [2.5, 5.0, 8.0, 16.0, 32.0, 64.0];

impl Link {
    fn new(gt_s: f64, width: u32) -> Self {
        let generation = SPEEDS.iter().position(|speed| *speed == gt_s).map_or(0, |at| at + 1);
        // 8 of 10 bits, since generation 3 128 of 130; generation 6 has none
        // of these, but a share of each packet for correction, about as much.
        let coded = if gt_s < 8.0 { 0.8 } else { 128.0 / 130.0 };
        let gb_s = gt_s / 8.0 * coded * f64::from(width);
        Self { generation: generation as u32, width, gt_s, gb_s }
    }

    /// "PCIe 4.0 x16"
    pub fn words(&self) -> String {
        match self.generation {
            0 => format!("PCIe of {} GT/s x{}", self.gt_s, self.width),
            generation => format!("PCIe {generation}.0 x{}", self.width),
        }
    }
}

impl Links {
    /// Of the device at `pci` in `devices` (`/sys/bus/pci/devices`).
    pub fn of(devices: &Path, pci: &str) -> Option<Self> {
        let folder = devices.join(pci);
        let of = |which: &str| {
            let speed = text(&folder, &format!("{which}_link_speed"))?;
            let gt_s = speed.split_whitespace().next()?.parse::<f64>().ok()?;
            let width = text(&folder, &format!("{which}_link_width"))?.parse().ok()?;
            (gt_s.is_finite() && gt_s > 0.0 && width > 0).then(|| Link::new(gt_s, width))
        };
        Some(Self { now: of("current")?, most: of("max") })
    }

    /// "PCIe 3.0 x8, 7.9 GB/s (of PCIe 4.0 x16)"
    pub fn words(&self) -> String {
        let of = match self.most {
            Some(most) if most != self.now => format!(" (of {})", most.words()),
            _ => String::new(),
        };
        format!("{}, {:.1} GB/s{of}", self.now.words(), self.now.gb_s)
    }
}

/// NVIDIA's devices that show or compute, by their places.
pub fn nvidia(devices: &Path) -> Vec<String> {
    let Ok(folders) = fs::read_dir(devices) else { return Vec::new() };
    let is_gpu = |folder: &Path| {
        let is = |name: &str, start: &str| {
            text(folder, name).is_some_and(|found| found.starts_with(start))
        };
        // Classes: display controllers, 3D controllers among them.
        is("vendor", "0x10de") && is("class", "0x03")
    };
    let mut found: Vec<String> = folders
        .filter_map(|folder| Some(folder.ok()?.path()))
        .filter(|folder| is_gpu(folder))
        .filter_map(|folder| Some(folder.file_name()?.to_str()?.to_string()))
        .collect();
    found.sort_unstable();
    found
}

fn text(folder: &Path, name: &str) -> Option<String> {
    Some(fs::read_to_string(folder.join(name)).ok()?.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, device: &str, files: &[(&str, &str)]) {
        let device = folder.join(device);
        fs::create_dir_all(&device).unwrap();
        for (name, text) in files {
            fs::write(device.join(name), format!("{text}\n")).unwrap();
        }
    }

    #[test]
    fn a_link_has_a_generation_and_what_it_carries() {
        let folder = tempfile::tempdir().unwrap();
        let of = |device: &str| Links::of(folder.path(), device);
        assert_eq!(of("0000:65:00.0"), None);
        let now = [("current_link_speed", "8.0 GT/s PCIe"), ("current_link_width", "8")];
        write(folder.path(), "0000:65:00.0", &now);
        let links = of("0000:65:00.0").unwrap();
        assert_eq!((links.now.generation, links.now.width, links.most), (3, 8, None));
        assert!((links.now.gb_s - 7.877).abs() < 0.001, "{links:?}");
        assert_eq!(links.words(), "PCIe 3.0 x8, 7.9 GB/s");
        let most = [("max_link_speed", "16.0 GT/s PCIe"), ("max_link_width", "16")];
        write(folder.path(), "0000:65:00.0", &most);
        let words = of("0000:65:00.0").unwrap().words();
        assert_eq!(words, "PCIe 3.0 x8, 7.9 GB/s (of PCIe 4.0 x16)");
        assert_eq!(Link::new(2.5, 16).gb_s, 4.0);
        assert_eq!(Link::new(7.0, 1).words(), "PCIe of 7 GT/s x1");
        // A device that sleeps or is a virtual one.
        for (speed, width) in [("Unknown", "16"), ("8.0 GT/s PCIe", "0"), ("inf", "4"), ("", "")] {
            let files = [("current_link_speed", speed), ("current_link_width", width)];
            write(folder.path(), "0000:66:00.0", &files);
            assert_eq!(of("0000:66:00.0"), None, "{speed:?} {width:?}");
        }
    }

    #[test]
    fn gpus_are_found_without_a_driver() {
        let folder = tempfile::tempdir().unwrap();
        assert!(nvidia(&folder.path().join("none")).is_empty());
        for (device, vendor, class) in [
            ("0000:65:00.0", "0x10de", "0x030000"),
            ("0000:65:00.1", "0x10de", "0x040300"),
            ("0000:17:00.0", "0x10de", "0x030200"),
            ("0000:00:02.0", "0x8086", "0x030000"),
        ] {
            write(folder.path(), device, &[("vendor", vendor), ("class", class)]);
        }
        assert_eq!(nvidia(folder.path()), ["0000:17:00.0", "0000:65:00.0"]);
    }
}
