//! Matrix products of many tokens: prefill. Kernels: `kernels/cuda/gemm.cu`.
//!
//! Answers are the contract's in every bit, so they are those of decoding and
//! of the CPU.

use super::args::Args;
use super::experts::ExpertMatrix;
use super::rows::{Input, activation_bytes, suffix};
use super::shape::{holds, holds_words, int, may_hold, optional, product};
use super::stream::Grid;
use super::{CudaError, Device, DeviceMatrix, Span, Stream};
use crate::backend::GatedActivation;
use crate::format::{ActivationKind, Format};

const MODULE: &str = "gemm";
/// Tokens of a tile.
const TILE_TOKENS: usize = 64;
const THREADS: u32 = 256;
/// Rows of a tile of float weights.
const FLOAT_ROWS: usize = 32;

/// `out[t, r] = sum_c x[t, c] * W[r, c] + bias[r]`.
pub struct Gemm<'a> {
    /// `[rows, cols]`, at a multiple of 16 bytes.
    pub weight: &'a DeviceMatrix,
    /// f32 `[rows]`
    pub bias: Option<&'a Span>,
    /// `[tokens, cols]`
    pub x: Input<'a>,
    pub tokens: usize,
    /// f32 `[tokens, rows]`, overwritten.
    pub out: &'a Span,
}

/// Choices of a chunk sorted by expert, in tiles; see [`group_tiles`].
#[derive(Clone, Copy)]
pub struct Groups<'a> {
    pub experts: usize,
    /// Bytes of an expert's block.
    pub block_bytes: usize,
    /// Choices of all tokens: sorted positions.
    pub choices: usize,
    /// i32 `[experts + 1]`: the sorted positions of expert `e` are
    /// `starts[e] .. starts[e + 1]`, as the router's `chunk_gather` writes it.
    pub starts: &'a Span,
    /// u64 `[experts]`: the address of each expert's block on the device, a
    /// multiple of 16, or 0: it is skipped, and its rows are left as they are.
    /// Every block that it names is alive until the launch has ended.
    pub table: &'a Span,
    /// [`Groups::tiles_bytes`], written by [`group_tiles`].
    pub tiles: &'a Span,
}

impl Groups<'_> {
    /// Tiles that there may be, whatever the routing: an expert's last tile
    /// may be short, and experts without a choice have none.
    const fn most_tiles(experts: usize, choices: usize) -> usize {
        choices / TILE_TOKENS + if experts < choices { experts } else { choices }
    }

    /// Bytes of `tiles`: i32 `[1 + most, 4]`.
    pub const fn tiles_bytes(experts: usize, choices: usize) -> usize {
        16 + 16 * Self::most_tiles(experts, choices)
    }

    fn check(&self, call: &'static str) -> Result<(), CudaError> {
        let Self { experts, choices, .. } = *self;
        if experts == 0 || choices == 0 {
            return Err(CudaError::shape(call, format!("{choices} choices of {experts} experts")));
        }
        int(call, "choices", choices)?;
        holds_words(call, "starts", self.starts, experts.saturating_add(1))?;
        holds(call, "table", self.table, experts, 8, 8)?;
        holds(call, "tiles", self.tiles, Self::tiles_bytes(experts, choices), 1, 4)
    }
}

/// The second matrix of a gated pair.
#[derive(Clone, Copy)]
pub struct Up<'a> {
    pub matrix: ExpertMatrix,
    /// f32 `[experts, rows]`
    pub bias: Option<&'a Span>,
    pub activation: GatedActivation,
    /// f32 `[choices, rows]`, needed where its format is not that of gate.
    pub scratch: Option<&'a Span>,
}

/// A matrix of each resident expert times the tokens that chose it; with
/// `up`, gate and up and the activation between them.
pub struct GroupGemm<'a> {
    pub groups: Groups<'a>,
    /// `[rows, cols]`
    pub matrix: ExpertMatrix,
    pub rows: usize,
    pub cols: usize,
    /// f32 `[experts, rows]`
    pub bias: Option<&'a Span>,
    /// `matrix` is gate, this is up: `out` is `gated(gate, up)`.
    pub up: Option<Up<'a>>,
    /// `[x_rows, cols]`
    pub x: Input<'a>,
    pub x_rows: usize,
    /// i32 `[choices]`: the row of `x` of each sorted position, below
    /// `x_rows` (the router's `token_of`); `None`: the position.
    pub x_order: Option<&'a Span>,
    /// i32 `[choices]`: the row of `out`, below `choices` and named once (the
    /// router's `choice_of`); `None`: the position, as
    /// [`crate::Grouping::row_of`].
    pub out_order: Option<&'a Span>,
    /// f32 `[choices, rows]`; rows of experts that are not resident are left.
    pub out: &'a Span,
}

