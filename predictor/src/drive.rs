//! Drives the planner: who is read, handed out, settled and given back, in
//! which order.
//!
//! The runtime and replay run this same code; what differs is the [`Tier`] of
//! frames under it and the clock that the tier has. A class of frames has as
//! many as its layers have slots, and a *ring* of further ones: a read always
//! goes to a spare frame, and whoever then leaves makes the next one spare.
//!
//! ```text
//! begin_pass(&Pass { .. })          a token, or a chunk of a prompt
//! for each MoE layer, when its router has answered:
//!     begin(&Wanted { .. }, ..)     reads what is missing
//!     foresee(..), prefetch()       what comes next, while something else is computed
//!     more(..) -> experts           compute them; then
//!     settle()                      who leaves for them?
//!     keep(..)                      what an idle wire brings for later tokens
//!     ... until more() has nothing
//!     end()                         also after an error
//! ```

mod event;
mod keep;
mod terms;

pub use event::Open;
pub use terms::{Landed, LayerCounts, Leave, Missing, Moved, Pass, Tier, Urgency, Wanted};

use crate::planner::{Arrival, Landing, Planner, Request, Retire, Room};
use crate::vocabulary::{ExpertId, Shape};
use crate::{Admission, forecast::External};

/// A planner, the frames that it plans for, and the event that is open.
pub struct Drive<T> {
    shape: Shape,
    planner: Planner,
    tier: T,
    /// `[layers][experts]`: fills on their way, by who asked for them.
    flights: Vec<Vec<Option<Urgency>>>,
    /// Per layer, for passes over one token and for chunks.
    counts: [Vec<LayerCounts>; 2],
    open: Open,
    ahead: Vec<ExpertId>,
    /// What became of experts that came for later tokens, until it is told.
    kept: Vec<(ExpertId, Admission)>,
    /// What the tier had moved at this moment.
    link: (Moved, u64),
    /// Of the pass that runs.
    tokens: usize,
    counts_as_prompt: bool,
    session: u64,
    keeps_ahead: bool,
    /// A device that is alone reads no frame of the layers before this one any
    /// more in this pass.
    passed: usize,
    /// Per class: frames that are no slots.
    rings: Vec<usize>,
}

impl<T: Tier> Drive<T> {
    /// `tier` has `frames` of each class; `planner` was made for `shape`.
    pub fn new(shape: &Shape, planner: Planner, tier: T, frames: &[usize]) -> Self {
        let mut rings = frames.to_vec();
        for (index, layer) in shape.moe() {
            let slots = planner.cache().slots(index);
            rings[layer.class] = rings[layer.class].saturating_sub(slots);
        }
        let experts = |layer: usize| shape.layer(layer).map_or(0, |layer| layer.experts);
        let layers = shape.layers.len();
        Self {
            flights: (0..layers).map(|layer| vec![None; experts(layer)]).collect(),
            counts: [vec![LayerCounts::default(); layers], vec![LayerCounts::default(); layers]],
            open: Open::default(),
            ahead: Vec::new(),
            kept: Vec::new(),
            link: (tier.moved(), tier.now_ns()),
            tokens: 1,
            counts_as_prompt: false,
            session: 0,
            keeps_ahead: false,
            passed: usize::MAX,
            rings,
            shape: shape.clone(),
            planner,
            tier,
        }
    }

    pub fn planner(&self) -> &Planner {
        &self.planner
    }

    pub fn tier(&self) -> &T {
        &self.tier
    }

    pub fn tier_mut(&mut self) -> &mut T {
        &mut self.tier
    }

    /// What each layer asked for and what that moved, `[layers]`, in passes
    /// over one token or over several (see [`Drive::count_as_prompt`]).
    pub fn counts(&self, is_token: bool) -> &[LayerCounts] {
        &self.counts[usize::from(!is_token)]
    }

    /// What was counted so far does not count.
    pub fn begin_counting(&mut self) {
        self.counts.iter_mut().for_each(|layers| layers.fill(LayerCounts::default()));
        self.meter_link();
    }

    /// What the tier moved since the pass that runs began.
    pub fn moved_in_pass(&self) -> Moved {
        self.link.0.until(self.tier.moved())
    }

