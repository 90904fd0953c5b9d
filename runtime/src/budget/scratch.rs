//! What a forward pass keeps besides weights and KV cache: the session's
//! buffers and those of the CPU backend. An upper bound that follows the
//! code in `forward/` and `kernels/src/cpu/` buffer by buffer;
//! `tests/scratch_memory.rs` holds it against real sessions.

use crate::model::description::{FeedForward, Mixer, ModelDescription};
use crate::model::weights::{
    FeedForwardWeights, GatedBlock, KeyUp, LatentQuery, MixerWeights, ModelWeights, Place, Weight,
};
use pregate_kernels::{ActivationKind, Format};

/// The largest pass of a session.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    /// Tokens that go through the model together.
    pub tokens: usize,
    /// Logits of so many of them are asked for.
    pub logit_rows: usize,
    /// Positions of the session.
    pub context: usize,
    /// Threads that compute.
    pub threads: usize,
}

/// Tokens of a packed tile (`Kernels::tile_shape`).
const TILE_TOKENS: usize = 8;
/// Rows that a batch unpacks at a time.
const PANEL_ROWS: usize = 16;
/// Rows of the largest unit of a batch (`Cpu::cut`).
const UNIT_ROWS: usize = 256;
/// Queries and positions that attention works on at a time.
const QUERIES: usize = 16;
const POSITIONS: usize = 256;
const F32: usize = 4;

/// Bytes of everything that a pass of `chunk` allocates.
pub fn scratch_bytes(description: &ModelDescription, weights: &ModelWeights, chunk: Chunk) -> u64 {
    let chunk = Chunk { logit_rows: chunk.logit_rows.min(chunk.tokens), ..chunk };
    let mut sum = Sum::default();
    session(description, weights, chunk, &mut sum);
    backend(description, weights, chunk, &mut sum);
    sum.0
}

#[derive(Default)]
struct Sum(u64);

impl Sum {
    /// Adds a product that may be too large for any machine.
    fn add(&mut self, factors: &[usize]) {
        self.0 = self.0.saturating_add(product(factors));
    }
}

fn product(factors: &[usize]) -> u64 {
    factors.iter().fold(1, |product, factor| product.saturating_mul(*factor as u64))
}

/// `forward::Scratch`, and what one pass makes and drops.
fn session(description: &ModelDescription, weights: &ModelWeights, chunk: Chunk, sum: &mut Sum) {
    let Chunk { tokens, logit_rows, .. } = chunk;
    let hidden = description.hidden;
    // Residual stream, normalised input, what a block adds.
    sum.add(&[3, tokens, hidden, F32]);
    sum.add(&[logit_rows, description.vocab, F32]);
    for rope in &description.ropes {
        sum.add(&[tokens, rope.dim / 2, 2 * F32]);
    }
    let mut mixers = [0; 6];
    let mut temporary = 0;
    for (layer, weights) in description.layers.iter().zip(&weights.layers) {
        let widths = mixer_widths(&layer.mixer, &weights.mixer);
        mixers.iter_mut().zip(widths).for_each(|(most, width)| *most = width.max(*most));
        match &layer.mixer {
            // One head of all tokens, gathered and mapped.
            Mixer::Latent(l) => {
                temporary = temporary.max(l.nope_dim.max(l.kv_rank) + l.kv_rank.max(l.value_dim));
            }
            // The inputs that the convolution remembers, beside the KV cache.
            Mixer::DeltaNet(d) => {
                let channels = 2 * d.key_heads * d.key_dim + d.value_heads * d.value_dim;
                sum.add(&[d.conv_kernel, channels, F32]);
            }
            Mixer::Attention(_) => {}
        }
    }
    sum.add(&[mixers.iter().sum::<usize>() + temporary, tokens, F32]);
    // Router logits, choices and their lists, states.
    let widest = |of: fn(&crate::model::description::MoeDescription) -> usize| {
        description.moe_layers().map(|(_, moe)| of(moe)).max().unwrap_or(0)
    };
    sum.add(&[tokens, widest(|moe| moe.experts) * F32 + widest(|moe| moe.top_k) * 16 + 64]);
    if description.moe_layers().any(|(_, moe)| moe.shared.is_some()) {
        sum.add(&[tokens, hidden + 1, F32]);
    }
    // Groups of rows that are shared out to the threads.
    sum.add(&[tokens, 64]);
}

