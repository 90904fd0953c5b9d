//! How near each policy comes to Belady's rule.
//!
//! `cargo run --release -p pregate-traces --example eviction -- train OUT TRACE...`
//! trains the universal network on four of five sequences of the traces.
//!
//! `cargo run --release -p pregate-traces --example eviction -- fit OUT TRACE`
//! trains the tables of one model, on the same part of its trace.
//!
//! `cargo run --release -p pregate-traces --example eviction -- TRACE...`
//! prints the share of the gap between LRU and Belady that each policy closes
//! on the fifth sequences (those that training left out) and on all. `--value
//! FILE` takes the network from FILE, `--fitted FILE` adds the policies with
//! tables, `--warm` leaves out the cold caches, `--held-out` the whole traces.
//!
//! Behind `adaptive-layer` stands how far it lies below the best fixed policy
//! (of separate caches) in the group of four layers where that is farthest.
//!
//! Caches are per layer unless a name ends in `pool`; an event's experts are
//! asked for together. Warm: caches live on over sequences. Cold: every
//! sequence finds an empty one. Policies' histories live on in both.

use pregate_predictor::policy::learned::{Fitted, Network};
use pregate_predictor::policy::{self, Belady, Event, Learned, Policy};
use pregate_predictor::{Admission, Cache, ExpertId, NoOutlook, Scope, Shape};
use pregate_traces::train::value::{Collector, Fit, Options, Samples, fit, read, train};
use pregate_traces::{Row, open};
use std::path::Path;
use std::time::Instant;

type Failure = Box<dyn std::error::Error>;

fn is_held_out(sequence: usize) -> bool {
    sequence % 5 == 4
}

#[derive(Default)]
struct Settings {
    traces: Vec<String>,
    value: Option<String>,
    fitted: Option<String>,
    warm: bool,
    held_out: bool,
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["train", out, _, ..] => return teach(out, &arguments[2..]),
        ["fit", out, trace] => return tables(out, trace),
        ["speed"] => {
            speed();
            return Ok(());
        }
        _ => {}
    }
    let mut settings = Settings::default();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--value" => settings.value = arguments.next(),
            "--fitted" => settings.fitted = arguments.next(),
            "--warm" => settings.warm = true,
            "--held-out" => settings.held_out = true,
            _ => settings.traces.push(argument),
        }
    }
    if settings.traces.is_empty() {
        return Err("give traces, or: train OUT TRACE..., or: fit OUT TRACE".into());
    }
    print(&settings)
}

/// Microseconds of an event on a model of 128 experts, on routing that keeps
/// 6 of 10 experts of the token before.
fn speed() {
    let shape = Shape::uniform(48, 128, 8, 1);
    let mut state = 1u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % below
    };
    let mut rows = vec![Row::default(); 1500];
    let mut last = vec![(0..8).collect::<Vec<u16>>(); 48];
    for row in &mut rows {
        for experts in &mut last {
            experts.retain(|_| random(10) < 6);
            while experts.len() < 8 {
                // Two of them, the smaller: some experts are more common.
                let expert = random(128).min(random(128)) as u16;
                if !experts.contains(&expert) {
                    experts.push(expert);
                }
            }
            row.push_layer(experts, &[]);
        }
    }
    for name in
        ["lru", "frequency-layer", "frequency-pool", "learned", "adaptive-layer", "adaptive"]
    {
        for slots in [32, 64] {
            let make = || policy::by_name(name).expect("it is listed");
            let best = (0..3).map(|_| replay(&rows, &shape, slots, make(), false));
            let best = best.min_by(|a, b| a.micros.total_cmp(&b.micros)).expect("three");
            println!("{name}, {slots} of 128: {:.2} us, hits {:.4}", best.micros, best.ratio());
        }
    }
}

fn tables(out: &str, trace: &str) -> Result<(), Failure> {
    let start = Instant::now();
    let mut source = open(Path::new(trace))?;
    let rows = read(&mut *source, &|sequence| !is_held_out(sequence))?;
    let header = source.header();
    let told = &mut |pass, [plain, with]: [f64; 2]| {
        let passed = start.elapsed();
        println!("pass {pass}: squared error {plain:.5} without, {with:.5} with, {passed:.0?}");
    };
    let network = Network::universal();
    let fitted = fit(&rows, &header.shape, header.fingerprint, &network, Fit::default(), told);
    std::fs::write(out, fitted.to_bytes())?;
    Ok(())
}