    /// Tokens of the pass that runs.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// A pass enters the first layer.
    pub fn begin_pass(&mut self, pass: &Pass<'_>) {
        if pass.is_start || self.session != pass.session {
            self.planner.new_sequence();
        }
        self.session = pass.session;
        self.meter_link();
        self.tokens = pass.ids.len();
        self.counts_as_prompt = self.tokens != 1;
        self.keeps_ahead = pass.keeps_ahead;
        self.tier.begin_pass();
        // No device is in a pass.
        self.passed = usize::MAX;
        self.admit_kept();
        let mut leaving = std::mem::take(&mut self.ahead);
        self.planner.let_go(&mut leaving);
        for &id in &leaving {
            self.layer_counts(id.layer()).evictions += 1;
            self.tier.vacate(id);
        }
        self.ahead = leaving;
        if pass.keeps_ahead {
            self.collect();
            self.pass_by(0);
        }
        match *pass.ids {
            [token] => self.planner.begin_token(token),
            _ => {
                self.planner.begin_chunk(pass.ids);
                // While its first layers are computed.
                self.collect();
                self.prefetch_free();
            }
        }
    }

    /// The pass that runs counts with those over several tokens: it is the
    /// last one of a prompt.
    pub fn count_as_prompt(&mut self) {
        self.counts_as_prompt = true;
    }

    /// A device that is alone has passed the layers before `layer`.
    fn pass_by(&mut self, layer: usize) {
        self.passed = layer;
        self.tier.passed(layer);
    }

    /// The pass took `ns`.
    pub fn passed(&mut self, ns: u64) {
        self.planner.passed(ns);
    }

    /// Scores that are judged and not acted on: the control, trials.
    pub fn control(&mut self, external: &External<'_>) {
        self.planner.external(external);
    }

    /// What became known between two events, scores among it, and what it
    /// makes worth reading.
    pub fn foresee_now(&mut self, external: Option<&External<'_>>) {
        self.collect();
        if let Some(external) = external {
            self.planner.external(external);
        }
        self.prefetch_free();
    }

    /// Scores that a forecast gave for a layer ahead, in an event.
    pub fn foresee(&mut self, external: &External<'_>) {
        self.planner.external(external);
    }

    /// Forecasting for `layers` took the token's thread `ns`.
    pub fn spent(&mut self, layers: &[usize], ns: u64) {
        let share = ns / layers.len().max(1) as u64;
        layers.iter().for_each(|&layer| self.planner.spent(layer, share));
    }

    /// Hands a read to the tier if a frame can be had for it: a free one, or,
    /// for a demand, one with an expert that was read ahead.
    fn submit(&mut self, id: ExpertId, urgency: Urgency) -> bool {
        let class = self.class(id.layer());
        let may_take = urgency == Urgency::Demand && !self.keeps_ahead;
        if self.tier.free(class) == 0 && may_take {
            match self.planner.make_room(class) {
                Some(Room::Released(id)) => self.drop_early(id),
                Some(Room::Discard(id)) => self.tier.discard(id),
                None => {}
            }
        }
        if self.tier.free(class) == 0 {
            return false;
        }
        self.flights[id.layer()][id.expert()] = Some(urgency);
        self.tier.submit(id, urgency);
        true
    }

    fn class(&self, layer: usize) -> usize {
        self.shape.layer(layer).map_or(0, |layer| layer.class)
    }

    /// Frames of the class of `layer` that are no slots.
    fn ring_of(&self, layer: usize) -> usize {
        self.rings[self.class(layer)]
    }

    /// Gives up what was read ahead for nothing.
    fn give_up(&mut self, retire: &Retire) {
        for id in &retire.release {
            self.layer_counts(id.layer()).prefetch_wasted += 1;
        }
        self.abandon(retire);
    }

    /// Gives up what an event asked for that ended before its use.
    fn abandon(&mut self, retire: &Retire) {
        retire.release.iter().for_each(|&id| self.drop_unused(id));
        retire.discard.iter().for_each(|&id| self.tier.discard(id));
    }

    /// An expert that was read ahead and not used gives its frame back.
    fn drop_early(&mut self, id: ExpertId) {
        self.layer_counts(id.layer()).prefetch_wasted += 1;
        self.drop_unused(id);
    }

