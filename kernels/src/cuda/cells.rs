//! A KV cache's cells on the device, and checks that launchers share.

use super::args::Args;
use super::error::CudaError;
use super::memory::Span;

/// Element type of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CellFormat {
    F16,
    F32,
}

impl CellFormat {
    pub fn bytes(self) -> usize {
        match self {
            CellFormat::F16 => 2,
            CellFormat::F32 => 4,
        }
    }

    /// As the names of kernels have it.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            CellFormat::F16 => "f16",
            CellFormat::F32 => "f32",
        }
    }
}

/// Keys or values of all positions: head `h` of position `p` is the `width`
/// cells from `h * head_stride + p * position_stride`, counted in cells from
/// the start of the span. What [`crate::KvView`] is on the CPU.
#[derive(Clone)]
pub struct DeviceCells {
    pub format: CellFormat,
    pub span: Span,
    pub head_stride: usize,
    pub position_stride: usize,
    pub width: usize,
}

impl DeviceCells {
    /// Refuses cells that do not lie in their span for `heads` heads and
    /// `positions` positions.
    pub(super) fn check(
        &self,
        call: &'static str,
        heads: usize,
        positions: usize,
    ) -> Result<(), CudaError> {
        let Self { head_stride, position_stride, width, .. } = *self;
        let last = |count: usize, stride: usize| count.checked_sub(1)?.checked_mul(stride);
        let end = last(heads, head_stride)
            .zip(last(positions, position_stride))
            .and_then(|(head, position)| head.checked_add(position)?.checked_add(width))
            .and_then(|cells| cells.checked_mul(self.format.bytes()));
        let fits = end.is_some_and(|end| end <= self.span.bytes());
        if width == 0 || !fits || [head_stride, position_stride].iter().any(|s| *s > MOST) {
            let problem = format!(
                "{heads} heads (stride {head_stride}) of {positions} positions (stride \
                 {position_stride}) of {width} cells in {} bytes",
                self.span.bytes()
            );
            return Err(CudaError::shape(call, problem));
        }
        Ok(())
    }

    /// Whether every row starts at a multiple of 16 bytes and consists of
    /// such words and of multiples of 8 cells.
    pub(super) fn is_vectored(&self) -> bool {
        let bytes = self.format.bytes();
        self.width.is_multiple_of(8)
            && self.span.address().is_multiple_of(16)
            && (self.head_stride * bytes).is_multiple_of(16)
            && (self.position_stride * bytes).is_multiple_of(16)
    }
}

const MOST: usize = i32::MAX as usize;

/// Refuses a span that is shorter than the `shape` of f32 numbers, or does
/// not start at a multiple of `align` bytes.
pub(super) fn check_floats(
    call: &'static str,
    name: &str,
    span: &Span,
    shape: &[usize],
    align: u64,
) -> Result<(), CudaError> {
    let bytes = shape.iter().try_fold(4usize, |product, n| product.checked_mul(*n));
    if bytes.is_none_or(|bytes| bytes > span.bytes()) {
        let problem = format!("{name} {shape:?} of f32 in {} bytes", span.bytes());
        return Err(CudaError::shape(call, problem));
    }
    if !span.address().is_multiple_of(align) {
        let problem = format!("{name} starts at {:#x}, no multiple of {align}", span.address());
        return Err(CudaError::shape(call, problem));
    }
    Ok(())
}

/// A size as kernels take it.
pub(super) fn int(call: &'static str, value: usize) -> Result<i32, CudaError> {
    i32::try_from(value).map_err(|_| CudaError::shape(call, format!("{value} is too large")))
}

/// A number of blocks.
pub(super) fn blocks(call: &'static str, count: usize) -> Result<u32, CudaError> {
    Ok(int(call, count)? as u32)
}

/// A pointer that may be null.
pub(super) fn optional(args: Args, span: Option<&Span>) -> Args {
    match span {
        Some(span) => args.span(span),
        None => args.address(0),
    }
}
