//! What a run cost and why: every token's time attributed, and per layer
//! where the experts came from. Plain numbers that the expert store fills and
//! callers print; nothing here reads a clock.

use pregate_predictor::drive::LayerCounts;
use serde::Serialize;
use std::ops::{AddAssign, Sub};

/// Wall time of one pass, or of many, in nanoseconds, by what the token's
/// thread did. The parts do not overlap; see [`Time::unattributed_ns`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Time {
    /// Everything that reads no routed expert: mixers, routers, shared
    /// experts, dense blocks, head.
    pub compute_ns: u64,
    /// Computing routed experts, wherever they came from.
    pub experts_ns: u64,
    /// Nothing to compute until an expert arrives from disk.
    pub wait_disk_ns: u64,
    /// Moving weights between places in memory.
    pub copy_ns: u64,
    /// Planner, cache, forecasts, submitting reads.
    pub overhead_ns: u64,
    /// From the first to the last of it.
    pub total_ns: u64,
}

impl Time {
    /// What no part explains.
    pub fn unattributed_ns(&self) -> u64 {
        let parts =
            [self.compute_ns, self.experts_ns, self.wait_disk_ns, self.copy_ns, self.overhead_ns];
        self.total_ns.saturating_sub(parts.into_iter().fold(0, u64::saturating_add))
    }
}

/// Where one layer's experts came from, or those of many layers. An expert
/// that several tokens of a chunk share counts once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LayerStats {
    /// Experts that were in a frame when their router answered.
    pub hits: u64,
    /// Experts that a prefetch was reading when their router answered.
    pub in_flight: u64,
    /// Experts that were nowhere when their router answered.
    pub misses: u64,
    /// Of those, computed by the host without being copied to the GPU.
    pub left: u64,
    /// Read for `misses`.
    pub bytes_demand: u64,
    /// Read ahead, wanted or not.
    pub bytes_prefetch: u64,
    /// Of those, given up before any use.
    pub bytes_wasted: u64,
    /// Experts read ahead that were then used.
    pub prefetch_useful: u64,
    /// Experts read ahead that left, or were given up, unused.
    pub prefetch_wasted: u64,
    /// Waiting for this layer's experts.
    pub stall_ns: u64,
}

impl From<&LayerCounts> for LayerStats {
    fn from(counts: &LayerCounts) -> Self {
        let &LayerCounts { in_flight, misses, left, bytes_demand, bytes_prefetch, .. } = counts;
        let &LayerCounts { bytes_wasted, prefetch_useful, prefetch_wasted, stall_ns, .. } = counts;
        let hits = counts.hits + counts.early;
        Self {
            hits,
            in_flight,
            misses,
            left,
            bytes_demand,
            bytes_prefetch,
            bytes_wasted,
            prefetch_useful,
            prefetch_wasted,
            stall_ns,
        }
    }
}

impl LayerStats {
    /// Experts asked for.
    pub fn requests(&self) -> u64 {
        self.hits + self.in_flight + self.misses
    }

    /// Share of the experts asked for that were in a slot; `None` before the
    /// first.
    pub fn hit_ratio(&self) -> Option<f64> {
        let requests = self.requests();
        (requests > 0).then(|| self.hits as f64 / requests as f64)
    }

    pub fn bytes_read(&self) -> u64 {
        self.bytes_demand + self.bytes_prefetch
    }
}

/// What the reads of experts did while passes ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LinkStats {
    /// Read, alignment and what was given up included.
    pub bytes: u64,
    /// At least one read was under way.
    pub busy_ns: u64,
}

impl LinkStats {
    /// Bytes per second while busy; `None` if it never was.
    pub fn bytes_per_s(&self) -> Option<f64> {
        (self.busy_ns > 0).then(|| self.bytes as f64 / self.busy_ns as f64 * 1e9)
    }
}

/// All passes of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Phase {
    /// Calls of the forward pass.
    pub passes: u64,
    /// Tokens in them.
    pub tokens: u64,
    pub time: Time,
    pub link: LinkStats,
    /// One per layer of the model, zero for dense layers.
    pub layers: Vec<LayerStats>,
}

impl Phase {
    /// The sum over all layers.
    pub fn total(&self) -> LayerStats {
        let mut sum = LayerStats::default();
        self.layers.iter().for_each(|layer| sum += *layer);
        sum
    }

