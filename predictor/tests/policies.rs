//! What each policy is for.

#[path = "support/prompt.rs"]
mod prompt;
#[path = "support/replay.rs"]
mod replay;
#[path = "support/rtrace.rs"]
mod rtrace;

use pregate_predictor::policy::{self, Frequency, LeastStale};
use pregate_predictor::{
    Admission, Ahead, Arrival, Cache, CapacityError, Event, ExpertId, Landing, NoOutlook, Outlook,
    Planner, Policy, Request, Retire, Scope, Shape,
};
use prompt::Behind;
use rtrace::Trace;

fn cache(slots: usize, policy: impl Policy + 'static) -> Cache {
    Cache::new(&Shape::uniform(2, 16, 2, 1), &[slots; 2], Box::new(policy)).unwrap()
}

/// One token uses `experts` of `layer`; what is missing is admitted.
fn token(cache: &mut Cache, layer: usize, experts: &[u32], outlook: &dyn Outlook) {
    cache.next_token();
    event(cache, layer, experts, outlook);
}

/// The same, of a token that has begun.
fn event(cache: &mut Cache, layer: usize, experts: &[u32], outlook: &dyn Outlook) {
    let counts = vec![1; experts.len()];
    cache.used(&Event { layer, experts, counts: &counts, tokens: 1 });
    for &expert in experts {
        let id = ExpertId::new(layer, expert);
        if !cache.contains(id) {
            cache.admit(id, &|_| false, outlook);
        }
    }
}

fn resident(cache: &Cache, layer: usize) -> Vec<u32> {
    cache.resident(layer).collect()
}

#[test]
fn frequency_outlives_recency() {
    let mut cache = cache(3, Frequency::with_decay(Scope::Layer, 0.99));
    for _ in 0..20 {
        token(&mut cache, 0, &[0, 1], &NoOutlook);
    }
    // Each comes once: the often used stay, the newcomers replace each other.
    for expert in 2..9 {
        token(&mut cache, 0, &[expert], &NoOutlook);
        assert_eq!(resident(&cache, 0), [0, 1, expert]);
    }
}

#[test]
fn least_stale_evicts_what_this_pass_has_not_used_first_come_first() {
    let mut cache = cache(4, LeastStale::new(Scope::Layer));
    token(&mut cache, 0, &[5, 6], &NoOutlook);
    token(&mut cache, 0, &[7, 8], &NoOutlook);
    // 5 came first, but this pass uses it: 6 is the first of the others.
    token(&mut cache, 0, &[5, 9], &NoOutlook);
    assert_eq!(resident(&cache, 0), [5, 7, 8, 9]);
    token(&mut cache, 0, &[1, 2], &NoOutlook);
    assert_eq!(resident(&cache, 0), [1, 2, 8, 9]);
}

