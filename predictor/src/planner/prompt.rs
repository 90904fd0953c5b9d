//! A chunk of a prompt on its way through the layers.

use crate::forecast::Forecaster;
use crate::vocabulary::{ExpertId, Shape};

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

    /// Experts of the next MoE layer in the order of the file, where so many
    /// tokens rather ask for an expert than not, if all are alike.
    pub fn wanted(&self, shape: &Shape, after: Option<usize>, out: &mut Vec<(f32, ExpertId)>) {
        let next = shape.moe().find(|&(layer, _)| after.is_none_or(|after| layer > after));
        let Some((index, layer)) = next else { return };
        let share = layer.top_k as f32 / layer.experts as f32;
        let used = 1.0 - (1.0 - share).powi(i32::try_from(self.tokens.len()).unwrap_or(i32::MAX));
        if used >= 0.5 {
            out.extend((0..layer.experts as u32).map(|e| (used, ExpertId::new(index, e))));
        }
    }
}
