//! Forecasts learn on real routing, and no forecast can break the forecaster.

#[path = "support/online.rs"]
mod online;
#[path = "support/rtrace.rs"]
mod rtrace;

use pregate_predictor::forecast::{self, External, Forecaster, Options, Source};
use pregate_predictor::ledger::{Ledger, Tally};
use pregate_predictor::{ExpertId, LayerShape, Outlook, Shape};
use proptest::prelude::*;
use rtrace::Trace;

fn ledger_for(shape: &Shape, forecaster: &Forecaster) -> Ledger {
    Ledger::new(shape, forecaster.columns(), forecaster.horizon())
}

/// All layers of one forecast at one distance.
fn total(ledger: &Ledger, forecast: &str, ahead: usize) -> Tally {
    let totals = ledger.totals();
    let row = totals.iter().find(|row| row.forecast == forecast && row.ahead == ahead);
    row.unwrap_or_else(|| panic!("{forecast} said nothing {ahead} ahead")).tally
}

fn recall(ledger: &Ledger, forecast: &str, ahead: usize) -> f64 {
    total(ledger, forecast, ahead).slot_recall().expect("it was asked")
}

/// Two sequences of 195 and 118 tokens, from nothing: what each forecast
/// reaches, less a margin. A forecast that does not learn stays at 0.125.
#[test]
fn every_forecast_learns_on_real_routing() {
    let trace = Trace::open(&rtrace::find("gptoss20b/cut.json").expect("the cut"));
    let shape = online::shape(&trace);
    let mut forecaster = Forecaster::new(&shape, Options { horizon: 3, ..Options::default() });
    let mut ledger = ledger_for(&shape, &forecaster);
    online::run(&trace, 0..trace.tokens, &mut forecaster, &mut ledger);
    for (name, ahead, least) in [
        ("previous-token", 1, 0.38),
        ("frequency", 1, 0.30),
        ("transition", 1, 0.60),
        ("naive-bayes", 1, 0.63),
        ("token", 1, 0.55),
        ("blend", 1, 0.65),
        ("blend", 3, 0.62),
        ("blend", 0, 0.42),
    ] {
        let reached = recall(&ledger, name, ahead);
        assert!(reached >= least, "{name} {ahead} ahead: {reached:.3}, wanted {least}");
    }
    let late = |name| {
        let tallies = ledger.recalls();
        let rows = tallies.iter().filter(|r| r.forecast == name && r.ahead == 1);
        rows.map(|r| r.tally.slot_recall().unwrap()).collect::<Vec<_>>()
    };
    assert!(late("blend").iter().all(|&recall| recall > 0.4), "a layer learned nothing");
    assert_eq!(forecaster.faults().count(), 0);
    assert_eq!(forecaster.refused(), 0);
}

/// The planner buys at these probabilities, so they must mean what they say.
/// After 195 tokens of learning: within 0.12 wherever there are 500 guesses.
#[test]
fn the_blends_probabilities_come_true() {
    let trace = Trace::open(&rtrace::find("gptoss20b/cut.json").expect("the cut"));
    let shape = online::shape(&trace);
    let mut forecaster = Forecaster::new(&shape, Options::default());
    let mut ledger = ledger_for(&shape, &forecaster);
    online::run(&trace, 0..195, &mut forecaster, &mut ledger);
    let reliability = online::run(&trace, 195..trace.tokens, &mut forecaster, &mut ledger);
    let mut spread = 0;
    for (count, sum, hits) in reliability.into_iter().filter(|(count, ..)| *count >= 500) {
        let (said, came) = (sum / count as f64, hits as f64 / count as f64);
        assert!((said - came).abs() < 0.12, "said {said:.3}, came true {came:.3}, {count} times");
        spread += 1;
    }
    assert!(spread >= 8, "only {spread} of ten buckets are used");
}

