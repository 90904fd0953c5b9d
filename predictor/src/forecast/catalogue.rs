//! Forecasts by name.

use super::hostile::{Constant, Garbage, Inverse, Panicking, Random, Silent};
use super::learned::{LearnedNetwork, LearnedPath, LearnedTables, Trained};
use super::{Forecast, Frequency, NaiveBayes, PreviousToken, TokenMemory, Transition};
use crate::Shape;
use std::sync::Arc;

/// The names that [`by_name`] knows: useful ones first, then those that are
/// wrong on purpose.
pub const NAMES: [&str; 11] = [
    "previous-token",
    "frequency",
    "transition",
    "naive-bayes",
    "token",
    "random",
    "inverse",
    "constant",
    "out-of-range",
    "panicking",
    "silent",
];

/// How many of [`NAMES`] are useful.
pub const USEFUL: usize = 5;

/// The names that [`learned`] knows.
pub const LEARNED: [&str; 4] =
    ["learned-tables", "learned-network", "learned-path", "learned-network-fixed"];

/// The one of [`LEARNED`] that a blend starts with believing.
pub const STRONG: &str = LEARNED[1];

/// How many of [`LEARNED`] a blend takes.
pub const LEARNED_USEFUL: usize = 3;

/// The trained forecast called `name`; `None`: there is none of this name, or
/// the file has none of this kind.
pub fn learned(name: &str, trained: &Arc<Trained>) -> Option<Box<dyn Forecast>> {
    let trained = Arc::clone(trained);
    Some(match name {
        "learned-tables" => Box::new(LearnedTables::new(trained)),
        "learned-network" => Box::new(LearnedNetwork::new(trained, true)?),
        "learned-network-fixed" => Box::new(LearnedNetwork::new(trained, false)?),
        "learned-path" => Box::new(LearnedPath::new(trained)?),
        _ => return None,
    })
}

/// The forecast called `name`, for guesses up to `horizon` layers ahead.
pub fn by_name(name: &str, shape: &Shape, horizon: usize) -> Option<Box<dyn Forecast>> {
    Some(match name {
        "previous-token" => Box::new(PreviousToken::new(shape)),
        "frequency" => Box::new(Frequency::new(shape)),
        "transition" => Box::new(Transition::new(shape, horizon)),
        "naive-bayes" => Box::new(NaiveBayes::new(shape, horizon)),
        "token" => Box::new(TokenMemory::new(shape)),
        "random" => Box::new(Random::new(1)),
        "inverse" => Box::new(Inverse::new(shape)),
        "constant" => Box::new(Constant),
        "out-of-range" => Box::new(Garbage::new()),
        "panicking" => Box::new(Panicking::new(20)),
        "silent" => Box::new(Silent),
        _ => return None,
    })
}
