//! Gated DeltaNet on the device (`kernels/cuda/delta_net.cu`): the causal
//! convolution, steps of few tokens with the bits of the CPU, and prompts in
//! chunks of 64 tokens with a tolerance.
//!
//! # Tolerance of [`delta_prefill`]
//! A chunk is computed by matrix products where the steps would follow each
//! other (2412.06464, section 3.3), so sums have another order and the chunk's
//! triangular system is solved once for all columns. Decays are products of at
//! most 64 factors, sums over keys and tokens have at most `n = key_dim + 64`
//! terms, and roundings of mixed signs grow with the root of their number.
//! With keys of length one and strengths in 0..=1 a step is a contraction, so
//! errors do not grow from chunk to chunk. The tests allow a difference of
//! `4 sqrt(n) 2^-24` of the largest answer (3e-6 for 128 keys) and find a fifth
//! of that.

use super::args::Args;
use super::device::Device;
use super::error::CudaError;
use super::memory::Span;
use super::shape::{blocks, holds_floats, int};
use super::stream::{Grid, Stream};

/// Tokens of a chunk of [`delta_prefill`].
pub const DELTA_CHUNK: usize = 64;
/// Numbers that a chunk and head of [`delta_prefill`] leave for the scan.
const CHUNK_WORK: usize = 2 * DELTA_CHUNK * DELTA_CHUNK + 2 * DELTA_CHUNK;
/// Shared memory of the scan's three tiles.
const TILES_BYTES: usize = 3 * DELTA_CHUNK * 36 * 4;
/// Columns of a head's memory in a block.
const COLUMNS: usize = 32;
/// Tokens that a warp of the convolution walks over.
const CONV_TILE: usize = 16;
const MODULE: &str = "delta_net";
const WARPS: usize = 4;

/// Sizes of a gated DeltaNet layer. A token's row of `channels` holds queries
/// and keys `[key_heads, key_dim]` and values `[value_heads, value_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaShape {
    pub key_heads: usize,
    /// A multiple of `key_heads`.
    pub value_heads: usize,
    /// A multiple of 4.
    pub key_dim: usize,
    /// A multiple of 4.
    pub value_dim: usize,
    /// Key head of value head `v`: `v % key_heads` (GGUF files) instead of
    /// `v / (value_heads / key_heads)`.
    pub is_tiled: bool,
}

impl DeltaShape {
    pub fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.values()
    }

    /// Numbers of all value heads of a token.
    pub fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Numbers of a layer's memory `[value_heads, key_dim, value_dim]`.
    pub fn memory(&self) -> usize {
        self.values() * self.key_dim
    }

    fn check(&self, call: &'static str) -> Result<(), CudaError> {
        let Self { key_heads, value_heads, key_dim, value_dim, .. } = *self;
        let is_whole = key_heads > 0
            && value_heads > 0
            && value_heads.is_multiple_of(key_heads)
            && [key_dim, value_dim].iter().all(|dim| *dim > 0 && dim.is_multiple_of(4));
        // No product below overflows.
        let is_small = [key_heads, value_heads, key_dim, value_dim].iter().all(|n| *n <= 1 << 12);
        if is_whole && is_small {
            return Ok(());
        }
        Err(CudaError::shape(call, format!("{self:?}")))
    }

    fn args(&self, call: &'static str, args: Args) -> Result<Args, CudaError> {
        Ok(args
            .i32(int(call, "key heads", self.key_heads)?)
            .i32(int(call, "value heads", self.value_heads)?)
            .i32(int(call, "key dim", self.key_dim)?)
            .i32(int(call, "value dim", self.value_dim)?))
    }

    fn slices(&self) -> usize {
        self.value_dim.div_ceil(COLUMNS)
    }
}

/// Causal depth-wise convolution and SiLU; then queries and keys are divided
/// by their norm per head, and queries scaled.
pub struct DeltaConv<'a> {
    pub shape: DeltaShape,
    /// Taps of a channel, 1 to 16.
    pub kernel: usize,
    /// `[tokens, channels]`
    pub raw: &'a Span,
    /// `[channels, kernel]`
    pub taps: &'a Span,
    /// `[kernel - 1, channels]`, oldest first: the inputs before this call's,
    /// replaced by the last ones of this call.
    pub past: &'a Span,
    /// `[tokens, channels]`, overwritten
    pub mixed: &'a Span,
    pub tokens: usize,
    /// Under the root of a key's or query's norm.
    pub epsilon: f32,
    /// Multiplies queries: `key_dim^-0.5` as the host computes it.
    pub query_scale: f32,
}

impl DeltaConv<'_> {
    /// Bytes that the launch must move.
    pub fn bytes(&self) -> u64 {
        let columns = 2 * self.tokens + self.kernel + 2 * (self.kernel - 1);
        (4 * columns * self.shape.channels()) as u64
    }
}

