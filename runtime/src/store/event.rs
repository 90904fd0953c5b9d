//! One layer's experts, from the router's answer to the last of them computed.
//!
//! The order of work: what is in a frame is handed out first; what is missing
//! is asked of the mover at once, before anything is computed, and handed out
//! as it arrives. Bytes go straight into a spare frame. When an expert has
//! been computed, the planner says who leaves for it, and the frame that is
//! then free takes the next one.

use super::frames::{FrameId, Pin};
use super::mover::Urgency;
use super::{ExpertStore, Inner, key_of};
use crate::error::{Error, Result};
use crate::session::Cancel;
use pregate_kernels::Routes;
use pregate_predictor::forecast::External;
use pregate_predictor::{Admission, Arrival, ExpertId, Observer, Origin, Request, Retire, Served};
use std::collections::VecDeque;
use std::sync::MutexGuard;

/// How long a wait for the disk lasts before cancelling is looked at.
const WAIT_NS: u64 = 20_000_000;

/// An expert that is in a frame and stays there while this exists.
pub struct Arrived {
    pub expert: u32,
    pin: Pin,
}

impl Arrived {
    /// The frame's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.pin
    }

    pub fn frame(&self) -> FrameId {
        self.pin.frame()
    }
}

/// Names what is computed without a frame.
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
    /// Until the link would start a demand.
    pub queue_ns: u64,
    /// Experts that the event asks for.
    pub asked: usize,
}

/// One layer's experts on their way to the computation. Holds the store: other
/// sessions wait until it ends.
pub struct Event<'s> {
    pub(super) store: &'s ExpertStore,
    pub(super) inner: MutexGuard<'s, Inner>,
    pub(super) layer: usize,
    /// What is handed out is launched on a device, which takes the caller no
    /// time.
    is_launched: bool,
    lists: Lists,
    /// Experts that the mover is bringing.
    pub(super) awaited: usize,
    began_ns: u64,
    waited_ns: u64,
    /// Time with the link of the fills that the event asked for, and when the
    /// last of them landed.
    link_ns: u64,
    landed_ns: u64,
    /// The same of those that were on their way before.
    came_ns: u64,
    bytes: u64,
    pub(super) busy_before_ns: u64,
    ended: bool,
}

/// An event's lists of experts; the store keeps them for the next event.
#[derive(Default)]
pub(super) struct Lists {
    /// Where each was when the event began.
    request: Request,
    /// In a frame and not handed out yet.
    ready: Vec<ExpertId>,
    /// To be asked of the mover when a frame is free, in this order.
    queue: VecDeque<ExpertId>,
    /// Computed without a frame.
    left: Vec<ExpertId>,
    in_flight_ns: Vec<Option<u64>>,
    /// Handed out last, to be settled when their pins are back.
    handed: Vec<ExpertId>,
    /// Computed outside the slots, and who left for them.
    admitted: Vec<(ExpertId, Admission)>,
    /// Fills that the event asked for and that landed, and those that were on
    /// their way before.
    copied: usize,
    waited_for: usize,
    origins: Vec<(u32, Origin)>,
}

impl<'s> Event<'s> {
    /// Asks for `experts`, distinct and of one MoE layer, in the order in
    /// which they are wanted. With `leave` they are launched on a device, and of
    /// the missing ones it names those that are computed without a frame.
    pub(super) fn begin(
        store: &'s ExpertStore,
        layer: usize,
        experts: &[u32],
        routes: &Routes,
        leave: Option<Leave<'_>>,
    ) -> Self {
        let mut inner = store.lock();
        if inner.keeps_ahead {
            inner.passed = layer;
        }
        inner.collect(store);
        inner.tell_routes(layer, routes);
        let mut lists = std::mem::take(&mut inner.lists);
        inner.planner.request(layer, experts, &mut lists.request);
        if inner.keeps_ahead {
            // What the layer needs stays until the event ends.
            inner.passed = layer + 1;
        }
        let Request { resident, early, in_flight, missing, retire, .. } = &lists.request;
        inner.give_up(store, retire);
        inner.count(layer, &lists.request);
        lists.ready.extend(resident.iter().chain(early));
        let is_launched = leave.is_some();
        lists.in_flight_ns.clear();
        if let Some(leave) = leave.filter(|_| !missing.is_empty() || !in_flight.is_empty()) {
            let free = inner.free_frames(store, layer);
            let ns = |bytes: u64| inner.planner.ledger().demand_ns(bytes);
            let remaining = |&id: &ExpertId| inner.mover.remaining(key_of(id)).map(ns);
            lists.in_flight_ns.extend(in_flight.iter().map(remaining));
            let (queue_ns, in_flight_ns) = (ns(inner.mover.queued()), &lists.in_flight_ns[..]);
            let asked = experts.len();
            lists.left =
                leave(Missing { layer, missing, in_flight, in_flight_ns, free, queue_ns, asked });
        }
        let mut awaited = 0;
        for &id in in_flight {
            match lists.left.contains(&id) {
                // It would come late; then it is there for later.
                true => inner.planner.leave(id, 0),
                false => {
                    inner.mover.promote(key_of(id));
                    awaited += 1;
                }
            }
        }
        let left = &lists.left;
        lists.queue.extend(missing.iter().filter(|id| !left.contains(id)));
        inner.layer_stats(layer).left += left.len() as u64;
        let busy_before_ns = inner.mover.counters().busy_ns;
        let began_ns = inner.mover.now_ns();
        let mut event = Self {
            store,
            inner,
            layer,
            is_launched,
            lists,
            awaited,
            began_ns,
            waited_ns: 0,
            link_ns: 0,
            landed_ns: began_ns,
            came_ns: began_ns,
            bytes: 0,
            busy_before_ns,
            ended: false,
        };
        event.ask();
        event
    }

