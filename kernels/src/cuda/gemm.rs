//! Matrix products of many tokens: prefill. Kernels: `kernels/cuda/gemm.cu`.
//!
//! Answers are the contract's in every bit, so they are those of decoding and
//! of the CPU.

use super::{Args, CudaError, Device, DeviceMatrix, Grid, Span, Stream};
use crate::backend::GatedActivation;
use crate::format::{ActivationKind, Format};

/// Tokens of a tile.
pub const TILE_TOKENS: usize = 64;
const THREADS: u32 = 256;
/// Rows of a tile of float weights.
const FLOAT_ROWS: usize = 32;

/// The input of a product, as its format wants it ([`Format::activation`]).
#[derive(Clone, Copy)]
pub enum GemmInput<'a> {
    /// Quantised in groups of the format's block length.
    Int8 {
        /// i8 `[rows, cols]`, 16-byte aligned.
        q: &'a Span,
        /// f32 `[rows, cols / group]`
        scales: &'a Span,
        /// i16 `[rows, cols / 16]`: the sum of each sixteen of `q`.
        sums: &'a Span,
    },
    /// f32 `[rows, cols]`
    F32(&'a Span),
}

/// `out[t, r] = sum_c x[t, c] * W[r, c] + bias[r]`.
pub struct Gemm<'a> {
    /// `[rows, cols]`, at a multiple of 16 bytes.
    pub weight: &'a DeviceMatrix,
    /// f32 `[rows]`
    pub bias: Option<&'a Span>,
    /// `[tokens, cols]`
    pub input: GemmInput<'a>,
    pub tokens: usize,
    /// f32 `[tokens, rows]`, overwritten.
    pub out: &'a Span,
}

/// Tokens of a chunk sorted by expert, in tiles; see [`group_tiles`].
#[derive(Clone, Copy)]
pub struct Groups<'a> {
    pub experts: usize,
    /// Choices of all tokens: sorted positions.
    pub choices: usize,
    /// i32 `[experts + 1]`: sorted positions of each expert, of the router.
    pub starts: &'a Span,
    /// u64 `[experts]`: the address of each expert's block, 0 = not resident.
    pub table: &'a Span,
    /// i32 `[4 + 4 * most_tiles]`, written by [`group_tiles`].
    pub tiles: &'a Span,
}

impl Groups<'_> {
    /// Tiles that there may be, whatever the routing.
    pub fn most_tiles(experts: usize, choices: usize) -> usize {
        // An expert's last tile may be short, and experts without a token
        // have none.
        choices / TILE_TOKENS + experts.min(choices)
    }

    /// Bytes of `tiles`.
    pub fn tiles_bytes(experts: usize, choices: usize) -> usize {
        16 + 16 * Self::most_tiles(experts, choices)
    }
}

/// One matrix of each expert of a layer.
#[derive(Clone, Copy)]
pub struct ExpertMatrix<'a> {
    pub format: Format,
    /// `[rows, cols]`
    pub rows: usize,
    pub cols: usize,
    /// Bytes from the start of an expert's block; with the block's address a
    /// multiple of 16.
    pub offset: usize,
    /// f32 `[experts, rows]`
    pub bias: Option<&'a Span>,
}

/// A matrix of each resident expert times the tokens that chose it; with
/// `up`, gate and up and the activation between them.
pub struct GroupGemm<'a> {
    pub groups: Groups<'a>,
    pub matrix: ExpertMatrix<'a>,
    /// `matrix` is gate, this is up: `out` is `gated(gate, up)`.
    pub up: Option<(ExpertMatrix<'a>, GatedActivation)>,
    /// `[input_rows, cols]`
    pub input: GemmInput<'a>,
    pub input_rows: usize,
    /// i32 `[choices]`: the row of the input of each sorted position; `None`:
    /// the same.
    pub in_order: Option<&'a Span>,
    /// i32 `[choices]`: the row of the answer; `None`: the same.
    pub out_order: Option<&'a Span>,
    /// f32 `[choices, rows]`; rows of experts that are not resident are left.
    pub out: &'a Span,
    /// f32 `[choices, rows]`, needed where gate and up have different formats.
    pub scratch: Option<&'a Span>,
}

