//! A borrowed weight matrix over bytes that somebody else owns (a mapped
//! file, a slot), checked once when it is made.

use crate::format::Format;
use thiserror::Error;

/// A matrix `[rows, cols]` whose bytes stay where they are.
///
/// Every [`Matrix`] satisfies: the bytes of each row lie inside the borrowed
/// slices, and `cols` is a whole number of the format's blocks.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    format: Format,
    rows: usize,
    cols: usize,
    storage: Storage<'a>,
}

/// Where the bytes of a row are.
#[derive(Clone, Copy, Debug)]
pub enum Storage<'a> {
    /// Row `r` starts at `r * stride` bytes.
    Rows { bytes: &'a [u8], stride: usize },
    /// Unquantised element `(r, c)` is element `c * pitch + r * step` of
    /// `bytes`: a transposed matrix, as Hugging Face folders of gpt-oss hold
    /// the experts.
    Columns { bytes: &'a [u8], pitch: usize, step: usize },
    /// MXFP4 with nibble pairs and scales in two arrays and elements low
    /// nibble first (element `2i` low, `2i + 1` high), as Hugging Face
    /// folders of gpt-oss hold the experts. Row `r` of the matrix is row
    /// `r * step` of the arrays.
    Mxfp4Pairs { blocks: &'a [u8], scales: &'a [u8], step: usize },
}

/// Sizes that do not fit together.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{format} matrix [{rows}, {cols}]: {problem}")]
pub struct ShapeError {
    pub format: Format,
    pub rows: usize,
    pub cols: usize,
    pub problem: String,
}

impl<'a> Matrix<'a> {
    /// Rows that follow each other without a gap.
    pub fn new(
        format: Format,
        rows: usize,
        cols: usize,
        bytes: &'a [u8],
    ) -> Result<Self, ShapeError> {
        let stride = format.row_bytes(cols).ok_or_else(|| {
            shape_error(format, rows, cols, "columns are not whole blocks".to_string())
        })?;
        Self::with_storage(format, rows, cols, Storage::Rows { bytes, stride })
    }

    /// Any [`Storage`], checked against the shape.
    pub fn with_storage(
        format: Format,
        rows: usize,
        cols: usize,
        storage: Storage<'a>,
    ) -> Result<Self, ShapeError> {
        let fail = |problem: String| Err(shape_error(format, rows, cols, problem));
        let Some(row_bytes) = format.row_bytes(cols) else {
            return fail("columns are not whole blocks".to_string());
        };
        if rows == 0 || cols == 0 {
            return fail("a dimension is zero".to_string());
        }
        let last = rows - 1;
        let (needed, found) = match storage {
            Storage::Rows { bytes, stride } => (
                last.checked_mul(stride).and_then(|start| start.checked_add(row_bytes)),
                bytes.len(),
            ),
            Storage::Columns { bytes, pitch, step } => {
                if format.block_len() != 1 {
                    return fail("quantised formats cannot be stored by columns".to_string());
                }
                let element = (|| {
                    (cols - 1)
                        .checked_mul(pitch)?
                        .checked_add(last.checked_mul(step)?)?
                        .checked_add(1)
                })();
                (element.and_then(|n| n.checked_mul(format.block_bytes())), bytes.len())
            }
            Storage::Mxfp4Pairs { blocks, scales, step } => {
                if format != Format::Mxfp4 {
                    return fail("nibble pairs are MXFP4 only".to_string());
                }
                let rows_held = last.checked_mul(step).and_then(|row| row.checked_add(1));
                let blocks_needed = rows_held.and_then(|n| n.checked_mul(cols / 32));
                match blocks_needed {
                    Some(n) if n > scales.len() => {
                        return fail(format!("needs {n} scales, has {}", scales.len()));
                    }
                    _ => {}
                }
                (blocks_needed.and_then(|n| n.checked_mul(16)), blocks.len())
            }
        };
        match needed {
            Some(needed) if needed <= found => Ok(Self { format, rows, cols, storage }),
            Some(needed) => fail(format!("needs {needed} bytes, has {found}")),
            None => fail("its size overflows".to_string()),
        }
    }

    pub fn format(&self) -> Format {
        self.format
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn storage(&self) -> Storage<'a> {
        self.storage
    }

    /// Bytes that a product with this matrix must read.
    pub fn weight_bytes(&self) -> usize {
        self.rows * self.row_bytes()
    }

    /// Bytes of one row in canonical block order.
    pub fn row_bytes(&self) -> usize {
        self.cols / self.format.block_len() * self.format.block_bytes()
    }

    /// All bytes and the row stride, when rows are in canonical block order.
    pub fn canonical_rows(&self) -> Option<(&'a [u8], usize)> {
        match self.storage {
            Storage::Rows { bytes, stride } => Some((bytes, stride)),
            _ => None,
        }
    }

    /// Row `r` in canonical block order: borrowed when it is stored so, else
    /// rebuilt in `scratch`.
    pub fn row<'s>(&self, r: usize, scratch: &'s mut Vec<u8>) -> &'s [u8]
    where
        'a: 's,
    {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        match self.storage {
            Storage::Rows { bytes, stride } => &bytes[r * stride..r * stride + self.row_bytes()],
            Storage::Columns { bytes, pitch, step } => {
                let size = self.format.block_bytes();
                scratch.clear();
                for c in 0..self.cols {
                    let at = (c * pitch + r * step) * size;
                    scratch.extend_from_slice(&bytes[at..at + size]);
                }
                scratch
            }
            Storage::Mxfp4Pairs { blocks, scales, step } => {
                let per_row = self.cols / 32;
                scratch.clear();
                for block in r * step * per_row..r * step * per_row + per_row {
                    scratch.push(scales[block]);
                    push_regrouped_nibbles(&blocks[block * 16..block * 16 + 16], scratch);
                }
                scratch
            }
        }
    }
}

