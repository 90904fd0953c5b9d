//! Belady's rule: for replay, where the future is known.

use super::{Event, Policy};
use crate::cache::{Candidates, Scope};
use crate::vocabulary::{ExpertId, Outlook, Shape};
use std::collections::VecDeque;

/// Evicts the expert whose next use is farthest: the bound for every policy
/// with the same scope, on the same events.
pub struct Belady {
    scope: Scope,
    may_bypass: bool,
    /// `[layers][experts]`: the events that will use it, ascending.
    uses: Vec<Vec<VecDeque<u32>>>,
    /// The events of the future so far, in the order that `used` will see.
    known: u32,
}

impl Belady {
    /// Nothing is known of the future yet. With `may_bypass` an expert that
    /// is used later than all residents does not stay.
    pub fn new(scope: Scope, may_bypass: bool) -> Self {
        Self { scope, may_bypass, uses: Vec::new(), known: 0 }
    }

    /// Adds the next event of the future.
    pub fn foresee(&mut self, layer: usize, experts: &[u32]) {
        if self.uses.len() <= layer {
            self.uses.resize(layer + 1, Vec::new());
        }
        let uses = &mut self.uses[layer];
        for &expert in experts {
            let expert = expert as usize;
            if uses.len() <= expert {
                uses.resize(expert + 1, VecDeque::new());
            }
            uses[expert].push_back(self.known);
        }
        self.known += 1;
    }

    fn next_use(&self, id: ExpertId) -> u32 {
        let uses = self.uses.get(id.layer()).and_then(|layer| layer.get(id.expert()));
        uses.and_then(|uses| uses.front()).copied().unwrap_or(u32::MAX)
    }
}

impl Policy for Belady {
    fn name(&self) -> &'static str {
        "belady"
    }

    fn scope(&self) -> Scope {
        self.scope
    }

    fn prepare(&mut self, _shape: &Shape, _slots: &[usize]) {}

    fn used(&mut self, event: &Event<'_>) {
        for &expert in event.experts {
            let now = self.uses[event.layer][expert as usize].pop_front();
            assert!(now.is_some(), "layer {} used {expert} unforeseen", event.layer);
        }
    }

    fn victim(
        &mut self,
        candidates: &Candidates<'_>,
        incoming: ExpertId,
        _outlook: &dyn Outlook,
    ) -> Option<ExpertId> {
        let farthest = candidates
            .layers()
            .flat_map(|layer| candidates.experts(layer).map(move |id| ExpertId::new(layer, id)))
            .max_by_key(|&id| self.next_use(id))?;
        let stays = !self.may_bypass || self.next_use(farthest) > self.next_use(incoming);
        stays.then_some(farthest)
    }
}
