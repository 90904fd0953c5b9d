//! Launchers of `kernels/cuda/logits.cu`: the best logits, on the device.

use super::args::Args;
use super::shape::fills;
use super::stream::Grid;
use super::{Arena, CudaError, Device, Span, Stream};

/// Logits of a row.
pub const MOST_VOCABULARY: usize = 1 << 18;
/// Logits that [`top_k`] answers with.
pub const MOST_TOP_K: usize = 256;

/// Cells of a row's scratch.
const SCRATCH_CELLS: usize = 8192;
const ARGMAX_THREADS: u32 = 256;
/// Logits that a block of `logits_argmax` looks at, so that it has a few loads
/// under way and the whole device has work.
const ARGMAX_SLICE: usize = 2048;
/// Blocks that the last one reads in one go.
const ARGMAX_BLOCKS: usize = 256;
const TOP_THREADS: u32 = 512;
/// Logits that a block of `logits_top_k` can look at.
const TOP_SLICE: usize = 8192;
/// What it looks at if the scratch has room for that many blocks.
const TOP_USUAL_SLICE: usize = 2048;

/// What launches on one stream share.
pub struct LogitsScratch {
    rows: usize,
    /// u64 `[rows, 8192]`
    partial: Span,
    /// u32 `[rows]`: 0 between launches.
    arrived: Span,
}

impl LogitsScratch {
    /// Bytes that [`LogitsScratch::new`] takes from its arena.
    pub const fn bytes(rows: usize) -> usize {
        rows.saturating_mul(SCRATCH_CELLS * 8 + 4).saturating_add(256)
    }

    /// For launches of up to `rows` rows.
    pub fn new(arena: &Arena, stream: &Stream, rows: usize) -> Result<Self, CudaError> {
        let partial = arena.take(rows.saturating_mul(SCRATCH_CELLS * 8), 16)?;
        let arrived = arena.take(rows.saturating_mul(4), 16)?;
        stream.fill(&arrived, 0)?;
        Ok(Self { rows, partial, arrived })
    }
}

/// The best logits of each row: [`argmax`] takes the lowest id of equal ones
/// (zeros of both signs are equal), [`top_k`] is in the order of
/// [`f32::total_cmp`] and then by rising id. NaN counts as smallest in both,
/// and is told of.
pub struct BestLogits<'a> {
    pub scratch: &'a LogitsScratch,
    pub rows: usize,
    pub vocabulary: usize,
    /// f32 `[rows, vocabulary]`, at a multiple of 16 bytes.
    pub logits: &'a Span,
    /// i32 `[rows, wanted]`, best first
    pub ids: &'a Span,
    /// f32 `[rows, wanted]`: the logits of these ids.
    pub best: &'a Span,
    /// i32 `[rows]`: 1 where any logit of the row is NaN, else 0.
    pub has_nan: &'a Span,
}

impl BestLogits<'_> {
    /// Bytes that must move: the logits once, and the answers.
    pub fn bytes(&self) -> u64 {
        (self.logits.bytes() + self.ids.bytes() + self.best.bytes()) as u64
    }

    /// The first parameters of both kernels.
    fn row(&self, slice: usize) -> Args {
        Args::new().span(self.logits).i32(self.vocabulary as i32).i32(slice as i32)
    }

    /// Their last ones.
    fn answers(&self, args: Args) -> Args {
        let LogitsScratch { partial, arrived, .. } = self.scratch;
        args.span(partial).span(arrived).span(self.ids).span(self.best).span(self.has_nan)
    }

    fn check(&self, call: &'static str, wanted: usize) -> Result<(), CudaError> {
        let Self { scratch, rows, vocabulary, .. } = *self;
        let fail = |problem: String| Err(CudaError::shape(call, problem));
        if rows == 0 || rows > scratch.rows.min(0xffff) {
            return fail(format!("{rows} rows with scratch for {}", scratch.rows));
        }
        if vocabulary == 0 || vocabulary > MOST_VOCABULARY {
            return fail(format!("a vocabulary of {vocabulary}, 1 to {MOST_VOCABULARY}"));
        }
        if wanted == 0 || wanted > vocabulary.min(MOST_TOP_K) {
            return fail(format!("the best {wanted} of {vocabulary}, at most {MOST_TOP_K}"));
        }
        if !self.logits.address().is_multiple_of(16) {
            return fail("the logits do not start at a multiple of 16 bytes".to_string());
        }
        fills(call, "the logits", self.logits, rows * vocabulary)?;
        fills(call, "the ids", self.ids, rows * wanted)?;
        fills(call, "the best", self.best, rows * wanted)?;
        fills(call, "the rows with NaN", self.has_nan, rows)
    }
}

/// How a row is cut: logits of a block (a multiple of 4) and blocks.
fn cut(vocabulary: usize, usual: usize, blocks: usize) -> (usize, usize) {
    let slice = vocabulary.div_ceil(blocks).max(usual).next_multiple_of(4);
    (slice, vocabulary.div_ceil(slice))
}

/// The largest logit of each row: ids and best are `[rows]`.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn argmax(device: &Device, stream: &Stream, call: BestLogits<'_>) -> Result<(), CudaError> {
    call.check("logits_argmax", 1)?;
    let (slice, blocks) = cut(call.vocabulary, ARGMAX_SLICE, ARGMAX_BLOCKS);
    let args = call.answers(call.row(slice));
    let blocks = [blocks as u32, call.rows as u32, 1];
    let grid = Grid { blocks, threads: [ARGMAX_THREADS, 1, 1], shared_bytes: 0 };
    stream.launch(&device.kernel("logits", &["logits_argmax"])?, grid, args)
}

/// The `wanted` largest logits of each row, best first: ids and best are
/// `[rows, wanted]`. At most 256, and at most the vocabulary.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn top_k(
    device: &Device,
    stream: &Stream,
    call: BestLogits<'_>,
    wanted: usize,
) -> Result<(), CudaError> {
    call.check("logits_top_k", wanted)?;
    let (slice, blocks) = cut(call.vocabulary, TOP_USUAL_SLICE, SCRATCH_CELLS / wanted);
    debug_assert!(slice <= TOP_SLICE && blocks * wanted <= SCRATCH_CELLS);
    let args = call.answers(call.row(slice).i32(wanted as i32));
    let blocks = [blocks as u32, call.rows as u32, 1];
    let grid = Grid { blocks, threads: [TOP_THREADS, 1, 1], shared_bytes: 0 };
    stream.launch(&device.kernel("logits", &["logits_top_k"])?, grid, args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_cover_the_row_within_the_kernels_limits() {
        for vocabulary in [1, 3, 100, 2048, 2049, 32_000, 151_936, 262_143, MOST_VOCABULARY] {
            for wanted in [1, 2, 40, 64, 255, 256] {
                let (slice, blocks) = cut(vocabulary, TOP_USUAL_SLICE, SCRATCH_CELLS / wanted);
                assert!(slice <= TOP_SLICE && slice.is_multiple_of(4), "{vocabulary} {wanted}");
                assert!(blocks * wanted <= SCRATCH_CELLS, "{vocabulary} {wanted}");
                assert!((blocks - 1) * slice < vocabulary && vocabulary <= blocks * slice);
            }
            let (slice, blocks) = cut(vocabulary, ARGMAX_SLICE, ARGMAX_BLOCKS);
            assert!(blocks <= ARGMAX_BLOCKS && vocabulary <= blocks * slice);
        }
    }
}
