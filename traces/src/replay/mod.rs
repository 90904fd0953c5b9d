//! Replays a trace on a machine that is not there: the runtime's own planner,
//! policies, forecasts and ledger, over tiers and a clock that are simulated.
//!
//! The same trace, machine and options give the same report, byte for byte.

pub mod count;
mod engine;
mod host;
mod machine;
mod memory;
pub mod models;
mod options;
mod passes;
pub mod presets;
mod report;
mod run;
mod tier;
mod totals;

pub use engine::Engine;
pub use machine::{Cpu, Disk, Figure, Gpu, LEAST_RATE, Link, Machine, MachineError};
pub use memory::MemoryTrace;
pub use options::{FORECAST_NS, Misses, Options, ReplayError, Slots, Warm};
pub use passes::{Pass, Passes};
pub use report::{
    Bound, Bracket, Cause, Counts, LayerReport, PhaseReport, Report, Spread, Stall, Times, Wire,
};
pub use run::{replay, replay_with};
