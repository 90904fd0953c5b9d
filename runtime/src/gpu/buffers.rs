//! Device memory of a session's passes: one arena, cut once.

use super::delta_net;
use crate::model::description::{FeedForward, Mixer, ModelDescription};
use pregate_kernels::cuda::router::RouterScratch;
use pregate_kernels::cuda::{
    Arena, Attend, CudaError, DeltaPrefill, Device, Groups, QuantisedSpans, Span,
};

/// Tokens that decode's kernels take.
pub const FEW_TOKENS: usize = pregate_kernels::cuda::MOST_TOKENS;
/// Tokens of a pass, at most.
pub const MOST_TOKENS: usize = 2048;

/// Tokens of a pass over a session's prompts.
pub fn pass_tokens(prefill_chunk: usize, capacity: usize) -> usize {
    prefill_chunk.min(capacity).clamp(FEW_TOKENS, MOST_TOKENS)
}
/// Where buffers start.
pub const ALIGN: usize = 256;

/// Every buffer holds what the layer that needs most of it needs.
pub struct Buffers {
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
    /// Of pieces of a pass.
    pub attention_scratch: Span,
    pub delta_scratch: Span,
    /// Zero between launches: of attention, and of gated DeltaNet.
    pub counters: Span,
    /// `[tokens, experts]`
    pub router_logits: Span,
    pub router_scratch: RouterScratch,
    /// `[tokens, k, inner]`
    pub vectors: Span,
    /// `vectors` in groups of 32 and of 256, for more than a few tokens.
    pub vector_forms: [QuantisedSpans; 2],
    /// The other half of `vectors`, where gate and up have different formats.
    pub other_vectors: Span,
    /// A chunk's choices by expert; see
    /// [`pregate_kernels::cuda::router_chunk::ChunkGather`].
    pub sorted: Sorted,
    /// `[tokens, k, hidden]`
    pub answers: Span,
    /// `[tokens, hidden]`
    pub shared: Span,
    /// `[tokens]`
    pub shared_gate: Span,
    /// `[few tokens, vocab]`
    pub logits: Span,
    /// u64 `[experts]`: where a layer's experts are that are there just now.
    pub table: Span,
}

/// The choices of a chunk in the order of their experts.
pub struct Sorted {
    /// i32 `[experts + 1]`
    pub starts: Span,
    /// i32 `[tokens, k]`
    pub token_of: Span,
    pub choice_of: Span,
    pub row_of: Span,
    /// See [`pregate_kernels::cuda::Groups::tiles_bytes`].
    pub tiles: Span,
}

/// What every buffer must hold; counts are of elements of one token.
struct Sizes<'a> {
    description: &'a ModelDescription,
    /// Of a pass.
    tokens: usize,
    mixer: [usize; 6],
    mixer_forms: usize,
    counters: usize,
    /// In bytes.
    attention_scratch: usize,
    experts: usize,
    vectors: usize,
    answers: usize,
    top_k: usize,
    /// In bytes.
    delta_scratch: usize,
}

/// Plain buffers of a session.
const PLAIN: usize = 24;

