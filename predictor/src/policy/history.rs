//! How much each expert was used, recent uses counting more.

use super::Event;
use crate::cache::Candidates;
use crate::vocabulary::{ExpertId, Shape};

/// A decay per token, and what the average that it makes weighs.
#[derive(Clone, Copy, Debug)]
pub struct Term {
    pub decay: f32,
    pub weight: f32,
}

/// A longer chunk counts no more than so many tokens: what decoding used before
/// it will be used again, if not in this text then in another session's. Of 16
/// to 512 this cost next to nothing behind the prompt, and saved most of what
/// a prompt took from other texts (`examples/prompts.rs`).
const CHUNK_TOKENS: f32 = 32.0;

#[derive(Clone, Default)]
struct Layer {
    /// `[terms][experts]`: the average of "was used" over past tokens.
    averages: Vec<Vec<f32>>,
    /// `[experts]`: the weighted sum of the averages.
    values: Vec<f32>,
    /// The resident with the smallest value, if it is known.
    least: Option<u32>,
}

/// The value of every expert, whether resident or not: weighted averages of
/// its use with several decays. Comparable between layers.
pub struct History {
    terms: Vec<Term>,
    layers: Vec<Layer>,
}

impl History {
    /// Nothing was used yet.
    pub fn new(terms: &[Term]) -> Self {
        Self { terms: terms.to_vec(), layers: Vec::new() }
    }

    pub fn prepare(&mut self, shape: &Shape) {
        let layer = |index: usize| {
            let experts = shape.layer(index).map_or(0, |layer| layer.experts);
            let averages = vec![vec![0.0; experts]; self.terms.len()];
            Layer { averages, values: vec![0.0; experts], least: None }
        };
        self.layers = (0..shape.layers.len()).map(layer).collect();
    }

    /// A chunk counts as its tokens would, had each expert's uses been spread
    /// evenly over them, but as no more than [`CHUNK_TOKENS`].
    pub fn used(&mut self, event: &Event<'_>) {
        let layer = &mut self.layers[event.layer];
        layer.least = None;
        layer.values.fill(0.0);
        for (term, averages) in self.terms.iter().zip(&mut layer.averages) {
            let tokens = event.tokens as f32;
            let kept = term.decay.powf(tokens.min(CHUNK_TOKENS));
            averages.iter_mut().for_each(|average| *average *= kept);
            for (&expert, &count) in event.experts.iter().zip(event.counts) {
                averages[expert as usize] += (1.0 - kept) * count as f32 / tokens;
            }
            for (value, average) in layer.values.iter_mut().zip(averages) {
                *value += term.weight * *average;
            }
        }
    }

    /// `id` became resident. If its history is worth less than that of the
    /// least, it may be the least itself.
    pub fn inserted(&mut self, id: ExpertId) {
        let layer = &mut self.layers[id.layer()];
        let value = |expert: u32| layer.values[expert as usize];
        if layer.least.is_some_and(|least| value(id.expert) <= value(least)) {
            layer.least = None;
        }
    }

    /// `id` is no longer resident.
    pub fn removed(&mut self, id: ExpertId) {
        let layer = &mut self.layers[id.layer()];
        if layer.least == Some(id.expert) {
            layer.least = None;
        }
    }

    pub fn value(&self, id: ExpertId) -> f32 {
        self.layers[id.layer()].values[id.expert()]
    }

    /// The expert of `layer` with the smallest value plus `extra` that may
    /// leave. It is looked for once between changes of the layer, so `extra`
    /// may be somewhat older than the call.
    pub fn least(
        &mut self,
        layer: usize,
        candidates: &Candidates<'_>,
        extra: &dyn Fn(ExpertId) -> f32,
    ) -> Option<ExpertId> {
        let state = &mut self.layers[layer];
        let smallest = |experts: &mut dyn Iterator<Item = u32>| {
            experts
                .map(|expert| (state.values[expert as usize], ExpertId::new(layer, expert)))
                .map(|(value, id)| (value + extra(id), id))
                .min_by(|a, b| a.0.total_cmp(&b.0))
                .map(|(_, id)| id)
        };
        if state.least.is_none() {
            state.least = smallest(&mut candidates.residents(layer)).map(|id| id.expert);
        }
        let id = ExpertId::new(layer, state.least?);
        match candidates.allows(id) {
            true => Some(id),
            false => smallest(&mut candidates.experts(layer)),
        }
    }
}