/// Certain about some experts, silent about the others.
struct Certain(&'static [u32]);

impl Outlook for Certain {
    fn probability(&self, id: ExpertId) -> Option<f32> {
        self.0.contains(&id.expert).then_some(1.0)
    }
}

#[test]
fn a_forecast_keeps_what_history_would_evict() {
    for name in ["forecast-aware", "adaptive", "learned"] {
        for (outlook, kept) in [(&Certain(&[3]) as &dyn Outlook, true), (&NoOutlook, false)] {
            let policy = policy::by_name(name).unwrap();
            let mut cache = Cache::new(&Shape::uniform(2, 16, 2, 1), &[3; 2], policy).unwrap();
            // No slot of another layer is free.
            (0..3).for_each(|expert| token(&mut cache, 1, &[expert], &NoOutlook));
            token(&mut cache, 0, &[3], &NoOutlook);
            for _ in 0..4 {
                token(&mut cache, 0, &[4, 5], &NoOutlook);
            }
            token(&mut cache, 0, &[6], outlook);
            assert_eq!(cache.contains(ExpertId::new(0, 3)), kept, "{name}");
            assert!(cache.contains(ExpertId::new(0, 6)));
        }
    }
}

#[test]
fn a_pool_lends_slots_and_leaves_every_layer_its_top_k() {
    let mut cache = cache(4, Frequency::new(Some(Scope::Pool)));
    token(&mut cache, 0, &[8, 9], &NoOutlook);
    token(&mut cache, 0, &[10, 11], &NoOutlook);
    // Layer 0 needs two experts, layer 1 one after the other.
    for round in 0..64 {
        token(&mut cache, 0, &[0, 1], &NoOutlook);
        token(&mut cache, 1, &[round % 16], &NoOutlook);
        assert!(cache.len(0) >= 2 && cache.len(0) + cache.len(1) <= 8);
    }
    assert_eq!([cache.len(0), cache.len(1)], [2, 6]);
    // And the other way round.
    for round in 0..64 {
        token(&mut cache, 0, &[round % 16], &NoOutlook);
        token(&mut cache, 1, &[0, 1], &NoOutlook);
        assert!(cache.len(1) >= 2);
    }
    assert!(cache.len(0) > 4, "{:?}", resident(&cache, 0));
}

/// A chunk of layer 0 whose experts are used `counts[expert]` times.
fn chunk(cache: &mut Cache, tokens: usize, counts: [u32; 16]) {
    let experts: Vec<u32> = (0..16).filter(|&expert| counts[expert as usize] > 0).collect();
    let counts: Vec<u32> = counts.into_iter().filter(|&count| count > 0).collect();
    cache.next_token();
    cache.used(&Event { layer: 0, experts: &experts, counts: &counts, tokens });
    let was_resident = |cache: &Cache, e: u32| cache.contains(ExpertId::new(0, e));
    let (here, missing): (Vec<u32>, Vec<u32>) =
        experts.iter().partition(|&&e| was_resident(cache, e));
    here.iter().for_each(|&e| cache.computed(ExpertId::new(0, e)));
    for expert in missing {
        let id = ExpertId::new(0, expert);
        cache.computed(id);
        cache.admit(id, &|_| false, &NoOutlook);
    }
}

#[test]
fn a_long_prompt_does_not_outweigh_what_was_decoded() {
    for name in ["lfu", "frequency", "forecast-aware"] {
        let policy = policy::by_name(name).unwrap();
        let mut cache = Cache::new(&Shape::uniform(2, 16, 2, 1), &[4; 2], policy).unwrap();
        for _ in 0..200 {
            token(&mut cache, 0, &[2, 3], &NoOutlook);
        }
        // Eight others by a quarter of its tokens each, 2 and 3 by one.
        chunk(
            &mut cache,
            512,
            std::array::from_fn(|e| if e >= 8 { 128 } else { u32::from(e == 2 || e == 3) }),
        );
        for expert in [2, 3] {
            let id = ExpertId::new(0, expert);
            assert!(cache.contains(id), "{name}: {:?}", resident(&cache, 0));
        }
    }
}

#[test]
fn after_a_prompt_the_cache_holds_what_decoding_and_the_prompt_used_most() {
    for name in ["lru", "lfu", "frequency", "forecast-aware"] {
        let policy = policy::by_name(name).unwrap();
        let mut cache = Cache::new(&Shape::uniform(2, 16, 2, 1), &[4; 2], policy).unwrap();
        for _ in 0..200 {
            token(&mut cache, 0, &[2, 3], &NoOutlook);
        }
        // It uses every expert, one of them by each of its tokens.
        chunk(&mut cache, 64, std::array::from_fn(|e| if e == 12 { 64 } else { 3 }));
        assert!(cache.contains(ExpertId::new(0, 12)), "{name}: {:?}", resident(&cache, 0));
        assert_eq!(cache.len(0), 4);
        if name == "frequency" || name == "forecast-aware" {
            // One chunk that uses all alike is no reason to forget them.
            assert!(cache.contains(ExpertId::new(0, 2)), "{name}: {:?}", resident(&cache, 0));
            assert!(cache.contains(ExpertId::new(0, 3)), "{name}: {:?}", resident(&cache, 0));
        }
    }
}

/// A prompt of 100 tokens of the one text of the trace in the midst of the
/// other: what decodes behind it, in either, finds about what it would have
/// found without a chunk.
#[test]
fn a_prompt_leaves_decoding_its_experts_on_real_routing() {
    let trace = Trace::open(&rtrace::find("gptoss20b/cut.json").expect("the cut"));
    let slots = trace.experts / 2;
    let of = |behind| prompt::ratios(&trace, (slots, policy::DEFAULT), [100, 100], behind).first;
    let [none, other, one_by_one, own] = Behind::ALL.map(of);
    println!("{none} {other} {one_by_one} {own}");
    assert!(other > none - 0.02, "{other} after a prompt, {none} without");
    assert!(own > one_by_one - 0.02, "{own} behind a chunk, {one_by_one} behind its tokens");
}

/// A long chunk does not outweigh what was decoded, but its last tokens count.
#[test]
fn a_prompt_ends_with_its_last_tokens() {
    for name in ["lru", "frequency", "forecast-aware"] {
        let policy = policy::by_name(name).unwrap();
        let shape = Shape::uniform(1, 16, 2, 1);
        let cache = Cache::new(&shape, &[4], policy).unwrap();
        let mut planner = Planner::new(&shape, cache, None, Ahead::default());
        let tokens = 64;
        planner.begin_chunk(&[0; 64]);
        // All but the last eight tokens are of ten experts, these of two others.
        for token in 0..tokens {
            let chosen = if token < 56 { [token % 10, (token + 1) % 10] } else { [12, 13] };
            planner.routed(0, &chosen, &[0.5, 0.5]);
        }
        let experts: Vec<u32> = (0..10).chain([12, 13]).collect();
        let mut request = Request::default();
        planner.request(0, &experts, &mut request);
        for &id in &request.missing {
            planner.filling(id);
            assert_eq!(planner.arrived(id, Landing::Ready), Arrival::Use);
            let _ = planner.admit(id, &|_| false);
        }
        planner.end(0, 0, 0, &mut Retire::default());
        for expert in [12, 13] {
            let id = ExpertId::new(0, expert);
            assert!(planner.cache().contains(id), "{name}: {:?}", resident(planner.cache(), 0));
        }
    }
}

#[test]
fn an_event_never_evicts_its_own_and_pins_are_kept() {
    for name in policy::NAMES {
        let policy = policy::by_name(name).unwrap();
        assert_eq!(policy.name(), name);
        let mut cache = Cache::new(&Shape::uniform(2, 16, 2, 1), &[2; 2], policy).unwrap();
        token(&mut cache, 0, &[0, 1], &NoOutlook);
        token(&mut cache, 1, &[0, 1], &NoOutlook);
        cache.next_token();
        cache.used(&Event { layer: 0, experts: &[1, 2], counts: &[1, 1], tokens: 1 });
        // 0 is pinned, 1 is of the event, layer 1 has no more than its top-k.
        let id = ExpertId::new(0, 2);
        let pinned = cache.admit(id, &|id| id.expert == 0, &NoOutlook);
        assert_eq!(pinned, Admission::Bypassed, "{name}");
        let admission = cache.admit(id, &|_| false, &NoOutlook);
        assert_eq!(admission, Admission::Replaced(ExpertId::new(0, 0)), "{name}");
    }
    assert!(policy::by_name("belady").is_none());
}

#[test]
fn a_tokens_experts_stay_until_all_of_them_were_computed() {
    for name in policy::NAMES {
        let policy = policy::by_name(name).unwrap();
        let mut cache = Cache::new(&Shape::uniform(1, 16, 2, 1), &[2], policy).unwrap();
        for _ in 0..20 {
            token(&mut cache, 0, &[0, 2], &NoOutlook);
        }
        token(&mut cache, 0, &[0, 1], &NoOutlook);
        cache.next_token();
        cache.used(&Event { layer: 0, experts: &[2, 1], counts: &[1, 1], tokens: 1 });
        cache.computed(ExpertId::new(0, 1));
        // 2 was used more often and is more recent; 1 stays all the same.
        let admission = cache.admit(ExpertId::new(0, 2), &|id| id.expert == 0, &NoOutlook);
        assert_eq!(admission, Admission::Bypassed, "{name}");
    }
}

#[test]
fn a_frame_that_is_lost_leaves_a_free_slot() {
    for name in policy::NAMES {
        let policy = policy::by_name(name).unwrap();
        let mut cache = Cache::new(&Shape::uniform(1, 16, 2, 1), &[2], policy).unwrap();
        token(&mut cache, 0, &[0, 1], &NoOutlook);
        assert!(!cache.has_free_slot(0), "{name}");
        cache.remove(ExpertId::new(0, 1));
        assert!(cache.has_free_slot(0), "{name}");
        token(&mut cache, 0, &[2], &NoOutlook);
        assert_eq!(resident(&cache, 0), [0, 2], "{name}");
    }
}

#[test]
fn a_newcomer_with_little_use_is_the_next_that_its_pool_gives() {
    let mut cache = cache(4, Frequency::new(Some(Scope::Pool)));
    token(&mut cache, 1, &[9], &NoOutlook);
    for _ in 0..30 {
        token(&mut cache, 0, &[0, 1], &NoOutlook);
        token(&mut cache, 1, &[0, 1], &NoOutlook);
    }
    for _ in 0..10 {
        token(&mut cache, 0, &[2, 0], &NoOutlook);
        token(&mut cache, 1, &[2, 3], &NoOutlook);
    }
    // Every slot is taken. 9 was used least, then 5, which replaces it.
    token(&mut cache, 0, &[5], &NoOutlook);
    assert_eq!([resident(&cache, 0), resident(&cache, 1)], [[0, 1, 2, 5], [0, 1, 2, 3]]);
    token(&mut cache, 1, &[6], &NoOutlook);
    assert_eq!(resident(&cache, 0), [0, 1, 2]);
    assert_eq!(resident(&cache, 1), [0, 1, 2, 3, 6]);
}

#[test]
fn too_few_slots_are_refused_with_the_layer() {
    let make = |slots: &[usize]| {
        let policy = policy::by_name(policy::DEFAULT).unwrap();
        Cache::new(&Shape::uniform(3, 8, 4, 1), slots, policy).err()
    };
    let error = make(&[4, 4, 3]).unwrap();
    assert_eq!(error, CapacityError::TooFew { layer: 2, slots: 3, top_k: 4 });
    let text = error.to_string();
    assert!(text.contains("layer 2") && text.contains('3') && text.contains('4'), "{text}");
    assert_eq!(make(&[4, 4]), Some(CapacityError::Layers { found: 2, layers: 3 }));
    assert_eq!(make(&[4, 5, 8]), None);
}

#[test]
fn on_real_routing_the_default_beats_lru_and_not_belady() {
    let trace = Trace::open(&rtrace::find("gptoss20b/cut.json").expect("the cut"));
    for slots in [8, 16, 24] {
        let hits = |name| replay::hits(&trace, slots, policy::by_name(name).unwrap(), None);
        let bound = replay::belady(&trace, Scope::Layer, true);
        let bound = replay::hits(&trace, slots, Box::new(bound), None);
        let (default, lru) = (hits(policy::DEFAULT), hits("lru"));
        assert!(default > lru, "{slots} slots: {default} hits, LRU {lru}");
        for layer in ["adaptive-layer", "forecast-aware-layer", "learned"] {
            let layer = hits(layer);
            assert!(layer < bound, "{slots} slots: {layer} hits, Belady {bound}");
        }
        // Without forecasts nothing but the history counts.
        assert_eq!(hits("forecast-aware"), hits("frequency"));
    }
}

/// Of what Belady hits more than LRU: on sequences that training did not see,
/// and which begin with an empty memory. The tenth of the trace that is in the
/// repository; all of it is in docs/measurements.md.
#[test]
fn the_learned_value_closes_the_gap_further_than_frequency_does() {
    let trace = Trace::open(&rtrace::find("gptoss20b/cut.json").expect("the cut"));
    for slots in [8, 16] {
        let hits = |name| replay::hits(&trace, slots, policy::by_name(name).unwrap(), None) as f64;
        let bound = Box::new(replay::belady(&trace, Scope::Layer, false));
        let (bound, lru) = (replay::hits(&trace, slots, bound, None) as f64, hits("lru"));
        let share = |name| (hits(name) - lru) / (bound - lru);
        let [learned, layer, default, frequency] =
            ["learned", "adaptive-layer", policy::DEFAULT, "frequency-layer"].map(share);
        println!("{slots} slots: {learned:.3} {layer:.3} {default:.3} {frequency:.3}");
        assert!(learned > frequency + 0.1, "{slots} slots: {learned}, {frequency}");
        assert!(layer > learned - 0.02, "{slots} slots: {layer}, {learned}");
        assert!(default > learned, "{slots} slots: {default}, {learned}");
    }
}

/// Text that comes again: what its first time used next is kept, where LRU
/// and frequency know nothing.
#[test]
fn what_comes_again_is_kept_until_it_is_used() {
    // A loop of 60 experts in an order of its own, two per token, twelve times.
    let order: Vec<u32> = (0..60).map(|i| i * 7 % 60).collect();
    let hits = |name| {
        let policy = policy::by_name(name).unwrap();
        let mut cache = Cache::new(&Shape::uniform(2, 64, 2, 1), &[30; 2], policy).unwrap();
        let mut hits = 0;
        for time in 0..12 {
            for pair in order.chunks_exact(2) {
                cache.next_token();
                for layer in 0..2 {
                    let here = |&&e: &&u32| cache.contains(ExpertId::new(layer, e));
                    hits += if time >= 4 { pair.iter().filter(here).count() } else { 0 };
                    event(&mut cache, layer, pair, &NoOutlook);
                }
            }
        }
        hits
    };
    let (lru, learned, default) = (hits("lru"), hits("learned"), hits(policy::DEFAULT));
    // A cache of 30 that knows the loop hits 29 of 60; two layers, 8 times.
    println!("loop: {learned}, {default} of 960, LRU {lru}");
    assert!(lru == 0 && learned > 320, "{learned} of 960, LRU {lru}");
    assert!(default > 320, "{default} of 960");
}

/// Where the last use is all that counts, the shadow caches find that out.
#[test]
fn the_default_follows_lru_where_lru_is_best() {
    // Each expert is used for some tokens on end, then others at random: so
    // what was used last is used next, and counts of older use mislead.
    let hits = |name| {
        let policy = policy::by_name(name).unwrap();
        let mut cache = Cache::new(&Shape::uniform(2, 16, 2, 1), &[4; 2], policy).unwrap();
        let (mut hits, mut state) = (0, 5u64);
        for _ in 0..1200 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let base = (state >> 40) as u32 % 16;
            for step in 0..8 {
                let experts = [base, (base + 1 + step % 3) % 16];
                hits += experts.iter().filter(|&&e| cache.contains(ExpertId::new(0, e))).count();
                token(&mut cache, 0, &experts, &NoOutlook);
            }
        }
        hits as f64 / 19_200.0
    };
    let (lru, layer) = (hits("lru"), hits("adaptive-layer"));
    println!("{lru} {layer} {}", hits("learned"));
    assert!(layer > lru - 0.01, "{layer}, LRU {lru}");
}
