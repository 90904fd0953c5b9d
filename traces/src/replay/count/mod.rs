//! Hits of caches that need no machine: LRU and Belady, for brackets and
//! sweeps over sizes.

mod belady;
mod future;
mod lru;

pub use belady::{Belady, NEVER};
pub use future::{Seen, foresee};
pub use lru::Lru;

use super::passes::{Pass, Passes};
use crate::{Hits, Source, TraceError};
use pregate_predictor::{CapacityError, Scope, Shape};

/// Why there is no count.
#[derive(Debug, thiserror::Error)]
pub enum CountError {
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error(transparent)]
    Slots(#[from] CapacityError),
}

/// Which experts are counted, and in which caches.
#[derive(Clone, Copy, Debug)]
pub struct Count<'a> {
    /// `[layers]`, 0 for dense ones.
    pub slots: &'a [usize],
    /// Passes that only warm the caches.
    pub warm_up: u64,
}

impl Count<'_> {
    /// Hits of LRU, one cache per layer, kept across sequences.
    ///
    /// # Errors
    /// Slots that no cache can work with; those of the source.
    pub fn lru(&self, source: &mut dyn Source) -> Result<Hits, CountError> {
        let shape = self.check(source)?;
        let mut lru = Lru::new(&shape, self.slots);
        source.rewind()?;
        let (mut passes, mut pass, mut at) = (Passes::new(source), Pass::default(), 0);
        let mut total = Hits::default();
        while passes.next(&mut pass)? {
            let counts = u64::from(at >= self.warm_up);
            for layer in 0..shape.layers.len() {
                let experts = pass.experts(layer);
                total.requests += counts * experts.len() as u64;
                total.hits += counts * lru.event(layer, experts) as u64;
            }
            at += 1;
        }
        Ok(total)
    }

    /// Hits of [`Belady`].
    ///
    /// # Errors
    /// As [`Count::lru`].
    pub fn belady(
        &self,
        source: &mut dyn Source,
        scope: Scope,
        may_bypass: bool,
    ) -> Result<Hits, CountError> {
        let shape = self.check(source)?;
        let mut belady = Belady::new(&shape, self.slots, scope, may_bypass);
        let mut total = Hits::default();
        foresee(source, &mut |seen| {
            let counts = u64::from(seen.pass >= self.warm_up);
            let hits = belady.event(seen.layer, seen.experts, seen.next);
            total.requests += counts * seen.experts.len() as u64;
            total.hits += counts * hits as u64;
        })?;
        Ok(total)
    }

    fn check(&self, source: &dyn Source) -> Result<Shape, CapacityError> {
        let shape = source.header().shape.clone();
        CapacityError::check(&shape, self.slots)?;
        Ok(shape)
    }
}
