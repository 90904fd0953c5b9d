//! Prefill: panels of sixteen rows times tiles of eight tokens.
//!
//! One register holds four columns of sixteen rows; `vpdpbusd` multiplies it
//! by four activations that are broadcast from memory, so a tile of eight
//! tokens needs nine loads for eight multiplications of 64 products.

use super::simd::*;
use super::unpack::{self, Floats, Panel, Quad};
use crate::cpu::kernels::{Activations, Rows, Scratch, Tile};
use crate::cpu::pool::Columns;
use crate::format::{ActivationKind, Format};
use std::arch::x86_64::*;

/// Tokens of a tile.
pub const TOKENS: usize = 8;

/// A tile of up to eight tokens; what belongs to one group of columns, one
/// sub-block or one block is adjacent for all of them.
#[derive(Debug, Default)]
pub struct Packed {
    /// `[cols / 4]`: four int8 values per token.
    q: Vec<[i32; TOKENS]>,
    /// Sums of the groups of 16 or 32 that the format wants.
    sums: Vec<[i32; TOKENS]>,
    /// Pairs of 16-bit sums, for formats with minimums per sub-block.
    pairs: Vec<[i32; TOKENS]>,
    /// `[blocks]`
    scales: Vec<[f32; TOKENS]>,
}

/// Rearranges `tokens` of `x` into `[cols / 4][8][4]` and the sums and
/// scales beside it into `[...][8]`; missing tokens are zero.
pub fn pack(format: Format, x: &Activations, tokens: &[u32], out: &mut Tile) {
    let cols = x.cols;
    if format.activation() == ActivationKind::F32 {
        out.x.clear();
        for t in tokens {
            out.x.extend_from_slice(x.token(*t as usize).x);
        }
        return;
    }
    let out = &mut out.packed;
    let shape = unpack::shape(format);
    let blocks = cols / format.block_len();
    let zeroed = |ints: &mut Vec<[i32; TOKENS]>, count: usize| {
        ints.clear();
        ints.resize(count, [0; TOKENS]);
    };
    zeroed(&mut out.q, cols / 4);
    zeroed(&mut out.sums, cols / shape.sub_len);
    zeroed(&mut out.pairs, blocks * shape.min_pairs);
    out.scales.clear();
    out.scales.resize(blocks, [0.0; TOKENS]);
    for (t, token) in tokens.iter().enumerate() {
        let x = x.token(*token as usize);
        for (out, q) in out.q.iter_mut().zip(x.q.as_chunks::<4>().0) {
            out[t] = i32::from_le_bytes(q.map(|q| q as u8));
        }
        for (out, scale) in out.scales.iter_mut().zip(x.scales) {
            out[t] = *scale;
        }
        let sums = if shape.sub_len == 16 { x.sums16 } else { x.sums32 };
        for (out, sum) in out.sums.iter_mut().zip(sums) {
            // Where the weights are offset, what the offset adds to each dot
            // product is taken off before it starts.
            out[t] = match shape.shift {
                Some(shift) => -((*sum as i32) << shift),
                None => *sum as i32,
            };
        }
        for (out, pair) in out.pairs.iter_mut().zip(sums.as_chunks::<2>().0) {
            out[t] = (pair[0] as u16 as u32 | (pair[1] as u16 as u32) << 16) as i32;
        }
    }
}

/// The answers of one panel and tile.
type Answers = [Floats; TOKENS];
/// Float lanes of a tile: `[lane][token][row]`.
type Lanes = [[Floats; TOKENS]];

