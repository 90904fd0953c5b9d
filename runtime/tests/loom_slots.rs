//! The slot protocol under loom: every interleaving with at most
//! [`PREEMPTIONS`] preemptions, and the weak memory orders of C11 with them.
//!
//! loom can miss interleavings of operations on one atomic (tokio-rs/loom
//! issues 166 and 392), so `shuttle_slots.rs` runs the same models at random.

#![allow(clippy::arc_with_non_send_sync)] // loom's cells are neither; see `spawn`

#[allow(dead_code)]
#[path = "../src/store/slot.rs"]
mod slot;
mod slot_models;

/// loom's types for `slot.rs` and the models.
mod sync {
    pub use crate::slot_models::seeded;
    use loom::sync::atomic;
    pub use loom::sync::atomic::Ordering;
    /// Who frees the memory is not in question; the models join all threads.
    pub use std::sync::Arc;
    use std::thread::panicking;

    /// loom's atomic, which guards leave alone while a found bug unwinds: loom
    /// cannot switch threads then.
    pub struct AtomicU64(atomic::AtomicU64);

    impl AtomicU64 {
        pub fn new(value: u64) -> Self {
            Self(atomic::AtomicU64::new(value))
        }

        pub fn load(&self, order: Ordering) -> u64 {
            self.0.load(order)
        }

        pub fn store(&self, value: u64, order: Ordering) {
            if !panicking() {
                self.0.store(value, order);
            }
        }

        pub fn compare_exchange(
            &self,
            from: u64,
            to: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            self.0.compare_exchange(from, to, success, failure)
        }

        pub fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
            if panicking() { 0 } else { self.0.fetch_add(value, order) }
        }

        pub fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
            if panicking() { 0 } else { self.0.fetch_sub(value, order) }
        }
    }

    /// Half of a slot's memory. loom reports accesses that are not ordered.
    pub struct Half(loom::cell::Cell<u64>);

    impl Half {
        pub fn new(value: u64) -> Self {
            Self(loom::cell::Cell::new(value))
        }

        pub fn read(&self) -> u64 {
            self.0.get()
        }

        pub fn write(&self, value: u64) {
            self.0.set(value);
        }
    }

    pub struct Thread(loom::thread::JoinHandle<()>);

    // loom runs all of its threads on one, so nothing is sent.
    pub fn spawn(run: impl FnOnce() + 'static) -> Thread {
        Thread(loom::thread::spawn(run))
    }

    impl Thread {
        pub fn join(self) {
            self.0.join().unwrap();
        }
    }
}

use slot_models::{MODELS, finds_bugs, holds};

const PREEMPTIONS: usize = 3;

fn explore(model: fn()) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(model);
}

#[test]
fn every_interleaving_is_right() {
    for model in &MODELS {
        holds(model, explore);
    }
}

#[test]
fn every_seeded_bug_is_found() {
    for model in &MODELS {
        finds_bugs(model, |_| true, explore);
    }
}
