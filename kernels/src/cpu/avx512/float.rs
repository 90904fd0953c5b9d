//! Rows of F32, F16 and BF16: 64 lanes in four registers.

use super::decode::AHEAD;
use super::simd::*;
use crate::cpu::kernels::{Rows, Tile};
use crate::cpu::pool::Columns;
use crate::dequant::dequantize_row;
use crate::format::Format;
use std::arch::x86_64::*;

pub const F32: u8 = 0;
pub const F16: u8 = 1;
pub const BF16: u8 = 2;

simd! {
    /// Up to 16 elements from the start of `bytes`, the rest zero, as f32.
    pub fn load_weights<const KIND: u8>(bytes: &[u8]) -> __m512 {
        if KIND == F32 {
            let count = bytes.len() / 4;
            // SAFETY: the mask covers at most the slice; masked lanes are not
            // read.
            return unsafe { _mm512_maskz_loadu_ps(low_bits16(count), bytes.as_ptr().cast()) };
        }
        let count = bytes.len() / 2;
        // SAFETY: as above.
        let x = unsafe { _mm256_maskz_loadu_epi16(low_bits16(count), bytes.as_ptr().cast()) };
        if KIND == F16 {
            _mm512_cvtph_ps(x)
        } else {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
        }
    }

    fn rows_of<const KIND: u8>(rows: Rows<'_>, x: &[f32], out: &mut [f32]) {
        let size = if KIND == F32 { 4 } else { 2 };
        for (r, out) in out.iter_mut().enumerate() {
            let row = rows.row(r);
            let mut lanes = [_mm512_setzero_ps(); 4];
            let (whole, rest) = x.as_chunks::<64>();
            let mut pieces = row.chunks_exact(64 * size);
            for (w, x) in (&mut pieces).zip(whole) {
                prefetch(w.as_ptr(), AHEAD, 64 * size);
                for g in 0..4 {
                    let w = load_weights::<KIND>(&w[16 * size * g..16 * size * (g + 1)]);
                    let x = load_f32x16(&x.as_chunks().0[g]);
                    lanes[g] = _mm512_fmadd_ps(w, x, lanes[g]);
                }
            }
            if !rest.is_empty() {
                let (w, x) = (pieces.remainder(), rest);
                let pieces = w.chunks(16 * size).zip(x.chunks(16));
                for (lane, (w, x)) in lanes.iter_mut().zip(pieces) {
                    let mask = low_bits16(x.len());
                    *lane = _mm512_mask3_fmadd_ps(load_weights::<KIND>(w), load_f32(x), *lane, mask);
                }
            }
            *out = tree64(lanes);
        }
    }

    /// The contract's tree over 64 lanes.
    pub fn tree64(lanes: [__m512; 4]) -> f32 {
        let low = _mm512_add_ps(lanes[0], lanes[2]);
        let high = _mm512_add_ps(lanes[1], lanes[3]);
        tree16(_mm512_add_ps(low, high))
    }

    pub fn rows(rows: Rows<'_>, x: &[f32], out: &mut [f32]) {
        match rows.format {
            Format::F32 => rows_of::<F32>(rows, x, out),
            Format::F16 => rows_of::<F16>(rows, x, out),
            _ => rows_of::<BF16>(rows, x, out),
        }
    }

    fn convert<const KIND: u8>(row: &[u8], out: &mut [f32]) {
        let size = if KIND == F32 { 4 } else { 2 };
        for (w, out) in row.chunks(16 * size).zip(out.chunks_mut(16)) {
            store_f32(out, load_weights::<KIND>(w));
        }
    }

    pub fn dequantise(format: Format, row: &[u8], out: &mut [f32]) {
        match format {
            Format::F32 => convert::<F32>(row, out),
            Format::F16 => convert::<F16>(row, out),
            Format::Bf16 => convert::<BF16>(row, out),
            _ => dequantize_row(format, row, out),
        }
    }

    /// Rows times the tokens of all tiles: two rows and three tokens at a
    /// time, each with its 64 lanes.
    pub fn batch(rows: Rows<'_>, tiles: &[Tile], out: &mut Columns<'_, f32>) {
        match rows.format {
            Format::F32 => batch_of::<F32>(rows, tiles, out),
            Format::F16 => batch_of::<F16>(rows, tiles, out),
            _ => batch_of::<BF16>(rows, tiles, out),
        }
    }

    fn batch_of<const KIND: u8>(rows: Rows<'_>, tiles: &[Tile], out: &mut Columns<'_, f32>) {
        let mut token = 0;
        for tile in tiles {
            // Three tokens stay in the first-level cache while all rows pass.
            for xs in tile.x.chunks(3 * rows.cols) {
                let count = xs.len() / rows.cols;
                for first in (0..rows.rows).step_by(2) {
                    if first + 1 < rows.rows {
                        let pair = [rows.row(first), rows.row(first + 1)];
                        match count {
                            3 => corner::<KIND, 2, 3>(pair, xs, first, token, out),
                            2 => corner::<KIND, 2, 2>(pair, xs, first, token, out),
                            _ => corner::<KIND, 2, 1>(pair, xs, first, token, out),
                        }
                    } else {
                        let one = [rows.row(first)];
                        match count {
                            3 => corner::<KIND, 1, 3>(one, xs, first, token, out),
                            2 => corner::<KIND, 1, 2>(one, xs, first, token, out),
                            _ => corner::<KIND, 1, 1>(one, xs, first, token, out),
                        }
                    }
                }
                token += count;
            }
        }
    }

    /// `R` rows times `T` tokens.
    fn corner<const KIND: u8, const R: usize, const T: usize>(
        rows: [&[u8]; R],
        xs: &[f32],
        first: usize,
        token: usize,
        out: &mut Columns<'_, f32>,
    ) {
        let size = if KIND == F32 { 4 } else { 2 };
        let cols = xs.len() / T;
        let mut lanes = [[[_mm512_setzero_ps(); 4]; T]; R];
        let whole = cols / 64 * 64;
        for at in (0..whole).step_by(64) {
            for g in 0..4 {
                let from = at + 16 * g;
                let mut w = [_mm512_setzero_ps(); R];
                for r in 0..R {
                    w[r] = load_weights::<KIND>(&rows[r][from * size..(from + 16) * size]);
                }
                for t in 0..T {
                    let x = load_f32(&xs[t * cols + from..t * cols + from + 16]);
                    for r in 0..R {
                        lanes[r][t][g] = _mm512_fmadd_ps(w[r], x, lanes[r][t][g]);
                    }
                }
            }
        }
        for g in 0..4 {
            let (from, to) = (cols.min(whole + 16 * g), cols.min(whole + 16 * g + 16));
            let mask = low_bits16(to - from);
            for r in 0..R {
                let w = load_weights::<KIND>(&rows[r][from * size..to * size]);
                for t in 0..T {
                    let x = load_f32(&xs[t * cols + from..t * cols + to]);
                    lanes[r][t][g] = _mm512_mask3_fmadd_ps(w, x, lanes[r][t][g], mask);
                }
            }
        }
        for t in 0..T {
            let out = &mut out.row(token + t)[first..first + R];
            for r in 0..R {
                out[r] = tree64(lanes[r][t]);
            }
        }
    }
}
