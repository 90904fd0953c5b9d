//! Trained forecasts: the file, what it refuses, and what the code that runs
//! says against a plain one.

use pregate_predictor::forecast::hostile::untrained;
use pregate_predictor::forecast::learned::input::{Context, FIELDS, Input, Situation};
use pregate_predictor::forecast::learned::network::Sizes;
use pregate_predictor::forecast::learned::{
    Binding, Dimensions, LIMIT_BYTES, LearnedNetwork, LearnedPath, LearnedTables, Trained,
    matrix::Matrix,
};
use pregate_predictor::forecast::{Forecast, Forecaster, Known};
use pregate_predictor::ledger::Ledger;
use pregate_predictor::policy::learned::fitted::{self, Fitted, TABLES, Table, lengths};
use pregate_predictor::policy::{self, Event, learned::Ranking};
use pregate_predictor::{Cache, ExpertId, LayerShape, NoOutlook, Shape};
use proptest::prelude::*;
use std::sync::Arc;

/// SplitMix64, as whole numbers below 1000 and as -0.5..0.5.
struct Rng(u64);

impl Rng {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits >> 33) % u64::from(limit)) as u32
    }

    fn set(&mut self, layer: &LayerShape) -> Vec<u32> {
        let mut set = Vec::new();
        while set.len() < layer.top_k {
            let expert = self.below(layer.experts as u32);
            if !set.contains(&expert) {
                set.push(expert);
            }
        }
        set
    }
}

/// Four MoE layers, the narrowest last, with a dense one among them.
fn shape() -> Shape {
    let layer = |experts, top_k| Some(LayerShape { experts, top_k, expert_bytes: 7, class: 0 });
    Shape { layers: vec![layer(8, 2), None, layer(8, 2), layer(8, 3), layer(5, 2)] }
}

fn random() -> Trained {
    let binding = Binding { model: "demo".to_string(), fingerprint: Some([7; 32]) };
    let mut trained = untrained(&shape(), binding, [6, 2, 3, 9, 1, 5, 4]);
    trained.value = Some(tables(&shape(), Some([7; 32]), |at| (at * 37 % 251) as i8));
    trained
}

/// Tables for eviction whose numbers are, in tenths, what `number` says of
/// their places in a layer.
fn tables(shape: &Shape, bound: Option<[u8; 32]>, number: impl Fn(usize) -> i8) -> Fitted {
    let of_layer = |lengths: [usize; TABLES + 1]| {
        let mut at = 0..;
        lengths.map(|length| Table {
            scale: 0.1,
            numbers: at.by_ref().take(length).map(&number).collect(),
        })
    };
    Fitted::new(shape, bound, lengths(shape).into_iter().map(of_layer).collect())
}

#[test]
fn a_file_comes_back_as_it_was() {
    let trained = random();
    let bytes = trained.to_bytes();
    assert_eq!(Trained::parse(&bytes).unwrap(), trained);
    assert_eq!(trained.to_bytes(), bytes);
    // The widest models' networks have no room for a way past the hidden units.
    let binding = Binding::default();
    let narrow = untrained(&shape(), binding, [6, 2, 3, 9, 0, 5, 4]);
    assert_eq!(Trained::parse(&narrow.to_bytes()).unwrap(), narrow);
    let without = Trained { value: None, ..trained };
    assert_eq!(Trained::parse(&without.to_bytes()).unwrap(), without);
    let unbound = Trained { binding: Binding::default(), ..without };
    assert_eq!(Trained::parse(&unbound.to_bytes()).unwrap(), unbound);
    let value = Some(tables(&shape(), None, |_| 1));
    let unbound = Trained { value, ..unbound };
    assert_eq!(Trained::parse(&unbound.to_bytes()).unwrap(), unbound);
}

/// What a file says of its own length holds for the tables as well.
#[test]
fn tables_for_eviction_have_the_bytes_that_are_counted() {
    for shape in [shape(), Shape::uniform(24, 32, 4, 1), Shape::uniform(3, 128, 8, 1)] {
        let found = tables(&shape, None, |_| 0).to_bytes().len();
        assert_eq!(fitted::bytes(&shape), Some(found));
        let trained = untrained(&shape, Binding::default(), [0, 0, 1, 0, 0, 0, 0]);
        let without = trained.to_bytes().len();
        let value = Some(tables(&shape, None, |_| 0));
        assert_eq!(Trained { value, ..trained }.to_bytes().len(), without + found);
    }
    let widest = LayerShape { experts: usize::MAX / 2, top_k: 1, expert_bytes: 1, class: 0 };
    assert_eq!(fitted::bytes(&Shape { layers: vec![Some(widest); 2] }), None);
}

