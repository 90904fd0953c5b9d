//! What a trace is like: how even, how repetitive and how predictable its
//! routing is.
//!
//! A first reading counts; a second one, over the second half of the tokens,
//! tests what the first half has taught. Per MoE layer; the figures of the
//! whole are means over layers.

use crate::{Row, Source, TraceError};
use pregate_predictor::Shape;
use std::collections::VecDeque;

/// Of the reuse.
pub const LAGS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Of the experts that a static set keeps.
pub const SHARES: [f64; 3] = [0.1, 0.25, 0.5];
/// Layers with more experts have no table of transitions: a million numbers.
const MOST_EXPERTS: usize = 1024;
/// Of all tables; layers behind that have none. Three times what the largest
/// published model needs.
const MOST_CELLS: usize = 32 << 20;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    pub tokens: u64,
    pub sequences: u64,
    /// In layers, counting an expert each time that a token chose it.
    pub accesses: u64,
    /// How many tokens each expert of a layer had, per MoE layer.
    pub layers: Vec<LayerStats>,
    /// Mean share of a token's experts that the token `LAGS[i]` before it in
    /// its sequence had chosen too; `None` without such tokens.
    pub reuse: [Option<f64>; LAGS.len()],
    /// Share of the experts of the second half that are among the
    /// `max(top-k, share * experts)` that the first half chose most.
    pub static_hits: [Option<f64>; SHARES.len()],
    /// Share of a layer's experts among the top-k likeliest after the layer
    /// before: by the sum of `P(expert | expert before)`, learned on the first
    /// half and tested on the second; over the layers of at most 1024 experts,
    /// as many as 128 MiB of counts are enough for.
    pub transition: Option<f64>,
    /// The same among twice as many.
    pub transition_2k: Option<f64>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerStats {
    /// Of the model.
    pub layer: usize,
    pub tokens: Vec<u64>,
    /// Of the experts' shares, 0 to 1: 1 where all are used alike.
    pub entropy: f64,
}

impl Stats {
    /// Mean over the layers that were used; `None` without any.
    pub fn entropy(&self) -> Option<f64> {
        let used = self.layers.iter().filter(|layer| layer.tokens.iter().any(|&n| n > 0));
        mean(used.map(|layer| layer.entropy))
    }

    /// Reads `source` twice from its beginning, or three times where it does
    /// not say how many tokens it has. `tell` is called with the tokens read so
    /// far, of all readings.
    ///
    /// # Errors
    /// Those of `source`.
    pub fn of(source: &mut dyn Source, tell: &mut dyn FnMut(u64)) -> Result<Self, TraceError> {
        let shape = source.header().shape.clone();
        let mut counts = Counts::new(&shape);
        let mut row = Row::default();
        source.rewind()?;
        let mut read = 0;
        let total = match source.tokens() {
            Some(tokens) => tokens,
            None => {
                let mut tokens = 0;
                while source.next(&mut row)? {
                    tokens += 1;
                    tell(tokens);
                }
                read = tokens;
                source.rewind()?;
                tokens
            }
        };
        let half = total / 2;
        let mut reuse = Reuse::new();
        let mut stats = Self::default();
        while source.next(&mut row)? {
            stats.sequences += u64::from(row.starts_sequence);
            counts.learn(&row, stats.tokens < half);
            reuse.token(&row, &shape);
            stats.tokens += 1;
            tell(read + stats.tokens);
        }
        counts.rank();
        source.rewind()?;
        let mut token = 0;
        // To the end, which says whether the file was cut off.
        while source.next(&mut row)? {
            if token >= half {
                counts.test(&row);
            }
            token += 1;
            tell(read + stats.tokens + token);
        }
        stats.reuse = reuse.shares();
        counts.tell(&mut stats);
        Ok(stats)
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0u64), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / count as f64)
}

/// Hits among so many; per layer, so that all layers weigh the same.
#[derive(Clone, Copy, Default)]
struct Share {
    hits: u64,
    of: u64,
}

impl Share {
    fn value(self) -> Option<f64> {
        (self.of > 0).then(|| self.hits as f64 / self.of as f64)
    }
}

struct Layer {
    index: usize,
    experts: usize,
    top_k: usize,
    /// Of all tokens, and of those of the first half.
    tokens: Vec<u64>,
    learned: Vec<u64>,
    /// `[experts of the MoE layer before, experts]`, of the first half; empty
    /// for the first layer and for very wide ones.
    after: Vec<u32>,
    /// Of each expert, its place when sorted by `learned`.
    place: Vec<usize>,
    static_hits: [Share; SHARES.len()],
    transition: [Share; 2],
}

struct Counts {
    layers: Vec<Layer>,
    /// Scratch of a layer.
    scores: Vec<(f64, u16)>,
}

impl Counts {
    fn new(shape: &Shape) -> Self {
        let (mut before, mut left) = (None, MOST_CELLS);
        let layers = shape.moe().map(|(index, layer)| {
            let experts = layer.experts;
            let cells = before.replace(experts).filter(|&n| n.max(experts) <= MOST_EXPERTS);
            let cells = cells.filter(|&n| n * experts <= left);
            left -= cells.map_or(0, |n| n * experts);
            Layer {
                index,
                experts,
                top_k: layer.top_k,
                tokens: vec![0; experts],
                learned: vec![0; experts],
                after: vec![0; cells.unwrap_or(0) * experts],
                place: Vec::new(),
                static_hits: Default::default(),
                transition: Default::default(),
            }
        });
        Self { layers: layers.collect(), scores: Vec::new() }
    }

