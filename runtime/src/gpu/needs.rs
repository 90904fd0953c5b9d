//! What a model asks of a GPU's memory, before any of it is taken.

use super::buffers::{FEW_TOKENS, pass_tokens};
use super::experts::BlockShape;
use super::host_share::{DiskShare, HostTooSmall};
use super::session::GpuSession;
use super::slots::SlotTable;
use super::upload::padded;
use super::vram::{Classes, MovingLayer};
use crate::budget::{self, Placement, Request, Sizes};
use crate::files::ModelFiles;
use crate::model::description::ModelDescription;
use crate::model::weights::{
    FeedForwardWeights, GatedBlock, KeyUp, LatentQuery, MixerWeights, ModelWeights, Norm,
    Projection, Weight,
};
use crate::model::{BelowHost, GpuExperts, Misses, Source, Streaming};
use crate::session::SessionOptions;
use pregate_kernels::cuda::router::RouterTable;
use serde::Serialize;

/// Bytes of a GPU's memory, by use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GpuParts {
    /// All weights but routed experts, and but the embedding rows, which the
    /// host looks up.
    pub weights_bytes: u64,
    /// Of experts that stay, and of slots for others.
    pub experts_bytes: u64,
    /// Of frames that experts come to before another leaves.
    pub ring_bytes: u64,
    /// Of the KV cache with a full context, and of recurrent layers: twice
    /// where not all experts stay, so that a token can be computed again.
    pub kv_bytes: u64,
    /// Buffers of passes.
    pub scratch_bytes: u64,
}

impl GpuParts {
    pub fn total(&self) -> u64 {
        self.weights_bytes
            + self.experts_bytes
            + self.ring_bytes
            + self.kv_bytes
            + self.scratch_bytes
    }
}

/// How much there is for a model beside everything else.
#[derive(Clone, Copy, Debug)]
pub struct GpuRoom {
    pub vram_bytes: u64,
    /// Of host memory, for experts.
    pub host_bytes: u64,
    /// As [`crate::budget::Request::ring`].
    pub ring: Option<usize>,
}

/// How a model uses a GPU's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuShare {
    pub parts: GpuParts,
    /// Experts that never leave the device, per layer of the model.
    pub fixed: Vec<usize>,
    /// Slots for the other experts, per layer of the model; none where these
    /// stay on the host.
    pub slots: Vec<usize>,
    /// Further frames of each size.
    pub ring: usize,
    /// Of the experts that are not fixed: all of them, or blocks and frames
    /// where some are on disk.
    pub host_bytes: u64,
    /// Experts that neither the device nor the host keeps.
    pub disk: Option<DiskShare>,
}

/// Why there is no share of a device.
#[derive(Clone, Debug)]
pub enum NoShare {
    /// The smallest parts, which are larger than the room on the device.
    Device(GpuParts),
    /// There is less than the least host memory for experts from disk.
    Host(HostTooSmall),
}

