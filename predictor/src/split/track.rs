//! Running estimates that a page fault does not move and a changed machine
//! does. Everything is the natural logarithm of a ratio of times, so that a
//! tenth more and a tenth less weigh the same.

/// Deviations beyond this are doubted: a factor of 1.5.
const DOUBT: f64 = 0.405;
/// Doubted values in a row, on one side, that make a new truth.
const AGREE: usize = 3;

/// Observations after a jump in which one that agrees with what was believed
/// before undoes it.
const RETURNS: u32 = 16;

/// What an observation did to an estimate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Taken into the mean.
    Followed,
    /// Doubted: it moved the mean no further than the limit of doubt would.
    Doubted,
    /// Enough doubted ones agreed: the estimate is their median now, above
    /// or below what it was.
    Rose,
    Fell,
    /// Beside the other worker only.
    RoseBeside,
}

/// A clipped mean of deviations from what else is known, with a memory of
/// `cap` observations.
#[derive(Clone, Debug, Default)]
pub struct Track {
    mean: f64,
    weight: f64,
    seen: u64,
    /// Where doubted observations would have put the mean.
    doubted: [f64; AGREE],
    doubts: usize,
    /// The mean before the last jump, and how many more observations it may
    /// come back in.
    before: f64,
    returns: u32,
}

impl Track {
    /// The estimate; 0 before anything was seen.
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// Observations that the estimate rests on, at most the cap.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// Observations in all, doubted ones included.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Something was `error` above (in logarithms) what it was expected to
    /// be with this estimate in the expectation. `prior`: how many
    /// observations the estimate 0 is worth; `cap`: the memory.
    /// `eager`: one in doubt is believed at once.
    pub fn note(&mut self, error: f64, prior: f64, cap: f64, eager: bool) -> Step {
        self.seen = self.seen.saturating_add(1);
        if error.abs() <= DOUBT {
            self.doubts = 0;
            self.returns = self.returns.saturating_sub(1);
            self.follow(error, prior, cap);
            return Step::Followed;
        }
        let target = self.mean + error;
        if self.returns > 0 && (target - self.before).abs() <= DOUBT {
            // What was doubted was a disturbance after all.
            (self.mean, self.weight, self.returns, self.doubts) = (self.before, 2.0, 0, 0);
            return if error > 0.0 { Step::Rose } else { Step::Fell };
        }
        if self.doubts > 0 && (self.doubted[0] > self.mean) != (target > self.mean) {
            self.doubts = 0;
        }
        self.doubted[self.doubts] = target;
        self.doubts += 1;
        let needed = match eager {
            true => 1,
            // What nothing has confirmed gives way to two.
            false if self.weight < 1.0 => AGREE - 1,
            false => AGREE,
        };
        if self.doubts >= needed {
            self.jump();
            return if error > 0.0 { Step::Rose } else { Step::Fell };
        }
        self.mean += DOUBT.copysign(error) / (prior + self.weight + 1.0);
        Step::Doubted
    }

    /// The middle of what was doubted, of two the nearer to the old mean.
    fn jump(&mut self) {
        let (doubted, old) = (&mut self.doubted[..self.doubts], self.mean);
        doubted.sort_by(|a, b| (a - old).abs().total_cmp(&(b - old).abs()));
        self.mean = doubted[(self.doubts - 1) / 2];
        (self.before, self.returns) = (old, RETURNS);
        self.weight = self.doubts as f64;
        self.doubts = 0;
    }

    /// Is something on the side of `error` in doubt already?
    pub fn doubts_like(&self, error: f64) -> bool {
        self.doubts > 0 && (self.doubted[0] > self.mean) == (error > 0.0)
    }

    /// Something else has taken over `by` of it.
    pub fn shift(&mut self, by: f64) {
        self.mean += by;
        self.doubts = 0;
    }

    /// Starts from what a neighbour knows.
    pub fn begin_at(&mut self, mean: f64) {
        self.mean = mean;
        self.seen = self.seen.max(1);
    }

    /// Takes what others have left of an observation that is not in doubt.
    pub fn follow(&mut self, error: f64, prior: f64, cap: f64) {
        self.weight = (self.weight + 1.0).min(cap);
        self.mean += error.clamp(-DOUBT, DOUBT) / (prior + self.weight);
    }

    /// Another estimate has explained what was doubted here.
    pub fn trust(&mut self) {
        self.doubts = 0;
    }
}

/// How much longer something takes beside something else, for each share
/// (0..=1) of its time that the other was busy: recursive least squares with
/// one coefficient and a limited memory.
#[derive(Clone, Debug)]
pub struct Slope {
    slope: f64,
    weight: f64,
}

impl Slope {
    pub fn new(slope: f64) -> Self {
        Self { slope, weight: 0.0 }
    }

    pub fn at(&self, share: f64) -> f64 {
        self.slope * share
    }

    pub fn note(&mut self, error: f64, share: f64, cap: f64) {
        self.weight = (self.weight + share * share).min(cap);
        let gain = share / (0.5 + self.weight);
        // Beside something else nothing is much faster, and no memory is
        // shared so badly that it is a hundred times slower.
        self.slope = (self.slope + gain * error.clamp(-DOUBT, DOUBT)).clamp(-0.2, 4.6);
    }
}
