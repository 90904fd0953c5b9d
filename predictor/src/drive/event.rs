//! One layer's experts, from the router's answer to the last of them computed.
//!
//! The order of work: what is in a frame is handed out first; what is missing
//! is asked of the tier at once, before anything is computed, and handed out
//! as it arrives. When an expert has been computed, the planner says who
//! leaves for it, and the frame that is then free takes the next one.

use super::{Drive, Leave, Missing, Tier, Urgency, Wanted};
use crate::planner::{Arrival, Request, Retire};
use crate::{Admission, ExpertId, Origin, Planner};
use std::collections::VecDeque;

/// An event's lists of experts and times; kept for the next event.
#[derive(Default)]
pub struct Open {
    layer: usize,
    is_open: bool,
    /// What is handed out is launched on a device, which takes the caller no
    /// time.
    is_launched: bool,
    /// Where each was when the event began.
    request: Request,
    /// In a frame and not handed out yet.
    ready: Vec<ExpertId>,
    /// To be asked of the tier when a frame is free, in this order.
    queue: VecDeque<ExpertId>,
    /// Computed without a frame.
    left: Vec<ExpertId>,
    in_flight_ns: Vec<Option<u64>>,
    /// Handed out last, to be settled when they were computed.
    handed: Vec<ExpertId>,
    /// Computed outside the slots, and who left for them.
    admitted: Vec<(ExpertId, Admission)>,
    origins: Vec<(u32, Origin)>,
    retire: Retire,
    /// Experts that the tier is bringing.
    pub(super) awaited: usize,
    /// Fills that the event asked for and that landed, their time with the
    /// wire, and when the last of them landed.
    copied: usize,
    copied_ns: u64,
    /// When the wire would begin with a demand, as expected at the event's
    /// beginning, and what the first of those fills waited for it.
    free_ns: u64,
    delay_ns: u64,
    landed_ns: u64,
    /// The same of those that were on their way before.
    waited_for: usize,
    came_ns: u64,
    began_ns: u64,
    waited_ns: u64,
    bytes: u64,
    pub(super) busy_before_ns: u64,
}

impl Open {
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Experts that are computed without a frame.
    pub fn left(&self) -> &[ExpertId] {
        &self.left
    }

    /// Is something in a frame that was not handed out?
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Where the experts were when the event began.
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// Handed out and not settled yet.
    pub fn handed(&self) -> &[ExpertId] {
        &self.handed
    }

    /// What became of those of the event that were in no slot and were
    /// settled.
    pub fn admitted(&self) -> &[(ExpertId, Admission)] {
        &self.admitted
    }

    /// Fills that the event asked for and that landed, and how long the wire
    /// had at least one of them: not while they waited for a tier below.
    pub fn copied(&self) -> (usize, u64) {
        (self.copied, self.copied_ns)
    }

    /// What the first of them waited before, for the wire to be free.
    pub fn delay_ns(&self) -> u64 {
        self.delay_ns
    }

    /// Fills that were on their way before and landed, and the time from the
    /// event's beginning to the last of them.
    pub fn waited_for(&self) -> (usize, u64) {
        (self.waited_for, self.came_ns.saturating_sub(self.began_ns))
    }

    /// On the tier's clock.
    pub fn began_ns(&self) -> u64 {
        self.began_ns
    }

    /// Time waited for the tier so far.
    pub fn waited_ns(&self) -> u64 {
        self.waited_ns
    }

    /// That arrived while the event was open, also for other layers.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// That left a slot for one of those in [`Open::admitted`].
    pub fn evictions(&self) -> usize {
        let left = |(_, admission): &&_| matches!(admission, Admission::Replaced(_));
        self.admitted.iter().filter(left).count()
    }

    /// Where each expert was when the event began.
    pub fn origins(&mut self) -> &[(u32, Origin)] {
        let Request { resident, early, in_flight, missing, fixed, .. } = &self.request;
        self.origins.clear();
        for (ids, origin) in [
            (fixed, Origin::Hit),
            (resident, Origin::Hit),
            (early, Origin::Early),
            (in_flight, Origin::InFlight),
            (missing, Origin::Miss),
        ] {
            self.origins.extend(ids.iter().map(|id| (id.expert, origin)));
        }
        &self.origins
    }

    /// A fill landed that the event waited for.
    fn came(&mut self, id: ExpertId, submitted_ns: u64, ended_ns: u64) {
        if self.request.missing.contains(&id) {
            // What it waited for before was not its own time: what came first,
            // and what the wire was at, which is not known as exactly.
            let half_ns = submitted_ns.midpoint(ended_ns);
            let free_ns = self.landed_ns.max(self.came_ns).max(self.free_ns.min(half_ns));
            if self.copied == 0 {
                self.delay_ns = free_ns.saturating_sub(self.began_ns);
            }
            self.copied_ns += ended_ns.saturating_sub(free_ns.max(submitted_ns));
            self.landed_ns = self.landed_ns.max(ended_ns);
            self.copied += 1;
        } else {
            self.came_ns = self.came_ns.max(ended_ns);
            self.waited_for += 1;
        }
    }

