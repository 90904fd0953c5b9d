//! One layer's experts, from the router's answer to the last of them computed.
//!
//! The order of work: what is in a frame is handed out first; what is missing
//! is asked of the mover at once, before anything is computed, and handed out
//! as it arrives. Bytes go straight into a spare frame. When an expert has
//! been computed, the planner says who leaves for it, and the frame that is
//! then free takes the next one.

use super::frames::Pin;
use super::mover::Urgency;
use super::{ExpertStore, Inner, key_of};
use crate::error::{Error, Result};
use crate::session::Cancel;
use pregate_kernels::Routes;
use pregate_predictor::forecast::External;
use pregate_predictor::{Arrival, ExpertId, Observer, Origin, Request, Retire, Served};
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
}

/// One layer's experts on their way to the computation. Holds the store: other
/// sessions wait until it ends.
pub struct Event<'s> {
    store: &'s ExpertStore,
    inner: MutexGuard<'s, Inner>,
    layer: usize,
    /// In a frame and not handed out yet.
    ready: Vec<ExpertId>,
    /// To be asked of the mover when a frame is free, in this order.
    queue: VecDeque<ExpertId>,
    /// Experts that the mover is bringing.
    awaited: usize,
    /// Handed out last, to be settled when their pins are back.
    handed: Vec<ExpertId>,
    origins: Vec<(u32, Origin)>,
    waited_ns: u64,
    bytes: u64,
    ended: bool,
}

impl<'s> Event<'s> {
    /// Asks for `experts`, distinct and of one MoE layer, in the order in
    /// which they are wanted.
    pub(super) fn begin(
        store: &'s ExpertStore,
        layer: usize,
        experts: &[u32],
        routes: &Routes,
    ) -> Self {
        let mut inner = store.lock();
        inner.collect(store);
        inner.tell_routes(layer, routes);
        let mut request = Request::default();
        inner.planner.request(layer, experts, &mut request);
        for &id in &request.in_flight {
            inner.mover.promote(key_of(id));
        }
        inner.retire(store, &request.retire);
        inner.count(layer, &request);
        let Request { resident, early, in_flight, missing, .. } = &request;
        let mut event = Self {
            store,
            inner,
            layer,
            ready: resident.iter().chain(early).copied().collect(),
            queue: missing.iter().copied().collect(),
            awaited: in_flight.len(),
            handed: Vec::new(),
            origins: origins(&request),
            waited_ns: 0,
            bytes: 0,
            ended: false,
        };
        event.ask();
        event
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
        if self.queue.is_empty() {
            self.inner.prefetch(self.store);
        }
    }

    /// Settles what was handed out last, and hands out everything that is in a
    /// frame now; waits for the disk if nothing is. Empty when all experts
    /// were handed out. The caller drops the answer before it asks again.
    pub fn next(&mut self, cancel: &Cancel) -> Result<Vec<Arrived>> {
        self.settle();
        self.ask();
        self.prefetch();
        self.receive(0)?;
        // A read that was given up has landed: it is asked for again before
        // anything waits.
        self.ask();
        while self.ready.is_empty() && (self.awaited > 0 || !self.queue.is_empty()) {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            self.receive(WAIT_NS)?;
            self.ask();
        }
        let ready = std::mem::take(&mut self.ready);
        self.handed.extend(&ready);
        Ok(ready.into_iter().map(|id| self.pin(id)).collect())
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
        for id in std::mem::take(&mut self.handed) {
            self.inner.settle(self.store, id);
        }
    }

    /// Gives waiting demands to the mover while frames are free.
    fn ask(&mut self) {
        while let Some(&next) = self.queue.front() {
            if !self.inner.submit(self.store, next, Urgency::Demand) {
                break;
            }
            self.inner.planner.filling(next);
            self.queue.pop_front();
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
            let (id, arrival, result) = self.inner.land(self.store, done);
            match arrival {
                Arrival::Use => {
                    self.awaited -= 1;
                    self.ready.push(id);
                }
                // A read-ahead that was given up before it became a demand.
                Arrival::Again => {
                    self.awaited -= 1;
                    self.queue.push_front(id);
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
        observer.served(&Served {
            layer: self.layer,
            first_position,
            tokens,
            experts: &self.origins,
            bytes: self.bytes,
            stall_ns: self.waited_ns,
        });
    }

    fn end(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let mut retire = Retire::default();
        self.inner.planner.end(self.layer, self.waited_ns, &mut retire);
        self.inner.retire(self.store, &retire);
        let stats = self.inner.layer_stats(self.layer);
        stats.stall_ns += self.waited_ns;
        self.inner.prefetch(self.store);
    }
}

fn origins(request: &Request) -> Vec<(u32, Origin)> {
    let with = |ids: &[ExpertId], origin| ids.iter().map(move |id| (id.expert, origin)).collect();
    let lists: [Vec<_>; 4] = [
        with(&request.resident, Origin::Hit),
        with(&request.early, Origin::Early),
        with(&request.in_flight, Origin::InFlight),
        with(&request.missing, Origin::Miss),
    ];
    lists.concat()
}

impl Drop for Event<'_> {
    /// An event that ends early (an error, a cancelled pass, a panic in the
    /// computation) leaves the store as usable as one that ends well: its
    /// pins are gone with the caller's [`Arrived`], and the planner gives up
    /// what it asked for.
    fn drop(&mut self) {
        self.end();
    }
}