/// Turns sorted tokens into tiles. Call it behind the router and behind the
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
        .i32(int(CALL, call.experts)?)
        .i32(int(CALL, Groups::most_tiles(call.experts, call.choices))?)
        .span(call.tiles);
    stream.launch(&device.kernel("gemm", "group_tiles")?, Grid::new(1, THREADS), args)
}

impl Groups<'_> {
    fn check(&self, call: &'static str) -> Result<(), CudaError> {
        let Self { experts, choices, .. } = *self;
        if experts == 0 || choices == 0 {
            return Err(CudaError::shape(call, format!("{choices} choices of {experts} experts")));
        }
        holds(call, "starts", self.starts, &[experts + 1, 4], 4)?;
        holds(call, "table", self.table, &[experts, 8], 8)?;
        let tiles = Self::tiles_bytes(experts, choices);
        holds(call, "tiles", self.tiles, &[tiles], 4)
    }
}

/// Launches a product.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit together; the driver's.
pub fn gemm(device: &Device, stream: &Stream, call: &Gemm<'_>) -> Result<(), CudaError> {
    const CALL: &str = "gemm";
    let Gemm { weight, bias, input, tokens, out } = *call;
    weight.check(CALL)?;
    if tokens == 0 {
        return Ok(());
    }
    let matrix = ExpertMatrix {
        format: weight.format,
        rows: weight.rows,
        cols: weight.cols,
        offset: 0,
        bias,
    };
    if !weight.address().is_multiple_of(16) {
        return Err(CudaError::shape(CALL, "the weights are not at a multiple of 16 bytes"));
    }
    matrix.check(CALL, 1)?;
    input.check(CALL, weight.format, tokens, weight.cols)?;
    holds(CALL, "out", out, &[tokens, weight.rows, 4], 4)?;
    let args = Args::new()
        .address(weight.address())
        .address(0)
        .address(0)
        .address(0)
        .address(0)
        .address(0)
        .i32(0)
        .i32(0)
        .f32(0.0)
        .f32(0.0)
        .address(bias.map_or(0, Span::address))
        .address(0);
    let launch = Launch { device, stream, call: CALL, matrix, pair: false };
    launch.go(args, input, tokens.div_ceil(TILE_TOKENS), tokens, out)
}

impl Gemm<'_> {
    /// Bytes that the launch must move: weights and bias once, the input once
    /// and the answers.
    pub fn bytes(&self) -> u64 {
        let Gemm { weight, bias, tokens, .. } = self;
        let bias = if bias.is_some() { 4 * weight.rows } else { 0 };
        weight.bytes()
            + bias as u64
            + *tokens as u64 * (input_row_bytes(weight.format, weight.cols) + 4 * weight.rows as u64)
    }
}

