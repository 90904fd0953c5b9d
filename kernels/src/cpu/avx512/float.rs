//! Rows of F32, F16 and BF16: 64 lanes in four registers.

use super::simd::*;
use crate::cpu::kernels::Rows;
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
            prefetch(row.as_ptr(), row.len().max(4096), row.len().min(16 * 1024));
            let mut lanes = [_mm512_setzero_ps(); 4];
            for (w, x) in row.chunks(64 * size).zip(x.chunks(64)) {
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
}
