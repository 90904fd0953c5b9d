//! Who brings the experts that a layer needs and the device does not have:
//! the host computes them, or the link copies them.

use crate::model::Misses;
use crate::store::{Event, Missing};
use pregate_predictor::split::{
    Asked, Choice, Chunk, ChunkOutcome, Early, Keep, Lapse, LayerSplit, Miss, Options, Outcome,
    Place, Seed, Spare, Split,
};
use pregate_predictor::{ExpertId, Shape};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Decides for every layer of a model, and learns what it led to.
pub struct Decider {
    misses: Misses,
    /// Experts that a layer has room for, per layer of the model.
    slots: Vec<usize>,
    shape: Shape,
    inner: Mutex<Inner>,
}

struct Inner {
    split: Split,
    /// Buffers.
    misses: Vec<Miss>,
    choice: Choice,
    counts: Vec<u32>,
    chunk: Chunk,
    computed: Vec<u32>,
    keeps: Vec<Keep>,
    /// The host's work and all time, lately, in ns.
    lately: [f64; 2],
    /// When the last event began.
    began_ns: u64,
    lapse: Lapse,
    /// Of [`Asked`], of the last decision.
    hidden_ns: u64,
    early: Early,
    /// Chance that a layer has work for the host, per layer of the model.
    chances: Vec<f64>,
}

/// What is left of a time in which the host worked or did not, an event later.
const FADES: f64 = 0.99;
/// Tokens that the chance of a layer's work remembers.
const CHANCE_MEMORY: f64 = 16.0;
/// Between two events of a token; more is a user's time.
const LONGEST_NS: u64 = 100_000_000;

/// What the host did for a layer.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostWork {
    pub experts: usize,
    /// Of all these experts together.
    pub tokens: usize,
    /// From the decision to the last row, less what it waited for reads from
    /// disk. Prices are what comes behind a read: copies wait for it as well
    /// ([`Event::copied`] counts from its end), so it weighs on neither side.
    pub ns: u64,
    /// Of `ns`, in which the link moved anything.
    pub busy_ns: u64,
    /// Its threads were roused before.
    pub is_roused: bool,
    /// When all that the device waited for was answered, as the store's clock
    /// counts; `None`: it waited for nothing.
    pub told_ns: Option<u64>,
}

impl Inner {
    /// The experts of an event were computed: who stays?
    fn settle(&mut self, event: &mut Event<'_>) {
        for (id, admission) in event.settled() {
            self.split.admitted(id.layer(), id.expert, admission);
        }
    }
}

impl Decider {
    /// `link_ns_per_byte`: as measured; `None`: unknown.
    pub fn new(
        misses: Misses,
        shape: &Shape,
        slots: &[usize],
        link_ns_per_byte: Option<f64>,
    ) -> Self {
        let usual = Seed::default();
        let link_ns_per_byte = link_ns_per_byte.unwrap_or(usual.link_ns_per_byte);
        let seed = Seed { link_ns_per_byte, ..usual };
        let inner = Inner {
            split: Split::new(shape, &seed, Options::default()),
            misses: Vec::new(),
            choice: Choice::default(),
            counts: Vec::new(),
            chunk: Chunk::default(),
            computed: Vec::new(),
            keeps: Vec::new(),
            lately: [0.0; 2],
            began_ns: 0,
            lapse: Lapse::default(),
            hidden_ns: 0,
            early: Early::default(),
            chances: vec![0.0; shape.layers.len()],
        };
        Self { misses, slots: slots.to_vec(), shape: shape.clone(), inner: Mutex::new(inner) }
    }

    /// Prices from probes: everything begins anew.
    pub fn seed(&self, seed: &Seed) {
        self.lock().split = Split::new(&self.shape, seed, Options::default());
    }

    /// A token enters the first layer.
    pub fn next_token(&self) {
        let inner = &mut *self.lock();
        inner.lapse.end();
        inner.split.next_token();
    }

