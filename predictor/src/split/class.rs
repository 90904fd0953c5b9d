//! The layers of one shape: what each way of sharing their misses would
//! take, and which ways still have to be tried.

use super::chunk::Tokens;
use super::keep::Keeping;
use super::reuse::Reuse;
use super::track::{Step, Track};
use super::trials::Trials;
use super::way::{CPU, Candidate, DISASTER, LINK, Mean, Pick, Sorted, Way, bounded};
use super::worker::{MOST, Other, Worker, sane};
use super::{Asked, Options, Outcome, Seed};
use crate::vocabulary::LayerShape;

/// Layers' walls that the allowance for exploring may grow to.
const SAVED: f64 = 64.0;
/// The spread of one measurement that tries are planned for (logarithm).
const SPREAD: f64 = 0.4;
/// Decisions that price one miss more at first, then one of so many.
const PRICED: u64 = 64;
const PRICE_EVERY: u64 = 8;
/// What a miss costs at least, as a share of one expert's time.
const LEAST_MISS: f64 = 0.05;

pub struct Class {
    pub cpu: Worker,
    pub link: Worker,
    pub tokens: Tokens,
    pub reuse: Reuse,
    pub keeping: Keeping,
    /// What one miss more costs, lately.
    miss: Mean,
    /// What the measured wall times add to the workers' own, `[CPU only,
    /// link only, both]`, and for each pair of counts.
    kinds: [Track; 3],
    walls: Vec<Track>,
    trials: Trials,
    /// ns that exploring may still cost.
    allowance_ns: f64,
    /// What exploring was expected to cost so far, and all walls, in ns.
    pub explored_ns: f64,
    pub wall_ns: f64,
    candidates: Vec<Candidate>,
    decisions: u64,
}

impl Class {
    /// `layers`: how many layers have this shape.
    pub fn new(shape: &LayerShape, layers: usize, seed: &Seed, options: &Options) -> Self {
        let worker = |start, rate, beside| Worker::new(start, rate, beside, shape, layers);
        let mut class = Self {
            cpu: worker(seed.cpu_start_ns, seed.cpu_ns_per_byte, seed.cpu_beside_link),
            link: worker(seed.link_start_ns, seed.link_ns_per_byte, seed.link_beside_cpu),
            tokens: Tokens::default(),
            reuse: Reuse::new(shape.top_k, shape.experts),
            keeping: Keeping::default(),
            miss: Mean::default(),
            kinds: Default::default(),
            walls: vec![Track::default(); (MOST + 1) * (MOST + 1)],
            trials: Trials::default(),
            allowance_ns: 0.0,
            explored_ns: 0.0,
            wall_ns: 0.0,
            candidates: Vec::new(),
            decisions: 0,
        };
        let cheaper = class.cpu.alone(0, 1).min(class.link.alone(0, 1));
        class.allowance_ns = options.first_explored.clamp(0.0, 1e6) * cheaper;
        class.trials = Trials::new(2.0 * class.allowance_ns);
        class
    }

    /// The machine is another one: everything may be tried again.
    pub fn changed(&mut self) {
        self.trials.restart();
    }

    pub fn trials(&self) -> &Trials {
        &self.trials
    }

    /// What one miss more costs in `layer` (of the class).
    pub fn miss_ns(&self, layer: usize) -> f64 {
        // Beside others one miss more may cost nothing; all of them do.
        let cheaper = self.cpu.alone(layer, 1).min(self.link.alone(layer, 1));
        self.miss.mean.max(LEAST_MISS * cheaper)
    }

    fn kind(way: &Way) -> usize {
        match (way.cpu, way.link()) {
            (_, 0) => 0,
            (0, _) => 1,
            _ => 2,
        }
    }

    fn wall_at(way: &Way) -> usize {
        way.cpu.min(MOST) * (MOST + 1) + way.link().min(MOST)
    }

    /// The workers' times beside each other: CPU, link.
    fn times(&self, layer: usize, cpu: usize, copies: usize, link_busy_ns: f64) -> (f64, f64) {
        let (own, links) = (self.cpu.alone(layer, cpu), self.link.alone(layer, copies));
        let share = |other: f64, mine: f64| if mine > 0.0 { (other / mine).min(1.0) } else { 0.0 };
        let beside_cpu = Other { count: copies, share: share(links.max(link_busy_ns), own) };
        let beside_link = Other { count: cpu, share: share(own, links) };
        let cpu_ns = if cpu > 0 { self.cpu.time(layer, cpu, beside_cpu) } else { 0.0 };
        let link_ns = if copies > 0 { self.link.time(layer, copies, beside_link) } else { 0.0 };
        (cpu_ns, link_ns)
    }

