//! Least stale (SpecMD, arXiv 2602.03921): what this pass has not used goes
//! first, in the order in which it came.

use super::{Event, Policy};
use crate::cache::{Candidates, Scope};
use crate::vocabulary::{ExpertId, Outlook, Shape};
use std::collections::VecDeque;

/// Evicts, of the experts that this pass over the layers has not used, the
/// one that became resident first; if all were used, the first of them.
pub struct LeastStale {
    scope: Scope,
    pass: u64,
    arrivals: u64,
    /// `[layers][experts]`: the pass that used it last.
    used: Vec<Vec<u64>>,
    /// `[layers][experts]`: which arrival made it resident.
    arrived: Vec<Vec<u64>>,
    /// `[queues]`: arrivals in order, one queue per layer or one for all.
    /// Those that have left since are skipped.
    queues: Vec<VecDeque<(u64, ExpertId)>>,
}

impl LeastStale {
    pub fn new(scope: Scope) -> Self {
        let (used, arrived, queues) = Default::default();
        Self { scope, pass: 0, arrivals: 0, used, arrived, queues }
    }

    fn queue(&self, layer: usize) -> usize {
        match self.scope {
            Scope::Layer => layer,
            Scope::Pool => 0,
        }
    }
}

impl Policy for LeastStale {
    fn name(&self) -> &'static str {
        match self.scope {
            Scope::Layer => "least-stale",
            Scope::Pool => "least-stale-pool",
        }
    }

    fn scope(&self) -> Scope {
        self.scope
    }

    fn prepare(&mut self, shape: &Shape, _slots: &[usize]) {
        let experts = |layer: usize| shape.layer(layer).map_or(0, |layer| layer.experts);
        self.used = (0..shape.layers.len()).map(|layer| vec![0; experts(layer)]).collect();
        self.arrived = self.used.clone();
        self.queues = vec![VecDeque::new(); shape.layers.len().max(1)];
    }

    fn next_token(&mut self) {
        self.pass += 1;
    }

    fn used(&mut self, event: &Event<'_>) {
        for &expert in event.experts {
            self.used[event.layer][expert as usize] = self.pass;
        }
    }

    fn inserted(&mut self, id: ExpertId) {
        self.arrivals += 1;
        self.arrived[id.layer()][id.expert()] = self.arrivals;
        let queue = self.queue(id.layer());
        self.queues[queue].push_back((self.arrivals, id));
    }

    fn removed(&mut self, id: ExpertId) {
        self.arrived[id.layer()][id.expert()] = 0;
        let queue = self.queue(id.layer());
        let arrived = &self.arrived;
        let is_here =
            |&(arrival, id): &(u64, ExpertId)| arrived[id.layer()][id.expert()] == arrival;
        let queue = &mut self.queues[queue];
        // Most who leave are near the front; the rest is swept in time.
        while queue.front().is_some_and(|entry| !is_here(entry)) {
            queue.pop_front();
        }
        let residents = arrived.iter().map(Vec::len).sum::<usize>();
        if queue.len() > 2 * residents {
            queue.retain(is_here);
        }
    }

    fn victim(
        &mut self,
        candidates: &Candidates<'_>,
        incoming: ExpertId,
        _outlook: &dyn Outlook,
    ) -> Option<ExpertId> {
        let here = self.queues[self.queue(incoming.layer())]
            .iter()
            .filter(|(arrival, id)| self.arrived[id.layer()][id.expert()] == *arrival)
            .map(|&(_, id)| id);
        let mut first = None;
        for id in here {
            if self.used[id.layer()][id.expert()] == self.pass && first.is_some() {
                continue;
            }
            if candidates.allows(id) {
                if self.used[id.layer()][id.expert()] != self.pass {
                    return Some(id);
                }
                first = Some(id);
            }
        }
        // Of an event nobody leaves for another that came later.
        first.filter(|&id| !candidates.is_of_event(id))
    }
}
