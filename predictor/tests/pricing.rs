//! The planner stops prefetching where the ledger says that it loses.

use pregate_predictor::forecast::Forecaster;
use pregate_predictor::policy::Lru;
use pregate_predictor::{
    Ahead, Arrival, Cache, ExpertId, Landing, Planner, Request, Retire, Shape,
};

const LAYERS: usize = 3;
const BYTES: u64 = 1 << 20;

fn planner(forecast: &str, priced: bool) -> Planner {
    let shape = Shape::uniform(LAYERS, 64, 2, BYTES);
    let cache = Cache::new(&shape, &[2; LAYERS], Box::new(Lru::default())).unwrap();
    let forecaster = Forecaster::by_name(forecast, &shape, 1);
    let limits = Ahead { threshold: 0.2, most: 8, priced };
    let mut planner = Planner::new(&shape, cache, forecaster, limits);
    planner.link(BYTES, BYTES, 0);
    planner
}

/// Each token uses two experts that the previous one did not; the token says
/// which.
fn both_change(token: u32, layer: u32) -> [u32; 2] {
    let first = 32 + (token % 4 * 2 + layer * 2) % 8;
    [first, first + 1]
}

/// Half of the work is always the same expert's.
fn one_stays(token: u32, layer: u32) -> [u32; 2] {
    [0, both_change(token, layer)[0]]
}

/// [`decode_at`] a cost of forecasting of an eighth of a read.
fn decode(planner: &mut Planner, experts: fn(u32, u32) -> [u32; 2], worked_ns: u64) -> usize {
    decode_at(planner, experts, worked_ns, BYTES / 8)
}

/// Everything that is ordered lands before the next event, computing one takes
/// `worked_ns`, forecasting for a layer `cost_ns`. Answers how many prefetches
/// tokens 200..300 ordered.
fn decode_at(
    planner: &mut Planner,
    experts: fn(u32, u32) -> [u32; 2],
    worked_ns: u64,
    cost_ns: u64,
) -> usize {
    let (mut request, mut retire, mut ahead) = (Request::default(), Retire::default(), Vec::new());
    let mut late = 0;
    for token in 0..300u32 {
        planner.begin_token(token % 4);
        for layer in 0..LAYERS {
            let experts = experts(token, layer as u32);
            if planner.wants(layer) {
                planner.spent(layer, cost_ns);
            }
            planner.routed(layer, &experts, &[0.5, 0.5]);
            planner.request(layer, &experts, &mut request);
            assert!(request.retire.discard.is_empty() && request.in_flight.is_empty());
            for &id in &request.missing {
                planner.filling(id);
                assert_eq!(planner.arrived(id, Landing::Ready), Arrival::Use);
            }
            request.resident.iter().for_each(|&id| planner.computed(id));
            for &id in request.missing.iter().chain(&request.early) {
                let _ = planner.admit(id, &|_: ExpertId| false);
            }
            planner.prefetch(&|_| 4, &mut ahead);
            for &id in &ahead {
                assert_eq!(planner.arrived(id, Landing::Ready), Arrival::Keep);
            }
            late += if token >= 200 { ahead.len() } else { 0 };
            planner.end(layer, 0, worked_ns, &mut retire);
        }
    }
    late
}

#[test]
fn a_forecast_that_is_right_goes_on() {
    let mut planner = planner("token", true);
    let late = decode(&mut planner, both_change, 4 * BYTES);
    let traffic = planner.ledger().traffic();
    assert!(late >= 300, "{late} prefetches, {traffic:?}");
    assert!(traffic.precision().unwrap() > 0.9, "{traffic:?}");
    assert!(traffic.saved_ns > 300 * BYTES && traffic.useful * BYTES == traffic.useful_bytes);
}

#[test]
fn a_forecast_that_is_wrong_is_stopped_unless_prices_are_off() {
    let mut priced = planner("inverse", true);
    let stopped = decode(&mut priced, both_change, 0);
    let mut free = planner("inverse", false);
    let wasteful = decode(&mut free, both_change, 0);
    assert!(free.ledger().traffic().precision().unwrap() < 0.1);
    assert!(stopped * 4 < wasteful, "{stopped} with prices, {wasteful} without");
    assert!(priced.ledger().prices().iter().any(|price| price.switched_off > 0));
}

