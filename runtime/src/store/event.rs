//! One layer's experts, as the computation sees them: pinned, as they arrive,
//! until the last was computed. What happens in which order is the drive's
//! (`pregate_predictor::drive`).

use super::frames::{FrameId, Pin};
use super::{ExpertStore, Inner, Leave};
use crate::error::{Error, Result};
use crate::session::Cancel;
use pregate_kernels::Routes;
use pregate_predictor::drive::{Tier, Wanted};
use pregate_predictor::forecast::External;
use pregate_predictor::{Admission, ExpertId, Observer, Planner, Served};
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

/// One layer's experts on their way to the computation. Holds the store: other
/// sessions wait until it ends.
pub struct Event<'s> {
    store: &'s ExpertStore,
    inner: MutexGuard<'s, Inner>,
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
        let Inner { drive, experts: ids, weights, .. } = &mut *inner;
        // What the router chose for each token.
        let mut tell = |planner: &mut Planner| {
            for token in 0..routes.tokens() {
                let choices = routes.of(token);
                ids.clear();
                ids.extend(choices.iter().map(|choice| choice.expert));
                weights.clear();
                weights.extend(choices.iter().map(|choice| choice.weight));
                planner.routed(layer, ids, weights);
            }
        };
        drive.begin(Wanted { layer, experts }, &mut tell, leave);
        Self { store, inner }
    }

    /// Of the model.
    pub fn layer(&self) -> usize {
        self.inner.drive.open().layer()
    }

    /// Experts that are computed without a frame.
    pub fn left(&self) -> &[ExpertId] {
        self.inner.drive.open().left()
    }

    /// Whether [`Event::next`] has something to hand out at once.
    pub fn has_ready(&self) -> bool {
        self.inner.drive.open().has_ready()
    }

    /// Is a forecast for `layer` worth its time now?
    pub fn wants(&self, layer: usize) -> bool {
        self.inner.drive.planner().wants(layer)
    }

    /// Scores that a forecast gave for a layer ahead.
    pub fn foresee(&mut self, external: &External<'_>) {
        self.inner.drive.foresee(external);
    }

    /// Forecasting for `layers` took the token's thread `ns`.
    pub fn spent(&mut self, layers: &[usize], ns: u64) {
        self.inner.drive.spent(layers, ns);
    }

    /// Asks the mover for what the forecasts say comes next, if no demand
    /// waits for a frame.
    pub fn prefetch(&mut self) {
        self.inner.drive.prefetch();
    }

    /// Settles what was handed out last, and hands out what is in a frame now:
    /// everything, or of a chunk a part; waits for the disk if nothing is.
    /// Empty when all experts were handed out. The caller drops the answer
    /// before it asks again.
    pub fn next(&mut self, cancel: &Cancel) -> Result<Vec<Arrived>> {
        self.inner.drive.settle();
        let mut there = Vec::new();
        self.more(cancel, &mut there)?;
        Ok(there)
    }

    /// As [`Event::next`], but what was handed out before is still in use: the
    /// rest goes behind it, to `there`. How many those are.
    pub fn more(&mut self, cancel: &Cancel, there: &mut Vec<Arrived>) -> Result<usize> {
        let mut may_wait = || match cancel.is_cancelled() {
            true => Err(Error::Cancelled),
            false => Ok(()),
        };
        let count = self.inner.drive.more(WAIT_NS, &mut may_wait)?.len();
        let handed = self.inner.drive.open().handed();
        there.extend(handed[handed.len() - count..].iter().map(|&id| self.pin(id)));
        Ok(count)
    }

    fn pin(&self, id: ExpertId) -> Arrived {
        let place = self.inner.drive.tier().places.get(id);
        let pin = place.and_then(|place| self.store.frames.pin(place.frame, place.generation));
        match pin {
            Some(pin) => Arrived { expert: id.expert, pin },
            // Nobody takes a frame from an expert of the event that runs.
            None => unreachable!("{id} has lost its frame"),
        }
    }

    /// Takes what the mover has brought, so that it goes on; hands nothing out.
    pub fn go_on(&mut self) -> Result<()> {
        self.inner.drive.go_on()
    }

    /// Settles what was handed out; the answer is what became of those that
    /// were in no slot: of the event, and of what came for later tokens.
    pub fn settled(&mut self) -> &[(ExpertId, Admission)] {
        self.inner.drive.settled()
    }

    /// Copies that may be ordered now with nobody waiting for them.
    pub fn room_to_keep(&self) -> usize {
        self.inner.drive.room_to_keep()
    }

    /// Orders copies of `wanted` for later tokens, which are computed without a
    /// frame now; each with what its next use saves, in ns.
    pub fn keep(&mut self, wanted: impl IntoIterator<Item = (ExpertId, u64)>) {
        self.inner.drive.keep(wanted);
    }

    /// The chance that a token misses something in `layer`, which is ahead;
    /// `None`: no forecast says so.
    pub fn miss_chance(&self, layer: usize) -> Option<f64> {
        self.inner.drive.planner().miss_chance(layer)
    }

    /// Time, since the event began, in which the link moved anything.
    pub fn link_busy_ns(&self) -> u64 {
        self.inner.drive.link_busy_ns()
    }

    /// Fills that the event asked for and that landed, and how long the link
    /// had at least one of them: not while they waited for a tier below.
    pub fn copied(&self) -> (usize, u64) {
        self.inner.drive.open().copied()
    }

    /// What the first of them waited before, for the link to be free.
    pub fn delay_ns(&self) -> u64 {
        self.inner.drive.open().delay_ns()
    }

    /// The same of fills that were on their way before.
    pub fn waited_for(&self) -> (usize, u64) {
        self.inner.drive.open().waited_for()
    }

    /// When the event began, as [`Event::now_ns`] counts.
    pub fn began_ns(&self) -> u64 {
        self.inner.drive.open().began_ns()
    }

    /// Time waited for the disk so far, in nanoseconds.
    pub fn waited_ns(&self) -> u64 {
        self.inner.drive.open().waited_ns()
    }

    pub fn now_ns(&self) -> u64 {
        self.inner.drive.tier().now_ns()
    }

    /// Ends the event after the last expert was computed, and tells the
    /// observer what it took.
    pub fn finish(mut self, first_position: usize, tokens: usize, observer: &mut dyn Observer) {
        let drive = &mut self.inner.drive;
        drive.settle();
        drive.end();
        let open = drive.open_mut();
        let (layer, evictions) = (open.layer(), open.evictions());
        let (bytes, stall_ns) = (open.bytes(), open.waited_ns());
        let experts = open.origins();
        observer.served(&Served {
            layer,
            first_position,
            tokens,
            experts,
            evictions,
            bytes,
            stall_ns,
        });
    }
}

impl Drop for Event<'_> {
    /// An event that ends early (an error, a cancelled pass, a panic in the
    /// computation) leaves the store as usable as one that ends well: its
    /// pins are gone with the caller's [`Arrived`], and the planner gives up
    /// what it asked for.
    fn drop(&mut self) {
        self.inner.drive.end();
    }
}
