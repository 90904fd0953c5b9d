use super::*;
use pregate_predictor::LayerShape;

/// Experts of 1000 bytes; a byte a nanosecond, two beside the processor.
fn tier() -> VirtualTier {
    tier_of(1000)
}

fn tier_of(expert_bytes: u64) -> VirtualTier {
    let layer = LayerShape { experts: 8, top_k: 2, expert_bytes, class: 0 };
    let shape = Shape { layers: vec![Some(layer)] };
    let figure = |value: f64| Figure::from(value);
    let wire = Rate::new(&figure(1.0), &figure(0.5), &figure(0.0));
    VirtualTier::new(&shape, wire, &[4])
}

fn id(expert: u32) -> ExpertId {
    ExpertId::new(0, expert)
}

#[test]
fn the_processor_is_slower_while_the_wire_moves_something() {
    let mut tier = tier();
    tier.compute(600.0, 3.0);
    assert_eq!(tier.now_ns(), 600, "nothing moves");
    tier.submit(id(0), Urgency::Prefetch);
    // It began alone: 1000 ns, in which a third of the work is done.
    tier.compute(600.0, 3.0);
    assert_eq!(tier.now_ns(), 600 + 1000 + 267);
    let landed = tier.next(0).expect("it has landed meanwhile");
    assert_eq!((landed.id, landed.ended_ns), (id(0), 1600));
    assert_eq!(tier.moved().busy_ns, 1000);
    // One that begins beside the processor takes twice as long.
    tier.submit(id(1), Urgency::Prefetch);
    tier.submit(id(2), Urgency::Prefetch);
    tier.compute(5000.0, 1.0);
    let ends: Vec<u64> = std::iter::from_fn(|| tier.next(0)).map(|one| one.ended_ns).collect();
    assert_eq!(ends, [1867 + 1000, 1867 + 3000]);
}

#[test]
fn the_wire_says_what_comes_before_a_demand() {
    let mut tier = tier();
    assert_eq!((tier.queued(), tier.remaining(id(0))), (0, None));
    tier.submit(id(0), Urgency::Prefetch);
    tier.submit(id(1), Urgency::Prefetch);
    // The chunk that moves; the other would be overtaken.
    assert_eq!(tier.queued(), 1000);
    tier.submit(id(2), Urgency::Demand);
    assert_eq!(tier.queued(), 2000);
    assert_eq!(tier.remaining(id(1)), Some(3000));
    assert_eq!(tier.remaining(id(2)), Some(2000));
    // Busy is what was, not what is to come.
    tier.work(250);
    assert_eq!(tier.moved().busy_ns, 250);
}

/// All that lands, and in which chunk it did.
fn landings(tier: &mut VirtualTier) -> Vec<(u32, u64)> {
    let all = std::iter::from_fn(|| tier.next(u64::MAX));
    all.map(|landed| (landed.id.expert, landed.ended_ns / CHUNK_BYTES)).collect()
}

#[test]
fn whoever_comes_goes_or_is_promoted_changes_whose_chunk_is_next() {
    let mut tier = tier_of(3 * CHUNK_BYTES);
    tier.submit(id(0), Urgency::Prefetch);
    tier.submit(id(1), Urgency::Prefetch);
    // In the second chunk of the first one.
    tier.work(CHUNK_BYTES * 3 / 2);
    tier.submit(id(2), Urgency::Demand);
    tier.work(CHUNK_BYTES);
    tier.promote(id(1));
    assert_eq!(landings(&mut tier), [(2, 5), (1, 8), (0, 9)]);
    // One that was given up and does not move goes at once.
    let mut tier = tier_of(3 * CHUNK_BYTES);
    (0..3).for_each(|expert| tier.submit(id(expert), Urgency::Prefetch));
    tier.work(CHUNK_BYTES * 3 / 2);
    tier.promote(id(2));
    tier.work(CHUNK_BYTES);
    tier.discard(id(0));
    assert_eq!(landings(&mut tier), [(0, 2), (2, 5), (1, 8)]);
}

#[test]
fn who_is_not_in_memory_waits_and_is_then_first() {
    let layer = LayerShape { experts: 8, top_k: 2, expert_bytes: 3 * CHUNK_BYTES, class: 0 };
    let shape = Shape { layers: vec![Some(layer)] };
    let mut tier = tier_of(3 * CHUNK_BYTES);
    let disk = Rate::new(&Figure::from(2.0), &Figure::from(2.0), &Figure::from(0.0));
    let mut ram = Lru::new(&shape, &[1]);
    ram.event(0, &[0]);
    tier.below = Some(Below::new(disk, ram));
    // The demand is read from disk for the time of a chunk and a half.
    tier.submit(id(0), Urgency::Prefetch);
    tier.submit(id(1), Urgency::Demand);
    assert_eq!(landings(&mut tier), [(1, 5), (0, 6)]);
}

#[test]
fn a_copy_and_the_host_wait_for_the_same_read() {
    let layer = LayerShape { experts: 8, top_k: 2, expert_bytes: 1000, class: 0 };
    let shape = Shape { layers: vec![Some(layer)] };
    let disk = Rate::new(&Figure::from(0.5), &Figure::from(0.5), &Figure::from(10.0));
    let mut below = Below::new(disk, Lru::new(&shape, &[1]));
    below.used(0, &[3]);
    assert_eq!(below.read(id(3), 5, 1000), 5, "memory has it");
    assert_eq!(below.read(id(0), 5, 1000), 2015);
    assert_eq!(below.read(id(0), 5, 1000), 2015, "it is coming");
    assert_eq!(below.read(id(0), 3000, 1000), 3000, "it is there");
    assert_eq!(below.bytes, 1000);
    // The layer ran: memory keeps what it used last.
    below.used(0, &[0]);
    assert_eq!(below.read(id(0), 3000, 1000), 3000);
    below.used(0, &[3]);
    assert_eq!(below.read(id(0), 3000, 1000), 5010, "it is gone");
    assert_eq!(below.bytes, 2000);
}
