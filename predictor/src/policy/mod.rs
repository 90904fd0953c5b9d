//! Who leaves when an expert has arrived and no slot is free.

mod belady;
mod lru;

pub use self::belady::Belady;
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

    fn scope(&self) -> Scope;

    /// Called once, before everything else. `slots` is `[layers]`.
    fn prepare(&mut self, shape: &Shape, slots: &[usize]);

    /// The experts of an event, whether resident or not.
    fn used(&mut self, event: &Event<'_>);

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

/// The policies that [`by_name`] knows.
pub const NAMES: [&str; 1] = ["lru"];

/// What serves when nobody asks for another.
pub const DEFAULT: &str = "lru";

/// The policy called `name`.
pub fn by_name(name: &str) -> Option<Box<dyn Policy>> {
    match name {
        "lru" => Some(Box::<Lru>::default()),
        _ => None,
    }
}
