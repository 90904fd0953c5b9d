//! Trains forecasts on a part of a trace and judges all of them on the rest:
//!
//! `cargo run --release -p pregate-traces --example forecasts -- TRACE [--train DATASET] [--save FILE]`
//!
//! `--times` trains nothing and measures times alone. Held out is every fifth
//! sequence, or with `--train` all that are not of that data set. Those that learn while they run have seen the training sequences.

use pregate_predictor::forecast::hostile::untrained;
use pregate_predictor::forecast::learned::{Binding, Dimensions, LIMIT_BYTES, Trained};
use pregate_predictor::forecast::{self, Forecast, Forecaster, Known, LEARNED, NAMES, USEFUL};
use pregate_traces::train::{self, Corpus, evaluate};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

fn main() {
    let mut args = std::env::args().skip(1);
    let (mut trace, mut dataset, mut save, mut load) = (None, None, None, None);
    let mut only_times = false;
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--train" => dataset = args.next(),
            "--save" => save = args.next(),
            "--load" => load = args.next(),
            "--times" => only_times = true,
            _ => trace = Some(arg),
        }
    }
    let Some(trace) = trace else {
        eprintln!("usage: forecasts TRACE [--train DATASET] [--save FILE] [--load FILE] [--times]");
        std::process::exit(64);
    };
    let mut source = pregate_traces::open(Path::new(&trace)).expect("a trace");
    let mut corpus = Corpus::new(source.header().clone());
    corpus.add(source.as_mut(), usize::MAX).expect("a whole trace");
    let is_learned = |sequence: &usize| match &dataset {
        Some(name) => corpus.sequences[*sequence].dataset == *name,
        None => sequence % 5 != 4,
    };
    let all = 0..corpus.sequences.len();
    let (learned, held): (Vec<usize>, Vec<usize>) = all.partition(is_learned);
    let tokens = |set: &[usize]| set.iter().map(|&s| corpus.range(s).len()).sum::<usize>();
    println!("{trace}: {} tokens to train, {} to judge", tokens(&learned), tokens(&held));

    if only_times {
        let sizes = Dimensions::fitting(corpus.shape(), 1 << 16, LIMIT_BYTES - (1 << 16));
        let trained = untrained(corpus.shape(), Binding::default(), sizes.numbers());
        println!("weights that mean nothing, {sizes:?}");
        return times(&corpus, &held, &Arc::new(trained));
    }
    let start = Instant::now();
    let trained = match load {
        Some(path) => {
            let bytes = std::fs::read(path).expect("a file");
            Trained::parse(&bytes).expect("trained forecasts")
        }
        None => train::train(&corpus, &learned, &train::Options::default(), &|_| ()),
    };
    let bytes = trained.to_bytes();
    println!(
        "trained in {:.0} s, {} bytes, {:?}",
        start.elapsed().as_secs_f64(),
        bytes.len(),
        trained.dimensions
    );
    if let Some(path) = save {
        std::fs::write(path, &bytes).expect("a file");
    }
    let trained = Arc::new(Trained::parse(&bytes).expect("what was just written"));
    let (shape, horizon) = (corpus.shape(), 8);
    let online = NAMES[..USEFUL].iter().filter_map(|n| forecast::by_name(n, shape, horizon));
    let learned_ones = LEARNED.iter().filter_map(|n| forecast::learned_by_name(n, &trained));
    let mut forecasts: Vec<Box<dyn Forecast>> = online.chain(learned_ones).collect();
    evaluate::warm(&corpus, &learned, &mut forecasts);
    let mut blend = Forecaster::by_name_with("blend", shape, horizon, &trained).expect("a blend");
    evaluate::warm_blend(&corpus, &learned, &mut blend);
    let group = |sequence: usize| usize::from(corpus.sequences[sequence].is_repetitive);
    let scores = evaluate::evaluate(&corpus, &held, &mut forecasts, Some(&mut blend), 2, &group);
    for (name, scores) in ["", ", sequences flagged repetitive"].iter().zip(scores) {
        if scores.iter().any(|score| score.questions > 0) {
            println!("\nheld out{name}:\n{}", evaluate::table(&scores));
        }
    }
    times(&corpus, &held, &trained);
}

/// What every forecast takes and holds.
fn times(corpus: &Corpus, held: &[usize], trained: &Arc<Trained>) {
    let shape = corpus.shape();
    println!("\nmicroseconds per layer (one layer ahead, the next token, learning), bytes held:");
    for name in NAMES[..USEFUL].iter().chain(&LEARNED) {
        let forecast = forecast::by_name(name, shape, 1);
        if let Some(mut forecast) = forecast.or_else(|| forecast::learned_by_name(name, trained)) {
            let us = layer_us(corpus, held, forecast.as_mut());
            println!("{name:22} {us:6.1} {:>10}", forecast.memory_bytes());
        }
    }
}

/// Seconds that this thread has computed.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_whitespace().next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}

/// Mean time for a layer: what was used, a question about the next layer, and
/// one about the next token.
fn layer_us(corpus: &Corpus, held: &[usize], forecast: &mut dyn Forecast) -> f64 {
    let layers = corpus.shape().layers.len();
    let nothing = vec![Vec::new(); layers];
    let mut known = nothing.clone();
    let mut scores = Vec::new();
    let (mut seconds, mut count) = (0.0, 0);
    for token in held.iter().flat_map(|&sequence| corpus.range(sequence)).take(1500) {
        let start = cpu_seconds();
        forecast.begin_token(corpus.ids[token].unwrap_or(token as u32));
        known.iter_mut().for_each(Vec::clear);
        for (layer, shape) in corpus.shape().moe() {
            scores.clear();
            scores.resize(shape.experts, 0.0);
            let asked = Known { token: Some(0), routed: &known };
            forecast.scores(layer, &asked, &mut scores);
            known[layer].extend(corpus.experts(token, layer).iter().map(|&e| u32::from(e)));
            forecast.routed(layer, &known[layer], corpus.weights(token, layer));
            let next = Known { token: None, routed: &nothing };
            forecast.scores(layer, &next, &mut scores);
            count += 1;
        }
        seconds += cpu_seconds() - start;
    }
    1e6 * seconds / f64::from(count.max(1))
}
