//! Dense and Mixture-of-Experts blocks; see [`crate::forward`]'s.

use super::buffers::{Buffers, FEW_TOKENS};
use super::exchange::Chosen;
use super::experts::{DeviceBlock, DeviceExperts};
use super::misses::Visit;
use super::pass::{Companions, Pass};
use super::token::{TokenPath, host_rows};
use super::weights::{DeviceFeedForward, DeviceMoe, DeviceNorm};
use crate::error::Result;
use pregate_kernels::cuda::router::{self, RouterStep, RouterTable, router_step};
use pregate_kernels::cuda::router_chunk::{ChunkChoice, ChunkGather, chunk_choose, chunk_gather};
use pregate_kernels::cuda::{
    self, Choices, Combine, CudaError, Down, GateUp, GroupGemm, Groups, HostRows, SharedAnswer,
    Span, Up, group_gemm, group_tiles,
};
use pregate_kernels::{Format, GatedActivation};

/// Runs the block behind its norm, which takes what the mixer left in
/// `delta`. Whether `delta` holds what this block adds; else it was added.
pub fn run(
    pass: &Pass<'_>,
    layer: usize,
    norm: &DeviceNorm,
    weights: &DeviceFeedForward,
    companions: &mut Companions<'_, '_>,
) -> Result<bool> {
    let Some(moe) = begin(pass, norm, weights, &[])? else { return Ok(true) };
    let chosen = &pass.exchange.choices[moe.router];
    let visit = || Visit::new(pass, layer, moe, chosen);
    let visit = (!moe.experts.is_whole()).then(visit).transpose()?;
    shared(pass, moe)?;
    let launch = |table: &Span| routed(pass, moe, table);
    match visit {
        Some(visit) => visit.run(companions, &pass.buffers.answers, &launch)?,
        None => launch(&moe.experts.table)?,
    }
    combine(pass, moe, None)?;
    Ok(false)
}

/// [`run`] of a token that the device computes by itself.
pub fn step(
    pass: &Pass<'_>,
    path: &TokenPath,
    layer: usize,
    norm: &DeviceNorm,
    weights: &DeviceFeedForward,
) -> Result<bool, CudaError> {
    let mail = path.mail().layers[layer];
    let ahead: Vec<usize> =
        mail.iter().flat_map(|mail| mail.ahead().iter().map(|ahead| ahead.router)).collect();
    let Some(moe) = begin(pass, norm, weights, &ahead)? else { return Ok(true) };
    let posted = mail.map(|mail| path.post(pass, layer, moe, &mail)).transpose()?;
    let Some((mail, table)) = mail.zip(posted).filter(|_| !moe.experts.is_whole()) else {
        routed(pass, moe, &moe.experts.table)?;
        shared(pass, moe)?;
        combine(pass, moe, None)?;
        return Ok(false);
    };
    routed(pass, moe, &table)?;
    // Behind the experts, whose vectors it overwrites: time for the host.
    shared(pass, moe)?;
    let late = path.settle(pass, moe, &mail)?;
    routed(pass, moe, &late)?;
    combine(pass, moe, Some(host_rows(&path.host_rows(&mail))))?;
    Ok(false)
}

