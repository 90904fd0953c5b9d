//! Launchers of `kernels/cuda/experts.cu`: routed experts of a few tokens
//! through the table of a layer, and what adds them up. A dense feed-forward
//! block is a table of one expert. Every result has the bits of
//! [`crate::contract::expert`] and [`crate::contract::combine`].

use super::args::Args;
use super::mailbox_layout::MOST_CHOICES;
use super::rows::{Input, Rows, activation_bytes, suffix};
use super::shape::{holds, holds_words, int, may_hold, optional, product};
use super::stream::Grid;
use super::{CudaError, Device, Span, Stream};
use crate::backend::GatedActivation;
use crate::format::Format;

const MODULE: &str = "experts";
const COMBINE_THREADS: usize = 128;

/// Which experts of which tokens.
#[derive(Clone, Copy)]
pub struct Choices<'a> {
    /// u64 `[experts]`: the address of each expert's block on the device, a
    /// multiple of 16, or 0: its choices are skipped and their rows left as
    /// they are. Every block that it names is alive until the launch has
    /// ended, and holds what the launch reads of it.
    pub table: &'a Span,
    pub experts: usize,
    /// Bytes of an expert's block.
    pub block_bytes: usize,
    pub tokens: usize,
    /// Choices of a token.
    pub k: usize,
    /// i32 `[tokens, k]`: the experts, in router order. `None`: expert 0.
    pub ids: Option<&'a Span>,
    /// i32 and how many: the choices to compute, each below `tokens * k` and
    /// named once. `None`: all.
    pub chosen: Option<(&'a Span, usize)>,
}

impl Choices<'_> {
    /// Choices that a launch computes.
    pub fn count(&self) -> usize {
        self.chosen.map_or(self.tokens.saturating_mul(self.k), |(_, count)| count)
    }

    fn check(&self, call: &'static str) -> Result<(), CudaError> {
        let Self { table, experts, tokens, k, .. } = self;
        let all = product(call, &[*tokens, *k])?;
        if all == 0 || *experts == 0 || self.count() == 0 || self.count() > 0xffff {
            let (count, most) = (self.count(), 0xffff);
            let problem =
                format!("{count} (1 to {most}) of {tokens} * {k} choices among {experts} experts");
            return Err(CudaError::shape(call, problem));
        }
        int(call, "choices", all)?;
        holds(call, "table", table, *experts, 8, 8)?;
        may_hold(call, "ids", self.ids, all)?;
        may_hold(call, "chosen", self.chosen.map(|(chosen, _)| chosen), self.count())
    }

    /// Refuses a matrix that does not lie in an expert's block.
    fn check_matrix(
        &self,
        call: &'static str,
        matrix: ExpertMatrix,
        rows: usize,
        cols: usize,
    ) -> Result<(), CudaError> {
        let ExpertMatrix { format, offset } = matrix;
        let end = format
            .row_bytes(cols)
            .and_then(|bytes| bytes.checked_mul(rows)?.checked_add(offset))
            .filter(|_| rows > 0 && cols > 0 && offset.is_multiple_of(16));
        if end.is_none_or(|end| end > self.block_bytes) {
            let block = self.block_bytes;
            let problem =
                format!("{format} matrix [{rows}, {cols}] at {offset} of a block of {block} bytes");
            return Err(CudaError::shape(call, problem));
        }
        Ok(())
    }

    fn args(&self, call: &'static str) -> Result<Args, CudaError> {
        let args = optional(Args::new().span(self.table), self.ids);
        let args = optional(args, self.chosen.map(|(chosen, _)| chosen));
        Ok(args.i32(int(call, "experts", self.experts)?))
    }
}

/// Where a matrix is in an expert's block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertMatrix {
    pub format: Format,
    /// In bytes, a multiple of 16.
    pub offset: usize,
}

/// The first half of experts: gate, up and the activation.
pub struct GateUp<'a> {
    pub choices: Choices<'a>,
    /// `[inner, hidden]`
    pub gate: ExpertMatrix,
    /// `[inner, hidden]`, of the same format
    pub up: ExpertMatrix,
    /// f32 `[experts, inner]`
    pub gate_bias: Option<&'a Span>,
    /// f32 `[experts, inner]`
    pub up_bias: Option<&'a Span>,
    pub activation: GatedActivation,
    /// `[tokens, hidden]`
    pub x: Input<'a>,
    pub hidden: usize,
    pub inner: usize,
    /// f32 `[tokens, k, inner]`; rows of choices that are not computed are
    /// left.
    pub out: &'a Span,
}