impl GpuShare {
    /// Everything but routed experts, then all of these if they fit. Else
    /// slots that experts come to and leave, because which ones are needed
    /// changes with the text; where the host has no room for all of them, so
    /// many are fixed on the device, or if that is not enough either, experts
    /// come from disk. With less than the smallest number of slots, the experts
    /// that fit are fixed.
    ///
    /// # Errors
    /// Less room than the least, which is named.
    pub fn of(
        files: &ModelFiles,
        description: &ModelDescription,
        weights: &ModelWeights,
        (context, options): (usize, &SessionOptions),
        room: GpuRoom,
    ) -> Result<Self, NoShare> {
        let tokens = pass_tokens(options.prefill_chunk, context);
        let parts = GpuParts {
            weights_bytes: dense_bytes(files, weights),
            kv_bytes: GpuSession::state_bytes(description, context, options.kv) as u64,
            scratch_bytes: GpuSession::scratch_bytes(description, context, tokens) as u64,
            ..GpuParts::default()
        };
        let Some(left) = room.vram_bytes.checked_sub(parts.total()) else {
            return Err(NoShare::Device(parts));
        };
        let experts = Experts::of(files, weights);
        if experts.bytes(&all(weights)) <= left {
            return Ok(experts.fixed(parts, all(weights)));
        }
        let copy_bytes = GpuSession::copy_bytes(description) as u64;
        let parts = GpuParts { kv_bytes: parts.kv_bytes + copy_bytes, ..parts };
        let Some(left) = left.checked_sub(copy_bytes) else {
            return Err(NoShare::Device(parts));
        };
        let too_many = experts.bytes(&all(weights)).saturating_sub(room.host_bytes);
        let mut fixed = experts.fill(|before, bytes| before < too_many && bytes <= left);
        let mut on_disk = None;
        if experts.bytes(&fixed) < too_many {
            fixed = vec![0; fixed.len()];
            let share = DiskShare::of(files, description, weights, &experts, room.host_bytes);
            on_disk = Some(share.map_err(NoShare::Host)?);
        }
        let moving: Vec<Option<MovingLayer>> = (fixed.iter().zip(&experts.layers).enumerate())
            .map(|(index, (&fixed, layer))| {
                let (experts, shape) = (*layer)?;
                let top_k = description.top_k(index);
                let layer = MovingLayer { shape, experts, fixed, top_k, slots: 0 };
                (fixed < experts).then_some(layer)
            })
            .collect();
        let fixed_bytes = experts.bytes(&fixed);
        let whole = |fixed| Ok(experts.fixed(parts, fixed));
        let most = || experts.fill(|_, bytes| bytes <= left);
        let Some(rest) = left.checked_sub(fixed_bytes) else { return whole(most()) };
        let Some((slots, ring)) = slots(&moving, rest, room.ring) else { return whole(most()) };
        let layers = moving.iter().zip(&slots);
        let slotted: Vec<_> = layers
            .map(|(layer, &slots)| layer.map(|layer| MovingLayer { slots, ..layer }))
            .collect();
        let [slots_bytes, ring_bytes] = [(&slotted, 0), (&moving, ring)]
            .map(|(layers, ring)| Classes::new(layers, ring).bytes());
        let parts = GpuParts { experts_bytes: fixed_bytes + slots_bytes, ring_bytes, ..parts };
        let (disk, host_bytes) = match on_disk {
            Some((disk, bytes)) => (Some(disk), bytes),
            None => (None, experts.bytes(&all(weights)) - fixed_bytes),
        };
        Ok(Self { parts, fixed, slots, ring, host_bytes, disk })
    }

    /// Whether all experts stay on the device.
    pub fn is_whole(&self) -> bool {
        self.host_bytes == 0
    }

    /// Whether some experts come and go.
    pub fn moves(&self) -> bool {
        self.slots.iter().any(|&slots| slots > 0)
    }

    /// What to load the model with; `streaming` for all but the numbers.
    pub fn experts(&self, streaming: Streaming, misses: Misses) -> GpuExperts {
        let Self { fixed, slots, ring, disk, .. } = self.clone();
        if self.is_whole() {
            return GpuExperts::All;
        }
        if !self.moves() {
            return GpuExperts::Some { fixed };
        }
        let source = match disk {
            None => Source::Host,
            Some(DiskShare { kept, frames, .. }) => {
                let source = Box::new(streaming.source);
                Source::HostAndDisk(BelowHost { kept, frames, source })
            }
        };
        let streaming = Streaming { slots, ring, source, ..streaming };
        GpuExperts::Moving { fixed, streaming, misses }
    }
}

