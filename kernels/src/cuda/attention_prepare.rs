//! Heads on their way to attention (`kernels/cuda/attention_prepare.cuh`):
//! clamp, norm, rotation, append. Bits are those of the forward pass on the
//! CPU.

use super::args::Args;
use super::attention::{MODULE, WARPS};
use super::cells::DeviceCells;
use super::device::Device;
use super::error::CudaError;
use super::memory::Span;
use super::position::At;
use super::shape::{blocks, holds_floats, int, optional};
use super::stream::{Grid, Stream};

/// Pairs of elements that a rotation turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// `i` and `i + half`
    Halves,
    /// `2 i` and `2 i + 1`
    Neighbours,
}

/// A rotation by a table that the host made for the tokens of a call.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    /// `[tokens, half, 2]` f32: cos and sin.
    pub table: &'a Span,
    /// Pairs that are turned.
    pub half: usize,
    pub pairs: Pairs,
}

/// RMS normalisation of queries and keys.
#[derive(Clone, Copy)]
pub struct HeadNorms<'a> {
    /// Per head `[width]`, or, over all heads of a token, `[heads, width]`.
    pub q: &'a Span,
    /// `[width]` or `[kv_heads, width]`.
    pub k: &'a Span,
    /// Over all heads of a token instead of each.
    pub is_whole: bool,
    pub epsilon: f32,
}

/// Queries, keys and values of a chunk of tokens after their projections:
/// clamp, norm, rotation of the leading elements; keys and values join the
/// cache at `at ..`.
pub struct PrepareHeads<'a> {
    /// `[tokens, heads, width]`, or with `is_gated` `[tokens, heads, 2 width]`:
    /// per head the query, then its gate, which stays where it is.
    pub q_raw: &'a Span,
    pub is_gated: bool,
    /// `[tokens, kv_heads, width]`
    pub k_raw: &'a Span,
    /// `[tokens, kv_heads, width]`
    pub v_raw: &'a Span,
    pub norms: Option<HeadNorms<'a>>,
    /// Projections are clamped to this magnitude.
    pub limit: Option<f32>,
    pub rotation: Rotation<'a>,
    /// `[tokens, heads, width]`, overwritten; not `q_raw`.
    pub q: &'a Span,
    pub keys: &'a DeviceCells,
    pub values: &'a DeviceCells,
    pub tokens: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// Of a head.
    pub width: usize,
    pub at: At<'a>,
}

impl PrepareHeads<'_> {
    /// Bytes that the launch must move.
    pub fn bytes(&self) -> u64 {
        let floats = self.tokens * self.width * 2 * (self.heads + self.kv_heads)
            + self.tokens * self.rotation.half * 2;
        let cells = 2 * self.tokens * self.kv_heads * self.width * self.keys.format.bytes();
        (4 * floats + cells) as u64
    }

    fn check(&self) -> Result<(), CudaError> {
        const CALL: &str = "prepare_heads";
        let Self { tokens, heads, kv_heads, width, .. } = *self;
        let q_width = if self.is_gated { 2 * width } else { width };
        holds_floats(CALL, "q_raw", self.q_raw, &[tokens, heads, q_width], 4)?;
        holds_floats(CALL, "k_raw", self.k_raw, &[tokens, kv_heads, width], 4)?;
        holds_floats(CALL, "v_raw", self.v_raw, &[tokens, kv_heads, width], 4)?;
        holds_floats(CALL, "q", self.q, &[tokens, heads, width], 4)?;
        check_rotation(CALL, &self.rotation, tokens, width)?;
        if let Some(norms) = self.norms {
            let (q, k) = if norms.is_whole { (heads, kv_heads) } else { (1, 1) };
            holds_floats(CALL, "q norm", norms.q, &[q, width], 4)?;
            holds_floats(CALL, "k norm", norms.k, &[k, width], 4)?;
            if norms.is_whole && self.is_gated {
                return Err(CudaError::unsupported("a norm over all heads of gated queries"));
            }
        }
        for cells in [self.keys, self.values] {
            cells.check(CALL, kv_heads, self.at.positions(tokens))?;
            if cells.width != width || cells.format != self.keys.format {
                let problem = format!("cells of {} for heads of {width}", cells.width);
                return Err(CudaError::shape(CALL, problem));
            }
        }
        if self.q.address() == self.q_raw.address() {
            return Err(CudaError::shape(CALL, "q over q_raw"));
        }
        Ok(())
    }
}