/// Launches a product of each resident expert.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit together; the driver's.
pub fn group_gemm(device: &Device, stream: &Stream, call: &GroupGemm<'_>) -> Result<(), CudaError> {
    const CALL: &str = "group_gemm";
    let GroupGemm { groups, matrix, up, input, input_rows, in_order, out_order, .. } = *call;
    groups.check(CALL)?;
    matrix.check(CALL, groups.experts)?;
    input.check(CALL, matrix.format, input_rows, matrix.cols)?;
    for (name, order) in [("in_order", in_order), ("out_order", out_order)] {
        if let Some(order) = order {
            holds(CALL, name, order, &[groups.choices, 4], 4)?;
        }
    }
    if in_order.is_none() && input_rows < groups.choices {
        return Err(CudaError::shape(CALL, "fewer rows of input than choices, and no order"));
    }
    let size = [groups.choices, matrix.rows, 4];
    holds(CALL, "out", call.out, &size, 4)?;
    let Some((up, activation)) = up else {
        return call.one(device, stream, matrix, None, call.out);
    };
    up.check(CALL, groups.experts)?;
    if (up.rows, up.cols) != (matrix.rows, matrix.cols) {
        return Err(CudaError::shape(CALL, "gate and up are of different shapes"));
    }
    if up.format == matrix.format {
        return call.one(device, stream, matrix, Some((up, activation)), call.out);
    }
    if up.format.activation() != matrix.format.activation() {
        let problem = format!("{} gate and {} up want different inputs", matrix.format, up.format);
        return Err(CudaError::unsupported(problem));
    }
    let scratch = call.scratch.ok_or_else(|| {
        CudaError::shape(CALL, "gate and up of different formats need scratch memory")
    })?;
    holds(CALL, "scratch", scratch, &size, 4)?;
    call.one(device, stream, matrix, None, call.out)?;
    call.one(device, stream, up, None, scratch)?;
    let count = groups.choices * matrix.rows;
    let (kind, alpha, limit) = numbers(activation);
    let args = Args::new()
        .span(call.out)
        .span(scratch)
        .i32(kind)
        .f32(alpha)
        .f32(limit)
        .address(count as u64);
    let blocks = u32::try_from(count.div_ceil(THREADS as usize));
    let blocks = blocks.map_err(|_| CudaError::shape(CALL, format!("{count} elements")))?;
    stream.launch(&device.kernel("gemm", "gate_rows")?, Grid::new(blocks, THREADS), args)
}

impl GroupGemm<'_> {
    fn one(
        &self,
        device: &Device,
        stream: &Stream,
        matrix: ExpertMatrix<'_>,
        up: Option<(ExpertMatrix<'_>, GatedActivation)>,
        out: &Span,
    ) -> Result<(), CudaError> {
        let address = |span: Option<&Span>| span.map_or(0, Span::address);
        let Groups { experts, choices, table, tiles, .. } = self.groups;
        let (kind, alpha, limit) = up.map_or((0, 0.0, 0.0), |(_, activation)| numbers(activation));
        let args = Args::new()
            .address(matrix.offset as u64)
            .address(up.map_or(0, |(up, _)| up.offset as u64))
            .span(table)
            .span(tiles)
            .address(address(self.in_order))
            .address(address(self.out_order))
            .i32(i32::from(up.is_some()))
            .i32(kind)
            .f32(alpha)
            .f32(limit)
            .address(address(matrix.bias))
            .address(address(up.and_then(|(up, _)| up.bias)));
        let launch = Launch { device, stream, call: "group_gemm", matrix, pair: up.is_some() };
        launch.go(args, self.input, Groups::most_tiles(experts, choices), choices, out)
    }

    /// Bytes that the launch must move when `used` experts are resident and
    /// have tokens: their matrices, the input and the answers once.
    pub fn bytes(&self, used: usize) -> u64 {
        let GroupGemm { groups, matrix, up, input_rows, .. } = self;
        let of = |m: &ExpertMatrix<'_>| {
            let bias = if m.bias.is_some() { 4 * m.rows } else { 0 };
            (m.rows * m.format.row_bytes(m.cols).unwrap_or(0) + bias) as u64
        };
        let weights = of(matrix) + up.as_ref().map_or(0, |(up, _)| of(up));
        used as u64 * weights
            + *input_rows as u64 * input_row_bytes(matrix.format, matrix.cols)
            + 4 * (groups.choices * matrix.rows) as u64
    }
}

impl ExpertMatrix<'_> {
    fn check(&self, call: &'static str, experts: usize) -> Result<(), CudaError> {
        let Self { format, rows, cols, offset, bias } = *self;
        let bytes = format.row_bytes(cols).and_then(|row| row.checked_mul(rows));
        if bytes.is_none_or(|bytes| bytes == 0) || !offset.is_multiple_of(16) {
            let problem = format!("{format} matrix [{rows}, {cols}] at offset {offset}");
            return Err(CudaError::shape(call, problem));
        }
        match bias {
            Some(bias) => holds(call, "bias", bias, &[experts, rows, 4], 4),
            None => Ok(()),
        }
    }
}

