//! Readers of other programs' traces.

pub mod rtrace;
