//! How products of rows are cut into blocks of threads: the sizes of
//! `kernels/cuda/rows.cuh`, and what a product's input is.

use super::shape::{holds, product};
use super::stream::Grid;
use super::{Arena, CudaError, Device, Span};
use crate::format::{ActivationKind, Format};

/// Tokens of one pass over the weights.
pub const MOST_TOKENS: usize = 8;
/// Dynamic shared memory that a launch should not exceed, so that several
/// blocks of threads share a multiprocessor.
const SHARED_BYTES: usize = 47 << 10;
const MOST_WARPS: usize = 8;

/// Activations quantised in groups, as `norm` and `quantise` write and
/// products read them.
#[derive(Clone)]
pub struct QuantisedSpans {
    /// 32 or 256
    pub group: usize,
    /// i8 `[rows, cols]`, at a multiple of 16 bytes
    pub q: Span,
    /// f32 `[rows, cols / group]`
    pub scales: Span,
    /// i16 `[rows, cols / 16]`: sums of 16 neighbouring codes
    pub sums: Span,
}

impl QuantisedSpans {
    /// Bytes that [`QuantisedSpans::take`] takes, padding included.
    pub const fn bytes(group: usize, rows: usize, cols: usize) -> usize {
        let count = rows.saturating_mul(cols);
        count.saturating_add(count / group * 4).saturating_add(count / 8).saturating_add(48)
    }

    /// Memory for `[rows, cols]`.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when `cols` are not whole groups of 32 or 256;
    /// [`CudaError::OutOfMemory`].
    pub fn take(arena: &Arena, group: usize, rows: usize, cols: usize) -> Result<Self, CudaError> {
        let call = "quantised activations";
        let count = product(call, &[rows, cols])?;
        if !matches!(group, 32 | 256) || !cols.is_multiple_of(group) {
            return Err(CudaError::shape(call, format!("{cols} columns in groups of {group}")));
        }
        Ok(Self {
            group,
            q: arena.take(count, 16)?,
            scales: arena.take(count / group * 4, 16)?,
            sums: arena.take(count / 8, 16)?,
        })
    }

    /// Refuses spans that do not hold `elements`, or are of another group.
    pub(super) fn check(
        &self,
        call: &'static str,
        group: usize,
        elements: usize,
    ) -> Result<(), CudaError> {
        if self.group != group {
            let found = self.group;
            let problem = format!("activations in groups of {found}, {group} are wanted");
            return Err(CudaError::shape(call, problem));
        }
        if !elements.is_multiple_of(group) {
            let problem = format!("{elements} activations are not groups of {group}");
            return Err(CudaError::shape(call, problem));
        }
        holds(call, "codes", &self.q, elements, 1, 16)?;
        holds(call, "scales", &self.scales, elements / group, 4, 4)?;
        holds(call, "sums", &self.sums, elements / 16, 2, 2)
    }
}

/// What a product is given.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// f32, for F32, F16 and BF16 weights
    Floats(&'a Span),
    /// For quantised weights, in groups of their blocks' length
    Quantised(&'a QuantisedSpans),
}

impl Input<'_> {
    /// Refuses an input that is not what rows of `format` want, or does not
    /// hold `elements`.
    pub(super) fn check(
        &self,
        call: &'static str,
        format: Format,
        elements: usize,
    ) -> Result<(), CudaError> {
        match (self, format.activation()) {
            (Self::Floats(x), ActivationKind::F32) => holds(call, "x", x, elements, 4, 4),
            (Self::Quantised(x), ActivationKind::Int8Per32 | ActivationKind::Int8Per256) => {
                x.check(call, format.block_len(), elements)
            }
            _ => Err(CudaError::shape(call, format!("activations of the wrong kind for {format}"))),
        }
    }
}

/// Bytes of `cols` activations as rows of `format` read them.
pub(super) fn activation_bytes(format: Format, cols: usize) -> u64 {
    let cols = cols as u64;
    match format.activation() {
        ActivationKind::F32 => 4 * cols,
        _ => cols + cols / format.block_len() as u64 * 4 + cols / 8,
    }
}

/// The ending of kernels' names for a format.
pub(super) fn suffix(format: Format) -> &'static str {
    match format {
        Format::F32 => "f32",
        Format::F16 => "f16",
        Format::Bf16 => "bf16",
        Format::Q8_0 => "q8_0",
        Format::Q4_0 => "q4_0",
        Format::Q4_1 => "q4_1",
        Format::Q5_0 => "q5_0",
        Format::Q5_1 => "q5_1",
        Format::Q2K => "q2_k",
        Format::Q3K => "q3_k",
        Format::Q4K => "q4_k",
        Format::Q5K => "q5_k",
        Format::Q6K => "q6_k",
        Format::Iq4Nl => "iq4_nl",
        Format::Iq4Xs => "iq4_xs",
        Format::Mxfp4 => "mxfp4",
    }
}