impl<'a> Sizes<'a> {
    fn of(description: &'a ModelDescription, capacity: usize, tokens: usize) -> Self {
        let mut sizes = Self {
            description,
            tokens,
            mixer: [0; 6],
            // The head's input is one of them.
            mixer_forms: description.hidden,
            counters: 0,
            attention_scratch: 0,
            experts: 0,
            vectors: 0,
            answers: 0,
            top_k: 1,
            delta_scratch: 0,
        };
        for layer in &description.layers {
            sizes.add_mixer(&layer.mixer, capacity);
            let (vectors, answers) = match &layer.feed_forward {
                FeedForward::Dense { inner } => (*inner, 0),
                FeedForward::Moe(moe) => {
                    sizes.experts = sizes.experts.max(moe.experts);
                    sizes.top_k = sizes.top_k.max(moe.top_k);
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
                let scratch = DeltaPrefill::scratch_bytes(&delta_net::shape(d), self.tokens);
                self.delta_scratch = self.delta_scratch.max(scratch);
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

    /// Bytes of the plain buffers, in the order in which `Buffers::new` names
    /// them.
    fn plain(&self) -> [usize; PLAIN] {
        let floats = |each: usize| 4 * self.tokens * each;
        let hidden = floats(self.description.hidden);
        let [a, b, c, d, e, f] = self.mixer.map(floats);
        let choices = self.tokens * self.top_k;
        [
            hidden,
            hidden,
            a,
            b,
            c,
            d,
            e,
            f,
            FEW_TOKENS * self.attention_scratch,
            self.delta_scratch,
            4 * FEW_TOKENS * self.counters,
            floats(self.experts),
            floats(self.vectors),
            floats(self.vectors),
            floats(self.answers),
            hidden,
            floats(1),
            4 * FEW_TOKENS * self.description.vocab,
            8 * self.experts,
            4 * (self.experts + 1),
            4 * choices,
            4 * choices,
            4 * choices,
            Groups::tiles_bytes(self.experts.max(1), choices),
        ]
        .map(|bytes| bytes.max(16))
    }

    /// Widths of the rows that are kept quantised: the stream's, a mixer's, the
    /// vectors of experts.
    fn forms(&self) -> [usize; 3] {
        [self.description.hidden, self.mixer_forms, self.vectors]
    }

    /// Of all buffers.
    fn bytes(&self) -> usize {
        let plain = self.plain().into_iter().map(|bytes| bytes.next_multiple_of(ALIGN));
        let forms = self.forms().into_iter().flat_map(|width| {
            GROUPS.map(|group| {
                let width = width.next_multiple_of(group);
                QuantisedSpans::bytes(group, self.tokens, width).next_multiple_of(ALIGN)
            })
        });
        plain.chain(forms).sum::<usize>() + RouterScratch::BYTES.next_multiple_of(ALIGN)
    }
}

/// Of quantised rows.
const GROUPS: [usize; 2] = [32, 256];

/// Room for `[tokens, width]`, or parts of it, in each of the groups.
fn forms(arena: &Arena, tokens: usize, width: usize) -> Result<[QuantisedSpans; 2], CudaError> {
    let [small, large] = GROUPS
        .map(|group| QuantisedSpans::take(arena, group, tokens, width.next_multiple_of(group)));
    Ok([small?, large?])
}

impl Buffers {
    /// Bytes of a session's buffers for contexts of up to `capacity`
    /// positions and passes of up to `tokens` tokens.
    pub fn bytes(description: &ModelDescription, capacity: usize, tokens: usize) -> usize {
        Sizes::of(description, capacity, tokens).bytes()
    }

    pub fn new(
        device: &Device,
        description: &ModelDescription,
        capacity: usize,
        tokens: usize,
    ) -> Result<Self, CudaError> {
        let sizes = Sizes::of(description, capacity, tokens);
        let arena = device.arena(sizes.bytes())?;
        let spans: Vec<Span> = (sizes.plain().into_iter())
            .map(|bytes| arena.take(bytes, ALIGN))
            .collect::<Result<_, _>>()?;
        let spans: [Span; PLAIN] =
            spans.try_into().map_err(|_| CudaError::unsupported("another number of buffers"))?;
        let [
            delta,
            normed,
            a,
            b,
            c,
            d,
            e,
            f,
            attention_scratch,
            delta_scratch,
            counters,
            router_logits,
            vectors,
            other_vectors,
            answers,
            shared,
            shared_gate,
            logits,
            table,
            starts,
            token_of,
            choice_of,
            row_of,
            tiles,
        ] = spans;
        device.compute().fill(&counters, 0)?;
        Ok(Self {
            normed_forms: forms(&arena, tokens, description.hidden)?,
            mixer_forms: forms(&arena, tokens, sizes.mixer_forms)?,
            vector_forms: forms(&arena, tokens, sizes.vectors)?,
            sorted: Sorted { starts, token_of, choice_of, row_of, tiles },
            router_scratch: RouterScratch::new(&arena, device.compute())?,
            mixer: [a, b, c, d, e, f],
            delta,
            normed,
            attention_scratch,
            delta_scratch,
            counters,
            router_logits,
            vectors,
            other_vectors,
            answers,
            shared,
            shared_gate,
            logits,
            table,
        })
    }
}
