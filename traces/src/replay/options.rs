//! What a replay is asked for.

use crate::TraceError;
use pregate_predictor::{Ahead, CapacityError, Shape};
use serde::{Deserialize, Serialize};

/// How many experts of each layer are kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Slots {
    /// This share of each layer's experts, `max(k, floor(share * experts))`.
    Share(f64),
    /// So many in every MoE layer, but at least the experts of a token.
    Each(usize),
    /// Per layer of the model, 0 for dense layers.
    Layers(Vec<usize>),
}

impl Slots {
    /// `[layers]`, 0 for dense ones.
    pub fn per_layer(&self, shape: &Shape) -> Vec<usize> {
        let of = |index: usize| {
            let Some(layer) = shape.layer(index) else { return 0 };
            let wanted = match self {
                // A share such as 0.29 of 100 is 28.999... in binary.
                Slots::Share(share) => (share * layer.experts as f64 + 1e-9).floor() as usize,
                Slots::Each(slots) => *slots,
                Slots::Layers(slots) => return slots.get(index).copied().unwrap_or(0),
            };
            wanted.clamp(layer.top_k, layer.experts.max(layer.top_k))
        };
        (0..shape.layers.len()).map(of).collect()
    }
}

/// What the caches and forecasts know when counting begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Warm {
    /// Nothing.
    #[default]
    Cold,
    /// The trace's first tokens, which are not counted.
    Tokens(u64),
    /// The whole trace, which is then replayed once more.
    Whole,
}

/// Who brings what a GPU misses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Misses {
    /// The split of the runtime decides, layer by layer.
    #[default]
    Auto,
    Cpu,
    Link,
}

/// Settings of a replay.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// What reports call the trace.
    pub trace: String,
    pub slots: Slots,
    /// Frames that are no slots; `None`: twice top-k and at least four, the
    /// runtime's choice.
    pub ring: Option<usize>,
    /// See [`pregate_predictor::policy::by_name`].
    pub policy: String,
    /// `none`, or see [`pregate_predictor::forecast::Forecaster::by_name`].
    pub forecast: String,
    /// MoE layers ahead that are forecast.
    pub horizon: usize,
    pub ahead: Ahead,
    pub warm: Warm,
    pub misses: Misses,
    /// Of an expert; `None`: as the trace says.
    pub expert_bytes: Option<u64>,
    /// Everything else that is read for a token: mixers, routers, shared
    /// experts, head, KV cache.
    pub dense_bytes: u64,
    /// What forecasting after a layer takes on the token's thread, in ns: of
    /// weight only where there is no GPU, whose host waits for it anyway.
    pub forecast_ns: u64,
    /// Experts kept in RAM behind a GPU, as a share of all; `None`: all.
    pub ram_share: Option<f64>,
    /// Also count LRU's and Belady's hits, for the bracket.
    pub bracket: bool,
}

/// What forecasting takes if nothing else is said.
pub const FORECAST_NS: u64 = 20_000;

impl Default for Options {
    fn default() -> Self {
        Self {
            trace: String::new(),
            slots: Slots::Share(0.25),
            ring: None,
            policy: pregate_predictor::policy::DEFAULT.to_string(),
            forecast: "blend".to_string(),
            horizon: pregate_predictor::forecast::HORIZON,
            ahead: Ahead::default(),
            warm: Warm::Cold,
            misses: Misses::Auto,
            expert_bytes: None,
            dense_bytes: 0,
            forecast_ns: FORECAST_NS,
            ram_share: None,
            bracket: true,
        }
    }
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error(transparent)]
    Machine(#[from] super::MachineError),
    #[error(transparent)]
    Slots(#[from] CapacityError),
    #[error("the trace does not say how many bytes an expert has: name the model, or the bytes")]
    NoExpertBytes,
    #[error("no {kind} is called {name}; known: {known}")]
    Name { kind: &'static str, name: String, known: String },
    #[error("{0}")]
    Count(#[from] super::count::CountError),
    #[error("{0}")]
    TooWide(String),
    #[error("a trace without tokens behind those that warm the caches")]
    Empty,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_rounded_down_and_never_below_a_token() {
        let shape = Shape::uniform(2, 100, 6, 1);
        assert_eq!(Slots::Share(0.29).per_layer(&shape), [29, 29]);
        assert_eq!(Slots::Share(0.0).per_layer(&shape), [6, 6]);
        assert_eq!(Slots::Share(7.0).per_layer(&shape), [100, 100]);
        assert_eq!(Slots::Each(3).per_layer(&shape), [6, 6]);
        let mixed = Shape { layers: vec![None, shape.layers[0]] };
        assert_eq!(Slots::Share(0.5).per_layer(&mixed), [0, 50]);
        assert_eq!(Slots::Layers(vec![0, 9]).per_layer(&mixed), [0, 9]);
    }
}
