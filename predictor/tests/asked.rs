//! What forecasts are asked once, and what is wanted ahead, follow what is
//! known, and nothing that was known before.

#[path = "support/rtrace.rs"]
#[allow(dead_code)]
mod rtrace;

use pregate_predictor::forecast::{
    self, External, Forecast, Forecaster, Known, NAMES, Options, Source, USEFUL,
};
use pregate_predictor::ledger::Ledger;
use pregate_predictor::policy;
use pregate_predictor::{Ahead, Cache, ExpertId, Planner, Request, Shape};
use rtrace::Trace;
use std::sync::{Arc, Mutex};

const LAYERS: usize = 6;
const EXPERTS: usize = 8;
const HORIZON: usize = 3;

/// Token and layer of each question.
type Asked = Arc<Mutex<Vec<(u32, usize)>>>;

/// Says of each layer what its last experts and the token's id were.
struct Said {
    asked: Asked,
    is_steady: bool,
    token: u32,
    last: Vec<u32>,
}

impl Forecast for Said {
    fn name(&self) -> &'static str {
        "said"
    }

    fn scores(&mut self, target: usize, known: &Known<'_>, scores: &mut [f32]) -> bool {
        self.asked.lock().unwrap().push((self.token, target));
        if known.token.is_none() {
            return false;
        }
        // The same numbers each time, so that their spread is.
        scores.iter_mut().zip(0u8..).for_each(|(score, at)| *score = f32::from(at));
        scores.rotate_right((5 * target + (self.token + self.last[target]) as usize) % EXPERTS);
        true
    }

    fn routed(&mut self, layer: usize, experts: &[u32], _: &[f32]) {
        self.last[layer] = experts[0];
    }

    fn begin_token(&mut self, token: u32) {
        self.token = token;
    }

    fn new_sequence(&mut self) {
        self.last.fill(0);
    }

    fn is_steady(&self) -> bool {
        self.is_steady
    }
}

impl Said {
    fn forecaster(shape: &Shape, is_steady: bool) -> (Forecaster, Asked) {
        let asked = Asked::default();
        let last = vec![0; LAYERS];
        let said = Said { asked: Arc::clone(&asked), is_steady, token: 0, last };
        let options = Options { horizon: HORIZON, learns: false, ..Options::default() };
        (Forecaster::with(shape, options, vec![Box::new(said)]), asked)
    }
}

/// Whatever is asked of a steady forecast once has the answer that it would
/// have given each time: also behind tokens that were cut off, and sequences.
#[test]
fn who_is_steady_is_asked_once_and_answers_the_same() {
    let shape = Shape::uniform(LAYERS, EXPERTS, 2, 1);
    let run = |is_steady| {
        let (mut forecaster, asked) = Said::forecaster(&shape, is_steady);
        let mut ledger = Ledger::new(&shape, forecaster.columns(), HORIZON);
        let mut answers: Vec<Option<Vec<u32>>> = Vec::new();
        for token in 0..40u32 {
            if token % 13 == 12 {
                forecaster.new_sequence();
            }
            forecaster.begin_token(token);
            let layers = if token % 7 == 3 { LAYERS / 2 } else { LAYERS };
            for layer in 0..layers {
                let first = (3 * token + layer as u32 * 5) % EXPERTS as u32;
                let experts = [first, (first + 1) % EXPERTS as u32];
                forecaster.routed(layer, &experts, &[0.6, 0.4], &mut ledger);
                forecaster.forecast(Some(layer), &|_| true);
                for layer in 0..LAYERS {
                    let bits = |p: &[f32]| p.iter().map(|p| p.to_bits()).collect();
                    answers.push(forecaster.probabilities(layer).map(bits));
                }
            }
        }
        assert_eq!(forecaster.faults().count(), 0);
        let asked = std::mem::take(&mut *asked.lock().unwrap());
        let totals = format!("{:?}", ledger.totals());
        (answers, totals, asked)
    };
    let (answers, totals, asked) = run(true);
    let (each, each_totals, each_asked) = run(false);
    assert!(answers == each, "other probabilities");
    assert_eq!(totals, each_totals);
    let mut once = each_asked.clone();
    once.sort_unstable();
    once.dedup();
    assert!(each_asked.len() > 2 * once.len(), "{} of {}", once.len(), each_asked.len());
    assert_eq!(asked.len(), once.len(), "asked twice");
}

