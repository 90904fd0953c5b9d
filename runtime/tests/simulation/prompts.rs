//! A prompt on the machine's clock: reads overlap with computing, within a
//! layer and from one to the next. Time is virtual and the same in every run,
//! so it may be asserted.

use super::disk::{Copies, Link};
use super::faults::Plan;
use super::machine::{Compute, Settings};
use super::world::{Config, PROMPTS, World, cpu};
use pregate_runtime::Cancel;
use pregate_runtime::statistics::LayerStats;

/// What a prompt of the tiny model took and did.
struct Took {
    ns: u64,
    stats: LayerStats,
    /// Reads of one expert of each layer.
    first_reads_ns: u64,
}

/// As many slots as a token has experts, one read at a time, and the whole
/// prompt as one chunk.
fn run(world: &World, forecast: &'static str, ring: usize, compute: Compute) -> Took {
    let config = Config {
        slots: world.top_k,
        ring,
        policy: "forecast-aware",
        forecast,
        horizon: 1,
        threshold: 0.5,
        prefill_chunk: 64,
        copies: Copies::Lazy,
        threads: 1,
    };
    let link = Link { latency_ns: 2, bytes_per_us: 100, depth: 1, chunk_bytes: 1 << 20 };
    let (copies, plan) = (config.copies, Plan::Clean);
    let settings = Settings { seed: 1, link, copies, plan, step_ns: 0, compute };
    let running = world.start_on(&config, settings, &cpu(1));
    let mut session = running.session();
    let logits = running.feed(&mut session, PROMPTS[0], &Cancel::new()).unwrap();
    assert!(logits == world.oracle[0], "I1: {forecast}, {ring}");
    let layout = running.model.store().expect("streamed").layout();
    let read_ns = |class: usize| layout.class_bytes[class] as u64 * 1000 / link.bytes_per_us;
    let first_reads_ns = layout.shape.moe().map(|(_, layer)| read_ns(layer.class)).sum();
    Took { ns: running.machine.now(), stats: running.stats().prefill.total(), first_reads_ns }
}

#[test]
fn while_one_half_of_the_ring_is_computed_the_other_is_read() {
    let world = World::tiny("prompts-ring");
    // Computing takes longer than reading, so that all but the first read of
    // each layer can be hidden; with one frame none can.
    let compute = Compute { expert_ns: 800_000, attention_ns: 0 };
    let [one, two, four] = [1, 2, 4].map(|ring| run(&world, "none", ring, compute));
    println!("{} {} {}: {:?}", one.ns, two.ns, four.ns, four.stats);
    for (ring, took) in [(2, &two), (4, &four)] {
        let stall_ns = took.stats.stall_ns;
        assert!(stall_ns <= took.first_reads_ns + 100, "{ring} frames: {stall_ns} ns");
    }
    assert!(one.ns > two.ns + 2 * one.first_reads_ns, "{} with one, {} with two", one.ns, two.ns);
    assert_eq!(four.stats.bytes_prefetch, 0);
    // A ring that was filled ahead would be one part, behind which everything
    // is waited for.
    let compute = Compute { expert_ns: 400_000, attention_ns: 1_000_000 };
    let ahead = run(&world, "frequency", 2, compute);
    assert_eq!(ahead.stats.stall_ns, 0, "{:?}", ahead.stats);
}

#[test]
fn the_next_layers_experts_come_while_this_one_is_computed() {
    let world = World::tiny("prompts-ahead");
    let compute = Compute { expert_ns: 100_000, attention_ns: 1_000_000 };
    let (none, ahead) = (run(&world, "none", 4, compute), run(&world, "frequency", 4, compute));
    let ratio = ahead.ns as f64 / none.ns as f64;
    println!("{} ns, {} ns ahead of demand: {ratio:.3}; {:?}", none.ns, ahead.ns, ahead.stats);
    assert!(ratio < 0.85, "{ratio}");
    // Before the first layer as well: of each class of frames a ring, at least.
    let LayerStats { prefetch_useful, bytes_prefetch, hits, in_flight, misses, .. } = ahead.stats;
    assert!(prefetch_useful >= 8 && bytes_prefetch > 0, "{:?}", ahead.stats);
    assert_eq!(hits + in_flight + misses, none.stats.misses, "the same experts");
}
