//! What [`super::slot`] is built from: the standard library's atomics.
//!
//! The model checks compile the same `slot.rs` beside a `sync` module of
//! their own: `tests/loom_slots.rs` with loom's types, `tests/shuttle_slots.rs`
//! with shuttle's. There [`seeded`] answers `true` for one bug at a time,
//! which the check has to find.

pub use std::sync::Arc;
pub use std::sync::atomic::{AtomicU64, Ordering};

use super::slot::Bug;

/// No bug is seeded here; the compiler removes every branch that asks.
#[inline(always)]
pub const fn seeded(_: Bug) -> bool {
    false
}
