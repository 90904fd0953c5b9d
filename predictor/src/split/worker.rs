//! What one of the two workers takes for the experts of one class.

use super::track::{Slope, Step, Track};
use crate::vocabulary::LayerShape;

/// Experts of one layer and token that are told apart; more cost the same
/// per expert.
pub const MOST: usize = 32;

/// Memory of estimates, in observations: how fast the machine may change,
/// and how slowly its structure does.
const LEVEL: f64 = 24.0;
const STRUCTURE: f64 = 64.0;

/// How far the price of a count is from the line's at most (logarithm): a
/// factor of four.
const COUNT_MOST: f64 = 1.4;
/// How much faster something may seem beside the other worker (logarithm).
const FASTER: f64 = 0.1;

/// A time in ns that estimates can live with.
pub fn sane(ns: f64) -> f64 {
    if ns.is_finite() { ns.clamp(1.0, 1e12) } else { 1e12 }
}

/// The time of `count` experts at once is the seed's line, times corrections:
/// the level (what the machine does lately), the count (experts that share
/// bandwidth, or do not fill the cores), the other worker beside it, exactly
/// this pair of counts, and the layer.
#[derive(Clone, Debug)]
pub struct Worker {
    start_ns: f64,
    each_ns: f64,
    level: Track,
    /// `[MOST + 1]`
    counts: Vec<Track>,
    beside: Slope,
    /// How much longer beside the other lately, beyond that.
    both: Track,
    /// `[MOST + 1][MOST + 1]`: own experts, the other's.
    pairs: Vec<Track>,
    /// `[layers of the class]`
    layers: Vec<Track>,
}

/// What is known of the other worker at the same time.
#[derive(Clone, Copy, Debug)]
pub struct Other {
    /// Its experts.
    pub count: usize,
    /// The share of our time in which it is busy.
    pub share: f64,
}

impl Worker {
    /// `beside`: factor of the time while the other is always busy.
    pub fn new(start_ns: f64, ns_per_byte: f64, beside: f64, of: &LayerShape, n: usize) -> Self {
        let rate = if ns_per_byte.is_finite() { ns_per_byte.clamp(1e-6, 1e6) } else { 1.0 };
        let beside = if beside.is_finite() { beside.clamp(1.0, 100.0) } else { 1.0 };
        Self {
            start_ns: if start_ns.is_finite() { start_ns.clamp(0.0, 1e9) } else { 0.0 },
            each_ns: sane(rate * of.expert_bytes as f64),
            level: Track::default(),
            counts: vec![Track::default(); MOST + 1],
            beside: Slope::new(beside.ln()),
            both: Track::default(),
            pairs: vec![Track::default(); (MOST + 1) * (MOST + 1)],
            layers: vec![Track::default(); n],
        }
    }

    /// Times that were told, doubted ones included.
    pub fn seen(&self) -> u64 {
        self.level.seen().saturating_add(self.both.seen())
    }

    fn line(&self, count: usize) -> f64 {
        sane(self.start_ns + self.each_ns * count as f64)
    }

    /// Of an untried count, what the nearest tried one deviates by.
    fn of_count(&self, count: usize) -> f64 {
        let tried = |at: usize| self.counts.get(at).filter(|track| track.seen() > 0);
        let near = (0..=MOST).find_map(|by| match (tried(count + by), count.checked_sub(by)) {
            (Some(track), _) => Some(track.mean()),
            (None, Some(below)) => tried(below).map(Track::mean),
            (None, None) => None,
        });
        near.unwrap_or(0.0)
    }

    /// ns of `count` experts in `layer` (of the class), nothing beside them.
    pub fn alone(&self, layer: usize, count: usize) -> f64 {
        if count == 0 {
            return 0.0;
        }
        let layer = self.layers.get(layer).map_or(0.0, Track::mean);
        let count_or_most = count.min(MOST);
        sane(self.line(count) * (self.level.mean() + self.of_count(count_or_most) + layer).exp())
    }

    /// How many times longer anything takes while the other is always busy,
    /// at least 1.
    pub fn slower(&self) -> f64 {
        (self.beside.at(1.0) + self.both.mean()).exp().max(1.0)
    }

