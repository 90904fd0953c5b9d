//! What was known of an expert, and when it was used again.

use crate::Row;
use crate::random::split_mix;
use pregate_predictor::Shape;
use pregate_predictor::policy::Event;
use pregate_predictor::policy::learned::{FEATURES, HORIZONS, Past};

/// Samples are drawn from so many tokens on, when averages mean something.
const FIRST_TOKEN: u64 = 200;

/// A sample that waits longer counts as never used: the farthest horizon
/// gives it less than 1e-5.
const FARTHEST: u64 = 400;

/// Training data of [`super::train`].
#[derive(Clone, Debug, Default)]
pub struct Samples {
    pub features: Vec<[f32; FEATURES]>,
    pub targets: Vec<[f32; HORIZONS.len()]>,
}

/// Goes over traces and takes samples.
pub struct Collector {
    shape: Shape,
    past: Past,
    /// Of the experts of a token and layer, this share is taken.
    rate: f64,
    random: Random,
    token: u64,
    /// `[layers][experts]`: samples that wait for the next use, with their
    /// token.
    waiting: Vec<Vec<Vec<(u64, usize)>>>,
    samples: Samples,
    experts: Vec<u32>,
    ones: Vec<u32>,
}

impl Collector {
    /// Takes a share `rate` of everything there is, by `seed`.
    pub fn new(shape: &Shape, rate: f64, seed: u64) -> Self {
        let mut past = Past::default();
        past.prepare(shape);
        let waiting = |layer: &Option<pregate_predictor::LayerShape>| {
            vec![Vec::new(); layer.as_ref().map_or(0, |layer| layer.experts)]
        };
        Self {
            past,
            rate,
            random: Random(seed),
            token: 0,
            waiting: shape.layers.iter().map(waiting).collect(),
            samples: Samples::default(),
            experts: Vec::new(),
            ones: Vec::new(),
            shape: shape.clone(),
        }
    }

    /// The next token.
    pub fn token(&mut self, row: &Row) {
        if row.starts_sequence {
            self.past.new_sequence();
        }
        self.past.next_token();
        for layer in 0..row.layers().min(self.shape.layers.len()) {
            if self.shape.layer(layer).is_some() && !row.experts(layer).is_empty() {
                self.layer(layer, row.experts(layer));
            }
        }
        self.token += 1;
    }

    fn layer(&mut self, layer: usize, experts: &[u16]) {
        self.experts.clear();
        self.experts.extend(experts.iter().map(|&expert| u32::from(expert)));
        self.ones.resize(experts.len(), 1);
        let event = Event { layer, experts: &self.experts, counts: &self.ones, tokens: 1 };
        self.past.used(&event);
        for &expert in &self.experts {
            for (token, sample) in self.waiting[layer][expert as usize].drain(..) {
                self.samples.targets[sample] = targets(self.token - token);
            }
        }
        if self.token < FIRST_TOKEN {
            return;
        }
        for expert in 0..self.waiting[layer].len() {
            if self.random.uniform() < self.rate {
                let sample = self.samples.features.len();
                self.samples.features.push(self.past.features(layer, expert as u32));
                self.samples.targets.push(targets(FARTHEST));
                self.waiting[layer][expert].push((self.token, sample));
            }
        }
    }

    /// All samples but those whose next use may lie behind the end.
    pub fn finish(self) -> Samples {
        let Samples { features, targets } = self.samples;
        let mut is_open = vec![false; features.len()];
        for &(token, sample) in self.waiting.iter().flatten().flatten() {
            is_open[sample] = self.token - token < FARTHEST;
        }
        let kept = features.into_iter().zip(targets).zip(is_open);
        let (features, targets) = kept.filter(|(_, open)| !open).map(|(sample, _)| sample).unzip();
        Samples { features, targets }
    }
}

/// What [`HORIZONS`] say of a next use after `distance` tokens, 1 or more.
pub(super) fn targets(distance: u64) -> [f32; HORIZONS.len()] {
    HORIZONS.map(|discount| match distance {
        1 => 1.0,
        FARTHEST.. => 0.0,
        _ => discount.powi(distance as i32 - 1),
    })
}

/// Numbers from a seed.
pub(super) struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        split_mix(&mut self.0)
    }

    /// From 0 to 1.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit.max(1) as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_the_discounted_next_uses() {
        // One layer, top-1 of 4: 0 in every other token, 1 in every fourth, 2
        // in the others, 3 never.
        let mut collector = Collector::new(&Shape::uniform(1, 4, 1, 1), 1.0, 1);
        let used = |token: u64| [0, 1, 0, 2][token as usize % 4];
        let tokens = FIRST_TOKEN + 100 + FARTHEST;
        for token in 0..tokens {
            let mut row = Row::default();
            row.push_layer(&[used(token)], &[]);
            collector.token(&row);
        }
        let samples = collector.finish();
        // Of the last tokens only what was used again.
        let open = samples.features.len() - 4 * 100;
        assert!(open < 3 * FARTHEST as usize && open > 2 * FARTHEST as usize, "{open}");
        for (index, found) in samples.targets[..400].iter().enumerate() {
            let (token, expert) = (FIRST_TOKEN + index as u64 / 4, index as u16 % 4);
            let next = (1..9).find(|ahead| used(token + ahead) == expert);
            let want = next.map_or([0.0; 3], |ahead| {
                [
                    f32::from(u8::from(ahead == 1)),
                    0.92f32.powi(ahead as i32 - 1),
                    0.97f32.powi(ahead as i32 - 1),
                ]
            });
            assert_eq!(*found, want, "token {token}, expert {expert}");
        }
    }

    #[test]
    fn a_share_of_them_is_taken_the_same_each_time() {
        let take = |seed| {
            let mut collector = Collector::new(&Shape::uniform(2, 32, 1, 1), 0.05, seed);
            for token in 0..1000u16 {
                let mut row = Row::default();
                (0..2).for_each(|layer| row.push_layer(&[(token * 7 + layer) % 32], &[]));
                collector.token(&row);
            }
            collector.finish()
        };
        let [one, two, three] = [1, 1, 2].map(take);
        assert!(one.features == two.features && one.features != three.features);
        let share = one.features.len() as f64 / (800.0 * 64.0);
        assert!((0.04..0.06).contains(&share), "{share}");
    }
}
