//! Experts that the CPU computed and that an idle link brings for later: from
//! the order until their first use, or until they leave without one.

use super::{Planner, Purpose, Request, State};
use crate::cache::Admission;
use crate::ledger::Ledger;
use crate::vocabulary::{ExpertId, Shape};

/// A demand overtakes at the border of a chunk: so much of a copy that nobody
/// waits for may be with the device before it.
const IN_THE_WAY_BYTES: u64 = 4 << 20;

/// One of them.
#[derive(Clone, Copy, Debug)]
struct One {
    id: ExpertId,
    /// What its first use saves.
    saves_ns: u64,
    /// Who left for it.
    victim: Option<ExpertId>,
    /// A demand that it was in the way of is booked.
    is_booked: bool,
    /// A read-ahead that was left to the CPU: the books of reading ahead have
    /// it, those of keeping do not.
    was_ahead: bool,
}

/// Those that were not used yet.
#[derive(Debug, Default)]
pub struct Kept {
    all: Vec<One>,
    /// Of the open event: those that it may wait for.
    late: Vec<One>,
}

impl Kept {
    fn take(&mut self, id: ExpertId) -> Option<One> {
        let at = self.all.iter().position(|one| one.id == id)?;
        Some(self.all.swap_remove(at))
    }

    /// `id` will not be used.
    pub fn wasted(&mut self, id: ExpertId, shape: &Shape, ledger: &mut Ledger) {
        if self.take(id).is_some_and(|one| !one.was_ahead) {
            ledger.kept_wasted(id.layer(), bytes(shape, id));
        }
    }

    /// An event found this.
    pub fn requested(&mut self, request: &Request, shape: &Shape, ledger: &mut Ledger) {
        let Request { resident, early, in_flight, missing, .. } = request;
        for &id in resident.iter().chain(early) {
            if let Some(one) = self.take(id).filter(|one| !one.was_ahead) {
                ledger.kept_used(id.layer(), bytes(shape, id), one.saves_ns);
            }
        }
        for &id in in_flight {
            let one = self.take(id);
            self.late.extend(one);
        }
        for one in &mut self.all {
            // It would have been there.
            if one.victim.is_some_and(|victim| missing.contains(&victim)) && !one.was_ahead {
                one.victim = None;
                ledger.kept_lost(one.id.layer(), one.saves_ns);
            }
        }
    }

    /// The event is over. What it waited for came too late to save anything.
    pub fn ended(&mut self, shape: &Shape, ledger: &mut Ledger) {
        for one in self.late.drain(..).filter(|one| !one.was_ahead) {
            ledger.kept_used(one.id.layer(), bytes(shape, one.id), 0);
        }
    }

    /// A demand is given to the link, behind what of these is with the device.
    pub fn demanded(
        &mut self,
        flies: impl Fn(ExpertId) -> bool,
        shape: &Shape,
        ledger: &mut Ledger,
    ) {
        let costs = |one: &&mut One| !one.is_booked && !one.was_ahead && flies(one.id);
        for one in self.all.iter_mut().filter(costs) {
            one.is_booked = true;
            let delay_ns = ledger.demand_ns(bytes(shape, one.id).min(IN_THE_WAY_BYTES));
            ledger.kept_lost(one.id.layer(), delay_ns);
        }
    }
}

fn bytes(shape: &Shape, id: ExpertId) -> u64 {
    shape.layer(id.layer()).map_or(0, |layer| layer.expert_bytes)
}

impl Planner {
    /// `wanted`, best first, are computed without a frame by the open event,
    /// and worth a copy that nobody waits for; each with what its next use
    /// saves, in ns. Those that get a frame, `room` many in all, and whose
    /// layer's books allow it, are marked as in flight; `out` gets them.
    pub fn keep(
        &mut self,
        wanted: impl IntoIterator<Item = (ExpertId, u64)>,
        mut room: usize,
        out: &mut Vec<ExpertId>,
    ) {
        out.clear();
        for (id, saves_ns) in wanted {
            let Some(layer) = self.shape.layer(id.layer()) else { continue };
            let is_computed = self.open.layer == Some(id.layer())
                && id.expert() < layer.experts
                && self.state(id) == State::Needed;
            let pays = !self.limits.priced || self.ledger.allows_keeping(id.layer());
            if is_computed && pays && room > 0 {
                room -= 1;
                self.ledger.kept_issued(id.layer(), layer.expert_bytes);
                let one = One { id, saves_ns, victim: None, is_booked: false, was_ahead: false };
                self.kept.all.push(one);
                self.set(id, State::Filling(Purpose::Keep));
                out.push(id);
            }
        }
    }

    /// Experts that come for later and are in no slot yet.
    pub fn keeps_coming(&self) -> usize {
        let comes = |one: &&One| !self.cache.contains(one.id);
        self.kept.all.iter().filter(comes).count()
    }

    /// `id`, whose copy is under way and was wanted by the open event, is
    /// computed instead: the copy would come late. It stays for later.
    pub fn leave(&mut self, id: ExpertId) {
        if self.state(id) != State::Filling(Purpose::Demand) {
            return;
        }
        let late = &mut self.kept.late;
        let one = match late.iter().position(|one| one.id == id) {
            Some(at) => late.swap_remove(at),
            None => {
                self.accounts.came_late(id, &self.shape, &mut self.ledger);
                One { id, saves_ns: 0, victim: None, is_booked: false, was_ahead: true }
            }
        };
        self.kept.all.push(one);
        self.set(id, State::Filling(Purpose::Keep));
    }

    /// The next expert of a layer before `passed` that has come for later and
    /// waits for a slot.
    pub fn next_kept(&self, passed: usize) -> Option<ExpertId> {
        let waits = |one: &&One| one.id.layer() < passed && self.state(one.id) == State::Early;
        self.kept.all.iter().find(waits).map(|one| one.id)
    }

    /// As [`Planner::admit`], of what [`Planner::next_kept`] says.
    pub fn admit_kept(&mut self, id: ExpertId, pinned: &dyn Fn(ExpertId) -> bool) -> Admission {
        assert_eq!(self.state(id), State::Early, "{id} is admitted");
        let admission = self.take_in(id, pinned);
        self.set(id, State::Absent);
        match admission {
            Admission::Added => {}
            Admission::Replaced(victim) => {
                self.kept.wasted(victim, &self.shape, &mut self.ledger);
                let one = self.kept.all.iter_mut().find(|one| one.id == id);
                one.into_iter().for_each(|one| one.victim = Some(victim));
            }
            Admission::Bypassed => self.kept.wasted(id, &self.shape, &mut self.ledger),
        }
        admission
    }
}
