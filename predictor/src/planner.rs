//! The order of moves: what a layer can compute at once, what it waits for,
//! what comes ahead of its layer, and whose frame becomes free.
//!
//! Runtime and replay run the same planner. It moves nothing itself: a caller
//! owns frames and fills and tells the planner what became of them.
//!
//! For each layer of a token, or of a chunk of tokens:
//! 1. [`Planner::routed`] with each token's answer of the router, then
//!    [`Planner::request`] with the experts of all of them;
//! 2. start a fill for each missing expert as frames are free
//!    ([`Planner::filling`]); [`Planner::make_room`] where none is; then [`Planner::prefetch`];
//! 3. compute residents, and what [`Planner::arrived`] says is to be used;
//!    tell [`Planner::computed`], and [`Planner::admit`] what was in no slot;
//! 4. [`Planner::end`], also after an error.
//!
//! Invariants, asserted in debug builds and by `tests/planner.rs`: at most
//! one fill is in flight per expert; what the open event needs is neither
//! evicted nor released before it was computed; an expert is in exactly one
//! of slot, frame outside the slots, flight, or nowhere; with one frame more
//! than slots every demand completes.

use crate::cache::{Admission, Cache};
use crate::forecast::{External, Forecaster};
use crate::ledger::{Ledger, Pass};
use crate::policy::Event;
use crate::vocabulary::{ExpertId, NoOutlook, Outlook, Shape};
use accounts::Accounts;
use kept::Kept;
use prompt::Prompt;
use shares::Shares;

mod accounts;
mod ahead;
mod kept;
mod moves;
mod prompt;
mod shares;

pub use moves::{Arrival, Landing, Request, Retire, Room};

/// Where an expert is that no slot holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Absent,
    /// The open event needs it and no fill has started.
    Needed,
    Filling(Purpose),
    /// Prefetched and ready, for a layer that is still ahead.
    Early,
    /// Ready outside the slots, and the open event uses it.
    InUse,
    /// In memory for good and no business of the slots.
    Fixed,
}

/// Who waits for a fill.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Purpose {
    Demand,
    Prefetch,
    /// Later tokens: the CPU computes it for this one.
    Keep,
    /// Nobody any more; its discard was ordered.
    Dropped,
}

/// Decoding goes on behind the last tokens of a prompt: the cache hears of so
/// many one by one, beside the chunk as a whole. More of them gain there and
/// lose in other texts; with these both are better off than without
/// (`examples/prompts.rs`).
const LAST_TOKENS: usize = 16;

/// The open event.
#[derive(Debug, Default)]
struct Open {
    layer: Option<usize>,
    /// `[experts]`: tokens of this event that chose each.
    counts: Vec<u32>,
    tokens: usize,
    experts: Vec<u32>,
    event_counts: Vec<u32>,
}

/// When a forecast becomes a fill.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Ahead {
    /// An expert is fetched ahead if it is needed with at least this
    /// probability.
    pub threshold: f32,
    /// Fetched ahead and not used yet, at most.
    pub most: usize,
    /// Prefetching stops in layers where the ledger says that it loses.
    pub priced: bool,
}

impl Default for Ahead {
    fn default() -> Self {
        Self { threshold: 0.5, most: 64, priced: true }
    }
}

/// Residency, forecasts, and what is on its way.
pub struct Planner {
    shape: Shape,
    cache: Cache,
    forecaster: Option<Forecaster>,
    ledger: Ledger,
    accounts: Accounts,
    limits: Ahead,
    /// The layer that was routed last; `None` at the start of a token.
    after: Option<usize>,
    /// Something is known that the forecaster was not asked about yet.
    ask: bool,
    /// The chunk of a prompt that is on its way through the layers.
    prompt: Option<Prompt>,
    shares: Shares,
    states: Vec<Vec<State>>,
    /// Every expert that is early or whose prefetch is in flight.
    ahead: Vec<ExpertId>,
    kept: Kept,
    /// Per class: fills in flight that nobody wants.
    dropped: Vec<usize>,
    open: Open,
    /// Scratch: free frames per class.
    room: Vec<usize>,
    /// What forecasts ask for, best first.
    wanted: Vec<(f32, ExpertId)>,
    /// `wanted` is what follows from all that is known of the running token.
    has_looked: bool,
}

