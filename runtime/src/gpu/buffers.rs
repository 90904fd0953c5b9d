//! Device memory of a session's passes: one arena, cut once.

use crate::model::description::{FeedForward, Mixer, ModelDescription, MoeDescription};
use pregate_kernels::cuda::router::RouterScratch;
use pregate_kernels::cuda::{Arena, Attend, CudaError, Device, QuantisedSpans, Span};
use std::ops::Range;

/// Tokens of a pass.
pub const MOST_TOKENS: usize = pregate_kernels::cuda::MOST_TOKENS;
/// Where buffers start.
pub const ALIGN: usize = 256;

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

/// What every buffer must hold; counts are of elements of one token.
struct Sizes<'a> {
    description: &'a ModelDescription,
    /// Pairs of each rope.
    halves: Vec<usize>,
    mixer: [usize; 6],
    mixer_forms: usize,
    counters: usize,
    /// In bytes.
    attention_scratch: usize,
    experts: usize,
    vectors: usize,
    answers: usize,
}

/// Plain buffers of a session.
const PLAIN: usize = 18;

impl<'a> Sizes<'a> {
    fn of(description: &'a ModelDescription, capacity: usize) -> Self {
        let mut sizes = Self {
            description,
            halves: description.ropes.iter().map(|rope| rope.dim / 2).collect(),
            mixer: [0; 6],
            mixer_forms: 0,
            counters: 0,
            attention_scratch: 0,
            experts: 0,
            vectors: 0,
            answers: 0,
        };
        for layer in &description.layers {
            sizes.add_mixer(&layer.mixer, capacity);
            let (vectors, answers) = match &layer.feed_forward {
                FeedForward::Dense { inner } => (*inner, 0),
                FeedForward::Moe(moe) => {
                    sizes.experts = sizes.experts.max(moe.experts);
                    let shared = moe.shared.map_or(0, |shared| shared.inner);
                    ((moe.top_k * moe.inner).max(shared), moe.top_k * description.hidden)
                }
            };
            sizes.vectors = sizes.vectors.max(vectors);
            sizes.answers = sizes.answers.max(answers);
        }
        sizes
    }

    fn add_mixer(&mut self, mixer: &Mixer, capacity: usize) {
        let (counts, forms) = match mixer {
            Mixer::Attention(a) => {
                let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
                let raw = if a.output_gate { 2 * q } else { q };
                self.attention(a.heads, a.head_dim, capacity);
                ([raw, kv, kv, q, q, 0], q)
            }
            Mixer::Latent(l) => {
                let (low, row) = (l.q_rank.unwrap_or(0), l.kv_rank + l.rope_dim);
                let (q, rank) = (l.heads * (l.nope_dim + l.rope_dim), l.heads * l.kv_rank);
                let values = l.heads * l.value_dim;
                self.attention(l.heads, l.kv_rank, capacity);
                let forms = low.max(rank).max(values).max(l.heads * l.nope_dim);
                ([q, low, row, l.heads * row, rank, values], forms)
            }
            Mixer::DeltaNet(d) => {
                let (heads, values) = (d.value_heads, d.value_heads * d.value_dim);
                let channels = 2 * d.key_heads * d.key_dim + values;
                self.counters = self.counters.max(heads);
                ([channels, channels, values, heads, heads, values], values)
            }
        };
        for (most, count) in self.mixer.iter_mut().zip(counts) {
            *most = (*most).max(count);
        }
        self.mixer_forms = self.mixer_forms.max(forms);
    }

    fn attention(&mut self, heads: usize, value_width: usize, capacity: usize) {
        let scratch = Attend::scratch_bytes(1, heads, value_width, capacity);
        self.attention_scratch = self.attention_scratch.max(scratch);
        self.counters = self.counters.max(heads);
    }

    /// Where the stream and each rope's table are in [`Buffers::inputs`].
    fn inputs(&self) -> (Range<usize>, Vec<Range<usize>>) {
        let x = 0..4 * MOST_TOKENS * self.description.hidden;
        let mut end = x.end;
        let table = |half: &usize| {
            let start = end.next_multiple_of(ALIGN);
            end = start + 8 * MOST_TOKENS * half;
            start..end
        };
        let tables = self.halves.iter().map(table).collect();
        (x, tables)
    }

