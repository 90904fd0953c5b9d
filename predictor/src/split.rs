//! Who brings the experts that a decoded token misses: the CPU computes them,
//! or the link copies them to the GPU, or some of both.
//!
//! [`Split`] is told what each worker took and how long the layer took from
//! the decision to the last row, and chooses the way of sharing that is
//! expected to end first. It has no clock, no thread and no chance: what it
//! answers follows from what it was told.
//!
//! - **Prices.** A worker's time for `n` experts is a line (seeded by the
//!   probes at start) times corrections that are learned: its level lately,
//!   the count, the other worker beside it on the same memory, the pair of
//!   counts, the layer (`split/worker.rs`). Layers of one shape learn
//!   together.
//! - **A copy stays.** What it saves later, less what the expert that leaves
//!   for it would have, is learned from the routing and counted
//!   (`split/reuse.rs`). It needs no copies to be learned.
//! - **Wall time decides.** What a layer took beyond its workers' own times
//!   is learned for each way; so a way that loses in wall time is left,
//!   whatever the prices say. A profile alone has chosen ways ten and more
//!   times too slow in other engines (issues #436 and #151 of FreeToken).
//! - **Outliers and drift.** A measurement that is off by more than a factor
//!   of 1.5 moves an estimate by a clipped step; three in a row on one side
//!   (two where only the seed speaks) are a changed machine, and the estimate
//!   jumps to their median. One that agrees with what was believed before
//!   undoes a jump (`split/track.rs`).
//! - **First looks** (`split/trials.rs`): each shape starts with two
//!   measurements of each worker alone, with a single miss if that is to be
//!   had soon: beside the other it may be slow for the other's sake. A
//!   disaster (four times the best) is left at its second measurement.
//! - **Second looks and exploring** ([`Options`]): what was not used for
//!   long, or was left, is measured again, and ways that may be better than
//!   the best are tried, while what either is expected to cost stays below
//!   `explore_share` of the layers' time, plus `first_explored`. After every
//!   disappointment the next look at a disaster waits three times as long.
//!
//! # Calls
//! ```text
//! next_token()                      a token enters the first layer
//! for each MoE layer, when the host learns its routing:
//!     routed(layer, experts)        all of them; also where nothing is missing
//!     if some are missing:
//!         choose(&Asked { .. }, &mut choice)
//!             Cpu:  compute it, write its row, say so to the device
//!             Link: order its copy
//!             Wait: its copy is under way; promote it
//!         keep(&Spare { .. }, &mut keeps)       what the CPU computes and the
//!                                               idle link brings for later
//!         ...
//!         measured(layer, &Outcome { .. })      when the last row is there
//!         admitted(layer, expert, &admission)   of each copied expert, when
//!                                               the cache has decided
//! ```
//! [`Split::measured`] may come after later layers' choices. What a caller
//! cannot measure it leaves 0. A copy ordered ahead of need is told by
//! [`Split::copied`] when it has landed and by [`Split::admitted`]. For a
//! prompt: [`Split::choose_chunk`], then [`Split::measured_chunk`].
//!
//! After the first tokens nothing is allocated.

use crate::cache::Admission;
use crate::vocabulary::{LayerShape, Shape};
pub use chunk::{Chunk, ChunkOutcome};
use class::Class;
pub use early::Early;
pub use keep::{Keep, Spare};
pub use lapse::Lapse;
pub use reason::Reason;
pub use report::LayerSplit;
use reuse::Marks;
pub use terms::{Asked, Choice, Miss, Options, Outcome, Place, Seed};
use worker::MOST;

mod chunk;
mod class;
mod early;
mod keep;
mod lapse;
mod reason;
mod report;
mod reuse;
mod terms;
mod track;
mod trials;
mod way;
mod worker;

/// What a layer was given so far.
#[derive(Clone, Copy, Debug, Default)]
struct Given {
    /// Its class, and its place among the layers of the class.
    class: usize,
    at: usize,
    decisions: u64,
    misses: u64,
    cpu: u64,
    waits: u64,
    /// Computed by the CPU, and copied for later.
    kept: u64,
    wall_ns: u64,
    measured: u64,
    reason: Reason,
}

/// The controller of one GPU.
pub struct Split {
    options: Options,
    classes: Vec<Class>,
    /// `[layers of the model]`; `None` is a dense layer.
    layers: Vec<Option<Given>>,
    /// `[layers of the model]`
    marks: Vec<Marks>,
    token: u64,
    sorted: Sorted,
}