    /// An expert that was read and not used gives its frame back.
    fn drop_unused(&mut self, id: ExpertId) {
        let bytes = self.tier.bytes_of(id);
        self.layer_counts(id.layer()).bytes_wasted += bytes;
        self.tier.vacate(id);
    }

    /// Books what the tier has brought.
    fn land(&mut self, landed: &Landed<T::Error>) -> Arrival {
        let id = landed.id;
        let Some(urgency) = self.flights[id.layer()][id.expert()].take() else {
            unreachable!("the tier answers what it was given")
        };
        let counts = self.layer_counts(id.layer());
        match urgency {
            Urgency::Demand => counts.bytes_demand += landed.bytes,
            Urgency::Prefetch => counts.bytes_prefetch += landed.bytes,
        }
        if landed.landing != Landing::Ready {
            counts.bytes_wasted += landed.bytes;
            counts.prefetch_wasted += u64::from(urgency == Urgency::Prefetch);
        }
        let arrival = self.planner.arrived(id, landed.landing);
        match (arrival, urgency) {
            (Arrival::Release, Urgency::Prefetch) => self.drop_early(id),
            (Arrival::Release, Urgency::Demand) => self.drop_unused(id),
            (Arrival::Keep, _) => self.admit_kept(),
            _ => {}
        }
        arrival
    }

    /// Books everything that has landed since the last event. A failed
    /// read-ahead is only counted: if the expert is needed, a demand will
    /// say what is wrong.
    fn collect(&mut self) {
        while let Some(landed) = self.tier.next(0) {
            let _ = self.land(&landed);
        }
    }

    /// Counts where the experts of an event come from.
    fn count(&mut self, layer: usize, request: &Request) {
        let Request { resident, early, in_flight, missing, fixed, .. } = request;
        let counts = self.layer_counts(layer);
        counts.hits += (fixed.len() + resident.len()) as u64;
        counts.early += early.len() as u64;
        counts.in_flight += in_flight.len() as u64;
        counts.misses += missing.len() as u64;
        // Of those on their way it is told when they are waited for.
        counts.prefetch_useful += early.len() as u64;
    }

    /// `id` was computed: who leaves for it, or does it leave itself? `None`:
    /// it was in a slot.
    fn settle_one(&mut self, id: ExpertId) -> Option<Admission> {
        if self.planner.cache().contains(id) {
            self.planner.computed(id);
            return None;
        }
        // Whatever was handed out before is back.
        let keeps_ahead = self.keeps_ahead;
        let admission = self.planner.admit(id, &|other| keeps_ahead && other.layer() > id.layer());
        match admission {
            Admission::Added => {}
            Admission::Replaced(victim) => self.tier.vacate(victim),
            Admission::Bypassed => self.tier.vacate(id),
        }
        self.count_admission(id, admission);
        Some(admission)
    }

    fn count_admission(&mut self, id: ExpertId, admission: Admission) {
        let counts = self.layer_counts(id.layer());
        counts.evictions += u64::from(matches!(admission, Admission::Replaced(_)));
        counts.bypassed += u64::from(admission == Admission::Bypassed);
    }

    /// Reads ahead into frames that nobody needs now. Where a demand cannot
    /// take a frame back, half of the ring is left to demands.
    fn prefetch_free(&mut self) {
        let Self { tier, rings, keeps_ahead, .. } = self;
        let kept = |class: usize| if *keeps_ahead { rings[class].div_ceil(2) } else { 0 };
        let mut ids = std::mem::take(&mut self.ahead);
        let room = |class: usize| tier.free(class).saturating_sub(kept(class));
        self.planner.prefetch(&room, &mut ids);
        for &id in &ids {
            let submitted = self.submit(id, Urgency::Prefetch);
            debug_assert!(submitted, "the planner saw a free frame for {id}");
        }
        self.ahead = ids;
    }

    /// Tells the planner what the link did since the last pass began.
    fn meter_link(&mut self) {
        let (moved, now) = (self.tier.moved(), self.tier.now_ns());
        let (before, then) = self.link;
        let Moved { bytes, busy_ns } = before.until(moved);
        self.planner.link(bytes, busy_ns, (now - then).saturating_sub(busy_ns));
        self.link = (moved, now);
    }

    fn layer_counts(&mut self, layer: usize) -> &mut LayerCounts {
        &mut self.counts[usize::from(self.counts_as_prompt)][layer]
    }
}
