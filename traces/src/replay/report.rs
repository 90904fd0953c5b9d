//! What a replay found.

use serde::Serialize;
use std::collections::BTreeMap;

/// Experts asked for, by where they were, and what became of the slots.
///
/// An expert that several tokens of a chunk share counts once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// `hits + early + in_flight + misses`.
    pub accesses: u64,
    /// In a slot.
    pub hits: u64,
    /// Read ahead, and there.
    pub early: u64,
    /// A read-ahead was bringing it.
    pub in_flight: u64,
    /// Nowhere.
    pub misses: u64,
    /// Of those, computed by the CPU without being copied to the GPU.
    pub left: u64,
    /// That left a slot for another.
    pub evictions: u64,
    /// That arrived and did not stay.
    pub bypassed: u64,
    /// Moved for misses, and moved ahead of need, wanted or not.
    pub bytes_demand: u64,
    pub bytes_ahead: u64,
    /// Of both, given up before any use.
    pub bytes_wasted: u64,
}

impl Counts {
    pub fn hit_ratio(&self) -> f64 {
        self.hits as f64 / self.accesses.max(1) as f64
    }

    pub fn bytes(&self) -> u64 {
        self.bytes_demand + self.bytes_ahead
    }
}

/// Time in which a token waited and nothing was computed, by what it waited
/// for, in ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stall {
    /// Its own reads, from disk, or over the link.
    pub demand_ns: u64,
    /// Its reads, which began later for what was being read ahead.
    pub behind_read_ahead_ns: u64,
    /// Read-aheads of what it needs that were not there in time.
    pub late_read_ahead_ns: u64,
    /// The CPU, which computes some misses beside the GPU.
    pub cpu_ns: u64,
    /// Host and GPU telling each other.
    pub visits_ns: u64,
}

/// The parts of [`Stall`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Cause {
    Demand,
    BehindReadAhead,
    LateReadAhead,
    Cpu,
    Visits,
}

impl Stall {
    pub fn total_ns(&self) -> u64 {
        self.causes().iter().map(|(_, ns)| ns).sum()
    }

    pub fn causes(&self) -> [(Cause, u64); 5] {
        [
            (Cause::Demand, self.demand_ns),
            (Cause::BehindReadAhead, self.behind_read_ahead_ns),
            (Cause::LateReadAhead, self.late_read_ahead_ns),
            (Cause::Cpu, self.cpu_ns),
            (Cause::Visits, self.visits_ns),
        ]
    }
}

/// Times of many passes, in ns. Ranks are exact to a twentieth of a percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    pub mean_ns: f64,
    pub median_ns: u64,
    pub p95_ns: u64,
}

/// Collects times in memory that does not grow with their number.
#[derive(Clone, Debug, Default)]
pub struct Times {
    count: u64,
    sum_ns: f64,
    /// By the leading twelve bits of the times.
    counts: BTreeMap<u64, u64>,
}

/// Of a double's bits, those that a time's grade leaves out: all but the
/// exponent and eleven of the fraction.
const DROPPED_BITS: u32 = 52 - 11;

impl Times {
    pub fn add(&mut self, ns: u64) {
        self.count += 1;
        self.sum_ns += ns as f64;
        *self.counts.entry((ns as f64).to_bits() >> DROPPED_BITS).or_default() += 1;
    }

    /// `None`: there are no times.
    pub fn spread(&self) -> Option<Spread> {
        let mean_ns = self.sum_ns / self.count as f64;
        let (median_ns, p95_ns) = (self.rank(0.5)?, self.rank(0.95)?);
        Some(Spread { mean_ns, median_ns, p95_ns })
    }

    /// The smallest that so large a share does not exceed.
    fn rank(&self, share: f64) -> Option<u64> {
        let rank = ((share * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        self.counts.iter().find_map(|(grade, count)| {
            seen += count;
            (seen >= rank).then(|| f64::from_bits(grade << DROPPED_BITS) as u64)
        })
    }
}

/// All passes of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PhaseReport {
    pub passes: u64,
    pub tokens: u64,
    pub counts: Counts,
    pub stall: Stall,
    /// Of all passes together.
    pub time_ns: u64,
}

/// One layer of the model, decode and prompts together; zero for dense ones.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LayerReport {
    pub slots: usize,
    pub counts: Counts,
    pub stall: Stall,
    /// `[experts]`, for a heat map: how often each was asked for, and was in
    /// a slot then.
    pub expert_accesses: Vec<u32>,
    pub expert_hits: Vec<u32>,
}

