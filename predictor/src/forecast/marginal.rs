//! How often is each expert of a layer used? Decayed counts.

use super::fast;

/// Decayed use counts of one layer's experts. A use that is `half_life`
/// tokens old counts half.
#[derive(Clone, Debug)]
pub struct Marginal {
    weights: Vec<f32>,
    total: f32,
    /// What a use counts now. It grows instead of the old ones shrinking.
    increment: f32,
    growth: f32,
    /// The share of the experts that a token uses.
    base: f32,
}

/// Tokens of prior belief in equal use.
const PRIOR: f32 = 2.0;
const RESCALE_AT: f32 = 1e6;

impl Marginal {
    pub fn new(experts: usize, top_k: usize, half_life: f32) -> Self {
        let base = if experts == 0 { 0.0 } else { (top_k as f32 / experts as f32).min(0.99) };
        let growth = 2f32.powf(1.0 / half_life.max(1.0));
        Self { weights: vec![0.0; experts], total: 0.0, increment: 1.0, growth, base }
    }

    /// One token used `experts`.
    pub fn used(&mut self, experts: &[u32]) {
        self.increment *= self.growth;
        self.total += self.increment;
        for &expert in experts {
            if let Some(weight) = self.weights.get_mut(expert as usize) {
                *weight += self.increment;
            }
        }
        if self.increment > RESCALE_AT {
            let scale = 1.0 / self.increment;
            self.weights.iter_mut().for_each(|weight| *weight *= scale);
            self.total *= scale;
            self.increment = 1.0;
        }
    }

    /// The probability that a token uses each expert, in 0.001..=0.999.
    pub fn probabilities(&self, out: &mut [f32]) {
        let prior = PRIOR * self.increment;
        let inverse = 1.0 / (self.total + prior);
        for (p, weight) in out.iter_mut().zip(&self.weights) {
            *p = ((weight + prior * self.base) * inverse).clamp(0.001, 0.999);
        }
    }

    /// Log-odds of [`Self::probabilities`].
    pub fn log_odds(&self, scores: &mut [f32]) {
        self.probabilities(scores);
        scores.iter_mut().for_each(|p| *p = fast::ln(*p / (1.0 - *p)));
    }

    pub fn experts(&self) -> usize {
        self.weights.len()
    }

    pub fn memory_bytes(&self) -> usize {
        4 * self.weights.len()
    }
}
