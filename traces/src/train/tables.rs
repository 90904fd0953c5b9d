//! Counts of what follows what, as log-odds.

use super::corpus::Corpus;
use super::tokens::TokenCounts;
use pregate_predictor::forecast::learned::{Dimensions, Trained, matrix::Matrix};

/// Events of prior belief in independence.
const PRIOR: f32 = 4.0;
const LIMIT: f32 = 6.0;

/// Fills priors, pairs and the odds of `trained.ids`.
pub fn train(corpus: &Corpus, sequences: &[usize], counts: &TokenCounts, trained: &mut Trained) {
    let Dimensions { layers, experts, .. } = trained.dimensions;
    let shares = counts.shares();
    let prior: Vec<f32> = shares.iter().map(|&share| odds(share)).collect();
    trained.priors = Matrix::nearest(experts, &prior);
    trained.pairs = pairs(corpus, sequences, shares, trained);
    let mut all = vec![0.0; trained.ids.len() * layers * experts];
    if experts > 0 && layers > 0 {
        for (&id, row) in trained.ids.iter().zip(all.chunks_exact_mut(layers * experts)) {
            for (layer, row) in row.chunks_exact_mut(experts).enumerate() {
                counts.fill(layer, id, None, row);
            }
        }
    }
    trained.odds = Matrix::nearest(layers * experts, &all);
}

fn odds(p: f32) -> f32 {
    let p = p.clamp(1e-3, 0.999);
    (p / (1.0 - p)).ln()
}

fn pairs(corpus: &Corpus, sequences: &[usize], shares: &[f32], trained: &Trained) -> Matrix {
    let Dimensions { layers, experts, pair_reach, .. } = trained.dimensions;
    let moe: Vec<usize> = corpus.shape().moe().map(|(layer, _)| layer).collect();
    if pair_reach == 0 {
        return Matrix::nearest(experts, &[]);
    }
    let rows = layers * (pair_reach + 1) * experts;
    let (mut counts, mut events) = (vec![0u32; rows * experts], vec![0u32; rows]);
    for &sequence in sequences {
        let range = corpus.range(sequence);
        for token in range.clone() {
            for place in 0..layers {
                for back in 0..=pair_reach.min(place) {
                    let before = if back == 0 { 1 } else { 0 };
                    if token < range.start + before {
                        continue;
                    }
                    for &from in corpus.experts(token - before, moe[place - back]) {
                        let row = trained.pair_row(place, back, u32::from(from));
                        events[row] += 1;
                        for &to in corpus.experts(token, moe[place]) {
                            counts[row * experts + usize::from(to)] += 1;
                        }
                    }
                }
            }
        }
    }
    let mut said = vec![0.0; counts.len()];
    for (at, said) in said.iter_mut().enumerate() {
        let (row, to) = (at / experts, at % experts);
        let p = shares[row / ((pair_reach + 1) * experts) * experts + to];
        let q = (counts[at] as f32 + PRIOR * p) / (events[row] as f32 + PRIOR);
        *said = (odds(q) - odds(p)).clamp(-LIMIT, LIMIT);
    }
    Matrix::nearest(experts, &said)
}
