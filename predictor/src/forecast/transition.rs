//! From layer to layer: what do the experts of earlier layers of this token
//! say about a later layer? Naive Bayes, learned while running.

use super::marginal::Marginal;
use super::pairs::{Pairs, Prior};
use super::{Forecast, Known};
use crate::{LayerShape, Shape};

/// Tokens after which a use counts half in the prior.
const HALF_LIFE: f32 = 2048.0;
/// How much the nearest, the second nearest ... layer counts. Neighbouring
/// layers say partly the same, so that their evidence is not simply added.
const TRUST: [f32; 6] = [1.0, 0.5, 0.35, 0.25, 0.2, 0.2];

/// Tables between layers up to `reach` apart, of which the `window` nearest
/// ones that are known are used.
struct Ladder {
    window: usize,
    layers: Vec<Option<Rung>>,
    /// This token's experts so far, `[layers]`.
    path: Vec<Vec<u32>>,
}

struct Rung {
    marginal: Marginal,
    prior: Prior,
    /// To the next layers.
    pairs: Pairs,
    /// The layers that `pairs` leads to.
    targets: Vec<usize>,
    /// The layers that lead here, nearest first, and which target of theirs
    /// this is.
    sources: Vec<(usize, usize)>,
}

impl Ladder {
    /// Holds at most `limit_bytes` in tables: `experts * (reach * experts +
    /// 1)` for each layer. The reach shrinks until they fit.
    fn new(shape: &Shape, horizon: usize, window: usize, limit_bytes: usize) -> Self {
        let layers = shape.layers.len();
        let targets = |layer: usize, reach: usize| {
            let later = shape.moe().filter(move |(later, _)| *later > layer);
            later.take(reach).map(|(later, shape)| (later, shape.experts))
        };
        let bytes = |reach: usize| {
            let of = |(l, layer): (usize, &LayerShape)| {
                Pairs::bytes(layer.experts, targets(l, reach).map(|(_, experts)| experts))
            };
            shape.moe().map(of).fold(0usize, usize::saturating_add)
        };
        let wanted = (horizon + window).saturating_sub(1).min(layers);
        let reach = (0..=wanted).rev().find(|&reach| bytes(reach) <= limit_bytes).unwrap_or(0);
        let leads_to = |layer| targets(layer, reach).map(|(l, _)| l).collect::<Vec<_>>();
        let rung = |(index, layer): (usize, &Option<LayerShape>)| {
            let layer = layer.as_ref()?;
            let marginal = Marginal::new(layer.experts, layer.top_k, HALF_LIFE);
            let sizes: Vec<usize> = targets(index, reach).map(|(_, experts)| experts).collect();
            let place = |source: usize| leads_to(source).iter().position(|&l| l == index);
            Some(Rung {
                prior: Prior::new(&marginal),
                marginal,
                pairs: Pairs::new(layer.experts, &sizes),
                targets: leads_to(index),
                sources: (0..index)
                    .rev()
                    .filter(|&source| shape.layer(source).is_some())
                    .filter_map(|source| Some((source, place(source)?)))
                    .collect(),
            })
        };
        let path = |l: &Option<LayerShape>| Vec::with_capacity(l.map_or(0, |l| l.top_k));
        Self {
            window: window.min(TRUST.len()),
            layers: shape.layers.iter().enumerate().map(rung).collect(),
            path: shape.layers.iter().map(path).collect(),
        }
    }

    fn scores(&self, target: usize, routed: &[Vec<u32>], scores: &mut [f32]) -> bool {
        let Some(Some(rung)) = self.layers.get(target) else { return false };
        scores.copy_from_slice(rung.prior.log_odds());
        let mut used = 0;
        for &(source, place) in &rung.sources {
            let Some(source) = self.layers[source].as_ref().filter(|_| !routed[source].is_empty())
            else {
                continue;
            };
            for (score, said) in scores.iter_mut().zip(source.pairs.said(place)) {
                *score += TRUST[used] * said;
            }
            used += 1;
            if used == self.window {
                break;
            }
        }
        used > 0
    }

    fn routed(&mut self, layer: usize, experts: &[u32]) {
        let Some(Some(rung)) = self.layers.get_mut(layer) else { return };
        rung.marginal.used(experts);
        rung.prior.set(&rung.marginal);
        for index in 0..rung_sources(&self.layers, layer) {
            let Some(rung) = &self.layers[layer] else { return };
            let (source, place) = rung.sources[index];
            if let Some(source_rung) = &mut self.layers[source] {
                source_rung.pairs.learn(&self.path[source], place, experts);
            }
        }
        self.path[layer].clear();
        self.path[layer].extend_from_slice(experts);
        let (until, after) = self.layers.split_at_mut(layer + 1);
        if let Some(Some(rung)) = until.last_mut() {
            let prior = |target: usize| {
                let target = after[rung.targets[target] - layer - 1].as_ref();
                &target.expect("targets are MoE layers").prior
            };
            rung.pairs.ask(experts, prior);
            rung.pairs.began(experts);
        }
    }

    fn begin_token(&mut self) {
        self.path.iter_mut().for_each(Vec::clear);
    }

    fn memory_bytes(&self) -> usize {
        let rung = |rung: &Rung| rung.pairs.memory_bytes() + 3 * rung.marginal.memory_bytes();
        self.layers.iter().flatten().map(rung).sum()
    }
}

fn rung_sources(layers: &[Option<Rung>], layer: usize) -> usize {
    layers[layer].as_ref().map_or(0, |rung| rung.sources.len())
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
    /// 48 layers with 128 experts and a horizon of 3, 4.4 MB.
    pub fn new(shape: &Shape, horizon: usize) -> Self {
        Self(Ladder::new(shape, horizon, Self::WINDOW, 32 << 20))
    }
}

ladder_forecast!(NaiveBayes, "naive-bayes");
