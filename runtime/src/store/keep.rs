//! What the caller computes without a frame and an idle link brings for later.

use super::mover::Urgency;
use super::{Event, ExpertStore, Inner};
use pregate_predictor::{Admission, ExpertId};

impl Inner {
    /// Gives slots to what has come for later and no device can miss in this
    /// pass any more: of layers that it has passed.
    pub(super) fn admit_kept(&mut self, store: &ExpertStore) {
        while let Some(id) = self.planner.next_kept(self.passed) {
            let (keeps_ahead, passed) = (self.keeps_ahead, self.passed);
            let pinned = |other: ExpertId| keeps_ahead && other.layer() >= passed;
            let admission = self.planner.admit_kept(id, &pinned);
            match admission {
                Admission::Added => {}
                Admission::Replaced(victim) => self.vacate(store, victim),
                Admission::Bypassed => self.drop_unused(store, id),
            }
            self.admitted.push((id, admission));
        }
    }
}

impl Event<'_> {
    /// Copies that may be ordered now with nobody waiting for them: one at a
    /// time, while the link has nothing to do that the event waits for, and
    /// half of the ring stays free for demands.
    pub fn room_to_keep(&self) -> usize {
        let inner = &self.inner;
        let is_idle = self.awaited == 0 && inner.mover.queued() == 0;
        let free = inner.free_frames(self.store, self.layer);
        let spare = free > inner.ring_of(self.store, self.layer) / 2;
        usize::from(is_idle && spare && inner.planner.keeps_coming() == 0)
    }

    /// Orders copies of `wanted` for later tokens, which are computed without a
    /// frame now; each with what its next use saves, in ns.
    pub fn keep(&mut self, wanted: impl IntoIterator<Item = (ExpertId, u64)>) {
        let room = self.room_to_keep();
        let Inner { planner, ahead, .. } = &mut *self.inner;
        planner.keep(wanted, room, ahead);
        let ids = std::mem::take(ahead);
        for &id in &ids {
            let submitted = self.inner.submit(self.store, id, Urgency::Prefetch);
            debug_assert!(submitted, "a frame was free for {id}");
        }
        self.inner.ahead = ids;
    }

    /// The chance that a token misses something in `layer`, which is ahead;
    /// `None`: no forecast says so.
    pub fn miss_chance(&self, layer: usize) -> Option<f64> {
        self.inner.planner.miss_chance(layer)
    }

    /// Time, since the event began, in which the link moved anything.
    pub fn link_busy_ns(&self) -> u64 {
        self.inner.mover.counters().busy_ns.saturating_sub(self.busy_before_ns)
    }
}
