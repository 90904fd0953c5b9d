//! The slot protocol under shuttle: random and PCT schedules, from fixed
//! seeds. It knows no weak memory orders, but it finds what loom's reduction
//! leaves out (see `loom_slots.rs`).

#[allow(dead_code)]
#[path = "../src/store/slot.rs"]
mod slot;
mod slot_models;

/// shuttle's types for `slot.rs` and the models.
mod sync {
    pub use crate::slot_models::seeded;
    pub use shuttle::sync::Arc;
    pub use shuttle::sync::atomic::{AtomicU64, Ordering};

    /// Half of a slot's memory; the scheduler may switch at every access.
    pub struct Half(AtomicU64);

    impl Half {
        pub fn new(value: u64) -> Self {
            Self(AtomicU64::new(value))
        }

        pub fn read(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }

        pub fn write(&self, value: u64) {
            self.0.store(value, Ordering::Relaxed);
        }
    }

    pub struct Thread(shuttle::thread::JoinHandle<()>);

    pub fn spawn(run: impl FnOnce() + Send + 'static) -> Thread {
        Thread(shuttle::thread::spawn(run))
    }

    impl Thread {
        pub fn join(self) {
            self.0.join().unwrap();
        }
    }
}

use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, Runner};
use slot::Bug;
use slot_models::{MODELS, finds_bugs, holds};

const SCHEDULES: usize = 20_000;
const SEED: u64 = 3;

fn explore(scheduler: impl Scheduler + 'static, model: fn()) {
    let mut config = Config::new();
    // It warns that it knows no weak memory orders.
    config.silence_warnings = true;
    Runner::new(scheduler, config).run(model);
}

fn random(model: fn()) {
    explore(RandomScheduler::new_from_seed(SEED, SCHEDULES), model);
}

/// Priorities with three changes: finds every bug of that depth with a
/// probability that has a lower bound (Burckhardt et al., ASPLOS 2010).
fn pct(model: fn()) {
    explore(PctScheduler::new_from_seed(SEED, 3, SCHEDULES), model);
}

/// shuttle runs every access as sequentially consistent.
fn is_visible(bug: Bug) -> bool {
    use Bug::*;
    !matches!(bug, ClaimRelaxed | CountRelaxed | PublishRelaxed | PinRelaxed | UnpinRelaxed)
}

#[test]
fn random_schedules_are_right() {
    for model in &MODELS {
        holds(model, random);
    }
}

#[test]
fn pct_schedules_are_right() {
    for model in &MODELS {
        holds(model, pct);
    }
}

#[test]
fn random_schedules_find_every_seeded_bug() {
    for model in &MODELS {
        finds_bugs(model, is_visible, random);
    }
}

#[test]
fn pct_schedules_find_every_seeded_bug() {
    for model in &MODELS {
        finds_bugs(model, is_visible, pct);
    }
}
