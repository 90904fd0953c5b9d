//! Hit ratios of every policy on recorded routing, beside Belady's bound.
//!
//! `cargo run --release -p pregate-predictor --example policies -- MANIFEST...`
//! with rtrace-1 manifests. Caches start cold and are kept across sequences; so
//! do the forecasts, which learn while they run. The time is that of a whole
//! event, replay and forecasts included.

#[path = "../tests/support/replay.rs"]
mod replay;
#[path = "../tests/support/rtrace.rs"]
mod rtrace;

use pregate_predictor::forecast::{Forecaster, Options};
use pregate_predictor::{Policy, Scope, policy};
use rtrace::Trace;
use std::path::Path;
use std::time::Instant;

const FRACTIONS: [f64; 3] = [0.25, 0.5, 0.75];

fn main() {
    let manifests: Vec<String> = std::env::args().skip(1).collect();
    assert!(!manifests.is_empty(), "give the manifests of rtrace-1 files");
    for manifest in &manifests {
        let trace = Trace::open(Path::new(manifest));
        let Trace { tokens, layers, top_k, experts, .. } = trace;
        println!("{manifest}: {tokens} tokens, {layers} layers, top-{top_k} of {experts}");
        println!("{:24}{:>8}{:>8}{:>8}{:>12}", "hit ratio", "25 %", "50 %", "75 %", "us/event");
        for name in policy::NAMES {
            let make = || policy::by_name(name).expect("it is listed");
            if name.starts_with("forecast-aware") {
                let blend = || Some(Forecaster::new(&replay::shape(&trace), Options::default()));
                row(&trace, name, &make, &blend);
            } else {
                row(&trace, name, &make, &|| None);
            }
        }
        for (name, scope, may_bypass) in
            [("belady", Scope::Layer, false), ("belady, may bypass", Scope::Layer, true)]
        {
            let make =
                || -> Box<dyn Policy> { Box::new(replay::belady(&trace, scope, may_bypass)) };
            row(&trace, name, &make, &|| None);
        }
    }
}

fn row(
    trace: &Trace,
    name: &str,
    policy: &dyn Fn() -> Box<dyn Policy>,
    forecaster: &dyn Fn() -> Option<Forecaster>,
) {
    print!("{name:24}");
    let events = trace.tokens * trace.layers;
    let mut seconds = 0.0;
    for fraction in FRACTIONS {
        let slots = trace.top_k.max((fraction * trace.experts as f64) as usize);
        let (policy, forecaster) = (policy(), forecaster());
        let start = Instant::now();
        let hits = replay::hits(trace, slots, policy, forecaster);
        seconds += start.elapsed().as_secs_f64();
        print!("{:>8.4}", hits as f64 / (events * trace.top_k) as f64);
    }
    println!("{:>12.2}", seconds * 1e6 / (events * FRACTIONS.len()) as f64);
}
