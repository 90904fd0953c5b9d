//! Who is resident: slots per layer, and who leaves for whom.
//!
//! Everything is event-atomic: the experts of a token and layer (or of a
//! chunk and layer) are requested together and none of them may evict
//! another before it was computed.

use crate::policy::{Event, Policy};
use crate::vocabulary::{ExpertId, LayerShape, Outlook, Shape};
use std::fmt;

/// How slots are divided between the layers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Each layer keeps its own slots.
    Layer,
    /// Layers of one class share their slots; no layer gives a slot away
    /// while it has no more than top-k experts.
    Pool,
}

/// What became of an expert that had arrived.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Admission {
    /// A slot was free.
    Added,
    /// This expert left; its frame is free.
    Replaced(ExpertId),
    /// It does not stay; its own frame is free.
    Bypassed,
}

/// Slots that no cache can work with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CapacityError {
    /// `slots` has another length than the model has layers.
    Layers { found: usize, layers: usize },
    /// A layer cannot hold the experts of one token.
    TooFew { layer: usize, slots: usize, top_k: usize },
}

impl CapacityError {
    /// Can a cache with `slots`, `[layers]`, serve a model of this shape?
    ///
    /// # Errors
    /// Another number of layers, fewer slots than experts per token.
    pub fn check(shape: &Shape, slots: &[usize]) -> Result<(), Self> {
        if slots.len() != shape.layers.len() {
            return Err(Self::Layers { found: slots.len(), layers: shape.layers.len() });
        }
        let too_few = shape.moe().find(|&(index, layer)| slots[index] < layer.top_k);
        match too_few {
            Some((layer, shape)) => {
                Err(Self::TooFew { layer, slots: slots[layer], top_k: shape.top_k })
            }
            None => Ok(()),
        }
    }
}

impl fmt::Display for CapacityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layers { found, layers } => {
                write!(f, "slots for {found} layers of a model with {layers}")
            }
            Self::TooFew { layer, slots, top_k } => write!(
                f,
                "layer {layer} has {slots} expert slots and needs at least {top_k}, \
                 the experts of one token"
            ),
        }
    }
}

impl std::error::Error for CapacityError {}

/// A set of experts of one layer.
///
/// Members are counted when asked for. A counter beside the bits lost its
/// increments in release builds: rustc 1.95 drops a comparison that is both
/// branched on and added as a number (`let joins = word & bit == 0;
/// self.len += usize::from(joins); joins`). `tests/replay.rs` in release mode
/// finds it.
#[derive(Clone, Debug, Default)]
struct Set {
    words: Vec<u64>,
}

impl Set {
    fn new(experts: usize) -> Self {
        Self { words: vec![0; experts.div_ceil(64)] }
    }

    fn len(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    fn contains(&self, expert: u32) -> bool {
        let word = self.words.get(expert as usize / 64);
        word.is_some_and(|word| word >> (expert % 64) & 1 == 1)
    }

    fn insert(&mut self, expert: u32) {
        self.words[expert as usize / 64] |= 1 << (expert % 64);
    }

    fn remove(&mut self, expert: u32) {
        if let Some(word) = self.words.get_mut(expert as usize / 64) {
            *word &= !(1 << (expert % 64));
        }
    }

    fn clear(&mut self) {
        self.words.fill(0);
    }

    fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| ones(index, word))
    }
}

/// The members of one word of a set, ascending.
fn ones(index: usize, mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| word.trailing_zeros())?;
        word &= word - 1;
        Some(index as u32 * 64 + bit)
    })
}

#[derive(Clone, Debug, Default)]
struct Layer {
    resident: Set,
    slots: usize,
    top_k: usize,
    class: usize,
    experts: usize,
}

/// The experts that may leave for an incoming one.
pub struct Candidates<'a> {
    layers: &'a [Layer],
    protected: Protected<'a>,
    /// All experts of the current event.
    event: &'a Set,
    pinned: &'a dyn Fn(ExpertId) -> bool,
    incoming: ExpertId,
    scope: Scope,
}

#[derive(Clone, Copy)]
struct Protected<'a> {
    layer: usize,
    set: &'a Set,
}

