//! Experts that the CPU computes and an idle link brings for later: when they
//! come, who leaves for them, and what the ledger says that it was worth.

use pregate_predictor::policy;
use pregate_predictor::{
    Admission, Ahead, Arrival, Cache, Event, ExpertId, Landing, LayerShape, NoOutlook, Planner,
    Request, Retire, Shape,
};

const SAVES_NS: u64 = 1_000_000;

/// Two layers of eight experts, two of each token, in three slots each.
fn planner(priced: bool) -> Planner {
    let layer = LayerShape { experts: 8, top_k: 2, expert_bytes: 1_000_000, class: 0 };
    let shape = Shape { layers: vec![Some(layer); 2] };
    let cache = Cache::new(&shape, &[3; 2], policy::by_name("lru").unwrap()).unwrap();
    let mut planner = Planner::new(&shape, cache, None, Ahead { priced, ..Ahead::default() });
    // A byte a nanosecond.
    planner.link(1_000_000_000, 1_000_000_000, 0);
    planner.begin_token(0);
    planner
}

fn id(expert: u32) -> ExpertId {
    ExpertId::new(0, expert)
}

/// An event of layer 0, in which the CPU computes what is nowhere and of that
/// keeps what `keeps` says. What is on its way is waited for.
fn event(planner: &mut Planner, experts: &[u32], keeps: &[u32]) -> (Request, Vec<ExpertId>) {
    let (mut request, mut kept) = (Request::default(), Vec::new());
    planner.routed(0, experts, &vec![0.5; experts.len()]);
    planner.request(0, experts, &mut request);
    planner.keep(keeps.iter().map(|&one| (id(one), SAVES_NS)), 8, &mut kept);
    end(planner);
    (request, kept)
}

fn end(planner: &mut Planner) {
    let mut retire = Retire::default();
    planner.end(0, 0, 0, &mut retire);
    assert_eq!(retire, Retire::default(), "nothing of what is kept is given up");
}

fn land(planner: &mut Planner, expert: u32) -> Admission {
    assert_eq!(planner.arrived(id(expert), Landing::Ready), Arrival::Keep);
    assert_eq!(planner.next_kept(0), None, "the device may still look for it");
    assert_eq!(planner.next_kept(1), Some(id(expert)));
    planner.admit_kept(id(expert), &|_| false)
}

#[test]
fn what_was_kept_is_there_when_it_is_used_again() {
    let mut planner = planner(true);
    let (request, kept) = event(&mut planner, &[0, 1], &[1]);
    assert_eq!((request.missing, kept), (vec![id(0), id(1)], vec![id(1)]));
    assert_eq!(planner.keeps_coming(), 1);
    assert_eq!(land(&mut planner, 1), Admission::Added);
    assert_eq!(planner.keeps_coming(), 0);
    let (request, _) = event(&mut planner, &[1, 2], &[]);
    assert_eq!((request.resident, request.missing), (vec![id(1)], vec![id(2)]));
    // Its first use is what it saved.
    event(&mut planner, &[1, 2], &[]);
    let books = planner.ledger().kept_traffic();
    assert_eq!([books.issued, books.useful, books.wasted], [1, 1, 0]);
    assert_eq!([books.saved_ns, books.lost_ns], [SAVES_NS, 0]);
    // It is no prefetch, which has books of its own.
    assert_eq!(planner.ledger().traffic().issued, 0);
}

#[test]
fn only_what_the_open_event_computes_is_kept() {
    let mut planner = planner(true);
    let (_, kept) = event(&mut planner, &[0, 1], &[7, 0]);
    assert_eq!(kept, [id(0)]);
    land(&mut planner, 0);
    let (_, kept) = event(&mut planner, &[0, 1], &[0]);
    assert_eq!(kept, [], "it is resident");
    planner.keep([(id(1), 1)], 8, &mut Vec::new());
    assert_eq!(planner.keeps_coming(), 0, "no event is open");
}

#[test]
fn who_left_and_is_missed_and_what_nobody_used_are_losses() {
    let mut planner = planner(false);
    for expert in 0..3 {
        event(&mut planner, &[expert, 7], &[expert]);
        assert_eq!(land(&mut planner, expert), Admission::Added);
    }
    for expert in 0..3 {
        event(&mut planner, &[expert, 7], &[]);
    }
    assert_eq!(planner.ledger().kept_traffic().lost_ns, 0);
    event(&mut planner, &[4, 7], &[4]);
    assert_eq!(land(&mut planner, 4), Admission::Replaced(id(0)));
    event(&mut planner, &[0, 7], &[0]);
    let books = planner.ledger().kept_traffic();
    assert_eq!(books.lost_ns, SAVES_NS, "0 would have been there");
    // Others come before 4 was used.
    land(&mut planner, 0);
    for expert in [5, 6] {
        event(&mut planner, &[expert, 7], &[expert]);
        land(&mut planner, expert);
    }
    event(&mut planner, &[5, 6], &[]);
    let books = planner.ledger().kept_traffic();
    assert_eq!(books.wasted, 1, "{books:?}");
}

#[test]
fn a_demand_that_waits_behind_it_is_its_price_once() {
    let mut planner = planner(true);
    event(&mut planner, &[0, 1], &[0]);
    let mut request = Request::default();
    planner.request(1, &[2, 3], &mut request);
    planner.filling(ExpertId::new(1, 2));
    planner.filling(ExpertId::new(1, 3));
    assert_eq!(planner.ledger().kept_traffic().lost_ns, 1_000_000);
}

