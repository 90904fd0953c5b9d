//! Before a layer of the token ran: its id, and the previous token.

use super::fast;
use super::marginal::Marginal;
use super::pairs::{Pairs, Prior};
use super::{Forecast, Known};
use crate::Shape;

const HALF_LIFE: f32 = 2048.0;
/// Occurrences of a token that are remembered.
const OCCURRENCES: usize = 3;
/// The largest number of tokens that are remembered.
const TOKENS: usize = 16384;
/// Room for them; fewer tokens are remembered where a token needs more.
const LIMIT_BYTES: usize = 16 << 20;
/// An expert that is not there.
const NONE: u16 = u16::MAX;
/// Occurrences of prior belief against what a token's occurrences say.
const PRIOR: f32 = 0.7;
const PREVIOUS_TRUST: f32 = 0.5;

/// What did this token's layers ask for when it was seen last, and what
/// usually follows the experts that the previous token used there? The first
/// layers depend on the token above all; for them nothing else is known yet.
///
/// Memory: a table of tokens by hash, `2 * 3 * sum(top_k)` bytes a token and
/// at most 16 MiB, and one table of pairs per layer, `experts^2 + experts`
/// bytes.
pub struct TokenMemory {
    layers: Vec<Option<Layer>>,
    /// Experts that one occurrence holds.
    stride: usize,
    /// `[tokens]`: whose row it is.
    owners: Vec<Option<u32>>,
    /// `[tokens]`: how often it was seen, as far as that matters.
    seen: Vec<u8>,
    /// `[tokens][OCCURRENCES][stride]`.
    experts: Vec<u16>,
    token: Option<u32>,
    votes: Vec<f32>,
}

struct Layer {
    marginal: Marginal,
    prior: Prior,
    pairs: Option<Pairs>,
    /// The experts of the last token, rank order.
    last: Vec<u32>,
    /// Where its experts are in an occurrence.
    at: usize,
    top_k: usize,
}

impl TokenMemory {
    pub fn new(shape: &Shape) -> Self {
        let mut stride = 0;
        let mut pair_bytes = 0usize;
        let layers = shape
            .layers
            .iter()
            .map(|layer| {
                let layer = layer.as_ref()?;
                let at = stride;
                stride += layer.top_k;
                let bytes = Pairs::bytes(layer.experts, [layer.experts].into_iter());
                let fits = pair_bytes.saturating_add(bytes) <= LIMIT_BYTES;
                pair_bytes += if fits { bytes } else { 0 };
                let marginal = Marginal::new(layer.experts, layer.top_k, HALF_LIFE);
                Some(Layer {
                    prior: Prior::new(&marginal),
                    marginal,
                    pairs: fits.then(|| Pairs::new(layer.experts, &[layer.experts])),
                    last: Vec::with_capacity(layer.top_k),
                    at,
                    top_k: layer.top_k,
                })
            })
            .collect();
        let token_bytes = (2 * OCCURRENCES * stride).max(1);
        let tokens = (LIMIT_BYTES / token_bytes).clamp(1, TOKENS);
        let widest = shape.moe().map(|(_, layer)| layer.experts).max().unwrap_or(0);
        Self {
            layers,
            stride,
            owners: vec![None; tokens],
            seen: vec![0; tokens],
            experts: vec![NONE; tokens * OCCURRENCES * stride],
            token: None,
            votes: vec![0.0; widest],
        }
    }

    fn slot(&self, token: u32) -> usize {
        // Fibonacci hashing.
        let hash = u64::from(token).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        hash as usize % self.owners.len()
    }

    /// The row of `token`, if it was seen.
    fn row(&self, token: u32) -> Option<usize> {
        let slot = self.slot(token);
        (self.owners[slot] == Some(token)).then_some(slot)
    }

    fn place(&self, slot: usize, occurrence: usize, layer: &Layer) -> std::ops::Range<usize> {
        let start = (slot * OCCURRENCES + occurrence) * self.stride + layer.at;
        start..start + layer.top_k
    }