/// Turns sorted choices into tiles. Call it behind the router and behind the
/// last change of the table.
///
/// # Errors
/// [`CudaError::Shape`] when a span is too small; the driver's.
pub fn group_tiles(device: &Device, stream: &Stream, call: &Groups<'_>) -> Result<(), CudaError> {
    const CALL: &str = "group_tiles";
    call.check(CALL)?;
    let args = Args::new()
        .span(call.starts)
        .span(call.table)
        .i32(int(CALL, "experts", call.experts)?)
        .i32(int(CALL, "tiles", Groups::most_tiles(call.experts, call.choices))?)
        .span(call.tiles);
    stream.launch(&device.kernel(MODULE, &["group_tiles"])?, Grid::new(1, THREADS), args)
}

/// Launches a product.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit together; the driver's.
pub fn gemm(device: &Device, stream: &Stream, call: &Gemm<'_>) -> Result<(), CudaError> {
    const CALL: &str = "gemm";
    let Gemm { weight, bias, x, tokens, out } = *call;
    weight.check(CALL)?;
    if tokens == 0 {
        return Ok(());
    }
    if !weight.address().is_multiple_of(16) {
        return Err(CudaError::shape(CALL, "the weights are not at a multiple of 16 bytes"));
    }
    let DeviceMatrix { format, rows, cols, .. } = *weight;
    may_hold(CALL, "bias", bias, rows)?;
    x.check(CALL, format, product(CALL, &[tokens, cols])?)?;
    holds_words(CALL, "out", out, product(CALL, &[tokens, rows])?)?;
    let nothing = |args: Args, count| (0..count).fold(args, |args, _| args.address(0));
    let args = nothing(Args::new().address(weight.address()), 5).i32(0).i32(0).f32(0.0).f32(0.0);
    let args = optional(args, bias).address(0);
    let launch = Launch { device, stream, call: CALL, format, rows, cols, is_pair: false };
    launch.go(args, x, tokens.div_ceil(TILE_TOKENS), tokens, out)
}

impl Gemm<'_> {
    /// Bytes that the launch must move: weights, bias and input once, and the
    /// answers.
    pub fn bytes(&self) -> u64 {
        let Gemm { weight, bias, tokens, .. } = self;
        let DeviceMatrix { format, rows, cols, .. } = **weight;
        let bias = bias.map_or(0, |_| 4 * rows as u64);
        weight.bytes() + bias + *tokens as u64 * (activation_bytes(format, cols) + 4 * rows as u64)
    }
}

/// Launches a product of each resident expert; [`group_tiles`] before it.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit together,
/// [`CudaError::Unsupported`] when gate and up want inputs of different kinds;
/// the driver's.
pub fn group_gemm(device: &Device, stream: &Stream, call: &GroupGemm<'_>) -> Result<(), CudaError> {
    const CALL: &str = "group_gemm";
    let GroupGemm { groups, matrix, rows, cols, x, x_rows, x_order, out, .. } = *call;
    groups.check(CALL)?;
    call.check_matrix(CALL, matrix, call.bias)?;
    x.check(CALL, matrix.format, product(CALL, &[x_rows, cols])?)?;
    if x_order.is_none() && x_rows < groups.choices {
        return Err(CudaError::shape(CALL, "fewer rows of input than choices, and no order"));
    }
    may_hold(CALL, "x_order", x_order, groups.choices)?;
    may_hold(CALL, "out_order", call.out_order, groups.choices)?;
    let answers = product(CALL, &[groups.choices, rows])?;
    holds_words(CALL, "out", out, answers)?;
    let Some(up) = call.up else {
        return call.one(device, stream, (matrix, call.bias), None, out);
    };
    call.check_matrix(CALL, up.matrix, up.bias)?;
    if up.matrix.format == matrix.format {
        return call.one(device, stream, (matrix, call.bias), Some(up), out);
    }
    if up.matrix.format.activation() != matrix.format.activation() {
        let (gate, up) = (matrix.format, up.matrix.format);
        return Err(CudaError::unsupported(format!("{gate} gate and {up} up of one expert")));
    }
    let scratch = up.scratch.ok_or_else(|| {
        CudaError::shape(CALL, "gate and up of different formats need scratch memory")
    })?;
    holds_words(CALL, "scratch", scratch, answers)?;
    call.one(device, stream, (matrix, call.bias), None, out)?;
    call.one(device, stream, (up.matrix, up.bias), None, scratch)?;
    let (kind, alpha, limit) = numbers(up.activation);
    let args = optional(Args::new().span(groups.tiles), call.out_order)
        .i32(kind)
        .f32(alpha)
        .f32(limit)
        .i32(int(CALL, "rows", rows)?)
        .span(out)
        .span(scratch);
    let blocks = int(CALL, "tiles", Groups::most_tiles(groups.experts, groups.choices))? as u32;
    stream.launch(&device.kernel(MODULE, &["gate_rows"])?, Grid::new(blocks, THREADS), args)
}

