//! Which expert follows which: counts of pairs, and what they say as log
//! likelihood ratios.

use super::fast;
use super::marginal::Marginal;

/// Events after which a row's counts are halved, so that old ones fade.
const ROW_LIMIT: u8 = 254;
/// Events of prior belief in independence.
const PRIOR: f32 = 3.0;
/// No pair is believed to be rarer than this.
const LEAST: f32 = 1.0 / 4096.0;
/// Experts whose shares are multiplied before a logarithm is taken:
/// `LEAST^CHUNK` is a normal `f32`.
const CHUNK: usize = 8;

/// What is believed about a layer's experts without evidence, `[experts]`.
#[derive(Clone, Debug)]
pub struct Prior {
    probabilities: Vec<f32>,
    log_odds: Vec<f32>,
}

impl Prior {
    pub fn new(marginal: &Marginal) -> Self {
        let zero = vec![0.0; marginal.experts()];
        let mut prior = Self { probabilities: zero.clone(), log_odds: zero };
        prior.set(marginal);
        prior
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

/// How often experts of some other layers, the targets, ran after expert `a`
/// of this one. Rows of one `a` lie together, since they are read together.
/// `from * (targets' experts + 1)` bytes.
#[derive(Clone, Debug)]
pub struct Pairs {
    /// `[targets + 1]`: where each target's experts start in a row.
    starts: Vec<usize>,
    /// `[from][starts.last()]`.
    counts: Vec<u8>,
    /// Events with `a`, `[from]`.
    events: Vec<u8>,
    /// Scratch, `[starts.last()]`.
    yes: Vec<f32>,
    no: Vec<f32>,
    /// `[starts.last()]`, see [`Self::said`].
    said: Vec<f32>,
}

impl Pairs {
    /// From a layer with `from` experts to layers with `targets` experts.
    pub fn new(from: usize, targets: &[usize]) -> Self {
        let mut starts = vec![0];
        starts.extend(targets.iter().scan(0, |end, experts| {
            *end += experts;
            Some(*end)
        }));
        let width = starts[targets.len()];
        Self {
            starts,
            counts: vec![0; from * width],
            events: vec![0; from],
            yes: vec![0.0; width],
            no: vec![0.0; width],
            said: vec![0.0; width],
        }
    }

    /// Bytes of the table.
    pub fn bytes(from: usize, targets: impl Iterator<Item = usize>) -> usize {
        let width = targets.fold(1usize, |sum, experts| sum.saturating_add(experts));
        from.saturating_mul(width)
    }

    /// `from` ran; what follows will be learned.
    pub fn began(&mut self, from: &[u32]) {
        let width = self.yes.len();
        for &a in from {
            let events = &mut self.events[a as usize];
            if *events >= ROW_LIMIT {
                *events /= 2;
                let row = a as usize * width..(a as usize + 1) * width;
                self.counts[row].iter_mut().for_each(|count| *count /= 2);
            }
            *events += 1;
        }
    }

    /// After `from`, the target's layer used `to`.
    pub fn learn(&mut self, from: &[u32], target: usize, to: &[u32]) {
        let width = self.yes.len();
        for &a in from {
            let start = a as usize * width + self.starts[target];
            for &b in to {
                let count = &mut self.counts[start + b as usize];
                *count = count.saturating_add(1);
            }
        }
    }

    /// Works out what the experts `from` say about every target's experts.
    pub fn ask<'a>(&mut self, from: &[u32], prior: impl Fn(usize) -> &'a Prior) {
        let width = self.yes.len();
        self.said.fill(0.0);
        for experts in from.chunks(CHUNK) {
            self.yes.fill(1.0);
            self.no.fill(1.0);
            for &a in experts {
                let a = a as usize;
                let share = 1.0 / (f32::from(self.events[a]) + PRIOR);
                let row = &self.counts[a * width..(a + 1) * width];
                for (target, range) in self.starts.windows(2).enumerate() {
                    let range = range[0]..range[1];
                    let yes = &mut self.yes[range.clone()];
                    let no = &mut self.no[range.clone()];
                    let prior = &prior(target).probabilities;
                    multiply(&row[range], share, prior, yes, no);
                }
            }
            for (target, range) in self.starts.windows(2).enumerate() {
                let range = range[0]..range[1];
                let products = self.yes[range.clone()].iter().zip(&self.no[range.clone()]);
                let count = experts.len() as f32;
                let base = &prior(target).log_odds;
                for ((said, (yes, no)), base) in self.said[range].iter_mut().zip(products).zip(base)
                {
                    *said += fast::ln(yes / no) - count * base;
                }
            }
        }
    }

    /// The last answer of [`Self::ask`] for a target, `[experts]`: naive
    /// Bayes' log likelihood ratios.
    pub fn said(&self, target: usize) -> &[f32] {
        &self.said[self.starts[target]..self.starts[target + 1]]
    }

    pub fn memory_bytes(&self) -> usize {
        self.counts.len() + self.events.len() + 12 * self.said.len()
    }
}

/// Multiplies `yes` by each expert's share of a row and `no` by the rest.
fn multiply(row: &[u8], share: f32, prior: &[f32], yes: &mut [f32], no: &mut [f32]) {
    for (((yes, no), &count), p) in yes.iter_mut().zip(no).zip(row).zip(prior) {
        let q = ((f32::from(count) + PRIOR * p) * share).clamp(LEAST, 1.0 - LEAST);
        *yes *= q;
        *no *= 1.0 - q;
    }
}
