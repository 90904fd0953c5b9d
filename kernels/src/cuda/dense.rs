//! Launchers of `kernels/cuda/dense.cu`: norms, quantisation, products of
//! matrices with a few tokens, embedding rows. Every result has the bits of
//! [`crate::contract`], [`crate::ops`] and the CPU backend.

use super::args::Args;
use super::rows::{Input, MOST_TOKENS, QuantisedSpans, Rows, activation_bytes, suffix};
use super::shape::{holds, holds_words, int, may_hold, optional, product};
use super::stream::Grid;
use super::{CudaError, Device, DeviceMatrix, Span, Stream};

const MODULE: &str = "dense";
const THREADS: u32 = 256;
/// Floats that a block of `norm` keeps in shared memory.
const MOST_NORM_WIDTH: usize = 12_000;

/// What a norm does.
#[derive(Clone, Copy)]
pub enum NormKind<'a> {
    /// `x / sqrt(mean(x^2) + epsilon) * weight`
    Rms,
    /// `(x - mean) / sqrt(variance + epsilon) * weight + bias`
    Layer {
        /// f32 `[width]`
        bias: Option<&'a Span>,
    },
}

/// The norm of rows, with what stands around it: an addition to the residual
/// stream in front, and quantisation behind.
pub struct Norm<'a> {
    pub kind: NormKind<'a>,
    pub rows: usize,
    /// At most 12,000.
    pub width: usize,
    /// f32: row `r` starts at element `r * x_stride`.
    pub x: &'a Span,
    pub x_stride: usize,
    /// f32 `[rows, width]` and a factor: `x += factor * delta` first, in place.
    pub delta: Option<(&'a Span, f32)>,
    /// f32 `[width]`
    pub weight: &'a Span,
    pub epsilon: f32,
    /// f32 and the elements from row to row; may be `x` itself.
    pub out: Option<(&'a Span, usize)>,
    /// The norm quantised, `[rows, width]`: at most one in groups of 32 and
    /// one in groups of 256.
    pub quantised: &'a [&'a QuantisedSpans],
}

impl Norm<'_> {
    /// Bytes that must move.
    pub fn bytes(&self) -> u64 {
        let forms: u64 = self.quantised.iter().map(|to| 4 + 32 / to.group as u64 + 1).sum();
        let per_element =
            4 * (1 + 2 * u64::from(self.delta.is_some())) + 4 * u64::from(self.out.is_some());
        let count = self.rows as u64 * self.width as u64;
        count * per_element + count * forms / 4 + 4 * self.width as u64
    }
}

/// Elements from the first of row 0 to the last of the last row.
fn extent(
    call: &'static str,
    rows: usize,
    stride: usize,
    width: usize,
) -> Result<usize, CudaError> {
    if rows > 1 && stride < width {
        let problem = format!("rows of {width} elements, {stride} apart");
        return Err(CudaError::shape(call, problem));
    }
    let last = product(call, &[rows.saturating_sub(1), stride])?;
    last.checked_add(width)
        .ok_or_else(|| CudaError::shape(call, format!("{rows} rows of {width} overflow")))
}

