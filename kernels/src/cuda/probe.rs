//! Launchers of `kernels/cuda/probe.cu`: what the device reaches at best, for
//! kernels to be compared with.

use super::args::Args;
use super::shape::{holds, int, product};
use super::stream::Grid;
use super::{CudaError, Device, Span, Stream};

const MODULE: &str = "probe";
const THREADS: u32 = 256;
/// Bytes of a word that [`probe_copy`] and [`probe_read`] move.
const WORD: usize = 16;

/// Launches nothing: what a launch costs.
pub fn probe_empty(device: &Device, stream: &Stream) -> Result<(), CudaError> {
    let kernel = device.kernel(MODULE, &["probe_empty"])?;
    stream.launch(&kernel, Grid::new(1, 32), Args::new().i32(0))
}

/// Copies `from` to the start of `to`, in `blocks` blocks of 256 threads.
/// Moves twice the bytes of `from`.
///
/// # Errors
/// [`CudaError::Shape`] when `from` is not whole words of 16 bytes, or `to` is
/// shorter; the driver's.
pub fn probe_copy(
    device: &Device,
    stream: &Stream,
    blocks: u32,
    from: &Span,
    to: &Span,
) -> Result<(), CudaError> {
    const CALL: &str = "probe_copy";
    let words = words(CALL, from)?;
    holds(CALL, "to", to, words, WORD, WORD as u64)?;
    let args = Args::new().span(to).span(from).u64(words as u64);
    stream.launch(&device.kernel(MODULE, &[CALL])?, Grid::new(blocks, THREADS), args)
}

/// Reads `from` in `blocks` blocks of 256 threads, each of which leaves the
/// exclusive or of the u32 that it has read. Moves the bytes of `from`.
///
/// - `sums`: u32 `[blocks, 256]`, overwritten
///
/// # Errors
/// As [`probe_copy`]'s.
pub fn probe_read(
    device: &Device,
    stream: &Stream,
    blocks: u32,
    from: &Span,
    sums: &Span,
) -> Result<(), CudaError> {
    const CALL: &str = "probe_read";
    let words = words(CALL, from)?;
    one_each(CALL, "sums", sums, blocks)?;
    let args = Args::new().span(sums).span(from).u64(words as u64);
    stream.launch(&device.kernel(MODULE, &[CALL])?, Grid::new(blocks, THREADS), args)
}

/// Products of 16 x 8 elements whose operands are ones in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeProduct {
    /// Depth 32, int8 in int32
    Int8,
    /// Depth 16, binary16 in binary32
    F16,
}

impl ProbeProduct {
    /// Products that a warp makes in a round.
    pub const IN_ROUND: u32 = 8;

    fn kernel(self) -> &'static str {
        match self {
            Self::Int8 => "probe_mma_s8",
            Self::F16 => "probe_mma_f16",
        }
    }

    /// Of one product; a multiplication and an addition are two.
    pub fn operations(self) -> u32 {
        let depth = match self {
            Self::Int8 => 32,
            Self::F16 => 16,
        };
        2 * 16 * 8 * depth
    }
}

/// Makes products in `rounds` rounds of `blocks` blocks of 8 warps. Moves no
/// bytes but its answers.
///
/// - `sums`: `[blocks, 256]`, i32 or f32: what a thread's elements add up to
///
/// # Errors
/// [`CudaError::Shape`] when `sums` is too short; the driver's.
pub fn probe_products(
    device: &Device,
    stream: &Stream,
    blocks: u32,
    product: ProbeProduct,
    rounds: usize,
    sums: &Span,
) -> Result<(), CudaError> {
    let name = product.kernel();
    one_each(name, "sums", sums, blocks)?;
    let args = Args::new().span(sums).i32(int(name, "rounds", rounds)?);
    stream.launch(&device.kernel(MODULE, &[name])?, Grid::new(blocks, THREADS), args)
}

/// Refuses a span that does not hold four bytes for each thread.
fn one_each(call: &'static str, what: &str, span: &Span, blocks: u32) -> Result<(), CudaError> {
    holds(call, what, span, product(call, &[blocks as usize, THREADS as usize])?, 4, 4)
}

/// How many words a span consists of.
fn words(call: &'static str, from: &Span) -> Result<usize, CudaError> {
    holds(call, "from", from, from.bytes().div_ceil(WORD), WORD, WORD as u64)?;
    Ok(from.bytes() / WORD)
}