/// The misses of a decision by where they may go; scratch.
#[derive(Default)]
struct Sorted {
    /// Ranks that a copy would have to be ordered for, and what it gains.
    order: Vec<(f64, usize)>,
    /// Ranks with a copy under way, and when it lands.
    waits: Vec<(f64, usize)>,
    gains: Vec<f64>,
    waits_ns: Vec<f64>,
    /// Of what the CPU computes.
    kept: Vec<usize>,
}

impl Sorted {
    fn sort(&mut self, misses: &[Miss], gain: impl Fn(u32) -> f64) {
        self.order.clear();
        self.waits.clear();
        for (rank, miss) in misses.iter().enumerate() {
            match miss.remaining_ns {
                Some(ns) => self.waits.push((worker::sane(ns as f64), rank)),
                None => self.order.push((gain(miss.expert), rank)),
            }
        }
        // Equal ones in rank order: a higher weight returns sooner.
        self.order.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        self.waits.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        self.gains.clear();
        self.gains.extend(self.order.iter().map(|one| one.0));
        self.waits_ns.clear();
        self.waits_ns.extend(self.waits.iter().map(|one| one.0));
    }
}

impl Split {
    pub fn new(shape: &Shape, seed: &Seed, options: Options) -> Self {
        let mut shapes: Vec<(LayerShape, usize)> = Vec::new();
        let mut layers = vec![None; shape.layers.len()];
        for (index, layer) in shape.moe() {
            let alike = |one: &LayerShape| {
                // How soon experts are used again hangs on how many there are.
                let sizes = |shape: &LayerShape| (shape.experts, shape.top_k, shape.expert_bytes);
                (one.class, sizes(one)) == (layer.class, sizes(layer))
            };
            let class = shapes.iter().position(|(one, _)| alike(one)).unwrap_or_else(|| {
                shapes.push((*layer, 0));
                shapes.len() - 1
            });
            layers[index] = Some(Given { class, at: shapes[class].1, ..Given::default() });
            shapes[class].1 += 1;
        }
        let class =
            |(shape, layers): &(LayerShape, usize)| Class::new(shape, *layers, seed, &options);
        let marks = |layer: &Option<LayerShape>| Marks::new(layer.map_or(0, |layer| layer.experts));
        Self {
            classes: shapes.iter().map(class).collect(),
            options,
            marks: shape.layers.iter().map(marks).collect(),
            layers,
            token: 0,
            sorted: Sorted { kept: Vec::with_capacity(MOST), ..Sorted::default() },
        }
    }

    /// A token enters the first layer.
    pub fn next_token(&mut self) {
        self.token += 1;
        self.classes.iter_mut().for_each(|class| class.reuse.refresh(self.token));
    }

    /// The router of `layer` chose `experts`; before [`Split::choose`], and
    /// also where nothing is missing.
    pub fn routed(&mut self, layer: usize, experts: &[u32]) {
        let Some(class) = self.given(layer).map(|given| given.class) else { return };
        let (marks, token) = (&mut self.marks[layer], self.token);
        self.classes[class].reuse.routed(marks, token, layer, experts);
    }

    /// Which of the experts that the CPU computes, as [`Split::choose`] has
    /// just decided, are worth a copy that nobody waits for: best first into
    /// `out`, at most [`Spare::frames`]. Nothing beside a measurement, which
    /// is to be of one worker alone.
    pub fn keep(&mut self, spare: &Spare<'_>, out: &mut Vec<Keep>) {
        out.clear();
        let Some(given) = self.given(spare.layer).map(|given| *given) else { return };
        if matches!(given.reason, Reason::Trial { .. } | Reason::Retry { .. }) {
            return;
        }
        let Self { sorted, classes, marks, .. } = self;
        let (class, marks) = (&mut classes[given.class], &marks[spare.layer]);
        sorted.gains.clear();
        let computed = &spare.computed[..spare.computed.len().min(MOST)];
        sorted.gains.extend(computed.iter().map(|&expert| class.reuse.gain(marks, expert)));
        class.keep(given.at, spare, &sorted.gains, &mut sorted.kept);
        let saves_ns = class.miss_ns(given.at) as u64;
        let kept = sorted.kept.iter();
        out.extend(kept.map(|&rank| Keep { expert: computed[rank], saves_ns }));
        if let Some(given) = self.given(spare.layer) {
            given.kept += out.len() as u64;
        }
    }

    /// What the cache did with an expert of `layer` that a copy has brought.
    pub fn admitted(&mut self, layer: usize, expert: u32, got: &Admission) {
        let Some(class) = self.given(layer).map(|given| given.class) else { return };
        let reuse = &mut self.classes[class].reuse;
        reuse.admitted(&mut self.marks[layer], expert, got);
        if let Admission::Replaced(victim) = got
            && let Some(marks) = self.marks.get_mut(victim.layer())
        {
            reuse.evicted(marks, self.token, victim.expert);
        }
    }