    /// Lists every way of sharing; `gains` are those of the misses that
    /// nothing brings yet, in misses saved, highest first; `waits_ns` the
    /// others' remaining times, ascending.
    fn list(&mut self, layer: usize, asked: &Asked<'_>, gains: &[f64], waits_ns: &[f64]) {
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        let queue_ns = bounded(asked.queue_ns);
        let hidden_ns = bounded(asked.hidden_ns);
        let miss_ns = self.miss_ns(layer);
        let all_kept: f64 = gains.iter().map(|&gain| self.kept_ns(layer, gain)).sum();
        for waits in 0..=waits_ns.len() {
            let waited_ns = waits.checked_sub(1).map_or(0.0, |last| waits_ns[last]);
            // Those that nothing copies now are computed, and some are kept.
            let mut reuse_ns = all_kept;
            for copies in 0..=gains.len().min(asked.frames) {
                let cpu = gains.len() + waits_ns.len() - waits - copies;
                let way = Way { copies, waits, cpu };
                reuse_ns += copies.checked_sub(1).map_or(0.0, |last| {
                    let copied_ns = gains[last] * miss_ns;
                    copied_ns - self.kept_ns(layer, gains[last])
                });
                let candidate = self.candidate(layer, way, queue_ns, waited_ns);
                candidates.push(Candidate {
                    wall_ns: candidate.wall_ns.max(hidden_ns),
                    hopeful_ns: candidate.hopeful_ns.max(hidden_ns),
                    reuse_ns,
                    saves: gains.first().copied().unwrap_or(0.0),
                    ..candidate
                });
            }
        }
        self.candidates = candidates;
    }

    /// What one miss less would have saved, now and then.
    fn price_miss(&mut self, layer: usize, asked: &Asked<'_>, (gains, waits_ns): Sorted<'_>) {
        let Some((_, fewer)) = gains.split_last() else { return };
        self.decisions = self.decisions.wrapping_add(1);
        if self.decisions > PRICED && !self.decisions.is_multiple_of(PRICE_EVERY) {
            return;
        }
        self.list(layer, asked, fewer, waits_ns);
        let without = self.cheapest(|_| true, Candidate::cost).map_or(0.0, |one| one.cost());
        self.list(layer, asked, gains, waits_ns);
        let Some(with) = self.cheapest(|_| true, Candidate::cost) else { return };
        // Each of the layer's misses could have been the one that was saved.
        self.miss.note(with.cost() - without, gains.len() as f64);
    }

    fn candidate(&self, layer: usize, way: Way, queue_ns: f64, waited_ns: f64) -> Candidate {
        let (cpu_ns, link_ns) = self.times(layer, way.cpu, way.copies, waited_ns);
        let link_ends = if way.copies > 0 { queue_ns + link_ns } else { 0.0 };
        // A demand overtakes what would still run when it starts.
        let overtaken = way.copies > 0 && waited_ns > queue_ns;
        let waited_ns = if overtaken { waited_ns + link_ns } else { waited_ns };
        let wall = self.walls[Self::wall_at(&way)].mean() + self.kinds[Self::kind(&way)].mean();
        let wall_ns = sane(cpu_ns.max(link_ends).max(waited_ns) * wall.exp());
        let known = if cpu_ns >= link_ends || way.copies == 0 {
            self.cpu.known(way.cpu, way.copies)
        } else {
            self.link.known(way.copies, way.cpu)
        };
        let hope = (-SPREAD / (1.0 + known).sqrt()).exp();
        let free_ns = self.cpu.alone(layer, way.cpu);
        let free_ns = match way.copies {
            0 => free_ns,
            copies => free_ns.max(queue_ns + self.link.alone(layer, copies)),
        };
        let hopeful_ns = wall_ns * hope;
        Candidate { way, wall_ns, free_ns, hopeful_ns, reuse_ns: 0.0, saves: 0.0 }
    }

