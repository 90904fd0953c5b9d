//! Where each matrix of a model is in its files, and the small vectors that
//! are kept as f32.

use super::description::ModelDescription;
use super::router::Router;
use crate::error::Result;
use crate::files::ModelFiles;
use pregate_kernels::matrix::Storage;
use pregate_kernels::{ExpertWeights, Format, Matrix};
use std::ops::Range;

/// A matrix inside a mapped tensor; made by the loader, which checks it.
#[derive(Clone, Copy, Debug)]
pub struct Weight {
    /// Index into [`ModelFiles::tensors`].
    pub(crate) tensor: usize,
    pub(crate) format: Format,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) place: Place,
}

/// How the matrix lies in its tensor; see [`Storage`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// From byte `start`, row after row, every `step`-th row.
    Rows { start: usize, step: usize },
    /// Transposed, from byte `start`.
    Columns { start: usize, pitch: usize, step: usize },
    /// MXFP4 pairs from byte `start`; scales in another tensor.
    Pairs { start: usize, scales: usize, scales_start: usize, step: usize },
}

impl Weight {
    /// The matrix over the bytes in memory.
    pub fn view<'a>(&self, files: &'a ModelFiles) -> Matrix<'a> {
        self.view_of(&|tensor, start| &files.weight_bytes(tensor)[start..])
    }

    /// The matrix over what `bytes(tensor, start)` answers: the bytes of a
    /// tensor from `start` on, as many as the matrix needs or more.
    pub(crate) fn view_of<'a>(&self, bytes: &dyn Fn(usize, usize) -> &'a [u8]) -> Matrix<'a> {
        let storage = match self.place {
            Place::Rows { start, step } => {
                let row_bytes = self.format.row_bytes(self.cols).unwrap_or(0);
                Storage::Rows { bytes: bytes(self.tensor, start), stride: row_bytes * step }
            }
            Place::Columns { start, pitch, step } => {
                Storage::Columns { bytes: bytes(self.tensor, start), pitch, step }
            }
            Place::Pairs { start, scales, scales_start, step } => Storage::Mxfp4Pairs {
                blocks: bytes(self.tensor, start),
                scales: bytes(scales, scales_start),
                step,
            },
        };
        Matrix::with_storage(self.format, self.rows, self.cols, storage)
            .expect("the loader checked this matrix against its tensor")
    }

    /// Row `row` of a matrix that is stored row after row, without touching the
    /// mapping of a model that is streamed.
    pub(crate) fn read_row<'a>(
        &self,
        files: &'a ModelFiles,
        row: usize,
        scratch: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        let Place::Rows { start, step } = self.place else {
            unreachable!("embeddings are stored row after row")
        };
        let row_bytes = self.format.row_bytes(self.cols).unwrap_or(0);
        files.weight_part(self.tensor, start + row * step * row_bytes, row_bytes, scratch)
    }

    /// The parts of tensors that the matrix lies in: index and bytes. Parts of
    /// two matrices may interleave.
    pub(crate) fn extents(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (rows, cols) = (self.rows, self.cols);
        let (first, second) = match self.place {
            Place::Rows { start, step } => {
                let row_bytes = self.format.row_bytes(cols).unwrap_or(0);
                ((self.tensor, start..start + ((rows - 1) * step + 1) * row_bytes), None)
            }
            Place::Columns { start, pitch, step } => {
                let elements = (cols - 1) * pitch + (rows - 1) * step + 1;
                ((self.tensor, start..start + elements * self.format.block_bytes()), None)
            }
            Place::Pairs { start, scales, scales_start, step } => {
                let blocks = ((rows - 1) * step + 1) * (cols / 32);
                let scales = (scales, scales_start..scales_start + blocks);
                ((self.tensor, start..start + blocks * 16), Some(scales))
            }
        };
        std::iter::once(first).chain(second)
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> u64 {
        self.rows as u64 * self.format.row_bytes(self.cols).unwrap_or(0) as u64
    }

    /// Index of the tensor that it lies in.
    pub fn tensor(&self) -> usize {
        self.tensor
    }

    pub fn format(&self) -> Format {
        self.format
    }

    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// A matrix with an optional bias `[rows]`.
#[derive(Debug)]
pub struct Projection {
    pub weight: Weight,
    pub bias: Option<Vec<f32>>,
}

/// Weight and optional bias of a normalisation, `[width]`.
#[derive(Debug)]
pub struct Norm {
    pub weight: Vec<f32>,
    pub bias: Option<Vec<f32>>,
}

/// Gate, up and down of an expert or a dense block.
#[derive(Debug)]
pub struct GatedBlock {
    pub gate: Projection,
    pub up: Projection,
    pub down: Projection,
}

impl GatedBlock {
    pub fn view<'a>(&'a self, files: &'a ModelFiles) -> ExpertWeights<'a> {
        self.view_of(&|tensor, start| &files.weight_bytes(tensor)[start..])
    }

    /// As [`Weight::view_of`].
    pub(crate) fn view_of<'a>(
        &'a self,
        bytes: &dyn Fn(usize, usize) -> &'a [u8],
    ) -> ExpertWeights<'a> {
        ExpertWeights {
            gate: self.gate.weight.view_of(bytes),
            up: self.up.weight.view_of(bytes),
            down: self.down.weight.view_of(bytes),
            gate_bias: self.gate.bias.as_deref(),
            up_bias: self.up.bias.as_deref(),
            down_bias: self.down.bias.as_deref(),
        }
    }

    /// See [`Weight::extents`].
    pub(crate) fn extents(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        [&self.gate, &self.up, &self.down].into_iter().flat_map(|part| part.weight.extents())
    }

    pub fn bytes(&self) -> u64 {
        self.gate.weight.bytes() + self.up.weight.bytes() + self.down.weight.bytes()
    }
}

