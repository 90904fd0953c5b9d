//! `pregate doctor`: what this machine has, and what to do about the rest.

mod decoding;
mod gpu;
mod limits;
mod machine_file;
mod pci;

use crate::{
    cli::DoctorArgs,
    exit::{self, Failure},
    expert_speed::{self, Line, Pool, Speed, USUAL},
    memory, model,
    output::{self, bytes},
    plan, save,
};
use decoding::Decoding;
use limits::Limits;
use pregate_kernels::{Cpu, CpuOptions, Isa};
use pregate_runtime::{
    OpenedModel,
    store::{
        disk::{self, DiskChoice, DiskOptions, DiskReport},
        frames::{ClassSpec, Frames},
    },
};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Ok,
    /// Works, but something could be better.
    Note,
    /// Models cannot run.
    Bad,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// "processor", "experts", "memory", "pinning", "model", "disk", "gpu",
    /// "link" or "decoding".
    pub about: &'static str,
    pub state: State,
    pub found: String,
    /// What to do next; `null` where there is nothing to do.
    pub next: Option<String>,
}

impl Finding {
    fn new(about: &'static str, state: State, found: String) -> Self {
        Self { about, state, found, next: None }
    }

    fn next(mut self, next: &str) -> Self {
        self.next = Some(next.to_string());
        self
    }
}

/// The fields of `--json`; scripts read them by name.
#[derive(Serialize)]
struct Report {
    version: &'static str,
    /// Whether models can run here, on the processor at least.
    can_run: bool,
    findings: Vec<Finding>,
    gpus: Vec<gpu::Gpu>,
    /// Experts on the processor; `null` where it was not measured.
    cpu_experts: Option<CpuExperts>,
    /// `null` without --machine-file and --model, and where a GPU computes.
    decoding: Option<Decoding>,
    limits: Limits,
}

/// The exit code: 0 if models can run on the processor.
pub fn run(args: &DoctorArgs) -> Result<u8, Failure> {
    check_output(args)?;
    let (mut findings, measured) = processor();
    let (with, cpu_experts) = measured.unzip();
    let (limits, of_limits) = limits::look();
    findings.extend([memory_of_machine(), of_limits]);
    let (of_model, disk) = model_and_disk(args.model.as_deref());
    findings.extend(of_model);
    let (gpus, of_gpus) = gpu::look(with.as_ref());
    findings.extend(of_gpus);
    // Only a machine that is written down wants to know, and only of models
    // that someone named: this takes memory and some seconds.
    let is_wanted = args.machine_file.is_some() && gpus.iter().all(|gpu| gpu.speed.is_none());
    let decoding = match &args.model {
        Some(model) if is_wanted => {
            let (decoding, finding) = decode(model);
            findings.push(finding);
            decoding
        }
        _ => None,
    };
    if let Some(path) = &args.machine_file {
        let measured = with.as_ref().zip(cpu_experts.as_ref());
        machine_file::write(path, measured, decoding.as_ref(), disk.as_ref(), &gpus)?;
    }
    let can_run = findings.iter().all(|finding| finding.state != State::Bad);
    let version = env!("CARGO_PKG_VERSION");
    let report = Report { version, can_run, findings, gpus, cpu_experts, decoding, limits };
    match args.json {
        true => output::json(&report)?,
        false => output::line(text(&report).trim_end())?,
    }
    Ok(if can_run { 0 } else { exit::RESOURCES })
}

/// The machine's file replaces no model, and can be written.
fn check_output(args: &DoctorArgs) -> Result<(), Failure> {
    let Some(out) = &args.machine_file else { return Ok(()) };
    if let Some(model) = &args.model {
        // One that does not open is found below; its own name is known.
        let opened = OpenedModel::open(model, &mut |_| {}).ok();
        let files = opened.iter().flat_map(|opened| opened.files().paths());
        let files = files.map(PathBuf::as_path).chain([model.as_path()]);
        save::refuse_same(out, files, "a file of the model")?;
    }
    save::check_place(out)
}