    /// Of the model.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Experts that are computed without a frame.
    pub fn left(&self) -> &[ExpertId] {
        &self.lists.left
    }

    /// Whether [`Event::next`] has something to hand out at once.
    pub fn has_ready(&self) -> bool {
        !self.lists.ready.is_empty()
    }

    /// Is a forecast for `layer` worth its time now?
    pub fn wants(&self, layer: usize) -> bool {
        self.inner.planner.wants(layer)
    }

    /// Scores that a forecast gave for a layer ahead.
    pub fn foresee(&mut self, external: &External<'_>) {
        self.inner.planner.external(external);
    }

    /// Forecasting for `layers` took the token's thread `ns`.
    pub fn spent(&mut self, layers: &[usize], ns: u64) {
        let share = ns / layers.len().max(1) as u64;
        layers.iter().for_each(|&layer| self.inner.planner.spent(layer, share));
    }

    /// Asks the mover for what the forecasts say comes next, if no demand
    /// waits for a frame.
    pub fn prefetch(&mut self) {
        self.ask();
        if self.lists.queue.is_empty() {
            self.inner.prefetch(self.store);
        }
    }

    /// Settles what was handed out last, and hands out what is in a frame now:
    /// everything, or of a chunk a part; waits for the disk if nothing is.
    /// Empty when all experts were handed out. The caller drops the answer
    /// before it asks again.
    pub fn next(&mut self, cancel: &Cancel) -> Result<Vec<Arrived>> {
        self.settle();
        let mut there = Vec::new();
        self.more(cancel, &mut there)?;
        Ok(there)
    }

    /// As [`Event::next`], but what was handed out before is still in use: the
    /// rest goes behind it, to `there`. How many those are.
    pub fn more(&mut self, cancel: &Cancel, there: &mut Vec<Arrived>) -> Result<usize> {
        self.prefetch();
        self.receive(0)?;
        // A read that was given up has landed: it is asked for again before
        // anything waits.
        self.ask();
        while self.lists.ready.is_empty() && (self.awaited > 0 || !self.lists.queue.is_empty()) {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            self.receive(WAIT_NS)?;
            self.ask();
        }
        let before = self.lists.handed.len();
        self.hand_out();
        let handed = &self.lists.handed[before..];
        there.extend(handed.iter().map(|&id| self.pin(id)));
        Ok(handed.len())
    }

    /// Which of the experts that are there are computed next? A token's all at
    /// once.
    ///
    /// Of a chunk's, those in the ring first, since reads wait for their
    /// frames, and of these half a ring: the other half is read into
    /// meanwhile. Then those in slots: where the caller computes them, in parts
    /// as long as anything is on its way, so that the mover does not wait long
    /// for its next frame. The last ones leave the ring to the next layer's.
    fn hand_out(&mut self) {
        let Lists { ready, handed, left, queue, .. } = &mut self.lists;
        // What is computed without a frame is computed by the caller, beside
        // what it is given first.
        if self.inner.tokens <= 1 || !left.is_empty() {
            handed.append(ready);
            return;
        }
        let cache = self.inner.planner.cache();
        ready.sort_by_key(|&id| cache.contains(id));
        let in_ring = ready.partition_point(|&id| !cache.contains(id));
        let is_waiting = self.awaited > 0 || !queue.is_empty();
        let half = (self.inner.ring_of(self.store, self.layer) / 2).max(1);
        let count = match in_ring {
            0 if is_waiting && !self.is_launched => half.min(ready.len()),
            0 => ready.len(),
            in_ring => half.min(in_ring),
        };
        handed.extend(ready.drain(..count));
    }

    fn pin(&self, id: ExpertId) -> Arrived {
        let pin = self
            .inner
            .places
            .get(id)
            .and_then(|place| self.store.frames.pin(place.frame, place.generation));
        match pin {
            Some(pin) => Arrived { expert: id.expert, pin },
            // Nobody takes a frame from an expert of the event that runs.
            None => unreachable!("{id} has lost its frame"),
        }
    }

    /// The planner decides who leaves for the experts that were computed.
    fn settle(&mut self) {
        for id in self.lists.handed.drain(..) {
            let admission = self.inner.settle(self.store, id);
            self.lists.admitted.extend(admission.map(|admission| (id, admission)));
        }
    }