/// Those that say of themselves that they are steady, on real routing.
#[test]
fn who_says_to_be_steady_is() {
    let trace = Trace::open(&rtrace::find("gptoss20b/cut.json").expect("the cut"));
    let shape = Shape::uniform(trace.layers, trace.experts, trace.top_k, 1);
    let all = NAMES[..USEFUL].iter().map(|name| forecast::by_name(name, &shape, HORIZON).unwrap());
    let steady: Vec<_> = all.filter(|forecast| forecast.is_steady()).collect();
    assert_eq!(steady.len(), 3);
    for mut forecast in steady {
        let mut scores = vec![0.0; trace.experts];
        let mut ask = |forecast: &mut dyn Forecast, target, token, path: &[Vec<u32>]| {
            let known = Known { token: Some(token), routed: path };
            forecast.scores(target, &known, &mut scores).then(|| scores.clone())
        };
        for at in 0..60 {
            let token = trace.token_ids[at];
            forecast.begin_token(token);
            let mut path = vec![Vec::new(); trace.layers];
            let targets = 0..trace.layers;
            let first: Vec<_> =
                targets.map(|target| ask(&mut *forecast, target, token, &path)).collect();
            for layer in 0..trace.layers {
                let now = ask(&mut *forecast, layer, token, &path);
                assert!(now == first[layer], "{} of layer {layer}", forecast.name());
                let weights: Vec<f32> = trace.weights(at, layer).collect();
                path[layer] = trace.experts(at, layer).collect();
                forecast.routed(layer, &path[layer], &weights);
            }
        }
    }
}

fn planner(shape: &Shape, forecaster: Forecaster) -> Planner {
    let cache = Cache::new(shape, &[2; LAYERS], policy::by_name("lru").unwrap()).unwrap();
    let limits = Ahead { threshold: 0.5, most: 64, priced: false };
    Planner::new(shape, cache, Some(forecaster), limits)
}

/// The experts that `planner` fetches now into `room` frames.
fn fetched(planner: &mut Planner, room: usize) -> Vec<ExpertId> {
    let mut ids = Vec::new();
    planner.prefetch(&|_| room, &mut ids);
    ids
}

/// The layers whose experts it fetches.
fn layers(planner: &mut Planner) -> Vec<usize> {
    let mut layers: Vec<usize> = fetched(planner, 99).iter().map(|id| id.layer()).collect();
    layers.dedup();
    layers
}

/// What a planner fetches ahead, when it is asked again and again.
#[test]
fn what_is_wanted_is_about_what_is_known_now() {
    let shape = Shape::uniform(LAYERS, EXPERTS, 2, 1);
    let at = |token| {
        let mut planner = planner(&shape, Said::forecaster(&shape, true).0);
        planner.begin_token(token);
        planner
    };
    let mut one = at(1);
    assert_eq!(layers(&mut one), [0, 1, 2]);
    assert!(layers(&mut one).is_empty(), "it is all on its way");
    one.routed(0, &[3, 4], &[0.5, 0.5]);
    one.request(0, &[3, 4], &mut Request::default());
    assert_eq!(layers(&mut one), [3], "one layer more is near");
    // Where there was no room, there is later.
    let mut one = at(1);
    assert!(fetched(&mut one, 0).is_empty());
    assert_eq!(layers(&mut one), [0, 1, 2]);
    // A token that was cut off leaves nothing for the next one.
    let mut one = at(1);
    assert!(fetched(&mut one, 0).is_empty());
    one.begin_token(2);
    let wanted = fetched(&mut one, 99);
    assert_eq!(wanted, fetched(&mut at(2), 99));
    assert_ne!(wanted, fetched(&mut at(1), 99));
    // Behind the end of a text nothing is wanted.
    let mut one = at(1);
    assert!(fetched(&mut one, 0).is_empty());
    one.new_sequence();
    assert!(fetched(&mut one, 99).is_empty());
}

/// Scores that come later than the first question count at once.
#[test]
fn what_is_wanted_follows_scores_that_the_runtime_computes() {
    let shape = Shape::uniform(LAYERS, EXPERTS, 2, 1);
    let forecaster = Forecaster::by_name("silent", &shape, HORIZON).unwrap();
    let mut planner = planner(&shape, forecaster);
    planner.begin_token(1);
    planner.routed(0, &[3, 4], &[0.5, 0.5]);
    planner.request(0, &[3, 4], &mut Request::default());
    assert!(fetched(&mut planner, 99).is_empty());
    let mut logits = [-9.0; EXPERTS];
    (logits[2], logits[5]) = (9.0, 8.0);
    let source = Source::StaleGate { ahead: 1 };
    planner.external(&External { source, target: 1, logits: &logits });
    assert_eq!(fetched(&mut planner, 99), [ExpertId::new(1, 2), ExpertId::new(1, 5)]);
}
