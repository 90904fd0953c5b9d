//! Replays a trace over a cache: every miss is fetched and offered to the
//! policy, in rank order.

use super::rtrace::Trace;
use pregate_predictor::policy::Belady;
use pregate_predictor::{Cache, Event, ExpertId, NoOutlook, Policy, Scope, Shape};

/// All layers of the trace are MoE layers of one class.
pub fn shape(trace: &Trace) -> Shape {
    Shape::uniform(trace.layers, trace.experts, trace.top_k, 1)
}

/// Belady's policy with the whole trace as its future.
pub fn belady(trace: &Trace, scope: Scope, may_bypass: bool) -> Belady {
    let mut belady = Belady::new(scope, may_bypass);
    for token in 0..trace.tokens {
        for layer in 0..trace.layers {
            belady.foresee(layer, &trace.experts(token, layer).collect::<Vec<_>>());
        }
    }
    belady
}

/// Hits with `slots` per layer, caches kept across sequences.
pub fn hits(trace: &Trace, slots: usize, policy: Box<dyn Policy>) -> u64 {
    let mut cache = Cache::new(&shape(trace), &vec![slots; trace.layers], policy).unwrap();
    let counts = vec![1; trace.top_k];
    let mut hits = 0;
    let mut experts = Vec::new();
    for token in 0..trace.tokens {
        if trace.starts.binary_search(&token).is_ok() {
            cache.new_sequence();
        }
        cache.next_token();
        for layer in 0..trace.layers {
            experts.clear();
            experts.extend(trace.experts(token, layer));
            let ids = experts.iter().map(|&expert| ExpertId::new(layer, expert));
            let missing: Vec<ExpertId> = ids.filter(|&id| !cache.contains(id)).collect();
            hits += (experts.len() - missing.len()) as u64;
            let counts = &counts[..experts.len()];
            cache.used(&Event { layer, experts: &experts, counts, tokens: 1 });
            for id in missing {
                cache.admit(id, &|_| false, &NoOutlook);
            }
        }
    }
    hits
}
