//! What each forecast is worth on recorded routing, learning while it runs:
//!
//! `cargo run --release -p pregate-predictor --example forecasts -- TRACE.json...`
//!
//! Prints slot recall, whole-set rate and gate-mass recall per forecast and
//! distance, how well the blend's probabilities are calibrated, and the time
//! per layer.

#[path = "../tests/support/online.rs"]
mod online;
#[path = "../tests/support/rtrace.rs"]
mod rtrace;

use std::path::Path;
use std::sync::OnceLock;
use std::time::Instant;

use pregate_predictor::Shape;
use pregate_predictor::forecast::{Forecaster, Options};
use pregate_predictor::ledger::{Ledger, Recall};
use rtrace::Trace;

fn main() {
    let manifests: Vec<String> = std::env::args().skip(1).collect();
    if manifests.is_empty() {
        eprintln!("usage: forecasts TRACE.json...");
        std::process::exit(64);
    }
    for manifest in &manifests {
        report(manifest);
    }
    println!("\ntime per layer of routed + forecast, without external scores:");
    for (experts, top_k) in [(32, 4), (64, 8), (128, 8), (256, 8)] {
        println!("{experts:>5} experts, top-{top_k}: {:.1} us", layer_us(experts, top_k));
    }
}

/// Time that this thread has computed; where the system does not say, since
/// the first call.
fn cpu_ns() -> u128 {
    static START: OnceLock<Instant> = OnceLock::new();
    std::fs::read_to_string("/proc/thread-self/schedstat")
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or_else(|| START.get_or_init(Instant::now).elapsed().as_nanos())
}

/// Mean time of one layer's forecasts in a model of 48 layers, on routing
/// that is partly predictable.
fn layer_us(experts: u32, top_k: usize) -> f64 {
    const LAYERS: usize = 48;
    const TOKENS: u32 = 120;
    let shape = Shape::uniform(LAYERS, experts as usize, top_k, 1);
    let mut forecaster = Forecaster::new(&shape, Options::default());
    let mut ledger = Ledger::new(&shape, forecaster.columns(), forecaster.horizon());
    let mut state = 1u64;
    let mut ns = 0;
    let mut random = |limit: u32| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u32 % limit
    };
    let weights = vec![1.0 / top_k as f32; top_k];
    for _ in 0..TOKENS {
        let token = random(50);
        let paths: Vec<Vec<u32>> = (0..LAYERS as u32)
            .map(|layer| {
                let mut set: Vec<u32> = Vec::new();
                while set.len() < top_k {
                    let noise = if random(3) == 0 { random(experts) } else { 0 };
                    let id = (token * 7 + layer * 5 + 3 * set.len() as u32 + noise) % experts;
                    let id = if set.contains(&id) { random(experts) } else { id };
                    if !set.contains(&id) {
                        set.push(id);
                    }
                }
                set
            })
            .collect();
        let start = cpu_ns();
        forecaster.begin_token(token);
        for (layer, path) in paths.iter().enumerate() {
            forecaster.routed(layer, path, &weights, &mut ledger);
            forecaster.forecast(Some(layer), &|_| true);
        }
        ns += cpu_ns() - start;
    }
    ns as f64 / 1e3 / f64::from(TOKENS) / LAYERS as f64
}

fn report(manifest: &str) {
    let trace = Trace::open(Path::new(manifest));
    let shape = online::shape(&trace);
    let options = Options::default();
    let horizon = options.horizon;
    let mut forecaster = Forecaster::new(&shape, options);
    let columns = forecaster.columns();
    // The first half of the tokens, then the second without and with loops.
    let mut ledgers = [0, 1, 2].map(|_| Ledger::new(&shape, columns.clone(), horizon));
    let mut reliability = online::Reliability::default();
    let start = cpu_ns();
    for (index, &first) in trace.starts.iter().enumerate() {
        let end = trace.starts.get(index + 1).copied().unwrap_or(trace.tokens);
        let half =
            if first < trace.tokens / 2 { 0 } else { 1 + usize::from(trace.repetitive[index]) };
        let part = online::run(&trace, first..end, &mut forecaster, &mut ledgers[half]);
        if half > 0 {
            online::add(&mut reliability, &part);
        }
    }
    let time_ns = cpu_ns() - start;
    println!(
        "\n{manifest}: {} tokens, {} layers, top-{} of {}",
        trace.tokens, trace.layers, trace.top_k, trace.experts
    );
    println!(
        "{:18} {:>6} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "forecast", "ahead", "1st half", "2nd half", "whole set", "gate mass", "loops"
    );
    let percent = |value: Option<f64>| value.map_or("-".into(), |v| format!("{:.1} %", 100.0 * v));
    let [cold, warm, loops] = ledgers.map(|ledger| ledger.totals());
    for row in &warm {
        let recall = |rows: &[Recall]| {
            let same = |c: &&Recall| c.forecast == row.forecast && c.ahead == row.ahead;
            rows.iter().find(same).and_then(|c| c.tally.slot_recall())
        };
        println!(
            "{:18} {:>6} {:>10} {:>10} {:>10} {:>10} {:>10}",
            row.forecast,
            row.ahead,
            percent(recall(&cold)),
            percent(row.tally.slot_recall()),
            percent(row.tally.whole_set_rate()),
            percent(row.tally.gate_mass_recall()),
            percent(recall(&loops)),
        );
    }
    println!("\nblend, one layer ahead, 2nd half: probability said, share that came true, guesses");
    for (count, sum, hits) in reliability.into_iter().filter(|(count, ..)| *count > 0) {
        let count_f = count as f64;
        println!("{:8.3} {:8.3} {count:>10}", sum / count_f, hits as f64 / count_f);
    }
    let layers = (trace.tokens * trace.layers) as f64;
    println!(
        "\n{:.1} us per layer (the trace's own reading included), {:.1} MB held",
        time_ns as f64 / 1e3 / layers,
        forecaster.memory_bytes() as f64 / 1e6
    );
}
