//! The switch that wall time decides: estimates say which layer's read-aheads
//! pay, tokens with and without say whether all of it does.
//!
//! What estimates leave out was 28 % on machines whose processor brings a miss
//! sooner than the link (`docs/measurements.md`): a read-ahead takes the frame
//! that a demand would have had, and its bytes the memory of whoever computes.

/// Tokens of a block, with or without reading ahead.
const BLOCK: u64 = 8;

/// Pairs of blocks before a verdict.
const PAIRS: u64 = 8;

/// Tokens with reading ahead before the first block: caches and forecasts
/// know nothing yet.
const FIRST: u64 = 16;

/// A trial ends early where the first pair is slower or faster by more than
/// this (a logarithm), two by more than half of it, and so on: half of a
/// trial's tokens go without what pays, or with what does not.
const PLAIN: f64 = 0.25;

/// A gain ends a trial early only after so many pairs, and where it is so many
/// standard errors.
const SURE_PAIRS: f64 = 3.0;
const SURE_ERRORS: f64 = 3.0;

/// Tokens after the first verdict until the next trial. Doubles with every
/// verdict that says the same, up to the longest.
const FIRST_REST: u64 = 512;
const LONGEST_REST: u64 = 8192;

/// What trials so far weigh beside a new one.
const KEPT: f64 = 0.5;

/// A token counts as at most so many usual ones: on a real machine something
/// else holds one up now and then, which would decide a trial.
const LONGEST_TOKEN: f64 = 2.0;

/// Tokens that the usual one remembers.
const USUAL_MEMORY: f64 = 16.0;

/// Decides for all layers. Deterministic in what it is told; until it is told
/// anything it is on.
///
/// It is on where pairs of blocks show a gain beyond their standard error:
/// tokens differ by more than most forecasts gain or lose, so without that
/// it would be on half of the time where a few percent are lost.
#[derive(Clone, Debug)]
pub struct Wall {
    phase: Phase,
    /// Tokens until the phase, or the block of a trial, is over.
    left: u64,
    /// ns of the pair of blocks that runs, with and without.
    pair: [f64; 2],
    /// What a token takes, lately, in ns; 0 before the first.
    usual_ns: f64,
    /// Of this trial and, decayed, those before it.
    seen: Seen,
    trial: Seen,
    rest: u64,
    verdict: Option<bool>,
    switched_off: u64,
}

/// How much longer a block took with reading ahead: natural logarithms of
/// ratios.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    pairs: f64,
    sum: f64,
    squares: f64,
}

impl Seen {
    fn add(&mut self, ratio: f64) {
        self.pairs += 1.0;
        self.sum += ratio;
        self.squares += ratio * ratio;
    }

    fn decay(&mut self) {
        for part in [&mut self.pairs, &mut self.sum, &mut self.squares] {
            *part *= KEPT;
        }
    }

    fn mean(&self) -> f64 {
        self.sum / self.pairs.max(1.0)
    }

    fn error(&self) -> f64 {
        let variance = self.squares / self.pairs.max(1.0) - self.mean().powi(2);
        (variance.max(0.0) / self.pairs.max(1.0)).sqrt()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Rest {
        is_on: bool,
    },
    /// Counted down to 0; even: with.
    Trial {
        blocks: u64,
    },
}

impl Default for Wall {
    fn default() -> Self {
        Self {
            phase: Phase::Rest { is_on: true },
            left: FIRST,
            pair: [0.0; 2],
            usual_ns: 0.0,
            seen: Seen::default(),
            trial: Seen::default(),
            rest: FIRST_REST,
            verdict: None,
            switched_off: 0,
        }
    }
}

impl Wall {
    pub fn on(&self) -> bool {
        match self.phase {
            Phase::Rest { is_on } => is_on,
            Phase::Trial { blocks } => blocks.is_multiple_of(2),
        }
    }

    /// How often it was switched off.
    pub fn switched_off(&self) -> u64 {
        self.switched_off
    }

