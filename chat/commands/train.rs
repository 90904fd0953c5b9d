//! `pregate train-predictor`: forecasts from recorded routing.

use crate::{
    cli::TrainArgs,
    exit::Failure,
    model,
    output::{bytes, line},
    progress::Progress,
    save,
};
use pregate_predictor::forecast::{
    self, Forecast, Forecaster, LEARNED, LEARNED_USEFUL, NAMES, USEFUL,
    learned::{LIMIT_BYTES, Trained},
};
use pregate_traces::train::{self, Corpus, evaluate};
use std::path::{Path, PathBuf};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};
use std::time::Instant;

/// Tokens of traces that are held in memory.
const MOST_TOKENS: usize = 1 << 20;
/// One in so many sequences is held out.
const HELD_OUT: usize = 8;
/// Layers ahead up to which forecasts are judged.
const HORIZON: usize = 8;

pub fn run(args: &TrainArgs) -> Result<(), Failure> {
    let corpus = corpus(&args.traces, args.model.as_deref())?;
    let all = 0..corpus.sequences.len();
    let (held, learned): (Vec<usize>, Vec<usize>) =
        all.partition(|sequence| sequence % HELD_OUT == HELD_OUT - 1);
    let trained = match (&args.evaluate, &args.out) {
        (Some(file), _) => read(file, &corpus)?,
        (None, Some(out)) => {
            let trained = train(&corpus, &learned, args);
            let file = trained.to_bytes();
            save::write_whole(out, |to| to.write_all(&file))?;
            let size = bytes(file.len() as u64);
            let layers = trained.dimensions.layers;
            line(&format!(
                "{}: {size}, {layers} layers, {} token ids",
                out.display(),
                trained.ids.len()
            ))?;
            trained
        }
        (None, None) => {
            return Err(Failure::Usage("--out FILE or --evaluate FILE is needed".to_string()));
        }
    };
    // A file that is judged was trained elsewhere, on other sequences.
    let held: Vec<usize> =
        if args.evaluate.is_some() { learned.into_iter().chain(held).collect() } else { held };
    if held.is_empty() {
        return line("nothing was held out: that takes 8 sequences, or as many times 2048 tokens");
    }
    let tokens: usize = held.iter().map(|&sequence| corpus.range(sequence).len()).sum();
    let what = if args.evaluate.is_some() { "" } else { "held out: " };
    line(&format!(
        "\n{what}{} sequences, {tokens} tokens\n{}",
        held.len(),
        judged(&corpus, &held, trained).trim_end()
    ))
}

/// All traces, which must be of one model.
fn corpus(traces: &[PathBuf], model: Option<&Path>) -> Result<Corpus, Failure> {
    let mut corpus: Option<Corpus> = None;
    let failed = |error: pregate_traces::TraceError| Failure::Usage(error.to_string());
    for path in traces {
        let mut source = pregate_traces::open(path).map_err(failed)?;
        let corpus = corpus.get_or_insert_with(|| Corpus::new(source.header().clone()));
        if let Some(problem) = corpus.differs(source.header()) {
            return Err(Failure::Usage(format!("{}: {problem}", path.display())));
        }
        corpus.add(source.as_mut(), MOST_TOKENS).map_err(failed)?;
    }
    let mut corpus = corpus.ok_or_else(|| Failure::Usage("no trace was given".to_string()))?;
    if let Some(path) = model {
        let opened = model::open(path)?;
        let shape = &opened.layout().shape;
        if let Some(problem) = corpus.differs_in_shape(shape) {
            return Err(Failure::Usage(format!("{}: {problem}", path.display())));
        }
        let here = opened.fingerprint()?;
        if corpus.header.fingerprint.is_some_and(|recorded| recorded != here) {
            let problem = "the traces were recorded with another model";
            return Err(Failure::Usage(format!("{}: {problem}", path.display())));
        }
        corpus.header.fingerprint = Some(here);
    }
    Ok(corpus)
}

fn train(corpus: &Corpus, learned: &[usize], args: &TrainArgs) -> Trained {
    let options = train::Options {
        threads: args.threads.unwrap_or_else(|| train::Options::default().threads),
        seed: args.seed,
        ..train::Options::default()
    };
    let bar = Mutex::new(Progress::new("training", "%", 100));
    let (done, all) = (AtomicUsize::new(0), train::work(corpus));
    let start = Instant::now();
    let trained = train::train(corpus, learned, &options, &|percents| {
        let done = done.fetch_add(percents, Ordering::Relaxed) + percents;
        if let Ok(mut bar) = bar.lock() {
            bar.set(100 * done / all);
        }
    });
    drop(bar);
    eprintln!("trained in {:.0} s", start.elapsed().as_secs_f64());
    trained
}

fn read(file: &Path, corpus: &Corpus) -> Result<Trained, Failure> {
    let name = || file.display().to_string();
    let size = std::fs::metadata(file).map_err(|error| Failure::io(name(), error))?.len();
    if size > LIMIT_BYTES as u64 {
        return Err(Failure::Usage(format!("{}: {size} bytes; not trained forecasts", name())));
    }
    let bytes = std::fs::read(file).map_err(|error| Failure::io(name(), error))?;
    let wrong = |error| Failure::Usage(format!("{}: {error}", name()));
    let trained = Trained::parse(&bytes).map_err(wrong)?;
    trained.check(corpus.shape(), corpus.header.fingerprint.as_ref()).map_err(wrong)?;
    Ok(trained)
}

/// A table of all forecasts on `held`. Those that learn while they run begin
/// with nothing there.
fn judged(corpus: &Corpus, held: &[usize], trained: Trained) -> String {
    let (shape, trained) = (corpus.shape(), Arc::new(trained));
    let online = NAMES[..USEFUL].iter().filter_map(|n| forecast::by_name(n, shape, HORIZON));
    let learned = LEARNED[..LEARNED_USEFUL].iter();
    let learned = learned.filter_map(|n| forecast::learned_by_name(n, &trained));
    let mut forecasts: Vec<Box<dyn Forecast>> = online.chain(learned).collect();
    let mut blend = Forecaster::by_name_with("blend", shape, HORIZON, &trained);
    let scores = evaluate::evaluate(corpus, held, &mut forecasts, blend.as_mut(), 1, &|_| 0);
    evaluate::table(&scores[0])
}
