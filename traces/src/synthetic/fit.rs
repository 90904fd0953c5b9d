//! Finds the weights with which a generator's figures are those of a trace.

use super::{Generator, Weights};
use crate::replay::count::{Count, CountError};
use crate::stats::Stats;
use crate::{Header, Row, Source, TraceError};
use pregate_predictor::{LayerShape, Scope};

/// Steps of the search over all weights.
const ROUNDS: usize = 7;

/// What a made-up trace shall have in common with a real one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// `None`: the trace is too short or too small to have it, such as reuse
    /// at 64 where no sequence has 65 tokens.
    pub values: [Option<f64>; Figures::NAMES.len()],
}

impl Figures {
    pub const NAMES: [&str; 9] = [
        "entropy",
        "reuse at 1",
        "reuse at 8",
        "reuse at 64",
        "LRU at 25 %",
        "LRU at 50 %",
        "Belady at 25 %",
        "Belady at 50 %",
        "transition recall",
    ];

    /// Of `source`, from its beginning; caches per layer, kept over
    /// sequences.
    ///
    /// # Errors
    /// Those of `source`; a trace without MoE layers.
    pub fn of(source: &mut dyn Source) -> Result<Self, CountError> {
        let shape = source.header().shape.clone();
        let stats = Stats::of(source, &mut |_| {})?;
        let slots = |share: f64| -> Vec<usize> {
            let slots =
                |layer: &LayerShape| ((share * layer.experts as f64) as usize).max(layer.top_k);
            shape.layers.iter().map(|layer| layer.as_ref().map_or(0, slots)).collect()
        };
        let mut ratios = [None; 4];
        for (index, share) in [0.25, 0.5].into_iter().enumerate() {
            let count = Count { slots: &slots(share), warm_up: 0 };
            ratios[index] = count.lru(source)?.ratio();
            ratios[2 + index] = count.belady(source, Scope::Layer, false)?.ratio();
        }
        let [lru_quarter, lru_half, quarter, half] = ratios;
        let values = [
            stats.entropy(),
            stats.reuse[0],
            stats.reuse[3],
            stats.reuse[6],
            lru_quarter,
            lru_half,
            quarter,
            half,
            stats.transition,
        ];
        Ok(Self { values })
    }

    /// Of the first `tokens`, or of all if there are fewer: some figures grow
    /// with the length of a trace, so those of equal lengths are compared.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn of_first(source: &mut dyn Source, tokens: u64) -> Result<Self, CountError> {
        Self::of(&mut First { source, tokens, left: tokens })
    }

    /// Squares of what they differ by, summed over the figures that `target`
    /// has. They lie between 0 and 1, so one that is absent is 1 away.
    fn distance(&self, target: &Self) -> f64 {
        let gap = |(own, target): (&Option<f64>, &Option<f64>)| match (own, target) {
            (Some(own), Some(target)) => (own - target).powi(2),
            (None, Some(_)) => 1.0,
            (_, None) => 0.0,
        };
        self.values.iter().zip(&target.values).map(gap).sum()
    }
}

/// The first tokens of another source.
struct First<'a> {
    source: &'a mut dyn Source,
    tokens: u64,
    left: u64,
}

impl Source for First<'_> {
    fn header(&self) -> &Header {
        self.source.header()
    }

    fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
        if self.left == 0 {
            row.clear();
            return Ok(false);
        }
        self.left -= 1;
        self.source.next(row)
    }

    fn tokens(&self) -> Option<u64> {
        Some(self.source.tokens()?.min(self.tokens))
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        self.left = self.tokens;
        self.source.rewind()
    }
}

/// What the search found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fit {
    pub weights: Weights,
    pub reached: Figures,
}

/// Searches, weight by weight with steps that shrink, for those with which
/// `generator` comes nearest to `target`. The same input gives the same
/// answer. `tell` is called with the trials so far and those at most.
///
/// # Errors
/// Those of counting.
pub fn fit(
    generator: &mut Generator,
    start: Weights,
    target: &Figures,
    tell: &mut dyn FnMut(usize, usize),
) -> Result<Fit, CountError> {
    let mut trials = 0;
    let most = 1 + ROUNDS * Weights::COUNT * 2;
    let mut look = |weights: Weights, trials: &mut usize| -> Result<Fit, CountError> {
        generator.reweigh(weights);
        let reached = Figures::of(generator)?;
        *trials += 1;
        tell(*trials, most);
        Ok(Fit { weights, reached })
    };
    let mut best = look(start, &mut trials)?;
    let mut step: f64 = 1.6;
    for _ in 0..ROUNDS {
        for index in 0..Weights::COUNT {
            for factor in [step, 1.0 / step] {
                let mut weights = best.weights;
                *weights.part(index) = (*weights.part(index) * factor).clamp(0.02, 8.0);
                let found = look(weights, &mut trials)?;
                if found.reached.distance(target) < best.reached.distance(target) {
                    best = found;
                    // The other way is worse then, as a rule.
                    break;
                }
            }
        }
        step = step.powf(0.72);
    }
    Ok(best)
}

/// Sequences whose lengths are kept.
const MOST_LENGTHS: usize = 1 << 16;

/// How long the first sequences of a trace are, 65,536 at most; none in a
/// trace without tokens. Read from its beginning as far as that takes.
///
/// # Errors
/// Those of `source`.
pub fn lengths(source: &mut dyn Source) -> Result<Vec<u64>, TraceError> {
    source.rewind()?;
    let mut row = Row::default();
    let mut lengths: Vec<u64> = Vec::new();
    while source.next(&mut row)? {
        if row.starts_sequence || lengths.is_empty() {
            if lengths.len() == MOST_LENGTHS {
                break;
            }
            lengths.push(0);
        }
        if let Some(last) = lengths.last_mut() {
            *last += 1;
        }
    }
    Ok(lengths)
}
