//! Quantised rows: one token, or a tile of tokens for each unpacked row.

use super::blocks::{SubScales, codes, format, minimum_at, scale_at, sub_scales};
use super::{Quantised, load_codes, load_f16, load_floats, load_ints, store_floats, tree_of_8};
use crate::block;
use crate::cpu::kernels::{Rows, Tile};
use crate::cpu::pool::Columns;
use crate::format::Format;
use std::arch::aarch64::*;

/// Calls `$function::<index of the format>`, for the quantised formats.
macro_rules! for_format {
    ($format:expr, $function:ident($($argument:expr),*)) => {
        match $format {
            Format::Q8_0 => $function::<{ Format::Q8_0 as usize }>($($argument),*),
            Format::Q4_0 => $function::<{ Format::Q4_0 as usize }>($($argument),*),
            Format::Q4_1 => $function::<{ Format::Q4_1 as usize }>($($argument),*),
            Format::Q5_0 => $function::<{ Format::Q5_0 as usize }>($($argument),*),
            Format::Q5_1 => $function::<{ Format::Q5_1 as usize }>($($argument),*),
            Format::Q2K => $function::<{ Format::Q2K as usize }>($($argument),*),
            Format::Q3K => $function::<{ Format::Q3K as usize }>($($argument),*),
            Format::Q4K => $function::<{ Format::Q4K as usize }>($($argument),*),
            Format::Q5K => $function::<{ Format::Q5K as usize }>($($argument),*),
            Format::Q6K => $function::<{ Format::Q6K as usize }>($($argument),*),
            Format::Iq4Nl => $function::<{ Format::Iq4Nl as usize }>($($argument),*),
            Format::Iq4Xs => $function::<{ Format::Iq4Xs as usize }>($($argument),*),
            Format::Mxfp4 => $function::<{ Format::Mxfp4 as usize }>($($argument),*),
            Format::F32 | Format::F16 | Format::Bf16 => panic!("{} is not quantised", $format),
        }
    };
}

/// Tokens that share one unpacking of a row.
pub const TILE: usize = 16;

/// `out[r]` is row `r` times one token.
///
/// Panics if the token has fewer columns than the rows.
#[target_feature(enable = "neon")]
pub fn rows(rows: Rows<'_>, token: Quantised<'_>, out: &mut [f32]) {
    for_format!(rows.format, few(rows, token, out))
}

/// `out.row(t)[r]` is row `r` times token `t`, counted over all tiles.
///
/// Panics on tiles that were not packed for these rows.
#[target_feature(enable = "neon")]
pub fn batch(rows: Rows<'_>, tiles: &[Tile], out: &mut Columns<'_, f32>) {
    let mut first = 0;
    for tile in tiles {
        let count = tile.tokens;
        assert!(count <= TILE && tile.q.len() == count * rows.cols, "tile of these rows");
        let (scales, sums) = (tile.scales.len() / count, tile.short_sums.len() / count);
        let token = |t: usize| Quantised {
            q: &tile.q[t * rows.cols..(t + 1) * rows.cols],
            scales: &tile.scales[t * scales..(t + 1) * scales],
            sums: &tile.short_sums[t * sums..(t + 1) * sums],
        };
        for_format!(rows.format, many(rows, count, &token, first, out));
        first += count;
    }
}

type Lanes = [float32x4_t; 2];

#[target_feature(enable = "neon")]
fn few<const F: usize>(rows: Rows<'_>, token: Quantised<'_>, out: &mut [f32]) {
    let mut group = Group::default();
    for (r, out) in out.iter_mut().enumerate() {
        let mut lanes = [vdupq_n_f32(0.0); 2];
        for (g, blocks) in rows.row(r).chunks(8 * format::<F>().block_bytes()).enumerate() {
            group.read::<F>(blocks);
            group.add::<F>(part::<F>(token, g), &mut lanes);
        }
        *out = tree_of_8(lanes);
    }
}

#[target_feature(enable = "neon")]
fn many<'a, const F: usize>(
    rows: Rows<'_>,
    count: usize,
    token: &dyn Fn(usize) -> Quantised<'a>,
    first: usize,
    out: &mut Columns<'_, f32>,
) {
    let mut group = Group::default();
    for r in 0..rows.rows {
        let mut lanes = [[vdupq_n_f32(0.0); 2]; TILE];
        for (g, blocks) in rows.row(r).chunks(8 * format::<F>().block_bytes()).enumerate() {
            group.read::<F>(blocks);
            for (t, lanes) in lanes[..count].iter_mut().enumerate() {
                group.add::<F>(part::<F>(token(t), g), lanes);
            }
        }
        for (t, lanes) in lanes[..count].iter().enumerate() {
            out.row(first + t)[r] = tree_of_8(*lanes);
        }
    }
}