/// Slots per layer, and the ring, of `bytes`; `None`: there is room for less
/// than the smallest number of them.
fn slots(
    layers: &[Option<MovingLayer>],
    bytes: u64,
    ring: Option<usize>,
) -> Option<(Vec<usize>, usize)> {
    let classes = Classes::new(layers, 0);
    let class_bytes = classes.block_bytes.iter().map(|&bytes| bytes as u64).collect();
    // More than there is: that all fit was asked before.
    let whole_bytes = u64::MAX;
    let sizes = Sizes { shape: classes.shape, class_bytes, whole_bytes, dense_bytes: 0 };
    let request =
        Request { budget_bytes: bytes, process_bytes: 0, kv_bytes: 0, scratch_bytes: 0, ring };
    match budget::divide(&sizes, &request).ok()?.placement {
        Placement::Whole => None,
        Placement::Streaming { slots, ring, .. } => Some((slots, ring)),
    }
}

/// The routed experts of a model.
pub(super) struct Experts {
    /// How many, and where their matrices are in a block.
    layers: Vec<Option<(usize, BlockShape)>>,
}

impl Experts {
    fn of(files: &ModelFiles, weights: &ModelWeights) -> Self {
        let mut layers = vec![None; weights.layers.len()];
        for (index, moe) in weights.moe_layers() {
            let shape = BlockShape::of(&moe.experts[0].view(files));
            layers[index] = Some((moe.experts.len(), shape));
        }
        Self { layers }
    }

    /// Of so many experts per layer.
    pub(super) fn bytes(&self, counts: &[usize]) -> u64 {
        let layers = self.layers.iter().zip(counts);
        layers
            .filter_map(|(layer, &count)| Some(block_bytes(&layer.as_ref()?.1) * count as u64))
            .sum()
    }

    /// Experts one by one to the layer with the smallest share of its experts,
    /// as long as `more` says so, which hears the bytes without and with the
    /// next one.
    pub(super) fn fill(&self, more: impl Fn(u64, u64) -> bool) -> Vec<usize> {
        let mut counts = vec![0; self.layers.len()];
        let mut bytes = 0;
        let open = |counts: &[usize]| {
            let layers = self.layers.iter().enumerate();
            let layers = layers.filter_map(|(index, layer)| Some((index, (*layer)?)));
            let open = layers.filter(|(index, (count, _))| counts[*index] < *count);
            // counts / experts against counts / experts.
            open.min_by(|(a, (x, _)), (b, (y, _))| (counts[*a] * y).cmp(&(counts[*b] * x)))
        };
        while let Some((index, (_, shape))) = open(&counts) {
            let before = bytes;
            bytes += block_bytes(&shape);
            if !more(before, bytes) {
                break;
            }
            counts[index] += 1;
        }
        counts
    }

    /// The share of a device that these experts never leave.
    fn fixed(&self, parts: GpuParts, fixed: Vec<usize>) -> GpuShare {
        let all: Vec<usize> =
            self.layers.iter().map(|layer| layer.map_or(0, |(count, _)| count)).collect();
        let experts_bytes = self.bytes(&fixed);
        GpuShare {
            parts: GpuParts { experts_bytes, ..parts },
            slots: vec![0; fixed.len()],
            ring: 0,
            host_bytes: self.bytes(&all) - experts_bytes,
            fixed,
            disk: None,
        }
    }
}

/// Experts per layer of the model if all of them are on the device.
pub fn all(weights: &ModelWeights) -> Vec<usize> {
    let mut resident = vec![0; weights.layers.len()];
    weights.moe_layers().for_each(|(index, moe)| resident[index] = moe.experts.len());
    resident
}

/// What an expert of a layer takes.
fn block_bytes(shape: &BlockShape) -> u64 {
    padded(shape.block_bytes)
}

/// Of the first experts of each layer, as [`super::GpuModel::upload`] takes
/// them.
pub fn experts_bytes(files: &ModelFiles, weights: &ModelWeights, counts: &[usize]) -> u64 {
    Experts::of(files, weights).bytes(counts)
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
    let experts = weights.moe_layers().map(|(_, moe)| moe.experts.len()).sum();
    let slots = padded(SlotTable::bytes(experts));
    projection(&weights.head)
        + norm(&weights.final_norm)
        + layers.sum::<u64>()
        + padded(routers)
        + slots
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
    block_bytes(&BlockShape::of(&block[0].view(files))) + beside_blocks(block)
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
