//! What the forecasts want stays.

use super::history::History;
use super::lfu::TERMS;
use super::{Event, Policy, best_scope};
use crate::cache::{Candidates, Scope};
use crate::vocabulary::{ExpertId, Outlook, Shape};

/// Evicts the expert with the smallest sum of decayed frequency and the
/// probability that forecasts give to its next use. Without forecasts it is
/// [`super::Lfu`].
pub struct ForecastAware {
    name: &'static str,
    scope: Scope,
    picks_scope: bool,
    weight: f32,
    history: History,
}

impl ForecastAware {
    /// What a probability of one adds to the value of an expert; use by every
    /// token adds 1.9, the sum of the weights of the history. Between 1 and 4
    /// the hit ratio changes by a tenth of a percent (`examples/policies.rs`).
    pub const WEIGHT: f32 = 2.0;

    /// Without a scope it takes the one that measures best for the slots that
    /// there are.
    pub fn new(scope: Option<Scope>) -> Self {
        let name = match scope {
            None => "forecast-aware",
            Some(Scope::Layer) => "forecast-aware-layer",
            Some(Scope::Pool) => "forecast-aware-pool",
        };
        let picks_scope = scope.is_none();
        let scope = scope.unwrap_or(Scope::Layer);
        Self { name, scope, picks_scope, weight: Self::WEIGHT, history: History::new(&TERMS) }
    }

    /// With `weight` instead of [`ForecastAware::WEIGHT`].
    pub fn with_weight(self, weight: f32) -> Self {
        Self { weight, ..self }
    }
}

impl Policy for ForecastAware {
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
        outlook: &dyn Outlook,
    ) -> Option<ExpertId> {
        let weight = self.weight;
        let extra = |id: ExpertId| weight * outlook.probability(id).unwrap_or(0.0);
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
