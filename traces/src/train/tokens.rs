//! How often each token's layers used each expert.

use super::corpus::Corpus;
use std::collections::HashMap;

/// Tokens of prior belief in the layer's marginal.
const PRIOR: f32 = 1.0;
/// Log-odds are kept within this.
pub const LIMIT: f32 = 6.0;

/// Counts per token id, MoE layer and expert.
pub struct TokenCounts {
    /// Where an id's counts are.
    places: HashMap<u32, usize>,
    /// `[ids]`.
    tokens: Vec<u32>,
    /// `[ids][layers][experts]`.
    counts: Vec<u16>,
    /// `[layers][experts]`: the shares of all tokens.
    shares: Vec<f32>,
    /// MoE layers of the model.
    layers: Vec<usize>,
    experts: usize,
}

/// Ids that occur at least twice in `sequences`, the most frequent first.
pub fn frequent(corpus: &Corpus, sequences: &[usize]) -> Vec<u32> {
    let mut counts: HashMap<u32, u32> = HashMap::new();
    for token in sequences.iter().flat_map(|&sequence| corpus.range(sequence)) {
        corpus.ids[token].into_iter().for_each(|id| *counts.entry(id).or_default() += 1);
    }
    let mut ids: Vec<_> = counts.into_iter().filter(|&(_, count)| count > 1).collect();
    ids.sort_unstable_by_key(|&(id, count)| (std::cmp::Reverse(count), id));
    ids.into_iter().map(|(id, _)| id).collect()
}

/// The counts of one sequence alone.
pub struct Own(TokenCounts);

impl TokenCounts {
    /// Of `ids` alone.
    pub fn new(corpus: &Corpus, sequences: &[usize], ids: &[u32]) -> Self {
        let mut all = Self::empty(corpus);
        ids.iter().for_each(|&id| _ = all.place(id));
        all.count(corpus, sequences, false);
        all
    }

    fn empty(corpus: &Corpus) -> Self {
        let shape = corpus.shape();
        let layers: Vec<usize> = shape.moe().map(|(layer, _)| layer).collect();
        let experts = shape.moe().map(|(_, layer)| layer.experts).max().unwrap_or(0);
        Self {
            places: HashMap::new(),
            tokens: Vec::new(),
            counts: Vec::new(),
            shares: vec![0.0; layers.len() * experts],
            layers,
            experts,
        }
    }

    fn place(&mut self, id: u32) -> usize {
        let next = self.places.len();
        let place = *self.places.entry(id).or_insert(next);
        if place == next {
            self.counts.resize(self.counts.len() + self.layers.len() * self.experts, 0);
            self.tokens.push(0);
        }
        place
    }

    fn count(&mut self, corpus: &Corpus, sequences: &[usize], adds: bool) {
        let row = self.layers.len() * self.experts;
        let mut tokens = 0f32;
        for token in sequences.iter().flat_map(|&sequence| corpus.range(sequence)) {
            let place = corpus.ids[token].and_then(|id| match adds {
                true => Some(self.place(id)),
                false => self.places.get(&id).copied(),
            });
            // What the first say is enough, and counts fit 16 bits.
            let place = place.filter(|&place| self.tokens[place] < u32::from(u16::MAX));
            place.into_iter().for_each(|place| self.tokens[place] += 1);
            tokens += 1.0;
            for (at, &layer) in self.layers.iter().enumerate() {
                for &expert in corpus.experts(token, layer) {
                    let at = at * self.experts + usize::from(expert);
                    self.shares[at] += 1.0;
                    if let Some(place) = place {
                        self.counts[place * row + at] += 1;
                    }
                }
            }
        }
        self.shares.iter_mut().for_each(|share| *share /= tokens.max(1.0));
    }

    pub fn own(&self, corpus: &Corpus, sequence: usize) -> Own {
        let mut own = Self::empty(corpus);
        own.count(corpus, &[sequence], true);
        Own(own)
    }

    /// The share of tokens that used each expert, `[layers][experts]`.
    pub fn shares(&self) -> &[f32] {
        &self.shares
    }

    /// What `id` says about the experts of a layer, in log-odds beyond the
    /// layer's own; without `own`. Zero for a token that was not seen.
    pub fn fill(&self, layer: usize, id: u32, own: Option<&Own>, field: &mut [f32]) {
        let Some(&place) = self.places.get(&id) else { return field.fill(0.0) };
        let own = own.and_then(|own| Some((&own.0, *own.0.places.get(&id)?)));
        let own_tokens = own.map_or(0, |(own, place)| own.tokens[place]);
        let tokens = self.tokens[place].saturating_sub(own_tokens);
        if tokens == 0 {
            return field.fill(0.0);
        }
        let start = layer * self.experts;
        let row =
            |counts: &Self, place: usize| place * counts.layers.len() * counts.experts + start;
        for (expert, field) in field.iter_mut().enumerate() {
            let mine = own.map_or(0, |(own, place)| own.counts[row(own, place) + expert]);
            let count = self.counts[row(self, place) + expert].saturating_sub(mine);
            let p = self.shares[start + expert].clamp(1e-4, 1.0 - 1e-4);
            let q = (f32::from(count) + PRIOR * p) / (tokens as f32 + PRIOR);
            let q = q.clamp(1e-4, 1.0 - 1e-4);
            let odds = (q * (1.0 - p) / (p * (1.0 - q))).ln();
            *field = odds.clamp(-LIMIT, LIMIT);
        }
    }
}