/// The activations of group `g` of eight blocks.
#[inline]
fn part<const F: usize>(token: Quantised<'_>, g: usize) -> Quantised<'_> {
    let cols = 8 * const { format::<F>().block_len() };
    let sums = const { if format::<F>().block_len() == 32 { 8 } else { 128 } };
    Quantised {
        q: &token.q[g * cols..],
        scales: &token.scales[g * 8..],
        sums: &token.sums[g * sums..],
    }
}

/// Up to eight unpacked blocks.
struct Group {
    used: usize,
    /// Block after block; blocks of 32 use two of the sixteen.
    codes: [[[i8; 16]; 16]; 8],
    sub: [SubScales; 8],
    d: [f32; 8],
    min: [f32; 8],
}

impl Default for Group {
    fn default() -> Self {
        Self {
            used: 0,
            codes: [[[0; 16]; 16]; 8],
            sub: [SubScales::default(); 8],
            d: [0.0; 8],
            min: [0.0; 8],
        }
    }
}

/// The f16 at `at` of each block, the other lanes zero.
#[target_feature(enable = "neon")]
fn f16_of_8<const F: usize>(blocks: &[u8], at: usize) -> [f32; 8] {
    let mut bits = [0u16; 8];
    for (bits, block) in bits.iter_mut().zip(blocks.chunks_exact(format::<F>().block_bytes())) {
        *bits = u16::from_le_bytes([block[at], block[at + 1]]);
    }
    let mut out = [0.0; 8];
    store_floats(&mut out[..4], load_f16(&bits[..4]));
    store_floats(&mut out[4..], load_f16(&bits[4..]));
    out
}

impl Group {
    #[inline]
    #[target_feature(enable = "neon")]
    fn read<const F: usize>(&mut self, blocks: &[u8]) {
        self.used = blocks.len() / const { format::<F>().block_bytes() };
        let parts = const { format::<F>().block_len() / 16 };
        for (b, block) in blocks.chunks_exact(format::<F>().block_bytes()).enumerate() {
            for i in 0..parts {
                // SAFETY: the array has the 16 bytes that are written.
                unsafe { vst1q_s8(self.codes[b][i].as_mut_ptr(), codes::<F>(block, i)) };
            }
            if const { format::<F>().block_len() == 256 } {
                self.sub[b] = sub_scales::<F>(block);
            }
            if const { matches!(format::<F>(), Format::Mxfp4) } {
                self.d[b] = block::e8m0_half(block[block::mxfp4::E]);
            }
        }
        if const { !matches!(format::<F>(), Format::Mxfp4) } {
            self.d = f16_of_8::<F>(blocks, const { scale_at(format::<F>()) });
        }
        if let Some(at) = const { minimum_at(format::<F>()) } {
            self.min = f16_of_8::<F>(blocks, at);
        }
    }

    /// Adds the blocks to their lanes. A lane without a block gains `0 * 0`,
    /// which changes nothing: a product of a float and a whole number never
    /// underflows, so no lane is ever `-0`.
    #[inline]
    #[target_feature(enable = "neon")]
    fn add<const F: usize>(&self, token: Quantised<'_>, lanes: &mut Lanes) {
        let (mut s, mut t) = ([0i32; 8], [0i32; 8]);
        for b in 0..self.used {
            (s[b], t[b]) = if const { format::<F>().block_len() == 32 } {
                let q = &token.q[32 * b..32 * b + 32];
                let pairs = vpaddlq_s16(products(load_codes(&self.codes[b][0]), load_codes(q)));
                let more = products(load_codes(&self.codes[b][1]), load_codes(&q[16..]));
                (vaddvq_s32(vpadalq_s16(pairs, more)), token.sums[b].into())
            } else {
                let q = &token.q[256 * b..256 * b + 256];
                let mut sum = vdupq_n_s32(0);
                for i in 0..16 {
                    let pairs = products(load_codes(&self.codes[b][i]), load_codes(&q[16 * i..]));
                    sum = vmlaq_n_s32(sum, vpaddlq_s16(pairs), self.sub[b].scales[i]);
                }
                let mins = self.sub[b].mins.iter().zip(&token.sums[16 * b..16 * b + 16]);
                let has_minimum = const { minimum_at(format::<F>()).is_some() };
                let t = if has_minimum {
                    mins.map(|(min, sum)| i32::from(*min) * i32::from(*sum)).sum()
                } else {
                    0
                };
                (vaddvq_s32(sum), t)
            };
        }
        let mut scales = [0.0; 8];
        scales[..self.used].copy_from_slice(&token.scales[..self.used]);
        for (half, lane) in lanes.iter_mut().enumerate() {
            let at = 4 * half..4 * half + 4;
            let scale = load_floats(&scales[at.clone()]);
            let (d, min) = (load_floats(&self.d[at.clone()]), load_floats(&self.min[at.clone()]));
            let s = vcvtq_f32_s32(load_ints(&s[at.clone()]));
            *lane = vfmaq_f32(*lane, vmulq_f32(d, scale), s);
            if const { minimum_at(format::<F>()).is_some() } {
                let (min, t) = (vmulq_f32(min, scale), vcvtq_f32_s32(load_ints(&t[at])));
                *lane = match const { format::<F>() } {
                    Format::Q4_1 | Format::Q5_1 => vfmaq_f32(*lane, min, t),
                    _ => vfmsq_f32(*lane, min, t),
                };
            }
        }
    }
}

/// Sums of two products each, exact in 16 bits.
#[inline]
#[target_feature(enable = "neon")]
fn products(codes: int8x16_t, q: int8x16_t) -> int16x8_t {
    vmlal_high_s8(vmull_s8(vget_low_s8(codes), vget_low_s8(q)), codes, q)
}