/// A dense block, whose answer is in `delta` then; or the norm and the router
/// of one with experts, and the routers `ahead` on the same state.
fn begin<'a>(
    pass: &Pass<'_>,
    norm: &DeviceNorm,
    weights: &'a DeviceFeedForward,
    ahead: &[usize],
) -> Result<Option<&'a DeviceMoe>, CudaError> {
    match weights {
        DeviceFeedForward::Dense(block) => {
            pass.norm(norm, true, pass.tokens, &[block.shape.gate.format])?;
            dense(pass, block, GatedActivation::Silu, &pass.buffers.delta)?;
            Ok(None)
        }
        DeviceFeedForward::Moe(moe) => {
            pass.norm(norm, true, pass.tokens, &formats(pass, moe))?;
            choose(pass, moe, &pass.exchange.choices[moe.router], ahead)?;
            Ok(Some(moe))
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

/// The answers of the routed experts that have an address in `table`.
fn routed(pass: &Pass<'_>, moe: &DeviceMoe, table: &Span) -> Result<(), CudaError> {
    let choice = Choice { ids: Some(&pass.exchange.choices[moe.router].ids), k: moe.top_k };
    experts(pass, &moe.experts, table, choice, moe.activation, &pass.buffers.answers)
}

/// The shared expert's answers, and its gate.
fn shared(pass: &Pass<'_>, moe: &DeviceMoe) -> Result<(), CudaError> {
    if let Some(block) = &moe.shared {
        dense(pass, block, moe.activation, &pass.buffers.shared)?;
    }
    if let Some(gate) = &moe.shared_gate {
        let out = &pass.buffers.shared_gate;
        pass.multiply(gate, None, pass.tokens, pass.normed(gate.format), out)?;
    }
    Ok(())
}

/// Adds all answers, those of `host` among them, to the stream.
fn combine(pass: &Pass<'_>, moe: &DeviceMoe, host: Option<HostRows<'_>>) -> Result<(), CudaError> {
    let Buffers { answers, shared, shared_gate, .. } = pass.buffers;
    let shared = moe.shared.as_ref().map(|_| SharedAnswer {
        answers: shared,
        gate_logits: moe.shared_gate.as_ref().map(|_| shared_gate),
    });
    let call = Combine {
        tokens: pass.tokens,
        k: moe.top_k,
        hidden: pass.description.hidden,
        answers,
        weights: &pass.exchange.choices[moe.router].weights,
        shared,
        residual: Some((&pass.exchange.x, pass.description.residual_scale)),
        out: None,
        host,
    };
    cuda::combine(pass.device(), pass.stream(), call)
}

/// Ids and weights of every token's experts.
fn choose(
    pass: &Pass<'_>,
    moe: &DeviceMoe,
    chosen: &Chosen,
    ahead: &[usize],
) -> Result<(), CudaError> {
    let table = routers(pass).ok_or_else(|| CudaError::unsupported("a layer without a router"))?;
    let (device, stream, tokens) = (pass.device(), pass.stream(), pass.tokens);
    let words = |span: &Span, count: usize| span.part(0..4 * count);
    let ids = words(&chosen.ids, tokens * moe.top_k);
    let weights = words(&chosen.weights, tokens * moe.top_k);
    let layer = &table.layers()[moe.router];
    if tokens == 1 && layer.is_fused() {
        let named = pass.step.filter(|_| !ahead.is_empty());
        let named = named.map(|step| step.path.named_ahead(ahead.len()));
        let call = RouterStep {
            table,
            scratch: &pass.buffers.router_scratch,
            state: &words(&pass.exchange.x, pass.description.hidden),
            chosen: Some(router::Chosen { layer: moe.router, ids: &ids, weights: &weights }),
            ahead: named.as_ref().map(|[ids, scores]| router::Ahead {
                layers: ahead,
                experts: 1,
                ids,
                scores,
            }),
        };
        return router_step(device, stream, call);
    }
    let logits = words(&pass.buffers.router_logits, tokens * layer.experts());
    let input = pass.normed(layer.weight.format);
    pass.multiply(&layer.weight, layer.bias.as_ref(), tokens, input, &logits)?;
    let (logits, ids, weights) = (&logits, &ids, &weights);
    let call = ChunkChoice { table, layer: moe.router, tokens, logits, ids, weights };
    chunk_choose(device, stream, call)
}

/// Which experts each token goes through.
#[derive(Clone, Copy)]
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
    experts(pass, block, &block.table, Choice { ids: None, k: 1 }, activation, out)
}

/// The answers of each token's experts, `[tokens, k, hidden]`: of those that
/// have an address in `table`, u64 `[experts]`.
fn experts(
    pass: &Pass<'_>,
    experts: &DeviceExperts,
    table: &Span,
    choice: Choice<'_>,
    activation: GatedActivation,
    answers: &Span,
) -> Result<(), CudaError> {
    match pass.tokens {
        0..=FEW_TOKENS => for_few(pass, experts, table, choice, activation, answers),
        _ => for_many(pass, experts, table, choice, activation, answers),
    }
}

/// Token by token.
fn for_few(
    pass: &Pass<'_>,
    experts: &DeviceExperts,
    table: &Span,
    choice: Choice<'_>,
    activation: GatedActivation,
    answers: &Span,
) -> Result<(), CudaError> {
    let (device, stream) = (pass.device(), pass.stream());
    let DeviceExperts { count, shape, biases, .. } = experts;
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

/// Sorts the choices of a chunk by expert; the answer is where each expert's
/// start.
fn sort(pass: &Pass<'_>, experts: usize, choice: &Choice<'_>) -> Result<Span, CudaError> {
    let sorted = &pass.buffers.sorted;
    let Some(ids) = choice.ids else { return Ok(pass.exchange.dense_starts.clone()) };
    let words = |span: &Span, count: usize| span.part(0..4 * count);
    let choices = pass.tokens * choice.k;
    let starts = words(&sorted.starts, experts + 1);
    let call = ChunkGather {
        tokens: pass.tokens,
        per_token: choice.k,
        experts,
        ids: &words(ids, choices),
        starts: &starts,
        token_of: &words(&sorted.token_of, choices),
        choice_of: &words(&sorted.choice_of, choices),
        row_of: &words(&sorted.row_of, choices),
    };
    chunk_gather(pass.device(), pass.stream(), call)?;
    Ok(starts)
}

/// Expert by expert, each with all of its tokens.
fn for_many(
    pass: &Pass<'_>,
    experts: &DeviceExperts,
    table: &Span,
    choice: Choice<'_>,
    activation: GatedActivation,
    answers: &Span,
) -> Result<(), CudaError> {
    let (device, stream, tokens) = (pass.device(), pass.stream(), pass.tokens);
    let Buffers { vectors, other_vectors, vector_forms, sorted, .. } = pass.buffers;
    let DeviceExperts { count, shape, biases, .. } = experts;
    let choices = tokens * choice.k;
    let starts = sort(pass, *count, &choice)?;
    let groups = Groups {
        experts: *count,
        block_bytes: shape.block_bytes,
        choices,
        starts: &starts,
        table,
        tiles: &sorted.tiles,
    };
    group_tiles(device, stream, &groups)?;
    let is_routed = choice.ids.is_some();
    let up =
        Up { matrix: shape.up, bias: biases.up.as_ref(), activation, scratch: Some(other_vectors) };
    let call = GroupGemm {
        groups,
        matrix: shape.gate,
        rows: shape.inner,
        cols: shape.hidden,
        bias: biases.gate.as_ref(),
        up: Some(up),
        x: pass.normed(shape.gate.format),
        x_rows: tokens,
        x_order: is_routed.then_some(&sorted.token_of),
        out_order: None,
        out: vectors,
    };
    group_gemm(device, stream, &call)?;
    let inner = shape.inner;
    let x = pass.input_in(vector_forms, shape.down.format, vectors, (choices, inner), inner)?;
    let call = GroupGemm {
        groups,
        matrix: shape.down,
        rows: shape.hidden,
        cols: inner,
        bias: biases.down.as_ref(),
        up: None,
        x,
        x_rows: choices,
        x_order: None,
        out_order: is_routed.then_some(&sorted.choice_of),
        out: answers,
    };
    group_gemm(device, stream, &call)
}
