//! A forecast that panics is disabled for the rest of the run and reported.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Forecast, Known, select};

/// What a forecast did that it must not do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    pub forecast: &'static str,
    /// It panicked and is disabled.
    pub panicked: bool,
    /// Answers that held something which is not finite or out of any range.
    pub unclean_answers: u64,
}

/// A forecast behind `catch_unwind`. Its state may be half changed after a
/// panic, which is why it is never called again.
pub struct Guarded {
    forecast: Box<dyn Forecast>,
    name: &'static str,
    is_steady: bool,
    panicked: bool,
    unclean_answers: u64,
}

impl Guarded {
    pub fn new(forecast: Box<dyn Forecast>) -> Self {
        let name = catch_unwind(AssertUnwindSafe(|| forecast.name()));
        let is_steady = catch_unwind(AssertUnwindSafe(|| forecast.is_steady()));
        Self {
            panicked: name.is_err() || is_steady.is_err(),
            name: name.unwrap_or("nameless"),
            is_steady: is_steady.unwrap_or(false),
            forecast,
            unclean_answers: 0,
        }
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    /// See [`Forecast::is_steady`].
    pub fn is_steady(&self) -> bool {
        self.is_steady
    }

    /// Calls the forecast, `None` if it is disabled or panics now.
    fn call<R>(&mut self, call: impl FnOnce(&mut dyn Forecast) -> R) -> Option<R> {
        if self.panicked {
            return None;
        }
        let answer = catch_unwind(AssertUnwindSafe(|| call(&mut *self.forecast)));
        self.panicked = answer.is_err();
        answer.ok()
    }

    /// Finite scores, or `false`.
    pub fn scores(&mut self, target: usize, known: &Known<'_>, scores: &mut [f32]) -> bool {
        let answered = self.call(|f| f.scores(target, known, scores)) == Some(true);
        if answered && select::sanitise(scores) {
            self.unclean_answers += 1;
        }
        answered
    }

    pub fn routed(&mut self, layer: usize, experts: &[u32], weights: &[f32]) {
        self.call(|f| f.routed(layer, experts, weights));
    }

    pub fn begin_token(&mut self, token: u32) {
        self.call(|f| f.begin_token(token));
    }

    pub fn new_sequence(&mut self) {
        self.call(|f| f.new_sequence());
    }

    pub fn memory_bytes(&self) -> usize {
        catch_unwind(AssertUnwindSafe(|| self.forecast.memory_bytes())).unwrap_or(0)
    }

    pub fn fault(&self) -> Option<Fault> {
        (self.panicked || self.unclean_answers > 0).then_some(Fault {
            forecast: self.name,
            panicked: self.panicked,
            unclean_answers: self.unclean_answers,
        })
    }
}