simd! {
    pub fn batch(rows: Rows<'_>, tiles: &[Tile], scratch: &mut Scratch, out: &mut Columns<'_, f32>) {
        if rows.format.activation() == ActivationKind::F32 {
            return super::float::batch(rows, tiles, out);
        }
        let panel = &mut scratch.panel;
        for first in (0..rows.rows).step_by(16) {
            let some = 16.min(rows.rows - first);
            unpack::unpack(rows, first, panel);
            let mut token = 0;
            for tile in tiles {
                let mut answers: Answers = [[0.0; 16]; TOKENS];
                multiply(rows.format, panel, tile, &mut answers);
                for answer in &answers[..tile.tokens] {
                    store_f32(&mut out.row(token)[first..first + some], load_f32x16(answer));
                    token += 1;
                }
            }
        }
    }

    /// Few tokens take the half tile.
    fn multiply(format: Format, panel: &mut Panel, tile: &Tile, answers: &mut Answers) {
        if tile.tokens > TOKENS / 2 {
            multiply_by::<TOKENS>(format, panel, &tile.packed, answers);
        } else {
            multiply_by::<{ TOKENS / 2 }>(format, panel, &tile.packed, answers);
        }
    }

    fn multiply_by<const T: usize>(
        format: Format,
        panel: &mut Panel,
        tile: &Packed,
        answers: &mut Answers,
    ) {
        match format {
            Format::Q4K | Format::Q5K => wide::<8, 8, 4, false, T>(panel, tile, answers),
            Format::Iq4Xs => wide::<8, 8, 0, true, T>(panel, tile, answers),
            Format::Q6K | Format::Q3K => wide::<4, 16, 0, true, T>(panel, tile, answers),
            Format::Q2K => wide::<4, 16, 8, false, T>(panel, tile, answers),
            Format::Q4_1 | Format::Q5_1 => narrow::<true, T>(panel, tile, answers),
            _ => narrow::<false, T>(panel, tile, answers),
        }
    }

    /// One group of four columns against `T` tokens.
    fn step<const T: usize>(acc: &mut [__m512i; T], w: &Quad, q: &[i32; TOKENS]) {
        let w = load64(w);
        for t in 0..T {
            acc[t] = _mm512_dpbusd_epi32(acc[t], w, _mm512_set1_epi32(q[t]));
        }
    }

    /// Blocks of 256 with `SUBS` sub-blocks of `QUADS` groups of columns.
    fn wide<const QUADS: usize, const SUBS: usize, const PAIRS: usize, const OFFSET: bool, const T: usize>(
        panel: &mut Panel,
        tile: &Packed,
        answers: &mut Answers,
    ) {
        let lanes = &mut panel.lanes;
        let quads = panel.quads.as_chunks::<64>().0;
        // Lanes without blocks stay at zero; the others start at zero.
        lanes[quads.len().min(8)..].fill([[0.0; 16]; TOKENS]);
        let scales = panel.scales.as_chunks::<SUBS>().0;
        let q = tile.q.as_chunks::<64>().0;
        let sums = tile.sums.as_chunks::<SUBS>().0;
        let blocks = quads.iter().zip(scales).zip(q.iter().zip(sums)).enumerate();
        for (b, ((quads, scales), (q, sums))) in blocks {
            let mut block = [_mm512_setzero_si512(); T];
            let subs = quads.as_chunks::<QUADS>().0.iter().zip(q.as_chunks::<QUADS>().0);
            for ((quads, q), (scale, sum)) in subs.zip(scales.iter().zip(sums)) {
                let mut acc = [_mm512_setzero_si512(); T];
                if OFFSET {
                    for t in 0..T {
                        acc[t] = _mm512_set1_epi32(sum[t]);
                    }
                }
                for k in 0..QUADS {
                    step(&mut acc, &quads[k], &q[k]);
                }
                let scale = load_i32x16(scale);
                for t in 0..T {
                    block[t] = _mm512_add_epi32(block[t], _mm512_mullo_epi32(acc[t], scale));
                }
            }
            let (d, factors) = (load_f32x16(&panel.d[b]), &tile.scales[b]);
            let lane = &mut lanes[b % 8];
            for t in 0..T {
                let factor = _mm512_mul_ps(d, _mm512_set1_ps(factors[t]));
                let before = if b < 8 { _mm512_setzero_ps() } else { load_f32x16(&lane[t]) };
                let sum = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(block[t]), before);
                store_f32x16(&mut lane[t], sum);
            }
            if PAIRS > 0 {
                let mut acc = [_mm512_setzero_si512(); T];
                for p in b * PAIRS..(b + 1) * PAIRS {
                    let mins = load_i32x16(&panel.mins[p]);
                    let pairs = &tile.pairs[p];
                    for t in 0..T {
                        acc[t] = _mm512_dpwssd_epi32(acc[t], mins, _mm512_set1_epi32(pairs[t]));
                    }
                }
                let m = load_f32x16(&panel.m[b]);
                for t in 0..T {
                    let factor = _mm512_mul_ps(m, _mm512_set1_ps(factors[t]));
                    let sum = _mm512_fnmadd_ps(factor, _mm512_cvtepi32_ps(acc[t]), load_f32x16(&lane[t]));
                    store_f32x16(&mut lane[t], sum);
                }
            }
        }
        add_lanes::<T>(lanes, answers);
    }

    /// Blocks of 32, lane after lane, so that the lanes stay in registers.
    fn narrow<const MINIMUM: bool, const T: usize>(panel: &mut Panel, tile: &Packed, answers: &mut Answers) {
        let lanes = &mut panel.lanes;
        let quads: &[[Quad; 8]] = panel.quads.as_chunks::<8>().0;
        let q: &[[[i32; TOKENS]; 8]] = tile.q.as_chunks::<8>().0;
        for (first, lane) in lanes.iter_mut().enumerate() {
            let mut sums = [_mm512_setzero_ps(); T];
            for b in (first..quads.len()).step_by(8) {
                let offsets = &tile.sums[b];
                let mut acc = [_mm512_setzero_si512(); T];
                if !MINIMUM {
                    for t in 0..T {
                        acc[t] = _mm512_set1_epi32(offsets[t]);
                    }
                }
                let (quads, q) = (&quads[b], &q[b]);
                for k in 0..8 {
                    step(&mut acc, &quads[k], &q[k]);
                }
                let (d, factors) = (load_f32x16(&panel.d[b]), &tile.scales[b]);
                for t in 0..T {
                    let factor = _mm512_mul_ps(d, _mm512_set1_ps(factors[t]));
                    sums[t] = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(acc[t]), sums[t]);
                }
                if MINIMUM {
                    let m = load_f32x16(&panel.m[b]);
                    for t in 0..T {
                        let factor = _mm512_mul_ps(m, _mm512_set1_ps(factors[t]));
                        sums[t] = _mm512_fmadd_ps(factor, _mm512_set1_ps(offsets[t] as f32), sums[t]);
                    }
                }
            }
            for t in 0..T {
                store_f32x16(&mut lane[t], sums[t]);
            }
        }
        add_lanes::<T>(lanes, answers);
    }

    /// The contract's tree over the eight lanes.
    fn add_lanes<const T: usize>(lanes: &Lanes, answers: &mut Answers) {
        for t in 0..T {
            let pair = |i: usize| {
                _mm512_add_ps(load_f32x16(&lanes[i][t]), load_f32x16(&lanes[i + 4][t]))
            };
            let even = _mm512_add_ps(pair(0), pair(2));
            let odd = _mm512_add_ps(pair(1), pair(3));
            store_f32x16(&mut answers[t], _mm512_add_ps(even, odd));
        }
    }
}
