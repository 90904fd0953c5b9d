//! Least recently used, per layer.

use super::{Event, Policy};
use crate::cache::{Candidates, Scope};
use crate::vocabulary::{ExpertId, Outlook, Shape};
use ::lru::LruCache;

/// Evicts the expert whose last use is the longest ago. Within an event,
/// rank 0 counts as the most recent; within a chunk, the expert that most
/// tokens chose.
#[derive(Default)]
pub struct Lru {
    /// Per layer the experts by recency: residents, and those of the current
    /// event.
    layers: Vec<LruCache<u32, ()>>,
    /// Of a chunk: its experts, fewest tokens first.
    order: Vec<usize>,
}

impl Policy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn scope(&self) -> Scope {
        Scope::Layer
    }

    fn prepare(&mut self, shape: &Shape, _slots: &[usize]) {
        self.layers = shape.layers.iter().map(|_| LruCache::unbounded()).collect();
    }

    fn used(&mut self, event: &Event<'_>) {
        self.order.clear();
        self.order.extend((0..event.experts.len()).rev());
        self.order.sort_by_key(|&index| event.counts[index]);
        let layer = &mut self.layers[event.layer];
        for &index in &self.order {
            layer.put(event.experts[index], ());
        }
    }

    fn used_last(&mut self, layer: usize, experts: &[u32]) {
        for &expert in experts.iter().rev() {
            self.layers[layer].put(expert, ());
        }
    }

    fn inserted(&mut self, id: ExpertId) {
        let layer = &mut self.layers[id.layer()];
        if !layer.contains(&id.expert) {
            layer.put(id.expert, ());
        }
    }

    fn removed(&mut self, id: ExpertId) {
        self.layers[id.layer()].pop(&id.expert);
    }

    fn victim(
        &mut self,
        candidates: &Candidates<'_>,
        incoming: ExpertId,
        _outlook: &dyn Outlook,
    ) -> Option<ExpertId> {
        let layer = incoming.layer();
        // The incoming expert stands in the list as well: whoever is more
        // recent does not leave for it.
        let oldest = self.layers[layer]
            .iter()
            .rev()
            .map(|(&expert, ())| ExpertId::new(layer, expert))
            .find(|&id| id == incoming || candidates.allows(id))?;
        if oldest == incoming {
            self.layers[layer].pop(&incoming.expert);
            return None;
        }
        Some(oldest)
    }
}
