//! Reading the blocks of each quantised format into registers.
//!
//! `F` is the index of the format in [`Format::ALL`]: every `match` on it is
//! decided when the kernel is compiled.

use super::{load, load_half};
use crate::block::{
    IQ4_TABLE, MXFP4_TABLE, iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k,
    q6_k, q8_0,
};
use crate::format::Format;
use std::arch::x86_64::*;

pub const fn format<const F: usize>() -> Format {
    Format::ALL[F]
}

/// Whether [`codes_32`] and [`codes_256`] give signed weights; the others are
/// unsigned and lack their offset.
pub const fn signed(format: Format) -> bool {
    matches!(format, Format::Q8_0 | Format::Iq4Nl | Format::Iq4Xs | Format::Mxfp4)
}

/// What is to be subtracted from unsigned codes of blocks of 32.
pub const fn offset(format: Format) -> i16 {
    match format {
        Format::Q4_0 => 8,
        Format::Q5_0 => 16,
        Format::Q3K => 4,
        Format::Q6K => 32,
        _ => 0,
    }
}

/// Where `d` is.
pub const fn scale_at(format: Format) -> usize {
    match format {
        Format::Q2K => q2_k::D,
        Format::Q3K => q3_k::D,
        Format::Q6K => q6_k::D,
        _ => 0,
    }
}

/// Where the f16 minimum is.
pub const fn minimum_at(format: Format) -> Option<usize> {
    match format {
        Format::Q4_1 => Some(q4_1::M),
        Format::Q5_1 => Some(q5_1::M),
        Format::Q2K => Some(q2_k::DMIN),
        Format::Q4K => Some(q4_k::DMIN),
        Format::Q5K => Some(q5_k::DMIN),
        _ => None,
    }
}

/// The f16 at `at` of each of up to eight blocks, the other lanes zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub fn f16_of_8<const F: usize>(blocks: &[u8], at: usize) -> __m256 {
    let bytes = const { format::<F>().block_bytes() };
    // Shifts in registers: eight narrow stores before a wide load would stall.
    let bits = |b: usize| match blocks.get(b * bytes + at..b * bytes + at + 2) {
        Some(bits) => u64::from(u16::from_le_bytes([bits[0], bits[1]])) << (16 * (b % 4)),
        None => 0,
    };
    let low = bits(0) | bits(1) | bits(2) | bits(3);
    let high = bits(4) | bits(5) | bits(6) | bits(7);
    _mm256_cvtph_ps(_mm_set_epi64x(high as i64, low as i64))
}

/// `d` of each of up to eight blocks, the other lanes zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub fn scales_of_8<const F: usize>(blocks: &[u8]) -> __m256 {
    if const { matches!(format::<F>(), Format::Mxfp4) } {
        return e8m0_of_8(blocks);
    }
    f16_of_8::<F>(blocks, const { scale_at(format::<F>()) })
}

/// [`crate::block::e8m0_half`] of each of up to eight MXFP4 blocks, the other
/// lanes of exponent zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn e8m0_of_8(blocks: &[u8]) -> __m256 {
    let bytes = const { Format::Mxfp4.block_bytes() };
    let exponents = (0..8).fold(0u64, |all, b| {
        let e = blocks.get(b * bytes + mxfp4::E).copied().unwrap_or(0);
        all | u64::from(e) << (8 * b)
    });
    let e = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(exponents as i64));
    let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, _mm256_set1_epi32(1)));
    let subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), e);
    let is_subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
    _mm256_castsi256_ps(_mm256_blendv_epi8(normal, subnormal, is_subnormal))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn table(values: &[i8; 16]) -> __m256i {
    let bytes = values.map(|v| v as u8);
    _mm256_broadcastsi128_si256(load_half(&bytes))
}

/// The nibbles of 16 bytes: low ones in the low half, high ones in the high.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles(bytes: &[u8]) -> __m256i {
    let bytes = load_half(bytes);
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// 16 in each byte whose bit of the 32 is set.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fifth_bits(bytes: &[u8]) -> __m256i {
    let bits = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let byte_of =
        _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bit_of = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit_of), bit_of);
    _mm256_and_si256(set, _mm256_set1_epi8(16))
}

