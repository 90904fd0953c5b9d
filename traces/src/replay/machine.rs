//! What a virtual machine is made of: bandwidths, delays, memory, and who says
//! so.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A number and where it comes from: a measurement with its command, a
/// datasheet, or the reason for an assumption.
///
/// In TOML `{ value = 24.0, source = "nvbandwidth" }`, or a bare number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Written")]
pub struct Figure {
    pub value: f64,
    pub source: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Bare(f64),
    With { value: f64, source: String },
}

impl From<Written> for Figure {
    fn from(written: Written) -> Self {
        match written {
            Written::Bare(value) => value.into(),
            Written::With { value, source } => Self { value, source },
        }
    }
}

impl From<f64> for Figure {
    fn from(value: f64) -> Self {
        Self { value, source: String::new() }
    }
}

impl Figure {
    pub fn new(value: f64, source: &str) -> Self {
        Self { value, source: source.to_string() }
    }
}

/// A machine. Rates are in GB/s (1e9 bytes, a byte per ns), delays in ns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    pub name: String,
    /// Where the figures that say nothing themselves come from.
    #[serde(default)]
    pub source: String,
    /// `None`: the CPU computes everything and experts stream from the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
    /// From RAM to VRAM; needed where there is a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<Link>,
    pub cpu: Cpu,
    /// What the system leaves to the process.
    pub ram_bytes: Figure,
    pub disk: Disk,
}

/// A GPU that decodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    pub vram_bytes: Figure,
    /// Reading weights of a token's products, not the datasheet's peak.
    pub vram_gbs: Figure,
    /// Of a layer, beside what reading its bytes takes: launches, norms,
    /// router, attention of a short context.
    pub layer_ns: Figure,
    /// What a layer with misses takes beyond its workers: the host learns of
    /// them and answers.
    pub visit_ns: Figure,
    /// Of a prompt: the rate at which weights meet tokens that share them, in
    /// 1e9 multiply-adds per second.
    pub gmacs: Figure,
}

/// Copies from page-locked memory to a GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    pub gbs: Figure,
    /// While the CPU computes experts from the same memory.
    pub gbs_beside_cpu: Figure,
    /// From the order to the first byte.
    pub start_ns: Figure,
}

/// The processor and its memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// Computing a token's experts from RAM, all cores.
    pub expert_gbs: Figure,
    /// While the link or the disk moves bytes through the same memory.
    pub expert_gbs_beside: Figure,
    /// Everything else that a token reads, where there is no GPU.
    pub dense_gbs: Figure,
    /// Until the first core works on an expert.
    pub start_ns: Figure,
    /// Of a layer, beside what reading its bytes takes; where there is no GPU.
    pub layer_ns: Figure,
    /// Of a layer whose experts are read from disk, beside forecasting itself:
    /// planning and orders to the disk; where there is no GPU. 0 if not said.
    #[serde(default = "nothing")]
    pub plan_ns: Figure,
    /// As [`Gpu::gmacs`].
    pub gmacs: Figure,
}

fn nothing() -> Figure {
    0.0.into()
}

/// Where the model's file is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Whole experts with O_DIRECT, some reads at once.
    pub gbs: Figure,
    /// From the order to the first byte, with nothing before it.
    pub latency_ns: Figure,
}

/// What is wrong with a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("not a machine: {0}")]
    Toml(#[from] toml::de::Error),
    #[error("machine {machine}: {field} is {found}; it has to be {allowed}")]
    Figure { machine: String, field: &'static str, found: f64, allowed: &'static str },
    #[error("machine {0} has a GPU and no link")]
    NoLink(String),
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// Anything of the above, in a file.
    #[error("{}: line {line}: {what}", path.display())]
    File { path: PathBuf, line: usize, what: String },
}

/// No rate is lower: a megabyte per second, a million multiply-adds. Times of
/// whole traces stay far from what a clock in ns can count.
pub const LEAST_RATE: f64 = 1e-3;
/// No rate and no memory is larger: an exabyte.
const MOST_RATE: f64 = 1e18;
/// No delay is longer: a second.
const MOST_DELAY: f64 = 1e9;

impl Machine {
    /// Reads and checks a machine.
    ///
    /// # Errors
    /// TOML that is none, unknown or missing fields, figures that no machine
    /// has.
    pub fn from_toml(text: &str) -> Result<Self, MachineError> {
        let machine: Self = toml::from_str(text)?;
        machine.check()?;
        Ok(machine)
    }

