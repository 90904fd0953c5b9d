//! The accounting is exact: LRU and Belady hit as often as programs that
//! share no code with this crate say.

#[path = "support/replay.rs"]
mod replay;
#[path = "support/rtrace.rs"]
mod rtrace;

use pregate_predictor::policy::{Belady, Lru};
use pregate_predictor::{Cache, Event, ExpertId, NoOutlook, Policy, Scope, Shape};
use rtrace::Trace;

/// `[layer, experts, hits]` of each event of the hand-checked example.
fn toy_events() -> Vec<(usize, Vec<u32>, usize)> {
    let path = rtrace::find("conformance_toy/events.csv").expect("the toy trace");
    let text = std::fs::read_to_string(path).unwrap();
    let event = |line: &str| {
        let fields: Vec<&str> = line.split(',').collect();
        let experts = fields[3].split(' ').map(|id| id.parse().unwrap()).collect();
        (fields[2].parse().unwrap(), experts, fields[5].parse().unwrap())
    };
    text.lines().skip(1).map(event).collect()
}

#[test]
fn the_toy_trace_hits_event_by_event() {
    let events = toy_events();
    assert_eq!(events.len(), 15);
    let mut belady = Belady::new(Scope::Layer, false);
    events.iter().for_each(|(layer, experts, _)| belady.foresee(*layer, experts));
    let policies: [Box<dyn Policy>; 2] = [Box::new(Lru::default()), Box::new(belady)];
    for policy in policies {
        let name = policy.name();
        let mut cache = Cache::new(&Shape::uniform(3, 4, 2, 1), &[2; 3], policy).unwrap();
        let mut total = 0;
        for (index, (layer, experts, want)) in events.iter().enumerate() {
            let ids = || experts.iter().map(|&expert| ExpertId::new(*layer, expert));
            let missing: Vec<ExpertId> = ids().filter(|&id| !cache.contains(id)).collect();
            assert_eq!(experts.len() - missing.len(), *want, "{name}: event {index}");
            total += want;
            cache.used(&Event { layer: *layer, experts, counts: &[1, 1], tokens: 1 });
            for id in missing {
                cache.admit(id, &|_| false, &NoOutlook);
            }
            assert!(ids().all(|id| cache.contains(id)), "{name}: event {index}");
        }
        assert_eq!(total, 12);
    }
}

fn check(trace: &Trace, slots: usize, lru: u64, belady: u64) {
    assert_eq!(
        replay::hits(trace, slots, Box::new(Lru::default()), None),
        lru,
        "LRU, {slots} slots"
    );
    let policy = Box::new(replay::belady(trace, Scope::Layer, false));
    assert_eq!(replay::hits(trace, slots, policy, None), belady, "Belady, {slots} slots");
    let policy = Box::new(replay::belady(trace, Scope::Layer, true));
    assert!(replay::hits(trace, slots, policy, None) >= belady, "bypassing can only help Belady");
}

#[test]
fn real_routing_hits_as_often_as_the_independent_replay() {
    let trace = Trace::open(&rtrace::find("gptoss20b/cut.json").expect("the cut"));
    for (slots, lru, belady) in [(4, 12391, 12391), (8, 19198, 22531), (16, 26087, 27817)] {
        check(&trace, slots, lru, belady);
    }
}

/// All of `golden_dev.json`, where the team's traces lie beside the checkout.
#[test]
fn whole_traces_hit_as_often_as_their_golden_file_says() {
    let Some(golden) = rtrace::find("golden_dev.json") else { return };
    let golden: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
    let mut checked = 0;
    for (name, facts) in golden.as_object().unwrap() {
        let Some(manifest) = rtrace::find(&format!("{name}.json")) else { continue };
        let trace = Trace::open(&manifest);
        for (slots, hits) in facts["event_atomic_per_layer"].as_object().unwrap() {
            let number = |key: &str| hits[key].as_u64().unwrap();
            let accesses = (trace.tokens * trace.layers * trace.top_k) as u64;
            assert_eq!(accesses, number("accesses"), "{name}");
            check(&trace, slots.parse().unwrap(), number("lru_hits"), number("belady_hits"));
            checked += 1;
        }
    }
    assert!(checked >= 9, "only {checked} golden rows were checked");
}