impl Planner {
    /// `cache` and `forecaster` were made for `shape`. Without a forecaster
    /// nothing is fetched ahead.
    pub fn new(shape: &Shape, cache: Cache, forecaster: Option<Forecaster>, limits: Ahead) -> Self {
        let columns = forecaster.as_ref().map(Forecaster::columns).unwrap_or_default();
        let horizon = forecaster.as_ref().map_or(0, Forecaster::horizon);
        let experts = |layer: usize| shape.layer(layer).map_or(0, |layer| layer.experts);
        let layers = 0..shape.layers.len();
        Self {
            states: layers.map(|layer| vec![State::Absent; experts(layer)]).collect(),
            ledger: Ledger::new(shape, columns, horizon),
            accounts: Accounts::default(),
            shares: Shares::new(shape),
            shape: shape.clone(),
            cache,
            forecaster,
            limits,
            after: None,
            ask: false,
            prompt: None,
            wanted: Vec::new(),
            has_looked: false,
            ahead: Vec::new(),
            kept: Kept::default(),
            dropped: vec![0; shape.classes()],
            open: Open::default(),
            room: Vec::new(),
        }
    }

    /// Who is resident.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The forecaster, if there is one.
    pub fn forecaster(&self) -> Option<&Forecaster> {
        self.forecaster.as_ref()
    }

    /// What the forecasts were worth.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// `id` is in memory for good, outside the slots: it is never fetched.
    /// To be said before the first request.
    pub fn fix(&mut self, id: ExpertId) {
        debug_assert_eq!(self.state(id), State::Absent, "{id} is fixed");
        self.set(id, State::Fixed);
    }

    /// The link moved `bytes` in `busy_ns` and was idle for `idle_ns` since
    /// the last call. Until the first call with bytes, which should bring the
    /// plan's measured speed, prefetching has no price and stays on.
    pub fn link(&mut self, bytes: u64, busy_ns: u64, idle_ns: u64) {
        self.ledger.link(bytes, busy_ns, idle_ns);
    }

    /// The pass that ran took `ns`, all in all: what decides in the end whether
    /// reading ahead pays. Without a forecaster there is nothing to decide.
    pub fn passed(&mut self, ns: u64) {
        if self.forecaster.is_some() {
            self.ledger.passed(ns);
        }
    }

    /// A token enters the first layer.
    pub fn begin_token(&mut self, token: u32) {
        self.begin(Pass::Token);
        if let Some(forecaster) = &mut self.forecaster {
            forecaster.begin_token(token);
        }
    }

    /// A chunk of a prompt enters the first layer.
    pub fn begin_chunk(&mut self, tokens: &[u32]) {
        self.begin(Pass::Chunk);
        self.forecaster.iter_mut().for_each(Forecaster::begin_chunk);
        self.prompt = Some(Prompt::new(tokens, self.shape.layers.len()));
    }

    fn begin(&mut self, pass: Pass) {
        self.ledger.next_pass(pass);
        self.accounts.close();
        self.end_of_prompt();
        self.cache.next_token();
        self.after = None;
        self.ask = false;
        self.has_looked = false;
    }

    /// Teaches the forecasts the chunk that went through the layers.
    fn end_of_prompt(&mut self) {
        if let (Some(prompt), Some(forecaster)) = (self.prompt.take(), &mut self.forecaster) {
            prompt.teach(forecaster);
        }
    }

    /// What follows has nothing to do with what came before.
    pub fn new_sequence(&mut self) {
        self.end_of_prompt();
        self.has_looked = false;
        self.cache.new_sequence();
        if let Some(forecaster) = &mut self.forecaster {
            forecaster.new_sequence();
        }
    }

    /// The router of `layer` chose `experts` (rank order, distinct) with
    /// `weights` for one token of the event that the next
    /// [`Planner::request`] opens; a chunk's tokens come in their order.
    pub fn routed(&mut self, layer: usize, experts: &[u32], weights: &[f32]) {
        debug_assert!(self.open.layer.is_none(), "layer {layer} is routed inside an event");
        let limit = self.states[layer].len();
        self.open.counts.resize(limit.max(self.open.counts.len()), 0);
        self.open.tokens += 1;
        for &expert in experts {
            self.open.counts[expert as usize] += 1;
        }
        self.after = Some(layer);
        self.ask = true;
        self.has_looked = false;
        self.shares.routed(layer, experts);
        if let Some(prompt) = &mut self.prompt {
            prompt.routed(layer, experts);
        } else if let Some(forecaster) = &mut self.forecaster {
            forecaster.routed(layer, experts, weights, &mut self.ledger);
        }
    }

