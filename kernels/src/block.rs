//! Where the fields of a quantised block are, and its integers.
//!
//! Source: the GGUF specification and the block structures of ggml
//! (`ggml-common.h`), restated as offsets. Everything is little-endian.
//! [`Block::unpack`] is the plain definition; SIMD kernels read the same
//! fields through the offsets given here.

use crate::format::Format;
use half::f16;

/// Blocks of 32 with one scale: f16 `d`, then the elements. Nibble formats
/// keep element `i` in the low nibble of byte `i` and element `i + 16` in
/// its high nibble.
pub mod q8_0 {
    pub const D: usize = 0;
    /// 32 x i8.
    pub const QS: usize = 2;
}

pub mod q4_0 {
    pub const D: usize = 0;
    /// 16 bytes of nibbles, value `w - 8`.
    pub const QS: usize = 2;
}

pub mod q4_1 {
    pub const D: usize = 0;
    /// f16 minimum, added.
    pub const M: usize = 2;
    pub const QS: usize = 4;
}

pub mod q5_0 {
    pub const D: usize = 0;
    /// u32: bit `i` is bit 4 of element `i`; value `w - 16`.
    pub const QH: usize = 2;
    pub const QS: usize = 6;
}

pub mod q5_1 {
    pub const D: usize = 0;
    pub const M: usize = 2;
    pub const QH: usize = 4;
    pub const QS: usize = 8;
}

pub mod iq4_nl {
    pub const D: usize = 0;
    /// 16 bytes of nibbles, indices into [`super::IQ4_TABLE`].
    pub const QS: usize = 2;
}

pub mod mxfp4 {
    /// u8 exponent of the scale ([`super::e8m0_half`]).
    pub const E: usize = 0;
    /// 16 bytes of nibbles, indices into [`super::MXFP4_TABLE`].
    pub const QS: usize = 1;
}

/// 16 sub-blocks of 16.
pub mod q2_k {
    /// 16 bytes: low nibble the scale, high nibble the minimum of a sub-block.
    pub const SCALES: usize = 0;
    /// 64 bytes: element `128 n + 32 j + l` is bits `2j..` of byte `32 n + l`.
    pub const QS: usize = 16;
    pub const D: usize = 80;
    pub const DMIN: usize = 82;
}

/// 16 sub-blocks of 16.
pub mod q3_k {
    /// 32 bytes: bit `4 n + j` of byte `l` is bit 2 of element
    /// `128 n + 32 j + l`; value `w - 4`.
    pub const HMASK: usize = 0;
    /// Two low bits, as in [`super::q2_k::QS`].
    pub const QS: usize = 32;
    /// 12 bytes of 6-bit scales, value `sc - 32`: scale `j` has its low four
    /// bits in nibble `j / 8` of byte `j % 8` and its high two in bits
    /// `2 (j / 4)..` of byte `8 + j % 4`.
    pub const SCALES: usize = 96;
    pub const D: usize = 108;
}

/// 8 sub-blocks of 32.
pub mod q4_k {
    pub const D: usize = 0;
    pub const DMIN: usize = 2;
    /// 12 bytes of 6-bit scales and minimums ([`super::scale_and_min`]).
    pub const SCALES: usize = 4;
    /// 128 bytes: elements `64 j + l` are the low nibbles and `64 j + 32 + l`
    /// the high nibbles of bytes `32 j + l`.
    pub const QS: usize = 16;
}

/// 8 sub-blocks of 32.
pub mod q5_k {
    pub const D: usize = 0;
    pub const DMIN: usize = 2;
    pub const SCALES: usize = 4;
    /// 32 bytes: bit `j` of byte `l` is bit 4 of element `32 j + l`.
    pub const QH: usize = 16;
    /// As in [`super::q4_k::QS`].
    pub const QS: usize = 48;
}

/// 16 sub-blocks of 16.
pub mod q6_k {
    /// 128 bytes: element `128 n + 64 h + 32 j + l` has its low four bits in
    /// nibble `h` of byte `64 n + 32 j + l`.
    pub const QL: usize = 0;
    /// 64 bytes: and its high two in bits `4 h + 2 j..` of byte `32 n + l`;
    /// value `w - 32`.
    pub const QH: usize = 128;
    /// 16 x i8.
    pub const SCALES: usize = 192;
    pub const D: usize = 208;
}

/// 8 sub-blocks of 32.
pub mod iq4_xs {
    pub const D: usize = 0;
    /// u16: bits `2 j..` are the high two bits of scale `j`; value `ls - 32`.
    pub const SCALES_HIGH: usize = 2;
    /// 4 bytes: nibble `j % 2` of byte `j / 2` is the low four bits.
    pub const SCALES_LOW: usize = 4;
    /// Sub-block `j`: 16 bytes from `16 j`, nibbles as in
    /// [`super::iq4_nl::QS`].
    pub const QS: usize = 8;
}

