//! A prompt on the machine's clock: what is read ahead for the next layer while
//! this one is computed makes it faster.

use super::disk::{Copies, Link};
use super::faults::Plan;
use super::machine::{Compute, Settings};
use super::world::{Config, PROMPTS, World, cpu};
use pregate_runtime::Cancel;

const READ_NS: u64 = 100_000;

fn time(world: &World, forecast: &'static str, ring: usize, compute: Compute) -> (u64, u64) {
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
    let settings =
        Settings { seed: 1, link, copies: config.copies, plan: Plan::Clean, step_ns: 0, compute };
    let running = world.start_on(&config, settings, &cpu(1));
    let mut session = running.session();
    let before = running.machine.now();
    running.feed(&mut session, PROMPTS[0], &Cancel::new()).unwrap();
    let total = running.stats().prefill.total();
    println!("{total:?}");
    (running.machine.now() - before, 0)
}

#[test]
fn explore() {
    let world = World::tiny("prompts");
    for expert_ns in [0, 30_000, 100_000, 300_000] {
        for attention_ns in [0, 300_000, 1_000_000] {
            for ring in [1, 2, 4, 8, 16] {
                let compute = Compute { expert_ns, attention_ns };
                let none = time(&world, "none", ring, compute).0;
                let ahead = time(&world, "frequency", ring, compute).0;
                println!(
                    "expert {expert_ns} attention {attention_ns} ring {ring}: {none} {ahead} {:.3}",
                    ahead as f64 / none as f64
                );
            }
        }
    }
}
