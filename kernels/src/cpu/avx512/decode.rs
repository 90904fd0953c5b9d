//! Rows of quantised formats times one token: eight blocks at a time, from
//! packed bytes to eight integer block sums, one per float lane.

use super::simd::*;
use crate::block::{self, q2_k, q3_k, q4_k, q5_k, q6_k};
use crate::cpu::kernels::{Activation, Rows};
use crate::format::Format;
use std::arch::x86_64::*;

/// Bytes that the software prefetch runs ahead, into the second-level cache:
/// the hardware's stops at each page, and the first level has too few miss
/// buffers. Measured for Q4_K on two Zen 4 cores, beside a plain read of 37
/// GB/s: 21 without, 21 with 4 KiB into the first level, 30 with 3 KiB into
/// the second, 33 with 6, 23 with 16.
pub const AHEAD: usize = 6 * 1024;

/// The activations of a group of up to eight blocks: `G` times 256 of them
/// (blocks of 256: one for each block; blocks of 32: one for the group).
#[derive(Clone, Copy)]
pub(super) struct Input<'a, const G: usize> {
    pub q: &'a [[Q64; 4]; G],
    pub scales: &'a [f32],
    pub sums16: &'a [i16],
    pub sums32: &'a [i16],
}

impl<'a, const G: usize> Input<'a, G> {
    /// Blocks `at .. at + count` of `len` elements.
    #[inline(always)]
    pub(super) fn new(
        x: &Activation<'a>,
        q: &'a [[Q64; 4]],
        len: usize,
        at: usize,
        count: usize,
    ) -> Self {
        let sums16: &[i16] = if len == 256 { &x.sums16[at * 16..(at + count) * 16] } else { &[] };
        Self {
            q: q[at * len / 256..].first_chunk().expect("activations of every block"),
            scales: &x.scales[at..at + count],
            sums16,
            sums32: &x.sums32[at * (len / 32)..(at + count) * (len / 32)],
        }
    }
}

/// Declares `fn rows`: walks the rows of a format group by group.
macro_rules! walk {
    ($name:ident, $bytes:literal, $len:literal, $order:ident, $group:ident) => {
        walk!(simd, $name, $bytes, $len, $order, $group);
    };
    ($features:ident, $name:ident, $bytes:literal, $len:literal, $order:ident, $group:ident) => {
        $features! {
            pub(super) fn $name(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
                let q = x.$order.as_chunks::<64>().0.as_chunks::<4>().0;
                for (r, out) in out.iter_mut().enumerate() {
                    let (blocks, _) = rows.row(r).as_chunks::<$bytes>();
                    let (full, rest) = blocks.as_chunks::<8>();
                    let mut lanes = _mm256_setzero_ps();
                    for (g, blocks) in full.iter().enumerate() {
                        if $len == 32 {
                            prefetch(blocks.as_ptr().cast(), AHEAD, 8 * $bytes);
                        }
                        lanes = $group(blocks, Input::new(&x, q, $len, 8 * g, 8), lanes);
                    }
                    if $len == 32 {
                        prefetch(rest.as_ptr().cast(), AHEAD, rest.len() * $bytes);
                    }
                    macro_rules! tail {
                        ($n:literal) => {
                            $group::<$n>(
                                rest.first_chunk().expect("length matched"),
                                Input::new(&x, q, $len, 8 * full.len(), $n),
                                lanes,
                            )
                        };
                    }
                    lanes = match rest.len() {
                        0 => lanes,
                        1 => tail!(1),
                        2 => tail!(2),
                        3 => tail!(3),
                        4 => tail!(4),
                        5 => tail!(5),
                        6 => tail!(6),
                        _ => tail!(7),
                    };
                    *out = tree8(lanes);
                }
            }
        }
    };
}
pub(super) use walk;