/// The values of the sixteen codes of IQ4_NL and IQ4_XS.
pub const IQ4_TABLE: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the values of the sixteen codes of MXFP4 (E2M1), so that they are
/// integers.
pub const MXFP4_TABLE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half of an E8M0 scale: `2^(e - 128)`, which belongs to the doubled
/// [`MXFP4_TABLE`]. Subnormal for `e < 2`. As in ggml, 255 is no NaN.
pub const fn e8m0_half(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e as u32 - 1) << 23 })
}

/// The 6-bit scale and minimum of sub-block `j` of Q4_K and Q5_K: `packed` is
/// the 12 bytes of their `SCALES`.
pub const fn scale_and_min(packed: &[u8; 12], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let (low, high) = (packed[j + 4], (packed[j - 4] >> 6, packed[j] >> 6));
        ((low & 15) | (high.0 << 4), (low >> 4) | (high.1 << 4))
    }
}

/// The f16 at `at`, as f32.
pub fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// A quantised block as integers and its one or two float scales. With
/// `j = i / sub_len`, element `i` is
/// - `d * scales[j] * weights[i]` without minimums,
/// - `d * scales[j] * weights[i] + min * mins[j]` with [`Minimum::Added`],
/// - `d * scales[j] * weights[i] - min * mins[j]` with
///   [`Minimum::Subtracted`].
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// Elements in use: 32 or 256.
    pub len: usize,
    /// Centred: the format's own offset (8, 16, 4, 32) is already subtracted
    /// and its table already looked up.
    pub weights: [i8; 256],
    /// Elements that share a sub-block scale: 32 or 16.
    pub sub_len: usize,
    /// One for formats without sub-blocks, already centred.
    pub scales: [i8; 16],
    pub mins: [i8; 16],
    pub d: f32,
    /// 0 without minimums.
    pub min: f32,
    pub minimum: Minimum,
}

/// What a format does with its minimums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Minimum {
    None,
    /// Q4_1, Q5_1
    Added,
    /// Q2_K, Q4_K, Q5_K
    Subtracted,
}

