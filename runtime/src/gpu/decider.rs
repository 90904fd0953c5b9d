//! [`pregate_predictor::decider`] behind a lock, over the store's events.

use crate::model::Misses;
use crate::store::{Event, Missing};
pub use pregate_predictor::decider::HostWork;
use pregate_predictor::decider::{Bring, Decider as Inner, Ended};
use pregate_predictor::split::{LayerSplit, Seed};
use pregate_predictor::{ExpertId, Shape};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Decides for every layer of a model, and learns what it led to.
pub struct Decider(Mutex<Inner>);

fn ended(event: &Event<'_>, work: HostWork) -> Ended {
    let (layer, began_ns) = (event.layer(), event.began_ns());
    let (copied, delay_ns) = (event.copied(), event.delay_ns());
    Ended { layer, began_ns, work, copied, delay_ns, waited_for: event.waited_for() }
}

impl Decider {
    /// `link_ns_per_byte`: as measured; `None`: unknown.
    pub fn new(
        misses: Misses,
        shape: &Shape,
        slots: &[usize],
        link_ns_per_byte: Option<f64>,
    ) -> Self {
        let usual = Seed::default();
        let link_ns_per_byte = link_ns_per_byte.unwrap_or(usual.link_ns_per_byte);
        let seed = Seed { link_ns_per_byte, ..usual };
        let bring = match misses {
            Misses::Auto => Bring::Auto,
            Misses::Host => Bring::Host,
            Misses::Copied => Bring::Link,
        };
        Self(Mutex::new(Inner::new(bring, shape, slots, &seed)))
    }

    /// Prices from probes: everything begins anew.
    pub fn seed(&self, seed: &Seed) {
        self.lock().seed(seed);
    }

    /// A token enters the first layer.
    pub fn next_token(&self) {
        self.lock().next_token();
    }

    /// See [`Inner::rouses`].
    pub fn rouses(&self, layer: usize, chance: Option<f64>) -> bool {
        self.lock().rouses(layer, chance)
    }

    /// A token goes on to its next layer: what became of the event of the one
    /// that it has passed (see [`Decider::ended`]), when the next one was heard,
    /// as the store's clock counts, and which it is if experts may be missing,
    /// with those that its router chose.
    pub fn next_layer(
        &self,
        passed: Option<(&mut Event<'_>, HostWork)>,
        heard_ns: Option<u64>,
        routed: Option<(usize, &[u32])>,
    ) {
        let inner = &mut *self.lock();
        let event = passed.as_ref().map(|(event, work)| ended(event, *work));
        inner.passed(event.as_ref(), heard_ns);
        if let Some((event, _)) = passed {
            inner.admitted(event.settled());
        }
        if let Some((layer, experts)) = routed {
            inner.routed(layer, experts);
        }
    }

    /// See [`Inner::of_token`].
    pub fn of_token(&self, missing: Missing<'_>, bounded: bool) -> Vec<ExpertId> {
        self.lock().of_token(&missing, bounded)
    }

    /// An event whose misses were just shared: what the host computes and is
    /// worth it comes over an idle link for later tokens.
    pub fn keep(&self, event: &mut Event<'_>) {
        let inner = &mut *self.lock();
        let keeps = inner.keeps(event.layer(), event.left(), event.room_to_keep());
        event.keep(keeps);
    }

    /// See [`Inner::of_chunk`].
    pub fn of_chunk(&self, missing: Missing<'_>, tokens: impl Fn(u32) -> u32) -> Vec<ExpertId> {
        self.lock().of_chunk(&missing, tokens)
    }

    /// The experts of an event have arrived and were computed: what that took,
    /// and who stays.
    pub fn ended(&self, event: &mut Event<'_>, work: HostWork, tokens: usize) {
        let inner = &mut *self.lock();
        inner.ended(&ended(event, work), tokens);
        inner.admitted(event.settled());
    }

    /// What it chose in each layer, and why; `None`: the user chose.
    pub fn report(&self) -> Option<Vec<LayerSplit>> {
        self.lock().report()
    }

    /// Likely work of the host, and how often its threads were roused for it.
    pub fn roused(&self) -> (u64, u64) {
        self.lock().roused()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
