//! Grouped-query attention.

use super::cache::Cells;
use super::rows::{buffer, for_each_row};
use super::{Mixing, project};
use crate::model::description::{AttentionDescription, Mixer, NormKind, QkNorm};
use crate::model::weights::AttentionWeights;
use pregate_kernels::{AttentionCall, contract, ops};

/// `normed` and `out` are `[tokens, hidden]`.
pub fn run(
    mixing: Mixing<'_>,
    mixer: &Mixer,
    weights: &AttentionWeights,
    keys: &mut Cells,
    values: &mut Cells,
    normed: &[f32],
    out: &mut [f32],
) {
    let Mixer::Attention(a) = mixer else { unreachable!("weights and description agree") };
    let (engine, chunk) = (mixing.engine, mixing.chunk);
    let (tokens, d) = (chunk.tokens, a.head_dim);
    let (q_width, kv_width) = (a.heads * d, a.kv_heads * d);
    let [q_store, k_store, v_store, mixed_store, gate_store, raw_store] =
        std::mem::take(mixing.buffers);
    let mut stores = [q_store, k_store, v_store, mixed_store, gate_store, raw_store];
    let [q_store, k_store, v_store, mixed_store, gate_store, raw_store] = &mut stores;

    let q = buffer(q_store, tokens * q_width);
    let k = buffer(k_store, tokens * kv_width);
    let v = buffer(v_store, tokens * kv_width);
    let raw = buffer(raw_store, if a.output_gate { 2 * tokens * q_width } else { 0 });
    let gate = buffer(gate_store, if a.output_gate { tokens * q_width } else { 0 });
    let projections = [&weights.q, &weights.k, &weights.v];
    let target = if a.output_gate { &mut *raw } else { &mut *q };
    project(engine.files, engine.backend, &projections, normed, tokens, &mut [target, k, v]);
    if a.output_gate {
        split_gate(raw, d, q, gate);
    }
    if let Some(limit) = a.clip_qkv {
        for buffer in [&mut *q, &mut *k, &mut *v] {
            buffer.iter_mut().for_each(|value| *value = value.clamp(-limit, limit));
        }
    }
    if let (Some(q_norm), Some(k_norm)) = (&weights.q_norm, &weights.k_norm) {
        let epsilon = match engine.description.norm {
            NormKind::Rms { epsilon } | NormKind::Layer { epsilon } => epsilon,
        };
        let width = |all| if a.qk_norm == QkNorm::Whole { all } else { d };
        norm_heads(&mixing, q, q_width, width(q_width), q_norm, epsilon);
        norm_heads(&mixing, k, kv_width, width(kv_width), k_norm, epsilon);
    }
    mixing.rotate(a.rope, q, d, 0);
    mixing.rotate(a.rope, k, d, 0);
    append(keys, a, chunk.first_position, k);
    append(values, a, chunk.first_position, v);

    let mixed = buffer(mixed_store, tokens * q_width);
    engine.backend.attention(AttentionCall {
        q,
        tokens,
        heads: a.heads,
        kv_heads: a.kv_heads,
        keys: keys.view(d),
        values: values.view(d),
        first_position: chunk.first_position,
        scale: a.scale,
        window: a.window,
        sinks: weights.sinks.as_deref(),
        out: mixed,
    });
    if a.output_gate {
        for (value, gate) in mixed.iter_mut().zip(&*gate) {
            *value *= contract::sigmoid(*gate);
        }
    }
    project(engine.files, engine.backend, &[&weights.output], mixed, tokens, &mut [out]);
    *mixing.buffers = stores;
}

/// Per head the projection holds the query, then its gate.
fn split_gate(raw: &[f32], head_dim: usize, q: &mut [f32], gate: &mut [f32]) {
    let heads = raw.chunks_exact(2 * head_dim);
    let parts = q.chunks_exact_mut(head_dim).zip(gate.chunks_exact_mut(head_dim));
    for (pair, (q, gate)) in heads.zip(parts) {
        q.copy_from_slice(&pair[..head_dim]);
        gate.copy_from_slice(&pair[head_dim..]);
    }
}

fn norm_heads(
    mixing: &Mixing<'_>,
    values: &mut [f32],
    per_token: usize,
    width: usize,
    weight: &[f32],
    epsilon: f32,
) {
    for_each_row(mixing.engine.backend, values, per_token, |_, row| {
        for head in row.chunks_exact_mut(width) {
            ops::rms_norm_in_place(head, weight, epsilon);
        }
    });
}

fn append(cells: &mut Cells, a: &AttentionDescription, first_position: usize, rows: &[f32]) {
    for (token, row) in rows.chunks_exact(a.kv_heads * a.head_dim).enumerate() {
        for (head, values) in row.chunks_exact(a.head_dim).enumerate() {
            cells.write(head, first_position + token, values);
        }
    }
}