simd! {
    /// `lanes = fma(d * scale, float(s), lanes)` for the first `N` lanes.
    pub(super) fn add_scaled<const N: usize>(lanes: __m256, d: __m256, scales: &[f32], s: __m256i) -> __m256 {
        let factor = _mm256_mul_ps(d, load_f32x8(scales));
        _mm256_mask3_fmadd_ps(factor, _mm256_cvtepi32_ps(s), lanes, low_bits16(N) as u8)
    }

    /// `lanes = fma(-(dmin * scale), float(t), lanes)`
    fn sub_scaled<const N: usize>(lanes: __m256, m: __m256, scales: &[f32], t: __m256i) -> __m256 {
        let factor = _mm256_mul_ps(m, load_f32x8(scales));
        _mm256_mask3_fnmadd_ps(factor, _mm256_cvtepi32_ps(t), lanes, low_bits16(N) as u8)
    }

    /// f16 at `at` of each block.
    fn factors<const N: usize, const B: usize>(blocks: &[[u8; B]; N], at: usize) -> __m256 {
        // Gathered in general registers, which have nothing else to do.
        let mut words = [0u64; 2];
        for (i, block) in blocks.iter().enumerate() {
            words[i / 4] |= (u16_at(block, at) as u64) << (16 * (i % 4));
        }
        _mm256_cvtph_ps(_mm_set_epi64x(words[1] as i64, words[0] as i64))
    }

    /// 16 bytes from `at` of blocks `first .. first + 4`; zeros where there is
    /// no block.
    fn four<const N: usize, const B: usize>(blocks: &[[u8; B]; N], first: usize, at: usize) -> __m512i {
        let mut parts = [_mm_setzero_si128(); 4];
        for (i, part) in parts.iter_mut().enumerate() {
            if first + i < N {
                *part = load16(bytes_at(&blocks[first + i], at));
            }
        }
        concat(parts)
    }
}

// Formats with blocks of 32.

/// `values + offset`, which is unsigned.
const fn unsigned(values: [i8; 16], offset: i32) -> [u8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = (values[i] as i32 + offset) as u8;
        i += 1;
    }
    out
}

/// IQ4's table, 128 added.
pub const IQ4_UNSIGNED: [u8; 16] = unsigned(block::IQ4_TABLE, 128);
/// MXFP4's doubled table, 16 added.
pub const MXFP4_UNSIGNED: [u8; 16] = unsigned(block::MXFP4_TABLE, 16);

