//! Wall time has the last word on reading ahead: the machine's clock reaches
//! the planner, stops what loses and lets what gains go on, also where noise
//! is in it. The answers stay what they are. Time is virtual and the same in
//! every run, so it may be asserted.

use super::disk::{Copies, Link};
use super::faults::Plan;
use super::machine::{Compute, Settings};
use super::world::{Config, PROMPTS, World, cpu, greedy};
use pregate_runtime::Cancel;

const CONVERSATIONS: usize = 10;
/// Greedy tokens of each.
const TOKENS: usize = 50;

#[derive(Clone, Copy)]
struct Place {
    forecast: &'static str,
    compute: Compute,
    /// Between two looks at the clock passes a time of its own, up to this.
    step_ns: u64,
}

/// What the conversations took.
#[derive(Debug)]
struct Took {
    ns: u64,
    answers: Vec<u32>,
    switched_off: u64,
    pays: bool,
    /// Tokens behind which reading ahead was on.
    on: usize,
}

fn run(world: &World, place: Place) -> Took {
    let Place { forecast, compute, step_ns } = place;
    let config = Config {
        slots: world.top_k + 1,
        ring: 4,
        policy: "lru",
        forecast,
        horizon: 1,
        threshold: 0.1,
        prefill_chunk: 64,
        copies: Copies::Lazy,
        threads: 1,
    };
    let (copies, plan) = (config.copies, Plan::Clean);
    let link = Link { latency_ns: 2, bytes_per_us: 100, depth: 1, chunk_bytes: 1 << 20 };
    let settings = Settings { seed: 3, link, copies, plan, step_ns, compute };
    let running = world.start_on(&config, settings, &cpu(1));
    let store = running.model.store().expect("streamed");
    let (cancel, mut answers, mut on) = (Cancel::new(), Vec::new(), 0);
    for conversation in 0..CONVERSATIONS {
        let mut session = running.session();
        let mut next = PROMPTS[0].to_vec();
        next[0] = 5 + conversation as u32;
        for _ in 0..TOKENS {
            let logits = running.feed(&mut session, &next, &cancel).unwrap();
            next = vec![greedy(&logits)];
            answers.extend_from_slice(&next);
            on += usize::from(store.with_planner(|planner| planner.ledger().pays()));
        }
    }
    let (switched_off, pays) =
        store.with_planner(|planner| (planner.ledger().switched_off(), planner.ledger().pays()));
    Took { ns: running.machine.now(), answers, switched_off, pays, on }
}

/// An attention in whose time four experts are read.
const LONG: Compute = Compute { expert_ns: 100_000, attention_ns: 1_000_000 };
/// Nothing in whose time anything is read.
const SHORT: Compute = Compute { expert_ns: 10_000, attention_ns: 0 };

#[test]
fn reading_ahead_that_gains_goes_on_whatever_the_noise() {
    let world = World::tiny("wall-gains");
    for (step_ns, most) in [(0, 0.92), (30_000, 0.97)] {
        let place = |forecast| Place { forecast, compute: LONG, step_ns };
        let (none, ahead) = (run(&world, place("none")), run(&world, place("frequency")));
        let ratio = ahead.ns as f64 / none.ns as f64;
        println!("{step_ns}: {ratio:.3}, on for {}", ahead.on);
        assert!(ratio < most && ahead.pays, "{step_ns}: {ratio}, {ahead:?}");
        // A trial is half without.
        assert!(ahead.on > CONVERSATIONS * TOKENS * 3 / 4, "{step_ns}: {}", ahead.on);
        assert!(ahead.answers == none.answers, "I2: other answers");
        assert_eq!(none.switched_off, 0, "nothing to switch off");
    }
}

#[test]
fn reading_ahead_that_loses_is_stopped_by_the_clock() {
    let world = World::tiny("wall-loses");
    let place = |forecast| Place { forecast, compute: SHORT, step_ns: 0 };
    let (none, ahead) = (run(&world, place("none")), run(&world, place("frequency")));
    let ratio = ahead.ns as f64 / none.ns as f64;
    println!("{ratio:.3}, on for {}", ahead.on);
    assert!(ahead.switched_off > 0 && !ahead.pays, "{ahead:?}");
    assert!(ahead.on < CONVERSATIONS * TOKENS / 4 && ratio < 1.02, "{ratio}, {}", ahead.on);
    assert!(ahead.answers == none.answers, "I2: other answers");
}
