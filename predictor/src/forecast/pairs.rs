//! Which expert follows which: counts of pairs between two layers.

/// Events after which a row's counts are halved, so that old ones fade.
const ROW_LIMIT: u16 = 4096;
/// Events of prior belief in independence.
const PRIOR: f32 = 3.0;
/// One pair shifts the odds by at most this factor, either way.
const CLAMP: f32 = 4096.0;

/// How often expert `b` of one layer ran after expert `a` of another.
/// `2 * (from * to + from)` bytes.
#[derive(Clone, Debug)]
pub struct Pairs {
    to: usize,
    /// `[from, to]`.
    counts: Vec<u16>,
    /// Events with `a`, `[from]`.
    events: Vec<u16>,
}

impl Pairs {
    pub fn new(from: usize, to: usize) -> Self {
        Self { to, counts: vec![0; from * to], events: vec![0; from] }
    }

    pub fn bytes(from: usize, to: usize) -> usize {
        2usize.saturating_mul(from.saturating_mul(to).saturating_add(from))
    }

    pub fn learn(&mut self, from: &[u32], to: &[u32]) {
        for &a in from {
            let a = a as usize;
            let row = &mut self.counts[a * self.to..(a + 1) * self.to];
            if self.events[a] >= ROW_LIMIT {
                row.iter_mut().for_each(|count| *count /= 2);
                self.events[a] /= 2;
            }
            self.events[a] += 1;
            for &b in to {
                row[b as usize] += 1;
            }
        }
    }

    /// Multiplies `odds[to]` by how much each expert of `from` shifts the odds
    /// of each `b`: naive Bayes' likelihood ratios. `prior[to]` holds the
    /// probabilities without any evidence. Eight experts at [`CLAMP`] stay
    /// inside an `f32`.
    pub fn shift(&self, from: &[u32], prior: &[f32], odds: &mut [f32]) {
        for &a in from {
            let a = a as usize;
            let events = f32::from(self.events[a]);
            let row = &self.counts[a * self.to..(a + 1) * self.to];
            for ((odds, &count), &p) in odds.iter_mut().zip(row).zip(prior) {
                let count = f32::from(count);
                let with = (count + PRIOR * p) * (1.0 - p);
                let without = (events - count + PRIOR * (1.0 - p)) * p;
                *odds *= (with / without).clamp(1.0 / CLAMP, CLAMP);
            }
        }
    }

    pub fn memory_bytes(&self) -> usize {
        2 * (self.counts.len() + self.events.len())
    }
}