/// Hits of caches with the same slots that read an expert when it is asked
/// for; `None` where they were not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bracket {
    /// 0 by definition.
    pub no_cache_hits: u64,
    pub lru_hits: u64,
    pub this_hits: u64,
    /// Of Belady's rule, each layer with its own slots, into which every
    /// missing expert comes: what the golden counts are of.
    pub belady_hits: u64,
    /// Of the best that any policy could do that knows the future, in the
    /// scope of this one's (layers that share their slots, or each its own),
    /// and without room for experts that are used later than all others.
    pub best_hits: u64,
}

impl Bracket {
    /// The share of the way from LRU to the best; `None` where they tie.
    pub fn closed(&self) -> Option<f64> {
        let gap = self.best_hits as f64 - self.lru_hits as f64;
        (gap > 0.0).then(|| (self.this_hits as f64 - self.lru_hits as f64) / gap)
    }
}

/// What moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Wire {
    Vram,
    Link,
    Cpu,
    Disk,
}

/// What the counted hits allow at best: every wire busy from the first
/// nanosecond to the last with the bytes that it had to move in decode.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bound {
    pub tok_s: f64,
    /// The wire that is busy longest.
    pub wire: Wire,
    /// ns per token that each is busy, in the order of [`Wire`].
    pub busy_ns: [f64; 4],
}

/// What one trace, machine and setting led to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub trace: String,
    pub model: String,
    /// What a synthetic trace was made after; `None` for real routing.
    pub synthetic_from: Option<String>,
    pub machine: String,
    pub policy: String,
    /// What layers went by at the end, where a policy has several rules, with
    /// how many layers each.
    pub rules: Vec<(&'static str, usize)>,
    pub forecast: String,
    pub warm: bool,
    /// The mean over MoE layers, rounded down; [`LayerReport::slots`] has each.
    pub slots_per_layer: usize,
    /// Sums over decode and prompts, as in [`Counts`].
    pub accesses: u64,
    pub hits: u64,
    pub misses: u64,
    pub evictions: u64,
    pub bytes: u64,
    pub hit_ratio: f64,
    pub bytes_per_token: f64,
    /// Decoded tokens per second, from the sum of their times.
    pub tok_s: f64,
    /// Times of decoded tokens.
    pub tpot: Spread,
    /// Times of prompts to their first token, all chunks together; `None`:
    /// the trace has no prompts.
    pub ttft: Option<Spread>,
    pub decode: PhaseReport,
    pub prompts: PhaseReport,
    /// Read-aheads that were used, and that were given up.
    pub ahead_useful: u64,
    pub ahead_wasted: u64,
    /// Over decode and prompts.
    pub bracket: Option<Bracket>,
    pub bound: Bound,
    /// `[layers]`
    pub layers: Vec<LayerReport>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_of_those_that_were_seen() {
        let spread = |times: &mut dyn Iterator<Item = u64>| {
            let mut all = Times::default();
            times.for_each(|ns| all.add(ns));
            all.spread()
        };
        assert_eq!(spread(&mut [].into_iter()), None);
        let one = spread(&mut [7].into_iter()).unwrap();
        assert_eq!((one.median_ns, one.p95_ns), (7, 7));
        let many = spread(&mut (1..=100).rev()).unwrap();
        assert_eq!((many.mean_ns, many.median_ns, many.p95_ns), (50.5, 50, 95));
        let long = spread(&mut (0..1000).map(|one| 1_000_000_007 + one * 1_000_000)).unwrap();
        assert!((1.4985e9..=1.5e9).contains(&(long.median_ns as f64)), "{long:?}");
    }

    #[test]
    fn a_bracket_without_a_gap_has_no_share() {
        let bracket = |lru_hits, this_hits, best_hits| Bracket {
            no_cache_hits: 0,
            lru_hits,
            this_hits,
            belady_hits: lru_hits,
            best_hits,
        };
        assert_eq!(bracket(10, 10, 10).closed(), None);
        assert_eq!(bracket(10, 15, 20).closed(), Some(0.5));
        assert_eq!(bracket(10, 9, 20).closed(), Some(-0.1));
    }
}
