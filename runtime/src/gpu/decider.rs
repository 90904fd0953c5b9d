//! Who brings the experts that a layer needs and the device does not have:
//! the host computes them, or the link copies them.

use crate::model::Misses;
use crate::store::{Event, Missing};
use pregate_predictor::split::{
    Asked, Choice, Chunk, ChunkOutcome, LayerSplit, Miss, Options, Outcome, Place, Seed, Split,
};
use pregate_predictor::{ExpertId, Shape};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Decides for every layer of a model, and learns what it led to.
pub struct Decider {
    misses: Misses,
    /// Experts that a layer has room for, per layer of the model.
    slots: Vec<usize>,
    inner: Mutex<Inner>,
}

struct Inner {
    split: Split,
    /// Buffers.
    misses: Vec<Miss>,
    choice: Choice,
    counts: Vec<u32>,
    chunk: Chunk,
}

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
        };
        Self { misses, slots: slots.to_vec(), inner: Mutex::new(inner) }
    }

    /// A token enters the first layer.
    pub fn next_token(&self) {
        self.lock().split.next_token();
    }

    /// A token goes on to its next layer: what became of the event of the one
    /// that it has passed (see [`Decider::ended`]), and the layer whose router
    /// chose `experts`.
    pub fn next_layer(
        &self,
        passed: Option<(&mut Event<'_>, HostWork)>,
        routed: Option<(usize, &[u32])>,
    ) {
        let split = &mut self.lock().split;
        if let Some((event, work)) = passed {
            self.learn(split, event, work, 1);
        }
        if let Some((layer, experts)) = routed {
            split.routed(layer, experts);
        }
    }

    /// Of one token's missing experts, those that the host computes.
    /// `bounded`: no frame becomes free before the layer has ended.
    pub fn of_token(&self, missing: Missing<'_>, bounded: bool) -> Vec<ExpertId> {
        let Missing { layer, missing: ids, free, .. } = missing;
        let most = if bounded { free } else { ids.len() };
        match self.misses {
            Misses::Host => return ids.to_vec(),
            Misses::Copied => return ids[most.min(ids.len())..].to_vec(),
            Misses::Auto => {}
        }
        let Inner { split, misses, choice, .. } = &mut *self.lock();
        misses.clear();
        misses.extend(ids.iter().map(|id| Miss { expert: id.expert, remaining_ns: None }));
        let asked = Asked {
            layer,
            misses,
            resident: self.slots[layer],
            frames: most,
            queue_ns: 0,
            hidden_ns: 0,
        };
        split.choose(&asked, choice);
        let mut copies = 0;
        let is_left = |(id, place): (&ExpertId, &Place)| {
            copies += usize::from(*place != Place::Cpu);
            (*place == Place::Cpu || copies > most).then_some(*id)
        };
        ids.iter().zip(&choice.places).filter_map(is_left).collect()
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
        self.learn(&mut self.lock().split, event, work, tokens);
    }

    fn learn(&self, split: &mut Split, event: &mut Event<'_>, work: HostWork, tokens: usize) {
        self.measured(split, event, work, tokens);
        let layer = event.layer();
        for (id, admission) in event.settled() {
            split.admitted(layer, id.expert, admission);
        }
    }

    fn measured(&self, split: &mut Split, event: &Event<'_>, work: HostWork, tokens: usize) {
        let HostWork { experts: cpu, tokens: cpu_tokens, ns: cpu_ns } = work;
        let (copies, copy_ns) = event.copied();
        if cpu + copies == 0 || self.misses != Misses::Auto {
            return;
        }
        let layer = event.layer();
        if tokens > 1 {
            let told = ChunkOutcome { cpu, cpu_tokens, cpu_ns, copies, copy_ns };
            return split.measured_chunk(layer, &told);
        }
        let wall_ns = cpu_ns.max(copy_ns);
        let told = Outcome { cpu, cpu_ns, copies, copy_ns, wall_ns, ..Outcome::default() };
        split.measured(layer, &told);
    }

    /// What it chose in each layer, and why; `None`: the user chose.
    pub fn report(&self) -> Option<Vec<LayerSplit>> {
        (self.misses == Misses::Auto).then(|| self.lock().split.report())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