/// The 32 elements of a block of 32, signed or lacking their offset.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub fn codes_32<const F: usize>(block: &[u8]) -> __m256i {
    match const { format::<F>() } {
        Format::Q8_0 => load(&block[q8_0::QS..]),
        Format::Q4_0 => nibbles(&block[q4_0::QS..]),
        Format::Q4_1 => nibbles(&block[q4_1::QS..]),
        Format::Q5_0 => {
            _mm256_or_si256(nibbles(&block[q5_0::QS..]), fifth_bits(&block[q5_0::QH..]))
        }
        Format::Q5_1 => {
            _mm256_or_si256(nibbles(&block[q5_1::QS..]), fifth_bits(&block[q5_1::QH..]))
        }
        Format::Iq4Nl => _mm256_shuffle_epi8(table(&IQ4_TABLE), nibbles(&block[iq4_nl::QS..])),
        Format::Mxfp4 => _mm256_shuffle_epi8(table(&MXFP4_TABLE), nibbles(&block[mxfp4::QS..])),
        _ => unreachable!("not a format of 32"),
    }
}

/// Bits `shift..` of each byte under `mask`. `shift` is a constant once the
/// loop over sub-blocks is unrolled.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bits(bytes: __m256i, shift: usize, mask: i8) -> __m256i {
    let shifted = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32));
    _mm256_and_si256(shifted, _mm256_set1_epi8(mask))
}

/// Elements `32 j..32 j + 32` of a block of 256, signed or lacking their
/// offset.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub fn codes_256<const F: usize>(block: &[u8], j: usize) -> __m256i {
    match const { format::<F>() } {
        Format::Q2K => bits(load(&block[q2_k::QS + 32 * (j / 4)..]), 2 * (j % 4), 3),
        Format::Q3K => {
            let low = bits(load(&block[q3_k::QS + 32 * (j / 4)..]), 2 * (j % 4), 3);
            let high = bits(load(&block[q3_k::HMASK..]), j, 1);
            _mm256_or_si256(low, _mm256_slli_epi16::<2>(high))
        }
        Format::Q4K => bits(load(&block[q4_k::QS + 32 * (j / 2)..]), 4 * (j % 2), 15),
        Format::Q5K => {
            let low = bits(load(&block[q5_k::QS + 32 * (j / 2)..]), 4 * (j % 2), 15);
            let high = bits(load(&block[q5_k::QH..]), j, 1);
            _mm256_or_si256(low, _mm256_slli_epi16::<4>(high))
        }
        Format::Q6K => {
            let (n, j) = (j / 4, j % 4);
            let low = bits(load(&block[q6_k::QL + 64 * n + 32 * (j % 2)..]), 4 * (j / 2), 15);
            let high = bits(load(&block[q6_k::QH + 32 * n..]), 2 * j, 3);
            _mm256_or_si256(low, _mm256_slli_epi16::<4>(high))
        }
        Format::Iq4Xs => {
            _mm256_shuffle_epi8(table(&IQ4_TABLE), nibbles(&block[iq4_xs::QS + 16 * j..]))
        }
        _ => unreachable!("not a format of 256"),
    }
}

/// The sub-block scales of a block of 256 as 16-bit numbers.
#[derive(Clone, Copy)]
pub struct SubScales {
    /// Lane `j` of the low half: the scale of elements `32 j..32 j + 16`; of
    /// the high half: of the 16 after them.
    spread: __m256i,
    /// What multiplies the 16 sums of the activations to make up for the
    /// missing offset: `offset * scale`.
    pub offsets: __m256i,
    /// What multiplies the 16 sums to make `t`.
    pub mins: __m256i,
}

impl SubScales {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn zero() -> Self {
        let zero = _mm256_setzero_si256();
        Self { spread: zero, offsets: zero, mins: zero }
    }

