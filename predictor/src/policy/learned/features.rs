//! What a network is told of an expert: nothing that names it, its layer or
//! its model.

use super::super::Event;
use super::recall::Recall;
use super::usage::{LONG_AGO, RATES, Usage};
use crate::forecast::fast;
use crate::vocabulary::Shape;

/// Numbers per expert: averages of its use, tokens since its last use, whether
/// and in which rank it is in use, the gaps between its last uses, what it was
/// worth after moments like this one, and how like they are.
pub const FEATURES: usize = RATES + 10;

/// What was, as far as policies look at it.
#[derive(Default)]
pub struct Past {
    /// `[layers]`: how many of the experts a token uses.
    density: Vec<f32>,
    usage: Vec<Option<Usage>>,
    recall: Recall,
}

impl Past {
    pub fn prepare(&mut self, shape: &Shape) {
        let density = |layer: &Option<crate::LayerShape>| {
            layer.as_ref().map_or(1.0, |l| l.top_k.max(1) as f32 / l.experts.max(1) as f32)
        };
        self.density = shape.layers.iter().map(density).collect();
        self.usage = shape.layers.iter().map(|layer| layer.as_ref().map(Usage::new)).collect();
        self.recall.prepare(shape);
    }

    pub fn next_token(&mut self) {
        self.recall.next_token();
    }

    pub fn new_sequence(&mut self) {
        self.recall.new_sequence();
    }

    pub fn used(&mut self, event: &Event<'_>) {
        if let Some(Some(usage)) = self.usage.get_mut(event.layer) {
            usage.used(event);
        }
        if event.tokens == 1 {
            self.recall.used(event.layer, event.experts);
        }
    }

    /// One of the last tokens of a chunk; `counts` is all ones.
    pub fn used_last(&mut self, layer: usize, experts: &[u32], counts: &[u32]) {
        if let Some(Some(usage)) = self.usage.get_mut(layer) {
            usage.used(&Event { layer, experts, counts, tokens: 1 });
        }
        self.recall.used_last(layer, experts);
    }

    /// The experts' use in `layer`; `None` for a dense layer.
    pub fn usage(&self, layer: usize) -> Option<&Usage> {
        self.usage.get(layer)?.as_ref()
    }

    /// What is known of `expert` of `layer`, which has run in this token.
    pub fn features(&self, layer: usize, expert: u32) -> [f32; FEATURES] {
        let mut features = [0.0; FEATURES];
        let Some(usage) = self.usage(layer) else { return features };
        let density = self.density[layer];
        for (feature, share) in features.iter_mut().zip(usage.shares(expert)) {
            *feature = 0.6 * fast::ln(share / density + 0.03);
        }
        let long = |tokens: u32| 0.4 * fast::ln(1.0 + tokens.min(2 * LONG_AGO) as f32) - 0.5;
        let (age, known) = (usage.age(expert), usage.expert(expert));
        let is_used = age == 0;
        let worth = self.recall.worth(layer, expert).map(|worth| 2.0 * worth);
        features[RATES..].copy_from_slice(&[
            long(age),
            if is_used { 1.0 } else { 0.0 },
            1.0 / (1.0 + age as f32),
            if is_used { known.rank } else { 0.0 },
            long(known.gaps[0]),
            long(known.gaps[1]),
            worth[0],
            worth[1],
            worth[2],
            3.0 * self.recall.quality() - 1.0,
        ]);
        features
    }
}
