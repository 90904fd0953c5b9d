//! The expert store: keeps as many experts in memory as the budget allows and
//! brings the others from disk just in time.
//!
//! One layer's experts go through an [`Event`]. The planner and its
//! [`Drive`] (in `pregate-predictor`, shared with replay) decide what happens
//! in which order; a [`mover::Mover`] reads;
//! [`frames`] hold the bytes under the slot protocol of [`slot`]. A class of
//! frames has `slots + ring` of them: a read always goes to a spare one, and
//! whoever then leaves makes the next one spare. So no read waits for an
//! eviction, no eviction is made for a guess, and nothing is ever copied.

pub mod disk;
mod event;
pub mod frames;
pub mod layout;
pub mod mover;
mod notices;
mod places;
pub mod slot;
mod sync;
mod tier;

pub use event::{Arrived, Event};
pub use pregate_predictor::drive::{Leave, Missing, Pass as PassInfo};

use crate::error::{Error, Result};
use crate::model::weights::GatedBlock;
use crate::session::Cancel;
use crate::statistics::{LinkStats, StreamStats, Time};
use disk::DiskReport;
use frames::{ClassSpec, Frames};
use layout::ModelLayout;
use mover::{Mover, Notice};
use notices::Told;
use pregate_kernels::{ExpertWeights, Routes};
use pregate_predictor::drive::{Drive, Moved};
use pregate_predictor::forecast::{External, Forecaster};
use pregate_predictor::{ExpertId, NoObserver, Planner};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tier::StoreTier;

/// How long a pass waits for its turn before cancelling is looked at.
const TURN_WAIT: Duration = Duration::from_millis(20);

/// Experts in frames, filled from disk.
pub struct ExpertStore {
    layout: Arc<ModelLayout>,
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
    drive: Drive<StoreTier>,
    stats: StreamStats,
    /// Buffers.
    experts: Vec<u32>,
    weights: Vec<f32>,
    /// Notices that were given out.
    told: Told,
}

/// What a fill of `id` is called.
pub fn key_of(id: ExpertId) -> u64 {
    u64::from(id.layer) << 32 | u64::from(id.expert)
}

/// Whose fill it is.
pub fn expert_of(key: u64) -> ExpertId {
    ExpertId { layer: (key >> 32) as u32, expert: key as u32 }
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
        let layout = Arc::new(layout);
        let counts: Vec<usize> = frames.classes().map(|spec| spec.frames).collect();
        let tier = StoreTier::new(layout.clone(), frames.clone(), mover);
        let inner = Inner {
            stats: StreamStats::new(layout.shape.layers.len()),
            drive: Drive::new(&layout.shape, planner, tier, &counts),
            experts: Vec::new(),
            weights: Vec::new(),
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
        self.lock().drive.begin_pass(&pass);
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
        inner.drive.begin_counting();
    }

    /// A pass ended; `time` says what its thread did.
    pub fn end_pass(&self, time: Time) {
        let mut inner = self.lock();
        let Moved { bytes, busy_ns } = inner.drive.moved_in_pass();
        let tokens = inner.drive.tokens();
        let phase = inner.stats.phase_mut(tokens);
        phase.passes += 1;
        phase.tokens += tokens as u64;
        phase.time += time;
        phase.link += LinkStats { bytes, busy_ns };
        // Nobody looked at a clock: it says nothing.
        if time.total_ns > 0 {
            inner.drive.passed(time.total_ns);
        }
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
        self.lock().drive.planner().wants(layer)
    }

    /// Scores that are judged and not acted on: the control, trials.
    pub fn control(&self, external: &External<'_>) {
        self.lock().drive.control(external);
    }

    /// Scores that a forecast gave between two events, and what they make
    /// worth reading.
    pub fn foresee(&self, external: &External<'_>) {
        self.lock().drive.foresee_now(Some(external));
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
        self.lock().stats()
    }

    /// How experts come, in words.
    pub fn describe(&self) -> String {
        self.lock().drive.tier().mover.describe()
    }

    /// What the mover has to tell the user since the last call: one of a kind
    /// for each file, ever.
    pub fn notices(&self) -> Vec<Notice> {
        let Inner { drive, told, .. } = &mut *self.lock();
        let notices = std::iter::from_fn(|| drive.tier_mut().mover.notice());
        notices.filter(|notice| told.is_new(notice)).collect()
    }

    /// Calls `look` with the planner, for reports.
    pub fn with_planner<T>(&self, look: impl FnOnce(&Planner) -> T) -> T {
        look(self.lock().drive.planner())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic inside an event unwinds through `Event::drop`, which leaves
        // everything consistent.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn stats(&self) -> StreamStats {
        let mut stats = self.stats.clone();
        for is_token in [true, false] {
            let layers = &mut stats.phase_mut(if is_token { 1 } else { 2 }).layers;
            let counts = self.drive.counts(is_token);
            layers.iter_mut().zip(counts).for_each(|(layer, counts)| *layer = counts.into());
        }
        stats
    }
}
