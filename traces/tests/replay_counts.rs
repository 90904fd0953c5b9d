//! Counting is exact: against programs that share no code with this crate,
//! against all that could be done, and against the runtime's own cache.

#[path = "support/small.rs"]
mod small;

use pregate_predictor::policy::{Belady as BeladyPolicy, Lru as LruPolicy};
use pregate_predictor::{Cache, Event, ExpertId, NoOutlook, Policy, Scope, Shape};
use pregate_traces::replay::MemoryTrace;
use pregate_traces::replay::count::{Count, CountError, foresee};
use pregate_traces::{Hits, Source};
use small::Rng;
use std::collections::BTreeSet;

fn count(trace: &mut dyn Source, slots: usize) -> [u64; 3] {
    let shape = trace.header().shape.clone();
    let slots: Vec<usize> = shape.layers.iter().map(|one| one.map_or(0, |_| slots)).collect();
    let count = Count { slots: &slots, warm_up: 0 };
    let belady = |trace: &mut dyn Source, may_bypass| {
        count.belady(trace, Scope::Layer, may_bypass).unwrap().hits
    };
    [count.lru(trace).unwrap().hits, belady(trace, false), belady(trace, true)]
}

#[test]
fn real_routing_hits_as_often_as_the_independent_replay() {
    let mut trace = pregate_traces::open(&small::cut()).unwrap();
    for (slots, lru, belady) in [(4, 12391, 12391), (8, 19198, 22531), (16, 26087, 27817)] {
        let [found_lru, found_belady, bound] = count(&mut *trace, slots);
        assert_eq!((found_lru, found_belady), (lru, belady), "{slots} slots");
        assert!(bound >= belady, "{bound} {belady}");
    }
}

