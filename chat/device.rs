//! Which device computes, and why.

use crate::{
    cli::{BackendChoice, DeviceArgs, DeviceChoice},
    exit::Failure,
};
use pregate_kernels::{Backend, Cpu, CpuOptions, Reference};
use std::sync::Arc;

pub struct Device {
    pub backend: Arc<dyn Backend>,
    /// Threads that compute.
    pub threads: usize,
    /// For one line on standard error.
    pub line: String,
}

impl Device {
    pub fn open(args: &DeviceArgs) -> Result<Self, Failure> {
        let why = match args.device {
            DeviceChoice::Auto => "chosen by --device auto: this build has no GPU backend yet",
            DeviceChoice::Cpu => "chosen by --device cpu",
        };
        Self::cpu(args.threads, why)
    }

    pub fn for_backend(choice: BackendChoice, threads: Option<usize>) -> Result<Self, Failure> {
        match choice {
            BackendChoice::Cpu => Self::cpu(threads, "chosen by --backend cpu"),
            BackendChoice::Reference => {
                let backend: Arc<dyn Backend> = Arc::new(Reference);
                let line = format!("{} (chosen by --backend reference)", backend.describe());
                Ok(Self { backend, threads: 1, line })
            }
        }
    }

    fn cpu(threads: Option<usize>, why: &str) -> Result<Self, Failure> {
        let cpu = Cpu::new(CpuOptions { threads, isa: None }).map_err(|error| {
            Failure::Resources(format!("cannot start the threads that compute: {error}"))
        })?;
        let threads = cpu.threads();
        let line = format!("{} ({why})", cpu.describe());
        Ok(Self { backend: Arc::new(cpu), threads, line })
    }

    /// Says on standard error what computes.
    pub fn announce(&self) {
        eprintln!("device: {}", self.line);
    }
}
