//! Multi-head latent attention in its absorbed form; see [`crate::forward`]'s.

use super::attention::is_long;
use super::pass::{Pass, from_row};
use super::weights::{DeviceKeyUp, DeviceLatent, DeviceQuery};
use crate::model::description::LatentDescription;
use pregate_kernels::cuda::{
    self, Attend, CudaError, DeviceCells, Flash, Gemv, Input, Norm, NormKind, PrepareLatent,
    Strides, attend, flash, prepare_latent,
};

/// Leaves what the block adds in `delta`.
pub fn run(
    pass: &Pass<'_>,
    l: &LatentDescription,
    weights: &DeviceLatent,
    rows: &DeviceCells,
) -> Result<(), CudaError> {
    let [q, low, kv, absorbed, mixed, values] = &pass.buffers.mixer;
    let (device, stream, tokens) = (pass.device(), pass.stream(), pass.tokens);
    let kv_down = &weights.kv_down;
    pass.product(kv_down, tokens, pass.normed(kv_down.weight.format), kv)?;
    match &weights.query {
        DeviceQuery::Full(full) => {
            pass.product(full, tokens, pass.normed(full.weight.format), q)?;
        }
        DeviceQuery::LowRank { down, norm, up } => {
            pass.product(down, tokens, pass.normed(down.weight.format), low)?;
            let width = down.weight.rows;
            let call = Norm {
                kind: NormKind::Rms,
                rows: tokens,
                width,
                x: low,
                x_stride: width,
                delta: None,
                weight: norm,
                epsilon: pass.epsilon(),
                out: Some((low, width)),
                quantised: &[],
            };
            cuda::norm(device, stream, call)?;
            pass.product_of(up, low, q)?;
        }
    }
    let call = PrepareLatent {
        q_raw: q,
        kv_raw: kv,
        kv_norm: &weights.kv_norm,
        epsilon: pass.epsilon(),
        rotation: pass.rotation(l.rope),
        absorbed,
        cells: rows,
        tokens,
        heads: l.heads,
        nope: l.nope_dim,
        rope: l.rope_dim,
        rank: l.kv_rank,
        at: pass.at(0),
    };
    prepare_latent(device, stream, call)?;
    absorb(pass, l, weights)?;
    let latent = DeviceCells { width: l.kv_rank, ..rows.clone() };
    let (row, rank) = (l.kv_rank + l.rope_dim, l.kv_rank);
    if is_long(pass, rows, &latent) {
        let call = Flash {
            q: absorbed,
            tokens,
            heads: l.heads,
            kv_heads: 1,
            keys: rows,
            values: &latent,
            first_position: pass.first_position,
            scale: l.scale,
            window: None,
            sinks: None,
            out: mixed,
        };
        flash(device, stream, &call)?;
    } else {
        for (first, tokens) in pass.pieces() {
            let call = Attend {
                q: &from_row(absorbed, first, l.heads * row),
                tokens,
                heads: l.heads,
                kv_heads: 1,
                keys: rows,
                values: &latent,
                at: pass.at(first),
                scale: l.scale,
                window: None,
                sinks: None,
                gate: None,
                out: &from_row(mixed, first, l.heads * rank),
                scratch: &pass.buffers.attention_scratch,
                counters: &pass.buffers.counters,
                plan: None,
            };
            attend(device, stream, call)?;
        }
    }
    let value_up = &weights.value_up;
    for (first, tokens) in pass.pieces() {
        let x = from_row(mixed, first, l.heads * rank);
        let x = pass.input(value_up.format, &x, (tokens * l.heads, rank), rank)?;
        let out = from_row(values, first, l.heads * l.value_dim);
        let call = Gemv {
            matrices: l.heads,
            x_strides: Strides { token: l.heads * rank, matrix: rank },
            out_strides: Strides { token: l.heads * l.value_dim, matrix: l.value_dim },
            ..Gemv::one(value_up, tokens, x, None, &out)
        };
        cuda::gemv(device, stream, call)?;
    }
    pass.product_of(&weights.output, values, &pass.buffers.delta)
}

/// The leading elements of `absorbed`: `W_uk^T q_nope` per head.
fn absorb(pass: &Pass<'_>, l: &LatentDescription, weights: &DeviceLatent) -> Result<(), CudaError> {
    let [all_q, _, _, all_absorbed, ..] = &pass.buffers.mixer;
    let (device, stream) = (pass.device(), pass.stream());
    let (q_head, row) = (l.nope_dim + l.rope_dim, l.kv_rank + l.rope_dim);
    let out_strides = Strides { token: l.heads * row, matrix: row };
    pass.pieces().try_for_each(|(first, tokens)| {
        let q = from_row(all_q, first, l.heads * q_head);
        let absorbed = from_row(all_absorbed, first, l.heads * row);
        match &weights.key_up {
            DeviceKeyUp::Rows(weight) => {
                let call = Gemv {
                    matrices: l.heads,
                    x_strides: Strides { token: l.heads * q_head, matrix: q_head },
                    out_strides,
                    ..Gemv::one(weight, tokens, Input::Floats(&q), None, &absorbed)
                };
                cuda::transposed(device, stream, call)
            }
            DeviceKeyUp::Transposed(weight) => {
                let x = pass.input(weight.format, &q, (tokens * l.heads, l.nope_dim), q_head)?;
                // Quantised rows stand without the rotary parts between them.
                let width = if matches!(x, Input::Floats(_)) { q_head } else { l.nope_dim };
                let call = Gemv {
                    matrices: l.heads,
                    x_strides: Strides { token: l.heads * width, matrix: width },
                    out_strides,
                    ..Gemv::one(weight, tokens, x, None, &absorbed)
                };
                cuda::gemv(device, stream, call)
            }
        }
    })
}
