//! Attention for few query tokens over a KV cache on the device
//! (`kernels/cuda/attention_chunk.cuh`), in chunks of 256 positions. Bits are
//! those of [`Backend::attention`](crate::Backend::attention) on the CPU.

use super::args::Args;
use super::cells::{CellFormat, DeviceCells};
use super::device::Device;
use super::error::CudaError;
use super::memory::Span;
use super::position::At;
use super::shape::{blocks, holds_floats, int, optional};
use super::stream::{Grid, Stream};

/// Positions of a chunk, at absolute multiples.
pub const CHUNK: usize = 256;
/// Shared memory of a block's two stages.
const STAGES_BYTES: usize = 2 * 64 * 256;
/// What a block may have without asking.
const SHARED_BYTES: usize = 48 << 10;
/// Up to this many chunks, the last block of a tile merges them; a launch of
/// its own has more warps for the work.
const MERGED_CHUNKS: usize = 32;
pub(super) const MODULE: &str = "attention";
/// Of a block.
pub(super) const WARPS: usize = 4;

/// A sigmoid gate on the answers: of head `h` of token `t`, the numbers from
/// `(t * heads + h) * stride`.
#[derive(Clone, Copy)]
pub struct OutputGate<'a> {
    /// Starts at a multiple of 16 bytes.
    pub span: &'a Span,
    /// In numbers, a multiple of 4.
    pub stride: usize,
}

/// How an [`Attend`] is cut. Answers do not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttendPlan {
    /// Queries of a block that share each load of keys and values: 1, 4, or,
    /// for f16 cells, 8.
    pub tile: usize,
    /// Chunks are merged in a launch of its own.
    pub merges_apart: bool,
}

/// Causal attention of `tokens` queries (1 to 8 is what it is made for) at
/// positions `at ..` over cells that hold theirs already.
pub struct Attend<'a> {
    /// `[tokens, heads, keys.width]`
    pub q: &'a Span,
    pub tokens: usize,
    pub heads: usize,
    /// Query heads `h * heads / kv_heads ..` share cache head `h`.
    pub kv_heads: usize,
    /// Widths are multiples of 8 and rows start at multiples of 16 bytes.
    pub keys: &'a DeviceCells,
    pub values: &'a DeviceCells,
    pub at: At<'a>,
    /// Multiplies `q . k` before the softmax.
    pub scale: f32,
    /// A query sees this many positions, itself included; `None`: all.
    pub window: Option<usize>,
    /// `[heads]`: a logit per head that has no value.
    pub sinks: Option<&'a Span>,
    pub gate: Option<OutputGate<'a>>,
    /// `[tokens, heads, values.width]`, overwritten
    pub out: &'a Span,
    /// [`Attend::scratch_bytes`]
    pub scratch: &'a Span,
    /// `4 * tokens * heads` bytes, zero before the first call; calls leave
    /// them zero. Calls that may run at once have their own.
    pub counters: &'a Span,
    /// `None`: chosen for the device.
    pub plan: Option<AttendPlan>,
}

/// The first position that a query at `position` sees.
fn first_visible(position: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window.max(1)))
}

/// Tiles that there are kernels for.
fn tiles(format: CellFormat) -> &'static [usize] {
    match format {
        CellFormat::F16 => &[1, 4, 8],
        CellFormat::F32 => &[1, 4],
    }
}

/// Shared memory of a block with a tile of `tile` queries.
fn shared_bytes(tile: usize, key_width: usize) -> usize {
    STAGES_BYTES + 4 * tile * (key_width + CHUNK)
}

