//! From logits to the next token.
//!
//! The steps and their order are llama.cpp's default chain: penalties, DRY,
//! top-k, top-p, min-p, temperature, then a draw. Temperature 0 takes the
//! highest logit after penalties and DRY, the lowest id on ties, and draws
//! nothing. The same options, seed, tokens and logits give the same choice on
//! every machine: own random numbers, own exponential, no order that depends
//! on threads.

mod dry;
mod options;
mod random;

pub use options::{Dry, SamplerOptions};

use crate::error::{Error, Result};
use random::{Xoshiro, exp};
use std::{
    cmp::Ordering,
    collections::{HashMap, VecDeque},
};

/// A candidate: token and logit, later probability.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    token: u32,
    logit: f32,
}

/// Best first: higher logit, then lower id.
fn best_first(left: &Candidate, right: &Candidate) -> Ordering {
    right.logit.total_cmp(&left.logit).then(left.token.cmp(&right.token))
}

/// Chooses tokens for one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    random: Xoshiro,
    /// The last tokens, newest at the back, as many as any step looks at.
    history: VecDeque<u32>,
    keeps: usize,
    /// How often each token is in the penalty window.
    counts: HashMap<u32, u32>,
    /// Kept between calls, so that a token allocates nothing.
    candidates: Vec<Candidate>,
    position: usize,
}