/// Eviction listens to probabilities, so none may be about another text.
#[test]
fn a_prompt_or_another_sequence_ends_what_was_said() {
    let trace = Trace::open(&rtrace::find("gptoss20b/cut.json").expect("the cut"));
    let shape = online::shape(&trace);
    let mut forecaster = Forecaster::new(&shape, Options::default());
    let mut ledger = ledger_for(&shape, &forecaster);
    for end in [Forecaster::begin_chunk, Forecaster::new_sequence] {
        online::run(&trace, 0..20, &mut forecaster, &mut ledger);
        assert!((0..trace.layers).all(|layer| forecaster.probabilities(layer).is_some()));
        end(&mut forecaster);
        assert!((0..trace.layers).all(|layer| forecaster.probabilities(layer).is_none()));
        assert_eq!(forecaster.probability(ExpertId::new(0, 0)), None);
    }
}

/// Distances are in MoE layers: a dense one between is none.
#[test]
fn dense_layers_are_no_distance() {
    let moe = Some(LayerShape { experts: 8, top_k: 1, expert_bytes: 1, class: 0 });
    let shape = Shape { layers: vec![moe, None, None, moe] };
    for name in ["transition", "naive-bayes"] {
        let mut forecaster = Forecaster::by_name(name, &shape, 1).unwrap();
        let mut ledger = ledger_for(&shape, &forecaster);
        for token in 0..80 {
            // The last layer follows the first.
            forecaster.begin_token(token);
            let expert = token * 5 % 8;
            forecaster.routed(0, &[expert], &[1.0], &mut ledger);
            forecaster.forecast(Some(0), &|_| true);
            forecaster.routed(3, &[(expert + 3) % 8], &[1.0], &mut ledger);
            // That was this token's; the next one's nobody has asked for.
            assert!(forecaster.probabilities(3).is_none(), "{name}");
        }
        forecaster.begin_token(80);
        forecaster.routed(0, &[2], &[1.0], &mut ledger);
        forecaster.forecast(Some(0), &|_| true);
        let said = forecaster.probabilities(3).unwrap();
        let best = (0..8).max_by(|&a, &b| said[a].total_cmp(&said[b]));
        assert_eq!(best, Some(5), "{name}: {said:?}");
    }
}

/// However large the model is, the forecasts stay bounded.
#[test]
fn memory_is_bounded() {
    for (layers, experts, top_k, limit_mb) in
        [(48, 128, 8, 60), (61, 384, 8, 140), (94, 512, 22, 240), (200, 2048, 64, 900)]
    {
        let shape = Shape::uniform(layers, experts, top_k, 1);
        let forecaster = Forecaster::new(&shape, Options::default());
        let bytes = forecaster.memory_bytes();
        assert!(bytes < limit_mb << 20, "{layers} x {experts}: {} MB", bytes >> 20);
    }
}

#[test]
fn forecasts_are_deterministic() {
    let trace = Trace::open(&rtrace::find("gptoss20b/cut.json").expect("the cut"));
    let shape = online::shape(&trace);
    let run = || {
        let mut forecaster = Forecaster::new(&shape, Options::default());
        let mut ledger = ledger_for(&shape, &forecaster);
        online::run(&trace, 0..60, &mut forecaster, &mut ledger);
        let bits = |layer| forecaster.probabilities(layer).unwrap().iter().map(|p| p.to_bits());
        (0..trace.layers).flat_map(bits).collect::<Vec<_>>()
    };
    assert_eq!(run(), run());
}

/// The control sees what the router sees, so it must read 100 %; logits that
/// are off by one expert must not.
#[test]
fn the_control_reads_100_percent_and_a_wrong_one_does_not() {
    let shape = Shape::uniform(4, 8, 2, 1);
    let mut forecaster = Forecaster::new(&shape, Options::default());
    let mut ledger = ledger_for(&shape, &forecaster);
    for token in 0..50u32 {
        forecaster.begin_token(token);
        for layer in 0..4 {
            let first = (token * 7 + layer as u32 * 3) % 8;
            let experts = [first, (first + 3) % 8];
            let mut logits = [0.0; 8];
            logits[experts[0] as usize] = 2.0;
            logits[experts[1] as usize] = 1.0;
            let target = layer;
            forecaster.external(&External {
                source: Source::ZeroStaleness,
                target,
                logits: &logits,
            });
            logits.rotate_right(1);
            let source = Source::StaleGate { ahead: 1 };
            forecaster.external(&External { source, target, logits: &logits });
            forecaster.routed(layer, &experts, &[0.6, 0.4], &mut ledger);
            forecaster.forecast(Some(layer), &|_| true);
        }
    }
    let control = total(&ledger, "control", 0);
    assert_eq!((control.slots, control.named, control.whole), (400, 400, 200));
    assert_eq!(control.gate_mass_recall(), Some(1.0));
    assert!(recall(&ledger, "stale-gate", 1) < 0.01);
}

