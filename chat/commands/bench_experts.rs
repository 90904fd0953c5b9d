//! `pregate bench --experts`: how fast the processor computes experts from
//! memory, without a model.

use crate::{
    cli::BenchArgs,
    device,
    exit::Failure,
    expert_speed::{self, Effort, Pages, Pool, Shape, Speed},
    memory, output,
    progress::Progress,
};
use pregate_kernels::Backend;
use serde::Serialize;

/// Experts that one token has on the processor.
const AT_ONCE: [usize; 4] = [1, 2, 4, 8];

/// The fields of `--json`; scripts read them by name.
#[derive(Serialize)]
struct Report {
    backend: String,
    threads: usize,
    pool_bytes: usize,
    rounds: usize,
    results: Vec<Measured>,
    /// Of the sources, where PREGATE_COMMIT was set at build time.
    commit: Option<&'static str>,
}

#[derive(Serialize)]
struct Measured {
    pages: Pages,
    #[serde(flatten)]
    shape: Shape,
    expert_bytes: usize,
    speeds: Vec<Speed>,
}

pub fn run(args: &BenchArgs) -> Result<(), Failure> {
    let cpu = device::processor(args.device.threads)?;
    let effort = fitting(Effort::full(args.repetitions))?;
    let shapes = expert_speed::shapes();
    let mut bar = Progress::new("measuring", "shapes", 2 * shapes.len());
    let mut results = Vec::new();
    for pages in [Pages::Huge, Pages::Small] {
        let pool = Pool::new(pages, effort.pool_bytes)?;
        for &shape in &shapes {
            let of = |at_once| expert_speed::measure(&cpu, &pool, shape, at_once, effort);
            let speeds = cpu.pinned(|| AT_ONCE.map(of)).map_err(expert_speed::no_thread)?;
            let speeds = speeds.into_iter().collect::<Result<_, _>>()?;
            results.push(Measured { pages, shape, expert_bytes: shape.bytes(), speeds });
            bar.set(results.len());
        }
    }
    drop(bar);
    let report = Report {
        backend: cpu.describe(),
        threads: cpu.threads(),
        pool_bytes: effort.pool_bytes,
        rounds: effort.rounds,
        results,
        commit: option_env!("PREGATE_COMMIT"),
    };
    match args.json {
        true => output::json(&report),
        false => output::line(text(&report).trim_end()),
    }
}

/// With less the caches would help.
const LEAST_POOL_BYTES: usize = 128 << 20;

/// A smaller pool where memory is short: half of what is free.
fn fitting(effort: Effort) -> Result<Effort, Failure> {
    let half = usize::try_from(memory::available().bytes / 2).unwrap_or(usize::MAX);
    if half < LEAST_POOL_BYTES {
        return Err(Failure::Resources(format!(
            "measuring needs {} of free memory, there are {}",
            output::bytes(2 * LEAST_POOL_BYTES as u64),
            output::bytes(2 * half as u64)
        )));
    }
    Ok(Effort { pool_bytes: effort.pool_bytes.min(half), ..effort })
}

fn text(report: &Report) -> String {
    let mut lines = vec![format!(
        "{}; medians of up to {} rounds over {}; GB/s, share of what plain reads reach",
        report.backend,
        report.rounds,
        output::bytes(report.pool_bytes as u64)
    )];
    for pages in [Pages::Huge, Pages::Small] {
        let heads = AT_ONCE.map(|count| format!("{:>13}", format!("{count} at once")));
        lines.push(format!("\n{:<34}{}   read", pages.name(), heads.concat()));
        lines.extend(report.results.iter().filter(|row| row.pages == pages).map(row));
    }
    let speeds = || report.results.iter().flat_map(|row| &row.speeds);
    let left_out: usize = speeds().map(|speed| speed.left_out).sum();
    let kept: usize = speeds().map(|speed| speed.rounds.len()).sum();
    if left_out > 0 {
        let why = "other programs took the processor";
        lines.push(format!("\n{left_out} rounds beside these {kept} were left out: {why}"));
    }
    if speeds().any(|speed| speed.disturbed) {
        lines.push("* no round without other programs on the processor".to_string());
    }
    lines.join("\n")
}

fn row(of: &Measured) -> String {
    let Shape { of: model, gate_up, down, .. } = of.shape;
    let formats = if gate_up == down {
        gate_up.name().to_string()
    } else {
        format!("{}, {}", gate_up.name(), down.name())
    };
    let cell = |speed: &Speed| {
        let mark = if speed.disturbed { "*" } else { "" };
        format!("{:>6.1}{mark} {:>4.0} %", speed.gb_s, speed.share * 100.0)
    };
    let cells: String = of.speeds.iter().map(|speed| format!("{:>13}", cell(speed))).collect();
    let reads: Vec<f64> = of.speeds.iter().map(|speed| speed.read_gb_s).collect();
    let read = expert_speed::median(&reads).unwrap_or(0.0);
    format!("{model:<15}{formats:<19}{cells}{read:>7.1}")
}