    /// Takes what the mover has brought, so that it goes on; hands nothing out.
    pub fn go_on(&mut self) -> Result<()> {
        self.receive(0)?;
        self.ask();
        Ok(())
    }

    /// Settles what was handed out; the answer is what became of those that
    /// were in no slot: of the event, and of what came for later tokens.
    pub fn settled(&mut self) -> &[(ExpertId, Admission)] {
        self.settle();
        self.inner.admit_kept(self.store);
        self.lists.admitted.append(&mut self.inner.admitted);
        &self.lists.admitted
    }

    /// Fills that the event asked for and that landed, and how long the link
    /// had at least one of them: not while they waited for a tier below.
    pub fn copied(&self) -> (usize, u64) {
        (self.lists.copied, self.link_ns)
    }

    /// The same of fills that were on their way before.
    pub fn waited_for(&self) -> (usize, u64) {
        (self.lists.waited_for, self.came_ns.saturating_sub(self.began_ns))
    }

    /// When the event began, as [`Event::now_ns`] counts.
    pub fn began_ns(&self) -> u64 {
        self.began_ns
    }

    /// Gives waiting demands to the mover while frames are free.
    fn ask(&mut self) {
        while let Some(&next) = self.lists.queue.front() {
            if !self.inner.submit(self.store, next, Urgency::Demand) {
                break;
            }
            self.inner.planner.filling(next);
            self.lists.queue.pop_front();
            self.awaited += 1;
        }
    }

    /// Takes what the mover has brought; waits up to `wait_ns` for the first.
    fn receive(&mut self, wait_ns: u64) -> Result<()> {
        let before = self.inner.mover.now_ns();
        let mut next = self.inner.mover.next(wait_ns);
        if wait_ns > 0 {
            self.waited_ns += self.inner.mover.now_ns() - before;
        }
        while let Some(done) = next {
            self.bytes += done.bytes;
            let (submitted_ns, ended_ns) = (done.submitted_ns, done.ended_ns);
            let (id, arrival, result) = self.inner.land(self.store, done);
            match arrival {
                Arrival::Use => {
                    self.awaited -= 1;
                    if self.lists.request.missing.contains(&id) {
                        let from = submitted_ns.max(self.landed_ns);
                        self.link_ns += ended_ns.saturating_sub(from);
                        self.landed_ns = self.landed_ns.max(ended_ns);
                        self.lists.copied += 1;
                    } else {
                        self.came_ns = self.came_ns.max(ended_ns);
                        self.lists.waited_for += 1;
                    }
                    self.lists.ready.push(id);
                }
                // A read-ahead that was given up before it became a demand.
                Arrival::Again => {
                    self.awaited -= 1;
                    self.lists.queue.push_front(id);
                }
                Arrival::Fail => {
                    self.awaited -= 1;
                    result?;
                }
                Arrival::Keep | Arrival::Release | Arrival::Nothing => {}
            }
            next = self.inner.mover.next(0);
        }
        Ok(())
    }

    /// Time waited for the disk so far, in nanoseconds.
    pub fn waited_ns(&self) -> u64 {
        self.waited_ns
    }

    pub fn now_ns(&self) -> u64 {
        self.inner.mover.now_ns()
    }

    /// Ends the event after the last expert was computed, and tells the
    /// observer what it took.
    pub fn finish(mut self, first_position: usize, tokens: usize, observer: &mut dyn Observer) {
        self.settle();
        self.end();
        let left = |(_, admission): &&_| matches!(admission, Admission::Replaced(_));
        let evictions = self.lists.admitted.iter().filter(left).count();
        observer.served(&Served {
            layer: self.layer,
            first_position,
            tokens,
            experts: self.lists.origins(),
            evictions,
            bytes: self.bytes,
            stall_ns: self.waited_ns,
        });
    }

    fn end(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let mut retire = Retire::default();
        let worked_ns = (self.now_ns() - self.began_ns).saturating_sub(self.waited_ns);
        self.inner.planner.end(self.layer, self.waited_ns, worked_ns, &mut retire);
        self.inner.abandon(self.store, &retire);
        let stats = self.inner.layer_stats(self.layer);
        stats.stall_ns += self.waited_ns;
        self.inner.prefetch(self.store);
    }
}

impl Lists {
    fn origins(&mut self) -> &[(u32, Origin)] {
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

    /// Ready for the next event.
    fn clear(&mut self) {
        self.ready.clear();
        self.queue.clear();
        self.handed.clear();
        self.left.clear();
        self.admitted.clear();
        self.copied = 0;
        self.waited_for = 0;
    }
}

impl Drop for Event<'_> {
    /// An event that ends early (an error, a cancelled pass, a panic in the
    /// computation) leaves the store as usable as one that ends well: its
    /// pins are gone with the caller's [`Arrived`], and the planner gives up
    /// what it asked for.
    fn drop(&mut self) {
        self.end();
        self.lists.clear();
        self.inner.lists = std::mem::take(&mut self.lists);
    }
}
