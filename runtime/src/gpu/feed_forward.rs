//! Dense and Mixture-of-Experts blocks; see [`crate::forward`]'s.

use super::buffers::{Buffers, Chosen};
use super::experts::{DeviceBlock, DeviceExperts};
use super::pass::Pass;
use super::weights::{DeviceFeedForward, DeviceMoe, DeviceNorm};
use pregate_kernels::cuda::router::{self, RouterStep, RouterTable, router_step};
use pregate_kernels::cuda::router_chunk::{ChunkChoice, chunk_choose};
use pregate_kernels::cuda::{
    self, Choices, Combine, CudaError, Down, GateUp, Gemv, SharedAnswer, Span,
};
use pregate_kernels::{Format, GatedActivation};

/// Runs the block behind its norm, which takes what the mixer left in
/// `delta`. Whether `delta` holds what this block adds; else it was added.
pub fn run(
    pass: &Pass<'_>,
    norm: &DeviceNorm,
    weights: &DeviceFeedForward,
) -> Result<bool, CudaError> {
    match weights {
        DeviceFeedForward::Dense(block) => {
            pass.norm(norm, true, pass.tokens, &[block.shape.gate.format])?;
            let delta = &pass.buffers.delta;
            dense(pass, block, GatedActivation::Silu, delta)?;
            Ok(true)
        }
        DeviceFeedForward::Moe(moe) => {
            pass.norm(norm, true, pass.tokens, &formats(pass, moe))?;
            mixture(pass, moe)?;
            Ok(false)
        }
    }
}

/// Formats of the matrices that read the normalised stream.
fn formats(pass: &Pass<'_>, moe: &DeviceMoe) -> Vec<Format> {
    let shared = moe.shared.as_ref().map(|block| block.shape.gate.format);
    let gate = moe.shared_gate.as_ref().map(|gate| gate.format);
    let router = routers(pass).map(|table| table.layers()[moe.router].weight.format);
    [Some(moe.experts.shape.gate.format), shared, gate, router].into_iter().flatten().collect()
}

fn routers<'a>(pass: &Pass<'a>) -> Option<&'a RouterTable> {
    pass.model.weights.routers.as_ref()
}

fn mixture(pass: &Pass<'_>, moe: &DeviceMoe) -> Result<(), CudaError> {
    let Buffers { x, answers, shared, shared_gate, choices, .. } = pass.buffers;
    let (device, stream, tokens) = (pass.device(), pass.stream(), pass.tokens);
    let chosen = &choices[moe.router];
    choose(pass, moe, chosen)?;
    if let Some(block) = &moe.shared {
        dense(pass, block, moe.activation, shared)?;
    }
    if let Some(gate) = &moe.shared_gate {
        let input = pass.normed(gate.format);
        cuda::gemv(device, stream, Gemv::one(gate, tokens, input, None, shared_gate))?;
    }
    let routed = Choice { ids: Some(&chosen.ids), k: moe.top_k };
    experts(pass, &moe.experts, routed, moe.activation, answers)?;
    let shared = moe.shared.as_ref().map(|_| SharedAnswer {
        answers: shared,
        gate_logits: moe.shared_gate.as_ref().map(|_| shared_gate),
    });
    let call = Combine {
        tokens,
        k: moe.top_k,
        hidden: pass.description.hidden,
        answers,
        weights: &chosen.weights,
        shared,
        residual: Some((x, pass.description.residual_scale)),
        out: None,
    };
    cuda::combine(device, stream, call)
}

/// Ids and weights of every token's experts.
fn choose(pass: &Pass<'_>, moe: &DeviceMoe, chosen: &Chosen) -> Result<(), CudaError> {
    let table = routers(pass).ok_or_else(|| CudaError::unsupported("a layer without a router"))?;
    let (device, stream, tokens) = (pass.device(), pass.stream(), pass.tokens);
    let words = |span: &Span, count: usize| span.part(0..4 * count);
    let ids = words(&chosen.ids, tokens * moe.top_k);
    let weights = words(&chosen.weights, tokens * moe.top_k);
    let layer = &table.layers()[moe.router];
    if tokens == 1 && layer.is_fused() {
        let call = RouterStep {
            table,
            scratch: &pass.buffers.router_scratch,
            state: &words(&pass.buffers.x, pass.description.hidden),
            chosen: Some(router::Chosen { layer: moe.router, ids: &ids, weights: &weights }),
            ahead: None,
        };
        return router_step(device, stream, call);
    }
    let logits = words(&pass.buffers.router_logits, tokens * layer.experts());
    let input = pass.normed(layer.weight.format);
    let call = Gemv::one(&layer.weight, tokens, input, layer.bias.as_ref(), &logits);
    cuda::gemv(device, stream, call)?;
    let (logits, ids, weights) = (&logits, &ids, &weights);
    let call = ChunkChoice { table, layer: moe.router, tokens, logits, ids, weights };
    chunk_choose(device, stream, call)
}

/// Which experts each token goes through.
struct Choice<'a> {
    /// i32 `[tokens, k]`; `None`: expert 0.
    ids: Option<&'a Span>,
    k: usize,
}

/// The block's answers to every token, `[tokens, hidden]`.
fn dense(
    pass: &Pass<'_>,
    block: &DeviceBlock,
    activation: GatedActivation,
    out: &Span,
) -> Result<(), CudaError> {
    experts(pass, block, Choice { ids: None, k: 1 }, activation, out)
}

/// The answers of each token's experts, `[tokens, k, hidden]`.
fn experts(
    pass: &Pass<'_>,
    experts: &DeviceExperts,
    choice: Choice<'_>,
    activation: GatedActivation,
    answers: &Span,
) -> Result<(), CudaError> {
    let (device, stream) = (pass.device(), pass.stream());
    let DeviceExperts { count, shape, table, biases, .. } = experts;
    let choices = Choices {
        table,
        experts: *count,
        block_bytes: shape.block_bytes,
        tokens: pass.tokens,
        k: choice.k,
        ids: choice.ids,
        chosen: None,
    };
    let call = GateUp {
        choices,
        gate: shape.gate,
        up: shape.up,
        gate_bias: biases.gate.as_ref(),
        up_bias: biases.up.as_ref(),
        activation,
        x: pass.normed(shape.gate.format),
        hidden: shape.hidden,
        inner: shape.inner,
        out: &pass.buffers.vectors,
    };
    cuda::gate_up(device, stream, call)?;
    let call = Down {
        choices,
        down: shape.down,
        bias: biases.down.as_ref(),
        hidden: shape.hidden,
        inner: shape.inner,
        vectors: &pass.buffers.vectors,
        answers,
    };
    cuda::down(device, stream, call)
}
