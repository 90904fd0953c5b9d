//! Does a forecast that prices itself ever lose?
//!
//! `cargo run --release -p pregate-traces --example pricing -- TRACE... MACHINE...`
//!
//! Replays every trace on every machine (a preset's name, a `.toml` file, or
//! `all` presets) at 12.5, 25, 50 and 75 % of the experts, with each policy, without
//! and with each forecast. Prints tokens per second without one, hits in
//! percent with LRU's and Belady's behind, and for each forecast the speed as
//! a share of that without, with its hits. Fails where one is more than 1 %
//! slower. From the environment: `POLICY`, `FORECAST` and `SHARES` (lists with
//! commas), `TOKENS` cuts the traces, `JOBS` replays at once. `PREDICTOR`, a
//! file of `pregate train-predictor`, stands for the usual forecasts: those in
//! it, and the blend of all. Bytes of experts and of what else is read are
//! those of the model that the trace names; `EXPERT_BYTES` and `DENSE_BYTES`
//! stand for them.

use pregate_predictor::forecast::learned::Trained;
use pregate_predictor::forecast::{Forecaster, LEARNED, NAMES, USEFUL, learned_by_name};
use pregate_predictor::policy::{DEFAULT, by_name};
use pregate_traces::replay::{
    Machine, MemoryTrace, Options, Report, Slots, models, presets, replay, replay_with,
};
use std::error::Error;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Of the experts that each layer has.
const SHARES: &str = "0.125,0.25,0.5,0.75";

fn text(name: &str, otherwise: &str) -> String {
    std::env::var(name).unwrap_or(otherwise.to_string())
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn list(text: &str) -> Vec<String> {
    text.split(',').map(str::to_string).collect()
}

/// A row: all forecasts of one trace, machine, policy and size.
struct Row<'a> {
    trace: &'a (String, MemoryTrace),
    machine: &'a Machine,
    policy: &'a str,
    share: f64,
}

/// The words of a row, and its slowest forecast's share of the speed without.
fn run(
    row: &Row<'_>,
    forecasts: &[String],
    trained: Option<&Arc<Trained>>,
) -> Result<(String, f64, String), String> {
    let (name, trace) = row.trace;
    let mut trace = MemoryTrace::new(trace.header.clone(), trace.rows.clone());
    let model = models::by_name(&trace.header.model);
    let expert = model.map_or(13_219_200, |model| model.expert_bytes());
    let dense = model.map_or(1_300_000_000, |model| model.other_bytes());
    let title = format!("{name} {} {} {}", row.machine.name, row.policy, row.share);
    let mut of = |forecast: &str, bracket: bool| -> Result<Report, String> {
        let options = Options {
            slots: Slots::Share(row.share),
            forecast: forecast.to_string(),
            expert_bytes: Some(number("EXPERT_BYTES", expert)),
            dense_bytes: number("DENSE_BYTES", dense),
            policy: row.policy.to_string(),
            bracket,
            ..Options::default()
        };
        let shape = &trace.header.shape;
        let trained = trained.filter(|_| forecast != "none");
        let forecaster = trained.and_then(|trained| {
            Forecaster::by_name_with(forecast, shape, options.horizon, trained)
        });
        let report = match (trained, by_name(row.policy)) {
            (Some(_), Some(policy)) if forecaster.is_some() => {
                replay_with(&mut trace, row.machine, &options, policy, forecaster, &mut |_| {})
            }
            (Some(_), _) => return Err(format!("no forecast {forecast} in the file")),
            (None, _) => replay(&mut trace, row.machine, &options, &mut |_| {}),
        };
        report.map_err(|error| error.to_string())
    };
    let none = of("none", true)?;
    let percent = |hits: u64| hits as f64 / none.accesses.max(1) as f64 * 100.0;
    let bracket = none.bracket.unwrap_or_default();
    let mut words = format!(
        "{title}: {:.2} tok/s, {:.1} ({:.1}-{:.1}) |",
        none.tok_s,
        percent(none.hits),
        percent(bracket.lru_hits),
        percent(bracket.belady_hits),
    );
    let mut worst = (f64::INFINITY, String::new());
    for forecast in forecasts {
        let report = of(forecast, false)?;
        let ratio = report.tok_s / none.tok_s;
        words += &format!(" {forecast} {ratio:.4} ({:.1})", percent(report.hits));
        if ratio < worst.0 {
            worst = (ratio, format!("{title} {forecast}"));
        }
    }
    Ok((words, worst.0, worst.1))
}

fn main() -> Result<(), Box<dyn Error>> {
    let (mut traces, mut machines) = (Vec::new(), Vec::new());
    for arg in std::env::args().skip(1) {
        if arg == "all" {
            machines.extend(presets::names().filter_map(presets::preset));
        } else if let Some(machine) = presets::preset(&arg) {
            machines.push(machine);
        } else if arg.ends_with(".toml") {
            machines.push(presets::read(Path::new(&arg))?);
        } else {
            let mut source = pregate_traces::open(Path::new(&arg))?;
            let most = number("TOKENS", u64::MAX) as usize;
            traces.push((arg, MemoryTrace::read(&mut *source, most)?));
        }
    }
    let policies = list(&text("POLICY", DEFAULT));
    let trained = std::env::var("PREDICTOR").ok();
    let trained = trained.map(|file| -> Result<_, Box<dyn Error>> {
        let trained = Arc::new(Trained::parse(&std::fs::read(file)?)?);
        for (_, trace) in &traces {
            trained.check(&trace.header.shape, trace.header.fingerprint.as_ref())?;
        }
        Ok(trained)
    });
    let trained = trained.transpose()?;
    let named = match &trained {
        Some(trained) => {
            LEARNED.into_iter().filter(|name| learned_by_name(name, trained).is_some()).collect()
        }
        None => NAMES[..USEFUL].to_vec(),
    };
    let usual: Vec<&str> = ["blend"].into_iter().chain(named).collect();
    let forecasts = list(&text("FORECAST", &usual.join(",")));
    let shares: Result<Vec<f64>, _> =
        list(&text("SHARES", SHARES)).iter().map(|s| s.parse()).collect();
    let mut rows = Vec::new();
    for trace in &traces {
        for machine in &machines {
            for policy in &policies {
                let row = |&share| Row { trace, machine, policy, share };
                rows.extend(shares.clone()?.iter().map(row));
            }
        }
    }
    let (next, worst) = (AtomicUsize::new(0), Mutex::new((f64::INFINITY, String::new())));
    let work = || -> Result<(), String> {
        while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (words, ratio, which) = run(row, &forecasts, trained.as_ref())?;
            println!("{words}");
            let mut worst = worst.lock().expect("nobody panics with it");
            if ratio < worst.0 {
                *worst = (ratio, which);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| -> Result<(), String> {
        let jobs: Vec<_> = (0..number("JOBS", 2)).map(|_| scope.spawn(work)).collect();
        jobs.into_iter().try_for_each(|job| job.join().expect("replay does not panic"))
    })?;
    let (ratio, which) = worst.into_inner()?;
    println!("worst of {} rows: {ratio:.4} {which}", rows.len());
    if ratio < 0.99 { Err("a forecast is more than 1 % slower than none".into()) } else { Ok(()) }
}
