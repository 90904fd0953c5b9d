//! Multi-head latent attention in its absorbed form; see [`crate::forward`]'s.

use super::pass::Pass;
use super::weights::{DeviceKeyUp, DeviceLatent, DeviceQuery};
use crate::model::description::LatentDescription;
use pregate_kernels::cuda::{
    self, Attend, CudaError, DeviceCells, Gemv, Input, Norm, NormKind, PrepareLatent, Strides,
    attend, prepare_latent,
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
        first_position: pass.first_position,
    };
    prepare_latent(device, stream, call)?;
    absorb(pass, l, weights)?;
    let latent = DeviceCells { width: l.kv_rank, ..rows.clone() };
    let call = Attend {
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
        gate: None,
        out: mixed,
        scratch: &pass.buffers.attention_scratch,
        counters: &pass.buffers.counters,
        plan: None,
    };
    attend(device, stream, call)?;
    let value_up = &weights.value_up;
    let x = pass.input(value_up.format, mixed, (tokens * l.heads, l.kv_rank), l.kv_rank)?;
    let call = Gemv {
        matrices: l.heads,
        x_strides: Strides { token: l.heads * l.kv_rank, matrix: l.kv_rank },
        out_strides: Strides { token: l.heads * l.value_dim, matrix: l.value_dim },
        ..Gemv::one(value_up, tokens, x, None, values)
    };
    cuda::gemv(device, stream, call)?;
    pass.product_of(&weights.output, values, &pass.buffers.delta)
}

/// The leading elements of `absorbed`: `W_uk^T q_nope` per head.
fn absorb(pass: &Pass<'_>, l: &LatentDescription, weights: &DeviceLatent) -> Result<(), CudaError> {
    let [q, _, _, absorbed, ..] = &pass.buffers.mixer;
    let (device, stream, tokens) = (pass.device(), pass.stream(), pass.tokens);
    let (q_head, row) = (l.nope_dim + l.rope_dim, l.kv_rank + l.rope_dim);
    let out_strides = Strides { token: l.heads * row, matrix: row };
    match &weights.key_up {
        DeviceKeyUp::Rows(weight) => {
            let call = Gemv {
                matrices: l.heads,
                x_strides: Strides { token: l.heads * q_head, matrix: q_head },
                out_strides,
                ..Gemv::one(weight, tokens, Input::Floats(q), None, absorbed)
            };
            cuda::transposed(device, stream, call)
        }
        DeviceKeyUp::Transposed(weight) => {
            let x = pass.input(weight.format, q, (tokens * l.heads, l.nope_dim), q_head)?;
            // Quantised rows stand without the rotary parts between them.
            let width = if matches!(x, Input::Floats(_)) { q_head } else { l.nope_dim };
            let call = Gemv {
                matrices: l.heads,
                x_strides: Strides { token: l.heads * width, matrix: width },
                out_strides,
                ..Gemv::one(weight, tokens, x, None, absorbed)
            };
            cuda::gemv(device, stream, call)
        }
    }
}
