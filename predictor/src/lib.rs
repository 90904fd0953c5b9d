//! Decisions only: the vocabulary of routing, residency, eviction policies,
//! forecasts and the planner.
//!
//! No GPU, no file, no clock, no thread.

pub mod observer;
pub mod vocabulary;

pub use observer::{NoObserver, Observer};
pub use vocabulary::{ExpertId, LayerShape, NoOutlook, Outlook, Shape};