    /// A token took `ns`.
    pub fn token(&mut self, ns: u64) {
        let ns = self.bounded(ns as f64);
        self.pair[usize::from(!self.on())] += ns;
        self.left = self.left.saturating_sub(1);
        if self.left > 0 {
            return;
        }
        match self.phase {
            Phase::Rest { .. } => {
                self.seen.decay();
                self.trial = Seen::default();
                self.next_block(2 * PAIRS);
            }
            Phase::Trial { .. } if self.on() => self.next_block_of_pair(),
            Phase::Trial { blocks } => {
                let [with, without] = self.pair.map(|ns| ns.max(1.0));
                let ratio = (with / without).ln();
                self.seen.add(ratio);
                self.trial.add(ratio);
                let plain = PLAIN / self.trial.pairs;
                // More than by chance; older trials that say otherwise want
                // the whole of this one.
                let is_sure = self.trial.pairs >= SURE_PAIRS
                    && self.trial.mean() + SURE_ERRORS * self.trial.error() < 0.0;
                let gains = is_sure && self.trial.mean() < -plain && self.gains();
                let is_plain = gains || self.trial.mean() > plain;
                match blocks == 1 || is_plain {
                    true => self.decide(),
                    false => self.next_block(blocks - 1),
                }
            }
        }
    }

    fn bounded(&mut self, ns: f64) -> f64 {
        if self.usual_ns == 0.0 {
            self.usual_ns = ns;
        }
        let ns = ns.min(LONGEST_TOKEN * self.usual_ns);
        self.usual_ns += (ns - self.usual_ns) / USUAL_MEMORY;
        ns
    }

    /// A pair of blocks begins with the one that reads ahead.
    fn next_block(&mut self, blocks: u64) {
        self.pair = [0.0; 2];
        (self.phase, self.left) = (Phase::Trial { blocks }, BLOCK);
    }

    fn next_block_of_pair(&mut self) {
        if let Phase::Trial { blocks } = &mut self.phase {
            *blocks -= 1;
        }
        self.left = BLOCK;
    }

    /// Beyond the standard error of all trials so far.
    fn gains(&self) -> bool {
        self.seen.mean() + self.seen.error() < 0.0
    }

    fn decide(&mut self) {
        let is_on = self.gains();
        self.rest = match self.verdict {
            Some(before) if before == is_on => (self.rest * 2).min(LONGEST_REST),
            _ => FIRST_REST,
        };
        self.switched_off += u64::from(!is_on);
        self.verdict = Some(is_on);
        (self.phase, self.left) = (Phase::Rest { is_on }, self.rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens with reading ahead, of so many that take 1000 ns without.
    fn on_for(tokens: u64, with_ns: impl Fn(u64) -> u64) -> u64 {
        let mut wall = Wall::default();
        let mut on = 0;
        for token in 0..tokens {
            on += u64::from(wall.on());
            wall.token(if wall.on() { with_ns(token) } else { 1000 });
        }
        on
    }

    #[test]
    fn what_loses_is_tried_seldom_and_what_wins_stays() {
        // Slower by a third: seen in the first pair of every trial.
        assert!(on_for(12_000, |_| 1333) <= FIRST + 6 * BLOCK);
        // By a little: all pairs are needed.
        assert!(on_for(12_000, |_| 1020) <= FIRST + 6 * PAIRS * BLOCK);
        let wins = on_for(12_000, |_| 950);
        assert!(wins >= 12_000 - 6 * PAIRS * BLOCK, "{wins}");
        // Faster by a sixth: three pairs of every trial say so.
        let wins = on_for(160, |_| 850);
        assert!(wins >= 160 - 3 * BLOCK, "{wins}");
    }

    #[test]
    fn one_that_changes_is_seen_in_time() {
        let learns = |token| if token < 2000 { 1200 } else { 900 };
        let on = on_for(12_000, learns);
        assert!(on > 6000, "{on}");
    }

    #[test]
    fn noise_alone_does_not_switch_it_on() {
        // Tokens differ by half; reading ahead costs three percent.
        let mut state = 1u64;
        let mut noise = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            750.0 + (state >> 33) as f64 / f64::from(1u32 << 31) * 500.0
        };
        let (mut wall, mut on) = (Wall::default(), 0);
        for _ in 0..60_000 {
            on += u64::from(wall.on());
            wall.token((noise() * if wall.on() { 1.03 } else { 1.0 }) as u64);
        }
        assert!(on < 6000, "{on}");
    }

    #[test]
    fn tokens_that_something_else_held_up_decide_nothing() {
        // One in 31 takes a hundred times as long, with and without.
        let (mut wall, mut on) = (Wall::default(), 0);
        for token in 0..12_000 {
            on += u64::from(wall.on());
            let ns = if wall.on() { 900 } else { 1000 };
            wall.token(if token % 31 == 20 { 100 * ns } else { ns });
        }
        assert!(on > 11_000, "{on}");
    }

    #[test]
    fn without_times_it_is_on() {
        assert!(Wall::default().on());
        assert_eq!(Wall::default().switched_off(), 0);
    }
}
