//! Which device computes, and why.

use crate::{
    cli::{BackendChoice, DeviceArgs, DeviceChoice},
    exit::Failure,
    output::bytes,
};
use pregate_kernels::{
    Backend, Cpu, CpuOptions, Reference,
    cuda::{self, CudaError, DeviceOptions},
};
use pregate_runtime::{Misses, gpu::GpuParts};
use std::sync::Arc;

pub struct Device {
    pub backend: Arc<dyn Backend>,
    /// Threads that compute.
    pub threads: usize,
    /// What computes and why, for one line on standard error.
    pub line: String,
    /// The GPU that computes; else the backend does.
    pub gpu: Option<Gpu>,
}

/// A GPU, and how much of its memory may be taken.
pub struct Gpu {
    pub device: cuda::Device,
    pub budget: GpuBudget,
    pub misses: Misses,
}

/// How much of a GPU's memory may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuBudget {
    pub free_bytes: u64,
    /// `--vram`
    pub cap_bytes: Option<u64>,
}

/// Of the GPU's memory, for what the driver takes: kernels, their stacks.
const RESERVE_BYTES: u64 = 256 << 20;

impl GpuBudget {
    pub fn bytes(&self) -> u64 {
        let least = self.cap_bytes.unwrap_or(u64::MAX).min(self.free_bytes);
        least.saturating_sub(RESERVE_BYTES)
    }

    /// "8.3 GB (8.6 GB by free GPU memory, less a reserve of 268.4 MB)"
    pub fn words(&self) -> String {
        let (from, of) = match self.cap_bytes {
            Some(cap) if cap < self.free_bytes => (cap, "--vram"),
            _ => (self.free_bytes, "free GPU memory"),
        };
        let [all, from, reserve] = [self.bytes(), from, RESERVE_BYTES].map(bytes);
        format!("{all} ({from} by {of}, less a reserve of {reserve})")
    }

    /// Why not even the smallest share of a model fits.
    pub fn too_small(&self, smallest: &GpuParts) -> Failure {
        Failure::Resources(format!(
            "--device cuda: the smallest share of the model that works on a GPU needs {} of its \
             memory ({}), the budget is {}: a shorter --context helps, or --device cpu",
            bytes(smallest.total()),
            parts_line(smallest, None, None),
            self.words(),
        ))
    }
}

/// "weights without experts 0.8 GB, 512 of 1024 experts 3.4 GB (50 %), ring 53.5
/// MB, KV cache for 4096 tokens 268.4 MB, scratch 9.1 MB".
pub fn parts_line(
    parts: &GpuParts,
    experts: Option<(usize, usize)>,
    context: Option<usize>,
) -> String {
    let GpuParts { weights_bytes, experts_bytes, ring_bytes, kv_bytes, scratch_bytes } = *parts;
    let weights = match experts {
        Some((resident, all)) if resident == all => {
            format!("all weights {}", bytes(weights_bytes + experts_bytes))
        }
        Some((resident, all)) => format!(
            "weights without experts {}, {resident} of {all} experts {} ({:.0} %)",
            bytes(weights_bytes),
            bytes(experts_bytes),
            resident as f64 / all as f64 * 100.0,
        ),
        None => format!("weights without experts {}", bytes(weights_bytes)),
    };
    let tokens = context.map_or(String::new(), |context| format!(" for {context} tokens"));
    let (kv, scratch) = (bytes(kv_bytes), bytes(scratch_bytes));
    let ring = match ring_bytes {
        0 => String::new(),
        some => format!(", ring {}", bytes(some)),
    };
    format!("{weights}{ring}, KV cache{tokens} {kv}, scratch {scratch}")
}

impl Device {
    pub fn open(args: &DeviceArgs) -> Result<Self, Failure> {
        let why = match args.device {
            DeviceChoice::Auto => automatic(),
            DeviceChoice::Cpu => "chosen by --device cpu".to_string(),
            DeviceChoice::Cuda { ordinal } => return Self::cuda(args, ordinal),
        };
        Self::cpu(args.threads, &why)
    }

    pub fn for_backend(choice: BackendChoice, threads: Option<usize>) -> Result<Self, Failure> {
        match choice {
            BackendChoice::Cpu => Self::cpu(threads, "chosen by --backend cpu"),
            BackendChoice::Reference => {
                let backend: Arc<dyn Backend> = Arc::new(Reference);
                let line = format!("{} (chosen by --backend reference)", backend.describe());
                Ok(Self { backend, threads: 1, line, gpu: None })
            }
        }
    }

