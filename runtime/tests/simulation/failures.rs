//! One thing goes wrong, at every place where it can.

use super::disk::{Copies, Link};
use super::faults::{Fault, Plan};
use super::identity::in_parallel;
use super::machine::Lie;
use super::world::{Config, PROMPTS, Running, World, cpu, greedy};
use pregate_runtime::store::mover::MoveError;
use pregate_runtime::{Cancel, Error};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

const LINK: Link = Link { latency_ns: 50_000, bytes_per_us: 1000, depth: 2, chunk_bytes: 8192 };

fn config(forecast: &'static str, ring: usize) -> Config {
    Config {
        slots: 3,
        ring,
        policy: "lru",
        forecast,
        horizon: 2,
        threshold: 0.1,
        prefill_chunk: 4,
        copies: Copies::Lazy,
        threads: 1,
    }
}

/// The first conversation; what failed is tried again, once.
fn converse(running: &Running<'_>) -> (u64, Option<Error>) {
    let mut session = running.session();
    let (mut next, mut step, mut failures, mut last) = (PROMPTS[0].to_vec(), 0, 0, None);
    while step <= 4 {
        match running.feed(&mut session, &next, &Cancel::new()) {
            Ok(bits) => {
                assert!(bits == running.world.oracle[step], "I1: other logits at step {step}");
                next = vec![greedy(&bits)];
                step += 1;
            }
            Err(error) => {
                next = if step == 0 { PROMPTS[0][session.position()..].to_vec() } else { next };
                failures += 1;
                last = Some(error);
                if failures > 1 {
                    break;
                }
            }
        }
    }
    (failures, last)
}

/// Exhaustive n-th failure: every read of a run fails once, in every way.
#[test]
fn every_read_may_fail_in_every_way() {
    super::quiet_about_planned_panics();
    let world = World::tiny("nth");
    let faults = [
        Fault::Io,
        Fault::Retried(2),
        Fault::Short,
        Fault::Slow(50_000_000),
        Fault::Slow(5_000_000_000),
        Fault::Changed,
        Fault::Stop,
    ];
    let mut jobs = Vec::new();
    for (forecast, ring) in [("none", 1), ("previous-token", 4)] {
        let clean = world.start(&config(forecast, ring), LINK, Plan::Clean, 1, &cpu(1));
        assert_eq!(converse(&clean).0, 0);
        let points = clean.machine.lock().disk.points;
        assert!(points > 100, "only {points} reads");
        let faults = faults.iter().enumerate();
        jobs.extend(faults.flat_map(|(index, &fault)| {
            // Faults that change nothing but the time are looked at less often.
            let step = if fault.ends_a_fill() { 1 } else { 5 };
            (index as u64 % step..points)
                .step_by(step as usize)
                .map(move |n| (forecast, ring, n, fault))
        }));
    }
    let (failed, passed) = (AtomicU64::new(0), AtomicU64::new(0));
    in_parallel(&jobs, |_, &(forecast, ring, nth, fault), cpus| {
        let what = || format!("{fault:?} at read {nth}, {forecast}, ring {ring}");
        let plan = Plan::Nth(nth, fault);
        let running = world.start(&config(forecast, ring), LINK, plan, 1, &cpus[0]);
        let (failures, last) = converse(&running);
        assert_eq!(running.machine.lock().disk.hit.len(), 1, "{}: not reached", what());
        match (fault, last) {
            (Fault::Changed, Some(Error::Move(MoveError::Changed { .. })))
            | (Fault::Stop, Some(Error::Move(MoveError::Stopped(_)))) => assert_eq!(failures, 2),
            (Fault::Io, Some(Error::Move(MoveError::Io { .. }))) => {
                assert_eq!(failures, 1, "F01: {}: the next try works", what());
                failed.fetch_add(1, Ordering::Relaxed);
            }
            // F02: nobody waited for it. A change may come with the last read.
            (Fault::Io | Fault::Changed | Fault::Stop, None) => {
                passed.fetch_add(1, Ordering::Relaxed);
            }
            (_, None) => {}
            (_, Some(error)) => panic!("{}: {error}", what()),
        }
    });
    let (failed, passed) = (failed.into_inner(), passed.into_inner());
    println!("{} runs: {failed} failed and went on, {passed} did not notice", jobs.len());
    assert!(failed > 100 && passed > 10);
}