/// All of `golden_dev.json`, in `$PREGATE_TRACES`; `examples/golden.rs` prints
/// them.
#[test]
fn whole_traces_hit_as_often_as_their_golden_file_says() {
    let Some(folder) = std::env::var_os("PREGATE_TRACES").map(std::path::PathBuf::from) else {
        eprintln!("not compared: $PREGATE_TRACES does not name the folder of the traces");
        return;
    };
    let text = std::fs::read_to_string(folder.join("golden_dev.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut checked = 0;
    for (name, facts) in golden.as_object().unwrap() {
        let path = folder.join(format!("{name}.json"));
        let Ok(mut trace) = pregate_traces::open(&path) else { continue };
        for (slots, want) in facts["event_atomic_per_layer"].as_object().unwrap() {
            let [lru, belady, _] = count(&mut *trace, slots.parse().unwrap());
            assert_eq!(want["lru_hits"], lru, "{name}, {slots} slots");
            assert_eq!(want["belady_hits"], belady, "{name}, {slots} slots");
            checked += 1;
        }
    }
    assert!(checked >= 9, "only {checked} golden rows were checked");
}

#[test]
fn the_toy_trace_hits_as_its_readers_can_check() {
    let text = std::fs::read_to_string(small::data().join("conformance_toy/events.csv")).unwrap();
    let mut tokens: Vec<Vec<Vec<u16>>> = Vec::new();
    for line in text.lines().skip(1) {
        let fields: Vec<&str> = line.split(',').collect();
        let experts = fields[3].split(' ').map(|id| id.parse().unwrap()).collect();
        if fields[2] == "0" {
            tokens.push(Vec::new());
        }
        tokens.last_mut().unwrap().push(experts);
    }
    let shape = Shape::uniform(3, 4, 2, 1);
    let mut trace = small::decoded(&shape, tokens);
    assert_eq!(count(&mut trace, 2)[..2], [12, 12]);
    let slots = [2; 3];
    let lru = Count { slots: &slots, warm_up: 0 }.lru(&mut trace).unwrap();
    assert_eq!(lru, Hits { requests: 30, hits: 12 });
    // Every layer's first event hits nothing.
    let warm = Count { slots: &slots, warm_up: 1 }.lru(&mut trace).unwrap();
    assert_eq!(warm, Hits { requests: 24, hits: 12 });
    let few = Count { slots: &[2, 1, 2], warm_up: 0 }.lru(&mut trace).unwrap_err();
    assert!(matches!(few, CountError::Slots(_)));
}

/// Hits of the best of all ways to go on after every event. `forced`: what
/// was asked for stays.
fn best(events: &[Vec<u16>], slots: usize, forced: bool) -> u64 {
    let mut ways: std::collections::BTreeMap<BTreeSet<u16>, u64> = [(BTreeSet::new(), 0)].into();
    for experts in events {
        let mut next = std::collections::BTreeMap::new();
        for (residents, hits) in ways {
            let now = hits + experts.iter().filter(|one| residents.contains(one)).count() as u64;
            let all: Vec<u16> =
                residents.union(&experts.iter().copied().collect()).copied().collect();
            for chosen in 0u32..1 << all.len() {
                let of = |at: usize| chosen >> at & 1 == 1;
                let kept: BTreeSet<u16> =
                    (0..all.len()).filter(|&at| of(at)).map(|at| all[at]).collect();
                let is_legal = !forced || experts.iter().all(|one| kept.contains(one));
                if kept.len() == slots.min(all.len()) && is_legal {
                    let best = next.entry(kept).or_insert(0);
                    *best = now.max(*best);
                }
            }
        }
        ways = next;
    }
    ways.into_values().max().unwrap()
}

#[test]
fn belady_is_the_best_of_everything_that_could_be_done() {
    let mut rng = Rng(1);
    for case in 0..300 {
        let experts = 3 + rng.below(4);
        let top_k = 1 + rng.below(experts.min(3) - 1);
        let slots = top_k + rng.below(experts - top_k);
        let events: Vec<Vec<u16>> = (0..4 + rng.below(10))
            .map(|_| {
                let wanted = 1 + rng.below(top_k);
                rng.distinct(wanted, experts)
            })
            .collect();
        let shape = Shape::uniform(1, experts, top_k, 1);
        let tokens = events.iter().map(|event| vec![event.clone()]).collect();
        let [lru, belady, bound] = count(&mut small::decoded(&shape, tokens), slots);
        assert_eq!(belady, best(&events, slots, true), "case {case}: {slots} of {events:?}");
        assert_eq!(bound, best(&events, slots, false), "case {case}: {slots} of {events:?}");
        assert!(lru <= belady && belady <= bound, "case {case}");
    }
}

/// Hits behind the planner's cache.
fn cached(trace: &MemoryTrace, slots: &[usize], policy: Box<dyn Policy>) -> u64 {
    let mut cache = Cache::new(&trace.header.shape, slots, policy).unwrap();
    let mut hits = 0;
    for row in &trace.rows {
        cache.next_token();
        for layer in 0..row.layers() {
            let experts: Vec<u32> = row.experts(layer).iter().map(|&id| id.into()).collect();
            let ids = || experts.iter().map(|&expert| ExpertId::new(layer, expert));
            let missing: Vec<ExpertId> = ids().filter(|&id| !cache.contains(id)).collect();
            hits += (experts.len() - missing.len()) as u64;
            let counts = vec![1; experts.len()];
            cache.used(&Event { layer, experts: &experts, counts: &counts, tokens: 1 });
            for id in missing {
                let _ = cache.admit(id, &|_| false, &NoOutlook);
            }
        }
    }
    hits
}

#[test]
fn the_runtimes_cache_hits_as_often() {
    let mut rng = Rng(2);
    for case in 0..60 {
        let (layers, experts) = (1 + rng.below(4), 2 + rng.below(30));
        let top_k = 1 + rng.below(experts.min(6));
        let slots: Vec<usize> =
            (0..layers).map(|_| top_k + rng.below(experts - top_k + 1)).collect();
        let steep = 1 + rng.below(3);
        let tokens = (0..100)
            .map(|_| {
                let mut layer = || {
                    let count = 1 + rng.below(top_k);
                    let mut wanted = BTreeSet::new();
                    while wanted.len() < count {
                        let limit = (0..steep).fold(experts, |limit, _| 1 + rng.below(limit));
                        wanted.insert(rng.below(limit) as u16);
                    }
                    wanted.into_iter().collect()
                };
                (0..layers).map(|_| layer()).collect()
            })
            .collect();
        let shape = Shape::uniform(layers, experts, top_k, 1);
        let mut trace = small::decoded(&shape, tokens);
        let count = Count { slots: &slots, warm_up: 0 };
        let lru = count.lru(&mut trace).unwrap().hits;
        assert_eq!(lru, cached(&trace, &slots, Box::<LruPolicy>::default()), "case {case}");
        let mut policy = BeladyPolicy::new(Scope::Layer, false);
        let mut requests = 0;
        foresee(&mut trace, &mut |seen| {
            let experts: Vec<u32> = seen.experts.iter().map(|&id| id.into()).collect();
            policy.foresee(seen.layer, &experts);
            requests += experts.len() as u64;
        })
        .unwrap();
        let belady = count.belady(&mut trace, Scope::Layer, false).unwrap();
        assert_eq!(belady.requests, requests);
        assert_eq!(belady.hits, cached(&trace, &slots, Box::new(policy)), "case {case}");
        let shared = count.belady(&mut trace, Scope::Pool, true).unwrap().hits;
        let own = count.belady(&mut trace, Scope::Layer, true).unwrap().hits;
        assert!(belady.hits <= own && own <= shared, "case {case}");
    }
}
