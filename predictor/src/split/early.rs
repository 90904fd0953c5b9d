//! Whether the CPU is made ready before it is known what it will compute.
//!
//! An expert's input is not there before its layer's router has spoken, so
//! nothing of its answer can be computed earlier (a stale input gives other
//! bits). What can is the CPU's own start: threads that sleep take tens of
//! microseconds to come back. Where a forecast says that a miss is likely they
//! are roused while the GPU still works on the layer.
//!
//! Both ways are measured in what the CPU's work took, against what its price
//! says, and the better one is used: where rousing gains nothing it stops. The
//! other is tried in one of [`TRY_EVERY`] times.

/// Below this chance of a miss threads sleep on.
const LIKELY: f64 = 0.5;
const TRY_EVERY: u64 = 32;
/// Memory of a mean, in measurements; and those that it needs to be believed.
const MEMORY: f64 = 64.0;
const SURE: f64 = 8.0;
/// A measurement counts as no more than this (logarithm): others have the
/// processor for a while.
const MOST: f64 = 0.7;
/// What rousing has to gain, as a share of the CPU's time, to pay for the
/// calls and for cores that spin.
const LEAST_GAIN: f64 = 0.005;

/// One of the two ways.
#[derive(Clone, Copy, Debug, Default)]
struct Way {
    mean: f64,
    weight: f64,
}

/// The two ways, and what each was found to take.
#[derive(Clone, Debug, Default)]
pub struct Early {
    /// Asleep, roused: the logarithm of the CPU's time against its price.
    ways: [Way; 2],
    asked: u64,
    roused: u64,
}

impl Early {
    /// Rouse the threads for a layer that misses something with this chance?
    pub fn rouses(&mut self, chance: f64) -> bool {
        if chance.is_nan() || chance < LIKELY {
            return false;
        }
        self.asked += 1;
        let best = self.is_worth_it();
        let rouses = if self.asked.is_multiple_of(TRY_EVERY) { !best } else { best };
        self.roused += u64::from(rouses);
        rouses
    }

    /// As far as is known. Before that the two take turns.
    pub fn is_worth_it(&self) -> bool {
        let [asleep, roused] = &self.ways;
        match asleep.weight.min(roused.weight) < SURE {
            true => roused.weight <= asleep.weight,
            false => roused.mean < asleep.mean - LEAST_GAIN,
        }
    }

    /// The CPU's work for a layer took `ns` and was expected to take
    /// `expected_ns`.
    pub fn measured(&mut self, was_roused: bool, ns: u64, expected_ns: f64) {
        let error = (ns.max(1) as f64 / expected_ns).ln();
        if !error.is_finite() {
            return;
        }
        let way = &mut self.ways[usize::from(was_roused)];
        way.weight = (way.weight + 1.0).min(MEMORY);
        way.mean += (error.clamp(-MOST, MOST) - way.mean) / way.weight;
    }

    /// Likely misses, and how often threads were roused for them.
    pub fn counts(&self) -> (u64, u64) {
        (self.asked, self.roused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often threads are roused in the second half of 1000 layers where
    /// that makes the CPU's work `gain` times shorter; every seventh measurement
    /// is disturbed.
    fn roused(gain: f64) -> usize {
        let mut early = Early::default();
        let rouses = (0..1000).filter(|&at| {
            let is_roused = early.rouses(0.9);
            let noise = if at % 7 == 0 { 5.0 } else { 1.0 + 0.02 * f64::from(at % 3) };
            let ns = 1e5 * noise / if is_roused { gain } else { 1.0 };
            early.measured(is_roused, ns as u64, 1.2e5);
            is_roused && at >= 500
        });
        rouses.count()
    }

    #[test]
    fn threads_are_roused_where_that_gains_and_nowhere_else() {
        assert!(roused(1.25) >= 450, "{}", roused(1.25));
        assert!((1..=50).contains(&roused(1.0)), "{}", roused(1.0));
        assert!((1..=50).contains(&roused(0.8)), "{}", roused(0.8));
    }

    #[test]
    fn nobody_is_roused_for_what_is_unlikely() {
        let mut early = Early::default();
        for chance in [0.0, 0.49, f64::NAN, f64::NEG_INFINITY] {
            assert!((0..100).all(|_| !early.rouses(chance)));
        }
        assert_eq!(early.counts(), (0, 0));
        early.measured(true, 0, f64::NAN);
        early.measured(true, u64::MAX, 0.0);
        assert!((0..100).any(|_| early.rouses(0.5)));
    }
}