impl GemmInput<'_> {
    fn check(
        &self,
        call: &'static str,
        format: Format,
        rows: usize,
        cols: usize,
    ) -> Result<(), CudaError> {
        match *self {
            Self::F32(x) if format.activation() == ActivationKind::F32 => {
                holds(call, "input", x, &[rows, cols, 4], 4)
            }
            Self::Int8 { q, scales, sums } if format.activation() != ActivationKind::F32 => {
                holds(call, "q", q, &[rows, cols], 16)?;
                holds(call, "scales", scales, &[rows, cols / format.block_len(), 4], 4)?;
                holds(call, "sums", sums, &[rows, cols / 16, 2], 8)
            }
            _ => Err(CudaError::shape(call, format!("input of the wrong kind for {format}"))),
        }
    }

    fn push(&self, args: Args) -> Args {
        match *self {
            Self::F32(x) => args.span(x),
            Self::Int8 { q, scales, sums } => args.span(q).span(scales).span(sums),
        }
    }
}

/// What plain and grouped products have in common.
struct Launch<'a> {
    device: &'a Device,
    stream: &'a Stream,
    call: &'static str,
    matrix: ExpertMatrix<'a>,
    pair: bool,
}

impl Launch<'_> {
    fn go(
        &self,
        args: Args,
        input: GemmInput<'_>,
        token_tiles: usize,
        tokens: usize,
        out: &Span,
    ) -> Result<(), CudaError> {
        let ExpertMatrix { format, rows, cols, .. } = self.matrix;
        let ahead = self.device.info().compute_capability >= (8, 0);
        let tile_rows = tile_rows(format, ahead) / if self.pair { 2 } else { 1 };
        let grid = Grid {
            blocks: [
                size(self.call, token_tiles)?,
                size(self.call, rows.div_ceil(tile_rows))?,
                1,
            ],
            threads: [THREADS, 1, 1],
            shared_bytes: shared_bytes(format, ahead),
        };
        let args = input
            .push(args)
            .i32(int(self.call, rows)?)
            .i32(int(self.call, cols)?)
            .i32(int(self.call, tokens)?)
            .span(out);
        let name = format!("gemm_{}", format.name().to_ascii_lowercase());
        self.stream.launch(&self.device.kernel("gemm", &name)?, grid, args)
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
pub fn shared_bytes(format: Format, ahead: bool) -> u32 {
    if format.activation() == ActivationKind::F32 {
        return 0;
    }
    let whole = format.block_len() == 256;
    let has_minimum = matches!(
        format,
        Format::Q4_1 | Format::Q5_1 | Format::Q2K | Format::Q4K | Format::Q5K
    );
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

fn input_row_bytes(format: Format, cols: usize) -> u64 {
    match format.activation() {
        ActivationKind::F32 => 4 * cols as u64,
        _ => (cols + cols / format.block_len() * 4 + cols / 16 * 2) as u64,
    }
}

/// Refuses a span that is shorter than the product of `size` in bytes, or not
/// at a multiple of `align`.
fn holds(
    call: &'static str,
    name: &str,
    span: &Span,
    size: &[usize],
    align: u64,
) -> Result<(), CudaError> {
    let needed = size.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
    if needed.is_some_and(|needed| needed <= span.bytes()) && span.address().is_multiple_of(align) {
        return Ok(());
    }
    let problem = format!(
        "{name} {size:?}, at a multiple of {align}, is a span of {} bytes at {:#x}",
        span.bytes(),
        span.address()
    );
    Err(CudaError::shape(call, problem))
}

fn int(call: &'static str, value: usize) -> Result<i32, CudaError> {
    i32::try_from(value).map_err(|_| CudaError::shape(call, format!("{value} is too large")))
}

fn size(call: &'static str, value: usize) -> Result<u32, CudaError> {
    u32::try_from(value).map_err(|_| CudaError::shape(call, format!("{value} is too large")))
}
