//! Training of the forecast that sees token ids alone.

use super::adam::Adam;
use super::corpus::{Corpus, Rng};
use super::network::dot;
use super::tokens::{Own, TokenCounts};
use pregate_predictor::forecast::learned::network::add_scaled;
use pregate_predictor::forecast::learned::path::Said;
use pregate_predictor::forecast::learned::{Dimensions, PLACES, Trained, matrix::Matrix};

const EPOCHS: usize = 3;
const BATCH: usize = 32;
const RATE: f32 = 2e-3;
const DECAY: f32 = 0.01;

/// Fills embeddings and both matrices; `told` hears percents.
pub fn train(
    corpus: &Corpus,
    sequences: &[usize],
    counts: &TokenCounts,
    trained: &mut Trained,
    seed: u64,
    told: &mut dyn FnMut(usize),
) {
    let dimensions = trained.dimensions;
    if dimensions.path_hidden == 0 || trained.ids.is_empty() {
        return told(100);
    }
    let mut rng = Rng(seed);
    let mut model = Model::new(&dimensions, counts.shares(), &mut rng);
    let mut gradient = Model { parts: model.parts.each_ref().map(|part| vec![0.0; part.len()]) };
    let mut adams = model.parts.each_ref().map(|part| Adam::new(part.len()));
    let mut order = sequences.to_vec();
    let tokens: usize = order.iter().map(|&sequence| corpus.range(sequence).len()).sum();
    let mut step = Step::new(&dimensions);
    let (mut done, mut percent, mut held) = (0, 0, 0);
    for _ in 0..EPOCHS {
        rng.shuffle(&mut order);
        for &sequence in &order {
            let own = counts.own(corpus, sequence);
            step.said.clear();
            step.rows = [None; 2];
            for token in corpus.range(sequence) {
                step.token(corpus, token, trained, &model);
                step.learn(corpus, token, (counts, &own), &model, &mut gradient);
                held += 1;
                done += 1;
                if held == BATCH || done == EPOCHS * tokens {
                    let rate = RATE * (1.0 - done as f32 / (EPOCHS * tokens) as f32).max(0.02);
                    let parts = model.parts.iter_mut().zip(&mut gradient.parts);
                    for ((weights, gradient), adam) in parts.zip(&mut adams) {
                        adam.step(weights, gradient, held, rate, DECAY);
                    }
                    held = 0;
                    let now = 100 * done / (EPOCHS * tokens);
                    told(now - percent);
                    percent = now;
                }
            }
        }
    }
    told(100 - percent);
    let [embeddings, path_in, path_out] = &model.parts;
    trained.embeddings = Matrix::nearest(dimensions.path_width, embeddings);
    trained.path_in = Matrix::nearest(dimensions.path_hidden, path_in);
    trained.path_out = Matrix::nearest(dimensions.experts, path_out);
}

/// Embeddings, in, out; laid out as in a file.
struct Model {
    parts: [Vec<f32>; 3],
}

impl Model {
    fn new(dimensions: &Dimensions, shares: &[f32], rng: &mut Rng) -> Self {
        let sizes = dimensions.path().map(|(rows, columns)| rows * columns);
        let mut parts = sizes.map(|size| vec![0.0; size]);
        let mut fill = |part: &mut [f32], most: f32| {
            part.iter_mut().for_each(|weight| *weight = most * 2.0 * (rng.uniform() - 0.5));
        };
        fill(&mut parts[0], 0.5);
        fill(&mut parts[1], 1.0 / ((PLACES * dimensions.path_width) as f32).sqrt());
        fill(&mut parts[2], 0.5 / (dimensions.path_hidden as f32).sqrt());
        let (experts, hidden) = (dimensions.experts, dimensions.path_hidden);
        let layers = parts[2].chunks_exact_mut((hidden + 2) * experts);
        for (layer, shares) in layers.zip(shares.chunks_exact(experts)) {
            let (trust, bias) = layer[hidden * experts..].split_at_mut(experts);
            trust.fill(0.7);
            for (bias, share) in bias.iter_mut().zip(shares) {
                let share = share.clamp(1e-3, 0.999);
                *bias = (share / (1.0 - share)).ln();
            }
        }
        Self { parts }
    }
}

/// One token's pass forward and back.
struct Step {
    dimensions: Dimensions,
    said: Said,
    /// The embeddings of this token and the one before.
    rows: [Option<usize>; 2],
    units: Vec<f32>,
    unit_errors: Vec<f32>,
    odds: Vec<f32>,
    errors: Vec<f32>,
}

