//! The price list adds up, and the switch stops what loses.

use pregate_predictor::Shape;
use pregate_predictor::ledger::{Answer, Ledger, Pass, Pricing};

const BYTES: u64 = 1000;

fn ledger() -> Ledger {
    let mut ledger = Ledger::new(&Shape::uniform(2, 8, 2, BYTES), vec!["one", "two"], 1);
    // One nanosecond per byte.
    ledger.link(BYTES, BYTES, 0);
    ledger
}

/// One token of layer 0 with one prefetch, if it is allowed.
fn token(ledger: &mut Ledger, useful: bool) -> bool {
    let allowed = ledger.allows(0);
    if allowed {
        ledger.issued(0, BYTES);
        if useful {
            ledger.useful(0, BYTES, 0);
        } else {
            ledger.wasted(0, BYTES, BYTES);
        }
    }
    ledger.next_pass(Pass::Token);
    allowed
}

#[test]
fn recalls_are_counted_per_layer_and_in_total() {
    let mut ledger = ledger();
    let at = |layer, column| Answer { layer, column, ahead: 1 };
    ledger.judge(at(0, 0), &[1, 2], &[2, 1], &[0.75, 0.25]);
    ledger.judge(at(1, 0), &[1, 2], &[2, 5], &[0.75, 0.25]);
    ledger.judge(at(1, 1), &[], &[2, 5], &[f32::NAN, 0.25]);
    ledger.judge(at(7, 0), &[1], &[1], &[1.0]);
    ledger.judge(at(0, 9), &[1], &[1], &[1.0]);
    let tally = ledger.tally(at(1, 0));
    assert_eq!((tally.slot_recall(), tally.whole_set_rate()), (Some(0.5), Some(0.0)));
    assert_eq!(tally.gate_mass_recall(), Some(0.75));
    let totals = ledger.totals();
    assert_eq!(totals.len(), 2);
    assert_eq!((totals[0].forecast, totals[0].layer, totals[0].ahead), ("one", None, 1));
    assert_eq!(totals[0].tally.slot_recall(), Some(0.75));
    assert_eq!(totals[0].tally.whole_set_rate(), Some(0.5));
    assert_eq!(totals[0].tally.gate_mass_recall(), Some(0.875));
    assert_eq!(totals[1].tally.gate_mass_recall(), Some(0.0));
}

#[test]
fn bytes_and_time_add_up() {
    let mut ledger = ledger();
    for _ in 0..4 {
        ledger.issued(1, BYTES);
    }
    ledger.useful(1, BYTES, 0);
    ledger.useful(1, BYTES, 400);
    ledger.wasted(1, BYTES, 100);
    ledger.stalled(1, 77);
    ledger.link(0, 0, 33);
    let traffic = ledger.traffic();
    assert_eq!(
        (traffic.issued_bytes, traffic.useful_bytes, traffic.wasted_bytes),
        (4000, 2000, 1000)
    );
    assert_eq!(traffic.saved_ns, 1000 + 600);
    assert_eq!(traffic.lost_ns, 100 + 50, "in the way, and the surcharge on all of it");
    assert_eq!(traffic.stall_ns, 77);
    assert_eq!(traffic.precision(), Some(2.0 / 3.0));
    assert_eq!(ledger.link_use().idle_ns, 33);
    assert_eq!(ledger.prices().len(), 1, "layer 0 did nothing");
    assert!((ledger.prices()[0].balance_ns - 1450.0).abs() < 1e-6);
}

#[test]
fn what_pays_stays_on() {
    let mut ledger = ledger();
    for index in 0..2000 {
        assert!(token(&mut ledger, index % 4 != 0), "switched off at token {index}");
    }
}

#[test]
fn what_loses_is_switched_off_and_tried_ever_less() {
    let mut ledger = ledger();
    let on: Vec<usize> = (0..20_000).filter(|_| token(&mut ledger, false)).collect();
    let pauses: Vec<usize> = on.windows(2).map(|w| w[1] - w[0]).filter(|&gap| gap > 1).collect();
    let pricing = Pricing::default();
    assert_eq!(pauses[0] as u64, pricing.first_pause + 1);
    assert!(pauses.windows(2).all(|w| w[1] >= w[0]) && pauses.len() >= 6, "{pauses:?}");
    assert!(on.len() * 100 < 20_000 * 2, "it was on for {} of 20000 tokens", on.len());
    assert!(ledger.prices()[0].switched_off >= 6);
}

#[test]
fn useless_bytes_in_idle_time_are_no_reason_to_go_on() {
    let mut ledger = ledger();
    for _ in 0..40 {
        ledger.issued(0, BYTES);
        ledger.wasted(0, BYTES, 0);
        ledger.next_pass(Pass::Token);
    }
    assert!(!ledger.allows(0));
    assert!(ledger.allows(1), "the other layer is judged by itself");
}

#[test]
fn it_comes_back_when_the_world_changes() {
    let mut ledger = ledger();
    for _ in 0..100 {
        token(&mut ledger, false);
    }
    assert!(!ledger.allows(0));
    let later: Vec<bool> = (0..400).map(|_| token(&mut ledger, true)).collect();
    assert!(later[200..].iter().all(|&on| on), "it pays now, and is still off");
}

#[test]
fn the_links_speed_follows_what_is_measured() {
    let mut ledger = ledger();
    assert_eq!(ledger.link_use().ns_per_byte, 1.0);
    ledger.link(2_000_000_000, 6_000_000_000, 0);
    assert_eq!(ledger.link_use().ns_per_byte, 3.0);
    ledger.link(u64::MAX, u64::MAX, u64::MAX);
    assert!(ledger.link_use().ns_per_byte.is_finite());
    ledger.useful(0, u64::MAX, 0);
    ledger.useful(0, u64::MAX, 0);
    ledger.wasted(9, u64::MAX, u64::MAX);
    assert!(ledger.prices()[0].balance_ns.is_finite());
}

#[test]
fn without_a_measured_link_nothing_has_a_price() {
    let mut ledger = Ledger::new(&Shape::uniform(1, 8, 2, BYTES), vec!["one"], 1);
    for _ in 0..200 {
        ledger.issued(0, BYTES);
        ledger.wasted(0, BYTES, BYTES);
        ledger.next_pass(Pass::Token);
    }
    assert!(ledger.allows(0));
    assert_eq!(ledger.traffic().wasted_bytes, 200 * BYTES);
}
