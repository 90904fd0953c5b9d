//! Runs drawn from a seed with the full plan of faults, each twice: the same
//! seed gives the same run, and whatever goes wrong, every answer is right or
//! an error that says why, and the next one is right again.

use super::disk::Copies;
use super::faults::Plan;
use super::identity::{forecasts, in_parallel, link};
use super::random::Random;
use super::world::{ANSWER, Config, PROMPTS, Running, World, greedy};
use pregate_kernels::Backend;
use pregate_predictor::policy;
use pregate_runtime::store::mover::MoveError;
use pregate_runtime::{Cancel, Error};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Seeds in a run of the tests.
const SEEDS: u64 = 2000;

/// What a run was worth, for the sums at the end.
#[derive(Default)]
struct Tally {
    events: BTreeMap<&'static str, u64>,
}

impl Tally {
    fn add(&mut self, what: &'static str, count: u64) {
        *self.events.entry(what).or_default() += count;
    }
}

fn config(random: &mut Random, world: &World) -> Config {
    Config {
        slots: random.pick(&world.slots()),
        ring: 1 + random.below(4) as usize,
        policy: random.pick(&policy::NAMES),
        forecast: random.pick(&forecasts()),
        horizon: 1 + random.below(3) as usize,
        threshold: random.pick(&[0.0, 0.1, 0.5]),
        prefill_chunk: random.pick(&[1, 4, 64]),
        copies: random.pick(&Copies::ALL),
        threads: 1,
    }
}

/// A plan of faults; a quarter of the seeds has none and is only cancelled.
fn plan(random: &mut Random) -> Plan {
    let (seed, per_mille) = (random.next(), random.pick(&[5, 20, 80, 300]));
    match random.below(8) {
        0 | 1 => Plan::Clean,
        2 => Plan::Final { seed, per_mille, after: 10 + random.below(150) },
        _ => Plan::Passing { seed, per_mille },
    }
}

/// Both conversations on a machine where things go wrong. The hash is of
/// everything that could be observed.
fn run(world: &World, seed: u64, cpu: &Arc<dyn Backend>, tally: &mut Tally) -> u64 {
    let mut random = Random::new(seed);
    let (config, plan) = (config(&mut random, world), plan(&mut random));
    let cancels = random.one_in(2);
    let running = world.start(&config, link(seed), plan, seed, cpu);
    let what = || format!("seed {seed}: {config:?}, {plan:?}");
    let steps = ANSWER + 1;
    let mut over = false;
    'conversations: for (which, prompt) in PROMPTS.iter().enumerate() {
        let mut session = running.session();
        let mut next = prompt.to_vec();
        for step in 0..steps {
            let right = &world.oracle[which * steps + step];
            let mut tries = 0;
            let bits = loop {
                let cancel = Cancel::new();
                // After some tries the user lets it work.
                if cancels && tries < 3 && random.one_in(3) {
                    running.machine.cancel_after(1 + random.below(200), &cancel);
                }
                // What was done of a prompt is kept.
                let position = session.position();
                let rest = if step == 0 { &prompt[position..] } else { &next[..] };
                match running.feed(&mut session, rest, &cancel) {
                    Ok(bits) => break bits,
                    Err(Error::Cancelled) => tally.add("cancelled", 1),
                    Err(Error::Move(MoveError::Io { offset, .. })) => {
                        assert!(offset < world.bytes.len() as u64, "I15: {}", what());
                        tally.add("failed", 1);
                    }
                    Err(Error::Move(MoveError::Changed { .. } | MoveError::Stopped(_))) => {
                        assert!(matches!(plan, Plan::Final { .. }), "{}", what());
                        over = true;
                        break 'conversations;
                    }
                    Err(error) => panic!("{}: {error}", what()),
                }
                tries += 1;
                assert!(tries < 500, "I9: {}: it never gets there", what());
            };
            assert!(bits == *right, "I1: {}: other logits at step {step}", what());
            next = vec![greedy(&bits)];
        }
    }
    if over {
        stays_over(&running, &what);
        tally.add("ended for good", 1);
    }
    note(&running, tally);
    running.machine.hash()
}

