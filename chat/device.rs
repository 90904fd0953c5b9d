//! Which device computes, and why.

use crate::{
    cli::{BackendChoice, DeviceArgs, DeviceChoice, MissesArg, Switch},
    exit::Failure,
    output::bytes,
};
use pregate_kernels::{
    Backend, Cpu, CpuOptions, Reference,
    cuda::{self, CudaError, DeviceOptions},
};
use pregate_runtime::{Misses, gpu::GpuParts};
use std::ffi::OsStr;
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
    /// A token is one CUDA graph.
    pub graphs: bool,
    /// Whether it may wait for the host in the middle of a token.
    pub device_tokens: bool,
}

/// How much of a GPU's memory may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuBudget {
    pub free_bytes: u64,
    /// `--vram`
    pub cap_bytes: Option<u64>,
    /// Less than a plan that the GPU had no room for, though it seemed to.
    pub below_bytes: Option<u64>,
}

/// Of the GPU's memory, for what the driver takes: kernels, their stacks.
const RESERVE_BYTES: u64 = 256 << 20;

impl GpuBudget {
    pub fn bytes(&self) -> u64 {
        let least = self.cap_bytes.unwrap_or(u64::MAX).min(self.free_bytes);
        least.saturating_sub(RESERVE_BYTES).min(self.below_bytes.unwrap_or(u64::MAX))
    }

    /// Of a plan that takes half of the experts' memory on the GPU that
    /// `refused` took, of what is free now; `None`: it took none.
    pub fn below(self, refused: &GpuParts, free_bytes: u64) -> Option<Self> {
        let experts = refused.experts_bytes + refused.ring_bytes;
        let below_bytes = Some(refused.total() - experts.div_ceil(2));
        (experts > 0).then_some(Self { free_bytes, below_bytes, ..self })
    }

    /// "8.3 GB (8.6 GB by free GPU memory, less a reserve of 268.4 MB)"
    pub fn words(&self) -> String {
        let all = bytes(self.bytes());
        if self.below_bytes == Some(self.bytes()) {
            return format!("{all} (less than the GPU refused)");
        }
        let (from, of) = match self.cap_bytes {
            Some(cap) if cap < self.free_bytes => (cap, "--vram"),
            _ => (self.free_bytes, "free GPU memory"),
        };
        let [from, reserve] = [from, RESERVE_BYTES].map(bytes);
        format!("{all} ({from} by {of}, less a reserve of {reserve})")
    }

    /// Why not even the smallest share of a model fits.
    pub fn too_small(&self, smallest: &GpuParts) -> Failure {
        Failure::Resources(format!(
            "--device cuda: the smallest share of the model that works on a GPU needs {} MiB of \
             its memory ({}); {} MiB are free, the budget is {}: a shorter --context helps, or \
             --device cpu",
            smallest.total().div_ceil(1 << 20),
            parts_line(smallest, None, None),
            self.free_bytes >> 20,
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
        for name in of_a_gpu(args) {
            eprintln!("note: {name} has no effect: no GPU computes ({why})");
        }
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
        let budget = GpuBudget { free_bytes, cap_bytes, below_bytes: None };
        let graphs = args.graphs == Switch::On;
        let set = SERIALISING.into_iter().find(|(name, serialises)| {
            std::env::var_os(name).is_some_and(|value| serialises(&value))
        });
        if let Some((name, _)) = set {
            eprintln!(
                "note: {name} is set: the host launches layer by layer, because a GPU that \
                 computes tokens by itself would wait for it in vain"
            );
        }
        let (misses, device_tokens) = (args.misses.into(), set.is_none());
        let gpu = Some(Gpu { device, budget, misses, graphs, device_tokens });
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

/// What was given and is about a GPU.
fn of_a_gpu(args: &DeviceArgs) -> impl Iterator<Item = &'static str> {
    let given = [
        ("--vram", args.vram.is_some()),
        ("--misses", args.misses != MissesArg::Auto),
        ("--graphs", args.graphs == Switch::Off),
    ];
    given.into_iter().filter_map(|(name, is_given)| is_given.then_some(name))
}

/// Why the processor computes although nobody asked for it.
fn automatic() -> String {
    let why = match cuda::Device::open(0, &DeviceOptions::default()) {
        // Until it has run on one: docs/measurements.md.
        Ok(device) => format!(
            "the GPU path was never tried on a GPU; {} is there, and --device cuda tries it",
            device.info().name
        ),
        Err(CudaError::NoDriver) => "no driver (no libcuda.so.1 or nvcuda.dll)".to_string(),
        Err(CudaError::NoDevice) => "no GPU that the driver sees".to_string(),
        Err(error) => error.to_string(),
    };
    format!("--device auto: CPU because {why}")
}

/// Whether a variable's value lets work wait that must not.
type Serialises = fn(&OsStr) -> bool;

/// Variables of the driver, and whether a value of theirs makes work wait that
/// a running launch waits for: launches return when they have run, or streams
/// share a queue (32 at most, 8 if nothing is said; three streams have work
/// while a token is computed, and loading has one more).
const SERIALISING: [(&str, Serialises); 2] = [
    ("CUDA_LAUNCH_BLOCKING", |value| value != "0"),
    ("CUDA_DEVICE_MAX_CONNECTIONS", |value| {
        value.to_str().and_then(|text| text.trim().parse().ok()).is_some_and(|count: u32| count < 4)
    }),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_what_is_free_or_allowed_less_a_reserve() {
        let budget = |free_bytes, cap_bytes| GpuBudget { free_bytes, cap_bytes, below_bytes: None };
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
        for word in
            ["3073 MiB of its memory", "experts 3.2 GB", "3.2 GB by --vram", "4096 MiB are free"]
        {
            assert!(words.contains(word), "{words}");
        }
        let smaller = budget(4 << 30, None).below(&parts, 2 << 30);
        assert_eq!(smaller, None, "there is nothing to leave out");
        let parts = GpuParts { experts_bytes: 5, ring_bytes: 4, ..parts };
        let smaller = budget(4 << 30, None).below(&parts, 8 << 30).unwrap();
        assert_eq!(smaller.bytes(), parts.total() - 5);
        assert!(smaller.words().contains("refused"), "{}", smaller.words());
        let smaller = budget(4 << 30, None).below(&parts, 1 << 30).unwrap();
        assert_eq!(smaller.bytes(), (1 << 30) - RESERVE_BYTES, "what is free now");
        let parts = GpuParts { experts_bytes: 0, ring_bytes: 0, ..parts };
        let line = |experts| parts_line(&parts, Some(experts), Some(100));
        assert!(line((8, 8)).starts_with("all weights 3.2 GB, KV cache for 100 tokens"));
        assert!(line((2, 8)).contains("2 of 8 experts 0 bytes (25 %)"), "{}", line((2, 8)));
    }
}
