//! Forecasts by name.

use super::hostile::{Constant, Garbage, Inverse, Panicking, Random, Silent};
use super::{Forecast, Frequency, NaiveBayes, PreviousToken, TokenMemory, Transition};
use crate::Shape;

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
