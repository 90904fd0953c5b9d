//! What is computed without a frame and an idle wire brings for later tokens.

use super::{Drive, Tier, Urgency};
use crate::{Admission, ExpertId};

impl<T: Tier> Drive<T> {
    /// Gives slots to what has come for later and no device can miss in this
    /// pass any more: of layers that it has passed.
    pub(super) fn admit_kept(&mut self) {
        while let Some(id) = self.planner.next_kept(self.passed) {
            let (keeps_ahead, passed) = (self.keeps_ahead, self.passed);
            let pinned = |other: ExpertId| keeps_ahead && other.layer() >= passed;
            let admission = self.planner.admit_kept(id, &pinned);
            match admission {
                Admission::Added => {}
                Admission::Replaced(victim) => self.tier.vacate(victim),
                Admission::Bypassed => self.drop_unused(id),
            }
            self.count_admission(id, admission);
            self.kept.push((id, admission));
        }
    }

    /// Copies that may be ordered now with nobody waiting for them: one at a
    /// time, while the wire has nothing to do that the event waits for, and
    /// half of the ring stays free for demands.
    pub fn room_to_keep(&self) -> usize {
        let layer = self.open.layer();
        let is_idle = self.open.awaited == 0 && self.tier.queued() == 0;
        let spare = self.tier.free(self.class(layer)) > self.ring_of(layer) / 2;
        usize::from(is_idle && spare && self.planner.keeps_coming() == 0)
    }

    /// Orders copies of `wanted` for later tokens, which the open event has
    /// computed without a frame; each with what its next use saves, in ns.
    pub fn keep(&mut self, wanted: impl IntoIterator<Item = (ExpertId, u64)>) {
        let room = self.room_to_keep();
        let mut ids = std::mem::take(&mut self.ahead);
        self.planner.keep(wanted, room, &mut ids);
        for &id in &ids {
            let submitted = self.submit(id, Urgency::Prefetch);
            debug_assert!(submitted, "a frame was free for {id}");
        }
        self.ahead = ids;
    }

    /// Time, since the open event began, in which the wire moved anything.
    pub fn link_busy_ns(&self) -> u64 {
        self.tier.moved().busy_ns.saturating_sub(self.open.busy_before_ns)
    }
}
