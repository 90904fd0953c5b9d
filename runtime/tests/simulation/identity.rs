//! I1, I2: the same bits as with everything in memory, whatever the slots, the
//! ring, the forecast, the policy, the chunks, the copies and the threads.

use super::disk::{Copies, Link};
use super::faults::Plan;
use super::random::Random;
use super::world::{Config, World, cpu};
use pregate_kernels::Backend;
use pregate_predictor::{forecast, policy};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const RINGS: [usize; 4] = [1, 2, 3, 8];
const CHUNKS: [usize; 3] = [1, 4, 64];
const THREADS: [usize; 2] = [1, 3];
/// Configurations in a run of the tests.
const SAMPLE: usize = 320;

/// Every forecast that there is, none, and the blend of the useful ones.
pub fn forecasts() -> Vec<&'static str> {
    ["none", "blend"].into_iter().chain(forecast::NAMES).chain(forecast::LEARNED).collect()
}

/// Every configuration of the issue.
fn all(world: &World) -> Vec<Config> {
    let mut all = Vec::new();
    for slots in world.slots() {
        for ring in RINGS {
            for forecast in forecasts() {
                for policy in policy::NAMES {
                    for prefill_chunk in CHUNKS {
                        for copies in Copies::ALL {
                            for threads in THREADS {
                                // A low bar, so that guesses are acted upon.
                                let (horizon, threshold) = (1 + slots % 3, 0.1);
                                all.push(Config {
                                    slots,
                                    ring,
                                    policy,
                                    forecast,
                                    horizon,
                                    threshold,
                                    prefill_chunk,
                                    copies,
                                    threads,
                                });
                            }
                        }
                    }
                }
            }
        }
    }
    all
}

/// A disk whose manners depend on the seed.
pub fn link(seed: u64) -> Link {
    let mut random = Random::new(seed ^ 0x11f2);
    Link {
        latency_ns: random.pick(&[1_000, 50_000, 400_000]),
        bytes_per_us: random.pick(&[100, 1_000, 10_000]),
        depth: random.pick(&[1, 2, 4, 16]),
        chunk_bytes: random.pick(&[4096, 8192, 1 << 20]),
    }
}

fn check(world: &World, config: &Config, seed: u64, cpus: &[Arc<dyn Backend>]) {
    let what = || format!("seed {seed}, {config:?} on {}", world.path.display());
    let cpu = &cpus[THREADS.iter().position(|&threads| threads == config.threads).unwrap()];
    let running = world.start(config, link(seed), Plan::Clean, seed, cpu);
    running.converse(seed.is_multiple_of(2), &what);
    let stats = running.stats();
    let (prefill, decode) = (stats.prefill.total(), stats.decode.total());
    let inside = running.machine.lock();
    // I13: nothing is silently inert.
    let read = prefill.bytes_read() + decode.bytes_read();
    assert!(read > 0, "I13: {}: no expert was read", what());
    assert!(inside.disk.points > 0 && inside.uses > 0, "I13: {}", what());
    if 2 * config.slots < world.experts {
        let came = decode.misses + decode.in_flight + decode.prefetch_useful;
        assert!(came > 0, "I13: {}: nothing was missing while decoding", what());
    }
    // The statistics and the observer saw the same.
    let [hits, early, in_flight, misses] = inside.origins;
    let counted = [
        prefill.hits + decode.hits,
        prefill.in_flight + decode.in_flight,
        prefill.misses + decode.misses,
        prefill.prefetch_useful + decode.prefetch_useful,
    ];
    assert_eq!(counted, [hits + early, in_flight, misses, early + in_flight], "{}", what());
    assert!(inside.disk.counters.bytes >= read, "I13: {}: bytes counted twice", what());
}

/// Runs every configuration of `jobs` on two threads.
pub fn in_parallel<T: Sync>(jobs: &[T], run: impl Fn(usize, &T, &[Arc<dyn Backend>]) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let cpus = THREADS.map(cpu);
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(index) else { break };
                    run(index, job, &cpus);
                }
            });
        }
    });
}

/// 320 configurations, drawn by a seed; all with `PREGATE_IDENTITY=all`, and
/// with `PREGATE_IDENTITY=<number>` those that this seed draws.
#[test]
fn streamed_experts_give_the_bits_of_resident_ones() {
    super::quiet_about_planned_panics();
    let world = World::tiny("identity");
    let asked = std::env::var("PREGATE_IDENTITY").unwrap_or_default();
    let mut jobs = all(&world);
    let number = jobs.len();
    if asked != "all" {
        let mut random = Random::new(asked.parse().unwrap_or(1));
        for index in 0..SAMPLE.min(number) {
            let other = index + random.below((number - index) as u64) as usize;
            jobs.swap(index, other);
        }
        jobs.truncate(SAMPLE);
    }
    assert!(jobs.len() >= 300, "only {} configurations", jobs.len());
    let started = std::time::Instant::now();
    in_parallel(&jobs, |index, config, cpus| check(&world, config, index as u64, cpus));
    println!("{} of {number} configurations in {:.1?}", jobs.len(), started.elapsed());
}

/// Other storages: merged gate and up, a dense layer in front, shared
/// experts, two sizes within one file.
#[test]
fn other_architectures_give_the_bits_of_resident_experts() {
    super::quiet_about_planned_panics();
    let names = ["deepseek_v2_lite.f32", "gpt_oss_mxfp4.MXFP4", "qwen3_moe_k256.Q4_K_M"];
    for name in names {
        let world = World::golden(name);
        let mut random = Random::new(5);
        let jobs: Vec<Config> = (0..12).map(|_| random.pick(&all(&world))).collect();
        in_parallel(&jobs, |index, config, cpus| check(&world, config, index as u64, cpus));
    }
}