impl Sampler {
    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Request`] names the option and its allowed range.
    pub fn new(options: SamplerOptions) -> Result<Self> {
        options.check()?;
        let dry_window = options.dry.as_ref().map_or(0, |dry| dry.window);
        let keeps = options.penalty_window.max(dry_window);
        Ok(Self {
            random: Xoshiro::seeded(options.seed),
            options,
            history: VecDeque::new(),
            keeps,
            counts: HashMap::new(),
            candidates: Vec::new(),
            position: 0,
        })
    }

    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// Tells it a token of the sequence: of the prompt, or the one that
    /// [`Sampler::sample`] chose.
    pub fn accept(&mut self, token: u32) {
        self.position += 1;
        let window = self.options.penalty_window;
        if window > 0 {
            *self.counts.entry(token).or_insert(0) += 1;
            if self.history.len() >= window {
                let leaves = self.history[self.history.len() - window];
                if let Some(count) = self.counts.get_mut(&leaves) {
                    *count -= 1;
                    if *count == 0 {
                        self.counts.remove(&leaves);
                    }
                }
            }
        }
        if self.keeps > 0 {
            if self.history.len() == self.keeps {
                self.history.pop_front();
            }
            self.history.push_back(token);
        }
    }

    /// Chooses a token from `logits` (`[vocab]`; penalties change them in
    /// place). It is not accepted by itself: an end-of-answer token may stay
    /// out of the history.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a logit is NaN or +infinity, or none is finite;
    /// a logit of -infinity is a token that cannot be chosen.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<u32> {
        self.check(logits)?;
        self.penalise(logits);
        if let Some(dry) = &self.options.dry {
            self.history.make_contiguous();
            let (history, _) = self.history.as_slices();
            let start = history.len().saturating_sub(dry.window);
            dry::apply(dry, &history[start..], logits);
        }
        if self.options.temperature == 0.0 {
            return Ok(greedy(logits));
        }
        let total = self.collect(logits);
        self.keep_top_p(total);
        self.keep_min_p();
        Ok(self.draw())
    }

    fn check(&self, logits: &[f32]) -> Result<()> {
        let mut finite = false;
        for &logit in logits {
            if logit.is_nan() || logit == f32::INFINITY {
                let found = if logit.is_nan() { "NaN" } else { "infinite" };
                return Err(Error::NotFinite { position: self.position, found });
            }
            finite |= logit.is_finite();
        }
        if !finite {
            return Err(Error::NotFinite { position: self.position, found: "no finite" });
        }
        Ok(())
    }

    /// Repetition penalty (Keskar et al. 2019: logits of seen tokens divided
    /// if positive, multiplied if negative), then frequency and presence
    /// penalty (subtracted per occurrence and once).
    fn penalise(&self, logits: &mut [f32]) {
        let SamplerOptions { repetition_penalty, frequency_penalty, presence_penalty, .. } =
            self.options;
        if repetition_penalty == 1.0 && frequency_penalty == 0.0 && presence_penalty == 0.0 {
            return;
        }
        for (&token, &count) in &self.counts {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            if *logit > 0.0 {
                *logit /= repetition_penalty;
            } else {
                *logit *= repetition_penalty;
            }
            *logit -= count as f32 * frequency_penalty + presence_penalty;
        }
    }

    /// The candidates, best first: the top k, or (k = 0) at least all that
    /// top-p and min-p keep. Returns the sum of the weights that top-p is a
    /// share of.
    fn collect(&mut self, logits: &[f32]) -> f64 {
        let candidates = &mut self.candidates;
        candidates.clear();
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // exp(-104) is 0 in binary32, after division by the temperature.
        let lowest = highest - 104.0 * self.options.temperature.max(1.0);
        let all = logits.iter().enumerate().filter(|(_, logit)| **logit >= lowest);
        candidates.extend(all.map(|(token, &logit)| Candidate { token: token as u32, logit }));
        let SamplerOptions { top_k, top_p, min_p, .. } = self.options;
        let weight = |candidate: &Candidate| exp(f64::from(candidate.logit - highest));
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, best_first);
            candidates.truncate(top_k);
        } else if top_k == 0 && (top_p < 1.0 || min_p > 0.0) {
            // Usually a few hundred hold all the probability that is asked
            // for; sorting the whole vocabulary would be the slowest step.
            let total: f64 = candidates.iter().map(weight).sum();
            let mut best = 256;
            while best < candidates.len() {
                candidates.select_nth_unstable_by(best - 1, best_first);
                // A little more, so that the order of the sums does not matter.
                let enough = f64::from(top_p) * total * (1.0 + 1e-9);
                let has_top_p =
                    top_p < 1.0 && candidates[..best].iter().map(weight).sum::<f64>() >= enough;
                if has_top_p || weight(&candidates[best - 1]) < f64::from(min_p) {
                    candidates.truncate(best);
                    break;
                }
                best *= 8;
            }
            candidates.sort_unstable_by(best_first);
            return total;
        }
        candidates.sort_unstable_by(best_first);
        if top_p < 1.0 { candidates.iter().map(weight).sum() } else { 0.0 }
    }

    /// The smallest set of best tokens whose probability reaches `top_p`
    /// (Holtzman et al. 2020), at temperature 1.
    fn keep_top_p(&mut self, total: f64) {
        let top_p = self.options.top_p;
        if top_p >= 1.0 {
            return;
        }
        let highest = self.candidates[0].logit;
        let mut sum = 0.0;
        let reached = self.candidates.iter().position(|candidate| {
            sum += exp(f64::from(candidate.logit - highest));
            sum >= f64::from(top_p) * total
        });
        if let Some(last) = reached {
            self.candidates.truncate(last + 1);
        }
    }

    /// Tokens with at least `min_p` of the best one's probability (Nguyen et
    /// al. 2024), at temperature 1.
    fn keep_min_p(&mut self) {
        let min_p = self.options.min_p;
        if min_p <= 0.0 {
            return;
        }
        let highest = self.candidates[0].logit;
        let keep = self.candidates.partition_point(|candidate| {
            exp(f64::from(candidate.logit - highest)) >= f64::from(min_p)
        });
        self.candidates.truncate(keep.max(1));
    }

    /// Draws from the softmax of logits over temperature.
    fn draw(&mut self) -> u32 {
        let temperature = f64::from(self.options.temperature);
        let highest = self.candidates[0].logit;
        let weight =
            |candidate: &Candidate| exp(f64::from(candidate.logit - highest) / temperature);
        let total: f64 = self.candidates.iter().map(weight).sum();
        let mut left = self.random.unit() * total;
        for candidate in &self.candidates {
            left -= weight(candidate);
            if left < 0.0 {
                return candidate.token;
            }
        }
        // Rounding may leave a little over: the last with a chance.
        let possible = self.candidates.iter().rev().find(|candidate| weight(candidate) > 0.0);
        possible.map_or(self.candidates[0].token, |candidate| candidate.token)
    }
}

/// The highest logit, the lowest id on ties.
pub fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests;