/// Of two reads a token, at most both are saved.
#[test]
fn a_forecast_that_costs_more_than_it_saves_is_stopped() {
    let late = |cost_ns| decode_at(&mut planner("token", true), both_change, 4 * BYTES, cost_ns);
    let (cheap, dear) = (late(BYTES / 8), late(3 * BYTES));
    assert!(dear * 4 < cheap, "{dear} of {cheap}");
}

#[test]
fn a_forecast_of_reads_that_computing_hides_is_stopped() {
    let mut seen = planner("token", true);
    let needed = decode(&mut seen, one_stays, BYTES / 4);
    let mut hidden = planner("token", true);
    let needless = decode(&mut hidden, one_stays, 4 * BYTES);
    assert!(needed >= 150, "{needed}: {:?}", seen.ledger().traffic());
    assert!(needless * 4 < needed, "{needless} of {needed}: {:?}", hidden.ledger().traffic());
    assert_eq!(hidden.ledger().traffic().saved_ns, 0);
}

#[test]
fn forecasting_that_leads_to_nothing_is_stopped() {
    let mut planner = planner("token", true);
    let mut wanted = Vec::new();
    for token in 0..200 {
        planner.begin_token(token);
        wanted.push(planner.wants(0));
        if wanted[token as usize] {
            planner.spent(0, 1000);
        }
    }
    let first_off = wanted.iter().position(|wanted| !wanted).unwrap();
    let on_again = first_off + wanted[first_off..].iter().position(|&wanted| wanted).unwrap();
    assert!((20..40).contains(&first_off), "{first_off}");
    assert_eq!(on_again - first_off, 64);
    assert!(wanted[on_again..].contains(&false), "the second trial goes on for ever");
}

/// 60 chunks of 32 tokens, each of which uses every other expert: the even ones
/// and the odd ones in turns, so that half of what is fetched ahead is of use.
/// Answers how many prefetches the last 20 ordered.
fn prefill(planner: &mut Planner, worked_ns: u64) -> usize {
    let (mut request, mut retire, mut ahead) = (Request::default(), Retire::default(), Vec::new());
    let mut late = 0;
    for chunk in 0..60u32 {
        planner.begin_chunk(&[0; 32]);
        for layer in 0..LAYERS {
            let experts: Vec<u32> = (0..32).map(|index| 2 * index + chunk % 2).collect();
            for token in 0..32 {
                let chosen = [experts[token], experts[(token + 1) % 32]];
                planner.routed(layer, &chosen, &[0.5, 0.5]);
            }
            planner.request(layer, &experts, &mut request);
            for &id in &request.missing {
                planner.filling(id);
                assert_eq!(planner.arrived(id, Landing::Ready), Arrival::Use);
            }
            request.resident.iter().for_each(|&id| planner.computed(id));
            for &id in request.missing.iter().chain(&request.early) {
                let _ = planner.admit(id, &|_: ExpertId| false);
            }
            planner.prefetch(&|_| 8, &mut ahead);
            for &id in &ahead {
                assert_eq!(planner.arrived(id, Landing::Ready), Arrival::Keep);
            }
            late += if chunk >= 40 { ahead.len() } else { 0 };
            planner.end(layer, 0, worked_ns, &mut retire);
        }
    }
    late
}

#[test]
fn a_chunks_reads_ahead_stop_where_computing_hides_them_anyway() {
    let mut seen = planner("token", true);
    let needed = prefill(&mut seen, BYTES);
    let mut hidden = planner("token", true);
    let needless = prefill(&mut hidden, 400 * BYTES);
    assert!(needed >= 200, "{needed}: {:?}", seen.ledger().chunk_traffic());
    assert!(needless * 2 < needed, "{needless} of {needed}");
    let mut unpriced = planner("token", false);
    assert_eq!(prefill(&mut unpriced, 400 * BYTES), needed);
    // A token's have books of their own.
    assert_eq!(hidden.ledger().traffic().issued, 0);
    assert!(!(0..LAYERS).all(|layer| hidden.ledger().allows(layer)));
    hidden.begin_token(0);
    assert!((0..LAYERS).all(|layer| hidden.wants(layer)));
}
