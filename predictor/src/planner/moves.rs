//! What the planner and its caller tell each other.

use crate::vocabulary::ExpertId;

/// What became of a fill.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Landing {
    /// All bytes are there.
    Ready,
    /// They could not be read.
    Failed,
    /// It was given up as ordered.
    Discarded,
}

/// What to do with a fill that has landed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Arrival {
    /// The open event waits for it: compute it, then admit it.
    Use,
    /// It waits for its layer where it is.
    Keep,
    /// It is ready and nobody wants it: its frame is free.
    Release,
    /// It did not come and the open event needs it: fill it again.
    Again,
    /// The open event needs it and it cannot be read: the event fails, unless
    /// the caller fills it again.
    Fail,
    /// It did not come and nobody wants it.
    Nothing,
}

/// Frames that are needed no longer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retire {
    /// Ready and unwanted: their frames are free.
    pub release: Vec<ExpertId>,
    /// In flight and unwanted: discard the fills. They still land.
    pub discard: Vec<ExpertId>,
}

impl Retire {
    pub(super) fn clear(&mut self) {
        self.release.clear();
        self.discard.clear();
    }
}

/// What a layer needs, by where it is; each in the order of the request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// In slots: compute them at once.
    pub resident: Vec<ExpertId>,
    /// Prefetched and ready outside the slots: compute them at once, then
    /// admit them.
    pub early: Vec<ExpertId>,
    /// Prefetches on their way, which are demands now: promote their fills.
    pub in_flight: Vec<ExpertId>,
    /// Nowhere: fill them, and say [`Planner::filling`] of each.
    pub missing: Vec<ExpertId>,
    /// In memory for good: see [`Planner::fix`].
    pub fixed: Vec<ExpertId>,
    /// What was prefetched for this layer and is not needed.
    pub retire: Retire,
}

/// A frame that a demand may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Room {
    /// This prefetched expert's frame is free now.
    Released(ExpertId),
    /// Discard this prefetch; its frame is free when it lands.
    Discard(ExpertId),
}

impl Request {
    pub(super) fn clear(&mut self) {
        self.resident.clear();
        self.early.clear();
        self.in_flight.clear();
        self.missing.clear();
        self.fixed.clear();
        self.retire.clear();
    }
}
