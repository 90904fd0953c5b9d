//! Who brings the experts that a layer needs and the device does not have:
//! the host computes them, or the link copies them.
//!
//! The runtime and replay ask this same code, event by event, and tell it what
//! became of each; neither shares misses in any other way.
//!
//! ```text
//! next_token()                          a token enters the first layer
//! for each MoE layer, when its router was heard:
//!     passed(..), admitted(..)          what became of the layer before
//!     routed(layer, experts)
//!     of_token(missing) -> left         what the host computes
//!     keeps(layer, left, room)          and what is copied of it for later
//! for each MoE layer of a chunk: of_chunk(missing), ended(..), admitted(..)
//! ```

use crate::cache::Admission;
use crate::drive::Missing;
use crate::split::{
    Asked, Choice, Chunk, ChunkOutcome, Early, Keep, Lapse, LayerSplit, Miss, Options, Outcome,
    Place, Seed, Spare, Split,
};
use crate::vocabulary::{ExpertId, Shape};

/// What is left of a time in which the host worked or did not, an event later.
const FADES: f64 = 0.99;
/// Tokens that the chance of a layer's work remembers.
const CHANCE_MEMORY: f64 = 16.0;
/// Between two events of a token; more is a user's time.
const LONGEST_NS: u64 = 100_000_000;

/// Who brings what a device misses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Bring {
    /// [`Split`] decides, layer by layer.
    #[default]
    Auto,
    /// The host computes all of it.
    Host,
    /// The link copies as much as there are frames for.
    Link,
}

/// Decides for every layer of a model, and learns what it led to.
pub struct Decider {
    bring: Bring,
    /// Experts that a layer has room for, per layer of the model.
    slots: Vec<usize>,
    shape: Shape,
    split: Split,
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
    /// Scratch.
    misses: Vec<Miss>,
    choice: Choice,
    counts: Vec<u32>,
    chunk: Chunk,
    computed: Vec<u32>,
    keeps: Vec<Keep>,
}

/// What the host did for a layer.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostWork {
    pub experts: usize,
    /// Of all these experts together.
    pub tokens: usize,
    /// From the decision to the last row, less what it waited for reads from
    /// disk. Prices are what comes behind a read: copies wait for it as well
    /// ([`Ended::copied`] counts from its end), so it weighs on neither side.
    pub ns: u64,
    /// Of `ns`, in which the link moved anything.
    pub busy_ns: u64,
    /// Its threads were roused before.
    pub is_roused: bool,
    /// When all that the device waited for was answered, on the clock of
    /// [`Decider::passed`]; `None`: it waited for nothing.
    pub told_ns: Option<u64>,
}

/// What became of an event's experts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ended {
    pub layer: usize,
    pub began_ns: u64,
    pub work: HostWork,
    /// Fills that it asked for, and how long the link had at least one; and
    /// what the first of them waited before, for the link to be free.
    pub copied: (usize, u64),
    pub delay_ns: u64,
    /// Fills that were on their way before, and ns from the event's beginning
    /// to the last of them.
    pub waited_for: (usize, u64),
}

impl Decider {
    /// `slots` per layer of the model.
    pub fn new(bring: Bring, shape: &Shape, slots: &[usize], seed: &Seed) -> Self {
        Self {
            bring,
            slots: slots.to_vec(),
            shape: shape.clone(),
            split: Split::new(shape, seed, Options::default()),
            lately: [0.0; 2],
            began_ns: 0,
            lapse: Lapse::default(),
            hidden_ns: 0,
            early: Early::default(),
            chances: vec![0.0; shape.layers.len()],
            misses: Vec::new(),
            choice: Choice::default(),
            counts: Vec::new(),
            chunk: Chunk::default(),
            computed: Vec::new(),
            keeps: Vec::new(),
        }
    }

    /// Prices from probes: everything begins anew.
    pub fn seed(&mut self, seed: &Seed) {
        self.split = Split::new(&self.shape, seed, Options::default());
    }

