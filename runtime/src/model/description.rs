//! What a model is made of. One value of [`ModelDescription`] per file; the
//! forward pass reads it and knows no architecture by name.

use pregate_kernels::GatedActivation;

/// A whole model, layer by layer.
#[derive(Clone, Debug)]
pub struct ModelDescription {
    /// The architecture's name as GGUF files spell it, e.g. `qwen3moe`.
    pub architecture: Architecture,
    /// The file's own name for the model, if it has one.
    pub name: Option<String>,
    pub vocab: usize,
    pub hidden: usize,
    /// Positions that the model was made for.
    pub context_limit: usize,
    pub norm: NormKind,
    /// Multiplies the embedding rows.
    pub embedding_scale: f32,
    /// Multiplies what a block adds to the residual stream.
    pub residual_scale: f32,
    /// Multiplies the logits.
    pub logit_scale: f32,
    /// Distinct rotary embeddings; layers name one by index.
    pub ropes: Vec<RopeDescription>,
    pub layers: Vec<LayerDescription>,
    /// Multi-token-prediction layers that the file holds behind its own; they
    /// are not run.
    pub extra_layers: usize,
}

impl ModelDescription {
    /// Routed experts of a token in layer `layer`; 0 if it is dense.
    pub fn top_k(&self, layer: usize) -> usize {
        match &self.layers[layer].feed_forward {
            FeedForward::Moe(moe) => moe.top_k,
            FeedForward::Dense { .. } => 0,
        }
    }

    /// The MoE layers with their index.
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &MoeDescription)> {
        self.layers.iter().enumerate().filter_map(|(index, layer)| match &layer.feed_forward {
            FeedForward::Moe(moe) => Some((index, moe)),
            FeedForward::Dense { .. } => None,
        })
    }
}

/// The families that we can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Mixtral,
    Qwen2Moe,
    Qwen3Moe,
    Qwen35Moe,
    Olmoe,
    DeepSeekV2,
    DeepSeekV3,
    GptOss,
    Glm4Moe,
    GraniteMoe,
    PhiMoe,
}

impl Architecture {
    pub const ALL: [Architecture; 11] = [
        Architecture::Mixtral,
        Architecture::Qwen2Moe,
        Architecture::Qwen3Moe,
        Architecture::Qwen35Moe,
        Architecture::Olmoe,
        Architecture::DeepSeekV2,
        Architecture::DeepSeekV3,
        Architecture::GptOss,
        Architecture::Glm4Moe,
        Architecture::GraniteMoe,
        Architecture::PhiMoe,
    ];

    /// `general.architecture` of GGUF files.
    pub fn gguf_name(self) -> &'static str {
        match self {
            Architecture::Mixtral => "llama",
            Architecture::Qwen2Moe => "qwen2moe",
            Architecture::Qwen3Moe => "qwen3moe",
            Architecture::Qwen35Moe => "qwen35moe",
            Architecture::Olmoe => "olmoe",
            Architecture::DeepSeekV2 | Architecture::DeepSeekV3 => "deepseek2",
            Architecture::GptOss => "gpt-oss",
            Architecture::Glm4Moe => "glm4moe",
            Architecture::GraniteMoe => "granitemoe",
            Architecture::PhiMoe => "phimoe",
        }
    }

    /// `model_type` values of Hugging Face configurations.
    pub fn model_types(self) -> &'static [&'static str] {
        match self {
            Architecture::Mixtral => &["mixtral"],
            Architecture::Qwen2Moe => &["qwen2_moe"],
            Architecture::Qwen3Moe => &["qwen3_moe"],
            Architecture::Qwen35Moe => &["qwen3_5_moe_text", "qwen3_5_moe"],
            Architecture::Olmoe => &["olmoe"],
            Architecture::DeepSeekV2 => &["deepseek_v2"],
            Architecture::DeepSeekV3 => &["deepseek_v3"],
            Architecture::GptOss => &["gpt_oss"],
            Architecture::Glm4Moe => &["glm4_moe"],
            Architecture::GraniteMoe => &["granitemoe", "granitemoeshared"],
            Architecture::PhiMoe => &["phimoe"],
        }
    }

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Architecture::Mixtral => "Mixtral",
            Architecture::Qwen2Moe => "Qwen2-MoE",
            Architecture::Qwen3Moe => "Qwen3-MoE",
            Architecture::Qwen35Moe => "Qwen3.5-MoE",
            Architecture::Olmoe => "OLMoE",
            Architecture::DeepSeekV2 => "DeepSeek-V2",
            Architecture::DeepSeekV3 => "DeepSeek-V3",
            Architecture::GptOss => "gpt-oss",
            Architecture::Glm4Moe => "GLM-4-MoE",
            Architecture::GraniteMoe => "Granite-MoE",
            Architecture::PhiMoe => "Phi-MoE",
        }
    }
}

/// The normalisation in front of every block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + epsilon) * weight`
    Rms { epsilon: f32 },
    /// `(x - mean) / sqrt(variance + epsilon) * weight + bias`
    Layer { epsilon: f32 },
}