    fn pair(&self, count: usize, other: usize) -> usize {
        count.min(MOST) * (MOST + 1) + other.min(MOST)
    }

    /// ns of `count` experts in `layer` beside the other worker.
    pub fn time(&self, layer: usize, count: usize, other: Other) -> f64 {
        let pair = self.pairs[self.pair(count, other.count)].mean();
        let both = if other.share > 0.0 { self.both.mean() } else { 0.0 };
        sane(self.alone(layer, count) * (self.beside.at(other.share) + both + pair).exp())
    }

    /// Has so many experts a price that was measured alone?
    pub fn is_known(&self, count: usize) -> bool {
        self.counts[count.min(MOST)].weight() >= 2.0
    }

    /// How often exactly this pair of counts was seen, lately.
    pub fn known(&self, count: usize, other: usize) -> f64 {
        self.pairs[self.pair(count, other)].weight()
    }

    /// `count` experts took `ns`. `eager`: the worker is left, and a time
    /// that is better than expected is believed at once.
    pub fn learn(
        &mut self,
        layer: usize,
        count: usize,
        other: Other,
        ns: f64,
        eager: bool,
    ) -> Step {
        let logarithm = sane(ns).ln();
        let error = |this: &Self| logarithm - this.time(layer, count, other).ln();
        let (at, pair) = (count.min(MOST), self.pair(count, other.count));
        if self.counts[at].seen() == 0 {
            // From here on it answers for itself.
            let inherited = self.of_count(at);
            self.counts[at].begin_at(inherited);
        }
        let first = error(self);
        let is_beside = other.share > 0.0;
        // A surprise beside the other worker may be the two of them, or the
        // machine; the next measurement alone tells.
        // A count that was never seen alone may have a price of its own, in
        // bounds: one expert does not fill the cores.
        if is_beside && self.counts[at].weight() < 2.0 && first.abs() <= COUNT_MOST {
            self.counts[at].note(first, 0.25, STRUCTURE, true);
            return Step::Followed;
        }
        let is_both = is_beside && !self.level.doubts_like(first);
        let step = match is_both {
            // What has not been tried beside the other is believed at once: a
            // second look costs less than a second disaster.
            true => {
                let eager = if first < 0.0 { eager } else { self.both.weight() == 0.0 };
                self.both.note(first, 1.0, LEVEL, eager)
            }
            false => self.note_level(first, eager),
        };
        if is_beside {
            self.settle(other.share);
        }
        match step {
            Step::Rose | Step::Fell | Step::RoseBeside => {
                self.counts.iter_mut().for_each(Track::trust);
                return if is_both && step == Step::Rose { Step::RoseBeside } else { step };
            }
            Step::Doubted if is_both => return step,
            Step::Doubted => {
                let left = error(self);
                return self.counts[at].note(left, 0.25, STRUCTURE, false);
            }
            Step::Followed => {}
        }
        self.counts[at].trust();
        if is_beside {
            let left = error(self);
            self.beside.note(left, other.share, STRUCTURE);
            let left = error(self);
            self.level.follow(left, 1.0, LEVEL);
        }
        let left = error(self);
        self.counts[at].follow(left, 0.25, STRUCTURE);
        let left = error(self);
        self.pairs[pair].follow(left, 2.0, STRUCTURE);
        let left = error(self);
        if let Some(track) = self.layers.get_mut(layer) {
            track.follow(left, 8.0, STRUCTURE);
        }
        step
    }

    /// Beside another nothing is much faster than alone: what seems so is the
    /// level's.
    fn settle(&mut self, share: f64) {
        let faster = self.beside.at(share) + self.both.mean() + FASTER;
        if faster < 0.0 {
            self.both.shift(-faster);
            self.level.shift(faster);
        }
    }

    /// A time alone. If the level jumps, what seemed to be the other worker's
    /// doing before was the machine's.
    fn note_level(&mut self, error: f64, eager: bool) -> Step {
        let before = self.level.mean();
        let step = self.level.note(error, 1.0, LEVEL, eager && error < 0.0);
        let moved = self.level.mean() - before;
        let both = self.both.mean();
        if matches!(step, Step::Rose | Step::Fell) && both * moved > 0.0 {
            self.both.shift(-moved.clamp(-both.abs(), both.abs()));
        }
        step
    }
}
