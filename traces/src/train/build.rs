//! From traces to a file of trained forecasts.

use super::corpus::Corpus;
use super::network::{self, Settings};
use super::samples::{self, Wanted};
use super::tokens::{TokenCounts, frequent};
use super::value::{FARTHEST, Fit, fit};
use super::{path, tables};
use crate::Row;
use pregate_predictor::forecast::learned::{Binding, Dimensions, LIMIT_BYTES, Trained};
use pregate_predictor::policy::learned::{Fitted, Network, fitted};
use pregate_predictor::{LayerShape, Shape};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How to train.
#[derive(Clone, Debug)]
pub struct Options {
    pub seed: u64,
    pub threads: usize,
    /// Of the file.
    pub limit_bytes: usize,
    /// Of the networks; `None`: as many as the amount of samples wants.
    pub epochs: Option<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 1, threads: 2, limit_bytes: LIMIT_BYTES, epochs: None }
    }
}

/// Samples of a layer that its epochs together see about.
const SEEN: usize = 400_000;
/// Memory for the samples of the layers that a thread trains, about.
const SAMPLE_BYTES: usize = 256 << 20;
/// One in so many sequences is for the early stop.
const CHECKED: usize = 12;

/// The tables for eviction may take this share of the file, in percent: wider
/// models do without, since they grow with experts squared. With 48 layers of
/// 128 experts they take 37.
const VALUE_PERCENT: usize = 40;
/// Tokens that they are trained on, the newest: each takes some 200 us.
const VALUE_TOKENS: usize = 1 << 17;
/// Of fewer nothing is learned: most have no future in the trace.
const VALUE_LEAST: usize = 2 * FARTHEST;

/// Work is counted in percents of a layer; this is all of it.
pub fn work(corpus: &Corpus) -> usize {
    100 * (corpus.shape().moe().count() + 2)
}

/// Trains on `sequences`. `told` hears, from any thread, what was done. The
/// answer does not depend on the number of threads.
pub fn train(
    corpus: &Corpus,
    sequences: &[usize],
    options: &Options,
    told: &(dyn Fn(usize) + Sync),
) -> Trained {
    let ids = frequent(corpus, sequences);
    let value_bytes = fitted::bytes(corpus.shape());
    let value_bytes =
        value_bytes.filter(|bytes| bytes / VALUE_PERCENT <= options.limit_bytes / 100);
    // The header and the layers of the file take some.
    let others = 1024 + 4 * corpus.shape().layers.len() + value_bytes.unwrap_or(0);
    let room = options.limit_bytes.saturating_sub(others);
    let dimensions = Dimensions::fitting(corpus.shape(), ids.len(), room);
    let mut ids = ids;
    ids.truncate(dimensions.ids);
    ids.sort_unstable();
    let counts = TokenCounts::new(corpus, sequences, &ids);
    let binding =
        Binding { model: corpus.header.model.clone(), fingerprint: corpus.header.fingerprint };
    let shape = plain(corpus.shape());
    let mut trained = Trained { binding, shape, dimensions, ids, ..Trained::default() };
    tables::train(corpus, sequences, &counts, &mut trained);
    let layers = dimensions.networks();
    let group = group(corpus, sequences, &dimensions);
    let job = Job { corpus, sequences, options, dimensions, counts: &counts, told };
    let networks = Mutex::new(vec![None; layers]);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..options.threads.clamp(1, layers.max(1)) {
            scope.spawn(|| {
                loop {
                    let first = group * next.fetch_add(1, Ordering::Relaxed);
                    if first >= layers {
                        break;
                    }
                    for (layer, parts) in job.networks(first..(first + group).min(layers)) {
                        networks.lock().expect("no thread panics here")[layer] = Some(parts);
                    }
                }
            });
        }
        path::train(corpus, sequences, &counts, &mut trained, options.seed, &mut |n| told(n));
        if value_bytes.is_some() {
            trained.value = value(corpus, sequences, options.seed, told);
        }
    });
    let networks = networks.into_inner().expect("all threads have ended");
    trained.networks = networks.into_iter().flatten().collect();
    trained
}

