//! A KV cache's cells on the device.

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
