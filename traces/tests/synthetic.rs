//! The generator of made-up traces: what a weight is for, and that a search
//! comes near the figures of a trace.

use pregate_predictor::LayerShape;
use pregate_traces::synthetic::{Figures, Generator, Weights, fit, lengths};
use pregate_traces::{Provenance, Row, Source};

fn generator(weights: Weights, tokens: u64, seed: u64) -> Generator {
    let layer = LayerShape { experts: 16, top_k: 3, expert_bytes: 7, class: 0 };
    Generator::new((4, layer), weights, (tokens, &[40, 60]), ("real", seed))
}

fn rows(source: &mut Generator) -> Vec<Row> {
    let (mut all, mut row) = (Vec::new(), Row::default());
    while source.next(&mut row).unwrap() {
        all.push(row.clone());
    }
    all
}

#[test]
fn the_same_seed_draws_the_same_trace_and_says_that_it_is_made_up() {
    let mut first = generator(Weights::default(), 130, 5);
    let all = rows(&mut first);
    first.rewind().unwrap();
    assert_eq!(rows(&mut first), all);
    assert_eq!(rows(&mut generator(Weights::default(), 130, 5)), all);
    assert_ne!(rows(&mut generator(Weights::default(), 130, 6)), all);
    assert_eq!(first.header().source, Provenance::Synthetic { from: "real".into(), seed: 5 });
    let starts: Vec<usize> = (0..130).filter(|&token| all[token].starts_sequence).collect();
    assert_eq!(starts, [0, 40, 100]);
    assert_eq!((all[45].position, all[45].pass_tokens), (5, 1));
    for row in &all {
        for layer in 0..4 {
            let mut experts = row.experts(layer).to_vec();
            experts.sort_unstable();
            assert!(experts.is_sorted_by(|a, b| a < b) && experts.len() == 3 && experts[2] < 16);
        }
    }
}

/// Entropy, reuse at 1, 8 and 64, and transition recall.
fn figures(weights: Weights) -> [f64; 5] {
    let values = Figures::of(&mut generator(weights, 1200, 1)).unwrap().values;
    // The sequences are too short for reuse at 64; NaN passes no comparison.
    [0, 1, 2, 3, 8].map(|index: usize| values[index].unwrap_or(f64::NAN))
}

#[test]
fn each_weight_moves_what_it_is_for() {
    let none = Weights { popularity: 0.0, topic: 0.0, slow: 0.0, fast: 0.0, coupling: 0.0 };
    let chance = 3.0 / 16.0;
    let [entropy, one, eight, _, transition] = figures(none);
    assert!(entropy > 0.99, "{entropy}");
    // Sampling: thousands of layers and tokens.
    assert!((one - chance).abs() < 0.02 && (eight - chance).abs() < 0.02, "{one} {eight}");
    assert!((transition - chance).abs() < 0.04, "{transition}");
    assert!(figures(Weights { popularity: 1.0, ..none })[0] < 0.95);
    let [entropy, _, eight, _, _] = figures(Weights { topic: 1.0, ..none });
    assert!(entropy > 0.9 && eight > chance + 0.1, "{entropy} {eight}");
    let [_, one, eight, _, _] = figures(Weights { fast: 1.0, ..none });
    assert!(one > chance + 0.08 && eight < chance + 0.03, "{one} {eight}");
    let [_, one, eight, _, _] = figures(Weights { slow: 1.0, ..none });
    assert!(one > chance + 0.1 && eight > chance + 0.08, "{one} {eight}");
    let [entropy, one, _, _, transition] = figures(Weights { coupling: 3.0, ..none });
    assert!(transition > chance + 0.2, "{transition}");
    assert!(entropy > 0.95 && one < chance + 0.03, "{entropy} {one}");
}

#[test]
fn a_search_comes_near_a_trace_that_it_does_not_know() {
    let hidden = Weights { popularity: 0.6, topic: 0.9, slow: 0.2, fast: 0.9, coupling: 2.0 };
    let target = Figures::of(&mut generator(hidden, 400, 77)).unwrap();
    let mut other = generator(Weights::default(), 400, 1);
    let start = Figures::of(&mut other).unwrap();
    let mut trials = 0;
    let found = fit(&mut other, Weights::default(), &target, &mut |done, most| {
        assert!(done <= most);
        trials = done;
    })
    .unwrap();
    let miss = |figures: &Figures| {
        // Sequences of 40 and 60 tokens have no reuse at 64.
        let pairs = figures.values.iter().zip(target.values);
        let gaps = pairs.filter_map(|(a, b)| Some((a.as_ref()? - b?).abs()));
        gaps.fold(0.0, f64::max)
    };
    assert!(miss(&found.reached) < 0.05, "{:?} for {:?}", found, target);
    assert!(miss(&found.reached) < miss(&start) / 2.0 && trials > 10);
    other.reweigh(found.weights);
    assert_eq!(Figures::of(&mut other).unwrap(), found.reached, "it can be had again");
}

/// What a trace does not have is not 0.
#[test]
fn figures_that_a_trace_is_too_short_for_are_absent() {
    let figures = Figures::of(&mut generator(Weights::default(), 130, 1)).unwrap();
    let names = Figures::NAMES.iter().zip(figures.values);
    let absent: Vec<_> =
        names.filter(|(_, value)| value.is_none()).map(|(name, _)| *name).collect();
    assert_eq!(absent, ["reuse at 64"]);
    let none = Figures::of(&mut generator(Weights::default(), 0, 1)).unwrap();
    assert!(none.values.iter().all(Option::is_none), "{none:?}");
    assert_eq!(lengths(&mut generator(Weights::default(), 0, 1)).unwrap(), [0; 0]);
    assert_eq!(lengths(&mut generator(Weights::default(), 130, 1)).unwrap(), [40, 60, 30]);
}

/// The shapes of models that nobody has traces of; as many tokens as asked
/// for, however many those are.
#[test]
fn wide_models_are_drawn_too() {
    for (experts, top_k) in [(128, 8), (256, 8), (512, 10)] {
        let layer = LayerShape { experts, top_k, expert_bytes: 7, class: 0 };
        let shape = (3, layer);
        let mut wide = Generator::new(shape, Weights::default(), (u64::MAX, &[9]), ("real", 5));
        assert_eq!(wide.tokens(), Some(u64::MAX));
        assert_eq!(wide.header().shape.layer(2), Some(&layer));
        let mut row = Row::default();
        let mut used = vec![false; experts];
        for token in 0..300 {
            assert!(wide.next(&mut row).unwrap());
            assert_eq!((row.starts_sequence, row.position), (token % 9 == 0, token % 9));
            for layer in 0..3 {
                let mut ids = row.experts(layer).to_vec();
                ids.sort_unstable();
                let is_below = usize::from(ids[top_k - 1]) < experts;
                assert!(ids.is_sorted_by(|a, b| a < b) && ids.len() == top_k && is_below);
                ids.iter().for_each(|&id| used[usize::from(id)] = true);
            }
        }
        let used = used.iter().filter(|used| **used).count();
        assert!(used > experts * 9 / 10, "{used} of {experts}");
    }
}