impl Block {
    /// Reads one block.
    ///
    /// Panics if `format` is not quantised or `bytes` is not one block long.
    pub fn unpack(format: Format, bytes: &[u8]) -> Block {
        assert_eq!(bytes.len(), format.block_bytes(), "one block of {format}");
        let mut block = Block {
            len: format.block_len(),
            weights: [0; 256],
            sub_len: 32,
            scales: [1; 16],
            mins: [1; 16],
            d: 0.0,
            min: 0.0,
            minimum: Minimum::None,
        };
        match format {
            Format::F32 | Format::F16 | Format::Bf16 => panic!("{format} has no quantised blocks"),
            Format::Q8_0 => {
                block.d = f16_at(bytes, q8_0::D);
                block.fill(|i| bytes[q8_0::QS + i] as i8);
            }
            Format::Q4_0 => {
                block.d = f16_at(bytes, q4_0::D);
                block.fill(|i| nibble(&bytes[q4_0::QS..], i) as i8 - 8);
            }
            Format::Q4_1 => {
                block.d = f16_at(bytes, q4_1::D);
                block.add_minimum(f16_at(bytes, q4_1::M));
                block.fill(|i| nibble(&bytes[q4_1::QS..], i) as i8);
            }
            Format::Q5_0 => {
                block.d = f16_at(bytes, q5_0::D);
                block.fill(|i| five_bits(bytes, q5_0::QH, q5_0::QS, i) as i8 - 16);
            }
            Format::Q5_1 => {
                block.d = f16_at(bytes, q5_1::D);
                block.add_minimum(f16_at(bytes, q5_1::M));
                block.fill(|i| five_bits(bytes, q5_1::QH, q5_1::QS, i) as i8);
            }
            Format::Iq4Nl => {
                block.d = f16_at(bytes, iq4_nl::D);
                block.fill(|i| IQ4_TABLE[nibble(&bytes[iq4_nl::QS..], i) as usize]);
            }
            Format::Mxfp4 => {
                block.d = e8m0_half(bytes[mxfp4::E]);
                block.fill(|i| MXFP4_TABLE[nibble(&bytes[mxfp4::QS..], i) as usize]);
            }
            Format::Q2K => {
                block.d = f16_at(bytes, q2_k::D);
                block.subtract_minimums(f16_at(bytes, q2_k::DMIN));
                block.sub_len = 16;
                for j in 0..16 {
                    block.scales[j] = (bytes[q2_k::SCALES + j] & 15) as i8;
                    block.mins[j] = (bytes[q2_k::SCALES + j] >> 4) as i8;
                }
                block.fill(|i| two_bits(&bytes[q2_k::QS..], i) as i8);
            }
            Format::Q3K => {
                block.d = f16_at(bytes, q3_k::D);
                block.sub_len = 16;
                for j in 0..16 {
                    let low = bytes[q3_k::SCALES + j % 8] >> (4 * (j / 8)) & 15;
                    let high = bytes[q3_k::SCALES + 8 + j % 4] >> (2 * (j / 4)) & 3;
                    block.scales[j] = (low | high << 4) as i8 - 32;
                }
                block.fill(|i| {
                    let high = bytes[q3_k::HMASK + i % 32] >> (i / 32) & 1;
                    (two_bits(&bytes[q3_k::QS..], i) | high << 2) as i8 - 4
                });
            }
            Format::Q4K => {
                block.read_k_scales(bytes);
                block.fill(|i| k_nibble(&bytes[q4_k::QS..], i) as i8);
            }
            Format::Q5K => {
                block.read_k_scales(bytes);
                block.fill(|i| {
                    let high = bytes[q5_k::QH + i % 32] >> (i / 32) & 1;
                    (k_nibble(&bytes[q5_k::QS..], i) | high << 4) as i8
                });
            }
            Format::Q6K => {
                block.d = f16_at(bytes, q6_k::D);
                block.sub_len = 16;
                for j in 0..16 {
                    block.scales[j] = bytes[q6_k::SCALES + j] as i8;
                }
                block.fill(|i| {
                    let (n, h, j, l) = (i / 128, i / 64 % 2, i / 32 % 2, i % 32);
                    let low = bytes[q6_k::QL + 64 * n + 32 * j + l] >> (4 * h) & 15;
                    let high = bytes[q6_k::QH + 32 * n + l] >> (4 * h + 2 * j) & 3;
                    (low | high << 4) as i8 - 32
                });
            }
            Format::Iq4Xs => {
                block.d = f16_at(bytes, iq4_xs::D);
                let high = u16::from_le_bytes([
                    bytes[iq4_xs::SCALES_HIGH],
                    bytes[iq4_xs::SCALES_HIGH + 1],
                ]);
                for j in 0..8 {
                    let low = bytes[iq4_xs::SCALES_LOW + j / 2] >> (4 * (j % 2)) & 15;
                    block.scales[j] = (low | ((high >> (2 * j)) as u8 & 3) << 4) as i8 - 32;
                }
                block.fill(|i| {
                    IQ4_TABLE[nibble(&bytes[iq4_xs::QS + i / 32 * 16..], i % 32) as usize]
                });
            }
        }
        block
    }

    fn fill(&mut self, weight: impl Fn(usize) -> i8) {
        for (i, out) in self.weights[..self.len].iter_mut().enumerate() {
            *out = weight(i);
        }
    }

    fn add_minimum(&mut self, min: f32) {
        self.min = min;
        self.minimum = Minimum::Added;
    }

    fn subtract_minimums(&mut self, min: f32) {
        self.min = min;
        self.minimum = Minimum::Subtracted;
    }

    /// Q4_K and Q5_K, whose first 16 bytes are the same.
    fn read_k_scales(&mut self, bytes: &[u8]) {
        self.d = f16_at(bytes, q4_k::D);
        self.subtract_minimums(f16_at(bytes, q4_k::DMIN));
        let packed = bytes[q4_k::SCALES..].first_chunk().expect("a whole block");
        for j in 0..8 {
            let (scale, min) = scale_and_min(packed, j);
            (self.scales[j], self.mins[j]) = (scale as i8, min as i8);
        }
    }
}

/// Element `i` of 32 in 16 bytes.
fn nibble(qs: &[u8], i: usize) -> u8 {
    qs[i % 16] >> (4 * (i / 16)) & 15
}

fn five_bits(bytes: &[u8], high_at: usize, low_at: usize, i: usize) -> u8 {
    nibble(&bytes[low_at..], i) | (bytes[high_at + i / 8] >> (i % 8) & 1) << 4
}

/// Element `i` of 256 in 64 bytes (Q2_K, Q3_K).
fn two_bits(qs: &[u8], i: usize) -> u8 {
    qs[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3
}

/// Element `i` of 256 in 128 bytes (Q4_K, Q5_K).
fn k_nibble(qs: &[u8], i: usize) -> u8 {
    qs[i / 64 * 32 + i % 32] >> (4 * (i / 32 % 2)) & 15
}