simd! {
    /// Sums of eight groups of 32 activations, times `2^shift`.
    pub(super) fn offsets(sums32: &[i16], shift: u32) -> __m256i {
        let sums = load_i16x8(sums32);
        _mm256_sll_epi32(_mm256_cvtepi16_epi32(sums), _mm_cvtsi32_si128(shift as i32))
    }

    /// Integer sums of blocks whose elements are `low` and `high` bytes of
    /// two registers of four blocks.
    fn nibble_sums(low: [__m512i; 2], high: [__m512i; 2], q: &[Q64; 4], both: bool) -> __m256i {
        let zero = _mm512_setzero_si512();
        let first = _mm512_dpbusd_epi32(zero, low[0], load_q(&q[0]));
        let first = _mm512_dpbusd_epi32(first, high[0], load_q(&q[1]));
        let mut second = zero;
        if both {
            second = _mm512_dpbusd_epi32(second, low[1], load_q(&q[2]));
            second = _mm512_dpbusd_epi32(second, high[1], load_q(&q[3]));
        }
        sum_lanes(first, second)
    }

    /// Low and high nibbles as bytes.
    pub(super) fn nibbles(packed: __m512i) -> (__m512i, __m512i) {
        let mask = _mm512_set1_epi8(15);
        (_mm512_and_si512(packed, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(packed), mask))
    }

    /// Sums of a format whose elements are nibbles from `at`, as they are.
    fn plain_sums<const N: usize, const B: usize>(blocks: &[[u8; B]; N], at: usize, q: &[Q64; 4]) -> __m256i {
        let (low0, high0) = nibbles(four(blocks, 0, at));
        let (low1, high1) = nibbles(four(blocks, 4, at));
        nibble_sums([low0, low1], [high0, high1], q, N > 4)
    }

    /// Sums of a format whose elements are looked up in `table`.
    fn table_sums<const N: usize, const B: usize>(
        blocks: &[[u8; B]; N],
        at: usize,
        table: &[u8; 16],
        q: &[Q64; 4],
    ) -> __m256i {
        let table = _mm512_broadcast_i32x4(load16(table));
        let (low0, high0) = nibbles(four(blocks, 0, at));
        let (low1, high1) = nibbles(four(blocks, 4, at));
        let of = |codes| _mm512_shuffle_epi8(table, codes);
        nibble_sums([of(low0), of(low1)], [of(high0), of(high1)], q, N > 4)
    }

    /// Sums of a format with four low bits from `low_at` and a mask of fifth
    /// bits at `high_at`.
    fn five_bit_sums<const N: usize, const B: usize>(
        blocks: &[[u8; B]; N],
        high_at: usize,
        low_at: usize,
        q: &[Q64; 4],
    ) -> __m256i {
        let sixteen = _mm512_set1_epi8(16);
        let mut low = [_mm512_setzero_si512(); 2];
        let mut high = low;
        for half in 0..2 {
            let (mut low_bits, mut high_bits) = (0u64, 0u64);
            for i in 0..4 {
                if 4 * half + i < N {
                    let bits = u32_at(&blocks[4 * half + i], high_at) as u64;
                    low_bits |= (bits & 0xffff) << (16 * i);
                    high_bits |= (bits >> 16) << (16 * i);
                }
            }
            let (l, h) = nibbles(four(blocks, 4 * half, low_at));
            low[half] = _mm512_mask_add_epi8(l, low_bits, l, sixteen);
            high[half] = _mm512_mask_add_epi8(h, high_bits, h, sixteen);
        }
        nibble_sums(low, high, q, N > 4)
    }

    pub(super) fn q4_0<const N: usize>(blocks: &[[u8; 18]; N], x: Input<'_, 1>, lanes: __m256) -> __m256 {
        let s = plain_sums(blocks, block::q4_0::QS, &x.q[0]);
        let s = _mm256_sub_epi32(s, offsets(x.sums32, 3));
        add_scaled::<N>(lanes, factors(blocks, block::q4_0::D), x.scales, s)
    }

    fn q4_1<const N: usize>(blocks: &[[u8; 20]; N], x: Input<'_, 1>, lanes: __m256) -> __m256 {
        let s = plain_sums(blocks, block::q4_1::QS, &x.q[0]);
        let lanes = add_scaled::<N>(lanes, factors(blocks, block::q4_1::D), x.scales, s);
        add_scaled::<N>(lanes, factors(blocks, block::q4_1::M), x.scales, offsets(x.sums32, 0))
    }

    fn q5_0<const N: usize>(blocks: &[[u8; 22]; N], x: Input<'_, 1>, lanes: __m256) -> __m256 {
        let s = five_bit_sums(blocks, block::q5_0::QH, block::q5_0::QS, &x.q[0]);
        let s = _mm256_sub_epi32(s, offsets(x.sums32, 4));
        add_scaled::<N>(lanes, factors(blocks, block::q5_0::D), x.scales, s)
    }

    fn q5_1<const N: usize>(blocks: &[[u8; 24]; N], x: Input<'_, 1>, lanes: __m256) -> __m256 {
        let s = five_bit_sums(blocks, block::q5_1::QH, block::q5_1::QS, &x.q[0]);
        let lanes = add_scaled::<N>(lanes, factors(blocks, block::q5_1::D), x.scales, s);
        add_scaled::<N>(lanes, factors(blocks, block::q5_1::M), x.scales, offsets(x.sums32, 0))
    }

    pub(super) fn iq4_nl<const N: usize>(blocks: &[[u8; 18]; N], x: Input<'_, 1>, lanes: __m256) -> __m256 {
        let s = table_sums(blocks, block::iq4_nl::QS, &IQ4_UNSIGNED, &x.q[0]);
        let s = _mm256_sub_epi32(s, offsets(x.sums32, 7));
        add_scaled::<N>(lanes, factors(blocks, block::iq4_nl::D), x.scales, s)
    }

    /// `2^(e - 128)` of eight exponents of 32 bits.
    pub(super) fn mxfp4_factors(e: __m256i) -> __m256 {
        let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, _mm256_set1_epi32(1)));
        let tiny = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), e);
        let is_tiny = _mm256_cmplt_epu32_mask(e, _mm256_set1_epi32(2));
        _mm256_castsi256_ps(_mm256_mask_mov_epi32(normal, is_tiny, tiny))
    }

    pub(super) fn mxfp4<const N: usize>(blocks: &[[u8; 17]; N], x: Input<'_, 1>, lanes: __m256) -> __m256 {
        let s = table_sums(blocks, block::mxfp4::QS, &MXFP4_UNSIGNED, &x.q[0]);
        let s = _mm256_sub_epi32(s, offsets(x.sums32, 4));
        let mut e = 0;
        for (i, block) in blocks.iter().enumerate() {
            e |= (block[block::mxfp4::E] as u64) << (8 * i);
        }
        let e = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(e as i64));
        add_scaled::<N>(lanes, mxfp4_factors(e), x.scales, s)
    }

    fn q8_0<const N: usize>(blocks: &[[u8; 34]; N], x: Input<'_, 1>, lanes: __m256) -> __m256 {
        let sign = _mm512_set1_epi8(-128);
        let zero = _mm512_setzero_si512();
        let mut sums = [zero; 4];
        for (i, sum) in sums.iter_mut().enumerate() {
            if 2 * i >= N {
                break;
            }
            let first = load32(bytes_at(&blocks[2 * i], block::q8_0::QS));
            let (w, q) = if 2 * i + 1 < N {
                let second = load32(bytes_at(&blocks[2 * i + 1], block::q8_0::QS));
                let w = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second);
                (w, load_q(&x.q[0][i]))
            } else {
                (_mm512_zextsi256_si512(first), load_q(&x.q[0][i]))
            };
            *sum = _mm512_dpbusd_epi32(zero, _mm512_xor_si512(w, sign), q);
        }
        let v = fold_quads(fold_pairs(sums[0], sums[1]), fold_pairs(sums[2], sums[3]));
        let v = _mm512_add_epi32(v, _mm512_shuffle_i32x4::<0b10_11_00_01>(v, v));
        let order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0);
        let s = _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, v));
        let s = _mm256_sub_epi32(s, offsets(x.sums32, 7));
        add_scaled::<N>(lanes, factors(blocks, block::q8_0::D), x.scales, s)
    }
}