    /// Ready for the next event.
    fn clear(&mut self) {
        self.ready.clear();
        self.queue.clear();
        self.handed.clear();
        self.left.clear();
        self.admitted.clear();
        self.in_flight_ns.clear();
        (self.copied, self.copied_ns, self.delay_ns, self.waited_for) = (0, 0, 0, 0);
        (self.awaited, self.waited_ns, self.bytes) = (0, 0, 0);
    }
}

impl<T: Tier> Drive<T> {
    /// The event that is open, or the last one.
    pub fn open(&self) -> &Open {
        &self.open
    }

    pub fn open_mut(&mut self) -> &mut Open {
        &mut self.open
    }

    /// Opens a layer's event. `tell` says to the planner what the router chose
    /// for each token ([`Planner::routed`]). With `leave` the experts are
    /// launched on a device, and of those that are not in a frame it names
    /// those that are computed without one.
    pub fn begin(
        &mut self,
        wanted: Wanted<'_>,
        tell: &mut dyn FnMut(&mut Planner),
        leave: Option<Leave<'_>>,
    ) {
        let Wanted { layer, experts } = wanted;
        debug_assert!(!self.open.is_open, "layer {layer} inside another event");
        if self.keeps_ahead {
            self.pass_by(layer);
        }
        self.collect();
        tell(&mut self.planner);
        let mut open = std::mem::take(&mut self.open);
        open.clear();
        self.planner.request(layer, experts, &mut open.request);
        if self.keeps_ahead {
            // What the layer needs stays until the event ends.
            self.pass_by(layer + 1);
        }
        let Request { resident, early, in_flight, missing, retire, .. } = &open.request;
        self.give_up(retire);
        self.count(layer, &open.request);
        open.ready.extend(resident.iter().chain(early));
        open.is_launched = leave.is_some();
        let mut queue_ns = 0;
        if let Some(leave) = leave.filter(|_| !missing.is_empty() || !in_flight.is_empty()) {
            let free = self.tier.free(self.class(layer));
            let ns = |bytes: u64| self.planner.ledger().demand_ns(bytes);
            let remaining = |&id: &ExpertId| self.tier.remaining(id).map(ns);
            open.in_flight_ns.extend(in_flight.iter().map(remaining));
            queue_ns = ns(self.tier.queued());
            let in_flight_ns = &open.in_flight_ns[..];
            let asked = experts.len();
            open.left =
                leave(Missing { layer, missing, in_flight, in_flight_ns, free, queue_ns, asked });
        }
        for &id in in_flight {
            match open.left.contains(&id) {
                // It would come late; then it is there for later.
                true => self.planner.leave(id),
                false => {
                    self.layer_counts(layer).prefetch_useful += 1;
                    self.tier.promote(id);
                    open.awaited += 1;
                }
            }
        }
        let left = &open.left;
        open.queue.extend(missing.iter().filter(|id| !left.contains(id)));
        self.layer_counts(layer).left += left.len() as u64;
        (open.layer, open.is_open) = (layer, true);
        open.busy_before_ns = self.tier.moved().busy_ns;
        open.began_ns = self.tier.now_ns();
        (open.landed_ns, open.came_ns) = (open.began_ns, open.began_ns);
        open.free_ns = open.began_ns + queue_ns;
        self.open = open;
        self.ask();
    }

    /// Gives waiting demands to the tier while frames are free.
    fn ask(&mut self) {
        while let Some(&next) = self.open.queue.front() {
            if !self.submit(next, Urgency::Demand) {
                break;
            }
            self.planner.filling(next);
            self.open.queue.pop_front();
            self.open.awaited += 1;
        }
    }

    /// Asks the tier for what the forecasts say comes next, if no demand
    /// waits for a frame.
    pub fn prefetch(&mut self) {
        self.ask();
        if self.open.queue.is_empty() {
            self.prefetch_free();
        }
    }

    /// What is in a frame now and was not handed out: everything, or of a
    /// chunk a part; waits for the tier if nothing is, `wait_ns` at most
    /// between two calls of `may_wait`. Empty when all experts were handed
    /// out. What was handed out and computed is to be settled.
    ///
    /// # Errors
    /// A demand that failed; what `may_wait` answers.
    pub fn more(
        &mut self,
        wait_ns: u64,
        may_wait: &mut dyn FnMut() -> Result<(), T::Error>,
    ) -> Result<&[ExpertId], T::Error> {
        self.prefetch();
        self.receive(0)?;
        // A read that was given up has landed: it is asked for again before
        // anything waits.
        self.ask();
        while self.open.ready.is_empty() && (self.open.awaited > 0 || !self.open.queue.is_empty()) {
            may_wait()?;
            self.receive(wait_ns)?;
            self.ask();
        }
        let before = self.open.handed.len();
        self.hand_out();
        Ok(&self.open.handed[before..])
    }