    /// The same machine as text for [`Machine::from_toml`].
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a machine is tables of numbers and text")
    }

    /// # Errors
    /// Figures that no machine has: rates near 0, delays of more than a
    /// second, what is negative or not finite.
    pub fn check(&self) -> Result<(), MachineError> {
        let wrong = |field, found, allowed| {
            let machine = self.name.clone();
            Err(MachineError::Figure { machine, field, found, allowed })
        };
        for (field, figure) in self.rates() {
            if !(LEAST_RATE..=MOST_RATE).contains(&figure.value) {
                return wrong(field, figure.value, "from 0.001 to 1e18");
            }
        }
        for (field, figure) in self.delays() {
            if !(0.0..=MOST_DELAY).contains(&figure.value) {
                return wrong(field, figure.value, "from 0 to 1e9, a second");
            }
        }
        match self.gpu.is_some() && self.link.is_none() {
            true => Err(MachineError::NoLink(self.name.clone())),
            false => Ok(()),
        }
    }

    fn rates(&self) -> Vec<(&'static str, &Figure)> {
        let Self { cpu, disk, .. } = self;
        let mut rates = vec![
            ("cpu.expert_gbs", &cpu.expert_gbs),
            ("cpu.expert_gbs_beside", &cpu.expert_gbs_beside),
            ("cpu.dense_gbs", &cpu.dense_gbs),
            ("cpu.gmacs", &cpu.gmacs),
            ("ram_bytes", &self.ram_bytes),
            ("disk.gbs", &disk.gbs),
        ];
        if let Some(gpu) = &self.gpu {
            rates.extend([
                ("gpu.vram_bytes", &gpu.vram_bytes),
                ("gpu.vram_gbs", &gpu.vram_gbs),
                ("gpu.gmacs", &gpu.gmacs),
            ]);
        }
        if let Some(link) = &self.link {
            rates.extend([("link.gbs", &link.gbs), ("link.gbs_beside_cpu", &link.gbs_beside_cpu)]);
        }
        rates
    }

    fn delays(&self) -> Vec<(&'static str, &Figure)> {
        let Self { cpu, disk, .. } = self;
        let mut delays = vec![
            ("cpu.start_ns", &cpu.start_ns),
            ("cpu.layer_ns", &cpu.layer_ns),
            ("cpu.plan_ns", &cpu.plan_ns),
            ("disk.latency_ns", &disk.latency_ns),
        ];
        if let Some(gpu) = &self.gpu {
            delays.extend([("gpu.layer_ns", &gpu.layer_ns), ("gpu.visit_ns", &gpu.visit_ns)]);
        }
        if let Some(link) = &self.link {
            delays.push(("link.start_ns", &link.start_ns));
        }
        delays
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
name = "a card"
ram_bytes = 32e9
[gpu]
vram_bytes = 12e9
vram_gbs = { value = 306, source = "85 % of 360" }
layer_ns = 12000
visit_ns = 20000
gmacs = 20000
[link]
gbs = { value = 24.0, source = "nvbandwidth" }
gbs_beside_cpu = 18
start_ns = 12000
[cpu]
expert_gbs = 36
expert_gbs_beside = 27
dense_gbs = 30
start_ns = 25000
layer_ns = 20000
gmacs = 200
[disk]
gbs = 3.4
latency_ns = 80000
"#;

    #[test]
    fn a_machine_survives_its_text_and_says_who_measured_what() {
        let machine = Machine::from_toml(TEXT).unwrap();
        assert_eq!(machine.gpu.as_ref().unwrap().vram_gbs.source, "85 % of 360");
        assert_eq!(machine.link.as_ref().unwrap().gbs, Figure::new(24.0, "nvbandwidth"));
        assert_eq!(Machine::from_toml(&machine.to_toml()).unwrap(), machine);
    }

    #[test]
    fn what_is_no_machine_is_refused_by_name() {
        let refused = |from: &str, to: &str| {
            let text = TEXT.replacen(from, to, 1);
            assert_ne!(text, TEXT);
            Machine::from_toml(&text).unwrap_err().to_string()
        };
        assert!(refused("gbs = 3.4", "gbs = 0").contains("disk.gbs is 0"));
        assert!(refused("gbs = 3.4", "gbs = nan").contains("disk.gbs is NaN"));
        assert!(refused("gbs = 3.4", "gbs = 1e300").contains("disk.gbs"));
        assert!(refused("gbs = 3.4", "gbs = 1e-4").contains("from 0.001"));
        assert!(refused("layer_ns = 20000", "layer_ns = 1e10").contains("cpu.layer_ns is 1000"));
        assert!(refused("layer_ns = 20000", "plan_ns = nan\nlayer_ns = 20000").contains("plan_ns"));
        assert!(refused("visit_ns = 20000", "visit_ns = -1").contains("gpu.visit_ns is -1"));
        assert!(refused("gmacs = 200", "gmac = 200").contains("gmac"));
        let without = TEXT.split("[link]").next().unwrap().to_string()
            + "[cpu]"
            + TEXT.split("[cpu]").nth(1).unwrap();
        assert!(Machine::from_toml(&without).unwrap_err().to_string().contains("no link"));
    }
}