// Formats with blocks of 256. Products of an unsigned weight below 64 and an
// int8 activation are added in pairs without saturation (2 * 63 * 127 fits 16
// bits), then multiplied by the sub-block's 16-bit scale and accumulated.

/// Which bytes of the eight 16-bit scales of a block go to the lower and the
/// upper 256 bits, for registers with sub-blocks `[a, b]` of 32.
const fn spread(a: i32, b: i32) -> [i32; 16] {
    let a = ((2 * a) | (2 * a + 1) << 8) * 0x1_0001;
    let b = ((2 * b) | (2 * b + 1) << 8) * 0x1_0001;
    [a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b]
}

const K4_SPREADS: [[i32; 16]; 4] = [spread(0, 2), spread(1, 3), spread(4, 6), spread(5, 7)];

/// Which of a block's eight scales each 32-bit element of four sub-blocks is
/// multiplied by.
const IQ4_SPREADS: [[i32; 16]; 2] = [
    [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3],
    [4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7],
];

simd! {
    /// Headers of four blocks of Q4_K or Q5_K to eight scales and eight
    /// minimums of 16 bits in each 128-bit lane.
    fn k4_scales(header: __m512i) -> (__m512i, __m512i) {
        let byte = |a: i32, b: i32, c: i32, d: i32| _mm512_set4_epi32(d, c, b, a);
        let low = _mm512_shuffle_epi32::<0b11_10_11_01>(header);
        let low = _mm512_srlv_epi32(low, byte(0, 0, 0, 4));
        let low = _mm512_and_si512(low, byte(0x3f3f_3f3f, 0x0f0f_0f0f, 0x3f3f_3f3f, 0x0f0f_0f0f));
        let high = _mm512_srli_epi32::<2>(_mm512_shuffle_epi32::<0b10_00_01_00>(header));
        let high = _mm512_and_si512(high, byte(0, 0x3030_3030, 0, 0x3030_3030));
        let all = _mm512_or_si512(low, high);
        let zero = _mm512_setzero_si512();
        (_mm512_unpacklo_epi8(all, zero), _mm512_unpackhi_epi8(all, zero))
    }

    /// `d` and `dmin` from the headers of eight blocks.
    fn k4_factors(headers: [__m512i; 2]) -> (__m256, __m256) {
        let order = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
        let both = _mm512_permutex2var_epi32(headers[0], order, headers[1]);
        let both = _mm512_castsi512_si256(both);
        let d = _mm256_cvtepi32_epi16(both);
        let m = _mm256_cvtepi32_epi16(_mm256_srli_epi32::<16>(both));
        (_mm256_cvtph_ps(d), _mm256_cvtph_ps(m))
    }

    /// `acc + (products of w and q, pair by pair) * scales`
    fn multiply(acc: __m512i, w: __m512i, q: __m512i, scales: __m512i) -> __m512i {
        dpwssd(acc, _mm512_maddubs_epi16(w, q), scales)
    }

    /// `_mm512_dpwssd_epi32`, which LLVM would take apart into a
    /// multiplication and an addition for a shorter chain; here throughput
    /// counts.
    fn dpwssd(mut acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: one instruction on registers, without memory or flags; the
        // feature is enabled for this function.
        unsafe {
            std::arch::asm!(
                "vpdpwssd {acc}, {a}, {b}",
                acc = inout(zmm_reg) acc,
                a = in(zmm_reg) a,
                b = in(zmm_reg) b,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        acc
    }

    /// Lane `i` of four in all lanes.
    fn broadcast_lane(x: __m512i, i: usize) -> __m512i {
        match i {
            0 => _mm512_shuffle_i32x4::<0x00>(x, x),
            1 => _mm512_shuffle_i32x4::<0x55>(x, x),
            2 => _mm512_shuffle_i32x4::<0xaa>(x, x),
            _ => _mm512_shuffle_i32x4::<0xff>(x, x),
        }
    }

    fn k4_group<const N: usize, const B: usize, const FIVE: bool>(
        blocks: &[[u8; B]; N],
        x: Input<'_, N>,
        lanes: __m256,
    ) -> __m256 {
        let headers = [four(blocks, 0, q4_k::D), four(blocks, 4, q4_k::D)];
        let (scales0, mins0) = k4_scales(headers[0]);
        let (scales1, mins1) = k4_scales(headers[1]);
        let zero = _mm512_setzero_si512();
        let mut sums = [zero; 8];
        let sixteen = _mm512_set1_epi8(16);
        for (i, block) in blocks.iter().enumerate() {
            prefetch(block.as_ptr(), AHEAD, block.len());
            let scales = broadcast_lane(if i < 4 { scales0 } else { scales1 }, i % 4);
            let mut acc = zero;
            let fifth = if FIVE {
                _mm512_broadcast_i64x4(load32(bytes_at(block, q5_k::QH)))
            } else {
                zero
            };
            for half in 0..2 {
                let at = if FIVE { q5_k::QS } else { q4_k::QS };
                let (mut low, mut high) = nibbles(load64(bytes_at(block, at + 64 * half)));
                if FIVE {
                    let bit = |a: u8| {
                        let (a, b) = (1u8 << (4 * half as u8 + a), 1u8 << (4 * half as u8 + a + 2));
                        let a = _mm512_castsi256_si512(_mm256_set1_epi8(a as i8));
                        _mm512_inserti64x4::<1>(a, _mm256_set1_epi8(b as i8))
                    };
                    low = _mm512_mask_add_epi8(low, _mm512_test_epi8_mask(fifth, bit(0)), low, sixteen);
                    high = _mm512_mask_add_epi8(high, _mm512_test_epi8_mask(fifth, bit(1)), high, sixteen);
                }
                let spread = |k: usize| _mm512_shuffle_epi8(scales, load_i32x16(&K4_SPREADS[2 * half + k]));
                acc = multiply(acc, low, load_q(&x.q[i][2 * half]), spread(0));
                acc = multiply(acc, high, load_q(&x.q[i][2 * half + 1]), spread(1));
            }
            sums[i] = acc;
        }
        let (first, second) = x.sums32.split_at(8 * N.min(4));
        let t0 = _mm512_madd_epi16(mins0, load_i16(first));
        let t1 = if N > 4 { _mm512_madd_epi16(mins1, load_i16(second)) } else { zero };
        let (d, m) = k4_factors(headers);
        let lanes = add_scaled::<N>(lanes, d, x.scales, sum_each(sums));
        sub_scaled::<N>(lanes, m, x.scales, sum_lanes(t0, t1))
    }

    fn q4_k<const N: usize>(blocks: &[[u8; 144]; N], x: Input<'_, N>, lanes: __m256) -> __m256 {
        k4_group::<N, 144, false>(blocks, x, lanes)
    }

    fn q5_k<const N: usize>(blocks: &[[u8; 176]; N], x: Input<'_, N>, lanes: __m256) -> __m256 {
        k4_group::<N, 176, true>(blocks, x, lanes)
    }

    /// 16-bit scales `order` of a block's sixteen, eight times each.
    fn spread16(scales: __m256i, order: [i16; 4]) -> __m512i {
        let order = _mm512_inserti64x4::<1>(
            _mm512_castsi256_si512(_mm256_set_m128i(_mm_set1_epi16(order[1]), _mm_set1_epi16(order[0]))),
            _mm256_set_m128i(_mm_set1_epi16(order[3]), _mm_set1_epi16(order[2])),
        );
        _mm512_permutexvar_epi16(order, _mm512_castsi256_si512(scales))
    }

    /// `acc - 2^SHIFT * sum_j scale_j * sum16_j`
    fn subtract_offsets<const SHIFT: i32>(acc: __m512i, scales: __m256i, sums16: &[i16]) -> __m512i {
        let sums = _mm512_castsi512_si256(load_i16(sums16));
        let offset = _mm256_slli_epi32::<SHIFT>(_mm256_madd_epi16(scales, sums));
        _mm512_sub_epi32(acc, _mm512_zextsi256_si512(offset))
    }

    fn halves_of(low: __m256i, high: __m256i) -> __m512i {
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    }

    fn q6_k<const N: usize>(blocks: &[[u8; 210]; N], x: Input<'_, N>, lanes: __m256) -> __m256 {
        let zero = _mm512_setzero_si512();
        let mut sums = [zero; 8];
        let left = halves_of(_mm256_set1_epi16(4), _mm256_set1_epi16(2));
        let right = halves_of(_mm256_set1_epi16(0), _mm256_set1_epi16(2));
        let high_mask = _mm512_set1_epi8(0x30);
        for (i, block) in blocks.iter().enumerate() {
            prefetch(block.as_ptr(), AHEAD, block.len());
            let scales = _mm256_cvtepi8_epi16(load16(bytes_at(block, q6_k::SCALES)));
            let mut acc = zero;
            for half in 0..2 {
                let (low, high) = nibbles(load64(bytes_at(block, q6_k::QL + 64 * half)));
                let top = _mm512_broadcast_i64x4(load32(bytes_at(block, q6_k::QH + 32 * half)));
                let low_top = _mm512_and_si512(_mm512_sllv_epi16(top, left), high_mask);
                let high_top = _mm512_and_si512(_mm512_srlv_epi16(top, right), high_mask);
                let j = 8 * half as i16;
                let low = _mm512_or_si512(low, low_top);
                let high = _mm512_or_si512(high, high_top);
                acc = multiply(acc, low, load_q(&x.q[i][2 * half]), spread16(scales, [j, j + 1, j + 2, j + 3]));
                let order = [j + 4, j + 5, j + 6, j + 7];
                acc = multiply(acc, high, load_q(&x.q[i][2 * half + 1]), spread16(scales, order));
            }
            sums[i] = subtract_offsets::<5>(acc, scales, &x.sums16[16 * i..16 * i + 16]);
        }
        add_scaled::<N>(lanes, factors(blocks, q6_k::D), x.scales, sum_each(sums))
    }

    /// The two low bits at `2 * j` of 64 bytes.
    fn crumbs(packed: __m512i, j: u32) -> __m512i {
        let shifted = _mm512_srl_epi16(packed, _mm_cvtsi32_si128(2 * j as i32));
        _mm512_and_si512(shifted, _mm512_set1_epi8(3))
    }

    fn q2_k<const N: usize>(blocks: &[[u8; 84]; N], x: Input<'_, N>, lanes: __m256) -> __m256 {
        let zero = _mm512_setzero_si512();
        let (mut sums, mut mins) = ([zero; 8], [zero; 8]);
        for (i, block) in blocks.iter().enumerate() {
            prefetch(block.as_ptr(), AHEAD, block.len());
            let packed = load16(bytes_at(block, q2_k::SCALES));
            let mask = _mm_set1_epi8(15);
            let scales = _mm256_cvtepu8_epi16(_mm_and_si128(packed, mask));
            let m = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16::<4>(packed), mask));
            let codes = load64(bytes_at(block, q2_k::QS));
            let mut acc = zero;
            for j in 0..4 {
                let k = 2 * j as i16;
                let spread = spread16(scales, [k, k + 1, k + 8, k + 9]);
                let q = load_q(&x.q[i][j]);
                acc = multiply(acc, crumbs(codes, j as u32), q, spread);
            }
            sums[i] = acc;
            let sums16 = _mm512_castsi512_si256(load_i16(&x.sums16[16 * i..16 * i + 16]));
            mins[i] = _mm512_zextsi256_si512(_mm256_madd_epi16(m, sums16));
        }
        let lanes = add_scaled::<N>(lanes, factors(blocks, q2_k::D), x.scales, sum_each(sums));
        sub_scaled::<N>(lanes, factors(blocks, q2_k::DMIN), x.scales, sum_each(mins))
    }

    /// Q3_K's sixteen 6-bit scales, 32 subtracted.
    pub fn q3_k_scales(block: &[u8; 110]) -> __m128i {
        let a = u32_at(block, q3_k::SCALES);
        let b = u32_at(block, q3_k::SCALES + 4);
        let c = u32_at(block, q3_k::SCALES + 8);
        const LOW: u32 = 0x0f0f_0f0f;
        const HIGH: u32 = 0x3030_3030;
        let packed = _mm_setr_epi32(
            (a & LOW | (c << 4) & HIGH) as i32,
            (b & LOW | (c << 2) & HIGH) as i32,
            ((a >> 4) & LOW | c & HIGH) as i32,
            ((b >> 4) & LOW | (c >> 2) & HIGH) as i32,
        );
        _mm_sub_epi8(packed, _mm_set1_epi8(32))
    }

    fn q3_k<const N: usize>(blocks: &[[u8; 110]; N], x: Input<'_, N>, lanes: __m256) -> __m256 {
        let zero = _mm512_setzero_si512();
        let mut sums = [zero; 8];
        let four = _mm512_set1_epi8(4);
        for (i, block) in blocks.iter().enumerate() {
            prefetch(block.as_ptr(), AHEAD, block.len());
            let scales = _mm256_cvtepi8_epi16(q3_k_scales(block));
            let codes = load64(bytes_at(block, q3_k::QS));
            let third = _mm512_broadcast_i64x4(load32(bytes_at(block, q3_k::HMASK)));
            let mut acc = zero;
            for j in 0..4 {
                let bit = |shift: usize| _mm256_set1_epi8((1u8 << shift) as i8);
                let is_set = _mm512_test_epi8_mask(third, halves_of(bit(j), bit(j + 4)));
                let w = crumbs(codes, j as u32);
                let w = _mm512_mask_add_epi8(w, is_set, w, four);
                let k = 2 * j as i16;
                let spread = spread16(scales, [k, k + 1, k + 8, k + 9]);
                acc = multiply(acc, w, load_q(&x.q[i][j]), spread);
            }
            sums[i] = subtract_offsets::<2>(acc, scales, &x.sums16[16 * i..16 * i + 16]);
        }
        add_scaled::<N>(lanes, factors(blocks, q3_k::D), x.scales, sum_each(sums))
    }

    /// IQ4_XS's eight 6-bit scales, 32 subtracted.
    pub fn iq4_xs_scales(block: &[u8; 136]) -> __m128i {
        let low = _mm_cvtsi32_si128(u32_at(block, block::iq4_xs::SCALES_LOW) as i32);
        let mask = _mm_set1_epi8(15);
        let even = _mm_and_si128(low, mask);
        let odd = _mm_and_si128(_mm_srli_epi16::<4>(low), mask);
        let low = _mm_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd));
        let high = _mm_set1_epi16(u16_at(block, block::iq4_xs::SCALES_HIGH) as i16);
        let high = _mm_srlv_epi16(high, _mm_setr_epi16(0, 2, 4, 6, 8, 10, 12, 14));
        let high = _mm_slli_epi16::<4>(_mm_and_si128(high, _mm_set1_epi16(3)));
        _mm_sub_epi16(_mm_or_si128(low, high), _mm_set1_epi16(32))
    }

    fn iq4_xs<const N: usize>(blocks: &[[u8; 136]; N], x: Input<'_, N>, lanes: __m256) -> __m256 {
        let zero = _mm512_setzero_si512();
        let mut sums = [zero; 8];
        let table = _mm512_broadcast_i32x4(load16(&IQ4_UNSIGNED));
        for (i, block) in blocks.iter().enumerate() {
            prefetch(block.as_ptr(), AHEAD, block.len());
            let scales16 = iq4_xs_scales(block);
            let scales = _mm512_castsi256_si512(_mm256_cvtepi16_epi32(scales16));
            let mut acc = zero;
            for half in 0..2 {
                let (low, high) = nibbles(load64(bytes_at(block, block::iq4_xs::QS + 64 * half)));
                let dot = _mm512_dpbusd_epi32(zero, _mm512_shuffle_epi8(table, low), load_q(&x.q[i][2 * half]));
                let dot = _mm512_dpbusd_epi32(dot, _mm512_shuffle_epi8(table, high), load_q(&x.q[i][2 * half + 1]));
                let spread = _mm512_permutexvar_epi32(load_i32x16(&IQ4_SPREADS[half]), scales);
                acc = _mm512_add_epi32(acc, _mm512_mullo_epi32(dot, spread));
            }
            let sums32 = _mm512_castsi512_si128(load_i16(&x.sums32[8 * i..8 * i + 8]));
            let offset = _mm_slli_epi32::<7>(_mm_madd_epi16(scales16, sums32));
            sums[i] = _mm512_sub_epi32(acc, _mm512_zextsi128_si512(offset));
        }
        add_scaled::<N>(lanes, factors(blocks, block::iq4_xs::D), x.scales, sum_each(sums))
    }
}