#[test]
fn tables_for_eviction_of_another_model_are_refused() {
    let said = |change: &dyn Fn(&mut Trained)| {
        let mut trained = random();
        change(&mut trained);
        Trained::parse(&trained.to_bytes()).unwrap_err().to_string()
    };
    let other = said(&|t| t.value = Some(tables(&shape(), Some([8; 32]), |_| 0)));
    assert!(other.contains("tables for eviction") && other.contains("another model"), "{other}");
    // Where one of the two is bound, the other has to be.
    let unbound = said(&|t| t.value = Some(tables(&shape(), None, |_| 0)));
    assert!(unbound.contains("another fingerprint"), "{unbound}");
    let bound = said(&|t| t.binding.fingerprint = None);
    assert!(bound.contains("another fingerprint"), "{bound}");
    let mut wider = shape();
    wider.layers[4].as_mut().unwrap().experts = 6;
    let wide = said(&|t| t.value = Some(tables(&wider, Some([7; 32]), |_| 0)));
    assert!(wide.contains("6 experts in layer 4, the model has 5"), "{wide}");
    // Cut short, with a checksum and a length that say so.
    let mut bytes = random().to_bytes();
    let value_bytes = random().value.unwrap().to_bytes().len() as u32;
    let at = bytes.windows(4).position(|four| four == value_bytes.to_le_bytes()).unwrap();
    bytes.pop();
    bytes[at..at + 4].copy_from_slice(&(value_bytes - 1).to_le_bytes());
    let sum = crc32fast::hash(&bytes[16..]);
    bytes[12..16].copy_from_slice(&sum.to_le_bytes());
    let short = Trained::parse(&bytes).unwrap_err().to_string();
    assert!(short.contains("its shape needs"), "{short}");
}

/// Tables that call one expert dear and the others cheap keep it, and those
/// that say the opposite do not; the rule keeps its name and says so.
#[test]
fn policies_that_learned_go_by_the_tables_of_their_model() {
    let shape = Shape::uniform(1, 8, 1, 1);
    let hits = |name: &str, dear: i8| {
        // Beyond the four tables of 64, the row that is always said.
        let number = |at: usize| if at < 3 * 64 { 0 } else { [-60, 60][usize::from(at % 64 == 3)] };
        let fitted = tables(&shape, None, |at| (number(at) / 60) * dear);
        let policy = policy::by_name_with(name, Some(&fitted)).unwrap();
        assert_eq!((policy.name(), policy::takes_tables(name)), (name, name != "lru"));
        let mut cache = Cache::new(&shape, &[2], policy).unwrap();
        let rules = cache.rules();
        let told = rules.iter().any(|rule| *rule == (Ranking::Fitted.name(), 1));
        assert_eq!(told, name != "lru", "{name}: {rules:?}");
        let mut rng = Rng(3);
        let mut hits = 0;
        for token in 0..300 {
            let expert = if token % 4 == 0 { 3 } else { rng.below(8) };
            cache.next_token();
            hits += usize::from(cache.contains(ExpertId::new(0, expert)));
            cache.used(&Event { layer: 0, experts: &[expert], counts: &[1], tokens: 1 });
            if !cache.contains(ExpertId::new(0, expert)) {
                cache.admit(ExpertId::new(0, expert), &|_| false, &NoOutlook);
            }
        }
        hits
    };
    assert_eq!(hits("lru", 60), hits("lru", -60));
    for name in ["learned", "adaptive", "adaptive-layer"] {
        let (with, against) = (hits(name, 60), hits(name, -60));
        assert!(with > 110 && with > against + 20, "{name}: {with} and {against}");
    }
    // Of another shape: left out, and that shows.
    let wider = tables(&Shape::uniform(1, 9, 1, 1), None, |_| 0);
    let cache = Cache::new(&shape, &[2], policy::by_name_with("adaptive", Some(&wider)).unwrap());
    assert_eq!(cache.unwrap().rules(), [(Ranking::Value.name(), 1)]);
}