impl GateUp<'_> {
    /// Bytes that must move when every choice's expert is resident.
    pub fn bytes(&self) -> u64 {
        let row = self.gate.format.row_bytes(self.hidden).unwrap_or(0) as u64;
        let biases = [self.gate_bias, self.up_bias].iter().flatten().count() as u64;
        self.choices.count() as u64 * self.inner as u64 * (2 * row + 4 * biases + 4)
            + self.choices.tokens as u64 * activation_bytes(self.gate.format, self.hidden)
    }
}

/// Runs [`GateUp`].
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit, [`CudaError::Unsupported`] when
/// gate and up have different formats; the driver's.
pub fn gate_up(device: &Device, stream: &Stream, call: GateUp<'_>) -> Result<(), CudaError> {
    const CALL: &str = "expert_gate_up";
    let GateUp { choices, gate, up, hidden, inner, .. } = call;
    choices.check(CALL)?;
    if gate.format != up.format {
        let problem = format!("an expert with {} gate and {} up rows", gate.format, up.format);
        return Err(CudaError::unsupported(problem));
    }
    choices.check_matrix(CALL, gate, inner, hidden)?;
    choices.check_matrix(CALL, up, inner, hidden)?;
    call.x.check(CALL, gate.format, product(CALL, &[choices.tokens, hidden])?)?;
    let biases = product(CALL, &[choices.experts, inner])?;
    may_hold(CALL, "gate bias", call.gate_bias, biases)?;
    may_hold(CALL, "up bias", call.up_bias, biases)?;
    holds_words(CALL, "out", call.out, product(CALL, &[choices.tokens, choices.k, inner])?)?;
    let (kind, alpha, limit) = match call.activation {
        GatedActivation::Silu => (0, 0.0, 0.0),
        GatedActivation::ClampedSwiglu { alpha, limit } => (1, alpha, limit),
    };
    let args = choices.args(CALL)?;
    let args = match call.x {
        Input::Floats(x) => args.span(x),
        Input::Quantised(x) => args.span(&x.q).span(&x.scales).span(&x.sums),
    };
    let args = args.i32(choices.k as i32).i32(int(CALL, "gate's offset", gate.offset)?).i32(int(
        CALL,
        "up's offset",
        up.offset,
    )?);
    let args = optional(optional(args, call.gate_bias), call.up_bias)
        .i32(int(CALL, "hidden", hidden)?)
        .i32(int(CALL, "inner", inner)?)
        .i32(kind)
        .f32(alpha)
        .f32(limit)
        .span(call.out);
    let grid = Rows {
        format: gate.format,
        rows: inner,
        cols: hidden,
        tokens: 1,
        count: choices.count(),
        is_paired: true,
    }
    .grid(device);
    let kernel = device.kernel(MODULE, &["expert_gate_up_", suffix(gate.format)])?;
    stream.launch(&kernel, grid, args)
}

/// The second half of experts: down.
pub struct Down<'a> {
    pub choices: Choices<'a>,
    /// `[hidden, inner]`
    pub down: ExpertMatrix,
    /// f32 `[experts, hidden]`
    pub bias: Option<&'a Span>,
    pub hidden: usize,
    pub inner: usize,
    /// f32 `[tokens, k, inner]`, at a multiple of 16 bytes: what [`gate_up`]
    /// gave.
    pub vectors: &'a Span,
    /// f32 `[tokens, k, hidden]`; rows of choices that are not computed are
    /// left.
    pub answers: &'a Span,
}

impl Down<'_> {
    /// Bytes that must move when every choice's expert is resident.
    pub fn bytes(&self) -> u64 {
        let row = self.down.format.row_bytes(self.inner).unwrap_or(0) as u64;
        let bias = if self.bias.is_some() { 4 } else { 0 };
        let each = self.hidden as u64 * (row + bias + 4) + 4 * self.inner as u64;
        self.choices.count() as u64 * each
    }
}

/// Runs [`Down`].
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn down(device: &Device, stream: &Stream, call: Down<'_>) -> Result<(), CudaError> {
    const CALL: &str = "expert_down";
    let Down { choices, down, hidden, inner, .. } = call;
    choices.check(CALL)?;
    choices.check_matrix(CALL, down, hidden, inner)?;
    may_hold(CALL, "bias", call.bias, product(CALL, &[choices.experts, hidden])?)?;
    let Choices { tokens, k, .. } = choices;
    holds(CALL, "vectors", call.vectors, product(CALL, &[tokens, k, inner])?, 4, 16)?;
    holds_words(CALL, "answers", call.answers, product(CALL, &[tokens, k, hidden])?)?;
    let args = choices.args(CALL)?.span(call.vectors).i32(int(CALL, "offset", down.offset)?);
    let args = optional(args, call.bias)
        .i32(int(CALL, "hidden", hidden)?)
        .i32(int(CALL, "inner", inner)?)
        .span(call.answers);
    let grid = Rows {
        format: down.format,
        rows: hidden,
        cols: inner,
        tokens: 1,
        count: choices.count(),
        is_paired: false,
    }
    .grid(device);
    let kernel = device.kernel(MODULE, &["expert_down_", suffix(down.format)])?;
    stream.launch(&kernel, grid, args)
}

