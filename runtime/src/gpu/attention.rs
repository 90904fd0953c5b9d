//! Grouped-query attention; see [`crate::forward`]'s.

use super::pass::Pass;
use super::weights::DeviceAttention;
use crate::model::description::{AttentionDescription, QkNorm};
use pregate_kernels::cuda::{
    Attend, CudaError, DeviceCells, HeadNorms, OutputGate, PrepareHeads, attend, prepare_heads,
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
        first_position: pass.first_position,
    };
    prepare_heads(pass.device(), pass.stream(), call)?;
    // Per head the query, then its gate.
    let gates = q_raw.part(4 * width.min(q_raw.bytes() / 4)..q_raw.bytes());
    let call = Attend {
        q,
        tokens,
        heads: a.heads,
        kv_heads: a.kv_heads,
        keys,
        values,
        first_position: pass.first_position,
        scale: a.scale,
        window: a.window,
        sinks: weights.sinks.as_ref(),
        gate: a.output_gate.then_some(OutputGate { span: &gates, stride: 2 * width }),
        out: mixed,
        scratch: &pass.buffers.attention_scratch,
        counters: &pass.buffers.counters,
        plan: None,
    };
    attend(pass.device(), pass.stream(), call)?;
    pass.product_of(&weights.output, mixed, &pass.buffers.delta)
}
