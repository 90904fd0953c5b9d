//! Attention of a chunk of queries: prefill. Kernels: `kernels/cuda/flash.cu`,
//! whose head states how far answers may be from those of the CPU.

use super::args::Args;
use super::cells::{CellFormat, DeviceCells};
use super::shape::{holds, may_hold, optional, product};
use super::stream::Grid;
use super::{CudaError, Device, Span, Stream};

const THREADS: u32 = 128;

/// Causal attention of queries at positions
/// `first_position .. first_position + tokens` over a cache that already
/// holds their keys and values; see [`crate::AttentionCall`].
pub struct Flash<'a> {
    /// f32 `[tokens, heads, keys.width]`
    pub q: &'a Span,
    pub tokens: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// F16 cells; each row is whole 16-byte words.
    pub keys: &'a DeviceCells,
    pub values: &'a DeviceCells,
    pub first_position: usize,
    pub scale: f32,
    /// A query sees this many positions, itself included; `None`: all.
    pub window: Option<usize>,
    /// f32 `[heads]`
    pub sinks: Option<&'a Span>,
    /// f32 `[tokens, heads, values.width]`, overwritten.
    pub out: &'a Span,
}

/// A kernel: widths, queries of a block, positions of a step.
struct Shape {
    name: &'static str,
    keys: usize,
    values: usize,
    queries: usize,
    positions: usize,
}

const fn heads(name: &'static str, width: usize, positions: usize) -> Shape {
    Shape { name, keys: width, values: width, queries: 64, positions }
}

const SHAPES: [Shape; 8] = [
    heads("flash_64", 64, 32),
    heads("flash_80", 80, 32),
    heads("flash_96", 96, 32),
    heads("flash_112", 112, 32),
    heads("flash_128", 128, 32),
    heads("flash_192", 192, 16),
    heads("flash_256", 256, 16),
    Shape { name: "flash_latent", keys: 576, values: 512, queries: 16, positions: 16 },
];

impl Shape {
    fn find(keys: usize, values: usize) -> Option<&'static Shape> {
        SHAPES.iter().find(|shape| (shape.keys, shape.values) == (keys, values))
    }

    /// Dynamic shared memory of a block: queries, keys, pairs of values, with
    /// the padding of `flash.cu`.
    fn shared_bytes(&self) -> u32 {
        let keys = 2 * (self.queries + self.positions) * (self.keys + 16);
        (keys + 2 * self.positions * (self.values + 8)) as u32
    }
}

/// Whether there is a kernel for heads of these widths (f16 cells); attention
/// of others is that of decoding.
pub fn has_flash(key_width: usize, value_width: usize) -> bool {
    Shape::find(key_width, value_width).is_some()
}

/// Launches attention.
///
/// # Errors
/// [`CudaError::Unsupported`] for widths without a kernel ([`has_flash`]);
/// [`CudaError::Shape`] when sizes do not fit together; the driver's.
pub fn flash(device: &Device, stream: &Stream, call: &Flash<'_>) -> Result<(), CudaError> {
    let Flash { q, tokens, heads, kv_heads, keys, values, first_position, .. } = *call;
    let fail = |problem: String| Err(CudaError::shape("flash", problem));
    let Some(shape) = Shape::find(keys.width, values.width) else {
        let what = format!("prefill attention with widths {} and {}", keys.width, values.width);
        return Err(CudaError::unsupported(what));
    };
    if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return fail(format!("{heads} heads over {kv_heads} heads of the cache"));
    }
    if tokens == 0 {
        return Ok(());
    }
    let positions = first_position.checked_add(tokens).filter(|end| i32::try_from(*end).is_ok());
    let Some(positions) = positions else {
        return fail(format!("{tokens} tokens from position {first_position}"));
    };
    for cells in [keys, values] {
        cells.check("flash", kv_heads, positions)?;
        if cells.format != CellFormat::F16 || !cells.is_vectored() {
            return fail("it wants f16 cells in rows of whole 16-byte words".to_string());
        }
    }
    holds("flash", "q", q, product("flash", &[tokens, heads, keys.width])?, 4, 4)?;
    holds("flash", "out", call.out, product("flash", &[tokens, heads, values.width])?, 4, 8)?;
    may_hold("flash", "sinks", call.sinks, heads)?;
    let queries = tokens.checked_mul(heads / kv_heads).filter(|n| i32::try_from(*n).is_ok());
    let (Some(queries), Ok(cache_heads)) = (queries, u16::try_from(kv_heads)) else {
        return fail(format!("{tokens} tokens of {heads} heads over {kv_heads}"));
    };
    // A window that covers the context is none.
    let window = call.window.map_or(0, |window| window.max(1).min(positions));
    let args = push(push(Args::new().span(q), keys), values);
    let args = optional(args, call.sinks)
        .span(call.out)
        .i32(tokens as i32)
        .i32(heads as i32)
        .i32(i32::from(cache_heads))
        .i32(first_position as i32)
        .i32(window as i32)
        .f32(call.scale);
    let grid = Grid {
        blocks: [queries.div_ceil(shape.queries) as u32, u32::from(cache_heads), 1],
        threads: [THREADS, 1, 1],
        shared_bytes: shape.shared_bytes(),
    };
    stream.launch(&device.kernel("flash", &[shape.name])?, grid, args)
}

impl Flash<'_> {
    /// Bytes that the launch must move: queries and answers once, keys and
    /// values of the visible positions once for each tile of queries.
    pub fn bytes(&self) -> u64 {
        let Flash { tokens, heads, kv_heads, keys, values, .. } = self;
        let Some(shape) = Shape::find(keys.width, values.width) else { return 0 };
        let shared = heads / kv_heads;
        let seen = |tile: usize| {
            let last = ((tile + 1) * shape.queries).min(tokens * shared) - 1;
            let end = self.first_position + last / shared + 1;
            let first = self.first_position + tile * shape.queries / shared + 1;
            end - self.window.map_or(0, |window| first.saturating_sub(window.max(1)))
        };
        let positions: usize = (0..(tokens * shared).div_ceil(shape.queries)).map(seen).sum();
        (4 * tokens * heads * (keys.width + values.width)
            + 2 * kv_heads * positions * (keys.width + values.width)) as u64
    }
}

fn push(args: Args, cells: &DeviceCells) -> Args {
    args.span(&cells.span).u64(cells.head_stride as u64).u64(cells.position_stride as u64)
}