/// Elements per token of the six buffers that the mixers share.
fn mixer_widths(mixer: &Mixer, weights: &MixerWeights) -> [usize; 6] {
    match mixer {
        Mixer::Attention(a) => {
            let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
            let gate = if a.output_gate { q } else { 0 };
            [q, kv, kv, q, gate, 2 * gate]
        }
        Mixer::Latent(l) => {
            let low = match weights {
                MixerWeights::Latent(w) => match &w.query {
                    LatentQuery::Full(_) => 0,
                    LatentQuery::LowRank { norm, .. } => norm.len(),
                },
                _ => 0,
            };
            let row = l.kv_rank + l.rope_dim;
            let q = l.heads * (l.nope_dim + l.rope_dim);
            [q, low, row, l.heads * row, l.heads * l.kv_rank, l.heads * l.value_dim]
        }
        Mixer::DeltaNet(d) => {
            let values = d.value_heads * d.value_dim;
            let channels = 2 * d.key_heads * d.key_dim + values;
            [channels, channels, values, d.value_heads, d.value_heads, values]
        }
    }
}

/// `Cpu`'s workspace and its threads' buffers.
fn backend(description: &ModelDescription, weights: &ModelWeights, chunk: Chunk, sum: &mut Sum) {
    let Chunk { tokens, logit_rows, context, threads } = chunk;
    let hidden = description.hidden;
    let mut linear = Prepared::default();
    let mut routed = Routed::default();
    let (mut attention, mut worker) = (0, 0);
    linear.call(logit_rows, &[&weights.head.weight]);
    for (layer, weights) in description.layers.iter().zip(&weights.layers) {
        mixer_calls(&weights.mixer, tokens, &mut linear);
        let (heads, key_width, value_width) = match &layer.mixer {
            Mixer::Attention(a) => (a.heads, a.head_dim, a.head_dim),
            Mixer::Latent(l) => (l.heads, l.kv_rank + l.rope_dim, l.kv_rank),
            Mixer::DeltaNet(_) => (0, 0, 0),
        };
        // One token's chunks of positions, or bounds of many tokens' rows.
        let by_position =
            product(&[context.div_ceil(POSITIONS), heads.max(QUERIES), value_width + 2, F32]);
        attention = attention.max(by_position.max(product(&[tokens, heads, 16])));
        worker = worker.max(product(&[QUERIES, key_width + POSITIONS + 3 * value_width, F32]));
        match (&weights.feed_forward, &layer.feed_forward) {
            (FeedForwardWeights::Moe(moe), FeedForward::Moe(m)) => {
                linear.call(tokens, &[&moe.router.weight]);
                if let Some(gate) = &moe.shared_gate {
                    linear.call(tokens, &[gate]);
                }
                routed.experts(tokens, m.top_k, hidden, &moe.experts);
                if let Some(shared) = &moe.shared {
                    routed.dense(tokens, shared);
                }
            }
            (FeedForwardWeights::Dense(block), _) => routed.dense(tokens, block),
            _ => {}
        }
    }
    let widest = linear.cols.max(routed.input.cols).max(routed.inner.cols);
    let built_rows = if has_odd_storage(weights) { 2 * POSITIONS } else { 1 };
    let per_worker = worker
        .saturating_add(product(&[widest, 2 * PANEL_ROWS + built_rows + F32]))
        .saturating_add(product(&[tokens.max(PANEL_ROWS), UNIT_ROWS, F32]))
        .saturating_add(8192);
    sum.0 = [
        linear.bytes(tokens),
        routed.bytes(),
        attention,
        per_worker.saturating_mul(threads as u64),
    ]
    .into_iter()
    .fold(sum.0, u64::saturating_add);
}

/// The calls of `Backend::linear` that a mixer makes.
fn mixer_calls(weights: &MixerWeights, tokens: usize, linear: &mut Prepared) {
    match weights {
        MixerWeights::Attention(w) => {
            linear.call(tokens, &[&w.q.weight, &w.k.weight, &w.v.weight]);
            linear.call(tokens, &[&w.output.weight]);
        }
        MixerWeights::Latent(w) => {
            match &w.query {
                LatentQuery::Full(q) => linear.call(tokens, &[&q.weight, &w.kv_down.weight]),
                LatentQuery::LowRank { down, up, .. } => {
                    linear.call(tokens, &[&down.weight, &w.kv_down.weight]);
                    linear.call(tokens, &[&up.weight]);
                }
            }
            for key in &w.key_up {
                if let KeyUp::Transposed(weight) = key {
                    linear.call(tokens, &[weight]);
                }
            }
            w.value_up.iter().for_each(|weight| linear.call(tokens, &[weight]));
            linear.call(tokens, &[&w.output.weight]);
        }
        MixerWeights::DeltaNet(w) => {
            let inputs = [&w.qkv, &w.gate, &w.alpha, &w.beta].map(|p| &p.weight);
            linear.call(tokens, &inputs);
            linear.call(tokens, &[&w.output.weight]);
        }
    }
}