#[derive(Clone, Debug)]
pub struct LayerDescription {
    pub mixer: Mixer,
    pub feed_forward: FeedForward,
}

/// What mixes positions.
#[derive(Clone, Debug)]
pub enum Mixer {
    Attention(AttentionDescription),
    Latent(LatentDescription),
    DeltaNet(DeltaNetDescription),
}

/// Grouped-query attention.
#[derive(Clone, Debug)]
pub struct AttentionDescription {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Index into [`ModelDescription::ropes`].
    pub rope: usize,
    pub qk_norm: QkNorm,
    /// Multiplies `q . k`.
    pub scale: f32,
    /// Positions that a query sees, itself included.
    pub window: Option<usize>,
    pub sinks: bool,
    /// The query projection carries a gate per head; its sigmoid multiplies
    /// the attention's output (Qwen3.5).
    pub output_gate: bool,
    /// Projections are clamped to this magnitude (OLMo).
    pub clip_qkv: Option<f32>,
}

/// RMS normalisation of queries and keys before the rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    None,
    /// Over each head.
    PerHead,
    /// Over all heads at once (OLMoE).
    Whole,
}

/// Multi-head latent attention (DeepSeek-V2 paper, 2405.04434, section 2.1),
/// run in its absorbed form: the cache holds `[latent | rotary key]`.
#[derive(Clone, Debug)]
pub struct LatentDescription {
    pub heads: usize,
    /// Rank of the query's low-rank projection; `None`: one full matrix.
    pub q_rank: Option<usize>,
    pub kv_rank: usize,
    pub nope_dim: usize,
    pub rope_dim: usize,
    pub value_dim: usize,
    pub rope: usize,
    pub scale: f32,
}

/// Gated DeltaNet (2412.06464) as Qwen3.5 uses it.
#[derive(Clone, Debug)]
pub struct DeltaNetDescription {
    pub key_heads: usize,
    pub value_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    /// Taps of the causal depth-wise convolution.
    pub conv_kernel: usize,
    /// Which key head serves value head `v`.
    pub head_order: HeadOrder,
    pub norm_epsilon: f32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadOrder {
    /// Key head `v / (value_heads / key_heads)`: Hugging Face folders.
    Grouped,
    /// Key head `v % key_heads`: GGUF files, whose converter reorders.
    Tiled,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeDescription {
    /// Leading elements of a head that are rotated; even.
    pub dim: usize,
    pub pairs: RopePairs,
    pub base: f64,
    pub scaling: RopeScaling,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// Element `i` with `i + dim / 2`.
    Halves,
    /// Element `2i` with `2i + 1`.
    Neighbours,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    /// YaRN (2309.00071).
    Yarn {
        factor: f64,
        original_context: f64,
        beta_fast: f64,
        beta_slow: f64,
        /// Round the correction range outward to whole dimensions.
        truncate: bool,
        /// Multiplies cos and sin.
        attention_factor: f64,
    },
    /// LongRoPE (2402.13753): a factor per pair, one list up to
    /// `original_context` positions and one for sessions with more.
    Long {
        original_context: usize,
        short_factors: Vec<f64>,
        long_factors: Vec<f64>,
        short_scale: f64,
        long_scale: f64,
    },
    /// A fixed factor per pair, from the file (Llama 3 in GGUF).
    Factors(Vec<f64>),
}

#[derive(Clone, Debug)]
pub enum FeedForward {
    Dense { inner: usize },
    Moe(MoeDescription),
}

#[derive(Clone, Debug)]
pub struct MoeDescription {
    pub experts: usize,
    pub top_k: usize,
    /// Rows of gate and up of one expert.
    pub inner: usize,
    pub activation: GatedActivation,
    pub router: RouterKind,
    pub shared: Option<SharedExpert>,
}

/// Experts that every token takes, as one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedExpert {
    pub inner: usize,
    /// A sigmoid gate from the hidden state multiplies its output (Qwen).
    pub gated: bool,
}

/// How logits become experts and weights; see [`super::router`].
#[derive(Clone, Debug, PartialEq)]
pub enum RouterKind {
    /// Softmax over all experts, top-k; `renormalise` divides by their sum.
    Softmax { renormalise: bool, scale: f32 },
    /// Top-k logits, softmax over those (Granite, gpt-oss).
    SoftmaxOfTopK,
    /// DeepSeek-V2: softmax, best groups by their best expert, top-k inside.
    GroupedSoftmax { groups: usize, groups_used: usize, renormalise: bool, scale: f32 },
    /// DeepSeek-V3, GLM-4: sigmoid scores; a bias per expert takes part in
    /// the choice, not in the weight; best groups by the sum of their best
    /// two.
    BiasedSigmoid { groups: usize, groups_used: usize, renormalise: bool, scale: f32 },
    /// Phi-3.5-MoE: two sequential choices, each normalised over the experts
    /// within `2 * jitter` of the best.
    SparseMixer { jitter: f32 },
}
