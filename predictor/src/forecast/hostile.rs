//! Forecasts that are wrong on purpose. Whatever they say, tokens must not
//! change and nothing may break; the identity tests run with each of them.

use super::learned::matrix::Matrix;
use super::learned::{Binding, Dimensions, Trained};
use super::{Forecast, Known, PreviousToken};
use crate::{LayerShape, Shape};

macro_rules! deaf {
    () => {
        fn routed(&mut self, _: usize, _: &[u32], _: &[f32]) {}
        fn begin_token(&mut self, _: u32) {}
        fn new_sequence(&mut self) {}
    };
}

/// Any experts.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// In 0..1.
    fn fill(&mut self, scores: &mut [f32]) {
        for score in scores {
            // xorshift64
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *score = (self.0 >> 40) as f32 / (1u64 << 24) as f32;
        }
    }
}

impl Forecast for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn scores(&mut self, _: usize, _: &Known<'_>, scores: &mut [f32]) -> bool {
        self.fill(scores);
        true
    }

    deaf!();
}

/// What the previous token used comes last.
pub struct Inverse(PreviousToken);

impl Inverse {
    pub fn new(shape: &Shape) -> Self {
        Self(PreviousToken::new(shape))
    }
}

impl Forecast for Inverse {
    fn name(&self) -> &'static str {
        "inverse"
    }

    fn scores(&mut self, target: usize, known: &Known<'_>, scores: &mut [f32]) -> bool {
        let answered = self.0.scores(target, known, scores);
        scores.iter_mut().for_each(|score| *score = -*score);
        answered
    }

    fn routed(&mut self, layer: usize, experts: &[u32], weights: &[f32]) {
        self.0.routed(layer, experts, weights);
    }

    fn begin_token(&mut self, _: u32) {}

    fn new_sequence(&mut self) {
        self.0.new_sequence();
    }
}

/// All experts alike.
pub struct Constant;

impl Forecast for Constant {
    fn name(&self) -> &'static str {
        "constant"
    }

    fn scores(&mut self, _: usize, _: &Known<'_>, scores: &mut [f32]) -> bool {
        scores.fill(1.0);
        true
    }

    deaf!();
}

/// Not numbers, infinities and numbers out of any range.
pub struct Garbage(usize);

impl Garbage {
    pub fn new() -> Self {
        Self(0)
    }
}

impl Default for Garbage {
    fn default() -> Self {
        Self::new()
    }
}

impl Forecast for Garbage {
    fn name(&self) -> &'static str {
        "out-of-range"
    }

    fn scores(&mut self, _: usize, _: &Known<'_>, scores: &mut [f32]) -> bool {
        const VALUES: [f32; 7] =
            [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-45, -0.0];
        for score in scores {
            self.0 += 1;
            *score = VALUES[self.0 % VALUES.len()];
        }
        true
    }

    deaf!();
}

/// Works for a while, then panics.
pub struct Panicking {
    calls: usize,
    at: usize,
}

impl Panicking {
    /// Panics at its `at`-th answer.
    pub fn new(at: usize) -> Self {
        Self { calls: 0, at }
    }
}

impl Forecast for Panicking {
    fn name(&self) -> &'static str {
        "panicking"
    }

    fn scores(&mut self, _: usize, _: &Known<'_>, scores: &mut [f32]) -> bool {
        self.calls += 1;
        assert!(self.calls < self.at, "a forecast that panics on purpose");
        scores.fill(0.0);
        true
    }

    deaf!();
}

/// Has never anything to say.
pub struct Silent;

impl Forecast for Silent {
    fn name(&self) -> &'static str {
        "silent"
    }

    fn scores(&mut self, _: usize, _: &Known<'_>, _: &mut [f32]) -> bool {
        false
    }

    deaf!();
}

/// A file of trained forecasts for `shape` whose weights mean nothing.
pub fn untrained(shape: &Shape, binding: Binding, sizes: [usize; Dimensions::NUMBERS]) -> Trained {
    let dimensions = Dimensions::new(shape, sizes);
    let mut random = Random::new(5);
    let mut matrix = |(rows, columns): (usize, usize)| {
        let mut weights = vec![0.0; rows * columns];
        random.fill(&mut weights);
        weights.iter_mut().for_each(|weight| *weight -= 0.5);
        Matrix::nearest(columns, &weights)
    };
    let plain = |layer: &LayerShape| LayerShape { expert_bytes: 0, class: 0, ..*layer };
    let layers = shape.layers.iter().map(|layer| layer.as_ref().map(plain));
    let [odds, priors, pairs] = dimensions.tables().map(&mut matrix);
    let networks = 0..dimensions.networks();
    let networks = networks.map(|_| dimensions.network().matrices().map(&mut matrix)).collect();
    let [embeddings, path_in, path_out] = dimensions.path().map(&mut matrix);
    Trained {
        binding,
        shape: Shape { layers: layers.collect() },
        dimensions,
        ids: (0..dimensions.ids as u32).map(|id| 3 * id).collect(),
        odds,
        priors,
        pairs,
        networks,
        embeddings,
        path_in,
        path_out,
        value: None,
    }
}
