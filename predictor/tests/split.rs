//! The split of misses between CPU and link, on simulated machines
//! (`support/machine.rs`) under simulated models (`support/world.rs`).

#[path = "support/machine.rs"]
mod machine;
#[path = "support/world.rs"]
mod world;

use machine::{Machine, Rng};
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
    /// ns that exploring and second looks cost in that window.
    explored: f64,
}

impl Run {
    /// The controller's own way, what it computes and what it keeps.
    fn new(seed: u64, world: &World, window: Range<usize>) -> Self {
        Self::with(seed, world, window, true)
    }

    fn with(seed: u64, world: &World, window: Range<usize>, keeps: bool) -> Self {
        let mut rng = Rng(seed ^ 0xabcd_ef01);
        let seeded = world.machine(0).seed(&mut rng);
        Self::seeded(seed, world, &seeded, window, keeps)
    }

    fn seeded(seed: u64, world: &World, seeded: &Seed, window: Range<usize>, keeps: bool) -> Self {
        let mut split = Split::new(&world.shape(), seeded, Options::default());
        let mut decoder = Decoder::new(world);
        let mut rule = match keeps {
            true => Rule::Keeping(&mut split, Rng(seed ^ 0x1234)),
            false => Rule::Live(&mut split, Rng(seed ^ 0x1234)),
        };
        let first = decoder.run(0..window.start, &mut rule);
        let before = rule.explored_ns();
        let later = decoder.run(window.clone(), &mut rule);
        let explored = (split.explored_ns().0 - before.0) as f64;
        let fixed = fixed(world, &window, &SHARES);
        let (fixed_first, fixed) = fixed.iter().map(|&[first, later]| (first, later)).unzip();
        Self { seed, first, later, fixed_first, fixed, explored }
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
    let (mut caching, mut keeping) = (0, 0);
    for run in &runs {
        let (seed, best) = (run.seed, run.best());
        let fixed: Vec<f64> = run.fixed.iter().map(|ns| ns / best).collect();
        let said = format!("world {seed}: {:.4} of the best of {fixed:.3?}", run.later.wall / best);
        assert!(run.above(best) <= 0.03, "{said}");
        assert!(run.above(run.cpu_only().min(run.stream_only())) <= 0.03, "{said}");
        // What settling costs.
        let first = run.fixed_first.iter().copied().fold(f64::INFINITY, f64::min);
        assert!(run.first.wall <= 1.12 * first, "{said}; first {:.3}", run.first.wall / first);
        let explored = run.explored / best;
        assert!(explored <= 0.025, "{said}: {explored:.3} of the best for trials");
        keeping += usize::from(100 * run.later.kept > run.later.misses);
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
    assert!(keeping >= 30, "{keeping}");
    // It sees each decision, and an idle link, which no fixed share does.
    assert!(above <= -0.05, "{above}");
}

/// A device with one frame to spare: the link is never alone with two misses.
#[test]
fn one_copy_at_a_time_settles_too() {
    let window = SETTLED..192;
    let run = |seed| {
        let mut world = World::random(seed, window.end);
        world.frames = 1;
        Run::new(seed, &world, window.clone())
    };
    let runs = of_all(0..40, run);
    for run in &runs {
        let (seed, best) = (run.seed, run.best());
        assert!(run.above(best) <= 0.04, "world {seed}: {:.4}", run.above(best));
    }
    let mean = runs.iter().map(|run| run.above(run.best())).sum::<f64>() / runs.len() as f64;
    assert!(mean <= 0.0, "{mean}");
}

/// A world whose machine is not what its probes found.
fn lying(seed: u64, tokens: usize) -> (World, Seed) {
    let mut world = World::random(seed, tokens);
    let mut rng = Rng(seed ^ 0x77);
    let seeded = world.machine(0).seed(&mut rng);
    let factor = rng.factor(20.0, 100.0);
    let machine = &mut world.machines[0].1;
    match seed % 3 {
        // The CPU is slow: its threads fight for cores with others.
        0 => machine.scale_cpu(1.0 / factor),
        // Each is as fast as it was found, and both at once are slow.
        1 => machine.trouble = factor,
        // The link is slow: a virtual machine's, or x1.
        _ => machine.link /= factor,
    }
    (world, seeded)
}

/// Issues #436 and #151 of FreeToken: a profile that no longer holds chose a
/// way that was 8 to 40 times slower, and stayed with it.
#[test]
fn a_disaster_is_left_and_stays_left() {
    let window = SETTLED..192;
    let run = |seed| {
        let (world, seeded) = lying(seed, window.end);
        Run::seeded(seed, &world, &seeded, window.clone(), true)
    };
    let mut worst = Vec::new();
    for run in of_all(500..545, run) {
        let (seed, pure) = (run.seed, run.cpu_only().min(run.stream_only()));
        let said = format!("world {seed}: {:.4} of the better one", run.later.wall / pure);
        assert!(run.above(pure) <= 0.035, "{said}");
        worst.push(run.cpu_only().max(run.stream_only()) / pure);
    }
    worst.sort_by(f64::total_cmp);
    // There was something to fall into.
    assert!(worst[worst.len() / 2] > 8.0, "{worst:?}");
}

/// The machine becomes another one in mid-run.
fn changing(seed: u64, at: usize, tokens: usize) -> World {
    let mut world = World::random(seed, tokens);
    let mut machine = world.machine(0).clone();
    match seed % 4 {
        0 => machine.scale_cpu(0.2),
        1 => machine.scale_cpu(4.0),
        2 => machine.link /= 5.0,
        _ => machine.link *= 4.0,
    }
    machine.memory = machine.memory.max(machine.cpu.max(machine.link) * 1.2);
    world.machines.push((at, machine));
    world
}

#[test]
fn a_machine_that_changes_is_followed() {
    let (at, end) = (128, 384);
    let window = at + SETTLED..end;
    let runs = of_all(600..632, |seed| Run::new(seed, &changing(seed, at, end), window.clone()));
    let mean = runs.iter().map(|run| run.above(run.best())).sum::<f64>() / runs.len() as f64;
    assert!(mean <= 0.01, "{mean:.4}");
    for run in &runs {
        let (seed, above) = (run.seed, run.above(run.best()));
        assert!(above <= 0.05, "world {seed}: {above:.4} above the best fixed split");
    }
}

/// A machine whose best way asks the CPU for nearly everything, and a link
/// that is not hopeless.
fn cpu_machine() -> Machine {
    Machine {
        cpu_start: 20e3,
        cpu_one: 30.0,
        cpu: 50.0,
        link_start: 8e3,
        copy_start: 4e3,
        link: 20.0,
        memory: 55.0,
        link_first: true,
        vram: 800.0,
        late: 10e3,
        join: 0.0,
        trouble: 1.0,
        busy: 0.0,
        busy_ns: 0.0,
        noise: 0.05,
        gap: 60e3,
        outliers: 0.002,
    }
}

/// The CPU computes what is missing, and the link is idle: what it brings
/// meanwhile for later is missing no more.
#[test]
fn an_idle_link_brings_what_the_cpu_computed() {
    let mut gained = Vec::new();
    for seed in 800..816 {
        let mut world = World::random(seed, 256);
        // A copy on demand ends later than the CPU, which it hardly slows.
        world.machines = vec![(0, Machine { link: 12.0, memory: 60.0, ..cpu_machine() })];
        let run = |keeps| Run::with(seed, &world, SETTLED..256, keeps);
        let [without, with] = [false, true].map(run);
        assert!(with.above(with.best()) <= 0.03, "world {seed}");
        assert_eq!(without.later.kept, 0);
        gained.push(1.0 - with.later.wall / without.later.wall);
    }
    gained.sort_by(f64::total_cmp);
    assert!(gained[0] >= -0.04, "{gained:.3?}");
    assert!(gained[gained.len() / 2] >= 0.04, "{gained:.3?}");
}

#[test]
fn a_stalled_cpu_is_left_and_comes_back() {
    for seed in 700..708 {
        let mut world = World::random(seed, 640);
        let mut stalled = cpu_machine();
        stalled.scale_cpu(1.0 / 30.0);
        world.machines = vec![(0, cpu_machine()), (128, stalled), (256, cpu_machine())];
        let mut rng = Rng(seed);
        let seeded = world.machine(0).seed(&mut rng);
        let mut split = Split::new(&world.shape(), &seeded, Options::default());
        let mut decoder = Decoder::new(&world);
        let mut rule = Rule::Live(&mut split, rng);
        let share = |part: &Totals| 1.0 - part.copies as f64 / part.misses as f64;
        let before = decoder.run(0..128, &mut rule);
        let falling = decoder.run(128..136, &mut rule);
        let stalled = decoder.run(136..256, &mut rule);
        let rising = decoder.run(256..512, &mut rule);
        let after = decoder.run(512..640, &mut rule);
        let shares = [&before, &falling, &stalled, &rising, &after].map(share);
        let said = format!("world {seed}: CPU {shares:.3?}");
        assert!(shares[0] > 0.15, "{said}: it was of use");
        // Eight tokens, of which one or two were caught by the stall.
        assert!(falling.asked <= 6.0 * falling.best, "{said}");
        assert!(shares[2] <= 0.02 && stalled.asked <= 1.25 * stalled.best, "{said}");
        assert!(shares[4] >= 0.75 * shares[0], "{said}");
    }
}