    /// Chooses for `layer` (of the class) in token `token`.
    pub fn choose(
        &mut self,
        (layer, token): (usize, u64),
        asked: &Asked<'_>,
        sorted: Sorted<'_>,
        options: &Options,
    ) -> (Candidate, Pick) {
        self.price_miss(layer, asked, sorted);
        self.list(layer, asked, sorted.0, sorted.1);
        let best = self.cheapest(|_| true, Candidate::cost).expect("a way without copies exists");
        let (chosen, pick) =
            self.trials.next(&self.candidates, &best, token, options).unwrap_or_else(|| {
                let near = |one: &Candidate| {
                    one.wall_ns < DISASTER * best.wall_ns
                        && one.cost() - best.cost() <= self.allowance_ns
                };
                let hopeful = self.cheapest(near, |one| one.hopeful_ns - one.reuse_ns);
                match hopeful {
                    Some(other) if other.way != best.way => (other, Pick::Explore),
                    _ => (best, Pick::Best),
                }
            });
        let cost = (chosen.cost() - best.cost()).max(0.0);
        match pick {
            Pick::Best => {}
            Pick::Retry(_) => self.trials.spend(cost),
            Pick::Trial(_) | Pick::Explore => self.allowance_ns -= cost,
        }
        self.ordered(chosen.way.copies > 0);
        self.explored_ns += if pick == Pick::Best { 0.0 } else { cost };
        self.trials.used(&chosen.way, pick, token);
        (chosen, pick)
    }

    fn cheapest(
        &self,
        may: impl Fn(&Candidate) -> bool,
        by: impl Fn(&Candidate) -> f64,
    ) -> Option<Candidate> {
        let may = self.candidates.iter().filter(|one| may(one));
        may.min_by(|a, b| by(a).total_cmp(&by(b))).copied()
    }

    /// `way` was taken in `layer` (of the class).
    pub fn learn(&mut self, layer: usize, told: &Outcome, options: &Options) {
        let way = Way { copies: told.copies, waits: told.waits, cpu: told.cpu };
        let (cpu_ns, link_ns) = (told.cpu_ns as f64, told.copy_ns as f64);
        let share = |other: f64, mine: f64| if mine > 0.0 { (other / mine).min(1.0) } else { 0.0 };
        let (own, links) = (self.cpu.alone(layer, way.cpu), self.link.alone(layer, way.copies));
        let others = told.busy_ns.max(if way.waits > 0 { told.wait_ns } else { 0 });
        let busy = links.max(others as f64);
        if way.cpu > 0 && told.cpu_ns > 0 {
            let other = Other { count: way.copies, share: share(busy, own) };
            let step = self.cpu.learn(
                layer,
                way.cpu,
                other,
                cpu_ns,
                self.trials.is_left(CPU, way.copies > 0 || told.busy_ns > 0),
            );
            self.learned(CPU, step, way.copies > 0 || told.busy_ns > 0);
        }
        if way.copies > 0 && told.copy_ns > 0 {
            let other = Other { count: way.cpu, share: share(own, links) };
            let step = self.link.learn(
                layer,
                way.copies,
                other,
                link_ns,
                self.trials.is_left(LINK, way.cpu > 0),
            );
            self.learned(LINK, step, way.cpu > 0);
        }
        let link_ends = if way.copies > 0 { told.delay_ns as f64 + link_ns } else { 0.0 };
        let waited = if way.waits > 0 { told.wait_ns as f64 } else { 0.0 };
        let explained = sane(cpu_ns.max(link_ends).max(waited).max(bounded(told.hidden_ns)));
        let wall_ns = if told.wall_ns > 0 { sane(told.wall_ns as f64) } else { explained };
        if explained <= 1.0 || way.cpu + way.link() == 0 {
            return;
        }
        self.wall_ns += wall_ns;
        let earned = options.explore_share.clamp(0.0, 1.0) * wall_ns;
        let most = self.allowance_ns.max(SAVED * wall_ns);
        self.allowance_ns = (self.allowance_ns + earned).min(most);
        self.trials.earn(earned, wall_ns);
        if told.wall_ns == 0 {
            return;
        }
        // What neither worker's own time explains: A/B in wall time.
        let (kind, at) = (Self::kind(&way), Self::wall_at(&way));
        let error = (wall_ns / explained).ln() - self.kinds[kind].mean() - self.walls[at].mean();
        let moved = self.kinds[kind].mean();
        self.kinds[kind].note(error, 0.0, 64.0, false);
        let error = error - (self.kinds[kind].mean() - moved);
        self.walls[at].note(error, 2.0, 64.0, false);
    }

    /// A copy ahead of need took `ns` on the link.
    pub fn copied(&mut self, layer: usize, ns: u64) {
        if ns > 0 {
            let alone = Other { count: 0, share: 0.0 };
            let step =
                self.link.learn(layer, 1, alone, ns as f64, self.trials.is_left(LINK, false));
            self.learned(LINK, step, false);
        }
    }

    fn learned(&mut self, worker: usize, step: Step, is_beside: bool) {
        let seen = if worker == CPU { self.cpu.seen() } else { self.link.seen() };
        self.trials.learned(worker, step, seen, is_beside);
        if step != Step::Followed && step != Step::Doubted {
            self.miss.doubt();
        }
    }
}
