//! The forward pass: token ids in, logits out, layer after layer. It reads
//! the model's description and knows no architecture by name.

mod attention;
pub mod cache;
mod delta_net;
mod feed_forward;
mod latent;
mod meter;
mod rows;
mod streamed;

use crate::error::{Error, Result};
use crate::files::ModelFiles;
use crate::model::description::{ModelDescription, NormKind};
use crate::model::rope::Rope;
use crate::model::weights::{MixerWeights, ModelWeights, Norm, Projection};
use crate::session::Cancel;
use crate::store::{ExpertStore, PassInfo};
use cache::{Cache, LayerCache};
pub(crate) use delta_net::L2_EPSILON;
use feed_forward::Companions;
pub use meter::{Meter, Work};
use pregate_kernels::{Backend, Linear, dequantize_row, ops};
use pregate_predictor::Observer;
use rows::{add_scaled, buffer, for_each_row};

/// What a pass computes with.
#[derive(Clone, Copy)]
pub struct Engine<'a> {
    pub files: &'a ModelFiles,
    pub description: &'a ModelDescription,
    pub weights: &'a ModelWeights,
    pub backend: &'a dyn Backend,
    /// Where routed experts come from, if they are not all in memory.
    pub store: Option<&'a ExpertStore>,
}

/// Buffers that live as long as a session, so that decoding allocates
/// nothing large.
#[derive(Default)]
pub struct Scratch {
    /// Residual stream, `[tokens, hidden]`
    x: Vec<f32>,
    /// Normalised input of a block, `[tokens, hidden]`
    normed: Vec<f32>,
    /// What a block adds, `[tokens, hidden]`
    delta: Vec<f32>,
    logits: Vec<f32>,
    /// `[cos, sin]` per rope, position and pair
    rope_tables: Vec<Vec<[f32; 2]>>,
    mixer: [Vec<f32>; 6],
    feed_forward: feed_forward::Scratch,
}

impl Scratch {
    /// The logits of the last pass that wanted any.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }
}

/// The tokens of one pass and where they stand.
#[derive(Clone, Copy)]
struct Chunk {
    tokens: usize,
    first_position: usize,
}

/// What a pass is asked for.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// Every id is below the vocabulary's size.
    pub ids: &'a [u32],
    /// Of the first id; all positions fit the cache.
    pub first_position: usize,
    /// Logits of so many of the last ids.
    pub wanted: usize,
    /// A number of the session's own.
    pub session: u64,
}

/// Runs a pass and leaves its logits, `[wanted, vocab]`, in the scratch. A
/// failed or cancelled pass leaves the cache behind `first_position`, and
/// the state of recurrent layers, undefined.
pub fn forward(
    engine: Engine<'_>,
    ropes: &[Rope],
    cache: &mut Cache,
    scratch: &mut Scratch,
    pass: Pass<'_>,
    observer: &mut dyn Observer,
    cancel: &Cancel,
) -> Result<()> {
    let Engine { files, description, weights, backend, store } = engine;
    let Pass { ids, first_position, wanted, session } = pass;
    let is_start = first_position == 0;
    let pass = PassInfo { ids, session, is_start, keeps_ahead: false };
    let _turn = store.map(|store| store.begin_pass(pass, cancel)).transpose()?;
    let mut meter = Meter::start(store);
    let hidden = description.hidden;
    let chunk = Chunk { tokens: ids.len(), first_position };
    scratch.rope_tables.resize_with(ropes.len(), Vec::new);
    for (rope, table) in ropes.iter().zip(&mut scratch.rope_tables) {
        rope.fill(first_position, chunk.tokens, table);
    }

    let x = buffer(&mut scratch.x, chunk.tokens * hidden);
    embed(engine, ids, x)?;
    let normed = buffer(&mut scratch.normed, chunk.tokens * hidden);
    let delta = buffer(&mut scratch.delta, chunk.tokens * hidden);
    scratch.feed_forward.start(chunk.tokens);
    for (index, layer) in weights.layers.iter().enumerate() {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if chunk.tokens == 1 {
            let buffers = &mut scratch.feed_forward.streamed;
            streamed::foresee_own(engine, chunk, index, x, buffers, &mut meter);
        }
        norm_rows(engine, &layer.mixer_norm, x, normed);
        let mixing = Mixing {
            engine,
            chunk,
            ropes,
            tables: &scratch.rope_tables,
            buffers: &mut scratch.mixer,
        };
        match (&layer.mixer, &mut cache.layers[index], &description.layers[index].mixer) {
            (MixerWeights::Attention(w), LayerCache::Attention { keys, values }, mixer) => {
                attention::run(mixing, mixer, w, keys, values, normed, delta);
            }
            (MixerWeights::Latent(w), LayerCache::Latent { rows }, mixer) => {
                latent::run(mixing, mixer, w, rows, normed, delta);
            }
            (MixerWeights::DeltaNet(w), LayerCache::DeltaNet(state), mixer) => {
                delta_net::run(mixing, mixer, w, state, normed, delta);
            }
            _ => unreachable!("cache and weights are made from one description"),
        }
        add_scaled(backend, x, delta, hidden, description.residual_scale);

        norm_rows(engine, &layer.feed_forward_norm, x, normed);
        feed_forward::run(
            engine,
            chunk,
            index,
            &layer.feed_forward,
            &mut scratch.feed_forward,
            x,
            normed,
            delta,
            &mut Companions { observer, cancel, meter: &mut meter },
        )?;
        add_scaled(backend, x, delta, hidden, description.residual_scale);
    }

    if wanted == 0 {
        meter.finish();
        return Ok(());
    }
    let from = (chunk.tokens - wanted) * hidden;
    norm_rows(engine, &weights.final_norm, &x[from..], &mut normed[from..]);
    let logits = buffer(&mut scratch.logits, wanted * description.vocab);
    project(files, backend, &[&weights.head], &normed[from..], wanted, &mut [&mut *logits]);
    if description.logit_scale != 1.0 {
        logits.iter_mut().for_each(|logit| *logit *= description.logit_scale);
    }
    meter.finish();
    check_finite(logits, description.vocab, first_position + chunk.tokens - wanted)
}

