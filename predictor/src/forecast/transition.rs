//! From layer to layer: what do the experts of earlier layers of this token
//! say about a later layer? Naive Bayes, learned while running.

use super::marginal::Marginal;
use super::pairs::{Pairs, Prior, Work};
use super::{Forecast, Known};
use crate::Shape;

/// Tokens after which a use counts half in the prior.
const HALF_LIFE: f32 = 2048.0;
/// How much the nearest, the second nearest ... layer counts. Neighbouring
/// layers say partly the same, so that their evidence is not simply added.
const TRUST: [f32; 6] = [1.0, 0.5, 0.35, 0.25, 0.2, 0.2];

/// Tables between layers up to `reach` apart, of which the `window` nearest
/// ones that are known are used.
struct Ladder {
    window: usize,
    priors: Vec<Option<Marginal>>,
    /// `[target][distance - 1]`.
    tables: Vec<Vec<Option<Pairs>>>,
    /// This token's experts so far, `[layers]`.
    path: Vec<Vec<u32>>,
    prior: Prior,
    work: Work,
}

impl Ladder {
    /// Holds at most `limit_bytes` in tables: `2 * (experts^2 + experts)` for
    /// each layer and distance. The reach shrinks until they fit.
    fn new(shape: &Shape, horizon: usize, window: usize, limit_bytes: usize) -> Self {
        let layers = shape.layers.len();
        let pair = |target: usize, distance: usize| {
            let (to, from) = (shape.layer(target)?, shape.layer(target.checked_sub(distance)?)?);
            Some((from.experts, to.experts))
        };
        let bytes = |reach: usize| {
            (0..layers)
                .flat_map(|target| (1..=reach).map(move |distance| (target, distance)))
                .filter_map(|(target, distance)| pair(target, distance))
                .fold(0usize, |sum, (from, to)| sum.saturating_add(Pairs::bytes(from, to)))
        };
        let wanted = (horizon + window).saturating_sub(1).min(layers);
        let reach = (0..=wanted).rev().find(|&reach| bytes(reach) <= limit_bytes).unwrap_or(0);
        let table = |target, distance| pair(target, distance).map(|(a, b)| Pairs::new(a, b));
        let widest = shape.moe().map(|(_, layer)| layer.experts).max().unwrap_or(0);
        Self {
            window: window.min(TRUST.len()),
            priors: (0..layers)
                .map(|l| shape.layer(l).map(|l| Marginal::new(l.experts, l.top_k, HALF_LIFE)))
                .collect(),
            tables: (0..layers)
                .map(|target| (1..=reach).map(|distance| table(target, distance)).collect())
                .collect(),
            path: shape
                .layers
                .iter()
                .map(|l| Vec::with_capacity(l.map_or(0, |l| l.top_k)))
                .collect(),
            prior: Prior::new(widest),
            work: Work::new(widest),
        }
    }

    fn scores(&mut self, target: usize, routed: &[Vec<u32>], scores: &mut [f32]) -> bool {
        let (Some(Some(marginal)), Some(tables)) =
            (self.priors.get(target), self.tables.get(target))
        else {
            return false;
        };
        let mut used = 0;
        for (index, table) in tables.iter().enumerate() {
            let Some(table) = table else { continue };
            let from = &routed[target - 1 - index];
            if from.is_empty() {
                continue;
            }
            if used == 0 {
                self.prior.set(marginal);
                scores.copy_from_slice(&self.prior.log_odds()[..scores.len()]);
            }
            table.add(from, TRUST[used], &self.prior, scores, &mut self.work);
            used += 1;
            if used == self.window {
                break;
            }
        }
        used > 0
    }

    fn routed(&mut self, layer: usize, experts: &[u32]) {
        let (Some(Some(marginal)), Some(tables)) =
            (self.priors.get_mut(layer), self.tables.get_mut(layer))
        else {
            return;
        };
        marginal.used(experts);
        for (index, table) in tables.iter_mut().enumerate() {
            if let Some(table) = table {
                table.learn(&self.path[layer - 1 - index], experts);
            }
        }
        self.path[layer].clear();
        self.path[layer].extend_from_slice(experts);
    }

    fn begin_token(&mut self) {
        self.path.iter_mut().for_each(Vec::clear);
    }

    fn memory_bytes(&self) -> usize {
        let tables: usize = self.tables.iter().flatten().flatten().map(Pairs::memory_bytes).sum();
        tables + self.priors.iter().flatten().map(Marginal::memory_bytes).sum::<usize>()
    }
}

macro_rules! ladder_forecast {
    ($type:ident, $name:literal) => {
        impl Forecast for $type {
            fn name(&self) -> &'static str {
                $name
            }

            fn scores(&mut self, target: usize, known: &Known<'_>, scores: &mut [f32]) -> bool {
                self.0.scores(target, known.routed, scores)
            }

            fn routed(&mut self, layer: usize, experts: &[u32], _: &[f32]) {
                self.0.routed(layer, experts);
            }

            fn begin_token(&mut self, _: u32) {
                self.0.begin_token();
            }

            fn new_sequence(&mut self) {
                self.0.begin_token();
            }

            fn memory_bytes(&self) -> usize {
                self.0.memory_bytes()
            }
        }
    };
}

/// The nearest known layer of this token alone.
pub struct Transition(Ladder);

impl Transition {
    /// Tables for guesses up to `horizon` layers ahead, in at most 16 MiB.
    pub fn new(shape: &Shape, horizon: usize) -> Self {
        Self(Ladder::new(shape, horizon, 1, 16 << 20))
    }
}

ladder_forecast!(Transition, "transition");

/// The nearest known layers of this token.
pub struct NaiveBayes(Ladder);

impl NaiveBayes {
    /// Layers that are looked at.
    pub const WINDOW: usize = 4;

    /// Tables for guesses up to `horizon` layers ahead, in at most 32 MiB: of
    /// 48 layers with 128 experts and a horizon of 3, 9.5 MB.
    pub fn new(shape: &Shape, horizon: usize) -> Self {
        Self(Ladder::new(shape, horizon, Self::WINDOW, 32 << 20))
    }
}

ladder_forecast!(NaiveBayes, "naive-bayes");
