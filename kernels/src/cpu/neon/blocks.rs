//! Reading the blocks of each quantised format into registers. `F` is the
//! index of the format in [`Format::ALL`].

use super::load;
use crate::block::{
    IQ4_TABLE, MXFP4_TABLE, iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k,
    q6_k, q8_0, scale_and_min,
};
use crate::format::Format;
use std::arch::aarch64::*;

pub const fn format<const F: usize>() -> Format {
    Format::ALL[F]
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

/// Bits `shift..` of each byte under `mask`.
#[inline]
#[target_feature(enable = "neon")]
fn bits(bytes: &[u8], shift: usize, mask: u8) -> uint8x16_t {
    vandq_u8(vshlq_u8(load(bytes), vdupq_n_s8(-(shift as i8))), vdupq_n_u8(mask))
}

/// `low + 2^shift high - offset`
#[inline]
#[target_feature(enable = "neon")]
fn joined(low: uint8x16_t, high: uint8x16_t, shift: i8, offset: i8) -> int8x16_t {
    let both = vorrq_u8(low, vshlq_u8(high, vdupq_n_s8(shift)));
    vsubq_s8(vreinterpretq_s8_u8(both), vdupq_n_s8(offset))
}

#[inline]
#[target_feature(enable = "neon")]
fn looked_up(table: &[i8; 16], index: uint8x16_t) -> int8x16_t {
    // SAFETY: the array has the 16 bytes that are read.
    vqtbl1q_s8(unsafe { vld1q_s8(table.as_ptr()) }, index)
}

/// 1 in each byte whose bit of the 16 is set.
#[inline]
#[target_feature(enable = "neon")]
fn spread(low: u8, high: u8) -> uint8x16_t {
    let bit_of = vcreate_u8(0x8040_2010_0804_0201);
    let bytes = vcombine_u8(vdup_n_u8(low), vdup_n_u8(high));
    vandq_u8(vtstq_u8(bytes, vcombine_u8(bit_of, bit_of)), vdupq_n_u8(1))
}

/// Elements `16 i..16 i + 16` of a block, their offset subtracted. `i` is a
/// constant once the loop over a block is unrolled.
#[inline]
#[target_feature(enable = "neon")]
pub fn codes<const F: usize>(block: &[u8], i: usize) -> int8x16_t {
    let none = vdupq_n_u8(0);
    // In blocks of 256: sub-block of 32, and which half of it.
    let (j, half) = (i / 2, 16 * (i % 2));
    match const { format::<F>() } {
        Format::Q8_0 => vreinterpretq_s8_u8(load(&block[q8_0::QS + 16 * i..])),
        Format::Q4_0 => joined(bits(&block[q4_0::QS..], 4 * i, 15), none, 0, 8),
        Format::Q4_1 => joined(bits(&block[q4_1::QS..], 4 * i, 15), none, 0, 0),
        Format::Q5_0 => {
            let high = spread(block[q5_0::QH + 2 * i], block[q5_0::QH + 2 * i + 1]);
            joined(bits(&block[q5_0::QS..], 4 * i, 15), high, 4, 16)
        }
        Format::Q5_1 => {
            let high = spread(block[q5_1::QH + 2 * i], block[q5_1::QH + 2 * i + 1]);
            joined(bits(&block[q5_1::QS..], 4 * i, 15), high, 4, 0)
        }
        Format::Iq4Nl => looked_up(&IQ4_TABLE, bits(&block[iq4_nl::QS..], 4 * i, 15)),
        Format::Mxfp4 => looked_up(&MXFP4_TABLE, bits(&block[mxfp4::QS..], 4 * i, 15)),
        Format::Q2K => {
            let low = bits(&block[q2_k::QS + 32 * (j / 4) + half..], 2 * (j % 4), 3);
            joined(low, none, 0, 0)
        }
        Format::Q3K => {
            let low = bits(&block[q3_k::QS + 32 * (j / 4) + half..], 2 * (j % 4), 3);
            joined(low, bits(&block[q3_k::HMASK + half..], j, 1), 2, 4)
        }
        Format::Q4K => {
            let low = bits(&block[q4_k::QS + 32 * (j / 2) + half..], 4 * (j % 2), 15);
            joined(low, none, 0, 0)
        }
        Format::Q5K => {
            let low = bits(&block[q5_k::QS + 32 * (j / 2) + half..], 4 * (j % 2), 15);
            joined(low, bits(&block[q5_k::QH + half..], j, 1), 4, 0)
        }
        Format::Q6K => {
            let (n, j) = (j / 4, j % 4);
            let low = bits(&block[q6_k::QL + 64 * n + 32 * (j % 2) + half..], 4 * (j / 2), 15);
            joined(low, bits(&block[q6_k::QH + 32 * n + half..], 2 * j, 3), 4, 32)
        }
        Format::Iq4Xs => {
            looked_up(&IQ4_TABLE, bits(&block[iq4_xs::QS + 16 * j..], 4 * (i % 2), 15))
        }
        _ => unreachable!("not a quantised format"),
    }
}

/// The scale and minimum of each 16 elements of a block of 256.
#[derive(Clone, Copy, Default)]
pub struct SubScales {
    pub scales: [i32; 16],
    pub mins: [i16; 16],
}

pub fn sub_scales<const F: usize>(block: &[u8]) -> SubScales {
    let mut sub = SubScales::default();
    match const { format::<F>() } {
        Format::Q2K => {
            for (i, byte) in block[q2_k::SCALES..q2_k::SCALES + 16].iter().enumerate() {
                sub.scales[i] = i32::from(byte & 15);
                sub.mins[i] = i16::from(byte >> 4);
            }
        }
        Format::Q3K => {
            for (i, scale) in sub.scales.iter_mut().enumerate() {
                let low = block[q3_k::SCALES + i % 8] >> (4 * (i / 8)) & 15;
                let high = block[q3_k::SCALES + 8 + i % 4] >> (2 * (i / 4)) & 3;
                *scale = i32::from(low | high << 4) - 32;
            }
        }
        Format::Q4K | Format::Q5K => {
            let packed = block[q4_k::SCALES..].first_chunk().expect("a whole block");
            for j in 0..8 {
                let (scale, min) = scale_and_min(packed, j);
                sub.scales[2 * j..2 * j + 2].fill(scale.into());
                sub.mins[2 * j..2 * j + 2].fill(min.into());
            }
        }
        Format::Q6K => {
            for (i, byte) in block[q6_k::SCALES..q6_k::SCALES + 16].iter().enumerate() {
                sub.scales[i] = i32::from(*byte as i8);
            }
        }
        Format::Iq4Xs => {
            let high = [block[iq4_xs::SCALES_HIGH], block[iq4_xs::SCALES_HIGH + 1]];
            let high = u16::from_le_bytes(high);
            for j in 0..8 {
                let low = block[iq4_xs::SCALES_LOW + j / 2] >> (4 * (j % 2)) & 15;
                let six = i32::from(low) | i32::from(high >> (2 * j) & 3) << 4;
                sub.scales[2 * j..2 * j + 2].fill(six - 32);
            }
        }
        _ => unreachable!("not a format of 256"),
    }
    sub
}
