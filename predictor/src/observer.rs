//! How others see what the runtime decides.

/// Sees what the runtime decides while it runs. The runtime calls it; the
/// trace recorder and the statistics implement it.
pub trait Observer: Send {
    /// The router of MoE layer `layer` (counted over all layers of the model)
    /// chose `experts` with `weights`, in router order, for the token at
    /// `position`.
    fn routed(&mut self, layer: usize, position: usize, experts: &[u32], weights: &[f32]);
}

/// Sees nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoObserver;

impl Observer for NoObserver {
    fn routed(&mut self, _: usize, _: usize, _: &[u32], _: &[f32]) {}
}