/// Shared memory of `Stage` and `FloatStage` in bytes.
struct Stage {
    /// Of a warp.
    warp: usize,
    /// Of a token.
    token: usize,
}

/// `row_pitch`
const fn pitch(bytes: usize, align: usize) -> usize {
    (bytes + 16 - align + 31) / 64 * 64 + 32
}

/// The largest power of two up to 16 that divides every block's start.
const fn block_align(format: Format) -> usize {
    let bytes = format.block_bytes();
    let power = bytes & bytes.wrapping_neg();
    if power < 16 { power } else { 16 }
}

/// Integers per sub-block that stand beside the codes.
const fn starts(format: Format) -> usize {
    match format {
        Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 => 1,
        Format::Q4K | Format::Q5K => 8,
        Format::Q2K | Format::Q3K | Format::Q6K => 16,
        _ => 0,
    }
}

const fn stage(format: Format) -> Stage {
    let (len, bytes) = (format.block_len(), format.block_bytes());
    if len == 1 {
        return Stage { warp: 4 * pitch(1024, bytes), token: 1024 / bytes * 4 };
    }
    let step = match (len, bytes) {
        (256, _) => 8,
        (_, 25..) => 32,
        _ => 64,
    };
    let align = block_align(format);
    let rows = 4 * pitch(step * bytes, align);
    let run = (32 * bytes + 16 - align).div_ceil(16) * 16;
    Stage {
        warp: if rows > run { rows } else { run },
        token: step * (len + 16 + 4 * starts(format) + 4),
    }
}

/// Rows of a warp.
const fn rows_of_warp(format: Format, cols: usize) -> usize {
    let blocks = cols / format.block_len();
    match format.block_len() {
        1 => 4,
        _ if blocks < 8 => 32 / blocks,
        _ => 4,
    }
}

/// What a launch over rows computes.
pub(super) struct Rows {
    pub format: Format,
    pub rows: usize,
    pub cols: usize,
    pub tokens: usize,
    /// Matrices or experts: the grid's second dimension.
    pub count: usize,
    /// Half of the warps of a block take another matrix.
    pub is_paired: bool,
}

impl Rows {
    /// The grid with the largest blocks that still give every multiprocessor
    /// two of them. Bits do not depend on it.
    pub fn grid(&self, device: &Device) -> Grid {
        let each = rows_of_warp(self.format, self.cols);
        let wanted = 2 * device.info().multiprocessors as usize;
        let fewest = if self.is_paired { 2 } else { 1 };
        let blocks = |warps: usize| self.rows.div_ceil(warps / fewest * each);
        let mut warps = MOST_WARPS;
        while warps > fewest
            && (self.shared_bytes(warps) > SHARED_BYTES || blocks(warps) * self.count < wanted)
        {
            warps /= 2;
        }
        Grid {
            blocks: [blocks(warps) as u32, self.count as u32, 1],
            threads: [32 * warps as u32, 1, 1],
            shared_bytes: self.shared_bytes(warps) as u32,
        }
    }

    /// `Buffers` of `kernels/cuda/rows.cuh`, or its counterpart for floats.
    fn shared_bytes(&self, warps: usize) -> usize {
        let stage = stage(self.format);
        let is_float = self.format.block_len() == 1;
        let lanes = if is_float { 0 } else { 4 * 32 * warps };
        warps * stage.warp + self.tokens * (stage.token + lanes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same figures as the `static_assert`s of `kernels/cuda/rows.cuh`.
    #[test]
    fn sizes_are_those_of_the_kernels() {
        let sizes = |format| {
            let stage = stage(format);
            (stage.warp, stage.token)
        };
        assert_eq!(sizes(Format::Q8_0), (4480, 1664));
        assert_eq!(sizes(Format::Mxfp4), (4480, 3328));
        assert_eq!(sizes(Format::Q5_1), (6272, 3584));
        assert_eq!(sizes(Format::Q4K), (4736, 2464));
        assert_eq!(sizes(Format::Q6K), (6784, 2720));
        assert_eq!(sizes(Format::F16), (4224, 2048));
    }

    #[test]
    fn every_format_fits_eight_tokens() {
        for format in Format::ALL {
            let cols = 64 * format.block_len();
            let rows = Rows { format, rows: 1, cols, tokens: 8, count: 1, is_paired: true };
            assert!(rows.shared_bytes(2) <= SHARED_BYTES, "{format}");
            assert_eq!(rows_of_warp(format, cols), 4);
        }
        assert_eq!(rows_of_warp(Format::Q4K, 768), 10);
        assert_eq!(rows_of_warp(Format::Q8_0, 32), 32);
    }
}
