//! One session at a time is at a device.
//!
//! All sessions of a model launch on one stream. While one captures its
//! launches, another's would go into that graph; while the device waits for one
//! session's host, another must neither take nor free memory, nor load kernels:
//! the driver would wait for the device meanwhile, and keep who has to answer
//! it from its calls. So a session passes the gate for each token or piece of a
//! prompt, to be made, and to be dropped. Nobody passes it twice at once: an
//! observer must not make or drop a session.

use crate::error::{Error, Result};
use crate::session::Cancel;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Between two looks at whether to go on waiting.
const LOOK: Duration = Duration::from_millis(20);

#[derive(Default)]
pub struct Gate {
    is_taken: Mutex<bool>,
    left: Condvar,
}

/// Who holds it is alone at the device.
pub struct Entered(Arc<Gate>);

impl Gate {
    /// Waits until nobody is at the device.
    pub fn enter(self: &Arc<Self>) -> Entered {
        self.enter_unless(&|| false).unwrap_or_else(|| unreachable!("nothing ends the wait"))
    }

    /// [`Gate::enter`], or [`Error::Cancelled`].
    pub fn enter_or(self: &Arc<Self>, cancel: &Cancel) -> Result<Entered> {
        self.enter_unless(&|| cancel.is_cancelled()).ok_or(Error::Cancelled)
    }

    fn enter_unless(self: &Arc<Self>, is_over: &dyn Fn() -> bool) -> Option<Entered> {
        let mut is_taken = self.is_taken.lock().unwrap_or_else(PoisonError::into_inner);
        while *is_taken {
            if is_over() {
                return None;
            }
            let waited = self.left.wait_timeout(is_taken, LOOK);
            is_taken = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *is_taken = true;
        Some(Entered(self.clone()))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        *self.0.is_taken.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.0.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_comes_in_when_the_other_has_left_or_is_told_to_stop() {
        let gate = Arc::new(Gate::default());
        let cancel = Cancel::new();
        let inside = gate.enter();
        cancel.cancel();
        assert!(matches!(gate.enter_or(&cancel), Err(Error::Cancelled)));
        let (waiting, entered) = (gate.clone(), Arc::new(Mutex::new(false)));
        let told = entered.clone();
        let other = std::thread::spawn(move || {
            let _inside = waiting.enter();
            *told.lock().unwrap() = true;
        });
        std::thread::sleep(3 * LOOK);
        assert!(!*entered.lock().unwrap());
        drop(inside);
        other.join().unwrap();
        assert!(*entered.lock().unwrap());
        // A way in that is free is not looked at for long.
        drop(gate.enter_or(&cancel).unwrap());
    }
}
