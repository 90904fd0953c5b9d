//! Quantised rows: one token, or a tile of tokens for each unpacked row.

use super::blocks::{
    SubScales, codes_32, codes_256, f16_of_8, format, minimum_at, offset, scales_of_8, signed,
    sub_scales,
};
use super::{Quantised, load_8_sums, load_codes, load_sums, load_up_to_8, sums_of_8, tree_of_8};
use crate::cpu::kernels::{Rows, Tile};
use crate::cpu::pool::Columns;
use crate::format::Format;
use std::arch::x86_64::*;

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

/// `out[r]` is row `r` times one token.
///
/// Panics if the token has fewer columns than the rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn rows(rows: Rows<'_>, token: Quantised<'_>, out: &mut [f32]) {
    for_format!(rows.format, dot_rows(rows, token, out))
}

/// `out.row(t)[r]` is row `r` times token `t`, counted over all tiles.
///
/// Panics on tiles that were not packed for these rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn batch(rows: Rows<'_>, tiles: &[Tile], out: &mut Columns<'_, f32>) {
    let mut first = 0;
    for tile in tiles {
        let tokens = Tokens::new(tile, rows.cols);
        for_format!(rows.format, dot_tile(rows, &tokens, first, out));
        first += tile.tokens;
    }
}

/// The tokens of one tile.
struct Tokens<'a> {
    tokens: [Quantised<'a>; TILE],
    used: usize,
}

impl<'a> Tokens<'a> {
    fn new(tile: &'a Tile, cols: usize) -> Self {
        assert!(tile.tokens <= TILE && tile.q.len() == tile.tokens * cols, "tile of these rows");
        let each = |all: usize| all / tile.tokens.max(1);
        let (scales, sums) = (each(tile.scales.len()), each(tile.short_sums.len()));
        let mut tokens = [Quantised { q: &[], scales: &[], sums: &[] }; TILE];
        for (t, token) in tokens[..tile.tokens].iter_mut().enumerate() {
            *token = Quantised {
                q: &tile.q[t * cols..(t + 1) * cols],
                scales: &tile.scales[t * scales..(t + 1) * scales],
                sums: &tile.short_sums[t * sums..(t + 1) * sums],
            };
        }
        Self { tokens, used: tile.tokens }
    }
}

/// Tokens that share one unpacking of a row: their codes for eight blocks of
/// 256 (32 KiB) stay in the first-level cache.
pub const TILE: usize = 16;