/// GGUF keeps element `i` of a block in the low nibble of byte `i` and
/// element `i + 16` in its high nibble; pairs keep `2i` and `2i + 1` there.
fn push_regrouped_nibbles(pairs: &[u8], out: &mut Vec<u8>) {
    let element = |i: usize| (pairs[i / 2] >> (4 * (i % 2))) & 0x0f;
    out.extend((0..16).map(|i| element(i) | (element(i + 16) << 4)));
}

fn shape_error(format: Format, rows: usize, cols: usize, problem: String) -> ShapeError {
    ShapeError { format, rows, cols, problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_short_and_overflowing_storage() {
        let bytes = [0u8; 16];
        assert!(Matrix::new(Format::F32, 2, 2, &bytes).is_ok());
        assert!(Matrix::new(Format::F32, 2, 3, &bytes).is_err());
        assert!(Matrix::new(Format::F32, usize::MAX, 2, &bytes).is_err());
        assert!(Matrix::new(Format::Q8_0, 1, 31, &bytes).is_err());
        let columns = Storage::Columns { bytes: &bytes, pitch: usize::MAX, step: 2 };
        assert!(Matrix::with_storage(Format::F32, 2, 2, columns).is_err());
    }

    #[test]
    fn columns_are_gathered() {
        let bytes: Vec<u8> =
            [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        // Stored [cols = 3][rows = 2].
        let storage = Storage::Columns { bytes: &bytes, pitch: 2, step: 1 };
        let matrix = Matrix::with_storage(Format::F32, 2, 3, storage).unwrap();
        let mut scratch = Vec::new();
        let row: Vec<f32> = matrix
            .row(1, &mut scratch)
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        assert_eq!(row, [2.0, 4.0, 6.0]);
    }

    #[test]
    fn nibble_pairs_become_ggml_order() {
        let pairs: Vec<u8> = (0..16u8).map(|i| (2 * i % 16) | ((2 * i + 1) % 16) << 4).collect();
        let mut out = Vec::new();
        push_regrouped_nibbles(&pairs, &mut out);
        for i in 0..16u8 {
            assert_eq!(out[i as usize], i | i << 4, "elements {i} and {}", i + 16);
        }
    }
}
