//! Training on made-up routing with a known rule.

use super::corpus::{Corpus, Rng};
use super::evaluate::{NEXT_TOKEN, Score, evaluate};
use super::network::{Scratch, backward, start};
use super::tokens::TokenCounts;
use super::{Options, train};
use crate::{Header, Row, Sequence, Source, TraceError};
use pregate_predictor::Shape;
use pregate_predictor::forecast::learned::input::{FIELDS, Rows};
use pregate_predictor::forecast::learned::network::Sizes;
use pregate_predictor::forecast::learned::{LearnedNetwork, LearnedPath, LearnedTables, Trained};
use pregate_predictor::forecast::{Forecast, Forecaster};
use std::sync::Arc;

const LAYERS: usize = 3;
const EXPERTS: u16 = 8;

/// Sequences of 40 tokens of six ids. An id says what layer 0 uses, and each
/// layer what the next one uses.
struct Ruled {
    header: Header,
    rng: Rng,
    tokens: u32,
    at: u32,
    ids: bool,
}

fn ruled(tokens: u32, ids: bool) -> Ruled {
    let shape = Shape::uniform(LAYERS, usize::from(EXPERTS), 2, 0);
    let header = Header { model: "ruled".to_string(), shape, ..Header::default() };
    Ruled { header, rng: Rng(4), tokens, at: 0, ids }
}

impl Source for Ruled {
    fn header(&self) -> &Header {
        &self.header
    }

    fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
        row.clear();
        if self.at == self.tokens {
            return Ok(false);
        }
        row.starts_sequence = self.at.is_multiple_of(40);
        row.position = self.at % 40;
        let id = self.rng.below(6) as u16;
        row.token = self.ids.then_some(100 + u32::from(id));
        let mut first = (id * 3) % EXPERTS;
        for layer in 0..LAYERS as u16 {
            row.push_layer(&[first, (first + 1 + layer) % EXPERTS], &[0.7, 0.3]);
            first = (first * 5 + 3) % EXPERTS;
        }
        self.at += 1;
        Ok(true)
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        self.at = 0;
        Ok(())
    }
}

fn corpus(tokens: u32, ids: bool) -> Corpus {
    let mut source = ruled(tokens, ids);
    let mut corpus = Corpus::new(source.header().clone());
    corpus.add(&mut source, usize::MAX).unwrap();
    corpus
}

fn options() -> Options {
    Options { epochs: Some(12), limit_bytes: 100_000, ..Options::default() }
}

fn recall(scores: &[Score], forecast: &str, ahead: usize) -> f64 {
    let row = scores.iter().find(|score| score.forecast == forecast && score.ahead == ahead);
    row.unwrap_or_else(|| panic!("{forecast} {ahead}")).recalls()[0]
}

#[test]
fn an_id_that_comes_all_the_time_says_nothing_beyond_its_layer() {
    let mut corpus = corpus(300_000, true);
    corpus.ids.fill(Some(7));
    let all: Vec<usize> = (0..corpus.sequences.len()).collect();
    let counts = TokenCounts::new(&corpus, &all, &[7]);
    let mut odds = [9.0; EXPERTS as usize];
    counts.fill(0, 7, None, &mut odds);
    assert!(odds.iter().all(|odds| odds.abs() < 0.05), "{odds:?}");
}