    /// A token enters the first layer.
    pub fn next_token(&mut self) {
        self.lapse.end();
        self.split.next_token();
    }

    /// Are the host's threads to be roused for `layer`, which comes next? It
    /// misses something with this chance, as forecasts say; they may say
    /// nothing.
    pub fn rouses(&mut self, layer: usize, chance: Option<f64>) -> bool {
        // Of the misses, the host has its usual share.
        let usual = self.chances.get(layer).copied().unwrap_or(0.0);
        let chance = if self.bring == Bring::Link { 0.0 } else { chance.unwrap_or(usual) };
        self.early.rouses(chance)
    }

    /// A token goes on to its next layer, or has ended: what became of the
    /// event of the one that it has passed, and when the next one was heard,
    /// on any clock; `None`: it has ended, or its times say nothing.
    pub fn passed(&mut self, event: Option<&Ended>, heard_ns: Option<u64>) {
        if let Some(told_ns) = event.and_then(|event| event.work.told_ns) {
            self.lapse.told(told_ns);
        }
        let wall_ns = heard_ns.and_then(|now_ns| self.lapse.heard(now_ns));
        if let Some(event) = event {
            self.measured(event, wall_ns);
        }
    }

    /// What the cache did with experts that were copied.
    pub fn admitted(&mut self, all: &[(ExpertId, Admission)]) {
        for (id, admission) in all {
            self.split.admitted(id.layer(), id.expert, admission);
        }
    }

    /// The router of `layer` chose `experts` for a token.
    pub fn routed(&mut self, layer: usize, experts: &[u32]) {
        self.split.routed(layer, experts);
    }

    /// Of one token's missing experts and those on their way, those that the
    /// host computes. `bounded`: no frame becomes free before the layer has
    /// ended.
    pub fn of_token(&mut self, missing: &Missing<'_>, bounded: bool) -> Vec<ExpertId> {
        let &Missing { layer, missing: ids, in_flight, in_flight_ns, free, queue_ns, asked } =
            missing;
        let most = if bounded { free } else { ids.len() };
        match self.bring {
            Bring::Host => return ids.to_vec(),
            Bring::Link => return ids[most.min(ids.len())..].to_vec(),
            Bring::Auto => {}
        }
        let Self { split, misses, choice, lapse, hidden_ns, .. } = self;
        *hidden_ns = lapse.hidden_ns(1.0 - ids.len() as f64 / asked.max(1) as f64);
        misses.clear();
        misses.extend(ids.iter().map(|id| Miss { expert: id.expert, remaining_ns: None }));
        // What takes no one knows how long is waited for.
        let under_way = in_flight.iter().zip(in_flight_ns);
        let under_way = || under_way.clone().filter(|(_, ns)| ns.is_some());
        misses.extend(
            under_way().map(|(id, &remaining_ns)| Miss { expert: id.expert, remaining_ns }),
        );
        let (resident, hidden_ns) = (self.slots[layer], *hidden_ns);
        let asked = Asked { layer, misses, resident, frames: most, queue_ns, hidden_ns };
        split.choose(&asked, choice);
        let mut copies = 0;
        let is_left = |(id, place): (&ExpertId, &Place)| {
            copies += usize::from(*place == Place::Link);
            (*place == Place::Cpu || *place == Place::Link && copies > most).then_some(*id)
        };
        let all = ids.iter().chain(under_way().map(|(id, _)| id));
        all.zip(&choice.places).filter_map(is_left).collect()
    }