walk!(q8_0_rows, 34, 32, own, q8_0);
walk!(q4_0_rows, 18, 32, own, q4_0);
walk!(q4_1_rows, 20, 32, own, q4_1);
walk!(q5_0_rows, 22, 32, own, q5_0);
walk!(q5_1_rows, 24, 32, own, q5_1);
walk!(iq4_nl_rows, 18, 32, own, iq4_nl);
walk!(mxfp4_rows, 17, 32, own, mxfp4);
walk!(q2_k_rows, 84, 256, own, q2_k);
walk!(q3_k_rows, 110, 256, own, q3_k);
walk!(q4_k_rows, 144, 256, own, q4_k);
walk!(q5_k_rows, 176, 256, own, q5_k);
walk!(q6_k_rows, 210, 256, q, q6_k);
walk!(iq4_xs_rows, 136, 256, own, iq4_xs);

simd! {
    pub fn rows(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
        match rows.format {
            Format::F32 | Format::F16 | Format::Bf16 => super::float::rows(rows, x.x, out),
            Format::Q8_0 => q8_0_rows(rows, x, out),
            Format::Q4_0 => q4_0_rows(rows, x, out),
            Format::Q4_1 => q4_1_rows(rows, x, out),
            Format::Q5_0 => q5_0_rows(rows, x, out),
            Format::Q5_1 => q5_1_rows(rows, x, out),
            Format::Iq4Nl => iq4_nl_rows(rows, x, out),
            Format::Mxfp4 => mxfp4_rows(rows, x, out),
            Format::Q2K => q2_k_rows(rows, x, out),
            Format::Q3K => q3_k_rows(rows, x, out),
            Format::Q4K => q4_k_rows(rows, x, out),
            Format::Q5K => q5_k_rows(rows, x, out),
            Format::Q6K => q6_k_rows(rows, x, out),
            Format::Iq4Xs => iq4_xs_rows(rows, x, out),
        }
    }
}