/// After the file has changed or the mover has stopped, whatever needs a read
/// is an error, and a new session gets that error too.
fn stays_over(running: &Running<'_>, what: &dyn Fn() -> String) {
    let mut session = running.session();
    let mut told = 0;
    for _ in 0..6 {
        match running.feed(&mut session, PROMPTS[0], &Cancel::new()) {
            Err(Error::Move(MoveError::Changed { .. } | MoveError::Stopped(_))) => told += 1,
            // A read ahead that had failed before.
            Err(Error::Move(MoveError::Io { .. })) => {}
            Ok(bits) => {
                assert!(bits == running.world.oracle[0], "I1: {}", what());
                assert_eq!(running.config.slots, running.world.experts, "F05: {}", what());
                return;
            }
            Err(error) => panic!("{}: {error} instead of what had happened", what()),
        }
    }
    assert!(told > 0, "F05: {}: nobody hears of it", what());
}

/// Counts, and adds the store's own numbers to the hash.
fn note(running: &Running<'_>, tally: &mut Tally) {
    let stats = running.stats();
    running.machine.note(format!("{stats:?}"));
    let (prefill, decode) = (stats.prefill.total(), stats.decode.total());
    let inside = running.machine.lock();
    let counters = inside.disk.counters;
    tally.add("reads", inside.disk.points);
    tally.add("faults", inside.disk.hit.len() as u64);
    tally.add("experts checked", inside.uses);
    tally.add("prefetches landed", counters.prefetches_landed);
    tally.add("demands landed", counters.demands_landed);
    tally.add("discarded", counters.discarded);
    tally.add("fills failed", counters.failed);
    tally.add("slow reads", counters.slow_reads);
    tally.add("short reads", counters.short_reads);
    tally.add("retries", counters.retries);
    tally.add("in flight when asked for", prefill.in_flight + decode.in_flight);
}

/// 2,000 seeds, or those from `PREGATE_SEEDS=<first>..<behind>`.
#[test]
fn whatever_goes_wrong_answers_are_right_or_errors_and_runs_repeat() {
    super::quiet_about_planned_panics();
    let world = World::tiny("seeds");
    let asked = std::env::var("PREGATE_SEEDS").ok();
    let range = asked.as_deref().and_then(|range| {
        let (first, behind) = range.split_once("..")?;
        Some(first.parse::<u64>().ok()?..behind.parse().ok()?)
    });
    let seeds: Vec<u64> = range.unwrap_or(0..SEEDS).collect();
    let tally = Mutex::new(Tally::default());
    let started = std::time::Instant::now();
    in_parallel(&seeds, |_, &seed, cpus| {
        let mut own = Tally::default();
        let first = run(&world, seed, &cpus[0], &mut own);
        let second = run(&world, seed, &cpus[0], &mut Tally::default());
        assert_eq!(first, second, "seed {seed}: two runs differ");
        let mut all = tally.lock().unwrap();
        own.events.into_iter().for_each(|(what, count)| all.add(what, count));
    });
    let tally = tally.into_inner().unwrap();
    println!("{} seeds, twice, in {:.1?}: {:?}", seeds.len(), started.elapsed(), tally.events);
    // The plan was not for nothing.
    let enough =
        |what: &str| tally.events.get(what).copied().unwrap_or(0) > seeds.len() as u64 / 100;
    for what in [
        "cancelled",
        "failed",
        "ended for good",
        "faults",
        "discarded",
        "slow reads",
        "short reads",
        "retries",
        "prefetches landed",
        "in flight when asked for",
    ] {
        assert!(enough(what) || seeds.len() < 200, "hardly any: {what}");
    }
}
