//! Least frequently used, with decay.

use super::history::{History, Term};
use super::{Event, Policy, best_scope};
use crate::cache::{Candidates, Scope};
use crate::vocabulary::{ExpertId, Outlook, Shape};

/// Evicts the expert that was used least, recent tokens counting more.
///
/// One decay is either quick to forget (recency) or slow (frequency). Routing
/// has both: an expert that was just used is likely again, and beyond some
/// tokens only its long-run share counts. So the value is a sum over four
/// decays; a fit of the weights to each layer while running gained less than
/// a tenth of a percent over the constant ones (`examples/policies.rs`).
pub struct Lfu {
    name: &'static str,
    scope: Scope,
    picks_scope: bool,
    history: History,
}

/// Picked on gpt-oss-20b and DeepSeek-V2-Lite routing at 25, 50 and 75 % of
/// the slots, the same for all.
pub const TERMS: [Term; 4] = [
    Term { decay: 0.5, weight: 0.3 },
    Term { decay: 0.9, weight: 0.4 },
    Term { decay: 0.98, weight: 1.0 },
    Term { decay: 0.995, weight: 0.2 },
];

impl Lfu {
    /// The best single decay per token.
    pub const DECAY: f32 = 0.97;

    /// With several decays. Without a scope it takes the one that measures
    /// best for the slots that there are.
    pub fn new(scope: Option<Scope>) -> Self {
        let name = match scope {
            None => "frequency",
            Some(Scope::Layer) => "frequency-layer",
            Some(Scope::Pool) => "frequency-pool",
        };
        let picks_scope = scope.is_none();
        let scope = scope.unwrap_or(Scope::Layer);
        Self { name, scope, picks_scope, history: History::new(&TERMS) }
    }

    /// With one decay per token, between 0 and 1.
    pub fn with_decay(scope: Scope, decay: f32) -> Self {
        let name = match scope {
            Scope::Layer => "lfu",
            Scope::Pool => "lfu-pool",
        };
        let history = History::new(&[Term { decay, weight: 1.0 }]);
        Self { name, scope, picks_scope: false, history }
    }
}

impl Policy for Lfu {
    fn name(&self) -> &'static str {
        self.name
    }

    fn scope(&self) -> Scope {
        self.scope
    }

    fn prepare(&mut self, shape: &Shape, slots: &[usize]) {
        if self.picks_scope {
            self.scope = best_scope(shape, slots);
        }
        self.history.prepare(shape);
    }

    fn used(&mut self, event: &Event<'_>) {
        self.history.used(event);
    }

    fn inserted(&mut self, id: ExpertId) {
        self.history.inserted(id);
    }

    fn removed(&mut self, id: ExpertId) {
        self.history.removed(id);
    }

    fn victim(
        &mut self,
        candidates: &Candidates<'_>,
        incoming: ExpertId,
        _outlook: &dyn Outlook,
    ) -> Option<ExpertId> {
        let history = &mut self.history;
        let least = candidates
            .layers()
            .filter_map(|layer| {
                let id = history.least(layer, candidates, &|_| 0.0)?;
                Some((history.value(id), id))
            })
            .min_by(|a, b| a.0.total_cmp(&b.0))?;
        let stays = !candidates.is_of_event(least.1) || least.0 < history.value(incoming);
        stays.then_some(least.1)
    }
}