/// All of a model's weights.
pub struct ModelWeights {
    /// `[vocab, hidden]`
    pub embedding: Weight,
    /// `[vocab, hidden]`; the embedding itself where they are tied.
    pub head: Projection,
    pub final_norm: Norm,
    pub layers: Vec<LayerWeights>,
}

pub struct LayerWeights {
    pub mixer_norm: Norm,
    pub mixer: MixerWeights,
    pub feed_forward_norm: Norm,
    pub feed_forward: FeedForwardWeights,
}

pub enum MixerWeights {
    Attention(Box<AttentionWeights>),
    Latent(Box<LatentWeights>),
    DeltaNet(Box<DeltaNetWeights>),
}

pub struct AttentionWeights {
    /// `[heads * head_dim, hidden]`, or twice the rows with an output gate:
    /// per head the query, then the gate.
    pub q: Projection,
    /// `[kv_heads * head_dim, hidden]`
    pub k: Projection,
    /// `[kv_heads * head_dim, hidden]`
    pub v: Projection,
    /// `[hidden, heads * head_dim]`
    pub output: Projection,
    /// `[head_dim]`, or `[heads * head_dim]` and `[kv_heads * head_dim]`.
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    /// `[heads]`
    pub sinks: Option<Vec<f32>>,
}

pub struct LatentWeights {
    pub query: LatentQuery,
    /// `[kv_rank + rope_dim, hidden]`
    pub kv_down: Projection,
    /// `[kv_rank]`
    pub kv_norm: Vec<f32>,
    /// Per head.
    pub key_up: Vec<KeyUp>,
    /// Per head `[value_dim, kv_rank]`.
    pub value_up: Vec<Weight>,
    /// `[hidden, heads * value_dim]`
    pub output: Projection,
}

pub enum LatentQuery {
    /// `[heads * (nope_dim + rope_dim), hidden]`
    Full(Projection),
    /// Down `[q_rank, hidden]`, norm `[q_rank]`, up `[heads * .., q_rank]`.
    LowRank { down: Projection, norm: Vec<f32>, up: Projection },
}

/// What takes a head's query into the latent space.
#[derive(Clone, Copy)]
pub enum KeyUp {
    /// `[nope_dim, kv_rank]`, used transposed (rows of the packed kv_b).
    Rows(Weight),
    /// `[kv_rank, nope_dim]` (GGUF's attn_k_b).
    Transposed(Weight),
}

