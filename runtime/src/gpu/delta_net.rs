//! Gated DeltaNet; see [`crate::forward`]'s. Prompts of 64 and more tokens are
//! computed in chunks, with the tolerance that
//! `kernels/src/cuda/delta_net.rs` states.

use super::pass::Pass;
use super::state::RecurrentState;
use super::weights::DeviceDeltaNet;
use crate::forward::L2_EPSILON;
use crate::model::description::{DeltaNetDescription, HeadOrder};
use pregate_kernels::cuda::{
    CudaError, DELTA_CHUNK, DeltaConv, DeltaDecode, DeltaInputs, DeltaPrefill, DeltaShape,
    delta_conv, delta_decode, delta_prefill,
};

/// Leaves what the block adds in `delta`.
pub fn run(
    pass: &Pass<'_>,
    d: &DeltaNetDescription,
    weights: &DeviceDeltaNet,
    state: &RecurrentState,
) -> Result<(), CudaError> {
    let [raw, mixed, gate, alpha, beta, answers] = &pass.buffers.mixer;
    let (device, stream, tokens) = (pass.device(), pass.stream(), pass.tokens);
    for (projection, out) in
        [(&weights.qkv, raw), (&weights.gate, gate), (&weights.alpha, alpha), (&weights.beta, beta)]
    {
        pass.product(projection, tokens, pass.normed(projection.weight.format), out)?;
    }
    let shape = shape(d);
    let call = DeltaConv {
        shape,
        kernel: d.conv_kernel,
        raw,
        taps: &weights.conv,
        past: &state.conv,
        mixed,
        tokens,
        epsilon: L2_EPSILON,
        query_scale: (d.key_dim as f32).powf(-0.5),
    };
    delta_conv(device, stream, call)?;
    let inputs = DeltaInputs {
        shape,
        tokens,
        mixed,
        alpha,
        beta,
        decay: &weights.decay,
        decay_bias: &weights.decay_bias,
        norm: &weights.norm,
        norm_epsilon: d.norm_epsilon,
        gate,
        memory: &state.memory,
        answers,
    };
    if tokens >= DELTA_CHUNK {
        let scratch = &pass.buffers.delta_scratch;
        delta_prefill(device, stream, DeltaPrefill { inputs, scratch })?;
    } else {
        let counters = &pass.buffers.counters;
        delta_decode(device, stream, DeltaDecode { inputs, counters })?;
    }
    pass.product_of(&weights.output, answers, &pass.buffers.delta)
}

pub fn shape(d: &DeltaNetDescription) -> DeltaShape {
    DeltaShape {
        key_heads: d.key_heads,
        value_heads: d.value_heads,
        key_dim: d.key_dim,
        value_dim: d.value_dim,
        is_tiled: d.head_order == HeadOrder::Tiled,
    }
}
