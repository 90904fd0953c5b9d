//! The ways of sharing the misses of a layer, and what is expected of each.

/// A share this many times slower than the best one is a disaster.
pub const DISASTER: f64 = 4.0;
/// Memory of a mean, in misses, and what is left of it on another machine.
const MISS_MEMORY: f64 = 256.0;
const MISS_DOUBT: f64 = 8.0;

/// One way of sharing the misses of a layer: the rest goes to the CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Way {
    /// New copies.
    pub copies: usize,
    /// Copies under way that the layer waits for.
    pub waits: usize,
    pub cpu: usize,
}

impl Way {
    /// Experts that come over the link.
    pub fn link(&self) -> usize {
        self.copies + self.waits
    }

    /// Experts that `worker` is given.
    pub fn count(&self, worker: usize) -> usize {
        if worker == CPU { self.cpu } else { self.copies }
    }

    pub fn uses(&self, worker: usize) -> bool {
        self.count(worker) > 0
    }

    /// `worker` does it alone.
    pub fn is_pure(&self, worker: usize) -> bool {
        self.uses(worker) && self.waits == 0 && self.count(1 - worker) == 0
    }
}

pub const CPU: usize = 0;
pub const LINK: usize = 1;

/// A way with what it is expected to take.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    pub way: Way,
    /// ns from the decision to the last row.
    pub wall_ns: f64,
    /// The same, if the workers did not slow each other.
    pub free_ns: f64,
    /// `wall_ns`, if what is not known well turns out well.
    pub hopeful_ns: f64,
    /// What the copies will save later.
    pub reuse_ns: f64,
    /// Misses that the copy of the most promising expert saves.
    pub saves: f64,
}

impl Candidate {
    pub fn cost(&self) -> f64 {
        self.wall_ns - self.reuse_ns
    }
}

/// Why a way was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pick {
    Best,
    /// The first measurements of a worker.
    Trial(usize),
    /// Nearly as good as the best, and less well known.
    Explore,
    /// A worker that was not used for long.
    Retry(usize),
}

/// The misses' gains, highest first, and the remaining times of those that
/// are under way, ascending.
pub type Sorted<'a> = (&'a [f64], &'a [f64]);

/// A weighted mean that forgets.
#[derive(Clone, Debug, Default)]
pub struct Mean {
    pub mean: f64,
    weight: f64,
}

impl Mean {
    pub fn note(&mut self, value: f64, weight: f64) {
        self.weight = (self.weight + weight).min(MISS_MEMORY);
        self.mean += (value - self.mean) * weight / self.weight;
    }

    /// One more, with a memory of so many.
    pub fn note_within(&mut self, value: f64, memory: f64) {
        self.weight = (self.weight + 1.0).min(memory.max(1.0));
        self.mean += (value - self.mean) / self.weight;
    }

    /// What was seen is of another machine.
    pub fn doubt(&mut self) {
        self.weight = self.weight.min(MISS_DOUBT);
    }
}

/// ns that came from outside.
pub fn bounded(ns: u64) -> f64 {
    (ns as f64).min(1e12)
}
