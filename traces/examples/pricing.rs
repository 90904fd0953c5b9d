//! Does a forecast that prices itself ever lose?
//!
//! `cargo run --release -p pregate-traces --example pricing -- TRACE.json... MACHINE.toml...`
//!
//! Replays every trace on every machine at 12.5, 25, 50 and 75 % of the experts, without
//! and with each forecast, and prints tokens per second, the forecasts' as a
//! share of the speed without. Fails where one is more than 1 % slower.
//! `EXPERT_BYTES` and `DENSE_BYTES` stand for what a trace does not say;
//! `TOKENS` cuts the traces, `POLICY` is another one than
//! the default. In brackets are hit ratio and million accesses per second.

use pregate_predictor::forecast::{NAMES, USEFUL};
use pregate_predictor::policy::DEFAULT;
use pregate_traces::replay::{Machine, MemoryTrace, Options, Slots, replay};
use std::path::Path;
use std::time::Instant;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut traces, mut machines) = (Vec::new(), Vec::new());
    for arg in std::env::args().skip(1) {
        match arg.ends_with(".toml") {
            true => machines.push(Machine::from_toml(&std::fs::read_to_string(&arg)?)?),
            false => {
                let mut source = pregate_traces::open(Path::new(&arg))?;
                let most = number("TOKENS", u64::MAX) as usize;
                traces.push((arg, MemoryTrace::read(&mut *source, most)?));
            }
        }
    }
    let mut worst = (f64::INFINITY, String::new());
    for (name, trace) in &mut traces {
        for machine in &machines {
            for share in [0.125, 0.25, 0.5, 0.75] {
                let mut without = 0.0;
                print!("{name} {} {share}:", machine.name);
                for forecast in ["none", "blend"].iter().chain(&NAMES[..USEFUL]) {
                    let options = Options {
                        slots: Slots::Share(share),
                        forecast: forecast.to_string(),
                        expert_bytes: Some(number("EXPERT_BYTES", 13_219_200)),
                        dense_bytes: number("DENSE_BYTES", 1_300_000_000),
                        policy: std::env::var("POLICY").unwrap_or(DEFAULT.to_string()),
                        bracket: false,
                        ..Options::default()
                    };
                    let start = Instant::now();
                    let report = replay(trace, machine, &options, &mut |_| {})?;
                    let rate = report.accesses as f64 / 1e6 / start.elapsed().as_secs_f64();
                    if *forecast == "none" {
                        without = report.tok_s;
                        print!(" none {without:.2} tok/s ({:.3}, {rate:.1} M/s)", report.hit_ratio);
                        continue;
                    }
                    let ratio = report.tok_s / without;
                    print!(" {forecast} {ratio:.4} ({:.3}, {rate:.2})", report.hit_ratio);
                    if ratio < worst.0 {
                        worst = (ratio, format!("{name} {} {share} {forecast}", machine.name));
                    }
                }
                println!();
            }
        }
    }
    println!("worst: {:.4} {}", worst.0, worst.1);
    if worst.0 < 0.99 { Err("a forecast is more than 1 % slower than none".into()) } else { Ok(()) }
}
