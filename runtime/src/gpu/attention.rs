//! Grouped-query attention; see [`crate::forward`]'s.

use super::pass::{Pass, from_row};
use super::weights::DeviceAttention;
use crate::model::description::{AttentionDescription, QkNorm};
use pregate_kernels::cuda::{
    Attend, CellFormat, CudaError, DeviceCells, Flash, HeadNorms, OutputGate, PrepareHeads, attend,
    flash, has_flash, prepare_heads,
};

/// Leaves what the block adds in `delta`.
pub fn run(
    pass: &Pass<'_>,
    a: &AttentionDescription,
    weights: &DeviceAttention,
    keys: &DeviceCells,
    values: &DeviceCells,
) -> Result<(), CudaError> {
    let [q_raw, k_raw, v_raw, q, mixed, _] = &pass.buffers.mixer;
    let (tokens, width) = (pass.tokens, a.head_dim);
    for (projection, out) in [(&weights.q, q_raw), (&weights.k, k_raw), (&weights.v, v_raw)] {
        pass.product(projection, tokens, pass.normed(projection.weight.format), out)?;
    }
    let norms = weights.q_norm.as_ref().zip(weights.k_norm.as_ref());
    let is_whole = a.qk_norm == QkNorm::Whole;
    let epsilon = pass.epsilon();
    let call = PrepareHeads {
        q_raw,
        is_gated: a.output_gate,
        k_raw,
        v_raw,
        norms: norms.map(|(q, k)| HeadNorms { q, k, is_whole, epsilon }),
        limit: a.clip_qkv,
        rotation: pass.rotation(a.rope),
        q,
        keys,
        values,
        tokens,
        heads: a.heads,
        kv_heads: a.kv_heads,
        width,
        at: pass.at(0),
    };
    prepare_heads(pass.device(), pass.stream(), call)?;
    let (q_width, heads) = (a.heads * width, a.heads);
    if is_long(pass, keys, values) && !a.output_gate {
        let call = Flash {
            q,
            tokens,
            heads,
            kv_heads: a.kv_heads,
            keys,
            values,
            first_position: pass.first_position,
            scale: a.scale,
            window: a.window,
            sinks: weights.sinks.as_ref(),
            out: mixed,
        };
        flash(pass.device(), pass.stream(), &call)?;
    } else {
        for (first, tokens) in pass.pieces() {
            // Per head the query, then its gate.
            let gates = a.output_gate.then(|| {
                let start = 4 * width * (2 * first * heads + 1);
                q_raw.part(start..q_raw.bytes())
            });
            let call = Attend {
                q: &from_row(q, first, q_width),
                tokens,
                heads,
                kv_heads: a.kv_heads,
                keys,
                values,
                at: pass.at(first),
                scale: a.scale,
                window: a.window,
                sinks: weights.sinks.as_ref(),
                gate: gates.as_ref().map(|span| OutputGate { span, stride: 2 * width }),
                out: &from_row(mixed, first, q_width),
                scratch: &pass.buffers.attention_scratch,
                counters: &pass.buffers.counters,
                plan: None,
            };
            attend(pass.device(), pass.stream(), call)?;
        }
    }
    pass.product_of(&weights.output, mixed, &pass.buffers.delta)
}

/// Tokens from which on a prompt's attention has a kernel of its own, whose
/// answers are not those of decode's in every bit (`kernels/cuda/flash.cu`).
/// Chosen by the number of tokens alone, so answers never depend on placement.
const LONG_TOKENS: usize = 32;

/// Whether that kernel computes this pass.
pub fn is_long(pass: &Pass<'_>, keys: &DeviceCells, values: &DeviceCells) -> bool {
    pass.tokens >= LONG_TOKENS
        && keys.format == CellFormat::F16
        && has_flash(keys.width, values.width)
}
