//! What the drive, the frames under it and its caller tell each other.

use crate::planner::Landing;
use crate::vocabulary::ExpertId;

/// Who waits for a fill. In the order of service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// The token being computed.
    Demand,
    /// Nobody yet; a forecast asked for it.
    Prefetch,
}

/// What became of a fill.
#[derive(Debug)]
pub struct Landed<E> {
    pub id: ExpertId,
    /// [`Landing::Ready`]: `id` has a frame. Otherwise its frame is free.
    pub landing: Landing,
    /// Bytes that were read for it, also those that are of no use any more.
    pub bytes: u64,
    /// From when on the wire could move it, on the tier's clock: when it was
    /// submitted, or when the tier below had read it.
    pub submitted_ns: u64,
    /// When its last byte came.
    pub ended_ns: u64,
    /// Why it failed.
    pub error: Option<E>,
}

/// What a tier has moved since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    pub bytes: u64,
    /// Time with at least one read under way.
    pub busy_ns: u64,
}

impl Moved {
    /// What was added until `later`.
    pub fn until(self, later: Self) -> Self {
        Self { bytes: later.bytes - self.bytes, busy_ns: later.busy_ns - self.busy_ns }
    }
}

/// Frames, and what fills them: the runtime's with its mover, or replay's.
///
/// Every fill that was submitted lands once. Only [`Tier::next`] may wait.
pub trait Tier {
    type Error;

    /// Frames of `class` that a fill can have now.
    fn free(&self, class: usize) -> usize;

    /// Bytes that a read of `id` moves.
    fn bytes_of(&self, id: ExpertId) -> u64;

    /// Starts a fill of `id`, which is nowhere, into a free frame, which there
    /// is.
    fn submit(&mut self, id: ExpertId, urgency: Urgency);

    /// The read-ahead of `id` became a demand, if it is still on its way.
    fn promote(&mut self, id: ExpertId);

    /// Nobody wants the fill of `id` any more. It lands nevertheless.
    fn discard(&mut self, id: ExpertId);

    /// `id` leaves its frame.
    fn vacate(&mut self, id: ExpertId);

    /// The next fill that landed, in their order. Waits for one for at most
    /// `wait_ns`; 0: does not wait.
    fn next(&mut self, wait_ns: u64) -> Option<Landed<Self::Error>>;

    /// The tier's clock.
    fn now_ns(&self) -> u64;

    fn moved(&self) -> Moved;

    /// Bytes that would be moved before a demand submitted now; 0: not known.
    fn queued(&self) -> u64 {
        0
    }

    /// Bytes until the fill of `id` lands, were it a demand from now on;
    /// `None`: not known, or it is not on its way.
    fn remaining(&self, _id: ExpertId) -> Option<u64> {
        None
    }

    /// A pass begins; see [`Pass::keeps_ahead`].
    fn begin_pass(&mut self) {}

    /// In this pass nothing reads the frames of layers before `layer` any
    /// more. Told only with [`Pass::keeps_ahead`].
    fn passed(&mut self, _layer: usize) {}
}

/// A pass over one token or a chunk of a prompt.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    pub ids: &'a [u32],
    /// Tells sessions apart, whose texts have nothing to do with each other.
    pub session: u64,
    /// Nothing came before the first id.
    pub is_start: bool,
    /// A device runs all layers by itself and may read the frames of any layer
    /// that is still ahead: none of those is taken from its expert.
    pub keeps_ahead: bool,
}

/// What a layer asks for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    pub layer: usize,
    /// Distinct, in the order in which they are wanted.
    pub experts: &'a [u32],
}

/// Names what is computed without a frame, of what is missing and of what is
/// on its way.
pub type Leave<'a> = &'a mut dyn FnMut(Missing<'_>) -> Vec<ExpertId>;

/// What an event did not find in a frame.
#[derive(Clone, Copy)]
pub struct Missing<'a> {
    pub layer: usize,
    /// Nowhere, in the order in which they are wanted.
    pub missing: &'a [ExpertId],
    /// On their way, by a forecast.
    pub in_flight: &'a [ExpertId],
    /// How long each of these still takes, as demands; `None`: not known.
    pub in_flight_ns: &'a [Option<u64>],
    /// Frames that a fill can have at once.
    pub free: usize,
    /// Until the wire would start a demand.
    pub queue_ns: u64,
    /// Experts that the event asks for.
    pub asked: usize,
}

/// What one layer asked for and what that moved. An expert that several
/// tokens of a chunk share counts once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerCounts {
    /// In a slot (or in memory for good) when their router answered.
    pub hits: u64,
    /// Read ahead, and there.
    pub early: u64,
    /// A read-ahead was bringing them.
    pub in_flight: u64,
    /// Nowhere.
    pub misses: u64,
    /// Computed without a frame, of the misses and of those on their way.
    pub left: u64,
    /// That left a slot for one of this layer.
    pub evictions: u64,
    /// That arrived and did not stay.
    pub bypassed: u64,
    /// Read for `misses`.
    pub bytes_demand: u64,
    /// Read ahead, wanted or not.
    pub bytes_prefetch: u64,
    /// Of both, given up before any use.
    pub bytes_wasted: u64,
    /// Read ahead and then used.
    pub prefetch_useful: u64,
    /// Read ahead that left, or were given up, unused.
    pub prefetch_wasted: u64,
    /// Waiting for this layer's experts.
    pub stall_ns: u64,
}
