//! The routing path from token ids alone (ExpertFlow, 2410.17954): all layers
//! are known before the first has run. Their encoder is a transformer; here,
//! where 50 us have to do, embeddings of this token, the one before and two
//! decayed means of those earlier go through one hidden layer.

use super::Trained;
use super::network::add_rows;
use super::sizes::PLACES;
use super::tables::Places;
use crate::forecast::{Forecast, Known};
use std::sync::Arc;

/// What a mean keeps from one token to the next.
pub const KEEPS: [f32; PLACES - 2] = [0.75, 0.97];

/// What was fed so far, as embeddings `[PLACES][width]`.
pub struct Said {
    width: usize,
    pub values: Vec<f32>,
    /// Scratch: rows of weights and what they count.
    rows: Vec<(u32, f32)>,
}

impl Said {
    pub fn new(width: usize) -> Self {
        Self { width, values: vec![0.0; PLACES * width], rows: Vec::new() }
    }

    /// A token with this embedding begins (all zero: not known).
    pub fn begin(&mut self, embedding: impl Iterator<Item = f32>) {
        let (newest, earlier) = self.values.split_at_mut(self.width);
        let (before, means) = earlier.split_at_mut(self.width);
        for (mean, keep) in means.chunks_exact_mut(self.width).zip(KEEPS) {
            for (mean, newest) in mean.iter_mut().zip(&*newest) {
                *mean = keep * *mean + (1.0 - keep) * newest;
            }
        }
        before.copy_from_slice(newest);
        newest.fill(0.0);
        newest.iter_mut().zip(embedding).for_each(|(to, value)| *to = value);
    }

    /// `units [hidden]` of it: `weights [values + 1][hidden]`, the last row being
    /// the bias; rectified.
    pub fn units(&mut self, weights: &[f32], units: &mut [f32]) {
        units.copy_from_slice(&weights[self.values.len() * units.len()..]);
        self.rows.clear();
        self.rows.extend((0..).zip(self.values.iter().copied()));
        add_rows(units, weights, &self.rows);
        units.iter_mut().for_each(|unit| *unit = unit.max(0.0));
    }

    pub fn clear(&mut self) {
        self.values.fill(0.0);
    }
}

/// Token ids in, all layers out.
pub struct LearnedPath {
    trained: Arc<Trained>,
    places: Places,
    path_in: Vec<f32>,
    path_out: Vec<f32>,
    said: Said,
    units: Vec<f32>,
    /// Those that are on.
    on: Vec<(u32, f32)>,
    row: Option<usize>,
}

impl LearnedPath {
    /// `None`: the file has none, since its traces had no token ids.
    pub fn new(trained: Arc<Trained>) -> Option<Self> {
        let dimensions = trained.dimensions;
        (dimensions.path_hidden > 0 && dimensions.ids > 0).then(|| Self {
            places: Places::new(&trained),
            path_in: trained.path_in.floats(),
            path_out: trained.path_out.floats(),
            said: Said::new(dimensions.path_width),
            units: vec![0.0; dimensions.path_hidden],
            on: Vec::new(),
            row: None,
            trained,
        })
    }
}

impl Forecast for LearnedPath {
    fn name(&self) -> &'static str {
        "learned-path"
    }

    fn scores(&mut self, target: usize, known: &Known<'_>, scores: &mut [f32]) -> bool {
        let Some(Some(place)) = self.places.of.get(target).copied() else { return false };
        if known.token.is_none() {
            return false;
        }
        let experts = self.trained.dimensions.experts;
        let size = (self.units.len() + 2) * experts;
        let rows = &self.path_out[place * size..(place + 1) * size];
        let (units, rest) = rows.split_at(self.units.len() * experts);
        let (trust, bias) = rest.split_at(experts);
        scores.fill(0.0);
        if let Some(row) = self.row {
            self.trained.add_odds(row, place, 1.0, scores);
        }
        for ((score, trust), bias) in scores.iter_mut().zip(trust).zip(bias) {
            *score = *score * trust + bias;
        }
        add_rows(scores, units, &self.on);
        true
    }

    fn routed(&mut self, _: usize, _: &[u32], _: &[f32]) {}

    fn begin_token(&mut self, token: u32) {
        self.row = self.trained.row(token);
        match self.row {
            Some(row) => self.said.begin(self.trained.embeddings.row(row)),
            None => self.said.begin(std::iter::empty()),
        }
        self.said.units(&self.path_in, &mut self.units);
        self.on.clear();
        self.on.extend((0..).zip(self.units.iter().copied()).filter(|(_, unit)| *unit > 0.0));
    }

    fn new_sequence(&mut self) {
        self.row = None;
        self.said.clear();
    }

    fn is_steady(&self) -> bool {
        true
    }

    fn memory_bytes(&self) -> usize {
        4 * (self.path_in.len() + self.path_out.len()) + self.trained.embeddings.values.len()
    }
}
