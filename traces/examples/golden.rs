//! LRU's and Belady's hits beside those of `golden_dev.json`:
//!
//! `cargo run --release -p pregate-traces --example golden -- FOLDER`
//!
//! `FOLDER` has the golden file and the traces that it names. Fails where a
//! count differs. The last columns are million accesses per second, reading
//! of the file included.

use pregate_predictor::Scope;
use pregate_traces::replay::count::Count;
use serde_json::Value;
use std::path::PathBuf;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder: PathBuf = std::env::args().nth(1).ok_or("usage: golden FOLDER")?.into();
    let golden: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("golden_dev.json"))?)?;
    let traces = golden.as_object().ok_or("golden_dev.json is no object")?;
    println!(
        "{:22} {:>6} {:>10} {:>10} {:>10} {:>10} {:>7} {:>7}",
        "trace", "slots", "LRU", "golden", "Belady", "golden", "LRU/s", "Bel./s"
    );
    let mut wrong = 0;
    for (name, facts) in traces {
        let Ok(mut trace) = pregate_traces::open(&folder.join(format!("{name}.json"))) else {
            println!("{name:22} is not here");
            continue;
        };
        let shape = trace.header().shape.clone();
        for (slots, want) in facts["event_atomic_per_layer"].as_object().into_iter().flatten() {
            let each: usize = slots.parse()?;
            let slots: Vec<usize> =
                shape.layers.iter().map(|layer| layer.map_or(0, |_| each)).collect();
            let count = Count { slots: &slots, warm_up: 0 };
            let start = Instant::now();
            let lru = count.lru(&mut *trace)?;
            let lru_s = start.elapsed().as_secs_f64();
            let start = Instant::now();
            let belady = count.belady(&mut *trace, Scope::Layer, false)?;
            let belady_s = start.elapsed().as_secs_f64();
            let wants = [&want["lru_hits"], &want["belady_hits"], &want["accesses"]];
            let found = [lru.hits, belady.hits, lru.requests];
            let is_right = wants.iter().zip(found).all(|(want, found)| **want == found);
            wrong += usize::from(!is_right);
            let rate = |seconds: f64| lru.requests as f64 / 1e6 / seconds;
            println!(
                "{name:22} {each:>6} {:>10} {:>10} {:>10} {:>10} {:>7.1} {:>7.1}{}",
                lru.hits,
                wants[0],
                belady.hits,
                wants[1],
                rate(lru_s),
                rate(belady_s),
                if is_right { "" } else { "  WRONG" }
            );
        }
    }
    if wrong > 0 { Err(format!("{wrong} counts differ").into()) } else { Ok(()) }
}
