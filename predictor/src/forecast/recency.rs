//! Forecasts that look at one layer alone: what did it do lately?

use super::marginal::Marginal;
use super::{Forecast, Known};
use crate::{LayerShape, Shape};

/// The experts that the previous token used in the same layer.
pub struct PreviousToken {
    /// `[layers]`, rank order.
    last: Vec<Vec<u32>>,
}

impl PreviousToken {
    pub fn new(shape: &Shape) -> Self {
        let capacity = |layer: &Option<LayerShape>| layer.map_or(0, |layer| layer.top_k);
        Self { last: shape.layers.iter().map(|l| Vec::with_capacity(capacity(l))).collect() }
    }
}

impl Forecast for PreviousToken {
    fn name(&self) -> &'static str {
        "previous-token"
    }

    fn scores(&mut self, target: usize, _: &Known<'_>, scores: &mut [f32]) -> bool {
        let Some(last) = self.last.get(target).filter(|last| !last.is_empty()) else {
            return false;
        };
        scores.fill(0.0);
        for (rank, &expert) in last.iter().enumerate() {
            // The first ranks stay more often than the last ones.
            scores[expert as usize] = 2.0 - rank as f32 / last.len() as f32;
        }
        true
    }

    fn routed(&mut self, layer: usize, experts: &[u32], _: &[f32]) {
        if let Some(last) = self.last.get_mut(layer) {
            last.clear();
            last.extend_from_slice(experts);
        }
    }

    fn begin_token(&mut self, _: u32) {}

    fn new_sequence(&mut self) {
        self.last.iter_mut().for_each(Vec::clear);
    }

    fn is_steady(&self) -> bool {
        true
    }

    fn memory_bytes(&self) -> usize {
        self.last.iter().map(|last| 4 * last.capacity()).sum()
    }
}

/// How often the layer used each expert, old uses counting less.
pub struct Frequency {
    layers: Vec<Option<Marginal>>,
}

impl Frequency {
    /// Tokens after which a use counts half.
    pub const HALF_LIFE: f32 = 128.0;

    pub fn new(shape: &Shape) -> Self {
        let marginal = |l: &LayerShape| Marginal::new(l.experts, l.top_k, Self::HALF_LIFE);
        Self { layers: shape.layers.iter().map(|l| l.as_ref().map(marginal)).collect() }
    }
}

impl Forecast for Frequency {
    fn name(&self) -> &'static str {
        "frequency"
    }

    fn scores(&mut self, target: usize, _: &Known<'_>, scores: &mut [f32]) -> bool {
        let Some(Some(marginal)) = self.layers.get(target) else { return false };
        marginal.log_odds(scores);
        true
    }

    fn routed(&mut self, layer: usize, experts: &[u32], _: &[f32]) {
        if let Some(Some(marginal)) = self.layers.get_mut(layer) {
            marginal.used(experts);
        }
    }

    fn begin_token(&mut self, _: u32) {}

    fn new_sequence(&mut self) {}

    fn is_steady(&self) -> bool {
        true
    }

    fn memory_bytes(&self) -> usize {
        self.layers.iter().flatten().map(Marginal::memory_bytes).sum()
    }
}
