//! Which ways have to be measured whatever they seem to cost: each worker
//! alone at the start, and what was left, now and then.

use super::Options;
use super::track::Step;
use super::way::{CPU, Candidate, DISASTER, LINK, Pick, Way};

/// Measurements of each worker alone that a class starts with. Beside the
/// other it may be slow for the other's sake.
const TRIALS: u64 = 2;
/// Measurements that settle what is in doubt.
const SURE: u64 = 3;
/// Decisions that a first measurement waits for one with a single miss.
const PATIENCE: u64 = 16;
/// Tokens until a disaster is looked at again after the other worker jumped.
const SOON: u64 = 16;
/// Measurements after which a jump is the machine's, not the seed's error.
const SETTLED: u64 = 16;
/// Tokens until a disaster is looked at again, at most: what kept a worker busy
/// may be over.
const LONGEST_PAUSE: u64 = 4096;
/// Layers' walls that may be saved for second looks.
const SAVED: f64 = 256.0;

/// Both workers at once.
const BOTH: usize = 2;

/// Does `way` ask this worker, or both?
fn uses(way: &Way, worker: usize) -> bool {
    if worker == BOTH { way.cpu > 0 && way.copies > 0 } else { way.uses(worker) }
}

/// When a worker is looked at again.
#[derive(Clone, Debug)]
struct Watch {
    /// Measurements alone that are still wanted.
    wanted: u64,
    /// Times that it was measured alone.
    alone: u64,
    last_token: u64,
    /// Tokens until the next look while it is left; 0: it is not left.
    pause: u64,
    /// The last measurement was a second look.
    is_look: bool,
}

impl Default for Watch {
    fn default() -> Self {
        Self { wanted: TRIALS, alone: 0, last_token: 0, pause: 0, is_look: false }
    }
}

/// The trials of one class.
#[derive(Clone, Debug, Default)]
pub struct Trials {
    /// CPU, link, and both at once.
    watch: [Watch; 3],
    /// Decisions that did without the trial that is wanted.
    waited: u64,
    /// ns that second looks may cost.
    saved_ns: f64,
}

impl Trials {
    /// `saved_ns`: what second looks may cost at once.
    pub fn new(saved_ns: f64) -> Self {
        Self { saved_ns, ..Self::default() }
    }

    /// Is a measurement of a worker alone due?
    pub fn are_wanted(&self) -> bool {
        self.watch[..BOTH].iter().any(|watch| watch.wanted > 0)
    }

    /// Everything may be tried again.
    pub fn restart(&mut self) {
        self.watch = Default::default();
    }

    /// Is this worker, or asking it beside the other, a disaster that nobody
    /// asks for any more?
    pub fn is_left(&self, worker: usize, is_beside: bool) -> bool {
        self.watch[worker].pause > 0 || is_beside && self.watch[BOTH].pause > 0
    }

    /// The share of a layer's time that second looks may take.
    pub fn earn(&mut self, ns: f64, wall_ns: f64) {
        let most = self.saved_ns.max(SAVED * wall_ns);
        self.saved_ns = (self.saved_ns + ns).min(most);
    }

    pub fn spend(&mut self, ns: f64) {
        self.saved_ns -= ns;
    }

    pub fn used(&mut self, way: &Way, pick: Pick, token: u64) {
        for worker in [CPU, LINK, BOTH] {
            let watch = &mut self.watch[worker];
            if worker != BOTH && way.is_pure(worker) {
                watch.alone += 1;
                watch.wanted = watch.wanted.saturating_sub(1);
            }
            if uses(way, worker) {
                watch.last_token = token;
                if pick == Pick::Best {
                    watch.pause = 0;
                }
            }
        }
    }

    /// A worker's measurement led to `step`, after `seen` of them.
    pub fn learned(&mut self, worker: usize, step: Step, seen: u64, is_beside: bool) {
        match step {
            Step::RoseBeside => {}
            Step::Rose if seen <= SETTLED => return self.watch[worker].pause = SOON,
            _ if seen <= SETTLED => return,
            _ => {}
        }
        match step {
            Step::Followed => {
                let watch = &mut self.watch[worker];
                watch.is_look = false;
                if !is_beside && watch.alone >= TRIALS {
                    watch.wanted = 0;
                }
            }
            // A second look that surprises wants to be confirmed soon.
            Step::Doubted if self.watch[worker].is_look => self.watch[worker].wanted = SURE - 1,
            Step::Doubted => {}
            // The machine is another one: the other worker's disaster may be
            // over as well. And some disturbances last for moments only.
            Step::Rose => {
                self.watch[1 - worker].pause = self.watch[1 - worker].pause.min(SOON);
                self.watch[worker].pause = 1;
            }
            Step::Fell => {
                self.watch[1 - worker].pause = self.watch[1 - worker].pause.min(SOON);
                self.watch[worker].pause = 0;
            }
            // Both at once are slow: is it this worker, or the two of them?
            Step::RoseBeside => {
                self.watch[worker].wanted = SURE;
                self.watch[BOTH].pause = 1;
            }
        }
    }