    /// Scores for a later layer that the runtime computed.
    pub fn external(&mut self, external: &External<'_>) {
        if let Some(forecaster) = &mut self.forecaster {
            forecaster.external(external);
            self.ask = true;
            self.has_looked = false;
        }
    }

    /// Opens the event of `layer`: it needs `experts`, distinct, in rank
    /// order for a token, in the order of reading for a chunk. None of them
    /// is evicted before it was computed.
    ///
    /// Panics on experts that the layer does not have.
    pub fn request(&mut self, layer: usize, experts: &[u32], out: &mut Request) {
        debug_assert!(self.open.layer.is_none(), "layer {layer} inside another event");
        self.open.layer = Some(layer);
        self.open.experts.clear();
        self.open.experts.extend_from_slice(experts);
        out.clear();
        for &expert in experts {
            let id = ExpertId::new(layer, expert);
            let list = match self.state(id) {
                _ if self.cache.contains(id) => &mut out.resident,
                State::Absent => &mut out.missing,
                State::Early => &mut out.early,
                State::Filling(_) => &mut out.in_flight,
                State::Needed | State::InUse => unreachable!("{id} is in use outside an event"),
                State::Fixed => &mut out.fixed,
            };
            list.push(id);
        }
        for &id in &out.early {
            self.set(id, State::InUse);
        }
        for &id in &out.in_flight {
            // One that was given up before counts as wasted for good.
            if self.state(id) == State::Filling(Purpose::Prefetch) {
                self.accounts.promoted(id);
            }
            self.set(id, State::Filling(Purpose::Demand));
        }
        for &id in &out.missing {
            self.set(id, State::Needed);
        }
        self.tell_cache(layer);
        let (states, ahead) = (&self.states, &self.ahead);
        let flies =
            |id: &ExpertId| states[id.layer()][id.expert()] == State::Filling(Purpose::Prefetch);
        let under_way = ahead.iter().copied().filter(flies);
        self.accounts.requested(out, under_way);
        self.kept.requested(out, &self.shape, &mut self.ledger);
        self.retire(layer, &mut out.retire);
    }

    fn tell_cache(&mut self, layer: usize) {
        let open = &mut self.open;
        let count = |&expert: &u32| open.counts.get(expert as usize).map_or(1, |&n| n.max(1));
        open.event_counts.clear();
        open.event_counts.extend(open.experts.iter().map(count));
        let tokens = open.tokens.max(1);
        let (experts, counts) = (&open.experts, &open.event_counts);
        self.cache.used(&Event { layer, experts, counts, tokens });
        if let Some(prompt) = &self.prompt {
            prompt.last(layer, LAST_TOKENS).for_each(|chosen| self.cache.used_last(layer, chosen));
        }
        open.counts.fill(0);
        open.tokens = 0;
    }

    /// The fill of a missing expert has started.
    pub fn filling(&mut self, id: ExpertId) {
        assert_eq!(self.state(id), State::Needed, "a fill of {id} starts");
        self.set(id, State::Filling(Purpose::Demand));
        let states = &self.states;
        let flies = |id: ExpertId| states[id.layer()][id.expert()] == State::Filling(Purpose::Keep);
        self.kept.demanded(flies, &self.shape, &mut self.ledger);
    }

    /// The fill of `id` has landed.
    pub fn arrived(&mut self, id: ExpertId, landing: Landing) -> Arrival {
        let State::Filling(purpose) = self.state(id) else {
            debug_assert!(false, "{id} landed and was not in flight");
            return Arrival::Nothing;
        };
        let (state, arrival) = match (purpose, landing) {
            (Purpose::Demand, Landing::Ready) => (State::InUse, Arrival::Use),
            (Purpose::Demand, Landing::Failed) => (State::Needed, Arrival::Fail),
            (Purpose::Demand, Landing::Discarded) => (State::Needed, Arrival::Again),
            (Purpose::Prefetch | Purpose::Keep, Landing::Ready) => (State::Early, Arrival::Keep),
            (Purpose::Dropped, Landing::Ready) => (State::Absent, Arrival::Release),
            (_, Landing::Failed | Landing::Discarded) => (State::Absent, Arrival::Nothing),
        };
        self.set(id, state);
        if purpose == Purpose::Keep && arrival == Arrival::Nothing {
            self.kept.wasted(id, &self.shape, &mut self.ledger);
        }
        if purpose == Purpose::Prefetch && arrival == Arrival::Nothing {
            self.wasted(id);
            self.ahead.retain(|&other| other != id);
        }
        arrival
    }

