//! Tells the ledger what prefetches brought and what they cost.

use super::Request;
use crate::ledger::Ledger;
use crate::vocabulary::{ExpertId, Shape};

/// A demand overtakes a prefetch at the border of a chunk: what is under way
/// of a useless prefetch delays it by one chunk at most.
const CHUNK_BYTES: u64 = 2 << 20;

/// What is not settled yet.
#[derive(Debug, Default)]
pub struct Accounts {
    /// Prefetches of this pass that nobody asked for or gave up yet. What an
    /// earlier pass left behind is in no open book.
    open: Vec<ExpertId>,
    /// Prefetches that were under way while a demand waited.
    in_the_way: Vec<ExpertId>,
    /// Of the open event: prefetches that were there in time.
    early: Vec<ExpertId>,
    /// Prefetches that it waits for.
    promoted: Vec<ExpertId>,
    /// All its experts, and those that nobody prefetched.
    experts: usize,
    missing: usize,
}

impl Accounts {
    /// A pass begins.
    pub fn close(&mut self) {
        self.open.clear();
        self.in_the_way.clear();
    }

    /// A prefetch of `id` was ordered.
    pub fn issued(&mut self, id: ExpertId, bytes: u64, ledger: &mut Ledger) {
        self.open.push(id);
        ledger.issued(id.layer(), bytes);
    }

    /// Takes `id` out of the open ones; `false`: it is none of them.
    fn settles(&mut self, id: ExpertId) -> bool {
        let at = self.open.iter().position(|&other| other == id);
        at.map(|at| self.open.swap_remove(at)).is_some()
    }

    /// The open event found this; `under_way` are prefetches that it does not
    /// need and that have not landed.
    pub fn requested(&mut self, request: &Request, under_way: impl Iterator<Item = ExpertId>) {
        let Request { resident, early, in_flight, missing, .. } = request;
        for &id in early {
            if self.settles(id) {
                self.early.push(id);
            }
        }
        self.experts = resident.len() + early.len() + in_flight.len() + missing.len();
        self.missing = missing.len();
        if !missing.is_empty() {
            for id in under_way {
                if !self.in_the_way.contains(&id) {
                    self.in_the_way.push(id);
                }
            }
        }
    }

    /// The event that opens waits for the prefetch of `id`.
    pub fn promoted(&mut self, id: ExpertId) {
        if self.settles(id) {
            self.promoted.push(id);
        }
    }

    /// The event that is open does without the prefetch of `id`, which comes
    /// too late for it.
    pub fn came_late(&mut self, id: ExpertId, shape: &Shape, ledger: &mut Ledger) {
        if let Some(at) = self.promoted.iter().position(|&other| other == id) {
            self.promoted.swap_remove(at);
            ledger.wasted(id.layer(), bytes(shape, id), 0);
        }
    }

    /// The prefetch of `id` was for nothing.
    pub fn gave_up(&mut self, id: ExpertId, shape: &Shape, ledger: &mut Ledger) {
        if !self.settles(id) {
            return;
        }
        let bytes = bytes(shape, id);
        let before = self.in_the_way.len();
        self.in_the_way.retain(|&other| other != id);
        let delayed = self.in_the_way.len() < before;
        ledger.wasted(id.layer(), bytes, if delayed { bytes.min(CHUNK_BYTES) } else { 0 });
    }

    /// The event is over after `stall_ns` of waiting and `worked_ns` of
    /// computing.
    ///
    /// As demands its prefetches would have been read while the other experts
    /// were computed: what that hides of a read was not saved. Demands that
    /// were read anyway had the first claim on it. How much of the stall each
    /// promoted prefetch caused is not known: all of it is charged to each.
    pub fn ended(&mut self, stall_ns: u64, worked_ns: u64, shape: &Shape, ledger: &mut Ledger) {
        let foreseen = self.early.len() + self.promoted.len();
        let Some(&any) = self.early.first().or(self.promoted.first()) else { return };
        let others = (self.experts - foreseen) as u64;
        let of_others = worked_ns / self.experts as u64 * others;
        let of_demands = self.missing as u64 * ledger.demand_ns(bytes(shape, any));
        let hidden_ns = of_others.saturating_sub(of_demands) / foreseen as u64;
        let late = self.promoted.drain(..).map(|id| (id, stall_ns + hidden_ns));
        for (id, not_saved_ns) in self.early.drain(..).map(|id| (id, hidden_ns)).chain(late) {
            self.in_the_way.retain(|&other| other != id);
            ledger.useful(id.layer(), bytes(shape, id), not_saved_ns);
        }
    }
}

fn bytes(shape: &Shape, id: ExpertId) -> u64 {
    shape.layer(id.layer()).map_or(0, |layer| layer.expert_bytes)
}
