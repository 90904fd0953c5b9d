//! Who leaves when an expert has arrived and no slot is free.

mod belady;
mod frequency;
mod history;
pub mod learned;
mod least_stale;
mod lru;

pub use self::belady::Belady;
pub use self::frequency::Frequency;
pub use self::learned::Learned;
pub use self::least_stale::LeastStale;
pub use self::lru::Lru;

use crate::cache::{Candidates, Scope};
use crate::vocabulary::{ExpertId, Outlook, Shape};

/// What a layer's router chose for one token or a chunk of them.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    pub layer: usize,
    /// Distinct. A token's are in rank order.
    pub experts: &'a [u32],
    /// `[experts]`: how many of the event's tokens chose each.
    pub counts: &'a [u32],
    /// Tokens that the router answered for, at least one.
    pub tokens: usize,
}

/// Decides who leaves. It may keep statistics about experts that are not
/// resident; the cache tells it about every event and every change.
pub trait Policy: Send {
    fn name(&self) -> &'static str;

    /// The same from [`Policy::prepare`] on.
    fn scope(&self) -> Scope;

    /// Called once, before everything else. `slots` is `[layers]`.
    fn prepare(&mut self, shape: &Shape, slots: &[usize]);

    /// The rules that layers go by now, with how many layers each; empty where
    /// there is but one. For reports.
    fn rules(&self) -> Vec<(&'static str, usize)> {
        Vec::new()
    }

    /// The experts of an event, whether resident or not.
    fn used(&mut self, event: &Event<'_>);

    /// One of the last tokens of the chunk that [`Policy::used`] has just been
    /// told of chose `experts`; in the order of the tokens.
    fn used_last(&mut self, _layer: usize, _experts: &[u32]) {}

    /// `id` became resident.
    fn inserted(&mut self, _id: ExpertId) {}

    /// `id` is no longer resident.
    fn removed(&mut self, _id: ExpertId) {}

    /// Who leaves for `incoming`? One of `candidates`, or nobody: then
    /// `incoming` itself does not stay.
    fn victim(
        &mut self,
        candidates: &Candidates<'_>,
        incoming: ExpertId,
        outlook: &dyn Outlook,
    ) -> Option<ExpertId>;

    /// A token (or a chunk) begins.
    fn next_token(&mut self) {}

    /// The text that follows has nothing to do with what came before.
    fn new_sequence(&mut self) {}
}

/// The names that [`by_name`] knows. `-pool`, and `adaptive`: layers of one
/// class share their slots; `-layer`, and `learned`: each keeps its own.
pub const NAMES: [&str; 14] = [
    "adaptive",
    "adaptive-layer",
    "forecast-aware",
    "forecast-aware-layer",
    "forecast-aware-pool",
    "frequency",
    "frequency-layer",
    "frequency-pool",
    "lfu",
    "lfu-pool",
    "learned",
    "least-stale",
    "least-stale-pool",
    "lru",
];

/// The policy that measures best (`traces/examples/eviction.rs`).
pub const DEFAULT: &str = "adaptive";

/// The policy called `name`. Belady's is not among them: it must be told the
/// future.
pub fn by_name(name: &str) -> Option<Box<dyn Policy>> {
    if let Some(learned) = learned_by_name(name) {
        return Some(Box::new(learned));
    }
    Some(match name {
        "forecast-aware" => Box::new(Frequency::with_forecasts(None)),
        "forecast-aware-layer" => Box::new(Frequency::with_forecasts(Some(Scope::Layer))),
        "forecast-aware-pool" => Box::new(Frequency::with_forecasts(Some(Scope::Pool))),
        "frequency" => Box::new(Frequency::new(None)),
        "frequency-layer" => Box::new(Frequency::new(Some(Scope::Layer))),
        "frequency-pool" => Box::new(Frequency::new(Some(Scope::Pool))),
        "lfu" => Box::new(Frequency::with_decay(Scope::Layer, Frequency::DECAY)),
        "lfu-pool" => Box::new(Frequency::with_decay(Scope::Pool, Frequency::DECAY)),
        "least-stale" => Box::new(LeastStale::new(Scope::Layer)),
        "least-stale-pool" => Box::new(LeastStale::new(Scope::Pool)),
        "lru" => Box::<Lru>::default(),
        _ => return None,
    })
}

fn learned_by_name(name: &str) -> Option<Learned> {
    let network = learned::Network::universal;
    Some(match name {
        "adaptive" => Learned::adaptive(Scope::Pool, network()),
        "adaptive-layer" => Learned::adaptive(Scope::Layer, network()),
        "learned" => Learned::new(network()),
        _ => return None,
    })
}

/// Does [`by_name_with`] use tables under this name?
pub fn takes_tables(name: &str) -> bool {
    learned_by_name(name).is_some()
}

/// The same with tables that were trained on traces of the model, which those
/// that learned use: `adaptive` where a layer's shadow caches hit more with
/// them, `learned` always. Tables of another shape are left out.
pub fn by_name_with(name: &str, fitted: Option<&learned::Fitted>) -> Option<Box<dyn Policy>> {
    match (learned_by_name(name), fitted) {
        (Some(learned), Some(fitted)) => Some(Box::new(learned.with(fitted.clone()))),
        _ => by_name(name),
    }
}

/// The scope that measures best with `slots`, `[layers]`: sharing them wins
/// where a layer can spare some, and loses a little where every layer is
/// short of them.
pub fn best_scope(shape: &Shape, slots: &[usize]) -> Scope {
    let experts: usize = shape.moe().map(|(_, layer)| layer.experts).sum();
    let slots: usize = slots.iter().sum();
    if slots.saturating_mul(8) >= experts * 3 { Scope::Pool } else { Scope::Layer }
}
