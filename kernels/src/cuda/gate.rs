//! One at a time is at a device.
//!
//! Whatever computes on a device launches on one stream. While one captures
//! its launches, another's would go into that graph; while the device waits for
//! one's host, another must neither take nor free memory, nor load kernels: the
//! driver would wait for the device meanwhile, and keep who has to answer it
//! from its calls.

use super::driver::{CallersContext, Driver};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Between two looks at whether to go on waiting.
const LOOK: Duration = Duration::from_millis(20);

/// The way to a device ([`super::Device::enter`]). Who came first enters first,
/// so that who leaves and comes back lets others in between.
#[derive(Default)]
pub(super) struct Gate {
    line: Mutex<Line>,
    left: Condvar,
}

#[derive(Default)]
struct Line {
    is_taken: bool,
    /// Who waits, by number.
    waiting: VecDeque<u64>,
    /// Numbers so far.
    numbers: u64,
}

/// Who holds it is alone at the device. It goes on the thread that made it,
/// whose current context is then what it was before.
pub struct Entered {
    // In the order of dropping.
    _context: CallersContext,
    _inside: Inside,
}

impl Entered {
    pub(super) fn new(driver: &Arc<Driver>, inside: Inside) -> Self {
        Self { _context: CallersContext::of(driver), _inside: inside }
    }
}

/// Who has passed the gate; the next one may when it goes.
pub(super) struct Inside(Arc<Gate>);

impl Gate {
    /// Waits until nobody is at the device; `None`: `is_over` ended the wait.
    pub fn enter_unless(self: &Arc<Self>, is_over: &dyn Fn() -> bool) -> Option<Inside> {
        let mut line = self.line();
        let number = line.numbers;
        line.numbers += 1;
        line.waiting.push_back(number);
        while line.is_taken || line.waiting.front() != Some(&number) {
            if is_over() {
                line.waiting.retain(|&waiting| waiting != number);
                drop(line);
                self.left.notify_all();
                return None;
            }
            let waited = self.left.wait_timeout(line, LOOK);
            line = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        line.waiting.pop_front();
        line.is_taken = true;
        Some(Inside(self.clone()))
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.line().is_taken = false;
        self.0.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    fn enter(gate: &Arc<Gate>) -> Inside {
        gate.enter_unless(&|| false).unwrap()
    }

    #[test]
    fn who_waits_comes_in_when_the_other_has_left_or_is_told_to_stop() {
        let gate = Arc::new(Gate::default());
        let inside = enter(&gate);
        assert!(gate.enter_unless(&|| true).is_none());
        let entered = AtomicBool::new(false);
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                let _inside = enter(&gate);
                entered.store(true, Ordering::Relaxed);
            });
            thread::sleep(3 * LOOK);
            assert!(!entered.load(Ordering::Relaxed));
            drop(inside);
            other.join().unwrap();
        });
        assert!(entered.load(Ordering::Relaxed));
        // A way in that is free is not looked at for long.
        drop(gate.enter_unless(&|| true).unwrap());
    }

    #[test]
    fn who_comes_back_at_once_is_behind_who_waited() {
        let gate = Arc::new(Gate::default());
        let inside = enter(&gate);
        let entered = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let _inside = enter(&gate);
                entered.store(true, Ordering::Relaxed);
            });
            while gate.line().waiting.is_empty() {
                thread::yield_now();
            }
            drop(inside);
            let _again = enter(&gate);
            assert!(entered.load(Ordering::Relaxed));
        });
    }
}
