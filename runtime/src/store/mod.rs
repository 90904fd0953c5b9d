//! The expert store: keeps as many experts in memory as the budget allows and
//! brings the others from disk just in time.
//!
//! One layer's experts go through an [`Event`]. The planner (in
//! `pregate-predictor`, shared with replay) decides; a [`mover::Mover`] reads;
//! [`frames`] hold the bytes under the slot protocol of [`slot`]. A class of
//! frames has `slots + ring` of them: a read always goes to a spare one, and
//! whoever then leaves makes the next one spare. So no read waits for an
//! eviction, no eviction is made for a guess, and nothing is ever copied.

pub mod disk;
mod event;
pub mod frames;
mod keep;
pub mod layout;
pub mod mover;
mod notices;
mod places;
pub mod slot;
mod sync;

pub use event::{Arrived, Event, Leave, Missing};

use crate::error::{Error, Result};
use crate::model::weights::GatedBlock;
use crate::session::Cancel;
use crate::statistics::{LayerStats, LinkStats, StreamStats, Time};
use disk::DiskReport;
use frames::{ClassSpec, FrameId, Frames};
use layout::ModelLayout;
use mover::{Counters, Done, Fill, MoveError, Mover, Notice, Urgency};
use notices::Told;
use places::{Place, Places};
use pregate_kernels::{ExpertWeights, Routes};
use pregate_predictor::forecast::{External, Forecaster};
use pregate_predictor::{
    Admission, Arrival, ExpertId, Landing, NoObserver, Planner, Request, Retire, Room,
};
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a pass waits for its turn before cancelling is looked at.
const TURN_WAIT: Duration = Duration::from_millis(20);

/// Experts in frames, filled from disk.
pub struct ExpertStore {
    layout: ModelLayout,
    frames: Arc<Frames>,
    horizon: usize,
    clock: Clock,
    disk: Option<DiskReport>,
    /// Whether a pass runs, and the end of one.
    running: Mutex<bool>,
    ended: Condvar,
    inner: Mutex<Inner>,
}

/// A pass's turn: passes of several sessions follow each other, because the
/// planner follows one token, or one chunk, through the layers.
pub struct Turn<'s>(&'s ExpertStore);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.running.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.0.ended.notify_one();
    }
}

/// Nanoseconds from some fixed moment: the machine's, or a simulated one's.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// What one event at a time may change.
struct Inner {
    planner: Planner,
    mover: Box<dyn Mover>,
    places: Places,
    /// Outstanding with the mover.
    flights: HashMap<u64, Flight>,
    stats: StreamStats,
    /// What became of experts that came for later.
    admitted: Vec<(ExpertId, Admission)>,
    /// Buffers.
    lists: event::Lists,
    ahead: Vec<ExpertId>,
    experts: Vec<u32>,
    weights: Vec<f32>,
    /// What the mover had done at this moment.
    link: (Counters, u64),
    /// Of the pass that runs.
    tokens: usize,
    session: u64,
    keeps_ahead: bool,
    /// A device that is alone reads no frame of the layers before this one any
    /// more in this pass.
    passed: usize,
    /// Frames without an expert that it may still read.
    limbo: Vec<FrameId>,
    /// Notices that were given out.
    told: Told,
    /// Per class: frames that are no slots.
    rings: Vec<usize>,
}

struct Flight {
    id: ExpertId,
    urgency: Urgency,
}

/// What a fill of `id` is called.
pub fn key_of(id: ExpertId) -> u64 {
    u64::from(id.layer) << 32 | u64::from(id.expert)
}

/// Whose fill it is.
pub fn expert_of(key: u64) -> ExpertId {
    ExpertId { layer: (key >> 32) as u32, expert: key as u32 }
}

/// A pass over one token or a chunk of a prompt.
#[derive(Clone, Copy, Debug)]
pub struct PassInfo<'a> {
    pub ids: &'a [u32],
    /// Tells sessions apart, whose texts have nothing to do with each other.
    pub session: u64,
    /// Nothing came before the first id.
    pub is_start: bool,
    /// A device runs all layers by itself and may read the frames of any layer
    /// that is still ahead: none of those is taken from its expert.
    pub keeps_ahead: bool,
}