/// Runs [`Norm`].
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit, [`CudaError::Unsupported`] when
/// the rows are too wide; the driver's.
pub fn norm(device: &Device, stream: &Stream, call: Norm<'_>) -> Result<(), CudaError> {
    const CALL: &str = "norm";
    let Norm { rows, width, .. } = call;
    if rows == 0 || width == 0 {
        return Err(CudaError::shape(CALL, format!("{rows} rows of {width}")));
    }
    if width > MOST_NORM_WIDTH {
        let most = MOST_NORM_WIDTH;
        return Err(CudaError::unsupported(format!("a norm of {width} elements, above {most}")));
    }
    let count = product(CALL, &[rows, width])?;
    holds_words(CALL, "x", call.x, extent(CALL, rows, call.x_stride, width)?)?;
    holds_words(CALL, "weight", call.weight, width)?;
    may_hold(CALL, "delta", call.delta.map(|(delta, _)| delta), count)?;
    let (is_layer, bias) = match call.kind {
        NormKind::Rms => (0, None),
        NormKind::Layer { bias } => (1, bias),
    };
    may_hold(CALL, "bias", bias, width)?;
    let (out, out_stride) = match call.out {
        Some((out, stride)) => {
            holds_words(CALL, "out", out, extent(CALL, rows, stride, width)?)?;
            (Some(out), stride)
        }
        None => (None, 0),
    };
    let mut forms = [None; 2];
    for to in call.quantised {
        to.check(CALL, to.group, count)?;
        let form = &mut forms[usize::from(to.group == 256)];
        if !width.is_multiple_of(to.group) || form.replace(*to).is_some() {
            let group = to.group;
            let problem = format!("rows of {width} in groups of {group}, or these twice");
            return Err(CudaError::shape(CALL, problem));
        }
    }
    let args = Args::new().span(call.x);
    let mut args = optional(args, call.delta.map(|(delta, _)| delta))
        .f32(call.delta.map_or(0.0, |(_, factor)| factor))
        .span(call.weight);
    args = optional(args, bias)
        .f32(call.epsilon)
        .i32(is_layer)
        .i32(int(CALL, "width", width)?)
        .i32(int(CALL, "x stride", call.x_stride)?)
        .i32(int(CALL, "out stride", out_stride)?);
    args = optional(args, out);
    for form in forms {
        args = optional(args, form.map(|to| &to.q));
        args = optional(args, form.map(|to| &to.scales));
        args = optional(args, form.map(|to| &to.sums));
    }
    // Eight elements a thread; two warps sum.
    let threads = width.div_ceil(8).next_multiple_of(32).clamp(64, 512) as u32;
    let grid = Grid {
        blocks: [int(CALL, "rows", rows)? as u32, 1, 1],
        threads: [threads, 1, 1],
        shared_bytes: 4 * (width as u32 + 48),
    };
    stream.launch(&device.kernel(MODULE, &["norm_rows"])?, grid, args)
}

/// `x += factor * delta`, both f32 of `count` elements; moves 12 bytes each.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn add_scaled(
    device: &Device,
    stream: &Stream,
    x: &Span,
    delta: &Span,
    factor: f32,
    count: usize,
) -> Result<(), CudaError> {
    const CALL: &str = "add_scaled";
    holds_words(CALL, "x", x, count)?;
    holds_words(CALL, "delta", delta, count)?;
    if count == 0 {
        return Ok(());
    }
    // The last thread's index may not overflow either.
    int(CALL, "count", count.saturating_add(1024))?;
    let args = Args::new().span(x).span(delta).f32(factor).i32(count as i32);
    let grid = Grid::new(count.div_ceil(4 * THREADS as usize) as u32, THREADS);
    stream.launch(&device.kernel(MODULE, &["add_scaled"])?, grid, args)
}

/// Quantises rows of f32.
pub struct Quantise<'a> {
    pub rows: usize,
    pub cols: usize,
    /// f32, at a multiple of 16 bytes: row `r` starts at element `r * stride`,
    /// a multiple of 4.
    pub x: &'a Span,
    pub stride: usize,
    /// `[rows, cols]`
    pub to: &'a QuantisedSpans,
}

impl Quantise<'_> {
    /// Bytes that must move.
    pub fn bytes(&self) -> u64 {
        let count = self.rows as u64 * self.cols as u64;
        5 * count + count / 8 + count / self.to.group as u64 * 4
    }
}

/// Runs [`Quantise`].
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn quantise(device: &Device, stream: &Stream, call: Quantise<'_>) -> Result<(), CudaError> {
    const CALL: &str = "quantise";
    let Quantise { rows, cols, x, stride, to } = call;
    let problem = format!("[{rows}, {cols}], {stride} apart, in groups of {}", to.group);
    let is_whole = matches!(to.group, 32 | 256) && cols.is_multiple_of(to.group);
    if rows == 0 || cols == 0 || !is_whole || (rows > 1 && !stride.is_multiple_of(4)) {
        return Err(CudaError::shape(CALL, problem));
    }
    to.check(CALL, to.group, product(CALL, &[rows, cols])?)?;
    holds(CALL, "x", x, extent(CALL, rows, stride, cols)?, 4, 16)?;
    let args = Args::new()
        .span(x)
        .i32(int(CALL, "cols", cols)?)
        .i32(int(CALL, "stride", stride)?)
        .span(&to.q)
        .span(&to.scales)
        .span(&to.sums);
    // A row of decoding is one or a few blocks: small ones, on many
    // multiprocessors.
    let threads = 64;
    let blocks = [cols.div_ceil(8 * threads as usize) as u32, int(CALL, "rows", rows)? as u32, 1];
    let grid = Grid { blocks, threads: [threads, 1, 1], shared_bytes: 0 };
    let name = if to.group == 32 { "quantise_32" } else { "quantise_256" };
    stream.launch(&device.kernel(MODULE, &[name])?, grid, args)
}

