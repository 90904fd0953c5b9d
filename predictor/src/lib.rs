//! Decisions only: the vocabulary of routing, residency, eviction policies,
//! forecasts, the planner and what drives it, the split of misses between CPU
//! and link, and what speed a split allows.
//!
//! No GPU, no file, no clock, no thread.

pub mod cache;
pub mod decider;
pub mod drive;
pub mod forecast;
pub mod ledger;
pub mod observer;
pub mod planner;
pub mod policy;
pub mod roofline;
pub mod split;
pub mod vocabulary;

pub use cache::{Admission, Cache, CapacityError, Scope};
pub use observer::{Fed, NoObserver, Observer, Origin, Served};
pub use planner::{Ahead, Arrival, Landing, Planner, Request, Retire, Room};
pub use policy::{Event, Policy};
pub use vocabulary::{ExpertId, LayerShape, NoOutlook, Outlook, Shape};