fn teach(out: &str, traces: &[String]) -> Result<(), Failure> {
    let start = Instant::now();
    let mut all = Samples::default();
    for path in traces {
        let mut source = open(Path::new(path))?;
        let rows = read(&mut *source, &|sequence| !is_held_out(sequence))?;
        let mut collector = Collector::new(&source.header().shape, 0.02, 7);
        rows.iter().for_each(|row| collector.token(row));
        let Samples { features, targets } = collector.finish();
        println!("{path}: {} tokens, {} samples", rows.len(), features.len());
        all.features.extend(features);
        all.targets.extend(targets);
    }
    let network = train(&all, Options::default(), &mut |epoch, error| {
        println!("epoch {epoch}: squared error {error:.5}, {:.0?}", start.elapsed());
    });
    std::fs::write(out, network.to_bytes())?;
    Ok(())
}

#[derive(Clone, Default)]
struct Hits {
    uses: u64,
    hits: u64,
    micros: f64,
    /// Of each layer.
    layers: Vec<[u64; 2]>,
}

/// Layers of a group whose hits are compared.
const GROUP: usize = 4;
/// With caches per layer, which `adaptive-layer` chooses among.
const FIXED: [&str; 4] = ["lfu", "least-stale", "frequency-layer", "learned"];

impl Hits {
    fn ratio(&self) -> f64 {
        self.hits as f64 / self.uses as f64
    }

    /// Hit ratios of groups of layers.
    fn groups(&self) -> impl Iterator<Item = f64> {
        self.layers.chunks(GROUP).map(|layers| {
            let sum = |of: usize| layers.iter().map(|layer| layer[of]).sum::<u64>() as f64;
            sum(1) / sum(0).max(1.0)
        })
    }
}

/// How far `found` lies below the best of `fixed` in the group of layers where
/// that is farthest.
fn farthest_below(found: &Hits, fixed: &[Hits]) -> f64 {
    let groups = found.groups().enumerate().map(|(group, ratio)| {
        let best = fixed.iter().filter_map(|one| one.groups().nth(group)).fold(0.0, f64::max);
        best - ratio
    });
    groups.fold(0.0, f64::max)
}

/// Nanoseconds that this thread had a processor, where the system tells; a
/// clock elsewhere.
fn now_ns(start: Instant) -> f64 {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let told = told.and_then(|text| text.split(' ').next()?.parse().ok());
    told.unwrap_or(start.elapsed().as_nanos() as f64)
}

/// One policy over one trace.
fn replay(rows: &[Row], shape: &Shape, slots: usize, rule: Box<dyn Policy>, cold: bool) -> Hits {
    let mut cache = Cache::new(shape, &vec![slots; shape.layers.len()], rule).expect("slots");
    let mut total = Hits { layers: vec![[0; 2]; shape.layers.len()], ..Hits::default() };
    let (mut experts, mut missing, ones) = (Vec::new(), Vec::new(), [1; 64]);
    let start = Instant::now();
    let began = now_ns(start);
    for row in rows {
        if row.starts_sequence {
            if cold {
                for layer in 0..shape.layers.len() {
                    experts.clear();
                    experts.extend(cache.resident(layer));
                    experts.iter().for_each(|&e| cache.remove(ExpertId::new(layer, e)));
                }
            }
            cache.new_sequence();
        }
        cache.next_token();
        for layer in 0..row.layers() {
            experts.clear();
            experts.extend(row.experts(layer).iter().map(|&expert| u32::from(expert)));
            if experts.is_empty() {
                continue;
            }
            missing.clear();
            let ids = experts.iter().map(|&expert| ExpertId::new(layer, expert));
            missing.extend(ids.filter(|&id| !cache.contains(id)));
            total.uses += experts.len() as u64;
            total.hits += (experts.len() - missing.len()) as u64;
            total.layers[layer][0] += experts.len() as u64;
            total.layers[layer][1] += (experts.len() - missing.len()) as u64;
            let counts = &ones[..experts.len()];
            cache.used(&Event { layer, experts: &experts, counts, tokens: 1 });
            for &id in &missing {
                let _: Admission = cache.admit(id, &|_| false, &NoOutlook);
            }
        }
    }
    let events = (rows.len() * shape.moe().count()) as f64;
    total.micros = (now_ns(start) - began) * 1e-3 / events;
    total
}

