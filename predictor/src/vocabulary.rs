//! The words that residency, forecasts and the planner share.

/// A routed expert of the model.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ExpertId {
    /// Counted over all layers of the model, dense ones included.
    pub layer: u32,
    /// The router's index, `0..experts` of the layer.
    pub expert: u32,
}

impl ExpertId {
    /// The expert `expert` of layer `layer`.
    pub fn new(layer: usize, expert: u32) -> Self {
        Self { layer: u32::try_from(layer).expect("a layer index fits 32 bits"), expert }
    }

    /// The layer as an index.
    pub fn layer(self) -> usize {
        self.layer as usize
    }

    /// The expert as an index.
    pub fn expert(self) -> usize {
        self.expert as usize
    }
}

impl std::fmt::Display for ExpertId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "expert {} of layer {}", self.expert, self.layer)
    }
}

/// What an MoE layer asks of the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerShape {
    /// Routed experts; shared experts are not counted.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Bytes that a miss moves.
    pub expert_bytes: u64,
    /// Layers of one class have frames of one size and may share them.
    pub class: usize,
}

/// The layers of a model; `None` is a dense layer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Shape {
    pub layers: Vec<Option<LayerShape>>,
}

impl Shape {
    /// `layers` equal MoE layers of one class.
    pub fn uniform(layers: usize, experts: usize, top_k: usize, expert_bytes: u64) -> Self {
        let layer = LayerShape { experts, top_k, expert_bytes, class: 0 };
        Self { layers: vec![Some(layer); layers] }
    }

    /// The MoE layers with their indices.
    pub fn moe(&self) -> impl Iterator<Item = (usize, &LayerShape)> {
        self.layers.iter().enumerate().filter_map(|(index, layer)| Some((index, layer.as_ref()?)))
    }

    /// The layer's shape; `None` for a dense layer or one that is not there.
    pub fn layer(&self, index: usize) -> Option<&LayerShape> {
        self.layers.get(index)?.as_ref()
    }

    /// Is `id` an expert of this model?
    pub fn contains(&self, id: ExpertId) -> bool {
        self.layer(id.layer()).is_some_and(|layer| id.expert() < layer.experts)
    }

    /// One more than the largest class; 0 without MoE layers.
    pub fn classes(&self) -> usize {
        self.moe().map(|(_, layer)| layer.class + 1).max().unwrap_or(0)
    }
}

/// What forecasts say about the next use of an expert.
pub trait Outlook {
    /// The probability that `id` is among the experts of its layer the next
    /// time that the layer runs; `None` where nothing is known.
    fn probability(&self, id: ExpertId) -> Option<f32>;
}

/// Knows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoOutlook;

impl Outlook for NoOutlook {
    fn probability(&self, _: ExpertId) -> Option<f32> {
        None
    }
}
