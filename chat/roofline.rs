//! How fast decoding can be: bytes over wires. What a token computes with
//! comes from memory, what has no slot comes from disk first.

use serde::Serialize;

/// One MoE layer of a plan.
#[derive(Clone, Copy, Debug)]
pub struct LayerLoad {
    pub experts: usize,
    /// Of one token.
    pub top_k: usize,
    /// Experts that stay in memory.
    pub slots: usize,
    /// Bytes that a missing expert moves.
    pub expert_bytes: u64,
}

/// What can be said before the first token, if every expert is as likely as
/// every other. Real routing hits more often.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Share of a token's experts that have a slot.
    pub hit_ratio: f64,
    /// Weight bytes that a token reads from memory.
    pub memory_bytes_per_token: u64,
    /// Bytes that it misses.
    pub disk_bytes_per_token: u64,
    /// Memory bandwidth over `memory_bytes_per_token`.
    pub compute_bound_tok_s: f64,
    /// Disk bandwidth over `disk_bytes_per_token`; `None`: nothing is missed,
    /// or the disk was not measured.
    pub disk_bound_tok_s: Option<f64>,
    /// The smaller of both: all reading hidden behind computing, or the other
    /// way round.
    pub bound_tok_s: f64,
    /// "memory" or "disk".
    pub binds: &'static str,
    /// With nothing hidden: each token reads what it misses, then computes.
    pub without_overlap_tok_s: f64,
}

/// `memory_bytes` is what a token reads with all its experts, bandwidths are
/// in bytes per second.
pub fn predict(
    memory_bytes: u64,
    layers: &[LayerLoad],
    memory_bandwidth: f64,
    disk_bandwidth: Option<f64>,
) -> Prediction {
    let missed = |layer: &LayerLoad| {
        let share = 1.0 - layer.slots as f64 / layer.experts.max(1) as f64;
        layer.top_k as f64 * share
    };
    let asked: f64 = layers.iter().map(|layer| layer.top_k as f64).sum();
    let misses: f64 = layers.iter().map(missed).sum();
    let disk_bytes: f64 =
        layers.iter().map(|layer| missed(layer) * layer.expert_bytes as f64).sum();
    let compute_s = memory_bytes as f64 / memory_bandwidth;
    let disk_s = disk_bandwidth.filter(|_| disk_bytes > 0.0).map(|rate| disk_bytes / rate);
    let slower = disk_s.filter(|disk_s| *disk_s > compute_s);
    Prediction {
        hit_ratio: if asked > 0.0 { 1.0 - misses / asked } else { 1.0 },
        memory_bytes_per_token: memory_bytes,
        disk_bytes_per_token: disk_bytes as u64,
        compute_bound_tok_s: 1.0 / compute_s,
        disk_bound_tok_s: disk_s.map(|disk_s| 1.0 / disk_s),
        bound_tok_s: 1.0 / slower.unwrap_or(compute_s),
        binds: if slower.is_some() { "disk" } else { "memory" },
        without_overlap_tok_s: 1.0 / (compute_s + disk_s.unwrap_or(0.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(slots: usize) -> LayerLoad {
        LayerLoad { experts: 8, top_k: 2, slots, expert_bytes: 1_000_000 }
    }

    #[test]
    fn bytes_over_wires() {
        // Half of the first layer's and a quarter of the second's experts.
        let layers = [layer(4), layer(6)];
        let found = predict(10_000_000, &layers, 1e10, Some(1e9));
        assert_eq!(found.hit_ratio, 1.0 - 1.5 / 4.0);
        assert_eq!(found.disk_bytes_per_token, 1_500_000);
        assert!((found.compute_bound_tok_s - 1000.0).abs() < 1e-6);
        assert!((found.disk_bound_tok_s.unwrap() - 1000.0 / 1.5).abs() < 1e-6);
        assert_eq!((found.bound_tok_s, found.binds), (found.disk_bound_tok_s.unwrap(), "disk"));
        assert!((found.without_overlap_tok_s - 400.0).abs() < 1e-6);
    }

    #[test]
    fn what_is_in_memory_is_not_bound_by_the_disk() {
        let found = predict(10_000_000, &[layer(8)], 1e10, Some(1e9));
        assert_eq!((found.hit_ratio, found.disk_bytes_per_token), (1.0, 0));
        assert_eq!((found.disk_bound_tok_s, found.binds), (None, "memory"));
        assert_eq!(found.bound_tok_s, found.without_overlap_tok_s);
        let fast = predict(10_000_000, &[layer(4)], 1e9, Some(1e9));
        assert_eq!(fast.binds, "memory");
        assert!(fast.bound_tok_s < fast.disk_bound_tok_s.unwrap());
        assert_eq!(predict(1, &[], 1.0, None).hit_ratio, 1.0, "no routed experts");
    }
}