pub struct DeltaNetWeights {
    /// `[2 * key_heads * key_dim + value_heads * value_dim, hidden]`
    pub qkv: Projection,
    /// Output gate z, `[value_heads * value_dim, hidden]`
    pub gate: Projection,
    /// Decay input a, `[value_heads, hidden]`
    pub alpha: Projection,
    /// Write strength b, `[value_heads, hidden]`
    pub beta: Projection,
    /// `[channels, conv_kernel]`, oldest tap first.
    pub conv: Vec<f32>,
    /// `-exp(A_log)`, `[value_heads]`
    pub decay: Vec<f32>,
    /// `[value_heads]`
    pub decay_bias: Vec<f32>,
    /// `[value_dim]`
    pub norm: Vec<f32>,
    /// `[hidden, value_heads * value_dim]`
    pub output: Projection,
}

pub enum FeedForwardWeights {
    Dense(Box<GatedBlock>),
    Moe(Box<MoeWeights>),
}

pub struct MoeWeights {
    /// `[experts, hidden]`; the bias is added to the logits.
    pub router: Projection,
    pub rule: Box<dyn Router>,
    pub experts: Vec<GatedBlock>,
    pub shared: Option<GatedBlock>,
    /// `[1, hidden]`
    pub shared_gate: Option<Weight>,
}

impl ModelWeights {
    /// Weight bytes that one decoded token reads: everything but the
    /// embedding, and as many average experts of each layer as
    /// `description` has chosen. KV cache and small vectors not counted.
    pub fn bytes_per_token(&self, description: &ModelDescription) -> u64 {
        let layers = self.layers.iter().enumerate().map(|(index, layer)| {
            let feed = match &layer.feed_forward {
                FeedForwardWeights::Dense(block) => block.bytes(),
                FeedForwardWeights::Moe(moe) => {
                    let experts: u64 = moe.experts.iter().map(GatedBlock::bytes).sum();
                    experts * description.top_k(index) as u64 / moe.experts.len() as u64
                        + moe.router.weight.bytes()
                        + moe.shared.as_ref().map_or(0, GatedBlock::bytes)
                        + moe.shared_gate.map_or(0, |gate| gate.bytes())
                }
            };
            feed + layer.mixer.bytes()
        });
        self.head.weight.bytes() + layers.sum::<u64>()
    }

    /// The MoE layers with their index.
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &MoeWeights)> {
        self.layers.iter().enumerate().filter_map(|(index, layer)| match &layer.feed_forward {
            FeedForwardWeights::Moe(moe) => Some((index, &**moe)),
            FeedForwardWeights::Dense(_) => None,
        })
    }

    /// Bytes of all routed experts.
    pub fn expert_bytes(&self) -> u64 {
        self.moe_layers().flat_map(|(_, moe)| &moe.experts).map(GatedBlock::bytes).sum()
    }
}

impl MixerWeights {
    fn bytes(&self) -> u64 {
        let sum = |list: &[&Projection]| list.iter().map(|p| p.weight.bytes()).sum::<u64>();
        match self {
            MixerWeights::Attention(w) => sum(&[&w.q, &w.k, &w.v, &w.output]),
            MixerWeights::Latent(w) => {
                let query = match &w.query {
                    LatentQuery::Full(q) => q.weight.bytes(),
                    LatentQuery::LowRank { down, up, .. } => sum(&[down, up]),
                };
                let keys = w.key_up.iter().map(|key| match key {
                    KeyUp::Rows(weight) | KeyUp::Transposed(weight) => weight.bytes(),
                });
                let values = w.value_up.iter().map(Weight::bytes);
                query + sum(&[&w.kv_down, &w.output]) + keys.chain(values).sum::<u64>()
            }
            MixerWeights::DeltaNet(w) => sum(&[&w.qkv, &w.gate, &w.alpha, &w.beta, &w.output]),
        }
    }
}