/// What the mixers share.
struct Mixing<'a> {
    engine: Engine<'a>,
    chunk: Chunk,
    ropes: &'a [Rope],
    tables: &'a [Vec<[f32; 2]>],
    buffers: &'a mut [Vec<f32>; 6],
}

impl Mixing<'_> {
    /// Rotates the `width`-wide heads of every token; `heads` is
    /// `[tokens, n * width]`, and of each head the elements from `skip` on
    /// are rotated.
    fn rotate(&self, rope: usize, values: &mut [f32], width: usize, skip: usize) {
        let (rope, table) = (&self.ropes[rope], &self.tables[rope]);
        let half = rope.half();
        let per_token = values.len() / self.chunk.tokens;
        for_each_row(self.engine.backend, values, per_token, |token, row| {
            let angles = &table[token * half..(token + 1) * half];
            for head in row.chunks_exact_mut(width) {
                rope.rotate(angles, &mut head[skip..]);
            }
        });
    }
}

/// The rows of the embedding, `[tokens, hidden]`.
pub fn embed(engine: Engine<'_>, ids: &[u32], x: &mut [f32]) -> Result<()> {
    let embedding = &engine.weights.embedding;
    let mut scratch = Vec::new();
    for (id, row) in ids.iter().zip(x.chunks_exact_mut(engine.description.hidden)) {
        let bytes = embedding.read_row(engine.files, *id as usize, &mut scratch)?;
        dequantize_row(embedding.format(), bytes, row);
        if engine.description.embedding_scale != 1.0 {
            row.iter_mut().for_each(|value| *value *= engine.description.embedding_scale);
        }
    }
    Ok(())
}

fn norm_rows(engine: Engine<'_>, norm: &Norm, x: &[f32], out: &mut [f32]) {
    let width = engine.description.hidden;
    for_each_row(engine.backend, out, width, |row, out| {
        let x = &x[row * width..(row + 1) * width];
        match engine.description.norm {
            NormKind::Rms { epsilon } => ops::rms_norm(x, &norm.weight, epsilon, out),
            NormKind::Layer { epsilon } => {
                ops::layer_norm(x, &norm.weight, norm.bias.as_deref(), epsilon, out);
            }
        }
    });
}

/// Several projections of one input; `outs[i]` is `[tokens, rows_i]`.
fn project<const N: usize>(
    files: &ModelFiles,
    backend: &dyn Backend,
    projections: &[&Projection; N],
    x: &[f32],
    tokens: usize,
    outs: &mut [&mut [f32]; N],
) {
    let mut outs = outs.iter_mut();
    let mut jobs: [Linear<'_>; N] = std::array::from_fn(|i| Linear {
        weight: projections[i].weight.view(files),
        bias: projections[i].bias.as_deref(),
        out: outs.next().expect("as many outputs as projections"),
    });
    backend.linear(x, tokens, &mut jobs);
}

/// Refuses logits, `[tokens, vocab]`, that are no numbers.
pub fn check_finite(logits: &[f32], vocab: usize, first_position: usize) -> Result<()> {
    match logits.iter().position(|logit| !logit.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::NotFinite {
            position: first_position + index / vocab,
            found: if logits[index].is_nan() { "NaN" } else { "infinite" },
        }),
    }
}