/// Experts whose rows are rebuilt before they are used.
fn has_odd_storage(weights: &ModelWeights) -> bool {
    let odd = |weight: &Weight| !matches!(weight.place, Place::Rows { .. });
    weights.layers.iter().any(|layer| match &layer.feed_forward {
        FeedForwardWeights::Moe(moe) => moe.experts.first().is_some_and(|e| odd(&e.gate.weight)),
        FeedForwardWeights::Dense(_) => false,
    })
}

/// Bytes of one token's activations: as floats, and as int8 in two orders
/// with scales and sums.
fn activation_bytes(format: Format, cols: usize) -> [u64; 2] {
    match format.activation() {
        ActivationKind::F32 => [product(&[cols, F32]), 0],
        _ => [0, product(&[2, cols.next_multiple_of(256)]) + (cols / 32 * 10) as u64],
    }
}

/// The same in a packed tile: int8, sums and scales.
fn tile_bytes(format: Format, cols: usize) -> [u64; 2] {
    match format.activation() {
        ActivationKind::F32 => [product(&[cols, F32]), 0],
        _ => [0, (cols + cols / 2) as u64],
    }
}

/// Inputs in every layout that calls want: the backend's buffers grow to the
/// largest call and stay.
#[derive(Default)]
struct Prepared {
    /// Per distinct format of a call, bytes as floats and as int8.
    sets: Vec<[u64; 2]>,
    /// Bytes of one token in a tile.
    tile: [u64; 2],
    /// Distinct formats of a call.
    formats: usize,
    cols: usize,
}

impl Prepared {
    fn call(&mut self, tokens: usize, matrices: &[&Weight]) {
        let Some(cols) = matrices.iter().map(|weight| weight.cols).max() else { return };
        self.cols = self.cols.max(cols);
        let mut formats: Vec<Format> = Vec::new();
        for weight in matrices {
            if !formats.contains(&weight.format) {
                formats.push(weight.format);
            }
        }
        self.formats = self.formats.max(formats.len());
        self.sets.resize(self.sets.len().max(formats.len()), [0; 2]);
        for (set, format) in self.sets.iter_mut().zip(formats) {
            for (most, bytes) in set.iter_mut().zip(activation_bytes(format, cols)) {
                *most = bytes.saturating_mul(tokens as u64).max(*most);
            }
            for (most, bytes) in self.tile.iter_mut().zip(tile_bytes(format, cols)) {
                *most = bytes.max(*most);
            }
        }
    }

    fn set_bytes(&self) -> u64 {
        self.sets.iter().flatten().copied().fold(0, u64::saturating_add)
    }

    /// With tiles of all tokens.
    fn bytes(&self, tokens: usize) -> u64 {
        let tiled = product(&[self.formats, tokens.next_multiple_of(TILE_TOKENS)]);
        let tile = self.tile[0] + self.tile[1];
        self.set_bytes().saturating_add(tiled.saturating_mul(tile))
    }
}

/// Buffers of routed experts and dense blocks.
#[derive(Default)]
struct Routed {
    input: Prepared,
    inner: Prepared,
    /// Most elements of the rows between the matrices, and of the answers.
    hidden: u64,
    answers: u64,
    /// Most tokens in tiles.
    tiled: u64,
    lists: u64,
}

impl Routed {
    fn experts(&mut self, tokens: usize, top_k: usize, hidden: usize, experts: &[GatedBlock]) {
        let Some(first) = experts.first() else { return };
        let rows = tokens.saturating_mul(top_k);
        self.input.call(tokens, &[&first.gate.weight, &first.up.weight]);
        self.inner.call(rows, &[&first.down.weight]);
        self.hidden = self.hidden.max(product(&[rows, first.gate.weight.rows, F32]));
        self.answers = self.answers.max(product(&[rows, hidden, F32]));
        // Every expert's last tile may be padded.
        let groups = experts.len().min(rows);
        self.tiled = self.tiled.max(product(&[rows + groups / 2 * TILE_TOKENS]));
        self.lists = self.lists.max(product(&[rows, 64]) + product(&[groups, 1024]));
    }

    fn dense(&mut self, tokens: usize, block: &GatedBlock) {
        self.input.call(tokens, &[&block.gate.weight, &block.up.weight]);
        self.inner.call(tokens, &[&block.down.weight]);
        self.hidden = self.hidden.max(product(&[tokens, block.gate.weight.rows, F32]));
        self.tiled = self.tiled.max(product(&[tokens.next_multiple_of(TILE_TOKENS)]));
    }

    fn bytes(&self) -> u64 {
        // One set of tiles serves both passes.
        let tile = |i: usize| self.input.tile[i].max(self.inner.tile[i]);
        let formats = self.input.formats.max(1) as u64;
        let tiles = self.tiled.saturating_mul(tile(0) + tile(1)).saturating_mul(formats);
        [
            self.input.set_bytes(),
            self.inner.set_bytes(),
            tiles,
            self.hidden,
            self.answers,
            self.lists,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }
}
