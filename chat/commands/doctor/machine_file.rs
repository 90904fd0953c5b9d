//! What the doctor measured, as a machine for `pregate replay --machine`.

use super::{
    CpuExperts, Measuring,
    decoding::Decoding,
    gpu::{Gpu, Speed},
};
use crate::{
    exit::Failure,
    expert_speed::{USUAL, median},
    memory,
    output::bytes,
    plan, save,
};
use pregate_kernels::{Backend, ExpertGroup, ExpertRows, GatedActivation};
use pregate_runtime::store::disk::DiskReport;
use pregate_traces::replay::{self, Figure, Machine};
use std::{hint::black_box, path::Path, time::Instant};

/// Writes the machine; what could not be measured is assumed and says so.
///
/// # Errors
/// Without a measured processor there is nothing to write.
pub fn write(
    path: &Path,
    measured: Option<(&Measuring, &CpuExperts)>,
    decoding: Option<&Decoding>,
    disk: Option<&DiskReport>,
    gpus: &[Gpu],
) -> Result<(), Failure> {
    let Some((with, cpu)) = measured else {
        let why = "the processor was not measured, see the lines about it";
        return Err(Failure::Resources(format!("--machine-file: {why}")));
    };
    let gmacs = prompt_gmacs(with)?;
    // The times of a stand-in mean nothing.
    let gpu = gpus.iter().find(|gpu| !gpu.is_standin && gpu.speed.is_some());
    let mut machine = machine((cpu, decoding), disk, gpu, gmacs, memory::available().bytes);
    // Several such files are compared by their names.
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    machine.name = stem.unwrap_or(machine.name);
    let head = "# A machine for `pregate replay --machine`, written by `pregate doctor`. Rates are \
                in GB/s, delays\n# in ns; a source says what was measured and what is assumed.\n";
    let text = format!("{head}{}", machine.to_toml());
    save::write_whole(path, |to| to.write_all(text.as_bytes()))?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

const MEASURED: &str = "measured by pregate doctor";
/// Of a layer, beside what reading its bytes takes, in ns.
pub const LAYER_NS: f64 = 20_000.0;
/// Of a prompt that chose the same expert.
const TOKENS: u32 = 64;
const ROUNDS: usize = 5;

/// 1e9 multiply-adds a second where many tokens share an expert, the median
/// of some rounds; a few milliseconds.
fn prompt_gmacs(with: &Measuring) -> Result<f64, Failure> {
    let weights = USUAL.weights(with.pool.bytes(), 0)?;
    let (hidden, tokens): (usize, Vec<u32>) = (USUAL.hidden, (0..TOKENS).collect());
    let groups = [ExpertGroup { weights, tokens: &tokens, first_row: 0 }];
    let x: Vec<f32> = (0..tokens.len() * hidden).map(|i| (i % 7) as f32 - 3.0).collect();
    let mut answers = vec![0.0; x.len()];
    let mut rates = Vec::with_capacity(ROUNDS);
    // The first one makes buffers.
    for round in 0..=ROUNDS {
        let started = Instant::now();
        with.cpu.expert_rows(ExpertRows {
            x: &x,
            tokens: tokens.len(),
            groups: &groups,
            activation: GatedActivation::Silu,
            answers: &mut answers,
        });
        black_box(&answers);
        let seconds = started.elapsed().as_secs_f64().max(1e-9);
        if round > 0 {
            rates.push((3 * hidden * USUAL.inner * tokens.len()) as f64 / seconds / 1e9);
        }
    }
    Ok(median(&rates).unwrap_or(0.0).max(0.01))
}

fn machine(
    (CpuExperts { line, speed }, decoding): (&CpuExperts, Option<&Decoding>),
    disk: Option<&DiskReport>,
    gpu: Option<&Gpu>,
    gmacs: f64,
    available_bytes: u64,
) -> Machine {
    let figure = |value: f64, source: String| Figure { value, source };
    let link = gpu.and_then(|gpu| gpu.speed.as_ref()).map(|speed| &speed.link);
    let at_once = format!("{MEASURED}: experts of {} beside copies to the GPU", USUAL.of);
    let alone = format!(
        "{MEASURED}: experts of {}, as their time grows with their number; {} at once take {:.0} % \
         of a plain read",
        USUAL.of,
        speed.experts,
        speed.share * 100.0
    );
    let beside = match link {
        // As it slowed what was measured with the same experts at once.
        Some(link) => {
            let share = (link.both.cpu_gb_s / line.measured_gb_s).clamp(0.01, 1.0);
            figure(line.gb_s * share, at_once.clone())
        }
        None => match decoding {
            Some(found) => figure(found.experts_gb_s, while_streaming(found)),
            None => figure(line.gb_s, "assumed: no slower beside reads from the disk".to_string()),
        },
    };
    let dense = match decoding {
        Some(found) => figure(found.dense_gb_s, while_streaming(found)),
        None => figure(line.gb_s, format!("as expert_gbs: {alone}")),
    };
    let plan = match decoding {
        Some(found) => figure(found.plan_us * 1e3, while_streaming(found)),
        None => figure(0.0, "assumed: not measured without a model (--model)".to_string()),
    };
    let ram = match available_bytes {
        u64::MAX => figure(8e9, "assumed: this system does not say what is free".to_string()),
        free => {
            let reserve = plan::reserve(free);
            let source = format!("{} free, less a reserve of {}", bytes(free), bytes(reserve));
            figure((free - reserve) as f64, source)
        }
    };
    Machine {
        name: "this machine".to_string(),
        source: format!("pregate doctor {}", env!("CARGO_PKG_VERSION")),
        gpu: gpu.and_then(|gpu| Some(gpu_of(gpu, gpu.speed.as_ref()?))),
        link: link.map(|link| replay::Link {
            gbs: match link.pinned_gb_s {
                Some(rate) => figure(rate, format!("{MEASURED}: page-locked memory")),
                None => figure(link.pageable_gb_s, format!("{MEASURED}: ordinary memory")),
            },
            gbs_beside_cpu: figure(link.both.link_gb_s.min(link.copy_gb_s()), at_once),
            start_ns: figure(link.copy_us * 1e3, format!("{MEASURED}: a copy of 4 KiB")),
        }),
        cpu: replay::Cpu {
            expert_gbs: figure(line.gb_s, alone.clone()),
            expert_gbs_beside: beside,
            dense_gbs: dense,
            start_ns: figure(line.start_us * 1e3, format!("{MEASURED}: one expert and several")),
            layer_ns: figure(
                LAYER_NS,
                "assumed: norms, router and attention of a short context".to_string(),
            ),
            plan_ns: plan,
            gmacs: figure(gmacs, format!("{MEASURED}: {TOKENS} tokens through one expert")),
        },
        ram_bytes: ram,
        disk: disk_of(disk, decoding),
    }
}

fn while_streaming(decoding: &Decoding) -> String {
    format!("{MEASURED}: decoding of {} of memory", decoding.of)
}

fn gpu_of(gpu: &Gpu, speed: &Speed) -> replay::Gpu {
    let free = gpu.free_bytes.unwrap_or(gpu.memory_bytes);
    let reserve = (256u64 << 20).min(free / 2);
    let of = format!("{}: {MEASURED}", gpu.name);
    replay::Gpu {
        vram_bytes: Figure {
            value: (free - reserve) as f64,
            source: format!("{}: {} free, less {}", gpu.name, bytes(free), bytes(reserve)),
        },
        vram_gbs: Figure { value: speed.read_gb_s, source: format!("{of}, a plain read") },
        layer_ns: Figure::new(8_000.0, "assumed: a graph's launches, norms, router, attention"),
        visit_ns: Figure {
            value: speed.link.visit_us * 1e3,
            source: format!(
                "{of}, a kernel that \
            does nothing until it is seen to have ended"
            ),
        },
        gmacs: Figure {
            value: f64::from(gpu.multiprocessors) * 400.0,
            source: "assumed: a quarter of what int8 tensor cores of Ampere have at 1.7 GHz"
                .to_string(),
        },
    }
}

fn disk_of(report: Option<&DiskReport>, decoding: Option<&Decoding>) -> replay::Disk {
    let measured = report.and_then(|report| Some((report, report.measured?)));
    replay::Disk {
        gbs: match (decoding, measured) {
            // Some seconds of the reads that are meant, not a moment of them.
            (Some(found), _) => Figure {
                value: found.disk_gb_s,
                source: format!("{} while it was busy", while_streaming(found)),
            },
            (None, Some((report, rate))) => Figure {
                value: rate.bytes_per_second() / 1e9,
                source: format!("{MEASURED}: {}", report.words),
            },
            (None, None) => Figure::new(
                3.4,
                "assumed: NVMe on PCIe 3.0, as the model had too little to measure with",
            ),
        },
        latency_ns: Figure::new(80_000.0, "assumed: usual for flash"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        expert_speed::{Line, Speed as CpuSpeed},
        link_speed::{Both, LinkSpeed},
    };
    use pregate_runtime::store::disk::{Bandwidth, DiskChoice};

    fn cpu() -> CpuExperts {
        CpuExperts {
            line: Line { gb_s: 40.0, start_us: 5.0, measured_gb_s: 32.0 },
            speed: CpuSpeed { experts: 4, share: 0.8, ..CpuSpeed::default() },
        }
    }

    fn gpu() -> Gpu {
        let link = LinkSpeed {
            pinned_gb_s: Some(24.0),
            pin_refused: None,
            pageable_gb_s: 9.0,
            copy_us: 12.0,
            visit_us: 8.0,
            both: Both { cpu_gb_s: 24.0, link_gb_s: 20.0 },
        };
        Gpu {
            ordinal: 0,
            name: "RTX \"quoted\"".to_string(),
            compute_capability: "8.9".to_string(),
            memory_bytes: 12 << 30,
            free_bytes: Some(8 << 30),
            multiprocessors: 46,
            driver: "12.4".to_string(),
            pci: String::new(),
            link: None,
            has_watchdog: false,
            is_standin: false,
            speed: Some(Speed { read_gb_s: 450.0, link }),
        }
    }

    #[test]
    fn what_was_measured_is_what_replay_reads() {
        let disk = DiskReport {
            choice: DiskChoice::Uring,
            words: "io_uring".to_string(),
            refused: Vec::new(),
            measured: Some(Bandwidth { bytes: 3_000_000, elapsed_ns: 1_000_000, read_bytes: 1 }),
        };
        let found = machine((&cpu(), None), Some(&disk), Some(&gpu()), 150.0, 16 << 30);
        let read = Machine::from_toml(&found.to_toml()).unwrap();
        assert_eq!(read, found);
        // Three quarters of what was measured alone, 32 GB/s.
        assert_eq!((read.cpu.expert_gbs.value, read.cpu.expert_gbs_beside.value), (40.0, 30.0));
        let (gpu, link) = (read.gpu.unwrap(), read.link.unwrap());
        assert_eq!(
            (link.gbs.value, link.gbs_beside_cpu.value, link.start_ns.value),
            (24.0, 20.0, 12e3)
        );
        assert_eq!((gpu.vram_gbs.value, gpu.visit_ns.value), (450.0, 8e3));
        assert_eq!(gpu.vram_bytes.value, ((8u64 << 30) - (256 << 20)) as f64);
        assert_eq!((read.disk.gbs.value, read.cpu.gmacs.value), (3.0, 150.0));
        assert_eq!(read.ram_bytes.value, ((16u64 << 30) - (16u64 << 30) / 10) as f64);
    }

    #[test]
    fn a_model_that_was_decoded_says_what_memory_gives_beside_the_disk() {
        let decoding = Decoding {
            of: "m.gguf with 2 GB".to_string(),
            ms_per_token: 90.0,
            dense_gb_s: 25.0,
            experts_gb_s: 30.0,
            plan_us: 130.0,
            disk_gb_s: 2.5,
        };
        let Machine { cpu, disk, .. } =
            machine((&cpu(), Some(&decoding)), None, None, 150.0, u64::MAX);
        assert_eq!(disk.gbs.value, 2.5);
        assert_eq!((cpu.expert_gbs.value, cpu.expert_gbs_beside.value), (40.0, 30.0));
        assert_eq!((cpu.dense_gbs.value, cpu.plan_ns.value), (25.0, 130e3));
        assert!(cpu.plan_ns.source.ends_with("decoding of m.gguf with 2 GB of memory"));
    }

    #[test]
    fn what_was_not_measured_is_assumed_and_says_so() {
        let found = machine((&cpu(), None), None, None, 150.0, u64::MAX);
        assert!(found.gpu.is_none() && found.link.is_none());
        for figure in
            [&found.disk.gbs, &found.disk.latency_ns, &found.ram_bytes, &found.cpu.layer_ns]
        {
            assert!(figure.source.starts_with("assumed"), "{figure:?}");
        }
        assert!(found.check().is_ok());
        let refused = write(Path::new("/nowhere/m.toml"), None, None, None, &[]).unwrap_err();
        assert!(refused.to_string().contains("not measured"));
    }
}
