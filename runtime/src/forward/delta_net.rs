//! Gated DeltaNet (2412.06464): a causal convolution, then per value head a
//! memory `S [key_dim, value_dim]` with decay and a delta-rule write:
//! `S = exp(g) S; S += k (beta (v - S^T k))^T; o = S^T q`.

use super::cache::DeltaNetState;
use super::rows::{buffer, for_each_mut, for_each_row};
use super::{Mixing, project};
use crate::model::description::{DeltaNetDescription, HeadOrder, Mixer};
use crate::model::weights::DeltaNetWeights;
use pregate_kernels::contract::{self, sigmoid, softplus};
use pregate_kernels::ops;

/// The published implementations' guard in the key and query normalisation.
pub const L2_EPSILON: f32 = 1e-6;

/// `normed` and `out` are `[tokens, hidden]`.
pub fn run(
    mixing: Mixing<'_>,
    mixer: &Mixer,
    weights: &DeltaNetWeights,
    state: &mut DeltaNetState,
    normed: &[f32],
    out: &mut [f32],
) {
    let Mixer::DeltaNet(d) = mixer else { unreachable!("weights and description agree") };
    let (engine, tokens) = (mixing.engine, mixing.chunk.tokens);
    let (keys, values) = (d.key_heads * d.key_dim, d.value_heads * d.value_dim);
    let channels = 2 * keys + values;
    let mut stores = std::mem::take(mixing.buffers);
    let [raw_store, mixed_store, gate_store, alpha_store, beta_store, heads_store] = &mut stores;

    let raw = buffer(raw_store, tokens * channels);
    let gate = buffer(gate_store, tokens * values);
    let alpha = buffer(alpha_store, tokens * d.value_heads);
    let beta = buffer(beta_store, tokens * d.value_heads);
    let projections = [&weights.qkv, &weights.gate, &weights.alpha, &weights.beta];
    project(
        engine.files,
        engine.backend,
        &projections,
        normed,
        tokens,
        &mut [raw, gate, alpha, beta],
    );
    let mixed = buffer(mixed_store, tokens * channels);
    convolve(&mixing, d, &weights.conv, &mut state.conv, raw, mixed);
    for_each_row(engine.backend, mixed, channels, |_, row| {
        let (q, k) = row[..2 * keys].split_at_mut(keys);
        let scale = (d.key_dim as f32).powf(-0.5);
        for head in q.chunks_exact_mut(d.key_dim) {
            ops::l2_normalise(head, L2_EPSILON);
            head.iter_mut().for_each(|value| *value *= scale);
        }
        for head in k.chunks_exact_mut(d.key_dim) {
            ops::l2_normalise(head, L2_EPSILON);
        }
    });

    // Head-major, so that each head's thread writes one piece.
    let heads = buffer(heads_store, values * tokens);
    let mut work: Vec<(&mut [f32], &mut [f32])> = state
        .memory
        .chunks_exact_mut(d.key_dim * d.value_dim)
        .zip(heads.chunks_exact_mut(tokens * d.value_dim))
        .collect();
    for_each_mut(engine.backend, &mut work, |head, (memory, answers)| {
        let key_head = match d.head_order {
            HeadOrder::Grouped => head / (d.value_heads / d.key_heads),
            HeadOrder::Tiled => head % d.key_heads,
        };
        let mut delta = vec![0.0; d.value_dim];
        for (token, answer) in answers.chunks_exact_mut(d.value_dim).enumerate() {
            let row = &mixed[token * channels..(token + 1) * channels];
            let q = &row[key_head * d.key_dim..(key_head + 1) * d.key_dim];
            let k = &row[keys + key_head * d.key_dim..keys + (key_head + 1) * d.key_dim];
            let v = &row[2 * keys + head * d.value_dim..2 * keys + (head + 1) * d.value_dim];
            let at = token * d.value_heads + head;
            let log_decay = weights.decay[head] * softplus(alpha[at] + weights.decay_bias[head]);
            let strength = sigmoid(beta[at]);
            step(memory, q, k, v, contract::exp(log_decay), strength, &mut delta, answer);
            ops::rms_norm_in_place(answer, &weights.norm, d.norm_epsilon);
            let gate = &gate[token * values + head * d.value_dim..];
            for (value, z) in answer.iter_mut().zip(gate) {
                *value *= z * sigmoid(*z);
            }
        }
    });
    let token_major = buffer(mixed_store, tokens * values);
    for (head, answers) in heads.chunks_exact(tokens * d.value_dim).enumerate() {
        for (token, answer) in answers.chunks_exact(d.value_dim).enumerate() {
            let at = token * values + head * d.value_dim;
            token_major[at..at + d.value_dim].copy_from_slice(answer);
        }
    }
    project(engine.files, engine.backend, &[&weights.output], token_major, tokens, &mut [out]);
    *mixing.buffers = stores;
}

/// One token of one head; `memory` is `[key_dim, value_dim]`.
#[allow(clippy::too_many_arguments)]
fn step(
    memory: &mut [f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    decay: f32,
    strength: f32,
    delta: &mut [f32],
    answer: &mut [f32],
) {
    let width = v.len();
    delta.fill(0.0);
    for (row, k) in memory.chunks_exact_mut(width).zip(k) {
        for (cell, recalled) in row.iter_mut().zip(&mut *delta) {
            *cell *= decay;
            *recalled += *cell * k;
        }
    }
    for (delta, v) in delta.iter_mut().zip(v) {
        *delta = (v - *delta) * strength;
    }
    answer.fill(0.0);
    for ((row, k), q) in memory.chunks_exact_mut(width).zip(k).zip(q) {
        for ((cell, delta), answer) in row.iter_mut().zip(&*delta).zip(&mut *answer) {
            *cell += k * delta;
            *answer += *cell * q;
        }
    }
}

/// Depth-wise causal convolution and SiLU over `raw [tokens, channels]`;
/// `past` keeps the inputs that the next chunk's first outputs need.
fn convolve(
    mixing: &Mixing<'_>,
    d: &DeltaNetDescription,
    taps: &[f32],
    past: &mut [f32],
    raw: &[f32],
    out: &mut [f32],
) {
    let kernel = d.conv_kernel;
    let channels = taps.len() / kernel;
    let tokens = raw.len() / channels;
    let history = kernel - 1;
    let before = &*past;
    for_each_row(mixing.engine.backend, out, channels, |token, row| {
        row.fill(0.0);
        for tap in 0..kernel {
            // Input of time `token + tap - history`.
            let input = match (token + tap).checked_sub(history) {
                Some(time) => &raw[time * channels..(time + 1) * channels],
                None => &before[(token + tap) * channels..(token + tap + 1) * channels],
            };
            for (channel, (value, input)) in row.iter_mut().zip(input).enumerate() {
                *value += taps[channel * kernel + tap] * input;
            }
        }
        row.iter_mut().for_each(|value| *value *= sigmoid(*value));
    });
    if tokens >= history {
        past.copy_from_slice(&raw[(tokens - history) * channels..]);
    } else {
        past.copy_within(tokens * channels.., 0);
        past[(history - tokens) * channels..].copy_from_slice(raw);
    }
}
