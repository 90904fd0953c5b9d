//! What a model asks of a GPU's memory, before any of it is taken.

use super::buffers::{Buffers, FEW_TOKENS, pass_tokens};
use super::experts::BlockShape;
use super::session::GpuSession;
use super::upload::padded;
use crate::files::ModelFiles;
use crate::model::description::ModelDescription;
use crate::model::weights::{
    FeedForwardWeights, GatedBlock, KeyUp, LatentQuery, MixerWeights, ModelWeights, Norm,
    Projection, Weight,
};
use crate::session::SessionOptions;
use pregate_kernels::cuda::router::RouterTable;
use serde::Serialize;

/// Bytes of a GPU's memory, by use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GpuParts {
    /// All weights but the embedding rows, which the host looks up.
    pub weights_bytes: u64,
    /// Of the KV cache with a full context, and of recurrent layers.
    pub kv_bytes: u64,
    /// Buffers of passes.
    pub scratch_bytes: u64,
}

impl GpuParts {
    pub fn of(
        files: &ModelFiles,
        description: &ModelDescription,
        weights: &ModelWeights,
        context: usize,
        options: &SessionOptions,
    ) -> Self {
        let tokens = pass_tokens(options.prefill_chunk, context);
        Self {
            weights_bytes: weights_bytes(files, weights),
            kv_bytes: GpuSession::state_bytes(description, context, options.kv) as u64,
            scratch_bytes: Buffers::bytes(description, context, tokens) as u64,
        }
    }

    pub fn total(&self) -> u64 {
        self.weights_bytes + self.kv_bytes + self.scratch_bytes
    }
}

/// Bytes that a session's passes keep on the host: logits, what is sent, and
/// what the routers chose.
pub fn host_scratch_bytes(
    description: &ModelDescription,
    options: &SessionOptions,
    context: usize,
    logit_rows: usize,
) -> u64 {
    let tokens = pass_tokens(options.prefill_chunk, context);
    let sent = tokens * 4 * description.hidden * 2;
    let tables: usize = description.ropes.iter().map(|rope| 2 * 4 * tokens * rope.dim).sum();
    let choices: usize =
        description.moe_layers().map(|(_, moe)| 4 * 8 * tokens * moe.top_k + 1024).sum();
    // Of one piece of a pass, and of all.
    let logits = 4 * description.vocab * (logit_rows + 2 * FEW_TOKENS);
    (sent + tables + choices + logits) as u64
}

/// What [`super::GpuModel::upload`] takes, to the byte.
pub fn weights_bytes(files: &ModelFiles, weights: &ModelWeights) -> u64 {
    let layers = weights.layers.iter().map(|layer| {
        let feed_forward = match &layer.feed_forward {
            FeedForwardWeights::Dense(block) => experts(files, std::slice::from_ref(&**block)),
            FeedForwardWeights::Moe(moe) => {
                let shared = moe.shared.as_slice();
                let selection_bias = moe.rule.on_device().and_then(|(_, bias)| bias);
                projection(&moe.router)
                    + floats(selection_bias)
                    + experts(files, &moe.experts)
                    + shared.iter().map(|_| experts(files, shared)).sum::<u64>()
                    + moe.shared_gate.iter().map(matrix).sum::<u64>()
            }
        };
        norm(&layer.mixer_norm)
            + mixer(&layer.mixer)
            + norm(&layer.feed_forward_norm)
            + feed_forward
    });
    let routers = weights.moe_layers().count() * RouterTable::LAYER_BYTES;
    projection(&weights.head) + norm(&weights.final_norm) + layers.sum::<u64>() + padded(routers)
}

fn floats(values: Option<&[f32]>) -> u64 {
    values.map_or(0, |values| padded(4 * values.len()))
}

fn norm(norm: &Norm) -> u64 {
    floats(Some(&norm.weight)) + floats(norm.bias.as_deref())
}

fn matrix(weight: &Weight) -> u64 {
    padded(weight.bytes() as usize)
}

fn projection(projection: &Projection) -> u64 {
    matrix(&projection.weight) + floats(projection.bias.as_deref())
}

fn mixer(weights: &MixerWeights) -> u64 {
    let projections = |list: &[&Projection]| list.iter().map(|p| projection(p)).sum::<u64>();
    match weights {
        MixerWeights::Attention(w) => {
            projections(&[&w.q, &w.k, &w.v, &w.output])
                + floats(w.q_norm.as_deref())
                + floats(w.k_norm.as_deref())
                + floats(w.sinks.as_deref())
        }
        MixerWeights::Latent(w) => {
            let query = match &w.query {
                LatentQuery::Full(full) => projection(full),
                LatentQuery::LowRank { down, norm, up } => {
                    projections(&[down, up]) + floats(Some(norm))
                }
            };
            let keys = w.key_up.iter().map(|key| match key {
                KeyUp::Rows(weight) | KeyUp::Transposed(weight) => weight.bytes(),
            });
            let values = w.value_up.iter().map(Weight::bytes);
            query
                + projections(&[&w.kv_down, &w.output])
                + floats(Some(&w.kv_norm))
                + padded(keys.sum::<u64>() as usize)
                + padded(values.sum::<u64>() as usize)
        }
        MixerWeights::DeltaNet(w) => {
            let vectors = [&w.conv, &w.decay, &w.decay_bias, &w.norm];
            projections(&[&w.qkv, &w.gate, &w.alpha, &w.beta, &w.output])
                + vectors.into_iter().map(|values| floats(Some(values))).sum::<u64>()
        }
    }
}

/// Blocks, their table, their biases.
fn experts(files: &ModelFiles, blocks: &[GatedBlock]) -> u64 {
    let block = padded(BlockShape::of(&blocks[0].view(files)).block_bytes);
    let biases = |of: fn(&GatedBlock) -> Option<&Vec<f32>>| {
        let count: usize = blocks.iter().filter_map(of).map(Vec::len).sum();
        if count == 0 { 0 } else { padded(4 * count) }
    };
    block * blocks.len() as u64
        + padded(8 * blocks.len())
        + biases(|block| block.gate.bias.as_ref())
        + biases(|block| block.up.bias.as_ref())
        + biases(|block| block.down.bias.as_ref())
}