impl ExpertStore {
    /// Frames for `slots` experts per layer and `ring` more per class are made
    /// by the caller ([`ExpertStore::specs`]), since the mover knows them too.
    pub fn new(
        layout: ModelLayout,
        frames: Arc<Frames>,
        mover: Box<dyn Mover>,
        mut planner: Planner,
        clock: Clock,
        disk: Option<DiskReport>,
    ) -> Self {
        if let Some(measured) = disk.as_ref().and_then(|disk| disk.measured.as_ref()) {
            // Before the first token this is what a byte costs.
            planner.link(measured.bytes, measured.elapsed_ns, 0);
        }
        let horizon = planner.forecaster().map_or(0, Forecaster::horizon);
        let mut rings: Vec<usize> = frames.classes().map(|spec| spec.frames).collect();
        for (index, layer) in layout.shape.moe() {
            let slots = planner.cache().slots(index);
            rings[layer.class] = rings[layer.class].saturating_sub(slots);
        }
        let inner = Inner {
            rings,
            places: Places::new(&layout.shape, &frames),
            stats: StreamStats::new(layout.shape.layers.len()),
            link: (mover.counters(), mover.now_ns()),
            planner,
            mover,
            flights: HashMap::new(),
            admitted: Vec::new(),
            lists: event::Lists::default(),
            ahead: Vec::new(),
            experts: Vec::new(),
            weights: Vec::new(),
            tokens: 1,
            session: 0,
            keeps_ahead: false,
            passed: usize::MAX,
            limbo: Vec::new(),
            told: Told::default(),
        };
        Self {
            layout,
            frames,
            horizon,
            clock,
            disk,
            running: Mutex::new(false),
            ended: Condvar::new(),
            inner: Mutex::new(inner),
        }
    }

    /// The frames of each class for `slots` per layer and `ring` spare ones.
    pub fn specs(layout: &ModelLayout, slots: &[usize], ring: usize) -> Vec<ClassSpec> {
        let slots_of = |class: usize| {
            let layers = layout.shape.moe().filter(|(_, layer)| layer.class == class);
            layers.map(|(index, _)| slots[index]).sum::<usize>()
        };
        let spec = |(class, &frame_bytes): (usize, &usize)| ClassSpec {
            frame_bytes,
            frames: slots_of(class) + ring,
        };
        layout.class_bytes.iter().enumerate().map(spec).collect()
    }

    /// A pass begins; it has the store until the answer is dropped. Waits for
    /// the pass of another session, and gives up when `cancel` says so.
    pub fn begin_pass(&self, pass: PassInfo<'_>, cancel: &Cancel) -> Result<Turn<'_>> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        while *running {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let waited = self.ended.wait_timeout(running, TURN_WAIT);
            running = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *running = true;
        drop(running);
        let turn = Turn(self);
        let mut inner = self.lock();
        if pass.is_start || inner.session != pass.session {
            inner.planner.new_sequence();
        }
        inner.session = pass.session;
        inner.meter_link();
        inner.tokens = pass.ids.len();
        inner.keeps_ahead = pass.keeps_ahead;
        inner.mover.begin_pass(pass.keeps_ahead);
        // No device is in a pass: every frame without an expert is free, and
        // what leaves now is out of its sight before it begins.
        inner.passed = usize::MAX;
        for frame in std::mem::take(&mut inner.limbo) {
            inner.places.give_back(frame);
        }
        inner.admit_kept(self);
        if pass.keeps_ahead {
            inner.collect(self);
            inner.passed = 0;
        }
        match *pass.ids {
            [token] => inner.planner.begin_token(token),
            _ => {
                inner.planner.begin_chunk(pass.ids);
                // While its first layers are computed.
                inner.collect(self);
                inner.prefetch(self);
            }
        }
        drop(inner);
        Ok(turn)
    }

    /// Brings `experts` of MoE layer `layer` into its slots, before the first
    /// pass.
    pub fn warm(&self, layer: usize, experts: &[u32]) -> Result<()> {
        let (cancel, routes) = (Cancel::new(), Routes::new());
        let pass = PassInfo { ids: &[], session: 0, is_start: true, keeps_ahead: false };
        let turn = self.begin_pass(pass, &cancel)?;
        let mut event = self.begin(layer, experts, &routes);
        while !event.next(&cancel)?.is_empty() {}
        event.finish(0, 0, &mut NoObserver);
        self.end_pass(Time::default());
        drop(turn);
        Ok(())
    }

    /// What was counted so far does not count.
    pub fn begin_statistics(&self) {
        let mut inner = self.lock();
        inner.stats = StreamStats::new(self.layout.shape.layers.len());
        inner.meter_link();
    }

    /// A pass ended; `time` says what its thread did.
    pub fn end_pass(&self, time: Time) {
        let mut inner = self.lock();
        let link = between(&inner.link.0, &inner.mover.counters());
        let tokens = inner.tokens;
        let phase = inner.stats.phase_mut(tokens);
        phase.passes += 1;
        phase.tokens += tokens as u64;
        phase.time += time;
        phase.link += link;
    }

    /// Asks for `experts`, distinct, of MoE layer `layer`, in the order in
    /// which they are wanted. Inside a [`Turn`]. `routes` is what the router chose for each token.
    pub fn begin(&self, layer: usize, experts: &[u32], routes: &Routes) -> Event<'_> {
        Event::begin(self, layer, experts, routes, None)
    }