    /// Where each MoE layer's ids and weights are in
    /// [`Buffers::all_choices`].
    fn choices(&self) -> Vec<Range<usize>> {
        let mut end = 0;
        let range = |(_, moe): (usize, &MoeDescription)| {
            let start = end;
            end += 2 * (4 * MOST_TOKENS * moe.top_k).next_multiple_of(ALIGN);
            start..end
        };
        self.description.moe_layers().map(range).collect()
    }

    /// Bytes of the plain buffers, in the order in which `Buffers::new` names
    /// them.
    fn plain(&self) -> [usize; PLAIN] {
        let (x, tables) = self.inputs();
        let floats = |each: usize| 4 * MOST_TOKENS * each;
        let hidden = floats(self.description.hidden);
        let [a, b, c, d, e, f] = self.mixer.map(floats);
        [
            tables.last().map_or(x.end, |table| table.end),
            self.choices().last().map_or(0, |range| range.end),
            hidden,
            hidden,
            a,
            b,
            c,
            d,
            e,
            f,
            MOST_TOKENS * self.attention_scratch,
            floats(self.counters),
            floats(self.experts),
            floats(self.vectors),
            floats(self.answers),
            hidden,
            floats(1),
            floats(self.description.vocab),
        ]
        .map(|bytes| bytes.max(16))
    }

    /// Widths of the rows that are kept quantised.
    fn forms(&self) -> [usize; 2] {
        [self.description.hidden, self.mixer_forms]
    }

    /// Of all buffers.
    fn bytes(&self) -> usize {
        let plain = self.plain().into_iter().map(|bytes| bytes.next_multiple_of(ALIGN));
        let forms = self.forms().into_iter().flat_map(|width| {
            GROUPS.map(|group| {
                let width = width.next_multiple_of(group);
                QuantisedSpans::bytes(group, MOST_TOKENS, width).next_multiple_of(ALIGN)
            })
        });
        plain.chain(forms).sum::<usize>() + RouterScratch::BYTES.next_multiple_of(ALIGN)
    }
}

/// Of quantised rows.
const GROUPS: [usize; 2] = [32, 256];

/// Room for `[tokens, width]`, or parts of it, in each of the groups.
fn forms(arena: &Arena, width: usize) -> Result<[QuantisedSpans; 2], CudaError> {
    let [small, large] = GROUPS.map(|group| {
        QuantisedSpans::take(arena, group, MOST_TOKENS, width.next_multiple_of(group))
    });
    Ok([small?, large?])
}

impl Buffers {
    /// Bytes of a session's buffers for contexts of up to `capacity`
    /// positions.
    pub fn bytes(description: &ModelDescription, capacity: usize) -> usize {
        Sizes::of(description, capacity).bytes()
    }

    /// For passes over up to [`MOST_TOKENS`] tokens.
    pub fn new(
        device: &Device,
        description: &ModelDescription,
        capacity: usize,
    ) -> Result<Self, CudaError> {
        let sizes = Sizes::of(description, capacity);
        let arena = device.arena(sizes.bytes())?;
        let spans: Vec<Span> = (sizes.plain().into_iter())
            .map(|bytes| arena.take(bytes, ALIGN))
            .collect::<Result<_, _>>()?;
        let spans: [Span; PLAIN] =
            spans.try_into().map_err(|_| CudaError::unsupported("another number of buffers"))?;
        let [
            inputs,
            all_choices,
            delta,
            normed,
            a,
            b,
            c,
            d,
            e,
            f,
            attention_scratch,
            counters,
            router_logits,
            vectors,
            answers,
            shared,
            shared_gate,
            logits,
        ] = spans;
        device.compute().fill(&counters, 0)?;
        let (x, tables) = sizes.inputs();
        let chosen = |range: Range<usize>| {
            let half = (range.start + range.end) / 2;
            let (ids, weights) = (range.start..half, half..range.end);
            Chosen { ids: all_choices.part(ids), weights: all_choices.part(weights), range }
        };
        Ok(Self {
            x: inputs.part(x),
            tables: tables.into_iter().map(|range| inputs.part(range)).collect(),
            choices: sizes.choices().into_iter().map(chosen).collect(),
            normed_forms: forms(&arena, description.hidden)?,
            mixer_forms: forms(&arena, sizes.mixer_forms)?,
            router_scratch: RouterScratch::new(&arena, device.compute())?,
            mixer: [a, b, c, d, e, f],
            inputs,
            delta,
            normed,
            attention_scratch,
            counters,
            router_logits,
            all_choices,
            vectors,
            answers,
            shared,
            shared_gate,
            logits,
        })
    }
}