impl Candidates<'_> {
    /// Layers that may give a slot, ascending.
    pub fn layers(&self) -> impl Iterator<Item = usize> + '_ {
        let own = self.incoming.layer();
        let all = match self.scope {
            Scope::Layer => own..own + 1,
            Scope::Pool => 0..self.layers.len(),
        };
        all.filter(move |&layer| self.gives(layer))
    }

    fn gives(&self, layer: usize) -> bool {
        let own = self.incoming.layer();
        let Some(state) = self.layers.get(layer) else { return false };
        layer == own
            || self.scope == Scope::Pool
                && state.class == self.layers[own].class
                && state.resident.len() > state.top_k
    }

    /// The experts of `layer` that may leave, ascending. `layer` is one of
    /// [`Candidates::layers`].
    pub fn experts(&self, layer: usize) -> impl Iterator<Item = u32> + '_ {
        let words = &self.layers[layer].resident.words;
        words
            .iter()
            .enumerate()
            .flat_map(move |(index, &word)| {
                let kept = match self.protected.layer == layer {
                    true => self.protected.set.words[index],
                    false => 0,
                };
                ones(index, word & !kept)
            })
            .filter(move |&expert| !(self.pinned)(ExpertId::new(layer, expert)))
    }

    /// All residents of `layer`, also those that may not leave.
    pub fn residents(&self, layer: usize) -> impl Iterator<Item = u32> + '_ {
        self.layers[layer].resident.iter()
    }

    /// Is `id` part of the current event? It may leave when it was computed,
    /// but others of the event have no better right to its slot than it has.
    pub fn is_of_event(&self, id: ExpertId) -> bool {
        id.layer() == self.protected.layer && self.event.contains(id.expert)
    }

    /// May `id` leave?
    pub fn allows(&self, id: ExpertId) -> bool {
        let layer = id.layer();
        let protected = self.protected.layer == layer && self.protected.set.contains(id.expert);
        self.gives(layer)
            && !protected
            && self.layers[layer].resident.contains(id.expert)
            && !(self.pinned)(id)
    }
}

/// Who is resident.
pub struct Cache {
    layers: Vec<Layer>,
    /// Per class, for [`Scope::Pool`]: slots and residents.
    pools: Vec<(usize, usize)>,
    policy: Box<dyn Policy>,
    /// The current event's layer, its experts, and those of them that are
    /// not computed yet.
    event_layer: usize,
    event: Set,
    is_chunk: bool,
    waiting: Set,
    /// Who would have left for others, had they not been pinned; see
    /// [`Cache::let_go`].
    owed: Vec<ExpertId>,
}

impl Cache {
    /// `slots` is `[layers]`, 0 for dense layers. Fails where a layer has
    /// fewer slots than experts per token.
    pub fn new(
        shape: &Shape,
        slots: &[usize],
        mut policy: Box<dyn Policy>,
    ) -> Result<Self, CapacityError> {
        CapacityError::check(shape, slots)?;
        let mut layers = vec![Layer::default(); slots.len()];
        let mut pools = vec![(0, 0); shape.classes()];
        for (index, layer) in shape.moe() {
            let LayerShape { top_k, class, experts, .. } = *layer;
            let slots = slots[index];
            layers[index] = Layer { resident: Set::new(experts), slots, top_k, class, experts };
            pools[class].0 += slots;
        }
        policy.prepare(shape, slots);
        Ok(Self {
            layers,
            pools,
            policy,
            event_layer: usize::MAX,
            event: Set::default(),
            is_chunk: false,
            waiting: Set::default(),
            owed: Vec::new(),
        })
    }