    /// [`ExpertStore::begin`] of experts that are launched on a device; some are
    /// computed without a frame: those that `leave` names, of the missing ones.
    pub fn begin_shared(
        &self,
        layer: usize,
        experts: &[u32],
        routes: &Routes,
        leave: Leave<'_>,
    ) -> Event<'_> {
        Event::begin(self, layer, experts, routes, Some(leave))
    }

    /// The weights of an expert that has arrived.
    pub fn view<'a>(
        &self,
        layer: usize,
        block: &'a GatedBlock,
        arrived: &'a Arrived,
    ) -> ExpertWeights<'a> {
        self.layout.layers[layer][arrived.expert as usize].view(block, arrived.bytes())
    }

    /// Where in the files an expert lies: the order in which a chunk reads.
    pub fn position(&self, layer: usize, expert: u32) -> (usize, u64) {
        self.layout.layers[layer][expert as usize].position()
    }

    /// Layers ahead whose routers a forecast wants to hear; 0: none.
    pub fn horizon(&self) -> usize {
        self.horizon
    }

    /// Is a forecast for `layer` worth its time now? Not while read-aheads
    /// for it are switched off.
    pub fn wants(&self, layer: usize) -> bool {
        self.lock().planner.wants(layer)
    }

    /// Scores that are judged and not acted on: the control, trials.
    pub fn control(&self, external: &External<'_>) {
        self.lock().planner.external(external);
    }

    /// Scores that a forecast gave between two events, and what they make
    /// worth reading.
    pub fn foresee(&self, external: &External<'_>) {
        let mut inner = self.lock();
        inner.collect(self);
        inner.planner.external(external);
        inner.prefetch(self);
    }

    /// The clock that passes are timed with.
    pub fn now_ns(&self) -> u64 {
        (self.clock)()
    }

    pub fn layout(&self) -> &ModelLayout {
        &self.layout
    }

    pub fn frames(&self) -> &Arc<Frames> {
        &self.frames
    }

    /// What the probe of the disk found; `None` with another source.
    pub fn disk(&self) -> Option<&DiskReport> {
        self.disk.as_ref()
    }

    pub fn stats(&self) -> StreamStats {
        self.lock().stats.clone()
    }

    /// How experts come, in words.
    pub fn describe(&self) -> String {
        self.lock().mover.describe()
    }

    /// What the mover has to tell the user since the last call: one of a kind
    /// for each file, ever.
    pub fn notices(&self) -> Vec<Notice> {
        let Inner { mover, told, .. } = &mut *self.lock();
        let notices = std::iter::from_fn(|| mover.notice());
        notices.filter(|notice| told.is_new(notice)).collect()
    }

    /// Calls `look` with the planner, for reports.
    pub fn with_planner<T>(&self, look: impl FnOnce(&Planner) -> T) -> T {
        look(&self.lock().planner)
    }

    /// Bytes that a read of `id` moves.
    fn bytes_of(&self, id: ExpertId) -> u64 {
        self.layout.layers[id.layer()][id.expert()].frame_bytes() as u64
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic inside an event unwinds through `Event::drop`, which leaves
        // everything consistent.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the link did from `before` to `now`.
fn between(before: &Counters, now: &Counters) -> LinkStats {
    LinkStats { bytes: now.bytes - before.bytes, busy_ns: now.busy_ns - before.busy_ns }
}

impl Inner {
    /// Hands a read to the mover if a frame can be had for it: a free one, or,
    /// for a demand, one with an expert that was read ahead.
    fn submit(&mut self, store: &ExpertStore, id: ExpertId, urgency: Urgency) -> bool {
        let class = store.layout.shape.layer(id.layer()).map_or(0, |layer| layer.class);
        let may_take = urgency == Urgency::Demand && !self.keeps_ahead;
        if self.places.free(class) == 0 && may_take {
            match self.planner.make_room(class) {
                Some(Room::Released(id)) => self.drop_early(store, id),
                Some(Room::Discard(id)) => self.mover.discard(key_of(id)),
                None => {}
            }
        }
        let Some(frame) = self.places.take_free(class) else { return false };
        let Some(ticket) = store.frames.claim(frame) else {
            unreachable!("a free frame is neither pinned nor being filled")
        };
        let pieces = store.layout.layers[id.layer()][id.expert()].pieces();
        let key = key_of(id);
        self.flights.insert(key, Flight { id, urgency });
        self.mover.submit(Fill { key, ticket, pieces, urgency });
        true
    }

    /// Frames of the class of `layer` that are no slots.
    fn ring_of(&self, store: &ExpertStore, layer: usize) -> usize {
        store.layout.shape.layer(layer).map_or(0, |layer| self.rings[layer.class])
    }

    /// Frames that a fill for `layer` can have at once.
    fn free_frames(&self, store: &ExpertStore, layer: usize) -> usize {
        store.layout.shape.layer(layer).map_or(0, |layer| self.places.free(layer.class))
    }

    /// Gives up what was read ahead for nothing.
    fn give_up(&mut self, store: &ExpertStore, retire: &Retire) {
        for id in &retire.release {
            self.layer_stats(id.layer()).prefetch_wasted += 1;
        }
        self.abandon(store, retire);
    }

    /// Gives up what an event asked for that ended before its use.
    fn abandon(&mut self, store: &ExpertStore, retire: &Retire) {
        retire.release.iter().for_each(|&id| self.drop_unused(store, id));
        retire.discard.iter().for_each(|&id| self.mover.discard(key_of(id)));
    }

    /// An expert that was read ahead and not used gives its frame back.
    fn drop_early(&mut self, store: &ExpertStore, id: ExpertId) {
        self.layer_stats(id.layer()).prefetch_wasted += 1;
        self.drop_unused(store, id);
    }

    /// An expert that was read and not used gives its frame back.
    fn drop_unused(&mut self, store: &ExpertStore, id: ExpertId) {
        self.layer_stats(id.layer()).bytes_wasted += store.bytes_of(id);
        self.vacate(store, id);
    }

    /// `id` leaves its frame.
    fn vacate(&mut self, store: &ExpertStore, id: ExpertId) {
        let Some(Place { frame, .. }) = self.places.take(id) else {
            unreachable!("{id} has a frame")
        };
        let released = store.frames.release(frame);
        debug_assert!(released, "{frame:?} of {id} is in use");
        self.mover.vacated(key_of(id));
        match id.layer() < self.passed {
            true => self.places.give_back(frame),
            false => self.limbo.push(frame),
        }
    }

    /// Books what the mover has brought.
    fn land(
        &mut self,
        store: &ExpertStore,
        done: Done,
    ) -> (ExpertId, Arrival, Result<(), MoveError>) {
        let Some(Flight { id, urgency }) = self.flights.remove(&done.key) else {
            unreachable!("the mover answers what it was given")
        };
        let stats = self.layer_stats(id.layer());
        match urgency {
            Urgency::Demand => stats.bytes_demand += done.bytes,
            Urgency::Prefetch => stats.bytes_prefetch += done.bytes,
        }
        let landing = match &done.result {
            Ok(()) => Landing::Ready,
            Err(MoveError::Discarded) => Landing::Discarded,
            Err(_) => Landing::Failed,
        };
        if landing == Landing::Ready {
            self.places.put(id, Place { frame: done.frame, generation: done.generation });
        } else {
            let stats = self.layer_stats(id.layer());
            stats.bytes_wasted += done.bytes;
            stats.prefetch_wasted += u64::from(urgency == Urgency::Prefetch);
            self.places.give_back(done.frame);
        }
        let arrival = self.planner.arrived(id, landing);
        match (arrival, urgency) {
            (Arrival::Release, Urgency::Prefetch) => self.drop_early(store, id),
            (Arrival::Release, Urgency::Demand) => self.drop_unused(store, id),
            (Arrival::Keep, _) => self.admit_kept(store),
            _ => {}
        }
        (id, arrival, done.result)
    }

    /// Books everything that has landed since the last event. A failed
    /// read-ahead is only counted: if the expert is needed, a demand will
    /// say what is wrong.
    fn collect(&mut self, store: &ExpertStore) {
        while let Some(done) = self.mover.next(0) {
            let _ = self.land(store, done);
        }
    }

    /// Counts where the experts of an event come from.
    fn count(&mut self, layer: usize, request: &Request) {
        let Request { resident, early, in_flight, missing, fixed, .. } = request;
        let stats = self.layer_stats(layer);
        stats.hits += (fixed.len() + resident.len() + early.len()) as u64;
        stats.in_flight += in_flight.len() as u64;
        stats.misses += missing.len() as u64;
        stats.prefetch_useful += (early.len() + in_flight.len()) as u64;
    }

    /// `id` was computed: who leaves for it, or does it leave itself? `None`:
    /// it was in a slot.
    fn settle(&mut self, store: &ExpertStore, id: ExpertId) -> Option<Admission> {
        if self.planner.cache().contains(id) {
            self.planner.computed(id);
            return None;
        }
        // Whatever was handed out before is back.
        let keeps_ahead = self.keeps_ahead;
        let admission = self.planner.admit(id, &|other| keeps_ahead && other.layer() > id.layer());
        match admission {
            Admission::Added => {}
            Admission::Replaced(victim) => self.vacate(store, victim),
            Admission::Bypassed => self.vacate(store, id),
        }
        Some(admission)
    }

    /// Reads ahead into frames that nobody needs now.
    fn prefetch(&mut self, store: &ExpertStore) {
        let places = &self.places;
        let mut ids = std::mem::take(&mut self.ahead);
        self.planner.prefetch(&|class| places.free(class), &mut ids);
        for &id in &ids {
            let submitted = self.submit(store, id, Urgency::Prefetch);
            debug_assert!(submitted, "the planner saw a free frame for {id}");
        }
        self.ahead = ids;
    }

    /// Tells the planner what the link did since the last pass began.
    fn meter_link(&mut self) {
        let (counters, now) = (self.mover.counters(), self.mover.now_ns());
        let (before, then) = self.link;
        let LinkStats { bytes, busy_ns } = between(&before, &counters);
        self.planner.link(bytes, busy_ns, (now - then).saturating_sub(busy_ns));
        self.link = (counters, now);
    }

    /// Tells the planner what the router of `layer` chose for each token.
    fn tell_routes(&mut self, layer: usize, routes: &Routes) {
        for token in 0..routes.tokens() {
            let choices = routes.of(token);
            self.experts.clear();
            self.experts.extend(choices.iter().map(|choice| choice.expert));
            self.weights.clear();
            self.weights.extend(choices.iter().map(|choice| choice.weight));
            self.planner.routed(layer, &self.experts, &self.weights);
        }
    }

    fn layer_stats(&mut self, layer: usize) -> &mut LayerStats {
        &mut self.stats.phase_mut(self.tokens).layers[layer]
    }
}