/// Launches `delta_conv`, and `delta_conv_keep` for more than 16 tokens.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit together, and the driver's.
pub fn delta_conv(device: &Device, stream: &Stream, call: DeltaConv<'_>) -> Result<(), CudaError> {
    const CALL: &str = "delta_conv";
    let DeltaConv { shape, kernel, tokens, .. } = call;
    shape.check(CALL)?;
    if !(1..=16).contains(&kernel) {
        return Err(CudaError::shape(CALL, format!("a convolution of {kernel} taps")));
    }
    let channels = shape.channels();
    holds_floats(CALL, "raw", call.raw, &[tokens, channels], 4)?;
    holds_floats(CALL, "mixed", call.mixed, &[tokens, channels], 4)?;
    holds_floats(CALL, "taps", call.taps, &[channels, kernel], 4)?;
    holds_floats(CALL, "past", call.past, &[kernel - 1, channels], 4)?;
    if tokens == 0 {
        return Ok(());
    }
    let tile = tokens.min(CONV_TILE);
    let args = Args::new()
        .span(call.raw)
        .span(call.taps)
        .span(call.past)
        .span(call.mixed)
        .i32(int(CALL, "tokens", tokens)?)
        .i32(int(CALL, "tile", tile)?);
    let args = shape.args(CALL, args)?;
    let args = args.i32(int(CALL, "kernel", kernel)?).f32(call.epsilon).f32(call.query_scale);
    let heads = 2 * shape.key_heads + shape.value_heads;
    let rows = tokens.div_ceil(tile);
    let grid = Grid {
        blocks: [blocks(CALL, heads.div_ceil(WARPS))?, blocks(CALL, rows)?, 1],
        threads: [128, 1, 1],
        shared_bytes: 0,
    };
    stream.launch(&device.kernel(MODULE, &["delta_conv"])?, grid, args)?;
    if rows == 1 {
        return Ok(());
    }
    let args = Args::new()
        .span(call.raw)
        .span(call.past)
        .i32(int(CALL, "tokens", tokens)?)
        .i32(int(CALL, "channels", channels)?)
        .i32(int(CALL, "kernel", kernel)?);
    let grid = Grid::new(blocks(CALL, channels.div_ceil(128))?, 128);
    stream.launch(&device.kernel(MODULE, &["delta_conv_keep"])?, grid, args)
}

/// What steps and chunks share.
#[derive(Clone, Copy)]
pub struct DeltaInputs<'a> {
    pub shape: DeltaShape,
    pub tokens: usize,
    /// `[tokens, channels]`, as [`delta_conv`] leaves it
    pub mixed: &'a Span,
    /// `[tokens, value_heads]`
    pub alpha: &'a Span,
    /// `[tokens, value_heads]`
    pub beta: &'a Span,
    /// `[value_heads]`: multiplies `softplus(alpha + decay_bias)`; negative.
    pub decay: &'a Span,
    /// `[value_heads]`
    pub decay_bias: &'a Span,
    /// `[value_dim]`
    pub norm: &'a Span,
    pub norm_epsilon: f32,
    /// `[tokens, value_heads, value_dim]`
    pub gate: &'a Span,
    /// `[value_heads, key_dim, value_dim]`, read and replaced
    pub memory: &'a Span,
    /// `[tokens, value_heads, value_dim]`, overwritten
    pub answers: &'a Span,
}

impl DeltaInputs<'_> {
    fn check(&self, call: &'static str) -> Result<(), CudaError> {
        let Self { shape, tokens, .. } = *self;
        shape.check(call)?;
        let (heads, values) = (shape.value_heads, shape.values());
        holds_floats(call, "mixed", self.mixed, &[tokens, shape.channels()], 16)?;
        holds_floats(call, "alpha", self.alpha, &[tokens, heads], 4)?;
        holds_floats(call, "beta", self.beta, &[tokens, heads], 4)?;
        holds_floats(call, "decay", self.decay, &[heads], 4)?;
        holds_floats(call, "decay_bias", self.decay_bias, &[heads], 4)?;
        holds_floats(call, "norm", self.norm, &[shape.value_dim], 4)?;
        holds_floats(call, "gate", self.gate, &[tokens, values], 4)?;
        holds_floats(call, "memory", self.memory, &[shape.memory()], 16)?;
        holds_floats(call, "answers", self.answers, &[tokens, values], 16)
    }

    /// Inputs and answers once, the memory twice.
    fn bytes(&self) -> usize {
        let Self { shape, tokens, .. } = *self;
        let row = shape.channels() + 2 * shape.values() + 2 * shape.value_heads;
        4 * (2 * shape.memory() + tokens * row)
    }
}

/// Steps of few tokens, one after the other.
pub struct DeltaDecode<'a> {
    pub inputs: DeltaInputs<'a>,
    /// `[value_heads]` u32, zero before the first call; calls leave them zero.
    /// Calls that may run at once have their own.
    pub counters: &'a Span,
}

impl DeltaDecode<'_> {
    /// Bytes that the launch must move.
    pub fn bytes(&self) -> u64 {
        self.inputs.bytes() as u64
    }
}

