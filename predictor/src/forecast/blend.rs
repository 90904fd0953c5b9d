//! The blend: logistic regression over what the sources say, learned online.
//! Its answers are probabilities.

use super::fast;

/// Which sources answered, one bit each, and how far ahead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Situation {
    pub ahead: u8,
    pub sources: u32,
}

/// Sources at most, so that their set fits [`Situation::sources`].
pub const MAX_SOURCES: usize = 32;
/// Two slopes per source: above and below its own threshold.
const PER_SOURCE: usize = 2;
/// A feature's largest magnitude.
const CLAMP: f32 = 4.0;
const WEIGHT_LIMIT: f32 = 16.0;
/// What all slopes start with together, and how much of it strong sources get.
const START: f32 = 1.5;
const STRONG_SHARE: f32 = 0.8;
/// What the bias starts with.
const BIAS: f32 = -0.3;
/// Step of AdaGrad, and how slowly its memory of past gradients fades.
const STEP: f32 = 0.2;
const FADE: f32 = 0.998;
/// How much the newest scores count in a [`Spread`].
const SPREAD_SHARE: f32 = 0.02;

/// What the sources said about one layer's experts at one moment, `[features,
/// experts]`. Features of sources that did not answer are zero.
#[derive(Clone, Debug)]
pub struct Features {
    experts: usize,
    values: Vec<f32>,
    pub situation: Situation,
    /// `[experts]`, the answer.
    pub probabilities: Vec<f32>,
}

impl Features {
    pub fn new(sources: usize, experts: usize) -> Self {
        Self {
            experts,
            values: vec![0.0; sources * PER_SOURCE * experts],
            situation: Situation { ahead: 0, sources: 0 },
            probabilities: vec![0.0; experts],
        }
    }

    pub fn clear(&mut self, ahead: u8) {
        self.situation = Situation { ahead, sources: 0 };
    }

    /// Source `source` gave the finite `scores[experts]`; `threshold` lies
    /// between those that it would choose and the others, `scale` is the usual
    /// spread of its scores.
    pub fn set(&mut self, source: usize, scores: &[f32], threshold: f32, scale: f32) {
        self.situation.sources |= 1 << source;
        let inverse = 1.0 / scale.max(1e-6);
        let start = source * PER_SOURCE * self.experts;
        let (above, below) =
            self.values[start..start + PER_SOURCE * self.experts].split_at_mut(self.experts);
        for ((above, below), &score) in above.iter_mut().zip(below).zip(scores) {
            let x = ((score - threshold) * inverse).clamp(-CLAMP, CLAMP);
            *above = x.max(0.0);
            *below = x.min(0.0);
        }
    }

    fn answered(&self) -> impl Iterator<Item = (usize, &[f32])> {
        let sources = self.situation.sources;
        self.values
            .chunks_exact(self.experts.max(1))
            .enumerate()
            .filter(move |(feature, _)| sources >> (feature / PER_SOURCE) & 1 == 1)
    }
}

/// The usual spread of the scores that a source gives in one layer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spread(f32);

impl Spread {
    /// The spread, after seeing these.
    pub fn after(&mut self, scores: &[f32]) -> f32 {
        let share = 1.0 / scores.len().max(1) as f32;
        let mean = fast::sum(scores) * share;
        let variance = fast::squares(scores, mean) * share;
        let spread = variance.sqrt();
        let keep = if self.0 == 0.0 { 0.0 } else { 1.0 - SPREAD_SHARE };
        self.0 = keep * self.0 + (1.0 - keep) * spread;
        self.0
    }
}

/// Weights for one situation.
#[derive(Clone, Debug)]
struct Weights {
    situation: Situation,
    bias: f32,
    bias_energy: f32,
    weights: Vec<f32>,
    energy: Vec<f32>,
}

impl Weights {
    /// A router on a state that is a little old names two to three experts in
    /// four (`papers.md` 5.1), so does a trained network; history one in two:
    /// the sources of the set `strong` start with most of the weight where
    /// they answer.
    fn new(sources: usize, strong: u32, situation: Situation) -> Self {
        let is_strong = |source: usize| strong >> source & 1 == 1;
        let answers = |source: &usize| situation.sources >> source & 1 == 1;
        let of_strong = (0..sources).filter(answers).filter(|&s| is_strong(s)).count();
        let of_history = (0..sources).filter(answers).count() - of_strong;
        let (strong_share, history_share) = match (of_strong, of_history) {
            (0, _) => (0.0, 1.0),
            (_, 0) => (1.0, 0.0),
            _ => (STRONG_SHARE, 1.0 - STRONG_SHARE),
        };
        let start = |source: usize| match is_strong(source) {
            true => START * strong_share / of_strong.max(1) as f32,
            false => START * history_share / of_history.max(1) as f32,
        };
        Self {
            situation,
            bias: BIAS,
            bias_energy: 0.1,
            weights: (0..sources * PER_SOURCE).map(|feature| start(feature / PER_SOURCE)).collect(),
            energy: vec![0.1; sources * PER_SOURCE],
        }
    }

