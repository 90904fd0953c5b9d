//! Device memory of a session's passes: one arena, cut once.

use super::GpuModel;
use super::weights::{DeviceFeedForward, DeviceMixer, DeviceQuery};
use crate::model::description::{Mixer, ModelDescription};
use crate::model::rope::Rope;
use pregate_kernels::cuda::router::RouterScratch;
use pregate_kernels::cuda::{Attend, CudaError, Device, QuantisedSpans, Span};
use std::ops::Range;

/// Tokens of a pass.
pub const MOST_TOKENS: usize = pregate_kernels::cuda::MOST_TOKENS;
const ALIGN: usize = 256;

/// Every buffer holds what the layer that needs most of it needs.
pub struct Buffers {
    /// What the host gives a pass: the residual stream `[tokens, hidden]`, then
    /// the tables of the rotations.
    pub inputs: Span,
    /// Of `inputs`: the residual stream.
    pub x: Span,
    /// Of `inputs`, per rope: `[tokens, half, 2]`.
    pub tables: Vec<Span>,
    /// `[tokens, hidden]`: what a block adds.
    pub delta: Span,
    /// `[tokens, hidden]`
    pub normed: Span,
    /// `normed` in groups of 32 and of 256.
    pub normed_forms: [QuantisedSpans; 2],
    /// What mixers keep on their way; see there.
    pub mixer: [Span; 6],
    /// A mixer's rows in groups of 32 and of 256.
    pub mixer_forms: [QuantisedSpans; 2],
    pub attention_scratch: Span,
    /// Zero between launches: of attention, and of gated DeltaNet.
    pub counters: Span,
    /// `[tokens, experts]`
    pub router_logits: Span,
    pub router_scratch: RouterScratch,
    /// Per MoE layer, i32 and f32 `[tokens, top_k]`.
    pub choices: Vec<Chosen>,
    /// All of `choices`.
    pub all_choices: Span,
    /// `[tokens, k, inner]`
    pub vectors: Span,
    /// `[tokens, k, hidden]`
    pub answers: Span,
    /// `[tokens, hidden]`
    pub shared: Span,
    /// `[tokens]`
    pub shared_gate: Span,
    /// `[tokens, vocab]`
    pub logits: Span,
}

/// Where a layer's choice goes.
pub struct Chosen {
    pub ids: Span,
    pub weights: Span,
    /// Where both are in [`Buffers::all_choices`], in bytes.
    pub range: Range<usize>,
}

/// The elements that each buffer must hold for one token.
#[derive(Default)]
struct Sizes {
    mixer: [usize; 6],
    mixer_forms: usize,
    counters: usize,
    attention_scratch: usize,
    experts: usize,
    vectors: usize,
    answers: usize,
}

impl Sizes {
    fn mixer(&mut self, counts: &[usize], forms: usize) {
        for (most, count) in self.mixer.iter_mut().zip(counts) {
            *most = (*most).max(*count);
        }
        self.mixer_forms = self.mixer_forms.max(forms);
    }

    fn attention(&mut self, heads: usize, value_width: usize, capacity: usize) {
        let scratch = Attend::scratch_bytes(1, heads, value_width, capacity);
        self.attention_scratch = self.attention_scratch.max(scratch);
        self.counters = self.counters.max(heads);
    }

    fn of(description: &ModelDescription, model: &GpuModel, capacity: usize) -> Self {
        let mut sizes = Self::default();
        for (layer, weights) in description.layers.iter().zip(&model.weights.layers) {
            match &layer.mixer {
                Mixer::Attention(a) => {
                    let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
                    let raw = if a.output_gate { 2 * q } else { q };
                    sizes.mixer(&[raw, kv, kv, q, q], q);
                    sizes.attention(a.heads, a.head_dim, capacity);
                }
                Mixer::Latent(l) => {
                    let low = match &weights.mixer {
                        DeviceMixer::Latent(w) => match &w.query {
                            DeviceQuery::LowRank { down, .. } => down.weight.rows,
                            DeviceQuery::Full(_) => 0,
                        },
                        _ => 0,
                    };
                    let (q, row) = (l.nope_dim + l.rope_dim, l.kv_rank + l.rope_dim);
                    let (rank, value) = (l.heads * l.kv_rank, l.heads * l.value_dim);
                    let widths = [l.heads * q, low, row, l.heads * row, rank, value];
                    let forms = low.max(rank).max(value).max(l.heads * l.nope_dim);
                    sizes.mixer(&widths, forms);
                    sizes.attention(l.heads, l.kv_rank, capacity);
                }
                Mixer::DeltaNet(d) => {
                    let values = d.value_heads * d.value_dim;
                    let channels = 2 * d.key_heads * d.key_dim + values;
                    let heads = d.value_heads;
                    sizes.mixer(&[channels, channels, values, heads, heads, values], values);
                    sizes.counters = sizes.counters.max(heads);
                }
            }
            let (vectors, answers) = match &weights.feed_forward {
                DeviceFeedForward::Dense(block) => (block.shape.inner, 0),
                DeviceFeedForward::Moe(moe) => {
                    sizes.experts = sizes.experts.max(moe.experts.count);
                    let shared = moe.shared.as_ref().map_or(0, |block| block.shape.inner);
                    let routed = moe.top_k * moe.experts.shape.inner;
                    (routed.max(shared), moe.top_k * description.hidden)
                }
            };
            sizes.vectors = sizes.vectors.max(vectors);
            sizes.answers = sizes.answers.max(answers);
        }
        sizes
    }
}