    /// Adds what the token's occurrences say; `false` if there are none.
    fn add_token(&self, token: u32, layer: &Layer, votes: &mut [f32], scores: &mut [f32]) -> bool {
        let Some(slot) = self.row(token) else { return false };
        votes.fill(0.0);
        let mut occurrences = 0.0;
        for occurrence in 0..OCCURRENCES {
            let experts = &self.experts[self.place(slot, occurrence, layer)];
            if experts.first().is_none_or(|&expert| expert == NONE) {
                continue;
            }
            occurrences += 1.0;
            for &expert in experts {
                if let Some(vote) = votes.get_mut(usize::from(expert)) {
                    *vote += 1.0;
                }
            }
        }
        let share = 1.0 / (occurrences + PRIOR);
        for ((score, vote), p) in
            scores.iter_mut().zip(votes.iter()).zip(layer.prior.probabilities())
        {
            let q = (vote + PRIOR * p) * share;
            *score += fast::ln(q * (1.0 - p) / (p * (1.0 - q)));
        }
        occurrences > 0.0
    }
}

impl Forecast for TokenMemory {
    fn name(&self) -> &'static str {
        "token"
    }

    fn scores(&mut self, target: usize, known: &Known<'_>, scores: &mut [f32]) -> bool {
        let Some(Some(layer)) = self.layers.get(target) else { return false };
        scores.copy_from_slice(layer.prior.log_odds());
        let mut answered = false;
        if let (Some(pairs), false) = (&layer.pairs, layer.last.is_empty()) {
            for (score, said) in scores.iter_mut().zip(pairs.said(0)) {
                *score += PREVIOUS_TRUST * said;
            }
            answered = true;
        }
        if let Some(token) = known.token {
            let mut votes = std::mem::take(&mut self.votes);
            answered |= self.add_token(token, layer, &mut votes[..scores.len()], scores);
            self.votes = votes;
        }
        answered
    }

    fn routed(&mut self, layer: usize, experts: &[u32], _: &[f32]) {
        let Some(Some(place)) = self.layers.get(layer) else { return };
        if let Some(slot) = self.token.and_then(|token| self.row(token)) {
            let occurrence = (usize::from(self.seen[slot]) + OCCURRENCES - 1) % OCCURRENCES;
            let range = self.place(slot, occurrence, place);
            let row = &mut self.experts[range];
            row.fill(NONE);
            for (to, &expert) in row.iter_mut().zip(experts) {
                *to = u16::try_from(expert).unwrap_or(NONE);
            }
        }
        let Some(Some(place)) = self.layers.get_mut(layer) else { return };
        place.marginal.used(experts);
        place.prior.set(&place.marginal);
        if let Some(pairs) = &mut place.pairs {
            pairs.learn(&place.last, 0, experts);
            pairs.ask(experts, |_| &place.prior);
            pairs.began(experts);
        }
        place.last.clear();
        place.last.extend_from_slice(experts);
    }

    fn begin_token(&mut self, token: u32) {
        self.token = Some(token);
        let slot = self.slot(token);
        if self.owners[slot] != Some(token) {
            self.owners[slot] = Some(token);
            self.seen[slot] = 0;
            let row = OCCURRENCES * self.stride;
            self.experts[slot * row..(slot + 1) * row].fill(NONE);
        }
        self.seen[slot] = (self.seen[slot] + 1) % (OCCURRENCES as u8 * 64);
    }

    fn new_sequence(&mut self) {
        self.token = None;
        self.layers.iter_mut().flatten().for_each(|layer| layer.last.clear());
    }

    fn is_steady(&self) -> bool {
        true
    }

    fn memory_bytes(&self) -> usize {
        let pairs = |layer: &Layer| layer.pairs.as_ref().map_or(0, Pairs::memory_bytes);
        2 * self.experts.len()
            + 9 * self.owners.len()
            + self.layers.iter().flatten().map(pairs).sum::<usize>()
    }
}