impl Attend<'_> {
    /// Positions that any query sees, and the chunks that they are in; with
    /// [`At::Step`] the most of both that there may be.
    fn seen(&self) -> (usize, usize) {
        match self.at {
            At::Host(position) => {
                let first = first_visible(position, self.window);
                let end = position + self.tokens;
                (end - first, end.div_ceil(CHUNK) - first / CHUNK)
            }
            At::Step { most, .. } => {
                let seen = self.window.map_or(most, |window| {
                    most.min(window.max(1).saturating_add(self.tokens).saturating_sub(1))
                });
                // Those that follow each other may begin with a chunk's last.
                (seen, most.div_ceil(CHUNK).min((seen + CHUNK - 2) / CHUNK + 1))
            }
        }
    }

    /// Bytes of [`Attend::scratch`] for contexts of up to `positions`.
    pub fn scratch_bytes(
        tokens: usize,
        heads: usize,
        value_width: usize,
        positions: usize,
    ) -> usize {
        4 * tokens * heads * positions.div_ceil(CHUNK) * (value_width + 2)
    }

    /// Bytes that the launches must move: the seen cells once, queries,
    /// answers, and the chunks' parts out and in. With [`At::Step`] as late in
    /// the context as it is made for.
    pub fn bytes(&self) -> u64 {
        let (seen, chunks) = self.seen();
        let cells = (self.keys.width + self.values.width) * self.keys.format.bytes();
        let rows = self.tokens * self.heads;
        let parts = 2 * chunks * (self.values.width + 2);
        let floats = rows * (self.keys.width + self.values.width + parts);
        (self.kv_heads * seen * cells + 4 * floats) as u64
    }

    /// The largest tile that fits shared memory, smaller where the device
    /// would stand idle: its copies of the same cells come from L2.
    pub fn choose_plan(&self, multiprocessors: usize) -> Result<AttendPlan, CudaError> {
        let queries = self.tokens * (self.heads / self.kv_heads);
        let chunks = self.seen().1;
        let fits = |tile: &usize| shared_bytes(*tile, self.keys.width) <= SHARED_BYTES;
        let tiles = tiles(self.keys.format);
        let largest = tiles.iter().rev().copied().find(fits).ok_or_else(|| {
            CudaError::unsupported(format!("attention to keys of {} cells", self.keys.width))
        })?;
        let blocks = |tile: usize| chunks * self.kv_heads * queries.div_ceil(tile);
        let fills = |tile: usize| blocks(tile) >= multiprocessors;
        let tile = match queries {
            0..=1 => 1,
            2..=4 => largest.min(4),
            _ if fills(largest) => largest,
            _ => largest.min(4),
        };
        Ok(AttendPlan { tile, merges_apart: chunks > MERGED_CHUNKS })
    }

    fn check(&self) -> Result<(), CudaError> {
        const CALL: &str = "attend";
        let Self { tokens, heads, kv_heads, keys, values, .. } = *self;
        let fail = |problem: String| Err(CudaError::shape(CALL, problem));
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            return fail(format!("{heads} heads for {kv_heads} of the cache"));
        }
        let positions = self.at.positions(tokens);
        if positions > i32::MAX as usize / 2 {
            return fail(format!("{positions} positions"));
        }
        for cells in [keys, values] {
            cells.check(CALL, kv_heads, positions)?;
            if !cells.is_vectored() || cells.format != keys.format {
                return Err(CudaError::unsupported(format!(
                    "attention to rows of {} cells with strides {} and {} from {:#x}: multiples of \
                     8 cells and of 16 bytes are needed",
                    cells.width,
                    cells.head_stride,
                    cells.position_stride,
                    cells.span.address()
                )));
            }
        }
        let chunks = self.seen().1;
        let rows = tokens.saturating_mul(heads);
        holds_floats(CALL, "q", self.q, &[rows, keys.width], 4)?;
        holds_floats(CALL, "out", self.out, &[rows, values.width], 16)?;
        holds_floats(CALL, "scratch", self.scratch, &[rows, chunks, values.width + 2], 16)?;
        holds_floats(CALL, "counters", self.counters, &[rows], 4)?;
        if let Some(sinks) = self.sinks {
            holds_floats(CALL, "sinks", sinks, &[heads], 4)?;
        }
        if let Some(gate) = self.gate {
            if gate.stride % 4 != 0 || gate.stride < values.width {
                return fail(format!("gates every {} for {}", gate.stride, values.width));
            }
            // The last head's gate ends with its width.
            let before = rows.saturating_sub(1).saturating_mul(gate.stride);
            holds_floats(CALL, "gate", gate.span, &[before.saturating_add(values.width)], 16)?;
        }
        if let Some(AttendPlan { tile, .. }) = self.plan
            && !tiles(keys.format).contains(&tile)
        {
            return fail(format!("a tile of {tile} queries"));
        }
        Ok(())
    }
}