#[test]
fn a_rule_is_learned_and_holds_on_other_sequences() {
    let corpus = corpus(1200, true);
    assert_eq!(corpus.sequences.len(), 30);
    let (learned, held): (Vec<usize>, Vec<usize>) = (0..30).partition(|sequence| sequence % 5 != 4);
    let trained = train(&corpus, &learned, &options(), &|_| ());
    let bytes = trained.to_bytes();
    assert!(bytes.len() <= 100_000, "{}", bytes.len());
    assert_eq!(Trained::parse(&bytes).unwrap(), trained);
    assert!(trained.value.as_ref().is_some_and(|value| value.fits(corpus.shape())));
    assert_eq!(trained.ids, [100, 101, 102, 103, 104, 105]);
    let trained = Arc::new(trained);
    let mut forecasts: Vec<Box<dyn Forecast>> = vec![
        Box::new(LearnedTables::new(Arc::clone(&trained))),
        Box::new(LearnedNetwork::new(Arc::clone(&trained), false).unwrap()),
        Box::new(LearnedPath::new(Arc::clone(&trained)).unwrap()),
    ];
    let mut blend = Forecaster::by_name_with("blend", corpus.shape(), 2, &trained).unwrap();
    let scores = evaluate(&corpus, &held, &mut forecasts, Some(&mut blend), 1, &|_| 0);
    for ahead in [1, 2] {
        assert_eq!(recall(&scores[0], "learned-tables", ahead), 1.0);
        assert_eq!(recall(&scores[0], "learned-network-fixed", ahead), 1.0);
        assert_eq!(recall(&scores[0], "learned-path", ahead), 1.0);
        let blend = recall(&scores[0], "blend", ahead);
        assert!(blend > 0.97, "{blend} {ahead} ahead");
    }
    // What comes next is drawn at random.
    let next = recall(&scores[0], "learned-network-fixed", NEXT_TOKEN);
    assert!(next < 0.6, "{next} of a random token");
    let network = scores[0].iter().find(|s| s.forecast == "learned-network-fixed").unwrap();
    assert_eq!(network.whole, network.questions);
    assert!((network.gate_mass_named - network.gate_mass).abs() < 1e-6);
    assert!(network.calibration_error() < 0.05, "{}", network.calibration_error());
    assert!(network.issued_used == network.slots && network.issued < network.slots + 20);
}

#[test]
fn the_same_traces_give_the_same_bytes_on_any_number_of_threads() {
    let corpus = corpus(400, true);
    let sequences: Vec<usize> = (0..corpus.sequences.len()).collect();
    let bytes = |threads, seed| {
        let options = Options { threads, seed, epochs: Some(1), ..options() };
        train(&corpus, &sequences, &options, &|_| ()).to_bytes()
    };
    let first = bytes(1, 1);
    assert!(first == bytes(1, 1) && first == bytes(3, 1), "training is not deterministic");
    assert_ne!(first, bytes(1, 2), "the seed has no effect");
}

#[test]
fn traces_without_ids_give_networks_without_them() {
    let corpus = corpus(1200, false);
    let sequences: Vec<usize> = (0..corpus.sequences.len()).collect();
    let trained = train(&corpus, &sequences, &options(), &|_| ());
    assert!(trained.ids.is_empty() && LearnedPath::new(Arc::new(trained.clone())).is_none());
    let mut forecasts: Vec<Box<dyn Forecast>> =
        vec![Box::new(LearnedNetwork::new(Arc::new(trained), false).unwrap())];
    let scores = evaluate(&corpus, &sequences, &mut forecasts, None, 1, &|_| 0);
    // Layer 0 of three cannot be known; of the others, everything.
    let reached = recall(&scores[0], "learned-network-fixed", 1);
    assert!(reached > 0.75 && reached < 0.95, "{reached}");
}

/// The gradient against differences of the loss, for every kind of weight.
#[test]
fn gradients_are_slopes() {
    let rows = Rows { reach: 2, experts: 4 };
    for is_direct in [true, false] {
        let sizes = Sizes { rows, experts: 4, hidden: 5, is_direct };
        let mut rng = Rng(8);
        let mut weights = start(&sizes, 2, &mut rng);
        weights.iter_mut().for_each(|weight| *weight += 0.5 * (rng.uniform() - 0.5));
        let mut scratch = Scratch::new(&sizes);
        scratch.input.sparse = vec![(0, 1.0), (6, 0.5), (9, 1.5), (rows.count() as u32 - 1, 0.3)];
        scratch.input.dense = (0..FIELDS * 4).map(|_| 2.0 * rng.uniform() - 1.0).collect();
        let truth = [1, 3];
        scratch.forward(&sizes, &weights);
        let mut gradient = vec![0.0; weights.len()];
        backward(&sizes, &weights, &truth, &mut scratch, &mut gradient);
        let mut loss = |weights: &[f32]| {
            scratch.forward(&sizes, weights);
            let answer = &scratch.sums[sizes.hidden..];
            let all: f64 = answer.iter().map(|&z| f64::from(z).exp().ln_1p()).sum();
            all - truth.iter().map(|&expert| f64::from(answer[usize::from(expert)])).sum::<f64>()
        };
        let mut moved = 0;
        for at in 0..weights.len() {
            const STEP: f32 = 1e-2;
            let before = weights[at];
            weights[at] = before + STEP;
            let above = loss(&weights);
            weights[at] = before - STEP;
            let below = loss(&weights);
            weights[at] = before;
            let slope = (above - below) / f64::from(2.0 * STEP);
            // Rounding of the loss in f32 over the step, and its curvature.
            let off = (f64::from(gradient[at]) - slope).abs();
            assert!(off < 2e-2, "weight {at}: {} for {slope}", gradient[at]);
            moved += usize::from(slope.abs() > 1e-2);
        }
        assert!(moved > 100, "only {moved} weights matter");
    }
}

