//! Traces that nobody recorded, for models of other shapes: made up so that
//! their statistics are those of a real one.
//!
//! A router's logit of an expert is a sum of independent parts, whose weights
//! are fitted ([`fit`]) until the routing has the real trace's figures
//! ([`Figures`]): how popular the expert is in its layer; how near it is to
//! the topic of the sequence; two memories that fade (half after 1 and after
//! 23 tokens); how much the experts of the layer before call for it (a fixed
//! table with few large entries); and noise. The top-k are chosen.
//!
//! Reproduced, as far as the fit's report says: normalised entropy, reuse at
//! lags 1, 8 and 64, hits of LRU and of Belady's rule at 25 and 50 %, and
//! recall of transitions. Not reproduced: token ids and what depends on them,
//! weights, prompts as passes, differences between layers, coupling over more
//! than one layer, loops in the text.

mod fit;
mod generator;

pub use fit::{Figures, Fit, fit, lengths};
pub use generator::Generator;

/// How much each part weighs beside noise of one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    pub popularity: f64,
    pub topic: f64,
    pub slow: f64,
    pub fast: f64,
    pub coupling: f64,
}

impl Default for Weights {
    /// Near those of the dev traces.
    fn default() -> Self {
        Self { popularity: 0.8, topic: 0.4, slow: 0.5, fast: 0.6, coupling: 3.5 }
    }
}

impl Weights {
    const COUNT: usize = 5;

    fn part(&mut self, index: usize) -> &mut f64 {
        match index {
            0 => &mut self.popularity,
            1 => &mut self.topic,
            2 => &mut self.slow,
            3 => &mut self.fast,
            _ => &mut self.coupling,
        }
    }
}