fn bound(rows: &[Row], scope: Scope) -> Box<dyn Policy> {
    let mut rule = Belady::new(scope, false);
    for row in rows {
        for layer in (0..row.layers()).filter(|&layer| !row.experts(layer).is_empty()) {
            let experts = row.experts(layer).iter().map(|&expert| u32::from(expert));
            rule.foresee(layer, &experts.collect::<Vec<_>>());
        }
    }
    Box::new(rule)
}

/// What to call a policy, and how to make it.
type Maker<'a> = (&'a str, Box<dyn Fn() -> Box<dyn Policy> + 'a>);

fn print(settings: &Settings) -> Result<(), Failure> {
    let network = &match &settings.value {
        Some(path) => Network::from_bytes(&std::fs::read(path)?)?,
        None => Network::universal(),
    };
    let tables = settings.fitted.as_ref().map(std::fs::read).transpose()?;
    for path in &settings.traces {
        let mut source = open(Path::new(path))?;
        let shape = source.header().shape.clone();
        let named = |name: &'static str| -> Maker<'_> {
            (name, Box::new(move || policy::by_name(name).expect("it is listed")))
        };
        let adaptive = |scope| -> Box<dyn Fn() -> Box<dyn Policy> + '_> {
            Box::new(move || Box::new(Learned::adaptive(scope, network.clone())))
        };
        let learned = || -> Box<dyn Policy> { Box::new(Learned::new(network.clone())) };
        let mut makers: Vec<Maker<'_>> = vec![
            named("lfu"),
            named("least-stale"),
            named("frequency-layer"),
            ("learned", Box::new(learned)),
            ("adaptive-layer", adaptive(Scope::Layer)),
            named("frequency-pool"),
            ("adaptive (pool)", adaptive(Scope::Pool)),
        ];
        if let Some(bytes) = &tables {
            let fitted = Fitted::from_bytes(bytes, &shape, source.header().fingerprint)?;
            for (name, scope) in [("fitted-layer", Scope::Layer), ("fitted (pool)", Scope::Pool)] {
                let (network, fitted) = (network.clone(), fitted.clone());
                let make = move || -> Box<dyn Policy> {
                    Box::new(Learned::fitted(scope, network.clone(), fitted.clone()))
                };
                makers.push((name, Box::new(make)));
            }
        }
        let (layers, layer) = (shape.moe().count(), *shape.moe().next().ok_or("no experts")?.1);
        println!("\n{path}: {layers} layers, top-{} of {}", layer.top_k, layer.experts);
        println!("share of the gap between LRU and Belady (hit ratio) [us an event]");
        let parts = [("held-out sequences", true), ("all sequences", false)];
        for (what, held_out) in parts.into_iter().take(if settings.held_out { 1 } else { 2 }) {
            let rows = read(&mut *source, &|sequence| !held_out || is_held_out(sequence))?;
            for cold in [false, true].into_iter().take(if settings.warm { 1 } else { 2 }) {
                for percent in [25, 50] {
                    let slots = layer.top_k.max(layer.experts * percent / 100);
                    let run = |rule| replay(&rows, &shape, slots, rule, cold);
                    let lru = run(policy::by_name("lru").expect("it is listed"));
                    let belady = run(bound(&rows, Scope::Layer));
                    print!(
                        "{what}, {}, {percent} %: LRU {:.4} [{:.1}], Belady {:.4}",
                        if cold { "cold" } else { "warm" },
                        lru.ratio(),
                        lru.micros,
                        belady.ratio()
                    );
                    let mut fixed = vec![lru.clone()];
                    for (name, make) in &makers {
                        let found = run(make());
                        let share = (found.ratio() - lru.ratio()) / (belady.ratio() - lru.ratio());
                        print!(", {name} {share:.3} ({:.4}) [{:.1}]", found.ratio(), found.micros);
                        if *name == "adaptive-layer" {
                            print!(" {:.4} below", farthest_below(&found, &fixed));
                        }
                        if FIXED.contains(name) {
                            fixed.push(found);
                        }
                    }
                    println!();
                }
            }
        }
    }
    Ok(())
}