/// Launches `delta_decode`: the bits of the CPU.
///
/// # Errors
/// As [`delta_conv`].
pub fn delta_decode(
    device: &Device,
    stream: &Stream,
    call: DeltaDecode<'_>,
) -> Result<(), CudaError> {
    const CALL: &str = "delta_decode";
    let DeltaDecode { inputs, counters } = call;
    let DeltaInputs { shape, tokens, .. } = inputs;
    inputs.check(CALL)?;
    holds_floats(CALL, "counters", counters, &[shape.value_heads], 4)?;
    if tokens == 0 {
        return Ok(());
    }
    let args = Args::new()
        .span(inputs.mixed)
        .span(inputs.alpha)
        .span(inputs.beta)
        .span(inputs.decay)
        .span(inputs.decay_bias)
        .span(inputs.norm)
        .span(inputs.gate)
        .span(inputs.memory)
        .span(inputs.answers)
        .span(counters)
        .i32(int(CALL, "tokens", tokens)?);
    let args = shape.args(CALL, args)?.i32(i32::from(shape.is_tiled)).f32(inputs.norm_epsilon);
    let grid = Grid {
        blocks: [blocks(CALL, shape.value_heads)?, blocks(CALL, shape.slices())?, 1],
        threads: [32, 1, 1],
        shared_bytes: (4 * shape.key_dim * (COLUMNS + 2)) as u32,
    };
    stream.launch(&device.kernel(MODULE, &["delta_decode"])?, grid, args)
}

/// A prompt, or a piece of one, in chunks of 64 tokens.
pub struct DeltaPrefill<'a> {
    pub inputs: DeltaInputs<'a>,
    /// [`DeltaPrefill::scratch_bytes`], about 1 MiB per 64 tokens and 32 heads:
    /// callers cut long prompts.
    pub scratch: &'a Span,
}

impl DeltaPrefill<'_> {
    /// Bytes of [`DeltaPrefill::scratch`].
    pub fn scratch_bytes(shape: &DeltaShape, tokens: usize) -> usize {
        4 * tokens.div_ceil(DELTA_CHUNK) * shape.value_heads * CHUNK_WORK
    }

    /// Bytes that the launches must move; the scratch memory twice.
    pub fn bytes(&self) -> u64 {
        let DeltaInputs { shape, tokens, .. } = self.inputs;
        let again = 4 * tokens * (shape.channels() + 2 * shape.values());
        (self.inputs.bytes() + again + 2 * Self::scratch_bytes(&shape, tokens)) as u64
    }
}

/// Launches `delta_chunk_scores`, `delta_chunk_scan` and `delta_norm_gate`.
/// Answers differ from [`delta_decode`]'s by rounding; see the module's page.
///
/// # Errors
/// As [`delta_conv`].
pub fn delta_prefill(
    device: &Device,
    stream: &Stream,
    call: DeltaPrefill<'_>,
) -> Result<(), CudaError> {
    const CALL: &str = "delta_prefill";
    let DeltaPrefill { inputs, scratch } = call;
    let DeltaInputs { shape, tokens, .. } = inputs;
    inputs.check(CALL)?;
    let chunks = tokens.div_ceil(DELTA_CHUNK);
    holds_floats(CALL, "scratch", scratch, &[chunks, shape.value_heads, CHUNK_WORK], 16)?;
    if tokens == 0 {
        return Ok(());
    }
    let heads = blocks(CALL, shape.value_heads)?;
    let threads = [128, 1, 1];
    let args = Args::new()
        .span(inputs.mixed)
        .span(inputs.alpha)
        .span(inputs.beta)
        .span(inputs.decay)
        .span(inputs.decay_bias)
        .span(scratch)
        .i32(int(CALL, "tokens", tokens)?);
    let args = shape.args(CALL, args)?.i32(i32::from(shape.is_tiled));
    let grid = Grid { blocks: [blocks(CALL, chunks)?, heads, 1], threads, shared_bytes: 0 };
    stream.launch(&device.kernel(MODULE, &["delta_chunk_scores"])?, grid, args)?;

    let args = Args::new()
        .span(inputs.mixed)
        .span(scratch)
        .span(inputs.memory)
        .span(inputs.answers)
        .i32(int(CALL, "tokens", tokens)?);
    let args = shape.args(CALL, args)?.i32(i32::from(shape.is_tiled));
    let shared_bytes = (4 * shape.key_dim * COLUMNS + TILES_BYTES) as u32;
    let grid = Grid { blocks: [heads, blocks(CALL, shape.slices())?, 1], threads, shared_bytes };
    stream.launch(&device.kernel(MODULE, &["delta_chunk_scan"])?, grid, args)?;

    let args = Args::new()
        .span(inputs.norm)
        .span(inputs.gate)
        .span(inputs.answers)
        .i32(int(CALL, "tokens", tokens)?)
        .i32(int(CALL, "value heads", shape.value_heads)?)
        .i32(int(CALL, "value dim", shape.value_dim)?)
        .f32(inputs.norm_epsilon);
    let rows = tokens * shape.value_heads;
    let grid = Grid::new(blocks(CALL, rows.div_ceil(WARPS))?, 128);
    stream.launch(&device.kernel(MODULE, &["delta_norm_gate"])?, grid, args)
}