    fn predict(&self, features: &mut Features) {
        let mut out = std::mem::take(&mut features.probabilities);
        out.fill(self.bias);
        for (feature, values) in features.answered() {
            let weight = self.weights[feature];
            for (out, value) in out.iter_mut().zip(values) {
                *out += weight * value;
            }
        }
        out.iter_mut().for_each(|z| *z = fast::sigmoid(*z));
        features.probabilities = out;
    }

    /// One step downhill; `errors[experts]` is prediction less truth.
    fn learn(&mut self, features: &Features, errors: &[f32], top_k: usize) {
        let norm = 1.0 / top_k.max(1) as f32;
        let step = |weight: &mut f32, energy: &mut f32, gradient: f32| {
            if gradient.is_finite() {
                *energy = *energy * FADE + gradient * gradient;
                *weight -= STEP * gradient / energy.sqrt();
                *weight = weight.clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT);
            }
        };
        let all = fast::sum(errors);
        step(&mut self.bias, &mut self.bias_energy, all * norm);
        for (feature, values) in features.answered() {
            let gradient = fast::dot(values, errors);
            step(&mut self.weights[feature], &mut self.energy[feature], gradient * norm);
        }
    }
}

/// What a blend that does not learn answers where one source speaks, see
/// [`Features::set`]: the same bits, in one go.
pub fn alone(scores: &[f32], threshold: f32, scale: f32, probabilities: &mut [f32]) {
    let inverse = 1.0 / scale.max(1e-6);
    for (probability, &score) in probabilities.iter_mut().zip(scores) {
        let x = ((score - threshold) * inverse).clamp(-CLAMP, CLAMP);
        *probability = fast::sigmoid(BIAS + START * x);
    }
}

/// The weights of one group of layers.
#[derive(Clone, Debug)]
pub struct Blend {
    sources: usize,
    /// Of these, routers on another state and trained networks, one bit each.
    strong: u32,
    /// One per situation that occurred; a runtime has few.
    known: Vec<Weights>,
    learns: bool,
    errors: Vec<f32>,
}

/// Situations that get their own weights; later ones share the first's.
const MAX_SITUATIONS: usize = 4 * (super::MAX_HORIZON + 1);

impl Blend {
    pub fn new(sources: usize, strong: u32, learns: bool) -> Self {
        Self { sources, strong, known: Vec::new(), learns, errors: Vec::new() }
    }

    fn weights(&mut self, situation: Situation) -> usize {
        if let Some(index) = self.known.iter().position(|known| known.situation == situation) {
            return index;
        }
        if self.known.len() == MAX_SITUATIONS {
            return 0;
        }
        self.known.push(Weights::new(self.sources, self.strong, situation));
        self.known.len() - 1
    }

    /// Fills `features.probabilities`.
    pub fn predict(&mut self, features: &mut Features) {
        let index = self.weights(features.situation);
        self.known[index].predict(features);
    }

    /// The layer asked for `experts`.
    pub fn learn(&mut self, features: &Features, experts: &[u32]) {
        if !self.learns {
            return;
        }
        self.errors.clear();
        self.errors.extend_from_slice(&features.probabilities);
        for &expert in experts {
            self.errors[expert as usize] -= 1.0;
        }
        let index = self.weights(features.situation);
        self.known[index].learn(features, &self.errors, experts.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn situations_without_number_take_no_more_memory() {
        let mut blend = Blend::new(12, 0, true);
        let mut features = Features::new(12, 4);
        for set in 1..4096u32 {
            features.clear(1);
            (0..12).filter(|source| set >> source & 1 == 1).for_each(|source| {
                features.set(source, &[0.5, 0.1, 0.9, 0.2], 0.3, 1.0);
            });
            blend.predict(&mut features);
            assert!(features.probabilities.iter().all(|p| (0.0..=1.0).contains(p)));
            blend.learn(&features, &[2]);
        }
        assert_eq!(blend.known.len(), MAX_SITUATIONS);
    }

    #[test]
    fn who_speaks_alone_needs_no_blend() {
        let scores: Vec<f32> = (0..40).map(|at| (at * 7 % 40) as f32 * 0.31 - 5.0).collect();
        for (threshold, scale) in [(0.2, 1.0), (-3.0, 0.01), (1.0, 0.0)] {
            let mut features = Features::new(5, scores.len());
            features.clear(2);
            features.set(0, &scores, threshold, scale);
            Blend::new(5, 0b11110, false).predict(&mut features);
            let mut found = vec![0.0; scores.len()];
            alone(&scores, threshold, scale, &mut found);
            assert_eq!(found, features.probabilities);
        }
    }
}