impl GroupGemm<'_> {
    fn check_matrix(
        &self,
        call: &'static str,
        matrix: ExpertMatrix,
        bias: Option<&Span>,
    ) -> Result<(), CudaError> {
        let ExpertMatrix { format, offset } = matrix;
        let Self { groups, rows, cols, .. } = self;
        let end = format
            .row_bytes(*cols)
            .and_then(|bytes| bytes.checked_mul(*rows)?.checked_add(offset))
            .filter(|_| *rows > 0 && *cols > 0 && offset.is_multiple_of(16));
        if end.is_none_or(|end| end > groups.block_bytes) {
            let block = groups.block_bytes;
            let problem =
                format!("{format} matrix [{rows}, {cols}] at {offset} of a block of {block} bytes");
            return Err(CudaError::shape(call, problem));
        }
        may_hold(call, "bias", bias, product(call, &[groups.experts, *rows])?)
    }

    fn one(
        &self,
        device: &Device,
        stream: &Stream,
        (matrix, bias): (ExpertMatrix, Option<&Span>),
        up: Option<Up<'_>>,
        out: &Span,
    ) -> Result<(), CudaError> {
        let Groups { experts, choices, table, tiles, .. } = self.groups;
        let (kind, alpha, limit) = up.map_or((0, 0.0, 0.0), |up| numbers(up.activation));
        let args = Args::new()
            .address(matrix.offset as u64)
            .address(up.map_or(0, |up| up.matrix.offset as u64))
            .span(table)
            .span(tiles);
        let args = optional(optional(args, self.x_order), self.out_order)
            .i32(i32::from(up.is_some()))
            .i32(kind)
            .f32(alpha)
            .f32(limit);
        let args = optional(optional(args, bias), up.and_then(|up| up.bias));
        let (format, rows, cols) = (matrix.format, self.rows, self.cols);
        let is_pair = up.is_some();
        let launch = Launch { device, stream, call: "group_gemm", format, rows, cols, is_pair };
        launch.go(args, self.x, Groups::most_tiles(experts, choices), choices, out)
    }

    /// Bytes that the launch must move when `used` experts are resident and
    /// have tokens: their matrices, the input and the answers once.
    pub fn bytes(&self, used: usize) -> u64 {
        let GroupGemm { groups, matrix, rows, cols, x_rows, .. } = self;
        let of = |matrix: ExpertMatrix, bias: Option<&Span>| {
            let row = matrix.format.row_bytes(*cols).unwrap_or(0) + bias.map_or(0, |_| 4);
            (rows * row) as u64
        };
        let up = self.up.map_or(0, |up| of(up.matrix, up.bias));
        used as u64 * (of(*matrix, self.bias) + up)
            + *x_rows as u64 * activation_bytes(matrix.format, *cols)
            + 4 * (groups.choices * rows) as u64
    }
}

/// What plain and grouped products have in common.
struct Launch<'a> {
    device: &'a Device,
    stream: &'a Stream,
    call: &'static str,
    format: Format,
    rows: usize,
    cols: usize,
    is_pair: bool,
}