/// Launches `attend_*`, and `attention_merge` for long contexts.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit together,
/// [`CudaError::Unsupported`] for rows that are no multiples of 8 cells and
/// 16 bytes, and the driver's.
pub fn attend(device: &Device, stream: &Stream, call: Attend<'_>) -> Result<(), CudaError> {
    const CALL: &str = "attend";
    if call.tokens == 0 {
        return Ok(());
    }
    call.check()?;
    let Attend { tokens, heads, kv_heads, keys, values, .. } = call;
    let plan = match call.plan {
        Some(plan) => plan,
        None => call.choose_plan(device.info().multiprocessors as usize)?,
    };
    let chunks = call.seen().1;
    let rows = tokens * heads;
    // Parts `[rows, chunks, width]`, then maxima and sums `[rows, chunks, 2]`.
    let stats = call.scratch.address() + (4 * rows * chunks * values.width) as u64;
    let window = call.window.map_or(0, |window| window.max(1).min(i32::MAX as usize / 2));
    let gate_stride = int(CALL, "gate stride", call.gate.map_or(0, |gate| gate.stride))?;
    let gate = call.gate.map(|gate| gate.span);
    let counters = if plan.merges_apart { None } else { Some(call.counters) };
    let args = Args::new().span(call.q).span(&keys.span).span(&values.span);
    let args =
        optional(optional(args, call.sinks), gate).span(call.scratch).address(stats).span(call.out);
    let args = optional(args, counters)
        .i32(int(CALL, "tokens", tokens)?)
        .i32(int(CALL, "heads", heads)?)
        .i32(int(CALL, "kv heads", kv_heads)?)
        .i32(int(CALL, "keys width", keys.width)?)
        .i32(int(CALL, "values width", values.width)?);
    let args = (call.at.args(CALL, args, tokens)?)
        .i32(int(CALL, "chunks", chunks)?)
        .i32(int(CALL, "window", window)?)
        .f32(call.scale)
        .i32(int(CALL, "keys head stride", keys.head_stride)?)
        .i32(int(CALL, "keys position stride", keys.position_stride)?)
        .i32(int(CALL, "values head stride", values.head_stride)?)
        .i32(int(CALL, "values position stride", values.position_stride)?)
        .i32(gate_stride);
    let tiles = (tokens * (heads / kv_heads)).div_ceil(plan.tile);
    let grid = Grid {
        blocks: [blocks(CALL, tiles)?, blocks(CALL, chunks)?, blocks(CALL, kv_heads)?],
        threads: [128, 1, 1],
        shared_bytes: shared_bytes(plan.tile, keys.width) as u32,
    };
    let ending = match plan.tile {
        1 => "_q1",
        4 => "_q4",
        _ => "_q8",
    };
    let pieces = ["attend_", keys.format.suffix(), ending];
    stream.launch(&device.kernel(MODULE, &pieces)?, grid, args)?;
    if !plan.merges_apart {
        return Ok(());
    }
    let args = optional(optional(Args::new(), call.sinks), gate)
        .span(call.scratch)
        .address(stats)
        .span(call.out)
        .i32(int(CALL, "tokens", tokens)?)
        .i32(int(CALL, "heads", heads)?)
        .i32(int(CALL, "values width", values.width)?);
    let args = (call.at.args(CALL, args, tokens)?)
        .i32(int(CALL, "chunks", chunks)?)
        .i32(int(CALL, "window", window)?)
        .i32(gate_stride);
    let jobs = rows * values.width.div_ceil(128);
    let grid = Grid::new(blocks(CALL, jobs.div_ceil(WARPS))?, 128);
    stream.launch(&device.kernel(MODULE, &["attention_merge"])?, grid, args)
}