    /// The machine is another one (woke up, has other cores): what was left
    /// may be tried again.
    pub fn changed(&mut self) {
        self.classes.iter_mut().for_each(Class::changed);
    }

    fn given(&mut self, layer: usize) -> Option<&mut Given> {
        self.layers.get_mut(layer)?.as_mut()
    }

    /// Shares the misses of a layer. A layer that has no experts, and misses
    /// beyond 32, go to the CPU.
    pub fn choose(&mut self, asked: &Asked<'_>, out: &mut Choice) {
        out.places.clear();
        out.places.resize(asked.misses.len(), Place::Cpu);
        (out.reason, out.expected_ns) = (Reason::Nothing, 0);
        let misses = &asked.misses[..asked.misses.len().min(MOST)];
        let Some(given) = self.given(asked.layer).map(|given| *given) else { return };
        if misses.is_empty() {
            return;
        }
        let Self { sorted, classes, marks, token, .. } = self;
        let (class, marks) = (&mut classes[given.class], &mut marks[asked.layer]);
        sorted.sort(misses, |expert| class.reuse.gain(marks, expert));
        let first = Asked { misses, ..*asked };
        let lists = (&sorted.gains[..], &sorted.waits_ns[..]);
        let (chosen, pick) = class.choose((given.at, *token), &first, lists, &self.options);
        for &(_, rank) in &sorted.order[..chosen.way.copies] {
            out.places[rank] = Place::Link;
        }
        for &(_, rank) in &sorted.waits[..chosen.way.waits] {
            out.places[rank] = Place::Wait;
        }
        for miss in misses {
            class.reuse.missed(marks, *token, miss.expert, asked.resident);
        }
        out.reason = reason::of(class, given.at, &chosen, pick);
        out.expected_ns = chosen.wall_ns as u64;
        let reason = out.reason;
        if let Some(given) = self.given(asked.layer) {
            given.decisions += 1;
            given.misses += asked.misses.len() as u64;
            given.cpu += out.count(Place::Cpu) as u64;
            given.waits += out.count(Place::Wait) as u64;
            given.reason = reason;
        }
    }

    /// Tells what a decision for `layer` led to; also one that was changed on
    /// its way, as when a copy failed and the CPU stood in.
    pub fn measured(&mut self, layer: usize, told: &Outcome) {
        let told = &told.bounded();
        let Some(given) = self.given(layer) else { return };
        given.measured += 1;
        given.wall_ns = given.wall_ns.saturating_add(told.wall_ns);
        let (class, at) = (given.class, given.at);
        self.classes[class].learn(at, told, &self.options);
    }

    /// A copy that nobody waited for, ordered ahead of need, was `ns` on the
    /// link: the link's price without trying it.
    pub fn copied(&mut self, layer: usize, ns: u64) {
        let Some(&mut Given { class, at, .. }) = self.given(layer) else { return };
        self.classes[class].copied(at, ns);
    }

    /// What the CPU takes for `count` experts of `layer`, nothing beside them,
    /// in ns; 0 for a layer without experts.
    pub fn cpu_ns(&self, layer: usize, count: usize) -> f64 {
        let given = self.layers.get(layer).and_then(Option::as_ref);
        given.map_or(0.0, |given| self.classes[given.class].cpu.alone(given.at, count))
    }

    /// What first looks, second looks and exploring were expected to cost,
    /// and what all layers with misses took, in ns. See [`Options`] for what
    /// bounds the first.
    pub fn explored_ns(&self) -> (u64, u64) {
        let sum = |of: fn(&Class) -> f64| self.classes.iter().map(of).sum::<f64>() as u64;
        (sum(|class| class.explored_ns), sum(|class| class.wall_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_learn_from_each_other_where_they_are_alike() {
        let layer =
            |experts, top_k| Some(LayerShape { experts, top_k, expert_bytes: 1000, class: 0 });
        let layers = vec![layer(8, 2), None, layer(8, 4), layer(64, 2), layer(8, 2)];
        let seed = Seed {
            cpu_start_ns: 1.0,
            cpu_ns_per_byte: 1.0,
            link_start_ns: 1.0,
            link_ns_per_byte: 1.0,
            cpu_beside_link: 1.0,
            link_beside_cpu: 1.0,
        };
        let split = Split::new(&Shape { layers }, &seed, Options::default());
        let classes: Vec<_> = split
            .layers
            .iter()
            .map(|given| given.as_ref().map(|one| (one.class, one.at)))
            .collect();
        let wanted = [Some((0, 0)), None, Some((1, 0)), Some((2, 0)), Some((0, 1))];
        assert_eq!(classes, wanted);
    }
}