    /// What was added since `earlier`, a copy of this value.
    pub fn since(&self, earlier: &Phase) -> Phase {
        let before = |layer| earlier.layers.get(layer).copied().unwrap_or_default();
        Phase {
            passes: self.passes.saturating_sub(earlier.passes),
            tokens: self.tokens.saturating_sub(earlier.tokens),
            time: self.time - earlier.time,
            link: self.link - earlier.link,
            layers: self.layers.iter().enumerate().map(|(i, now)| *now - before(i)).collect(),
        }
    }
}

/// What a streaming session did since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StreamStats {
    /// Passes over several tokens at once.
    pub prefill: Phase,
    /// Passes over one token.
    pub decode: Phase,
}

impl StreamStats {
    pub fn new(layers: usize) -> Self {
        let phase = Phase { layers: vec![LayerStats::default(); layers], ..Phase::default() };
        Self { prefill: phase.clone(), decode: phase }
    }

    /// Where a pass over `tokens` tokens belongs.
    pub fn phase_mut(&mut self, tokens: usize) -> &mut Phase {
        if tokens == 1 { &mut self.decode } else { &mut self.prefill }
    }

    /// What was added since `earlier`, a copy of this value.
    pub fn since(&self, earlier: &StreamStats) -> StreamStats {
        StreamStats {
            prefill: self.prefill.since(&earlier.prefill),
            decode: self.decode.since(&earlier.decode),
        }
    }
}

/// Field by field; differences stop at zero.
macro_rules! add_and_subtract {
    ($type:ident: $($field:ident),+) => {
        impl AddAssign for $type {
            fn add_assign(&mut self, other: Self) {
                $(self.$field = self.$field.saturating_add(other.$field);)+
            }
        }

        impl Sub for $type {
            type Output = Self;

            fn sub(self, other: Self) -> Self {
                Self { $($field: self.$field.saturating_sub(other.$field)),+ }
            }
        }
    };
}

add_and_subtract!(Time: compute_ns, experts_ns, wait_disk_ns, copy_ns, overhead_ns, total_ns);
add_and_subtract!(LinkStats: bytes, busy_ns);
add_and_subtract!(
    LayerStats: hits, in_flight, misses, left, bytes_demand, bytes_prefetch, bytes_wasted,
    prefetch_useful, prefetch_wasted, stall_ns
);

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(seed: u64) -> LayerStats {
        LayerStats {
            hits: seed,
            in_flight: seed + 1,
            misses: seed + 2,
            left: seed + 9,
            bytes_demand: seed + 3,
            bytes_prefetch: seed + 4,
            bytes_wasted: seed + 5,
            prefetch_useful: seed + 6,
            prefetch_wasted: seed + 7,
            stall_ns: seed + 8,
        }
    }

    #[test]
    fn an_interval_is_what_was_added_in_it() {
        let time = Time {
            compute_ns: 1,
            experts_ns: 2,
            wait_disk_ns: 3,
            copy_ns: 4,
            overhead_ns: 5,
            total_ns: 21,
        };
        assert_eq!(time.unattributed_ns(), 6);
        let mut stats = StreamStats::new(2);
        let decode = stats.phase_mut(1);
        let link = LinkStats { bytes: 3000, busy_ns: 1500 };
        (decode.passes, decode.tokens, decode.time, decode.link) = (1, 1, time, link);
        decode.layers[1] += layer(10);
        let before = stats.clone();

        let decode = stats.phase_mut(1);
        decode.passes += 1;
        decode.tokens += 1;
        decode.time += time;
        decode.link += link;
        decode.layers[1] += layer(100);
        stats.phase_mut(7).tokens += 7;
        let added = stats.since(&before);
        assert_eq!(
            added.decode,
            Phase {
                layers: vec![layer(0) - layer(0), layer(100)],
                passes: 1,
                tokens: 1,
                time,
                link
            }
        );
        assert_eq!(added.decode.link.bytes_per_s(), Some(2e9));
        assert_eq!(added.prefill.link.bytes_per_s(), None);
        assert_eq!(added.prefill.tokens, 7);
        assert_eq!(added.decode.total(), layer(100));
        assert_eq!(added.decode.total().requests(), 303);
        assert_eq!(added.decode.total().hit_ratio(), Some(100.0 / 303.0));
        assert_eq!(added.decode.total().bytes_read(), 207);
        assert_eq!(LayerStats::default().hit_ratio(), None);
    }
}