    /// The trial that is due, if one is. `best` is the best of `all`.
    pub fn next(
        &mut self,
        all: &[Candidate],
        best: &Candidate,
        token: u64,
        options: &Options,
    ) -> Option<(Candidate, Pick)> {
        self.first(all, best).or_else(|| {
            [CPU, LINK, BOTH].into_iter().find_map(|worker| {
                let one = self.again(worker, all, best, token, options)?;
                Some((one, Pick::Retry(if worker == BOTH { CPU } else { worker })))
            })
        })
    }

    /// A measurement of one worker alone, with as few experts as can be: it
    /// may be a disaster.
    fn first(&mut self, all: &[Candidate], best: &Candidate) -> Option<(Candidate, Pick)> {
        if self.watch[..BOTH].iter().all(|watch| watch.wanted == 0) {
            return None;
        }
        let pure = |worker| all.iter().find(|one| one.way.is_pure(worker)).copied();
        let is_new = self.watch[..BOTH].iter().any(|watch| watch.alone < TRIALS);
        self.waited += 1;
        if best.way.cpu + best.way.link() > 1 && self.waited < PATIENCE {
            // Not both at once before each is known.
            let pures = [CPU, LINK].into_iter().filter_map(|worker| Some((pure(worker)?, worker)));
            let cheaper = pures.min_by(|a, b| a.0.wall_ns.total_cmp(&b.0.wall_ns));
            return cheaper.filter(|_| is_new).map(|(one, worker)| (one, Pick::Trial(worker)));
        }
        let due = |&worker: &usize| {
            let watch = &self.watch[worker];
            let bearable = |one: Candidate| one.wall_ns < DISASTER * best.wall_ns;
            watch.wanted > 0
                && pure(worker).is_some_and(|one| watch.alone < TRIALS || bearable(one))
        };
        let worker =
            [CPU, LINK].into_iter().filter(due).max_by_key(|&one| self.watch[one].wanted)?;
        self.waited = 0;
        Some((pure(worker)?, Pick::Trial(worker)))
    }

    /// A worker that was not used for long.
    fn again(
        &mut self,
        worker: usize,
        all: &[Candidate],
        best: &Candidate,
        token: u64,
        options: &Options,
    ) -> Option<Candidate> {
        // Both at once only where that would be best if they did not slow each
        // other.
        let may = all
            .iter()
            .filter(|one| uses(&one.way, worker) && (worker != BOTH || one.free_ns < best.wall_ns));
        let one = *may.min_by(|a, b| a.wall_ns.total_cmp(&b.wall_ns))?;
        let watch = &mut self.watch[worker];
        let is_disaster = one.wall_ns >= DISASTER * best.wall_ns;
        if is_disaster && watch.pause == 0 {
            watch.pause = options.disaster_tokens.max(1);
        }
        let due = if is_disaster { watch.pause } else { options.retry_tokens.max(1) };
        // Alone and with a single miss, if that is to be had.
        let due =
            if worker == BOTH || one.way.is_pure(worker) { due } else { due.saturating_mul(2) };
        let idle = token.saturating_sub(watch.last_token);
        if idle < due || one.cost() - best.cost() > self.saved_ns {
            return None;
        }
        watch.pause = watch.pause.saturating_mul(3).min(LONGEST_PAUSE);
        watch.is_look = true;
        Some(one)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alone(cpu: usize, copies: usize, wall_ns: f64) -> Candidate {
        let way = Way { copies, cpu, ..Way::default() };
        let (free_ns, hopeful_ns) = (wall_ns, wall_ns);
        Candidate { way, wall_ns, free_ns, hopeful_ns, reuse_ns: 0.0, saves: 0.0 }
    }

    #[test]
    fn a_disaster_is_looked_at_again_before_long() {
        let all = [alone(1, 0, 1e3), alone(0, 1, 1e5)];
        let mut trials = Trials::new(1e12);
        for worker in [CPU, LINK] {
            (0..TRIALS).for_each(|_| trials.used(&all[worker].way, Pick::Trial(worker), 0));
        }
        let (mut last, mut longest, mut looks) = (0, 0, 0);
        for token in 1..100_000 {
            let one = trials.next(&all, &all[CPU], token, &Options::default());
            let (way, pick) = one.map_or((all[CPU].way, Pick::Best), |one| (one.0.way, one.1));
            trials.used(&way, pick, token);
            if pick == Pick::Retry(LINK) {
                (longest, last) = (longest.max(token - last), token);
                looks += 1;
            }
        }
        // Rarer each time, but not for ever.
        assert_eq!(longest, LONGEST_PAUSE);
        assert!((24..32).contains(&looks), "{looks}");
    }
}