impl Launch<'_> {
    fn go(
        &self,
        args: Args,
        x: Input<'_>,
        token_tiles: usize,
        tokens: usize,
        out: &Span,
    ) -> Result<(), CudaError> {
        let Self { device, call, format, rows, cols, is_pair, .. } = *self;
        let ahead = device.info().compute_capability >= (8, 0);
        let tile_rows = tile_rows(format, ahead) / if is_pair { 2 } else { 1 };
        let row_tiles = int(call, "tiles of rows", rows.div_ceil(tile_rows))?;
        let token_tiles = int(call, "tiles of tokens", token_tiles)?;
        let grid = Grid {
            blocks: [token_tiles as u32, row_tiles as u32, 1],
            threads: [THREADS, 1, 1],
            shared_bytes: shared_bytes(format, ahead),
        };
        let args = match x {
            Input::Floats(x) => args.span(x),
            Input::Quantised(x) => args.span(&x.q).span(&x.scales).span(&x.sums),
        };
        let args = args
            .i32(int(call, "rows", rows)?)
            .i32(int(call, "cols", cols)?)
            .i32(int(call, "tokens", tokens)?)
            .span(out);
        let kernel = device.kernel(MODULE, &["gemm_", suffix(format)])?;
        self.stream.launch(&kernel, grid, args)
    }
}

/// Rows of a tile, pairs counted twice. `ahead`: the kernels of compute
/// capability 8.0 and higher.
fn tile_rows(format: Format, ahead: bool) -> usize {
    match format.block_len() {
        1 => FLOAT_ROWS,
        256 if ahead => 128,
        _ => 64,
    }
}

/// Dynamic shared memory of a block, as `Layout` of `gemm_tile.cuh` has it.
fn shared_bytes(format: Format, ahead: bool) -> u32 {
    if format.activation() == ActivationKind::F32 {
        return 0;
    }
    let whole = format.block_len() == 256;
    let has_minimum =
        matches!(format, Format::Q4_1 | Format::Q5_1 | Format::Q2K | Format::Q4K | Format::Q5K);
    let (rows, blocks) = (tile_rows(format, ahead), if whole { 1 } else { 8 });
    let slab = blocks * format.block_bytes();
    // Blocks start at multiples of the largest power of two that divides
    // their length, 16 at most; a row's slab is covered by whole 16 bytes.
    let align = 1 << format.block_bytes().trailing_zeros().min(4);
    let packed = rows * (slab + 16 - align).next_multiple_of(16);
    let codes = 256 * (rows + TILE_TOKENS * if ahead { 2 } else { 1 });
    let minimums = if has_minimum { 1 } else { 0 };
    let row_floats = 4 * rows * blocks * (1 + minimums);
    let token_floats = 4 * TILE_TOKENS * blocks * if whole { 1 } else { 1 + minimums };
    let sub_blocks = if whole { 16 * (rows + minimums * (rows + 2 * TILE_TOKENS)) } else { 0 };
    let lists = 8 * (rows + TILE_TOKENS);
    (codes + packed + row_floats + token_floats + sub_blocks + lists) as u32
}

/// Kind, alpha and limit of `contract_gated` in `common.cuh`.
fn numbers(activation: GatedActivation) -> (i32, f32, f32) {
    match activation {
        GatedActivation::Silu => (0, 0.0, 0.0),
        GatedActivation::ClampedSwiglu { alpha, limit } => (1, alpha, limit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same figures as the head of `kernels/cuda/gemm.cu`. A multiprocessor
    /// of compute capability 8.6, 8.9 or 12.0 gives a block 99 KB, Turing 64 KB.
    #[test]
    fn shared_memory_is_that_of_the_kernels() {
        for (format, bytes) in [
            (Format::Q2K, 86784),
            (Format::Q3K, 86272),
            (Format::Q4K, 92928),
            (Format::Q5K, 97024),
            (Format::Q6K, 98560),
            (Format::Iq4Xs, 88320),
            (Format::Q8_0, 72704),
            (Format::Q4_0, 64512),
            (Format::Mxfp4, 64512),
            (Format::Q4_1, 69632),
            (Format::Q5_0, 66560),
            (Format::Q5_1, 71680),
            (Format::Bf16, 0),
        ] {
            assert_eq!(shared_bytes(format, true), bytes, "{format}");
            assert!(shared_bytes(format, false) <= 56320, "{format}");
        }
    }

    #[test]
    fn tiles_are_enough_for_any_routing() {
        let tiles = |counts: &[usize]| counts.iter().map(|n| n.div_ceil(64)).sum::<usize>();
        for counts in [&[65, 1, 63, 64, 0, 1][..], &[1; 300], &[64; 4], &[65; 9], &[0, 0, 5]] {
            let choices = counts.iter().sum();
            assert!(tiles(counts) <= Groups::most_tiles(counts.len(), choices), "{counts:?}");
        }
    }
}