    /// The scale of each of the 16-bit pairs of [`codes_256`] `j`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn of(&self, j: usize) -> __m256i {
        let pair = (2 * j + ((2 * j + 1) << 8)) as i16;
        _mm256_shuffle_epi8(self.spread, _mm256_set1_epi16(pair))
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub fn sub_scales<const F: usize>(block: &[u8]) -> SubScales {
    let zero = _mm256_setzero_si256();
    match const { format::<F>() } {
        Format::Q2K => {
            let bytes = load_half(&block[q2_k::SCALES..]);
            let low = _mm_set1_epi8(15);
            let mins = _mm_and_si128(_mm_srli_epi16::<4>(bytes), low);
            let spread = evens_then_odds(_mm_and_si128(bytes, low));
            SubScales { spread, offsets: zero, mins: _mm256_cvtepi8_epi16(mins) }
        }
        Format::Q3K => {
            // The 16 bytes that end with the scales.
            let bytes = load_half(&block[q3_k::SCALES - 4..]);
            with_offset::<F>(q3_scales(_mm_srli_si128::<4>(bytes)))
        }
        Format::Q6K => with_offset::<F>(load_half(&block[q6_k::SCALES..])),
        Format::Q4K | Format::Q5K => {
            let at = q4_k::SCALES;
            let word = |i: usize| {
                let i = at + 4 * i;
                u32::from_le_bytes([block[i], block[i + 1], block[i + 2], block[i + 3]])
            };
            let (a, b, c) = (word(0), word(1), word(2));
            let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x0303_0303);
            let scales = u64::from(a & six) | u64::from((c & four) | ((a >> 6) & two) << 4) << 32;
            let mins =
                u64::from(b & six) | u64::from(((c >> 4) & four) | ((b >> 6) & two) << 4) << 32;
            let mins = _mm_cvtsi64_si128(mins as i64);
            SubScales {
                spread: both_halves(scales),
                offsets: zero,
                mins: _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(mins, mins)),
            }
        }
        Format::Iq4Xs => {
            let at = iq4_xs::SCALES_LOW;
            let low = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
            let at = iq4_xs::SCALES_HIGH;
            let high = u16::from_le_bytes([block[at], block[at + 1]]);
            SubScales { spread: iq4_xs_scales(low, high), offsets: zero, mins: zero }
        }
        _ => unreachable!("not a format of 256"),
    }
}

/// 16 signed bytes in natural order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn with_offset<const F: usize>(scales: __m128i) -> SubScales {
    let natural = _mm256_cvtepi8_epi16(scales);
    let offset = _mm256_set1_epi16(const { offset(format::<F>()) });
    SubScales {
        spread: evens_then_odds(scales),
        offsets: _mm256_mullo_epi16(natural, offset),
        mins: _mm256_setzero_si256(),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn evens_then_odds(scales: __m128i) -> __m256i {
    let order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, order))
}

/// Eight signed bytes, one per sub-block of 32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn both_halves(scales: u64) -> __m256i {
    _mm256_cvtepi8_epi16(_mm_set1_epi64x(scales as i64))
}

/// The eight scales of IQ4_XS, 32 subtracted, in both halves.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn iq4_xs_scales(low: u32, high: u16) -> __m256i {
    let low = _mm_cvtsi32_si128(low as i32);
    let nibbles = _mm_unpacklo_epi8(low, _mm_srli_epi16::<4>(low));
    let nibbles = _mm_cvtepu8_epi16(_mm_and_si128(nibbles, _mm_set1_epi8(15)));
    // Moves bits `2 j` and `2 j + 1` to the top of lane `j`, then to 4 and 5.
    let places = _mm_setr_epi16(1 << 14, 1 << 12, 1 << 10, 1 << 8, 1 << 6, 1 << 4, 1 << 2, 1);
    let top = _mm_mullo_epi16(_mm_set1_epi16(high as i16), places);
    let two = _mm_slli_epi16::<4>(_mm_srli_epi16::<14>(top));
    let six = _mm_or_si128(nibbles, two);
    _mm256_broadcastsi128_si256(_mm_sub_epi16(six, _mm_set1_epi16(32)))
}

/// The 16 scales of Q3_K, 32 subtracted, from their 12 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q3_scales(packed: __m128i) -> __m128i {
    let low_bytes = _mm_unpacklo_epi64(packed, _mm_srli_epi16::<4>(packed));
    let low = _mm_and_si128(low_bytes, _mm_set1_epi8(15));
    // Bytes 8..12, shifted by 0, 2, 4 and 6 for scales 0, 4, 8 and 12 on.
    let high_bytes = _mm_shuffle_epi32::<0b10_10_10_10>(packed);
    let shifted = _mm_srlv_epi32(high_bytes, _mm_setr_epi32(0, 2, 4, 6));
    let high = _mm_slli_epi16::<4>(_mm_and_si128(shifted, _mm_set1_epi8(3)));
    _mm_sub_epi8(_mm_or_si128(low, high), _mm_set1_epi8(32))
}