#[test]
fn what_comes_too_late_is_left_to_the_cpu_and_stays_for_later() {
    let mut planner = planner(true);
    event(&mut planner, &[0, 1], &[1]);
    let mut request = Request::default();
    planner.request(0, &[1, 2], &mut request);
    assert_eq!(request.in_flight, [id(1)]);
    planner.leave(id(1));
    end(&mut planner);
    assert_eq!(land(&mut planner, 1), Admission::Added);
    // One that was waited for saved nothing.
    event(&mut planner, &[3, 4], &[3]);
    planner.request(0, &[3, 1], &mut request);
    assert_eq!((&request.in_flight[..], &request.resident[..]), (&[id(3)][..], &[id(1)][..]));
    assert_eq!(planner.arrived(id(3), Landing::Ready), Arrival::Use);
    planner.computed(id(3));
    let _ = planner.admit(id(3), &|_| false);
    end(&mut planner);
    let books = planner.ledger().kept_traffic();
    assert_eq!([books.issued, books.useful], [2, 2]);
    assert_eq!(books.saved_ns, SAVES_NS);
}

#[test]
fn a_read_ahead_that_is_left_to_the_cpu_is_not_in_the_books_of_keeping() {
    let mut planner = planner(true);
    let mut out = Vec::new();
    planner.fetch_ahead([id(2)], &|_| 4, &mut out);
    assert_eq!(out, [id(2)]);
    let mut request = Request::default();
    planner.request(0, &[2, 3], &mut request);
    assert_eq!(request.in_flight, [id(2)]);
    planner.leave(id(2));
    end(&mut planner);
    land(&mut planner, 2);
    planner.request(0, &[2, 3], &mut request);
    assert!(request.resident.contains(&id(2)), "it came for later");
    end(&mut planner);
    let books = planner.ledger().kept_traffic();
    assert_eq!([books.issued, books.useful, books.wasted, books.lost_ns], [0; 4], "{books:?}");
}

#[test]
fn the_books_stop_what_loses() {
    let mut planner = planner(true);
    let mut kept = 0;
    for token in 0..64 {
        planner.begin_token(token);
        // Each is another, and none is ever used again in time.
        let expert = token % 7;
        if !planner.cache().contains(id(expert)) {
            let (_, keeps) = event(&mut planner, &[expert, 7], &[expert]);
            kept += keeps.len();
            for one in keeps {
                land(&mut planner, one.expert);
            }
        }
    }
    assert!((12..32).contains(&kept), "{kept}");
    let price = planner.ledger().kept_prices()[0];
    assert!(!price.on && price.switched_off == 1, "{price:?}");
}

fn used(cache: &mut Cache, layer: usize, experts: &[u32]) {
    let counts = &vec![1; experts.len()];
    cache.used(&Event { layer, experts, counts, tokens: 1 });
}

/// Layers that share six slots: two experts of layer 0 and two of layer 1 that
/// are used often, and two of layer 1 that were used once.
fn pool() -> Cache {
    let layer = LayerShape { experts: 8, top_k: 2, expert_bytes: 1, class: 0 };
    let shape = Shape { layers: vec![Some(layer); 2] };
    let mut cache = Cache::new(&shape, &[3; 2], policy::by_name("lfu-pool").unwrap()).unwrap();
    let add = |cache: &mut Cache, layer, expert| {
        let got = cache.admit(ExpertId::new(layer, expert), &|_| false, &NoOutlook);
        assert_eq!(got, Admission::Added);
    };
    for token in 0..8 {
        cache.next_token();
        for layer in 0..2 {
            used(&mut cache, layer, &[0, 1]);
            (0..2).filter(|_| token == 0).for_each(|expert| add(&mut cache, layer, expert));
        }
    }
    used(&mut cache, 1, &[2, 3]);
    (2..4).for_each(|expert| add(&mut cache, 1, expert));
    cache
}

/// Layer 0 asks for a new one, while the device may still find what layer 1
/// has: one of its own leaves.
fn ask(cache: &mut Cache) {
    cache.next_token();
    used(cache, 0, &[0, 2]);
    let got = cache.admit(id(2), &|other| other.layer() > 0, &NoOutlook);
    assert_eq!(got, Admission::Replaced(id(1)));
}

#[test]
fn who_was_pinned_and_worth_less_leaves_between_two_tokens() {
    let (mut cache, mut out) = (pool(), Vec::new());
    ask(&mut cache);
    assert_eq!((cache.len(0), cache.len(1)), (2, 4));
    cache.let_go(&mut out);
    assert!(matches!(out[..], [one] if one.layer() == 1 && one.expert >= 2), "{out:?}");
    assert!(!cache.contains(out[0]));
    // Once, and the slot is for whoever comes first.
    cache.let_go(&mut out);
    assert_eq!(out, []);
    used(&mut cache, 0, &[0, 1]);
    assert_eq!(cache.admit(id(1), &|other| other.layer() > 0, &NoOutlook), Admission::Added);
    assert_eq!((cache.len(0), cache.len(1)), (3, 3));
}

#[test]
fn who_was_pinned_and_used_again_stays() {
    let (mut cache, mut out) = (pool(), Vec::new());
    ask(&mut cache);
    used(&mut cache, 1, &[2, 3]);
    cache.let_go(&mut out);
    assert_eq!(out, []);
    assert_eq!((cache.len(0), cache.len(1)), (2, 4));
}