    /// Which of the experts that are there are computed next? A token's all at
    /// once.
    ///
    /// Of a chunk's, those in the ring first, since reads wait for their
    /// frames, and of these half a ring: the other half is read into
    /// meanwhile. Then those in slots: where the caller computes them, in parts
    /// as long as anything is on its way, so that the tier does not wait long
    /// for its next frame. The last ones leave the ring to the next layer's.
    fn hand_out(&mut self) {
        let half = (self.ring_of(self.open.layer) / 2).max(1);
        let Open { ready, handed, left, queue, awaited, is_launched, .. } = &mut self.open;
        // What is computed without a frame is computed by the caller, beside
        // what it is given first.
        if self.tokens <= 1 || !left.is_empty() {
            handed.append(ready);
            return;
        }
        let cache = self.planner.cache();
        ready.sort_by_key(|&id| cache.contains(id));
        let in_ring = ready.partition_point(|&id| !cache.contains(id));
        let is_waiting = *awaited > 0 || !queue.is_empty();
        let count = match in_ring {
            0 if is_waiting && !*is_launched => half.min(ready.len()),
            0 => ready.len(),
            in_ring => half.min(in_ring),
        };
        handed.extend(ready.drain(..count));
    }

    /// What was handed out was computed: the planner decides who leaves for
    /// it.
    pub fn settle(&mut self) {
        let mut handed = std::mem::take(&mut self.open.handed);
        for id in handed.drain(..) {
            let admission = self.settle_one(id);
            self.open.admitted.extend(admission.map(|admission| (id, admission)));
        }
        self.open.handed = handed;
    }

    /// As [`Drive::settle`]; the answer is what became of those that were in
    /// no slot: of the event, and of what came for later tokens.
    pub fn settled(&mut self) -> &[(ExpertId, Admission)] {
        self.settle();
        self.admit_kept();
        self.open.admitted.append(&mut self.kept);
        &self.open.admitted
    }

    /// Takes what the tier has brought, so that it goes on; hands nothing out.
    ///
    /// # Errors
    /// A demand that failed.
    pub fn go_on(&mut self) -> Result<(), T::Error> {
        self.receive(0)?;
        self.ask();
        Ok(())
    }

    /// Takes what the tier has brought; waits up to `wait_ns` for the first.
    fn receive(&mut self, wait_ns: u64) -> Result<(), T::Error> {
        let before = self.tier.now_ns();
        let mut next = self.tier.next(wait_ns);
        if wait_ns > 0 {
            self.open.waited_ns += self.tier.now_ns() - before;
        }
        while let Some(landed) = next {
            self.open.bytes += landed.bytes;
            let id = landed.id;
            match self.land(&landed) {
                Arrival::Use => {
                    self.open.awaited -= 1;
                    self.open.came(id, landed.submitted_ns, landed.ended_ns);
                    self.open.ready.push(id);
                }
                // A read-ahead that was given up before it became a demand.
                Arrival::Again => {
                    self.open.awaited -= 1;
                    self.open.queue.push_front(id);
                }
                Arrival::Fail => {
                    self.open.awaited -= 1;
                    if let Some(error) = landed.error {
                        return Err(error);
                    }
                }
                Arrival::Keep | Arrival::Release | Arrival::Nothing => {}
            }
            next = self.tier.next(0);
        }
        Ok(())
    }

    /// Ends the event, also one that was not finished: what it asked for and
    /// did not use is given up. A second call does nothing.
    pub fn end(&mut self) {
        if !std::mem::take(&mut self.open.is_open) {
            return;
        }
        let (layer, waited_ns) = (self.open.layer, self.open.waited_ns);
        let worked_ns = (self.tier.now_ns() - self.open.began_ns).saturating_sub(waited_ns);
        let mut retire = std::mem::take(&mut self.open.retire);
        self.planner.end(layer, waited_ns, worked_ns, &mut retire);
        self.abandon(&retire);
        self.open.retire = retire;
        let counts = self.layer_counts(layer);
        counts.stall_ns += waited_ns;
        self.prefetch_free();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(expert: u32) -> ExpertId {
        ExpertId::new(0, expert)
    }

    fn opened(began_ns: u64, free_ns: u64) -> Open {
        let mut open = Open { began_ns, free_ns, ..Open::default() };
        (open.landed_ns, open.came_ns) = (began_ns, began_ns);
        open.request.missing.extend([id(0), id(1)]);
        open
    }

    #[test]
    fn a_copys_time_is_without_what_came_before_it() {
        // A read-ahead that was on its way lands first.
        let mut open = opened(100, 150);
        open.came(id(5), 90, 400);
        open.came(id(0), 100, 700);
        open.came(id(1), 100, 1000);
        assert_eq!((open.waited_for(), open.copied()), ((1, 300), (2, 600)));
        assert_eq!(open.delay_ns(), 300);
        // The wire was at something that nobody waits for.
        let mut open = opened(100, 180);
        open.came(id(0), 100, 340);
        assert_eq!((open.copied(), open.delay_ns()), ((1, 160), 80));
        // It was shorter than expected.
        let mut open = opened(100, 900);
        open.came(id(0), 100, 340);
        assert_eq!((open.copied(), open.delay_ns()), ((1, 120), 120));
    }
}