/// Elements between the inputs, or outputs, of neighbouring tokens and
/// matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strides {
    pub token: usize,
    pub matrix: usize,
}

/// Products of one or several matrices with up to eight tokens.
pub struct Gemv<'a> {
    /// `[rows, cols]`, the first of the matrices, which follow each other
    /// without a gap; at a multiple of 16 bytes.
    pub weight: &'a DeviceMatrix,
    pub matrices: usize,
    /// 1 to 8
    pub tokens: usize,
    /// Token `t` of matrix `m` is the row from element
    /// `t * x_strides.token + m * x_strides.matrix`; 0 for `matrix`: all
    /// matrices have the same input.
    pub x: Input<'a>,
    pub x_strides: Strides,
    /// f32 `[matrices, rows]`; not for [`transposed`]
    pub bias: Option<&'a Span>,
    /// f32, by `out_strides`
    pub out: &'a Span,
    pub out_strides: Strides,
}

impl<'a> Gemv<'a> {
    /// One matrix: x is `[tokens, cols]`, out `[tokens, rows]`.
    pub fn one(
        weight: &'a DeviceMatrix,
        tokens: usize,
        x: Input<'a>,
        bias: Option<&'a Span>,
        out: &'a Span,
    ) -> Self {
        let x_strides = Strides { token: weight.cols, matrix: 0 };
        let out_strides = Strides { token: weight.rows, matrix: 0 };
        Self { weight, matrices: 1, tokens, x, x_strides, bias, out, out_strides }
    }

    /// Bytes that must move: weights once.
    pub fn bytes(&self) -> u64 {
        let Self { weight, matrices, tokens, .. } = self;
        let (matrices, tokens) = (*matrices as u64, *tokens as u64);
        let inputs = if self.x_strides.matrix == 0 { 1 } else { matrices };
        let bias = if self.bias.is_some() { 4 * weight.rows as u64 } else { 0 };
        matrices * (weight.bytes() + bias)
            + tokens * inputs * activation_bytes(weight.format, weight.cols)
            + tokens * matrices * 4 * weight.rows as u64
    }

    /// Checks all but the input's kind; the input has `wide` elements, the
    /// output `high`. Returns the elements that the input spans.
    fn check(&self, call: &'static str, wide: usize, high: usize) -> Result<usize, CudaError> {
        let Self { weight, matrices, tokens, x_strides, out_strides, .. } = self;
        weight.check(call)?;
        if *tokens == 0 || *tokens > MOST_TOKENS || *matrices == 0 {
            let problem = format!("{tokens} tokens (1 to {MOST_TOKENS}), {matrices} matrices");
            return Err(CudaError::shape(call, problem));
        }
        let bytes = product(call, &[weight.row_bytes(), weight.rows, *matrices])?;
        if weight.offset.checked_add(bytes).is_none_or(|end| end > weight.span.bytes()) {
            let problem = format!("{matrices} matrices of {bytes} bytes do not lie in their span");
            return Err(CudaError::shape(call, problem));
        }
        if !weight.address().is_multiple_of(16) {
            return Err(CudaError::shape(call, "a matrix not at a multiple of 16 bytes"));
        }
        let spanned = |strides: &Strides, width: usize| {
            let of_tokens = product(call, &[tokens - 1, strides.token])?;
            let of_matrices = product(call, &[matrices - 1, strides.matrix])?;
            of_tokens
                .checked_add(of_matrices)
                .and_then(|start| start.checked_add(width))
                .ok_or_else(|| CudaError::shape(call, "strides overflow"))
        };
        holds_words(call, "out", self.out, spanned(out_strides, high)?)?;
        may_hold(call, "bias", self.bias, product(call, &[*matrices, weight.rows])?)?;
        spanned(x_strides, wide)
    }

    fn sizes(&self, call: &'static str, args: Args) -> Result<Args, CudaError> {
        Ok(args
            .i32(int(call, "rows", self.weight.rows)?)
            .i32(int(call, "cols", self.weight.cols)?)
            .i32(self.tokens as i32)
            .i32(int(call, "x stride", self.x_strides.token)?)
            .i32(int(call, "x stride", self.x_strides.matrix)?)
            .i32(int(call, "out stride", self.out_strides.token)?)
            .i32(int(call, "out stride", self.out_strides.matrix)?))
    }
}