impl Step {
    fn new(dimensions: &Dimensions) -> Self {
        let (hidden, experts) = (dimensions.path_hidden, dimensions.experts);
        Self {
            dimensions: *dimensions,
            said: Said::new(dimensions.path_width),
            rows: [None; 2],
            units: vec![0.0; hidden],
            unit_errors: vec![0.0; hidden],
            odds: vec![0.0; experts],
            errors: vec![0.0; experts],
        }
    }

    fn token(&mut self, corpus: &Corpus, token: usize, trained: &Trained, model: &Model) {
        let width = self.dimensions.path_width;
        let row = corpus.ids[token].and_then(|id| trained.row(id));
        self.rows = [row, self.rows[0]];
        let embedding = row.map_or(&[][..], |row| &model.parts[0][row * width..(row + 1) * width]);
        self.said.begin(embedding.iter().copied());
        self.said.units(&model.parts[1], &mut self.units);
    }

    fn learn(
        &mut self,
        corpus: &Corpus,
        token: usize,
        (counts, own): (&TokenCounts, &Own),
        model: &Model,
        gradient: &mut Model,
    ) {
        let (hidden, experts) = (self.dimensions.path_hidden, self.dimensions.experts);
        let size = (hidden + 2) * experts;
        self.unit_errors.fill(0.0);
        let moe = corpus.shape().moe().map(|(layer, _)| layer);
        for (place, layer) in moe.enumerate() {
            let truth = corpus.experts(token, layer);
            if truth.is_empty() {
                continue;
            }
            match corpus.ids[token] {
                Some(id) => counts.fill(place, id, Some(own), &mut self.odds),
                None => self.odds.fill(0.0),
            }
            let weights = &model.parts[2][place * size..(place + 1) * size];
            let slopes = &mut gradient.parts[2][place * size..(place + 1) * size];
            self.layer(truth, weights, slopes);
        }
        for (error, unit) in self.unit_errors.iter_mut().zip(&self.units) {
            *error *= f32::from(*unit > 0.0);
        }
        let values = &self.said.values;
        let (rows, bias) = gradient.parts[1].split_at_mut(values.len() * hidden);
        add_scaled(bias, 1.0, &self.unit_errors);
        for (row, &value) in rows.chunks_exact_mut(hidden).zip(values) {
            add_scaled(row, value, &self.unit_errors);
        }
        // The means learn nothing: their tokens did when they were fed.
        let width = self.dimensions.path_width;
        for (at, row) in self.rows.iter().enumerate() {
            let Some(row) = row else { continue };
            let weights = model.parts[1][at * width * hidden..].chunks_exact(hidden);
            let slopes = &mut gradient.parts[0][row * width..(row + 1) * width];
            for (slope, weights) in slopes.iter_mut().zip(weights) {
                *slope += dot(weights, &self.unit_errors);
            }
        }
    }

    /// One layer's answer, its errors, and what they say about the weights.
    fn layer(&mut self, truth: &[u16], weights: &[f32], slopes: &mut [f32]) {
        let experts = self.dimensions.experts;
        let split = self.units.len() * experts;
        let (rows, direct) = weights.split_at(split);
        let (trust, bias) = direct.split_at(experts);
        let error = &mut self.errors;
        error.copy_from_slice(bias);
        for ((error, trust), odds) in error.iter_mut().zip(trust).zip(&self.odds) {
            *error += trust * odds;
        }
        for (&unit, row) in self.units.iter().zip(rows.chunks_exact(experts)) {
            if unit > 0.0 {
                add_scaled(error, unit, row);
            }
        }
        error.iter_mut().for_each(|odds| *odds = 1.0 / (1.0 + (-*odds).exp()));
        truth.iter().for_each(|&expert| error[usize::from(expert)] -= 1.0);
        let (slope_rows, slopes) = slopes.split_at_mut(split);
        let (trust_slopes, bias_slopes) = slopes.split_at_mut(experts);
        add_scaled(bias_slopes, 1.0, error);
        for ((slope, error), odds) in trust_slopes.iter_mut().zip(&*error).zip(&self.odds) {
            *slope += error * odds;
        }
        let both = slope_rows.chunks_exact_mut(experts).zip(rows.chunks_exact(experts));
        for ((&unit, sum), (slopes, row)) in self.units.iter().zip(&mut self.unit_errors).zip(both)
        {
            if unit > 0.0 {
                add_scaled(slopes, unit, error);
                *sum += dot(row, error);
            }
        }
    }
}