    fn learn(&mut self, row: &Row, is_first_half: bool) {
        let mut before: &[u16] = &[];
        for layer in &mut self.layers {
            let experts = row.experts(layer.index);
            for &expert in experts {
                layer.tokens[usize::from(expert)] += 1;
                layer.learned[usize::from(expert)] += u64::from(is_first_half);
            }
            if is_first_half && !layer.after.is_empty() {
                for &from in before {
                    let counts = &mut layer.after[usize::from(from) * layer.experts..];
                    experts.iter().for_each(|&expert| counts[usize::from(expert)] += 1);
                }
            }
            before = experts;
        }
    }

    fn rank(&mut self) {
        for layer in &mut self.layers {
            let mut order: Vec<usize> = (0..layer.experts).collect();
            // Stable: of equals the lower number comes first.
            order.sort_by_key(|&expert| std::cmp::Reverse(layer.learned[expert]));
            layer.place = vec![0; layer.experts];
            order.iter().enumerate().for_each(|(place, &expert)| layer.place[expert] = place);
        }
    }

    fn test(&mut self, row: &Row) {
        let mut before: Option<(&[u16], &[u64])> = None;
        for layer in &mut self.layers {
            let experts = row.experts(layer.index);
            let chosen = experts.len() as u64;
            for (share, hits) in SHARES.iter().zip(&mut layer.static_hits) {
                let kept = ((share * layer.experts as f64) as usize).max(layer.top_k);
                let is_kept = |expert: &&u16| layer.place[usize::from(**expert)] < kept;
                hits.of += chosen;
                hits.hits += experts.iter().filter(is_kept).count() as u64;
            }
            if let Some((from, totals)) = before.filter(|_| !layer.after.is_empty()) {
                self.scores.clear();
                self.scores.extend((0..layer.experts).map(|expert| (0.0, expert as u16)));
                for &from in from {
                    let from = usize::from(from);
                    let total = totals[from].max(1) as f64;
                    let counts = &layer.after[from * layer.experts..][..layer.experts];
                    let pairs = self.scores.iter_mut().zip(counts);
                    pairs.for_each(|(score, &count)| score.0 += f64::from(count) / total);
                }
                self.scores.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                for (factor, share) in (1..).zip(&mut layer.transition) {
                    let named = &self.scores[..(factor * layer.top_k).min(layer.experts)];
                    let is_named = |id: &&u16| named.iter().any(|(_, named)| named == *id);
                    share.of += chosen;
                    share.hits += experts.iter().filter(is_named).count() as u64;
                }
            }
            before = Some((experts, &layer.learned));
        }
    }

    fn tell(self, stats: &mut Stats) {
        let over =
            |share: &dyn Fn(&Layer) -> Option<f64>| mean(self.layers.iter().filter_map(share));
        for index in 0..SHARES.len() {
            stats.static_hits[index] = over(&|layer| layer.static_hits[index].value());
        }
        stats.transition = over(&|layer| layer.transition[0].value());
        stats.transition_2k = over(&|layer| layer.transition[1].value());
        stats.layers = self.layers.into_iter().map(Layer::stats).collect();
        stats.accesses = stats.layers.iter().flat_map(|layer| &layer.tokens).sum();
    }
}

impl Layer {
    fn stats(self) -> LayerStats {
        let sum = self.tokens.iter().sum::<u64>() as f64;
        let part = |&count: &u64| match count {
            0 => 0.0,
            count => -(count as f64 / sum) * (count as f64 / sum).ln(),
        };
        let entropy = self.tokens.iter().map(part).sum::<f64>() / (self.experts as f64).ln();
        let entropy = if self.experts > 1 { entropy } else { 0.0 };
        LayerStats { layer: self.index, tokens: self.tokens, entropy }
    }
}

/// Compares every token with those before it.
struct Reuse {
    /// The last 64 of the sequence, newest first.
    recent: VecDeque<Row>,
    /// Sums of shares, and of layers that were compared.
    sums: [(f64, u64); LAGS.len()],
}

impl Reuse {
    fn new() -> Self {
        Self { recent: VecDeque::new(), sums: [(0.0, 0); LAGS.len()] }
    }

    fn token(&mut self, row: &Row, shape: &Shape) {
        if row.starts_sequence {
            self.recent.clear();
        }
        for (&lag, (sum, count)) in LAGS.iter().zip(&mut self.sums) {
            let Some(before) = self.recent.get(lag - 1) else { break };
            for (index, _) in shape.moe() {
                let (now, then) = (row.experts(index), before.experts(index));
                // Not recorded.
                if now.is_empty() {
                    continue;
                }
                let both = now.iter().filter(|expert| then.contains(expert)).count();
                *sum += both as f64 / now.len() as f64;
                *count += 1;
            }
        }
        let oldest =
            if self.recent.len() == LAGS[LAGS.len() - 1] { self.recent.pop_back() } else { None };
        let mut newest = oldest.unwrap_or_default();
        newest.clone_from(row);
        self.recent.push_front(newest);
    }

    fn shares(&self) -> [Option<f64>; LAGS.len()] {
        self.sums.map(|(sum, count)| (count > 0).then(|| sum / count as f64))
    }
}