/// The tables for eviction; `None` from too few tokens.
fn value(
    corpus: &Corpus,
    sequences: &[usize],
    seed: u64,
    told: &(dyn Fn(usize) + Sync),
) -> Option<Fitted> {
    let mut rows: Vec<Row> = Vec::new();
    for &sequence in sequences.iter().rev() {
        let range = corpus.range(sequence);
        if rows.len() + range.len() > VALUE_TOKENS {
            break;
        }
        // Backwards, until all are turned round.
        rows.extend(range.rev().map(|token| corpus.row(token)));
        rows.last_mut().expect("a sequence has tokens").starts_sequence = true;
    }
    rows.reverse();
    if rows.len() < VALUE_LEAST {
        return None;
    }
    let options = Fit { seed, ..Fit::default() };
    let fingerprint = corpus.header.fingerprint;
    let mut done = 0;
    let fitted =
        fit(&rows, corpus.shape(), fingerprint, &Network::universal(), options, &mut |pass, _| {
            let percents = 100 * (pass + 1) / options.passes - done;
            done += percents;
            told(percents);
        });
    Some(fitted)
}

/// Experts and top-k alone.
fn plain(shape: &Shape) -> Shape {
    let plain = |layer: &LayerShape| LayerShape { expert_bytes: 0, class: 0, ..*layer };
    Shape { layers: shape.layers.iter().map(|layer| layer.as_ref().map(plain)).collect() }
}

/// Layers whose samples fit the memory.
fn group(corpus: &Corpus, sequences: &[usize], dimensions: &Dimensions) -> usize {
    let tokens: usize = sequences.iter().map(|&sequence| corpus.range(sequence).len()).sum();
    let fields = pregate_predictor::forecast::learned::input::FIELDS;
    let sample_bytes = 2 * fields * dimensions.experts + 256;
    (SAMPLE_BYTES / (2 * tokens * sample_bytes).max(1)).clamp(1, 4)
}

struct Job<'a> {
    corpus: &'a Corpus,
    sequences: &'a [usize],
    options: &'a Options,
    dimensions: Dimensions,
    counts: &'a TokenCounts,
    told: &'a (dyn Fn(usize) + Sync),
}

type Parts = [pregate_predictor::forecast::learned::matrix::Matrix; 5];

impl Job<'_> {
    /// The networks of the MoE layers `places`.
    fn networks(&self, places: std::ops::Range<usize>) -> Vec<(usize, Parts)> {
        let numbered = || self.sequences.iter().enumerate();
        let is_checked = |at: usize| at % CHECKED == CHECKED - 1;
        let learned: Vec<usize> = numbered().filter(|s| !is_checked(s.0)).map(|s| *s.1).collect();
        let checked: Vec<usize> = numbered().filter(|s| is_checked(s.0)).map(|s| *s.1).collect();
        let collect = |sequences: &[usize]| {
            let (places, reach) = (places.clone(), self.dimensions.reach);
            samples::collect(self.corpus, sequences, places, reach, self.counts, Wanted::Training)
        };
        let sizes = self.dimensions.network();
        let both = collect(&learned).into_iter().zip(collect(&checked));
        let network = |(place, (samples, checked)): (usize, (_, samples::Samples))| {
            let samples: samples::Samples = samples;
            let epochs = (SEEN / samples.len().max(1)).clamp(3, 8);
            let epochs = self.options.epochs.unwrap_or(epochs);
            let settings = Settings { epochs, ..Settings::default() };
            let seed = self.options.seed.wrapping_add(1 + place as u64);
            let mut told = |percents| (self.told)(percents);
            let weights = network::train(&sizes, &samples, &checked, &settings, seed, &mut told);
            (place, sizes.to_matrices(&weights))
        };
        places.clone().zip(both).map(network).collect()
    }
}
