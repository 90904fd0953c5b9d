//! How others see what the runtime decides.

/// Sees what the runtime decides while it runs. The runtime calls it; the
/// trace recorder and the statistics implement it.
pub trait Observer: Send {
    /// A pass through the layers begins. What is told until the next one
    /// belongs to it; a pass that fails or is cancelled ends early.
    fn fed(&mut self, _: &Fed<'_>) {}

    /// The router of MoE layer `layer` (counted over all layers of the model)
    /// chose `experts` with `weights`, in router order, for the token at
    /// `position`.
    fn routed(&mut self, layer: usize, position: usize, experts: &[u32], weights: &[f32]);

    /// The experts of a layer were brought and computed, for a token or a
    /// chunk. Only called where experts are streamed.
    fn served(&mut self, _: &Served<'_>) {}
}

/// Tokens that go through the layers together: one, or a chunk of a prompt.
#[derive(Clone, Copy, Debug)]
pub struct Fed<'a> {
    /// Tells sessions apart, whose texts have nothing to do with each other.
    pub session: u64,
    /// Of the first token; 0 where nothing came before it.
    pub first_position: usize,
    pub tokens: &'a [u32],
    /// Of a prompt, whose last chunk may be a single token; else the one that
    /// was sampled last.
    pub is_prompt: bool,
}

/// Where an expert was when its router answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// In a slot.
    Hit,
    /// Read ahead, and there.
    Early,
    /// A read-ahead was bringing it.
    InFlight,
    /// On disk.
    Miss,
}

/// What one layer's experts cost.
#[derive(Clone, Copy, Debug)]
pub struct Served<'a> {
    pub layer: usize,
    pub first_position: usize,
    pub tokens: usize,
    /// Distinct, with their origins.
    pub experts: &'a [(u32, Origin)],
    /// That left a slot for one of them.
    pub evictions: usize,
    /// That arrived from disk meanwhile, for this layer or ahead.
    pub bytes: u64,
    /// Time in which nothing could be computed.
    pub stall_ns: u64,
}

/// Sees nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoObserver;

impl Observer for NoObserver {
    fn routed(&mut self, _: usize, _: usize, _: &[u32], _: &[f32]) {}
}

impl<T: Observer + ?Sized> Observer for &mut T {
    fn fed(&mut self, fed: &Fed<'_>) {
        (**self).fed(fed);
    }

    fn routed(&mut self, layer: usize, position: usize, experts: &[u32], weights: &[f32]) {
        (**self).routed(layer, position, experts, weights);
    }

    fn served(&mut self, served: &Served<'_>) {
        (**self).served(served);
    }
}

/// `None` is nobody.
impl<T: Observer> Observer for Option<T> {
    fn fed(&mut self, fed: &Fed<'_>) {
        self.iter_mut().for_each(|observer| observer.fed(fed));
    }

    fn routed(&mut self, layer: usize, position: usize, experts: &[u32], weights: &[f32]) {
        self.iter_mut().for_each(|observer| observer.routed(layer, position, experts, weights));
    }

    fn served(&mut self, served: &Served<'_>) {
        self.iter_mut().for_each(|observer| observer.served(served));
    }
}

/// Both are told.
impl<A: Observer, B: Observer> Observer for (A, B) {
    fn fed(&mut self, fed: &Fed<'_>) {
        self.0.fed(fed);
        self.1.fed(fed);
    }

    fn routed(&mut self, layer: usize, position: usize, experts: &[u32], weights: &[f32]) {
        self.0.routed(layer, position, experts, weights);
        self.1.routed(layer, position, experts, weights);
    }

    fn served(&mut self, served: &Served<'_>) {
        self.0.served(served);
        self.1.served(served);
    }
}