#[target_feature(enable = "avx2,fma,f16c")]
fn dot_rows<const F: usize>(rows: Rows<'_>, token: Quantised<'_>, out: &mut [f32]) {
    for (r, out) in out.iter_mut().enumerate() {
        *out = dot::<F>(rows.row(r), token);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot<const F: usize>(row: &[u8], token: Quantised<'_>) -> f32 {
    let mut lanes = _mm256_setzero_ps();
    for (g, blocks) in row.chunks(8 * const { format::<F>().block_bytes() }).enumerate() {
        lanes = add_blocks::<F>(blocks, group::<F>(token, g), Scales::read::<F>(blocks), lanes);
    }
    tree_of_8(lanes)
}

/// The activations of up to eight blocks.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn group<const F: usize>(token: Quantised<'_>, g: usize) -> Quantised<'_> {
    let cols = 8 * const { format::<F>().block_len() };
    let sums = const { if format::<F>().block_len() == 32 { 8 } else { 128 } };
    Quantised {
        q: &token.q[g * cols..],
        scales: &token.scales[g * 8..],
        sums: &token.sums[g * sums..],
    }
}

/// `d` and minimum of up to eight blocks.
#[derive(Clone, Copy)]
struct Scales {
    d: __m256,
    min: __m256,
    used: usize,
}

impl Scales {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn read<const F: usize>(blocks: &[u8]) -> Scales {
        Scales {
            d: scales_of_8::<F>(blocks),
            min: match const { minimum_at(format::<F>()) } {
                Some(at) => f16_of_8::<F>(blocks, at),
                None => _mm256_setzero_ps(),
            },
            used: blocks.len() / const { format::<F>().block_bytes() },
        }
    }

    /// Adds up to eight blocks' sums to their lanes. A lane without a block
    /// gains `0 * 0`, which changes nothing: a product of a float and a whole
    /// number never underflows, so no lane is ever `-0`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add<const F: usize>(self, s: __m256i, t: __m256i, scales: &[f32], lanes: __m256) -> __m256 {
        let scales = load_up_to_8(&scales[..self.used]);
        let d = _mm256_mul_ps(self.d, scales);
        let mut next = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(s), lanes);
        if const { minimum_at(format::<F>()).is_some() } {
            let (min, t) = (_mm256_mul_ps(self.min, scales), _mm256_cvtepi32_ps(t));
            next = match const { format::<F>() } {
                Format::Q4_1 | Format::Q5_1 => _mm256_fmadd_ps(min, t, next),
                _ => _mm256_fnmadd_ps(min, t, next),
            };
        }
        next
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_blocks<const F: usize>(
    blocks: &[u8],
    token: Quantised<'_>,
    scales: Scales,
    lanes: __m256,
) -> __m256 {
    let zero = _mm256_setzero_si256();
    let (mut s, mut t) = ([zero; 8], [zero; 8]);
    let bytes = const { format::<F>().block_bytes() };
    if const { format::<F>().block_len() == 32 } {
        for (b, block) in blocks.chunks_exact(bytes).enumerate().take(8) {
            let q = load_codes(&token.q[32 * b..]);
            let pairs = pair_products::<F>(codes_32::<F>(block), q);
            s[b] = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        }
        let (s, t) = finish_32::<F>(sums_of_8(&s), token, scales.used);
        return scales.add::<F>(s, t, token.scales, lanes);
    }
    for (b, block) in blocks.chunks_exact(bytes).enumerate().take(8) {
        let sub = sub_scales::<F>(block);
        let q: &[i8; 256] = token.q[256 * b..256 * b + 256].try_into().expect("256 codes");
        let mut sum = zero;
        for j in 0..8 {
            let pairs = pair_products::<F>(codes_256::<F>(block, j), load_codes(&q[32 * j..]));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, sub.of(j)));
        }
        (s[b], t[b]) = finish_256::<F>(sum, &sub, &token.sums[16 * b..]);
    }
    let t = if const { minimum_at(format::<F>()).is_some() } { sums_of_8(&t) } else { zero };
    scales.add::<F>(sums_of_8(&s), t, token.scales, lanes)
}

/// Sums of two neighbouring products, exact in 16 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pair_products<const F: usize>(codes: __m256i, q: __m256i) -> __m256i {
    if const { signed(format::<F>()) } {
        _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(q, codes))
    } else {
        _mm256_maddubs_epi16(codes, q)
    }
}

/// `(s, t)` of eight blocks of 32 from the products with their codes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn finish_32<const F: usize>(s: __m256i, token: Quantised<'_>, used: usize) -> (__m256i, __m256i) {
    if const { offset(format::<F>()) == 0 && minimum_at(format::<F>()).is_none() } {
        return (s, s);
    }
    let sums = match token.sums.first_chunk() {
        Some(sums) if used >= 8 => load_8_sums(sums),
        _ => {
            let mut sums = [0i16; 8];
            sums[..used].copy_from_slice(&token.sums[..used]);
            load_8_sums(&sums)
        }
    };
    let t = _mm256_cvtepi16_epi32(sums);
    (
        _mm256_sub_epi32(
            s,
            _mm256_mullo_epi32(t, _mm256_set1_epi32(const { offset(format::<F>()) as i32 })),
        ),
        t,
    )
}

/// `(s, t)` of one block of 256, still to be summed over lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn finish_256<const F: usize>(sum: __m256i, sub: &SubScales, sums: &[i16]) -> (__m256i, __m256i) {
    let mut s = sum;
    if const { offset(format::<F>()) != 0 } {
        s = _mm256_sub_epi32(s, _mm256_madd_epi16(sub.offsets, load_sums(sums)));
    }
    if const { minimum_at(format::<F>()).is_some() } {
        (s, _mm256_madd_epi16(sub.mins, load_sums(sums)))
    } else {
        (s, _mm256_setzero_si256())
    }
}

