//! Million accesses per second of processor time, by what is replayed:
//!
//! `cargo run --release -p pregate-traces --example speed -- TRACE.json MACHINE.toml [PREDICTOR]`
//!
//! Counting LRU alone, and the whole engine with each policy and forecast, at
//! 25 %; with a file of `pregate train-predictor` those that were trained, too.
//! `EXPERT_BYTES` stands for what the trace does not say; `ONLY` leaves all
//! lines out that do not begin with it.

use pregate_predictor::forecast::learned::Trained;
use pregate_predictor::forecast::{self, Forecaster};
use pregate_predictor::policy;
use pregate_traces::replay::count::Count;
use pregate_traces::replay::{Machine, MemoryTrace, Options, Slots, replay, replay_with};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Time that this thread has computed; where the system does not say, since
/// `start`.
fn cpu_s(start: Instant) -> f64 {
    std::fs::read_to_string("/proc/thread-self/schedstat")
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse::<f64>().ok())
        .map_or_else(|| start.elapsed().as_secs_f64(), |ns| ns / 1e9)
}

/// Whether the line that begins so is wanted.
fn is_wanted(line: &str) -> bool {
    std::env::var("ONLY").map_or(true, |only| line.starts_with(&only))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let (trace, machine, predictor) = match &args[..] {
        [_, trace, machine] => (trace, machine, None),
        [_, trace, machine, predictor] => (trace, machine, Some(predictor)),
        _ => return Err("usage: speed TRACE.json MACHINE.toml [PREDICTOR]".into()),
    };
    let start = Instant::now();
    let machine = Machine::from_toml(&std::fs::read_to_string(machine)?)?;
    let mut source = pregate_traces::open(Path::new(trace))?;
    let mut trace = MemoryTrace::read(&mut *source, usize::MAX)?;
    let slots = Slots::Share(0.25).per_layer(&trace.header.shape);
    let before = cpu_s(start);
    let hits = Count { slots: &slots, warm_up: 0 }.lru(&mut *source)?;
    let rate = |accesses: u64, before: f64| accesses as f64 / 1e6 / (cpu_s(start) - before);
    println!("counting LRU, file read anew: {:.1} M/s", rate(hits.requests, before));
    let bytes = std::env::var("EXPERT_BYTES").ok().and_then(|text| text.parse().ok());
    let both = policy::NAMES.iter().map(|&policy| (policy, "none"));
    let useful = forecast::NAMES[..forecast::USEFUL].iter().map(|&one| (policy::DEFAULT, one));
    for (policy, forecast) in both.chain(useful).chain([(policy::DEFAULT, "blend")]) {
        if !is_wanted(&format!("{policy}, {forecast}:")) {
            continue;
        }
        let options = Options {
            policy: policy.to_string(),
            forecast: forecast.to_string(),
            expert_bytes: Some(bytes.unwrap_or(13_219_200)),
            dense_bytes: 1_300_000_000,
            bracket: false,
            ..Options::default()
        };
        let before = cpu_s(start);
        let report = replay(&mut trace, &machine, &options, &mut |_| {})?;
        println!("{policy}, {forecast}: {:.2} M/s", rate(report.accesses, before));
    }
    let Some(predictor) = predictor else { return Ok(()) };
    let trained = Arc::new(Trained::parse(&std::fs::read(predictor)?)?);
    let shape = trace.header.shape.clone();
    trained.check(&shape, trace.header.fingerprint.as_ref())?;
    let learned = forecast::LEARNED.iter().map(|&one| (one, 3));
    // The same, asked about the next layer and the next token alone.
    let near = ("learned-network", 1);
    for policy in ["lru", policy::DEFAULT] {
        for (forecast, horizon) in learned.clone().chain([near, ("blend", 3)]) {
            let line = format!("{policy}, {forecast}, trained, {horizon} ahead:");
            if !is_wanted(&line) {
                continue;
            }
            let Some(forecaster) = Forecaster::by_name_with(forecast, &shape, horizon, &trained)
            else {
                continue;
            };
            let options = Options {
                policy: policy.to_string(),
                forecast: forecast.to_string(),
                horizon,
                expert_bytes: Some(bytes.unwrap_or(13_219_200)),
                dense_bytes: 1_300_000_000,
                bracket: false,
                ..Options::default()
            };
            let rule = policy::by_name(policy).expect("it is listed");
            let before = cpu_s(start);
            let report =
                replay_with(&mut trace, &machine, &options, rule, Some(forecaster), &mut |_| {})?;
            let rate = rate(report.accesses, before);
            let us = shape.moe().next().map_or(0, |(_, layer)| layer.top_k) as f64 / rate;
            println!("{line} {rate:.2} M/s, {us:.1} us a layer");
        }
    }
    Ok(())
}
