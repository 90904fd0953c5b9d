//! A chunk of a prompt on its way through the layers.

use crate::forecast::Forecaster;

/// The experts of one layer, token after token.
#[derive(Clone, Default)]
struct Rows {
    experts: Vec<u32>,
    /// One per token: where its experts end.
    ends: Vec<usize>,
}

pub struct Prompt {
    tokens: Vec<u32>,
    layers: Vec<Rows>,
}

impl Prompt {
    pub fn new(tokens: &[u32], layers: usize) -> Self {
        Self { tokens: tokens.to_vec(), layers: vec![Rows::default(); layers] }
    }

    /// Tokens of the chunk.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// What each of the last tokens that the router of `layer` answered chose,
    /// `count` of them, in their order.
    pub fn last(&self, layer: usize, count: usize) -> impl Iterator<Item = &[u32]> {
        let Rows { experts, ends } = &self.layers[layer];
        let first = ends.len().saturating_sub(count);
        (first..ends.len()).map(move |index| {
            let start = index.checked_sub(1).map_or(0, |before| ends[before]);
            &experts[start..ends[index]]
        })
    }

    /// The next token's answer of the router of `layer`.
    pub fn routed(&mut self, layer: usize, experts: &[u32]) {
        let rows = &mut self.layers[layer];
        rows.experts.extend_from_slice(experts);
        rows.ends.push(rows.experts.len());
    }

    /// Shows the forecasts the tokens that went through every layer.
    pub fn teach(&self, forecaster: &mut Forecaster) {
        let mut path = vec![Vec::new(); self.layers.len()];
        let mut starts = vec![0; self.layers.len()];
        for (index, &token) in self.tokens.iter().enumerate() {
            for ((rows, path), start) in self.layers.iter().zip(&mut path).zip(&mut starts) {
                path.clear();
                if let Some(&end) = rows.ends.get(index) {
                    path.extend_from_slice(&rows.experts[*start..end]);
                    *start = end;
                }
            }
            forecaster.observe(token, &path);
        }
    }
}