/// What a block's experts add to the stream.
pub struct Combine<'a> {
    pub tokens: usize,
    /// Choices of a token.
    pub k: usize,
    pub hidden: usize,
    /// f32 `[tokens, k, hidden]`
    pub answers: &'a Span,
    /// f32 `[tokens, k]`, in router order
    pub weights: &'a Span,
    /// The shared expert's answers.
    pub shared: Option<SharedAnswer<'a>>,
    /// f32 `[tokens, hidden]` and a factor: `residual += factor * out`.
    pub residual: Option<(&'a Span, f32)>,
    /// f32 `[tokens, hidden]`
    pub out: Option<&'a Span>,
    /// Choices that the host computed; of one token.
    pub host: Option<HostRows<'a>>,
}

/// Answers that are not in [`Combine::answers`].
#[derive(Clone, Copy)]
pub struct HostRows<'a> {
    /// f32 `[k, hidden]`, of [`super::Mapped`] memory: read across the link.
    pub rows: &'a Span,
    /// u32, on the device: bit i says that choice i is row i of these. What
    /// [`super::settle`] leaves.
    pub from_host: &'a Span,
}

/// A shared expert's part.
#[derive(Clone, Copy)]
pub struct SharedAnswer<'a> {
    /// f32 `[tokens, hidden]`
    pub answers: &'a Span,
    /// f32 `[tokens]`: logits whose sigmoid scales the answers. `None`: 1.
    pub gate_logits: Option<&'a Span>,
}

impl Combine<'_> {
    /// Bytes that must move.
    pub fn bytes(&self) -> u64 {
        let more = u64::from(self.shared.is_some())
            + 2 * u64::from(self.residual.is_some())
            + u64::from(self.out.is_some());
        4 * self.tokens as u64 * (self.hidden as u64 * (self.k as u64 + more) + self.k as u64)
    }
}

/// Runs [`Combine`].
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn combine(device: &Device, stream: &Stream, call: Combine<'_>) -> Result<(), CudaError> {
    const CALL: &str = "combine";
    let Combine { tokens, k, hidden, shared, residual, out, .. } = call;
    let width = product(CALL, &[tokens, hidden])?;
    if width == 0 || (residual.is_none() && out.is_none()) {
        let problem = format!("{tokens} tokens of {hidden} elements, or nowhere to put them");
        return Err(CudaError::shape(CALL, problem));
    }
    holds_words(CALL, "answers", call.answers, product(CALL, &[width, k])?)?;
    holds_words(CALL, "weights", call.weights, product(CALL, &[tokens, k])?)?;
    may_hold(CALL, "shared answers", shared.map(|shared| shared.answers), width)?;
    let gate_logits = shared.and_then(|shared| shared.gate_logits);
    may_hold(CALL, "gate logits", gate_logits, tokens)?;
    may_hold(CALL, "residual", residual.map(|(residual, _)| residual), width)?;
    may_hold(CALL, "out", out, width)?;
    may_hold(
        CALL,
        "the host's rows",
        call.host.map(|host| host.rows),
        product(CALL, &[width, k])?,
    )?;
    may_hold(CALL, "the host's choices", call.host.map(|host| host.from_host), 1)?;
    if call.host.is_some() && (tokens != 1 || k > MOST_CHOICES) {
        let problem = format!("{k} choices of {tokens} tokens with rows of the host");
        return Err(CudaError::shape(CALL, problem));
    }
    let args = Args::new()
        .span(call.answers)
        .span(call.weights)
        .i32(int(CALL, "k", k)?)
        .i32(int(CALL, "hidden", hidden)?);
    let args = optional(optional(args, shared.map(|shared| shared.answers)), gate_logits);
    let args = optional(args, residual.map(|(residual, _)| residual))
        .f32(residual.map_or(0.0, |(_, factor)| factor));
    let args = optional(optional(args, out), call.host.map(|host| host.rows));
    let args = optional(args, call.host.map(|host| host.from_host));
    let blocks = [hidden.div_ceil(COMBINE_THREADS) as u32, int(CALL, "tokens", tokens)? as u32, 1];
    let grid = Grid { blocks, threads: [COMBINE_THREADS as u32, 1, 1], shared_bytes: 0 };
    stream.launch(&device.kernel(MODULE, &["combine"])?, grid, args)
}