/// Eight blocks of 256, unpacked once for a tile of tokens.
struct Unpacked {
    codes: [[__m256i; 8]; 8],
    scales: [[__m256i; 8]; 8],
    sub: [SubScales; 8],
}

#[target_feature(enable = "avx2,fma,f16c")]
fn dot_tile<const F: usize>(
    rows: Rows<'_>,
    tokens: &Tokens<'_>,
    first: usize,
    out: &mut Columns<'_, f32>,
) {
    let tokens = &tokens.tokens[..tokens.used];
    let zero = _mm256_setzero_si256();
    let sub = SubScales::zero();
    let mut unpacked = Unpacked { codes: [[zero; 8]; 8], scales: [[zero; 8]; 8], sub: [sub; 8] };
    for r in 0..rows.rows {
        let mut lanes = [_mm256_setzero_ps(); TILE];
        let groups = rows.row(r).chunks(8 * const { format::<F>().block_bytes() });
        for (g, blocks) in groups.enumerate() {
            if const { format::<F>().block_len() == 32 } {
                add_tile_32::<F>(blocks, g, tokens, &mut lanes);
            } else {
                unpack::<F>(blocks, &mut unpacked);
                add_tile_256::<F>(blocks, &unpacked, g, tokens, &mut lanes);
            }
        }
        for (t, lanes) in lanes[..tokens.len()].iter().enumerate() {
            out.row(first + t)[r] = tree_of_8(*lanes);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_tile_32<const F: usize>(
    blocks: &[u8],
    g: usize,
    tokens: &[Quantised<'_>],
    lanes: &mut [__m256; TILE],
) {
    let zero = _mm256_setzero_si256();
    let scales = Scales::read::<F>(blocks);
    let mut codes = [zero; 8];
    for (codes, block) in codes.iter_mut().zip(blocks.chunks_exact(format::<F>().block_bytes())) {
        *codes = codes_32::<F>(block);
    }
    for (token, lanes) in tokens.iter().zip(lanes) {
        let token = group::<F>(*token, g);
        let mut s = [zero; 8];
        for (b, (s, q)) in s.iter_mut().zip(token.q.chunks_exact(32)).enumerate() {
            let pairs = pair_products::<F>(codes[b], load_codes(q));
            *s = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        }
        let (s, t) = finish_32::<F>(sums_of_8(&s), token, scales.used);
        *lanes = scales.add::<F>(s, t, token.scales, *lanes);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<const F: usize>(blocks: &[u8], unpacked: &mut Unpacked) {
    for (b, block) in blocks.chunks_exact(format::<F>().block_bytes()).enumerate().take(8) {
        unpacked.sub[b] = sub_scales::<F>(block);
        for j in 0..8 {
            unpacked.codes[b][j] = codes_256::<F>(block, j);
            unpacked.scales[b][j] = unpacked.sub[b].of(j);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_tile_256<const F: usize>(
    blocks: &[u8],
    unpacked: &Unpacked,
    g: usize,
    tokens: &[Quantised<'_>],
    lanes: &mut [__m256; TILE],
) {
    let zero = _mm256_setzero_si256();
    let scales = Scales::read::<F>(blocks);
    for (token, lanes) in tokens.iter().zip(lanes) {
        let token = group::<F>(*token, g);
        let (mut s, mut t) = ([zero; 8], [zero; 8]);
        let q = token.q.chunks_exact(256).zip(token.sums.chunks_exact(16));
        for (b, (q, sums)) in q.enumerate().take(scales.used) {
            let (codes, of_pair) = (&unpacked.codes[b], &unpacked.scales[b]);
            let mut sum = zero;
            for j in 0..8 {
                let pairs = pair_products::<F>(codes[j], load_codes(&q[32 * j..]));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, of_pair[j]));
            }
            (s[b], t[b]) = finish_256::<F>(sum, &unpacked.sub[b], sums);
        }
        let t = if const { minimum_at(format::<F>()).is_some() } { sums_of_8(&t) } else { zero };
        *lanes = scales.add::<F>(sums_of_8(&s), t, token.scales, *lanes);
    }
}