    /// `id` of the open event was computed; nothing reads its frame any more.
    pub fn computed(&mut self, id: ExpertId) {
        self.cache.computed(id);
    }

    /// `id` was computed and is in no slot: who leaves for it? Never one in
    /// `pinned`, never one that the open event still needs.
    pub fn admit(&mut self, id: ExpertId, pinned: &dyn Fn(ExpertId) -> bool) -> Admission {
        assert_eq!(self.state(id), State::InUse, "{id} is admitted");
        self.cache.computed(id);
        let admission = self.take_in(id, pinned);
        self.set(id, State::Absent);
        if let Admission::Replaced(victim) = admission {
            self.kept.wasted(victim, &self.shape, &mut self.ledger);
        }
        admission
    }

    /// Who leaves for `id`, as far as forecasts may say so.
    fn take_in(&mut self, id: ExpertId, pinned: &dyn Fn(ExpertId) -> bool) -> Admission {
        let outlook: &dyn Outlook = match &self.forecaster {
            // Who does not pay has no say in who leaves either.
            Some(forecaster) if !self.limits.priced || self.ledger.pays() => forecaster,
            _ => &NoOutlook,
        };
        self.cache.admit(id, pinned, outlook)
    }

    /// No device is in a pass: those leave that were to leave before and could
    /// not (see [`Cache::let_go`]); their frames are free.
    pub fn let_go(&mut self, out: &mut Vec<ExpertId>) {
        self.cache.let_go(out);
        for &id in &*out {
            self.kept.wasted(id, &self.shape, &mut self.ledger);
        }
    }

    /// The event of `layer` is over, after `stall_ns` of waiting and
    /// `worked_ns` of computing. What it asked for and did not use, because it
    /// failed or was cancelled, is given up.
    pub fn end(&mut self, layer: usize, stall_ns: u64, worked_ns: u64, out: &mut Retire) {
        debug_assert_eq!(self.open.layer, Some(layer));
        out.clear();
        self.ledger.stalled(layer, stall_ns);
        self.accounts.ended(stall_ns, worked_ns, &self.shape, &mut self.ledger);
        self.kept.ended(&self.shape, &mut self.ledger);
        for index in 0..self.open.experts.len() {
            let id = ExpertId::new(layer, self.open.experts[index]);
            match self.state(id) {
                State::InUse => {
                    self.set(id, State::Absent);
                    out.release.push(id);
                }
                State::Filling(Purpose::Demand) => {
                    self.set(id, State::Filling(Purpose::Dropped));
                    out.discard.push(id);
                }
                State::Needed => self.set(id, State::Absent),
                _ => {}
            }
            self.cache.computed(id);
        }
        self.open.layer = None;
        self.open.experts.clear();
    }

    /// The frame of a resident expert is lost.
    pub fn lost(&mut self, id: ExpertId) {
        self.cache.remove(id);
        self.kept.wasted(id, &self.shape, &mut self.ledger);
    }

    fn class(&self, layer: usize) -> usize {
        self.shape.layer(layer).map_or(0, |layer| layer.class)
    }

    fn state(&self, id: ExpertId) -> State {
        self.states[id.layer()][id.expert()]
    }

    fn set(&mut self, id: ExpertId, state: State) {
        debug_assert!(
            state == State::Absent || !self.cache.contains(id),
            "{id} is in a slot and becomes {state:?}"
        );
        let class = self.class(id.layer());
        let before = std::mem::replace(&mut self.states[id.layer()][id.expert()], state);
        self.dropped[class] += usize::from(state == State::Filling(Purpose::Dropped));
        self.dropped[class] -= usize::from(before == State::Filling(Purpose::Dropped));
    }
}
