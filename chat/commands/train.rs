//! `pregate train-predictor`: forecasts from recorded routing.

use crate::{
    cli::TrainArgs,
    commands::replay::check_memory,
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
use pregate_traces::{
    Provenance,
    train::{self, Corpus, evaluate},
};
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
    let goal = goal(args)?;
    let corpus = corpus(&args.traces, args.model.as_deref())?;
    let all = 0..corpus.sequences.len();
    let (held, learned): (Vec<usize>, Vec<usize>) =
        all.partition(|sequence| sequence % HELD_OUT == HELD_OUT - 1);
    let trained = match goal {
        Goal::Judge(file) => read(file, &corpus)?,
        Goal::Train(out) => {
            let trained = train(&corpus, &learned, args);
            let file = trained.to_bytes();
            save::write_whole(out, |to| to.write_all(&file))?;
            let size = bytes(file.len() as u64);
            let layers = trained.dimensions.layers;
            line(&format!(
                "{}: {size}, {layers} layers, {} token ids, {} for eviction",
                out.display(),
                trained.ids.len(),
                if trained.value.is_some() { "tables" } else { "no tables" }
            ))?;
            trained
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

/// Which file is judged, or written.
enum Goal<'a> {
    Judge(&'a Path),
    Train(&'a Path),
}

/// What is wanted. The answer does not replace what is learned from.
fn goal(args: &TrainArgs) -> Result<Goal<'_>, Failure> {
    let out = match (&args.evaluate, &args.out) {
        (Some(file), _) => return Ok(Goal::Judge(file)),
        (None, Some(out)) => out,
        (None, None) => {
            return Err(Failure::Usage("--out FILE or --evaluate FILE is needed".to_string()));
        }
    };
    let traces = args.traces.iter().flat_map(|trace| pregate_traces::files(trace));
    if traces.chain(args.model.clone()).any(|read| save::is_same_file(&read, out)) {
        return Err(Failure::Usage(format!("--out {}: is read", out.display())));
    }
    // Better now than behind minutes of training.
    save::check_place(out)?;
    Ok(Goal::Train(out))
}

/// The first `limit` tokens of traces, which must be of one model, and the
/// traces of which some had no room.
fn gather(traces: &[PathBuf], limit: usize) -> Result<(Corpus, Vec<&Path>), Failure> {
    let (mut corpus, mut cut): (Option<Corpus>, Vec<&Path>) = (None, Vec::new());
    for path in traces {
        let mut source = pregate_traces::open(path)?;
        check_memory(path, source.header())?;
        let corpus = corpus.get_or_insert_with(|| Corpus::new(source.header().clone()));
        if let Some(problem) = corpus.differs(source.header()) {
            return Err(Failure::Usage(format!("{}: {problem}", path.display())));
        }
        if !corpus.add(source.as_mut(), limit)? {
            cut.push(path);
        }
        if let Provenance::Synthetic { .. } = source.header().source {
            eprintln!("note: {} is SYNTHETIC: nobody's routing", path.display());
        }
        if let Some(notice) = source.notice() {
            eprintln!("warning: {}: {notice}", path.display());
        }
    }
    let corpus = corpus.ok_or_else(|| Failure::Usage("no trace was given".to_string()))?;
    Ok((corpus, cut))
}

/// All traces, as the model of all of them or `model` says.
fn corpus(traces: &[PathBuf], model: Option<&Path>) -> Result<Corpus, Failure> {
    let (mut corpus, cut) = gather(traces, MOST_TOKENS)?;
    for path in cut {
        eprintln!(
            "warning: {}: not all of it is used: {MOST_TOKENS} tokens of all traces are the most",
            path.display()
        );
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;
    use pregate_predictor::Shape;
    use pregate_traces::{Header, Row, format::Writer};

    fn trace(path: &Path, tokens: u32, fingerprint: Option<[u8; 32]>) {
        let shape = Shape::uniform(1, 4, 1, 0);
        let header = Header { shape, fingerprint, ..Header::default() };
        let mut writer = Writer::new(std::fs::File::create(path).unwrap(), &header, &[]).unwrap();
        for position in 0..tokens {
            let mut row = Row::default();
            (row.pass_tokens, row.position, row.starts_sequence) = (1, position, position == 0);
            row.push_layer(&[0], &[]);
            writer.push(&row).unwrap();
        }
        writer.finish().unwrap();
    }

    #[test]
    fn a_trace_is_not_replaced_by_what_was_learned_from_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        trace(file.path(), 30, None);
        let before = std::fs::read(file.path()).unwrap();
        let name = file.path().to_str().unwrap();
        let cli = Cli::parse_from(["pregate", "train-predictor", name, "--out", name]);
        let Some(Command::TrainPredictor(args)) = cli.command else { panic!("another command") };
        let refused = run(&args).unwrap_err();
        assert!(matches!(refused, Failure::Usage(_)), "{refused}");
        assert_eq!(std::fs::read(file.path()).unwrap(), before);
    }

    #[test]
    fn what_has_no_room_is_told_and_every_fingerprint_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b, c, damaged] = ["a", "b", "c", "d"].map(|name| folder.path().join(name));
        trace(&a, 30, None);
        trace(&b, 30, Some([1; 32]));
        trace(&c, 30, Some([2; 32]));
        let two = [a.clone(), b.clone()];
        let (corpus, cut) = gather(&two, 60).unwrap();
        assert_eq!((corpus.tokens(), cut), (60, vec![]));
        assert_eq!(corpus.header.fingerprint, Some([1; 32]));
        let (corpus, cut) = gather(&two, 59).unwrap();
        assert_eq!((corpus.tokens(), cut), (59, vec![b.as_path()]));
        // The first one says nothing; the others are of two models.
        let other = gather(&[a, b.clone(), c], 90).err().unwrap();
        assert!(matches!(other, Failure::Usage(_)), "{other}");
        assert!(other.to_string().contains("another model"), "{other}");
        // A file that is broken is no mistake of the call.
        let mut bytes = std::fs::read(&b).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&damaged, bytes).unwrap();
        let broken = gather(&[damaged], 90).err().unwrap();
        assert!(matches!(broken, Failure::File(_)), "{broken}");
    }
}