#[test]
fn a_corpus_says_whether_a_trace_had_room_and_takes_the_first_fingerprint() {
    let mut corpus = Corpus::new(ruled(1, true).header);
    let mut add = |tokens, digest: Option<u8>| {
        let mut source = ruled(tokens, true);
        source.header.fingerprint = digest.map(|byte| [byte; 32]);
        let problem = corpus.differs(&source.header);
        (problem.is_some(), corpus.add(&mut source, 100).unwrap(), corpus.header.fingerprint)
    };
    assert_eq!(add(40, None), (false, true, None));
    assert_eq!(add(40, Some(1)), (false, true, Some([1; 32])));
    // Nobody knows what the first one was; the second one is known.
    assert_eq!(add(20, Some(2)), (true, true, Some([1; 32])), "to the last token");
    assert_eq!(add(1, Some(1)), (false, false, Some([1; 32])));
    assert_eq!(add(0, None), (false, true, Some([1; 32])));
    assert_eq!(corpus.tokens(), 100);
}

#[test]
fn long_sequences_are_cut_and_other_models_refused() {
    let mut source = ruled(5000, true);
    let mut corpus = Corpus::new(source.header().clone());
    struct Endless<'a>(&'a mut Ruled);
    impl Source for Endless<'_> {
        fn header(&self) -> &Header {
            self.0.header()
        }
        fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
            let more = self.0.next(row)?;
            row.starts_sequence = false;
            Ok(more)
        }
        fn rewind(&mut self) -> Result<(), TraceError> {
            self.0.rewind()
        }
        fn sequences(&self) -> &[Sequence] {
            &[]
        }
    }
    assert!(!corpus.add(&mut Endless(&mut source), 4500).unwrap(), "500 had no room");
    let lengths: Vec<u64> = corpus.sequences.iter().map(|sequence| sequence.tokens).collect();
    assert_eq!(lengths, [2048, 2048, 404]);
    let same = ruled(1, true).header;
    assert_eq!(corpus.differs(&same), None);
    let wider = Header { shape: Shape::uniform(LAYERS, 9, 2, 0), ..same.clone() };
    let said = corpus.differs(&wider).unwrap();
    assert_eq!(said, "its layer 0 has top-2 of 9 experts, the traces' has top-2 of 8 experts");
    corpus.header.fingerprint = Some([1; 32]);
    let other = Header { fingerprint: Some([2; 32]), ..same };
    assert!(corpus.differs(&other).unwrap().contains("another model"));
}

/// What the file's tables were fitted to is the training part in its order,
/// and models that are too wide, or traces too short, do without.
#[test]
fn tables_for_eviction_are_those_of_the_training_part() {
    let corpus = corpus(400, true);
    let sequences: Vec<usize> = (0..9).collect();
    let few = Options { epochs: Some(1), ..options() };
    let trained = train(&corpus, &sequences, &few, &|_| ());
    let mut source = ruled(400, true);
    let rows = super::value::read(&mut source, &|sequence| sequence < 9).unwrap();
    let fit = super::value::Fit { seed: few.seed, ..super::value::Fit::default() };
    let network = pregate_predictor::policy::learned::Network::universal();
    let wanted = super::value::fit(&rows, corpus.shape(), None, &network, fit, &mut |_, errors| {
        assert!(errors[1] < errors[0], "{errors:?}");
    });
    assert_eq!(trained.value, Some(wanted));
    assert_eq!(train(&corpus, &sequences[..7], &few, &|_| ()).value, None, "280 tokens");
    let small = Options { limit_bytes: 2000, ..few };
    let trained = train(&corpus, &sequences, &small, &|_| ());
    assert_eq!(trained.value, None, "they would be more than 40 % of the file");
    assert!(trained.to_bytes().len() <= 2000);
}
