//! The disk as a [`Mover`]: io_uring with O_DIRECT where the system has them,
//! threads that read by position elsewhere.
//!
//! ```text
//! owner ── submit / promote / discard ──> Board (demands | prefetches | later)
//!   ^                                       | take          ^ settle
//!   └── next <── Done of a fill ────────────┤               |
//!                                           v               |
//!                 Ring (one thread, io_uring)  or  Pool (threads, pread)
//! ```
//!
//! - [`job`]: one read and what follows from the system's answers.
//! - [`board`]: which job is next, and when a fill has ended.
//! - [`source`]: the files, and whether they are still the ones of old.
//! - [`shared`]: the mover on top of these; `uring` and [`threads`] are its
//!   engines, [`probe`] chooses one.

mod board;
mod job;
mod measure;
mod probe;
mod shared;
mod source;
mod threads;
#[cfg(target_os = "linux")]
mod uring;

pub use measure::Bandwidth;
pub use probe::{DiskChoice, DiskOptions, DiskReport, probe};

#[cfg(doc)]
use super::mover::Mover;

#[cfg(test)]
mod tests;