/// Memory of its own, of unspecified contents.
pub fn room(device: &Device, bytes: usize) -> Result<Span, CudaError> {
    let bytes = bytes.max(16);
    device.arena(bytes)?.take(bytes, ALIGN)
}

/// Room for `[tokens, width]`, or parts of it, in groups of 32 and of 256.
fn forms(device: &Device, width: usize) -> Result<[QuantisedSpans; 2], CudaError> {
    let form = |group: usize| {
        let width = width.next_multiple_of(group);
        let arena = device.arena(QuantisedSpans::bytes(group, MOST_TOKENS, width) + 3 * ALIGN)?;
        QuantisedSpans::take(&arena, group, MOST_TOKENS, width)
    };
    Ok([form(32)?, form(256)?])
}

impl Buffers {
    /// For passes over up to [`MOST_TOKENS`] tokens of contexts of up to
    /// `capacity` positions.
    pub fn new(
        model: &GpuModel,
        description: &ModelDescription,
        ropes: &[Rope],
        capacity: usize,
    ) -> Result<Self, CudaError> {
        let device = model.device();
        let sizes = Sizes::of(description, model, capacity);
        let floats = |each: usize| room(device, 4 * MOST_TOKENS * each);
        let hidden = description.hidden;

        let x_bytes = 4 * MOST_TOKENS * hidden;
        let mut end = x_bytes;
        let mut place = |rope: &Rope| {
            let start = end.next_multiple_of(ALIGN);
            end = start + 8 * MOST_TOKENS * rope.half();
            start..end
        };
        let tables: Vec<Range<usize>> = ropes.iter().map(&mut place).collect();
        let inputs = room(device, end)?;

        let mut end = 0;
        let mut ranges = Vec::new();
        for layer in &model.weights.layers {
            let DeviceFeedForward::Moe(moe) = &layer.feed_forward else { continue };
            let each = (4 * MOST_TOKENS * moe.top_k).next_multiple_of(ALIGN);
            ranges.push(end..end + 2 * each);
            end += 2 * each;
        }
        let all_choices = room(device, end)?;
        let chosen = |range: Range<usize>| {
            let half = (range.start + range.end) / 2;
            let (ids, weights) = (range.start..half, half..range.end);
            Chosen { ids: all_choices.part(ids), weights: all_choices.part(weights), range }
        };
        let choices = ranges.into_iter().map(chosen).collect();

        let counters = floats(sizes.counters)?;
        device.compute().fill(&counters, 0)?;
        let scratch = device.arena(RouterScratch::BYTES + ALIGN)?;
        let mixer = sizes.mixer.iter().map(|each| floats(*each));
        let mixer: Vec<Span> = mixer.collect::<Result<_, _>>()?;
        Ok(Self {
            x: inputs.part(0..x_bytes),
            tables: tables.into_iter().map(|range| inputs.part(range)).collect(),
            inputs,
            delta: floats(hidden)?,
            normed: floats(hidden)?,
            normed_forms: forms(device, hidden)?,
            mixer: mixer.try_into().map_err(|_| CudaError::unsupported("mixer buffers"))?,
            mixer_forms: forms(device, sizes.mixer_forms)?,
            attention_scratch: room(device, MOST_TOKENS * sizes.attention_scratch)?,
            counters,
            router_logits: floats(sizes.experts)?,
            router_scratch: RouterScratch::new(&scratch, device.compute())?,
            choices,
            all_choices,
            vectors: floats(sizes.vectors)?,
            answers: floats(sizes.answers)?,
            shared: floats(hidden)?,
            shared_gate: floats(1)?,
            logits: floats(description.vocab)?,
        })
    }
}