    /// Of what the host computes in `layer`, `left` as [`Decider::of_token`]
    /// has just said, what is worth a copy over an idle link, at most `room`;
    /// with what the next use of each saves, in ns.
    pub fn keeps<'d>(
        &'d mut self,
        layer: usize,
        left: &[ExpertId],
        room: usize,
    ) -> impl Iterator<Item = (ExpertId, u64)> + use<'d> {
        let Self { split, computed, keeps, lately, .. } = self;
        keeps.clear();
        if self.bring == Bring::Auto && !left.is_empty() {
            computed.clear();
            computed.extend(left.iter().map(|id| id.expert));
            let cpu_share = lately[0] / lately[1].max(1.0);
            split.keep(&Spare { layer, computed, frames: room, cpu_share }, keeps);
        }
        keeps.iter().map(move |keep| (ExpertId::new(layer, keep.expert), keep.saves_ns))
    }

    /// Of the missing experts of several tokens, those that the host computes.
    /// `tokens` answers for an expert.
    pub fn of_chunk(
        &mut self,
        missing: &Missing<'_>,
        tokens: impl Fn(u32) -> u32,
    ) -> Vec<ExpertId> {
        match self.bring {
            Bring::Host => return missing.missing.to_vec(),
            Bring::Link => return Vec::new(),
            Bring::Auto => {}
        }
        let Self { split, counts, chunk, .. } = self;
        counts.clear();
        counts.extend(missing.missing.iter().map(|id| tokens(id.expert)));
        split.choose_chunk(missing.layer, counts, 0, chunk);
        let all = missing.missing.iter().zip(&chunk.places);
        all.filter(|(_, place)| **place == Place::Cpu).map(|(id, _)| *id).collect()
    }

    /// The experts of an event of a pass over `tokens` have arrived and were
    /// computed, by a caller who did not hear of layers one by one.
    pub fn ended(&mut self, event: &Ended, tokens: usize) {
        match tokens {
            1 => self.measured(event, None),
            _ => self.measured_chunk(event),
        }
    }

    fn measured_chunk(&mut self, event: &Ended) {
        let HostWork { experts: cpu, tokens: cpu_tokens, ns: cpu_ns, .. } = event.work;
        let (copies, copy_ns) = event.copied;
        if cpu + copies > 0 && self.bring == Bring::Auto {
            let told = ChunkOutcome { cpu, cpu_tokens, cpu_ns, copies, copy_ns };
            self.split.measured_chunk(event.layer, &told);
        }
    }

    /// `wall_ns`: of the layer, if the device was heard of before and behind it.
    fn measured(&mut self, event: &Ended, wall_ns: Option<u64>) {
        let &Ended { layer, began_ns, work, copied, delay_ns, waited_for } = event;
        let HostWork { experts: cpu, ns, busy_ns, is_roused, .. } = work;
        let cpu_ns = if cpu > 0 { ns } else { 0 };
        let all_ns = began_ns.saturating_sub(self.began_ns).min(LONGEST_NS);
        self.began_ns = began_ns;
        let [worked, all] = self.lately;
        self.lately = [worked + cpu_ns as f64, all + all_ns as f64].map(|ns| FADES * ns);
        if let Some(chance) = self.chances.get_mut(layer) {
            *chance += (f64::from(u8::from(cpu > 0)) - *chance) / CHANCE_MEMORY;
        }
        if cpu > 0 {
            self.early.measured(is_roused, cpu_ns, self.split.cpu_ns(layer, cpu));
        }
        let ((copies, copy_ns), (waits, wait_ns)) = (copied, waited_for);
        if cpu + copies + waits == 0 || self.bring != Bring::Auto {
            return;
        }
        let hidden_ns = self.hidden_ns;
        let copied_ns = if copies > 0 { delay_ns + copy_ns } else { 0 };
        let known_ns = cpu_ns.max(copied_ns).max(wait_ns).max(hidden_ns);
        let wall_ns = wall_ns.unwrap_or(known_ns);
        let told = Outcome {
            cpu,
            cpu_ns,
            copies,
            delay_ns,
            copy_ns,
            waits,
            wait_ns,
            busy_ns,
            hidden_ns,
            wall_ns,
        };
        self.split.measured(layer, &told);
    }

    /// What it chose in each layer, and why; `None`: the user chose.
    pub fn report(&self) -> Option<Vec<LayerSplit>> {
        (self.bring == Bring::Auto).then(|| self.split.report())
    }

    /// Likely work of the host, and how often its threads were roused for it.
    pub fn roused(&self) -> (u64, u64) {
        self.early.counts()
    }
}
