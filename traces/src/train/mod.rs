//! Forecasts trained from traces: tables, a network per layer, and a network
//! over token ids alone. Seeded and in one order: the same traces give the
//! same bytes, on any number of threads.

mod adam;
mod build;
mod corpus;
pub mod evaluate;
mod network;
mod path;
mod samples;
mod tables;
#[cfg(test)]
mod tests;
mod tokens;
pub mod value;

pub use build::{Options, train, work};
pub use corpus::Corpus;
pub use samples::DISTANCES;
