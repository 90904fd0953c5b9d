//! Least frequently used, with decay, and what forecasts add to it.

use super::history::{History, Term};
use super::{Event, Policy, best_scope};
use crate::cache::{Candidates, Scope};
use crate::vocabulary::{ExpertId, Outlook, Shape};

/// Evicts the expert of the smallest value: how often it was used, recent
/// tokens counting more, and where asked for the probability that forecasts
/// give to its next use.
///
/// One decay is either quick to forget (recency) or slow (frequency). Routing
/// has both: an expert that was just used is likely again, and beyond some
/// tokens only its long-run share counts. So the value is a sum over four
/// decays; a fit of the weights to each layer while running gained less than
/// a tenth of a percent over the constant ones (`examples/policies.rs`).
pub struct Frequency {
    name: &'static str,
    scope: Scope,
    picks_scope: bool,
    /// What a probability of one adds to the value of an expert.
    forecast_weight: f32,
    history: History,
    /// What one token counts for each of its experts.
    ones: Vec<u32>,
}

/// Picked on gpt-oss-20b and DeepSeek-V2-Lite routing at 25, 50 and 75 % of
/// the slots, the same for all.
const TERMS: [Term; 4] = [
    Term { decay: 0.5, weight: 0.3 },
    Term { decay: 0.9, weight: 0.4 },
    Term { decay: 0.98, weight: 1.0 },
    Term { decay: 0.995, weight: 0.2 },
];

/// Use by every token adds 1.9, the sum of the weights above. Between 1 and 4
/// the hit ratio changes by a tenth of a percent (`examples/policies.rs`).
const FORECAST_WEIGHT: f32 = 2.0;

impl Frequency {
    /// The best single decay per token.
    pub const DECAY: f32 = 0.97;

    /// With several decays. Without a scope it takes the one that measures
    /// best for the slots that there are.
    pub fn new(scope: Option<Scope>) -> Self {
        Self::named(["frequency", "frequency-layer", "frequency-pool"], scope, &TERMS)
    }

    /// As [`Frequency::new`], with forecasts where there are any.
    pub fn with_forecasts(scope: Option<Scope>) -> Self {
        let names = ["forecast-aware", "forecast-aware-layer", "forecast-aware-pool"];
        Self { forecast_weight: FORECAST_WEIGHT, ..Self::named(names, scope, &TERMS) }
    }

    /// With one decay per token, between 0 and 1.
    pub fn with_decay(scope: Scope, decay: f32) -> Self {
        Self::named(["lfu", "lfu", "lfu-pool"], Some(scope), &[Term { decay, weight: 1.0 }])
    }

    /// Names for a scope that is picked, [`Scope::Layer`] and [`Scope::Pool`].
    fn named(names: [&'static str; 3], scope: Option<Scope>, terms: &[Term]) -> Self {
        let name = match scope {
            None => names[0],
            Some(Scope::Layer) => names[1],
            Some(Scope::Pool) => names[2],
        };
        Self {
            name,
            scope: scope.unwrap_or(Scope::Layer),
            picks_scope: scope.is_none(),
            forecast_weight: 0.0,
            history: History::new(terms),
            ones: Vec::new(),
        }
    }
}

impl Policy for Frequency {
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

    fn used_last(&mut self, layer: usize, experts: &[u32]) {
        self.ones.resize(experts.len().max(self.ones.len()), 1);
        let counts = &self.ones[..experts.len()];
        self.history.used(&Event { layer, experts, counts, tokens: 1 });
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
        outlook: &dyn Outlook,
    ) -> Option<ExpertId> {
        let weight = self.forecast_weight;
        let extra = |id: ExpertId| match weight {
            0.0 => 0.0,
            weight => weight * outlook.probability(id).unwrap_or(0.0),
        };
        let history = &mut self.history;
        // The incoming expert's layer has changed, so its forecasts are
        // fresh; of the others each offers what it could spare when it ran,
        // at today's price.
        let mut least: Option<(f32, ExpertId)> = None;
        for layer in candidates.layers() {
            let Some(id) = history.least(layer, candidates, &extra) else { continue };
            let value = history.value(id) + extra(id);
            if least.is_none_or(|(smallest, _)| value < smallest) {
                least = Some((value, id));
            }
        }
        let (value, victim) = least?;
        let stays =
            !candidates.is_of_event(victim) || value < history.value(incoming) + extra(incoming);
        stays.then_some(victim)
    }
}
