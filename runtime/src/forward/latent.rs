//! Multi-head latent attention in its absorbed form: queries are taken into
//! the latent space, the cache keeps one row per position, and values come
//! back out per head.

use super::cache::Cells;
use super::rows::{buffer, for_each_row};
use super::{Mixing, project};
use crate::model::description::{LatentDescription, Mixer, NormKind};
use crate::model::weights::{KeyUp, LatentQuery, LatentWeights};
use pregate_kernels::{AttentionCall, Linear, ops};

/// `normed` and `out` are `[tokens, hidden]`.
pub fn run(
    mixing: Mixing<'_>,
    mixer: &Mixer,
    weights: &LatentWeights,
    rows: &mut Cells,
    normed: &[f32],
    out: &mut [f32],
) {
    let Mixer::Latent(l) = mixer else { unreachable!("weights and description agree") };
    let (engine, chunk) = (mixing.engine, mixing.chunk);
    let tokens = chunk.tokens;
    let epsilon = match engine.description.norm {
        NormKind::Rms { epsilon } | NormKind::Layer { epsilon } => epsilon,
    };
    let mut stores = std::mem::take(mixing.buffers);
    let [q_store, low_store, kv_store, absorbed_store, mixed_store, values_store] = &mut stores;

    let q_head = l.nope_dim + l.rope_dim;
    let q = buffer(q_store, tokens * l.heads * q_head);
    let row_width = l.kv_rank + l.rope_dim;
    let kv = buffer(kv_store, tokens * row_width);
    match &weights.query {
        LatentQuery::Full(full) => {
            let both = [full, &weights.kv_down];
            project(engine.files, engine.backend, &both, normed, tokens, &mut [q, kv]);
        }
        LatentQuery::LowRank { down, norm, up } => {
            let low = buffer(low_store, tokens * norm.len());
            let both = [down, &weights.kv_down];
            project(engine.files, engine.backend, &both, normed, tokens, &mut [low, kv]);
            for_each_row(engine.backend, low, norm.len(), |_, row| {
                ops::rms_norm_in_place(row, norm, epsilon);
            });
            project(engine.files, engine.backend, &[up], low, tokens, &mut [q]);
        }
    }
    for_each_row(engine.backend, kv, row_width, |_, row| {
        ops::rms_norm_in_place(&mut row[..l.kv_rank], &weights.kv_norm, epsilon);
    });
    mixing.rotate(l.rope, q, q_head, l.nope_dim);
    mixing.rotate(l.rope, kv, row_width, l.kv_rank);
    for (token, row) in kv.chunks_exact(row_width).enumerate() {
        rows.write(0, chunk.first_position + token, row);
    }

    let absorbed = buffer(absorbed_store, tokens * l.heads * row_width);
    absorb(&mixing, l, weights, q, absorbed);
    let mixed = buffer(mixed_store, tokens * l.heads * l.kv_rank);
    engine.backend.attention(AttentionCall {
        q: absorbed,
        tokens,
        heads: l.heads,
        kv_heads: 1,
        keys: rows.view(row_width),
        values: rows.view(l.kv_rank),
        first_position: chunk.first_position,
        scale: l.scale,
        window: None,
        sinks: None,
        out: mixed,
    });
    let values = buffer(values_store, tokens * l.heads * l.value_dim);
    for (head, weight) in weights.value_up.iter().enumerate() {
        per_head(
            mixed,
            values,
            (l.heads, head),
            l.kv_rank,
            l.value_dim,
            (0, l.value_dim),
            |x, y| {
                let weight = weight.view(engine.files);
                engine.backend.linear(x, tokens, &mut [Linear { weight, bias: None, out: y }]);
            },
        );
    }
    project(engine.files, engine.backend, &[&weights.output], values, tokens, &mut [out]);
    *mixing.buffers = stores;
}

/// `absorbed = [W_uk^T q_nope | q_rope]` per head.
fn absorb(
    mixing: &Mixing<'_>,
    l: &LatentDescription,
    weights: &LatentWeights,
    q: &[f32],
    absorbed: &mut [f32],
) {
    let (q_head, row_width) = (l.nope_dim + l.rope_dim, l.kv_rank + l.rope_dim);
    for (q, row) in q.chunks_exact(q_head).zip(absorbed.chunks_exact_mut(row_width)) {
        row[l.kv_rank..].copy_from_slice(&q[l.nope_dim..]);
    }
    let (engine, tokens) = (mixing.engine, mixing.chunk.tokens);
    for (head, key_up) in weights.key_up.iter().enumerate() {
        per_head(
            q,
            absorbed,
            (l.heads, head),
            q_head,
            row_width,
            (l.nope_dim, l.kv_rank),
            |x, y| match key_up {
                KeyUp::Rows(weight) => {
                    engine.backend.linear_transposed(x, tokens, weight.view(engine.files), y);
                }
                KeyUp::Transposed(weight) => {
                    let weight = weight.view(engine.files);
                    engine.backend.linear(x, tokens, &mut [Linear { weight, bias: None, out: y }]);
                }
            },
        );
    }
}

/// Gathers the leading elements of one head of every token, maps them, and
/// scatters the answer to the leading elements of that head. `widths` are
/// the heads' sizes in `from` and `to`; `used` how many elements take part
/// (all of `from`'s head where `used.0` is 0).
fn per_head(
    from: &[f32],
    to: &mut [f32],
    (heads, head): (usize, usize),
    from_width: usize,
    to_width: usize,
    used: (usize, usize),
    map: impl FnOnce(&[f32], &mut [f32]),
) {
    let take = if used.0 == 0 { from_width } else { used.0 };
    let x: Vec<f32> = from
        .chunks_exact(heads * from_width)
        .flat_map(|row| &row[head * from_width..head * from_width + take])
        .copied()
        .collect();
    let tokens = from.len() / (heads * from_width);
    let mut y = vec![0.0; tokens * used.1];
    map(&x, &mut y);
    for (row, y) in to.chunks_exact_mut(heads * to_width).zip(y.chunks_exact(used.1)) {
        row[head * to_width..head * to_width + used.1].copy_from_slice(y);
    }
}