/// Launches `attention_prepare_*`.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit together, and the driver's.
pub fn prepare_heads(
    device: &Device,
    stream: &Stream,
    call: PrepareHeads<'_>,
) -> Result<(), CudaError> {
    const CALL: &str = "prepare_heads";
    call.check()?;
    let PrepareHeads { tokens, heads, kv_heads, width, .. } = call;
    if tokens == 0 {
        return Ok(());
    }
    let norm = call.norms.map_or(0, |norms| 1 + i32::from(norms.is_whole));
    let kernel = device.kernel(MODULE, &["attention_prepare_", call.keys.format.suffix()])?;
    let args = Args::new().span(call.q_raw).span(call.k_raw).span(call.v_raw);
    let args = optional(args, call.norms.map(|norms| norms.q));
    let args = optional(args, call.norms.map(|norms| norms.k))
        .span(call.rotation.table)
        .span(call.q)
        .span(&call.keys.span)
        .span(&call.values.span)
        .i32(int(CALL, "tokens", tokens)?)
        .i32(int(CALL, "heads", heads)?)
        .i32(int(CALL, "kv heads", kv_heads)?)
        .i32(int(CALL, "width", width)?)
        .i32(int(CALL, "width", if call.is_gated { 2 * width } else { width })?)
        .i32(norm)
        .f32(call.norms.map_or(0.0, |norms| norms.epsilon))
        .f32(call.limit.unwrap_or(f32::INFINITY))
        .i32(int(CALL, "half", call.rotation.half)?)
        .i32(i32::from(call.rotation.pairs == Pairs::Neighbours));
    let args = (call.at.args(CALL, args, tokens)?)
        .i32(int(CALL, "keys head stride", call.keys.head_stride)?)
        .i32(int(CALL, "keys position stride", call.keys.position_stride)?)
        .i32(int(CALL, "values head stride", call.values.head_stride)?)
        .i32(int(CALL, "values position stride", call.values.position_stride)?);
    let jobs = tokens * (heads + 2 * kv_heads);
    stream.launch(&kernel, Grid::new(blocks(CALL, jobs.div_ceil(WARPS))?, 128), args)
}

fn check_rotation(
    call: &'static str,
    rotation: &Rotation<'_>,
    tokens: usize,
    width: usize,
) -> Result<(), CudaError> {
    holds_floats(call, "table", rotation.table, &[tokens, rotation.half, 2], 8)?;
    if 2 * rotation.half > width {
        let problem = format!("{} pairs turned in heads of {width}", rotation.half);
        return Err(CudaError::shape(call, problem));
    }
    Ok(())
}

/// Latent attention: the rotary part of every query goes to the end of its
/// absorbed row, and each token's row `[latent | rotary key]` joins the cache
/// with its latent normalised.
pub struct PrepareLatent<'a> {
    /// `[tokens, heads, nope + rope]`
    pub q_raw: &'a Span,
    /// `[tokens, rank + rope]`
    pub kv_raw: &'a Span,
    /// `[rank]`
    pub kv_norm: &'a Span,
    pub epsilon: f32,
    pub rotation: Rotation<'a>,
    /// `[tokens, heads, rank + rope]`; elements from `rank` on are written.
    pub absorbed: &'a Span,
    /// One head, rows of `rank + rope`.
    pub cells: &'a DeviceCells,
    pub tokens: usize,
    pub heads: usize,
    pub nope: usize,
    pub rope: usize,
    pub rank: usize,
    pub at: At<'a>,
}

impl PrepareLatent<'_> {
    /// Bytes that the launch must move.
    pub fn bytes(&self) -> u64 {
        let row = self.rank + self.rope;
        let floats = self.tokens * (2 * self.heads * self.rope + row + 2 * self.rotation.half);
        (4 * floats + self.tokens * row * self.cells.format.bytes()) as u64
    }

    fn check(&self) -> Result<(), CudaError> {
        const CALL: &str = "prepare_latent";
        let Self { tokens, heads, nope, rope, rank, .. } = *self;
        holds_floats(CALL, "q_raw", self.q_raw, &[tokens, heads, nope + rope], 4)?;
        holds_floats(CALL, "kv_raw", self.kv_raw, &[tokens, rank + rope], 4)?;
        holds_floats(CALL, "kv_norm", self.kv_norm, &[rank], 4)?;
        holds_floats(CALL, "absorbed", self.absorbed, &[tokens, heads, rank + rope], 4)?;
        check_rotation(CALL, &self.rotation, tokens, rope)?;
        self.cells.check(CALL, 1, self.at.positions(tokens))?;
        if self.cells.width != rank + rope {
            let problem = format!("cells of {} for rows of {}", self.cells.width, rank + rope);
            return Err(CudaError::shape(CALL, problem));
        }
        Ok(())
    }
}

/// Launches `latent_prepare_*`.
///
/// # Errors
/// As [`prepare_heads`].
pub fn prepare_latent(
    device: &Device,
    stream: &Stream,
    call: PrepareLatent<'_>,
) -> Result<(), CudaError> {
    const CALL: &str = "prepare_latent";
    call.check()?;
    let PrepareLatent { tokens, heads, .. } = call;
    if tokens == 0 {
        return Ok(());
    }
    let kernel = device.kernel(MODULE, &["latent_prepare_", call.cells.format.suffix()])?;
    let args = Args::new()
        .span(call.q_raw)
        .span(call.kv_raw)
        .span(call.kv_norm)
        .span(call.rotation.table)
        .span(call.absorbed)
        .span(&call.cells.span)
        .i32(int(CALL, "tokens", tokens)?)
        .i32(int(CALL, "heads", heads)?)
        .i32(int(CALL, "nope", call.nope)?)
        .i32(int(CALL, "rope", call.rope)?)
        .i32(int(CALL, "rank", call.rank)?)
        .f32(call.epsilon)
        .i32(int(CALL, "half", call.rotation.half)?)
        .i32(i32::from(call.rotation.pairs == Pairs::Neighbours));
    let args = (call.at.args(CALL, args, tokens)?).i32(int(
        CALL,
        "cells position stride",
        call.cells.position_stride,
    )?);
    let jobs = tokens * (heads + 1);
    stream.launch(&kernel, Grid::new(blocks(CALL, jobs.div_ceil(WARPS))?, 128), args)
}