    /// The policy's name.
    pub fn policy(&self) -> &'static str {
        self.policy.name()
    }

    /// What layers go by now; see [`Policy::rules`].
    pub fn rules(&self) -> Vec<(&'static str, usize)> {
        self.policy.rules()
    }

    /// Is `id` resident? False for an expert that the model does not have.
    pub fn contains(&self, id: ExpertId) -> bool {
        self.layers.get(id.layer()).is_some_and(|layer| layer.resident.contains(id.expert))
    }

    /// The resident experts of `layer`, ascending.
    pub fn resident(&self, layer: usize) -> impl Iterator<Item = u32> + '_ {
        self.layers[layer].resident.iter()
    }

    /// Resident experts of `layer`.
    pub fn len(&self, layer: usize) -> usize {
        self.layers[layer].resident.len()
    }

    /// Slots that `layer` brought in; in a pool it may hold more or fewer.
    pub fn slots(&self, layer: usize) -> usize {
        self.layers[layer].slots
    }

    /// Is a slot for an expert of `layer` free, so that nobody has to leave?
    pub fn has_free_slot(&self, layer: usize) -> bool {
        let state = &self.layers[layer];
        match self.policy.scope() {
            Scope::Layer => state.resident.len() < state.slots,
            Scope::Pool => self.pools[state.class].1 < self.pools[state.class].0,
        }
    }

    /// One event begins: its experts are protected until they are
    /// [`Cache::computed`] (which says what that is good for) or the next
    /// event begins.
    ///
    /// Panics on experts that the layer does not have.
    pub fn used(&mut self, event: &Event<'_>) {
        let layer = &self.layers[event.layer];
        self.event_layer = event.layer;
        self.is_chunk = event.tokens > 1;
        self.event.clear();
        self.event.words.resize(layer.resident.words.len(), 0);
        for &expert in event.experts {
            assert!((expert as usize) < layer.experts, "layer {}: {expert}", event.layer);
            self.event.insert(expert);
        }
        self.waiting.clone_from(&self.event);
        // What is used again is worth its slot.
        let (layer, of_event) = (event.layer, &self.event);
        self.owed.retain(|id| id.layer() != layer || !of_event.contains(id.expert));
        self.policy.used(event);
    }

    /// One of the last tokens of the chunk that [`Cache::used`] has just been
    /// told of chose `experts`; in the order of the tokens. What decodes behind
    /// the chunk goes on from them.
    pub fn used_last(&mut self, layer: usize, experts: &[u32]) {
        self.policy.used_last(layer, experts);
    }

    /// `id` was computed. A chunk's experts may be more than the slots, so
    /// from now on it may leave for another of its event. A token's experts
    /// all fit and none of them evicts another.
    pub fn computed(&mut self, id: ExpertId) {
        if self.is_chunk && id.layer() == self.event_layer {
            self.waiting.remove(id.expert);
        }
    }

    /// `id` has arrived and was computed: who leaves for it? Never an expert
    /// of the current event that is not computed, never one in `pinned`.
    pub fn admit(
        &mut self,
        id: ExpertId,
        pinned: &dyn Fn(ExpertId) -> bool,
        outlook: &dyn Outlook,
    ) -> Admission {
        debug_assert!(!self.contains(id), "{id} is resident and was admitted");
        if self.contains(id) {
            return Admission::Bypassed;
        }
        if self.has_free_slot(id.layer()) {
            self.insert(id);
            return Admission::Added;
        }
        let victim = match self.victim(id, &|_| false, outlook) {
            Some(victim) if pinned(victim) => {
                if !self.owed.contains(&victim) {
                    self.owed.push(victim);
                }
                self.victim(id, pinned, outlook)
            }
            other => other,
        };
        let Some(victim) = victim else { return Admission::Bypassed };
        self.remove(victim);
        self.insert(id);
        Admission::Replaced(victim)
    }

    fn victim(
        &mut self,
        id: ExpertId,
        pinned: &dyn Fn(ExpertId) -> bool,
        outlook: &dyn Outlook,
    ) -> Option<ExpertId> {
        let candidates = Candidates {
            layers: &self.layers,
            protected: Protected { layer: self.event_layer, set: &self.waiting },
            event: &self.event,
            pinned,
            incoming: id,
            scope: self.policy.scope(),
        };
        let victim = self.policy.victim(&candidates, id, outlook)?;
        assert!(candidates.allows(victim), "{victim} may not leave for {id}");
        Some(victim)
    }

    /// Nobody is pinned now: those leave that would have left for others since
    /// the last call, and were not used after it. `out` gets them.
    ///
    /// While a device runs ahead by itself nobody of the layers before it may
    /// leave, so that layers which share their slots could only give to later
    /// ones: the first would lose theirs for good (hits of `adaptive` on
    /// gpt-oss routing at a quarter of the slots: 58 % in place of 67 with
    /// slots of their own). The slot that is free now is for whoever comes
    /// first.
    pub fn let_go(&mut self, out: &mut Vec<ExpertId>) {
        out.clear();
        let mut owed = std::mem::take(&mut self.owed);
        for id in owed.drain(..) {
            let layer = &self.layers[id.layer()];
            if self.contains(id) && layer.resident.len() > layer.top_k {
                self.remove(id);
                out.push(id);
            }
        }
        self.owed = owed;
    }

    fn insert(&mut self, id: ExpertId) {
        let layer = &mut self.layers[id.layer()];
        layer.resident.insert(id.expert);
        self.pools[layer.class].1 += 1;
        self.policy.inserted(id);
    }

    /// `id` is no longer resident: its frame is lost.
    pub fn remove(&mut self, id: ExpertId) {
        if self.contains(id) {
            let layer = &mut self.layers[id.layer()];
            layer.resident.remove(id.expert);
            self.pools[layer.class].1 -= 1;
            self.policy.removed(id);
        }
    }

    /// A token (or a chunk) begins.
    pub fn next_token(&mut self) {
        self.policy.next_token();
    }

    /// The text that follows has nothing to do with what came before.
    pub fn new_sequence(&mut self) {
        self.policy.new_sequence();
    }
}
