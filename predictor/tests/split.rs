//! The split of misses between CPU and link, on simulated machines
//! (`support/machine.rs`) under simulated models (`support/world.rs`).

#[path = "support/machine.rs"]
mod machine;
#[path = "support/world.rs"]
mod world;

use machine::Rng;
use pregate_predictor::split::{Options, Seed, Split};
use std::ops::Range;
use world::{Decoder, Rule, Totals, World, fixed};

/// Shares of the misses that fixed rules give to the link.
const SHARES: [f64; 6] = [0.0, 0.125, 0.25, 0.5, 0.75, 1.0];
/// Settled from here on.
const SETTLED: usize = 64;

/// What a controller and the fixed rules make of a world.
struct Run {
    seed: u64,
    /// Before and in the window that is judged.
    first: Totals,
    later: Totals,
    /// ns of the same: one per share, then the clairvoyant's.
    fixed_first: Vec<f64>,
    fixed: Vec<f64>,
    /// ns that exploring cost, and ns of layers with misses.
    explored: (u64, u64),
}

impl Run {
    fn new(seed: u64, world: &World, window: Range<usize>) -> Self {
        let mut rng = Rng(seed ^ 0xabcd_ef01);
        let seeded = world.machine(0).seed(&mut rng);
        Self::seeded(seed, world, &seeded, window)
    }

    fn seeded(seed: u64, world: &World, seeded: &Seed, window: Range<usize>) -> Self {
        let mut split = Split::new(&world.shape(), seeded, Options::default());
        let mut decoder = Decoder::new(world);
        let mut rule = Rule::Live(&mut split, Rng(seed ^ 0x1234));
        let first = decoder.run(0..window.start, &mut rule);
        let later = decoder.run(window.clone(), &mut rule);
        let fixed = fixed(world, &window, &SHARES);
        let (fixed_first, fixed) = fixed.iter().map(|&[first, later]| (first, later)).unzip();
        Self { seed, first, later, fixed_first, fixed, explored: split.explored_ns() }
    }

    fn best(&self) -> f64 {
        self.fixed.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn cpu_only(&self) -> f64 {
        self.fixed[0]
    }

    fn stream_only(&self) -> f64 {
        self.fixed[SHARES.len() - 1]
    }

    /// Above `ns`, as a share of it.
    fn above(&self, ns: f64) -> f64 {
        self.later.wall / ns - 1.0
    }
}

/// `one` of each seed, on both cores.
fn of_all<T: Send>(seeds: Range<u64>, one: impl Fn(u64) -> T + Sync) -> Vec<T> {
    let half = seeds.start + (seeds.end - seeds.start) / 2;
    let run = |seeds: Range<u64>| seeds.map(&one).collect::<Vec<T>>();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| run(half..seeds.end));
        let mut all = run(seeds.start..half);
        all.extend(second.join().expect("a run"));
        all
    })
}

#[test]
fn two_hundred_machines_settle_at_the_best_fixed_split() {
    let window = SETTLED..320;
    let run = |seed| Run::new(seed, &World::random(seed, window.end), window.clone());
    let runs = of_all(0..200, run);
    let mut above = 0.0;
    let mut best_is = [0; 3];
    let mut caching = 0;
    for run in &runs {
        let (seed, best) = (run.seed, run.best());
        let fixed: Vec<f64> = run.fixed.iter().map(|ns| ns / best).collect();
        let said = format!("world {seed}: {:.4} of the best of {fixed:.3?}", run.later.wall / best);
        assert!(run.above(best) <= 0.03, "{said}");
        assert!(run.above(run.cpu_only().min(run.stream_only())) <= 0.03, "{said}");
        // What settling costs.
        let first = run.fixed_first.iter().copied().fold(f64::INFINITY, f64::min);
        assert!(run.first.wall <= 1.12 * first, "{said}; first {:.3}", run.first.wall / first);
        let explored = run.explored.0 as f64 / run.explored.1 as f64;
        assert!(explored <= 0.05, "{said}: {explored} spent on trials");
        above += run.above(best) / runs.len() as f64;
        let of_best = run.fixed.iter().position(|&ns| ns == best).unwrap_or(0);
        match of_best {
            0 => best_is[0] += 1,
            at if at == SHARES.len() - 1 => best_is[1] += 1,
            _ => best_is[2] += 1,
        }
        // A copy's later hits make the difference: what ends first now is not
        // what is best.
        caching += usize::from(run.fixed[SHARES.len()] > 1.1 * best);
    }
    // The machines are not all of one kind.
    assert!(best_is.iter().all(|&count| count >= 20), "{best_is:?}");
    assert!(caching >= 20, "{caching}");
    // It sees each decision, which no fixed share does.
    assert!(above <= 0.0, "{above}");
}
