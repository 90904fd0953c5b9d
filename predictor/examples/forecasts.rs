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
use std::time::Instant;

use pregate_predictor::forecast::{Forecaster, Options};
use pregate_predictor::ledger::Ledger;
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
}

fn report(manifest: &str) {
    let trace = Trace::open(Path::new(manifest));
    let shape = online::shape(&trace);
    let options = Options::default();
    let horizon = options.horizon;
    let mut forecaster = Forecaster::new(&shape, options);
    let columns = forecaster.columns();
    let mut ledgers = [0, 1].map(|_| Ledger::new(&shape, columns.clone(), horizon));
    let half = trace.tokens / 2;
    let start = Instant::now();
    online::run(&trace, 0..half, &mut forecaster, &mut ledgers[0]);
    let reliability = online::run(&trace, half..trace.tokens, &mut forecaster, &mut ledgers[1]);
    let time = start.elapsed();
    println!(
        "\n{manifest}: {} tokens, {} layers, top-{} of {}",
        trace.tokens, trace.layers, trace.top_k, trace.experts
    );
    println!(
        "{:18} {:>6} {:>12} {:>12} {:>10} {:>10}",
        "forecast", "ahead", "1st half", "2nd half", "whole set", "gate mass"
    );
    let percent = |value: Option<f64>| value.map_or("-".into(), |v| format!("{:.1} %", 100.0 * v));
    let cold = ledgers[0].totals();
    for row in ledgers[1].totals() {
        let same = |c: &&_| same_row(c, &row);
        let first = cold.iter().find(same).and_then(|c| c.tally.slot_recall());
        println!(
            "{:18} {:>6} {:>12} {:>12} {:>10} {:>10}",
            row.forecast,
            row.ahead,
            percent(first),
            percent(row.tally.slot_recall()),
            percent(row.tally.whole_set_rate()),
            percent(row.tally.gate_mass_recall()),
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
        time.as_secs_f64() * 1e6 / layers,
        forecaster.memory_bytes() as f64 / 1e6
    );
}

fn same_row(a: &pregate_predictor::ledger::Recall, b: &pregate_predictor::ledger::Recall) -> bool {
    a.forecast == b.forecast && a.ahead == b.ahead
}