#[test]
fn what_is_wrong_with_a_file_is_said() {
    let bytes = random().to_bytes();
    let said = |bytes: &[u8]| Trained::parse(bytes).unwrap_err().to_string();
    assert!(said(b"GGUF").contains("does not begin with \"pgpredct\""));
    let mut newer = bytes.clone();
    newer[8] = 9;
    assert!(said(&newer).contains("version 9"), "{}", said(&newer));
    let mut damaged = bytes.clone();
    *damaged.last_mut().unwrap() ^= 1;
    assert!(said(&damaged).contains("checksum"));
    assert!(said(&bytes[..bytes.len() - 1]).contains("checksum"));
    assert!(said(&[&bytes[..], &vec![0; LIMIT_BYTES]].concat()).contains("at most"));
    // Sealed again, so that the checksum does not save the parser.
    let sealed = |change: &dyn Fn(&mut Trained)| {
        let mut trained = random();
        change(&mut trained);
        said(&trained.to_bytes())
    };
    assert!(sealed(&|t| t.ids.swap(0, 1)).contains("ascend"));
    assert!(sealed(&|t| t.pairs.scales[2] = f32::NAN).contains("scale NaN of row 2"));
    assert!(sealed(&|t| t.priors.scales[0] = -1.0).contains("scale -1"));
    assert!(sealed(&|t| t.dimensions.hidden = 10).contains("ask for"));
    assert!(sealed(&|t| t.dimensions.reach = 99).contains("no sense"));
    assert!(sealed(&|t| t.shape.layers[0].as_mut().unwrap().top_k = 9).contains("top-9 of 8"));
}

