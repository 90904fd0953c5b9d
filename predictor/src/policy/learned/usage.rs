//! How each expert of a layer was used: averages over the past, the last
//! uses, and the place it has in the current event.

use super::super::Event;
use crate::vocabulary::LayerShape;

/// Averages with so many rates.
pub const RATES: usize = 8;

/// What a token's part in an average keeps with each token after it:
/// `e^(-1/t)` for `t` of 1.5, 3, 6, 12, 25, 50, 150 and 600 tokens.
const DECAYS: [f32; RATES] =
    [0.513_417, 0.716_531, 0.846_482, 0.920_044, 0.960_789, 0.980_199, 0.993_356, 0.998_335];

/// A longer chunk counts no more than so many tokens (see `history.rs`).
const CHUNK_TOKENS: usize = 32;

/// An expert that was never used counts as used so many tokens ago.
pub const LONG_AGO: u32 = 1000;

/// What is known of one expert.
#[derive(Clone, Copy, Debug)]
pub struct Use {
    /// Average of "was used", each rate.
    pub averages: [f32; RATES],
    /// The layer's clock when it was last used.
    last: u32,
    /// Tokens between the last uses, the latest first.
    pub gaps: [u32; 2],
    /// Its rank among `top_k` then, 0 to 1.
    pub rank: f32,
}

/// One layer.
pub struct Usage {
    top_k: usize,
    /// Tokens, from [`LONG_AGO`] on.
    clock: u32,
    /// What the averages of an expert that is always used would be.
    full: [f32; RATES],
    experts: Vec<Use>,
}

impl Usage {
    pub fn new(shape: &LayerShape) -> Self {
        let never = Use { averages: [0.0; RATES], last: 0, gaps: [LONG_AGO; 2], rank: 0.0 };
        Self {
            top_k: shape.top_k.max(1),
            clock: LONG_AGO,
            full: [0.0; RATES],
            experts: vec![never; shape.experts],
        }
    }

    /// A chunk counts as its tokens would, had each expert's uses been spread
    /// evenly over them, but as no more than [`CHUNK_TOKENS`].
    pub fn used(&mut self, event: &Event<'_>) {
        let tokens = event.tokens.clamp(1, CHUNK_TOKENS);
        self.clock = self.clock.saturating_add(tokens as u32);
        let kept = DECAYS.map(|decay| (0..tokens).fold(1.0, |kept: f32, _| kept * decay));
        let part = |averages: &mut [f32; RATES], share: f32| {
            averages.iter_mut().zip(kept).for_each(|(one, kept)| *one += (1.0 - kept) * share);
        };
        let decay = |averages: &mut [f32; RATES]| {
            averages.iter_mut().zip(kept).for_each(|(one, kept)| *one *= kept);
        };
        decay(&mut self.full);
        part(&mut self.full, 1.0);
        self.experts.iter_mut().for_each(|expert| decay(&mut expert.averages));
        for (rank, (&expert, &count)) in event.experts.iter().zip(event.counts).enumerate() {
            let expert = &mut self.experts[expert as usize];
            part(&mut expert.averages, count as f32 / event.tokens.max(1) as f32);
            expert.gaps = [self.clock - expert.last, expert.gaps[0]];
            expert.last = self.clock;
            expert.rank = (rank as f32 / self.top_k as f32).min(1.0);
        }
    }

    pub fn expert(&self, expert: u32) -> &Use {
        &self.experts[expert as usize]
    }

    /// Tokens since the last use; 0 for one of the current event.
    pub fn age(&self, expert: u32) -> u32 {
        self.clock - self.experts[expert as usize].last
    }

    /// Averages of `expert` as shares of what they could be.
    pub fn shares(&self, expert: u32) -> [f32; RATES] {
        let averages = &self.experts[expert as usize].averages;
        std::array::from_fn(|rate| averages[rate] / (self.full[rate] + 1e-6))
    }

    /// The rule of [`super::super::Frequency`], close to it: it has rates of
    /// its own.
    pub fn frequency(&self, expert: u32) -> f32 {
        let averages = &self.experts[expert as usize].averages;
        0.3 * averages[0] + 0.4 * averages[3] + averages[5] + 0.2 * averages[6]
    }

    /// The rule of LRU: the smallest is the one used longest ago, and of an
    /// event's the last rank.
    pub fn recency(&self, expert: u32) -> f32 {
        -(self.age(expert) as f32) - 0.5 * self.experts[expert as usize].rank
    }
}