    fn cpu(threads: Option<usize>, why: &str) -> Result<Self, Failure> {
        let cpu = processor(threads)?;
        let threads = cpu.threads();
        let line = format!("{} ({why})", cpu.describe());
        Ok(Self { backend: Arc::new(cpu), threads, line, gpu: None })
    }

    fn cuda(args: &DeviceArgs, ordinal: usize) -> Result<Self, Failure> {
        let failed = |error: CudaError| Failure::Resources(format!("--device cuda: {error}"));
        let device = cuda::Device::open(ordinal, &DeviceOptions::default()).map_err(failed)?;
        let (free_bytes, total_bytes) = device.memory().map_err(failed)?;
        let cap_bytes = args.vram.map(|size| size.of(total_bytes));
        let line = format!("{} (chosen by --device cuda)", device.info().describe());
        let budget = GpuBudget { free_bytes, cap_bytes };
        let gpu = Some(Gpu { device, budget, misses: args.misses.into() });
        Ok(Self { line, gpu, ..Self::cpu(args.threads, "beside a GPU")? })
    }

    /// What computes: "CPU, 2 threads, AVX2".
    pub fn describe(&self) -> String {
        match &self.gpu {
            Some(gpu) => gpu.device.info().describe(),
            None => self.backend.describe(),
        }
    }

    /// Says on standard error what computes.
    pub fn announce(&self) {
        eprintln!("device: {}", self.line);
    }
}

/// Whether this is the tests' stand-in for a GPU, whose times mean nothing.
pub fn is_standin(gpu: &cuda::DeviceInfo) -> bool {
    gpu.name == "Pregate stand-in"
}

/// The processor with `threads` threads, or as many as it has cores.
pub fn processor(threads: Option<usize>) -> Result<Cpu, Failure> {
    Cpu::new(CpuOptions { threads, isa: None }).map_err(|error| {
        Failure::Resources(format!("cannot start the threads that compute: {error}"))
    })
}

/// Why the processor computes although nobody asked for it.
fn automatic() -> String {
    let found = cuda::Device::open(0, &DeviceOptions::default());
    let why = match &found {
        Ok(device) => {
            // Until it has run on one: docs/measurements.md.
            let name = &device.info().name;
            format!(
                "{name} is there, but the GPU path was never tried on one: --device cuda tries it"
            )
        }
        Err(CudaError::NoDriver) => "no NVIDIA driver".to_string(),
        Err(CudaError::NoDevice) => "no NVIDIA GPU".to_string(),
        Err(error) => error.to_string(),
    };
    format!("chosen by --device auto: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_what_is_free_or_allowed_less_a_reserve() {
        let budget = |free_bytes, cap_bytes| GpuBudget { free_bytes, cap_bytes };
        assert_eq!(budget(8 << 30, None).bytes(), (8 << 30) - RESERVE_BYTES);
        assert_eq!(budget(8 << 30, Some(4 << 30)).bytes(), (4 << 30) - RESERVE_BYTES);
        assert_eq!(budget(8 << 30, Some(16 << 30)).bytes(), (8 << 30) - RESERVE_BYTES);
        assert_eq!(budget(1 << 20, None).bytes(), 0);
        assert!(budget(8 << 30, Some(4 << 30)).words().contains("4.3 GB by --vram"));
        assert!(budget(8 << 30, Some(16 << 30)).words().contains("by free GPU memory"));

        let parts = GpuParts { weights_bytes: 3 << 30, kv_bytes: 1 << 20, ..Default::default() };
        let Failure::Resources(words) = budget(4 << 30, Some(3 << 30)).too_small(&parts) else {
            panic!("another failure");
        };
        for word in ["3.2 GB of its memory", "experts 3.2 GB", "3.2 GB by --vram", "--context"] {
            assert!(words.contains(word), "{words}");
        }
        let line = |experts| parts_line(&parts, Some(experts), Some(100));
        assert!(line((8, 8)).starts_with("all weights 3.2 GB, KV cache for 100 tokens"));
        assert!(line((2, 8)).contains("2 of 8 experts 0 bytes (25 %)"), "{}", line((2, 8)));
    }
}