fn text(report: &Report) -> String {
    let lines = report.findings.iter().map(|finding| {
        let state = match finding.state {
            State::Ok => "ok",
            State::Note => "note",
            State::Bad => "BAD",
        };
        let next = finding.next.as_ref().map(|next| format!("; {next}")).unwrap_or_default();
        format!("{state:<5} {:<10} {}{next}\n", finding.about, finding.found)
    });
    let verdict = match report.can_run {
        true => "models can run here",
        false => "models cannot run here: see the lines that say BAD",
    };
    lines.chain([verdict.to_string()]).collect()
}

/// What measurements need.
pub struct Measuring {
    pub cpu: Cpu,
    pub pool: Pool,
}

/// How fast the processor computes experts, for `--json`.
#[derive(Serialize)]
struct CpuExperts {
    line: Line,
    speed: Speed,
}

fn processor() -> (Vec<Finding>, Option<(Measuring, CpuExperts)>) {
    let cpu = match Cpu::new(CpuOptions::default()) {
        Ok(cpu) => cpu,
        Err(error) => {
            let found = format!("cannot start the threads that compute: {error}");
            let next = "raise this user's limit of processes (ulimit -u)";
            return (vec![Finding::new("processor", State::Bad, found).next(next)], None);
        }
    };
    let threads = threads(&cpu);
    let measured = expert_speed::pool().and_then(|pool| {
        let line = cpu.pinned(|| expert_speed::line(&cpu, &pool, USUAL));
        let (line, speed) = line.map_err(expert_speed::no_thread)??;
        Ok((Measuring { cpu, pool }, CpuExperts { line, speed }))
    });
    match measured {
        Ok(measured) => (vec![threads, experts(&measured.1)], Some(measured)),
        Err(failure) => {
            let finding = Finding::new("experts", State::Note, failure.to_string());
            (vec![threads, finding], None)
        }
    }
}

fn experts(CpuExperts { line, speed }: &CpuExperts) -> Finding {
    let disturbed = if speed.disturbed { ", beside other programs" } else { "" };
    let found = format!(
        "those of {} in {} and {} on the processor: {:.1} GB/s ({} at once), {:.0} % of a plain \
         read{disturbed}; {:.0} us to start",
        USUAL.of,
        USUAL.gate_up.name(),
        USUAL.down.name(),
        speed.gb_s,
        speed.experts,
        speed.share * 100.0,
        line.start_us
    );
    Finding::new("experts", State::Ok, found)
}

fn threads(cpu: &Cpu) -> Finding {
    let about = "processor";
    let threads = cpu.threads();
    let plural = if threads == 1 { "" } else { "s" };
    let found = format!("{threads} thread{plural}, {}", cpu.isa().name());
    match cpu.isa() {
        Isa::Scalar => Finding::new(about, State::Note, found)
            .next("without AVX2 and FMA, or NEON, everything is several times slower"),
        _ => Finding::new(about, State::Ok, found),
    }
}

/// With less, not even the demo model and its cache fit well.
const LEAST_BYTES: u64 = 256 << 20;

fn memory_of_machine() -> Finding {
    let available = memory::available();
    if available.bytes == u64::MAX {
        let found = "this system does not say how much is free".to_string();
        return Finding::new("memory", State::Note, found).next("give --ram SIZE to every command");
    }
    let found = format!("{} free ({})", bytes(available.bytes), available.according_to);
    match available.bytes {
        LEAST_BYTES.. => Finding::new("memory", State::Ok, found),
        _ => Finding::new("memory", State::Bad, found).next("end other programs"),
    }
}

/// Frames that the disk is tried with.
const FRAMES: ClassSpec = ClassSpec { frame_bytes: 2 << 20, frames: 16 };

