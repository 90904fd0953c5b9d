//! What goes wrong on the simulated disk, and when: a plan that depends on
//! nothing but a seed and the number of the read.

use super::random::Random;
use pregate_runtime::store::mover::Urgency;

/// What happens to one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    None,
    /// F01, F02: the system refuses `0..=2` times and then answers.
    Retried(u32),
    /// F01, F02, F09: it refuses three times; the fill fails.
    Io,
    /// F03: it answers with less than asked for, so that a second read is
    /// needed.
    Short,
    /// F04, F09: it takes so many nanoseconds longer.
    Slow(u64),
    /// F05, F07: the file is no longer what was opened. For ever.
    Changed,
    /// F06: another file has the name now. Reading goes on.
    Replaced,
    /// F24: the thread that reads panics. For ever.
    Stop,
    /// F08: this bit of the read, counted modulo its length, is wrong.
    Flip(u64),
}

impl Fault {
    /// The fill that it happens to brings no expert.
    pub fn ends_a_fill(self) -> bool {
        matches!(self, Fault::Io | Fault::Changed | Fault::Stop)
    }
}

const MS: u64 = 1_000_000;

/// Which reads of a run go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    Clean,
    /// The read with this number.
    Nth(u64, Fault),
    /// Each with a probability of `per_mille`, by `seed`: everything that the
    /// run can go on after.
    Passing {
        seed: u64,
        per_mille: u64,
    },
    /// As before, and after `after` reads something that ends all reading.
    Final {
        seed: u64,
        per_mille: u64,
        after: u64,
    },
    /// Each read with a probability of `per_mille` has a wrong bit.
    Flips {
        seed: u64,
        per_mille: u64,
    },
}

impl Plan {
    /// What happens to read number `read`.
    pub fn at(self, read: u64, urgency: Urgency) -> Fault {
        match self {
            Plan::Clean => Fault::None,
            Plan::Nth(nth, fault) if nth == read => fault,
            Plan::Nth(..) => Fault::None,
            Plan::Passing { seed, per_mille } => passing(seed, per_mille, read, urgency),
            Plan::Final { seed, after, .. } if read == after => {
                if seed.is_multiple_of(2) {
                    Fault::Changed
                } else {
                    Fault::Stop
                }
            }
            Plan::Final { seed, per_mille, .. } => passing(seed, per_mille, read, urgency),
            Plan::Flips { seed, per_mille } => {
                let mut random = Random::new(seed ^ read.wrapping_mul(0x9e37));
                if random.below(1000) < per_mille {
                    Fault::Flip(random.next())
                } else {
                    Fault::None
                }
            }
        }
    }

    /// The most that a fault of this plan makes one read longer.
    pub fn slowest_ns(self) -> u64 {
        match self {
            Plan::Clean | Plan::Flips { .. } => 0,
            Plan::Nth(..) | Plan::Passing { .. } | Plan::Final { .. } => 5_000 * MS + 11 * MS,
        }
    }
}

fn passing(seed: u64, per_mille: u64, read: u64, urgency: Urgency) -> Fault {
    let mut random = Random::new(seed ^ read.wrapping_mul(0x9e37_79b9));
    if random.below(1000) >= per_mille {
        return Fault::None;
    }
    // A read ahead may fail as often as it likes. Demands stop failing after a
    // while, since liveness is checked too.
    let hard = match urgency {
        Urgency::Prefetch => 6,
        Urgency::Demand => 2 * u64::from(read < 400),
    };
    match random.below(12) {
        n if n < hard => Fault::Io,
        6 | 7 => Fault::Retried(1 + random.below(2) as u32),
        8 => Fault::Slow(50 * MS),
        9 if random.below(8) == 0 => Fault::Slow(5_000 * MS),
        10 => Fault::Replaced,
        _ => Fault::Short,
    }
}