/// Cancelling at every look at the clock or at the disk (I12).
#[test]
fn a_run_may_be_cancelled_at_every_moment() {
    super::quiet_about_planned_panics();
    let world = World::tiny("cancel");
    let config = config("previous-token", 3);
    let calls = {
        let running = world.start(&config, LINK, Plan::Clean, 3, &cpu(1));
        assert_eq!(converse(&running).0, 0);
        running.machine.lock().calls
    };
    let jobs: Vec<u64> = (1..calls).step_by(3).collect();
    let cancelled = AtomicU64::new(0);
    in_parallel(&jobs, |_, &after, cpus| {
        let running = world.start(&config, LINK, Plan::Clean, 3, &cpus[0]);
        let cancel = Cancel::new();
        running.machine.cancel_after(after, &cancel);
        let mut session = running.session();
        let mut next = PROMPTS[0].to_vec();
        for step in 0..=4 {
            match running.feed(&mut session, &next, &cancel) {
                Ok(bits) => next = vec![greedy(&bits)],
                Err(Error::Cancelled) => {
                    cancelled.fetch_add(1, Ordering::Relaxed);
                    let done = &PROMPTS[0][..session.position().min(PROMPTS[0].len())];
                    let rest =
                        if step == 0 { PROMPTS[0][done.len()..].to_vec() } else { next.clone() };
                    let bits = running.feed(&mut session, &rest, &Cancel::new()).unwrap();
                    assert!(bits == world.oracle[step], "I12: after {after} calls");
                    break;
                }
                Err(error) => panic!("after {after} calls: {error}"),
            }
        }
        assert_eq!(converse(&running).0, 0, "I12: the next conversation");
    });
    let cancelled = cancelled.into_inner();
    println!("{cancelled} of {} runs were cancelled", jobs.len());
    assert!(cancelled * 2 > jobs.len() as u64, "{cancelled} of {}", jobs.len());
}

/// Runs of each kind of lie.
const LIE_SEEDS: u64 = 3_500;

/// F08, F26: a wrong bit, a frame with another expert, a generation of
/// another time. None is ever computed with: the check at the use sees it, or
/// the store itself does.
#[test]
fn wrong_bits_and_wrong_frames_are_seen_at_their_first_use() {
    super::quiet_about_planned_panics();
    let world = World::tiny("lies");
    let kinds = [None, Some(Lie::WrongFrame), Some(Lie::StaleGeneration)];
    let jobs: Vec<(u64, Option<Lie>)> =
        (0..LIE_SEEDS).flat_map(|seed| kinds.map(|lie| (seed, lie))).collect();
    let (told, seen) = (AtomicU64::new(0), kinds.map(|_| AtomicU64::new(0)));
    in_parallel(&jobs, |job, &(seed, lie), cpus| {
        let plan = if lie.is_some() { Plan::Clean } else { Plan::Flips { seed, per_mille: 10 } };
        let config = config(if seed % 2 == 0 { "none" } else { "previous-token" }, 4);
        let running = world.start(&config, LINK, plan, seed, &cpus[0]);
        running.machine.lock().lie = lie.map(|lie| (lie, 6));
        let ended = silently(|| converse(&running));
        let inside = running.machine.lock();
        let lies = inside.lies + inside.disk.hit.len() as u64;
        told.fetch_add(lies, Ordering::Relaxed);
        match ended {
            // `converse` has compared every bit.
            Ok((0, _)) => {}
            Ok((_, error)) => panic!("{lie:?}, seed {seed}: {error:?}"),
            Err(text) => {
                assert!(lies > 0, "{lie:?}, seed {seed}, without a lie: {text}");
                let by_check = text.contains("I5") || text.contains("I6");
                let by_store = text.contains("has lost its frame");
                assert!(by_check || by_store, "{lie:?}, seed {seed}: {text}");
                seen[job % kinds.len()].fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let (told, seen) = (told.into_inner(), seen.map(AtomicU64::into_inner));
    println!("{told} lies; runs stopped by one: {seen:?}, of {}", jobs.len());
    assert!(told >= 10_000, "{told} lies");
    for (lie, seen) in kinds.iter().zip(seen) {
        assert!(2 * seen > LIE_SEEDS, "{lie:?}: {seen} of {LIE_SEEDS} runs");
    }
}

/// A panic's text as an error, without a word on the terminal.
fn silently<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    super::SILENT.set(true);
    let result = catch_unwind(AssertUnwindSafe(run));
    super::SILENT.set(false);
    result.map_err(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().unwrap_or(&"").to_string(),
    })
}