    /// Are the host's threads to be roused for `layer`, which comes next? It
    /// misses something with this chance, as forecasts say; they may say
    /// nothing.
    pub fn rouses(&self, layer: usize, chance: Option<f64>) -> bool {
        let inner = &mut *self.lock();
        // Of the misses, the host has its usual share.
        let usual = inner.chances.get(layer).copied().unwrap_or(0.0);
        let chance = if self.misses == Misses::Copied { 0.0 } else { chance.unwrap_or(usual) };
        inner.early.rouses(chance)
    }

    /// A token goes on to its next layer: what became of the event of the one
    /// that it has passed (see [`Decider::ended`]), when the next one was heard,
    /// as the store's clock counts, and which it is if experts may be missing,
    /// with those that its router chose.
    pub fn next_layer(
        &self,
        passed: Option<(&mut Event<'_>, HostWork)>,
        heard_ns: Option<u64>,
        routed: Option<(usize, &[u32])>,
    ) {
        let inner = &mut *self.lock();
        if let Some(told_ns) = passed.as_ref().and_then(|(_, work)| work.told_ns) {
            inner.lapse.told(told_ns);
        }
        let wall_ns = heard_ns.and_then(|now_ns| inner.lapse.heard(now_ns));
        if let Some((event, work)) = passed {
            self.measured(inner, event, work, wall_ns);
            inner.settle(event);
        }
        if let Some((layer, experts)) = routed {
            inner.split.routed(layer, experts);
        }
    }

    /// Of one token's missing experts and those on their way, those that the
    /// host computes. `bounded`: no frame becomes free before the layer has
    /// ended.
    pub fn of_token(&self, missing: Missing<'_>, bounded: bool) -> Vec<ExpertId> {
        let Missing { layer, missing: ids, in_flight, in_flight_ns, free, queue_ns, asked } =
            missing;
        let most = if bounded { free } else { ids.len() };
        match self.misses {
            Misses::Host => return ids.to_vec(),
            Misses::Copied => return ids[most.min(ids.len())..].to_vec(),
            Misses::Auto => {}
        }
        let Inner { split, misses, choice, lapse, hidden_ns, .. } = &mut *self.lock();
        *hidden_ns = lapse.hidden_ns(1.0 - ids.len() as f64 / asked.max(1) as f64);
        misses.clear();
        misses.extend(ids.iter().map(|id| Miss { expert: id.expert, remaining_ns: None }));
        // What takes no one knows how long is waited for.
        let under_way = in_flight.iter().zip(in_flight_ns);
        let under_way = || under_way.clone().filter(|(_, ns)| ns.is_some());
        misses.extend(
            under_way().map(|(id, &remaining_ns)| Miss { expert: id.expert, remaining_ns }),
        );
        let asked = Asked {
            layer,
            misses,
            resident: self.slots[layer],
            frames: most,
            queue_ns,
            hidden_ns: *hidden_ns,
        };
        split.choose(&asked, choice);
        let mut copies = 0;
        let is_left = |(id, place): (&ExpertId, &Place)| {
            copies += usize::from(*place == Place::Link);
            (*place == Place::Cpu || *place == Place::Link && copies > most).then_some(*id)
        };
        let all = ids.iter().chain(under_way().map(|(id, _)| id));
        all.zip(&choice.places).filter_map(is_left).collect()
    }

    /// An event whose misses were just shared: what the host computes and is
    /// worth it comes over an idle link for later tokens.
    pub fn keep(&self, event: &mut Event<'_>) {
        if self.misses != Misses::Auto || event.left().is_empty() {
            return;
        }
        let Inner { split, computed, keeps, lately, .. } = &mut *self.lock();
        computed.clear();
        computed.extend(event.left().iter().map(|id| id.expert));
        let (layer, frames) = (event.layer(), event.room_to_keep());
        let cpu_share = lately[0] / lately[1].max(1.0);
        split.keep(&Spare { layer, computed, frames, cpu_share }, keeps);
        let id = |keep: &Keep| (ExpertId::new(layer, keep.expert), keep.saves_ns);
        event.keep(keeps.iter().map(id));
    }

    /// Of the missing experts of several tokens, those that the host computes.
    /// `tokens` answers for an expert.
    pub fn of_chunk(&self, missing: Missing<'_>, tokens: impl Fn(u32) -> u32) -> Vec<ExpertId> {
        match self.misses {
            Misses::Host => return missing.missing.to_vec(),
            Misses::Copied => return Vec::new(),
            Misses::Auto => {}
        }
        let Inner { split, counts, chunk, .. } = &mut *self.lock();
        counts.clear();
        counts.extend(missing.missing.iter().map(|id| tokens(id.expert)));
        split.choose_chunk(missing.layer, counts, 0, chunk);
        let all = missing.missing.iter().zip(&chunk.places);
        all.filter(|(_, place)| **place == Place::Cpu).map(|(id, _)| *id).collect()
    }

    /// The experts of an event have arrived and were computed: what that took,
    /// and who stays.
    pub fn ended(&self, event: &mut Event<'_>, work: HostWork, tokens: usize) {
        let inner = &mut *self.lock();
        match tokens {
            1 => self.measured(inner, event, work, None),
            _ => self.measured_chunk(inner, event, work),
        }
        inner.settle(event);
    }

    fn measured_chunk(&self, inner: &mut Inner, event: &Event<'_>, work: HostWork) {
        let HostWork { experts: cpu, tokens: cpu_tokens, ns: cpu_ns, .. } = work;
        let (copies, copy_ns) = event.copied();
        if cpu + copies > 0 && self.misses == Misses::Auto {
            let told = ChunkOutcome { cpu, cpu_tokens, cpu_ns, copies, copy_ns };
            inner.split.measured_chunk(event.layer(), &told);
        }
    }

    /// `wall_ns`: of the layer, if the device was heard of before and behind it.
    fn measured(&self, inner: &mut Inner, event: &Event<'_>, work: HostWork, wall_ns: Option<u64>) {
        let HostWork { experts: cpu, ns, busy_ns, is_roused, .. } = work;
        let (layer, cpu_ns) = (event.layer(), if cpu > 0 { ns } else { 0 });
        let Inner { split, lately, began_ns, hidden_ns, early, chances, .. } = inner;
        let all_ns = event.began_ns().saturating_sub(*began_ns).min(LONGEST_NS);
        *began_ns = event.began_ns();
        *lately = [lately[0] + cpu_ns as f64, lately[1] + all_ns as f64].map(|ns| FADES * ns);
        if let Some(chance) = chances.get_mut(layer) {
            *chance += (f64::from(u8::from(cpu > 0)) - *chance) / CHANCE_MEMORY;
        }
        if cpu > 0 {
            early.measured(is_roused, cpu_ns, split.cpu_ns(layer, cpu));
        }
        let (copies, copy_ns) = event.copied();
        let (waits, wait_ns) = event.waited_for();
        if cpu + copies + waits == 0 || self.misses != Misses::Auto {
            return;
        }
        let hidden_ns = *hidden_ns;
        let known_ns = cpu_ns.max(copy_ns).max(wait_ns).max(hidden_ns);
        let wall_ns = wall_ns.unwrap_or(known_ns);
        let told = Outcome {
            cpu,
            cpu_ns,
            copies,
            delay_ns: 0,
            copy_ns,
            waits,
            wait_ns,
            busy_ns,
            hidden_ns,
            wall_ns,
        };
        split.measured(layer, &told);
    }

    /// What it chose in each layer, and why; `None`: the user chose.
    pub fn report(&self) -> Option<Vec<LayerSplit>> {
        (self.misses == Misses::Auto).then(|| self.lock().split.report())
    }

    /// Likely work of the host, and how often its threads were roused for it.
    pub fn roused(&self) -> (u64, u64) {
        self.lock().early.counts()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