/// `out[t, m, r] = sum_c x[t, m, c] * W[m, r, c] + bias[m, r]`
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn gemv(device: &Device, stream: &Stream, call: Gemv<'_>) -> Result<(), CudaError> {
    const CALL: &str = "gemv";
    let DeviceMatrix { format, rows, cols, .. } = *call.weight;
    let elements = call.check(CALL, cols, rows)?;
    call.x.check(CALL, format, elements)?;
    let group = format.block_len();
    let Strides { token, matrix } = call.x_strides;
    if !token.is_multiple_of(group) || !matrix.is_multiple_of(group) {
        let problem = format!("inputs {token} and {matrix} apart are not groups of {group}");
        return Err(CudaError::shape(CALL, problem));
    }
    let args =
        Args::new().span(&call.weight.span.part(call.weight.offset..call.weight.span.bytes()));
    let (args, ending) = match call.x {
        Input::Floats(x) if call.tokens == 1 => (args.span(x), ""),
        Input::Floats(x) => (args.span(x), "_many"),
        Input::Quantised(x) => (args.span(&x.q).span(&x.scales).span(&x.sums), ""),
    };
    let args = call.sizes(CALL, optional(args, call.bias).span(call.out))?;
    let (tokens, count) = (call.tokens, call.matrices);
    let grid = Rows { format, rows, cols, tokens, count, is_paired: false }.grid(device);
    let kernel = device.kernel(MODULE, &["gemv_", suffix(format), ending])?;
    stream.launch(&kernel, grid, args)
}

/// `out[t, m, c] = sum_r x[t, m, r] * W[m, r, c]`, one fused multiply-add per
/// row in index order: the absorbed projections of latent attention, a matrix
/// per head. `x` is [`Input::Floats`] for every format, with rows of `rows`
/// elements; the outputs have `cols`.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn transposed(device: &Device, stream: &Stream, call: Gemv<'_>) -> Result<(), CudaError> {
    const CALL: &str = "transposed";
    let DeviceMatrix { format, rows, cols, .. } = *call.weight;
    let elements = call.check(CALL, rows, cols)?;
    let (Input::Floats(x), None) = (call.x, call.bias) else {
        return Err(CudaError::shape(CALL, "takes floats and no bias"));
    };
    holds_words(CALL, "x", x, elements)?;
    let args = Args::new()
        .span(&call.weight.span.part(call.weight.offset..call.weight.span.bytes()))
        .span(x)
        .span(call.out);
    let args = call.sizes(CALL, args)?;
    let each = if format.block_len() == 256 { 256 } else { 64 };
    let blocks = [cols.div_ceil(each) as u32, int(CALL, "matrices", call.matrices)? as u32, 1];
    let grid = Grid { blocks, threads: [each as u32, 1, 1], shared_bytes: 0 };
    stream.launch(&device.kernel(MODULE, &["transposed_", suffix(format)])?, grid, args)
}

/// Rows of a table as floats.
pub struct Embed<'a> {
    /// `[vocabulary, hidden]`
    pub table: &'a DeviceMatrix,
    /// i32 `[tokens]`; an id outside the table gives NaN.
    pub ids: &'a Span,
    pub tokens: usize,
    /// Multiplies every element.
    pub scale: f32,
    /// f32 `[tokens, hidden]`
    pub out: &'a Span,
}

impl Embed<'_> {
    /// Bytes that must move.
    pub fn bytes(&self) -> u64 {
        self.tokens as u64 * (self.table.row_bytes() as u64 + 4 * self.table.cols as u64 + 4)
    }
}

/// Runs [`Embed`].
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn embed(device: &Device, stream: &Stream, call: Embed<'_>) -> Result<(), CudaError> {
    const CALL: &str = "embed";
    let Embed { table, ids, tokens, scale, out } = call;
    table.check(CALL)?;
    let DeviceMatrix { format, rows, cols, .. } = *table;
    if tokens == 0 || !table.address().is_multiple_of(16) {
        let problem = format!("{tokens} tokens, or a table not at a multiple of 16 bytes");
        return Err(CudaError::shape(CALL, problem));
    }
    holds_words(CALL, "ids", ids, tokens)?;
    holds_words(CALL, "out", out, product(CALL, &[tokens, cols])?)?;
    let args = Args::new()
        .span(&table.span.part(table.offset..table.span.bytes()))
        .span(ids)
        .i32(int(CALL, "rows", rows)?)
        .i32(int(CALL, "cols", cols)?)
        .f32(scale)
        .span(out);
    let blocks = [cols.div_ceil(THREADS as usize) as u32, int(CALL, "tokens", tokens)? as u32, 1];
    let grid = Grid { blocks, threads: [THREADS, 1, 1], shared_bytes: 0 };
    stream.launch(&device.kernel(MODULE, &["embed_", suffix(format)])?, grid, args)
}
