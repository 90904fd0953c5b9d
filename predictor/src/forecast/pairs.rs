//! Which expert follows which: counts of pairs between two layers.

use super::fast;
use super::marginal::Marginal;

/// Events after which a row's counts are halved, so that old ones fade.
const ROW_LIMIT: u16 = 4096;
/// Events of prior belief in independence.
const PRIOR: f32 = 3.0;
/// No pair is believed to be rarer than this.
const LEAST: f32 = 1.0 / 4096.0;
/// Experts whose shares are multiplied before a logarithm is taken:
/// `LEAST^CHUNK` is a normal `f32`.
const CHUNK: usize = 8;

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

    /// Adds to `scores[to]`, log-odds, what the experts `from` say about each
    /// `b`: `trust` times naive Bayes' log likelihood ratios.
    pub fn add(
        &self,
        from: &[u32],
        trust: f32,
        prior: &Prior,
        scores: &mut [f32],
        work: &mut Work,
    ) {
        let shares = &prior.probabilities[..self.to];
        for experts in from.chunks(CHUNK) {
            let (yes, no) = (&mut work.yes[..self.to], &mut work.no[..self.to]);
            yes.fill(1.0);
            no.fill(1.0);
            for &a in experts {
                let a = a as usize;
                let share = 1.0 / (f32::from(self.events[a]) + PRIOR);
                let row = &self.counts[a * self.to..(a + 1) * self.to];
                for (((yes, no), &count), p) in
                    yes.iter_mut().zip(no.iter_mut()).zip(row).zip(shares)
                {
                    let q = ((f32::from(count) + PRIOR * p) * share).clamp(LEAST, 1.0 - LEAST);
                    *yes *= q;
                    *no *= 1.0 - q;
                }
            }
            let count = experts.len() as f32;
            let products = yes.iter().zip(no.iter());
            for ((score, (yes, no)), base) in scores.iter_mut().zip(products).zip(&prior.log_odds) {
                *score += trust * (fast::ln(yes / no) - count * base);
            }
        }
    }

    pub fn memory_bytes(&self) -> usize {
        2 * (self.counts.len() + self.events.len())
    }
}

/// What is believed about a layer's experts without evidence, `[experts]`.
#[derive(Clone, Debug)]
pub struct Prior {
    probabilities: Vec<f32>,
    log_odds: Vec<f32>,
}

impl Prior {
    pub fn new(experts: usize) -> Self {
        Self { probabilities: vec![0.0; experts], log_odds: vec![0.0; experts] }
    }

    /// Takes over a layer's frequencies.
    pub fn set(&mut self, marginal: &Marginal) {
        marginal.probabilities(&mut self.probabilities);
        for (odds, p) in self.log_odds.iter_mut().zip(&self.probabilities) {
            *odds = fast::ln(p / (1.0 - p));
        }
    }

    pub fn probabilities(&self) -> &[f32] {
        &self.probabilities
    }

    pub fn log_odds(&self) -> &[f32] {
        &self.log_odds
    }
}

/// Scratch for [`Pairs::add`], `[experts]` of the widest layer.
#[derive(Clone, Debug)]
pub struct Work {
    yes: Vec<f32>,
    no: Vec<f32>,
}

impl Work {
    pub fn new(experts: usize) -> Self {
        Self { yes: vec![0.0; experts], no: vec![0.0; experts] }
    }
}