#[test]
fn another_model_is_refused() {
    let trained = random();
    assert_eq!(trained.check(&shape(), Some(&[7; 32])), Ok(()));
    assert_eq!(trained.check(&shape(), None), Ok(()));
    let error = trained.check(&shape(), Some(&[8; 32])).unwrap_err().to_string();
    assert!(
        error.contains("demo") && error.contains("070707") && error.contains("080808"),
        "{error}"
    );
    let other = Shape::uniform(5, 8, 2, 7);
    let error = trained.check(&other, Some(&[7; 32])).unwrap_err().to_string();
    assert!(error.contains("5 MoE layers of 5"), "{error}");
    let mut narrower = shape();
    narrower.layers[4].as_mut().unwrap().top_k = 1;
    assert!(trained.check(&narrower, None).is_err());
    let unbound = Trained { binding: Binding::default(), ..trained };
    assert_eq!(unbound.check(&shape(), Some(&[8; 32])), Ok(()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Whatever the bytes are: an error or a whole answer, no panic.
    #[test]
    fn hostile_bytes(seed in any::<u64>(), changes in 1usize..6, cut in any::<u16>(), seal in any::<bool>()) {
        let mut bytes = random().to_bytes();
        let mut rng = Rng(seed);
        for _ in 0..changes {
            // Mostly the head, where sizes are.
            let limit = if rng.below(4) == 0 { bytes.len() } else { 130.min(bytes.len()) };
            let at = rng.below(limit as u32) as usize;
            bytes[at] = rng.below(256) as u8;
        }
        if cut.is_multiple_of(3) {
            bytes.truncate(bytes.len().saturating_sub(usize::from(cut)));
        }
        if seal && bytes.len() > 16 {
            bytes[..12].copy_from_slice(&random().to_bytes()[..12]);
            let sum = crc32fast::hash(&bytes[16..]);
            bytes[12..16].copy_from_slice(&sum.to_le_bytes());
        }
        if let Ok(trained) = Trained::parse(&bytes) {
            let shape = trained.shape.clone();
            let trained = Arc::new(trained);
            if let Some(value) = &trained.value {
                prop_assert!(value.fits(&shape));
                let policy = policy::by_name_with("adaptive-layer", Some(value)).unwrap();
                let slots: Vec<usize> =
                    shape.layers.iter().map(|layer| layer.map_or(0, |l| l.top_k)).collect();
                let mut cache = Cache::new(&shape, &slots, policy).unwrap();
                for _ in 0..3 {
                    cache.next_token();
                    for (layer, moe) in shape.moe() {
                        let experts = rng.set(moe);
                        let counts = vec![1; experts.len()];
                        cache.used(&Event { layer, experts: &experts, counts: &counts, tokens: 1 });
                        for &expert in &experts {
                            let id = ExpertId::new(layer, expert);
                            if !cache.contains(id) {
                                cache.admit(id, &|_| false, &NoOutlook);
                            }
                        }
                    }
                }
            }
            if let Some(mut forecaster) = Forecaster::by_name_with("blend", &shape, 2, &trained) {
                let mut ledger = Ledger::new(&shape, forecaster.columns(), 2);
                for token in [3, 15, 4] {
                    forecaster.begin_token(token);
                    for (layer, moe) in shape.moe() {
                        let experts = rng.set(moe);
                        forecaster.routed(layer, &experts, &vec![0.5; experts.len()], &mut ledger);
                        forecaster.forecast(Some(layer), &|_| true);
                    }
                }
                prop_assert_eq!(forecaster.faults().filter(|fault| fault.panicked).count(), 0);
            }
        }
    }
}

/// The network's answer from its definition, in f64 and without shortcuts.
fn plainly(sizes: &Sizes, parts: &[Matrix; 5], input: &Input) -> Vec<f64> {
    let [units, direct, dense, straight, out] = parts.each_ref().map(|part| {
        let rows = 0..part.scales.len();
        rows.map(|row| part.row(row).map(f64::from).collect::<Vec<_>>()).collect::<Vec<_>>()
    });
    let mut hidden = vec![0.0; sizes.hidden];
    let mut answer = straight[FIELDS].clone();
    for &(row, value) in &input.sparse {
        let (row, value) = (row as usize, f64::from(value));
        hidden.iter_mut().zip(&units[row]).for_each(|(sum, weight)| *sum += value * weight);
        answer.iter_mut().zip(&direct[row]).for_each(|(sum, weight)| *sum += value * weight);
    }
    for (row, &value) in input.dense.iter().enumerate() {
        let value = f64::from(value);
        hidden.iter_mut().zip(&dense[row]).for_each(|(sum, weight)| *sum += value * weight);
        let (field, expert) = (row / sizes.experts, row % sizes.experts);
        answer[expert] += straight[field][expert] * value;
    }
    for (unit, row) in hidden.iter().zip(&out) {
        answer.iter_mut().zip(row).for_each(|(sum, weight)| *sum += unit.max(0.0) * weight);
    }
    answer
}

/// What runs keeps sums from one question to the next; a plain one does not.
#[test]
fn the_network_that_runs_is_the_one_in_the_file() {
    let (trained, shape) = (Arc::new(random()), Shape::uniform(4, 8, 2, 1));
    let mut inner = (*trained).clone();
    inner.shape = Shape::uniform(4, 8, 2, 0);
    let trained = Arc::new(inner);
    let sizes = trained.dimensions.network();
    let mut network = LearnedNetwork::new(Arc::clone(&trained), false).unwrap();
    let mut context = Context::new(&shape, trained.dimensions.reach);
    let (mut rng, mut input, mut scores) = (Rng(9), Input::default(), vec![0.0; 8]);
    let nothing = vec![Vec::new(); 4];
    let mut compared = 0;
    for token in 0..30 {
        if usize::is_multiple_of(token, 11) {
            network.new_sequence();
            context.new_sequence();
        }
        let id = [3, 4, 15][token % 3];
        network.begin_token(id);
        context.begin_token(Some(id));
        let mut known = nothing.clone();
        for layer in 0..4 {
            let mut check = |target: usize, situation, known: &Known<'_>| {
                assert!(network.scores(target, known, &mut scores));
                context.look(target, situation, &mut input);
                if let (Some(row), Some(_)) = (trained.row(id), known.token) {
                    trained.add_odds(row, target, 1.0, &mut input.dense[(FIELDS - 1) * 8..]);
                }
                let wanted = plainly(&sizes, &trained.networks[target], &input);
                for (score, wanted) in scores.iter().zip(&wanted) {
                    // Rounding of about a hundred sums of magnitude 10 in f32.
                    assert!((f64::from(*score) - wanted).abs() < 1e-3, "{score} for {wanted}");
                }
                compared += 1;
            };
            for target in layer..4 {
                let ahead = Situation::Ahead(target - layer + 1);
                check(target, ahead, &Known { token: Some(id), routed: &known });
            }
            if layer > 0 {
                check(layer - 1, Situation::NextToken, &Known { token: None, routed: &nothing });
            }
            let experts = rng.set(&LayerShape { experts: 8, top_k: 2, expert_bytes: 0, class: 0 });
            network.routed(layer, &experts, &[0.7, 0.3]);
            context.routed(layer, &experts, &[0.7, 0.3]);
            known[layer] = experts;
        }
    }
    assert_eq!(compared, 30 * 13);
}

/// One id, one path: after some tokens the network says it, whatever it was
/// trained to say; one that may not learn does not.
#[test]
fn a_network_goes_on_learning() {
    let mut trained = random();
    trained.shape = Shape::uniform(4, 8, 2, 0);
    let trained = Arc::new(trained);
    let recall = |learns| {
        let mut network = LearnedNetwork::new(Arc::clone(&trained), learns).unwrap();
        let (mut scores, mut hits) = (vec![0.0; 8], 0);
        for token in 0..400 {
            network.begin_token(3);
            let mut known = vec![Vec::new(); 4];
            for layer in 0..4 {
                let experts = vec![layer as u32, layer as u32 + 4];
                network.scores(layer, &Known { token: Some(3), routed: &known }, &mut scores);
                let mut best: Vec<usize> = (0..8).collect();
                best.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
                let named = experts.iter().filter(|&&e| best[..2].contains(&(e as usize)));
                hits += if token >= 300 { named.count() } else { 0 };
                network.routed(layer, &experts, &[0.5, 0.5]);
                known[layer] = experts;
            }
        }
        hits as f64 / 800.0
    };
    assert!(recall(true) > 0.95, "{}", recall(true));
    assert!(recall(false) < 0.8, "{}", recall(false));
}

#[test]
fn tables_add_what_layers_and_the_id_say() {
    let trained = Arc::new(random());
    let mut tables = LearnedTables::new(Arc::clone(&trained));
    let (mut scores, mut routed) = (vec![0.0; 8], vec![Vec::new(); 5]);
    tables.begin_token(6);
    routed[0] = vec![1, 4];
    let known = Known { token: Some(6), routed: &routed };
    assert!(tables.scores(3, &known, &mut scores));
    // Layer 3 is the third MoE layer: layer 0 lies two back.
    let mut wanted: Vec<f32> = trained.priors.row(2).collect();
    for expert in [1, 4] {
        let row = (2 * 3 + 2) * 8 + expert;
        wanted.iter_mut().zip(trained.pairs.row(row)).for_each(|(sum, said)| *sum += 0.8 * said);
    }
    let odds: Vec<f32> = trained.odds.row(2).skip(2 * 8).collect();
    wanted.iter_mut().zip(odds).for_each(|(sum, said)| *sum += 0.6 * said);
    for (score, wanted) in scores.iter().zip(&wanted) {
        assert!((score - wanted).abs() < 1e-5, "{scores:?} {wanted:?}");
    }
    assert!(!tables.scores(1, &known, &mut scores), "a dense layer has no experts");
}

#[test]
fn the_path_knows_all_layers_before_the_first_ran() {
    let trained = Arc::new(random());
    let mut path = LearnedPath::new(Arc::clone(&trained)).unwrap();
    let nothing = vec![Vec::new(); 5];
    let mut answers = |id| {
        path.begin_token(id);
        let known = Known { token: Some(id), routed: &nothing };
        [0, 2, 3].map(|layer| {
            let mut scores = vec![0.0; 8];
            assert!(path.scores(layer, &known, &mut scores));
            scores
        })
    };
    let (first, again, other) = (answers(15), answers(15), answers(9));
    assert_ne!(first, again, "the token before counts");
    assert_ne!(again, other);
    path.new_sequence();
    let mut scores = vec![0.0; 8];
    path.begin_token(15);
    let known = Known { token: Some(15), routed: &nothing };
    path.scores(0, &known, &mut scores);
    assert_eq!(scores, first[0], "a new sequence forgets the old one");
    let next = Known { token: None, routed: &nothing };
    assert!(!path.scores(0, &next, &mut scores), "a token that is not known says nothing");
}

/// Sizes shrink until a file fits, for every shape that models have.
#[test]
fn files_fit_their_limit() {
    for (layers, experts, top_k) in
        [(24, 32, 4), (26, 64, 6), (48, 128, 8), (61, 256, 8), (94, 512, 22), (200, 2048, 64)]
    {
        let shape = Shape::uniform(layers, experts, top_k, 0);
        for ids in [0, 1 << 20] {
            let dimensions = Dimensions::fitting(&shape, ids, LIMIT_BYTES - 4096);
            let bytes = dimensions.bytes().expect("a size");
            assert!(bytes <= LIMIT_BYTES - 4096, "{layers} x {experts}: {bytes}");
            assert!(dimensions.is_valid());
            if experts <= 256 {
                assert!(dimensions.hidden >= 16, "{layers} x {experts}: {dimensions:?}");
            }
        }
    }
}
