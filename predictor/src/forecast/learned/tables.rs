//! Tables that were counted over traces: what each expert of an earlier layer,
//! of the previous token here, and the token's id say. Naive Bayes.

use super::Trained;
use crate::forecast::{Forecast, Known};
use std::sync::Arc;

/// How much the nearest, second nearest ... known layer counts: neighbouring
/// layers say partly the same.
const TRUST: [f32; 4] = [0.8, 0.4, 0.3, 0.25];
const TOKEN_TRUST: f32 = 0.6;
const PREVIOUS_TRUST: f32 = 0.25;

/// Naive Bayes over trained tables.
pub struct LearnedTables {
    trained: Arc<Trained>,
    places: Places,
    /// Where the running token's odds are.
    row: Option<usize>,
    /// `[layers of the model]`: of the newest token.
    last: Vec<Vec<u32>>,
}

impl LearnedTables {
    pub fn new(trained: Arc<Trained>) -> Self {
        let places = Places::new(&trained);
        let last = vec![Vec::new(); trained.shape.layers.len()];
        Self { trained, places, row: None, last }
    }
}

/// Places of layers among the MoE layers, and back.
pub struct Places {
    /// MoE layers in order.
    pub moe: Vec<usize>,
    /// `[layers]`; `None` is dense.
    pub of: Vec<Option<usize>>,
}

impl Places {
    pub fn new(trained: &Trained) -> Self {
        let moe: Vec<usize> = trained.shape.moe().map(|(layer, _)| layer).collect();
        let mut of = vec![None; trained.shape.layers.len()];
        moe.iter().enumerate().for_each(|(place, &layer)| of[layer] = Some(place));
        Self { moe, of }
    }

    /// The MoE layers from `target` back to the nearest that is known; to
    /// before the first, if none is.
    pub fn ahead(&self, place: usize, known: &Known<'_>) -> usize {
        let is_known = |back: &usize| {
            let layer = self.moe[place - back];
            known.routed.get(layer).is_some_and(|experts| !experts.is_empty())
        };
        (1..=place).find(is_known).unwrap_or(place + 1)
    }
}

impl Trained {
    /// Where what is known of a token id is.
    pub fn row(&self, id: u32) -> Option<usize> {
        self.ids.binary_search(&id).ok()
    }

    /// Adds what a token id says about a layer.
    pub fn add_odds(&self, row: usize, place: usize, trust: f32, to: &mut [f32]) {
        let start = row * self.odds.columns + place * self.dimensions.experts;
        let scale = trust * self.odds.scales[row];
        for (to, &odds) in to.iter_mut().zip(&self.odds.values[start..]) {
            *to += scale * f32::from(odds);
        }
    }

    /// The row of [`Trained::pairs`] with what `expert` says about the layer at
    /// `place`: so many layers `back`, 0: the same layer of the token before.
    pub fn pair_row(&self, place: usize, back: usize, expert: u32) -> usize {
        let blocks = self.dimensions.pair_reach + 1;
        (place * blocks + back) * self.dimensions.experts + expert as usize
    }
}

impl Forecast for LearnedTables {
    fn name(&self) -> &'static str {
        "learned-tables"
    }

    fn scores(&mut self, target: usize, known: &Known<'_>, scores: &mut [f32]) -> bool {
        let Some(Some(place)) = self.places.of.get(target).copied() else { return false };
        let trained = &*self.trained;
        scores.fill(0.0);
        trained.priors.add_row(place, 1.0, scores);
        let has_pairs = trained.dimensions.pair_reach > 0;
        for &expert in self.last[target].iter().filter(|_| has_pairs) {
            let row = trained.pair_row(place, 0, expert);
            trained.pairs.add_row(row, PREVIOUS_TRUST, scores);
        }
        let ahead = self.places.ahead(place, known);
        let reach = trained.dimensions.pair_reach.min(place);
        for (back, trust) in (ahead..=reach).zip(TRUST) {
            for &expert in &known.routed[self.places.moe[place - back]] {
                let row = trained.pair_row(place, back, expert);
                trained.pairs.add_row(row, trust, scores);
            }
        }
        if let (Some(row), Some(_)) = (self.row, known.token) {
            trained.add_odds(row, place, TOKEN_TRUST, scores);
        }
        true
    }

    fn routed(&mut self, layer: usize, experts: &[u32], _: &[f32]) {
        if let Some(last) = self.last.get_mut(layer) {
            last.clear();
            last.extend_from_slice(experts);
        }
    }

    fn begin_token(&mut self, token: u32) {
        self.row = self.trained.row(token);
    }

    fn new_sequence(&mut self) {
        self.row = None;
        self.last.iter_mut().for_each(Vec::clear);
    }

    fn memory_bytes(&self) -> usize {
        self.trained.odds.values.len() + self.trained.pairs.values.len()
    }
}