/// A stale gate that is right is what the blend follows.
#[test]
fn the_blend_follows_a_good_stale_gate() {
    let shape = Shape::uniform(3, 16, 2, 1);
    let mut forecaster = Forecaster::new(&shape, Options::default());
    let mut ledger = ledger_for(&shape, &forecaster);
    let mut late = ledger_for(&shape, &forecaster);
    let mut state = 1u64;
    for token in 0..400u32 {
        forecaster.begin_token(token);
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as u32 % 16
        };
        let truth: Vec<[u32; 2]> = (0..3)
            .map(|_| {
                let first = next();
                [first, (first + 1 + next() % 15) % 16]
            })
            .collect();
        for layer in 0..3 {
            let book = if token < 200 { &mut ledger } else { &mut late };
            forecaster.routed(layer, &truth[layer], &[0.5, 0.5], book);
            if let Some(next) = truth.get(layer + 1) {
                let mut logits = [-1.0; 16];
                next.iter().for_each(|&expert| logits[expert as usize] = 1.0);
                let source = Source::StaleGate { ahead: 1 };
                forecaster.external(&External { source, target: layer + 1, logits: &logits });
            }
            forecaster.forecast(Some(layer), &|_| true);
        }
    }
    // Layer 0 has no gate before it and random experts.
    let tally = |layer| {
        late.recalls()
            .into_iter()
            .find(|r| r.forecast == "blend" && r.layer == Some(layer) && r.ahead == 1)
            .and_then(|r| r.tally.slot_recall())
            .unwrap()
    };
    assert!(tally(1) > 0.99 && tally(2) > 0.99, "{} {}", tally(1), tally(2));
    assert!(tally(0) < 0.5);
}

#[test]
fn a_forecast_that_panics_is_disabled_and_reported() {
    let shape = Shape::uniform(4, 8, 2, 1);
    let names = ["panicking", "previous-token"];
    let forecasts = names.map(|name| forecast::by_name(name, &shape, 3).unwrap());
    let mut forecaster =
        Forecaster::with(&shape, Options::default(), forecasts.into_iter().collect());
    let mut ledger = ledger_for(&shape, &forecaster);
    for token in 0..30 {
        forecaster.begin_token(token);
        for layer in 0..4 {
            forecaster.routed(layer, &[1, 2], &[0.5, 0.5], &mut ledger);
            forecaster.forecast(Some(layer), &|_| true);
        }
    }
    let faults: Vec<_> = forecaster.faults().collect();
    assert_eq!(faults.len(), 1);
    assert!(faults[0].panicked && faults[0].forecast == "panicking");
    assert_eq!(recall(&ledger, "previous-token", 1), 1.0, "the others go on");
    assert!(total(&ledger, "panicking", 1).guesses < 20);
}

#[test]
fn scores_out_of_range_are_repaired_and_reported() {
    let shape = Shape::uniform(4, 8, 2, 1);
    let forecasts = vec![forecast::by_name("out-of-range", &shape, 3).unwrap()];
    let mut forecaster = Forecaster::with(&shape, Options::default(), forecasts);
    forecaster.begin_token(0);
    let faults: Vec<_> = forecaster.faults().collect();
    assert_eq!(faults.len(), 1);
    assert!(!faults[0].panicked && faults[0].unclean_answers > 0, "{faults:?}");
}

