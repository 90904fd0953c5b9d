//! Replays a trace over a cache: every miss is fetched and offered to the
//! policy, in rank order.

use super::rtrace::Trace;
use pregate_predictor::forecast::Forecaster;
use pregate_predictor::ledger::Ledger;
use pregate_predictor::policy::Belady;
use pregate_predictor::{Cache, Event, ExpertId, NoOutlook, Outlook, Policy, Scope, Shape};

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

/// Hits with `slots` per layer, caches kept across sequences; `forecaster`
/// learns on the way and answers what the policy asks.
pub fn hits(
    trace: &Trace,
    slots: usize,
    policy: Box<dyn Policy>,
    mut forecaster: Option<Forecaster>,
) -> u64 {
    let shape = shape(trace);
    let mut cache = Cache::new(&shape, &vec![slots; trace.layers], policy).unwrap();
    let columns = forecaster.as_ref().map(Forecaster::columns).unwrap_or_default();
    let mut ledger = Ledger::new(&shape, columns, forecaster.as_ref().map_or(0, |f| f.horizon()));
    let counts = vec![1; trace.top_k];
    let mut hits = 0;
    let mut experts = Vec::new();
    for token in 0..trace.tokens {
        let starts = trace.starts.binary_search(&token).is_ok();
        if starts {
            cache.new_sequence();
        }
        cache.next_token();
        if let Some(forecaster) = &mut forecaster {
            if starts {
                forecaster.new_sequence();
            }
            let id = trace.token_ids.get(token).copied().unwrap_or(token as u32);
            forecaster.begin_token(id);
        }
        for layer in 0..trace.layers {
            experts.clear();
            experts.extend(trace.experts(token, layer));
            let ids = experts.iter().map(|&expert| ExpertId::new(layer, expert));
            let missing: Vec<ExpertId> = ids.filter(|&id| !cache.contains(id)).collect();
            hits += (experts.len() - missing.len()) as u64;
            let counts = &counts[..experts.len()];
            cache.used(&Event { layer, experts: &experts, counts, tokens: 1 });
            if let Some(forecaster) = &mut forecaster {
                let weights = vec![1.0; experts.len()];
                forecaster.routed(layer, &experts, &weights, &mut ledger);
                forecaster.forecast(Some(layer), &|_| true);
            }
            let outlook: &dyn Outlook = match &forecaster {
                Some(forecaster) => forecaster,
                None => &NoOutlook,
            };
            for id in missing {
                cache.admit(id, &|_| false, outlook);
            }
        }
    }
    hits
}