fn model_and_disk(path: Option<&Path>) -> (Vec<Finding>, Option<DiskReport>) {
    let opened = model::path_or_demo(path).and_then(|path| {
        let opened = OpenedModel::open(&path, &mut |_| {})?;
        Ok((path, opened))
    });
    let (path, opened) = match opened {
        Ok(opened) => opened,
        Err(failure) => {
            let next = "name a .gguf file or a folder with --model PATH";
            let finding = Finding::new("model", State::Bad, failure.to_string()).next(next);
            return (vec![finding], None);
        }
    };
    let size = bytes(opened.files().total_bytes());
    let found =
        format!("{}: {}, {size}", path.display(), opened.description().architecture.title());
    let (of_disk, report) = disk(&opened);
    (vec![Finding::new("model", State::Ok, found), of_disk], report)
}

/// How experts would be read from where the model lies.
fn disk(model: &OpenedModel) -> (Finding, Option<DiskReport>) {
    let names = model.files().paths().iter().cloned();
    let files: Vec<_> = names.zip(model.files().identities()).collect();
    let tried = Frames::new(&[FRAMES])
        .and_then(|frames| disk::probe(&files, &frames, &DiskOptions::default()));
    match tried {
        Err(error) => {
            let finding = Finding::new("disk", State::Bad, error.to_string());
            (finding.next("copy the model to a local disk"), None)
        }
        Ok((_, report)) => {
            let found = plan::disk_line(&report);
            let finding = match report.choice {
                DiskChoice::Buffered => Finding::new("disk", State::Note, found).next(
                    "a model larger than memory streams faster from a disk that has O_DIRECT",
                ),
                _ => Finding::new("disk", State::Ok, found),
            };
            (finding, Some(report))
        }
    }
}

/// A model's own decoding while it is streamed.
fn decode(model: &Path) -> (Option<Decoding>, Finding) {
    let about = "decoding";
    match decoding::measure(model) {
        Ok(Some(found)) => {
            let words = format!(
                "{} of memory: {:.1} ms a token; weights of every token {:.1} GB/s, experts {:.1} \
                 GB/s beside the disk ({:.2} GB/s), planning {:.0} us a layer",
                found.of,
                found.ms_per_token,
                found.dense_gb_s,
                found.experts_gb_s,
                found.disk_gb_s,
                found.plan_us
            );
            (Some(found), Finding::new(about, State::Ok, words))
        }
        Ok(None) => {
            let words = "not measured: the model has no experts to stream, or is too small";
            let next = "name a model of the size that you mean to run with --model";
            (None, Finding::new(about, State::Note, words.to_string()).next(next))
        }
        Err(failure) => {
            let words = format!("not measured: {failure}");
            (None, Finding::new(about, State::Note, words))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_finding_and_what_to_do_next() {
        let mut report = Report {
            version: "0",
            can_run: true,
            findings: vec![
                Finding::new("processor", State::Ok, "2 threads".to_string()),
                Finding::new("gpu", State::Note, "none".to_string()).next("buy one"),
            ],
            gpus: Vec::new(),
            cpu_experts: None,
            decoding: None,
            limits: Limits { locked_bytes: None, wsl: false },
        };
        let lines = text(&report);
        assert_eq!(
            lines,
            "ok    processor  2 threads\nnote  gpu        none; buy one\nmodels can run here"
        );
        report.findings[0].state = State::Bad;
        report.can_run = false;
        assert!(text(&report).starts_with("BAD   processor"));
        assert!(text(&report).contains("cannot run"));
    }

    #[test]
    fn a_model_that_is_not_there_is_bad_and_says_what_to_name() {
        let (found, _) = model_and_disk(Some(Path::new("/nowhere/model.gguf")));
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].about, found[0].state), ("model", State::Bad));
        assert!(found[0].found.contains("/nowhere/model.gguf"), "{found:?}");
        assert!(found[0].next.as_ref().is_some_and(|next| next.contains("--model")));
    }
}
