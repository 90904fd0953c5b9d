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
    /// Prefetches that were under way while a demand waited.
    in_the_way: Vec<ExpertId>,
    /// Prefetches that the open event waits for.
    promoted: Vec<ExpertId>,
}

impl Accounts {
    /// The open event found this; `under_way` are prefetches that it does not
    /// need and that have not landed.
    pub fn requested(
        &mut self,
        request: &Request,
        under_way: impl Iterator<Item = ExpertId>,
        shape: &Shape,
        ledger: &mut Ledger,
    ) {
        for &id in &request.early {
            self.in_the_way.retain(|&other| other != id);
            ledger.useful(id.layer(), bytes(shape, id), 0);
        }
        if !request.missing.is_empty() {
            for id in under_way {
                if !self.in_the_way.contains(&id) {
                    self.in_the_way.push(id);
                }
            }
        }
    }

    /// The event that opens waits for the prefetch of `id`.
    pub fn promoted(&mut self, id: ExpertId) {
        self.promoted.push(id);
    }

    /// The prefetch of `id` was for nothing.
    pub fn gave_up(&mut self, id: ExpertId, shape: &Shape, ledger: &mut Ledger) {
        let bytes = bytes(shape, id);
        let before = self.in_the_way.len();
        self.in_the_way.retain(|&other| other != id);
        let delayed = self.in_the_way.len() < before;
        ledger.wasted(id.layer(), bytes, if delayed { bytes.min(CHUNK_BYTES) } else { 0 });
    }

    /// The event is over after `stall_ns` of waiting. How much of it each
    /// promoted prefetch caused is not known: all of it is charged to each.
    pub fn ended(&mut self, stall_ns: u64, shape: &Shape, ledger: &mut Ledger) {
        for id in self.promoted.drain(..) {
            self.in_the_way.retain(|&other| other != id);
            ledger.useful(id.layer(), bytes(shape, id), stall_ns);
        }
    }
}

fn bytes(shape: &Shape, id: ExpertId) -> u64 {
    shape.layer(id.layer()).map_or(0, |layer| layer.expert_bytes)
}
