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
    /// All weights but routed experts, and but the embedding rows, which the
    /// host looks up.
    pub weights_bytes: u64,
    pub experts_bytes: u64,
    /// Of the KV cache with a full context, and of recurrent layers.
    pub kv_bytes: u64,
    /// Buffers of passes.
    pub scratch_bytes: u64,
}

impl GpuParts {
    pub fn total(&self) -> u64 {
        self.weights_bytes + self.experts_bytes + self.kv_bytes + self.scratch_bytes
    }
}

/// How a model uses a GPU's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuShare {
    pub parts: GpuParts,
    /// Experts on the device per layer of the model, 0 for dense layers.
    pub resident: Vec<usize>,
}

impl GpuShare {
    /// Everything but routed experts, then as many of these as fit
    /// `budget_bytes`: one by one to the layer with the smallest share of its
    /// experts.
    ///
    /// Error: the smallest parts, which are larger than the budget.
    pub fn of(
        files: &ModelFiles,
        description: &ModelDescription,
        weights: &ModelWeights,
        (context, options): (usize, &SessionOptions),
        budget_bytes: u64,
    ) -> Result<Self, GpuParts> {
        let tokens = pass_tokens(options.prefill_chunk, context);
        let mut parts = GpuParts {
            weights_bytes: dense_bytes(files, weights),
            experts_bytes: 0,
            kv_bytes: GpuSession::state_bytes(description, context, options.kv) as u64,
            scratch_bytes: Buffers::bytes(description, context, tokens) as u64,
        };
        let Some(mut left) = budget_bytes.checked_sub(parts.total()) else { return Err(parts) };
        let mut resident = vec![0; weights.layers.len()];
        let layers: Vec<(usize, usize, u64)> = (weights.moe_layers())
            .map(|(index, moe)| (index, moe.experts.len(), block_bytes(files, &moe.experts)))
            .collect();
        let all: u64 = layers.iter().map(|(_, count, bytes)| *count as u64 * bytes).sum();
        if all <= left {
            layers.iter().for_each(|(index, count, _)| resident[*index] = *count);
            parts.experts_bytes = all;
            return Ok(Self { parts, resident });
        }
        let open = |resident: &[usize]| {
            let open = layers.iter().filter(|(index, count, _)| resident[*index] < *count);
            // resident / count against resident / count.
            open.min_by(|(a, x, _), (b, y, _)| (resident[*a] * y).cmp(&(resident[*b] * x))).copied()
        };
        while let Some((index, _, bytes)) = open(&resident) {
            let Some(rest) = left.checked_sub(bytes) else { break };
            left = rest;
            parts.experts_bytes += bytes;
            resident[index] += 1;
        }
        Ok(Self { parts, resident })
    }
}

/// Experts per layer of the model if all of them are on the device.
pub fn all_resident(weights: &ModelWeights) -> Vec<usize> {
    let mut resident = vec![0; weights.layers.len()];
    weights.moe_layers().for_each(|(index, moe)| resident[index] = moe.experts.len());
    resident
}

/// What an expert of a layer takes.
fn block_bytes(files: &ModelFiles, experts: &[GatedBlock]) -> u64 {
    padded(BlockShape::of(&experts[0].view(files)).block_bytes)
}

/// Of the first experts of each layer, as [`super::GpuModel::upload`] takes
/// them.
pub fn experts_bytes(files: &ModelFiles, weights: &ModelWeights, resident: &[usize]) -> u64 {
    let layers = weights.moe_layers();
    layers.map(|(index, moe)| resident[index] as u64 * block_bytes(files, &moe.experts)).sum()
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

/// What [`super::GpuModel::upload`] takes beside experts, to the byte.
pub fn dense_bytes(files: &ModelFiles, weights: &ModelWeights) -> u64 {
    let layers = weights.layers.iter().map(|layer| {
        let feed_forward = match &layer.feed_forward {
            FeedForwardWeights::Dense(block) => dense_block(files, block),
            FeedForwardWeights::Moe(moe) => {
                let selection_bias = moe.rule.on_device().and_then(|(_, bias)| bias);
                projection(&moe.router)
                    + floats(selection_bias)
                    + beside_blocks(&moe.experts)
                    + moe.shared.iter().map(|block| dense_block(files, block)).sum::<u64>()
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

/// A block that every token takes.
fn dense_block(files: &ModelFiles, block: &GatedBlock) -> u64 {
    let block = std::slice::from_ref(block);
    block_bytes(files, block) + beside_blocks(block)
}

/// The table of a layer's blocks, and their biases.
fn beside_blocks(blocks: &[GatedBlock]) -> u64 {
    let biases = |of: fn(&GatedBlock) -> Option<&Vec<f32>>| {
        let count: usize = blocks.iter().filter_map(of).map(Vec::len).sum();
        if count == 0 { 0 } else { padded(4 * count) }
    };
    padded(8 * blocks.len())
        + biases(|block| block.gate.bias.as_ref())
        + biases(|block| block.up.bias.as_ref())
        + biases(|block| block.down.bias.as_ref())
}