/// A model with dense layers, unequal experts and more experts per token than
/// eight.
fn odd_shape() -> Shape {
    let layer = |experts, top_k| Some(LayerShape { experts, top_k, expert_bytes: 1, class: 0 });
    let layers = vec![None, layer(4, 4), layer(30, 12), None, layer(7, 1), layer(16, 3)];
    // Shapes that no model has.
    let strange = [layer(0, 2), layer(3, 0), layer(2, 5)];
    Shape { layers: layers.into_iter().chain(strange).collect() }
}

/// Something that the runtime could do, well or badly.
#[derive(Clone, Debug)]
enum Call {
    Begin(u32),
    Sequence,
    Routed(usize, Vec<u32>, Vec<f32>),
    Forecast(Option<usize>),
    External(u8, u8, usize, Vec<f32>),
    Observe(u32, Vec<Vec<u32>>),
}

fn number() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -3f32..3.0,
        1 => prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY)],
        1 => any::<f32>(),
    ]
}

fn call() -> impl Strategy<Value = Call> {
    let ids = |limit: u32| prop::collection::vec(0..limit, 0..14);
    prop_oneof![
        2 => (0..9u32).prop_map(Call::Begin),
        1 => Just(Call::Sequence),
        6 => (0..7usize, ids(17), prop::collection::vec(number(), 14)).prop_map(|(l, e, mut w)| {
            w.truncate(e.len());
            Call::Routed(l, e, w)
        }),
        6 => (0..9usize).prop_map(|layer| Call::Routed(layer, vec![0], vec![1.0])),
        1 => (0..7usize, ids(40)).prop_map(|(l, e)| Call::Routed(l, e, vec![1.0])),
        4 => prop::option::of(0..10usize).prop_map(Call::Forecast),
        3 => (0..4u8, 0..6u8, 0..7usize, prop::collection::vec(number(), 0..31))
            .prop_map(|(k, a, t, l)| Call::External(k, a, t, l)),
        2 => (0..4u8, 0..4u8, prop::collection::vec(number(), 16))
            .prop_map(|(k, a, l)| Call::External(k, a, 5, l)),
        1 => (0..9u32, prop::collection::vec(ids(20), 0..8)).prop_map(|(t, p)| Call::Observe(t, p)),
    ]
}

fn apply(call: &Call, forecaster: &mut Forecaster, ledger: &mut Ledger) {
    match call {
        Call::Begin(token) => forecaster.begin_token(*token),
        Call::Sequence => forecaster.new_sequence(),
        Call::Routed(layer, experts, weights) => {
            forecaster.routed(*layer, experts, weights, ledger);
        }
        Call::Forecast(after) => forecaster.forecast(*after, &|_| true),
        Call::External(kind, ahead, target, logits) => {
            let source = match kind {
                0 => Source::StaleGate { ahead: *ahead },
                1 => Source::StaleGateShared { ahead: *ahead },
                2 => Source::OwnGateBeforeAttention,
                _ => Source::ZeroStaleness,
            };
            forecaster.external(&External { source, target: *target, logits });
        }
        Call::Observe(token, path) => forecaster.observe(*token, path),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever the runtime and the forecasts do: no panic, every probability
    /// is one, and ids that the model has not are unknown.
    #[test]
    fn nothing_breaks_the_forecaster(
        name in prop::sample::select([&["blend"][..], &forecast::NAMES[..]].concat()),
        horizon in 0usize..5,
        calls in prop::collection::vec(call(), 1..120),
    ) {
        let shape = odd_shape();
        let mut forecaster = Forecaster::by_name(name, &shape, horizon).unwrap();
        let mut ledger = ledger_for(&shape, &forecaster);
        for call in &calls {
            apply(call, &mut forecaster, &mut ledger);
        }
        for layer in 0..11 {
            for expert in 0..40 {
                let id = ExpertId::new(layer, expert);
                if let Some(p) = forecaster.probability(id) {
                    prop_assert!((0.0..=1.0).contains(&p) && shape.contains(id));
                }
            }
        }
        for row in ledger.recalls() {
            let tally = row.tally;
            prop_assert!(tally.named <= tally.slots && tally.whole <= tally.guesses);
            prop_assert!(tally.gate_mass.is_finite());
            prop_assert!(tally.gate_mass_named <= tally.gate_mass);
        }
    }
}
